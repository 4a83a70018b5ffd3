"""The loss of a model over a data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np

from microgpt.backend import Backend, Docs
from microgpt.config import Config
from microgpt.memory import check_memory
from microgpt.tokenizer import Tokenizer

COLUMNS = 768  # positions at a time, with padding, or those of one document


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
    T = config.max_tokens - 1
    documents = sorted((document[:T] for document in documents), key=len, reverse=True)
    if not set(tokenizer.ids).issuperset("".join(documents)):
        for document in documents:  # before hours are spent on the others
            tokenizer.encode(document)
    n = np.minimum(np.array(list(map(len, documents))) + 1, T)  # positions of each document
    doc_sum, sums = 0.0, np.zeros(T)
    start = 0
    while start < len(documents):
        rows = slice(start, start + max(1, COLUMNS // int(n[start])))
        docs = encoded(documents[rows], tokenizer, T + 1)
        losses = np.asarray(backend.position_losses(docs), float)  # (B, T), padded with zeros
        doc_sum += float((losses.sum(axis=1) / n[rows]).sum())
        sums[: n[start]] += losses.sum(axis=0)
        start = rows.stop
    counts = len(n) - np.searchsorted(n[::-1], np.arange(n[0]), "right")  # documents that reach it
    means = sums[: n[0]] / counts
    return Evaluation(doc_sum / len(n), list(zip(counts.tolist(), means.tolist())))


def encoded(documents: Sequence[str], tokenizer: Tokenizer, longest: int) -> Docs:
    """The tokens of each document; of documents of one length as an array, in less time."""
    if len(documents[0]) != len(documents[-1]):
        return [tokenizer.document(document, longest) for document in documents]
    text = "".join(documents).translate({ord(char): i for char, i in tokenizer.ids.items()})
    ids = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
    tokens = np.full((len(documents), len(documents[0]) + 2), tokenizer.eos)
    tokens[:, 0] = tokenizer.bos
    tokens[:, 1:-1] = ids.reshape(len(documents), -1)
    return cast("Docs", tokens[:, :longest])


def check_evaluation(
    backend_name: str, documents: Sequence[str], tokenizer: Tokenizer, config: Config
) -> None:
    """Refuse an evaluation that this machine has no memory for."""
    longest = min(max(map(len, documents)) + 1, config.max_tokens - 1)
    config = replace(config, batch_size=max(1, COLUMNS // longest), num_samples=0)
    check_memory(config, tokenizer.vocab_size, documents, backend_name)
