"""Two implementations draw the same documents, at several temperatures and in both precisions."""

from __future__ import annotations

from dataclasses import replace
from itertools import zip_longest
from random import Random
from typing import Any

import pytest

from crosscheck.compare import Disagreement, Outcome
from crosscheck.conftest import Choice
from microgpt.backend import fresh_state, load_backend

NUM = 3
DRAWN = ("cold-samples", "repeated-token", "tied-two-layers")


@pytest.mark.about("documents drawn")
@pytest.mark.parametrize("temperature", [0.2, 0.7, 1.5])
@pytest.mark.parametrize("name", DRAWN)
def test_documents_drawn(
    name: str, temperature: float, choice: Choice, settle: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A draw differs only if its random number is within rounding of the border of two tokens.

    In both precisions, together and one after another.
    """
    case = choice.case(name)
    prompt = case.tokenizer.encode(case.chars[:1])

    def drawn(backend: str, dtype: str) -> list[str]:
        model = load_backend(backend, replace(case.config, dtype=dtype), fresh_state(case.params))
        rng = Random(5)
        documents = [
            *model.sample(case.tokenizer, rng, NUM, temperature, []),
            *model.sample(case.tokenizer, rng, NUM, temperature, prompt),
        ]
        return [case.tokenizer.decode(document) for document in documents]

    reference = drawn(choice.reference, "float64")
    assert len(set(reference)) > 1, "documents that are all the same tell nothing"
    dtypes = ("float64",) if choice.candidate == "scalar" else ("float64", "float32")
    found = {f"{dtype}, together": drawn(choice.candidate, dtype) for dtype in dtypes}
    monkeypatch.setattr("vectorized.backend.most_walkers", lambda config: 1)
    found |= {f"{dtype}, one by one": drawn(choice.candidate, dtype) for dtype in dtypes}
    for how, candidate in found.items():
        if candidate != reference:
            pairs = list(zip_longest(reference, candidate, fillvalue="not there"))
            i, both = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
            sides = zip((choice.reference, choice.candidate), both)
            texts = [(side, f"document {i}: {text or 'empty'}") for side, text in sides]
            texts.append(("drawn", f"in {how}, at temperature {temperature:g}"))
            wrong = Disagreement(
                name, 1, "sample/documents", "differ", shape=(len(reference),), texts=tuple(texts)
            )
            settle(Outcome(name, found=[wrong]))
