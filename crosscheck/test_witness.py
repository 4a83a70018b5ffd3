"""The third witness: both gradients equal derivatives that no backward pass had a part in."""

from __future__ import annotations

import numpy as np
import pytest

from crosscheck.cases import Case, case_names, draw_params, load_case, with_params
from crosscheck.compare import Tally
from crosscheck.tolerance import FLOAT64
from crosscheck.trace import Array, suited
from crosscheck.witness import as_direction, complex_step, difference
from microgpt.backend import fresh_state, load_backend
from vectorized.flat import flatten

TOLERANCE = FLOAT64.tolerances["gradient"]
SMOOTH = [name for name in case_names() if not load_case(name).kink]  # a kink has no derivative
SMALL = ("one-position", "repeated-token", "tied-two-layers", "three-layers")


def gradient(case: Case, backend_name: str) -> Array:
    """The gradient of the loss of the first batch, (P,)."""
    backend = load_backend(
        backend_name, suited(case.config, backend_name, "float64"), fresh_state(case.params)
    )
    backend.forward(case.docs(0))
    backend.backward()
    return flatten({name: backend.grads()[name] for name in case.params}, np.dtype("float64"))


@pytest.mark.parametrize("name", SMALL)
def test_every_parameter_by_complex_step(name: str, tallies: list[Tally]) -> None:
    case = load_case(name)
    ours, theirs = gradient(case, "scalar"), gradient(case, "vectorized")
    witnessed = complex_step(case, np.eye(len(ours)))
    worst = 0.0
    for backend, gradients in (("scalar", ours), ("vectorized", theirs)):
        shares = as_direction(case, TOLERANCE.shares(witnessed, gradients))
        for tensor, share in shares.items():
            assert share.max() <= 1, f"{name}: the d{tensor} of {backend} is not the derivative"
            worst = max(worst, float(share.max()))
    assert np.count_nonzero(witnessed) > len(witnessed) // 3
    tallies.append(Tally(1, 2, 2 * len(ours), worst, f"gradient of {name} by complex step"))


@pytest.mark.parametrize("name", SMOOTH)
def test_random_directions_by_complex_step(name: str) -> None:
    case = load_case(name)
    ours, theirs = gradient(case, "scalar"), gradient(case, "vectorized")
    directions = np.random.default_rng(7).standard_normal((20, len(ours)))
    witnessed = complex_step(case, directions)
    assert np.abs(witnessed).min() > 0
    # rounding in a sum of P products is measured by the size of its terms
    allowed = 1e-12 + 1e-9 * np.abs(directions * ours).sum(axis=1)
    assert (np.abs(directions @ ours - witnessed) <= allowed).all()
    assert (np.abs(directions @ theirs - witnessed) <= allowed).all()


@pytest.mark.parametrize("name", ["one-document", "microgpt-243", "two-layers", "unused-row"])
def test_scalar_along_random_directions_by_differences(name: str, notes: list[str]) -> None:
    """The witness of scalar's own forward pass, which takes no complex numbers."""
    case = load_case(name)
    ours = gradient(case, "scalar")
    rng = np.random.default_rng(3)
    margins = []
    for _ in range(12):
        direction = rng.standard_normal(len(ours)) / np.sqrt(len(ours))
        derivative, margin = difference(case, "scalar", as_direction(case, direction))
        if margin > 2:  # no ReLU crosses its kink within reach of the step
            margins.append(margin)
            assert derivative == pytest.approx(direction @ ours, rel=1e-8, abs=1e-9), margin
    assert len(margins) >= 3
    notes.append(
        f"differences on {name}: {len(margins)} directions, the nearest kink"
        f" {min(margins):.0f} steps away"
    )


def test_the_witness_objects_to_a_wrong_gradient() -> None:
    case = load_case("repeated-token")
    wrong = gradient(case, "vectorized")
    wrong[np.argmax(np.abs(wrong))] *= 1 + 1e-6
    witnessed = complex_step(case, np.eye(len(wrong)))
    assert TOLERANCE.shares(witnessed, wrong).max() > 1


def test_the_witness_is_independent_of_the_parameters_drawn() -> None:
    case = load_case("repeated-token")
    other = with_params(case, draw_params(case, seed=99))
    a, b = (
        complex_step(one, np.eye(len(gradient(one, "vectorized")))[:5]) for one in (case, other)
    )
    assert not np.allclose(a, b)
