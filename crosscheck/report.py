"""A disagreement in words, for eyes at 80 columns."""

from __future__ import annotations

import dataclasses
import math
import struct
import textwrap
from typing import Any

from crosscheck import trace
from crosscheck.compare import Disagreement, Tally
from crosscheck.trace import PHASES, split_key

WIDTH = 80


def render(found: Disagreement, reference: str, candidate: str) -> str:
    """A disagreement in a few lines: what, where, by how much, what is behind it, what agreed."""
    phase, name = split_key(found.key)
    where = [f"case {found.case}", f"step {found.step}", *([PHASES[phase]] if phase else [])]
    rows: list[tuple[str, str]] = []
    if found.shape is not None:
        at = ", ".join(f"{axis}={i}" for axis, i in zip(axes(found.key), found.index))
        difference = abs(found.candidate - found.reference)
        relative = difference / abs(found.reference) if found.reference else math.inf
        rows += [
            ("first at", f"{name}[{at}] of {found.shape}" if at else name),
            (reference, f"{found.reference!r}"),
            (candidate, f"{found.candidate!r}"),
            (
                "difference",
                f"{difference:.3g} absolute, {relative:.3g} relative,"
                f" {ulps(found.reference, found.candidate)} ulp",
            ),
            ("allowed", str(found.tolerance)),
            ("exceeded by", f"{found.exceeding:,} of {found.elements:,} elements"),
        ]
    if found.formula:
        rows.append(("should be", f"{found.formula} = {found.expected:.6g}"))
        rows += [("", f"{operand} = {numbers}") for operand, numbers in found.operands.items()]
    if found.at_fault:
        side = reference if found.at_fault == "reference" else candidate
        rows.append(("at fault", f"{side}: its number is not what its own operands come to"))
    if found.diagnosis:
        rows.append(("looks like", found.diagnosis))
    if found.phases:
        rows.append(("differs in", ", ".join(PHASES[phase] for phase in found.phases)))
    compared = [key for key in found.agreed if key.startswith(("forward", "backward", "gradient"))]
    if compared:
        rows.append(
            ("agreed", f"{len(compared)} tensors before it, the last {split_key(compared[-1])[1]}")
        )
    width = max((len(label) for label, _ in rows), default=0)
    lines = [f"{', '.join(where)}:", f"{name} {found.problem}".strip()]
    for label, text in rows:
        lines += textwrap.wrap(
            text,
            WIDTH,
            initial_indent=f"  {label:{width}}  ",
            subsequent_indent=" " * (width + 4),
            break_on_hyphens=False,
        )
    return "\n".join(lines)


def as_json(found: Disagreement) -> dict[str, Any]:
    """The same for other programs. Numbers that JSON has no name for are given as text."""

    def plain(value: Any) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            return str(value)
        return value

    fields = dataclasses.asdict(found)
    return {name: plain(value) for name, value in fields.items()}


def axes(key: str) -> tuple[str, ...]:
    """What the indices of a tensor are called."""
    letters = trace.axes(key)
    if len(letters) < 2 or letters[0] in ("B", "T"):
        return tuple("c" if letter in "CFV" else letter.lower() for letter in letters)
    return "row", "column"


def ulps(a: float, b: float) -> str:
    """How many float64 numbers lie between two of them, in words."""
    if not (math.isfinite(a) and math.isfinite(b)):
        return "no number of"
    distance = abs(_ordinal(a) - _ordinal(b))
    return f"{distance:,}" if distance < 1_000_000 else f"{distance:.1e}"


def _ordinal(x: float) -> int:
    """The place of a float among all floats, counted from 0."""
    bits: int = struct.unpack("<q", struct.pack("<d", x))[0]
    return bits if bits >= 0 else -(bits & 0x7FFF_FFFF_FFFF_FFFF)


def summary(tally: Tally, comparisons: int) -> str:
    """What was compared."""
    return (
        f"{comparisons} comparisons over {tally.steps:,} steps: {tally.tensors:,} tensors,"
        f" {tally.elements:,} elements\nthe worst used {tally.worst:.2g} of the allowed error"
        f" ({tally.worst_key})"
    )
