"""Random models: configurations and batches that hypothesis draws."""

from __future__ import annotations

import dataclasses
from typing import Any

from hypothesis import strategies as st

from crosscheck.cases import Case
from microgpt.settings import config_from
from microgpt.taps import ACTIVATIONS

REASON = "drawn at random"


@st.composite
def cases(draw: Any) -> Case:
    """A case without its parameters: layers, heads, widths, context, switches, documents.

    The simplest value comes first in every choice, since hypothesis shrinks a failing model towards
    first values: what is left can be worked out on paper.
    """
    taken: set[int] = set()

    def size(name: str, most: int, times: int = 1) -> int:
        """A size that no other axis has, since between equal axes an exchange is not seen.

        1, which broadcasts, may occur more than once.
        """
        free = [n for n in range(1, most + 1) if n == 1 or not taken & {n, n * times}]
        n: int = draw(st.sampled_from(free), label=name)
        taken.update({n, n * times} - {1})
        return n

    n_head = size("n_head", 4)
    head_dim = size("head_dim", 4, times=n_head)
    positions = size("positions", 8)
    documents = size("documents", 5)
    crop = draw(st.sampled_from(["positions", "tokens"]), label="crop")
    room = draw(st.integers(0, 2), label="room") if positions > 1 else 0
    config = config_from(
        {
            "n_layer": draw(st.integers(1, 3), label="n_layer"),
            "n_embd": n_head * head_dim,
            "n_head": n_head,
            "block_size": positions + room + (crop == "tokens"),
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
    special = {"chars-bos": 1, "bos-eos-chars": 2}[config.vocabulary]
    counts = [n for n in range(1, 8) if n + special not in taken]
    chars = "abcdefg"[: draw(st.sampled_from(counts), label="characters")]
    most = max(1, positions - 1)  # characters of a document, which has one position more
    full = st.text(st.sampled_from(chars), min_size=most, max_size=most)
    text = st.text(st.sampled_from(chars), min_size=1, max_size=most + 2)
    first = [draw(full), *draw(st.lists(text, min_size=documents - 1, max_size=documents - 1))]
    others = draw(st.lists(st.lists(text, min_size=1, max_size=4), max_size=1))
    batches = [first, *others]
    return Case("random", REASON, config, chars, batches, random=REASON)


def described(case: Case) -> str:
    """A case in two lines: the settings that differ from the default, and the documents."""
    default = dataclasses.asdict(config_from({}, REASON))
    differs = {
        name: value
        for name, value in dataclasses.asdict(case.config).items()
        if value != default[name]
    }
    words = " ".join(f"{name}={value}" for name, value in differs.items())
    return f"{words}\ncharacters {case.chars!r}, batches {case.batches}"
