"""The loss of a model over a data set."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from microgpt.backend import Backend
from microgpt.config import Config
from microgpt.memory import check_memory
from microgpt.tokenizer import Tokenizer

BATCH = 256  # documents at a time, or fewer:
COLUMNS = 4096  # positions of all of them, padded to the longest, unless it is one document


@dataclass(frozen=True)
class Evaluation:
    """What a model loses on documents it is shown."""

    loss: float  # the mean over documents of the mean over their positions
    by_position: list[tuple[int, float]]  # how many documents reach it, and their mean loss there


def evaluation(
    backend: Backend, documents: Sequence[str], tokenizer: Tokenizer, config: Config
) -> Evaluation:
    """Show every document to the model once; nothing is learned.

    Raises MicrogptError naming the first character that the model never saw.
    """
    kept = config.max_tokens - 1  # characters of a document
    known = set(tokenizer.ids)
    for document in documents:  # before hours are spent on the others
        if not known.issuperset(document[:kept]):
            tokenizer.encode(document[:kept])
    doc_sum, sums, counts = 0.0, np.zeros(kept + 1), np.zeros(kept + 1, int)
    for batch in _batches(sorted(documents, key=len), kept):
        encoded = [tokenizer.document(document, kept + 1) for document in batch]
        rows = backend.position_losses(encoded)
        losses = np.concatenate(rows, dtype=float)
        n = np.array([len(row) for row in rows])
        starts = n.cumsum() - n
        positions = np.arange(len(losses)) - starts.repeat(n)
        doc_sum += float((np.add.reduceat(losses, starts) / n).sum())
        sums += np.bincount(positions, losses, kept + 1)
        counts += np.bincount(positions, minlength=kept + 1)
    reached = counts > 0
    means = sums[reached] / counts[reached]
    return Evaluation(doc_sum / len(documents), list(zip(counts[reached].tolist(), means.tolist())))


def check_evaluation(
    backend_name: str, documents: Sequence[str], tokenizer: Tokenizer, config: Config
) -> None:
    """Refuse an evaluation that this machine has no memory for."""
    size = min(BATCH, len(documents))
    config = replace(config, batch_size=size, num_samples=0)
    check_memory(config, tokenizer.vocab_size, documents, backend_name)


def _batches(ordered: Sequence[str], kept: int) -> Iterator[Sequence[str]]:
    """Documents in the order of their length, as many at a time as there is room for."""
    start = 0
    while start < len(ordered):

        def columns(rows: int, start: int = start) -> int:
            return rows * (min(len(ordered[start + rows - 1]), kept) + 1)

        most = range(1, min(BATCH, len(ordered) - start) + 1)
        rows = max(1, bisect_right(most, COLUMNS, key=columns))
        yield ordered[start : start + rows]
        start += rows
