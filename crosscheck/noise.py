"""The noise of each tensor of a case: how far rounding may move it, measured on the reference.

scalar/ runs three times more, and every number that scalar/ is given or computes, forward and
backward, is moved by one unit in the last place, up or down at random. How far a tensor moves at
most is its noise. Sums in another order, or another exp, move a tensor about as far.

A run may leave an element unmoved by accident. So the noise of an element is at least each of: the
root mean square of the moves of its row, and of its column in a matrix; a tenth of the root mean
square of the moves of the tensor; one unit in the element's last place; a sixteenth of a unit in
the last place of the tensor's root mean square. The last two need no measurement. The noise is also
at least what the noise of the tensor's operands makes of the element, by the table: errors that
cancel in scalar/ need not cancel in another text.

Adam's v is a square and spans many orders of magnitude: its noise is that of its root.

Source: Parker, "Monte Carlo arithmetic: exploiting randomness in floating-point arithmetic" (1997).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from itertools import cycle, islice
from operator import mul
from typing import Any

import numpy as np

from crosscheck.cases import Case
from crosscheck.operations import Around, Call, Slot, calls
from crosscheck.trace import ENTRY, Array, Step, part, real, split_key, state_of, suited
from microgpt.backend import State, load_backend
from microgpt.config import Config
from microgpt.train import learning_rate

Noise = Mapping[str, Array]  # the noise of every element, by key
ULP = 2.0**-52
RUNS = 3  # a tensor of one element may stay where it is in one of them
SHARE = 0.1  # of the root mean square of a tensor's moves: the least move of an element
LEAST = 1 / 16  # of a unit in the last place of a tensor's root mean square: the least noise
SQUARES = ("entry_v", "adam_v")  # phases of Adam's v
FACTORS = 99_991  # how many random factors are used in turn; a prime number


def noise(case: Case, steps: Sequence[Step]) -> list[Noise]:
    """The noise of each tensor of a trace that scalar/ has run freely, a mapping for every step.

    The list ends before the first step that lacks its state at entry, or in which scalar/ stops.
    """
    runs = [_of_one_run(case, steps, np.random.default_rng(seed)) for seed in range(RUNS)]
    return [{key: np.maximum.reduce([one[key] for one in same]) for key in same[0]}
            for same in zip(*runs)]  # fmt: skip


def _of_one_run(case: Case, steps: Sequence[Step], rng: np.random.Generator) -> list[Noise]:
    """How far one run at random moves each tensor, a mapping for every step."""

    def moved(tensors: Mapping[str, Any]) -> dict[str, Array]:
        numbers = {name: np.array(tensor, "float64") for name, tensor in tensors.items()}
        return {name: x + ULP * x * rng.choice((-1, 1), x.shape) for name, x in numbers.items()}

    config = suited(case.config, "scalar", "float64")
    found: list[Noise] = []
    with suppress(Exception), np.errstate(all="ignore"):
        state = state_of(steps[0], ENTRY, 0)
        for number, step in enumerate(steps):
            start = State(moved(state.params), moved(state.m), moved(state.v), number)
            backend = load_backend("scalar", config, start, watch=True)
            with _rounding_at_random(rng):
                backend.forward([row[row >= 0].tolist() for row in step["batch/tokens"]])
            backend.backward()
            again = _keyed("entry/", start.params)
            again |= _keyed("entry_m/", start.m) | _keyed("entry_v/", start.v)
            again |= _keyed("forward/", backend.taps()) | _keyed("backward/d", backend.dtaps())
            again |= _keyed("gradient/d", backend.grads())
            now = _moves(step, again)
            now |= {key: np.fmax(now[key], x) for key, x in of_operands(config, step).items()
                    if key in now}  # fmt: skip
            # Adam is given a gradient of which every element has moved by its noise
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
            found.append(_with_second_ways({**now, **_moves(step, after)}, step))
    return found


@contextmanager
def _rounding_at_random(rng: np.random.Generator) -> Iterator[None]:
    """Within this context, every Value and local derivative is moved by one unit, up or down.

    A graph that was built in this context keeps its moved derivatives for backward().
    """
    Value = import_module("scalar.value").Value
    factors = cycle((1 + ULP * rng.choice((-1, 1), FACTORS)).tolist())
    exact = Value.__init__

    def rounded(self: Any, data: float, children: Any = (), local_grads: Any = ()) -> None:
        self.data = data * next(factors)
        self.grad = 0.0
        self._children = children
        self._local_grads = tuple(map(mul, local_grads, islice(factors, len(local_grads))))

    Value.__init__ = rounded
    try:
        yield
    finally:
        Value.__init__ = exact


def of_operands(config: Config, step: Step) -> Noise:
    """How far each tensor moves, by the table, if every operand moves by a unit in the last place.

    The noise of a tensor is at least this, since another text may compute the operands in a way in
    which their errors do not cancel. A tensor is left out if it or an operand is not there, or is
    not numbers in the shape of the table.
    """
    around, rng = Around(config, step), np.random.default_rng(0)
    own: Step = {}  # how far each element of a tensor has moved

    def moved(slot: Slot) -> Any:
        if not slot.is_tensor:
            return slot.value
        keys = (f"backward/{slot.name}", f"forward/{slot.name}")
        move = next((own[key] for key in keys if key in own), 0.0)
        sign = rng.choice((-1, 1), np.shape(slot.value))
        return slot.value + move + ULP * slot.value * sign

    with np.errstate(all="ignore"):
        for key in step:
            parts: list[Call] = []
            if split_key(key)[0] in ("forward", "backward", "gradient"):
                with suppress(KeyError):  # this tensor or an operand is not there as numbers
                    around.tensor(key)
                    parts = calls(around, key)
            if parts:
                moves = [
                    call.total(**{name: moved(slot) for name, slot in call.slots.items()})
                    - call.total()
                    for call in parts
                ]
                own[key] = np.nan_to_num(sum(moves[1:], start=moves[0]))
    found = {}
    for key, moves_of_key in own.items():
        there = real(key, moves_of_key.shape, step["batch/tokens"])
        found[key] = np.maximum(smoothed(moves_of_key, there), least_noise(step, key))
    return _with_second_ways(found, step)


def _keyed(prefix: str, tensors: Mapping[str, Any]) -> Step:
    """Copies of tensors, by their keys."""
    return {f"{prefix}{name}": np.array(tensor) for name, tensor in tensors.items()}


def _moves(step: Step, again: Step) -> Step:
    """The noise of the tensors of a step, from the same tensors after every number was moved."""
    found = {}
    for key in again.keys() & step.keys():
        phase, name = split_key(key)
        here, there = np.asarray(step[key], "float64"), again[key]
        if phase in SQUARES:
            here, there = here**0.5, there**0.5
        rounded = again[f"params/{name}"] if phase == "update" else here
        at = real(key, here.shape, step["batch/tokens"])
        moved = smoothed(there - here, at) + ULP * np.abs(rounded)
        found[key] = np.maximum(moved, least_noise(step, key))
    return found


def least_noise(step: Step, key: str) -> Array:
    """The least that the noise of a tensor can be, which needs no measurement."""
    phase, name = split_key(key)
    numbers = np.asarray(step[f"params/{name}" if phase == "update" else key], "float64")
    sizes = np.abs(numbers) ** 0.5 if phase in SQUARES else np.abs(numbers)
    there = real(key, sizes.shape, step["batch/tokens"])
    whole = np.sqrt((sizes**2).sum(where=there) / max(there.sum(), 1))
    return ULP * np.maximum(sizes, LEAST * whole)


def _with_second_ways(found: Step, step: Step) -> Noise:
    """The noise, and that of what a step computes a second time: eval, read and unwatched."""
    second = {f"unwatched/d{name}": x for name, x in part(found, "gradient", "d").items()}
    for key, same in {"eval/loss_t": "forward/loss_t", "unwatched/loss": "forward/loss"}.items():
        if same in found:
            second[key] = found[same]
    if "forward/logits" in found:
        positions = int((step["batch/tokens"][0] >= 0).sum()) - 1
        read = found["forward/logits"][0, :positions]
        second["read/logits"] = np.maximum(read, least_noise(step, "read/logits"))
    return {**found, **second}


def smoothed(moves: Array, there: Array) -> Array:
    """The size of each move: at least the root mean square of its row, and SHARE of the whole.

    Of a matrix, also that of its column: where one position gives the gradient dy x^T of a weight,
    the moves of a row are those of a single number, dy_o, which may be small by accident.
    """
    sizes = np.where(there, np.abs(moves), 0.0)
    if not sizes.ndim:
        return sizes
    lines = [_typical(sizes, there, axis) for axis in ((-1, -2) if sizes.ndim == 2 else (-1,))]
    return np.maximum.reduce([sizes, *lines, SHARE * _typical(sizes, there, None)])


def _typical(sizes: Array, there: Array, axis: int | None) -> Array:
    """The root mean square along an axis, or of all, in an array of as many axes."""
    squares, counts = (sizes**2).sum(axis, keepdims=True), there.sum(axis, keepdims=True)
    return np.broadcast_to(np.sqrt(squares / np.maximum(counts, 1)), sizes.shape)
