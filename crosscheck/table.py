"""A trace compared with the table (microgpt/taps.py): each tensor computed from its operands.

Two texts with the same mistake agree with each other, but not with the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

import microgpt.taps
from crosscheck.cases import Case
from crosscheck.compare import SIDES, Outcome, compare
from crosscheck.diagnose import NOT_CLEARED
from crosscheck.lines import function_of
from crosscheck.operations import Around, total
from crosscheck.trace import Step, split_key
from microgpt.cli.whereabouts import IMPLEMENTATIONS
from microgpt.config import Config
from microgpt.taps import consumers, taps

NAME = "recomputed"  # what reports call the numbers that the table gives
HELD = ("forward", "backward", "gradient")  # phases that the table computes


def held_to_table(
    case: Case,
    steps: Callable[[], Iterable[Step]],
    reference: str,
    after: int = 0,
    before: Step | None = None,
) -> Outcome:
    """The outcome of comparing each tensor of a text with the table's operation on its operands.

    steps        returns the steps of the text; it is called twice
    reference    the name of the text
    after        how many steps came before these
    before       the last of those
    """
    by_table, names = map(partial(computed, case.config), steps()), (reference, NAME)
    both = (before, before) if before else None
    outcome = compare(case, steps(), by_table, names=names, after=after, before=both)
    if outcome.found and outcome.found[0].shape is not None:
        found = outcome.found[0]
        line = table_line(case.config, found.key)
        if NOT_CLEARED in found.diagnosis:  # neither the line nor the texts
            problem = "is not what its own inputs give"
            outcome.found[0] = replace(found, problem=problem, at_fault=SIDES[0])
            return outcome
        functions = [function_of(found.key, case.config, side) for side in IMPLEMENTATIONS]
        outcome.found[0] = replace(
            found,
            problem=f"is not what the formula in {line.partition(' ')[0]} gives:"
            " that formula or both texts are wrong",
            at_fault="",
            lines=(*found.lines, line),
            function="; ".join(functions),
        )
    return outcome


def computed(config: Config, step: Step) -> Step:
    """The step, with every tensor of HELD computed by the table from operands of the same step."""
    around, found = Around(config, step), dict(step)
    for key in step:
        # the operands are no numbers if a function of the text returned nothing
        with np.errstate(all="ignore"), suppress(KeyError, IndexError, TypeError, ValueError):
            by_table = total(around, key) if split_key(key)[0] in HELD else None
            found[key] = step[key] if by_table is None else by_table
    return found


def table_line(config: Config, key: str) -> str:
    """The line of the table that says how a tensor is computed, with its file and number."""
    phase, name = split_key(key)
    tap = taps(config)[name] if phase == "forward" else consumers(config)[name[1:]][0][0]
    own = f'Tap("{tap.name.rpartition(".")[2]}",'
    if tap.operation == "activation":
        own = f'"{config.activation}": Activation('
    lines = Path(microgpt.taps.__file__).read_text(encoding="utf-8").splitlines()
    number = next(i for i, line in enumerate(lines, 1) if own in line)
    return f"microgpt/taps.py:{number} {lines[number - 1].strip()}"
