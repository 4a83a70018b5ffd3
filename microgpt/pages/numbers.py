"""Tensors of one document written out in rows, as scalar's lists or as NumPy's arrays."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def rows(
    tensor: Array, axes: Sequence[str], letters: Sequence[str], lists: bool, most: float
) -> list[str]:
    """The numbers of a tensor, a row to each position; and how many rows are left out, if any are.

    axes       the letters of its shape: none, (B, T), (B, T, channels) or (B, H, T, U)
    letters    the token of each position
    lists      as scalar keeps them: heads within positions, and only positions up to t
    most       how many numbers are written; at least two rows are
    """
    if not axes:
        return [f"{float(tensor)!r}"]
    form, comma = _form(tensor), ", " if lists else " "

    def row(numbers: Iterable[float]) -> str:
        return comma.join(form.format(x) for x in numbers)

    heads = [f"t={t} {letter:4} " for t, letter in enumerate(letters)]
    if "U" in axes:
        H, T = tensor.shape[1:3]
        order = [(t, h) for t in range(T) for h in range(H)]
        absent = "" if lists else " " + ".".rjust(len(form.format(0.0)))
        written = [
            f"{heads[t]}h={h} [{row(tensor[0, h, t, : t + 1])}{absent * (T - 1 - t)}]"
            for t, h in (order if lists else sorted(order, key=lambda at: at[1]))
        ]
    elif len(axes) == 2:
        written = [head + row([x]) for head, x in zip(heads, tensor[0])]
        written = written if lists else [f"[{row(tensor[0])}]"]
    else:
        written = [f"{head}[{row(numbers)}]" for head, numbers in zip(heads, tensor[0])]
    kept = max(2, int(most * len(written) / tensor.size))
    left_out = len(written) - kept
    return written[:kept] + [f".. and {left_out} rows more"] * (left_out > 0)


def _form(tensor: Array) -> str:
    """A format of four digits for the largest number, or powers of ten where it is too small."""
    largest = float(np.abs(tensor).max())
    digits = 3 - math.floor(math.log10(largest)) if largest else 1
    fixed = max(1, digits)
    return f"{{:{fixed + 3}.{fixed}f}}" if -4 < digits < 10 else "{:11.3e}"
