"""The errors that are written for the person who meets them."""

import re


class MicrogptError(Exception):
    """Something the user can mend. The message says what is wrong, where, and what to do."""


class LostHelpError(MicrogptError):
    """A process that helped has gone; the model is as the last update left it."""


def printable(text: str) -> str:
    """A text that came from outside, without what a terminal would take for a command."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda control: repr(control[0])[1:-1], text)


def shortened(value: object, longest: int = 60) -> str:
    """A value as it is quoted in one line."""
    if isinstance(value, str):
        return repr(value) if len(value) <= longest else f"{value[:longest]!r}.."
    text = repr(value)
    return text if len(text) <= longest else f"{text[:longest]}.."
