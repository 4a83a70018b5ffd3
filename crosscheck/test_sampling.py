"""Two implementations draw the same documents, at several temperatures and in both precisions."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from crosscheck.conftest import Choice
from microgpt.backend import fresh_state, load_backend

NUM = 3
DRAWN = ("cold-samples", "repeated-token", "tied-two-layers")


@pytest.mark.parametrize("together", [True, False], ids=["together", "one after another"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("temperature", [0.2, 0.7, 1.5])
@pytest.mark.parametrize("name", DRAWN)
def test_documents_drawn(
    name: str,
    temperature: float,
    dtype: str,
    together: bool,
    choice: Choice,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A draw differs only if its random number is within rounding of the border of two tokens."""
    if not together:
        monkeypatch.setattr("vectorized.backend.most_walkers", lambda config: 1)
    case = choice.case(name)
    if choice.candidate == "scalar" and dtype == "float32":
        pytest.skip("scalar has double precision only")
    prompt = case.tokenizer.encode(case.chars[:1])
    texts = []
    for backend, precision in ((choice.reference, "float64"), (choice.candidate, dtype)):
        config = replace(case.config, dtype=precision)
        model = load_backend(backend, config, fresh_state(case.params))
        rng = Random(5)
        drawn = [
            *model.sample(case.tokenizer, rng, NUM, temperature, []),
            *model.sample(case.tokenizer, rng, NUM, temperature, prompt),
        ]
        texts.append([case.tokenizer.decode(document) for document in drawn])
    reference, candidate = texts
    assert candidate == reference
    assert len(set(reference)) > 1, "documents that are all the same tell nothing"
