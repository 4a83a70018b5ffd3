"""How a side stops in a step: what it raised, in which of its lines, after which tap.

A side is one of the two implementations that are compared.
"""

from __future__ import annotations

import linecache
import struct
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import patch

import numpy as np

from microgpt.cli.whereabouts import IMPLEMENTATIONS, imported_from
from microgpt.config import Config
from microgpt.layout import Tree, tap_names, written

REFUSED = "RecordingError"  # see vectorized/record.py
# a NaN that no computation gives; copies, sums and float32 keep the bits that it is known by
MARK: float = struct.unpack("<d", struct.pack("<Q", 0x7FF8_5EED_0000_0000))[0]
LONGEST_MESSAGE = 200  # characters of an error's message that a report quotes


@dataclass(frozen=True)
class Stop:
    """Where and why a side stopped."""

    side: str  # "scalar" or "vectorized"
    error: str  # the exception and its message, in one line
    line: str = ""  # "vectorized/model.py:52", the side's innermost line
    text: str = ""  # the source of that line
    function: str = ""
    last: str = ""  # the last tap or derivative that it wrote
    empty: bool = False  # whether `last` is None, since a function returned nothing
    callers: tuple[str, ...] = ()  # the calls of the text that led to the line, the innermost first

    @property
    def refused(self) -> bool:
        """Whether vectorized/record.py could not record the text, whose numbers may be right."""
        return self.error.startswith(REFUSED)

    @property
    def not_finite(self) -> bool:
        """Whether the side itself refused a number that is not finite."""
        return self.error.startswith("FloatingPointError")


class IncompleteError(Exception):
    """A side has stopped in a step; `step` holds the tensors that the side computed before."""

    def __init__(self, step: dict[str, Any], stop: Stop) -> None:
        super().__init__(f"{stop.side} stops: {stop.error}")
        self.step, self.stop = step, stop


def then_stopped(steps: Sequence[Any], stopped: IncompleteError | None) -> Iterator[Any]:
    """The steps of a side again; if it stopped in the last, the error in place of that step."""
    yield from steps[: len(steps) - bool(stopped)]
    if stopped:
        raise stopped


def stop_of(error: BaseException, config: Config | None = None) -> Stop | None:
    """Where a side raised an exception; None if the exception passed through no line of a side.

    config    the configuration of the model, for the names of its taps
    """
    if isinstance(error, IncompleteError):
        return error.stop
    first = str(error).strip().partition("\n")[0]
    refused = type(error).__name__ == REFUSED
    if refused:  # the message begins with the line, which is reported by itself
        first = first.partition(": ")[2] or first
    words = f"{type(error).__name__}: {first[:LONGEST_MESSAGE]}" if first else type(error).__name__
    if isinstance(error, SyntaxError) and error.filename:
        place = _own(error.filename)
        if place:
            side, file = place
            words, text = f"{type(error).__name__}: {error.msg}", (error.text or "").strip()
            return Stop(side, words, f"{file}:{error.lineno}", text)
    frames = list(traceback.walk_tb(error.__traceback__))
    own = [(frame, line) for frame, line in frames if _own(frame.f_code.co_filename)]
    if not own:
        return None
    if refused:  # the line of the text, not that of the recorder
        own = [one for one in own if Path(one[0].f_code.co_filename).name != "record.py"] or own
    frame, line = own[-1]
    side, file = _own(frame.f_code.co_filename) or ("", "")
    text = linecache.getline(frame.f_code.co_filename, line).strip()
    last, empty = _last_written([frame for frame, _ in own], config) if config else ("", False)
    calls = [_caller(*one) for one in reversed(own[:-1]) if not _of_backend(one[0])]
    callers = (*_repeated(frame), *calls)
    return Stop(side, words, f"{file}:{line}", text, frame.f_code.co_name, last, empty, callers)


def _of_backend(frame: FrameType) -> bool:
    """Whether a frame is of the code that calls the text, and not of the text."""
    return Path(frame.f_code.co_filename).name in ("backend.py", "replay.py", "ranks.py")


def _repeated(frame: FrameType) -> list[str]:
    """If a frame runs a recording, the call of the text that it repeats, as `_caller` says it."""
    names = frame.f_locals
    if type(names.get("self")).__name__ != "Recording" or "arguments" not in names:
        return []
    runs, lines = (kind[names["part"]] for kind in (names["self"].runs, names["self"].lines))
    at = [arguments is names["arguments"] for _, arguments in runs].index(True)
    name, (path, line) = lines[at]
    _, file = _own(path) or ("", path)
    return [f"recorded {name}, {file}:{line}"]


def _caller(frame: FrameType, line: int) -> str:
    """A call as a report shows it: "attention, scalar/model.py:52"."""
    _, file = _own(frame.f_code.co_filename) or ("", "")
    return f"{frame.f_code.co_name}, {file}:{line}"


def _own(filename: str) -> tuple[str, str] | None:
    """The side that a file belongs to, and the file's path within the checkout."""
    path = Path(filename)
    for side in IMPLEMENTATIONS:
        root = imported_from(side)
        if path.is_relative_to(root / side):
            return side, path.relative_to(root).as_posix()
    return None


def _last_written(frames: list[FrameType], config: Config) -> tuple[str, bool]:
    """The last derivative or else tap that these frames wrote, and whether that tensor is None."""
    for tree_name, d in (("dtap", "d"), ("tap", "")):
        trees = [frame.f_locals.get(tree_name) for frame in frames]
        for tree in trees:
            if isinstance(tree, Tree) and len(tree.layers) == config.n_layer:
                names = tap_names(config)
                for name, tap in reversed(written(tree, names[::-1] if d else names).items()):
                    return d + name, tap is None
    return "", False


@contextmanager
def marked_memory() -> Iterator[None]:
    """Within this context, np.empty fills its arrays with MARK, so that unwritten memory shows."""
    empty, empty_like = np.empty, np.empty_like

    def marked(made: Any) -> Any:
        if made.dtype.kind == "f":
            made.fill(MARK)
        return made

    with patch.multiple(
        np,
        empty=lambda *args, **kwargs: marked(empty(*args, **kwargs)),
        empty_like=lambda *args, **kwargs: marked(empty_like(*args, **kwargs)),
    ):
        yield


def is_marked(number: float) -> bool:
    """Whether a number comes from memory that was never written (see marked_memory)."""
    bits: int = struct.unpack("<Q", struct.pack("<d", number))[0]
    return bits >> 32 & 0x7FFF_FFFF == 0x7FF8_5EED  # whatever its sign


def as_array(tensor: Any) -> Any:
    """A tensor as an array; what is no array of numbers becomes a sentence that says so."""
    if tensor is None:
        return np.array("is None: a function returned nothing", object)
    try:
        array = np.array(tensor)
    except ValueError:
        return np.array(f"is ragged: {_lengths(tensor)}", object)
    if array.dtype.kind in "biuf":
        return array
    other = next(x for x in array.flat if not isinstance(x, (int, float)))
    return np.array(f"holds {type(other).__name__} in the place of numbers", object)


def _lengths(tensor: Any) -> str:
    """The lengths of lists at the depth where lists differ in length, in words."""
    side_by_side, lengths = [tensor], [0]
    while len(lengths) == 1:
        side_by_side = [item for one in side_by_side for item in one]
        lengths = sorted({len(x) if isinstance(x, (list, tuple)) else 0 for x in side_by_side})
    return f"lists of {', '.join(map(str, lengths[:-1]))} and {lengths[-1]} numbers side by side"
