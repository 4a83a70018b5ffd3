"""The initial weights."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from itertools import repeat
from math import prod
from random import Random
from typing import Any

from microgpt.config import Config
from microgpt.layout import param_shapes
from microgpt.taps import params as table


def init_params(config: Config, vocab_size: int, rng: Random) -> dict[str, Any]:
    """Every weight drawn from gauss(0, std): parameter by parameter, row by row.

    Returns tensors by name: a matrix as n_out rows of n_in numbers, a vector as its numbers. The
    table says which std a parameter has, and each weight takes one draw even where std is 0; a
    parameter for which the table has a number takes none.
    """
    params: dict[str, Any] = {}
    for name, (*n_out, n_in) in param_shapes(config, vocab_size).items():
        init, size = table(config)[name].init, prod(n_out) * n_in
        if isinstance(init, str):
            std = getattr(config, init)
            drawn: Iterable[float] = (rng.gauss(0, std) for _ in range(size))
        else:
            drawn = repeat(init, size)
        # one block per tensor: the memory of many small blocks is never given back to the system
        numbers = memoryview(array("d", drawn))
        by_row = [numbers[start : start + n_in] for start in range(0, size, n_in)]
        params[name] = by_row if n_out else numbers
    return params
