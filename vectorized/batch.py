"""From documents to arrays: a batch in micro-batches of rows, each padded to one length.

The model works on arrays (B, T), and a padded position takes as long as a token. In training, short
documents are packed into one row (sequence packing): each counts its positions from 0, and the mask
hides the other documents. Without packing, a step of the default model takes 1.16, 1.42 and 1.16
times as long in float32, at 16, 64 and 256 documents; in float64 it is 1.24 at 64, and 0.98 at 256.
A micro-batch has at most COLUMNS positions, or is one row, so that its arrays stay in the cache.

Every shape of a micro-batch is recorded once (vectorized.record), so there should be few shapes.

Same as scalar:         the loss, a mean over documents of a mean over positions.
Different from scalar:  one document after another -> side by side, each position with its weight.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from microgpt.backend import Docs
from microgpt.config import Config
from microgpt.runs.memory import COLUMNS
from vectorized.model import Array, Batch, causal_mask

ROW = 16  # the length of a packed row is a multiple of this, or block_size
PRICE = 2**12  # positions * T whose attention takes as long as beginning one more micro-batch


class MicroBatch(NamedTuple):
    """Documents that are computed at once, in B rows of T positions: packed, or a row for each."""

    docs: Docs
    starts: list[int]  # flat index of each document's first position, if packed; else []
    shape: tuple[int, int]  # (B, T)


def micro_batches(docs: Docs, config: Config) -> list[MicroBatch]:
    """The documents in micro-batches: packed into rows, unless there is only one.

    A row takes the longest document that is left, then the longest that fits behind it, until none
    does. If all documents that are left fit into rows of half the length, and are not few (PRICE),
    a micro-batch of shorter rows begins: attention computes T numbers for every position.
    """
    if len(docs) == 1:
        return [MicroBatch(docs, [], (1, rounded(len(docs[0]) - 1, 2, config)))]
    left = sorted(docs, key=len)
    left_lengths = [len(doc) - 1 for doc in left]
    found = []
    while left:
        T = rounded(left_lengths[-1], ROW, config)
        half = T // 2 // ROW * ROW if sum(left_lengths) * T > PRICE else 0
        chosen, starts, B, most = [], [], 0, max(1, COLUMNS // T)
        while left and most > B and left_lengths[-1] > half:
            B, room, i = B + 1, T, len(left) - 1  # a new row; i: the longest document
            while i >= 0:
                chosen.append(left.pop(i))
                starts.append(B * T - room)
                room -= left_lengths.pop(i)
                i = bisect_right(left_lengths, room) - 1  # the longest that fits, or -1
        found.append(MicroBatch(chosen, starts, (B, T)))
    return found


def padded(docs: Docs, config: Config) -> MicroBatch:
    """The documents in a row each, of the length of the longest, rounded up."""
    T = rounded(int(lengths(docs).max()), 2, config)
    return MicroBatch(docs, [], (len(docs), T))


def rounded(T: int, step: int, config: Config) -> int:
    """T rounded up to a multiple of `step`, at most block_size.

    Above 32, few lengths occur: at most sixteen from 33 to 64, and from 65 to 128, and so on.
    """
    step = max(step, 1 << (T - 1).bit_length() >> 5)
    return min(-(-T // step) * step, config.block_size)


def empty_batch(B: int, T: int, dtype: np.dtype, packed: bool = False) -> Batch:
    """The arrays of a batch, for `fill`, or for `fill_packed`."""
    both = np.zeros((B, T + 1), int)
    tokens, targets = np.zeros((2, B, T), int) if packed else (both[:, :-1], both[:, 1:])
    positions = np.zeros((B, T), int) + np.arange(T)
    # in the memory order of attn_logits when recorded: (U, 1, B, T)
    mask = np.empty((T, 1, B, T), dtype).transpose(2, 1, 3, 0)  # (B, 1, T, U)
    mask[:] = causal_mask(T, dtype)
    return Batch(tokens, targets, np.zeros((B, T), dtype), positions, mask)


def pad(docs: Docs, dtype: np.dtype, of: int | None = None) -> Batch:
    """Documents of n + 1 tokens, any n > 0, as one batch, a row for each.

    of    how many documents the whole batch has, if these are a part of it

    Behind a shorter document lie its last token and zeros: weight 0, and hidden by the mask.
    """
    batch = empty_batch(len(docs), lengths(docs).max(), dtype)
    fill(batch, docs, of or len(docs))
    return batch


def lengths(docs: Docs) -> Array:
    """How many positions each of K documents has: one fewer than tokens. (K,)"""
    if isinstance(docs, np.ndarray):  # of one length: the same as below, in less time
        return np.full(len(docs), docs.shape[1] - 1)
    return np.fromiter(map(len, docs), int, len(docs)) - 1


def fill(batch: Batch, docs: Docs, of: int) -> None:
    """Put documents into the arrays of a batch, which may have room for longer ones."""
    both: Any = batch.tokens.base  # (B, T + 1): the tokens, and behind them the last target
    weights = batch.weights
    B, T = weights.shape
    if B == 1 or isinstance(docs, np.ndarray):  # of one length: the same as below, in less time
        n = len(docs[0]) - 1
        both[:, : n + 1], weights[:, :n] = docs, 1 / (of * n)
        if n < T:
            both[:, n + 1 :], weights[:, n:] = 0, 0
        return
    length = lengths(docs)[:, None]  # (B, 1)
    inside = np.arange(T + 1) <= length  # (B, T + 1), whether there is a token
    both.fill(0)
    both[inside] = np.fromiter(chain.from_iterable(docs), int)
    np.divide(inside[:, 1:], of * length, out=weights)


def fill_packed(batch: Batch, micro_batch: MicroBatch, of: int) -> None:
    """Put documents into the arrays of a batch, where each starts in its packed row."""
    docs, starts, (_, T) = micro_batch  # K documents of N positions together
    length = lengths(docs)  # (K,)
    both = np.fromiter(chain.from_iterable(docs), int)  # (N + K,): n positions have n + 1 tokens
    doc = np.repeat(np.arange(len(docs)), length)  # (N,), the document of every position
    i = np.arange(len(doc))  # (N,)
    position = i - (length.cumsum() - length)[doc]  # (N,), in its document
    at = np.array(starts)[doc] + position  # (N,), flat index in the batch
    for array in batch[:4]:
        array.fill(0)
    tokens, targets, weights, positions = (array.reshape(-1) for array in batch[:4])
    tokens[at], targets[at] = both[i + doc], both[i + doc + 1]  # one more for each document before
    weights[at], positions[at] = (1 / (of * length))[doc], position
    t, u = np.arange(T), np.arange(T)[:, None, None]
    first = t - batch.positions  # (B, T), where the document of t begins; in padding, t
    mask = batch.mask[:, 0].transpose(2, 0, 1)  # (U, B, T), as it lies in memory
    mask[:] = np.where((first <= u) & (u <= t), 0.0, -np.inf)
