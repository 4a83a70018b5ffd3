"""A diagnosis is reproduced from the numbers: faults are put into a trace, and read off again."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

import crosscheck.diagnose
from crosscheck.again import CLOSE, RECORDED, Trial, again, packed
from crosscheck.cases import Case, load_case
from crosscheck.causes import OR, Cause, Finding
from crosscheck.compare import compare
from crosscheck.defects import Patch, planted
from crosscheck.diagnose import diagnose
from crosscheck.explain import WORDS, expression
from crosscheck.formulas import slips
from crosscheck.operations import FUNCTIONS, Around, Call, Slot, calls
from crosscheck.read_again import DRAWS, drawn_again, other_draws, read
from crosscheck.report import PLACE, with_diagnosis
from crosscheck.table import held_to_table
from crosscheck.trace import Array, Step, trace
from crosscheck.variants import alternatives
from crosscheck.where import where
from microgpt.backend import fresh_state
from microgpt.taps import AXES

JUDGES = (
    "adam_forms",
    "diagnose",
    "explain",
    "formulas",
    "operations",
    "read_again",
    "variants",
    "where",
)
Fault = Callable[[Step, Around], Array]


@pytest.fixture(scope="module")
def steps() -> dict[str, tuple[Case, list[Step]]]:
    names = ("two-layers", "tied-two-layers", "three-layers", "ragged-batch", "gelu")
    cases = {name: load_case(name) for name in names}
    return {name: (case, list(trace(case, "vectorized", "float64", 2)))
            for name, case in cases.items()}  # fmt: skip


def said(steps: dict[str, tuple[Case, list[Step]]], name: str, key: str, fault: Fault) -> str:
    case, (before, step) = steps[name]
    wrong = {**step, key: np.asarray(fault(step, Around(case.config, step)))}
    return diagnose(case, 2, key, step, wrong, before)


@pytest.mark.parametrize("promised", ["float64", "float32"])
@pytest.mark.parametrize(
    "key",
    [
        "forward/emb",
        "forward/layer0.mlp_res",
        "forward/layer0.attn_logits",
        "backward/dlayer0.k",
        "gradient/dlayer1.mlp_fc1",
        "adam_m/wte",
    ],
)
def test_numbers_that_no_mistake_gives_have_no_reading(
    steps: dict[str, tuple[Case, list[Step]]], key: str, promised: str
) -> None:
    case, (before, step) = steps["two-layers"]
    errors = np.random.default_rng(1).standard_normal(step[key].shape)
    for of in ("an element", "all elements"):
        wrong = step[key].copy()
        there = np.abs(errors) == np.abs(errors).max() if of == "an element" else wrong != 0
        wrong[there] += (np.abs(wrong).max() * errors)[there]
        words = diagnose(case, 2, key, step, {**step, key: wrong}, before, promised)
        assert not words or words.startswith(PLACE), of


def _linear(w: str, x: str) -> Fault:
    return lambda s, a: s[f"forward/{x}"] @ s[f"entry/{w}"].T


def _norm(x: Array) -> Array:
    return np.asarray(x * ((x * x).mean(-1, keepdims=True) + 1e-5) ** -0.5)


def _early(a: Around) -> Array:
    """Channels such that each head of what has been rolled by one begins one too early."""
    C = a.config.n_embd
    first = np.arange(C) < a.config.head_dim
    return np.where(first, (np.arange(C) + 1) % C, np.arange(C))


def _scores(q: Array, k: Array, a: Around) -> Array:
    products = np.einsum("bthd,buhd->bhtu", a.heads(q), a.heads(k))
    return np.asarray(products / a.config.head_dim**0.5 * a.looked_at)


def _without(key: str, which: int, times: float = 0.0) -> Fault:
    """The tensor with one of its contributions multiplied."""
    return lambda s, a: s[key] + (times - 1) * calls(a, key)[which].total()


NORM, LOGITS = "backward/dlayer1.attn_norm", "backward/dlayer1.attn_logits"
FAULTS: list[tuple[str, str, Fault, str]] = [
    ("two-layers", "forward/layer1.q", _linear("layer0.attn_wq", "layer1.attn_norm"),
     "layer0.attn_wq in place of layer1.attn_wq"),
    ("three-layers", "forward/layer2.k", _linear("layer2.attn_wk", "layer1.mlp_res"),
     "layer1.mlp_res in place of layer2.attn_norm"),
    ("tied-two-layers", "forward/layer0.v", lambda s, a: s["forward/layer0.attn_norm"]
     @ s["entry/layer0.attn_wv"], "layer0.attn_wv transposed"),
    ("two-layers", NORM, _without(NORM, 2), "missing: the contribution of layer1.v"),
    ("three-layers", NORM, _without(NORM, 0, 2.0), "there twice: the contribution of layer1.q"),
    ("gelu", NORM, _without(NORM, 1, -1.0), "the sign of the contribution of layer1.k"),
    ("tied-two-layers", "gradient/dwte", _without("gradient/dwte", 1),
     "missing: the contribution of wte as lm_head"),
    ("two-layers", LOGITS, lambda s, a: calls(a, LOGITS)[0].terms()[
        "the first term of the softmax's derivative"], "missing: the sum over the row"),
    ("gelu", "backward/dlayer0.mlp_pre", lambda s, a: s["backward/dlayer0.mlp_act"],
     "the slope of the activation is left out"),
    ("ragged-batch", "gradient/dlayer0.attn_wq", lambda s, a: np.einsum(
        "bto,bti->oi", s["backward/dlayer0.q"][:1], s["forward/layer0.attn_norm"][:1]),
     "only the first document"),
    ("two-layers", "gradient/dlayer0.mlp_fc1", lambda s, a: s["gradient/dlayer0.mlp_fc1"] * 3.7,
     "3.7 times the reference's; no name for this factor"),
    ("two-layers", "forward/emb", lambda s, a: s["forward/emb"] + s["forward/emb"] * 0.5
     * (np.arange(s["forward/emb"].shape[1]) == 0)[:, None], "wrong at the first position"),
    ("two-layers", "forward/emb_norm", lambda s, a: s["forward/emb"] * ((s["forward/emb"] ** 2)
     .mean(-1, keepdims=True) ** -0.5 + 1e-5), "mean(x * x) ** (-0.5) + eps in place of"),
    ("two-layers", "forward/layer0.mlp_norm", lambda s, a: _norm(
        s["forward/layer0.attn_res"] - s["forward/emb_norm"]), "goes on without the residual"),
    ("two-layers", "forward/layer0.attn_logits", lambda s, a: _scores(
        s["forward/layer0.q"], np.roll(s["forward/layer0.k"], 1, -1)[..., _early(a)], a),
     "a head begins one channel too early, of k only"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "key", "fault", "words"), FAULTS, ids=lambda x: str(x)[:40])
def test_a_fault_is_read_off_the_numbers(
    steps: dict[str, tuple[Case, list[Step]]], name: str, key: str, fault: Fault, words: str
) -> None:
    assert words in said(steps, name, key, fault)


def test_numbers_that_nothing_explains_are_not_explained(
    steps: dict[str, tuple[Case, list[Step]]],
) -> None:
    case, (_, step) = steps["two-layers"]
    rng = np.random.default_rng(0)
    for key in step:
        if key.startswith(("forward/layer1", "backward/dlayer1", "gradient/", "adam_m/")):
            noise = rng.standard_normal(step[key].shape)
            words = diagnose(case, 2, key, step, {**step, key: step[key] * (1 + noise)}, None)
            assert not words or words.startswith(("wrong ", "rows sum to ")), f"{key}: {words}"


def test_a_formula_comes_with_its_slips() -> None:
    wrong = [formula for _, formula in slips("s * (d - y * mean(d * y))", {"y": ["x"]})]
    for formula in ("s * d - y * mean(d * y)", "s * (d + y * mean(d * y))", "s * (d - mean(d * y))",
                    "s * (d - y * sum(d * y))", "s * (d - y * mean(d * x))"):  # fmt: skip
        assert formula in wrong
    assert "s * (d - y * mean(d * y))" not in wrong


def test_a_long_part_of_a_formula_is_cut_at_its_brackets() -> None:
    told = [words for words, _ in slips("exp(x - max(x)) / sum(exp(x - max(x)))")]
    assert all(words.count("(") == words.count(")") for words in told)
    assert any(".." in words for words in told)


@pytest.fixture(scope="module")
def drawn(steps: dict[str, tuple[Case, list[Step]]]) -> dict[str, dict[str, Array]]:
    """Documents by the fault that they are drawn with."""
    case, (step, _) = steps["gelu"]
    keys = ("sample/documents", "sample/likeliest")
    return {key: dict(other_draws(case, key, 1, step)) for key in keys}


@pytest.mark.parametrize("words", [*DRAWS])
def test_documents_drawn_with_a_fault_name_it(
    steps: dict[str, tuple[Case, list[Step]]], drawn: dict[str, dict[str, Array]], words: str
) -> None:
    case, (step, _) = steps["gelu"]
    for key, by_fault in drawn.items():
        wrong = by_fault[words]
        if not np.array_equal(wrong, step[key]):
            said = diagnose(case, 1, key, step, {**step, key: wrong}, None)
            explained = [by_fault[one] for one in said.split(OR) if one in by_fault]
            assert any(np.array_equal(guess, wrong) for guess in explained)


@pytest.mark.parametrize(
    ("words", "power"),
    [
        ("the logits are multiplied by the temperature, not divided", -1),
        ("the temperature has no effect", 0),
        ("the root of the temperature divides the logits", 0.5),
        ("the temperature is squared", 2),
    ],
)
def test_a_fault_in_the_temperature_draws_as_another_temperature_does(
    steps: dict[str, tuple[Case, list[Step]]],
    drawn: dict[str, dict[str, Array]],
    words: str,
    power: float,
) -> None:
    case, (step, _) = steps["gelu"]
    other = replace(case, temperature=case.temperature**power)
    right = drawn_again(other, "sample/documents", 1, step)
    assert np.array_equal(drawn["sample/documents"][words], right)


def test_drawing_and_reading_by_the_table_are_right(
    steps: dict[str, tuple[Case, list[Step]]],
) -> None:
    for case, (step, _) in steps.values():
        assert np.allclose(read(Around(case.config, step)), step["read/logits"], rtol=1e-12)
        for key in ("sample/documents", "sample/likeliest"):
            assert np.array_equal(drawn_again(case, key, 1, step), step[key])


def _found(case: str, diagnosis: str) -> Finding:
    return Finding("first steps", case, 1, "forward/emb", "", diagnosis, "", "", {})


def test_a_reading_is_told_if_other_cases_have_it_too() -> None:
    first = _found("a", "x, or y")
    agreed = Cause(first, [_found("b", "y"), _found("c", "y, or z")])
    assert agreed.diagnosis == "y"
    assert Cause(first).diagnosis == "x, or y"
    assert Cause(first, [_found("b", "u"), _found("c", "v")]).diagnosis == ""
    report = "emb disagrees\n  at          emb\n  looks like  x, or y\n  allowed     0"
    assert with_diagnosis(report, "x, or y", "y") == report.replace("x, or y", "y")
    assert "looks like" not in with_diagnosis(report, "x, or y", "")


def test_a_recording_is_followed_to_the_tap_that_it_gets_wrong() -> None:
    case = load_case("two-layers")
    root = Patch("vectorized/record.py", "-0.5: np.reciprocal", "-0.5: np.square")
    for phase in RECORDED:
        trial = Trial(case.config, fresh_state(case.params), phase)
        assert trial.leaves(case.docs(0)) == ""
        with planted([root]), np.errstate(all="ignore"):
            assert "emb_norm is the first that is not the text's" in trial.leaves(case.docs(0))


def test_a_recorded_batch_is_computed_again_in_its_own_precision() -> None:
    case, loss = load_case("one-document"), "return loss + _loss(self.last, last, of)"
    single = Patch("vectorized/replay.py", loss, f"{loss} + (self.flat.dtype == 'float32')")
    with planted([single]):
        (step,) = trace(case, "vectorized", "float32", 1, draws=False)
        found = {dtype: again(case, 1, "unwatched", step, dtype) for dtype in CLOSE}
    words = {dtype: tried.words for dtype, tried in found.items() if tried}
    assert words["float32"].startswith("a document by itself is wrong")
    assert words["float64"].startswith("in a new backend it is right")


def test_what_one_rank_gets_wrong_is_not_blamed_on_shares() -> None:
    case = load_case("three-shares")
    sound = list(trace(case, "scalar", "float64", 1))
    weights = Patch("vectorized/batch.py", "(1 / (of * length))[doc]", "(2 / (of * length))[doc]")
    shares = Patch("vectorized/backend.py", "self.sums.gradient()", "pass")
    for patch, on_shares in ((weights, False), (shares, True)):
        with planted([patch]):
            theirs = trace(case, "vectorized", "float64", 1)
            (found, *_) = compare(case, sound, theirs, names=("scalar", "vectorized")).found
        assert found.again.startswith("one rank is right") is on_shares
        assert ("ranks" in found.diagnosis) is on_shares


@pytest.mark.parametrize(("phase", "power"), [("adam_m", 1), ("adam_v", 2)])
def test_a_clipped_gradient_is_shown_with_the_factor_that_clips_it(phase: str, power: int) -> None:
    case = load_case("decay-and-clip")
    (step,) = trace(case, "scalar", "float64", 1, draws=False)
    behind = expression(case, 1, f"{phase}/wte", (0, 4), step)
    assert behind
    found = re.fullmatch(r"(\S+) [mv] \+ \(1 - (\S+)\) \((\S+) g\)(\^2)?", behind.formula)
    assert found
    beta, factor = float(found[2]), float(found[3])
    assert factor < 1
    assert behind.value == pytest.approx(
        (1 - beta) * (factor * behind.operands["g"]) ** power, 1e-4
    )


@pytest.mark.parametrize(
    ("patch", "case_name", "place"),
    [
        (Patch("vectorized/adam.py", "longest / (squares**0.5)", "longest / squares"),
         "decay-and-clip", "clip, vectorized/adam.py:"),
        (Patch("vectorized/sample.py", "astype(float) / (temperature or 1.0)", "astype(float)"),
         "cold-samples", "probabilities, vectorized/sample.py:"),
        (Patch("vectorized/sample.py", "min(len(text) + 1, longest)", "len(text)"),
         "cold-samples", "sample_many, vectorized/sample.py:"),
        (Patch("vectorized/batch.py", "(first <= u) & (u <= t)", "u <= t"),
         "unused-row", "what runs the recorded text: vectorized/batch.py"),
    ],
    ids=["clip", "probabilities", "sample_many", "packing"],
)  # fmt: skip
def test_a_report_leads_to_what_its_diagnosis_is_about(
    patch: Patch, case_name: str, place: str
) -> None:
    case = load_case(case_name)
    sound = list(trace(case, "scalar", "float64", 2))
    with planted([patch]):
        theirs = trace(case, "vectorized", "float64", 2)
        (found, *_) = compare(case, sound, theirs, names=("scalar", "vectorized")).found
    assert found.function.startswith(place), found


def test_gradients_that_scalar_does_not_clear_are_no_fault_of_the_table() -> None:
    case, kept = load_case("one-document"), Patch("scalar/backend.py", "p.grad = 0.0", "pass")
    with planted([kept]):
        first, second = trace(case, "scalar", "float64", 2, draws=False)
        found = held_to_table(case, lambda: [second], "scalar", after=1, before=first).found[0]
    assert found.problem == "is not what its own inputs give"
    assert found.at_fault == "reference"
    assert found.function.startswith("backward, scalar/backend.py:")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("(first <= u) & (u <= t)", "u <= t", "the mask is wrong"),
        ("(1 / (of * length))[doc], position", "(1 / (of * length))[doc], at", "positions are"),
        ("(1 / (of * length))[doc]", "(2 / (of * length))[doc]", "the weights are wrong"),
        ("array.fill(0)", "array.fill(1)", "the weights are wrong in padding"),
        ("starts.append(B * T - room)", "starts.append(B * T - T)", "lie on each other"),
        ("bisect_right(left_lengths, room)", "bisect_right(left_lengths, room + 1)", "longer than"),
        ("both[i + doc + 1]", "both[i + doc]", "the targets are wrong"),
    ],
)
def test_what_is_wrong_with_packed_arrays_is_named(old: str, new: str, words: str) -> None:
    case = load_case("micro-batches")
    docs = case.docs(0)
    trial = Trial(case.config, fresh_state(case.params), "unwatched")
    with planted([Patch("vectorized/batch.py", old, new)]), np.errstate(all="ignore"):
        parts = import_module("vectorized.batch").micro_batches(docs, case.config)
        assert words in " ".join(map(trial.wrong_array, parts))


@pytest.mark.parametrize(
    ("new", "wrong"),
    [
        ("dwpe[: demb.shape[1]] += demb.sum(axis=0)", True),
        ("np.add.at(dwpe, positions, demb + 0.0 * demb.sum(axis=0))", False),
    ],
)
def test_a_text_that_is_not_recorded_is_tried_in_packed_rows(new: str, wrong: bool) -> None:
    case = load_case("single-character")
    (step,) = trace(case, "vectorized", "float64", 1, draws=False)
    with planted([Patch("vectorized/model.py", "np.add.at(dwpe, positions, demb)", new)]):
        assert ("the text itself is wrong" in packed(case, 1, step)) == wrong


@pytest.mark.parametrize(
    ("phase", "words"), [("m", "m does not change"), ("v", "v does not change")]
)
def test_rows_that_adam_leaves_as_they_were_are_told(
    steps: dict[str, tuple[Case, list[Step]]], phase: str, words: str
) -> None:
    def left(step: Step, _: Around) -> Array:
        first = np.arange(len(step["adam_m/layer1.mlp_fc2"])) < 2
        return np.where(
            first[:, None],
            step[f"entry_{phase}/layer1.mlp_fc2"],
            step[f"adam_{phase}/layer1.mlp_fc2"],
        )

    assert said(steps, "two-layers", f"adam_{phase}/layer1.mlp_fc2", left).startswith(words)


def test_an_operation_without_words_is_judged_all_the_same(
    steps: dict[str, tuple[Case, list[Step]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    case, (_, step) = steps["two-layers"]
    key, index = "forward/emb_norm", (0, 1, 2)
    monkeypatch.delitem(WORDS, "rmsnorm")
    behind = expression(case, 2, key, index, step)
    assert behind
    assert behind.formula == "rmsnorm(emb)"
    assert np.isclose(behind.value, step[key][index], rtol=1e-12)


def test_a_term_that_is_one_number_for_a_row_is_missed(
    steps: dict[str, tuple[Case, list[Step]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    case, (_, step) = steps["two-layers"]

    def terms(a: Around, dy: Array, scale: Array) -> dict[str, Array]:
        return {"the whole": scale * dy, "the mean": -scale * dy.mean(axis=-1, keepdims=True)}

    monkeypatch.setitem(FUNCTIONS, "rmsnorm", [FUNCTIONS["rmsnorm"][0], terms])
    (call,) = calls(Around(case.config, step), "backward/demb")
    sound = {**step, "backward/demb": call.total()}
    wrong = {**step, "backward/demb": call.terms()["the whole"]}
    assert diagnose(case, 2, "backward/demb", sound, wrong, None) == "missing: the mean"


def test_a_vector_of_another_layer_is_tried_and_no_vector_is_transposed(
    steps: dict[str, tuple[Case, list[Step]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    case, (_, step) = steps["two-layers"]
    monkeypatch.setitem(AXES, "gain", ("C",))
    gains = {f"entry/layer{i}.gain": np.arange(8.0) + i for i in (0, 1)}
    slot = Slot("layer1.gain", gains["entry/layer1.gain"], ("C",))
    call = Call("scaled", "", lambda a, gain: {"": gain}, Around(case.config, {**step, **gains}),
                {"gain": slot})  # fmt: skip
    tried = [words for words, _ in alternatives(call, "gain", gains, None)]
    assert "layer0.gain in place of layer1.gain" in tried
    assert not [words for words in tried if "transposed" in words]


def test_an_axis_with_one_index_is_no_place() -> None:
    case = load_case("one-head")
    tokens = np.array([[26, 1, 2, 3]])
    wrong = np.zeros((1, 1, 3, 3), bool)
    wrong[0, 0, 2] = True
    there = np.tril(np.ones((3, 3), bool))[None, None]
    words = where(case, "forward/layer0.attn_weights", wrong, there, tokens)
    assert words == "at the last position"


@pytest.mark.parametrize("name", JUDGES)
def test_no_judge_imports_a_candidate(name: str) -> None:
    folder = Path(crosscheck.diagnose.__file__).parent
    text = (folder / f"{name}.py").read_text(encoding="utf-8")
    assert "from vectorized" not in text
    assert "from scalar" not in text


def test_a_quoted_part_of_a_formula_has_single_spaces() -> None:
    for formula in (
        "exp(x - max(x)) / sum(exp(x - max(x)))",
        "y * (dy - sum(dy * y)) + dy * dy * y",
    ):
        for words, _ in slips(formula):
            assert words == " ".join(words.split())


def test_shares_of_ranks_that_nothing_else_explains_are_said_to_be_shares() -> None:
    case = load_case("three-shares")
    (step,) = trace(case, "vectorized", "float64", 1)
    key = next(key for key in step if key.startswith("adam_m/"))
    faulty = {**step, key: np.random.default_rng(1).normal(size=step[key].shape)}
    said = diagnose(case, 1, key, step, faulty, None)
    assert said == "shares of the ranks, if one rank agrees"
