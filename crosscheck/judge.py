"""The verdict on one exercise: its functions each by itself, then the model with all of them."""

from __future__ import annotations

import ast
import io
import linecache
import math
import re
import sys
import types
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from random import Random
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np

from crosscheck.alone import alone
from crosscheck.candidate import (
    DEEPEST,
    RESULTS,
    UNDONE,
    Candidate,
    Late,
    Told,
    contained,
    guard,
    innermost,
    unreadable_line,
    watched,
)
from crosscheck.cases import Case, load_case
from crosscheck.check import report_alone, report_told
from crosscheck.compare import Disagreement, compare
from crosscheck.exercises import Exercise, attempted, refused
from crosscheck.functions import drawn_cases, inputs
from crosscheck.hints import hints
from crosscheck.report import in_rows, render
from crosscheck.sides import IncompleteError, then_stopped
from crosscheck.trace import (
    Step,
    WatchedAndTrained,
    part,
    steps_by,
    suited,
)
from microgpt.backend import fresh_state

DONE, RIGHT_SO_FAR, WRONG, UNTRIED = "done", "right so far", "wrong", "not attempted"
# cases that together run every line of the text; the first case finds most mistakes
PANEL = {
    "scalar": (
        *("cold-samples", "repeated-token", "microgpt-243", "single-character", "one-position"),
        *("decay-and-clip", "unlikely-target"),
    ),
    "vectorized": (
        *("ragged-batch", "cold-samples", "repeated-token", "microgpt-243", "single-character"),
        *("one-position", "gelu", "decay-and-clip", "two-layers", "tied-two-layers"),
        *("longer-than-context", "large-logits", "large-attention-logits", "on-the-kink"),
    ),
}
STEPS = 3  # of a case
SECONDS = 10.0  # for the steps of a case; a learner's code that takes longer is stopped
DRAWN = 6  # how many random models run, drawn anew whenever the learner's file changes
LABEL = 10  # characters of the labels of rows
FILLED = 40  # how many batches `fill` is tried on


@dataclass(frozen=True)
class Verdict:
    """The state of an exercise, and the report if it is wrong."""

    state: str
    written: tuple[str, ...] = ()  # the functions that the learner has begun
    function: str = ""  # the function that is wrong
    report: tuple[str, ...] = ()  # lines


def judge(exercise: Exercise, path: Path, hint: int = 0) -> Verdict:
    """The verdict on the file of an exercise.

    hint    what the report tells: 0 where it is wrong, 1 the likely cause too, 2 the equation too
    """
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError) as error:
        words = f"cannot be read: {getattr(error, 'msg', error)}"
        return as_wrong((), Told(path.name, words, unreadable_line(path.name, error)))
    written = attempted(exercise, tree)
    if not written:
        return Verdict(UNTRIED)
    door = refused(exercise, tree)
    if door:
        number, words = door
        line = f"{path.name}:{number} {text.splitlines()[number - 1].strip()}"
        return as_wrong(written, Told(path.name, words, line))
    try:
        learner = _loaded(exercise, path, text, written)
        found = _judged(exercise, learner, text, written, hint)
    except Told as told:
        if told.undone:
            rest = tuple(name for name in written if name != told.function)
            return Verdict(RIGHT_SO_FAR if rest else UNTRIED, rest)
        return as_wrong(written, told)
    if found:
        return replace(found, written=tuple(written))
    whole = exercise.defect or len(written) == len(exercise.functions)
    return Verdict(DONE if whole else RIGHT_SO_FAR, tuple(written))


def as_wrong(written: Sequence[str], told: Told) -> Verdict:
    """The verdict on a file of which this was told."""
    return Verdict(WRONG, tuple(written), told.function, tuple(report_told(told)))


def _loaded(exercise: Exercise, path: Path, text: str, written: Sequence[str]) -> Candidate:
    """A learner's file as a candidate; functions and methods not yet written are the text's.

    Raises Told if the file cannot be run, or hands on the text's own functions.
    """
    module = types.ModuleType(f"exercise_{exercise.name}")
    name, seed = module.__name__, _seed(text)
    import_module(f"{exercise.package}.backend")  # and what it imports: _placed looks through them
    learner = Candidate(path, module, exercise.package, {}, [], [], {}, seed, SECONDS)
    linecache.checkcache(str(path))
    sys.modules[name] = module  # where dataclasses look for the module of a class
    try:
        run = compile(text, str(path), "exec")
        watched(learner, path.name, lambda: exec(run, vars(module)))
    finally:
        del sys.modules[name]
    shipped = import_module(exercise.module)
    for home in exercise.functions:
        home = home.partition(".")[0]
        theirs, ours = getattr(module, home, None), getattr(shipped, home)
        if isinstance(ours, type) and isinstance(theirs, type):
            _completed(theirs, ours, [x for x in written if x.startswith(f"{home}.")])
        elif home not in written:
            setattr(module, home, ours)  # the others of this file may call it
    for home in dict.fromkeys(name.partition(".")[0] for name in written):
        theirs = getattr(module, home, None)
        if not callable(theirs):
            raise Told(home, f"is {type(theirs).__name__}; expected a function")
        if theirs is getattr(shipped, home):
            raise Told(home, "is the text's own function of that name")
        learner.functions[home] = theirs
    return learner


def _seed(text: str) -> int:
    """The seed of random inputs; another text has another, so that no answer can be looked up."""
    return zlib.crc32(text.encode())


def _completed(theirs: type, ours: type, written: Sequence[str]) -> None:
    """Give a learner's class the text's methods in place of those that are not written yet."""
    own = {name.partition(".")[2] for name in written}
    names = {**vars(import_module(ours.__module__)), ours.__name__: theirs}
    for name, method in vars(ours).items():
        there = name in vars(theirs)
        if isinstance(method, types.FunctionType) and name not in own:
            if there and name in ("__init__", "__repr__"):
                continue
            copy = types.FunctionType(method.__code__, names, name, method.__defaults__)
            setattr(theirs, name, copy)


def _judged(
    exercise: Exercise, learner: Candidate, text: str, written: Sequence[str], hint: int
) -> Verdict | None:
    """The verdict on a learner's functions if one is wrong; None if all are right."""
    own = [name for name in written if name in RESULTS] if not exercise.defect else []
    if exercise.package == "vectorized":
        for name in own:
            if name == "read":
                continue
            wrong = alone(learner, name, _inputs(name, learner.seed))
            if wrong:
                lines = report_alone(wrong, hints(learner, wrong, hint))
                return Verdict(WRONG, (), name, tuple(lines))
    if exercise.module == "scalar.value" and not exercise.defect:
        verdict = _operations(exercise, learner, written, hint)
        if verdict:
            return verdict
    found = _in_model(exercise, learner)
    if not found:
        filled = "fill" in learner.functions and not exercise.defect
        return _filling(learner) if filled else None
    if len(written) > 1 and not exercise.defect:  # which of them?
        for name in written:
            only = _loaded(exercise, learner.path, text, [name])
            again = _in_model(exercise, only, found.case)
            if again:
                return Verdict(WRONG, (), name, _headed(name, again, hint))
    name = written[0] if not exercise.defect and len(written) == 1 else ""
    return Verdict(WRONG, (), name, _headed(name, found, hint))


def _headed(name: str, found: Disagreement, hint: int) -> tuple[str, ...]:
    """The report on a disagreement, headed by the function that is wrong."""
    first = f"{name} is wrong, as the model shows with it in its place:"
    return ("", *([first] if name else []), *shown(found, hint).splitlines())


@cache
def _inputs(name: str, seed: int) -> list[Any]:
    """The inputs on which a function is tried by itself."""
    return inputs([name], seed)[name]


def shown(found: Disagreement, hint: int) -> str:
    """The report on a disagreement, with the diagnosis from hint 1 on, the equation from 2 on."""
    quiet: dict[str, Any] = {"lines": (), "function": "", "phases": (), "at_fault": ""}
    if found.key:  # a stop after a wrong number follows from that number
        quiet["stop"] = None
    if hint < 1:
        quiet["diagnosis"] = ""
    if hint < 2:
        quiet.update(formula="", operands={})
    return render(replace(found, **quiet), "reference", "yours")


# --- operations by themselves ------------------------------------------------------------------


class Expression(NamedTuple):
    """A small expression to try an operation on."""

    function: str
    words: str
    numbers: list[float]
    of: Callable[..., Any]  # takes the functions by name, and a Value for each number


def _expressions(seed: int) -> Iterator[Expression]:
    """Expressions of random numbers, each with the function that it tries."""
    rng = Random(seed)

    def some(count: int, least: float = -2.0) -> list[float]:
        return [rng.uniform(least, 2.0) for _ in range(count)]

    c = round(rng.uniform(-2, 2), 3)
    n = rng.choice([2, 3, -1, -0.5])
    for _ in range(3):
        yield Expression("Value.__add__", "a + b", some(2), lambda f, a, b: a + b)
        yield Expression("Value.__add__", f"a + {c}", some(1), lambda f, a: a + c)
        yield Expression("Value.__mul__", "a * b", some(2), lambda f, a, b: a * b)
        yield Expression("Value.__mul__", f"a * {c}", some(1), lambda f, a: a * c)
        yield Expression("Value.__pow__", f"a ** {n}", some(1, 0.5), lambda f, a: a**n)
        yield Expression("Value.log", "a.log()", some(1, 0.1), lambda f, a: a.log())
        yield Expression("Value.exp", "a.exp()", some(1), lambda f, a: a.exp())
        yield Expression("Value.relu", "a.relu()", some(1, 0.1), lambda f, a: a.relu())
        yield Expression("Value.relu", "(-a).relu()", some(1, 0.1), lambda f, a: (-a).relu())
        yield Expression("Value.tanh", "a.tanh()", some(1), lambda f, a: a.tanh())
        yield Expression("total", "total([a, b, c])", some(3), lambda f, *x: f["total"](x))
        yield Expression("mean", "mean([a, b, c])", some(3), lambda f, *x: f["mean"](x))
        yield Expression(
            "dot", "dot([a, b], [c, d])", some(4), lambda f, *x: f["dot"](x[:2], x[2:])
        )
        yield Expression("Value.backward", "a * b", some(2), lambda f, a, b: a * b)
        yield Expression("Value.backward", "a * b + a", some(2), lambda f, a, b: a * b + a)
        yield Expression(
            "Value.backward",
            "(a * b) * (a * b).tanh()",
            some(2),
            lambda f, a, b: (lambda ab: ab * ab.tanh())(a * b),
        )


def _operations(
    exercise: Exercise, learner: Candidate, written: Sequence[str], hint: int
) -> Verdict | None:
    """The verdict on the first operation that is wrong; None if all are right."""
    shipped = {**vars(import_module("scalar.value"))}
    for one in _expressions(learner.seed):
        if one.function not in written:
            continue
        wanted = _values(shipped, one)
        found = _operated(exercise, learner, one)
        for name, right in wanted.items():
            if not abs(found[name] - right) <= 1e-9 * abs(right):
                return Verdict(
                    WRONG, (), one.function, _of_operation(one, name, wanted, found, hint)
                )
    return None


def _operated(exercise: Exercise, learner: Candidate, one: Expression) -> dict[str, float]:
    """The value of an expression by the learner's operations, and its derivatives.

    Raises Told if the operation raises an exception, does not end, or gives no number.
    """
    with _placed(exercise, learner), contained(learner, one.function):
        try:
            found = _values({**vars(import_module("scalar.value"))}, one)
        except Late as late:
            line = innermost(learner, late)
            raise Told(one.function, f"does not end, for {one.words}", line) from None
        except NotImplementedError as error:
            raise Told(one.function, UNDONE, innermost(learner, error)) from None
        except Exception as error:
            words = f"raises {type(error).__name__}: {error}, for {one.words}"
            raise Told(one.function, words, innermost(learner, error)) from None
    for name, x in found.items():
        if not isinstance(x, (int, float)):
            kind = type(x).__name__
            raise Told(one.function, f"gives {name} as {kind}; expected a plain number")
    return found


def _of_operation(
    one: Expression,
    name: str,
    wanted: Mapping[str, float],
    found: Mapping[str, float],
    hint: int,
) -> tuple[str, ...]:
    """The report on an operation: which number is wrong, and what it should be."""
    value = name == one.words
    rows = [
        ("of", name),
        ("at", ", ".join(f"{x} = {y:.6g}" for x, y in zip("abcd", one.numbers))),
        ("should be", repr(wanted[name])),
        ("yours", repr(found[name])),
    ]
    if hint:
        rows.append(("looks like", _slip(one, name, wanted, found)))
    about = import_module("scalar.value").__doc__ or ""
    row = next((x for x in about.splitlines() if x.startswith(_row(one))), "")
    if hint > 1 and row:
        operation, comes_to, slopes, *others = re.split(r"  +", row)
        where = f"; {', '.join(others)}" if others else ""
        rows.append(("equation", f"{operation}: value {comes_to}, derivatives {slopes}{where}"))
    first = f"{one.function} gives a wrong {'value' if value else 'derivative'}, by itself:"
    return "", first, *in_rows(rows, LABEL)


def _slip(
    one: Expression, name: str, wanted: Mapping[str, float], found: Mapping[str, float]
) -> str:
    """What a wrong value or derivative looks like: the sign turned, the inverse, .."""
    right, theirs = wanted[name], found[name]
    if name == one.words:
        words = "the value is wrong"
    elif not any(found[other] for other in found if other != one.words):
        return "the value is right, and the derivatives are zero everywhere"
    else:
        words = "the value is right, and the derivative is wrong"
    known = {
        "the sign is turned": -right,
        "it is the inverse": 1 / right if right else math.nan,
        "it is the value of the expression": wanted[one.words],
        "it is zero": 0.0,
        "it is 1": 1.0,
        **{f"it is {x} itself": y for x, y in zip("abcd", one.numbers)},
    }
    said = (why for why, x in known.items() if abs(theirs - x) <= 1e-9 * abs(x) and x != right)
    return ": ".join([words, *([why] if (why := next(said, "")) else [])])


def _row(one: Expression) -> str:
    """How the operation's row in the table at the head of scalar/value.py begins."""
    name = one.function.removeprefix("Value.")
    return {"__add__": "a + b", "__mul__": "a * b", "__pow__": "a **"}.get(name, f"{name}(")


def _values(functions: Mapping[str, Any], one: Expression) -> dict[str, Any]:
    """The value of an expression and its derivatives, each by how a report names it."""
    operands = [functions["Value"](x) for x in one.numbers]
    result = one.of(functions, *operands)
    if not hasattr(result, "backward"):
        words = f"gives {type(result).__name__} for {one.words}; expected a Value"
        raise Told(one.function, words)
    result.backward()
    found = {one.words: result.data}
    for letter, operand in zip("abcd", operands):
        found[f"d({one.words}) / d{letter}"] = operand.grad
    return found


def _filling(learner: Candidate) -> Verdict | None:
    """The verdict on `fill` if it leaves wrong numbers in arrays that held other documents."""
    rng = Random(learner.seed)
    shipped = import_module("vectorized.batch")
    for _ in range(FILLED):
        B, T = rng.randint(1, 5), rng.randint(1, 7)
        docs = [[rng.randrange(9) for _ in range(rng.randint(2, T + 1))] for _ in range(B)]
        docs = rng.choice([docs, [doc[:2] for doc in docs]])
        right, theirs = (shipped.empty_batch(B, T, np.dtype("float64")) for _ in range(2))
        for array in theirs[:3]:
            array[:] = 7  # of the documents before
        shipped.fill(right, docs, B + 1)
        given = [list(doc) for doc in docs]
        guard(learner, "fill")(theirs, given, B + 1)
        if given != docs:
            raise Told("fill", "changes the documents, which are its input")
        for name, x, y in zip(right._fields, right, theirs):
            if not np.allclose(x, y, rtol=1e-9, atol=0.0):
                b, t = (int(i[0]) for i in np.nonzero(x != y))
                lengths = ", ".join(str(len(doc)) for doc in docs)
                rows = [
                    ("given", f"documents of {lengths} tokens, of {B + 1} in the whole batch;"
                              f" arrays of {x.shape}, which hold other documents"),
                    ("at", f"{name}[b={b}, t={t}]"),
                    ("should be", repr(x[b, t].item())),
                    ("yours", repr(y[b, t].item())),
                ]  # fmt: skip
                lines = ("", "fill is wrong, by itself:", *in_rows(rows, LABEL))
                return Verdict(WRONG, (), "fill", lines)
    return None


# --- in the model --------------------------------------------------------------------------------


def _in_model(exercise: Exercise, learner: Candidate, only: str = "") -> Disagreement | None:
    """The first disagreement of the model that has the learner's functions with the reference.

    only    the name of the one case that is run; "" for all
    """
    panel = map(_case, PANEL[exercise.package])
    for case in [*panel, *drawn_cases(learner.seed, DRAWN)]:
        if only not in ("", case.name):
            continue
        reference = _reference(case, _draws(exercise, case))
        with _placed(exercise, learner), contained(learner, exercise.name):
            theirs, stopped = _theirs(exercise, learner, case, reference)
        found = _compared(case, reference, theirs, stopped)
        if found:
            return found
    return None


@cache
def _case(name: str) -> Case:
    return load_case(name)


# the reference's steps by case, and whether documents are drawn; none of random models
_known: dict[tuple[str, bool], list[Step]] = {}


def _reference(case: Case, draws: bool) -> list[Step]:
    """The steps of a case as the text of vectorized/ computes them."""
    key = case.name, draws
    if case.random or key not in _known:
        reference = list(_steps(case, "vectorized", draws))
        if case.random:
            return reference
        _known[key] = reference
    return _known[key]


def _draws(exercise: Exercise, case: Case) -> bool:
    """Whether documents are drawn from the model: only for sample.py, since drawing takes long."""
    return exercise.source.endswith("sample.py") and not case.random


def _theirs(
    exercise: Exercise, learner: Candidate, case: Case, reference: Sequence[Step]
) -> tuple[list[Step], IncompleteError | None]:
    """The steps of the model that has the learner's functions, and the error that ended them.

    Raises Told if a line of the learner's raised that error.
    """
    steps: list[Step] = []
    try:
        for step in _steps(case, exercise.package, _draws(exercise, case), reference):
            steps.append(step)
    except Late as late:
        words = f"is not done after {learner.time_limit:g} seconds"
        raise Told(exercise.name, words, innermost(learner, late)) from None
    except IncompleteError as error:
        cause = error.__context__ or error
        line = innermost(learner, cause)
        if isinstance(cause, NotImplementedError):
            raise Told(line.partition(":")[0], UNDONE, line) from None
        if line:
            words = f"{type(cause).__name__}: {cause}".partition("\n")[0][:200]
            raise Told(exercise.name, f"raises {words}", line) from None
        return [*steps, error.step], error
    except Exception as error:  # the text cannot go on with what a function returned
        if "inhomogeneous" in str(error) and exercise.source.endswith("sample.py"):
            words = "returns documents longer than the context: BOS is no part of what it returns"
            raise Told("sample", words) from None
        words = f"stops the model, with {type(error).__name__}: {error}".partition("\n")[0][:200]
        raise Told(exercise.name, words, innermost(learner, error)) from None
    return steps, None


def _compared(
    case: Case, reference: list[Step], theirs: list[Step], stopped: IncompleteError | None
) -> Disagreement | None:
    """The first disagreement of the learner's steps with the reference's."""
    with np.errstate(all="ignore"):
        outcome = compare(case, reference[: len(theirs)], then_stopped(theirs, stopped))
    return outcome.found[0] if outcome.found else None


def _steps(case: Case, package: str, draws: bool, reference: Sequence[Step] = ()) -> Iterator[Step]:
    """The steps of a case by a text, not recorded; one step of a random model.

    A random model is updated by the reference's gradients, since Adam may amplify rounding there.
    """
    config = suited(case.config, package, "float64")
    backend: Any = import_module(f"{package}.backend").Backend(
        config, fresh_state(case.params), watch=True
    )
    pair = WatchedAndTrained(package, config, backend, backend, math.inf)
    grads = part(reference[0], "gradient", "d") if case.random and reference else None
    with patch("vectorized.backend.most_walkers", lambda _: 1):  # one document after another
        yield from steps_by(pair, case, range(1 if case.random else STEPS), draws, grads)


def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, but with arrays for lists of numbers in what it returns."""

    def call(*args: Any, **kwargs: Any) -> Any:
        found = function(*args, **kwargs)
        if isinstance(found, tuple):
            return tuple(map(np.asarray, found))
        return np.asarray(found) if isinstance(found, list) and _numbers(found) else found

    return call


def _numbers(x: Any) -> bool:
    """Whether the first element of nested lists is a number."""
    while isinstance(x, list) and x:
        x = x[0]
    return isinstance(x, (int, float))


@contextmanager
def _placed(exercise: Exercise, learner: Candidate) -> Iterator[None]:
    """Within this context, the text has the learner's functions and classes; they print nothing."""
    shipped = vars(import_module(exercise.module))
    plain = exercise.package == "vectorized"
    exchanged = [
        (shipped[name], _plain(theirs) if plain and name in RESULTS else theirs)
        for name, theirs in learner.functions.items()
    ]
    modules = [
        module
        for name, module in list(sys.modules.items())
        if name.partition(".")[0] == exercise.package and name != "vectorized.record"
    ]
    before = [
        (module, name, old, new)
        for module in modules
        for name, x in list(vars(module).items())
        for old, new in exchanged
        if x is old
    ]
    deepest = sys.getrecursionlimit()
    sys.setrecursionlimit(max(deepest, DEEPEST))
    try:
        for module, name, _, new in before:
            setattr(module, name, new)
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        sys.setrecursionlimit(deepest)
        for module, name, old, _ in before:
            setattr(module, name, old)
