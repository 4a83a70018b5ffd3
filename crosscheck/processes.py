"""The tests of the crosscheck in several processes, each of which takes one test after another."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection, get_all_start_methods, get_context
from multiprocessing.connection import Connection
from typing import Any

import pytest
from _pytest.runner import runtestprotocol

MOST = 8  # processes; there are some twenty cases to share


def cores() -> int:
    """How many processes are of use on this machine."""
    if "fork" not in get_all_start_methods():
        return 1
    able = getattr(os, "sched_getaffinity", None)
    return min(MOST, len(able(0)) if able else os.cpu_count() or 1)


@dataclass
class Worker:
    """A process that runs tests, and the test that it is at."""

    process: Any
    pipe: Connection
    item: int = -1


def in_processes(
    items: Sequence[pytest.Item], count: int, choose: Callable[[list[int], list[int]], int]
) -> Iterator[tuple[int, list[Any], list[int]]]:
    """The number of each test, its reports as they come in, and the tests that are not done.

    choose    says which test is next, given those that wait and those that are running
    """
    context = get_context("fork")
    waiting = list(range(len(items)))
    workers = []
    for _ in range(min(count, len(items))):
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, items))
        with warnings.catch_warnings():  # threads of libraries are idle here
            warnings.simplefilter("ignore", DeprecationWarning)
            process.start()
        theirs.close()
        workers.append(Worker(process, ours))

    def begin(worker: Worker) -> None:
        if waiting:
            running = [one.item for one in workers if one.item >= 0]
            worker.item = choose(waiting, running)
            waiting.remove(worker.item)
            worker.pipe.send(worker.item)

    try:
        for worker in workers:
            begin(worker)
        while busy := {worker.pipe: worker for worker in workers if worker.item >= 0}:
            for pipe in connection.wait(list(busy)):
                worker = busy[pipe]  # type: ignore[index]
                done, worker.item = worker.item, -1
                try:
                    reports = worker.pipe.recv()
                except (EOFError, OSError):
                    worker.process.join()
                    code = worker.process.exitcode
                    raise pytest.UsageError(
                        f"the process that ran {items[done].nodeid} has ended ({code});"
                        " --processes 1 runs all tests in this one"
                    ) from None
                begin(worker)
                running = [one.item for one in workers if one.item >= 0]
                yield done, reports, [*waiting, *running]
    finally:
        for worker in workers:
            worker.pipe.close()
            worker.process.kill()
            worker.process.join()


def _serve(pipe: Connection, items: Sequence[pytest.Item]) -> None:
    """Runs in another process: a test for each number that comes, until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    config = items[0].config
    capture = config.pluginmanager.getplugin("capturemanager")
    if capture:  # files of its own for what tests print
        capture.stop_global_capturing()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        capture.start_global_capturing()
    with suppress(EOFError, OSError):
        while True:
            reports = runtestprotocol(items[pipe.recv()], log=False, nextitem=None)
            to_plain = config.hook.pytest_report_to_serializable
            pipe.send([to_plain(config=config, report=report) for report in reports])
