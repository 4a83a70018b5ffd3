"""What every command does for the terminal: signals, output, and errors in one line."""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn, TextIO

from microgpt.cli.whereabouts import refuse_another_copy
from microgpt.errors import MicrogptError, printable, raised_at
from microgpt.runs import signals
from microgpt.runs.launch import RANK, told
from microgpt.runs.signals import SIGNALLED, at_once

BROKEN_PIPE = 141  # 128 + SIGPIPE
NO_FORMULA = "no formula here"  # of a text that does not know an activation of the table
UNKNOWN_COMMAND = re.compile(r"argument COMMAND: invalid choice: '(.*)' \(choose from (.*)\)", re.S)

NO_NUMBER = re.compile(r"argument (.*): invalid (int|float) value: (.*)", re.S)
NUMBERS = {"int": "a whole number", "float": "a number"}


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage in front of it."""

    def error(self, message: str) -> NoReturn:
        if unknown := UNKNOWN_COMMAND.match(message):
            message = f"there is no command {unknown[1]}"
            if near := get_close_matches(unknown[1], re.findall(r"[\w-]+", unknown[2]), n=1):
                message += f"; did you mean {near[0]}"
        elif number := NO_NUMBER.match(message):
            message = f"{number[1]}: expected {NUMBERS[number[2]]}, got {number[3]}"
        if not told(RANK):  # one rank says it
            say(f"{self.prog}: error: {one_line(message)}; see {self.prog} --help", sys.stderr)
        sys.exit(2)

    def _print_message(self, message: str, file: Any = None) -> None:
        """Print help; argparse itself would not tell that the output takes none."""
        print(message, end="", file=file)


def directory(text: str) -> Path:
    """The path that an option names, which is not empty."""
    if not text:
        raise argparse.ArgumentTypeError("expected the name of a directory")
    return Path(text)


@contextlib.contextmanager
def page_libraries() -> Iterator[None]:
    """Raise MicrogptError, with what to install, if a library that makes pages is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise MicrogptError(
            f"pages need the library {error.name}, which is not there; install what they need"
            " with: python -m pip install jinja2 pygments"
        ) from None


def run(parser: Callable[[], argparse.ArgumentParser], arguments: Sequence[str] | None) -> int:
    """Run a command; returns the exit status, which is 2 for anything the user can mend.

    The options that the parser makes have `run`, the command as a function of them, and `parser`,
    its own one. A command whose options have `rest` gets there what its parser does not know.
    """
    return _printed(lambda: parser().prog, lambda: _parsed(parser(), arguments))


def guarded(program: str, command: Callable[[], int]) -> int:
    """The same for a command without options; `program` is what its errors begin with."""
    return _printed(lambda: program, lambda: _told(program, command))


def _printed(program: Callable[[], str], command: Callable[[], int]) -> int:
    """Run a command whose output may be closed, full, or read by no program any more."""
    status = None
    with _output():
        try:
            with at_once():
                status = command()
                sys.stdout.flush()
        except KeyboardInterrupt as interrupt:  # before the command began, or as it ended
            if status is None:
                say(f"{signals.program}: interrupted", sys.stderr)
            status = status or _signalled(interrupt)
            _silence()
        except OSError as error:
            if _unread(error):
                status = status or BROKEN_PIPE
            else:
                where = error.filename or "what is printed cannot be written"
                say(f"{program()}: error: {one_line(where)}: {error.strerror}", sys.stderr)
                status = status or 2
            _silence()
    return status or 0


def _parsed(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> int:
    """Run the command that the arguments name."""
    try:
        options, unknown = parser.parse_known_args(arguments)
        options.arguments = sys.argv[1:] if arguments is None else list(arguments)
        if hasattr(options, "rest"):
            options.rest = unknown
        elif unknown:
            options.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    except SystemExit as done:  # --help and --version are printed, mistakes explained
        return int(done.code or 0)
    return _told(options.parser.prog, lambda: int(options.run(options)))


def _told(program: str, command: Callable[[], int]) -> int:
    """Run a command that says in one line what ended it."""
    signals.program = program  # which a signal during an import says
    try:
        refuse_another_copy()
        return command()
    except MicrogptError as error:
        say(f"{program}: error: {one_line(error)}", sys.stderr)
        return 2
    except ValueError as error:
        if not str(error).startswith(NO_FORMULA):
            raise
        say(f"{program}: error: {raised_at(error)}: {one_line(error)}; write one", sys.stderr)
        return 2
    except MemoryError:
        say(
            f"{program}: error: there is not enough memory; try a smaller model, batch or"
            " block_size",
            sys.stderr,
        )
        return 2
    except SystemExit:  # no command of ours: its status would be taken for ours
        say(f"{program}: error: something that was called has ended the program", sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        say(f"{program}: interrupted", sys.stderr)
        return _signalled(interrupt)


def _unread(error: OSError) -> bool:
    """Whether the program that read the output has ended, on Windows an invalid argument."""
    invalid = error.errno == errno.EINVAL and error.filename is None
    return isinstance(error, BrokenPipeError) or (sys.platform == "win32" and invalid)


def _signalled(interrupt: KeyboardInterrupt) -> int:
    return SIGNALLED + int(getattr(interrupt, "number", signal.SIGINT))


class Plain:
    """A stream without the characters that a terminal takes for commands."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        return self.stream.write("\n".join(map(printable, text.split("\n"))))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def bare(stream: Any) -> TextIO:
    """The stream itself, for what has to command the terminal, such as a bar."""
    found: TextIO = getattr(stream, "stream", stream)
    return found


@contextlib.contextmanager
def _output() -> Iterator[None]:
    """Standard output as a Plain one that takes every character, closed or not."""
    for file in range(3):
        try:
            os.fstat(file)
        except OSError:  # closed; the next file to be opened would take its number
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed before this program began
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):  # a pipe may not take every character of a sample
        sys.stdout.reconfigure(errors="backslashreplace")
    before = sys.stdout
    sys.stdout = Plain(before)
    try:
        yield
    finally:
        sys.stdout = before


def _silence() -> None:
    """Let the interpreter's last flush go nowhere, since no program takes the output."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say(text: str, file: TextIO | None = None) -> None:
    """Print for a terminal that may have been closed."""
    with contextlib.suppress(OSError):
        print(text, file=file, flush=True)


def one_line(message: object) -> str:
    """A message as one line, whatever a path, a file or a server's answer in it may contain."""
    return printable(" ".join(str(message).splitlines()))
