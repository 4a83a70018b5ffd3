"""A disagreement in words, for eyes at 80 columns."""

from __future__ import annotations

import math
import struct

from crosscheck.compare import Disagreement, Tally
from crosscheck.trace import PHASES, split_key


def render(found: Disagreement, reference: str, candidate: str) -> str:
    """The disagreement in a few lines: what, where, by how much, what agreed before it."""
    phase, name = split_key(found.key)
    place = f"case {found.case}, step {found.step}"
    if phase:
        place += f", {PHASES[phase]}"
    lines = [
        f"{place}:",
        f"{name or 'the comparison'} {found.problem}".replace("the comparison no", "no"),
    ]
    if found.shape:
        width = max(len(reference), len(candidate), len("difference"))
        difference = abs(found.candidate - found.reference)
        relative = difference / abs(found.reference) if found.reference else math.inf
        at = ", ".join(
            f"{axis}={i}" for axis, i in zip(axes(found.key, len(found.shape)), found.index)
        )
        rows = {
            "at": f"{name}[{at}], shape {found.shape}",
            reference: f"{found.reference!r}",
            candidate: f"{found.candidate!r}",
            "difference": f"{difference:.3g} absolute, {relative:.3g} relative,"
            f" {ulps(found.reference, found.candidate)} ulp",
            "allowed": str(found.tolerance),
            "exceeded": f"by {found.exceeding:,} of {found.elements:,} elements",
        }
        lines += [f"  {label:{width}}  {text}" for label, text in rows.items()]
    compared = [key for key in found.agreed if not key.startswith(("batch", "entry"))]
    if compared:
        last = split_key(compared[-1])[1]
        lines.append(
            f"  {len(compared)} tensors of this step agreed before it, the last was {last}"
        )
    return "\n".join(lines)


def axes(key: str, dimensions: int) -> tuple[str, ...]:
    """What the indices of a tensor count."""
    phase, name = split_key(key)
    if phase in ("forward", "backward"):
        if name.endswith((".attn_logits", ".attn_weights")):
            return ("b", "h", "t", "u")
        return ("b", "t", "c")[:dimensions]
    return ("row", "column")[:dimensions]


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


def summary(tally: Tally, cases: int) -> str:
    """What was compared, in a line."""
    return (
        f"{cases} cases, {tally.steps:,} steps, {tally.tensors:,} tensors,"
        f" {tally.elements:,} elements compared; the closest used {tally.worst:.2g} of the"
        f" allowed error ({tally.worst_key})"
    )
