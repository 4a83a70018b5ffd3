"""What a run has to survive, on demand: kills, refused writes, a long time, damaged files.

python -m tests.faults kills --count 200         SIGKILL at random moments, and each time --resume
python -m tests.faults writes                    every operation on files refused in turn
python -m tests.faults soak --steps 100000       steady memory
python -m tests.faults mutations --count 20000   damaged files: see tests.mutations

Each prints one line with its figures, and exits with 1 if something did not survive. A run has
survived if its losses, parameters, moments and samples are bit for bit those of an undisturbed one.
"""

from __future__ import annotations

import argparse
import builtins
import contextlib
import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from pathlib import Path
from random import Random
from time import perf_counter
from typing import Any
from unittest.mock import patch

from microgpt.cli.commands import main as typed
from microgpt.runs.checkpoint import FILE_NAME, read_tensors
from microgpt.runs.directory import LOCK, METRICS, RUN_FILES
from microgpt.settings import load_config
from microgpt.train import new_run

WORDS = "emma\nana\nmia\nmaximilian\na\nnoam\nevangeline\n"
FLAGS = (
    *("--n-embd", "4", "--n-head", "2", "--block-size", "5", "--init-std", "0.5"),
    *("--batch-size", "2", "--learning-rate", "0.05", "--num-samples", "6", "--temperature", "1"),
)
WINDOWS = ("--documents", "windows", "--held-out", "2", "--eval-every", "7")
OPERATIONS = ("open", "fsync", "replace", "unlink", "write", "ftruncate", "mkdir", "chmod", "rmdir")
ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS)
STEADY = 4e6  # bytes by which the resident set may grow

Fault = Callable[[Callable[[], object], Any], object]  # of an operation, and half of what it writes


def metrics_of(out: str) -> list[dict[str, Any]]:
    """metrics.jsonl, without the time that steps took."""
    lines = Path(out, METRICS).read_text(encoding="utf-8").splitlines()
    return [{**json.loads(line), "seconds": 0} for line in lines]


def training(
    folder: Path, backend: str, steps: int, every: int, more: Sequence[str] = ()
) -> list[str]:
    """The command line of a small run on a small data set, without its directory."""
    (folder / "words.txt").write_text(WORDS, encoding="utf-8")
    return [
        *("train", "--dataset", str(folder / "words.txt"), *FLAGS, "--backend", backend),
        *("--steps", str(steps), "--checkpoint-every", str(every), *more),
    ]


def going_on(start: Sequence[str], out: Path) -> list[str]:
    """What to type after a run was cut short: --resume if there is a checkpoint, else once more."""
    if not (out / FILE_NAME).exists():
        return [*start, "--out", str(out)]
    backend = start[start.index("--backend") + 1]
    return ["train", "--resume", "--out", str(out), "--backend", backend]


def microgpt(*arguments: object) -> int:
    """The exit status of a command line."""
    return typed(list(map(str, arguments)))


def quiet(arguments: Sequence[str]) -> tuple[int, str]:
    """The exit status of a command line in this process, and what it said on stderr."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as said:
        return microgpt(*arguments), said.getvalue()


def differences(out: Path, whole: Path) -> list[str]:
    """In what a finished run differs from an undisturbed one; the time it took may."""
    # the removal of the lock, or of a folder that a file was moved out of, may have been refused
    names = {path.name for path in out.iterdir() if not path.is_dir() or any(path.iterdir())}
    names -= {LOCK}
    if names != set(RUN_FILES):
        return [f"the files are {sorted(names)}"]
    found = []
    if figures(out) != figures(whole):
        found.append("metrics.jsonl")
    (tensors, metadata), (expected, told) = (read_tensors(run / FILE_NAME) for run in (out, whole))
    if metadata != told or tensors.keys() != expected.keys():
        found.append("the metadata of the checkpoint")
    found += [name for name in expected if tensors[name].tobytes() != expected[name].tobytes()]
    return found + [
        name
        for name in RUN_FILES
        if name not in (FILE_NAME, METRICS)
        and (out / name).read_bytes() != (whole / name).read_bytes()
    ]


def unlike(status: int, said: str, out: Path, whole: Path) -> list[str]:
    """In what a run differs, going by how the last attempt at it ended."""
    if (status, said) == (0, "") or "has had all of its" in said:  # cut short when all was written
        return differences(out, whole)
    return [f"status {status}: {said.strip()}"]


def figures(out: Path) -> list[tuple[int, float, float, float]]:
    """Step, loss, learning rate, and the loss of what is held out, 0 where it was not measured."""
    lines = map(json.loads, (out / METRICS).read_text(encoding="utf-8").splitlines())
    return [(x["step"], x["loss"], x["lr"], x.get("held_out", 0.0)) for x in lines]


# operations on files, counted and refused


class Operations:
    """Counts the operations on files, and puts a fault in the place of one of them.

    at          which, counted from 0
    for_good    and of all that follow
    """

    def __init__(self, fault: Fault, at: int = -1, for_good: bool = False) -> None:
        self.fault, self.at, self.for_good = fault, at, for_good
        self.count = 0

    def do(self, operation: Callable[[], Any], half: Callable[[], Any] | None = None) -> Any:
        number, self.count = self.count, self.count + 1
        if self.at >= 0 and (number == self.at or (self.for_good and number > self.at)):
            return self.fault(operation, half)
        return operation()

    @contextlib.contextmanager
    def watched(self) -> Iterator[Operations]:
        """See every operation that microgpt makes here."""
        with ExitStack() as patches:
            for name in OPERATIONS:
                patches.enter_context(patch.object(os, name, self._counted(getattr(os, name))))
            patches.enter_context(patch.object(builtins, "open", self._opened(builtins.open)))
            yield self

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **more: Any) -> Any:
            return self.do(lambda: function(*arguments, **more))

        return counted

    def _opened(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def opened(path: Any, mode: str = "r", *rest: Any, **more: Any) -> Any:
            if mode in ("r", "rb"):
                return function(path, mode, *rest, **more)
            return File(self.do(lambda: function(path, mode, *rest, **more)), self)

        return opened


class File:
    """A file whose operations are counted."""

    def __init__(self, file: Any, operations: Operations) -> None:
        self.file, self.operations = file, operations

    def write(self, content: Any) -> Any:
        def half() -> None:
            self.file.write(content[: len(content) // 2])
            self.file.flush()

        return self.operations.do(lambda: self.file.write(content), half)

    def flush(self) -> Any:
        return self.operations.do(self.file.flush)

    def close(self) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> File:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def refuse(number: int) -> Fault:
    """The system refuses the operation, half done if it writes."""

    def fault(operation: object, half: Callable[[], object] | None) -> None:
        if half is not None:
            half()
        raise OSError(number, os.strerror(number))

    return fault


def die(operation: object, half: Callable[[], object] | None) -> None:
    """The process is killed in the middle of the operation."""
    if half is not None:
        half()
    os.kill(os.getpid(), signal.SIGKILL)


def writes(
    steps: int = 6, every: int = 2, errors: Sequence[int] = ERRORS, stride: int = 1
) -> list[str]:
    """Refuse every operation in turn, once and for good; returns what did not survive.

    Of a run that begins, of one that replaces another, and of one that goes on.
    """
    complaints: list[str] = []
    tried = 0
    unsynced = patch.object(os, "fsync", lambda fd: None)  # nothing here depends on the disk
    with tempfile.TemporaryDirectory() as name, unsynced:
        folder = Path(name)
        start = training(folder, "vectorized", steps, every)
        whole, out = folder / "whole", folder / "run"
        other, begun = folder / "other", folder / "begun"
        assert quiet([*start, "--out", str(whole)]) == (0, "")
        assert quiet([*start, "--seed", "7", "--out", str(other)]) == (0, "")
        stop_after(3, [*start, "--out", str(begun)])
        for before, arguments in (
            (None, [*start, "--out", str(out)]),
            (other, [*start, "--out", str(out), "--overwrite"]),
            (begun, ["train", "--resume", "--out", str(out)]),
        ):
            put(before, out)
            with Operations(refuse(0)).watched() as operations:
                assert quiet(arguments) == (0, "")
            for at in range(0, operations.count, stride):
                for error, for_good in [(error, good) for error in errors for good in (0, 1)]:
                    put(before, out)
                    with Operations(refuse(error), at, bool(for_good)).watched():
                        status, said = quiet(arguments)
                    tried += 1
                    complaints += [
                        f"operation {at} of {arguments[-1]}, {errno.errorcode[error]}: {what}"
                        for what in after_refusal(status, said, before, out, whole, start)
                    ]
    print(f"writes: {tried} refusals, {len(complaints)} not survived")
    return complaints


def put(before: Path | None, out: Path) -> None:
    """Make a directory a copy of another, or nothing."""
    shutil.rmtree(out, ignore_errors=True)
    if before is not None:
        shutil.copytree(before, out)


def after_refusal(
    status: int, said: str, before: Path | None, out: Path, whole: Path, start: list[str]
) -> Iterator[str]:
    """What is wrong after an operation was refused."""
    if (status, len(said.splitlines())) not in ((0, 0), (2, 1)):
        yield f"status {status}: {said}"
    if before is not None and not (out / FILE_NAME).exists():
        yield "the checkpoint is gone"
    elif before is not None and not differences_in_text(before, out):
        return  # nothing was begun
    if status:
        status, said = quiet(going_on(start, out))
    yield from unlike(status, said, out, whole)


def differences_in_text(before: Path, out: Path) -> bool:
    """Whether a file of the run before is not what it was."""
    return any(
        not (out / path.name).exists() or (out / path.name).read_bytes() != path.read_bytes()
        for path in before.iterdir()
    )


def stop_after(step: int, arguments: list[str]) -> None:
    """Train with Ctrl-C after a step."""
    from microgpt.cli import report

    update = report.Progress.update

    def update_and_stop(progress: report.Progress, done: int, *rest: Any) -> None:
        update(progress, done, *rest)
        if done == step:
            os.kill(os.getpid(), signal.SIGINT)

    with patch.object(report.Progress, "update", update_and_stop):
        assert quiet(arguments) == (130, "")


# kills


def kills(
    count: int = 200, seed: int = 0, steps: int = 1000, scalar_steps: int = 150, every: int = 5
) -> list[str]:
    """Kill runs until there have been so many kills; returns what did not survive.

    One in three learns windows of a text, and measures others that it does not learn.
    Every other kill comes at a random time, the rest in the middle of a random operation on files.
    The seed fixes the times and the operations.
    """
    rng = Random(seed)
    complaints: list[str] = []
    killed = finished = 0
    with tempfile.TemporaryDirectory() as name:
        undisturbed = [
            Undisturbed(Path(name), "vectorized", steps, every),
            Undisturbed(Path(name), "scalar", scalar_steps, every),
            Undisturbed(Path(name), "vectorized", steps, every, WINDOWS),
        ]
        while killed < count:
            one, out = undisturbed[finished % 3], Path(name) / f"run-{finished}"
            while True:
                at, patience = -1, None
                if killed < count and rng.random() < 0.5:
                    at = rng.randrange(one.operations)
                elif killed < count:
                    patience = rng.uniform(0, one.seconds)
                status, said = process(going_on(one.start, out), at, patience)
                if status != -signal.SIGKILL:
                    break
                killed += 1
            finished += 1
            complaints += [f"{out.name}: {what}" for what in unlike(status, said, out, one.out)]
    print(f"kills: {killed} kills in {finished} runs, {len(complaints)} not survived")
    return complaints


class Undisturbed:
    """A run that nothing happened to, and what it took."""

    def __init__(
        self, folder: Path, backend: str, steps: int, every: int, more: Sequence[str] = ()
    ) -> None:
        self.start = training(folder, backend, steps, every, more)
        self.out = folder / "-".join(["whole", backend, *more[1:2]])
        with Operations(die).watched() as operations:
            assert quiet([*self.start, "--out", str(self.out)]) == (0, "")
        self.operations = operations.count
        began = perf_counter()
        assert process([*self.start, "--out", f"{self.out}-again"]) == (0, "")
        self.seconds = perf_counter() - began


def process(arguments: list[str], at: int = -1, patience: float | None = None) -> tuple[int, str]:
    """The exit status of a process, and what it said on stderr.

    at          the operation on files in the middle of which it is killed, counted from 0
    patience    the seconds after which it is killed
    """
    command = [sys.executable, __file__, "child", str(at), *arguments]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=patience)
    except subprocess.TimeoutExpired:  # and it was killed
        return -signal.SIGKILL, ""
    return ran.returncode, ran.stderr


def soak(steps: int = 100_000) -> list[str]:
    """Train for a long time; returns a complaint if the memory in use grows after a tenth of it."""
    with tempfile.TemporaryDirectory() as name:
        config = load_config(overrides={"steps": str(steps), "checkpoint_every": "1000"})
        resident: dict[int, int] = {}

        def progress(step: int, loss: float, seconds: float) -> None:
            if step in (steps // 10, steps):
                resident[step] = resident_set()

        with new_run(config, "vectorized", Path(name) / "run", "soak") as run:
            assert run.train(progress)
    early, late = resident[steps // 10], resident[steps]
    print(
        f"soak: {steps:,} steps, resident {early / 1e6:.1f} MB after {steps // 10:,} of them,"
        f" {late / 1e6:.1f} MB at the end"
    )
    return [f"grew by {late - early:,} bytes"] if late - early > STEADY else []


def resident_set() -> int:
    """The memory in use, in bytes; where the system does not tell, the most there ever was."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def mutations(count: int, seed: int) -> list[str]:
    """See tests.mutations."""
    from tests.mutations import main as damaged_files

    return ["see above"] if damaged_files(count, seed) else []


def child(at: int, arguments: list[str]) -> int:
    """A run that is killed in the middle of an operation on files."""
    with Operations(die, at).watched():
        return microgpt(*arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("kills")
    command.set_defaults(run=kills)
    command.add_argument("--count", type=int, default=200)
    command.add_argument("--seed", type=int, default=0)
    commands.add_parser("writes").set_defaults(run=writes)
    command = commands.add_parser("soak")
    command.set_defaults(run=soak)
    command.add_argument("--steps", type=int, default=100_000)
    command = commands.add_parser("mutations")
    command.set_defaults(run=mutations)
    command.add_argument("--count", type=int, default=20_000)
    command.add_argument("--seed", type=int, default=0)
    options = vars(parser.parse_args(arguments))
    del options["command"]
    complaints = options.pop("run")(**options)
    for complaint in complaints:
        print(complaint)
    return 1 if complaints else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        sys.exit(child(int(sys.argv[2]), sys.argv[3:]))
    sys.exit(main())
