"""Ctrl-C, SIGTERM and a closed terminal: an end at once, or one between two steps."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Interrupted(KeyboardInterrupt):
    """A signal asked for the end."""

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {number}")
        self.number = number


@contextmanager
def at_once() -> Iterator[None]:
    """A signal raises Interrupted, wherever the program is."""

    def receive(number: int, frame: object) -> None:
        raise Interrupted(number)

    with _handled_by(receive):
        yield


@contextmanager
def between_steps() -> Iterator[list[int]]:
    """A list that is empty until the first signal; a second one raises Interrupted."""
    received: list[int] = []

    def receive(number: int, frame: object) -> None:
        if received:
            raise Interrupted(number)
        received.append(number)

    with _handled_by(receive):
        yield received


@contextmanager
def _handled_by(receive: Callable[[int, object], None]) -> Iterator[None]:
    before = {number: signal.signal(number, receive) for number in _numbers()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _numbers() -> list[int]:
    numbers: list[int] = [signal.SIGINT, signal.SIGTERM]
    # Windows has no SIGHUP, and nohup asks for it to be ignored
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    return numbers
