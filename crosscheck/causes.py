"""The findings of a run sorted into causes, and what the cases that fail have in common."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import chain
from typing import Any

from crosscheck.again import ON_RANKS, RECORDED, RECORDER
from crosscheck.cases import Case
from crosscheck.diagnose import OF_ANOTHER
from crosscheck.report import PLACE, with_diagnosis
from crosscheck.sides import REFUSED
from crosscheck.trace import PHASES, split_key
from microgpt.config import FIELDS, Config
from microgpt.settings import config_from
from microgpt.taps import taps

LAYER = re.compile(r"layer\d+\.")
OR = ", or "  # between two readings of the same numbers
ASIDE = re.compile(r" \(here also [^)]*\)|\d+(\.\d+)?(e-?\d+)?")  # what differs between cases
VALUE = "Value alone"  # the comparison of Value: its errors show in all that scalar computes
CONFIRMING = 3  # other cases that must fail alike before a report is printed during the run
STEPS = ("first steps", "steps one by one", "running freely")  # the comparisons of whole steps
ONE_FUNCTION = ("adam_m", "adam_v", "update", "sample")  # phases; it computes all their tensors
STALE = re.compile(r"(of|at) the (first step|step before)$")  # a reading: an old number was used
# how other comparisons run a case, for the title of a report
RUN_AS = {"micro-batches": "in micro-batches", "two ranks": "on two ranks", "float32": "in float32"}
# one of the two runs in micro-batches has no forms for small arrays: see in_micro_batches
OR_LARGER = ", or with the calls of a larger model"


@dataclass(frozen=True)
class Finding:
    """What a test found: a difference, or a side that stopped."""

    about: str  # the comparison, in words
    case: str
    step: int
    key: str
    headline: str
    diagnosis: str
    report: str
    stopped: str  # the line and the error with which a side stopped, if one did
    fields: Mapping[str, Any] = field(repr=False)
    side: str = ""  # the implementation at fault, if that is known

    @property
    def refused(self) -> bool:
        """Whether the recorder refused the text; wrong numbers are reported before that."""
        return f" {REFUSED}: " in self.stopped


@dataclass(frozen=True)
class Run:
    """How far a test came."""

    about: str
    case: str
    agreed: int  # how many steps agreed
    failed: int  # the step that did not agree; 0: all did


@dataclass
class Cause:
    """A finding, and the later findings that follow from it."""

    first: Finding
    others: list[Finding] = field(default_factory=list)

    @property
    def diagnosis(self) -> str:
        """The readings of the first finding that most other cases share; "" if none is shared.

        A small case allows several readings of its numbers. The other cases that count are those
        in which the same kind of tensor is the first to differ.
        """
        own, kind = self.first.diagnosis, _kind(self.first.key)
        others = {
            one.case: {_bare(words) for words in one.diagnosis.split(OR)}
            for one in self.others
            if one.about in STEPS and one.case != self.first.case
            and _kind(one.key) == kind and one.diagnosis
        }  # fmt: skip
        if not own or not others:
            return own
        votes = {
            words: sum(_bare(words) in readings for readings in others.values())
            for words in own.split(OR)
        }
        most = max(votes.values())
        if not most:
            return own if len(others) == 1 or _is_place(own) else ""
        return OR.join(words for words, count in votes.items() if count == most)

    @property
    def report(self) -> str:
        """The report of the first finding, with the readings that other cases share."""
        return with_diagnosis(self.first.report, self.first.diagnosis, self.diagnosis)

    @property
    def confirmed(self) -> bool:
        """Whether enough other cases have failed to tell which readings they share."""
        return len({one.case for one in self.others} - {self.first.case}) >= CONFIRMING

    @property
    def all(self) -> list[Finding]:
        """The first finding and the others."""
        return [self.first, *self.others]

    @property
    def kinds(self) -> tuple[str, ...]:
        """The comparison of the first finding; with a comparison of whole steps, all of those."""
        return STEPS if self.first.about in STEPS else (self.first.about,)

    @property
    def refusals(self) -> list[Finding]:
        """Those with which the recorder stops before a number is wrong, if the first is wrong."""
        return [one for one in self.others if one.refused and not self.first.refused]

    @property
    def alike(self) -> list[Finding]:
        """All but the refusals."""
        return [one for one in self.all if self.first.refused or not one.refused]


def _bare(words: str) -> str:
    """A reading without what differs from case to case: layers and numbers."""
    return ASIDE.sub("", LAYER.sub("", words)).partition(", in ")[0]


def _is_place(words: str) -> bool:
    """Whether a reading says only where numbers are wrong, which other cases need not share."""
    return words.startswith(PLACE)


def causes(findings: Iterable[Finding]) -> list[Cause]:
    """The causes of findings that are in the order of the run, the simplest case first."""
    found: list[Cause] = []
    for finding in findings:
        again = (one for one in found if any(_seen_again(finding, other) for other in one.all))
        after = (one for one in found if _follows(finding, one.first))
        if behind := next(chain(again, after), None):
            behind.others.append(finding)
        else:
            found.append(Cause(finding))
    return found


def _seen_again(finding: Finding, earlier: Finding) -> bool:
    """Whether a finding is what another comparison found in the same tensor of the same case.

    A finding that has a reading of its own is not, unless it is one of single precision, whose
    numbers tell readings apart less well.
    """
    same = finding.case == earlier.case and _kind(finding.key) == _kind(earlier.key)
    sides = {finding.side, earlier.side} - {""}
    unread = not _readings(finding) or finding.about == "float32"
    alike = len(sides) < 2 and _of_recorder(finding) == _of_recorder(earlier)
    return same and finding.key != "" and alike and unread


def _follows(finding: Finding, first: Finding) -> bool:
    """Whether a finding may have the same cause as an earlier one."""
    if first.about == VALUE:  # all that scalar gets wrong may follow
        return finding.fields.get("at_fault") in ("", first.fields.get("at_fault"))
    exchanged = all(one.diagnosis.startswith(OF_ANOTHER) for one in (first, finding))
    if exchanged and _kind(first.key)[0] == "forward":  # of the same cause, if with the same tensor
        return LAYER.sub("", first.diagnosis) == LAYER.sub("", finding.diagnosis)
    if _of_recorder(first) and (_of_recorder(finding) or split_key(finding.key)[0] in RECORDED):
        return True
    if not (finding.key or finding.stopped):  # it says that something is wrong, and not what
        return True
    if first.stopped or finding.stopped:  # after a wrong number, or at the same line
        same = first.stopped == finding.stopped or first.key != ""
        return same or first.stopped.partition(" ")[0] == finding.stopped.partition(" ")[0] != ""
    kind, earlier = _kind(finding.key), _kind(first.key)
    if kind == earlier or not first.key:
        return True
    if first.fields.get("again") and finding.fields.get("again"):
        return not (_of_recorder(first) or _of_recorder(finding))  # both are of batches
    both = _readings(first), _readings(finding)
    if both[0] & both[1] and _same_line(first, finding):
        return True
    if all(one.side and _is_stale(one) for one in (first, finding)) and first.side == finding.side:
        return True
    if kind[0] == earlier[0] in ONE_FUNCTION:
        return not all(both) or bool(both[0] & both[1])
    if kind[0] == earlier[0] == "gradient" and both[0] & both[1]:
        return True
    if (earlier[0], kind[0]) == ("adam_m", "adam_v"):  # neither is computed from the other
        return "adam_v" in first.fields.get("phases", ())
    readings = {first.diagnosis, finding.diagnosis} - {""}
    if len(readings) == 2 and finding.about in STEPS:
        return False
    if (earlier, kind) == (("gradient", "dlm_head"), ("gradient", "dwte")):  # dwte has it as a part
        return _is_tied(finding)
    return _downstream(kind, earlier)


def _same_line(first: Finding, finding: Finding) -> bool:
    """Whether two wrong tensors are computed at the same line of the side at fault."""
    lines = [{*one.fields.get("lines", ())} for one in (first, finding)]
    own = [line for line in lines[0] & lines[1] if line.startswith(f"{first.side}/")]
    return first.side == finding.side != "" and bool(own)


def _is_stale(finding: Finding) -> bool:
    """Whether all readings of a tensor of Adam say that a number of an earlier step was used."""
    readings = _readings(finding)
    adam = split_key(finding.key)[0] in ("adam_m", "adam_v", "update")
    return adam and bool(readings) and all(map(STALE.search, readings))


def _is_tied(finding: Finding) -> bool:
    """Whether the model has no lm_head of its own, by the gradients that agreed."""
    agreed = [key for key in finding.fields.get("agreed", ()) if key.startswith("gradient/")]
    return bool(agreed) and "gradient/dlm_head" not in agreed


def _of_recorder(finding: Finding) -> bool:
    """Whether what records or what runs the recording is at fault, by its line or by trials."""
    lines = tuple(f"vectorized/{name}.py:" for name in ("record", "lower", "replay"))
    tried = finding.fields.get("function", "")
    return finding.stopped.startswith(lines) or RECORDER in tried


def _readings(finding: Finding) -> set[str]:
    """Its readings without what differs from case to case, and without those of a place alone."""
    said = finding.diagnosis.split(OR) if finding.diagnosis else []
    return {_bare(words) for words in said if not _is_place(words)}


def _kind(key: str) -> tuple[str, str]:
    """A tensor's phase and name without the layer; a recorded run's as if the text had run."""
    phase, name = split_key(key)
    if phase == "eval" or (phase, name) == ("unwatched", "loss"):
        phase = "forward"
    if phase == "unwatched":
        phase = "gradient"
    tap = name.rpartition(".")[2]
    return phase, tap if name.startswith("layer") or "." not in name else f"d{tap}"


def _downstream(later: tuple[str, str], earlier: tuple[str, str]) -> bool:
    """Whether a kind of tensor is computed from an earlier kind."""
    phases = list(PHASES)
    (phase, name), (before, source) = later, earlier
    if before in ("eval", "read"):
        return (before, phase) == ("read", "sample")
    if phase != before:
        return phases.index(before) < phases.index(phase)
    if phase == "forward":
        return source in _behind().get(name, ())
    if phase == "backward":
        return name.removeprefix("d") in _behind().get(source.removeprefix("d"), ())
    return False


@cache
def _behind() -> dict[str, set[str]]:
    """For every tap, without its layer's name, all taps that it is computed from."""
    found: dict[str, set[str]] = {}
    for tap in taps(config_from({"norm_embedding": True}, "the graph of a layer")).values():
        own = {operand.rpartition(".")[2] for operand in tap.operands}
        behind = own.union(*(found.get(operand, set()) for operand in own))
        found[tap.name.rpartition(".")[2]] = behind
    return found


def also(cause: Cause, counted: bool = False) -> str:
    """The other cases and comparisons that fail, in one line; "" if there are none.

    counted    whether the line before counts the cases
    """
    others = cause.alike[1:]
    told = {one.case for one in others if one.about in cause.kinds} if counted else set()
    cases = {one.case for one in others if one.about in STEPS} - {cause.first.case} - told
    words = [f"{len(cases)} case{'s' * (len(cases) > 1)}"] if cases else []
    abouts = dict.fromkeys(one.about for one in others if one.about not in STEPS)
    words += [RUN_AS.get(about, about) for about in abouts if about != cause.first.about]
    return f"also fails: {', '.join(words)}" if words else ""


# --- what the failing cases share ----------------------------------------------------------------


FEWEST = 10  # cases; a property that separates fewer may do so by chance


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
    ("where the shape of a batch occurs again", _again),
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
    """The property that a field of the configuration has this value."""
    return f"{name} {value}", lambda at: bool(getattr(at.config, name) == value)


def consequences(
    cause: Cause, runs: Sequence[Run], load: Callable[[str], Case], listed: Collection[str]
) -> tuple[str, str, str]:
    """Which cases fail, where the recorder stops, and what else fails: a line for each, or "".

    The arguments are those of `shared`.
    """
    cases = shared(cause, runs, load, listed)
    return cases, refusals(cause), also(cause, counted=cases.startswith("fails in"))


def refusals(cause: Cause) -> str:
    """In how many cases the recorder stops before a number is wrong, in one line; "" if in none."""
    refused = [one for one in cause.refusals if one.about in STEPS]
    cases = {one.case for one in refused} - {one.case for one in cause.alike}
    lines = dict.fromkeys(one.stopped.partition(" ")[0] for one in refused)
    more = f"in {len(cases)} other case{'s' * (len(cases) > 1)} all numbers agree until"
    return f"{more} the recorder stops, at {', '.join(lines)}" if cases else ""


def shared(
    cause: Cause, runs: Sequence[Run], load: Callable[[str], Case], listed: Collection[str]
) -> str:
    """Which cases fail, and the property that they have and the cases that pass have not, if any.

    No property is given if the comparison ran on few cases or not on all that are listed, nor if
    only one case fails or passes and several properties would fit.

    runs      of all tests on cases, also of those that passed
    load      gives a case by its name
    listed    the names of the cases that were to be run
    """
    own = [run for run in runs if run.about in cause.kinds]
    found = [one for one in cause.alike if one.about in cause.kinds]
    failing, abouts = {(one.case, one.step) for one in found}, {one.about for one in found}
    names, failed = {run.case for run in own}, {name for name, _ in failing}
    compared = [run for run in own if run.about in abouts]  # what agrees in another way may fail so
    agreed = {(run.case, n) for run in compared for n in range(1, run.agreed + 1)}
    agreed |= {(one.case, one.step) for one in cause.refusals if _agrees(one, cause)}
    agreed = {(name, n) for name, n in agreed - failing if name in names}
    if len(names) < 2 or not failed <= names:
        return _only(cause, runs)
    whole = all({run.case for run in own if run.about == about} >= set(listed) for about in abouts)
    passed = names - {run.case for run in own if run.failed} - failed
    count = f"all {len(names)} cases" if failed == names else f"{len(failed)} of {len(names)} cases"
    count += " that were run" * (not whole)
    words: list[str] = []
    if whole and len(names) >= FEWEST:
        wrong, right = ([_moment(load(name), 1) for name in some] for some in (failed, passed))
        chosen = {(field, getattr(moment.config, field)) for field in CHOSEN for moment in wrong}
        split = _apart([*(_with(*pair) for pair in sorted(chosen)), *OF_CASES], wrong, right)
        wrong, right = ([_moment(load(name), n) for name, n in some] for some in (failing, agreed))
        by_step = _apart(OF_STEPS, wrong, right)
        words = _one(split, "those with ", "cases") if split else _one(by_step, "", "steps")
    if not words and min(n for _, n in failing) > 1:  # few cases tell no more than this
        always = len(failed) > 1 and all(n == 1 for _, n in agreed)
        words = ["from step 2 on" if always else "not in the first step"]
    if not words and len(failed) < min(4, len(names)):
        words = [", ".join(sorted(failed))]
    only = _only(cause, runs)
    return f"fails in {count}" + "".join(f": {one}" for one in words) + f"; {only}" * bool(only)


def _agrees(finding: Finding, cause: Cause) -> bool:
    """Whether the tensor that the cause makes wrong agreed before the recorder stopped."""
    return _kind(cause.first.key) in map(_kind, finding.fields.get("agreed", ()))


def _one(fitting: Sequence[str], before: str, of: str) -> list[str]:
    """The first property that fits, with the second, which tells the same cases or steps apart."""
    same = "".join(f" (here the same {of} as {before}{one})" for one in fitting[1:2])
    return [f"{before}{one}{same}" for one in fitting[:1]]


def _apart(
    properties: Iterable[Property], wrong: Sequence[Moment], right: Sequence[Moment]
) -> list[str]:
    """The properties that all wrong moments have, and no right one; none if that may be chance."""
    found = [
        words
        for words, holds in properties
        if right and all(map(holds, wrong)) and not any(map(holds, right))
    ]
    return found if len(found) < 2 or min(len(wrong), len(right)) > 1 else []


def _moment(case: Case, number: int) -> Moment:
    docs = [case.docs(step) for step in range(max(number, 1))]
    return Moment(case.config, docs[-1], number, docs[:-1])


def _only(cause: Cause, runs: Sequence[Run]) -> str:
    """The one comparison that fails, in words; "" if several fail, or those of whole steps.

    Nothing is said if no other comparison of this run came as far as the step that fails.
    """
    abouts, step = {one.about for one in cause.all}, min(one.step for one in cause.all)
    compared = any(run.about not in abouts and run.agreed >= step for run in runs)
    if len(abouts) == 1 and not abouts & {*STEPS, VALUE} and compared:
        or_larger = OR_LARGER * (cause.first.about == "micro-batches")
        return f"only {RUN_AS.get(cause.first.about, f'in: {cause.first.about}')}{or_larger}"
    if cause.first.fields.get("again") == ON_RANKS:
        return "only where ranks share a batch"
    if abouts & {*STEPS} == {STEPS[2]} and any(
        run.about == STEPS[1] and run.agreed >= step for run in runs
    ):
        return "a step that starts from the reference's state agrees"
    phases = {split_key(one.key)[0] for one in cause.all}
    if phases <= {*RECORDED}:
        return "only where the text is recorded; unrecorded, it agrees"
    return ""
