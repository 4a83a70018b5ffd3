"""The loss of a model over a data set."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

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
    doc_losses = array("d")
    by_position: list[array[float]] = []
    for batch in _batches(sorted(documents, key=len), kept):
        encoded = [tokenizer.document(document, config.max_tokens) for document in batch]
        for losses in backend.position_losses(encoded):
            doc_losses.append(math.fsum(losses) / len(losses))
            by_position += [array("d") for _ in range(len(losses) - len(by_position))]
            for position, loss in enumerate(losses):
                by_position[position].append(loss)
    return Evaluation(
        loss=math.fsum(doc_losses) / len(doc_losses),
        by_position=[(len(losses), math.fsum(losses) / len(losses)) for losses in by_position],
    )


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
    for end in range(1, len(ordered) + 1):
        more = end + 1 - start
        if (
            end == len(ordered)
            or more > BATCH
            or more * (min(len(ordered[end]), kept) + 1) > COLUMNS
        ):
            yield ordered[start:end]
            start = end
