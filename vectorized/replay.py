"""What trains and evaluates: the text, recorded once for every shape of a micro-batch.

Same as scalar:         the numbers, up to rounding.
Different from scalar:  the functions of the text -> the calls that they made (vectorized.record);
                        one document after another -> micro-batches, whose gradients add up.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from microgpt.backend import Docs
from microgpt.config import Config
from microgpt.layout import Tree, grow, pick
from vectorized.adam import adam
from vectorized.batch import MicroBatch, empty_batch, fill, fill_packed, micro_batches, padded
from vectorized.flat import Shapes, named_views
from vectorized.lower import ALIGN, Recording
from vectorized.model import Array, Batch, loss_backward, loss_forward
from vectorized.record import Number, Recorder, address

CALLS = 10_000  # of the recordings that a Replay keeps, some 14 MB
CHUNK = 2**15  # parameters that Adam updates at a time, so that their moments stay in the cache
ROOM = 4  # so many times what is needed, for later recordings: untouched pages take no memory


class Step(NamedTuple):
    """The recorded calls for one shape of a batch, and the arrays that they begin and end with."""

    batch: Batch
    result: Array  # in training, the loss (); in evaluation, the loss of every position (B, T)
    recording: Recording


class Replay:
    """A model's loss, gradient and update, by recordings: one for each shape of a batch."""

    def __init__(
        self, config: Config, shapes: Shapes, flat: Array, flat_grads: Array, m: Array, v: Array
    ) -> None:
        self.config = config
        self.shapes = shapes
        self.flat = flat
        self.flat_grads, self.m, self.v = flat_grads, m, v  # (P,), as flat
        self.flat_sum = np.empty_like(flat)  # (P,), untouched until there are several micro-batches
        self.summed = False  # whether flat_sum has gradients of this batch
        self.last: Step | None = None  # whose backward pass is still to come
        self.kept: dict[Any, Step] = {}  # those used last at the end
        self.adam: Recording | None = None
        self.numbers: tuple[float, ...] = ()  # what an update takes besides arrays
        self.block = np.empty(0, np.uint8)  # where all recordings work, one after another

    def forward(self, docs: Docs, of: int) -> float:
        """The sum of the documents' mean losses, divided by `of`, the documents of the whole batch.

        Each micro-batch but the last runs its backward pass at once, while its arrays are in the
        cache: the next micro-batch needs their memory.
        """
        self.last = None
        if len(docs) == 0:  # there are more ranks than documents
            self.flat_grads.fill(0.0)
            return 0.0
        loss = 0.0
        *others, last = micro_batches(docs, self.config)
        self.summed = bool(others)
        if others:
            self.flat_sum.fill(0.0)
        with np.errstate(all="ignore"):  # Backend.forward refuses a loss that is not finite
            for micro_batch in others:
                step = self.training(micro_batch)
                loss += _loss(step, micro_batch, of)
                step.recording.run(1)
                self.flat_sum += self.flat_grads
            self.last = self.training(last)
            return loss + _loss(self.last, last, of)

    def backward(self) -> None:
        """The gradient of what forward returned, in flat_grads."""
        if self.last is None:
            return
        self.last.recording.run(1)
        self.last = None
        if self.summed:
            self.flat_grads += self.flat_sum

    def update(self, step: int, lr_t: float, factor: float) -> None:
        """An update by Adam, with the gradient in flat_grads times a factor."""
        self.numbers = step, lr_t, factor
        if self.adam is None:
            self.adam = self._record_update()
        self.adam.run(0)

    def losses(self, docs: Docs) -> Array:
        """The loss of every position: a row for each document, T rounded up, padding included."""
        step = self._kept(*padded(docs, self.config).shape, packed=False, training=False)
        fill(step.batch, docs, len(docs))
        with np.errstate(all="ignore"):  # padding need not be finite
            step.recording.run(0)
        return step.result

    def training(self, micro_batch: MicroBatch) -> Step:
        """The recorded calls for rows as many and as long as these."""
        return self._kept(*micro_batch.shape, packed=bool(micro_batch.starts), training=True)

    def _kept(self, B: int, T: int, packed: bool, training: bool) -> Step:
        key = B, T, packed, training
        step = self.kept.pop(key, None)
        if step is None:
            step = self._record(*key)
            calls = step.recording.size + sum(one.recording.size for one in self.kept.values())
            while calls > CALLS and self.kept:
                calls -= self.kept.pop(next(iter(self.kept))).recording.size
        self.kept[key] = step
        return step

    def _record(self, B: int, T: int, packed: bool, training: bool) -> Step:
        recorder, L = Recorder(self.flat.dtype), self.config.n_layer
        tap, dtap, dparams = Tree(L), Tree(L), Tree(L)
        named = named_views(self.flat, self.shapes)
        params = grow({name: recorder.hold(w) for name, w in named.items()}, L)
        batch = empty_batch(B, T, self.flat.dtype, packed)
        # positions and mask are the same in every run if documents are not packed
        fixed = [recorder.hold(array, fixed=not packed) for array in batch[3:]]
        held = Batch(*map(recorder.hold, batch[:3]), *fixed)
        loss = loss_forward(held, params, self.config, tap)
        result = np.empty(() if training else (B, T), self.flat.dtype)
        recorder.put(loss if training else tap.loss_t, result)
        if training:
            recorder.mark()
            loss_backward(held, params, dparams, self.config, tap, dtap)
            for name, grad in named_views(self.flat_grads, self.shapes).items():
                recorder.put(pick(dparams, name), grad)
        return Step(batch, result, recorder.recording(self._memory))

    def _record_update(self) -> Recording:
        recorder = Recorder(self.flat.dtype)
        step, lr_t, factor = map(self._number, range(3))
        for start in range(0, len(self.flat), CHUNK):
            whole = self.flat, self.flat_grads, self.m, self.v
            params, grads, m, v = (recorder.hold(x[start : start + CHUNK]) for x in whole)
            if self.config.grad_clip:
                grads = factor * grads
            adam(params, grads, m, v, step, lr_t, self.config)
        return recorder.recording(self._memory)

    def _number(self, i: int) -> Any:
        """self.numbers[i], read anew in every run."""
        return Number(lambda: self.numbers[i])

    def _memory(self, nbytes: int) -> Array:
        """At least so many bytes, where every recording works."""
        if nbytes > len(self.block) - ALIGN:
            self.kept.clear()  # they work in the old block
            self.adam = None
            self.block = np.empty(0, np.uint8)  # free the old block before making a larger one
            self.block = np.empty(ROOM * nbytes + ALIGN, np.uint8)
        return self.block[-address(self.block) % ALIGN :]


def _loss(step: Step, micro_batch: MicroBatch, of: int) -> float:
    if micro_batch.starts:
        fill_packed(step.batch, micro_batch, of)
    else:
        fill(step.batch, micro_batch.docs, of)
    step.recording.run(0)
    return float(step.result)
