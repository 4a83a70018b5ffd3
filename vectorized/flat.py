"""All parameters in one buffer, one after the other, and their names in it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from microgpt.layout import Tree, grow
from vectorized.model import Array

Shapes = Mapping[str, tuple[int, ...]]


def flatten(tensors: Mapping[str, Any], dtype: Any) -> Array:
    """One buffer (P,) that holds all tensors, one after the other, row by row."""
    shapes = {name: np.shape(tensor) for name, tensor in tensors.items()}
    flat = np.empty(sum(map(math.prod, shapes.values())), dtype)
    for name, view in named_views(flat, shapes).items():
        with np.errstate(over="ignore"):  # too large for float32 is infinite, and found as such
            view[:] = tensors[name]
    return flat


def named_views(flat: Array, shapes: Shapes) -> dict[str, Array]:
    """The tensors in a buffer: views, so that writing to one writes to the buffer."""
    views, start = {}, 0
    for name, shape in shapes.items():
        end = start + math.prod(shape)
        views[name] = flat[start:end].reshape(shape)
        start = end
    return views


def model_tree(flat: Array, shapes: Shapes, n_layer: int) -> Tree:
    """The tensors of a buffer as the model reads them: params.wte, params.layers[0].attn_wo."""
    return grow(named_views(flat, shapes), n_layer)
