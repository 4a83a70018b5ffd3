"""Ranks in the threads of one process, so that batches are shared without MPI."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, BrokenBarrierError
from typing import Any

import numpy as np

from microgpt.backend import Backend, Docs, State, Tensors, load_backend
from microgpt.config import Config

SECONDS = 60  # after which a rank that waits for the others gives up


class Thread:
    """The communication of a rank (microgpt.runs.ranks.Comm), between threads."""

    def __init__(self, rank: int, rows: list[Any], barrier: Barrier) -> None:
        self.rank, self.size = rank, len(rows)
        self.rows, self.barrier = rows, barrier

    def send(self, array: Any) -> None:
        array[:] = self._of_all(array)[0]

    def swap(self, rows: Any, out: Any) -> None:
        out[:] = [theirs[self.rank] for theirs in self._of_all(rows)]

    def gather(self, row: Any, out: Any) -> None:
        out[:] = self._of_all(row)

    def _of_all(self, array: Any) -> list[Any]:
        """The arrays that all ranks have brought, in the order of the ranks."""
        self.rows[self.rank] = np.array(array)
        self.barrier.wait(SECONDS)
        found = list(self.rows)
        self.barrier.wait(SECONDS)  # before a rank writes its next array
        return found


class Together:
    """A Backend (microgpt.backend) on several ranks; a number is NaN where the ranks differ.

    Only rank 0 begins with the given state, and has to send the state to the other ranks.
    """

    def __init__(self, name: str, config: Config, state: State) -> None:
        self.threads = ThreadPoolExecutor(config.cores)
        self.barrier = Barrier(config.cores)
        rows: list[Any] = [None] * config.cores
        params, m, v = map(_another, (state.params, state.m, state.v))
        other = State(params, m, v, state.updates)

        def begin(rank: int) -> Backend:
            comm = Thread(rank, rows, self.barrier)
            return load_backend(name, config, other if rank else state, comm=comm)

        self.ranks: list[Any] = self._all(begin, range(config.cores))

    def forward(self, docs: Docs) -> float:
        losses = self._all(lambda rank: rank.forward(docs), self.ranks)
        return float(_where_alike(losses))

    def backward(self) -> None:
        self._all(lambda rank: rank.backward(), self.ranks)

    def update(self, lr_t: float) -> None:
        self._all(lambda rank: rank.update(lr_t), self.ranks)

    def set_grads(self, grads: Tensors) -> None:
        self._all(lambda rank: rank.set_grads(grads), self.ranks)

    def grads(self) -> Tensors:
        return _alike([rank.grads() for rank in self.ranks])

    def state(self) -> State:
        states = [rank.state() for rank in self.ranks]
        params, m, v = (
            _alike([getattr(state, kind) for state in states]) for kind in ("params", "m", "v")
        )
        return State(params, m, v, states[0].updates)

    def __getattr__(self, name: str) -> Any:
        """Evaluation, reading and sampling, which rank 0 does alone."""
        return getattr(self.ranks[0], name)

    def _all(self, do: Callable[[Any], Any], ranks: Iterable[Any]) -> list[Any]:
        """The result of each rank.

        If ranks raise exceptions, one is raised again; not one of a rank that waited for another.
        """
        self.barrier.reset()

        def guarded(rank: Any) -> Any:
            with np.errstate(all="ignore"):
                try:
                    return do(rank)
                except BaseException:
                    self.barrier.abort()  # the others need not wait for this rank
                    raise

        futures = [self.threads.submit(guarded, rank) for rank in ranks]
        errors = [error for future in futures if (error := future.exception())]
        for error in sorted(errors, key=lambda error: isinstance(error, BrokenBarrierError)):
            raise error
        return [future.result() for future in futures]


def _alike(several: Sequence[Tensors]) -> Tensors:
    """The tensors of the first rank, with NaN where another rank has other numbers."""
    return {name: _where_alike([tensors[name] for tensors in several]) for name in several[0]}


def _where_alike(arrays: Sequence[Any]) -> Any:
    """The first array, with NaN where another array has another number."""
    first, *others = map(np.asarray, arrays)
    same = np.all([first == other for other in others], axis=0)
    return np.where(same, first, np.nan)


def _another(tensors: Tensors) -> Tensors:
    """Tensors of other numbers."""
    return {name: np.asarray(tensor) + 1.0 for name, tensor in tensors.items()}
