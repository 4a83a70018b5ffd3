"""`--cores N`: the same command again as N ranks on this machine, which mpiexec starts.

This process stays with the terminal. Rank 0 writes to the output of this process, receives its
signals through a pipe, and takes the end of the pipe for SIGTERM: ranks do not outlive the command.

Every command imports this module before anything else, so it imports little itself.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from microgpt.errors import MicrogptError

INSTALL = "python -m pip install mpi4py mpich"
FILES = "MICROGPT_FILES"  # of the command, for its ranks: stdout, stderr, signals, process ids
# what MPICH, Open MPI and Slurm tell a process
RANK = ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK")
SIZE = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE")
MAIN = "from microgpt.__main__ import main; sys.exit(main())"

SAID = "microgpt: error: "
LAST_WORDS = 0.3  # seconds in which mpiexec passes on what a rank has printed, before all end


def told(names: Sequence[str]) -> int | None:
    """The number in the first of these environment variables that is set; None if none is."""
    return next((int(os.environ[name]) for name in names if name in os.environ), None)


def begin() -> None:
    """Where mpiexec has started this process, go on as a rank in a child process.

    This process stays behind to say which rank it was if a signal ends the rank: what mpiexec
    itself says then is often about another one.
    """
    if told(RANK) is None or not hasattr(os, "fork"):  # on Windows this process is the rank
        return
    rank = os.fork()
    if rank:
        _outlive(rank)
    if FILES in os.environ:
        _attach(*map(int, os.environ.pop(FILES).split()))


def _outlive(rank: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the rank has them as well
        signal.signal(number, signal.SIG_IGN)
    if FILES in os.environ:
        import threading

        signals = int(os.environ[FILES].split()[2])
        threading.Thread(target=_wake, args=(rank, signals), daemon=True).start()
    status = os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1])
    if status >= 0:
        os._exit(status)
    memory = ", perhaps for want of memory" if status == -signal.SIGKILL else ""
    said = (
        f"rank {told(RANK)} (process {rank} on {os.uname().nodename}) was killed by signal"
        f" {-status}{memory}; go on from the last checkpoint with --resume"
    )
    os.write(2, f"{SAID}{said}\n".encode())
    time.sleep(LAST_WORDS)
    if "PMI_FD" in os.environ:  # the way of MPICH to end all ranks without further comment
        os.write(int(os.environ["PMI_FD"]), b"cmd=abort exitcode=2\n")
        signal.pause()
    os._exit(2)


def _wake(rank: int, signals: int) -> None:
    """Continue a rank, if it was stopped, when the command that has launched it is killed."""
    import select

    end = select.poll()
    end.register(signals, 0)  # nothing but the end of the pipe
    end.poll()
    os.kill(rank, signal.SIGCONT)


def _attach(out: int, err: int, signals: int, pids: int) -> None:
    """Take the output and the signals of the command that has launched this rank."""
    os.write(pids, f"{os.getpid()}\n".encode())
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


def launch(ranks: int, arguments: Sequence[str]) -> int:
    """Run the command with these arguments as `ranks` ranks; returns the exit status.

    Raises MicrogptError if there is no MPI, or if a rank was killed.
    """
    import subprocess
    from tempfile import TemporaryFile

    from microgpt.runs.signals import handled_by

    command = command_of(ranks, MAIN, *arguments)
    signals, ours = os.pipe()
    with TemporaryFile() as said, TemporaryFile(buffering=0) as pids:

        def pass_on(number: int, _: object) -> None:
            os.write(ours, bytes([number]))

        files = [_copy(1), _copy(2), signals, pids.fileno()]
        with handled_by(pass_on), _stopped_together(pids.fileno()):
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
    if status and text:
        raise MicrogptError(
            text.partition(SAID)[2].partition("\n")[0] or f"--cores {ranks}: {text}"
        )
    return status if status >= 0 else 128 - status


def command_of(ranks: int, program: str, *arguments: str) -> list[str]:
    """The command line that starts a Python program as `ranks` ranks on this machine.

    Raises MicrogptError if MPI is not installed.
    """
    if sys.platform == "win32":  # which cannot hand open files on to ranks
        raise MicrogptError(
            f"--cores {ranks}: on Windows type mpiexec -n {ranks} before the command and leave"
            " --cores out; or use --cores 1"
        )
    found = mpiexec()
    if not found:
        raise MicrogptError(
            f"--cores {ranks}: ranks need MPI, which is not installed; install it with:"
            f" {INSTALL}; or use --cores 1"
        )
    here = f"import sys; sys.path[:] = {sys.path!r}; {program}"
    start = [found, "-launcher", "fork", "-hosts", "localhost", "-n", str(ranks)]
    return [*start, sys.executable, "-c", here, *arguments]


def mpiexec() -> str | None:
    """The mpiexec of this Python, or else the first on the path; None: no MPI, or Windows."""
    import shutil
    import sysconfig
    from importlib.util import find_spec

    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    usable = sys.platform != "win32" and find_spec("mpi4py")
    return shutil.which("mpiexec", path=path) if usable else None


def _copy(file: int) -> int:
    """A duplicate of a file descriptor, or of the null device if that file is closed."""
    try:
        return os.dup(file)
    except OSError:
        return os.open(os.devnull, os.O_WRONLY)


@contextmanager
def _stopped_together(pids: int) -> Iterator[None]:
    """Ctrl-Z stops the ranks as well, until this process goes on."""

    def stop(_: int, frame: object) -> None:
        ranks = list(map(int, os.pread(pids, 1 << 16, 0).split()))
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for rank in ranks:
                os.kill(rank, number)
            if number == signal.SIGSTOP:
                os.kill(os.getpid(), number)

    before = signal.signal(signal.SIGTSTP, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTSTP, before)
