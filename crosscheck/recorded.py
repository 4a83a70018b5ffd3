"""What is recorded: where a recording leaves the text, and recordings of small micro-batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np

from crosscheck.cases import Case
from crosscheck.trace import ENTRY, Array, Step, state_of
from microgpt.backend import load_backend
from microgpt.taps import consumers, taps

CLOSE = 1e-9  # of the largest number; recorded calls may add in another order than the text
LISTED = 4  # how many calls a sentence names
# two ways to cut a batch into micro-batches: the arguments of in_micro_batches
CUTS = {"one row": (1, 1, False), "cut": (32, 2, True)}


@contextmanager
def in_micro_batches(columns: int, row: int, lowered: bool) -> Iterator[None]:
    """Within this context, vectorized/ cuts batches into micro-batches of so many positions.

    row        the length of a packed row is a multiple of it
    lowered    whether the recorder has other forms of operations on small arrays

    The modules are looked up when the context begins, since defects may be planted in them.
    """
    numbers = {"batch.COLUMNS": columns, "batch.ROW": row}
    if not lowered:
        small = "EQUAL_ROWS", "LOOK_UP", "ONE_HOT"
        numbers |= {f"record.{name}": 0 for name in small}
        numbers |= {"replay.CHUNK": 100}  # parameters that Adam updates at a time
    with ExitStack() as stack:
        for name, number in numbers.items():
            stack.enter_context(patch(f"vectorized.{name}", number))
        yield


def leaves_text(case: Case, number: int, step: Step) -> str:
    """A sentence on the first tap that the recorded calls get wrong, and the calls that compute it.

    number    which step it is, from 1
    step      the step of the side that records

    Returns "" if the calls compute all taps of every document, or cannot be followed.
    """
    config = replace(case.config, cores=1)
    state = state_of(step, ENTRY, number - 1)
    with suppress(Exception):  # a recorder at fault may raise any exception
        for doc in case.docs(number - 1):
            watched: Any = load_backend("vectorized", config, state, watch=True)
            trained: Any = load_backend("vectorized", config, state)
            for backend in (watched, trained):
                backend.forward([doc])
                backend.backward()
            wanted = {**watched.taps(), **{f"d{k}": x for k, x in watched.dtaps().items()}}
            ((_, recording),) = trained.recordings([doc])
            words = _first_wrong(case, wanted, recording)
            if words:
                return words
    return ""


def _first_wrong(case: Case, wanted: Mapping[str, Array], recording: Any) -> str:
    """The sentence for one document, whose taps and derivatives should be `wanted`."""
    calls = [
        (call, line)
        for calls, lines in zip(recording.runs, recording.lines)
        for call, line in zip(calls, lines)
    ]
    seen: dict[str, int] = {}  # the first call after which the numbers of a tap are in memory
    for i, ((f, arguments), _) in enumerate(calls):
        f(*arguments)
        numbers = [np.sort(array, axis=None) for array in _arrays(f, arguments)]
        for name, tap in wanted.items():
            if name not in seen and any(_holds(array, tap) for array in numbers):
                seen[name] = i
    names = list(taps(case.config))
    users = {name: [tap.name for tap, _ in found] for name, found in consumers(case.config).items()}
    behind = {  # what each tap or derivative goes into
        **{name: users[name] for name in names},
        **{f"d{tap.name}": [f"d{x}" for x in tap.operands] for tap in taps(case.config).values()},
    }
    order = [*names, *[f"d{name}" for name in reversed(names)]]
    for at, name in enumerate(order):
        after = [one for one in behind[name] if one in wanted]
        if name in wanted and name not in seen and not any(one in seen for one in after):
            before = max((seen[one] for one in order[:at] if one in seen), default=-1)
            some = [f"{call} ({file.rpartition('/')[2]}:{number})"
                    for _, (call, (file, number)) in calls[before + 1 :][:LISTED]]  # fmt: skip
            return f"recorded, {name} is the first that is not the text's: {', '.join(some)}"
    return ""


def _arrays(f: Any, arguments: tuple[Any, ...]) -> Iterator[Array]:
    """The arrays that a call reads and writes."""
    owner = [getattr(f, "__self__", None), *getattr(f, "keywords", {}).values()]
    for one in (*owner, *arguments):
        if isinstance(one, np.ndarray) and one.dtype.kind == "f":
            yield one


def _holds(numbers: Array, tap: Array) -> bool:
    """Whether all numbers of a tap, except zeros, are among these sorted numbers."""
    own = np.asarray(tap).reshape(-1)
    own = own[np.isfinite(own) & (own != 0)]
    if not own.size or own.size > numbers.size:
        return not own.size
    at = np.clip(np.searchsorted(numbers, own), 1, max(numbers.size - 1, 1))
    near = np.minimum(np.abs(numbers[at - 1] - own), np.abs(numbers[at % numbers.size] - own))
    return bool((near <= CLOSE * np.abs(own).max()).all())
