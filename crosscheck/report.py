"""A disagreement in words, in lines of at most 80 columns."""

from __future__ import annotations

import dataclasses
import math
import re
import struct
import textwrap
from collections.abc import Iterable
from typing import Any

from crosscheck import trace
from crosscheck.compare import Disagreement, Tally
from crosscheck.sides import is_marked
from crosscheck.tolerance import RTOL
from crosscheck.trace import DERIVED, PHASES, split_key
from microgpt.backend import BACKENDS

WIDTH = 80
PLACE = "wrong "  # how a diagnosis begins that says no more than where
MOST_ULPS = 1_000_000  # more units in the last place than these are no rounding
CALLERS = 5  # how many calls are shown that led to an exception
INSTEAD = (
    "write it with einsum of two arrays, reshape, x @ w.T, np.add.at, .sum or .mean over the last"
    " axis; vectorized/record.py has the operations that it knows"
)
DRAWN = {
    "sample/documents": "the drawn documents differ",
    "sample/likeliest": "the documents of the likeliest tokens differ",
}


def render(found: Disagreement, reference: str, candidate: str, about: str = "") -> str:
    """The report on a disagreement: where, what, by how much, the cause, and what agreed before.

    about    how the case was run, if not as it stands: in micro-batches, on two ranks
    """
    names = {"reference": reference, "candidate": candidate}
    rows = _numbers(found, reference, candidate) if found.shape is not None else []
    place_alone = found.diagnosis.startswith(PLACE)
    if found.diagnosis and not place_alone and (found.key or not found.stop):
        rows.append(("looks like", found.diagnosis))
    if found.again:
        rows.append(("tried again", found.again))
    if found.at_fault and found.shape is not None:
        rows.append(("at fault", f"{names[found.at_fault]}: {_reason(found, names)}"))
    lines = [_line(line, found.key) for line in found.lines]
    rows += [("computed at" if not i else "", line) for i, line in enumerate(lines)]
    if found.function:
        rows.append(("look at", found.function))
    if found.formula:
        number = _told_apart(found.expected, _at_fault(found))
        is_number = found.formula == f"{found.expected:.6g}"
        rows.append(("should be", number if is_number else f"{found.formula} = {number}"))
        rows += [("", f"{operand} = {numbers}") for operand, numbers in found.operands.items()]
    if found.shape is not None and not found.texts:
        rows += _difference(found, reference, candidate)
    if where := found.where or (found.diagnosis.removeprefix(PLACE) if place_alone else ""):
        rows.append(("wrong", where))
    if found.shape is None:  # a stop after a wrong number follows from that number
        rows += _stop(found)
    if len(found.phases) > 1:
        rows.append(("differs in", ", ".join(PHASES[phase] for phase in found.phases)))
    compared = _compared(found)
    if compared and not (found.stop and found.stop.refused and not found.key):
        count = f"{len(compared)} tensor{'s' * (len(compared) > 1)}"
        rows.append(("agreed", f"{count} before it, the last {split_key(compared[-1])[1]}"))
    lines = [
        *wrapped(f"{place(found.case, found.step, found.key or found.stopped_in, about)}:"),
        *wrapped(headline(found, reference, candidate)),
    ]
    width = max((len(label) for label, _ in rows), default=0)
    return "\n".join([*lines, *in_rows(rows, width)])


def in_rows(rows: Iterable[tuple[str, str]], width: int) -> list[str]:
    """The lines of rows of label and text; texts begin in one column."""
    return [
        line
        for label, text in rows
        for line in wrapped(text, f"  {label:{width}}  ", " " * (width + 4))
    ]


def _line(line: str, key: str) -> str:
    """A line of a text that computes a tensor, as a report gives it.

    scalar/ has no line for a gradient: its graph computes the gradient of what a line computes.
    """
    place, _, text = line.partition(" ")
    phase, name = split_key(key)
    gradient = phase in DERIVED and name != "loss"
    forward = gradient and place.startswith("scalar/")
    return f"{place} (its forward pass) {text}" if forward else line


def _compared(found: Disagreement) -> list[str]:
    """The tensors that agreed before, of the forward and the backward pass."""
    return [key for key in found.agreed if key.startswith(("forward", "backward", "gradient"))]


def place(case: str, step: int, key: str, about: str = "") -> str:
    """Where a disagreement is: case, how it was run, step and phase."""
    if not case:
        return "before any case"
    phase = PHASES.get(split_key(key)[0], "")
    return ", ".join(filter(None, (f"case {case}", about, f"step {step}", phase)))


def headline(found: Disagreement, reference: str, candidate: str) -> str:
    """The tensor and what is wrong with it, with the names of the sides."""
    if found.texts and found.key in DRAWN:
        return DRAWN[found.key]
    names = {"reference": reference, "candidate": candidate}
    name = split_key(found.key)[1] or (names.get(found.at_fault, "") if found.stop else "")
    problem = found.problem
    for side, label in names.items():
        problem = problem.replace(f"the {side}", label)
    return f"{name} {problem}".strip()


def _numbers(found: Disagreement, reference: str, candidate: str) -> list[tuple[str, str]]:
    """Rows on the element that is shown, or on the documents that token ids stand for."""
    if found.texts:
        return list(found.texts)
    _, name = split_key(found.key)
    at = ", ".join(f"{axis}={i}" for axis, i in zip(axes(found.key), found.index))
    return [
        ("at", f"{name}[{at}] of {found.shape}" if at else name),
        (reference, f"{found.reference!r}"),
        (candidate, f"{found.candidate!r}"),
    ]


def _reason(found: Disagreement, names: dict[str, str]) -> str:
    """Why a side is at fault, as a sentence."""
    name = split_key(found.key)[1]
    if found.written_later:
        return (
            f"{name} holds other numbers than its own inputs give; was it changed in place after"
            " it was written?"
        )
    if found.texts:
        return f"drawn again from {names[found.at_fault]}'s own parameters, they are others"
    own = f"{names[found.at_fault]}'s own inputs"
    number = _told_apart(found.recomputed, _at_fault(found))
    return f"recomputed from {own}, it should be {number}"


def _at_fault(found: Disagreement) -> float:
    """The number of the side at fault; of the candidate where that is not known."""
    return found.reference if found.at_fault == "reference" else found.candidate


def _told_apart(number: float, other: float) -> str:
    """A number with six digits, or as many as it takes to be seen to be another number."""
    digits = (n for n in range(6, 17) if f"{number:.{n}g}" != f"{other:.{n}g}")
    return f"{number:.{next(digits, 6)}g}"


def _difference(found: Disagreement, reference: str, candidate: str) -> list[tuple[str, str]]:
    """Rows on how far apart the two numbers are, and how many elements exceed the tolerance."""
    difference = abs(found.candidate - found.reference)
    relative = difference / abs(found.reference) if found.reference else math.inf
    exceeding = f"{found.exceeding:,} of {found.elements:,} elements"
    sizes = [f"{difference:.3g} absolute", f"{relative:.3g} relative"]
    rows = []
    if math.isfinite(difference):
        distance = ulps(found.reference, found.candidate)
        rows.append(("difference", ", ".join([*sizes, f"{distance} ulp"] if distance else sizes)))
    rows += [
        ("allowed", str(found.tolerance)),
        ("exceeded by", exceeding + "; shown is one of the worst" * (found.exceeding > 1)),
    ]
    ours = reference in BACKENDS and candidate in BACKENDS  # a port has no marked memory
    if ours and is_marked(found.candidate) != is_marked(found.reference):
        rows.append(
            ("nan", "the check fills new memory with nan: an element that is never written is nan")
        )
    return rows


def _stop(found: Disagreement) -> list[tuple[str, str]]:
    """Rows on how a side stopped in the step."""
    stop = found.stop
    if not stop:
        return []
    rows = []
    if not stop.refused:
        rows.append(
            (
                "then" if found.key else "error",
                f"{stop.side} stops: " * bool(found.key) + stop.error,
            )
        )
    elif compared := _compared(found):
        rows.append(
            ("numbers", f"agree in this step: {len(compared)} tensors, computed in plain NumPy; but"
             " the recorder of vectorized/record.py does not know this operation")
        )  # fmt: skip
    else:
        rows.append(
            ("numbers", "none is wrong here: only the recorder does not know this operation")
        )
    if stop.line:
        within = f"  (in {stop.function})" if stop.function else ""
        rows.append(("its line", f"{stop.line} {stop.text.partition('  # ')[0]}{within}"))
    if stop.callers and not stop.refused:
        rows.append(("called by", "; ".join(stop.callers[:CALLERS])))
    if stop.refused:
        rows.append(("instead", INSTEAD))
    if stop.last and not stop.refused:
        empty = ", which is None: a function returned nothing" if stop.empty else ""
        rows.append(("got to", f"{stop.last}, the last tap that it wrote{empty}"))
    return rows


def with_diagnosis(report: str, old: str, new: str) -> str:
    """A report with another diagnosis in its row "looks like"; without that row if `new` is ""."""
    row = re.search(r"^  looks like +", report, re.MULTILINE)
    if not row or old == new:
        return report
    first, then = row[0], " " * len(row[0])
    before, after = ("".join(f"{line}\n" for line in wrapped(words, first, then))
                     for words in (old, new))  # fmt: skip
    return report.replace(before, after if new else "", 1)


def wrapped(text: str, first: str = "", then: str = "") -> list[str]:
    """The lines of a text, each of at most WIDTH characters."""
    return textwrap.wrap(
        text, WIDTH, initial_indent=first, subsequent_indent=then, break_on_hyphens=False
    )


def as_json(found: Disagreement) -> dict[str, Any]:
    """The fields of a disagreement for JSON; nan and inf, which JSON lacks, become texts."""

    def plain(value: Any) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            return str(value)
        return value

    fields = dataclasses.asdict(found)
    fields["operands"] = dict(found.operands)
    return {name: plain(value) for name, value in fields.items()}


def axes(key: str) -> tuple[str, ...]:
    """The names of a tensor's axes in a report: letters, or row and column for a parameter."""
    letters = trace.axes(key)
    if len(letters) < 2 or letters[0] in ("B", "T"):
        return tuple("c" if letter in "CFV" else letter.lower() for letter in letters)
    return "row", "column"


def ulps(a: float, b: float) -> str:
    """The distance of two finite numbers in units in the last place; "" if it is large."""
    distance = abs(_ordinal(a) - _ordinal(b))
    return f"{distance:,}" if distance <= MOST_ULPS else ""


def _ordinal(x: float) -> int:
    """The number of a float64 among all float64 numbers in order; that of 0.0 is 0."""
    bits: int = struct.unpack("<q", struct.pack("<d", x))[0]
    return bits if bits >= 0 else -(bits & 0x7FFF_FFFF_FFFF_FFFF)


def summary(tally: Tally, comparisons: int) -> str:
    """The lines that say how much was compared, and how close the numbers came."""
    counted = [f"{count:,} {PHASES[phase]}" for phase, count in tally.excused.items()]
    why = ", as rounding leaves sums whose terms cancel, and within the allowed absolute error"
    within = [f"{tally.within:,} lie within the least noise that there can be"]
    worst = [f"the worst used {tally.worst:.2g} of the allowed error ({tally.worst_key})"]
    within, worst = within * (tally.within > 0), worst * (tally.worst > 0 or not tally.within)
    lines = [
        f"{comparisons} comparison{'s' * (comparisons != 1)} over {tally.steps:,}"
        f" step{'s' * (tally.steps != 1)}: {tally.tensors:,} tensors,"
        f" {tally.elements:,} elements",
        "; of the others ".join(within + worst),
        f"elements farther apart than {RTOL:g} of their size{why * bool(counted)}:"
        f" {', '.join(counted) or 'none'}",
    ]
    return "\n".join(wrapped for line in lines for wrapped in textwrap.wrap(line, WIDTH) or [""])
