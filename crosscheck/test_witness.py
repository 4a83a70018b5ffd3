"""The gradients of both implementations equal derivatives that no backward pass computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from crosscheck.cases import Case, case_names, draw_params, load_case, with_params
from crosscheck.compare import Disagreement, Outcome, Tally, exhibit
from crosscheck.lines import lines_of
from crosscheck.tolerance import FLOAT64
from crosscheck.trace import Array, backward_order, suited
from crosscheck.witness import as_direction, complex_step, difference
from microgpt.backend import BACKENDS, fresh_state, load_backend
from vectorized.flat import flatten

TOLERANCE = FLOAT64.tolerances["gradient"]
SMOOTH = [name for name in case_names() if not load_case(name).kink]  # on a kink is no derivative
SMALL = ("one-position", "repeated-token", "tied-two-layers", "three-layers")


def gradient(case: Case, backend_name: str) -> Array:
    """(P,): the gradient of the loss of the first batch, by an implementation as it trains."""
    backend = load_backend(
        backend_name, suited(case.config, backend_name, "float64"), fresh_state(case.params)
    )
    backend.forward(case.docs(0))
    backend.backward()
    return flatten({name: backend.grads()[name] for name in case.params}, np.dtype("float64"))


@pytest.mark.about("the witness")
@pytest.mark.parametrize("name", SMALL)
def test_every_parameter_by_complex_step(name: str, tallies: list[Tally], settle: Any) -> None:
    case = load_case(name)
    sides = {side: gradient(case, side) for side in BACKENDS}
    witnessed = complex_step(case, np.eye(len(sides["scalar"])))
    shares = {side: TOLERANCE.shares(witnessed, found) for side, found in sides.items()}
    wrong = [side for side in BACKENDS if shares[side].max() > 1]
    if wrong:
        numbers = {side: as_direction(case, sides[side]) for side in BACKENDS}
        true, exceeding = as_direction(case, witnessed), as_direction(case, shares[wrong[0]])
        settle(_objection(case, wrong, numbers, true, exceeding), labels=("witness", wrong[0]))
    assert np.count_nonzero(witnessed) > len(witnessed) // 3
    columns = enumerate((as_direction(case, shares[side]) for side in BACKENDS), 1)
    settle(Outcome(name, shares={n: _worst(column) for n, column in columns}), counted=False)
    worst = max(float(share.max()) for share in shares.values())
    about = f"gradient of {name} by complex step"
    tallies.append(Tally(1, 2, 2 * len(witnessed), worst, about))


def _objection(
    case: Case,
    wrong: Sequence[str],
    numbers: Mapping[str, Mapping[str, Array]],
    true: Mapping[str, Array],
    shares: Mapping[str, Array],
) -> Outcome:
    """The outcome for the first parameter whose gradient is not the derivative of the loss."""
    name = next(name for name in backward_order(true) if shares[name].max() > 1)
    side = wrong[0]
    key = f"{'unwatched' if side == 'vectorized' else 'gradient'}/d{name}"  # see `gradient`
    index = exhibit(key, true[name], shares[name])
    others = [one for one in BACKENDS if one not in wrong]
    verdict = f"in {side} alone: that of {others[0]} is" if others else f"in {' and '.join(wrong)}"
    found = Disagreement(
        case.name,
        1,
        key,
        f"is not the derivative of the loss, {verdict}",
        shape=true[name].shape,
        index=index,
        reference=float(true[name][index]),
        candidate=float(numbers[side][name][index]),
        tolerance=TOLERANCE,
        exceeding=int((shares[name] > 1).sum()),
        elements=true[name].size,
        diagnosis=""
        if others
        else "the two sides agree with each other, and not with the witness:"
        " the code that they share is at fault, or both have the same mistake",
        lines=lines_of(key, case.config),
    )
    return Outcome(case.name, found=[found], shares={1: _worst(shares)})


def _worst(shares: Mapping[str, Array]) -> dict[str, float]:
    """The largest share of each gradient, for the map."""
    return {f"gradient/d{name}": float(shares[name].max()) for name in backward_order(shares)}


def _along(case: Case, what: str) -> Outcome:
    """The outcome that says that a derivative along a direction is wrong."""
    problem = f"the derivative along a random direction is wrong in {what}"
    return Outcome(case.name, found=[Disagreement(case.name, 1, "", problem)])


@pytest.mark.about("the witness")
@pytest.mark.parametrize("name", SMOOTH)
def test_random_directions_by_complex_step(name: str, settle: Any) -> None:
    case = load_case(name)
    sides = {side: gradient(case, side) for side in BACKENDS}
    ours = sides["scalar"]
    directions = np.random.default_rng(7).standard_normal((20, len(ours)))
    witnessed = complex_step(case, directions)
    assert np.abs(witnessed).min() > 0
    # rounding in a sum of P products is measured by the size of its terms
    allowed = 1e-12 + 1e-9 * np.abs(directions * ours).sum(axis=1)
    wrong = [
        side
        for side, found in sides.items()
        if not (np.abs(directions @ found - witnessed) <= allowed).all()
    ]
    if wrong:
        settle(_along(case, " and ".join(wrong)))
    apart = {side: np.abs(directions @ found - witnessed) for side, found in sides.items()}
    shares = {
        n: {"gradient/along 20 random directions": float((apart[side] / allowed).max())}
        for n, side in enumerate(BACKENDS, 1)
    }
    settle(Outcome(name, shares=shares), counted=False)


@pytest.mark.about("the witness")
@pytest.mark.parametrize("name", ["one-document", "microgpt-243", "two-layers", "unused-row"])
def test_scalar_along_random_directions_by_differences(
    name: str, notes: list[str], settle: Any
) -> None:
    """scalar's forward pass takes no complex numbers, so differences of its losses are compared."""
    case = load_case(name)
    ours = gradient(case, "scalar")
    rng = np.random.default_rng(3)
    margins = []
    for _ in range(12):
        direction = rng.standard_normal(len(ours)) / np.sqrt(len(ours))
        derivative, margin = difference(case, "scalar", as_direction(case, direction))
        if margin > 2:  # no ReLU crosses its kink within reach of the step
            margins.append(margin)
            if derivative != pytest.approx(direction @ ours, rel=1e-8, abs=1e-9):
                settle(
                    _along(case, f"scalar: {direction @ ours!r}, and by differences {derivative!r}")
                )
    assert len(margins) >= 3
    notes.append(
        f"differences on {name}: {len(margins)} directions, the nearest kink"
        f" {min(margins):.0f} steps away"
    )


@pytest.mark.about("the witness")
def test_the_witness_objects_to_a_wrong_gradient() -> None:
    case = load_case("repeated-token")
    wrong = gradient(case, "vectorized")
    planted = [np.argmax(np.abs(wrong))]
    wrong[planted] *= 1 + 1e-6
    witnessed = complex_step(case, np.eye(len(wrong))[planted])
    assert TOLERANCE.shares(witnessed, wrong[planted]).max() > 1


@pytest.mark.about("the witness")
def test_the_witness_is_independent_of_the_parameters_drawn() -> None:
    case = load_case("repeated-token")
    other = with_params(case, draw_params(case, seed=99))
    a, b = (
        complex_step(one, np.eye(len(gradient(one, "vectorized")))[:5]) for one in (case, other)
    )
    assert not np.allclose(a, b)
