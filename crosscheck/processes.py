"""The tests of the crosscheck in several processes; each process runs one test after another."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection, get_all_start_methods, get_context
from multiprocessing.connection import Connection
from typing import Any

import pytest

MOST = 8  # processes; about twenty cases are shared among them


def can_fork() -> bool:
    """Whether this system can copy a process; Windows cannot."""
    return "fork" in get_all_start_methods()


def cores() -> int:
    """How many processes make the tests faster on this machine."""
    if not can_fork() or sys.platform == "darwin":  # the BLAS of macOS does not survive a fork
        return 1
    able = getattr(os, "sched_getaffinity", None)
    return min(MOST, len(able(0)) if able else os.cpu_count() or 1)


@dataclass
class Worker:
    """A process that runs tests, and the number of the test that runs in it; -1 for none."""

    process: Any
    pipe: Connection
    item: int = -1


def in_processes(
    items: Sequence[pytest.Item], count: int, choose: Callable[[list[int], list[int]], int]
) -> Iterator[tuple[int, list[Any], list[int]]]:
    """The number of each test that is done, its reports, and the numbers of those not yet done.

    choose    gives the next test, from those that wait and those that run

    If the process of a test ends, a report of that test says so, and another process is started.
    """
    waiting = list(range(len(items)))
    workers = [_started(items) for _ in range(min(count, len(items)))]

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
                done = worker.item
                try:
                    reports = worker.pipe.recv()
                except (EOFError, OSError):
                    worker.process.join()
                    reports = [_ended(items[done], worker.process.exitcode)]
                    workers.remove(worker)
                    worker = _started(items)
                    workers.append(worker)
                worker.item = -1
                begin(worker)
                running = [one.item for one in workers if one.item >= 0]
                yield done, reports, [*waiting, *running]
    finally:
        for worker in workers:
            worker.pipe.close()
            worker.process.kill()
            worker.process.join()


def _started(items: Sequence[pytest.Item]) -> Worker:
    """A new process, which waits for the number of a test."""
    context = get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, items))
    with warnings.catch_warnings():  # a fork beside threads is warned of; the libraries' are idle
        warnings.simplefilter("ignore", DeprecationWarning)
        process.start()
    theirs.close()
    return Worker(process, ours)


def _ended(item: pytest.Item, code: int) -> Any:
    """The report of a test whose process has ended, as a mapping."""
    words = (
        f"the process that ran this test has ended, with exit code {code};\n"
        "--processes 1 runs all tests in this one"
    )
    report = pytest.TestReport(item.nodeid, item.location, {}, "failed", words, "call")
    return item.config.hook.pytest_report_to_serializable(config=item.config, report=report)


class _Reports:
    """A plugin that keeps the reports of the test that runs."""

    def __init__(self) -> None:
        self.kept: list[Any] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.kept.append(report)


def _serve(pipe: Connection, items: Sequence[pytest.Item]) -> None:
    """Run a test for each number that comes through the pipe, until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C: the parent ends this process
    config = items[0].config
    capture = config.pluginmanager.getplugin("capturemanager")
    if capture:  # what tests print goes into files of this process
        capture.stop_global_capturing()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        capture.start_global_capturing()
    for name in ("terminalreporter", "crosscheck-session"):  # they report in the parent alone
        config.pluginmanager.unregister(name=name)
    reports = _Reports()
    config.pluginmanager.register(reports)
    to_plain = config.hook.pytest_report_to_serializable
    with suppress(EOFError, OSError):
        while True:
            item = items[pipe.recv()]
            reports.kept.clear()
            item.ihook.pytest_runtest_protocol(item=item, nextitem=None)
            pipe.send([to_plain(config=config, report=one) for one in reports.kept])
