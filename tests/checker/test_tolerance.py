"""What is allowed: narrow enough to show a single rounding to float32, wide enough for any other
order of sums."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from crosscheck.at_once import Passed, passing
from crosscheck.cases import Case, load_case
from crosscheck.compare import Outcome, compare, compare_teacher_forced
from crosscheck.defects import Defect, Patch, planted, reference_steps, standard
from crosscheck.noise import noise, smoothed
from crosscheck.tolerance import FACTOR, FLOAT64, Tolerance, float32, float64
from crosscheck.trace import Step, real, trace

MARGIN = 10
EPS = Patch(
    "vectorized/model.py",
    "scale = (ms + eps) ** -0.5",
    "scale = (ms + float(np.float32(eps))) ** -0.5",
)
CASES = ("one-document", "three-layers", "microgpt-243", "repeated-token", "impossible-padding")


def _compared(name: str, *patches: Patch) -> Outcome:
    case = load_case(name)
    sound, allowed = reference_steps(name, "scalar"), standard(name)
    with planted(patches):
        return compare(case, sound, trace(case, "vectorized", "float64", len(sound)), allowed)


def test_an_eps_in_single_precision_is_caught_in_most_elements() -> None:
    (first, *_) = _compared("one-document", EPS).found
    assert first.key == "forward/emb_norm"
    assert first.exceeding > first.elements // 2


def test_what_is_allowed_is_never_more_than_before() -> None:
    for name in CASES:
        for number, step in enumerate(reference_steps(name, "scalar"), 1):
            for key, tensor in step.items():
                if key.startswith(("batch", "sample", "entry_v", "adam_v")):
                    continue
                most = 1e-12 + 1e-9 * np.abs(tensor)
                assert (standard(name).tolerance(number, key).allowed(tensor) <= most).all()


@pytest.mark.parametrize("name", CASES)
def test_what_passes_without_a_measurement_would_pass_with_it(name: str) -> None:
    measured = standard(name)
    unmeasured = float64(lambda: measured.noise, load_case(name).config)
    for number, step in enumerate(reference_steps(name, "scalar"), 1):
        for key in step.keys() & measured.noise[number - 1].keys():
            *less, (most, _) = unmeasured.widening(number, key, step)
            assert less
            for least, _ in less:
                assert (least.allowed(step[key]) <= most.allowed(step[key])).all(), key


def test_single_precision_that_passes_without_a_measurement_would_pass_with_it() -> None:
    measured = standard("three-layers").noise
    allowed = float32(load_case("three-layers"), lambda: measured)
    for number, step in enumerate(reference_steps("three-layers", "scalar"), 1):
        for key in step.keys() & measured[number - 1].keys():
            *less, (most, _) = allowed.widening(number, key, step)
            assert len(less) > 1
            for least, _ in less:
                assert (least.allowed(step[key]) <= most.allowed(step[key])).all(), key


def test_a_row_of_tensors_passes_those_that_pass_one_by_one() -> None:
    name, key, wrong = "ragged-batch", "backward/dlayer0.q", "forward/layer0.v"
    reference = reference_steps(name, "scalar")[0]
    candidate = {**reference_steps(name, "vectorized")[0]}
    candidate[wrong] = candidate[wrong] + np.where(
        candidate[wrong] == candidate[wrong].max(), 1e-9, 0
    )
    there = real(key, reference[key].shape, reference["batch/tokens"])
    candidate[key] = np.where(there, candidate[key], 7.0)  # padding may hold any number
    known = standard(name).noise
    allowed = float64(lambda: known, load_case(name).config)
    for _ in range(2):  # the second time with what the standard has kept
        passed = passing(1, reference, candidate, allowed)
        assert wrong not in passed
        tolerance, least = next(allowed.widening(1, key, reference))
        shares = tolerance.shares(reference[key], candidate[key])[there]
        excused = tolerance.excused(reference[key], candidate[key])[there].sum()
        assert passed[key] == Passed(shares.max(), least, excused)


def test_a_row_of_tensors_passes_none_if_one_has_another_shape() -> None:
    step = reference_steps("one-document", "scalar")[0]
    assert passing(1, step, step, FLOAT64)
    assert not passing(1, step, {**step, "forward/emb": step["forward/emb"][:, :1]}, FLOAT64)
    assert not passing(1, step, {k: x for k, x in step.items() if k != "forward/emb"}, FLOAT64)


def test_a_reference_whose_errors_cancel_is_no_cause_for_complaint() -> None:
    case = load_case("large-attention-logits")
    differentiated = Patch(
        "scalar/model.py", "max(x_i.data for x_i in x)", "max(x, key=lambda x_i: x_i.data)"
    )
    theirs = reference_steps(case.name, "vectorized")
    with planted([differentiated]):
        ours = list(trace(case, "scalar", "float64", len(theirs), draws=False))
        allowed = float64(noise(case, ours))
    found = compare(case, ours, [{key: x for key, x in step.items() if not key.startswith("sample")}
                                 for step in theirs], allowed).found  # fmt: skip
    assert not found


@pytest.mark.parametrize("name", CASES)
def test_there_is_room_for_ten_times_the_worst(name: str) -> None:
    """Of what the noise allows; where 1e-9 allows less, two thirds must be left."""
    allowed = standard(name)
    narrow = replace(
        allowed, noise=[{k: x / MARGIN for k, x in one.items()} for one in allowed.noise]
    )
    case, sound = load_case(name), reference_steps(name, "scalar")
    assert (
        compare(case, sound, trace(case, "vectorized", "float64", len(sound)), narrow).found == []
    )


@pytest.mark.parametrize("name", CASES)
def test_room_is_left_for_another_order_of_sums_and_another_exp(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vectorized import model

    exp, einsum = model.exp, model.einsum

    def other_exp(x: Any) -> Any:
        """Off by one unit in the last place, up or down by the number itself."""
        if type(x) is not np.ndarray:
            return exp(x)  # being recorded
        ulps = (x.view("int64") * 2654435761 >> 33) % 3 - 1
        return exp(x) * np.where(x == 0, 1.0, 1 + 2.0**-52 * ulps)

    def other_order(letters: str, *operands: Any) -> Any:
        if any(type(x) is not np.ndarray for x in operands):
            return einsum(letters, *operands)
        wide = [x.astype("longdouble") for x in operands]
        return einsum(letters, *wide).astype(operands[0].dtype)

    monkeypatch.setattr(model, "exp", other_exp)
    monkeypatch.setattr(model, "einsum", other_order)
    case, sound = load_case(name), reference_steps(name, "scalar")
    found = compare(case, sound, trace(case, "vectorized", "float64", len(sound)), standard(name))
    assert found.found == []
    assert found.tally.worst < 1 / 3


def test_adams_v_has_no_additive_term() -> None:
    assert FLOAT64.tolerances["adam_v"].atol == FLOAT64.tolerances["entry_v"].atol == 0
    tiny, other = np.array([1e-20]), np.array([1.1e-20])
    assert FLOAT64.tolerances["adam_v"].shares(tiny, other) > 1
    assert FLOAT64.tolerances["adam_m"].shares(tiny, other) < 1


def test_a_wrong_small_number_in_adams_v_is_caught() -> None:
    case, sound = load_case("one-document"), reference_steps("one-document", "scalar")
    key = "adam_v/layer0.mlp_fc1"
    wrong = [dict(step) for step in sound]
    v = wrong[0][key].copy()
    small = np.unravel_index(np.argmin(np.where(v > 0, v, np.inf)), v.shape)
    assert v[small] < 1e-12
    v[small] *= 1 + 1e-6
    wrong[0][key] = v
    assert [one.key for one in compare(case, sound, wrong, standard("one-document")).found] == [key]


def test_few_elements_are_excused_and_they_are_counted() -> None:
    for name in ("large-attention-logits", "large-logits", *CASES):
        tally = _compared(name).tally
        assert sum(tally.excused.values()) <= tally.elements // 1000
        assert tally.excused.get("adam_v", 0) == 0
        assert tally.excused.get("params", 0) <= 1  # large-logits: p that its update cancels
    assert _compared("large-attention-logits").tally.excused["backward"] > 0


def test_excused_is_what_the_relative_part_alone_does_not_let_pass() -> None:
    tolerance = Tolerance(rtol=1e-9, atol=1e-12)
    numbers, others = np.array([1.0, 1e-5]), np.array([1.0 + 5e-10, 1e-5 + 5e-13])
    assert (tolerance.shares(numbers, others) < 1).all()
    assert tolerance.excused(numbers, others).tolist() == [False, True]


def test_the_noise_of_a_sum_that_cancels_is_that_of_its_terms() -> None:
    case = load_case("large-attention-logits")
    sound = reference_steps("large-attention-logits", "scalar")[:1]
    (measured,) = noise(case, sound)
    key = "backward/dlayer0.attn_logits"
    here = np.abs(sound[0][key])
    cancelled = (here > 0) & (measured[key] > 1e-12 * here)
    assert cancelled.any()
    plain = measured["forward/emb"] / np.abs(sound[0]["forward/emb"])
    assert np.median(plain) < 1e-15


def test_a_row_that_a_single_number_moves_has_the_noise_of_its_columns() -> None:
    moves = np.outer([1e-20, 1.0, 2.0], [1.0, 3.0, 1.0])  # dy x^T at one position
    assert smoothed(moves, np.ones(moves.shape, bool))[0].min() > 1


def test_what_one_run_leaves_unmoved_another_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = iter(
        [[{"a": np.array([0.0, 2.0])}], [{"a": np.array([1.0, 0.0])}], [{"a": np.zeros(2)}]]
    )
    monkeypatch.setattr("crosscheck.noise._of_one_run", lambda *_: next(runs))
    (found,) = noise(load_case("one-position"), [])
    assert found["a"].tolist() == [1.0, 2.0]


def test_noise_ends_where_a_step_lacks_its_batch() -> None:
    case, sound = load_case("one-document"), reference_steps("one-document", "scalar")
    lacking: list[Step] = [sound[0], {k: v for k, v in sound[1].items() if "batch" not in k}]
    assert len(noise(case, sound)) == len(sound)
    assert len(noise(case, lacking)) == 1
    assert noise(case, [{}]) == []


def test_scalar_is_as_it_was_after_its_noise_is_measured() -> None:
    from scalar.value import Value

    exact = Value.__init__
    noise(load_case("one-position"), reference_steps("one-position", "scalar")[:1])
    assert Value.__init__ is exact


def test_single_precision_is_excused_where_double_shows_cancellation() -> None:
    case: Case = load_case("one-document")
    tensor = np.array([1.0, 1e-9])
    other = np.array([1.0, 1e-9 + 1e-3])
    key = "gradient/dwte"
    plain = float32(case).tolerance(1, key).shares(tensor, other)
    cancels = float32(case, [{key: np.array([0.0, 1e-12])}]).tolerance(1, key)
    assert plain[1] > 1
    assert cancels.shares(tensor, other)[1] < 1


def test_a_rounded_gradient_is_caught_in_single_precision_too() -> None:
    case, sound = load_case("repeated-token"), reference_steps("repeated-token", "scalar")
    patch = Patch("vectorized/model.py", "dx = dy @ w  #", "dx = 1.001 * (dy @ w)  #")
    assert Defect("a factor", "", (patch,), "").package == "vectorized"
    with planted([patch]):
        found = compare_teacher_forced(
            case, sound, "vectorized", float32(case, noise(case, sound))
        ).found
    assert found
    assert found[0].key.startswith("backward/")


def test_a_standard_says_how_much_it_allows() -> None:
    known = float64([{"forward/loss": np.array(1e-16)}]).tolerance(1, "forward/loss")
    assert str(known) == f"{FACTOR:,} times its noise; at most rtol 1e-09, atol 1e-12"
