"""How the arrays lie: a batch of documents as columns, the parameters as views of one buffer.

A vector of scalar/ is a column here. N = B T columns stand side by side, document after document,
so that y = w . x is one matrix product and every sum over channels runs along axis 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from microgpt.layout import grow

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Batch:
    """B documents, padded at the end to the T positions of the longest."""

    tokens: Array  # (B, T), the inputs
    targets: Array  # (N,), where each column's target token sits in a flattened (V, N)
    weights: Array  # (N,), each position's share of the loss: 1 / (B n), and 0 for padding
    ragged: bool  # whether there is padding at all


def pad(docs: Sequence[Sequence[int]], dtype: np.dtype) -> Batch:
    """Documents of n + 1 tokens, any n, as one batch of inputs and targets."""
    B, T = len(docs), max(map(len, docs)) - 1
    ids: list[list[int]] = []
    weights: list[float] = []
    for tokens in docs:
        n = len(tokens) - 1
        ids.append([*tokens, *[0] * (T - n)])
        weights += [1 / (B * n)] * n + [0.0] * (T - n)
    tokens_and_targets = np.array(ids)  # (B, T + 1)
    return Batch(
        tokens=tokens_and_targets[:, :-1],
        targets=tokens_and_targets[:, 1:].reshape(-1) * (B * T) + np.arange(B * T),
        weights=np.array(weights, dtype),
        ragged=0.0 in weights,
    )


def flatten(tensors: Mapping[str, Any], dtype: np.dtype) -> Array:
    """One buffer that holds all tensors, one after the other, row by row."""
    return np.concatenate([np.asarray(tensor, dtype).reshape(-1) for tensor in tensors.values()])


def named_views(flat: Array, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Array]:
    """The tensors of such a buffer: views, so that writing to one writes to the other."""
    views, start = {}, 0
    for name, (n_out, n_in) in shapes.items():
        views[name] = flat[start : start + n_out * n_in].reshape(n_out, n_in)
        start += n_out * n_in
    return views


def model_tree(flat: Array, shapes: Mapping[str, tuple[int, int]], n_layer: int) -> SimpleNamespace:
    """The tensors of a buffer as the model reads them: params.wte, params.layers[0].attn_wq.

    attn_wq, attn_wk and attn_wv lie side by side, so attn_wqkv (3 C, C) is a view of all three.
    """
    params = grow(named_views(flat, shapes), n_layer)
    start = 0
    for name, (n_out, n_in) in shapes.items():
        if name.endswith(".attn_wq"):
            layer = params.layers[int(name.removeprefix("layer").removesuffix(".attn_wq"))]
            layer.attn_wqkv = flat[start : start + 3 * n_out * n_in].reshape(3 * n_out, n_in)
        start += n_out * n_in
    return params


def column_sum(x: Array) -> Array:
    """s = x_0 + .. + x_n-1, in every column: (n, N) -> (N,). As a product, faster than sum()."""
    return _filled(len(x), 1.0, x.dtype).dot(x)


def column_mean(x: Array) -> Array:
    """s = 1/n * (x_0 + .. + x_n-1), in every column: (n, N) -> (N,)."""
    return _filled(len(x), 1 / len(x), x.dtype).dot(x)


@cache
def _filled(n: int, value: float, dtype: np.dtype) -> Array:
    return np.full(n, value, dtype)
