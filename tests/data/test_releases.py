"""docs/releases.md, line by line: files that an earlier release wrote, in this one.

formats/0.1.0/ was written by 0.1.0: a run of 6 of 12 steps, what it logged when it went on to the
end with scalar (went-on.jsonl), and a case with a trace of it.
"""

from __future__ import annotations

import json
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import microgpt
from crosscheck.__main__ import main as crosscheck
from crosscheck.cases import load_case
from microgpt.backend import BACKENDS
from microgpt.cli.commands import main
from microgpt.runs.checkpoint import load_checkpoint, read_tensors, write_tensors
from microgpt.settings import load_config

OLD = Path(__file__).parent / "formats" / "0.1.0"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A copy of the run of 0.1.0."""
    return Path(shutil.copytree(OLD / "run", tmp_path / "run"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_run_goes_on_as_the_earlier_release_would_have(run: Path, backend: str) -> None:
    more = ["--steps", "12", "--backend", backend, "--quiet"]
    assert main(["train", "--resume", "--out", str(run), *more]) == 0
    ours = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    theirs = (OLD / "went-on.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(theirs) == 6
    for our, their in zip(map(json.loads, ours[6:]), map(json.loads, theirs)):
        assert (our["step"], our["lr"]) == (their["step"], their["lr"])
        exact = backend == "scalar" and sys.platform == "linux"  # another exp, other digits
        assert our["loss"] == pytest.approx(their["loss"], rel=0.0 if exact else 1e-12, abs=0)


def test_a_checkpoint_is_sampled_and_evaluated(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for backend in BACKENDS:
        assert main(["sample", str(run), "--backend", backend]) == 0
        assert capsys.readouterr().out == "kmcx<BOS>x\nhuaknm\n"
    assert main(["eval", str(run)]) == 0
    assert "loss 3.3588" in capsys.readouterr().out


def test_a_configuration_and_a_case_mean_what_they_meant(run: Path) -> None:
    for config in (
        load_config(str(run / "config.yaml")),
        load_checkpoint(run).config,
        load_case(str(OLD / "case.yaml")).config,
    ):
        assert config.activation == "squared_relu"
        assert (config.documents, config.eval_every, config.top_k) == ("lines", 0, 0)


def test_a_trace_is_compared_and_is_no_reference_for_what_it_lacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, theirs = tmp_path / "ours.safetensors", OLD / "trace.safetensors"
    case = ["--case", str(OLD / "case.yaml"), "--backend", "vectorized", "--steps", "1"]
    assert crosscheck(["trace", *case, "--out", str(ours)]) == 0
    assert crosscheck(["diff", str(ours), str(theirs)]) == 0
    assert "120 tensors" in capsys.readouterr().out
    assert crosscheck(["diff", str(theirs), str(ours)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "step 1 lacks sample/likeliest" in line


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("version", "3", "a checkpoint of version '3', and this program reads version '2'"),
        ("config", None, "unknown key 'later'"),
    ],
)
def test_a_checkpoint_of_a_later_release_is_refused_in_one_line(
    run: Path, key: str, value: str | None, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run / "checkpoint.safetensors"
    tensors, metadata = read_tensors(path)
    metadata[key] = value or json.dumps({**json.loads(metadata["config"]), "later": 1})
    write_tensors(path, tensors, metadata)
    assert main(["sample", str(run)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_the_version_stands_in_one_place_and_in_the_changelog() -> None:
    root = Path(__file__).resolve().parents[2]
    assert microgpt.__version__ == version("microgpt-crosscheck")
    changes = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"\n## {microgpt.__version__}\n" in changes
    assert microgpt.__version__ not in (root / "pyproject.toml").read_text(encoding="utf-8")
