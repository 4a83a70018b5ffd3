"""Two implementations compute the same: every case, step by step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from itertools import islice
from random import Random
from typing import Any

import numpy as np
import pytest

from crosscheck.cases import Case, load_case
from crosscheck.compare import Outcome, compare, compare_teacher_forced
from crosscheck.conftest import Choice
from crosscheck.recorded import CUTS, in_micro_batches
from crosscheck.reference_steps import ReferenceSteps
from crosscheck.table import NAME, held_to_table
from crosscheck.tolerance import FLOAT64, Standard, float32
from crosscheck.trace import PHASES, Step, backward_order, keys, real, split_key, trace
from microgpt.backend import State, Tensors, fresh_state, load_backend
from microgpt.data import load_documents
from microgpt.init import init_params
from microgpt.layout import param_shapes, tap_names
from microgpt.settings import load_config
from microgpt.train import learning_rate

CHECKPOINT = 5  # every so many steps the long run keeps a state, from which it can be repeated
COLUMN = 50  # steps of the long run for each column of the map
FREE_LOSS = 1e-12  # how far losses of the long run may lie apart; in all known runs, within 1e-14
FREE_PARAMS = 1e-10  # how far parameters of the long run may lie apart


@pytest.mark.about("first steps")
def test_first_step(
    case: Case, reference_steps: ReferenceSteps, choice: Choice, settle: Any
) -> None:
    """The first step of every case comes before the longer tests, which count it in the summary."""
    if choice.dtype == "float64":
        outcome = _free(case, reference_steps, choice, choice.coarse(case), 1)
    else:
        outcome = _teacher_forced(case, reference_steps.first(1), choice, choice.coarse(case))
    if outcome.found:
        reference_steps.failed.touch()
    settle(outcome, counted=False)


@pytest.mark.about("the formulas of microgpt/taps.py")
def test_by_the_table(
    case: Case, reference_steps: ReferenceSteps, choice: Choice, settle: Any
) -> None:
    """Each tensor is the table's operation on its operands: two texts may share a mistake."""
    outcome = held_to_table(case, partial(reference_steps.first, 1), choice.reference)
    settle(outcome, counted=False, labels=(choice.reference, NAME))


@pytest.mark.about("the formulas of microgpt/taps.py")
def test_later_steps_by_the_table(
    case: Case, reference_steps: ReferenceSteps, choice: Choice, settle: Any
) -> None:
    """Each tensor of the steps after the first is the table's operation on its operands."""
    if next(reference_steps.later(), None) is None:
        pytest.skip("the reference does not get to a second step: see test_first_step")
    (first,) = reference_steps.first(1)
    outcome = held_to_table(case, reference_steps.later, choice.reference, after=1, before=first)
    settle(outcome, counted=False, labels=(choice.reference, NAME))


@pytest.mark.about("steps one by one")
def test_teacher_forced(
    case: Case, reference_steps: ReferenceSteps, choice: Choice, standard: Standard, settle: Any
) -> None:
    """Each step starts from the reference's state, and Adam is given the reference's gradients."""
    settle(_teacher_forced(case, reference_steps, choice, standard))


@pytest.mark.about("running freely")
def test_free_running(
    case: Case, reference_steps: ReferenceSteps, choice: Choice, standard: Standard, settle: Any
) -> None:
    """Each side continues from its own state, so errors of a step reach the steps after it."""
    if choice.dtype == "float32":
        pytest.skip("errors of single precision grow from step to step; see test_teacher_forced")
    settle(_free(case, reference_steps, choice, standard, choice.steps_of(case)))


@pytest.mark.about("float32")
def test_in_single_precision(
    case: Case, reference_steps: ReferenceSteps, choice: Choice, settle: Any
) -> None:
    """Two steps of every case in float32; --dtype float32 compares all steps so."""
    if choice.candidate == "scalar":
        pytest.skip("scalar has double precision only")
    if choice.dtype == "float32":
        pytest.skip("test_teacher_forced compares all steps in single precision already")
    settle(_teacher_forced(case, reference_steps.first(2), choice, float32(case)), counted=False)


@pytest.mark.about("micro-batches")
@pytest.mark.parametrize("way", CUTS)
def test_in_micro_batches(
    case: Case,
    way: str,
    reference_steps: ReferenceSteps,
    choice: Choice,
    standard: Standard,
    settle: Any,
) -> None:
    """A batch that is cut into micro-batches has the same loss and gradients."""
    with in_micro_batches(*CUTS[way]):
        if choice.dtype == "float64":  # from the second step on, in memory that was used before
            settle(_free(case, reference_steps, choice, standard, min(3, choice.steps_of(case))))
        else:
            settle(_teacher_forced(case, reference_steps.first(2), choice, standard))


@pytest.mark.about("two ranks")
def test_on_two_ranks(
    case: Case, reference_steps: ReferenceSteps, choice: Choice, standard: Standard, settle: Any
) -> None:
    """A batch that two ranks share gives the same numbers (see crosscheck.ranks)."""
    shared = replace(case, config=replace(case.config, cores=2))
    if choice.dtype == "float64":
        settle(_free(shared, reference_steps, choice, standard, min(3, choice.steps_of(case))))
    else:
        settle(_teacher_forced(shared, reference_steps.first(1), choice, standard))


def _free(
    case: Case, reference_steps: ReferenceSteps, choice: Choice, standard: Standard, steps: int
) -> Outcome:
    """The outcome of the first steps, where each side continues from its own state."""
    theirs = islice(trace(case, choice.candidate, "float64", choice.steps_of(case)), steps)
    names = choice.reference, choice.candidate
    return compare(case, reference_steps.first(steps), theirs, standard, names)


def _teacher_forced(
    case: Case, reference_steps: Iterable[Step], choice: Choice, standard: Standard
) -> Outcome:
    """The outcome of the steps, each from the reference's state."""
    return compare_teacher_forced(
        case, reference_steps, choice.candidate, standard, choice.reference
    )


@pytest.mark.about("a thousand steps")
def test_a_thousand_steps(choice: Choice, notes: list[str], settle: Any) -> None:
    """The original run: after a thousand updates of their own, the sides are still close."""
    if choice.dtype == "float32":
        pytest.skip("errors of single precision grow from step to step; see test_teacher_forced")
    config = load_config()
    rng = Random(config.seed)
    documents = load_documents(config.dataset)
    rng.shuffle(documents)
    chars, batches = "".join(sorted(set("".join(documents)))), [[doc] for doc in documents]
    case = Case("a-thousand-steps", "", config, chars, batches, random="a long run")
    start = fresh_state(init_params(config, case.tokenizer.vocab_size, rng))
    ours = load_backend(choice.reference, config, start)
    theirs = load_backend(choice.candidate, config, start)
    checkpoints = [start]
    worst = apart = 0.0
    outcome = Outcome(case.name)  # for the map
    for step in range(config.steps):
        if step % CHECKPOINT == 0:
            checkpoints = [checkpoints[-1], _copied(ours.state())]
            apart = _apart(checkpoints[-1].params, theirs.state().params, step, outcome)
            if apart > FREE_PARAMS:
                break
        docs = case.docs(step)
        losses = ours.forward(docs), theirs.forward(docs)
        worst = max(worst, abs(losses[0] - losses[1]))
        share = abs(losses[0] - losses[1]) / FREE_LOSS
        outcome.note(step // COLUMN + 1, "forward/loss", share)
        if worst > FREE_LOSS:
            break
        for backend in (ours, theirs):
            backend.backward()
            backend.update(learning_rate(step, config))
    else:
        apart = _apart(ours.state().params, theirs.state().params, step, outcome)
        settle(outcome, counted=False)
    if max(worst / FREE_LOSS, apart / FREE_PARAMS) > 1:
        settle(_restarted(case, checkpoints[0], choice, step + 1 - checkpoints[0].updates))
        pytest.fail(f"in step {step + 1}: losses {worst:.1e}, parameters {apart:.1e} apart")
    notes.append(
        f"free run of {config.steps:,} steps: losses within {worst:.1e},"
        f" parameters at the end {apart:.1e}"
    )


def _apart(ours: Tensors, theirs: Tensors, step: int, outcome: Outcome) -> float:
    """The largest distance of a parameter between the sides; distances go into the map."""
    apart = {
        name: float(np.abs(np.asarray(ours[name]) - np.asarray(theirs[name])).max())
        for name in ours
    }
    for name, distance in apart.items():
        outcome.note(step // COLUMN + 1, f"params/{name}", distance / FREE_PARAMS)
    return max(apart.values())


def _copied(state: State) -> State:
    """A copy of the state, which the next step does not change."""
    params, m, v = (
        {name: np.array(tensor) for name, tensor in one.items()}
        for one in (state.params, state.m, state.v)
    )
    return State(params, m, v, state.updates)


def _restarted(case: Case, start: State, choice: Choice, steps: int) -> Outcome:
    """The outcome of the steps from a state on, compared tensor by tensor."""
    names = choice.reference, choice.candidate
    ours, theirs = (trace(case, name, "float64", steps, start) for name in names)
    return compare(case, ours, theirs, names=names, after=start.updates)


@pytest.mark.about("the names of all tensors")
def test_nothing_is_left_out(choice: Choice, settle: Any) -> None:
    """A trace of either side has every tap, derivative, gradient, moment and parameter."""
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
    reference_steps = list(trace(case, choice.reference, "float64", 1))
    outcome = _teacher_forced(case, reference_steps, choice, FLOAT64)
    if outcome.found:
        settle(outcome)
    for name in (choice.reference, choice.candidate):
        step = next(trace(case, name, "float64", 1))
        assert list(step) == expected == keys(case.config, 27)
        assert {split_key(key)[0] for key in step} == set(PHASES)
    assert outcome.tally.tensors == len(expected) - 2
    assert outcome.tally.elements == sum(
        int(real(key, tensor.shape, reference_steps[0]["batch/tokens"]).sum())
        for key, tensor in reference_steps[0].items()
        if split_key(key)[0] != "sample"
    )
