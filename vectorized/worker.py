"""The loss and the gradient of documents, a micro-batch at a time.

Same as scalar:         the loss and the gradient of a batch are means over its documents.
Different from scalar:  one document after another -> micro-batches, whose gradients add up.
"""

from __future__ import annotations

import numpy as np

from microgpt.backend import Docs
from microgpt.config import Config
from vectorized.batch import micro_batches
from vectorized.flat import Shapes
from vectorized.model import Array
from vectorized.replay import Replay, Step


class Worker:
    """Finds what a share of a batch adds to the loss, and the gradient of that."""

    def __init__(self, config: Config, shapes: Shapes, flat: Array, flat_grads: Array) -> None:
        self.config = config
        self.flat_grads = flat_grads  # (P,), as flat
        self.replay = Replay(config, shapes, flat, flat_grads)
        # evaluation has memory of its own, so that it can come between forward and backward
        self.evaluation = Replay(config, shapes, flat, flat_grads)
        self.flat_sum = np.zeros(len(flat), flat.dtype)  # untouched pages take no memory
        self.summed = 0  # micro-batches of this batch whose gradient is in flat_sum
        self.last: Step | None = None  # whose backward pass is still to come

    def forward(self, docs: Docs, of: int) -> float:
        """The mean losses of these documents, added up, / `of` (documents of the whole batch).

        Of all micro-batches but the last, the backward pass is run at once: its arrays are in the
        cache, and the next micro-batch needs their memory.
        """
        loss, self.summed = 0.0, 0
        if not docs:  # there are more ranks than documents
            self.flat_grads.fill(0.0)
            return loss
        *others, last = micro_batches(docs, self.config)
        with np.errstate(all="ignore"):  # a loss that is not finite says it all
            for micro_batch in others:
                step = self.replay.training(micro_batch)
                loss += step.forward(micro_batch, of)
                step.backward()
                if self.summed:
                    self.flat_sum += self.flat_grads
                else:
                    self.flat_sum[:] = self.flat_grads
                self.summed += 1
            self.last = self.replay.training(last)
            return loss + self.last.forward(last, of)

    def backward(self) -> None:
        """The gradient of what forward returned, in flat_grads."""
        if self.last is None:
            return
        self.last.backward()
        self.last = None
        if self.summed:
            self.flat_grads += self.flat_sum

    def update(self, m: Array, v: Array, step: int, lr_t: float, factor: float) -> None:
        """An update by Adam with the gradient in flat_grads, times a factor."""
        self.replay.update(m, v, step, lr_t, factor)

    def losses(self, docs: Docs) -> Array:
        """The loss of every position: a row for each document, filled up with anything."""
        with np.errstate(all="ignore"):  # padding need not be finite
            return self.evaluation.losses(docs)
