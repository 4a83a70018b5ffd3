"""Drawn documents that differ, as texts, with the probability of each side's first other draw."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from importlib import import_module
from unittest.mock import patch

import numpy as np

from crosscheck.cases import Case
from crosscheck.trace import TOP_K, Array, Step, drawn, part
from microgpt.backend import BACKENDS, fresh_state, load_backend
from microgpt.tokenizer import Tokenizer

ONE_BY_ONE = "drawn one after another they are right: sample_many is at fault"


def parted(
    case: Case, number: int, key: str, ours: Step, theirs: Step, names: Sequence[str]
) -> tuple[str, tuple[tuple[str, str], ...]]:
    """The diagnosis of drawn documents that differ, and rows of label and text on the first two.

    number   which step it is, from 1
    names    the names of the implementations, which are asked for logits and probabilities; or ()
    """
    tokenizer = case.tokenizer
    a, b = ours[key], theirs[key]
    row = int(np.argmax((a != b).any(axis=1)))
    at = int(np.argmax(a[row] != b[row]))
    labels = names or ("reference", "candidate")
    texts = [
        (label, f"document {row}: {_text(tokens[row], tokenizer)}")
        for label, tokens in zip(labels, (a, b))
    ]
    if not key.startswith("sample/"):
        return "", (*texts, ("they part", f"at token {at}"))
    after = _text(a[row, :at], tokenizer)
    texts.append(("they part", f"at draw {at} of it, after {after}"))
    here = [int(tokens[row, at]) if tokens[row, at] >= 0 else tokenizer.eos for tokens in (a, b)]
    read: list[Array] = []
    said: list[Array] = []
    settings = _settings(case, key, row)
    for name, step in zip(names, (ours, theirs)):
        with suppress(Exception):  # a side may fail here, too; the texts are reported all the same
            read.append(_logits(case, name, step, a[row, :at]))
            said.append(said_by(name, read[0], *settings))
            numbers = ", ".join(
                f"{_letter(token, tokenizer)} {said[-1][token]:.6g}" for token in here
            )
            texts.append(("", f"p after it, {name}: {numbers}"))
    if len(said) < 2 or not np.allclose(read[0], read[1], rtol=1e-6, atol=1e-12):
        return "", tuple(texts)
    temperature, top_k = settings
    of = f" over the {top_k} largest logits" * (top_k > 0)
    rule = f"softmax(logits / {temperature:g}){of}" if temperature else "1 for the largest logit"
    right = right_probabilities(read[0], *settings)
    wrong = [
        name for name, p in zip(names, said) if not np.allclose(p, right, rtol=1e-6, atol=1e-12)
    ]
    if wrong:
        numbers = ", ".join(f"{_letter(token, tokenizer)} {right[token]:.6g}" for token in here)
        texts.append(("", f"{rule}: {numbers}"))
        own = " and ".join(f"{name}.sample.probabilities" for name in wrong)
        return f"{own} of the same logits is not {rule}", tuple(texts)
    if "vectorized" in names and _right_one_by_one(case, number, key, theirs, ours[key]):
        return ONE_BY_ONE, tuple(texts)
    return (
        "both read the same logits and make the same probabilities of them: the draw, the prompt or"
        " the closing token is at fault"
    ), tuple(texts)


def _right_one_by_one(case: Case, number: int, key: str, step: Step, right: Array) -> bool:
    """Whether vectorized/ draws the right documents when it draws them one after another."""
    state = fresh_state(part(step, "params"))
    with suppress(Exception), patch("vectorized.backend.most_walkers", lambda config: 1):
        backend = load_backend("vectorized", replace(case.config, cores=1), state)
        return np.array_equal(drawn(case, backend, number - 1)[key], right)
    return False


def _settings(case: Case, key: str, row: int) -> tuple[float, int]:
    """The temperature and top_k with which a document was drawn (see crosscheck.trace.drawn)."""
    if key != "sample/likeliest":
        return case.temperature, 0
    return (0.0, 0) if row else (case.temperature, TOP_K)


def _logits(case: Case, name: str, step: Step, tokens: Array) -> Array:
    """(V,): the logits of the token after these tokens, by an implementation."""
    if name not in BACKENDS:
        raise ValueError(name)
    backend = load_backend(name, replace(case.config, cores=1), fresh_state(part(step, "params")))
    logits: Array = np.asarray(backend.read(tokens.tolist())[-1], float)
    return logits


def said_by(name: str, logits: Array, temperature: float, top_k: int) -> Array:
    """(V,): the probabilities of logits, by an implementation's own function."""
    probabilities = import_module(f"{name}.sample").probabilities
    if name == "vectorized":
        return np.asarray(probabilities(logits[None], temperature, top_k)[0])
    value = import_module("scalar.value").Value
    return np.asarray(probabilities([value(x) for x in logits.tolist()], temperature, top_k))


def right_probabilities(logits: Array, temperature: float, top_k: int) -> Array:
    """(V,): the right probabilities, softmax(logits / temperature) over the top_k largest."""
    most = 1 if temperature == 0 else top_k or len(logits)
    kept = np.argsort(-logits, kind="stable")[:most]
    chances = np.zeros_like(logits)
    chances[kept] = np.exp((logits[kept] - logits.max()) / (temperature or 1.0))
    return chances / chances.sum()


def wrongly_kept(found: Array, right: Array) -> str:
    """Which tokens have a probability and should not, where logits are equal; "" if none has."""
    kept, wanted = (np.flatnonzero(probs).tolist() for probs in (found, right))
    if len(kept) > len(wanted):
        rule = "of equal logits, only those with the lower token ids are kept"
        return f"{len(kept)} tokens have a probability, where {len(wanted)} should: {rule}"
    if len(kept) == len(wanted) and kept != wanted:
        return "of equal logits, others are kept than those with the lower token ids"
    return ""


def _text(tokens: Array, tokenizer: Tokenizer) -> str:
    """Token ids as a text, without the opening token."""
    return (
        "".join(_letter(int(token), tokenizer) for token in tokens[1:] if token >= 0) or "nothing"
    )


def _letter(token: int, tokenizer: Tokenizer) -> str:
    """A token as text; (BOS) and (EOS) for those without a character."""
    if token in (-1, tokenizer.eos):
        return "(EOS)"
    if token == tokenizer.bos:
        return "(BOS)"
    return repr(tokenizer.decode([token]))[1:-1]
