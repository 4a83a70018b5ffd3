"""The command line, end to end: what is printed, what is written, what is refused."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from http.client import BadStatusLine
from importlib import import_module
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import Mock
from urllib.error import URLError

import numpy as np
import pytest
import yaml
from faults import microgpt

from microgpt import data, download, evaluate, train
from microgpt.backend import BACKENDS, fresh_state, load_backend
from microgpt.cli import report, shell
from microgpt.config import FIELDS
from microgpt.init import init_params
from microgpt.runs.checkpoint import FILE_NAME, Checkpoint, load_checkpoint, read_tensors
from microgpt.runs.directory import RUN_FILES
from microgpt.settings import flag, load_config
from microgpt.tokenizer import build_tokenizer

Edit = Callable[[Any, Any], object]  # of tensors and metadata
Rewrite = Callable[[Path, Path, Edit], None]


def process(*arguments: object, **more: Any) -> subprocess.CompletedProcess[str]:
    """A command line, run to its end in a process of its own."""
    command = [sys.executable, "-m", "microgpt", *map(str, arguments)]
    return subprocess.run(
        command, **{"stdout": subprocess.PIPE, **more}, stderr=subprocess.PIPE, encoding="utf-8"
    )


def metrics(out: Path) -> list[dict[str, Any]]:
    text = (out / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def losses(out: Path) -> list[float]:
    """The loss of each step; every step is there once."""
    entries = metrics(out)
    assert [entry["step"] for entry in entries] == list(range(1, len(entries) + 1))
    return [entry["loss"] for entry in entries]


def samples(out: Path) -> list[str]:
    *lines, last = (out / "samples.txt").read_text(encoding="utf-8").split("\n")
    assert last == ""
    return lines


def contents(folder: Path) -> dict[Path, bytes | None]:
    """The bytes of every file in a folder, by path."""
    return {
        path.relative_to(folder): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def untimed(printed: str) -> str:
    """The lines that a run prints, without its times."""
    return re.sub(r"in \d+\.\d\d s, \d+\.\d{3} ms a step", "in .. s, .. ms a step", printed)


def assert_same_checkpoint(out: Path, expected: Path) -> None:
    """Bit for bit: parameters, moments, random stream, and all the rest."""
    tensors, metadata = read_tensors(out / FILE_NAME)
    expected_tensors, expected_metadata = read_tensors(expected / FILE_NAME)
    assert metadata == expected_metadata
    assert set(tensors) == set(expected_tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor, expected_tensors[name])


@pytest.fixture(scope="module")
def flags(tiny: dict[str, str]) -> list[str]:
    """The small configuration."""
    return [word for name, text in tiny.items() for word in (flag(name), text)]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The run by default: its directory, and what it printed."""
    out = tmp_path_factory.mktemp("original") / "run"
    with redirect_stdout(io.StringIO()) as printed:
        assert microgpt("train", "--out", out) == 0
    return out, printed.getvalue()


@pytest.fixture
def without_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both texts, without a formula for the activation that they are asked for."""
    for text, function in (("scalar", "activation"), ("vectorized", "activation_forward")):
        known = getattr(import_module(f"{text}.model"), function)
        monkeypatch.setattr(f"{text}.model.{function}", lambda x, _, known=known: known(x, "silu"))


@pytest.fixture(scope="module")
def small(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the small configuration, finished."""
    out = tmp_path_factory.mktemp("small") / "run"
    with redirect_stdout(io.StringIO()):
        assert microgpt("train", *flags, "--out", out) == 0
    return out


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


# train


def test_the_run_by_default_is_the_original_figure_for_figure(
    original: tuple[Path, str], golden: dict[str, Any]
) -> None:
    out, _ = original
    np.testing.assert_allclose(losses(out), golden["loss"], rtol=0, atol=1e-12)
    assert len(golden["loss"]) == 1000
    assert samples(out) == golden["samples"]
    for entry in metrics(out):
        assert list(entry) == ["step", "loss", "lr", "seconds"]
        assert entry["lr"] == 0.01 * (1 - (entry["step"] - 1) / 1000)


def test_a_run_directory_holds_four_files_and_the_whole_configuration(
    original: tuple[Path, str],
) -> None:
    out, _ = original
    assert {path.name for path in out.iterdir()} == set(RUN_FILES)
    written = yaml.safe_load((out / "config.yaml").read_text(encoding="utf-8"))
    assert written == dataclasses.asdict(load_config())
    assert load_config(str(out / "config.yaml")) == load_config()


def test_a_pipe_gets_plain_lines(original: tuple[Path, str], golden: dict[str, Any]) -> None:
    out, printed = original
    steps = [1, *range(50, 1001, 50)]
    last = math.fsum(golden["loss"][-100:]) / 100
    assert untimed(printed).split("\n") == [
        "documents 32,469 | vocabulary 27 | parameters 4,192 | steps 1,000 x 1",
        *(f"step {step:4} / 1000 | loss {golden['loss'][step - 1]:.4f}" for step in steps),
        f"loss {last:.4f}, mean of the last 100 steps; knowing nothing would be ln 27 = 3.2958",
        f"The next token is as uncertain as a fair choice among {math.exp(last):.1f}"
        " instead of all 27.",
        "1,000 steps in .. s, .. ms a step",
        *(f"sample {i:2}: {sample}" for i, sample in enumerate(golden["samples"], 1)),
        f"everything is in {out}; to look at it: microgpt report {out}",
        "",
    ]


def test_a_terminal_gets_a_bar(
    flags: list[str], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdout", terminal)
    assert microgpt("train", *flags) == 0
    printed = terminal.getvalue()
    assert re.search(r"\| 12/12 \[[^\r\n]*\nloss ", printed)
    assert "\nstep" not in printed
    assert "sample  6: " in printed


def test_the_first_revision_is_a_preset(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert microgpt("train", "--config", "microgpt-243", "--steps", "5") == 0
    first, *_ = capsys.readouterr().out.splitlines()
    assert first == "documents 32,469 | vocabulary 28 | parameters 3,648 | steps 5 x 1"
    assert len(samples(here / "runs" / "microgpt-243")) == 5


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--batch-size", "4"],
        ["--config", "microgpt-243", "--batch-size", "2"],
        ["--init-std-residual", "0", "--seed", "7"],
    ],
)
def test_the_backend_changes_nothing_else(
    more: list[str],
    flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    printed = {}
    for backend in BACKENDS:
        (tmp_path / backend).mkdir()
        monkeypatch.chdir(tmp_path / backend)
        assert microgpt("train", *flags, *more, "--backend", backend, "--out", "run") == 0
        printed[backend] = untimed(capsys.readouterr().out)
    scalar, vectorized = (tmp_path / backend / "run" for backend in BACKENDS)
    assert printed["scalar"] == printed["vectorized"]
    assert contents(scalar).keys() == contents(vectorized).keys()
    for name in ("config.yaml", "samples.txt"):
        assert (scalar / name).read_bytes() == (vectorized / name).read_bytes()
    np.testing.assert_allclose(losses(scalar), losses(vectorized), rtol=0, atol=1e-12)
    rates = [[entry["lr"] for entry in metrics(out)] for out in (scalar, vectorized)]
    assert rates[0] == rates[1]


def test_a_run_is_repeated_from_its_own_config_file(small: Path, here: Path) -> None:
    assert microgpt("train", "--config", small / "config.yaml", "--out", "again") == 0
    assert losses(here / "again") == losses(small)
    assert_same_checkpoint(here / "again", small)


def test_runs_are_numbered_by_the_name_of_their_configuration(flags: list[str], here: Path) -> None:
    (here / "mine.yaml").write_text("seed: 7\n", encoding="utf-8")
    assert [microgpt("train", *flags) for _ in range(3)] == [0, 0, 0]
    assert [microgpt("train", *flags, "--config", "mine.yaml") for _ in range(2)] == [0, 0]
    names = ["microgpt", "microgpt-2", "microgpt-3", "mine", "mine-2"]
    assert sorted(path.name for path in (here / "runs").iterdir()) == names
    for name in names:
        assert {path.name for path in (here / "runs" / name).iterdir()} == set(RUN_FILES)


@pytest.mark.parametrize("only", RUN_FILES)
def test_a_directory_with_any_file_of_a_run_is_not_written_to_unasked(
    only: str, flags: list[str], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "run").mkdir()
    (here / "run" / only).write_text("precious", encoding="utf-8")
    before = contents(here)
    assert microgpt("train", *flags, "--out", "run") == 2
    assert "--out run: holds a run already" in capsys.readouterr().err
    assert contents(here) == before


def test_overwrite_replaces_the_run_and_nothing_else(
    flags: list[str], small: Path, here: Path
) -> None:
    shutil.copytree(small, here / "run")
    (here / "run" / "notes.txt").write_text("precious", encoding="utf-8")
    assert microgpt("train", *flags, "--seed", "7", "--out", "run", "--overwrite") == 0
    assert (here / "run" / "notes.txt").read_text(encoding="utf-8") == "precious"
    assert len(losses(here / "run")) == 12
    assert losses(here / "run")[0] != losses(small)[0]


def test_overwrite_with_bad_input_leaves_the_run_as_it_was(
    flags: list[str], small: Path, here: Path
) -> None:
    shutil.copytree(small, here / "run")
    before = contents(here)
    for bad in (["--dataset", "missing.txt"], ["--backend", "torch"], ["--n-head", "3"]):
        assert microgpt("train", *flags, *bad, "--out", "run", "--overwrite") == 2
        assert contents(here) == before


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_run_that_diverges_says_so_in_one_line_and_keeps_the_checkpoint_before(
    backend: str, flags: list[str], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = ["train", *flags, "--backend", backend, "--out", "run"]
    assert microgpt(*train, "--learning-rate", "1e300") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(r"microgpt train: error: step \d: .*--learning-rate than 1e\+300", line)
    assert load_checkpoint(here / "run").state.updates == 0
    assert not (here / "run" / "samples.txt").exists()
    resume = ["train", "--resume", "--out", "run", "--backend", backend]
    assert microgpt(*resume, "--learning-rate", "0.05") == 0
    assert len(losses(here / "run")) == 12


def test_accents_are_learned_and_written_also_where_they_cannot_be_printed(
    tmp_path: Path,
) -> None:
    (tmp_path / "accents.txt").write_text("\u0142\u00e9\U0001f600\n", encoding="utf-8")
    sizes = ["--n-embd", "4", "--steps", "3", "--num-samples", "9", "--temperature", "9"]
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    ran = process(
        *("train", "--dataset", "accents.txt", *sizes, "--out", "run"), cwd=tmp_path, env=ascii_only
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    drawn = samples(tmp_path / "run")
    assert "\u0142" in "".join(drawn)
    numbers = [text.encode("ascii", "backslashreplace").decode() for text in drawn]
    utf8 = {"LC_ALL": "C"} if os.name == "posix" else {"PYTHONUTF8": "1"}
    for env, lines in ((ascii_only, numbers), ({**os.environ, **utf8}, drawn)):
        ran = process("sample", "run", cwd=tmp_path, env=env)
        assert (ran.returncode, ran.stdout.splitlines(), ran.stderr) == (0, lines, "")


# Ctrl-C, and --resume

CLOSED = getattr(signal, "SIGHUP", None) or vars(signal)["SIGBREAK"]  # of a closed terminal


def signals_after(patch: pytest.MonkeyPatch, step: int, number: int, times: int = 1) -> None:
    """Send this process a signal when training reports a step."""
    update = report.Progress.update

    def update_and_signal(progress: report.Progress, done: int, *rest: Any) -> None:
        update(progress, done, *rest)
        for _ in range(times if done == step else 0):
            signal.raise_signal(number)

    patch.setattr(report.Progress, "update", update_and_signal)


def train_until(step: int, *arguments: object) -> None:
    """Train, with Ctrl-C after a step."""
    with pytest.MonkeyPatch.context() as patch:
        signals_after(patch, step, signal.SIGINT)
        assert microgpt("train", *arguments) == 130


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, CLOSED])
def test_a_signal_ends_a_run_with_its_checkpoint_written(
    number: int,
    flags: list[str],
    small: Path,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def left_to_others(*_: object) -> None:
        raise AssertionError("the signal was not handled")

    before = signal.signal(number, left_to_others)
    try:
        signals_after(monkeypatch, 5, number)
        assert microgpt("train", *flags, "--out", "run") == 128 + number
        assert signal.getsignal(number) is left_to_others
    finally:
        signal.signal(number, before)
    printed = capsys.readouterr()
    assert printed.err == ""
    assert printed.out.splitlines()[-2:] == [
        "stopped after step 5 of 12; everything is in run",
        "go on with: microgpt train --resume --out run",
    ]
    assert losses(here / "run") == losses(small)[:5]
    assert load_checkpoint(here / "run").state.updates == 5
    assert not (here / "run" / "samples.txt").exists()


def test_a_second_signal_ends_it_at_once(
    flags: list[str],
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    signals_after(monkeypatch, 5, signal.SIGINT, times=2)
    assert microgpt("train", *flags, "--out", "run") == 130
    assert capsys.readouterr().err == "microgpt train: interrupted\n"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch_size", ["1", "4"])
@pytest.mark.parametrize("stops", [[1], [4, 11]])
def test_an_interrupted_run_goes_on_as_if_nothing_had_been(
    backend: str, batch_size: str, stops: list[int], flags: list[str], here: Path
) -> None:
    train = [*flags, "--batch-size", batch_size, "--backend", backend]
    assert microgpt("train", *train, "--out", "whole") == 0
    train_until(stops[0], *train, "--out", "run")
    resume = ["--resume", "--out", "run", "--backend", backend]
    for stop in stops[1:]:
        train_until(stop, *resume)
    assert microgpt("train", *resume) == 0
    whole, run = here / "whole", here / "run"
    assert losses(run) == losses(whole)
    assert [entry["lr"] for entry in metrics(run)] == [entry["lr"] for entry in metrics(whole)]
    assert_same_checkpoint(run, whole)
    assert samples(run) == samples(whole)
    assert (run / "config.yaml").read_bytes() == (whole / "config.yaml").read_bytes()


@pytest.mark.parametrize(("begins", "ends"), [BACKENDS, BACKENDS[::-1]])
def test_a_run_goes_on_with_the_other_backend(
    begins: str, ends: str, flags: list[str], small: Path, here: Path
) -> None:
    train_until(5, *flags, "--backend", begins, "--out", "run")
    assert microgpt("train", "--resume", "--out", "run", "--backend", ends) == 0
    np.testing.assert_allclose(losses(here / "run"), losses(small), rtol=0, atol=1e-12)
    assert samples(here / "run") == samples(small)


def test_steps_that_no_checkpoint_has_seen_are_done_again(
    flags: list[str], small: Path, here: Path
) -> None:
    train_until(5, *flags, "--out", "run")
    with open(here / "run" / "metrics.jsonl", "a", encoding="utf-8") as log:
        log.write('{"step": 6, "loss": 9.0, "lr": 9.0, "seconds": 9.0}\n{"step": 7, "lo')
    assert microgpt("train", "--resume", "--out", "run") == 0
    assert losses(here / "run") == losses(small)


def test_a_finished_run_goes_on_when_asked_for_more_steps(small: Path, here: Path) -> None:
    shutil.copytree(small, here / "run")
    assert microgpt("train", "--resume", "--out", "run", "--steps", "20") == 0
    assert losses(here / "run")[:12] == losses(small)
    assert [entry["lr"] for entry in metrics(here / "run")[12:]] == [
        0.05 * (1 - step / 20) for step in range(12, 20)
    ]
    assert load_config(str(here / "run" / "config.yaml")).steps == 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--out run --n-embd 8", "n_embd is part of what was trained and cannot change"),
        ("--out run --seed 1", "seed is part of what was trained and cannot change"),
        ("--out run --batch-size 2", "batch_size is part of what was trained and cannot change"),
        ("--out run --dataset names", "names: is not the text that the run in run was trained on"),
        ("--out run --eval-every 2", "--eval-every: nothing is held out of training"),
        ("--out run --steps 4", "has had all of its 5 steps"),
        ("--out run --steps 0", "--steps: expected 1 or more, got 0"),
        ("--out run --config microgpt", "--config: does not go with --resume"),
        ("--out run --overwrite", "--overwrite: does not go with --resume"),
        ("--out run --backend torch", "unknown backend 'torch'"),
        ("--out none", "there is no such file"),
        ("", "--resume: which run? Name its directory with --out DIR"),
    ],
)
def test_a_run_is_not_resumed_as_another(
    arguments: str,
    message: str,
    flags: list[str],
    here: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train_until(5, *flags, "--out", "run")
    capsys.readouterr()
    before = contents(here)
    assert microgpt("train", "--resume", *arguments.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert contents(here) == before


def test_a_finished_run_is_not_resumed(
    small: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(small)
    assert microgpt("train", "--resume", "--out", small) == 2
    assert "has had all of its 12 steps; to train on" in capsys.readouterr().err
    assert contents(small) == before


def test_a_run_is_not_resumed_on_a_changed_data_set(
    flags: list[str], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "words.txt").write_text("abba\nba\ncab\n", encoding="utf-8")
    train_until(5, *flags, "--dataset", "words.txt", "--out", "run")
    capsys.readouterr()
    (here / "words.txt").write_text("abba\nba\ncabb\n", encoding="utf-8")
    before = contents(here)
    assert microgpt("train", "--resume", "--out", "run") == 2
    assert "words.txt: has changed since the run in run began" in capsys.readouterr().err
    assert contents(here) == before


# sample


def sampled(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[str]:
    capsys.readouterr()
    assert microgpt("sample", *arguments) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    return printed.out.split("\n")[:-1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_sample_without_a_seed_repeats_the_samples_of_the_run(
    backend: str, small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sampled(capsys, small, "--backend", backend) == samples(small)
    assert sampled(capsys, small / FILE_NAME, "--backend", backend) == samples(small)
    assert sampled(capsys, small, "--backend", backend, "--num", "2") == samples(small)[:2]
    assert sampled(capsys, small, "--backend", backend, "--num", "0") == []


def test_sample_repeats_the_samples_of_the_original(
    original: tuple[Path, str], golden: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert sampled(capsys, original[0]) == golden["samples"]
    assert sampled(capsys, original[0], "--temperature", "0.5") == golden["samples"]


def test_a_seed_chooses_the_samples_for_both_backends(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, again, other = (
        sampled(capsys, small, "--seed", seed, "--num", "20", "--backend", backend)
        for seed, backend in ((1, "scalar"), (1, "vectorized"), (2, "vectorized"))
    )
    assert one == again != other


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_sample_begins_with_the_prompt(
    backend: str, small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = {}
    for prompt in ("z", "zo\u00e9", "mmmm"):  # the last leaves room for one character
        drawn[prompt] = sampled(
            capsys, small, "--prompt", prompt, "--num", "40", "--backend", backend
        )
        assert len(drawn[prompt]) == 40
        assert all(sample.startswith(prompt) for sample in drawn[prompt])
    assert len(set(drawn["z"])) > 20
    assert {len(sample) for sample in drawn["mmmm"]} == {4, 5}


def test_a_prompt_is_continued_alike_by_both_backends(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scalar, vectorized = (
        sampled(capsys, small, "--prompt", "an", "--num", "20", "--backend", backend)
        for backend in BACKENDS
    )
    assert scalar == vectorized


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_low_temperature_takes_the_likeliest_and_a_high_one_anything(
    backend: str, small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    at = ["--num", "30", "--backend", backend, "--temperature"]
    assert len(set(sampled(capsys, small, *at, "1e-6"))) == 1
    assert len(set(sampled(capsys, small, *at, "1e6"))) > 20


def test_temperature_0_takes_the_likeliest_and_says_it_once(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (likeliest,) = sampled(capsys, small, "--temperature", "1e-6", "--num", "1")
    for backend in BACKENDS:
        at = ["--temperature", "0", "--backend", backend]
        assert sampled(capsys, small, *at) == [likeliest]
        assert sampled(capsys, small, *at, "--num", "3", "--seed", "9") == [likeliest] * 3
        assert sampled(capsys, small, "--top-k", "1", "--backend", backend)[0] == likeliest


def test_top_k_draws_from_the_likeliest_alone_and_alike_by_both_backends(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held = load_checkpoint(small)
    at = ["--num", "60", "--temperature", "2", "--seed", "3", "--top-k"]
    drawn = {
        (top_k, backend): sampled(capsys, small, *at, top_k, "--backend", backend)
        for top_k in (1, 2, 5, 0, 99)
        for backend in BACKENDS
    }
    logits = np.asarray(
        load_backend("scalar", held.config, held.state).read([held.tokenizer.bos])[0]
    )
    for top_k in (1, 2, 5):
        likeliest = set(np.argsort(-logits)[:top_k].tolist())
        firsts = {(held.tokenizer.document(text))[1] for text in drawn[top_k, "scalar"]}
        assert firsts <= likeliest
        assert drawn[top_k, "scalar"] == drawn[top_k, "vectorized"]
    assert drawn[0, "scalar"] == drawn[0, "vectorized"] == drawn[99, "scalar"]
    assert len({*drawn[1, "scalar"]}) == 1 < len({*drawn[2, "scalar"]})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", ["1e-305", "1e-320"])
def test_a_temperature_near_zero_takes_the_likeliest_or_is_refused(
    temperature: str, backend: str, small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (likeliest,) = sampled(capsys, small, "--temperature", "1e-6", "--num", "1")
    status = microgpt(
        *("sample", small, "--backend", backend, "--temperature", temperature, "--num", "1")
    )
    printed = capsys.readouterr()
    if status == 0:
        assert printed.out == f"{likeliest}\n"
    else:
        assert status == 2
        assert len(printed.err.splitlines()) == 1


# eval


def plain_losses(held: Checkpoint, text: str) -> np.ndarray:
    """-log p(next token) by position, from a third writing of the 200-line model in NumPy."""
    config, p = held.config, held.state.params
    tokens = held.tokenizer.document(text)
    n = min(config.block_size, len(tokens) - 1)
    heads = (n, config.n_head, config.n_embd // config.n_head)

    def norm(x: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + config.norm_eps)

    def softmax(x: np.ndarray) -> np.ndarray:
        e = np.exp(x - x.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    x = norm(p["wte"][tokens[:n]] + p["wpe"][:n])
    for i in range(config.n_layer):
        q, k, v = (
            (norm(x) @ p[f"layer{i}.attn_w{name}"].T).reshape(heads).swapaxes(0, 1)
            for name in "qkv"
        )
        scores = q @ k.swapaxes(1, 2) / math.sqrt(heads[2])
        scores[:, ~np.tri(n, dtype=bool)] = -np.inf
        out = (softmax(scores) @ v).swapaxes(0, 1).reshape(n, -1)
        x = x + out @ p[f"layer{i}.attn_wo"].T
        mlp = np.maximum(norm(x) @ p[f"layer{i}.mlp_fc1"].T, 0)
        x = x + mlp @ p[f"layer{i}.mlp_fc2"].T
    probs = softmax(x @ p["lm_head"].T)
    return -np.log(probs[np.arange(n), tokens[1 : n + 1]])


SEEN = ["a", "emma", "ana", "evangeline", "m", "vivian", "noam", "emma"]


def test_above_ln_v_a_loss_is_worse_than_knowing_nothing() -> None:
    assert "among 2.7 instead" in report.meaning(1.0, 27)
    assert "among 26.9 instead of all 27" in report.meaning(3.293, 27)
    for loss in (3.4, 2000.0):
        assert "worse than knowing nothing" in report.meaning(loss, 27)


def expected_evaluation(held: Checkpoint) -> tuple[float, list[tuple[int, float]]]:
    """The mean loss over SEEN, and per position how many documents reach it and their mean."""
    rows = [plain_losses(held, text) for text in SEEN]
    reach = [[row[t] for row in rows if len(row) > t] for t in range(held.config.block_size)]
    return float(np.mean([row.mean() for row in rows])), [
        (len(here), float(np.mean(here))) for here in reach
    ]


@pytest.mark.quick
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("times", [1, 20])  # in one batch, and in several, some of one length
def test_the_evaluation_is_the_mean_over_documents_of_means_over_positions(
    backend: str, times: int, small: Path
) -> None:
    held = load_checkpoint(small)
    loss, by_position = expected_evaluation(held)
    result = evaluate.evaluation(
        load_backend(backend, held.config, held.state), SEEN * times, held.tokenizer, held.config
    )
    assert abs(result.loss - loss) < 1e-12
    counts, means = zip(*result.by_position)
    expected_counts, expected_means = zip(*by_position)
    assert counts == tuple(times * count for count in expected_counts)
    assert expected_counts == (8, 8, 6, 6, 5)
    np.testing.assert_allclose(means, expected_means, rtol=0, atol=1e-12)


def test_long_documents_are_evaluated_one_by_one() -> None:
    config = load_config(overrides={"n_embd": "4", "block_size": "1000"})
    tokenizer = build_tokenizer("ab", config)
    state = fresh_state(init_params(config, tokenizer.vocab_size, Random(1)))
    backend = load_backend("vectorized", config, state)
    texts = ["ab" * 500, "b" * 999, "a"]
    alone = [evaluate.evaluation(backend, [text], tokenizer, config).loss for text in texts]
    found = evaluate.evaluation(backend, texts, tokenizer, config)
    assert found.loss == pytest.approx(sum(alone) / 3, rel=1e-12)
    assert [count for count, _ in found.by_position] == [3] * 2 + [2] * 998


@pytest.mark.parametrize("preset", ["microgpt", "microgpt-243"])
@pytest.mark.parametrize("longest", [2, 3, 5, 9])
def test_documents_of_one_length_have_the_same_tokens_as_by_themselves(
    preset: str, longest: int
) -> None:
    chars = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x11000)]))  # ids beyond 0xD800
    tokenizer = build_tokenizer(chars, load_config(preset))
    documents = ["abc", "\u4e2d\U00010fffA", chars[-3:]]
    found = evaluate.encoded(documents, tokenizer, longest)
    assert isinstance(found, np.ndarray)
    assert found.tolist() == [tokenizer.document(document, longest) for document in documents]


@pytest.mark.parametrize("backend", BACKENDS)
def test_eval_prints_the_loss_by_position_and_against_knowing_nothing(
    backend: str, small: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "seen.txt").write_text("\n".join(SEEN), encoding="utf-8")
    held = load_checkpoint(small)
    loss, by_position = expected_evaluation(held)
    V = held.tokenizer.vocab_size
    assert microgpt("eval", small, "--dataset", "seen.txt", "--backend", backend) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert printed.out.splitlines() == [
        "seen.txt, all: 8 documents",
        "position  documents     loss",
        *(
            f"{position:8}  {count:9}  {mean:7.4f}"
            for position, (count, mean) in enumerate(by_position, 1)
        ),
        f"loss {loss:.4f}, mean over 8 documents; knowing nothing would be ln {V} ="
        f" {math.log(V):.4f}",
        f"The next token is as uncertain as a fair choice among {math.exp(loss):.1f}"
        f" instead of all {V}.",
    ]


def test_eval_takes_the_data_set_of_the_run_and_changes_nothing(
    small: Path, words: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(small)
    assert microgpt("eval", small) == 0
    by_default = capsys.readouterr().out
    assert "mean over 9 documents" in by_default
    assert microgpt("eval", small / FILE_NAME, "--dataset", words) == 0
    assert capsys.readouterr().out == by_default
    assert contents(small) == before


def test_documents_cropped_by_tokens_have_a_position_less(
    words: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = ["--config", "microgpt-243", "--dataset", words, "--block-size", "5", "--steps", "1"]
    assert microgpt("train", *first, "--out", "run") == 0
    capsys.readouterr()
    assert microgpt("eval", "run") == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:-2]]
    assert [row[:2] for row in rows] == [["1", "9"], ["2", "9"], ["3", "8"], ["4", "8"]]


# Bad input: one line, status 2, nothing touched.


@pytest.fixture
def desk(small: Path, rewrite: Rewrite, here: Path) -> Path:
    """A working directory with a run, and with files and folders that are damaged or no run."""
    shutil.copytree(small, here / "run")
    checkpoint = here / "run" / FILE_NAME
    (here / "folder").mkdir()
    for name, content in {
        "words.txt": b"emma\nana\n",
        "unseen.txt": b"emma\nquinn\n",
        "empty.txt": b"\n \n",
        "latin.txt": b"emma\ncaf\xe9\n",
        "key.yaml": b"n_layers: 2\n",
        "type.yaml": b"adam_eps: 1e-8\n",
        "preset.yaml": b"preset: wombat\n",
        "broken.yaml": b"n_layer: [\nn_embd\n",
        "cut": checkpoint.read_bytes()[:-100],
    }.items():
        (here / name).write_bytes(content)
    rewrite(checkpoint, here / "version", lambda tensors, metadata: metadata.update(version="1"))
    rewrite(checkpoint, here / "shape", lambda tensors, _: tensors.update(wpe=tensors["wte"]))
    rewrite(checkpoint, here / "tensors", lambda tensors, metadata: metadata.clear())
    return here


LONG = "x" * 300
BAD_INPUT = [
    ("train --config wombat", "there is no preset and no file 'wombat'; the presets are"),
    ("train --config folder", "there is no preset and no file 'folder'"),
    ("train --config preset.yaml", "preset.yaml: unknown preset 'wombat'; the presets are"),
    ("train --config key.yaml", "key.yaml: unknown key 'n_layers'; did you mean 'n_layer'?"),
    ("train --config type.yaml", "type.yaml: adam_eps: expected a number, got '1e-8'"),
    ("train --config broken.yaml", "broken.yaml: not readable as YAML"),
    ("train --config words.txt", "words.txt: expected lines of the form 'key: value'"),
    (f"train --config {LONG}", ""),
    ("train --backend torch", "unknown backend 'torch'; expected scalar or vectorized"),
    ("train --backend scalar --dtype float32", "--dtype float32: scalar computes with"),
    ("train --dtype float16", "--dtype: expected float64 or float32, got 'float16'"),
    ("train --n-embd 10 --n-head 4", "n_head can be 1, 2, 5, 10"),
    ("train --n-layer 0", "--n-layer: expected 1 or more, got 0"),
    ("train --n-embd 0", "--n-embd: expected 1 or more, got 0"),
    ("train --n-head 0", "--n-head: expected 1 or more, got 0"),
    ("train --block-size -1", "--block-size: expected 1 or more, got -1"),
    ("train --steps 0", "--steps: expected 1 or more, got 0"),
    ("train --batch-size -3", "--batch-size: expected 1 or more, got -3"),
    ("train --steps 1.5", "--steps: expected a whole number, got '1.5'"),
    ("train --steps ''", "--steps: expected a whole number, got ''"),
    ("train --learning-rate fast", "--learning-rate: expected a number, got 'fast'"),
    ("train --learning-rate nan", "--learning-rate: expected a finite number, got nan"),
    ("train --learning-rate -0.1", "--learning-rate: expected more than 0, got -0.1"),
    ("train --beta1 1", "--beta1: expected less than 1, got 1.0"),
    ("train --tie-lm-head yes", "--tie-lm-head: expected true or false, got 'yes'"),
    ("train --temperature 1e-305", "--temperature: 1e-305 is too close to 0; try 0.001, or 0"),
    ("train --dataset missing.txt", "'missing.txt' names no data set and no file"),
    ("train --dataset folder", "'folder' is a folder, not a file"),
    ("train --dataset empty.txt", "empty.txt: no documents; expected one on each line"),
    ("train --dataset latin.txt", "latin.txt: line 2 is not UTF-8 text; save it as UTF-8"),
    ("train --dataset ''", "--dataset: ''"),
    (f"train --dataset {LONG}", ""),
    ("train --out words.txt", "--out words.txt: is a file; name a directory"),
    ("train --eval-every 10", "--eval-every: nothing is held out of training; add --held-out N"),
    ("train --cores 8", "--cores 8 needs --batch-size 8 or more; it is 1"),
    ("train --warmup-steps 50 --steps 2", "--warmup-steps 50 must be less than --steps 2"),
    ("train --seed -5", "--seed: expected 0 or more, got -5; a negative seed would draw the"),
    ("sample run --seed -5", "--seed: expected 0 or more, got -5; a negative seed would draw"),
    ("train --log-every 0", "--log-every: expected 1 or more, got 0"),
    ("train --log-every 5 --quiet", "--log-every: does not go with --quiet; leave one out"),
    ("train --documents words", "--documents: expected lines or windows, got 'words'"),
    ("train --dataset words.txt --documents windows", "words.txt: has 9 characters, fewer than a"),
    ("train --out words.txt/run", "words.txt/run"),
    ("train --out run", "--out run: holds a run already"),
    (f"train --out {LONG}", ""),
    ("train --resume", "--resume: which run? Name its directory with --out DIR"),
    ("train --resume --out folder", "there is no such file"),
    ("train --out", "argument --out: expected one argument"),
    ("train --wombat 3", "unrecognized arguments: --wombat"),
    ("train --n-lay 3", "unrecognized arguments: --n-lay"),
    ("sample", "the following arguments are required: CHECKPOINT"),
    ("sample missing", "missing: there is no run and no checkpoint of that name"),
    ("sample 'missing\nhere'", "there is no run and no checkpoint"),
    ("sample folder", "checkpoint.safetensors: there is no such file"),
    ("sample words.txt", "words.txt: not a checkpoint of microgpt; expected a checkpoint.saf"),
    ("sample cut", "cut: not a readable safetensors file: it is cut short, or damaged"),
    ("sample tensors", "tensors: not a checkpoint of microgpt"),
    ("sample version", "version: a checkpoint of version '1', and this program reads version '2'"),
    ("sample shape", "shape: the tensor 'wpe' is (13, 4), and its configuration asks for (5, 4)"),
    (f"sample {LONG}", ""),
    ("sample run --prompt emmq", "the character 'q' (U+0071) in 'emmq' is not in the vocabulary"),
    ("sample run --prompt \u00fc", "(U+00FC)"),
    ("sample run --prompt emman", "--prompt: 5 characters leave no room in a context of 5"),
    ("sample run --temperature -1", "--temperature: expected 0 or more, got -1.0"),
    ("sample run --top-k -1", "--top-k: expected 0 or more, got -1"),
    ("sample run --top-k some", "--top-k: expected a whole number, got 'some'"),
    ("sample run --temperature nan", "--temperature: expected a finite number, got nan"),
    ("sample run --temperature hot", "--temperature: expected a number, got 'hot'"),
    ("sample run --num -1", "--num: expected 0 or more, got -1"),
    ("sample run --num many", "--num: expected a whole number, got 'many'"),
    ("sample run --seed x", "--seed: expected a whole number, got 'x'"),
    ("sample run --backend torch", "unknown backend 'torch'; expected scalar or vectorized"),
    ("eval missing", "missing: there is no run and no checkpoint"),
    ("atlas --out nowhere/a.html", "--out: there is no folder nowhere; make it first"),
    ("report run --out nowhere/deep/a.html", "--out: there is no folder nowhere/deep; make"),
    ("eval cut", "cut: not a readable safetensors file"),
    ("eval version", "version: a checkpoint of version '1'"),
    ("eval shape", "shape: the tensor 'wpe' is (13, 4), and its configuration asks for (5, 4)"),
    ("eval run --dataset missing.txt", "'missing.txt' names no data set and no file"),
    ("eval run --dataset nmes", "'nmes' names no data set and no file; did you mean 'names'?"),
    ("eval run --dataset empty.txt", "empty.txt: no documents"),
    ("eval run --dataset latin.txt", "latin.txt: line 2 is not UTF-8 text"),
    ("eval run --dataset unseen.txt", "the character 'q' (U+0071) in 'quinn' is not in the"),
    ("eval run --part some", "--part: expected held-out, training or all, got 'some'"),
    ("eval run --part held-out", "--part held-out: this run held nothing out; use --part all"),
    ("eval run --part training --dataset words.txt", "--part training: is of the run's own data"),
    ("eval run --backend torch", "unknown backend 'torch'; expected scalar or vectorized"),
]


def test_a_command_that_is_mistyped_is_answered_with_the_likely_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert microgpt("trian") == 2
    assert microgpt("wombat") == 2
    near, far = capsys.readouterr().err.splitlines()
    assert "error: there is no command trian; did you mean train; see microgpt --help" in near
    assert "error: there is no command wombat; see microgpt --help" in far


@pytest.mark.parametrize(("line", "message"), BAD_INPUT)
def test_bad_input_gets_one_line_and_touches_nothing(
    line: str, message: str, desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = shlex.split(line)
    before = contents(desk)
    assert microgpt(*arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"microgpt {arguments[0]}: error: ")
    assert printed.err.endswith("\n")
    assert len(printed.err.splitlines()) == 1
    assert message in printed.err
    assert contents(desk) == before


@pytest.mark.parametrize(
    "trouble",
    [URLError(OSError(-3, "Temporary failure in name resolution")), BadStatusLine("220 ftp\r\n")],
)
def test_an_absent_network_gets_one_line_and_touches_nothing(
    trouble: Exception,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def urlopen(*arguments: object, **more: object) -> None:
        raise trouble

    monkeypatch.setattr(download, "urlopen", urlopen)
    monkeypatch.setenv("MICROGPT_CACHE", str(here / "cache"))
    assert microgpt("train", "--dataset", "makemore") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"microgpt train: error: {data.MAKEMORE_URL}: cannot be downloaded (")
    assert line.endswith("or use --dataset names")
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("command", ["train", "sample", "eval"])
@pytest.mark.usefixtures("without_formula")
def test_an_activation_without_a_formula_gets_one_line_that_says_where_to_write_it(
    command: str, backend: str, small: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--activation", "gelu"] if command == "train" else [small]
    assert microgpt(command, *model, "--backend", backend) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(
        rf"microgpt {command}: error: {backend}/model.py:\d+: no formula here for the activation"
        r" 'silu'; write one\n",
        said,
    )


@pytest.mark.parametrize("arguments", [[], ["wombat"]])
def test_without_a_command_the_commands_are_named_or_asked_for(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert microgpt(*arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("microgpt: error: ")
    assert ("COMMAND" if not arguments else "there is no command wombat") in line


def test_help_names_every_field(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert microgpt("train", "--help") == 0
    printed = capsys.readouterr().out
    for name, field in FIELDS.items():
        assert re.search(rf"{flag(name)} \S+\s+{re.escape(field.metadata['help'][:12])}", printed)


# As a process of its own


def test_a_process_ends_with_the_status_and_the_line(tmp_path: Path) -> None:
    ran = process("train", "--n-head", "3", cwd=tmp_path)
    assert ran.returncode == 2
    assert ran.stdout == ""
    (line,) = ran.stderr.splitlines()
    assert line.startswith("microgpt train: error: n_head 3 does not divide n_embd 16")
    assert list(tmp_path.iterdir()) == []


def test_a_process_trains_far_from_the_source(flags: list[str], tmp_path: Path) -> None:
    ran = process("train", *flags, cwd=tmp_path)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert f"everything is in {Path('runs', 'microgpt')}; " in ran.stdout.splitlines()[-1]
    assert {path.name for path in (tmp_path / "runs" / "microgpt").iterdir()} == set(RUN_FILES)


@pytest.mark.parametrize("unbuffered", ["", "1"])  # the write fails at the last flush, or at once
@pytest.mark.parametrize("command", ["eval", "sample"])
def test_a_reader_that_leaves_ends_it_quietly(command: str, unbuffered: str, small: Path) -> None:
    ran = process_unread(unbuffered, command, small)
    assert (ran.returncode, ran.stderr) == (141, "")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_leaves_the_help_ends_it_quietly(unbuffered: str) -> None:
    assert process_unread(unbuffered, "train", "--help").stderr == ""


def test_ctrl_c_at_the_very_end_ends_quietly(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:

        def done() -> int:
            patch.setattr(sys.stdout, "flush", Mock(side_effect=KeyboardInterrupt))
            return 0

        assert shell.guarded("microgpt", done) == 130
    assert capsys.readouterr().err == ""


def process_unread(unbuffered: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A process that writes to a pipe whose reader has gone, as head -1 does."""
    read, write = os.pipe()
    os.close(read)
    try:
        return process(*arguments, stdout=write, env={**os.environ, "PYTHONUNBUFFERED": unbuffered})
    finally:
        os.close(write)


def test_documents_kept_from_training_are_not_trained_on_and_are_measured(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["ab", "ba", "aab", "bba", "abba"]
    (here / "words.txt").write_text("\n".join(words), encoding="utf-8")
    Random(42).shuffle(words)
    (here / "kept.txt").write_text("\n".join(words[3:]), encoding="utf-8")
    trained_on: list[list[str]] = []
    batch = train.batch

    def watched(step: int, documents: list[str], *more: Any) -> list[list[int]]:
        trained_on.append(documents)
        return batch(step, documents, *more)

    monkeypatch.setattr(train, "batch", watched)
    flags = ["--dataset", "words.txt", "--n-embd", "4", "--n-head", "2", "--steps", "6"]
    assert microgpt("train", *flags, "--held-out", "2", "--out", "run") == 0
    said = capsys.readouterr().out
    assert trained_on == [words[:3]] * 6
    assert microgpt("eval", "run", "--dataset", "kept.txt") == 0
    (loss,) = re.findall(r"loss (\S+), mean over 2 documents", capsys.readouterr().out)
    assert f"loss {loss} on 2 documents kept from training" in said
    assert microgpt("train", *flags, "--held-out", "5", "--out", "none") == 2
    assert "none would be left" in capsys.readouterr().err
    assert not (here / "none").exists()


# --max-seconds


@pytest.mark.parametrize("every", ["0", "1"])
def test_time_is_up(here: Path, capsys: pytest.CaptureFixture[str], every: str) -> None:
    begin = ["train", "--steps", "20000", "--max-seconds", "0.05", "--out", "run"]
    begin += ["--checkpoint-every", every]
    assert microgpt(*begin, "--num-samples", "2") == 0
    out = capsys.readouterr().out
    assert "time is up after step" in out
    assert "go on with: microgpt train --resume --out run" in out
    before = metrics(here / "run")
    seconds = [line["seconds"] for line in before]
    assert sum(seconds[:-1]) < 0.05
    assert len(samples(here / "run")) == 2
    assert microgpt("train", "--resume", "--out", "run", "--max-seconds", "0.01") == 0
    after = metrics(here / "run")
    assert after[: len(before)] == before
    assert len(after) > len(before)
