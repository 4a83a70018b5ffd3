"""Two implementations draw the same documents, at several temperatures and in both precisions.

Of equal logits, which stored parameters do not give, both keep those with the lower token ids.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import zip_longest
from random import Random
from typing import Any

import numpy as np
import pytest

from crosscheck.compare import Disagreement, Outcome
from crosscheck.conftest import Choice
from crosscheck.lines import place_of
from crosscheck.samples import right_probabilities, said_by, wrongly_kept
from microgpt.backend import fresh_state, load_backend

NUM = 3
EQUAL = np.array([0.5, 2.0, 0.0, 2.0, -1.0, 0.5, -0.0, 2.0, 0.5])  # logits, in four groups
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


@pytest.mark.about("documents drawn")
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_equal_logits(temperature: float, choice: Choice, settle: Any) -> None:
    """Where top_k or temperature 0 parts equal logits, those with the lower token ids are kept."""
    sides = dict.fromkeys((choice.reference, choice.candidate))
    for top_k in range(len(EQUAL) + 2):  # 0: all of them
        right = right_probabilities(EQUAL, temperature, top_k)
        found = {side: said_by(side, EQUAL, temperature, top_k) for side in sides}
        wrong = [side for side in sides if not np.allclose(found[side], right, 1e-12, 0.0)]
        if wrong:
            rows = {"logits": EQUAL, **found, "should be": right}
            texts = [(label, " ".join(f"{x:.4g}" for x in row)) for label, row in rows.items()]
            words = wrongly_kept(found[wrong[0]], right)
            places = [place_of(f"{side}/sample.py", "probabilities") for side in wrong]
            differing = Disagreement(
                "equal logits", 1, "sample/probabilities",
                f"are wrong in {' and '.join(wrong)}, top_k {top_k}, temperature {temperature:g}",
                shape=EQUAL.shape, texts=tuple(texts), diagnosis=words, function="; ".join(places),
            )  # fmt: skip
            settle(Outcome("equal logits", found=[differing]))
