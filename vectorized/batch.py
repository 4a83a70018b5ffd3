"""From documents to arrays: a batch in micro-batches, each padded to one length.

The text works on arrays (B, T), so documents of different length have to be padded, and a padded
position takes as long as a token. Documents that are sorted by length and cut into micro-batches
need little padding, but every micro-batch takes a run of the recorded calls. A cut is made where it
saves more time than that run takes.

Every shape of a micro-batch is recorded once (vectorized.record), so few of them may occur.

Same as scalar:         the loss, a mean over documents of a mean over positions.
Different from scalar:  one document after another -> side by side, each position with its weight.
"""

from __future__ import annotations

from itertools import chain

import numpy as np

from microgpt.backend import Docs
from microgpt.config import Config
from microgpt.runs.memory import COLUMNS
from vectorized.model import Batch

PADDING = 1024  # numbers, positions times n_embd, that take as long as one more micro-batch


def micro_batches(docs: Docs, config: Config) -> list[Docs]:
    """The documents sorted by length, and cut where that saves more padding than it costs."""
    if len(docs) == 1:
        return [docs]
    ordered = sorted(docs, key=len)
    rows = max(1, len(docs) // 16)  # cut at multiples of this, so that few shapes occur
    return _cut(ordered, rows, PADDING / config.n_embd)


def _cut(docs: Docs, rows: int, price: float) -> list[Docs]:
    """Cut where it saves most padding, if that is more than the price; then cut the parts again.

    Parts that remain have at most COLUMNS positions, or are one document.
    """
    T = len(docs[-1]) - 1
    saved, at = 0.0, 0
    for count in range(rows, len(docs), rows):
        padding = count * (T + 1 - len(docs[count - 1]))
        if padding > saved:
            saved, at = padding, count
    if saved > price:
        return [*_cut(docs[:at], rows, price), *_cut(docs[at:], rows, price)]
    most = max(1, COLUMNS // T)
    return [docs[first : first + most] for first in range(0, len(docs), most)]


def rounded(T: int, rows: int, config: Config) -> int:
    """T rounded up, so that few lengths occur; at most block_size.

    Up to 32, one row is rounded to a multiple of 2, and several rows are not; above 32, there are
    sixteen lengths for each doubling.
    """
    step = max(1 if rows > 1 else 2, 1 << (T - 1).bit_length() >> 5)
    return min(-(-T // step) * step, config.block_size)


def empty_batch(B: int, T: int, dtype: np.dtype) -> Batch:
    """The arrays of a batch, for `fill`."""
    return Batch(np.zeros((B, T), int), np.zeros((B, T), int), np.zeros((B, T), dtype))


def pad(docs: Docs, dtype: np.dtype, of: int | None = None) -> Batch:
    """Documents of n + 1 tokens, any n > 0, as one batch, a row for each.

    of    how many documents the whole batch has, if these are a part of it

    A shorter document is padded with token 0: weight 0, and the mask hides it from earlier tokens.
    """
    batch = empty_batch(len(docs), max(map(len, docs)) - 1, dtype)
    fill(batch, docs, of or len(docs))
    return batch


def fill(batch: Batch, docs: Docs, of: int) -> None:
    """Put documents into the arrays of a batch, which may have room for longer ones."""
    tokens, targets, weights = batch
    B, T = tokens.shape
    if B == 1 or isinstance(docs, np.ndarray):  # of one length: the same as below, in less time
        n = len(docs[0]) - 1
        both = np.asarray(docs[0] if B == 1 else docs)  # (n + 1,) or (B, n + 1)
        tokens[:, :n], targets[:, :n], weights[:, :n] = both[..., :-1], both[..., 1:], 1 / (of * n)
        if n < T:
            tokens[:, n:], targets[:, n:], weights[:, n:] = 0, 0, 0
        return
    lengths = np.fromiter(map(len, docs), int)[:, None] - 1  # (B, 1)
    inside = np.arange(T + 1) <= lengths  # (B, T + 1)
    both = np.zeros((B, T + 1), int)
    both[inside] = np.fromiter(chain.from_iterable(docs), int)
    tokens[:], targets[:] = both[:, :-1], both[:, 1:]
    np.divide(inside[:, 1:], of * lengths, out=weights)
