"""Two traces held against each other: the first difference, or a count of what agreed."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import count

import numpy as np

from crosscheck.again import RECORDED, UPDATED, Again, again, packed, updated_again
from crosscheck.at_once import Passed, passing
from crosscheck.cases import Case
from crosscheck.diagnose import NOT_CLEARED, OF_ANOTHER, OF_SHARES, diagnose
from crosscheck.explain import Expression, expression, shown
from crosscheck.lines import function_of, lines_of, place_of
from crosscheck.operations import Around, calls
from crosscheck.read_again import drawn_again
from crosscheck.samples import ONE_BY_ONE, parted
from crosscheck.sides import IncompleteError, Stop
from crosscheck.tolerance import FLOAT64, Standard, Tolerance
from crosscheck.trace import (
    Array,
    Step,
    axes,
    expected_shape,
    keys,
    real,
    split_key,
    teacher_forced,
)
from crosscheck.where import where
from microgpt.cli.whereabouts import IMPLEMENTATIONS
from microgpt.config import Config
from microgpt.train import learning_rate

SIDES = ("reference", "candidate")
COUNTED = ("batch", "sample")  # phases of token ids, which have no precision
WATCHED = ("forward", "read", "backward", "gradient")  # in the order in which a step keeps them
TYPICAL = 0.1  # of the median size; a smaller element may be small by accident
NEAR = 0.5  # of the largest share; elements above it are equally good to show
TOO_MANY_KEYS = (
    "a position looks at more keys than there are up to it: one list takes the keys or values of"
    " several layers or documents"
)
KINK = 1e-9  # a ReLU input this close to 0 may fall on either side by rounding alone


@dataclass(frozen=True)
class Disagreement:
    """A tensor that is not as it should be, and everything that a report says about it."""

    case: str
    step: int  # from 1
    key: str
    problem: str  # in words; where values differ, the figures below say how
    shape: tuple[int, ...] | None = None
    index: tuple[int, ...] = ()
    reference: float = 0.0
    candidate: float = 0.0
    tolerance: Tolerance = FLOAT64.tolerances["forward"]
    exceeding: int = 0
    elements: int = 0
    agreed: tuple[str, ...] = ()  # the keys of this step that agreed before it
    formula: str = ""  # the scalar expression behind the element
    operands: Mapping[str, str] = field(default_factory=dict)  # of the formula, on the right side
    expected: float = 0.0  # the value of the formula with these operands
    at_fault: str = ""  # the side whose number is not the value of the formula: one of SIDES
    recomputed: float = 0.0  # the value of the formula with the operands of the side at fault
    diagnosis: str = ""  # what the mistake looks like, if that is known
    stopped_in: str = ""  # the phase in which a side stopped, before any number was wrong
    again: str = ""  # which parts of a recorded batch are right when computed again
    where: str = ""  # which elements are wrong, if they form a pattern
    phases: tuple[str, ...] = ()  # all phases in which this step differs
    texts: tuple[tuple[str, str], ...] = ()  # label and text of token ids
    lines: tuple[str, ...] = ()  # where both texts compute the tensor
    function: str = ""  # that computes it on the side at fault
    stop: Stop | None = None  # where and why a side stopped within this step

    @property
    def written_later(self) -> str:
        """The key of the later tap whose numbers this tap has, or "": it was changed in place."""
        tap = self.diagnosis.removeprefix(OF_ANOTHER).strip().partition(" ")[0]
        key, own = f"forward/{tap}", self.diagnosis.startswith(OF_ANOTHER)
        return key if own and self.key.startswith("forward/") and key not in self.agreed else ""


@dataclass
class Tally:
    """What was compared, and how close it came to failing."""

    steps: int = 0
    tensors: int = 0
    elements: int = 0
    worst: float = 0.0  # the largest share of the allowed error that any element used
    worst_key: str = ""
    excused: dict[str, int] = field(default_factory=dict)  # elements that pass thanks to atol
    within: int = 0  # tensors within the least noise that there can be; they are not in `worst`

    def count(self, key: str, elements: int, excused: int, share: float, least: bool) -> None:
        """Count a tensor that agrees; `least`: within the least noise that there can be."""
        phase = split_key(key)[0]
        self.tensors += 1
        self.elements += elements
        if excused:
            self.excused[phase] = self.excused.get(phase, 0) + excused
        if least:
            self.within += 1
        elif share > self.worst:
            self.worst, self.worst_key = share, key

    def add(self, other: Tally) -> None:
        """Add the counts of another tally."""
        self.steps += other.steps
        self.tensors += other.tensors
        self.elements += other.elements
        self.within += other.within
        for phase, number in other.excused.items():
            self.excused[phase] = self.excused.get(phase, 0) + number
        if other.worst > self.worst:
            self.worst, self.worst_key = other.worst, other.worst_key


@dataclass
class Outcome:
    """What a comparison of two traces found: the first disagreement of each phase, in order."""

    case: str
    tally: Tally = field(default_factory=Tally)
    found: list[Disagreement] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what was left out
    # for the map: the largest share of the allowed error by step and key, and the shares of the
    # elements of the first tensor that disagrees
    shares: dict[int, dict[str, float]] = field(default_factory=dict)
    wrong: Array | None = field(default=None, repr=False)

    def note(self, step: int, key: str, share: float) -> None:
        """Keep the share of a tensor, if it is the largest of its step."""
        shares = self.shares.setdefault(step, {})
        shares[key] = max(shares.get(key, 0.0), share)

    def worst(self) -> dict[str, float]:
        """The largest share of each tensor, over all steps."""
        keys = dict.fromkeys(key for shares in self.shares.values() for key in shares)
        return {key: max(one.get(key, 0.0) for one in self.shares.values()) for key in keys}


def compare(
    case: Case,
    reference: Iterable[Step],
    candidate: Iterable[Step],
    standard: Standard = FLOAT64,
    names: Sequence[str] = (),
    after: int = 0,
    before: tuple[Step, Step] | None = None,
) -> Outcome:
    """What two traces show when held against each other, up to the first step that differs.

    names     of the two implementations, if they can run again for a better explanation
    after     how many steps came before these
    before    the last of those steps, of both sides, for a better explanation
    """
    outcome = Outcome(case.name)
    both = _until_stopped(reference), _until_stopped(candidate)
    for number in count(after + 1):
        (ours, our_stop), (theirs, their_stop) = (next(steps, (None, None)) for steps in both)
        if ours is None and theirs is None:
            break
        if ours is None or theirs is None:
            side = "reference" if ours is None else "candidate"
            problem = f"is missing: the {side} stops after step {number - 1}"
            outcome.found.append(Disagreement(case.name, number, "", problem))
            return outcome
        stops = our_stop, their_stop
        compare_step(case, number, ours, theirs, standard, outcome, stops)
        if outcome.found:
            outcome.found[0] = explained(case, outcome.found, ours, theirs, before, standard, names)
            return outcome
        outcome.tally.steps += 1
        before = ours, theirs
    if outcome.tally.steps == 0:
        outcome.found.append(Disagreement(case.name, 0, "", "no step was compared"))
    return outcome


def compare_teacher_forced(
    case: Case,
    reference_steps: Iterable[Step],
    candidate: str,
    standard: Standard = FLOAT64,
    reference: str = "",
) -> Outcome:
    """What an implementation shows against a trace, each step begun from the trace's state."""
    stops: list[Stop | None] = []
    kept: list[Step] = []  # without samples, which teacher forcing does not draw
    for step, stop in _until_stopped(reference_steps):
        kept.append({key: step[key] for key in step if split_key(key)[0] != "sample"})
        stops.append(stop)

    def again() -> Iterator[Step]:
        for step, stop in zip(kept, stops):
            if stop:
                raise IncompleteError(step, stop)
            yield step

    names = (reference, candidate) if reference else ()
    begun = [step for step in kept if "entry/wte" in step]
    forced = teacher_forced(case, candidate, standard.dtype, begun)
    return compare(case, again(), forced, standard, names)


def _until_stopped(steps: Iterable[Step]) -> Iterator[tuple[Step, Stop | None]]:
    """Each step; if the side stops within a step, what the step has so far, and the stop."""
    try:
        for step in steps:
            yield step, None
    except IncompleteError as error:
        yield error.step, error.stop


def compare_step(
    case: Case,
    step: int,
    reference: Step,
    candidate: Step,
    standard: Standard,
    outcome: Outcome,
    stops: tuple[Stop | None, Stop | None] = (None, None),
) -> None:
    """Add to the outcome the first tensor of each phase that differs in this step, and counts."""
    agreed: list[str] = []
    noted: set[str] = set()
    there = {*reference, *candidate}
    order = [key for key in keys(case.config, case.tokenizer.vocab_size) if key in there]
    passed = passing(step, reference, candidate, standard)
    ended_early = [side for side, stop in zip((reference, candidate), stops) if stop]
    for key in order:
        if any(_not_reached(key, side, order) for side in ended_early):
            continue
        found = _compare_tensor(
            case, step, key, reference, candidate, standard, outcome, passed.get(key)
        )
        if found is None:
            agreed.append(key)
        elif split_key(key)[0] not in noted:
            noted.add(split_key(key)[0])
            outcome.found.append(replace(found, agreed=tuple(agreed)))
    ended = next((stop for stop in stops if stop), None)
    if ended and not outcome.found:
        at_fault = SIDES[stops.index(ended)]
        outcome.found.append(stopped(case.name, step, at_fault, ended, tuple(agreed)))
    if ended:
        outcome.found[0] = replace(outcome.found[0], stop=ended)


def stopped(
    case: str, step: int, at_fault: str, stop: Stop, agreed: tuple[str, ...] = ()
) -> Disagreement:
    """The disagreement of a side that stops before any number is wrong."""
    kind, _, words = stop.error.partition(": ")
    problem = f"stops with {kind}"
    if stop.refused:
        words = words.removesuffix(" cannot be recorded")
        problem = f"stops: the recorder cannot repeat {words}"
    return Disagreement(
        case, step, "", problem, at_fault=at_fault, agreed=agreed, diagnosis=words, stop=stop
    )


def _not_reached(key: str, step: Step, order: Sequence[str]) -> bool:
    """Whether a side that has stopped did so before it came to this tensor."""
    phase, _ = split_key(key)
    phases = {split_key(one)[0] for one in step}
    if phase in WATCHED and phases & {*WATCHED[WATCHED.index(phase) + 1 :], "gradient"}:
        return False  # a later phase has tensors, so this phase was complete
    held = [order.index(one) for one in step if split_key(one)[0] == phase]
    return key not in step and order.index(key) > max(held, default=-1)


def explained(
    case: Case,
    found: list[Disagreement],
    ours: Step,
    theirs: Step,
    before: tuple[Step, Step] | None,
    standard: Standard,
    names: Sequence[str] = (),
) -> Disagreement:
    """The first disagreement of a step, with the expression behind its element and a diagnosis.

    The side at fault is the one whose number is not what its own operands give. What a step is too
    incomplete to say is left out.

    before    the steps of both sides before this one
    names     of the two implementations, if they can run again for a better explanation
    """
    first = replace(found[0], phases=tuple(split_key(one.key)[0] for one in found if one.key))
    phase, numbers = split_key(first.key)[0], first.shape is not None
    if numbers:
        first = _with_side(case, first, ours, theirs, standard)
    sound, faulty = (theirs, ours) if first.at_fault == "reference" else (ours, theirs)
    earlier = before[sound is theirs] if before else None
    incomplete = (KeyError, IndexError, TypeError, ValueError, AttributeError)
    if numbers:
        with suppress(*incomplete):
            first = _with_expression(case, first, sound)
    with suppress(*incomplete):
        words = diagnose(case, first.step, first.key, sound, faulty, earlier, standard.dtype)
        first = replace(first, diagnosis=words or first.diagnosis)
    if first.stop and not first.key:
        phase = _stopped_in(faulty)
        first = replace(first, stopped_in=phase)
    if "vectorized" in names:
        first = _with_trials(case, first, phase, theirs, standard.dtype)
    if numbers and phase in COUNTED:
        words, texts = parted(case, first.step, first.key, ours, theirs, names)
        # both are true: what was done, and in which function; but a reading is of `sample` alone
        if first.diagnosis and words and words != ONE_BY_ONE:
            words, texts = first.diagnosis, (*texts, ("", words))
        first = replace(first, diagnosis=words or first.diagnosis, texts=texts)
    elif numbers:
        words = _where(case, first, ours, theirs, standard)
        first = replace(first, where="" if words in first.diagnosis else words)
    if first.key:
        side = dict(zip(SIDES, names)).get(first.at_fault, "")
        function = first.function or _told_by(first, case.config, side)
        if not function:
            caller = _is_given_another(case, first, sound)
            function = function_of(first.key, case.config, side, first.agreed, caller)
        first = replace(first, lines=lines_of(first.key, case.config), function=function)
    return first


def _is_given_another(case: Case, found: Disagreement, sound: Step) -> bool:
    """Whether an operation is right, and is given a tensor that is none of its operands."""
    given = re.match(r"(?:the scale of )?([\w.]+) in place of ", found.diagnosis)
    phases = "forward", "backward", "entry"
    if not given or not any(f"{phase}/{given[1]}" in sound for phase in phases):
        return False
    with suppress(KeyError):  # an operand is missing
        operations = calls(Around(case.config, sound), found.key)
        return all(given[1] != slot.name for call in operations for slot in call.slots.values())
    return False


def _told_by(found: Disagreement, config: Config, side: str) -> str:
    """The function that a diagnosis is about, and its place; "" if that is none of its own."""
    phase = split_key(found.key)[0]
    if found.written_later:
        return function_of(found.written_later, config, side)
    said = " ".join([found.diagnosis, *(words for _, words in found.texts)])
    if of_draws := re.search(r"(\w+)\.sample\.probabilities of the same", said):
        return place_of(f"{of_draws[1]}/sample.py", "probabilities")
    if found.diagnosis == ONE_BY_ONE:
        return place_of("vectorized/sample.py", "sample_many")
    if side in IMPLEMENTATIONS and phase in ("adam_m", "adam_v") and "clip" in found.diagnosis:
        return place_of(f"{side}/adam.py", "clip")
    if side in IMPLEMENTATIONS and NOT_CLEARED in found.diagnosis:
        return place_of(f"{side}/backend.py", "backward")
    return ""


def _stopped_in(step: Step) -> str:
    """The phase in which a side stopped whose step came so far; "" for the text by itself."""
    begun = {split_key(key)[0] for key in step}
    if "params" in begun:
        return "sample"
    if "unwatched" in begun:
        return "update"
    return "unwatched" if "gradient" in begun else ""


def _with_trials(
    case: Case, found: Disagreement, phase: str, theirs: Step, dtype: str
) -> Disagreement:
    """The disagreement of recorded calls with what trials of the batch and its parts show."""
    tried: Again | None = None
    if found.stop and found.stop.refused:
        return found if found.key else replace(found, again=packed(case, found.step, theirs))
    if phase in RECORDED:
        tried = again(case, found.step, phase, theirs, dtype)
    elif found.shape is not None and phase in UPDATED and found.at_fault == "candidate":
        both = found.recomputed, found.candidate
        tried = updated_again(case, found.step, found.key, found.index, both, theirs, dtype)
    if tried is None:
        return found
    said = found.diagnosis.removeprefix(OF_SHARES).removeprefix(": ")
    before = "what runs the recorded text: " * tried.files.startswith("vectorized/")
    function = f"{before}{tried.files}"
    if not function:  # the text is at fault
        key = found.key.replace("unwatched/d", "gradient/d").replace("unwatched/", "forward/")
        function = function_of(key, case.config, "vectorized")
    return replace(found, diagnosis=tried.leaves or said, again=tried.words, function=function)


def _with_side(
    case: Case, found: Disagreement, ours: Step, theirs: Step, standard: Standard
) -> Disagreement:
    """The disagreement with the side at fault, if one side alone contradicts its own operands."""
    own = [_follows(case, found, step, standard) for step in (ours, theirs)]
    wrong = [(side, one[0]) for side, one in zip(SIDES, own) if one and not one[1]]
    if None in own or len(wrong) != 1:
        return found
    return replace(found, at_fault=wrong[0][0], recomputed=wrong[0][1])


def _with_expression(case: Case, found: Disagreement, sound: Step) -> Disagreement:
    """The disagreement with the expression behind its element, if there is one."""
    behind = behind_element(case, found.step, found.key, found.index, sound)
    if behind is None:
        return found
    operands = {name: shown(value) for name, value in behind.operands.items()}
    return replace(found, formula=behind.formula, operands=operands, expected=float(behind.value))


def _where(case: Case, found: Disagreement, ours: Step, theirs: Step, standard: Standard) -> str:
    """Which elements are wrong, in words; "" if they form no pattern."""
    a, b, tokens = ours[found.key], theirs[found.key], ours["batch/tokens"]
    there = real(found.key, a.shape, tokens)
    wrong = standard.tolerance(found.step, found.key).shares(a, b) > 1
    return where(case, found.key, wrong & there, there & ((a != 0) | (b != 0)), tokens)


def behind_element(
    case: Case, number: int, key: str, index: tuple[int, ...], step: Step
) -> Expression | None:
    """The expression behind an element; None if there is none."""
    if key == "read/logits":
        t, i = index
        formula = f"logits[b=0, t={t}, c={i}] of the forward pass, which reads the same tokens"
        return Expression(formula, {}, float(step["forward/logits"][0, t, i]))
    return expression(case, number, key, index, step)


def _follows(
    case: Case, found: Disagreement, step: Step, standard: Standard
) -> tuple[float, bool] | None:
    """The value of an element's expression, and whether the element is that; None without one."""
    if split_key(found.key)[0] == "sample":
        with suppress(KeyError, IndexError, ArithmeticError, ValueError):
            again = drawn_again(case, found.key, found.step, step)
            return 0.0, np.array_equal(again, step[found.key])
        return None
    try:
        behind = behind_element(case, found.step, found.key, found.index, step)
    except (KeyError, IndexError, ArithmeticError, ValueError, TypeError):
        return None
    if behind is None:
        return None
    number = np.asarray(step[found.key][found.index])
    tolerance = standard.tolerance(found.step, found.key).at(found.index)
    share = tolerance.shares(np.asarray(behind.value), number)
    return float(behind.value), bool(share <= 1)


def misshapen(
    case: Case, step: int, key: str, tensor: Array, right: tuple[int, ...], side: str
) -> Disagreement | None:
    """That a tensor of a side holds no numbers, or is not of the right shape; None if neither."""
    words = ""
    if tensor.dtype.kind == "O":
        problem = f"{tensor[()]}, in the {side}"
        if "U" in axes(key) and "ragged" in problem:
            words = TOO_MANY_KEYS
    elif tensor.shape != right:
        problem = f"has shape {tensor.shape} in the {side}, and should have {right}"
        if "H" in axes(key) and tensor.ndim == len(right):
            axis = axes(key).index("H")
            found, wanted = tensor.shape[axis], right[axis]
            if found != wanted:
                words = f"{found} head{'s' * (found != 1)}, and n_head is {wanted}"
    else:
        return None
    return Disagreement(case.name, step, key, problem, at_fault=side, diagnosis=words)


def _malformed(
    case: Case, step: int, key: str, reference: Step, candidate: Step, standard: Standard
) -> Disagreement | None:
    """Why two tensors cannot be compared: absence, no numbers, shape or precision; or None."""
    if key not in reference or key not in candidate:
        side = "candidate" if key in reference else "reference"
        problem = f"was never written by the {side}"
        return Disagreement(case.name, step, key, problem, at_fault=side)
    ours, theirs = reference[key], candidate[key]
    if ours.shape != theirs.shape or "O" in (ours.dtype.kind, theirs.dtype.kind):
        wanted = expected_shape(key, case, reference["batch/tokens"])
        right = theirs.shape if theirs.shape == wanted else ours.shape
        for side, tensor in zip(SIDES, (ours, theirs)):
            if wrong := misshapen(case, step, key, tensor, right, side):
                return wrong
    phase, _ = split_key(key)
    if phase not in (*COUNTED, "eval") and theirs.dtype != standard.dtype and theirs.ndim:
        problem = f"is {theirs.dtype}, and {standard.dtype} was promised"
        return Disagreement(case.name, step, key, problem)
    return None


def _compare_tensor(
    case: Case,
    step: int,
    key: str,
    reference: Step,
    candidate: Step,
    standard: Standard,
    outcome: Outcome,
    passed: Passed | None,
) -> Disagreement | None:
    """What is wrong with a tensor of a step; None if it agrees, and then the outcome counts it.

    passed    how the tensor lies within the narrowest of its tolerances, if it does
    """
    seen = outcome.shares.setdefault(step, {})
    seen[key] = math.inf
    malformed = _malformed(case, step, key, reference, candidate, standard)
    if malformed:
        return malformed
    ours, theirs = reference[key], candidate[key]
    there = real(key, ours.shape, reference["batch/tokens"])
    for tolerance, least in standard.widening(step, key, reference) if passed is None else ():
        shares = np.where(there, tolerance.shares(ours, theirs), 0.0)
        seen[key] = float(shares.max())
        if seen[key] <= 1:
            excused = int((tolerance.excused(ours, theirs) & there).sum()) * bool(tolerance.rtol)
            passed = Passed(seen[key], least, excused)
            break
    if passed is None:
        if not outcome.found:
            outcome.wrong = np.where(there, shares, np.nan)
        index = exhibit(key, ours, shares)
        return Disagreement(
            case.name,
            step,
            key,
            "disagrees",
            shape=ours.shape,
            index=index,
            reference=float(ours[index]),
            candidate=float(theirs[index]),
            tolerance=tolerance.at(index),
            exceeding=int((shares > 1).sum()),
            elements=int(there.sum()),
        )
    seen[key] = passed.share
    problem = _vacuous(case, step, key, ours, theirs, there, reference["batch/tokens"])
    if problem:
        return Disagreement(case.name, step, key, problem)
    elements = int(np.count_nonzero(there))
    outcome.tally.count(key, elements, passed.excused, passed.share, passed.least)
    return None


def exhibit(key: str, reference: Array, shares: Array) -> tuple[int, ...]:
    """The index of the wrong element that a report shows.

    It is the first whose share is near the largest among typical elements: not one that is small
    by accident, nor a weight of a softmax over a single position. Of token ids, the first wrong.
    """
    wrong = shares > 1
    phase, _ = split_key(key)
    near = wrong
    if phase not in COUNTED:
        sizes = np.abs(reference)
        some = wrong & (sizes > 0)
        typical = some & (sizes >= TYPICAL * np.median(sizes[some])) if some.any() else wrong.copy()
        if "U" in axes(key) and wrong[:, :, 1:].any():
            typical[:, :, 0] = False
        chosen = typical if typical.any() else wrong
        near = chosen & (shares >= NEAR * shares[chosen].max())
    return tuple(map(int, np.unravel_index(np.argmax(near), near.shape)))


def simplicity(case: Case, step: int) -> tuple[int, ...]:
    """A key by which to sort steps, the simplest first: by layers, documents, positions, ...

    Among models of as many layers, a single position counts as the least simple: its attention has
    nothing to choose from, so it shows little.

    step    counted from 1
    """
    docs, config = case.docs(max(step, 1) - 1), case.config
    T = max(map(len, docs)) - 1
    return config.n_layer, T == 1, len(docs), T, config.n_head, config.n_embd


def _unused_rows(case: Case, name: str, rows: int, tokens: Array) -> Array:
    """The rows of wte or wpe that no document reads, so that their gradient is zero."""
    if name == "dwpe":
        return np.arange(rows) >= tokens.shape[1] - 1
    inputs = tokens[:, :-1][tokens[:, 1:] >= 0]
    return ~np.isin(np.arange(rows), inputs) & (not case.config.tie_lm_head)


def _vacuous(
    case: Case,
    step: int,
    key: str,
    reference: Array,
    candidate: Array,
    there: Array,
    tokens: Array,
) -> str:
    """Why agreement on this tensor proves nothing, or contradicts the case; "" if it does not."""
    phase, name = split_key(key)
    if phase in (*COUNTED, "entry_m", "entry_v"):  # not results, or zero at the first step
        return ""
    # where the gradient of a parameter is zero, the moments and the update are zero as well
    gradient = f"d{name}" if phase in ("adam_m", "adam_v", "update") else name
    if gradient in case.zero:
        if np.any(reference[there]):
            return "is not zero, although the case says that it is"
    elif not np.any(reference[there]) and not case.random:
        if phase == "update" and learning_rate(step - 1, case.config) == 0:
            return (
                f"is zero everywhere: microgpt/train.py, learning_rate, is 0 in step {step}, so"
                " agreement proves nothing"
            )
        return "is zero everywhere, so agreement proves nothing, and the case does not say why"
    if phase in ("gradient", "unwatched") and name in ("dwte", "dwpe"):
        unused = _unused_rows(case, name, len(reference), tokens)
        if np.any(reference[unused]) or np.any(candidate[unused]):
            return "is not exactly zero in the rows that no document reads"
        if name in case.zero_rows:
            declared = case.tokenizer.encode(case.zero_rows[name]["chars"])
            if not unused[declared].all():
                return "has rows that the case calls unused, but a document reads them"
    watched = phase == "forward" and name.endswith(".mlp_pre") and not (case.kink or case.random)
    if watched and np.abs(reference[there]).min() < KINK:
        return f"comes within {KINK:g} of the kink of the ReLU, where rounding decides the slope"
    return ""
