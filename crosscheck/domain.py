"""Domain mutants: sources with one mistake that people make in models, at each place in turn.

A factor or a term is dropped, two tensors of equal shape are exchanged, a matrix or the axes of a
product are transposed, a sum runs over another axis or becomes a mean.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from itertools import pairwise

from microgpt.taps import AXES

FILES = (
    "vectorized/model.py",
    "vectorized/adam.py",
    "vectorized/sample.py",
    "scalar/model.py",
    "scalar/adam.py",
    "scalar/sample.py",
)
CALLS = {"total": "mean", "mean": "total", "sum": "mean", "max": "min", "min": "max"}


def mutations(source: str, lists: bool) -> Iterator[tuple[str, str]]:
    """The mistake in words and the source with it, for every mutant of a source.

    All mutants can be compiled; some compute the same as the source.

    lists    whether the source has matrices as lists of rows, and not as arrays
    """
    transposed = "list(zip(*{}))" if lists else "{}.T"
    tree = ast.parse(source)
    shapes = _shapes_of_locals(source)
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        for statement in function.body:
            for node in ast.walk(statement):
                for what, new in _changes(node, shapes.get(function.name, {}), transposed):
                    yield what, _replaced(source, node, new)


def _changes(node: ast.AST, shapes: dict[str, str], transposed: str) -> Iterator[tuple[str, str]]:
    """The mistake in words and the text that replaces a node, for every mistake at the node."""
    match node:
        case ast.BinOp(left, ast.Mult() | ast.Div() | ast.Pow() | ast.MatMult() as op, right):
            yield "a factor dropped", ast.unparse(left)
            if isinstance(op, (ast.Mult, ast.MatMult)):
                yield "a factor dropped", ast.unparse(right)
        case ast.BinOp(left, ast.Add() | ast.Sub(), right):
            yield "a term dropped", ast.unparse(left)
            yield "a term dropped", ast.unparse(right)
        case ast.AugAssign(target, op, value):
            place, number = ast.unparse(target), ast.unparse(value)
            yield "a term dropped", f"{place} = {number}"
            yield "a term dropped", "pass"
        case ast.Call(function, [*arguments]):
            for i, (a, b) in enumerate(pairwise(arguments)):
                plain = (ast.Name, ast.Attribute)
                if isinstance(a, plain) and isinstance(b, plain):
                    order = [*arguments[:i], b, a, *arguments[i + 2 :]]
                    yield "tensors exchanged", ast.unparse(ast.Call(function, order, node.keywords))
            called = getattr(function, "attr", getattr(function, "id", ""))
            if called in CALLS:
                text = ast.unparse(node)
                yield "another sum", re.sub(rf"\b{called}\(", f"{CALLS[called]}(", text, count=1)
        case ast.keyword("axis", value):
            others = [axis for axis in ("-2", "-1", "0", "1") if axis != ast.unparse(value)]
            yield from (("another axis", f"axis={axis}") for axis in others)
        case ast.Constant(str(letters)) if re.fullmatch(r"[a-z]+(,[a-z]+)*->[a-z]*", letters):
            for i, (one, two) in enumerate(pairwise(letters)):
                if one.isalpha() and two.isalpha():
                    yield "axes transposed", repr(letters[:i] + two + one + letters[i + 2 :])
        case ast.Attribute(value, "T"):
            yield "not transposed", ast.unparse(value)
        case ast.Attribute(ast.Name(of), name, ast.Load()) if name in AXES and of != "config":
            yield "transposed", transposed.format(f"{of}.{name}")
            for other in AXES:
                if other != name and AXES[other] == AXES[name]:
                    yield "tensors exchanged", f"{of}.{other}"
        case ast.Name(name, ast.Load()) if name in shapes:
            if shapes[name].count(",") == 1:
                yield "transposed", transposed.format(name)
            for other, shape in shapes.items():
                if other != name and shape == shapes[name]:
                    yield "tensors exchanged", other


def _shapes_of_locals(source: str) -> dict[str, dict[str, str]]:
    """By function, the local names and the shape that the comment on their line gives."""
    shapes: dict[str, dict[str, str]] = {}
    function = ""
    for line in source.splitlines():
        if found := re.match(r"def (\w+)", line):
            function = found[1]
        elif found := re.match(r" +([\w, ]+) = .*#[^#]*?((?:[\[(][^\])]*[\])])+)$", line):
            names = found[1].split(", ")
            if len(names) == 1:
                shapes.setdefault(function, {})[names[0]] = found[2]
    return shapes


def _replaced(source: str, node: ast.AST, new: str) -> str:
    """The source with another text in the place of a node, in brackets for an expression."""
    old = ast.get_source_segment(source, node)
    assert old is not None
    before = source.splitlines(keepends=True)[: node.lineno - 1]  # type: ignore[attr-defined]
    start = len("".join(before)) + node.col_offset  # type: ignore[attr-defined]
    text = f"({new})" if isinstance(node, ast.expr) else new
    return source[:start] + text + source[start + len(old) :]
