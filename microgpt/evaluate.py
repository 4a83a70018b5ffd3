"""The loss of a model over a data set."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from microgpt.backend import Backend
from microgpt.config import Config
from microgpt.tokenizer import Tokenizer

BATCH = 256  # documents at a time


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
    encoded = [tokenizer.document(document)[: config.max_tokens] for document in documents]
    encoded.sort(key=len)  # alike in length, they need no padding
    doc_losses: list[float] = []
    by_position: list[list[float]] = []
    for start in range(0, len(encoded), BATCH):
        for losses in backend.position_losses(encoded[start : start + BATCH]):
            doc_losses.append(math.fsum(losses) / len(losses))
            by_position += [[] for _ in range(len(losses) - len(by_position))]
            for position, loss in enumerate(losses):
                by_position[position].append(loss)
    return Evaluation(
        loss=math.fsum(doc_losses) / len(doc_losses),
        by_position=[(len(losses), math.fsum(losses) / len(losses)) for losses in by_position],
    )
