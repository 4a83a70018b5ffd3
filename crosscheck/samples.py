"""Token ids as texts: what two sides drew, and how probable each draw was where they part."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

import numpy as np

from crosscheck.cases import Case
from crosscheck.trace import Array, Step, part
from microgpt.backend import NAMES, fresh_state, load_backend
from microgpt.tokenizer import Tokenizer


def parted(
    case: Case, key: str, ours: Step, theirs: Step, names: Sequence[str]
) -> tuple[str, tuple[tuple[str, str], ...]]:
    """What it looks like, and rows of label and text: the first two documents that differ.

    names    of the two implementations, which are then asked for their probabilities
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
    chances: list[Array] = []
    for name, step in zip(names, (ours, theirs)):
        with suppress(Exception):  # a side that cannot say is reported all the same
            chances.append(_chances(case, name, step, a[row, :at]))
            said = ", ".join(
                f"{_letter(token, tokenizer)} {chances[-1][token]:.6g}" for token in here
            )
            texts.append(("", f"p after it, {name}: {said}"))
    if len(chances) == 2 and np.allclose(chances[0], chances[1], rtol=1e-6, atol=1e-12):
        choice = (
            "in which tokens are taken for the likeliest, in the temperature, or in the draw"
            if key == "sample/likeliest"
            else "in the temperature, in how a token is drawn from them, in the prompt, or in how"
            " many random numbers were taken before"
        )
        return (
            f"both give the next token these probabilities at temperature {case.temperature:g}:"
            f" the difference is {choice}"
        ), tuple(texts)
    return "", tuple(texts)


def _chances(case: Case, name: str, step: Step, tokens: Array) -> Array:
    """The probabilities of the token that follows these, (V,)."""
    if name not in NAMES:
        raise ValueError(name)
    backend = load_backend(name, replace(case.config, cores=1), fresh_state(part(step, "params")))
    logits = np.asarray(backend.read(tokens.tolist())[-1], float) / case.temperature
    exps = np.exp(logits - logits.max())
    chances: Array = exps / exps.sum()
    return chances


def _text(tokens: Array, tokenizer: Tokenizer) -> str:
    """Token ids as a text; the opening token is left out, and the closing one shown as a dot."""
    return (
        "".join(_letter(int(token), tokenizer) for token in tokens[1:] if token >= 0) or "nothing"
    )


def _letter(token: int, tokenizer: Tokenizer) -> str:
    if token < 0 or token in (tokenizer.bos, tokenizer.eos):
        return "(end)"
    return repr(tokenizer.decode([token]))[1:-1]
