"""The initial weights."""

from __future__ import annotations

from random import Random

from microgpt.config import Config
from microgpt.layout import param_shapes


def init_params(config: Config, vocab_size: int, rng: Random) -> dict[str, list[list[float]]]:
    """Every weight drawn from gauss(0, std): parameter by parameter, row by row.

    Returns nested lists [n_out][n_in] by name. The residual projections (attn_wo, mlp_fc2) have
    a standard deviation of their own; each weight takes one draw even where it is 0.
    """
    params = {}
    for name, (n_out, n_in) in param_shapes(config, vocab_size).items():
        residual = name.endswith((".attn_wo", ".mlp_fc2"))
        std = config.init_std_residual if residual else config.init_std
        params[name] = [[rng.gauss(0, std) for _ in range(n_in)] for _ in range(n_out)]
    return params
