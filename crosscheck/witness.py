"""The witness: derivatives of the loss that no backward pass computes.

The forward pass of vectorized/ computes the loss on complex numbers. A step of 1e-30 i in one
direction moves the imaginary part of the loss by 1e-30 times the derivative in that direction.
Nothing is subtracted, so the derivative is exact to rounding.

The Values of scalar/ cannot hold complex numbers: there, the derivative is a difference of losses.

Source: Squire and Trapp, "Using complex variables to estimate derivatives of real functions",
SIAM Review 40 (1998).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from crosscheck.cases import Case
from crosscheck.trace import Array, suited
from microgpt.backend import fresh_state, load_backend
from microgpt.layout import Tree, param_shapes
from vectorized.batch import pad
from vectorized.flat import flatten, model_tree, named_views
from vectorized.model import loss_forward

STEP = 1e-30


def complex_step(case: Case, directions: Array) -> Array:
    """(K,): the derivative of the loss of the case's first batch along each direction.

    directions    (K, P), where P is the number of parameters, in the order of the state dict
    """
    config, V = case.config, case.tokenizer.vocab_size
    shapes = param_shapes(config, V)
    batch = pad(case.docs(0), np.dtype("float64"))
    flat = flatten(case.params, np.dtype("complex128"))  # (P,)
    params = model_tree(flat, shapes, config.n_layer)
    point = flat.copy()
    derivatives = np.empty(len(directions))
    for k, direction in enumerate(directions):
        flat[:] = point + 1j * STEP * direction
        with np.errstate(all="ignore"):  # what padding gives need not be finite
            loss = loss_forward(batch, params, config, Tree(config.n_layer))
            derivatives[k] = np.imag(loss) / STEP
    return derivatives


def difference(case: Case, backend_name: str, direction: Mapping[str, Any]) -> tuple[float, float]:
    """The derivative of a backend's loss along a direction, by differences, and the kink margin.

    Two central differences, with steps h and 2 h, cancel each other's leading error. The margin is
    the distance of the nearest ReLU input from its kink, in steps of that input; below 1, an input
    may have crossed its kink between the losses, and the difference is no derivative.
    """

    def loss(h: float) -> tuple[float, list[Array]]:
        params = {
            name: np.asarray(tensor) + h * direction[name] for name, tensor in case.params.items()
        }
        backend = load_backend(
            backend_name,
            suited(case.config, backend_name, "float64"),
            fresh_state(params),
            watch=True,
        )
        value = backend.forward(case.docs(0))
        taps = backend.taps()
        return value, [np.array(taps[name]) for name in taps if name.endswith(".mlp_pre")]

    h = 1e-4
    (left2, _), (left, before), (right, after), (right2, _) = (
        loss(-2 * h),
        loss(-h),
        loss(h),
        loss(2 * h),
    )
    moved = [np.abs(b - a) for a, b in zip(before, after)]
    here = [np.abs(a + b) / 2 for a, b in zip(before, after)]
    margin = min(float((x / (m + 1e-300))[x > 0].min()) for x, m in zip(here, moved))
    return (8 * (right - left) - (right2 - left2)) / (12 * h), margin


def as_direction(case: Case, flat: Array) -> dict[str, Array]:
    """A direction (P,) as tensors by name."""
    return named_views(flat, param_shapes(case.config, case.tokenizer.vocab_size))
