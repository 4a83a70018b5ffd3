"""The map of a crosscheck, a page: how much of the tolerance each tensor of each step used.

Columns are steps, case by case; rows are tensors in the order of computation. Each comparison makes
a part of the map, of numbers and texts alone, which one process can send to another.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np

from crosscheck.causes import Cause, Finding, causes
from crosscheck.compare import Outcome, Tally
from crosscheck.report import as_json, axes, headline, summary
from crosscheck.report import render as render_text
from crosscheck.trace import GIVEN, PHASES, Array, split_key
from microgpt.pages.page import render, write
from microgpt.pages.pictures import png
from microgpt.pages.sources import highlighted

__all__ = ["Part", "of_outcomes", "page", "part", "write"]

DECADES = 8  # powers of ten below the tolerance that have colours of their own
LEVELS = 16  # colours for what is within the tolerance
ABSENT, FOLLOWS, FIRST = LEVELS, LEVELS + 1, LEVELS + 2  # no tensor; beyond; beyond, and first
PALETTE = np.array(
    [
        *[(13, 122, 132, 10 + 220 * i // (LEVELS - 1)) for i in range(LEVELS)],
        (128, 128, 128, 70),
        (240, 120, 130, 190),
        (214, 20, 40, 255),
    ],
    np.uint8,
)
REDS = 12  # shades of elements beyond the tolerance
FARTHEST = 1e15  # times the tolerance: where the shades end
ERRORS = np.array(
    [
        (13, 122, 132, 40),
        *[(214, 20, 40, 60 + 195 * i // REDS) for i in range(1, REDS + 1)],
        (128, 128, 128, 70),
    ],
    np.uint8,
)
COLUMNS = {  # what a column stands for, by kind of comparison; in all others, a step
    "random models": "a random model, with the worst of its steps",
    "a thousand steps": "the worst of 50 steps of the long run; parameters, after every fifth",
    "the witness": "an implementation, scalar before vectorized, compared with derivatives that no"
    " backward pass has computed",
}
MATRICES = 24  # how many matrices are drawn of the tensor that differs first
PIXELS = 128  # how many of its rows and columns a matrix shows


@dataclass
class Part:
    """The part of the map that one comparison makes."""

    about: str  # the kind of comparison, in words
    case: str
    steps: dict[str, dict[str, float]]  # by step, the worst share of the tolerance of each tensor
    first: list[Any]  # the step and key that differed first, or nothing
    errors: list[dict[str, Any]] = field(default_factory=list)  # the first tensor's matrices as PNG


@dataclass(frozen=True)
class Column:
    """The columns of a case: one picture."""

    case: str
    image: str
    steps: int
    worst: float
    worst_key: str
    failed: bool


@dataclass(frozen=True)
class Band:
    """The rows of a phase."""

    title: str
    rows: list[str]


@dataclass(frozen=True)
class Sheet:
    """A kind of comparison."""

    about: str
    column: str  # what a column stands for
    bands: list[Band]
    columns: list[Column]


@dataclass(frozen=True)
class Difference:
    """A cause, with pictures of the errors in the tensor that differs first."""

    cause: Cause
    headline: str
    lines: list[tuple[str, Any]]
    operands: Mapping[str, str]
    rows: str
    columns: str
    errors: list[dict[str, Any]]


def part(outcome: Outcome, about: str) -> Part:
    """The part of the map that an outcome makes."""
    steps = {str(step): shares for step, shares in outcome.shares.items()}
    if not outcome.found:
        return Part(about, outcome.case, steps, [])
    first = outcome.found[0]
    return Part(about, outcome.case, steps, [first.step, first.key], matrices(outcome))


def matrices(outcome: Outcome) -> list[dict[str, Any]]:
    """Pictures of the errors in the tensor that differs first, for a template."""
    shares, key = outcome.wrong, outcome.found[0].key
    if shares is None or not shares.ndim:
        return []
    names = axes(key)
    while shares.ndim < 2:
        shares, names = shares[None], ("", *names)
    there = ~np.isnan(shares)
    beyond = np.log10(np.where(there & (shares > 1), np.minimum(shares, FARTHEST), 1.0))
    reds = np.ceil(beyond / max(beyond.max(), 1.0) * REDS)
    shades = np.where(there, reds, REDS + 1).astype(np.uint8)
    found = []
    for index in list(product(*map(range, shares.shape[:-2])))[:MATRICES]:
        matrix = shades[index][:PIXELS, :PIXELS]
        found.append(
            {
                "title": ", ".join(f"{name}={i}" for name, i in zip(names, index)),
                "image": png(matrix, ERRORS),
                "shape": matrix.shape,
                "names": names[-2:],
            }
        )
    return found


def levels(shares: Array) -> Array:
    """The colour of each share of the tolerance: by its logarithm up to 1, beyond that FOLLOWS."""
    with np.errstate(divide="ignore", invalid="ignore"):
        decades = np.log10(np.maximum(shares, 0.0)) + DECADES
        within = np.clip(np.rint(decades / DECADES * (LEVELS - 1)), 0, LEVELS - 1)
        found = np.where(shares > 1, FOLLOWS, within)
    return np.where(np.isnan(shares), ABSENT, found).astype(np.uint8)


def page(
    parts: Sequence[Part], causes: Sequence[Cause], compared: str, labels: tuple[str, str]
) -> str:
    """The page as HTML: the differences by cause, and the map."""
    abouts = list(dict.fromkeys(one.about for one in parts if one.steps))
    return render(
        "map.html.j2",
        title="Crosscheck of " + " and ".join(labels),
        labels=labels,
        differences=[difference(cause, parts) for cause in causes],
        sheets=[sheet(about, [one for one in parts if one.about == about]) for about in abouts],
        compared=compared,
        decades=DECADES,
        scale=png(np.arange(LEVELS, dtype=np.uint8)[None], PALETTE),
    )


def of_outcomes(about: str, outcomes: Sequence[Outcome], reference: str, candidate: str) -> str:
    """The page as HTML, for comparisons of one kind."""
    labels, tally = (reference, candidate), Tally()
    findings = []
    for outcome in outcomes:
        tally.add(outcome.tally)
        if outcome.found:
            first = outcome.found[0]
            report = render_text(first, *labels)
            at = about, first.case, first.step, first.key, headline(first, *labels)
            findings.append(Finding(*at, first.diagnosis, report, "", as_json(first)))
    parts = [part(outcome, about) for outcome in outcomes]
    return page(parts, causes(findings), summary(tally, len(outcomes)), labels)


def difference(cause: Cause, parts: Iterable[Part]) -> Difference:
    """A cause with its lines, operands and pictures."""
    first = cause.first
    at = [first.step, first.key]
    place = first.about, first.case
    errors = [one.errors for one in parts if (one.about, one.case) == place and one.first == at]
    fields = first.fields
    lines = []
    for line in fields.get("lines", ()):
        file, _, code = line.partition(" ")
        lines.append((file, highlighted(code)))
    names = errors[0][0]["names"] if errors and errors[0] else ("", "")
    return Difference(
        cause,
        first.headline,
        lines,
        fields.get("operands", {}),
        names[0],
        names[1],
        errors[0] if errors else [],
    )


def sheet(about: str, parts: Sequence[Part]) -> Sheet:
    """A kind of comparison, with the rows of all its cases."""
    order = rows(parts)
    place = {key: i for i, key in enumerate(order)}
    bands: list[Band] = []
    for key in order:
        phase, name = split_key(key)
        title = PHASES.get(phase, phase)
        if not bands or bands[-1].title != title:
            bands.append(Band(title, []))
        bands[-1].rows.append(name)
    return Sheet(
        about,
        COLUMNS.get(about, "a step"),
        bands,
        [column(one, place) for one in parts if one.steps],
    )


def rows(parts: Sequence[Part]) -> list[str]:
    """The keys of the rows: those of the deepest model, any other behind the key before it.

    A tensor that both sides are given has a row only if the two differ in it.
    """
    steps = [shares for one in parts for shares in one.steps.values()]
    off = {key for shares in steps for key, share in shares.items() if share}
    lists = [[key for key in shares if key in off or split_key(key)[0] not in GIVEN]
             for shares in steps]  # fmt: skip
    order: list[str] = []
    for keys in sorted(lists, key=len, reverse=True):
        at = 0
        for key in keys:
            if key in order:
                at = order.index(key) + 1
            else:
                order.insert(at, key)
                at += 1
    return sorted(order, key=lambda key: list(PHASES).index(split_key(key)[0]))


def column(one: Part, place: Mapping[str, int]) -> Column:
    """A case as a picture: a row for each tensor, a column for each step."""
    table = np.full((len(place), len(one.steps)), math.nan)
    for j, shares in enumerate(one.steps.values()):
        for key, share in shares.items():
            if key in place:
                table[place[key], j] = share
    found = levels(table)
    for j, step in enumerate(one.steps):
        if one.first and one.first[0] == int(step) and one.first[1] in place:
            found[place[one.first[1]], j] = FIRST
    worst, key = max((share, key) for shares in one.steps.values() for key, share in shares.items())
    return Column(one.case, png(found, PALETTE), len(one.steps), worst, key, bool(one.first))
