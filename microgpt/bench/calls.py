"""The NumPy calls that a step of vectorized replays, each timed in its place in the step.

On arrays this small, a call spends most of its time on its arguments and not on arithmetic. So the
time of an empty call, times the number of calls, is a lower bound of the time of a step.
"""

from __future__ import annotations

import gc
import linecache
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import median
from time import perf_counter, perf_counter_ns
from typing import Any

import numpy as np

from microgpt.backend import Docs

CallList = Sequence[tuple[Callable[..., Any], tuple[Any, ...]]]  # functions and their arguments

PASSES = ("forward", "backward")  # the parts of a recording
SECONDS = 1.0  # for all replays together
REPLAYS = 11, 1000  # the least, the most
FIRSTS = 3  # first steps that are timed, each with a new backend
EMPTY = 1000  # empty calls in a row
SHAPES = 32  # characters of the column of shapes, at most
BETWEEN = {"dot": " . ", "matmul": " @ "}  # stands between operands
IN_PLACE = ("__setitem__", "fill", "at")  # NumPy's functions that write to their first array


@dataclass
class Call:
    """A NumPy call, and the median of its times."""

    name: str
    file: str
    line: int
    shapes: list[tuple[int, ...]]  # of its arrays, the written array last
    written: int  # bytes
    seconds: float

    @property
    def source(self) -> str:
        """The line of vectorized/ that made the call, without its comment."""
        return linecache.getline(self.file, self.line).partition("  # ")[0].strip()

    @property
    def form(self) -> str:
        """The shapes as text: 16x48 . 48x7 -> 16x7"""
        *inputs, out = ["x".join(map(str, shape)) or "1" for shape in self.shapes]
        return f"{BETWEEN.get(self.name, ', ').join(inputs)} -> {out}".strip()


@dataclass
class Part:
    """Calls that follow one another: the forward or backward pass of a micro-batch, the update."""

    name: str
    shape: tuple[int, ...]  # (B, T) of the micro-batch, () for the update
    calls: list[Call]

    @property
    def seconds(self) -> float:
        """The sum over its calls."""
        return sum(call.seconds for call in self.calls)


@dataclass
class Listing:
    """All calls of a step."""

    label: str
    parts: list[Part]
    step: float  # seconds of the whole step, in which tokens are copied too
    empty: float  # seconds of an empty call
    recording: float  # seconds by which the first step was longer

    @property
    def calls(self) -> list[Call]:
        """The calls of all parts."""
        return [call for part in self.parts for call in part.calls]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """(B, T) of each micro-batch."""
        return [part.shape for part in self.parts if part.name == "forward"]


def listed(label: str, fresh: Callable[[], Any], docs: Docs) -> Listing:
    """The step of vectorized on these documents; fresh() returns a new backend.

    The learning rate is 0, so that every step repeats the first.
    """

    def both_passes() -> float:
        start = perf_counter()
        backend.forward(docs)
        backend.backward()
        return perf_counter() - start

    firsts: list[float] = []
    again: list[float] = []
    steps: list[float] = []
    for _ in range(FIRSTS):
        backend = fresh()
        firsts.append(both_passes())
        backend.update(0.0)
    both_passes()  # record again what a larger recording displaced
    backend.update(0.0)
    *micro_batches, (_, update) = backend.recordings(docs)
    kinds = [
        *((name, shape, it, i) for shape, it in micro_batches for i, name in enumerate(PASSES)),
        ("update", (), update, 0),
    ]
    replays: list[list[list[int]]] = [[] for _ in kinds]
    least, most = REPLAYS
    gc.collect()
    gc.disable()
    try:
        began = perf_counter()
        while len(steps) < most and (len(steps) < least or perf_counter() - began < SECONDS):
            start = perf_counter()
            again.append(both_passes())
            backend.update(0.0)
            steps.append(perf_counter() - start)
            for (_, _, recording, i), replayed in zip(kinds, replays):
                replayed.append(_stamps(recording.runs[i]))
    finally:
        gc.enable()
    parts = []
    for (part, shape, recording, i), replayed in zip(kinds, replays):
        nanoseconds = np.median(np.diff(replayed, axis=1), axis=0) - _of_the_clock()
        seconds = np.maximum(nanoseconds, 0.0) * 1e-9
        found = zip(recording.runs[i], recording.lines[i], seconds.tolist())
        calls = [_call(f, given, name, line, one) for (f, given), (name, line), one in found]
        parts.append(Part(part, shape, calls))
    recording_took = max(0.0, median(firsts) - median(again))
    return Listing(label, parts, median(steps), empty_call(), recording_took)


def _call(
    f: Any, arguments: Sequence[Any], name: str, line: tuple[str, int], seconds: float
) -> Call:
    named = getattr(f, "keywords", {}).values()  # arguments of a partial
    operands = [getattr(f, "__self__", None), *arguments, *named]
    arrays = [x for x in operands if isinstance(x, np.ndarray)]
    written = arrays[-1].nbytes
    if getattr(f, "__name__", "") in IN_PLACE:
        first, *others = arrays
        arrays = [*others, first]
        written = others[1].nbytes if len(others) > 1 else first.nbytes  # others[0] is the index
    return Call(name, *line, [x.shape for x in arrays], written, seconds)


@lru_cache(maxsize=1)
def empty_call() -> float:
    """The seconds of a NumPy call on single numbers, on this machine."""
    return median(_replayed(_empty_calls()) for _ in range(100)) / EMPTY


@lru_cache(maxsize=1)
def _of_the_clock() -> float:
    """The nanoseconds that reading the clock adds to each call."""
    looked = []
    for _ in range(100):
        stamps = _stamps(_empty_calls())
        looked.append((stamps[-1] - stamps[0]) * 1e-9)
    return (median(looked) / EMPTY - empty_call()) * 1e9


@lru_cache(maxsize=1)
def _empty_calls() -> CallList:
    x, y, out = np.ones(1), np.ones(1), np.ones(1)
    return [(np.add, (x, y, out))] * EMPTY


def _replayed(run: CallList) -> float:
    start = perf_counter()
    for f, arguments in run:
        f(*arguments)
    return perf_counter() - start


def _stamps(run: CallList) -> list[int]:
    """Run the calls, and note the time before the first and after each, in nanoseconds."""
    clock = perf_counter_ns
    stamps = [clock()]
    note = stamps.append
    for f, arguments in run:
        f(*arguments)
        note(clock())
    return stamps


def per_step(backend: Any, batches: Sequence[Docs]) -> float | None:
    """How many calls a step makes on average; with several cores, those of this process.

    None for a backend that replays no recording.
    """
    if not hasattr(backend, "recordings"):
        return None
    sizes = [recording.size for docs in batches for _, recording in backend.recordings(docs)]
    return sum(sizes) / len(batches)


def lines(listing: Listing, width: int) -> list[str]:
    """The listing as lines of `width` characters; of several micro-batches, the largest."""
    largest = max(listing.shapes, key=lambda shape: shape[0] * shape[1])
    first = next(i for i, part in enumerate(listing.parts) if part.shape == largest)
    shown = [*listing.parts[first : first + 2], listing.parts[-1]]
    calls = [call for part in shown for call in part.calls]
    form = min(SHAPES, max(len(call.form) for call in calls))
    name = max(len(call.name) for call in calls)
    place = max(len(_place(call)) for call in calls)
    written = [
        f"{'us':>7} {'bytes':>5} {'call':{name}} {'shapes':{form}} {'line':{place}}".rstrip()
    ]
    others = len(listing.shapes) - 1
    for part in shown:
        of = f" of {part.shape[0]} x {part.shape[1]} positions" if part.shape else ""
        which = f", the largest of {others + 1} micro-batches" if of and others else ""
        written.append(f"{part.name}{of}{which}")
        for call in part.calls:
            start = f"{call.seconds * 1e6:7.2f} {_short(call.written):>5} {call.name:{name}}"
            line = f"{start} {_cut(call.form, form):{form}} {_place(call):{place}} {call.source}"
            written.append(_cut(line.rstrip(), width))
        written.append(f"{part.seconds * 1e6:7.2f} us in {len(part.calls)} calls")
    return [*written, *_totals(listing)]


def _totals(listing: Listing) -> list[str]:
    count = len(listing.calls)
    seconds = sum(call.seconds for call in listing.calls)
    step, empty, micro_batches = listing.step, listing.empty * count, len(listing.shapes)
    of = f" for {micro_batches} micro-batches and the update" if micro_batches > 1 else ""
    one = "one shape" if len(set(listing.shapes)) == 1 else f"{len(set(listing.shapes))} shapes"
    return [
        f"{listing.label}: a step of {step * 1e6:,.1f} us",
        f"{count:,} calls{of} take {seconds * 1e6:,.1f} us of it, {seconds / step:.0%}",
        f"as many empty ones, {listing.empty * 1e6:.3f} us each, would take {empty * 1e6:,.1f} us,"
        f" {empty / step:.0%}",
        f"recording {one} takes as long as {listing.recording / step:,.0f} steps",
    ]


def as_json(listing: Listing) -> dict[str, object]:
    """The listing as JSON, with all micro-batches; times in seconds."""
    return {
        "label": listing.label,
        "seconds_per_step": listing.step,
        "seconds_of_calls": sum(call.seconds for call in listing.calls),
        "calls_per_step": len(listing.calls),
        "seconds_per_empty_call": listing.empty,
        "seconds_of_recording": listing.recording,
        "parts": [
            {
                "name": part.name,
                "shape": part.shape,
                "seconds": part.seconds,
                "calls": [
                    {
                        "name": call.name,
                        "seconds": call.seconds,
                        "bytes_written": call.written,
                        "shapes": call.shapes,
                        "file": call.file,
                        "line": call.line,
                        "source": call.source,
                    }
                    for call in part.calls
                ],
            }
            for part in listing.parts
        ],
    }


def _place(call: Call) -> str:
    return f"{Path(call.file).name}:{call.line}"


def _short(number: int) -> str:
    """A number in at most five characters."""
    for unit in ("", "k", "M"):
        if number < 10_000:
            return f"{number}{unit}"
        number = round(number / 1000)
    return f"{number}G"


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 2] + ".."
