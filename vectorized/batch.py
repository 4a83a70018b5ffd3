"""What the columns of a batch are: documents in rows, and rows in pieces.

A row has one document, or in training as many short ones as there is room for, one after the
other. That is fewer products and less padding, and they do not see one another.

Same as scalar:         the loss, a mean over documents of a mean over positions.
Different from scalar:  one document after another -> side by side, each position with its weight.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import chain
from operator import itemgetter
from typing import NamedTuple

import numpy as np

from microgpt.backend import Docs
from microgpt.config import Config
from microgpt.layout import Tree
from vectorized.arrays import Array, Shape, counted, filled, packed_masks, set_ones

Row = tuple[int, Docs]  # how many positions are taken, by which documents

SHARED = 16  # positions of a packed row at most; a longer document has a row of its own
COLUMNS = 1024  # of a piece of a batch
PADDING = 2560  # numbers of padding that cost as much as a piece more
PACKING = 1200  # numbers of padding that cost as much as to pack the documents


class Batch(NamedTuple):
    """Documents as N = B T columns."""

    shape: Shape
    token_at: Array  # (N,), where each column's token sits in a flattened (V, N)
    target_at: Array  # (N,), the same for the token after it
    weights: Array  # (N,), each position's share of the loss: 1 / (documents n), 0 for padding
    ragged: bool  # whether there is padding at all
    positions: Array | None = None  # (N,), each column's in its document; None: as in its row


def pieces(docs: Docs, config: Config) -> list[list[Row]]:
    """A batch in pieces of at most COLUMNS columns, whose rows are alike in length.

    Documents are packed, and cut into pieces, where more padding would cost more than that does.
    There is a cut between packed rows and longer ones, too: see `packed_masks`.
    The loss of a batch is the sum over its pieces, and so is the gradient.
    """
    positions = sum(map(len, docs)) - len(docs)
    columns = len(docs) * (max(map(len, docs)) - 1)  # with a row for every document
    packs = (columns - positions) * config.n_embd > PACKING
    if columns <= COLUMNS and not packs:
        return [alone(docs)]
    rows = together(docs, config.block_size) if packs else alone(docs)
    rows.sort(key=itemgetter(0))
    cut = [rows[:1]]
    real = shortest = rows[0][0]  # positions of the last piece, and of its first row
    for taken, row in rows[1:]:
        columns = (len(cut[-1]) + 1) * taken
        padding = (columns - real - taken) * config.n_embd
        if columns > COLUMNS or padding > PADDING or (packs and taken > SHARED >= shortest):
            cut.append([])
            real, shortest = 0, taken
        cut[-1].append((taken, row))
        real += taken
    return cut


def alone(docs: Docs) -> list[Row]:
    """A row for every document."""
    return [(len(doc) - 1, [doc]) for doc in docs]


def together(docs: Docs, block_size: int) -> list[Row]:
    """Rows of several documents: beside the longest the shortest, as many as there is room for."""
    room = min(SHARED, block_size)
    left = deque(sorted(docs, key=len, reverse=True))
    rows: list[Row] = []
    while left:
        row = [left.popleft()]
        taken = len(row[0]) - 1
        while left and taken + len(left[-1]) - 1 <= room:
            row.append(left.pop())
            taken += len(row[-1]) - 1
        rows.append((taken, row))
    return rows


def as_batch(piece: Sequence[Row], dtype: np.dtype, of: int) -> Batch:
    """A piece of a batch of so many documents, padded or packed."""
    docs = [doc for _, row in piece for doc in row]
    return pad(docs, dtype, of) if len(docs) == len(piece) else pack(piece, docs, dtype, of)


def pad(docs: Docs, dtype: np.dtype, of: int | None = None) -> Batch:
    """Documents of n + 1 tokens, any n > 0, as one batch of inputs and targets, a row for each.

    of    how many documents the whole batch has, if these are a piece of it

    Behind a document that is shorter than others there is token 0.
    """
    lengths = [len(doc) - 1 for doc in docs]
    B, T, whole = len(docs), max(lengths), of or len(docs)
    ragged = min(lengths) < T
    if ragged:
        n = np.array(lengths)[:, None]  # (B, 1)
        tokens = np.zeros((B, T + 1), int)
        tokens[counted(T + 1) <= n] = _flat(docs)
        weights = ((counted(T) < n) / (whole * n)).astype(dtype).reshape(-1)  # (N,)
    else:
        tokens = np.array(docs)  # (B, T + 1)
        weights = filled((B * T,), 1 / (whole * T), dtype)  # (N,)
    starts = tokens * (B * T)  # (B, T + 1)
    inputs, targets = places(starts[:, :-1]), places(starts[:, 1:])  # (N,)
    return Batch(Shape(B, T), inputs, targets, weights, ragged)


def pack(piece: Sequence[Row], docs: Docs, dtype: np.dtype, of: int) -> Batch:
    """The same with several documents in a row.

    docs    all documents of the piece, row after row

    What a row lacks to the longest is filled up with token 0, as if its last document went on.
    """
    taken = [positions for positions, _ in piece]
    B, T = len(piece), max(taken)
    room: list[int] = []  # for each document and its closing token, and what its row lacks
    for positions, row in piece:
        room += map(len, row)
        room[-1] += T - positions
    n, width = np.array(list(map(len, docs))) - 1, np.array(room) - 1  # (documents,)
    which = np.repeat(counted(len(docs)), width)  # (N,), the document of every column
    position = counted(B * T) - (width.cumsum() - width)[which]  # (N,), in that document
    real = position < n[which]  # (N,)
    weights = (real / (of * n)[which]).astype(dtype)  # (N,)
    starts = _flat(docs) * (B * T)  # of the tokens of all documents
    at = (n.cumsum() - n)[which] + which + position  # (N,), where there are n + 1 of each
    inputs = places(starts.take(at, mode="clip") * real)  # (N,)
    targets = places(starts.take(at + 1, mode="clip") * real)  # (N,)
    return Batch(Shape(B, T, True), inputs, targets, weights, min(taken) < T, position)


def arrange(batch: Batch, tap: Tree) -> None:
    """The positions, since another batch may have lain there, and the mask of a packed batch.

    tap    the arrays for batches of this shape
    """
    if batch.positions is None:
        set_ones(tap.position_rows, tap.at)
        return
    T, N = batch.shape.T, len(batch.positions)
    column = counted(N)
    set_ones(tap.position_rows, batch.positions * N + column)
    t = column % T
    start = t - batch.positions  # (N,), of the document in its row
    mask = tap.mask[:, 0]  # (T, N)
    mask[:] = packed_masks(T, mask.dtype).take(start * T + t, axis=1)


def _flat(docs: Docs) -> Array:
    """The tokens of all documents."""
    return np.fromiter(chain.from_iterable(docs), int, sum(map(len, docs)))


def places(starts: Array) -> Array:
    """Where each column has its token in a flattened (V, N), of starts = tokens * N.

    starts    where the rows of the tokens start in it: (B, T) or (N,) -> (N,)
    """
    return starts.reshape(-1) + counted(starts.size)
