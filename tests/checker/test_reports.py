"""One cause, one report: what a person gets who has made a mistake."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from crosscheck import lines
from crosscheck.again import RECORDER
from crosscheck.cases import load_case
from crosscheck.causes import (
    OR_LARGER,
    RUN_AS,
    STEPS,
    VALUE,
    Cause,
    Finding,
    Run,
    also,
    causes,
    consequences,
    shared,
)
from crosscheck.compare import Disagreement, Tally, compare, exhibit, simplicity
from crosscheck.conftest import Session
from crosscheck.defects import Patch, planted
from crosscheck.lines import function_of, lines_of
from crosscheck.reference_steps import ReferenceSteps
from crosscheck.report import WIDTH, render, summary
from crosscheck.sides import is_marked, marked_memory
from crosscheck.tolerance import float32
from crosscheck.trace import keys, teacher_forced, trace
from crosscheck.where import where

ROOT = Path(__file__).resolve().parents[2]
SCREENS = 48  # lines of two
NAMES = ("scalar", "vectorized")
MODEL = "vectorized/model.py"
RAISING = "raise NotImplementedError"
NO_ROW_SUM = Patch(MODEL, "return y * (dy - total(dy * y))", "return y * dy")


def report(patch: Patch, case_name: str = "single-character") -> str:
    """What a case says to a patch."""
    case = load_case(case_name)
    with planted([patch]), np.errstate(all="ignore"):
        ours, theirs = (trace(case, name, "float64", 1) for name in NAMES)
        outcome = compare(case, ours, theirs, names=NAMES)
    words = render(outcome.found[0], *NAMES)
    assert max(map(len, words.splitlines())) <= WIDTH
    return re.sub(r"\s+", " ", words)


@pytest.mark.parametrize(
    ("patch", "words"),
    [
        (
            Patch(MODEL, "return scale * (dy - y * mean(dy * y))", RAISING),
            ["vectorized stops with NotImplementedError", "got to dlayer0.mlp_norm", f"{MODEL}:"],
        ),
        (
            Patch(MODEL, "return exps / total(exps)", "exps / total(exps)"),
            ["attn_weights is None: a function returned nothing, in vectorized", "softmax_forward"],
        ),
        (
            Patch(MODEL, "return x * scale, scale", "return x * scale"),
            ["not enough values to unpack", "rmsnorm_forward(emb, config.norm_eps)", "got to emb"],
        ),
        (
            Patch(MODEL, "return x.mean(axis=-1, keepdims=True)", "return mean(x)"),
            ["RecursionError", "(in mean)", "got to emb"],
        ),
        (
            Patch(MODEL, "k = tap.k = linear", "k = linear"),
            ["layer0.k was never written by vectorized", "agreed 4 tensors"],
        ),
        (
            Patch(MODEL, "dtap.emb = demb", "pass"),
            ["demb was never written by vectorized", "the last demb_norm"],
        ),
        (
            Patch(MODEL, "    dparams.wte, dparams.wpe = dwte, dwpe", "    dparams.wte = dwte"),
            ["dwpe was never written by vectorized"],
        ),
        (
            Patch(MODEL, "dwpe = np.zeros_like(params.wpe)", "dwpe = np.empty_like(params.wpe)"),
            ["dwpe disagrees", "an element that is never written is nan"],
        ),
        (
            Patch("scalar/model.py", "    probs = softmax(logits)  # [V]", f"    {RAISING}"),
            ["scalar stops with NotImplementedError", "scalar/model.py:", "(in cross_entropy)",
             "got to logits"],
        ),
        (
            Patch("vectorized/lower.py", "(a.dot, (b, out))", "(a.dot, (a, out))"),
            ["vectorized stops with ValueError", "(in run)", "recorded dot, vectorized/model.py:"],
        ),
    ],
    ids=["stub", "no return", "too few", "recursion", "tap", "derivative", "gradient", "memory",
         "scalar", "recording"],
)  # fmt: skip
def test_a_side_that_stops_is_reported_like_one_that_is_wrong(
    patch: Patch, words: list[str]
) -> None:
    said = report(patch)
    assert "Traceback" not in said
    for one in words:
        assert one in said, said


ROW_MEAN = "return scale * (dy - y * mean(dy * y))"


def test_what_only_the_recorder_refuses_does_not_read_like_a_wrong_number() -> None:
    said = report(Patch(MODEL, ROW_MEAN, ROW_MEAN.replace("dy * y)", "dy.transpose(0, 1, 2) * y)")))
    assert "the recorder cannot repeat .transpose of an array" in said
    assert "tensors, computed in plain NumPy; but the recorder" in said
    assert "its line vectorized/model.py:" in said
    assert "instead write it with einsum of two arrays, reshape, x @ w.T" in said
    wrong = ROW_MEAN.replace("dy - y * mean(dy", "dy + y * mean(dy.transpose(0, 1, 2)")
    said = report(Patch(MODEL, ROW_MEAN, wrong))
    assert "the sign of the second term of the norm's derivative" in said
    assert "transpose of an array" not in said


def test_a_wrong_number_is_told_before_what_the_recorder_refuses() -> None:
    refusal = replace(finding("a", "", words="x"), stopped="m.py:1 RecordingError: x", headline="x")
    wrong = finding("b", "forward/emb")
    findings = {"first": [refusal], "second": [wrong]}
    session = SimpleNamespace(findings=findings, order={"first": 0, "second": 1})
    found = Session.in_order.fget(session)  # type: ignore[attr-defined]
    assert [cause.all for cause in causes(found)] == [[wrong, refusal]]


@pytest.mark.parametrize(
    ("told", "readings", "line"),
    [
        ("x, or y", "y", "  with the other cases it looks like: y"),
        ("x", "z", "  with the other cases it looks like: nothing that all of them share"),
        ("x", "x", ""),
        ("wrong in row 1", "z", ""),
    ],
)
def test_a_reading_that_other_cases_change_is_told_in_a_line(
    told: str, readings: str, line: str
) -> None:
    first = finding("a", "forward/emb", words=told)
    others = [finding(name, "forward/emb", words=readings) for name in "bc"]
    session = SimpleNamespace(announced=first, told=told, _consequences=lambda _: ())
    lines = Session._lines(session, Cause(first, others), 0, 1)  # type: ignore[arg-type]
    title = "one cause, reported above: case a, step 1, forward pass:"
    assert lines == ["", title, *([line] if line else [])]


def test_only_memory_that_was_not_written_is_said_to_be_that() -> None:
    with marked_memory():
        marks = np.empty(2), np.empty(2, "float32")
    assert all(is_marked(float(numbers[0])) for numbers in marks)
    assert is_marked(float(-marks[0][0] + 1.0))
    with np.errstate(all="ignore"):
        assert not is_marked(float(np.exp(np.float64(1e4)) * 0.0))
    assert not is_marked(np.nan)
    assert not is_marked(1.0)


def test_what_is_looked_for_first_follows_the_two_numbers() -> None:
    said = report(NO_ROW_SUM)
    order = ["vectorized", "looks like", "at fault", "computed at", "look at", "should be w",
             "difference", "allowed", "exceeded by", "differs in", "agreed"]  # fmt: skip
    places = [said.index(f" {words}") for words in order]
    assert places == sorted(places)
    assert "recomputed from vectorized's own inputs, it should be" in said


def test_a_tensor_overwritten_after_it_was_written_is_told_and_is_one_cause() -> None:
    line = "attn_res = tap.attn_res = projected + x  # (B, T, C)"
    said = report(Patch(MODEL, line, "x += projected\n    attn_res = tap.attn_res = x"))
    assert "agreed 1 tensor before it, the last emb" in said
    assert "emb_norm holds other numbers than its own inputs give; was it changed in place" in said
    first, second = (f"these are the numbers of layer{i}.attn_res (forward pass)" for i in (0, 1))
    found = [
        finding("a", "forward/emb_norm", words=first),
        finding("b", "forward/layer0.mlp_res", words=second),
        finding("c", "forward/emb", words=first),
        finding("d", "forward/emb", words=first.replace("attn_res", "mlp_res")),
    ]
    assert [cause.first.case for cause in causes(found)] == ["a", "d"]


def test_the_last_of_two_positions_has_a_number() -> None:
    case, there = load_case("single-character"), np.ones((1, 2, 16), bool)
    last = there & (np.arange(2) == 1)[None, :, None]
    assert where(case, "forward/emb", last, there, np.array([[0, 1, 0]])) == "at position 1"
    there, last = np.ones((1, 3, 16), bool), np.zeros((1, 3, 16), bool)
    last[:, 2] = True
    tokens = np.array([[0, 1, 2, 0]])
    assert where(case, "forward/emb", last, there, tokens) == "at the last position"


def test_a_gradient_of_another_shape_is_blamed_on_its_side() -> None:
    patch = Patch(MODEL, "dparams.wte, dparams.wpe = dwte, dwpe",
                  "dparams.wte, dparams.wpe = dwte.T, dwpe")  # fmt: skip
    said = report(patch)
    assert "dwte has shape (16, 4) in vectorized, and should have (4, 16)" in said


def test_keys_that_layers_share_are_told() -> None:
    patch = Patch("scalar/model.py", "keys: list[Matrix] = [[] for _ in range(config.n_layer)]",
                  "keys: list[Matrix] = [[]] * config.n_layer")  # fmt: skip
    said = report(patch, "two-layers")
    assert "is ragged: lists of" in said
    assert "in scalar" in said
    assert "one list takes the keys or values of several layers or documents" in said


def test_a_report_names_the_lines_of_both_texts_and_the_function_at_fault() -> None:
    said = report(NO_ROW_SUM)
    assert "vectorized/model.py:" in said
    assert "dattn_logits = softmax_backward(dattn_weights, tap.attn_weights)" in said
    assert re.search(r"computed at scalar/model.py:\d+ \(its forward pass\) ", said)
    assert " ulp" not in said  # a wrong number is not a matter of rounding
    assert "look at softmax_backward, vectorized/model.py:" in said
    assert "at fault vectorized" in said


def test_of_operations_that_a_text_chooses_between_the_one_of_the_table_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    norm = "rmsnorm_backward(dmlp_norm, tap.mlp_norm, tap.mlp_scale)"
    chosen = f"if config:\n        dx = {norm}\n        return dx + dmlp_res"
    source = lines._source(MODEL)
    other = source.replace(
        f"return {norm}", f"{chosen}\n    return softmax_backward(dmlp_norm, tap.mlp_norm)"
    )
    assert other != source
    monkeypatch.setattr(lines, "_source", lambda _: other)
    lines._functions.cache_clear()
    found = function_of("backward/dlayer0.attn_res", load_case("gelu").config, "vectorized")
    lines._functions.cache_clear()
    assert found.startswith("rmsnorm_backward, vectorized/model.py:")


def test_a_function_that_is_right_elsewhere_is_not_blamed() -> None:
    config = load_case("one-document").config
    named = partial(function_of, "backward/demb_norm", config, "vectorized")
    assert named().startswith("rmsnorm_backward, ")
    assert named(agreed=["gradient/dlm_head", "forward/emb_norm"]).startswith("rmsnorm_backward, ")
    assert named(agreed=["backward/dlayer0.attn_res"]).startswith("attention_backward, ")


@pytest.mark.parametrize(
    ("old", "new", "blamed"),
    [
        ("tap.layers[-1].mlp_res", "tap.layers[0].mlp_res", "gpt_backward"),
        ("dmlp_norm, tap.mlp_norm, tap.mlp_scale", "dmlp_norm, tap.mlp_norm, tap.attn_scale",
         "mlp_backward"),
        ("dx = dy @ w", "dx = dy @ (2.0 * w)", "linear_backward"),
    ],
)  # fmt: skip
def test_a_function_that_is_given_another_tensor_is_not_blamed(
    old: str, new: str, blamed: str
) -> None:
    assert f"look at {blamed}, " in report(Patch(MODEL, old, new), "two-layers")


def test_every_tensor_has_a_line_in_both_texts() -> None:
    case = load_case("two-layers")
    for key in keys(case.config, 27):
        if not key.startswith(("batch", "entry")):
            found = lines_of(key, case.config)
            assert [line.partition("/")[0] for line in found] == list(NAMES), key
    dres = lines_of("backward/dlayer0.mlp_res", case.config)[1]
    assert "rmsnorm_backward(dattn_norm" in dres
    assert "linear_backward(dlogits" in lines_of("backward/dlayer1.mlp_res", case.config)[1]
    assert function_of("adam_v/wte", case.config, "scalar").startswith("adam, scalar/adam.py:")


def test_an_epsilon_in_the_clip_factor_is_named_and_the_two_numbers_are_told_apart() -> None:
    clip = Patch("scalar/adam.py", "longest / (squares**0.5))", "longest / (squares**0.5 + 1e-6))")
    said = report(clip, "decay-and-clip")
    assert "1e-6 is added to the length, as in PyTorch's clip_grad_norm_" in said
    assert "at fault scalar" in said
    (number,) = re.findall(r"own inputs, it should be (\S+)", said)
    (wrong,) = re.findall(r" scalar (-\S+)", said)
    assert f"{float(wrong):.{len(number.lstrip('-0.'))}g}" != number


def test_an_update_of_zero_is_led_back_to_the_learning_rate() -> None:
    case = load_case("one-position")
    case = replace(case, config=replace(case.config, steps=1))
    ours, theirs = (trace(case, name, "float64", 2) for name in NAMES)
    words = render(compare(case, ours, theirs, names=NAMES).found[0], *NAMES)
    assert "learning_rate, is 0 in step 2" in words


def test_drawn_documents_are_told_as_texts() -> None:
    patch = Patch("vectorized/sample.py", "logits.astype(float) / (temperature or 1.0)",
                  "logits.astype(float)")  # fmt: skip
    said = report(patch, "one-document")
    assert "scalar document 0: " in said
    assert "at draw" in said
    assert "p after it, scalar: " in said
    assert "vectorized.sample.probabilities of the same logits is not softmax(logits / 2)" in said
    assert "scalar.sample.probabilities" not in said
    assert "documents drawn: the drawn documents differ" in said
    assert "ulp" not in said


def test_a_draw_that_is_at_fault_is_not_blamed_on_the_temperature() -> None:
    line = "token = rng.choices(range(tokenizer.vocab_size)"
    patch = Patch("scalar/sample.py", line, f"rng.random()\n        {line}")
    said = report(patch, "one-document")
    assert "the draw, the prompt or the closing token is at fault" in said
    patch = Patch("scalar/sample.py", "top_k or len(logits)]", "len(logits)]")
    said = report(patch, "one-document")
    assert "scalar.sample.probabilities of the same logits is not softmax" in said
    assert "over the 2 largest logits" in said
    assert "the documents of the likeliest tokens differ" in said


def test_reading_has_its_expression_and_its_side() -> None:
    patch = Patch("vectorized/sample.py", "np.concatenate((self.values, v), axis=1)",
                  "np.concatenate((v, self.values), axis=1)")  # fmt: skip
    said = report(patch)
    assert "reading token by token: logits disagrees" in said
    assert "of the forward pass, which reads the same tokens" in said
    assert "at fault vectorized" in said
    assert "computed at scalar/backend.py:" in said
    lists = "keys: list[Matrix] = [[] for _ in range(self.config.n_layer)]"
    shared_list = Patch(
        "scalar/backend.py", lists, "keys: list[Matrix] = [[]] * self.config.n_layer"
    )
    said = report(shared_list, "two-layers")
    assert "the keys of all layers lie in one list" in said
    assert "look at read, scalar/backend.py:" in said


def test_a_fault_in_the_weights_of_the_loss_is_one_of_the_loss() -> None:
    patch = Patch("vectorized/batch.py", "out=weights)", "out=weights)\n    weights[-1] = 0")
    assert "forward pass: loss disagrees" in report(patch, "ragged-batch")


def test_recorded_gradients_are_compared_in_the_order_of_the_backward_pass() -> None:
    case = load_case("two-layers")
    order = [key for key in keys(case.config, 27) if key.startswith("unwatched/")]
    assert order[:3] == ["unwatched/loss", "unwatched/dlm_head", "unwatched/dlayer1.mlp_fc2"]
    assert order[-2:] == ["unwatched/dwte", "unwatched/dwpe"]


def test_the_element_that_is_shown_is_a_typical_one() -> None:
    shares = np.full((1, 1, 3, 3), 5.0)
    reference = np.full((1, 1, 3, 3), 1.0)
    shares[0, 0, 0] = 100  # a softmax over one position
    assert exhibit("forward/layer0.attn_weights", reference, shares) == (0, 0, 1, 0)
    rows, sizes = np.array([9.0, 100.0, 8.0]), np.array([1.0, 0.0, 1.0])
    assert exhibit("update/wte", sizes, rows) == (0,)
    assert exhibit("update/wte", np.zeros(3), rows) == (1,)


def test_simple_is_what_has_few_layers_then_few_documents() -> None:
    names = ["two-layers", "one-position", "ragged-batch", "one-document", "single-character"]
    ordered = sorted(names, key=lambda name: simplicity(load_case(name), 1))
    assert ordered[:2] == ["single-character", "one-document"]
    assert ordered[-1] == "two-layers"


def test_steps_of_the_reference_are_computed_once(tmp_path: Path) -> None:
    case = load_case("tied-two-layers")
    whole = list(trace(case, "scalar", "float64", 3))
    first = ReferenceSteps(case, "scalar", 3, tmp_path, "one")
    next(iter(first))
    second = ReferenceSteps(case, "scalar", 3, tmp_path, "one")
    for ours, theirs in zip(whole, second):
        assert list(ours) == list(theirs)
        for key in ours:
            np.testing.assert_array_equal(ours[key], theirs[key])
    assert [one.rest is None for one in (first, second)] == [False, True]  # no graph is kept on
    assert len(list(tmp_path.iterdir())) == 3


# --- causes, consequences, and what failing cases share ------------------------------------------


def finding(case: str, key: str, about: str = STEPS[0], step: int = 1, words: str = "") -> Finding:
    """What a test found."""
    return Finding(about, case, step, key, "", words, "", "", {})


def test_what_lies_downstream_is_a_consequence() -> None:
    found = causes(
        [
            finding("a", "forward/layer0.attn_logits"),
            finding("b", "forward/layer2.attn_logits"),
            finding("b", "gradient/dwte", "float32"),
            finding("c", "forward/layer0.mlp_res"),
            finding("d", "forward/layer0.v"),
            finding("e", "forward/emb"),
        ]
    )
    assert [cause.first.case for cause in found] == ["a", "d", "e"]
    assert also(found[0]) == "also fails: 2 cases, in float32"


def test_another_diagnosis_is_another_cause() -> None:
    first = finding("a", "backward/dlayer0.q", words="transposed")
    assert len(causes([first, finding("b", "gradient/dwpe")])) == 1
    assert len(causes([first, finding("b", "gradient/dwpe", words="doubled")])) == 2


def test_all_parameters_of_an_update_have_one_cause() -> None:
    first = finding("a", "adam_m/wte", words="doubled, in column 3")
    both = replace(first, fields={"phases": ("adam_m", "adam_v")})
    assert [len(causes([one, finding("b", "adam_v/wte")])) for one in (first, both)] == [2, 1]
    for words, number in (("doubled, in row 0", 1), ("wrong in row 0", 1), ("", 1), ("halved", 2)):
        assert len(causes([first, finding("b", "adam_m/lm_head", words=words)])) == number


def test_gradients_with_one_reading_have_one_cause() -> None:
    first = finding("a", "gradient/dlm_head", words="has not been cleared")
    for words, number in (("has not been cleared, in row 2", 1), ("doubled", 2)):
        assert len(causes([first, finding("b", "gradient/dlayer0.attn_wo", words=words)])) == number


def test_one_line_with_one_reading_is_one_cause() -> None:
    words = "the residual's contribution, dlayer{}.attn_res is added before the derivative"
    lines = "scalar/model.py:107 a", "vectorized/model.py:191 c"
    first, second = (
        replace(finding(case, key, words=words.format(i)), side=side, fields={"lines": where})
        for i, (case, key, side, where) in enumerate(
            [
                ("a", "backward/demb_norm", "vectorized", lines),
                ("b", "backward/dlayer0.mlp_res", "vectorized", ("scalar/model.py:90 b", lines[1])),
            ]
        )
    )
    assert len(causes([first, second])) == 1
    assert len(causes([first, replace(second, diagnosis="doubled")])) == 2
    assert len(causes([first, replace(second, side="scalar")])) == 2
    assert len(causes([first, replace(second, fields={"lines": ("vectorized/x.py:1 c",)})])) == 2


def test_a_tensor_found_wrong_again_is_no_other_cause() -> None:
    first = finding("gelu", "gradient/dlm_head", words="x")
    tied = replace(finding("tied", "gradient/dwte", words="x"), side="vectorized")
    again = finding("tied", "unwatched/dwte", "the witness", step=2)
    assert len(causes([first, tied, again])) == 1
    assert len(causes([first, tied, replace(again, case="other")])) == 2
    assert len(causes([first, tied, replace(again, side="scalar")])) == 2
    for about, number in (("float32", 1), ("micro-batches", 2)):
        other = finding("tied", "gradient/dwte", about, words="transposed")
        assert len(causes([first, tied, other])) == number


@pytest.mark.parametrize(("agreed", "number"), [("dlayer0.attn_wo", 1), ("dlm_head", 2)])
def test_a_tied_gradient_has_that_of_the_head_as_a_part(agreed: str, number: int) -> None:
    own = replace(finding("b", "gradient/dwte"), fields={"agreed": (f"gradient/{agreed}",)})
    assert len(causes([finding("a", "gradient/dlm_head", words="x"), own])) == number


def test_old_numbers_of_the_recorded_update_are_one_cause(tmp_path: Path) -> None:
    old = "        return Number(lambda: self.numbers[i])"
    new = "        number = self.numbers[i]\n        return Number(lambda: number)"
    frozen = Patch("vectorized/replay.py", old, new)
    cases = "--case", "single-character", "--case", "short-gradient"
    done = run(tmp_path, [frozen], *cases, "-k", "free_running", "--json", str(tmp_path / "j"))
    (cause,) = json.loads((tmp_path / "j").read_text(encoding="utf-8"))["causes"]
    readings = [one["diagnosis"] for one in (cause, *cause["also_fails"])]
    assert readings == ["corrections and learning rate are those of the first step",
                        "the clip factor is that of the step before"], done.stdout  # fmt: skip


def test_numbers_of_two_sides_are_two_causes_even_if_both_are_old() -> None:
    ours, theirs = (
        replace(finding(side, key, words="that of the step before"), side=side)
        for side, key in (("scalar", "update/wte"), ("vectorized", "adam_m/wte"))
    )
    assert len(causes([ours, theirs])) == 2


def test_what_is_wrong_of_batches_or_of_the_recorder_has_one_cause() -> None:
    batches, more, recorder, other = (
        replace(finding(case, key, words=case), fields={"again": words, "function": function})
        for case, key, words, function in [
            ("a", "unwatched/dlm_head", "micro-batch by micro-batch it is right", "replay.py"),
            ("b", "unwatched/dlayer1.mlp_fc2", "in a new backend it is right", "batch.py"),
            ("c", "unwatched/dlayer1.mlp_fc2", "a document by itself is wrong", RECORDER),
            ("d", "unwatched/dwte", "wrong in packed rows, and only if recorded", RECORDER),
        ]
    )
    stop = replace(finding("e", ""), stopped="vectorized/lower.py:259 IndexError: index 9")
    assert [cause.all for cause in causes([batches, more, recorder])] == [
        [batches, more],
        [recorder],
    ]
    assert len(causes([recorder, other, stop])) == 1
    assert len(causes([stop, recorder, batches])) == 1


TEN = ["one-document", "ragged-batch", "tied-two-layers", "three-layers", "four-layers",
       "two-layers", "one-head", "single-character", "one-position", "repeated-token"]  # fmt: skip


def told(failing: Sequence[str], names: Sequence[str] = TEN, listed: Sequence[str] = TEN) -> str:
    """What is said of the cases that fail, of those that were run."""
    runs = [Run(STEPS[0], name, name not in failing, name in failing) for name in names]
    (cause,) = causes(finding(name, "forward/emb") for name in failing)
    return shared(cause, runs, load_case, listed)


def test_the_property_that_failing_cases_share_is_told() -> None:
    assert told(TEN[3:5]) == "fails in 2 of 10 cases: those with n_layer >= 3"
    assert told(TEN[4:5]) == "fails in 1 of 10 cases: those with n_layer >= 4"


def test_a_property_that_proves_nothing_is_not_told() -> None:
    deep = TEN[3:5]
    assert told(deep, TEN[:9], TEN[:9]) == "fails in 2 of 9 cases: four-layers, three-layers"
    assert told(deep, TEN, [*TEN, "other"]).startswith("fails in 2 of 10 cases that were run: fo")
    # of these, it is the only case with tie_lm_head and the only one with squared_relu
    tied = [*TEN[:3], *TEN[4:], "unused-row"]
    assert told(TEN[2:3], tied, tied) == "fails in 1 of 10 cases: tied-two-layers"
    assert told(TEN[:1], TEN[:1], TEN[:1]) == ""
    # of these, it is the only case with weight_decay and the only one with warmup_steps
    scheduled = [*TEN, "short-gradient", "decay-and-clip"]
    assert told(scheduled[-1:], scheduled, scheduled).endswith("of 12 cases: decay-and-clip")
    scheduled.insert(0, "clip-not-reached")
    assert told(scheduled[-1:], scheduled, scheduled).endswith("13 cases: those with weight_decay")


def test_two_properties_that_fit_do_not_read_like_one_of_both() -> None:
    names = ["microgpt-243", *TEN[:3], *TEN[4:]]
    assert told([names[0], names[3]], names, names) == (
        "fails in 2 of 10 cases: those with activation squared_relu"
        " (here the same cases as those with tie_lm_head)"
    )


def test_the_one_comparison_with_a_second_step_is_not_said_to_fail_alone() -> None:
    ways = [Run("micro-batches", name, 1, 2) for name in TEN[:4]]
    found = [finding(run.case, "gradient/dwte", run.about, 2) for run in ways]
    first = [Run(STEPS[0], name, 1, 0) for name in TEN]
    said = shared(causes(found)[0], [*ways, *first], load_case, TEN)
    assert said == "fails in all 4 cases that were run: from step 2 on"
    later = [*ways, *first, Run(STEPS[2], TEN[0], 3, 0)]
    assert shared(causes(found)[0], later, load_case, TEN).endswith(
        f"on; only in micro-batches{OR_LARGER}"
    )


def test_a_case_in_which_only_the_recorder_stops_is_not_counted_with_wrong_numbers() -> None:
    uneven = ["ragged-batch", "four-layers"]
    wrong = [finding(name, "forward/loss") for name in uneven]
    refused = [
        replace(
            finding(name, "", words="a sum over this axis"),
            stopped="vectorized/model.py:318 RecordingError: a sum over this axis",
            fields={"agreed": ("forward/loss_t", "forward/loss")},
        )
        for name in TEN
        if name not in uneven
    ]
    runs = [Run(STEPS[0], name, 0, 1) for name in TEN]
    (cause,) = causes([*wrong, *refused])
    assert consequences(cause, runs, load_case, TEN) == (
        "fails in 2 of 10 cases: where documents are of unequal length",
        "in 8 other cases all numbers agree until the recorder stops, at vectorized/model.py:318",
        "",
    )


def test_what_failing_cases_are_counted_is_said_once() -> None:
    (cause,) = causes(finding(name, "forward/emb", about) for name in TEN for about in
                      (STEPS[0], "float32"))  # fmt: skip
    runs = [Run(about, name, 0, 1) for name in TEN for about in (STEPS[0], "float32")]
    said = "fails in all 10 cases", "", "also fails: in float32"
    assert consequences(cause, runs, load_case, TEN) == said


def test_every_comparison_has_words() -> None:
    for path in sorted((ROOT / "crosscheck").glob("test_*.py")):
        for one in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(one, ast.FunctionDef) and one.name.startswith("test_"):
                assert "mark.about(" in ast.unparse(one), f"{path.name}: {one.name}"


def test_numbers_that_only_the_absolute_error_allows_are_explained() -> None:
    said = " ".join(summary(Tally(excused={"backward": 2538}), 1).split())
    assert "as rounding leaves sums whose terms cancel, and within the allowed" in said
    assert said.endswith("2,538 backward pass")
    assert summary(Tally(), 1).endswith("farther apart than 1e-09 of their size: none")


def test_a_property_of_steps_is_told_where_cases_share_none() -> None:
    runs = [Run(STEPS[1], name, 1, 2) for name in TEN]
    found = [finding(run.case, "update/wte", STEPS[1], 2) for run in runs]
    assert "all 10 cases: from step 2 on" in shared(causes(found)[0], runs, load_case, TEN)


@pytest.mark.parametrize(
    ("about", "title"),
    [(STEPS[0], "case a, step 1:"), ("micro-batches", "case a, in micro-batches, step 1:")],
)
def test_a_title_says_how_the_case_was_run(about: str, title: str) -> None:
    found = Disagreement("a", 1, "", "no step was compared")
    assert render(found, *NAMES, RUN_AS.get(about, "")).startswith(title)


def test_what_fails_in_float32_alone_says_so() -> None:
    runs = [Run("float32", "one-document", 0, 1), Run(STEPS[0], "one-document", 1, 0)]
    (cause,) = causes([finding("one-document", "forward/emb", "float32")])
    assert "only in float32" in shared(cause, runs, load_case, TEN)


# --- whole runs ----------------------------------------------------------------------------------


def run(
    folder: Path, patches: Sequence[Patch], *arguments: str
) -> subprocess.CompletedProcess[str]:
    """`pytest crosscheck` on a copy of the project with patches."""
    for name in (*NAMES, "microgpt", "crosscheck", "fixtures"):
        ignored = shutil.ignore_patterns("__pycache__", "golden")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", folder)
    for patch in patches:
        source = folder / patch.file
        text = source.read_text(encoding="utf-8")
        assert text.count(patch.old) == 1
        source.write_text(text.replace(patch.old, patch.new), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "crosscheck", *arguments]
    usual = {name: x for name, x in os.environ.items() if name != "CI"}  # where pytest says more
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False, env=usual
    )


CASES = ("--case", "single-character", "--case", "one-head", "--case", "tied-two-layers")


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_run_with_a_bug_prints_one_report(processes: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    arguments = ["--processes", processes, "--json", str(path), "--junitxml", "junit.xml"]
    done = run(tmp_path, [NO_ROW_SUM], *CASES, *arguments)
    assert done.returncode == 1
    assert done.stdout.startswith(f"crosscheck of scalar/ and vectorized/ in {tmp_path}")
    assert len(done.stdout.splitlines()) <= SCREENS, done.stdout
    own = [line for line in done.stdout.splitlines()[7:] if "junit.xml" not in line]
    assert max(map(len, own)) <= WIDTH
    assert done.stdout.count("dlayer0.attn_logits[b=0") == 1
    assert "one cause, reported above: case single-character, step 1" in done.stdout
    assert "fails in all 3 cases\n" in done.stdout
    assert "also fails: in float32, in micro-batches, on two ranks" in done.stdout
    assert " 21 failed" in done.stdout
    (cause,) = json.loads(path.read_text(encoding="utf-8"))["causes"]
    assert cause["key"] == "backward/dlayer0.attn_logits"
    assert len(cause["also_fails"]) == 20
    assert 'failures="21"' in (tmp_path / "junit.xml").read_text(encoding="utf-8")


def test_a_process_that_ends_leaves_one_line_and_a_whole_summary(tmp_path: Path) -> None:
    text = "    rng = np.random.default_rng(1)\n    explained = set()\n"
    ends = f'{text}    if name == "ragged-batch":\n        __import__("os")._exit(9)\n'
    killed = Patch("crosscheck/test_explain.py", text, ends)
    done = run(tmp_path, [killed], "--processes", "2", "-k", "test_explain or first_step and one")
    assert done.returncode == 1
    assert done.stdout.count("has ended, with exit code 9") == 2
    assert re.search(r"2 failed, \d+ passed", done.stdout)


def test_what_agreed_is_not_told_of_in_a_run_that_fails(tmp_path: Path) -> None:
    chosen = "first_step and one-head or by_differences and unused"
    done = run(tmp_path, [NO_ROW_SUM], "-k", chosen)
    assert "1 failed, 1 passed" in done.stdout
    assert "steps away" not in done.stdout


def test_a_formula_that_a_tensor_does_not_follow_has_its_numbers_and_lines(tmp_path: Path) -> None:
    line = "res = tap.layers[-1].mlp_res"
    other = Patch(MODEL, line, line.replace("-1", "0"))
    done = run(tmp_path, [other], "-k", "every_expression and tied and vectorized")
    assert "dwte is not what its own inputs give, in vectorized" in done.stdout
    for row in ("recomputed  ", "vectorized  ", "computed at", "should be"):
        assert f"\n  {row}" in done.stdout, done.stdout


def test_all_reports_are_printed_on_demand(tmp_path: Path) -> None:
    done = run(tmp_path, [NO_ROW_SUM], "-v", *CASES, "-k", "first_step")
    assert done.stdout.count("at fault") == 4  # the first, and all three


def test_a_text_that_python_cannot_read_is_refused_in_a_few_lines(tmp_path: Path) -> None:
    done = run(tmp_path, [replace(NO_ROW_SUM, new="return y * (dy - total(dy * y)")])
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    said = done.stdout + done.stderr
    assert "vectorized/ cannot be imported: SyntaxError: '(' was never closed" in said
    assert "vectorized/model.py:" in said
    assert len(said.splitlines()) <= 5


def test_the_quick_run_leaves_out_what_takes_long() -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "crosscheck", "-m",
               "quick", "--collect-only", "-q"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "test_first_step" in done.stdout
    assert "thousand" not in done.stdout
    assert "random_models" not in done.stdout
    assert "free_running" not in done.stdout


def test_a_mistake_that_both_sides_share_is_found_by_the_witness(tmp_path: Path) -> None:
    halved = [
        Patch("scalar/value.py", "(float(self.data > 0),)", "(0.5 * float(self.data > 0),)"),
        Patch("vectorized/model.py", "return dy * (x > 0.0)", "return 0.5 * dy * (x > 0.0)"),
    ]
    done = run(tmp_path, halved, "-k", "every_parameter and repeated")
    assert done.returncode == 1
    said = re.sub(r"\s+", " ", done.stdout)
    assert "is not the derivative of the loss, in scalar and vectorized" in said
    assert "the two sides agree with each other, and not with the witness" in said
    assert len(done.stdout.splitlines()) <= SCREENS


# --- Value by itself -----------------------------------------------------------------------------

VALUE_FILE = "scalar/value.py"


@pytest.mark.parametrize(
    ("patch", "words"),
    [
        (
            Patch(VALUE_FILE, "exponent * self.data ** (exponent - 1)",
                  "exponent * self.data**exponent - 1"),
            ["Value.__pow__: d(a ** 2)/da at a = 0.7 is given as -0.02, should be 1.4",
             "looks like n a^n - 1"],
        ),
        (
            Patch(VALUE_FILE, "(other.data, self.data))", "(self.data, other.data))"),
            ["Value.__mul__: d(a * b)/da", "d/db: two local derivatives are exchanged"],
        ),
        (
            Patch(VALUE_FILE, "child.grad +=", "child.grad ="),
            ["Value.backward: a value that is used twice gets only its last contribution"],
        ),
        (
            Patch(VALUE_FILE, "in reversed(order)", "in order"),
            ["passes its gradient on before all its uses have added to it", "_topological_order"],
        ),
        (
            Patch(VALUE_FILE, "        self.grad = 1.0\n", ""),
            ["Value.backward never sets self.grad = 1", "look at backward, scalar/value.py:"],
        ),
        (
            Patch(VALUE_FILE, "return Value(exp, (self,), (exp,))", "Value(exp, (self,), (exp,))"),
            ["Value.exp: exp(a) gives None, which is no Value"],
        ),
    ],
    ids=["power", "product", "assignment", "order", "end", "no return"],
)  # fmt: skip
def test_a_mistake_in_value_is_told_before_any_case(
    patch: Patch, words: list[str], tmp_path: Path
) -> None:
    done = run(tmp_path, [patch], "-x", "-m", "quick")
    assert done.returncode == 1
    said = re.sub(r"\s+", " ", done.stdout)
    for one in [*words, "before any case:", "one cause, reported above", "1 failed"]:
        assert one in said, done.stdout
    assert max(map(len, done.stdout.splitlines()[7:])) <= WIDTH


def test_all_that_fails_follows_from_a_mistake_in_value(tmp_path: Path) -> None:
    patch = Patch(VALUE_FILE, "(other.data, self.data))", "(self.data, other.data))")
    done = run(tmp_path, [patch], *CASES, "-k", "value or first_step or teacher")
    assert "one cause, reported above: before any case: Value.__mul__" in done.stdout
    assert "also fails: " in done.stdout
    assert len(done.stdout.splitlines()) <= SCREENS, done.stdout


def test_a_fault_of_the_other_side_does_not_follow_from_one_in_value() -> None:
    ours, same, other = (
        Finding(about, "", 0, "", "", "", "", "", {"at_fault": side})
        for about, side in [(VALUE, "reference"), ("a", "reference"), ("b", "candidate")]
    )
    assert [cause.first for cause in causes([ours, same, other])] == [ours, other]


def test_a_softmax_that_overflows_in_single_precision_is_reported() -> None:
    case = load_case("large-attention-logits")
    steps = list(trace(case, "scalar", "float64", 1))
    with planted([Patch(MODEL, "exps = exp(x - largest)", "exps = exp(x)")]):
        theirs = list(teacher_forced(case, "vectorized", "float32", steps))
    outcome = compare(case, steps, theirs, float32(case), names=NAMES)
    assert "attn_weights" in render(outcome.found[0], *NAMES)
