"""The errors that are written for the person who meets them."""

CONTROLS = {i: repr(chr(i))[1:-1] for i in (*range(0x20), *range(0x7F, 0xA0))}


class MicrogptError(Exception):
    """Something the user can mend. The message says what is wrong, where, and what to do."""


def printable(text: str) -> str:
    """A text that came from outside, without what a terminal would take for a command."""
    return text.translate(CONTROLS)


def shortened(value: object, longest: int = 60) -> str:
    """A value as it is quoted in one line."""
    if isinstance(value, str):
        return repr(value) if len(value) <= longest else f"{value[:longest]!r}.."
    text = repr(value)
    return text if len(text) <= longest else f"{text[:longest]}.."
