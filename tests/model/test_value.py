"""Value: every operation's number and derivative, and the order in which gradients add up."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from decimal import Decimal, localcontext
from functools import reduce
from operator import add, mul
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from scalar.value import Value, dot, mean, total

# The witness: the same expression in decimal arithmetic of 50 digits, where a central difference
# with h = 1e-15 leaves 30 digits of the derivative.
DIGITS = 50
H = Decimal("1e-15")


def exp(x: Any) -> Any:
    return x.exp()


def log(x: Any) -> Any:
    return x.ln() if isinstance(x, Decimal) else x.log()


def relu(x: Any) -> Any:
    return max(x, Decimal(0)) if isinstance(x, Decimal) else x.relu()


def tanh(x: Any) -> Any:
    if isinstance(x, Decimal):
        return ((2 * x).exp() - 1) / ((2 * x).exp() + 1)
    return x.tanh()


def power(x: Any, exponent: float) -> Any:
    return x ** (Decimal(exponent) if isinstance(x, Decimal) else exponent)


# the operations, as functions of two numbers of which some use only the first
OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "a + b": lambda a, b: a + b,
    "a + 2": lambda a, b: a + 2,
    "2 + a": lambda a, b: 2 + a,
    "a - b": lambda a, b: a - b,
    "a - 2": lambda a, b: a - 2,
    "2 - a": lambda a, b: 2 - a,
    "-a": lambda a, b: -a,
    "a * b": lambda a, b: a * b,
    "a * 3": lambda a, b: a * 3,
    "3 * a": lambda a, b: 3 * a,
    "a / b": lambda a, b: a / b,
    "a / 3": lambda a, b: a / 3,
    "3 / a": lambda a, b: 3 / a,
    "a ** 2": lambda a, b: power(a, 2),
    "a ** 3": lambda a, b: power(a, 3),
    "a ** -1": lambda a, b: power(a, -1),
    "a ** 0.5": lambda a, b: power(a, 0.5),
    "a ** -0.5": lambda a, b: power(a, -0.5),
    "exp(a)": lambda a, b: exp(a),
    "log(a)": lambda a, b: log(a),
    "relu(a)": lambda a, b: relu(a),
    "relu(-a)": lambda a, b: relu(-a),
    "tanh(a)": lambda a, b: tanh(a),
}
POSITIVE = ("a ** 0.5", "a ** -0.5", "log(a)")  # these need a > 0

Program = list[tuple[str, int, int]]  # operations, and the indices of their operands


def run(program: Program, leaves: Sequence[Any]) -> list[Any]:
    """All numbers of a program: its leaves, the results, and the sum of everything at the end.

    The sum begins with the last result, so that backward meets the result before its operands.
    """
    numbers = list(leaves)
    for name, i, j in program:
        numbers.append(OPERATIONS[name](numbers[i], numbers[j]))
    return [*numbers, reduce(add, reversed(numbers))]


def exactly(program: Program, leaves: Sequence[float]) -> tuple[list[float], list[float]]:
    """All numbers of a program, and the derivative of the last with respect to each leaf."""
    with localcontext() as context:
        context.prec = DIGITS
        x = [Decimal(leaf) for leaf in leaves]
        slopes = []
        for i in range(len(x)):
            up = run(program, [*x[:i], x[i] + H, *x[i + 1 :]])[-1]
            down = run(program, [*x[:i], x[i] - H, *x[i + 1 :]])[-1]
            slopes.append(float((up - down) / (2 * H)))
        return [float(number) for number in run(program, x)], slopes


def tame(number: float) -> bool:
    """Not large, and not close to 0, where digits cancel and ReLU and division are not smooth."""
    return 0.05 <= abs(number) <= 20


leaves_strategy = st.lists(st.floats(-5, 5).filter(tame), min_size=1, max_size=3)


@st.composite
def programs(draw: st.DrawFn) -> tuple[Program, list[float]]:
    """Leaves, and operations on leaves and on earlier results, with tame results."""
    leaves = draw(leaves_strategy)
    numbers, program = list(leaves), []
    for _ in range(draw(st.integers(1, 8))):
        name = draw(st.sampled_from(list(OPERATIONS)))
        i, j = (draw(st.integers(0, len(numbers) - 1)) for _ in range(2))
        a, b = numbers[i], numbers[j]
        # 0 comes from ReLU alone, and is no operand
        if tame(a) and tame(b) and (a > 0 or name not in POSITIVE):
            result = OPERATIONS[name](Value(a), Value(b)).data
            if tame(result) or name.startswith("relu"):
                numbers.append(result)
                program.append((name, i, j))
    return program, leaves


def recursive_backward(root: Value) -> None:
    """The original program's backward: recursive, and without a guard."""
    order: list[Value] = []
    seen: set[Value] = set()

    def visit(value: Value) -> None:
        if value not in seen:
            seen.add(value)
            for child in value._children:
                visit(child)
            order.append(value)

    visit(root)
    root.grad = 1.0
    for value in reversed(order):
        for child, local_grad in zip(value._children, value._local_grads or ()):
            child.grad += local_grad * value.grad


@pytest.mark.parametrize("name", OPERATIONS)
@settings(deadline=None)
@given(a=st.floats(-5, 5).filter(tame), b=st.floats(-5, 5).filter(tame))
def test_an_operation_has_the_value_and_the_slopes_of_finite_differences(
    name: str, a: float, b: float
) -> None:
    if name in POSITIVE:
        a = abs(a)
    numbers, slopes = exactly([(name, 0, 1)], [a, b])
    x, y = Value(a), Value(b)
    result = OPERATIONS[name](x, y)
    (result + x + y).backward()
    assert result.data == pytest.approx(numbers[2], rel=1e-14, abs=1e-15)
    assert [x.grad, y.grad] == pytest.approx(slopes, rel=1e-13, abs=1e-13)


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_on_one_value_twice_adds_both_slopes(name: str) -> None:
    _, slopes = exactly([(name, 0, 0)], [1.75])
    x = Value(1.75)
    (OPERATIONS[name](x, x) + x).backward()
    assert x.grad == pytest.approx(slopes[0], rel=1e-14)


@settings(deadline=None)
@given(programs())
def test_expressions_that_reuse_their_parts_have_the_slopes_of_finite_differences(
    drawn: tuple[Program, list[float]],
) -> None:
    program, leaves = drawn
    numbers, slopes = exactly(program, leaves)
    values = run(program, [Value(leaf) for leaf in leaves])
    values[-1].backward()
    assert [value.data for value in values] == pytest.approx(numbers, rel=1e-9, abs=1e-12)
    largest = max(abs(value.grad) for value in values)
    found = [value.grad for value in values[: len(leaves)]]
    assert found == pytest.approx(slopes, rel=1e-9, abs=1e-9 * largest)


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (Value(0.3) - Value(0.1), 0.3 - 0.1),
        (Value(0.3) / Value(0.7), 0.3 * 0.7**-1),
        (Value(0.7) ** -0.5, 0.7**-0.5),
        (1 - Value(0.9), 1 - 0.9),
        (2 / Value(0.7), 0.7**-1 * 2),
        (Value(0.7).exp(), math.exp(0.7)),
        (Value(0.7).log(), math.log(0.7)),
    ],
)
def test_numbers_have_the_digits_of_the_same_expression_in_floats(
    result: Value, expected: float
) -> None:
    assert result.data == expected


def test_relu_has_no_slope_at_the_kink() -> None:
    x = Value(0.0)
    x.relu().backward()
    assert x.grad == 0.0


@pytest.mark.parametrize("number", [0.0, -2.5])
def test_the_logarithm_of_nothing_or_less_is_refused_with_a_reason(number: float) -> None:
    with pytest.raises(FloatingPointError, match=rf"logarithm of {number}: a probability has"):
        Value(number).log()


numbers_strategy = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=9)


@pytest.mark.parametrize(
    ("short", "written_out"),
    [(total, lambda x: reduce(add, x)), (mean, lambda x: (1 / len(x)) * reduce(add, x))],
)
@pytest.mark.parametrize(
    "operands", [lambda x: x, lambda x: [*x, x[0]], lambda x: [*x, *x]], ids=["", "first", "all"]
)
@settings(deadline=None)
@given(numbers=numbers_strategy, upstream=st.floats(-1e3, 1e3))
@example(numbers=[0.1, 0.2, 0.3, 1e6, -1e6], upstream=0.1)
def test_total_and_mean_are_the_written_out_sums_to_the_digit(
    short: Callable[[list[Value]], Value],
    written_out: Callable[[list[Value]], Value],
    operands: Callable[[list[Value]], list[Value]],
    numbers: list[float],
    upstream: float,
) -> None:
    assert_same_digits(
        lambda x: short(operands(x)) * upstream,
        lambda x: written_out(operands(x)) * upstream,
        numbers,
    )


@pytest.mark.parametrize(
    "operands",
    [lambda x, y: (x, y), lambda x, y: (x, x), lambda x, y: (x, x[::-1])],
    ids=["different", "the same", "the same elsewhere"],
)
@settings(deadline=None)
@given(
    pairs=st.lists(st.tuples(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3)), min_size=1, max_size=9),
    upstream=st.floats(-1e3, 1e3),
)
@example(pairs=[(0.1, 0.2), (0.3, 0.7), (1e3, 1e3), (-1e3, 1e3)], upstream=0.1)
def test_dot_is_the_written_out_sum_of_products_to_the_digit(
    operands: Callable[[list[Value], list[Value]], tuple[list[Value], list[Value]]],
    pairs: list[tuple[float, float]],
    upstream: float,
) -> None:
    n = len(pairs)
    assert_same_digits(
        lambda x: dot(*operands(x[:n], x[n:])) * upstream,
        lambda x: reduce(add, map(mul, *operands(x[:n], x[n:]))) * upstream,
        [a for a, _ in pairs] + [b for _, b in pairs],
    )


def assert_same_digits(
    short: Callable[[list[Value]], Value],
    written_out: Callable[[list[Value]], Value],
    numbers: Sequence[float],
) -> None:
    ours, theirs = ([Value(number) for number in numbers] for _ in range(2))
    a, b = short(ours), written_out(theirs)
    a.backward()
    recursive_backward(b)
    assert a.data == b.data
    assert [x.grad for x in ours] == [x.grad for x in theirs]


# scales so different that a sum of gradients has other digits in another order
scales = st.sampled_from([1.0, -1.0, 0.1, 1e16, -1e16, 3.7, 1e8])


@st.composite
def sums(draw: st.DrawFn) -> list[tuple[int, float, int, float]]:
    """Numbers made of two earlier ones: a * number_i + b * number_j, without factors of 1.0."""
    return [
        (draw(st.integers(0, n)), draw(scales), draw(st.integers(0, n)), draw(scales))
        for n in range(draw(st.integers(1, 9)))
    ]


@settings(max_examples=300, deadline=None)
@given(sums())
@example([(0, 1e16, 0, 1e16), (0, 0.1, 0, 1.0), (2, -1e16, 1, 1e16)])  # layer by layer is not it
def test_gradients_add_up_in_the_order_of_the_original_program(
    program: list[tuple[int, float, int, float]],
) -> None:
    def build() -> list[Value]:
        values = [Value(1.0)]
        for i, a, j, b in program:
            left = values[i] if a == 1.0 else values[i] * a
            values.append(left + (values[j] if b == 1.0 else values[j] * b))
        return values

    ours, theirs = build(), build()
    ours[-1].backward()
    recursive_backward(theirs[-1])
    assert [value.grad for value in ours] == [value.grad for value in theirs]


def test_gradients_add_up_from_the_last_operand_to_the_first() -> None:
    x = Value(1.0)
    ((x * 1.0 + x * 1e16) + x * -1e16).backward()
    assert x.grad == (-1e16 + 1e16) + 1.0
    assert x.grad != (1.0 + 1e16) + -1e16  # the result of the other order


def test_a_value_passes_its_gradient_on_when_it_has_all_of_it() -> None:
    for order in (1, -1):
        x = Value(2.0)
        b = x * 3
        a = b * 5
        reduce(add, [a, b][::order]).backward()
        assert x.grad == 18.0


def test_a_chain_of_100_000_additions_runs_backward() -> None:
    x = Value(1.0)
    chain = x
    for _ in range(100_000):
        chain = chain + x
    chain.backward()
    assert x.grad == 100_001.0


def test_a_second_run_over_a_graph_is_refused_and_changes_nothing() -> None:
    x = Value(2.0)
    loss = (x * x).exp() * 3
    loss.backward()
    once = x.grad
    with pytest.raises(RuntimeError, match="already run through"):
        loss.backward()
    assert x.grad == once


def test_a_run_over_a_part_that_was_run_already_is_refused_and_changes_nothing() -> None:
    x = Value(2.0)
    shared = x * 3
    first, second = shared * 5, shared.exp() + x
    first.backward()
    once = x.grad
    with pytest.raises(RuntimeError, match="build the graph again"):
        second.backward()
    assert (x.grad, shared.grad) == (once, 5.0)


def test_the_refused_run_would_have_counted_twice() -> None:
    def losses(x: Value) -> tuple[Value, Value]:
        a = 3 * x
        return 5 * a, 7 * a

    x = Value(1.0)
    first, second = losses(x)
    recursive_backward(first)
    recursive_backward(second)
    assert x.grad == 51.0

    x = Value(1.0)
    first, second = losses(x)
    first.backward()
    with pytest.raises(RuntimeError, match="gives dx = 51, where the derivative is 36"):
        second.backward()

    x = Value(1.0)
    first, second = losses(x)
    (first + second).backward()
    assert x.grad == 36.0


def test_graphs_that_share_only_leaves_add_to_their_gradients() -> None:
    x, y = Value(2.0), Value(3.0)
    (x * y).backward()
    (x * 10).backward()
    assert (x.grad, y.grad) == (13.0, 2.0)
