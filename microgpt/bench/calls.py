"""What a step of vectorized consists of: the calls of NumPy that it replays, timed in place.

A call on so few numbers takes most of its time to find out what it has been given. What an empty
one takes, times the number of calls, is therefore what no step gets below that makes as many.
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

CallList = Sequence[tuple[Callable[..., Any], tuple[Any, ...]]]  # calls and their arguments

PASSES = ("forward", "backward")  # the parts of a recording
SECONDS = 1.0  # that the replays take
REPLAYS = 11, 1000  # at least, at most
FIRSTS = 3  # first steps, each with a backend of its own
EMPTY = 1000  # calls in a row
SHAPES = 32  # characters of the longest shapes that are written out
BETWEEN = {"dot": " . ", "matmul": " @ "}  # the shapes of what goes in
IN_PLACE = ("__setitem__", "fill", "at")  # of NumPy, what writes to the first of its arrays


@dataclass
class Call:
    """One of the list, and the time it took, a median."""

    name: str
    file: str
    line: int
    shapes: list[tuple[int, ...]]  # of the arrays, the one that it writes last
    written: int  # bytes
    seconds: float

    @property
    def source(self) -> str:
        """The line of the text, without what it says behind #."""
        return linecache.getline(self.file, self.line).partition("  # ")[0].strip()

    @property
    def form(self) -> str:
        """The shapes as one writes them: 16x48 . 48x7 -> 16x7"""
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
        """All of it."""
        return sum(call.seconds for call in self.calls)


@dataclass
class Listing:
    """A step in all its calls."""

    label: str
    parts: list[Part]
    step: float  # seconds of the whole step, in which tokens have to be put into place as well
    empty: float  # seconds of an empty call
    recording: float  # seconds longer that the first step took

    @property
    def calls(self) -> list[Call]:
        """Those of all parts."""
        return [call for part in self.parts for call in part.calls]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """(B, T) of each micro-batch."""
        return [part.shape for part in self.parts if part.name == "forward"]


def listed(label: str, fresh: Callable[[], Any], docs: Docs) -> Listing:
    """The step of vectorized on these documents; fresh() is a backend that has done nothing.

    The rate is 0, so that every step is the first one over again.
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
    both_passes()  # what had to make room for a larger one has been recorded again
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


def _call(f: Any, arguments: Sequence[Any], name: str, line: Any, seconds: float) -> Call:
    named = getattr(f, "keywords", {}).values()  # of a partial
    operands = [getattr(f, "__self__", None), *arguments, *named]
    arrays = [x for x in operands if isinstance(x, np.ndarray)]
    written = arrays[-1].nbytes
    if getattr(f, "__name__", "") in IN_PLACE:
        first, *others = arrays
        arrays = [*others, first]
        written = others[1].nbytes if len(others) > 1 else first.nbytes  # others[0] says where
    return Call(name, line.file, line.number, [x.shape for x in arrays], written, seconds)


@lru_cache(maxsize=1)
def empty_call() -> float:
    """Seconds that NumPy takes for a call that has next to nothing to do, on this machine."""
    return median(_replayed(_empty_calls()) for _ in range(100)) / EMPTY


@lru_cache(maxsize=1)
def _of_the_clock() -> float:
    """Nanoseconds that a look at the clock adds to each call."""
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
    """The calls of a step of vectorized, on average; with several cores, those of this process.

    None for whoever replays none.
    """
    if not hasattr(backend, "recordings"):
        return None
    sizes = [recording.size for docs in batches for _, recording in backend.recordings(docs)]
    return sum(sizes) / len(batches)


def lines(listing: Listing, width: int) -> list[str]:
    """The listing in lines of so many characters: of several micro-batches, the largest."""
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
    step, empty, pieces = listing.step, listing.empty * count, len(listing.shapes)
    of = f" for {pieces} micro-batches and the update" if pieces > 1 else ""
    one = "one shape" if len(set(listing.shapes)) == 1 else f"{len(set(listing.shapes))} shapes"
    return [
        f"{listing.label}: a step of {step * 1e6:,.1f} us",
        f"{count:,} calls{of} take {seconds * 1e6:,.1f} us of it, {seconds / step:.0%}",
        f"as many empty ones, {listing.empty * 1e6:.3f} us each, would take {empty * 1e6:,.1f} us,"
        f" {empty / step:.0%}",
        f"recording {one} takes as long as {listing.recording / step:,.0f} steps",
    ]


def as_json(listing: Listing) -> dict[str, object]:
    """The same for other programs, all micro-batches; times in seconds."""
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
    """A number in five characters."""
    for unit in ("", "k", "M"):
        if number < 10_000:
            return f"{number}{unit}"
        number = round(number / 1000)
    return f"{number}G"


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 2] + ".."
