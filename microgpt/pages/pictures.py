"""Pictures that weigh little: arrays of numbers as PNG, curves as SVG."""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from struct import pack
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

LEVELS = 20  # shades on either side of zero
ABSENT = 2 * LEVELS + 1  # the colour of elements that do not exist
LARGEST = 256  # pixels across
NEGATIVE, POSITIVE, GREY = (37, 99, 235), (217, 83, 10), (128, 128, 128)


def _diverging() -> Array:
    """Red, green, blue and opacity by level: zero lets the paper through, light or dark."""
    shades = [(*NEGATIVE, 255 * i // LEVELS) for i in range(LEVELS, 0, -1)]
    shades += [(*GREY, 0)]
    shades += [(*POSITIVE, 255 * i // LEVELS) for i in range(1, LEVELS + 1)]
    return np.array([*shades, (*GREY, 64)], np.uint8)


DIVERGING = _diverging()


def heat(numbers: Array, scale: float, there: Array | None = None, largest: int = LARGEST) -> str:
    """A matrix as a PNG, one pixel a number: blue below zero, orange above, full at `scale`.

    there      which numbers there are
    largest    pixels across; of a larger matrix, the largest number of each block is shown
    """
    matrix = np.atleast_2d(np.asarray(numbers, float))
    matrix = _smaller(matrix if there is None else np.where(there, matrix, np.nan), largest)
    shares = np.clip(np.nan_to_num(matrix) / (scale or 1.0), -1.0, 1.0)
    levels = np.where(np.isfinite(matrix), np.rint(shares * LEVELS) + LEVELS, ABSENT)
    return png(levels.astype(np.uint8), DIVERGING)


def _smaller(matrix: Array, largest: int) -> Array:
    for axis in (0, 1):
        n = matrix.shape[axis]
        if n > largest:
            starts = np.arange(largest) * n // largest
            high = np.fmax.reduceat(matrix, starts, axis)
            low = np.fmin.reduceat(matrix, starts, axis)
            matrix = np.where(high > -low, high, low)
    return matrix


def png(levels: Array, palette: Array) -> str:
    """A picture with a palette, as a data URI."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return pack(">I", len(data)) + kind + data + pack(">I", zlib.crc32(kind + data))

    height, width = levels.shape
    rows = b"".join(b"\0" + row.tobytes() for row in levels)
    image = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0))
        + chunk(b"PLTE", palette[:, :3].tobytes())
        + chunk(b"tRNS", palette[:, 3].tobytes())
        + chunk(b"IDAT", zlib.compress(rows, 9))
        + chunk(b"IEND", b"")
    )
    return "data:image/png;base64," + base64.b64encode(image).decode()


def label(char: str) -> str:
    """A character beside a row or column; its number in Unicode where it would not be seen."""
    return char if char.isprintable() and char.strip() else f"U+{ord(char):04X}"


@dataclass(frozen=True)
class Line:
    """One line of a chart: its name, its points, and how it is drawn."""

    name: str
    x: Array
    y: Array
    look: str = "line"  # or "points"
    colour: int = 0


@dataclass(frozen=True)
class Tick:
    """A place on an axis, in percent, and the number beside it."""

    at: float
    text: str


@dataclass(frozen=True)
class Drawn:
    """A line as it is drawn: in a square of 1,000 by 1,000, y downwards."""

    name: str
    path: str
    dots: list[tuple[float, float]]
    colour: int


@dataclass(frozen=True)
class Chart:
    """Lines over steps."""

    title: str
    lines: list[Drawn]
    band: str  # the outline of the single values around the line, or nothing
    level: float | None  # the height of a line across, in percent from above
    level_name: str
    x: list[Tick]
    y: list[Tick]


POINTS = 500  # of a line at most; with more steps, each point is the mean of a stretch


def chart(
    title: str,
    lines: Sequence[Line],
    band: Line | None = None,
    level: float | None = None,
    level_name: str = "",
) -> Chart | None:
    """The lines to scale; None if no line has a point.

    band     numbers around the lines, of which the lowest and highest of each stretch are shown
    level    a height to draw a line at
    """
    lines = [line for line in lines if len(line.x)]
    if not lines:
        return None
    thin = [(line, *_thinned(line.x, line.y)) for line in lines]
    heights = [y for _, _, y in thin] + ([np.array([level])] if level is not None else [])
    low, high = (float(f([f(y) for y in heights])) for f in (np.min, np.max))
    room = 0.06 * (high - low) or 0.5 * abs(high) or 1.0
    low, high = max(low - room, 0.0) if low >= 0 else low - room, high + room
    left = min(float(line.x[0]) for line in lines)
    right = max(float(line.x[-1]) for line in lines)
    right += right == left

    def across(x: Any) -> Any:
        return 1000 * (np.asarray(x, float) - left) / (right - left)

    def down(y: Any) -> Any:
        return 1000 * (1 - np.clip((np.asarray(y, float) - low) / (high - low), 0.0, 1.0))

    drawn = []
    for line, x, y in thin:
        points = list(zip(across(x).round(1).tolist(), down(y).round(1).tolist()))
        dots = points if line.look == "points" or len(points) == 1 else []
        drawn.append(Drawn(line.name, "" if len(points) == 1 else _path(points), dots, line.colour))
    outline = ""
    if band is not None and len(band.x):
        starts = _stretches(len(band.x))
        x = across(band.x[starts]).round(1).tolist()
        top, bottom = (
            down(f.reduceat(band.y, starts)).round(1).tolist() for f in (np.maximum, np.minimum)
        )
        outline = _path([*zip(x, top), *zip(x[::-1], bottom[::-1])]) + "Z"
    return Chart(
        title,
        drawn,
        outline,
        None if level is None else float(down(level)) / 10,
        level_name,
        [Tick(float(across(x)) / 10, f"{x:,.0f}") for x in _round_numbers(left, right)],
        [Tick(float(down(y)) / 10, f"{y:.4g}") for y in _round_numbers(low, high)],
    )


def _stretches(n: int) -> Array:
    """Where each of at most POINTS stretches of n begins."""
    return np.arange(min(n, POINTS)) * n // min(n, POINTS)


def _thinned(x: Array, y: Array) -> tuple[Array, Array]:
    starts = _stretches(len(x))
    counts = np.diff([*starts, len(x)])
    return np.add.reduceat(x, starts) / counts, np.add.reduceat(y, starts) / counts


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:g} {y:g}" for x, y in points)


def _round_numbers(low: float, high: float) -> list[float]:
    """Some five round numbers between two."""
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    step *= next(k for k in (1, 2, 5, 10) if (high - low) / (step * k) <= 6)
    return [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]
