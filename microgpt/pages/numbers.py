"""Tensors of one document written out in rows, as scalar's lists or as NumPy's arrays."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True)
class Numbers:
    """A tensor in rows."""

    rows: list[str]
    folded: list[str]  # further rows
    left_out: int  # and how many more there are


def rows(tensor: Array, axes: Sequence[str], labels: Sequence[str], lists: bool) -> list[str]:
    """The numbers of a tensor, a row to each position, or to each row of a parameter.

    axes       the letters of its shape: none, (B, T), (B, T, channels), (B, H, T, U), or two
    labels     what stands before each row
    lists      as scalar keeps them: a position has no numbers for the positions after it
    """
    if not axes:
        return [f"{float(tensor)!r}"]
    form, comma = _form(tensor), ", " if lists else " "

    def row(numbers: Iterable[float]) -> str:
        return comma.join(form.format(x) for x in numbers)

    if "H" in axes:
        H, T = tensor.shape[1:3]
        absent = "" if lists else " " + ".".rjust(len(form.format(0.0)))
        return [
            f"h={h} {labels[t]} [{row(tensor[0, h, t, : t + 1])}{absent * (T - 1 - t)}]"
            for h in range(H)
            for t in range(T)
        ]
    matrix = tensor[0] if axes[0] == "B" else tensor
    if matrix.ndim == 1:
        each = [f"{label} {row([x])}" for label, x in zip(labels, matrix)]
        return each if lists else [f"[{row(matrix)}]"]
    return [f"{label} [{row(numbers)}]" for label, numbers in zip(labels, matrix)]


def _form(tensor: Array) -> str:
    """A format of four digits for the largest number, or powers of ten where it is too small."""
    largest = float(np.abs(tensor).max())
    digits = 3 - math.floor(math.log10(largest)) if largest else 1
    fixed = max(1, digits)
    return f"{{:{fixed + 3}.{fixed}f}}" if -4 < digits < 10 else "{:11.3e}"
