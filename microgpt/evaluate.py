"""The loss of a model over a data set."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random

import numpy as np

from microgpt.backend import Backend
from microgpt.checkpoint import Checkpoint
from microgpt.config import Config
from microgpt.data import digest, in_order, load_documents, parts
from microgpt.errors import MicrogptError, shortened
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
    backend: Backend,
    documents: Sequence[str],
    tokenizer: Tokenizer,
    config: Config,
    progress: Callable[[int], object] = id,
) -> Evaluation:
    """Show every document to the model once; nothing is learned.

    progress    is told how many documents are done, after each batch

    Raises MicrogptError naming the first character that the model never saw.
    """
    kept = config.max_tokens - 1  # characters of a document
    known = set(tokenizer.ids)
    for document in documents:  # before hours are spent on the others
        if not known.issuperset(document[:kept]):
            tokenizer.encode(document[:kept])
    done = 0
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
        done += len(batch)
        progress(done)
    reached = counts > 0
    means = sums[reached] / counts[reached]
    return Evaluation(doc_sum / len(documents), list(zip(counts[reached].tolist(), means.tolist())))


def chosen(held: Checkpoint, dataset: str | None, part: str | None) -> tuple[str, str, list[str]]:
    """The data set, its part and the documents to measure a model with.

    dataset    another one than the run's
    part       held-out, training or all; where none is named, what was held out, if anything was

    Raises MicrogptError if there is no such part.
    """
    config = held.config
    part = part or ("held-out" if config.held_out and not dataset else "all")
    if part not in ("held-out", "training", "all"):
        raise MicrogptError(f"--part: expected held-out, training or all, got {shortened(part)}")
    if part != "all" and dataset:
        raise MicrogptError(f"--part {part}: is of the run's own data set; leave out --dataset")
    if part == "held-out" and not config.held_out:
        raise MicrogptError("--part held-out: this run held nothing out; measure all")
    name = dataset or config.dataset
    documents = load_documents(name, config.documents)
    if part != "all":
        Random(config.seed).shuffle(documents)
        if digest(documents) != held.documents:
            raise MicrogptError(
                f"{name}: has changed since the model was trained, so what was held out is not"
                " known; choose --dataset FILE or --part all"
            )
        training, held_out = parts(documents, config)
        documents = held_out if part == "held-out" else in_order(training)
    elif config.documents == "windows":
        documents = in_order(parts(documents, replace(config, held_out=0))[0])
    return name, part, documents


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
