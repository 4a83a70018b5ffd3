"""Ctrl-C, SIGTERM and a closed terminal: an end at once, or one between two steps.

The entry of a command imports this module before anything else, so it imports little itself.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from microgpt.runs.launch import RANK, told

exit_now = os._exit  # os._exit itself is another function while a candidate runs
SIGNALLED = 128  # exit status of a signal, less its number, as in shells

program = "microgpt"  # with which the last line begins


class Interrupted(KeyboardInterrupt):
    """A signal asked for the end."""

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {number}")
        self.number = number


def begin(name: str) -> None:
    """From now on a signal or a lack of memory ends this process in one line.

    A command that has begun handles both itself.
    """
    global program
    program = name
    sys.unraisablehook = _not_lost(sys.unraisablehook)
    sys.excepthook = _out_of_memory(sys.excepthook)
    for number in _numbers():
        signal.signal(number, signal.SIG_IGN if told(RANK) else end)  # rank 0 speaks for all


def end(number: int, frame: object = None) -> None:
    """End the process here and now, as a kill would, in one line."""
    _end("interrupted", SIGNALLED + number)


def _end(last_words: str, status: int) -> None:
    for number in _numbers():  # a signal that comes meanwhile would print a second line
        signal.signal(number, signal.SIG_IGN)
    with suppress(OSError):
        if sys.stderr is not None:  # if it was closed, file 2 may be any file
            os.write(2, f"{program}: {last_words}\n".encode())
    exit_now(status)


@contextmanager
def at_once() -> Iterator[None]:
    """A signal raises Interrupted, wherever the program is, but ends the process in an import.

    An exception raised in an import could become another: NumPy makes ImportErrors of them.
    """

    if told(RANK):  # rank 0 ends the others
        yield
        return

    def receive(number: int, frame: FrameType | None) -> None:
        if _importing(frame):
            end(number)
        raise Interrupted(number)

    with handled_by(receive):
        yield


@contextmanager
def between_steps() -> Iterator[list[int]]:
    """A list that is empty until the first signal; a second one raises Interrupted."""
    received: list[int] = []

    def receive(number: int, frame: object) -> None:
        if received:
            raise Interrupted(number)
        received.append(number)

    with handled_by(receive):
        yield received


@contextmanager
def handled_by(receive: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Let this function receive the signals."""
    before = {number: signal.getsignal(number) for number in _numbers()}
    try:
        for number in before:
            signal.signal(number, receive)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _numbers() -> list[int]:
    numbers: list[int] = [signal.SIGINT, signal.SIGTERM]
    # a closed terminal sends SIGHUP, or on Windows SIGBREAK; nohup asks for it to be ignored
    for name in ("SIGHUP", "SIGBREAK"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            numbers.append(number)
    return numbers


def _importing(frame: FrameType | None) -> bool:
    """Whether a module is being imported."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _not_lost(
    before: Callable[[sys.UnraisableHookArgs], object],
) -> Callable[[sys.UnraisableHookArgs], object]:
    """What Python does with an exception that it cannot raise, as in a __del__."""

    def hook(unraisable: sys.UnraisableHookArgs) -> object:
        if isinstance(unraisable.exc_value, Interrupted):
            end(unraisable.exc_value.number)
        return before(unraisable)

    return hook


def _out_of_memory(before: Callable[..., object]) -> Callable[..., object]:
    """What Python does with an exception that no function has caught, as of an import."""

    def hook(kind: type[BaseException], error: BaseException, trace: object) -> object:
        if isinstance(error, MemoryError):
            _end("error: there is not enough memory", 2)
        return before(kind, error, trace)

    return hook
