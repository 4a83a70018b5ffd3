"""Who works on a batch: this process, and on several cores others beside it.

Same as scalar:         the loss and the gradient of a batch are means over its documents.
Different from scalar:  one document after another -> shares of a batch, in micro-batches.

NumPy holds Python's lock for most of the time that a small array takes, so cores are used by
processes. They read the parameters where they lie, in memory that they share, and each writes its
gradient to memory that this process reads; what goes through a pipe is documents and losses.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.util
import os
import pickle
import select
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from time import perf_counter
from typing import Any

import numpy as np

from microgpt.backend import Docs
from microgpt.config import Config
from microgpt.errors import LostHelpError
from vectorized.batch import micro_batches
from vectorized.flat import Shapes
from vectorized.model import Array
from vectorized.replay import Replay, Step

AWAKE = 0.0002 if hasattr(os, "sched_yield") else 0.0  # seconds; waking takes a tenth of that


class Worker:
    """Finds what a share of a batch adds to the loss, and the gradient of that."""

    def __init__(self, config: Config, shapes: Shapes, flat: Array, flat_grads: Array) -> None:
        self.config = config
        self.flat_grads = flat_grads  # (P,), as flat
        self.replay = Replay(config, shapes, flat, flat_grads)
        # evaluation has memory of its own, so that it can come between forward and backward
        self.evaluation = Replay(config, shapes, flat, flat_grads)
        self.flat_sum = np.zeros(len(flat), flat.dtype)  # untouched pages take no memory
        self.summed = 0  # micro-batches of this batch whose gradient is in flat_sum
        self.last: Step | None = None  # whose backward pass is still to come

    def forward(self, docs: Docs, of: int) -> float:
        """The mean losses of these documents, added up, / `of` (documents of the whole batch).

        Of all micro-batches but the last, the backward pass is run at once: its arrays are in the
        cache, and the next micro-batch needs their memory.
        """
        *others, last = micro_batches(docs, self.config)
        loss, self.summed = 0.0, 0
        with np.errstate(all="ignore"):  # a loss that is not finite says it all
            for micro_batch in others:
                step = self.replay.training(micro_batch)
                loss += step.forward(micro_batch, of)
                step.backward()
                if self.summed:
                    self.flat_sum += self.flat_grads
                else:
                    self.flat_sum[:] = self.flat_grads
                self.summed += 1
            self.last = self.replay.training(last)
            return loss + self.last.forward(last, of)

    def backward(self) -> None:
        """The gradient of what forward returned, in flat_grads."""
        if self.last is None:
            return
        self.last.backward()
        self.last = None
        if self.summed:
            self.flat_grads += self.flat_sum

    def update(self, m: Array, v: Array, step: int, lr_t: float, factor: float) -> None:
        """An update by Adam with the gradient in flat_grads, times a factor."""
        self.replay.update(m, v, step, lr_t, factor)

    def losses(self, docs: Docs) -> Array:
        """The loss of every position: a row for each document, filled up with anything."""
        with np.errstate(all="ignore"):  # padding need not be finite
            return self.evaluation.losses(docs)


class Line:
    """One end of a pipe between two processes. receive() polls for AWAKE seconds, then sleeps.

    Waking up takes a good part of the time of a small batch. After a late message receive() does
    not poll: another program may need the core.
    """

    def __init__(self, pipe: Connection) -> None:
        self.pipe = pipe
        self.soon = True  # whether the last message came within AWAKE
        self.arrived: Callable[[int], Any] = pipe.poll
        if hasattr(select, "poll"):  # which is eight times as fast
            poll = select.poll()
            poll.register(pipe, select.POLLIN)
            self.arrived = poll.poll

    def send(self, message: Any) -> None:
        self.pipe.send_bytes(pickle.dumps(message))  # twice as fast as its own send()

    def receive(self) -> Any:
        began = perf_counter()
        while self.soon and not self.arrived(0) and perf_counter() < began + AWAKE:
            os.sched_yield()  # let other processes use this core
        message = self.pipe.recv_bytes()
        self.soon = perf_counter() < began + AWAKE
        return pickle.loads(message)


class Remote:
    """A Worker in its own process. begin() starts forward and backward, which run unasked."""

    def __init__(self, config: Config, shapes: Shapes, memory: Any) -> None:
        context = multiprocessing.get_context("spawn")
        grads = shared(len(memory))
        self.flat_grads = np.frombuffer(grads, config.dtype)  # (P,)
        ours, theirs = context.Pipe()
        self.line = Line(ours)
        self.answers = 0  # that are still to come
        self.started = False
        process = context.Process(
            target=serve, args=(theirs, config, shapes, memory, grads), daemon=True
        )
        with _deaf():
            process.start()
        theirs.close()
        # Kill the process when this object is deleted, or at exit before multiprocessing joins it
        # (0: early at exit). If this process is killed, the pipe closes and serve() returns.
        multiprocessing.util.Finalize(self, process.kill, exitpriority=0)

    def begin(self, docs: Docs, of: int) -> None:
        """Find the loss and the gradient of these documents."""
        while self.answers:  # left from a batch whose backward() was not called
            self._receive()
        with suppress(BrokenPipeError):  # there will be no answer, and that is dealt with
            self.line.send((docs, of))
        self.answers = 2

    def forward(self) -> float:
        """The loss, as soon as it is known."""
        return float(self._receive())

    def backward(self) -> None:
        """Wait until the gradient is in flat_grads."""
        self._receive()

    def _receive(self) -> Any:
        try:
            answer = self.line.receive()
        except (EOFError, ConnectionResetError, BrokenPipeError):
            raise LostHelpError(
                "--cores: a process that worked on a share of the batch has ended, for want of"
                " memory or because it was killed; go on with fewer cores"
                if self.started
                else "cores: a process that was to share the batch has not started; a script that"
                " asks for one needs `if __name__ == '__main__':`"
            ) from None
        self.answers -= 1
        self.started = True
        return answer


def serve(pipe: Connection, config: Config, shapes: Shapes, memory: Any, grads: Any) -> None:
    """Runs in the other process: forward and backward for each message, until the pipe closes."""
    flat, flat_grads = (np.frombuffer(numbers, config.dtype) for numbers in (memory, grads))
    worker, line = Worker(config, shapes, flat, flat_grads), Line(pipe)
    with suppress(EOFError, OSError, MemoryError):  # the parent will miss the answer
        while True:
            line.send(worker.forward(*line.receive()))
            worker.backward()
            line.send(None)


def deal(docs: Docs, shares: int) -> list[Docs]:
    """Deal documents into shares of about equal work; the first share is the largest.

    Where there are fewer documents than shares, the last ones are empty.
    """
    if shares == 1:
        return [docs]
    ordered = sorted(docs, key=len, reverse=True)
    return [ordered[first::shares] for first in range(shares)]


def shared(size: int) -> Any:
    """That many bytes, which other processes can be given."""
    return multiprocessing.get_context("spawn").RawArray("b", size)


@contextmanager
def _deaf() -> Iterator[None]:
    """A process started here ignores Ctrl-C, SIGTERM and SIGHUP; its parent ends it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # multiprocessing's own, whose start would undo the mask
    heard = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, heard)
