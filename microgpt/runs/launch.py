"""`--cores N`: the same command again as N ranks on this machine, which mpiexec starts.

This process stays with the terminal. Rank 0 writes to the output of this process, receives its
signals through a pipe, and takes the end of the pipe for SIGTERM: ranks do not outlive the command.

Every command imports this module before anything else, so it imports little itself.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from microgpt.errors import MicrogptError

INSTALL = "python -m pip install mpi4py mpich"
FILES = "MICROGPT_FILES"  # of the command, for its ranks: stdout, stderr, signals, answers
# what MPICH, Open MPI and Slurm tell a process
RANK = ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK")
SIZE = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE")
AGAIN = "import sys; sys.path[:] = {!r}; from microgpt.__main__ import main; sys.exit(main())"
# in the words of mpiexec: a process that a signal has ended, and the number of the signal
KILLED = re.compile(r"PID (\d+) RUNNING AT.*?EXIT STRING: [^\n]*\(signal (\d+)\)", re.DOTALL)

answers = -1  # the file in which rank 0 answers the command that has launched it


def told(names: Sequence[str]) -> int | None:
    """The number in the first of these variables that there is, if there is one."""
    return next((int(os.environ[name]) for name in names if name in os.environ), None)


def attach() -> None:
    """Take the output and the signals of the command, if this is a rank that it has launched."""
    global answers
    if FILES not in os.environ:
        return
    out, err, signals, answers = map(int, os.environ.pop(FILES).split())
    os.dup2(err, 2)
    if told(RANK) == 0:
        import threading

        os.dup2(out, 1)
        threading.Thread(target=_receive, args=(signals,), daemon=True).start()


def _receive(signals: int) -> None:
    """Every byte of the pipe is the number of a signal."""
    from threading import main_thread

    number = b"."
    while number:
        number = os.read(signals, 1)
        signal.pthread_kill(main_thread().ident or 0, ord(number or bytes([signal.SIGTERM])))


def answer(text: str) -> None:
    """Let the command know, if one has launched this rank."""
    if answers >= 0:
        os.write(answers, text.encode())


def launch(ranks: int, arguments: Sequence[str]) -> int:
    """Run the command of these arguments as so many ranks; returns its exit status.

    Raises MicrogptError if there is no MPI, or if a rank was killed.
    """
    import subprocess
    from tempfile import TemporaryFile

    from microgpt.runs.signals import handled_by

    command = [mpiexec(ranks), "-launcher", "fork", "-hosts", "localhost", "-n", str(ranks)]
    command += [sys.executable, "-c", AGAIN.format(sys.path), *arguments]
    signals, ours = os.pipe()
    with TemporaryFile() as said, TemporaryFile() as answered:

        def pids() -> list[int]:
            return list(map(int, os.pread(answered.fileno(), 1 << 16, 0).split()))

        def pass_on(number: int, _: object) -> None:
            os.write(ours, bytes([number]))

        files = [_copy(1), _copy(2), signals, answered.fileno()]
        with handled_by(pass_on), _stopped_together(pids):
            try:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=said,
                    stderr=said,
                    pass_fds=files,
                    env={**os.environ, FILES: " ".join(map(str, files))},
                    start_new_session=True,  # the terminal's signals come to this process alone
                )
            except OSError as error:
                raise MicrogptError(f"--cores {ranks}: {command[0]}: {error.strerror}") from None
            status = process.wait()
        said.seek(0)
        text = said.read().decode(errors="replace").strip()
        killed = KILLED.search(text)
        if killed and int(killed[1]) in pids():
            raise MicrogptError(
                f"rank {pids().index(int(killed[1]))} (process {killed[1]}) was killed by signal"
                f" {killed[2]}, perhaps for want of memory; go on from the last checkpoint with"
                " --resume"
            )
    if status and text:
        raise MicrogptError(f"--cores {ranks}: {text}")
    return status if status >= 0 else 128 - status


def mpiexec(ranks: int) -> str:
    """The mpiexec that belongs to this Python, or else the first on the path.

    Raises MicrogptError if there is none, or no mpi4py.
    """
    import shutil
    import sysconfig
    from importlib.util import find_spec

    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    found = shutil.which("mpiexec", path=path)
    if not found or find_spec("mpi4py") is None:
        raise MicrogptError(
            f"--cores {ranks}: ranks need MPI, which is not installed; install it with:"
            f" {INSTALL}; or use --cores 1"
        )
    return found


def _copy(file: int) -> int:
    """Another number for an open file, or for what takes anything if the file is closed."""
    try:
        return os.dup(file)
    except OSError:
        return os.open(os.devnull, os.O_WRONLY)


@contextmanager
def _stopped_together(pids: Any) -> Iterator[None]:
    """Ctrl-Z stops the ranks as well, until this process goes on."""

    def stop(number: int, frame: object) -> None:
        for number, which in ((signal.SIGSTOP, pids()), (signal.SIGCONT, pids())):
            for pid in which:
                os.kill(pid, number)
            if number == signal.SIGSTOP:
                os.kill(os.getpid(), number)

    before = signal.signal(signal.SIGTSTP, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTSTP, before)
