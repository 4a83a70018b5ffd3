"""The initial weights."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from random import Random

from microgpt.config import Config
from microgpt.layout import param_shapes


def init_params(config: Config, vocab_size: int, rng: Random) -> dict[str, list[Sequence[float]]]:
    """Every weight drawn from gauss(0, std): parameter by parameter, row by row.

    Returns matrices by name, as n_out rows of n_in numbers. The residual projections (attn_wo,
    mlp_fc2) have a standard deviation of their own; each weight takes one draw even where it is 0.
    """
    params: dict[str, list[Sequence[float]]] = {}
    for name, (n_out, n_in) in param_shapes(config, vocab_size).items():
        residual = name.endswith((".attn_wo", ".mlp_fc2"))
        std = config.init_std_residual if residual else config.init_std
        # one block per matrix: the memory of many small blocks is never given back to the system
        numbers = memoryview(array("d", (rng.gauss(0, std) for _ in range(n_out * n_in))))
        params[name] = [numbers[start : start + n_in] for start in range(0, len(numbers), n_in)]
    return params
