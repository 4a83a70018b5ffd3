"""What is recorded: where a recording leaves the text, and recordings of small micro-batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any
from unittest.mock import patch

import numpy as np

from crosscheck.lines import lines_of
from crosscheck.trace import Array
from microgpt.config import Config
from microgpt.layout import Tree, written
from microgpt.taps import consumers, taps

# of the largest number; recorded calls may add in another order than the text
CLOSE = {"float64": 1e-9, "float32": 1e-5}
LISTED = 6  # how many calls a sentence names
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
        small = "EQUAL_ROWS", "LOOK_UP", "ONE_HOT", "SPREAD"
        numbers |= {f"record.{name}": 0 for name in small}
        numbers |= {"replay.CHUNK": 100}  # parameters that Adam updates at a time
    with ExitStack() as stack:
        for name, number in numbers.items():
            stack.enter_context(patch(f"vectorized.{name}", number))
        yield


def leaves_text(config: Config, params: Tree, step: Any) -> str:
    """A sentence on the first tap that the recorded calls get wrong, and the calls that compute it.

    step    what is recorded for a shape of a batch, and the arrays of a batch that it has run on

    Returns "" if the calls compute all taps.
    """
    tap, dtap, dparams = (Tree(config.n_layer) for _ in range(3))
    model = import_module("vectorized.model")
    model.loss_forward(step.batch, params, config, tap)
    wanted = written(tap, taps(config))
    if len(step.recording.runs) > 1:
        model.loss_backward(step.batch, params, dparams, config, tap, dtap)
        wanted |= {f"d{name}": x for name, x in written(dtap, taps(config)).items()}
    else:  # evaluation, which makes no mean of the losses
        wanted.pop("loss", None)
    return _first_wrong(config, wanted, step.recording)


def _first_wrong(config: Config, wanted: Mapping[str, Array], recording: Any) -> str:
    """The sentence for recorded calls whose taps and derivatives should be `wanted`."""
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
            if name not in seen and any(
                _holds(array, tap, CLOSE[config.dtype]) for array in numbers
            ):
                seen[name] = i
    names = list(taps(config))
    users = {name: [tap.name for tap, _ in found] for name, found in consumers(config).items()}
    behind = {  # what each tap or derivative goes into
        **{name: users[name] for name in names},
        **{f"d{tap.name}": [f"d{x}" for x in tap.operands] for tap in taps(config).values()},
    }
    order = [*names, *[f"d{name}" for name in reversed(names)]]
    for at, name in enumerate(order):
        after = [one for one in behind[name] if one in wanted]
        if name in wanted and name not in seen and not any(one in seen for one in after):
            before = max((seen[one] for one in order[:at] if one in seen), default=-1)
            key = f"forward/{name}" if name in names else f"backward/{name}"
            place = lines_of(key, config)[-1].partition(" ")[0].rpartition("/")[2]
            some = [f"{call} ({file.rpartition('/')[2]}:{number})"
                    for _, (call, (file, number)) in calls[before + 1 :][:LISTED]]  # fmt: skip
            last = max((i for i, call in enumerate(some) if f"({place})" in call), default=LISTED)
            some = some[: last + 1]  # up to the line that writes the tap
            return f"recorded, {name} is the first that is not the text's: {', '.join(some)}"
    return ""


def _arrays(f: Any, arguments: tuple[Any, ...]) -> Iterator[Array]:
    """The arrays that a call reads and writes."""
    owner = [getattr(f, "__self__", None), *getattr(f, "keywords", {}).values()]
    for one in (*owner, *arguments):
        if isinstance(one, np.ndarray) and one.dtype.kind == "f":
            yield one


def _holds(numbers: Array, tap: Array, close: float) -> bool:
    """Whether all numbers of a tap, except zeros, are among these sorted numbers."""
    own = np.asarray(tap).reshape(-1)
    own = own[np.isfinite(own) & (own != 0)]
    if not own.size or own.size > numbers.size:
        return not own.size
    at = np.clip(np.searchsorted(numbers, own), 1, max(numbers.size - 1, 1))
    near = np.minimum(np.abs(numbers[at - 1] - own), np.abs(numbers[at % numbers.size] - own))
    return bool((near <= close * np.abs(own).max()).all())
