"""Every case, step by step: two implementations compute the same."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from random import Random
from typing import Any

import numpy as np
import pytest

from crosscheck.cases import Case, load_case
from crosscheck.compare import compare, compare_taught
from crosscheck.conftest import Choice
from crosscheck.tolerance import float32
from crosscheck.trace import PHASES, Step, backward_order, keys, real, split_key, trace
from microgpt.backend import fresh_state, load_backend
from microgpt.config import load_config
from microgpt.data import load_documents
from microgpt.init import init_params
from microgpt.layout import param_shapes, tap_names
from microgpt.tokenizer import build_tokenizer
from microgpt.train import batch, learning_rate

FREE_LOSS = 1e-12  # 1e-14 is exceeded by no run we know of
FREE_PARAMS = 1e-10


def test_free_running(case: Case, lessons: tuple[Step, ...], choice: Choice, settle: Any) -> None:
    """Each goes its own way: what one step gets wrong, the next ones build on."""
    if choice.dtype == "float32":
        pytest.skip("single precision goes its own way; see test_taught")
    settle(compare(case, lessons, trace(case, choice.candidate, "float64", choice.steps)))


def test_taught(case: Case, lessons: tuple[Step, ...], choice: Choice, settle: Any) -> None:
    """Each step starts from the reference's state, and Adam is handed the reference's gradients."""
    settle(compare_taught(case, lessons, choice.candidate, choice.standard(case)))


def test_in_single_precision(
    case: Case, lessons: tuple[Step, ...], choice: Choice, settle: Any
) -> None:
    """Two steps with what is checked in float32; --dtype float32 does so with all of them."""
    if choice.candidate == "scalar":
        pytest.skip("scalar has double precision only")
    if choice.dtype == "float32":
        pytest.skip("test_taught compares all steps in single precision already")
    settle(compare_taught(case, lessons[:2], choice.candidate, float32(case)), counted=False)


@pytest.mark.parametrize(
    ("columns", "padding", "lowered"), [(1, 0, False), (32, 100, True)], ids=["alone", "cut"]
)
def test_in_micro_batches(
    case: Case,
    columns: int,
    padding: int,
    lowered: bool,
    lessons: tuple[Step, ...],
    choice: Choice,
    settle: Any,
) -> None:
    """A batch cut into micro-batches is the same batch, with and without the recorder's tricks for
    small arrays."""
    from vectorized import batch, record, replay  # here, since a defect may be planted in them

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch, "COLUMNS", columns)
        patch.setattr(batch, "PADDING", padding)
        if not lowered:
            patch.setattr(replay, "CHUNK", 100)  # parameters that Adam updates at a time
            for trick in ("EQUAL_ROWS", "EXPANDED", "ONE_HOT"):
                patch.setattr(record, trick, 0)
        if choice.dtype == "float64":  # from the second step on, in memory that was used before
            few = min(3, choice.steps)
            settle(
                compare(
                    case,
                    lessons[:few],
                    islice(trace(case, choice.candidate, "float64", choice.steps), few),
                )
            )
        else:
            settle(compare_taught(case, lessons[:2], choice.candidate, choice.standard(case)))


def test_on_two_cores(case: Case, lessons: tuple[Step, ...], choice: Choice, settle: Any) -> None:
    """A batch that two processes share is the same batch."""
    shared = replace(case, config=replace(case.config, cores=2))
    if choice.dtype == "float64":
        few = min(3, choice.steps)
        settle(
            compare(
                shared,
                lessons[:few],
                islice(trace(shared, choice.candidate, "float64", choice.steps), few),
            )
        )
    else:
        settle(compare_taught(shared, lessons[:1], choice.candidate, choice.standard(case)))


def test_a_thousand_steps(choice: Choice, notes: list[str]) -> None:
    """The original run, each on its own: how far apart are they after a thousand updates?"""
    if choice.dtype == "float32":
        pytest.skip("single precision goes its own way; see test_taught")
    config = load_config()
    rng = Random(config.seed)
    documents = load_documents(config.dataset)
    rng.shuffle(documents)
    tokenizer = build_tokenizer("".join(documents), config)
    start = fresh_state(init_params(config, tokenizer.vocab_size, rng))
    ours = load_backend(choice.reference, config, start)
    theirs = load_backend(choice.candidate, config, start)
    worst = 0.0
    for step in range(config.steps):
        docs = batch(step, documents, tokenizer, config)
        losses = ours.forward(docs), theirs.forward(docs)
        worst = max(worst, abs(losses[0] - losses[1]))
        assert worst <= FREE_LOSS, f"step {step + 1}: loss {losses[0]!r} and {losses[1]!r}"
        for backend in (ours, theirs):
            backend.backward()
            backend.update(learning_rate(step, config))
    a, b = ours.state().params, theirs.state().params
    apart = max(float(np.abs(np.asarray(a[name]) - np.asarray(b[name])).max()) for name in a)
    assert apart <= FREE_PARAMS
    notes.append(
        f"free run of {config.steps:,} steps: losses within {worst:.1e},"
        f" parameters at the end {apart:.1e}"
    )


def test_nothing_is_left_out(choice: Choice) -> None:
    """A trace has every tap, derivative, gradient, moment and parameter, on either side."""
    case = load_case("two-layers")
    taps, params = tap_names(case.config), list(param_shapes(case.config, 27))
    expected = [
        "batch/tokens",
        *[f"{phase}/{name}" for phase in ("entry", "entry_m", "entry_v") for name in params],
        *[f"forward/{name}" for name in taps],
        "eval/loss_t",
        "read/logits",
        *[f"backward/d{name}" for name in reversed(taps)],
        *[f"gradient/d{name}" for name in backward_order(params)],
        "unwatched/loss",
        *[f"unwatched/d{name}" for name in backward_order(params)],
        *[
            f"{phase}/{name}"
            for phase in ("adam_m", "adam_v", "update", "params")
            for name in params
        ],
        "sample/documents",
        "sample/likeliest",
    ]
    for name in (choice.reference, choice.candidate):
        step = next(trace(case, name, "float64", 1))
        assert list(step) == expected == keys(case.config, 27)
        assert {split_key(key)[0] for key in step} == set(PHASES)
    lessons = list(trace(case, choice.reference, "float64", 1))
    outcome = compare_taught(case, lessons, choice.candidate)
    assert outcome.tally.tensors == len(expected) - 2
    assert outcome.tally.elements == sum(
        int(real(key, tensor.shape, lessons[0]["batch/tokens"]).sum())
        for key, tensor in lessons[0].items()
        if split_key(key)[0] != "sample"
    )
