"""Trace files compared: any subset of what is computed counts, and nothing else does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from crosscheck.__main__ import main
from crosscheck.cases import load_case
from crosscheck.trace import Step, trace
from crosscheck.traces import save_trace
from microgpt.runs.checkpoint import read_tensors

Write = Callable[[list[Step]], Path]
CASE = "repeated-token"


@pytest.fixture(scope="module")
def steps() -> list[Step]:
    return list(trace(load_case(CASE), "scalar", "float64", 3))


@pytest.fixture
def reference(steps: list[Step], tmp_path: Path) -> Path:
    save_trace(tmp_path / "reference.safetensors", load_case(CASE), "scalar", "float64", steps)
    return tmp_path / "reference.safetensors"


@pytest.fixture
def port(tmp_path: Path) -> Write:
    """Write what a port has computed."""

    def write(steps: list[Step]) -> Path:
        path = tmp_path / "port.safetensors"
        save_trace(path, load_case(CASE), "port", "float64", steps)
        return path

    return write


def _only(step: Step, *starts: str) -> Step:
    return {key: tensor for key, tensor in step.items() if key.startswith(starts)}


def _diff(*arguments: object) -> int:
    return main(["diff", *map(str, arguments)])


def test_gradients_of_one_step_of_three_are_compared(
    reference: Path, port: Write, steps: list[Step], capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(3):
        some = [_only(step, "gradient/") if i == number else {} for i, step in enumerate(steps)]
        assert _diff(reference, port(some)) == 0
        assert "over 1 step: 9 tensors" in capsys.readouterr().out
        some[number]["gradient/dwpe"] = 2 * some[number]["gradient/dwpe"]
        assert _diff(reference, port(some)) == 1
        assert f"step {number + 1}, parameter gradients:\ndwpe" in capsys.readouterr().out


def test_a_prefix_of_the_steps_is_compared(
    reference: Path, port: Write, steps: list[Step], capsys: pytest.CaptureFixture[str]
) -> None:
    assert _diff(reference, port(steps[:2])) == 0
    words = capsys.readouterr().out
    assert "port: 2 steps; reference has 3" in words
    assert "over 2 steps" in words


@pytest.mark.parametrize("starts", [("batch/",), ("entry",), ("batch/", "entry/", "entry_m/")])
def test_a_file_of_what_both_were_given_has_compared_nothing(
    starts: tuple[str, ...],
    reference: Path,
    port: Write,
    steps: list[Step],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert _diff(reference, port([_only(step, *starts) for step in steps])) == 2
    error = capsys.readouterr().err
    assert "holds no computed tensor" in error
    assert error.count("\n") == 1


def test_patterns_may_stand_anywhere_and_be_given_twice(
    reference: Path, port: Write, steps: list[Step], capsys: pytest.CaptureFixture[str]
) -> None:
    whole = port(steps)
    assert _diff("--only", "gradient/*", reference, whole) == 0
    assert "3 steps: 27 tensors" in capsys.readouterr().out
    assert _diff(reference, "--only", "gradient/*,forward/loss", whole) == 0
    assert "3 steps: 30 tensors" in capsys.readouterr().out
    assert _diff(reference, whole, "--only", "gradient/*", "--only", "forward/loss") == 0
    assert "3 steps: 30 tensors" in capsys.readouterr().out


def test_tensors_of_its_own_are_left_alone_and_counted(
    reference: Path, port: Write, steps: list[Step], capsys: pytest.CaptureFixture[str]
) -> None:
    path = port(steps)
    tensors, metadata = read_tensors(path)
    save_file({**tensors, "step1/my/own": np.zeros(3), "notes": np.ones(2)}, path, metadata)
    assert _diff(reference, path) == 0
    assert "port: 2 tensors not compared, unknown names such as" in capsys.readouterr().out


def test_missing_metadata_are_named(
    reference: Path, port: Write, steps: list[Step], capsys: pytest.CaptureFixture[str]
) -> None:
    path = port(steps)
    tensors, metadata = read_tensors(path)
    save_file(tensors, path, {k: v for k, v in metadata.items() if k not in ("chars", "dtype")})
    assert _diff(reference, path) == 2
    assert "its metadata lack dtype, chars; see" in capsys.readouterr().err
    short = metadata["config"].replace('"n_embd"', '"no_embd"')
    save_file(tensors, path, {**metadata, "config": short})
    assert _diff(reference, path) == 2
    error = capsys.readouterr().err
    assert "config, in its metadata, lacks n_embd; take over" in error
    assert "version" not in error


def test_another_model_is_refused_with_what_differs(
    reference: Path, port: Write, steps: list[Step], capsys: pytest.CaptureFixture[str]
) -> None:
    path = port(steps)
    tensors, metadata = read_tensors(path)
    save_file(tensors, path, {**metadata, "chars": "xyz"})
    assert _diff(reference, path) == 2
    assert "chars are 'xyz', not 'anv'" in capsys.readouterr().err


def test_a_port_is_held_to_the_noise_of_the_reference(
    reference: Path, port: Write, steps: list[Step], capsys: pytest.CaptureFixture[str]
) -> None:
    slightly = [{"gradient/dwpe": step["gradient/dwpe"] * (1 + 1e-11)} for step in steps]
    assert _diff(reference, port(slightly)) == 1
    assert "times its noise" in capsys.readouterr().out
