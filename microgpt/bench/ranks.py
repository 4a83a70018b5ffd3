"""vectorized on several ranks, for `microgpt bench`: they run beside it and do what it asks."""

from __future__ import annotations

import os
import pickle
import weakref
from collections.abc import Sequence
from contextlib import suppress
from subprocess import DEVNULL, Popen
from time import perf_counter
from typing import Any

import numpy as np

from microgpt.backend import Docs, State, Tensors, load_backend
from microgpt.config import Config
from microgpt.errors import MicrogptError
from microgpt.runs.launch import command_of
from microgpt.runs.ranks import joined

PIPES = "MICROGPT_BENCH"  # the files in which rank 0 reads and answers
REDUCTIONS = 100


class OnRanks:
    """As much of a Backend (microgpt.backend) as a benchmark needs, on config.cores ranks."""

    def __init__(self, config: Config, state: State) -> None:
        theirs, ours = os.pipe()
        answers, answer = os.pipe()
        self.process = Popen(
            command_of(config.cores, "from microgpt.bench.ranks import serve; serve()"),
            stdin=DEVNULL,
            stdout=DEVNULL,
            stderr=DEVNULL,
            pass_fds=(theirs, answer),
            env={**os.environ, PIPES: f"{theirs} {answer}"},
        )
        os.close(theirs)
        os.close(answer)
        self.asked, self.answers = os.fdopen(ours, "wb"), os.fdopen(answers, "rb")
        weakref.finalize(self, _end, self.process, self.asked, self.answers)
        params, m, v = (
            {name: np.asarray(tensor) for name, tensor in tensors.items()}
            for tensors in (state.params, state.m, state.v)
        )
        self._ask("begin", config, State(params, m, v, state.updates))

    def forward(self, docs: Docs) -> float:
        return self._ask("forward", docs)

    def backward(self) -> None:
        self._ask("backward")

    def update(self, lr_t: float) -> None:
        self._ask("update", lr_t)

    def grads(self) -> Tensors:
        return self._ask("grads")

    def state(self) -> State:
        return self._ask("state")

    def steps(self, batches: Sequence[Docs], lr_t: float) -> float:
        """Seconds that a step on each of these batches takes, all together."""
        return self._ask("steps", batches, lr_t)

    def reduction(self) -> float:
        """Seconds that it takes to add up the gradients of all ranks, a median."""
        return self._ask("reduction")

    def _ask(self, *message: Any) -> Any:
        try:
            pickle.dump(message, self.asked)
            self.asked.flush()
            answer = pickle.load(self.answers)
        except (OSError, EOFError):
            raise MicrogptError("--cores: the ranks have ended; go on with fewer cores") from None
        if isinstance(answer, Exception):
            raise answer
        return answer


def _end(process: Popen[bytes], asked: Any, answers: Any) -> None:
    for file in (asked, answers):  # at the end of which the ranks end
        with suppress(OSError):
            file.close()
    process.wait()


class Rank:
    """One of the ranks: a Backend, and what is timed on it."""

    def begin(self, config: Config, state: State) -> None:
        self.backend: Any = load_backend("vectorized", config, state, comm=joined())

    def steps(self, batches: Sequence[Docs], lr_t: float) -> float:
        start = perf_counter()
        for docs in batches:
            self.backend.forward(docs)
            self.backend.backward()
            self.backend.update(lr_t)
        return perf_counter() - start

    def reduction(self) -> float:
        self.backend.flat_grads.fill(0.0)
        seconds = []
        for _ in range(REDUCTIONS):
            joined().any(False)  # all begin together
            start = perf_counter()
            self.backend.sums.gradient()
            seconds.append(perf_counter() - start)
        return float(np.median(seconds))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)


def serve() -> None:
    """Runs as every rank: does what rank 0 reads, and answers from there."""
    ranks, rank = joined(), Rank()
    asked, answers = (
        os.fdopen(int(number), mode)
        for number, mode in zip(os.environ[PIPES].split(), ("rb", "wb"))
    )
    while message := ranks.tell(_read(asked) if ranks.rank == 0 else None):
        method, *arguments = message
        try:
            with np.errstate(all="ignore"):
                answer = getattr(rank, method)(*arguments)
        except Exception as error:
            answer = error
        if ranks.rank == 0:
            pickle.dump(answer, answers)
            answers.flush()
    ranks.end(0)


def _read(asked: Any) -> Any:
    try:
        return pickle.load(asked)
    except EOFError:
        return None
