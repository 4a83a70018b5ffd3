"""Pictures that weigh little: arrays of numbers as PNG, curves as SVG."""

from __future__ import annotations

import base64
import zlib
from struct import pack
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

LEVELS = 31  # shades on either side of zero
ABSENT = 2 * LEVELS + 1  # the colour of what there is not
LARGEST = 256  # pixels across; of larger arrays, the largest number of each block is shown
NEGATIVE, POSITIVE, GREY = (37, 99, 235), (217, 83, 10), (128, 128, 128)


def _diverging() -> Array:
    """Red, green, blue and opacity by level: zero lets the paper through, light or dark."""
    shades = [(*NEGATIVE, 255 * i // LEVELS) for i in range(LEVELS, 0, -1)]
    shades += [(*GREY, 0)]
    shades += [(*POSITIVE, 255 * i // LEVELS) for i in range(1, LEVELS + 1)]
    return np.array([*shades, (*GREY, 64)], np.uint8)


DIVERGING = _diverging()


def heat(numbers: Array, scale: float, there: Array | None = None) -> str:
    """A matrix as a PNG, one pixel a number: blue below zero, orange above, full at `scale`."""
    matrix = _smaller(np.atleast_2d(np.asarray(numbers, float)))
    shares = np.clip(matrix / scale if scale else matrix, -1.0, 1.0)
    levels = np.where(np.isfinite(matrix), np.rint(shares * LEVELS) + LEVELS, ABSENT)
    if there is not None:
        levels = np.where(there, levels, ABSENT)
    return png(levels.astype(np.uint8), DIVERGING)


def _smaller(matrix: Array) -> Array:
    for axis in (0, 1):
        n = matrix.shape[axis]
        if n > LARGEST:
            starts = np.arange(LARGEST) * n // LARGEST
            high = np.maximum.reduceat(matrix, starts, axis)
            low = np.minimum.reduceat(matrix, starts, axis)
            matrix = np.where(high > -low, high, low)
    return matrix


def png(levels: Array, palette: Array) -> str:
    """A picture with a palette, as the address of an image that holds it."""

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
