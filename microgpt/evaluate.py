"""The loss of a model over a data set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import cast

import numpy as np

from microgpt.backend import Backend, Docs
from microgpt.config import Config
from microgpt.data import digest, in_order, load_documents, parts
from microgpt.errors import MicrogptError, shortened
from microgpt.runs.checkpoint import Checkpoint
from microgpt.runs.memory import check_memory
from microgpt.tokenizer import Tokenizer

POSITIONS_AT_ONCE = 768  # of a batch, with padding; a longer document is a batch of its own


@dataclass(frozen=True)
class Evaluation:
    """The loss of a model on documents."""

    loss: float  # the mean over documents of the mean over their positions
    by_position: list[tuple[int, float]]  # documents that reach it, and their mean loss there


def evaluation(
    backend: Backend,
    documents: Sequence[str],
    tokenizer: Tokenizer,
    config: Config,
    progress: Callable[[int], object] = id,
) -> Evaluation:
    """The loss of the model on every document; the model is not changed.

    progress    called after each batch with the number of documents done so far

    Raises MicrogptError naming the first character that is not in the vocabulary.
    """
    T = config.max_tokens - 1
    documents = sorted((document[:T] for document in documents), key=len, reverse=True)
    if not set(tokenizer.ids).issuperset("".join(documents)):
        for document in documents:  # raise before hours are spent on other documents
            tokenizer.encode(document)
    n = np.minimum(np.array(list(map(len, documents))) + 1, T)  # positions of each document
    doc_sum, sums = 0.0, np.zeros(T)
    start = 0
    while start < len(documents):
        rows = slice(start, start + max(1, POSITIONS_AT_ONCE // int(n[start])))
        docs = encoded(documents[rows], tokenizer, T + 1)
        losses = np.asarray(backend.position_losses(docs), float)  # (B, T), padded with zeros
        doc_sum += float((losses.sum(axis=1) / n[rows]).sum())
        sums[: n[start]] += losses.sum(axis=0)
        start = min(rows.stop, len(documents))
        progress(start)
    counts = len(n) - np.searchsorted(n[::-1], np.arange(n[0]), "right")  # documents per position
    means = sums[: n[0]] / counts
    return Evaluation(doc_sum / len(n), list(zip(counts.tolist(), means.tolist())))


def encoded(documents: Sequence[str], tokenizer: Tokenizer, longest: int) -> Docs:
    """The tokens of each document; for documents of equal length one array, which is faster."""
    if len(documents[0]) != len(documents[-1]):
        return [tokenizer.document(document, longest) for document in documents]
    text = "".join(documents).translate({ord(char): i for char, i in tokenizer.ids.items()})
    ids = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
    tokens = np.full((len(documents), len(documents[0]) + 2), tokenizer.eos)
    tokens[:, 0] = tokenizer.bos
    tokens[:, 1:-1] = ids.reshape(len(documents), -1)
    return cast("Docs", tokens[:, :longest])


def chosen(held: Checkpoint, dataset: str | None, part: str | None) -> tuple[str, str, list[str]]:
    """The data set, its part and the documents to measure a model with.

    dataset    replaces the run's data set
    part       held-out, training or all; by default held-out if the run has any, else all

    Raises MicrogptError if there is no such part.
    """
    config = held.config
    part = part or ("held-out" if config.held_out and not dataset else "all")
    if part not in ("held-out", "training", "all"):
        raise MicrogptError(f"--part: expected held-out, training or all, got {shortened(part)}")
    if part != "all" and dataset:
        raise MicrogptError(f"--part {part}: is of the run's own data set; leave out --dataset")
    if part == "held-out" and not config.held_out:
        raise MicrogptError("--part held-out: this run held nothing out; use --part all")
    name = config.dataset if dataset is None else dataset
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
    """Raise MicrogptError if this machine has too little memory for an evaluation."""
    longest = min(max(map(len, documents)) + 1, config.max_tokens - 1)
    config = replace(config, batch_size=max(1, POSITIONS_AT_ONCE // longest), num_samples=0)
    check_memory(config, tokenizer.vocab_size, documents, backend_name)
