"""Ranks: processes that train one model together by MPI, each on its share of every batch.

Rank 0 is the run: it reads, decides, writes and prints, as one process does. The other ranks hear
from rank 0 what to train, take every step with it, and end when it ends.
"""

from __future__ import annotations

import os
import sys
from array import array
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Event, Thread
from time import perf_counter, sleep
from typing import Any, Protocol

from microgpt.errors import MicrogptError, raised_at
from microgpt.runs import launch

AWAKE, NAP = 0.0003, 0.01  # seconds of polling before the first nap, and of the longest nap
BEAT, MISSING = 1.0, 10  # seconds between signs of life, and how many of them may be missing


class Comm(Protocol):
    """What ranks need of MPI. All ranks call the same methods in the same order."""

    @property
    def rank(self) -> int:
        """The number of this rank, from 0."""

    @property
    def size(self) -> int:
        """How many ranks there are."""

    def send(self, array: Any) -> None:
        """Copy the array of rank 0 into the array of every other rank."""

    def swap(self, rows: Any, out: Any) -> None:
        """Send row r to rank r; `out` receives one row from every rank, in the order of ranks."""

    def gather(self, row: Any, out: Any) -> None:
        """Send this row to all ranks; `out` receives all rows, in the order of ranks."""


class AgreedError(MicrogptError):
    """A refusal that all ranks know of."""


class Alone:
    """One process: all ranks that there are."""

    rank, size = 0, 1
    here = 1  # ranks on this machine

    def send(self, array: Any) -> None:
        pass

    def swap(self, rows: Any, out: Any) -> None:
        out[:] = rows

    def gather(self, row: Any, out: Any) -> None:
        out[0] = row

    def tell(self, message: Any = None) -> Any:
        """The message of rank 0, on every rank."""
        return message

    def any(self, own: bool) -> bool:
        """Whether `own` is true on any rank."""
        return own

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """A MicrogptError that one rank raises in here is raised on all ranks, as AgreedError."""
        yield

    @contextmanager
    def failing(self) -> Iterator[None]:
        """End all ranks if what follows fails on one, with a line that says on which."""
        yield

    def end(self, status: int) -> None:
        """End this rank; with an exit status other than 0, all of them."""


ALONE = Alone()
_joined = ALONE


def joined() -> Alone:
    """The ranks that mpiexec has started, or this process alone."""
    global _joined
    if _joined is ALONE and launch.told(launch.RANK) is not None:
        _joined = World()
    return _joined


def end(status: int) -> int:
    """The exit status of this rank; all ranks end if it is not 0."""
    _joined.end(status)
    return status


class World(Alone):
    """The ranks that mpiexec has started."""

    def __init__(self) -> None:
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:
            raise MicrogptError(
                f"ranks need MPI, which is not here ({error}); install it with: {launch.INSTALL}"
            ) from None
        self.mpi, self.comm = MPI, MPI.COMM_WORLD
        self.rank, self.size = self.comm.rank, self.comm.size
        started = launch.told(launch.SIZE) or self.size
        if self.size != started:
            raise MicrogptError(
                f"mpiexec has started {started} processes, and mpi4py sees {self.size}: they belong"
                " to different MPI libraries; use the mpiexec that was installed with mpi4py"
            )
        host, self.pulse = MPI.Get_processor_name(), self.comm.Dup()
        pids: list[tuple[str, int]] = self.comm.allgather((host, os.getpid()))
        self.here = sum(there == host for there, _ in pids)
        self.names = [f"rank {r} (process {pid} on {on})" for r, (on, pid) in enumerate(pids)]
        self.over = Event()
        self.watch = Thread(target=self._watch, daemon=True)
        self.watch.start()

    def send(self, array: Any) -> None:
        self._wait(self.comm.Ibcast(array))

    def swap(self, rows: Any, out: Any) -> None:
        self._wait(self.comm.Ialltoall(rows, out))

    def gather(self, row: Any, out: Any) -> None:
        self._wait(self.comm.Iallgather(row, out))

    def tell(self, message: Any = None) -> Any:
        self._wait(self.comm.Ibarrier())
        return self.comm.bcast(message)

    def any(self, own: bool) -> bool:
        said = array("i", [own])
        self._wait(self.comm.Iallreduce(self.mpi.IN_PLACE, said, self.mpi.MAX))
        return bool(said[0])

    @contextmanager
    def agreed(self) -> Iterator[None]:
        refusal = ""
        try:
            yield
        except MicrogptError as error:
            refusal = f"{self.names[self.rank]}: {error}" if self.rank else str(error)
        self._wait(self.comm.Ibarrier())
        refusals = [said for said in self.comm.allgather(refusal) if said]
        if refusals:
            raise AgreedError(refusals[0])

    @contextmanager
    def failing(self) -> Iterator[None]:
        try:
            yield
        except (MicrogptError, OSError, KeyboardInterrupt) as error:
            if self.rank == 0:
                raise  # the command says it
            if not isinstance(error, AgreedError):
                self._fail(f"{self.names[self.rank]}: {error}")
        except MemoryError:
            self._fail(
                f"{self.names[self.rank]}: there is not enough memory; try a smaller model, batch"
                " or block_size"
            )
        except Exception as error:
            said = f"{raised_at(error)}: {type(error).__name__}: {error}"
            self._fail(f"{self.names[self.rank]}: {said}")

    def end(self, status: int) -> None:
        if status:
            with suppress(OSError, ValueError):
                sys.stdout.flush()
            sleep(launch.LAST_WORDS)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # MPI would say more
            self.comm.Abort(status)
        self._wait(self.comm.Ibarrier())  # for rank 0, which has more to do than the others
        self.over.set()
        self.watch.join()
        self._wait(self.comm.Ibarrier())
        self._signs_of_life()
        self.mpi.Finalize()

    def _fail(self, why: str) -> None:
        if self.rank:  # rank 0 ends all ranks; where all fail alike, one of them says so
            sleep(2 * launch.LAST_WORDS)
        with suppress(OSError):
            os.write(2, f"microgpt: error: {why}\n".encode())
        self.end(2)

    def _wait(self, request: Any) -> None:
        """Wait for the other ranks; after a while, leave the core to other programs."""
        began = perf_counter()
        while not request.Test():
            waited = perf_counter() - began
            if waited > AWAKE:
                sleep(min(waited / 10, NAP))

    def _watch(self) -> None:
        """Exchange signs of life with rank 0, in a thread; fail where they are missing.

        A rank gives them while it computes, writes or waits, but not while it is stopped or its
        machine is out of reach. If all ranks are stopped, none misses the others.
        """
        others = [0] if self.rank else list(range(1, self.size))
        missing = dict.fromkeys(others, 0)
        parent = os.getppid()  # see microgpt.runs.launch
        while not self.over.wait(BEAT):
            for other in others:
                self.pulse.Isend(b"", other).Free()
                missing[other] += 1
            if os.getppid() != parent:
                self._fail(f"the parent of {self.names[self.rank]} was killed")
            for other in self._signs_of_life():
                missing[other] = 0
            patience = MISSING + 3 * self.rank  # of several ranks that miss rank 0, one says so
            lost = [other for other in others if missing[other] > patience]
            if lost:
                self._fail(
                    f"{self.names[lost[0]]} gives no sign of life: it was stopped, or its machine"
                    " cannot be reached; go on from the last checkpoint with --resume"
                )

    def _signs_of_life(self) -> set[int]:
        """The ranks that have given one since the last call."""
        found, status = set(), self.mpi.Status()
        while self.pulse.Iprobe(status=status):
            self.pulse.Recv(bytearray(), status.source)
            found.add(status.source)
        return found
