"""What differs on Windows and macOS, played on the system that the tests run on."""

from __future__ import annotations

import errno
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from crosscheck import conftest as options_of_crosscheck
from crosscheck import mutants, processes
from microgpt.cli import shell
from microgpt.errors import MicrogptError, as_typed
from microgpt.runs import directory, files, launch, signals
from microgpt.runs.directory import METRICS, Metrics

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows, as far as the product asks for it."""
    monkeypatch.setattr(sys, "platform", "win32")


@pytest.mark.parametrize(
    ("path", "typed"),
    [
        ("runs/book", "runs/book"),
        ("runs\\book", "runs\\book"),
        ("my runs\\book", '"my runs\\book"'),
        ("C:\\it's mine", '"C:\\it\'s mine"'),
    ],
)
@pytest.mark.usefixtures("windows")
def test_a_path_to_be_typed_is_quoted_as_windows_has_it(path: str, typed: str) -> None:
    assert as_typed(path) == typed


def refusing(times: int, patch: pytest.MonkeyPatch) -> list[float]:
    """Let the system refuse to put a file in place; the pauses in between."""
    refusals, pauses, replace = iter(range(times)), [], os.replace

    def refused(*paths: Any) -> None:
        if next(refusals, None) is not None:
            raise PermissionError(errno.EACCES, "Access is denied")
        replace(*paths)

    patch.setattr(os, "replace", refused)
    patch.setattr(files.time, "sleep", pauses.append)
    return pauses


def test_a_file_that_is_being_read_is_replaced_as_soon_as_windows_lets_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        pauses = refusing(3, patch)
        patch.setattr(sys, "platform", "win32")
        files.write_whole(tmp_path / "file", b"whole")
    assert len(pauses) == 3
    assert (tmp_path / "file").read_bytes() == b"whole"


@pytest.mark.parametrize(("system", "tries"), [("win32", files.TRIES), ("linux", 1)])
def test_a_file_that_cannot_be_replaced_is_refused_in_one_line(
    system: str, tries: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses = refusing(10**6, monkeypatch)
    monkeypatch.setattr(sys, "platform", system)
    with pytest.raises(MicrogptError, match="file: cannot be written: Access is denied"):
        files.write_whole(tmp_path / "file", b"whole")
    assert len(pauses) == tries - 1
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("windows_has", [("SIGBREAK",), ()])
def test_a_closed_terminal_ends_a_run_by_the_signal_that_the_system_has(
    windows_has: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(signal, "SIGHUP", raising=False)
    monkeypatch.delattr(signal, "SIGBREAK", raising=False)
    for name in windows_has:
        monkeypatch.setattr(signal, name, signal.SIGABRT, raising=False)

    def receive(number: int, frame: object) -> None:
        pass

    with signals.handled_by(receive):
        handled = {one for one in signal.valid_signals() if signal.getsignal(one) is receive}
    assert handled == {signal.SIGINT, signal.SIGTERM, *[signal.SIGABRT for _ in windows_has]}


@pytest.mark.parametrize(
    ("system", "number", "status"),
    [("win32", errno.EINVAL, 141), ("linux", errno.EINVAL, 2), ("win32", errno.ENOSPC, 2)],
)
def test_output_that_is_no_longer_read_ends_a_command_quietly(
    system: str,
    number: int,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def unread() -> int:
        raise OSError(number, "refused")

    monkeypatch.setattr(sys, "platform", system)
    assert shell.guarded("microgpt", unread) == status
    assert ("what is printed cannot be written: refused" in capsys.readouterr().err) == (
        status == 2
    )


def test_metrics_have_the_same_bytes_on_every_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(*arguments: Any, newline: str = "\r\n", **named: Any) -> Any:
        return open(*arguments, newline=newline, **named)

    monkeypatch.setattr(directory, "open", opened, raising=False)
    with Metrics(tmp_path) as metrics:
        metrics.write(1, 0.5, 0.01, 0.001, None)
    assert (tmp_path / METRICS).read_bytes().endswith(b"1000000}\n")


def test_a_system_that_cannot_copy_a_process_runs_the_crosscheck_in_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(processes, "get_all_start_methods", lambda: ["spawn"])
    assert processes.cores() == 1
    with pytest.raises(MicrogptError, match="which this system cannot make"):
        next(mutants.tried([]))
    monkeypatch.setattr(options_of_crosscheck, "can_fork", lambda: False)
    given = {"--reference": "scalar", "--backend": "vectorized", "--dtype": "float64"}
    given |= {"--steps": 5, "--processes": 2, "--case": None}
    config = SimpleNamespace(getoption=given.get, addinivalue_line=lambda *_: None)
    with pytest.raises(pytest.UsageError, match="--processes: this system cannot fork processes"):
        options_of_crosscheck.pytest_configure(config)  # type: ignore[arg-type]


@pytest.mark.usefixtures("windows")
def test_windows_is_told_how_ranks_are_started_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MicrogptError, match="type mpiexec -n 2 before the command"):
        launch.command_of(2, "")
    assert launch.mpiexec() is None
    monkeypatch.setenv(launch.RANK[0], "1")
    monkeypatch.delattr(os, "fork")
    launch.begin()


def test_macos_runs_the_crosscheck_in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert processes.cores() == 1


@pytest.mark.parametrize("package", ["microgpt", "scalar", "vectorized", "crosscheck"])
def test_what_only_some_systems_have_is_asked_for(package: str) -> None:
    """No module imports, or takes for granted, what Windows lacks."""
    modules = ("fcntl", "resource", "pwd", "grp", "termios")
    functions = ("fork", "getuid", "geteuid", "wait4", "sched_yield")
    for path in (ROOT / package).rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not [name for name in modules if f"import {name}\n" in text], path
        for name in functions:
            assert f"os.{name}(" not in text or f'hasattr(os, "{name}")' in text, (path, name)
        for line in text.splitlines():  # text is UTF-8 wherever it is opened
            if (".read_text(" in line or ".write_text(" in line) and "def " not in line:
                assert "encoding" in line, f"{path}: {line}"


def test_scripts_and_fixtures_keep_their_line_ends() -> None:
    assert "* text=auto eol=lf" in (ROOT / ".gitattributes").read_text(encoding="utf-8")
    for path in (ROOT / ".ci" / "run", *(ROOT / "fixtures" / "data").glob("*.txt")):
        assert b"\r" not in path.read_bytes(), path
