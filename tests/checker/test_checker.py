"""The checker is checked: planted bugs are caught, and a weakened checker is found out."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crosscheck import compare as comparing
from crosscheck.__main__ import main
from crosscheck.cases import Case, case_names, draw_params, load_case, read_case, save_case
from crosscheck.compare import compare
from crosscheck.defects import (
    PANEL,
    Defect,
    Patch,
    Verdict,
    judge,
    load_defects,
    planted,
    row,
    total,
)
from crosscheck.report import WIDTH, as_json, render, ulps
from crosscheck.tolerance import FLOAT64, Standard, Tolerance
from crosscheck.trace import Step, trace
from microgpt.errors import MicrogptError
from vectorized.batch import micro_batches

DEFECTS = {defect.name: defect for defect in load_defects()}


@pytest.fixture(scope="module")
def verdicts() -> list[Verdict]:
    """What the crosscheck makes of every named defect."""
    return [judge(defect) for defect in DEFECTS.values()]


@pytest.fixture
def case() -> Case:
    """A small case."""
    return load_case("tied-two-layers")


@pytest.fixture
def reference_steps(case: Case) -> list[Step]:
    """Its reference."""
    return list(trace(case, "vectorized", "float64", 2))


def test_there_are_at_least_sixty_defects_in_both_implementations() -> None:
    assert len(DEFECTS) >= 60
    assert {defect.package for defect in DEFECTS.values()} == {"scalar", "vectorized"}
    assert all(defect.story for defect in DEFECTS.values())


def test_every_defect_is_caught(verdicts: list[Verdict]) -> None:
    assert [verdict.defect.name for verdict in verdicts if verdict.first is None] == []


def test_the_first_divergence_is_the_planted_operation(verdicts: list[Verdict]) -> None:
    assert [verdict.defect.name for verdict in verdicts if not verdict.located] == []


def test_the_promised_diagnoses_are_given(verdicts: list[Verdict]) -> None:
    assert [one.defect.name for one in verdicts if not one.understood] == []


def test_reports_fit_eighty_columns_and_json(verdicts: list[Verdict]) -> None:
    for verdict in verdicts:
        assert verdict.first
        words = render(verdict.first, "scalar", "vectorized")
        assert max(map(len, words.splitlines())) <= WIDTH, words
        assert words.isascii()
        again = json.loads(json.dumps(as_json(verdict.first), allow_nan=False))
        assert again["key"] == verdict.first.key


def test_the_kill_matrix_names_every_defect(verdicts: list[Verdict]) -> None:
    assert all(row(verdict).startswith(f"{verdict.defect.name} ") for verdict in verdicts)
    assert f"{len(DEFECTS)} of {len(DEFECTS)} caught, {len(DEFECTS)} located" in total(verdicts)


def test_without_a_defect_nothing_is_caught() -> None:
    with planted([]):
        case = load_case(PANEL[0])
        assert not compare(
            case, trace(case, "scalar", "float64", 1), trace(case, "vectorized", "float64", 1)
        ).found


def test_a_defect_that_no_longer_fits_the_text_is_an_error() -> None:
    patch = Patch("vectorized/model.py", "return dy * (x > 1.0)", "return dy")
    message = r"vectorized/model.py: .*'return dy \* \(x > 1.0\)', which is there 0 times"
    with pytest.raises(MicrogptError, match=message), planted([patch]):
        pass


def test_a_patch_that_does_not_run_is_no_defect_that_was_located() -> None:
    patch = Patch("vectorized/model.py", "return dy * (x > 0.0)", "return dy * (x > zero)")
    verdict = judge(
        Defect("misspelt", "A typing error.", (patch,), "backward/"), ["repeated-token"]
    )
    assert not verdict.located
    assert verdict.first
    assert verdict.first.problem == "stops with NameError"
    assert verdict.diagnosis == "name 'zero' is not defined"


def test_the_recorder_has_defects_of_its_own() -> None:
    recorder = {f"vectorized/{name}.py" for name in ("record", "lower", "replay")}
    assert sum(one.patches[0].file in recorder for one in DEFECTS.values()) >= 15


def test_the_case_of_micro_batches_is_cut_into_them() -> None:
    case = load_case("micro-batches")
    cut = [micro_batches(case.docs(step), case.config) for step in range(len(case.batches))]
    shapes = [[part.shape for part in parts] for parts in cut]
    assert shapes == [
        [(1, 64), (2, 32), (5, 16)],
        [(1, 64), (2, 16)],
        [(1, 10)],
        [(1, 10)],
    ]
    for shorter, longer in ((1, 0), (3, 2)):  # what was behind the shorter one shows
        assert len(cut[shorter][0].docs[0]) < len(cut[longer][0].docs[0])


def test_planting_leaves_no_trace() -> None:
    import vectorized.backend

    before = vectorized.backend.Backend
    judge(DEFECTS["rmsnorm-backward-one-term"], ["repeated-token"])
    assert sys.modules["vectorized.backend"].Backend is before  # type: ignore[attr-defined]


# --- a weakened checker --------------------------------------------------------------------------


def _loose() -> Standard:
    tolerances = dict.fromkeys(FLOAT64.tolerances, Tolerance(rtol=1e-2, atol=1e-2))
    return Standard("float64", tolerances)


def _weakened(weakness: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = comparing._compare_tensor

    def skipping(case: Case, step: int, key: str, *rest: Any) -> Any:
        return None if key.endswith("attn_logits") else whole(case, step, key, *rest)

    def with_itself(case: Case, step: int, key: str, ours: Step, theirs: Step, *rest: Any) -> Any:
        return whole(case, step, key, ours, ours, *rest)

    def loosely(
        case: Case, step: int, key: str, ours: Step, theirs: Step, _: Standard, tally: Any, *_2: Any
    ) -> Any:
        return whole(case, step, key, ours, theirs, _loose(), tally, None)

    weak = {"tolerance": loosely, "skipped tap": skipping, "itself": with_itself}[weakness]
    monkeypatch.setattr(comparing, "_compare_tensor", weak)


@pytest.mark.parametrize(
    ("weakness", "witness"),
    [
        ("tolerance", "log-of-p-plus-eps"),
        ("skipped tap", "softmax-backward-without-row-sum"),
        ("itself", "mask-missing"),
    ],
)
def test_a_weakened_checker_fails_on_a_defect(
    weakness: str, witness: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = judge(DEFECTS[witness])
    assert sound.located
    assert sound.understood
    _weakened(weakness, monkeypatch)
    weak = judge(DEFECTS[witness])
    assert not (weak.located and weak.understood)


# --- it cannot pass empty ------------------------------------------------------------------------


def _doctored(reference_steps: list[Step], key: str, tensor: Any) -> Iterator[Step]:
    for step in reference_steps:
        yield {**step, key: tensor}


def _problem(case: Case, reference: Any, candidate: Any) -> str:
    found = compare(case, reference, candidate).found
    return f"{found[0].key} {found[0].problem}" if found else ""


def test_no_step_at_all_fails(case: Case) -> None:
    assert "no step was compared" in _problem(case, [], [])


def test_a_tensor_missing_on_either_side_fails(case: Case, reference_steps: list[Step]) -> None:
    lacking = [
        {k: v for k, v in step.items() if k != "forward/layer0.q"} for step in reference_steps
    ]
    assert (
        _problem(case, reference_steps, lacking)
        == "forward/layer0.q was never written by the candidate"
    )
    assert (
        _problem(case, lacking, reference_steps)
        == "forward/layer0.q was never written by the reference"
    )


def test_the_shape_is_checked_before_the_values(case: Case, reference_steps: list[Step]) -> None:
    key = "gradient/dlayer0.mlp_fc1"
    turned = list(_doctored(reference_steps, key, reference_steps[0][key].T))
    found = compare(case, reference_steps, turned).found[0]
    assert found.problem == "has shape (8, 32) in the candidate, and should have (32, 8)"
    assert found.diagnosis == "transposed"


def test_a_reference_of_zeros_fails_unless_declared(
    case: Case, reference_steps: list[Step]
) -> None:
    key = "backward/dlayer0.q"
    empty = list(_doctored(reference_steps, key, np.zeros_like(reference_steps[0][key])))
    assert "is zero everywhere" in _problem(case, empty, empty)
    declared = dataclasses.replace(case, zero={"dlayer0.q": "for this test"})
    assert _problem(declared, empty, empty) == ""
    assert "is not zero" in _problem(declared, reference_steps, reference_steps)


def test_an_update_that_moves_nothing_fails(case: Case, reference_steps: list[Step]) -> None:
    key = "update/layer1.mlp_fc2"
    still = list(_doctored(reference_steps, key, np.zeros_like(reference_steps[0][key])))
    assert f"{key} is zero everywhere" in _problem(case, still, still)


def test_a_relu_input_on_the_kink_fails_unless_declared(
    case: Case, reference_steps: list[Step]
) -> None:
    key = "forward/layer0.mlp_pre"
    pre = reference_steps[0][key].copy()
    pre[0, 0, 0] = 1e-15
    kinked = list(_doctored(reference_steps, key, pre))
    assert "the kink of the ReLU" in _problem(case, kinked, kinked)
    assert _problem(dataclasses.replace(case, kink="for this test"), kinked, kinked) == ""


def test_declared_unused_rows_must_be_exactly_zero() -> None:
    case = load_case("unused-row")
    reference_steps = list(trace(case, "vectorized", "float64", 1))
    grad = reference_steps[0]["gradient/dwte"].copy()
    grad[case.tokenizer.encode("q")] = 1e-300
    touched = list(_doctored(reference_steps, "gradient/dwte", grad))
    assert "is not exactly zero in the rows" in _problem(case, reference_steps, touched)


def test_float32_is_not_taken_for_float64(case: Case, reference_steps: list[Step]) -> None:
    key = "forward/layer0.v"
    rounded = list(_doctored(reference_steps, key, reference_steps[0][key].astype("float32")))
    assert _problem(case, reference_steps, rounded) == f"{key} is float32, and float64 was promised"


def test_not_a_number_never_agrees(case: Case, reference_steps: list[Step]) -> None:
    key = "forward/loss"
    undefined = list(_doctored(reference_steps, key, np.array(np.nan)))
    assert _problem(case, reference_steps, undefined) == f"{key} disagrees"
    assert _problem(case, undefined, undefined) == f"{key} disagrees"


def test_a_difference_of_an_allowed_error_and_a_half_fails(
    case: Case, reference_steps: list[Step]
) -> None:
    key = "forward/layer1.mlp_norm"
    for share, agrees in ((0.5, True), (1.5, False)):
        moved = reference_steps[0][key].copy()
        moved[0, 0, 0] += share * (1e-12 + 1e-9 * abs(moved[0, 0, 0]))
        near = [{**reference_steps[0], key: moved}]
        assert (_problem(case, reference_steps[:1], near) == "") is agrees


def test_padding_is_not_compared(reference_steps: list[Step]) -> None:
    case = load_case("ragged-batch")
    step = next(trace(case, "vectorized", "float64", 1))
    logits = step["forward/logits"].copy()
    shortest = case.docs(0)[1]
    logits[1, len(shortest) - 1 :] = 7.0
    assert _problem(case, [step], [{**step, "forward/logits": logits}]) == ""
    logits[1, len(shortest) - 2] += 1e-6
    assert _problem(case, [step], [{**step, "forward/logits": logits}]) != ""


# --- cases, traces and the command line ----------------------------------------------------------


@pytest.mark.parametrize("name", case_names())
def test_a_stored_case_has_the_parameters_of_its_seed(name: str) -> None:
    case = load_case(name)
    drawn = draw_params(case)
    for tensor in case.params:
        np.testing.assert_allclose(case.params[tensor], drawn[tensor], rtol=1e-14)


def test_a_saved_case_is_the_same_case(case: Case, tmp_path: Path) -> None:
    save_case(case, tmp_path / "again.yaml")
    again = load_case(str(tmp_path / "again.yaml"))
    assert again.config == case.config
    assert (again.chars, again.batches) == (case.chars, case.batches)
    for name in case.params:
        np.testing.assert_array_equal(again.params[name], case.params[name])


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("chars: abc\nbatches: [[ab]]\n", "why is missing"),
        ("why: x\nchars: abc\nbatches: [[ab]]\nchar: d\n", "unknown key 'char'"),
        ("why: x\nchars: [a]\nbatches: [[ab]]\n", "chars: expected a str"),
        ("why: x\nchars: abc\nbatches: [[ab]]\nconfig: {n_head: 3}\n", "does not divide"),
    ],
)
def test_a_malformed_case_is_refused(text: str, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "case.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(MicrogptError, match=complaint):
        read_case(path)


def test_traces_can_be_written_read_and_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    for path, backend in ((a, "scalar"), (b, "vectorized")):
        name = ["--case", "repeated-token", "--backend", backend, "--out", str(path)]
        assert main(["trace", *name, "--steps", "2"]) == 0
    capsys.readouterr()
    assert main(["diff", str(a), str(b)]) == 0
    assert "2 steps" in capsys.readouterr().out
    assert main(["diff", str(a), str(b), "--only", "gradient/*"]) == 0
    assert main(["diff", str(a), str(b), "--only", "nothing/*"]) == 2
    assert "no computed tensor like nothing/*" in capsys.readouterr().err


def test_a_trace_that_differs_is_reported(
    case: Case, reference_steps: list[Step], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from crosscheck.traces import save_trace

    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    key = "gradient/dlayer0.attn_wq"
    partly = [
        {k: v for k, v in step.items() if k.startswith("gradient")} for step in reference_steps
    ]
    partly[1][key] = 2 * partly[1][key]
    save_trace(a, case, "vectorized", "float64", reference_steps)
    save_trace(b, case, "mine", "float64", partly)
    assert main(["diff", str(a), str(b)]) == 1
    words = capsys.readouterr().out
    assert "step 2" in words
    assert "dlayer0.attn_wq" in words
    assert "doubled" in words
    assert main(["diff", str(a), str(b), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["disagreement"]["key"] == key
    for broken in (a.read_bytes()[:-5], b"nonsense"):
        b.write_bytes(broken)
        assert main(["diff", str(a), str(b)]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_ulps_count_the_numbers_between() -> None:
    assert ulps(1.0, 1.0) == "0"
    assert ulps(1.0, float(np.nextafter(1.0, 2.0))) == "1"
    assert ulps(-5e-324, 5e-324) == "2"
    assert ulps(1.0, -1.0) == ulps(1.0, 1.0 + 1e-9) == ""


# --- pytest crosscheck, on a tree with a bug in it -----------------------------------------------


@pytest.fixture
def buggy(tmp_path: Path) -> Path:
    """A copy of the project with a defect planted for good."""
    root = Path(comparing.__file__).parent.parent
    for name in ("scalar", "vectorized", "microgpt", "crosscheck", "fixtures"):
        ignored = shutil.ignore_patterns("__pycache__", "names.txt", "golden")
        shutil.copytree(root / name, tmp_path / name, ignore=ignored)
    source = tmp_path / "vectorized" / "model.py"
    patch = DEFECTS["rmsnorm-backward-one-term"].patches[0]
    source.write_text(source.read_text(encoding="utf-8").replace(patch.old, patch.new), "utf-8")
    return tmp_path


def _pytest(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_pytest_crosscheck_reports_the_bug_and_saves_the_smallest_model(buggy: Path) -> None:
    smallest, report = buggy / "smallest.yaml", buggy / "report.json"
    done = _pytest(buggy, "crosscheck/test_random.py", "--save-case", str(smallest))
    assert done.returncode == 1
    assert "saved as" in done.stdout
    test = "crosscheck/test_cases.py::test_teacher_forced"
    done = _pytest(buggy, test, "--case", "one-head", "--json", str(report))
    assert done.returncode == 1
    assert "case one-head, step 1, backward pass:\ndlayer0.attn_res disagrees" in done.stdout
    assert "the second term of the norm's derivative is missing" in done.stdout
    found = json.loads(report.read_text(encoding="utf-8"))["causes"]
    assert found[0]["key"] == "backward/dlayer0.attn_res"
    saved = load_case(str(smallest))
    assert saved.config.n_layer == 1
    assert saved.config.n_embd <= 2
    again = _pytest(buggy, "crosscheck/test_cases.py::test_teacher_forced", "--case", str(smallest))
    assert again.returncode == 1
    assert "disagrees" in again.stdout


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--backend", "scalar"], "against itself proves nothing"),
        (["--backend", "torch"], "unknown backend 'torch'"),
        (["--backend", "scalar", "--reference", "vectorized", "--dtype", "float32"], "float64"),
        (["--case", "nowhere"], "there is no case and no file 'nowhere'"),
        (["--steps", "0"], "expected 1 or more"),
        (["--processes", "0"], "expected 1 or more"),
        (["--save-case", "x.txt"], "expected a name in .yaml"),
    ],
)
def test_wrong_options_are_refused(arguments: list[str], complaint: str, buggy: Path) -> None:
    done = _pytest(buggy, "crosscheck/test_cases.py::test_teacher_forced", *arguments)
    assert done.returncode != 0
    assert complaint in done.stdout + done.stderr
