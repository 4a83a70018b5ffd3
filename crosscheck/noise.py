"""What rounding may do to each tensor of a case: the reference's own answer to a perturbation.

The reference runs once more, with every number that a step is given (parameters, Adam's moments,
the gradient that Adam takes) moved by one unit in the last place, up or down. How far a tensor
moves by that is its noise. Sums in another order, or another exp, move it about as far.

One run may leave an element where it was by accident, so an element's noise is no less than the
root mean square of its row, and than a tenth of that of the tensor, and than its own last place.
Adam's v is a square and spans many orders of magnitude: its noise is that of its root.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from crosscheck.cases import Case
from crosscheck.trace import Array, Step, part, real, split_key, suited
from microgpt.backend import State, load_backend
from microgpt.train import learning_rate

Noise = Mapping[str, Array]  # by key
ULP = 2.0**-52
SHARE = 0.1  # of the tensor's root mean square
SQUARES = ("entry_v", "adam_v")


def noise(case: Case, backend_name: str, steps: Sequence[Step], seed: int = 0) -> list[Noise]:
    """The noise of each tensor of a trace, step by step; the implementation must be the trace's.

    Empty from the step on that lacks what it began with, or that the implementation cannot run.
    """
    rng = np.random.default_rng(seed)

    def moved(tensors: Mapping[str, Any]) -> dict[str, Array]:
        numbers = {name: np.array(tensor, "float64") for name, tensor in tensors.items()}
        return {name: x + ULP * x * rng.choice((-1, 1), x.shape) for name, x in numbers.items()}

    config = suited(case.config, backend_name, "float64")
    found: list[Noise] = []
    with suppress(KeyError, ArithmeticError), np.errstate(all="ignore"):
        state = State(*(part(steps[0], phase) for phase in ("entry", "entry_m", "entry_v")), 0)
        for number, step in enumerate(steps):
            start = State(moved(state.params), moved(state.m), moved(state.v), number)
            backend = load_backend(backend_name, config, start, watch=True)
            backend.forward([row[row >= 0].tolist() for row in step["batch/tokens"]])
            backend.backward()
            again = _keyed("entry/", start.params)
            again |= _keyed("entry_m/", start.m) | _keyed("entry_v/", start.v)
            again |= _keyed("forward/", backend.taps()) | _keyed("backward/d", backend.dtaps())
            again |= _keyed("gradient/d", backend.grads())
            now = _moves(step, again)
            # Adam takes a gradient no element of which has stayed where it was by accident
            for name, grad in part(step, "gradient", "d").items():
                key = f"gradient/d{name}"
                again[key] = grad + np.copysign(now[key], again[key] - grad)
            backend.set_grads(part(again, "gradient", "d"))
            backend.update(learning_rate(number, config))
            state = backend.state()
            after = _keyed("adam_m/", state.m) | _keyed("adam_v/", state.v)
            after |= _keyed("params/", state.params)
            for name in start.params:
                after[f"update/{name}"] = after[f"params/{name}"] - again[f"entry/{name}"]
            found.append({**_elsewhere(now, step), **_moves(step, after)})
    return found


def _keyed(prefix: str, tensors: Mapping[str, Any]) -> dict[str, Array]:
    return {f"{prefix}{name}": np.array(tensor) for name, tensor in tensors.items()}


def _moves(step: Step, again: Step) -> dict[str, Array]:
    """The noise of tensors of a step, from what they are when it is perturbed."""
    found = {}
    for key in again.keys() & step.keys():
        phase, name = split_key(key)
        here, there = np.asarray(step[key], "float64"), again[key]
        if phase in SQUARES:
            here, there = here**0.5, there**0.5
        rounded = again[f"params/{name}"] if phase == "update" else here
        at = real(key, here.shape, step["batch/tokens"])
        found[key] = _smoothed(there - here, at) + ULP * np.abs(rounded)
    return found


def _elsewhere(found: Mapping[str, Array], step: Step) -> Noise:
    """The noise, also of what is computed a second time in another way."""
    aliases = {
        "eval/loss_t": found.get("forward/loss_t"),
        "unwatched/loss": found.get("forward/loss"),
        **{f"unwatched/d{name}": x for name, x in part(found, "gradient", "d").items()},
    }
    if "forward/logits" in found:
        positions = int((step["batch/tokens"][0] >= 0).sum()) - 1
        aliases["read/logits"] = found["forward/logits"][0, :positions]
    return {**found, **{key: x for key, x in aliases.items() if x is not None}}


def _smoothed(moves: Array, there: Array) -> Array:
    """The size of each move, no less than that of its row and a share of that of the tensor."""
    sizes = np.where(there, np.abs(moves), 0.0)
    if not sizes.ndim:
        return sizes
    squares, counts = (sizes**2).sum(-1, keepdims=True), there.sum(-1, keepdims=True)
    row = np.sqrt(squares / np.maximum(counts, 1))
    whole = np.sqrt(squares.sum() / max(counts.sum(), 1))
    return np.maximum(np.maximum(sizes, row), SHARE * whole)
