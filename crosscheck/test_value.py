"""scalar's Value by itself: each operation, each local derivative, and the rules of backward().

A mistake in Value makes every model wrong, far from the mistake. So these tests come first.
"""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

import scalar.value
from crosscheck.causes import VALUE
from crosscheck.compare import Disagreement, Outcome
from crosscheck.lines import place_of, statement_in
from crosscheck.witness import STEP

FILE = "scalar/value.py"
NAMES = "abcd"
POINT = (0.7, 1.3, -0.4, 2.1)  # the numbers a, b, c and d
CLOSE = 1e-12  # the largest relative error, some thousand roundings

Function = Callable[..., Any]


@dataclass(frozen=True)
class Operation:
    """A function of a, b, .., for Values and for complex numbers."""

    name: str  # of the method or function that is checked
    text: str
    of_values: Function
    of_numbers: Function
    point: Sequence[float] = POINT
    slips: Mapping[str, Function] = field(default_factory=dict)  # frequent wrong derivatives

    @property
    def operands(self) -> dict[str, float]:
        """The operands, by name."""
        return dict(zip(NAMES[: self.of_numbers.__code__.co_argcount], self.point))

    def __str__(self) -> str:
        return self.text + (f" at {self.point[0]}" if self.point != POINT else "")


def both(name: str, text: str, function: Function) -> Operation:
    """An operation whose Python expression is the same for Values and for numbers."""
    return Operation(name, text, function, function)


def power(n: float) -> Operation:
    """The operation a ** n."""
    slip = "n a^n - 1: the 1 is to be taken from the exponent"
    return Operation("__pow__", f"a ** {n}", lambda a: a**n, lambda a: a**n,
                     slips={slip: lambda a: n * a**n - 1})  # fmt: skip


def relu(a: float) -> Operation:
    """The operation relu(a), at this a."""
    return Operation("relu", "relu(a)", lambda a: a.relu(), lambda a: a if a.real > 0 else 0j, (a,))


OPERATIONS = [
    both("__add__", "a + b", lambda a, b: a + b),
    both("__add__", "a + 2", lambda a: a + 2),
    both("__mul__", "a * b", lambda a, b: a * b),
    both("__mul__", "a * 3", lambda a: a * 3),
    *map(power, (2, 3, -1, 0.5, -0.5)),
    Operation("log", "log(a)", lambda a: a.log(), lambda a: cmath.log(a)),
    Operation("exp", "exp(a)", lambda a: a.exp(), lambda a: cmath.exp(a)),
    *map(relu, (0.7, -0.4, 0.0)),
    Operation("tanh", "tanh(a)", lambda a: a.tanh(), lambda a: cmath.tanh(a),
              slips={"1 - tanh(a): the square is missing": lambda a: 1 - math.tanh(a)}),
    both("__neg__", "-a", lambda a: -a),
    both("__sub__", "a - b", lambda a, b: a - b),
    both("__sub__", "a - 2", lambda a: a - 2),
    both("__truediv__", "a / b", lambda a, b: a / b),
    both("__truediv__", "a / 3", lambda a: a / 3),
    both("__radd__", "2 + a", lambda a: 2 + a),
    both("__rmul__", "3 * a", lambda a: 3 * a),
    both("__rsub__", "2 - a", lambda a: 2 - a),
    both("__rtruediv__", "3 / a", lambda a: 3 / a),
    Operation("total", "total([a, b, c])", lambda a, b, c: scalar.value.total([a, b, c]),
              lambda a, b, c: a + b + c),
    Operation("dot", "dot([a, b], [c, d])", lambda a, b, c, d: scalar.value.dot([a, b], [c, d]),
              lambda a, b, c, d: a * c + b * d),
    Operation("mean", "mean([a, b, c])", lambda a, b, c: scalar.value.mean([a, b, c]),
              lambda a, b, c: (a + b + c) / 3),
]  # fmt: skip


@pytest.fixture(autouse=True)
def scalar_is_a_side(choice: Any) -> None:
    """Skip the tests of Value if vectorized is compared with itself."""
    if "scalar" not in (choice.reference, choice.candidate):
        pytest.skip("scalar is not compared")


def is_close(a: float, b: float) -> bool:
    """Whether two numbers differ by rounding alone."""
    return math.isclose(a, b, rel_tol=CLOSE, abs_tol=CLOSE)


def disagreement(choice: Any, problem: str, **more: Any) -> Outcome:
    """The outcome that says what is wrong with Value."""
    at_fault = "reference" if choice.reference == "scalar" else "candidate"
    return Outcome("", found=[Disagreement("", 0, "", problem, at_fault=at_fault, **more)])


def derivatives(of: Any, by: Sequence[Any]) -> list[float]:
    """d(of) / d(x) for every x of `by`; without backward() if Value keeps local derivatives."""
    if hasattr(of, "_local_grads"):
        return [derivative(of, x) for x in by]
    of.backward()
    return [x.grad for x in by]


def derivative(of: Any, by: Any) -> float:
    """d(of) / d(by), from the local derivatives in the graph."""
    if of is by:
        return 1.0
    parts = zip(of._children, of._local_grads or ())
    return math.fsum(local_grad * derivative(child, by) for child, local_grad in parts)


@pytest.mark.about(VALUE)
@pytest.mark.parametrize("operation", OPERATIONS, ids=str)
def test_an_operation(operation: Operation, choice: Any, settle: Any) -> None:
    method = hasattr(scalar.value.Value, operation.name)
    if not method and not hasattr(scalar.value, operation.name):
        pytest.skip(f"scalar/value.py has no {operation.name}")
    operands = operation.operands
    name = f"Value.{operation.name}" if method else operation.name
    point = ", ".join(f"{operand} = {number}" for operand, number in operands.items())
    lines = statement_in(FILE, operation.name, 0 if len(operands) > 1 else -1)

    values = [scalar.value.Value(number) for number in operands.values()]
    result = operation.of_values(*values)
    if not isinstance(result, scalar.value.Value):
        problem = f"{name}: {operation.text} gives {result!r}, which is no Value"
        settle(disagreement(choice, problem, lines=lines))
    expected = complex(operation.of_numbers(*operands.values())).real
    if not is_close(result.data, expected):
        problem = (
            f"{name}: {operation.text} at {point} is {result.data:.13g}, should be {expected:.13g}"
        )
        settle(disagreement(choice, problem, lines=lines))

    true = {}
    for operand in operands:
        stepped = {**operands, operand: operands[operand] + STEP * 1j}
        true[operand] = complex(operation.of_numbers(*stepped.values())).imag / STEP
    for operand, given in zip(operands, derivatives(result, values)):
        if not is_close(given, true[operand]):
            settle(
                disagreement(
                    choice,
                    f"{name}: d({operation.text})/d{operand} at {point}"
                    f" is given as {given:.13g}, should be {true[operand]:.13g}",
                    diagnosis=_guess(operation, true, operand, given),
                    lines=lines,
                )
            )


def _guess(operation: Operation, true: Mapping[str, float], operand: str, given: float) -> str:
    """What a wrong derivative looks like; "" if it looks like nothing known."""
    for words, slip in operation.slips.items():
        if is_close(given, slip(*operation.operands.values())):
            return words
    for other, number in true.items():
        if other != operand and is_close(given, number):
            return f"d/d{other}: two local derivatives are exchanged"
    return "the other sign" if is_close(given, -true[operand]) else ""


# --- backward() ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """A graph, a gradient in it, and which mistake in backward() gives which wrong gradient."""

    text: str
    gradient: Callable[[Any], float]  # of a leaf a, after backward()
    expected: float
    signs: Mapping[float, str]  # by wrong gradient, the mistake


NO_END = "never sets self.grad = 1"
LAST = "a value that is used twice gets only its last contribution: = for +=?"
LEAF = "a leaf loses the gradient that another graph has given it: = for +=?"
EARLY = "a value passes its gradient on before all its uses have added to it: the order"
BARE = "a local derivative is passed on without the gradient of the result: * value.grad?"


def run(of: Any, by: Any) -> float:
    """by.grad after of.backward()"""
    of.backward()
    return float(by.grad)


def end(a: Any) -> float:
    b = a * 3
    return run(b, b)


def two_graphs(a: Any) -> float:
    run(a * 2, a)
    return run(a * 3, a)


def used_twice(a: Any, first: bool) -> float:
    b = a * 2
    return run(b + b * 3 if first else b * 3 + b, a)


RULES = [
    Rule("db/db with b = 3 a", end, 1, {0: NO_END}),
    Rule("d(a + a)/da", lambda a: run(a + a, a), 2, {1: LAST}),
    Rule("d(a * a)/da at a = 5", lambda a: run(a * a, a), 10, {5: LAST}),
    Rule("d(2 a + 3 a)/da", lambda a: run(a * 2 + a * 3, a), 5, {0: EARLY}),
    Rule("d(3 b)/da with b = 2 a", lambda a: run(a * 2 * 3, a), 6, {0: EARLY, 2: BARE}),
    Rule("d(b + 3 b)/da with b = 2 a", lambda a: used_twice(a, True), 8, {2: EARLY, 6: EARLY}),
    Rule("d(3 b + b)/da with b = 2 a", lambda a: used_twice(a, False), 8, {2: EARLY, 6: EARLY}),
    Rule("d(2 a)/da + d(3 a)/da, in two graphs", two_graphs, 5, {3: LEAF}),
]


@pytest.mark.about(VALUE)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.text)
def test_a_rule_of_backward(rule: Rule, choice: Any, settle: Any) -> None:
    found = rule.gradient(scalar.value.Value(5.0))
    if not is_close(found, rule.expected):
        sign = rule.signs.get(found, "")
        problem = f"{rule.text} is {found:.13g}, should be {rule.expected}"
        look = ["backward", *["_topological_order"] * (sign == EARLY)]
        settle(
            disagreement(
                choice,
                f"Value.backward {sign}"
                if sign == NO_END
                else f"Value.backward: {sign or problem}",
                where=problem if sign else "",
                lines=statement_in(FILE, "backward", -1, "grad") if sign in (LAST, LEAF) else (),
                function=" and ".join(filter(None, (place_of(FILE, name) for name in look))),
            )
        )
