"""Formulas as Python expressions: their values, and their slips.

A slip is a formula with one small change: a term, factor or power left out, an operation or
function exchanged for its counterpart, a bracket moved, another name, another number. Slips are
made from the formula alone, so that every formula of the table has wrong forms to be compared with.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from functools import cache
from types import CodeType
from typing import Any, TypeVar

import numpy as np

from crosscheck.trace import Array

Tree = TypeVar("Tree", bound=ast.AST)
Slip = tuple[str, str]  # in words, and the wrong formula


class Mechanical(str):
    """The words for a slip; a wrong form with a name of its own says more."""

    __slots__ = ()


LONGEST_PART = 32  # characters of a part of a formula that is quoted
SWAPS: dict[type, type] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
}  # fmt: skip
COUNTERPARTS = {"mean": "sum", "sum": "mean", "exp": "log", "log": "exp"}


@cache
def _compiled(formula: str) -> CodeType:
    return compile(formula, formula, "eval")


def value(formula: str, names: Mapping[str, Any]) -> Array:
    """The value of a formula whose names stand for these numbers and functions."""
    result: Array = np.asarray(eval(_compiled(formula), {"__builtins__": {}}, dict(names)))
    return result


def values(forms: Mapping[str, str], names: Mapping[str, Any]) -> Iterator[tuple[str, Array]]:
    """The words and the value of each formula."""
    for words, formula in forms.items():
        yield words, value(formula, names)


def slipped(
    formula: str, names: Mapping[str, Any], others: Mapping[str, Sequence[str]] | None = None
) -> Iterator[tuple[str, Array]]:
    """The words and the value of each slip of a formula; `others` as in `slips`."""
    for words, wrong in slips(formula, others or {}):
        try:
            yield Mechanical(words), value(wrong, names)
        except (NameError, ZeroDivisionError, ValueError, OverflowError):
            continue


def slips(formula: str, others: Mapping[str, Sequence[str]] | None = None) -> list[Slip]:
    """The slips of a formula.

    others    for a name, the names and formulas that are likely to be written in its place
    """
    tree = ast.parse(formula, mode="eval").body
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        for words, changed in _changes(node):
            found.setdefault(ast.unparse(_replaced(tree, node, changed)), words)
        for other in (others or {}).get(node.id, ()) if isinstance(node, ast.Name) else ():
            wrong = ast.unparse(_replaced(tree, node, ast.parse(other, mode="eval").body))
            found.setdefault(wrong, f"{wrong} in place of {formula}")
    for words, changed in _numbers_everywhere(tree):
        found.setdefault(ast.unparse(changed), words)
    found.pop(ast.unparse(tree), None)
    return [(words, wrong) for wrong, words in found.items()]


def _changes(node: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    """The slips at one part of a formula, in words and as the new part."""
    if isinstance(node, ast.BinOp):
        yield from _without_a_side(node)
        if type(node.op) in SWAPS:
            other = ast.BinOp(node.left, SWAPS[type(node.op)](), node.right)
            yield f"{_short(other)} in place of {_short(node)}", other
        yield from _regrouped(node)
    elif isinstance(node, ast.UnaryOp):
        yield f"the sign of {_short(node.operand)}", node.operand
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        (inner,) = node.args
        yield f"{node.func.id} is left out of {_short(node)}", inner
        if node.func.id in COUNTERPARTS:
            other_call = ast.Call(ast.Name(COUNTERPARTS[node.func.id]), [inner], [])
            yield f"{_short(other_call)} in place of {_short(node)}", other_call
        if isinstance(inner, ast.BinOp):
            of_left, of_right = (ast.Call(node.func, [x], []) for x in (inner.left, inner.right))
            for moved in (
                ast.BinOp(of_left, inner.op, inner.right),
                ast.BinOp(inner.left, inner.op, of_right),
            ):
                yield f"{_short(moved)} in place of {_short(node)}", moved
    elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        for other_number in _other_numbers(node.value):
            constant = ast.Constant(other_number)
            yield f"{other_number:.9g} in place of {_short(node)}", constant


def _without_a_side(node: ast.BinOp) -> Iterator[tuple[str, ast.expr]]:
    """The operation with one of its operands left out."""
    kinds: dict[type, str] = {ast.Mult: "factor", ast.Div: "factor", ast.Pow: "power"}
    word = kinds.get(type(node.op), "term")
    if word != "power":
        neutral = ast.Constant(0 if word == "term" else 1)
        plain = isinstance(node.op, (ast.Add, ast.Mult))
        without = node.right if plain else ast.BinOp(neutral, node.op, node.right)
        yield f"the {word} {_short(node.left)} is left out of {_short(node)}", without
    yield f"the {word} {_short(node.right)} is left out of {_short(node)}", node.left


def _regrouped(node: ast.BinOp) -> Iterator[tuple[str, ast.expr]]:
    """Two operations in a row, with the brackets around another pair of their operands."""
    made = []
    if isinstance(node.left, ast.BinOp):  # (a . b) : c
        a, b, c, own = node.left.left, node.left.right, node.right, node.left.op
        made += [
            ast.BinOp(a, own, ast.BinOp(b, node.op, c)),
            ast.BinOp(ast.BinOp(a, node.op, c), own, b),
        ]
    if isinstance(node.right, ast.BinOp):  # a . (b : c)
        a, b, c, own = node.left, node.right.left, node.right.right, node.right.op
        made += [ast.BinOp(ast.BinOp(a, node.op, b), own, c)]
    for other in made:
        yield f"{_short(other)} in place of {_short(node)}", other


def _other_numbers(number: float) -> list[float]:
    """Numbers that are likely to be written for a number: rounded, cut off, or multiples of it."""
    others = {round(number, places) for places in range(1, 6)}
    others |= {int(number * 10**places) / 10**places for places in range(1, 6)}
    others |= {number / 3, number * 3, number * 2, number / 2, number + 1, number * 10, -number}
    return sorted({round(other, 9) for other in others} - {number})


def _numbers_everywhere(tree: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    """The formula with a number that occurs more than once changed wherever it occurs."""
    numbers = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    for number in {x for x in numbers if isinstance(x, (int, float)) and numbers.count(x) > 1}:
        for other in (number - 1, number + 1, number / 2, number * 2):
            changed = deepcopy(tree)
            for node in ast.walk(changed):
                if isinstance(node, ast.Constant) and node.value == number:
                    node.value = other
            yield f"{other:g} in place of {number:g}, everywhere", changed


def _replaced(tree: Tree, node: ast.AST, by: ast.expr) -> Tree:
    """A copy of the formula in which one part is exchanged."""
    return deepcopy(tree, {id(node): by})


def _short(node: ast.AST) -> str:
    """The source of a part of a formula; in a long one, inner parts are replaced by dots."""
    while len(ast.unparse(node)) > LONGEST_PART:
        parts = [x for x in ast.walk(node) if isinstance(x, (ast.BinOp, ast.Call))]
        cut = [_replaced(node, part, ast.Name("..")) for part in parts if part is not node]
        if not cut:
            break
        by_length = sorted(cut, key=lambda x: len(ast.unparse(x)))
        fits = [x for x in by_length if len(ast.unparse(x)) <= LONGEST_PART]
        node = (fits or by_length[:1])[-1]
    return ast.unparse(node)
