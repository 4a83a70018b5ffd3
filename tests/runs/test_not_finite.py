"""Both implementations refuse numbers that are not finite."""

from __future__ import annotations

import numpy as np
import pytest

from crosscheck.cases import load_case
from microgpt.backend import BACKENDS, fresh_state, load_backend


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ask", ["forward", "position_losses"])
@pytest.mark.parametrize(
    ("case_name", "tensor", "factor"),
    [
        ("one-document", "layer0.attn_wq", np.nan),
        ("ragged-batch", "layer0.mlp_fc2", np.inf),
        ("ragged-batch", "lm_head", 1e309),
        ("tied-two-layers", "layer0.mlp_fc1", 1e200),  # its square
    ],
)
def test_a_loss_that_is_not_finite_is_refused_by_both(
    case_name: str, tensor: str, factor: float, ask: str, backend: str
) -> None:
    case = load_case(case_name)
    params = {name: np.array(matrix) for name, matrix in case.params.items()}
    params[tensor] *= factor
    model = load_backend(backend, case.config, fresh_state(params))
    with pytest.raises(FloatingPointError):
        getattr(model, ask)(case.docs(0))


def test_a_target_without_any_probability_is_refused_by_scalar_alone() -> None:
    """A limit that docs/proof.md states: -log(0) is no number, log(softmax) is one."""
    case = load_case("unlikely-target")
    params = {name: np.array(matrix) for name, matrix in case.params.items()}
    params["lm_head"][0] = -300.0
    scalar, vectorized = (
        load_backend(name, case.config, fresh_state(params)) for name in ("scalar", "vectorized")
    )
    with pytest.raises(FloatingPointError, match="a probability has shrunk to nothing"):
        scalar.forward(case.docs(0))
    assert 745 < max(map(max, vectorized.position_losses(case.docs(0)))) < 1e4
