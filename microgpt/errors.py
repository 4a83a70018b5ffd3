"""The errors that are written for the person who meets them."""

import sys

CONTROLS = {i: repr(chr(i))[1:-1] for i in (*range(0x20), *range(0x7F, 0xA0))}


class MicrogptError(Exception):
    """Something the user can mend. The message says what is wrong, where, and what to do."""


def raised_at(error: BaseException) -> str:
    """The line that raised an error, such as scalar/model.py:51."""
    from pathlib import Path
    from traceback import extract_tb

    last = extract_tb(error.__traceback__)[-1]
    return f"{'/'.join(Path(last.filename).parts[-2:])}:{last.lineno}"


def printable(text: str) -> str:
    """A text that came from outside, without what a terminal would take for a command."""
    return text.translate(CONTROLS)


def as_typed(word: object) -> str:
    """A word as a shell takes it: quoted if it has to be, for Windows in double quotes."""
    if sys.platform == "win32":
        from subprocess import list2cmdline

        return list2cmdline([str(word)])
    from shlex import quote

    return quote(str(word))


def shortened(value: object, longest: int = 60) -> str:
    """A value as it is quoted in one line."""
    if isinstance(value, str):
        return repr(value) if len(value) <= longest else f"{value[:longest]!r}.."
    text = repr(value)
    return text if len(text) <= longest else f"{text[:longest]}.."
