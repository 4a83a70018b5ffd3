"""The tensors of a step held to what they are allowed all at once, as one long row of numbers.

A step has some two hundred small tensors, and a call of NumPy takes longer than the arithmetic on
one of them. A tensor that does not pass here is looked at by itself, in crosscheck.compare.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from crosscheck.tolerance import Standard, as_shares, distance
from crosscheck.trace import Array, Step, real, split_key


@dataclass(frozen=True)
class Passed:
    """How a tensor came to pass."""

    share: float  # the largest share of what is allowed that an element used
    least: bool  # whether by the least noise that there can be
    excused: int  # elements that pass thanks to atol


@dataclass(frozen=True)
class Row:
    """Tensors of a step of the reference, one after another: N numbers."""

    starts: Array  # where each tensor begins in the row
    least: Sequence[bool]  # whether each is held to the least noise that there can be
    numbers: Array  # (N,)
    there: Array  # (N,): which elements are real
    allowed: Array  # (N,): how far from each number another may lie, by the narrowest tolerance
    by_rtol: Array  # (N,): how far rtol alone lets it lie; inf where there is no rtol


def passing(
    number: int, reference: Step, candidate: Step, standard: Standard
) -> Mapping[str, Passed]:
    """The tensors of a step whose numbers all lie within the narrowest tolerance that they have.

    Empty if the steps do not have the same tensors of the same shapes. Documents drawn, which may
    be of any length, are left out.
    """
    keys = [key for key in reference if split_key(key)[0] != "sample"]
    pairs = [(reference[key], candidate.get(key)) for key in keys]
    if not keys or any(
        theirs is None or "O" in (ours.dtype.kind, theirs.dtype.kind) or ours.shape != theirs.shape
        for ours, theirs in pairs
    ):
        return {}
    row = standard.rows.get(number) or _row_of(number, reference, keys, standard)
    if callable(standard.noise):  # such a standard is that of one trace
        standard.rows[number] = row
    with np.errstate(all="ignore"):
        apart = distance(row.numbers, _joined([candidate[key] for key in keys]))
        shares = np.where(row.there, as_shares(apart, row.allowed), 0.0)
        excused = np.add.reduceat((apart > row.by_rtol) & row.there, row.starts, dtype=int)
    largest = np.maximum.reduceat(shares, row.starts)
    each = zip(keys, largest.tolist(), row.least, excused.tolist())
    return {key: Passed(share, *rest) for key, share, *rest in each if share <= 1}


def _row_of(number: int, step: Step, keys: Sequence[str], standard: Standard) -> Row:
    """These tensors of a step, in one row."""
    tensors = [step[key] for key in keys]
    tolerances = [next(standard.widening(number, key, step)) for key in keys]
    sizes = [tensor.size for tensor in tensors]
    numbers = _joined(tensors)
    with np.errstate(all="ignore"):
        rtol = np.repeat([tolerance.rtol or np.inf for tolerance, _ in tolerances], sizes)
        return Row(
            starts=np.cumsum([0, *sizes[:-1]]),
            least=[least for _, least in tolerances],
            numbers=numbers,
            there=_joined([real(key, step[key].shape, step["batch/tokens"]) for key in keys]),
            allowed=_joined([one.allowed(x) for (one, _), x in zip(tolerances, tensors)]),
            by_rtol=np.where(np.isinf(rtol), np.inf, rtol * np.abs(numbers)),
        )


def _joined(tensors: Sequence[Array]) -> Array:
    return np.concatenate([np.ravel(tensor) for tensor in tensors])
