"""A batch on several ranks: each has all parameters, and works on its share of the documents.

Same as scalar:         the loss and the gradient of a batch are means over its documents.
Different from scalar:  one document after another -> shares, and sums over the ranks.

Documents have the weight 1 / (documents of the whole batch) on every rank. The gradients of the
shares therefore add up to the gradient of the batch, and every rank makes the same update.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from microgpt.backend import Docs
from microgpt.runs.ranks import Comm
from vectorized.model import Array


def share(docs: Docs, rank: int, size: int) -> Docs:
    """The documents that this rank works on: all shares are about equal work.

    Where there are fewer documents than ranks, those of the last ranks are empty.
    """
    return sorted(docs, key=len, reverse=True)[rank::size] if size > 1 else docs


class Sums:
    """Sums over the ranks, in a fixed order: all ranks have the same bits, in every run.

    The order of MPI's own Allreduce depends on the size of the array, the number of ranks and
    where they are; here each rank adds up one slice of the gradients, and then gives it to all.
    """

    def __init__(self, comm: Comm, numbers: int, dtype: Any) -> None:
        self.comm = comm
        slices = comm.size, -(-numbers // comm.size)
        self.slices = np.zeros(slices, dtype)
        self.grads: Array = self.slices.reshape(-1)[:numbers]  # (P,)
        if comm.size > 1:
            self.received = np.zeros(slices, dtype)  # this rank's slice, of every rank

    def loss(self, own: float) -> float:
        """The sum of the losses of all ranks."""
        if self.comm.size == 1:
            return own
        losses = np.zeros((self.comm.size, 1))
        self.comm.gather(np.array([own]), losses)
        return float(losses.sum())

    def gradient(self) -> None:
        """Put the sum of the gradients of all ranks in the place of this rank's gradient."""
        if self.comm.size == 1:
            return
        self.comm.swap(self.slices, self.received)
        total, *others = self.received
        for other in others:
            total += other
        self.comm.gather(total, self.slices)
