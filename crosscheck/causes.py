"""What fails in a run, sorted into causes: what came first, what follows, what is shared."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from crosscheck.cases import Case
from crosscheck.diagnose import OF_ANOTHER
from crosscheck.report import with_diagnosis
from crosscheck.sides import REFUSED
from crosscheck.trace import PHASES, split_key
from microgpt.config import FIELDS, Config
from microgpt.settings import config_from
from microgpt.taps import taps

LAYER = re.compile(r"layer\d+\.")
OR = ", or "  # between two readings of the same numbers
ASIDE = re.compile(r" \(here also [^)]*\)|\d+(\.\d+)?(e-?\d+)?")  # what differs from case to case
VALUE = "Value alone"  # what fails there shows in everything that scalar computes
CONFIRMING = 3  # cases that are waited for before a report is printed
STEPS = ("first steps", "steps one by one", "running freely")  # in float64, in one batch


@dataclass(frozen=True)
class Finding:
    """What a test found: a difference, or a side that stopped."""

    about: str  # the kind of comparison, in words
    case: str
    step: int
    key: str
    headline: str
    diagnosis: str
    report: str
    stopped: str  # where, and with what error, if a side did
    fields: Mapping[str, Any] = field(repr=False)

    @property
    def refused(self) -> bool:
        """Whether only the recorder refused the text; a number that is wrong is told first."""
        return f" {REFUSED}: " in self.stopped


@dataclass(frozen=True)
class Run:
    """How far a test came: the steps that agreed, and the step that did not (0: all did)."""

    about: str
    case: str
    agreed: int
    failed: int


@dataclass
class Cause:
    """A finding, and those that follow from it."""

    first: Finding
    others: list[Finding] = field(default_factory=list)

    @property
    def diagnosis(self) -> str:
        """What it looks like, in all cases in which the same kind of tensor is the first to differ.

        A small case allows several readings. Those that most of the other cases do not have are
        left out; "" where none is left.
        """
        own = self.first.diagnosis
        alike = [one for one in self.others if one.about in STEPS and one.case != self.first.case]
        told = [
            {_bare(words) for words in one.diagnosis.split(OR)}
            for one in {one.case: one for one in alike if _kind(one.key) == _kind(self.first.key)
                        and one.diagnosis}.values()
        ]  # fmt: skip
        if not own or not told:
            return own
        votes = {words: sum(_bare(words) in one for one in told) for words in own.split(OR)}
        if not any(votes.values()):
            return own if len(told) == 1 or _is_place(own) else ""
        most = max(votes.values())
        return OR.join(words for words, count in votes.items() if count == most)

    @property
    def report(self) -> str:
        """The report of the first finding, with what is left of its readings."""
        return with_diagnosis(self.first.report, self.first.diagnosis, self.diagnosis)

    @property
    def confirmed(self) -> bool:
        """Whether enough other cases show the same for the reading to be told."""
        return len({one.case for one in self.others} - {self.first.case}) >= CONFIRMING

    @property
    def all(self) -> list[Finding]:
        """All of them."""
        return [self.first, *self.others]


def _bare(words: str) -> str:
    """A reading without layers and numbers, which differ from case to case."""
    return ASIDE.sub("", LAYER.sub("", words)).partition(", in ")[0]


def _is_place(words: str) -> bool:
    """Whether words say only where numbers are wrong, which is true of its own case."""
    return words.startswith("wrong ")


def causes(findings: Iterable[Finding]) -> list[Cause]:
    """The causes behind findings, which come in the order of the run, the simplest case first."""
    found: list[Cause] = []
    for finding in findings:
        behind = next((one for one in found if _follows(finding, one.first)), None)
        if behind:
            behind.others.append(finding)
        else:
            found.append(Cause(finding))
    return found


def _follows(finding: Finding, first: Finding) -> bool:
    """Whether one finding may come of the cause of another."""
    if first.about == VALUE:
        return finding.fields.get("at_fault") in ("", first.fields.get("at_fault"))
    in_place = first.diagnosis.startswith(OF_ANOTHER)
    if in_place and finding.diagnosis.startswith(OF_ANOTHER) and _kind(first.key)[0] == "forward":
        return LAYER.sub("", first.diagnosis) == LAYER.sub("", finding.diagnosis)
    if first.stopped or finding.stopped:
        same = first.stopped == finding.stopped or first.key != ""
        return same or first.stopped.partition(" ")[0] == finding.stopped.partition(" ")[0] != ""
    if _kind(first.key) == _kind(finding.key) or not first.key or not finding.key:
        return True
    another = bool(first.diagnosis and finding.diagnosis) and first.diagnosis != finding.diagnosis
    if another and finding.about in STEPS:
        return False
    return _downstream(_kind(finding.key), _kind(first.key))


def _kind(key: str) -> tuple[str, str]:
    """A tensor's phase and name, those of recorded runs as in the text, without the layer."""
    phase, name = split_key(key)
    if phase == "eval" or (phase, name) == ("unwatched", "loss"):
        phase = "forward"
    if phase == "unwatched":
        phase = "gradient"
    tap = name.rpartition(".")[2]
    return phase, tap if name.startswith("layer") or "." not in name else f"d{tap}"


def _downstream(later: tuple[str, str], earlier: tuple[str, str]) -> bool:
    """Whether a tensor is computed from another, in some step."""
    phases = list(PHASES)
    (phase, name), (before, source) = later, earlier
    if before in ("eval", "read"):
        return (before, phase) == ("read", "sample")
    if phase != before:
        return phases.index(before) < phases.index(phase) and (before, phase) != (
            "adam_m",
            "adam_v",
        )
    if phase == "forward":
        return source in _behind().get(name, ())
    if phase == "backward":
        return name.removeprefix("d") in _behind().get(source.removeprefix("d"), ())
    return False


@cache
def _behind() -> dict[str, set[str]]:
    """For every tap of a layer, all that it is computed from, without the layer's name."""
    found: dict[str, set[str]] = {}
    for tap in taps(config_from({"norm_embedding": True}, "the graph of a layer")).values():
        own = {operand.rpartition(".")[2] for operand in tap.operands}
        behind = own.union(*(found.get(operand, set()) for operand in own))
        found[tap.name.rpartition(".")[2]] = behind
    return found


def also(cause: Cause) -> str:
    """What fails as well, in one line; nothing if that is all."""
    cases = {one.case for one in cause.others if one.about in STEPS} - {cause.first.case}
    words = [f"{len(cases)} case{'s' * (len(cases) > 1)}"] if cases else []
    abouts = dict.fromkeys(one.about for one in cause.others if one.about not in STEPS)
    words += [about for about in abouts if about != cause.first.about]
    return f"also fails: {', '.join(words)}" if words else ""


# --- what the failing cases share ----------------------------------------------------------------


FEWEST = 10  # cases of which a property says something


@dataclass(frozen=True)
class Moment:
    """A step of a case."""

    config: Config
    docs: list[list[int]]
    number: int  # from 1
    before: list[list[list[int]]]  # the batches of the steps before it

    @property
    def shape(self) -> tuple[int, int]:
        """B and T."""
        return len(self.docs), max(map(len, self.docs)) - 1


def _repeats(moment: Moment) -> bool:
    inputs = [token for doc in moment.docs for token in doc[:-1] if token != doc[0]]
    return len(inputs) > len(set(inputs))


def _again(moment: Moment) -> bool:
    return moment.shape in [replace(moment, docs=docs).shape for docs in moment.before]


Property = tuple[str, Callable[[Moment], bool]]

OF_STEPS: list[Property] = [
    ("from step 2 on", lambda at: at.number > 1),
    ("where a shape of a batch comes again", _again),
    ("in batches of several documents (B > 1)", lambda at: len(at.docs) > 1),
    ("in batches of one document", lambda at: len(at.docs) == 1),
    ("where documents are of unequal length", lambda at: len(set(map(len, at.docs))) > 1),
    ("at a single position (T = 1)", lambda at: at.shape[1] == 1),
    ("where there is more than one position (T > 1)", lambda at: at.shape[1] > 1),
    ("where a character is repeated", _repeats),
]
# fields with choices; the vocabulary and how documents are cropped show in the batches themselves
CHOSEN = [
    name
    for name, field in FIELDS.items()
    if field.metadata["choices"] and name not in ("vocabulary", "crop", "dtype", "documents")
]
OF_CASES: list[Property] = [
    ("tie_lm_head", lambda at: at.config.tie_lm_head),
    ("an lm_head of its own", lambda at: not at.config.tie_lm_head),
    ("norm_embedding", lambda at: at.config.norm_embedding),
    ("norm_embedding off", lambda at: not at.config.norm_embedding),
    ("grad_clip", lambda at: at.config.grad_clip > 0),
    ("weight_decay", lambda at: at.config.weight_decay > 0),
    ("warmup_steps", lambda at: at.config.warmup_steps > 0),
    ("n_head = 1", lambda at: at.config.n_head == 1),
    ("n_head > 1", lambda at: at.config.n_head > 1),
    ("one channel to a head", lambda at: at.config.head_dim == 1),
    ("more than one channel to a head", lambda at: at.config.head_dim > 1),
    ("one layer", lambda at: at.config.n_layer == 1),
    ("n_layer >= 2", lambda at: at.config.n_layer >= 2),
    ("n_layer >= 3", lambda at: at.config.n_layer >= 3),
    ("n_layer >= 4", lambda at: at.config.n_layer >= 4),
]


def _with(name: str, value: Any) -> Property:
    """That a field of the configuration has a value."""
    return f"{name} {value}", lambda at: bool(getattr(at.config, name) == value)


def shared(
    cause: Cause, runs: Sequence[Run], load: Callable[[str], Case], listed: Collection[str]
) -> str:
    """Which cases fail, and the property that tells them from those that do not, if one does.

    No property is told where the comparison did not run on the whole list, or on few cases; nor of
    a single case, where it is one property of several.

    runs      of all tests on cases, also those that passed
    load      gives a case by its name
    listed    the names of the cases that were to be run
    """
    abouts = {one.about for one in cause.all}
    kinds = STEPS if abouts & set(STEPS) else (cause.first.about,)
    own = [run for run in runs if run.about in kinds]
    failing = {(one.case, one.step) for one in cause.all if one.about in kinds}
    agreed = {(run.case, n) for run in own for n in range(1, run.agreed + 1)} - failing
    names, failed = {run.case for run in own}, {name for name, _ in failing}
    if len(names) < 2 or not failed <= names:
        return _only(cause)
    whole = all(
        {run.case for run in own if run.about == about} >= set(listed)
        for about in {one.about for one in cause.all if one.about in kinds}
    )
    passed = names - {run.case for run in own if run.failed} - failed
    count = f"all {len(names)} cases" if failed == names else f"{len(failed)} of {len(names)} cases"
    count += " that were run" * (not whole)
    moments = {pair: _moment(load(pair[0]), pair[1]) for pair in failing | agreed}
    named = [
        _with(field, value)
        for field in CHOSEN
        for value in sorted({getattr(moment.config, field) for moment in moments.values()})
    ]
    split = [
        words
        for words, holds in (*named, *OF_CASES)
        if passed
        and all(holds(moments[one]) for one in failing)
        and not any(holds(_moment(load(name), 1)) for name in passed)
    ]
    by_step = [
        words
        for words, holds in OF_STEPS
        if agreed
        and all(holds(moments[one]) for one in failing)
        and not any(holds(moments[one]) for one in agreed)
    ]
    enough = whole and len(names) >= FEWEST
    if not enough or (len(split) > 1 and min(len(failed), len(passed)) < 2):
        split = []
    if not enough or (len(by_step) > 1 and min(len(failing), len(agreed)) < 2):
        by_step = []
    words = [f"those with {' and '.join(split[:2])}"] if split else by_step[:2]
    if not words and len(failed) < min(4, len(names)):
        words = [", ".join(sorted(failed))]
    only = _only(cause)
    return (
        f"fails in {count}"
        + (f": {', '.join(words)}" if words else "")
        + (f"; {only}" * bool(only))
    )


def _moment(case: Case, number: int) -> Moment:
    docs = [case.docs(step) for step in range(max(number, 1))]
    return Moment(case.config, docs[-1], number, docs[:-1])


def _only(cause: Cause) -> str:
    """Where alone it fails, if it does so in one kind of comparison only."""
    abouts = {one.about for one in cause.all}
    if len(abouts) == 1 and not abouts & {*STEPS, VALUE}:
        return f"only in: {cause.first.about}"
    phases = {split_key(one.key)[0] for one in cause.all}
    if phases <= {"unwatched", "eval"}:
        return "only as it is recorded for training; the text as it stands agrees"
    return ""
