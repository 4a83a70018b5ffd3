"""Runs that survive: kills, signals, full disks, other runs, numbers that are not finite.

The long forms are in tests/faults.py.
"""

from __future__ import annotations

import errno
import io
import math
import os
import platform
import shutil
import signal
import stat
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from itertools import count
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

import faults
import numpy as np
import pytest
from faults import differences, quiet, training

from microgpt.backend import BACKENDS
from microgpt.cli import report
from microgpt.cli.commands import main as microgpt
from microgpt.config import Config
from microgpt.errors import MicrogptError
from microgpt.layout import param_shapes, pick
from microgpt.runs import checkpoint
from microgpt.runs import directory as rundir
from microgpt.runs.checkpoint import FILE_NAME, load_checkpoint
from microgpt.runs.directory import LOCK, METRICS, RUN_FILES
from microgpt.train import Run, new_run, resumed_run

# terminals and locks of POSIX; on Windows these tests are left out
fcntl, pty, termios = map(pytest.importorskip, ("fcntl", "pty", "termios"))

STEPS, EVERY = 12, 4


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command line of a small run, without its directory."""
    return training(tmp_path_factory.mktemp("data"), "vectorized", STEPS, EVERY)


@pytest.fixture(scope="module")
def whole(start: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of that run, finished without interruption."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert quiet([*start, "--out", str(out)]) == (0, "")
    return out


@pytest.fixture
def run(start: list[str], tmp_path: Path) -> Path:
    """The directory of that run, interrupted after five steps."""
    faults.stop_after(5, [*start, "--out", str(tmp_path / "run")])
    return tmp_path / "run"


@pytest.fixture(autouse=True)
def _untaken() -> Iterator[None]:
    """A signal without a handler fails its test, and does not end the test run."""

    def left_to_us(number: int, frame: object) -> None:
        raise AssertionError(f"signal {number} was not handled")

    before = {n: signal.signal(n, left_to_us) for n in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def resume(out: Path, *more: str) -> tuple[int, str]:
    return quiet(["train", "--resume", "--out", str(out), *more])


def after_step(number: int, act: Callable[[], object]) -> Any:
    """A patch that calls `act` when training reports this step."""
    update = report.Progress.update

    def update_and_act(progress: report.Progress, step: int, *rest: Any) -> None:
        update(progress, step, *rest)
        if step == number:
            act()

    return patch.object(report.Progress, "update", update_and_act)


def one_line(said: tuple[int, str]) -> str:
    """The one line of an error with exit status 2."""
    status, text = said
    assert status == 2
    (line,) = text.splitlines()
    assert line.startswith("microgpt train: error: ")
    return line


# Short forms of tests/faults.py


def test_a_killed_run_goes_on_bit_for_bit() -> None:
    assert faults.kills(count=5, steps=100, scalar_steps=30, every=3) == []


def test_no_refused_write_costs_more_than_the_steps_since_the_last_checkpoint() -> None:
    assert faults.writes(errors=[errno.ENOSPC], stride=5) == []


def test_memory_is_steady() -> None:
    assert faults.soak(steps=5_000) == []


# Checkpoints


def test_checkpoints_are_written_every_n_steps_and_at_the_end(
    start: list[str], tmp_path: Path
) -> None:
    written: list[int] = []
    save = Run.save

    def watched(run: Run) -> None:
        save(run)
        written.append(load_checkpoint(run.out).state.updates)

    with patch.object(Run, "save", watched):
        assert quiet([*start, "--out", str(tmp_path / "run")])[0] == 0
        assert written == [0, 4, 8, 12]
        written.clear()
        assert quiet([*start, "--checkpoint-every", "5", "--out", str(tmp_path / "five")])[0] == 0
        assert written == [0, 5, 10, 12]
        written.clear()
        assert quiet([*start, "--checkpoint-every", "0", "--out", str(tmp_path / "end")])[0] == 0
        assert written == [0, 12]


def test_the_disk_has_the_metrics_before_the_checkpoint_and_the_names_after_it(
    start: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    done: list[tuple[str, int]] = []  # file synced or renamed, size of metrics.jsonl
    fsync, replace = os.fsync, os.replace

    def synced(fd: int) -> None:
        fsync(fd)
        found = os.fstat(fd)
        metrics = out / METRICS
        if stat.S_ISDIR(found.st_mode):
            done.append(("folder", 0))
        elif metrics.exists() and os.path.samestat(found, metrics.stat()):
            done.append((METRICS, found.st_size))
        else:
            done.append(("file", 0))

    def replaced(source: Path, target: Path) -> None:
        size = (out / METRICS).stat().st_size if (out / METRICS).exists() else 0
        replace(source, target)
        done.append((target.name, size))

    with patch.object(os, "fsync", synced), patch.object(os, "replace", replaced):
        assert quiet([*start, "--out", str(out)]) == (0, "")
    places = [i for i, (what, _) in enumerate(done) if what == FILE_NAME]
    assert len(places) == 4
    for i in places:
        assert done[i - 1][0] == "file"
        assert done[i + 1][0] == "folder"
    for i in places[1:]:
        assert done[i - 2] == (METRICS, done[i][1])  # nothing was added in between
        assert done[i][1] > 0


def test_what_killed_writers_left_is_removed_and_nothing_else(run: Path, whole: Path) -> None:
    for name in RUN_FILES:
        folder = run / f".{name}.123.0123abcd"
        folder.mkdir()
        for begun in (name, ".tmp123"):  # libraries have files of their own
            (folder / begun).write_text("half", encoding="utf-8")
    (run / ".samples.txt.124.0123abcd").write_text("half", encoding="utf-8")
    others = (".checkpoint.safetensors.swp", ".notes.txt.123.0123abcd", "checkpoint.old")
    elsewhere = run.parent / "elsewhere"
    elsewhere.mkdir()
    precious = [elsewhere / "thesis.txt", *(run / name for name in others)]
    for path in precious:
        path.write_text("precious", encoding="utf-8")
    (run / ".samples.txt.125.0123abcd").symlink_to(elsewhere)
    assert resume(run) == (0, "")
    for path in precious:
        path.unlink()
    assert differences(run, whole) == []


def test_a_run_that_was_killed_before_its_samples_were_written_writes_them(
    whole: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "samples.txt").unlink()
    assert resume(tmp_path / "run") == (0, "")
    assert differences(tmp_path / "run", whole) == []
    assert "has had all of its 12 steps" in one_line(resume(tmp_path / "run"))


def test_what_was_asked_for_when_a_run_went_on_is_not_forgotten(run: Path) -> None:
    def kill() -> None:
        raise KeyboardInterrupt

    with after_step(6, kill):
        assert resume(run, "--steps", "9", "--checkpoint-every", "0")[0] == 130
    assert load_checkpoint(run).state.updates == 5
    assert resume(run) == (0, "")
    assert load_checkpoint(run).state.updates == 9


def test_a_directory_without_a_checkpoint_is_not_resumed_and_can_be_begun_again(
    start: list[str], whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    out.mkdir()
    begun = out / f".{FILE_NAME}.123.0123abcd"
    begun.mkdir()
    (begun / FILE_NAME).write_text("half", encoding="utf-8")
    (out / LOCK).write_text("process 123 on nowhere\n", encoding="utf-8")
    assert "nothing to go on from; start a run without --resume" in one_line(resume(out))
    assert quiet([*start, "--out", str(out)]) == (0, "")
    assert differences(out, whole) == []


# metrics.jsonl


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda lines: lines[:2] + lines[3:], "line 3 is not that of step 3"),
        (lambda lines: lines[:2] + lines[1:], "line 3 is not that of step 3"),
        (lambda lines: lines[:4], "line 5 is not that of step 5"),
        (lambda lines: [*lines[:3], lines[3][:9]], "line 4 is not that of step 4"),
        (lambda lines: [], "line 1 is not that of step 1"),
        (lambda lines: [b"[]", *lines], "line 1 is not that of step 1"),
        (lambda lines: [b"\xff", *lines[1:]], "line 1 is not that of step 1"),
        (lambda lines: [b"[" * 100_000, *lines[1:]], "line 1 is not that of step 1"),
        (lambda lines: [b'{"step": 1e999}', *lines[1:]], "line 1 is not that of step 1"),
        (lambda lines: [b'{"step": 1.5}', *lines[1:]], "line 1 is not that of step 1"),
        (lambda lines: [b'{"step": "1"}', *lines[1:]], "line 1 is not that of step 1"),
    ],
)
def test_metrics_with_a_gap_are_not_gone_on_from(
    edit: Callable[[list[bytes]], list[bytes]], message: str, run: Path
) -> None:
    lines = (run / METRICS).read_bytes().splitlines()
    (run / METRICS).write_bytes(b"\n".join(edit(lines)))
    before = {path: path.read_bytes() for path in run.iterdir()}
    assert message in one_line(resume(run))
    assert {path: path.read_bytes() for path in run.iterdir()} == before


def test_metrics_that_were_deleted_begin_where_the_run_goes_on(run: Path, whole: Path) -> None:
    (run / METRICS).unlink()
    faults.stop_after(9, ["train", "--resume", "--out", str(run)])
    with open(run / METRICS, "ab") as file:
        file.write(b'{"step": 10, "lo')
    assert resume(run) == (0, "")
    assert faults.figures(run) == faults.figures(whole)[5:]


# Signals


def test_a_signal_while_a_checkpoint_is_written_lets_it_be_completed(
    start: list[str], whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    write_tensors = checkpoint.write_tensors

    def interrupted(path: Path, tensors: Any, metadata: dict[str, str]) -> None:
        if metadata["updates"] == "8":
            os.kill(os.getpid(), signal.SIGTERM)
        write_tensors(path, tensors, metadata)

    with patch.object(checkpoint, "write_tensors", interrupted):
        assert quiet([*start, "--out", str(out)]) == (143, "")
    assert load_checkpoint(out).state.updates == 8
    assert resume(out) == (0, "")
    assert differences(out, whole) == []


def test_a_second_signal_ends_a_run_at_once_and_leaves_the_checkpoint_before(
    start: list[str], whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    replace = os.replace

    def interrupted(source: Path, target: Path) -> None:
        if target.name == FILE_NAME and (out / FILE_NAME).exists():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        replace(source, target)

    with patch.object(os, "replace", interrupted):
        assert quiet([*start, "--out", str(out)]) == (143, "microgpt train: interrupted\n")
    assert {path.name for path in out.iterdir()} == {FILE_NAME, METRICS, "config.yaml"}
    assert load_checkpoint(out).state.updates == 0
    assert resume(out) == (0, "")
    assert differences(out, whole) == []


@pytest.mark.parametrize("place", ["documents", "samples"])
def test_a_signal_before_or_after_training_ends_a_run_at_once(
    place: str, start: list[str], whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    target = {
        "documents": "microgpt.train.load_documents",
        "samples": "vectorized.backend.sample_many",
    }[place]
    with patch(target, lambda *_: os.kill(os.getpid(), signal.SIGHUP)):
        assert faults.microgpt([*start, "--out", str(out)]) == 129
    printed = capsys.readouterr()
    assert printed.err == "microgpt train: interrupted\n"
    if place == "documents":
        assert not out.exists()
    else:
        assert printed.out.splitlines()[-2:] == [
            f"everything up to step 12 is in {out}",
            f"go on with: microgpt train --resume --out {out}",
        ]
        assert resume(out) == (0, "")
        assert differences(out, whole) == []


def test_nohup_is_respected(start: list[str], tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with after_step(5, lambda: os.kill(os.getpid(), signal.SIGHUP)):
            assert quiet([*start, "--out", str(tmp_path / "run")]) == (0, "")
    finally:
        signal.signal(signal.SIGHUP, before)


def prepared(code: str, *command: str) -> list[str]:
    """A command that is run after a line of Python, in the same process."""
    line = f"import fcntl, os, resource, sys, termios; {code}; os.execv(sys.argv[1], sys.argv[1:])"
    return [sys.executable, "-c", line, sys.executable, *command]


def test_a_closed_terminal_ends_a_run_with_its_checkpoint_written(
    start: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    command = ["-m", "microgpt", *start, "--steps", "1000000", "--out", str(out)]
    ours, terminal = pty.openpty()
    fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    child = subprocess.Popen(
        prepared("fcntl.ioctl(0, termios.TIOCSCTTY, 0)", *command),
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
    )
    os.close(terminal)
    seen = b""
    while seen.count(b"step/s") < 3:
        seen += os.read(ours, 1000)
    os.close(ours)
    assert child.wait(timeout=20) == 129
    updates = load_checkpoint(out).state.updates
    assert updates > 0
    assert len(faults.figures(out)) == updates
    assert {path.name for path in out.iterdir()} == {FILE_NAME, METRICS, "config.yaml"}


# What the system refuses


@pytest.fixture
def process(start: list[str], tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Train in a process of its own."""

    def train(*flags: str, first: str = "pass", **more: Any) -> Any:
        out = ["--out", str(tmp_path / "run")]
        command = prepared(first, "-m", "microgpt", *start, *flags, *out)
        streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        return subprocess.run(command, **{**streams, "encoding": "utf-8", **more})

    return train


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_an_output_without_a_reader_ends_a_run_that_can_go_on(
    unbuffered: str,
    process: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
    whole: Path,
) -> None:
    read, write = os.pipe()
    os.close(read)
    ran = process(stdout=write, env={**os.environ, "PYTHONUNBUFFERED": unbuffered})
    os.close(write)
    assert (ran.returncode, ran.stderr) == (141, "")
    if unbuffered:
        assert resume(tmp_path / "run") == (0, "")
    assert differences(tmp_path / "run", whole) == []


@pytest.mark.parametrize(
    ("number", "error", "said"),
    [
        (None, BrokenPipeError(errno.EPIPE, "Broken pipe"), (141, "")),
        (None, OSError(errno.EIO, "Input/output error"),
         (2, "microgpt: error: what is printed cannot be written: Input/output error; go on with:"
             " microgpt train --resume --out RUN\n")),
        (signal.SIGHUP, OSError(errno.EIO, "Input/output error"), (129, "")),
    ],
)  # fmt: skip
def test_progress_without_a_reader_ends_a_run_with_its_checkpoint_written(
    number: int | None,
    error: OSError,
    said: tuple[int, str],
    start: list[str],
    whole: Path,
    tmp_path: Path,
) -> None:
    def leave() -> None:
        if number is not None:
            os.kill(os.getpid(), number)
        raise error

    out = tmp_path / "run"
    with after_step(6, leave):
        status, words = quiet([*start, "--out", str(out)])
    assert (status, words.replace(str(out), "RUN")) == said
    assert load_checkpoint(out).state.updates == 6
    assert resume(out) == (0, "")
    assert differences(out, whole) == []


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_an_output_on_a_full_disk_ends_a_run_that_can_go_on(
    unbuffered: str,
    process: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
    whole: Path,
) -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        ran = process(stdout=full, env={**os.environ, "PYTHONUNBUFFERED": unbuffered})
    first = "microgpt: error: what is printed cannot be written: No space left on device"
    resuming = f"; go on with: microgpt train --resume --out {tmp_path / 'run'}" * bool(unbuffered)
    assert (ran.returncode, ran.stderr) == (2, f"{first}{resuming}\n")
    if unbuffered:
        assert resume(tmp_path / "run") == (0, "")
    assert differences(tmp_path / "run", whole) == []


def test_a_signal_counts_for_more_than_an_output_on_a_full_disk(
    start: list[str], tmp_path: Path
) -> None:
    class Full(io.StringIO):
        def flush(self) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    stop = after_step(6, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with stop, redirect_stdout(Full()), redirect_stderr(io.StringIO()):
        assert faults.microgpt([*start, "--out", str(tmp_path / "run")]) == 143
    assert load_checkpoint(tmp_path / "run").state.updates == 6


def test_a_run_needs_no_output(
    process: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path, whole: Path
) -> None:
    ran = process(stdout=None, first="os.close(1)")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert differences(tmp_path / "run", whole) == []


def test_a_limit_on_the_size_of_files_leaves_the_checkpoint_before(
    process: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    limit = 30_000  # more than a checkpoint has, less than the metrics of all steps
    limited = f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
    ran = process("--steps", "1000", "--checkpoint-every", "50", first=limited)
    line = one_line((ran.returncode, ran.stderr))
    assert "metrics.jsonl: cannot be written: File too large; the checkpoint of step " in line
    updates = load_checkpoint(tmp_path / "run").state.updates
    assert updates in range(50, 1000, 50)
    assert resume(tmp_path / "run") == (0, "")
    steps, *_ = zip(*faults.figures(tmp_path / "run"))
    assert steps == tuple(range(1, 1001))


def test_a_checkpoint_that_the_system_refuses_is_told_in_one_line(
    process: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    limited = "resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))"  # less than a checkpoint
    ran = process(first=limited)
    line = one_line((ran.returncode, ran.stderr))
    assert "checkpoint.safetensors: cannot be written: File too large" in line
    assert not any(path.is_dir() for path in (tmp_path / "run").iterdir())


def vanish(out: Path) -> None:
    shutil.rmtree(out)


def become_a_file(out: Path) -> None:
    shutil.rmtree(out)
    out.write_text("a file", encoding="utf-8")


def move(out: Path) -> None:
    out.rename(out.with_name("moved"))


def lose_metrics(out: Path) -> None:
    (out / METRICS).unlink()


def edit_metrics(out: Path) -> None:
    lines = (out / METRICS).read_bytes()
    (out / METRICS).unlink()
    (out / METRICS).write_bytes(lines)


@pytest.mark.parametrize(
    ("disturb", "message"),
    [
        (vanish, "metrics.jsonl: cannot be written: No such file or directory"),
        (become_a_file, "metrics.jsonl: cannot be written: Not a directory"),
        (move, "metrics.jsonl: cannot be written: No such file or directory"),
        (lose_metrics, "metrics.jsonl: cannot be written: No such file or directory"),
        (edit_metrics, "metrics.jsonl: was replaced by another file during the run"),
    ],
)
def test_a_directory_that_changes_under_a_run_ends_it(
    disturb: Callable[[Path], None],
    message: str,
    start: list[str],
    tmp_path: Path,
) -> None:
    out = tmp_path / "run"
    with after_step(6, lambda: disturb(out)):
        line = one_line(quiet([*start, "--out", str(out)]))
    assert message in line
    kept = next((path for path in (out, tmp_path / "moved") if path.is_dir()), None)
    assert ("go on with" in line) == out.is_dir()
    if kept is not None:
        assert load_checkpoint(kept).state.updates == 4


# Two runs, one directory


@pytest.fixture
def alive(start: list[str], tmp_path: Path) -> Iterator[tuple[Path, subprocess.Popen[str]]]:
    """A run at work, in a process of its own."""
    out = tmp_path / "alive"
    command = [sys.executable, "-u", "-m", "microgpt", *start, "--steps", "100000000"]
    with subprocess.Popen(
        [*command, "--out", str(out)], stdout=subprocess.PIPE, encoding="utf-8"
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        child.stdout.readline()
        yield out, child
        child.kill()


def test_a_second_run_is_kept_out_while_the_first_lives_and_not_longer(
    alive: tuple[Path, subprocess.Popen[str]],
    start: list[str],
    whole: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, child = alive
    begin = [*start, "--out", str(out)]
    for second in (resume(out), quiet([*begin, "--overwrite"])):
        assert f"another run is at work there (process {child.pid} on " in one_line(second)
    assert "holds a run already" in one_line(quiet(begin))
    assert child.poll() is None
    child.kill()
    child.wait()
    assert (out / LOCK).exists()
    assert faults.microgpt([*begin, "--overwrite"]) == 0
    said, *_ = capsys.readouterr().out.splitlines()
    assert said.startswith(f"the run before (process {child.pid} on ")
    assert said.endswith(") was cut short; its lock is void")
    assert differences(out, whole) == []
    assert not (out / LOCK).exists()


def test_of_two_runs_that_choose_a_name_at_once_each_gets_its_own(
    start: list[str], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    faster = rundir.claim(Path("runs", "microgpt"), overwrite=False)  # and nothing written yet
    assert quiet(start) == (0, "")
    faster.release()
    assert differences(tmp_path / "runs" / "microgpt-2", whole) == []


def test_a_lock_that_was_removed_while_it_was_taken_is_not_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = rundir.RunLock(tmp_path)
    opened = os.open

    def released_in_between(path: Path, *more: Any, **named: Any) -> int:
        fd = opened(path, *more, **named)
        first.release()
        return fd

    with patch.object(os, "open", released_in_between):
        second = rundir.RunLock(tmp_path)
    with pytest.raises(rundir.TakenError):
        rundir.RunLock(tmp_path)
    second.release()
    assert list(tmp_path.iterdir()) == []


def test_a_directory_is_given_back_at_the_end_and_after_an_error(
    tiny_config: Config, tmp_path: Path
) -> None:
    with new_run(tiny_config, "vectorized", tmp_path, "") as run:
        assert (run.out / LOCK).exists()
    assert not (run.out / LOCK).exists()
    rundir.RunLock(run.out).release()
    with pytest.raises(MicrogptError, match="unknown backend") as refusal:
        resumed_run(tmp_path, "torch", {})
    assert refusal.tb is not None  # in which the lock is still known
    rundir.RunLock(run.out).release()


def test_a_directory_that_was_taken_since_it_was_looked_at_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / METRICS).write_text("precious", encoding="utf-8")
    with pytest.raises(rundir.TakenError, match="holds a run already"):
        rundir.claim(tmp_path, overwrite=False)
    rundir.claim(tmp_path, overwrite=True).release()


def test_a_lock_that_cannot_be_written_is_not_held(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    with patch.object(platform, "node", side_effect=full), pytest.raises(MicrogptError) as refusal:
        rundir.RunLock(tmp_path)
    assert refusal.tb is not None  # in which the lock is still known
    rundir.RunLock(tmp_path).release()


def test_a_file_system_without_locks_is_written_to_all_the_same(
    start: list[str], whole: Path, tmp_path: Path
) -> None:
    no_locks = OSError(errno.ENOLCK, "No locks available")
    with patch.object(fcntl, "flock", side_effect=no_locks):
        assert quiet([*start, "--out", str(tmp_path / "run")]) == (0, "")
    assert differences(tmp_path / "run", whole) == []


# Numbers that are not finite


def spoiled(backend: str, method: str, number: int, spoil: Callable[[Any], object]) -> Any:
    """A patch by which `spoil` is called on the backend after the n-th call of a method."""
    module = import_module(f"{backend}.backend")
    calls = count(1)
    before = getattr(module.Backend, method)

    def spoil_after(backend: Any, *arguments: Any) -> None:
        before(backend, *arguments)
        if next(calls) == number:
            spoil(backend)

    return patch.object(module.Backend, method, spoil_after)


def no_number(backend: Any) -> None:
    """Set a weight to NaN."""
    matrix = pick(backend.params, "layer0.mlp_fc2")
    if isinstance(matrix, np.ndarray):
        matrix[0, 0] = np.nan
    else:
        matrix[0][0].data = math.nan


def gradient(value: float) -> Callable[[Any], None]:
    """A function that sets one number of the gradient to this value."""

    def spoil(backend: Any) -> None:
        grads = {name: np.array(grad) for name, grad in backend.grads().items()}
        grads["layer0.mlp_fc2"][0, 0] = value
        backend.set_grads(grads)

    return spoil


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("method", "number", "spoil", "message"),
    [
        (
            *("update", 6, no_number),
            "step 7: the loss is nan; first not finite: tap layer0.mlp_res,"
            " parameter layer0.mlp_fc2;",
        ),
        ("update", 8, no_number, "step 8: layer0.mlp_fc2 is not finite everywhere;"),
        ("backward", 8, gradient(math.inf), "step 8: layer0.mlp_fc2 is not finite everywhere;"),
        ("backward", 8, gradient(1e200), "step 8: "),
    ],
)
def test_no_checkpoint_has_a_number_that_is_not_finite(
    method: str,
    number: int,
    spoil: Callable[[Any], object],
    message: str,
    backend: str,
    start: list[str],
    whole: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "run"
    begin = [*start, "--backend", backend, "--out", str(out)]
    with spoiled(backend, method, number, spoil):
        line = one_line(quiet(begin))
    assert message in line
    assert line.endswith(
        "; try a smaller --learning-rate than 0.05, such as 0.005; the checkpoint of step 4 is"
        f" kept: go on with: microgpt train --resume --out {out} --learning-rate 0.005"
    )
    assert load_checkpoint(out).state.updates == 4
    assert resume(out, "--backend", backend) == (0, "")
    np.testing.assert_allclose(faults.figures(out), faults.figures(whole), rtol=0, atol=1e-12)


def test_an_overflow_is_traced_to_the_first_tap_and_no_parameter(
    start: list[str], tmp_path: Path
) -> None:
    line = one_line(quiet([*start, "--init-std", "1e154", "--out", str(tmp_path / "run")]))
    assert "step 1: the loss is nan; first not finite: tap layer0.attn_logits, parameter no" in line
    assert line.endswith("try a smaller --init-std than 1e+154, such as 0.08")


def test_a_batch_in_micro_batches_is_traced_as_well(start: list[str], tmp_path: Path) -> None:
    large = [*start, "--batch-size", "200", "--out", str(tmp_path / "run")]
    with spoiled("vectorized", "update", 6, no_number):
        line = one_line(quiet(large))
    assert "step 7: the loss is nan; first not finite: tap layer0.mlp_res, param" in line


def test_a_run_is_replaced_only_by_one_that_has_begun(
    start: list[str], whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    begin = [*start, "--out", str(out), "--overwrite"]
    with patch("microgpt.train.init_params", infinite):
        assert "wte is not finite everywhere" in one_line(quiet(begin))
    assert differences(out, whole) == []


def infinite(config: Config, vocab_size: int, rng: Random) -> dict[str, Any]:
    return {
        name: np.full(shape, np.inf) for name, shape in param_shapes(config, vocab_size).items()
    }


def test_a_loss_of_documents_kept_from_training_that_is_not_finite_is_said(
    start: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def not_finite(*_: object) -> None:
        raise FloatingPointError("the loss of a position is not finite")

    with patch("vectorized.backend.Backend.position_losses", not_finite):
        assert faults.microgpt([*start, "--held-out", "2", "--out", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "no loss on 2 documents kept from training: the loss of a position is not" in said


# A directory from another user


@pytest.mark.parametrize("kind", ["link", "dangling", "hard link", "pipe", "folder"])
def test_a_lock_that_leads_elsewhere_is_refused(run: Path, tmp_path: Path, kind: str) -> None:
    precious, lock = tmp_path / "precious", run / LOCK
    lock.unlink(missing_ok=True)
    if kind != "dangling":
        precious.write_text("precious", encoding="utf-8")
    if kind == "hard link":
        os.link(precious, lock)
    elif kind == "pipe":
        os.mkfifo(lock)
    elif kind == "folder":
        lock.mkdir()
    else:
        lock.symlink_to(precious)
    assert LOCK in one_line(resume(run))
    assert precious.exists() == (kind != "dangling")
    assert kind == "dangling" or precious.read_text(encoding="utf-8") == "precious"


@pytest.mark.parametrize("kind", ["pipe", "endless", "huge"])
def test_metrics_that_are_none_are_refused(run: Path, kind: str) -> None:
    (run / METRICS).unlink()
    if kind == "pipe":
        os.mkfifo(run / METRICS)
    elif kind == "endless":
        (run / METRICS).symlink_to("/dev/zero")
    else:
        (run / METRICS).touch()
        os.truncate(run / METRICS, 10**9)
    assert "not the metrics of 5 steps; delete it to go on" in one_line(resume(run))


def test_a_run_whose_directory_was_moved_leaves_its_successor_alone(
    start: list[str], tmp_path: Path
) -> None:
    out, moved = tmp_path / "run", tmp_path / "moved"

    def replaced() -> None:
        if moved.exists():
            return  # in the run that follows
        out.rename(moved)
        assert quiet([*start, "--out", str(out)]) == (0, "")
        (out / LOCK).write_text("process of another\n", encoding="utf-8")

    with after_step(2, replaced):
        said = one_line(quiet([*start, "--out", str(out)]))
    assert "was replaced by another file during the run" in said
    assert "--resume" not in said  # what is there now is not ours
    assert (out / LOCK).read_text(encoding="utf-8") == "process of another\n"


def test_a_run_goes_on_where_its_data_are_now(
    start: list[str], run: Path, whole: Path, tmp_path: Path
) -> None:
    data = Path(start[start.index("--dataset") + 1])
    elsewhere, gone = tmp_path / "elsewhere.txt", data.with_name("gone.txt")
    elsewhere.write_bytes(data.read_bytes())
    data.rename(gone)
    try:
        assert "say where it is now with --dataset" in one_line(resume(run))
        assert resume(run, "--dataset", str(elsewhere)) == (0, "")
    finally:
        gone.rename(data)
    assert load_checkpoint(run).config.dataset == str(elsewhere)
    assert (run / "samples.txt").read_bytes() == (whole / "samples.txt").read_bytes()
    elsewhere.write_text("other words\n", encoding="utf-8")
    assert "has changed since" in one_line(resume(run, "--steps", "20"))


def test_what_a_lock_says_is_printed_as_text(run: Path) -> None:
    (run / LOCK).write_bytes(b"\n\x1b[31mEVIL\x9b\nline 2")
    said = io.StringIO()
    with redirect_stdout(said):
        assert microgpt(["train", "--resume", "--out", str(run)]) == 0
    assert r"(\x1b[31mEVIL" in said.getvalue()
    assert "\x1b" not in said.getvalue()
