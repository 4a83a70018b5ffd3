"""The run directory: its files, its lock, and checks of what is read from it.

config.yaml              the configuration, complete
metrics.jsonl            one object per step: step (from 1), loss, lr, seconds (that this step took)
                         and where measured: held_out, the loss on held-out documents
checkpoint.safetensors   see microgpt.runs.checkpoint
samples.txt              what the trained model wrote, one document per line; written last
run.lock                 exists while a run writes to the directory, and names its process
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import platform
import re
import stat
import sys
import weakref
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import yaml

from microgpt.config import Config
from microgpt.errors import MicrogptError, shortened
from microgpt.runs.checkpoint import FILE_NAME
from microgpt.runs.files import make_folder, remove_begun, sync_folder, write_whole, writing
from microgpt.settings import read_yaml, stored_config

if TYPE_CHECKING:
    from filelock import FileLock

CONFIG, METRICS, SAMPLES = "config.yaml", "metrics.jsonl", "samples.txt"
RUN_FILES = (CONFIG, METRICS, FILE_NAME, SAMPLES)
LOCK = "run.lock"
LONGEST_LINE = 200  # bytes of a line of metrics.jsonl, or of run.lock
MARGIN = 100_000_000  # bytes of lines of metrics.jsonl after the checkpoint


class TakenError(MicrogptError):
    """A directory that belongs to another run."""


class RunLock:
    """A lock that keeps other runs out of a run directory for as long as its process lives.

    The operating system drops the lock when the process ends, however it ends: a run.lock that
    was left behind keeps no run out. Where a file system has no locks, the run goes on without.

    left_by  the process that left run.lock behind, or an empty text

    Raises TakenError if another run has the directory.
    """

    def __init__(self, out: Path) -> None:
        self.out, self.path = out, out / LOCK
        with writing(self.path):
            lock = _acquired(self.path)
            self.file = os.stat(self.path)
            self.release = weakref.finalize(self, _release, lock, self.path, self.file)
            with released_on_error(self), open(self.path, "rb+") as file:
                self.left_by = _holder(file)
                file.truncate(1)
                file.seek(1)
                file.write(f"process {os.getpid()} on {platform.node()}\n".encode())

    @property
    def stands(self) -> bool:
        """Whether the run.lock at this path is still the one that this run has locked."""
        return _is_at(self.file, self.path)


def _acquired(path: Path) -> FileLock:
    from filelock import FileLock, Timeout  # whose import takes as long as a hundred steps

    if os.path.lexists(path):  # in a directory from another user it may be a link
        found = os.lstat(path)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
            raise MicrogptError(f"{path}: not a file of its own, as runs make them; remove it")
    lock = FileLock(path, thread_local=False)
    try:
        lock.acquire(timeout=0.2)  # seconds: the run before may just be removing the file
    except Timeout:
        with open(path, "rb") as file:
            holder = _holder(file)
        raise TakenError(
            f"{path.parent}: another run is at work there ({holder}); wait for its end,"
            " or choose another directory with --out DIR"
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):  # no locks on this file system
            raise
    return lock


def _holder(file: BinaryIO) -> str:
    """The text of run.lock after its first byte, which is locked, and so unreadable on Windows."""
    file.seek(1)
    return file.read(LONGEST_LINE).decode(errors="replace").strip()


def _is_at(file: os.stat_result, path: Path) -> bool:
    with contextlib.suppress(OSError):
        return os.path.samestat(file, os.stat(path))
    return False


def _release(lock: FileLock, path: Path, file: os.stat_result) -> None:
    if _is_at(file, path):  # in a directory that was moved, run.lock is another run's
        with contextlib.suppress(OSError):  # Windows removes no open file
            os.unlink(path)
    lock.release()
    if sys.platform == "win32":
        with contextlib.suppress(OSError):
            os.unlink(path)


def holds_run(out: Path) -> bool:
    """Whether a directory has any file of a run in it."""
    return any(os.path.exists(out / run_file) for run_file in RUN_FILES)


def check_free(out: Path, overwrite: bool) -> None:
    """Raises TakenError if a directory holds a run that is not to be replaced."""
    if os.path.exists(out) and not os.path.isdir(out):
        raise TakenError(f"--out {out}: is a file; name a directory, which need not exist yet")
    if holds_run(out) and not overwrite:
        raise TakenError(
            f"--out {out}: holds a run already; choose another directory, continue that run with"
            " --resume, or replace it with --overwrite"
        )


def claim(out: Path, overwrite: bool) -> RunLock:
    """The lock of a directory, made if need be, for a new run.

    Raises TakenError if a run is at work there, or has been and is not to be replaced.
    """
    try:
        make_folder(out)
        sync_folder(out.parent)
    except OSError as error:
        raise MicrogptError(f"--out {out}: {error.strerror}") from None
    lock = RunLock(out)
    with released_on_error(lock):
        check_free(out, overwrite)
    return lock


def discard(lock: RunLock) -> None:
    """Remove the files of a run, then its directory and the parent directory if they are empty."""
    tidy(lock.out)
    for run_file in RUN_FILES:
        with contextlib.suppress(OSError):
            os.unlink(lock.out / run_file)
    lock.release()
    for folder in (lock.out, lock.out.parent):
        with contextlib.suppress(OSError):  # the folder is not empty
            folder.rmdir()


def claim_free(first: Path) -> RunLock:
    """The lock of the first of name, name-2, name-3 and so on that belongs to no run."""
    names = (first if i == 1 else first.with_name(f"{first.name}-{i}") for i in count(1))
    while True:
        with contextlib.suppress(TakenError):
            return claim(next(path for path in names if not holds_run(path)), overwrite=False)


@contextlib.contextmanager
def released_on_error(lock: RunLock) -> Iterator[None]:
    """Release the lock if the block raises."""
    try:
        yield
    except BaseException:
        lock.release()
        raise


def tidy(out: Path) -> None:
    """Remove the unfinished files of a killed run."""
    begun = re.compile(rf"\.({'|'.join(map(re.escape, RUN_FILES))})\.\d+\.[0-9a-f]{{8}}")
    with contextlib.suppress(OSError):  # unfinished files do no harm
        for path in out.iterdir():
            if begun.fullmatch(path.name):
                remove_begun(path)


class Metrics:
    """metrics.jsonl, open at its end."""

    def __init__(self, out: Path) -> None:
        self.path = out / METRICS
        with writing(self.path):
            self.file = open(self.path, "a", encoding="utf-8", newline="\n")  # noqa: SIM115

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # the lines of a checkpoint's steps were synced before
            self.file.close()

    def write(
        self, step: int, loss: float, lr_t: float, seconds: float, held_out: float | None
    ) -> None:
        """Add the line of a step, counted from 1."""
        more = "" if held_out is None else f', "held_out": {held_out!r}'
        line = f'"step": {step}, "loss": {loss!r}, "lr": {lr_t!r}, "seconds": {seconds:.9f}{more}'
        with writing(self.path):
            self.file.write(f"{{{line}}}\n")

    def sync(self) -> None:
        """Return once every line is on the disk.

        Raises MicrogptError if the file cannot be written, or was replaced by another file.
        """
        with writing(self.path):
            self.file.flush()
            os.fsync(self.file.fileno())
            there = os.path.samestat(os.fstat(self.file.fileno()), os.stat(self.path))
        if not there:
            raise MicrogptError(f"{self.path}: was replaced by another file during the run")


def metrics_until(out: Path, updates: int) -> bytes:
    """The lines of metrics.jsonl for the steps that a checkpoint has had, without later lines.

    The file, or its first lines, may be missing: the user may have deleted them.

    Raises MicrogptError if one of the other lines is missing, doubled or damaged.
    """
    path = out / METRICS
    try:
        if not updates or not os.path.lexists(path):
            return b""
        if not os.path.isfile(path) or path.stat().st_size > LONGEST_LINE * updates + MARGIN:
            raise MicrogptError(f"{path}: not the metrics of {updates:,} steps; delete it to go on")
        with open(path if path.stat().st_size else os.devnull, "rb") as file:
            lines = [file.readline(10 * LONGEST_LINE).rstrip(b"\n")]
            first = _step_of(lines[0]) or 1
            for number, step in enumerate(range(first, updates + 1), 1):
                if _step_of(lines[-1]) != step:
                    raise MicrogptError(
                        f"{path}: line {number} is not that of step {step}, which the checkpoint"
                        " has had; bring the file back as it was, or delete it to go on without"
                        " the lines so far"
                    )
                lines.append(file.readline(10 * LONGEST_LINE).rstrip(b"\n"))
    except OSError as error:
        raise MicrogptError(f"{path}: {error.strerror}") from None
    return b"".join(line + b"\n" for line in lines[:-1])


def keep_held_out(out: Path, step: int, loss: float) -> None:
    """Add the held-out loss of this step to its line, the last one of metrics.jsonl."""
    *before, last = metrics_until(out, step).splitlines() or [b""]
    if last and b'"held_out"' not in last:
        last = last[:-1] + f', "held_out": {loss!r}}}'.encode()
        write_metrics(out, b"".join(line + b"\n" for line in (*before, last)))


def best_held_out(lines: bytes) -> tuple[float, int] | None:
    """The lowest held-out loss in these lines of metrics.jsonl, and its step; None if none."""
    measured = (json.loads(line) for line in lines.splitlines() if b'"held_out"' in line)
    found = [(entry.get("held_out"), entry["step"]) for entry in measured]
    return min((pair for pair in found if isinstance(pair[0], float)), default=None)


def _step_of(line: bytes) -> int | None:
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if type(step) is int else None


def write_metrics(out: Path, lines: bytes) -> None:
    """Replace metrics.jsonl by these lines."""
    write_whole(out / METRICS, lines)


def write_config(out: Path, config: Config) -> None:
    """Write every field to config.yaml."""
    text = yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)
    write_whole(out / CONFIG, text.encode())


def unlike(out: Path, config: Config) -> str:
    """The fields of config.yaml that differ from the checkpoint's, with their values, as text."""
    try:
        found = stored_config(read_yaml(out / CONFIG), str(out / CONFIG))
    except MicrogptError as error:
        return str(error) if os.path.lexists(out / CONFIG) else ""
    ours, theirs = dataclasses.asdict(config), dataclasses.asdict(found)
    return ", ".join(
        f"{name} {shortened(theirs[name], 200)}" for name in ours if ours[name] != theirs[name]
    )


def write_samples(out: Path, samples: list[str], between: str = "") -> None:
    """Write samples.txt: one sample per line; `between` separates samples of several lines."""
    write_whole(out / SAMPLES, between.join(f"{sample}\n" for sample in samples).encode())


def remove_samples(out: Path) -> None:
    """Remove the samples of a replaced run, or of this run after fewer steps."""
    with writing(out / SAMPLES):
        (out / SAMPLES).unlink(missing_ok=True)
