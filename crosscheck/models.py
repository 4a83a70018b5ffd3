"""Whole models and batches, drawn by hypothesis, from every corner of the configuration."""

from __future__ import annotations

import dataclasses
from typing import Any

from hypothesis import strategies as st

from crosscheck.cases import Case
from microgpt.config import config_from
from microgpt.taps import ACTIVATIONS

REASON = "drawn at random"


@st.composite
def cases(draw: Any) -> Case:
    """A case without its parameters: layers, heads, widths, context, switches, documents.

    The simplest comes first in every choice, so that what shrinks becomes a model that can be
    worked out on paper.
    """
    n_head = draw(st.integers(1, 4), label="n_head")
    head_dim = draw(st.integers(1, 4), label="head_dim")
    crop = draw(st.sampled_from(["positions", "tokens"]), label="crop")
    config = config_from(
        {
            "n_layer": draw(st.integers(1, 3), label="n_layer"),
            "n_embd": n_head * head_dim,
            "n_head": n_head,
            "block_size": draw(st.integers(2 if crop == "tokens" else 1, 8), label="block_size"),
            "vocabulary": draw(st.sampled_from(["chars-bos", "bos-eos-chars"])),
            "crop": crop,
            "norm_embedding": draw(st.booleans(), label="norm_embedding"),
            "activation": draw(st.sampled_from([*ACTIVATIONS]), label="activation"),
            "tie_lm_head": draw(st.booleans(), label="tie_lm_head"),
            "norm_eps": draw(st.sampled_from([1e-5, 1e-2, 1e-8]), label="norm_eps"),
            "init_std": draw(st.sampled_from([0.3, 0.08, 0.02, 1e-3, 1.0]), label="init_std"),
            "init_std_residual": draw(
                st.sampled_from([0.3, 0.02, 1e-3, 1.0]), label="init_std_residual"
            ),
            "beta1": draw(st.sampled_from([0.85, 0.0, 0.99]), label="beta1"),
            "beta2": draw(st.sampled_from([0.99, 0.5]), label="beta2"),
            "adam_eps": draw(st.sampled_from([1e-8, 1e-3]), label="adam_eps"),
            "weight_decay": draw(st.sampled_from([0.0, 0.1]), label="weight_decay"),
            "grad_clip": draw(st.sampled_from([0.0, 0.1, 10.0]), label="grad_clip"),
            "seed": draw(st.integers(0, 999), label="seed"),
        },
        REASON,
    )
    chars = "abcdef"[: draw(st.integers(1, 6), label="characters")]
    documents = st.text(st.sampled_from(chars), min_size=1, max_size=10)
    batches = draw(
        st.lists(st.lists(documents, min_size=1, max_size=4), min_size=1, max_size=2),
        label="batches",
    )
    return Case("random", REASON, config, chars, batches, random=REASON)


def described(case: Case) -> str:
    """A case in a few lines: what differs from the default, and the documents."""
    default = dataclasses.asdict(config_from({}, REASON))
    differs = {
        name: value
        for name, value in dataclasses.asdict(case.config).items()
        if value != default[name]
    }
    words = " ".join(f"{name}={value}" for name, value in differs.items())
    return f"{words}\ncharacters {case.chars!r}, batches {case.batches}"
