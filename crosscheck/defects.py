"""Named defects: classic bugs, planted one at a time to test that the crosscheck catches them.

fixtures/defects.yaml lists the defects, and tells of each what goes wrong and why.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from types import CodeType, ModuleType
from typing import Any

import numpy as np
import yaml

from crosscheck.cases import load_case
from crosscheck.compare import Disagreement, compare, compare_teacher_forced
from crosscheck.noise import noise
from crosscheck.report import WIDTH
from crosscheck.tolerance import Standard, float64
from crosscheck.trace import Step, split_key, trace
from microgpt.errors import MicrogptError
from microgpt.settings import FIXTURES
from microgpt.strict_yaml import Loader

ROOT = FIXTURES.parent
# every line in which a defect is planted runs in at least one of these cases
PANEL = (
    "ragged-batch",
    "micro-batches",
    "repeated-token",
    "longer-than-context",
    "two-layers",
    "tied-two-layers",
    "microgpt-243",
    "large-logits",
    "decay-and-clip",
    "on-the-kink",
    "large-attention-logits",
)
STEPS = 4


@dataclass(frozen=True)
class Patch:
    """A piece of source text and its replacement."""

    file: str
    old: str
    new: str


@dataclass(frozen=True)
class Defect:
    """A bug: the patches that plant it, and what the crosscheck must say."""

    name: str
    story: str
    patches: tuple[Patch, ...]
    first: str  # a regular expression for the key of the first tensor to differ
    says: str = ""  # a regular expression for the diagnosis; "" if none is promised
    case: str = ""  # the case to try first

    @property
    def package(self) -> str:
        """The implementation in which the defect is planted."""
        return self.patches[0].file.partition("/")[0]


@dataclass
class Verdict:
    """What the crosscheck says of a defect."""

    defect: Defect
    first: Disagreement | None = None
    caught_by: set[str] = field(default_factory=set)  # the phases that differ
    caught_alone: set[str] = field(default_factory=set)  # those that differ with teacher forcing

    @property
    def located(self) -> bool:
        """Whether the first tensor to differ is the one that the defect computes."""
        return self.first is not None and bool(re.match(self.defect.first, self.first.key))

    @property
    def understood(self) -> bool:
        """Whether the diagnosis is the right one, or none was promised."""
        return bool(re.search(self.defect.says, self.diagnosis))

    @property
    def diagnosis(self) -> str:
        """What the report says of the mistake."""
        said = (self.first.diagnosis, self.first.again) if self.first else ()
        return "; ".join(filter(None, said))


def load_defects() -> list[Defect]:
    """All defects, in the order of the file."""
    with open(FIXTURES / "defects.yaml", encoding="utf-8") as file:
        entries: list[dict[str, Any]] = yaml.load(file.read(), Loader)
    return [
        Defect(
            name=entry["name"],
            story=entry["story"],
            patches=tuple(
                Patch(part["file"], part["old"], part["new"])
                for part in [entry, *entry.get("also", [])]
            ),
            first=entry["first"],
            says=entry.get("says", ""),
            case=entry.get("case", ""),
        )
        for entry in entries
    ]


def judge(defect: Defect, panel: Sequence[str] = PANEL) -> Verdict:
    """What the crosscheck says of a defect, in the first case of the panel that catches it.

    scalar is the reference and vectorized the candidate, as for a user, in either of which the
    defect may be.
    """
    names = dict.fromkeys([*filter(None, [defect.case]), *panel])
    allowed = {name: standard(name) for name in names}  # measured before the defect is planted
    with planted(defect.patches), np.errstate(all="ignore"):
        for name in names:
            case = load_case(name)
            sound = reference_steps(name, "vectorized" if defect.package == "scalar" else "scalar")
            faulty: list[Step] = []
            steps = _recorded(trace(case, defect.package, "float64", STEPS), faulty)
            ours, theirs = (steps, sound) if defect.package == "scalar" else (sound, steps)
            try:
                found = compare(case, ours, theirs, allowed[name], ("scalar", "vectorized")).found
            except Exception as error:  # no tensor differs, so only `first: $` expects this
                stopped = f"stops with {type(error).__name__}"
                return Verdict(defect, Disagreement(name, 1, "", stopped, diagnosis=str(error)))
            if found:
                reference = faulty if defect.package == "scalar" else sound
                alone = compare_teacher_forced(case, reference, "vectorized", allowed[name]).found
                return Verdict(
                    defect,
                    found[0],
                    caught_by={split_key(one.key)[0] for one in found},
                    caught_alone={split_key(one.key)[0] for one in alone},
                )
    return Verdict(defect)


def _recorded(steps: Iterable[Step], record: list[Step]) -> Iterator[Step]:
    """The steps, each of which is also added to the record."""
    for step in steps:
        record.append(step)
        yield step


@cache
def reference_steps(case_name: str, backend: str) -> tuple[Step, ...]:
    """The trace of an implementation without a defect."""
    case = load_case(case_name)
    return tuple(trace(case, backend, "float64", STEPS))


@cache
def standard(case_name: str) -> Standard:
    """What is allowed in a case, by the noise of scalar/ without a defect."""
    return float64(noise(load_case(case_name), reference_steps(case_name, "scalar")))


@contextmanager
def planted(patches: Sequence[Patch]) -> Iterator[None]:
    """Within this context, a patched package is imported anew, with the patches."""
    sources: dict[str, str] = {}
    for patch in patches:
        source = sources.get(patch.file) or (ROOT / patch.file).read_text(encoding="utf-8")
        if source.count(patch.old) != 1:
            raise MicrogptError(
                f"{patch.file}: a defect replaces {patch.old!r}, which is there"
                f" {source.count(patch.old)} times and not once; adapt the defect to the text"
            )
        sources[patch.file] = source.replace(patch.old, patch.new)
    packages = {file.partition("/")[0] for file in sources}
    modules = {file.removesuffix(".py").replace("/", "."): text for file, text in sources.items()}
    shelved = _shelve(packages)
    finder = _Finder(modules)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        _shelve(packages)
        sys.modules.update(shelved)


def _shelve(packages: set[str]) -> dict[str, ModuleType]:
    """The imported modules of these packages, which are taken out of sys.modules."""
    names = [name for name in sys.modules if name.partition(".")[0] in packages]
    return {name: sys.modules.pop(name) for name in names}


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """Finds the patched modules; Python's own finders find all others."""

    def __init__(self, sources: Mapping[str, str]) -> None:
        self.sources = sources

    def find_spec(
        self, fullname: str, path: Any = None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self.sources:
            return None
        return importlib.util.spec_from_file_location(fullname, _path(fullname), loader=self)

    def get_source(self, fullname: str) -> str:
        return self.sources[fullname]

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.sources[fullname], _path(fullname))


def _path(fullname: str) -> str:
    """The file of a module of the project."""
    return str(ROOT / fullname.replace(".", "/")) + ".py"


LEGEND = """\
Caught by  F forward taps and loss, B backward taps, G parameter gradients,
           T training unwatched, M Adam's m, V Adam's v, U update,
           S samples drawn; lower case: also with the gradients of the
           reference, so that the defect is in Adam
"""
MARKS = {
    "F": "forward",
    "B": "backward",
    "G": "gradient",
    "T": "unwatched",
    "M": "adam_m",
    "V": "adam_v",
    "U": "update",
    "S": "sample",
}


def row(verdict: Verdict) -> str:
    """The lines on a defect: what caught it, the first tensor that differs, and the diagnosis."""
    seen = ""
    for letter, phase in MARKS.items():
        alone = phase in verdict.caught_alone and letter in "MVU"
        mark = letter.lower() if alone else letter
        seen += mark if phase in verdict.caught_by else "."
    first = verdict.first.key or verdict.first.problem if verdict.first else "NOT CAUGHT"
    wrong = "" if verdict.located else "  (expected " + verdict.defect.first + ")"
    lines = [f"{verdict.defect.name:37} {seen} {first}{wrong}"]
    indent = " " * 8
    lines += textwrap.wrap(
        verdict.diagnosis, WIDTH, initial_indent=indent, subsequent_indent=indent
    )
    return "\n".join(lines)


def total(verdicts: Sequence[Verdict]) -> str:
    """How many defects were caught, located and explained."""
    caught = sum(verdict.first is not None for verdict in verdicts)
    located = sum(verdict.located for verdict in verdicts)
    promised = [verdict for verdict in verdicts if verdict.defect.says]
    understood = sum(verdict.understood for verdict in promised)
    return (
        f"{caught} of {len(verdicts)} caught, {located} located,"
        f" {understood} of {len(promised)} promised diagnoses given"
    )
