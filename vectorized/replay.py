"""What training and evaluation run: the text, recorded once for every shape of a batch.

Same as scalar:         the numbers.
Different from scalar:  the functions of the text -> the calls that they made (vectorized.record).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from microgpt.backend import Docs
from microgpt.config import Config
from microgpt.layout import Tree, grow, pick
from vectorized.adam import adam
from vectorized.batch import empty_batch, fill, rounded
from vectorized.flat import Shapes, named_views
from vectorized.model import Array, Batch, loss_backward, loss_forward
from vectorized.record import ALIGN, Number, Recorder, Recording, address

CALLS = 10_000  # of all recordings that are kept, some 14 MB
CHUNK = 2**15  # parameters that Adam updates at a time, so that their moments stay in the cache
ROOM = 4  # a new block is so many times the recording it is made for; untouched pages take none


class Step:
    """The recorded calls of one shape of a batch, and the arrays that they begin and end with."""

    def __init__(self, batch: Batch, result: Array, recording: Recording) -> None:
        self.batch = batch
        self.result = result  # the loss (), or the loss of every position (B, T)
        self.recording = recording

    def forward(self, docs: Docs, of: int) -> float:
        """The mean losses of these documents, added up, / `of` (documents of the whole batch)."""
        fill(self.batch, docs, of)
        self.recording.run(0)
        return float(self.result)

    def backward(self) -> None:
        """The gradient of what forward returned."""
        self.recording.run(1)


class Replay:
    """A model's recordings: one for each shape of a batch, made when it first occurs."""

    def __init__(self, config: Config, shapes: Shapes, flat: Array, flat_grads: Array) -> None:
        self.config = config
        self.shapes = shapes
        self.flat = flat
        self.flat_grads = flat_grads
        self.kept: dict[Any, Any] = {}  # recordings, those used last at the end
        self.calls = 0  # of all recordings kept
        self.adam: Recording | None = None
        self.numbers: tuple[float, ...] = ()  # what an update takes besides arrays
        self.block = np.empty(0, np.uint8)  # where all of them work, one after another

    def training(self, docs: Docs) -> Step:
        """Loss and gradient of documents as many and as long as these."""
        return self._kept(self._record_training, len(docs), max(map(len, docs)) - 1)

    def losses(self, docs: Docs) -> Array:
        """The loss of every position: a row for each document, T rounded up, padding included."""
        step = self._kept(self._record_losses, len(docs), max(map(len, docs)) - 1)
        fill(step.batch, docs, len(docs))
        step.recording.run(0)
        return step.result

    def update(self, m: Array, v: Array, step: int, lr_t: float, factor: float) -> None:
        """An update by Adam, with the gradient times a factor."""
        self.numbers = step, lr_t, factor
        if self.adam is None:
            self.adam = self._record_update(m, v)
        self.adam.run(0)

    def _record_training(self, B: int, T: int) -> Step:
        recorder, batch, params, tap = self._begin(B, T)
        dtap, dparams = Tree(self.config.n_layer), Tree(self.config.n_layer)
        held = Batch(*map(recorder.hold, batch))
        loss = np.empty((), self.flat.dtype)
        recorder.put(loss_forward(held, params, self.config, tap), loss)
        recorder.mark()
        loss_backward(held, params, dparams, self.config, tap, dtap)
        for name, grad in named_views(self.flat_grads, self.shapes).items():
            recorder.put(pick(dparams, name), grad)
        return Step(batch, loss, recorder.recording(self._memory))

    def _record_losses(self, B: int, T: int) -> Step:
        recorder, batch, params, tap = self._begin(B, T)
        losses = np.empty((B, T), self.flat.dtype)
        loss_forward(Batch(*map(recorder.hold, batch)), params, self.config, tap)
        recorder.put(tap.loss_t, losses)
        return Step(batch, losses, recorder.recording(self._memory))

    def _record_update(self, m: Array, v: Array) -> Recording:
        recorder = Recorder(self.flat.dtype)
        step: Any = Number(lambda: self.numbers[0])
        lr_t: Any = Number(lambda: self.numbers[1])
        factor = Number(lambda: self.numbers[2])
        for start in range(0, len(self.flat), CHUNK):
            part = slice(start, start + CHUNK)
            params, grads, m_, v_ = (
                recorder.hold(x[part]) for x in (self.flat, self.flat_grads, m, v)
            )
            if self.config.grad_clip:
                grads = factor * grads
            adam(params, grads, m_, v_, step, lr_t, self.config)
        return recorder.recording(self._memory)

    def _begin(self, B: int, T: int) -> tuple[Recorder, Batch, Tree, Tree]:
        dtype = self.flat.dtype
        batch = empty_batch(B, T, dtype)
        recorder = Recorder(dtype)
        named = named_views(self.flat, self.shapes)
        params = grow({name: recorder.hold(w) for name, w in named.items()}, self.config.n_layer)
        return recorder, batch, params, Tree(self.config.n_layer)

    def _kept(self, record: Callable[[int, int], Step], B: int, n: int) -> Step:
        """The step for B documents of up to n positions (n + 1 tokens)."""
        key = record.__name__, B, rounded(n, B, self.config)
        step = self.kept.pop(key, None)
        if step is None:
            step = record(*key[1:])
            self.calls += step.recording.size
            while self.calls > CALLS and self.kept:
                self.calls -= self.kept.pop(next(iter(self.kept))).recording.size
        self.kept[key] = step
        return step

    def _memory(self, nbytes: int) -> Array:
        """Memory for a recording: the first bytes of the block."""
        if nbytes > len(self.block) - ALIGN:
            self.kept.clear()  # they work in the old block
            self.calls = 0
            self.adam = None
            self.block = np.empty(0, np.uint8)  # free the old block before making a larger one
            self.block = np.empty(ROOM * nbytes + ALIGN, np.uint8)
        return self.block[-address(self.block) % ALIGN :]
