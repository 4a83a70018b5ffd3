"""The lines of both texts that compute a tensor, found by the tensor's name in their source."""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from crosscheck.trace import split_key
from microgpt.cli.whereabouts import IMPLEMENTATIONS, imported_from
from microgpt.config import Config
from microgpt.taps import consumers

# by phase: the names in `adam` that hold a tensor, and the trees of taps or gradients that hold it
ADAM = {"adam_m": ("m",), "adam_v": ("v",), "update": ("p", "params"), "params": ("p", "params")}
TREES = {"forward": ("tap",), "backward": ("dtap",), "gradient": ("dw", "dparams")}
LONGEST_LINE = 100  # characters of a line that are quoted


class Found(NamedTuple):
    """A statement of a text."""

    file: str  # "vectorized/model.py"
    function: ast.FunctionDef
    statement: ast.stmt

    def __str__(self) -> str:
        words = " ".join((ast.get_source_segment(_source(self.file), self.statement) or "").split())
        words = words if len(words) <= LONGEST_LINE else f"{words[:LONGEST_LINE]}.."
        return f"{self.file}:{self.statement.lineno} {words}"


def lines_of(key: str, config: Config) -> tuple[str, ...]:
    """Where scalar/ and vectorized/ compute a tensor: file, line and text of each."""
    return tuple(str(found) for side in IMPLEMENTATIONS if (found := _find(side, key, config)))


def function_of(
    key: str, config: Config, side: str, agreed: Sequence[str] = (), caller: bool = False
) -> str:
    """The function of a side that computes a tensor, and its place; "" if it is not found.

    agreed    keys of tensors that are right: what computes one of them in the same phase is right,
              and the function that calls it is named instead
    caller    whether to name the function that calls it in any case
    """
    found = _find(side, key, config) if side in IMPLEMENTATIONS else None
    if not found:
        return ""
    phase = split_key(key)[0]
    if side == "vectorized" and phase in ("eval", "unwatched"):
        return "what runs the recorded text: vectorized/replay.py, record.py, lower.py, batch.py"
    if side == "scalar" and phase in ("backward", "gradient", "unwatched"):
        return "the local derivatives in scalar/value.py"
    functions = _functions(found.file)
    right = [_find(side, one, config) for one in agreed if split_key(one)[0] == phase]
    without = {name for one in right if one for name in _called(one.statement)}
    called = [name for name in _called(found.statement) if name in functions.keys() - without]
    name = found.function.name if caller or not called else called[0]
    return f"{name}, {found.file}:{functions[name].lineno}"


def place_of(file: str, name: str) -> str:
    """A function and its place, "relu, scalar/value.py:60"; "" if the file does not have it."""
    function = _functions(file).get(name)
    return f"{name}, {file}:{function.lineno}" if function else ""


def statement_in(file: str, name: str, number: int, attribute: str = "") -> tuple[str, ...]:
    """A statement of a function, as a tuple of one: a return, or one that changes an attribute.

    number       which of the statements, counted as Python counts indices
    attribute    the attribute; "" for a return

    Returns () if the file does not have the function or the statement.
    """
    function = _functions(file).get(name)
    found = [
        one
        for one in (_statements(function) if function else [])
        if (
            any(getattr(target, "attr", "") == attribute for target in _targets(one))
            if attribute
            else isinstance(one, ast.Return)
        )
    ]
    return (str(Found(file, function, found[number])),) if function and found else ()


def _find(side: str, key: str, config: Config) -> Found | None:
    """The statement of a side that computes a tensor; None if it is not found."""
    phase, name = split_key(key)
    if phase == "unwatched":
        phase = "forward" if name == "loss" else "gradient"
    phase = "forward" if phase == "eval" else phase
    if phase in ADAM:
        return _changed(f"{side}/adam.py", ADAM[phase])
    if phase in ("read", "sample"):
        file = "backend" if (phase, side) == ("read", "scalar") else "sample"
        return _last_line(f"{side}/{file}.py", (phase,))
    if phase not in TREES:
        return None
    file, tap = f"{side}/model.py", name.rpartition(".")[2]
    if phase != "forward":
        tap = name.removeprefix("d").rpartition(".")[2]
    if side == "scalar":  # the line of the tap or parameter, whose derivative the graph computes
        return _assigned(file, ("tap",), tap) or _read(file, tap) or _last_line(file, (tap,))
    found = _assigned(file, TREES[phase], tap)
    if found is None or phase != "backward":
        return _followed(found, tap, name, config) if found else None
    return _of_the_table(_followed(found, tap, name, config), name.removeprefix("d"), config)


@cache
def _source(file: str) -> str:
    """The text of a file of the product."""
    return Path(imported_from(file.partition("/")[0]), file).read_text(encoding="utf-8")


@cache
def _functions(file: str) -> dict[str, ast.FunctionDef]:
    """The functions of a file, by name; {} if the file cannot be read."""
    try:
        module = ast.parse(_source(file))
    except (OSError, SyntaxError, UnicodeDecodeError):
        return {}
    return {node.name: node for node in ast.walk(module) if isinstance(node, ast.FunctionDef)}


def _statements(function: ast.FunctionDef) -> list[ast.stmt]:
    """The simple statements of a function, by line."""
    simple = (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Expr, ast.Return)
    found = [node for node in ast.walk(function) if isinstance(node, simple)]
    return sorted(found, key=lambda node: node.lineno)


def _targets(statement: ast.stmt) -> list[ast.expr]:
    """The targets that a statement assigns to."""
    if isinstance(statement, ast.Assign):
        targets = statement.targets
    elif isinstance(statement, (ast.AugAssign, ast.AnnAssign)):
        targets = [statement.target]
    else:
        targets = []
    return [one for t in targets for one in (t.elts if isinstance(t, ast.Tuple) else [t])]


def _assigned(file: str, trees: tuple[str, ...], tap: str) -> Found | None:
    """The first statement that puts a tap into one of these trees."""

    def is_tap(x: ast.expr) -> bool:
        tree = x.value if isinstance(x, ast.Attribute) and x.attr == tap else None
        return isinstance(tree, ast.Name) and tree.id.removesuffix("_i") in trees

    return _first(file, lambda statement: any(map(is_tap, _targets(statement))))


def _read(file: str, name: str) -> Found | None:
    """The first statement that reads a parameter."""
    return _first(file, lambda one: any(getattr(x, "attr", "") == name for x in ast.walk(one)))


def _first(file: str, wanted: Callable[[ast.stmt], bool]) -> Found | None:
    """The first statement in the functions of a file that is wanted."""
    for function in _functions(file).values():
        for statement in filter(wanted, _statements(function)):
            return Found(file, function, statement)
    return None


def _last_line(file: str, names: tuple[str, ...]) -> Found | None:
    """The return of the first of these functions that the file has."""
    for name in names:
        function = _functions(file).get(name)
        if function:
            return Found(file, function, _statements(function)[-1])
    return None


def _changed(file: str, names: tuple[str, ...]) -> Found | None:
    """The last statement of `adam` that changes one of these names."""
    function = _functions(file).get("adam")
    found = [one for one in _statements(function) if _changes(one, names)] if function else []
    return Found(file, function, found[-1]) if function and found else None


def _changes(statement: ast.stmt, names: tuple[str, ...]) -> bool:
    """Whether a statement assigns to one of these names, or passes it to a call as the first."""
    for target in _targets(statement):
        while isinstance(target, (ast.Subscript, ast.Attribute)):
            target = target.value
        if isinstance(target, ast.Name) and target.id in names:
            return True
    call = statement.value if isinstance(statement, ast.Expr) else None
    return (
        isinstance(call, ast.Call)
        and bool(call.args)
        and isinstance(call.args[0], ast.Name)
        and call.args[0].id in names
    )


def _followed(found: Found, tap: str, full: str, config: Config) -> Found:
    """The statement that computes a tensor, followed through names: `dtap.emb = demb`."""
    for _ in range(9):
        value = _value(found.statement, tap)
        if isinstance(value, ast.Call) and isinstance(value.func, ast.Name):
            function = _functions(found.file).get(value.func.id)
            if function and value.func.id == "merge_heads":
                value = value.args[0]
            elif function and "dtap" in [one.arg for one in function.args.args]:
                return Found(found.file, function, _statements(function)[-1])
        if not isinstance(value, ast.Name):
            return found
        before = _before(found, value.id, full, config)
        if before is None:
            return found
        found, tap = before, value.id
    return found


def _of_the_table(found: Found, tap: str, config: Config) -> Found:
    """Where a function chooses between operations, the statement with the one of the table."""
    own = {f"{user.function}_backward" for user, _ in consumers(config)[tap] if user.function}
    calls = {name for name in _called(found.statement) if name.endswith("_backward")}
    chosen = [one for one in _statements(found.function) if own.intersection(_called(one))]
    within = {f"{user.within}_backward" for user, _ in consumers(config)[tap]}
    if not own or not calls or calls & (own | within) or not chosen:
        return found
    return Found(found.file, found.function, chosen[-1])


def _called(statement: ast.stmt) -> list[str]:
    """The functions that a statement calls by name."""
    calls = [node.func for node in ast.walk(statement) if isinstance(node, ast.Call)]
    return [called.id for called in calls if isinstance(called, ast.Name)]


def _value(statement: ast.stmt, name: str) -> ast.expr | None:
    """The expression that a statement assigns to a name or attribute; None if there is none."""
    value = getattr(statement, "value", None)
    if isinstance(statement, ast.Assign) and isinstance(value, ast.Tuple):
        (targets,) = statement.targets
        for target, part in zip(getattr(targets, "elts", []), value.elts):
            if name in (getattr(target, "attr", None), getattr(target, "id", None)):
                return part
    return value if isinstance(statement, ast.Assign) else None


def _before(found: Found, name: str, full: str, config: Config) -> Found | None:
    """The last statement that changes a name before another statement reads it.

    In a loop over layers, the last statement of the loop's body, except for the first layer.
    """
    line = found.statement.lineno
    changing = [
        one
        for one in _statements(found.function)
        if one is not found.statement and _changes(one, (name,))
    ]
    for loop in ast.walk(found.function):
        if isinstance(loop, ast.For) and loop.lineno < line <= (loop.end_lineno or line):
            inside = [one for one in changing if loop.lineno < one.lineno <= (loop.end_lineno or 0)]
            earlier = [one for one in inside if one.lineno < line]
            last_layer = full.startswith(f"dlayer{config.n_layer - 1}.")
            if inside and not earlier and not last_layer:
                return Found(found.file, found.function, inside[-1])
    before = [one for one in changing if one.lineno < line]
    return Found(found.file, found.function, before[-1]) if before else None
