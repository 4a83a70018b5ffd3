"""Two traces held against each other: the first difference, or a count of what agreed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from crosscheck.cases import Case
from crosscheck.trace import Array, Step, real, split_key

KINK = 1e-9  # a ReLU input this close to 0 may fall on either side by rounding alone


@dataclass(frozen=True)
class Tolerance:
    """How far two numbers may lie apart: atol + rtol * |reference|."""

    rtol: float
    atol: float

    def __str__(self) -> str:
        return f"rtol {self.rtol:g}, atol {self.atol:g}"

    def shares(self, reference: Array, candidate: Array) -> Array:
        """The distance of each pair as a share of what is allowed; not a number counts as inf."""
        allowed = self.atol + self.rtol * np.abs(reference)
        with np.errstate(invalid="ignore", over="ignore"):
            shares = np.abs(candidate.astype("float64") - reference) / allowed
        return np.where(np.isfinite(reference) & np.isfinite(shares), shares, np.inf)


FLOAT64 = Tolerance(rtol=1e-9, atol=1e-12)


@dataclass(frozen=True)
class Disagreement:
    """Why a comparison failed: the first tensor, in order, that is not as it should be."""

    case: str
    step: int  # from 1
    key: str
    problem: str  # in words; the figures below are there when values differ
    shape: tuple[int, ...] = ()
    index: tuple[int, ...] = ()
    reference: float = 0.0
    candidate: float = 0.0
    tolerance: Tolerance = FLOAT64
    exceeding: int = 0
    elements: int = 0
    agreed: tuple[str, ...] = ()  # the keys of this step that agreed before it


@dataclass
class Tally:
    """What was compared, and how close it came to failing."""

    steps: int = 0
    tensors: int = 0
    elements: int = 0
    worst: float = 0.0  # the largest share of the allowed error that any element used
    worst_key: str = ""

    def add(self, other: Tally) -> None:
        """Take another tally into this one."""
        self.steps += other.steps
        self.tensors += other.tensors
        self.elements += other.elements
        if other.worst > self.worst:
            self.worst, self.worst_key = other.worst, other.worst_key


@dataclass
class Outcome:
    """What a comparison of two traces found."""

    case: str
    tally: Tally = field(default_factory=Tally)
    disagreement: Disagreement | None = None


def compare(
    case: Case,
    reference: Iterable[Step],
    candidate: Iterable[Step],
    tolerance: Tolerance = FLOAT64,
) -> Outcome:
    """Hold the steps of two traces against each other, up to the first difference."""
    outcome = Outcome(case.name)
    for step, (ours, theirs) in enumerate(zip(reference, candidate), 1):
        outcome.disagreement = _compare_step(case, step, ours, theirs, tolerance, outcome.tally)
        if outcome.disagreement:
            return outcome
        outcome.tally.steps += 1
    if outcome.tally.steps == 0:
        outcome.disagreement = Disagreement(case.name, 0, "", "no step was compared")
    return outcome


def _compare_step(
    case: Case, step: int, reference: Step, candidate: Step, tolerance: Tolerance, tally: Tally
) -> Disagreement | None:
    agreed: list[str] = []

    def disagree(key: str, problem: str, **figures: object) -> Disagreement:
        return Disagreement(case.name, step, key, problem, agreed=tuple(agreed), **figures)  # type: ignore[arg-type]

    for key in [*reference, *[key for key in candidate if key not in reference]]:
        if key not in reference or key not in candidate:
            side = "candidate" if key in reference else "reference"
            return disagree(key, f"is missing in the {side}")
        ours, theirs = reference[key], candidate[key]
        if ours.shape != theirs.shape:
            return disagree(key, f"has shape {theirs.shape} where it should be {ours.shape}")
        there = real(key, ours.shape, reference["batch/tokens"])
        shares = np.where(there, tolerance.shares(ours, theirs), 0.0)
        if not (shares <= 1).all():
            index = np.unravel_index(np.argmax(shares > 1), shares.shape)
            return disagree(
                key,
                "disagrees",
                shape=ours.shape,
                index=tuple(map(int, index)),
                reference=float(ours[index]),
                candidate=float(theirs[index]),
                tolerance=tolerance,
                exceeding=int((shares > 1).sum()),
                elements=int(there.sum()),
            )
        vacuous = _vacuous(case, key, ours[there], theirs, ours)
        if vacuous:
            return disagree(key, vacuous)
        agreed.append(key)
        tally.tensors += 1
        tally.elements += int(there.sum())
        if shares.max(initial=0.0) > tally.worst:
            tally.worst, tally.worst_key = float(shares.max()), key
    return None


def _vacuous(case: Case, key: str, there: Array, candidate: Array, reference: Array) -> str:
    """Why agreement on this tensor would prove nothing, or is not what the case declares."""
    phase, name = split_key(key)
    if phase == "batch":
        return ""
    # a parameter whose gradient is zero has moments and an update of zero as well
    gradient = f"d{name}" if phase in ("adam_m", "adam_v", "update") else name
    if gradient in case.zero:
        if np.any(there):
            return "is not zero, and the case declares it to be"
    elif not np.any(there):
        return "is zero everywhere, so that agreement proves nothing, and the case does not say why"
    if phase == "gradient" and name in case.zero_rows:
        rows = case.tokenizer.encode(case.zero_rows[name]["chars"])
        if np.any(reference[rows]) or np.any(candidate[rows]):
            return "is not exactly zero in the rows that the case declares to be unused"
    watched = phase == "forward" and name.endswith(".mlp_pre") and not case.kink
    if watched and np.abs(there).min() < KINK:
        return f"comes within {KINK:g} of the kink of the ReLU, where rounding decides the slope"
    return ""
