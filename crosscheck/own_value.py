"""The check of a candidate's Value: each operation's value, and its derivatives by complex step."""

from __future__ import annotations

import cmath
from collections.abc import Callable
from random import Random
from typing import Any

from crosscheck.alone import Wrong
from crosscheck.candidate import Candidate, watched
from crosscheck.witness import STEP

# by formula: the number of operands, and the operation on Values and on complex numbers
OPERATIONS: dict[str, tuple[int, Callable[..., Any], Callable[..., Any]]] = {
    "a + b": (2, lambda a, b: a + b, lambda a, b: a + b),
    "a * b": (2, lambda a, b: a * b, lambda a, b: a * b),
    "a ** 3": (1, lambda a: a**3, lambda a: a**3),
    "a ** -0.5": (1, lambda a: a**-0.5, lambda a: a**-0.5),
    "a.log()": (1, lambda a: a.log(), cmath.log),
    "a.exp()": (1, lambda a: a.exp(), cmath.exp),
    "a.relu()": (1, lambda a: a.relu(), lambda a: a if a.real > 0 else 0 * a),
    "(a - 9).relu()": (1, lambda a: (a - 9).relu(), lambda a: 0 * a),
    "a.tanh()": (1, lambda a: a.tanh(), cmath.tanh),
    "-a": (1, lambda a: -a, lambda a: -a),
    "a - b": (2, lambda a, b: a - b, lambda a, b: a - b),
    "a / b": (2, lambda a, b: a / b, lambda a, b: a / b),
    "2 + a": (1, lambda a: 2 + a, lambda a: 2 + a),
    "2 * a": (1, lambda a: 2 * a, lambda a: 2 * a),
    "a + a": (1, lambda a: a + a, lambda a: a + a),
    "a * a": (1, lambda a: a * a, lambda a: a * a),
    "a * b + a": (2, lambda a, b: a * b + a, lambda a, b: a * b + a),
    "c * c, c = a * b": (2, lambda a, b: (c := a * b) * c, lambda a, b: (a * b) ** 2),
}
NEEDED_BY_GELU = "a.tanh()"


def value_alone(candidate: Candidate) -> Wrong | None:
    """The first operation of a candidate's Value whose value or derivative is wrong, or None."""
    rng, value = Random(candidate.seed), candidate.functions["Value"]
    for formula, (count, theirs, ours) in OPERATIONS.items():
        if formula == NEEDED_BY_GELU and not hasattr(value, "tanh"):
            continue
        for _ in range(3):
            numbers = [rng.uniform(0.2, 3.0) for _ in range(count)]
            leaves = [value(x) for x in numbers]

            def call(leaves: list[Any] = leaves, theirs: Callable[..., Any] = theirs) -> Any:
                result = theirs(*leaves)
                result.backward()
                return result

            result = watched(candidate, "Value", call)
            candidate.calls["Value"] += 1
            wanted = {"the value": (complex(ours(*numbers)).real, result.data)}
            for i, (letter, leaf) in enumerate(zip("ab", leaves)):
                moved = [x + 1j * STEP * (i == j) for j, x in enumerate(numbers)]
                wanted[f"d{letter}"] = complex(ours(*moved)).imag / STEP, leaf.grad
            for label, (right, found) in wanted.items():
                if not abs(found - right) <= 1e-12 * max(1.0, abs(right)) * bool(right):
                    given = ", ".join(f"{a} = {x!r}" for a, x in zip("ab", numbers))
                    return Wrong("Value", formula, f"gives wrong numbers in {label}", label=label,
                                 reference=right, candidate=float(found), exceeding=1, elements=1,
                                 arguments=given, line=candidate.line_of("Value"))  # fmt: skip
    return None
