"""The verdict on a candidate: each function by itself, then all of them in the whole model."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np

from crosscheck.candidate import (
    RESULTS,
    Candidate,
    Told,
    as_our_array,
    in_place,
    load_candidate,
    text_functions,
    watched,
)
from crosscheck.cases import Case, load_case
from crosscheck.compare import Disagreement, compare, explained
from crosscheck.functions import (
    Wrong,
    alone,
    drawn_cases,
    inputs,
    loss_and_grads,
    stored_cases,
    value_alone,
)
from crosscheck.likeness import likeness
from crosscheck.noise import noise
from crosscheck.report import WIDTH, as_json, render, wrapped
from crosscheck.sides import IncompleteError
from crosscheck.tolerance import FLOAT64, float64
from crosscheck.trace import (
    Step,
    drawn,
    in_order,
    padded_tokens,
    split_key,
    suited,
    trace,
    trace_step,
)
from microgpt.backend import fresh_state
from microgpt.errors import MicrogptError, printable
from microgpt.runs.memory import most_walkers
from microgpt.train import learning_rate
from scalar.backend import Backend as Scalar
from vectorized.backend import Backend as Watched

RIGHT, WRONG, CANNOT, INCOMPLETE = 0, 1, 2, 3  # exit status
# small models that between them reach every line of the text, and how many steps of each
PANEL = {
    "cold-samples": 3,
    "single-character": 2,
    "decay-and-clip": 3,
    "microgpt-243": 1,
    "two-layers": 1,
}
ONE_BY_ONE = "single-character"  # where documents are drawn by `sample`, not by `sample_many`
QUIET = {"lines": (), "function": "", "operands": {}, "formula": "", "diagnosis": ""}


@dataclass
class Verdict:
    """What is said of a candidate."""

    status: int
    first: str  # what was found in it
    functions: dict[str, str] = field(default_factory=dict)  # right, wrong, not attempted, ..
    report: list[str] = field(default_factory=list)  # lines
    fields: dict[str, Any] = field(default_factory=dict)  # the report, for other programs
    end: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def __str__(self) -> str:
        return "\n".join([*wrapped(self.first, "", "  "), *self.report, *self.end])

    def as_json(self) -> str:
        """The same for other programs."""
        return json.dumps({**asdict(self), "text": str(self)}, indent=1, default=str)


def check(path: Path, hint: int = 0, time_limit: float = 5.0) -> Verdict:
    """The verdict on the candidate in a file or package.

    hint    how much is told: 0 where it is wrong, 1 what it looks like, 2 the equation as well

    Raises MicrogptError if nothing can be checked.
    """
    since = time.monotonic()
    again = f"python -m crosscheck check {printable(str(path))}"
    try:
        candidate = load_candidate(path)
    except Told as told:
        verdict = Verdict(CANNOT if told.function == path.name else WRONG, "")
        verdict.report = report_told(told)
        verdict.end = ["", f"next: mend it, then: {again}"]
        return verdict
    candidate.time_limit = time_limit
    verdict = Verdict(RIGHT, candidate.describe())
    for name in (*candidate.stubs, *candidate.absent):
        verdict.functions[name] = "not attempted"
    try:
        _judge(candidate, verdict, hint)
    except Told as told:
        if told.undone:
            verdict.functions[told.function] = "not attempted"
            verdict.status = INCOMPLETE
        else:
            verdict.functions[told.function] = "wrong"
            verdict.status = WRONG
        verdict.report = report_told(told)
        verdict.fields = {"function": told.function, "problem": told.words, "line": told.line}
    for name, line in candidate.said.items():
        verdict.report += ["", f"{name} prints; left out here: {printable(line)}"[:WIDTH]]
    verdict.seconds = time.monotonic() - since
    if verdict.status == RIGHT and "not attempted" in verdict.functions.values():
        verdict.status = INCOMPLETE
    verdict.end = _end(candidate, verdict, again, hint)
    return verdict


def _judge(candidate: Candidate, verdict: Verdict, hint: int) -> None:
    """Each function alone, in the order of the text, then the whole model; up to what is wrong."""
    names = [*candidate.functions]
    if not names:
        return
    by_itself = [name for name in names if name in RESULTS or name == "loss_and_grads"]
    if candidate.side == "vectorized":
        by_itself = [name for name in by_itself if name != "read"]
        given = inputs(by_itself, candidate.seed)
        for name in by_itself:
            try:
                wrong = alone(candidate, name, given[name])
            except Told as told:
                if not told.undone:
                    raise
                del candidate.functions[name]
                verdict.functions[name] = "not attempted"
                continue
            if wrong:
                verdict.functions[name], verdict.status = "wrong", WRONG
                verdict.report = report_alone(candidate, wrong, hint)
                verdict.fields = _plain(wrong)
                return
            verdict.functions[name] = "right alone"
    if "Value" in names:
        wrong = value_alone(candidate)
        if wrong:
            verdict.functions["Value"], verdict.status = "wrong", WRONG
            verdict.report = report_alone(candidate, wrong, 0)
            verdict.fields = _plain(wrong)
            return
    found = in_whole(candidate) if candidate.functions else None
    if found:
        name = _at_fault(candidate, found)
        verdict.functions[name or names[0]], verdict.status = "wrong", WRONG
        verdict.report = ["", *_shown(found, candidate, hint).splitlines()]
        verdict.fields = as_json(found)
        return
    for name in candidate.functions:
        if not candidate.calls[name]:
            raise Told(name, "was never called, so nothing is known of it", candidate.line_of(name))
        verdict.functions[name] = "right"


def _plain(wrong: Wrong) -> dict[str, Any]:
    """What is wrong, for other programs."""
    return {k: v for k, v in vars(wrong).items() if k not in ("case", "evidence")}


def report_told(told: Told) -> list[str]:
    first, *rest = told.words.split("\n")
    lines = ["", *wrapped(f"{told.function} {first}")]
    for words in rest:
        lines += wrapped(words, "  ", "    ")
    return [*lines, *([f"  your line   {told.line}"[:WIDTH]] if told.line else [])]


def report_alone(candidate: Candidate, wrong: Wrong, hint: int) -> list[str]:
    """The report on a function by itself."""
    rows = []
    if wrong.exceeding:
        at = f"{wrong.label}[{', '.join(map(str, wrong.index))}]" if wrong.index else wrong.label
        apart = abs(wrong.candidate - wrong.reference)
        relative = f"{apart / abs(wrong.reference):.3g} relative" if wrong.reference else "inf"
        rows += [
            ("at", f"{at} of {wrong.shape}" if wrong.shape else at),
            ("should be", repr(wrong.reference)),
            ("yours", repr(wrong.candidate)),
            ("difference", f"{apart:.3g} absolute, {relative}; allowed 1e-09 relative"),
            ("wrong", f"{wrong.exceeding:,} of {wrong.elements:,} elements"),
        ]
    rows += [("given", wrong.arguments), ("fails for", wrong.share), ("your line", wrong.line[:64])]
    if hint:
        rows += _hints(candidate, wrong, hint)
    lines = ["", *wrapped(f"{wrong.function} {wrong.problem}, by itself, on {wrong.origin}:")]
    for label, text in rows:
        lines += wrapped(text, f"  {label:10}  ", " " * 14) if text else []
    return lines


def _hints(candidate: Candidate, wrong: Wrong, hint: int) -> list[tuple[str, str]]:
    """The diagnosis, and the equation with its numbers, from the model with this function in it."""
    own, words = [wrong.case] if wrong.case else [], ""
    for case in [*own, *map(load_case, PANEL)]:
        lessons = list(_steps(candidate, case, 1, ()))
        found = _compared(candidate, case, lessons, [wrong.function], 1, FLOAT64)
        if found and found.diagnosis:
            rows = [("looks like", found.diagnosis)]
            if hint > 1 and found.formula:
                name = split_key(found.key)[1]
                rows.append(("equation", f"{name} = {found.formula} = {found.expected:.6g}"))
                rows += [("", f"{x} = {numbers}") for x, numbers in found.operands.items()]
            return rows
    if wrong.function in RESULTS:
        words = likeness(wrong.function, wrong.evidence)
    equation = equation_of(wrong.function) if hint > 1 else ""
    rows = [("looks like", words or "nothing that has a name here")]
    return [*rows, ("equation", equation)] if equation else rows


def equation_of(name: str) -> str:
    """The first line of the docstring of the text's function of that name."""
    function = text_functions("vectorized").get(name)
    return (function.__doc__ or "").partition("\n")[0] if function else ""


# --- the whole model -----------------------------------------------------------------------------


def in_whole(candidate: Candidate) -> Disagreement | None:
    """The first disagreement of the model with all functions in their place, over several steps.

    The reference is the other text: scalar for functions of vectorized, and the other way round.
    """
    names = [*candidate.functions]
    slow = "Value" in names  # its graphs are larger, a number for each operation
    for name, steps in list(PANEL.items())[: 3 if slow else None]:
        case = load_case(name)
        draws = bool({"sample", "probabilities", "sample_many"} & set(names))
        lessons = list(trace(case, "scalar", "float64", steps, draws=draws))
        standard = float64(noise(case, lessons))
        if candidate.side == "scalar":
            lessons = list(_steps(candidate, case, steps, (), draws))
        found = _compared(candidate, case, lessons, names, steps, standard, draws)
        if found:
            return found
    cases = [*stored_cases(), *drawn_cases(candidate.seed)] if candidate.whole == "Backend" else []
    if candidate.side == "scalar" and not slow:
        cases = sorted(drawn_cases(candidate.seed), key=_work)[:3]
    for case in cases:
        lessons = list(_steps(candidate, case, 1, ()))
        found = _compared(candidate, case, lessons, names, 1, FLOAT64)
        if found:
            return found
    return None


def _work(case: Case) -> int:
    """Numbers that a step computes, more or less."""
    return case.config.n_layer * case.config.n_embd**2 * sum(map(len, case.docs(0)))


def _compared(
    candidate: Candidate,
    case: Case,
    lessons: Sequence[Step],
    names: Sequence[str],
    steps: int,
    standard: Any,
    draws: bool = False,
) -> Disagreement | None:
    """The first disagreement of a case; what a candidate need not write is not compared."""
    theirs: list[Step] = []
    stopped: IncompleteError | None = None
    try:
        theirs.extend(_steps(candidate, case, steps, names, draws))
    except IncompleteError as error:
        stopped = error
        theirs.append(error.step)
    ours = whole = list(lessons)
    if candidate.whole:
        ours = [{key: x for key, x in a.items() if key in b} for a, b in zip(ours, theirs)]
    elif stopped is None:
        optional = ("backward", "forward")
        ours = [
            {k: x for k, x in a.items() if k in b or split_key(k)[0] not in optional}
            for a, b in zip(ours, theirs)
        ]

    def stepped() -> Iterator[Step]:
        yield from theirs[: len(theirs) - bool(stopped)]
        if stopped:
            raise stopped

    sides = ("scalar", "vectorized")
    names_of_sides = sides if candidate.side == "vectorized" else sides[::-1]
    with np.errstate(all="ignore"):
        found = compare(case, ours[: len(theirs)], stepped(), standard, names_of_sides).found
        if found and found[0].shape is not None and not found[0].stop:
            at = found[0].step - 1  # once more, with all that the reference has of this step
            before = (whole[at - 1], theirs[at - 1]) if at else None
            found = [
                explained(case, found, whole[at], theirs[at], before, standard, names_of_sides)
            ]
    return found[0] if found else None


def _steps(
    candidate: Candidate, case: Case, steps: int, names: Sequence[str], draws: bool = False
) -> Iterator[Step]:
    """The steps of a case with these functions in their place; without any, vectorized's own."""
    side = candidate.side if names else "vectorized"
    config = suited(case.config, side, "float64")
    many = "sample_many" in names and case.name != ONE_BY_ONE
    walkers = most_walkers if many else lambda _: 1
    with in_place(candidate, names), patch("vectorized.backend.most_walkers", walkers):
        if candidate.whole and names:
            backend: Any = Own(candidate, config, case)
        elif side == "scalar":
            backend = Scalar(config, fresh_state(case.params), watch=True)
        else:
            backend = Watched(config, fresh_state(case.params), watch=True)
        pair: Any = SimpleNamespace(
            name=side, config=config, watched=backend, trained=backend, begun=math.inf
        )
        for step in range(steps):
            if isinstance(backend, Own):
                yield backend.step(case.docs(step), learning_rate(step, config))
                continue
            record = trace_step(pair, case.docs(step), learning_rate(step, config))
            if draws and step in (0, steps - 1):
                record = {**record, **drawn(case, backend, step)}
            yield record


class Own:
    """A whole model of the candidate's: its loss and gradients, and its update or else ours."""

    def __init__(self, candidate: Candidate, config: Any, case: Case) -> None:
        self.candidate, self.config = candidate, config
        self.params = {name: np.array(x) for name, x in case.params.items()}
        self.updating = candidate.whole == "Backend"
        state = fresh_state({name: x.copy() for name, x in self.params.items()})
        make = candidate.functions["Backend"] if self.updating else Watched
        watch = [True] if len(signature(make).parameters) > 2 else []
        self.backend: Any = self._asked(lambda: make(config, state, *watch))

    def _asked(self, call: Callable[[], Any]) -> Any:
        return watched(self.candidate, self.candidate.whole, call)

    def step(self, docs: Any, lr_t: float) -> Step:
        """A step as far as the candidate computes it."""
        record: Step = {"batch/tokens": padded_tokens(docs)}
        record |= {f"entry/{name}": x for name, x in self.params.items()}
        if self.updating:
            self.candidate.calls["Backend"] += 1
            loss = self._asked(lambda: self.backend.forward(docs))
            self._asked(self.backend.backward)
            grads = self._arrays("grads()", self._asked(self.backend.grads))
        else:
            given = {name: x.copy() for name, x in self.params.items()}
            found = loss_and_grads(self.candidate, [given, docs, self.config])
            loss = found.pop("loss")
            grads = {name.removeprefix("d"): x for name, x in found.items()}
            self.backend.set_grads(grads)
        record["forward/loss"] = np.array(loss, "float64")
        record |= {f"gradient/d{name}": x for name, x in grads.items()}
        self._asked(lambda: self.backend.update(lr_t))
        after = self._arrays("state().params", self._asked(self.backend.state).params)
        record |= {f"update/{name}": after[name] - x for name, x in self.params.items()}
        record |= {f"params/{name}": x for name, x in after.items()}
        self.params = after
        return in_order(record)

    def _arrays(self, what: str, found: Any) -> dict[str, Any]:
        """Copies of tensors by name, all that there should be."""
        try:
            return {name: np.array(as_our_array(found[name])) for name in self.params}
        except (KeyError, TypeError, ValueError) as error:
            words = f"gives no arrays by name in {what}: {type(error).__name__} {error}"
            raise Told("Backend", words, self.candidate.line_of("Backend")) from None


def _at_fault(candidate: Candidate, found: Disagreement) -> str:
    """The function of the candidate that a disagreement points at, where that can be said."""
    named, only = found.function.partition(",")[0], [*candidate.functions]
    return named if named in only else only[0] if len(only) == 1 else ""


def _shown(found: Disagreement, candidate: Candidate, hint: int) -> str:
    """The usual report, as far as the hints that were asked for allow; without lines of ours."""
    kept: dict[str, Any] = dict(QUIET)
    if hint:
        del kept["diagnosis"]
    if hint > 1:
        del kept["formula"], kept["operands"]
    stop = found.stop
    if stop:  # the text's own line, at which the candidate's results stop it
        kept.pop("diagnosis", None)
    reference = "vectorized" if candidate.side == "scalar" else "scalar"
    text = render(replace(found, **kept), reference, candidate.path.name)
    name = _at_fault(candidate, found)
    line = f"  your line   {candidate.line_of(name)}"
    return f"{text}\n{line[:WIDTH]}" if name else text


def _end(candidate: Candidate, verdict: Verdict, again: str, hint: int) -> list[str]:
    """How far the candidate is, and the next command to type."""
    took = f"({verdict.seconds:.1f} s)"
    if verdict.status == WRONG:
        wrong = next((k for k, words in verdict.functions.items() if words == "wrong"), "it")
        right = [k for k, words in verdict.functions.items() if words.startswith("right")]
        before = f"right before it: {', '.join(right)} {took}" if right else took
        more = " --hint" * (hint + 1) if hint < 2 and verdict.fields.get("index") else ""
        words = f"mend {wrong} and type it again" if not more else f"for a hint about {wrong}"
        return ["", *wrapped(before), f"{words}:", f"  {again}{more}"]
    done = [name for name, words in verdict.functions.items() if words == "right"]
    lines = wrapped(f"right: {', '.join(done)} {took}") if done else []
    if verdict.status == INCOMPLETE:
        left = [name for name, words in verdict.functions.items() if words == "not attempted"]
        lines += wrapped(f"right so far, and not complete: next is {left[0]}; then type:")
        return ["", *lines, f"  {again}"]
    return ["", *lines, "all right"]


# --- the command ---------------------------------------------------------------------------------


def run(path: Path, hint: int, as_text: bool, time_limit: float) -> int:
    """Print the verdict; its exit status."""
    verdict = check(path, hint, time_limit)
    print(verdict if as_text else verdict.as_json())
    return verdict.status


def watch(path: Path, hint: int, time_limit: float, every: float = 1.0) -> int:
    """Print the verdict again whenever the candidate has changed, until interrupted."""
    seen: dict[Path, tuple[int, int]] = {}
    before: dict[str, str] = {}
    while True:
        files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
        now = {one: (one.stat().st_mtime_ns, one.stat().st_size) for one in files if one.exists()}
        if now != seen:
            seen = now
            command = [sys.executable, "-X", "utf8", "-m", "crosscheck", "check", str(path)]
            command += ["--json", *["--hint"] * hint, "--time-limit", str(time_limit)]
            done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
            try:
                found = json.loads(done.stdout)
            except ValueError:
                print((done.stdout + done.stderr).strip(), flush=True)
            else:
                states = found["functions"]
                changes = [
                    f"{name}: {before[name]} -> {words}"
                    for name, words in states.items()
                    if name in before and before[name] != words
                ]
                print("\n".join([found["text"], *changes, "-" * 80]), flush=True)
                before = states
        time.sleep(every)


def asked(path: Path) -> None:
    """Refuse a candidate that is not there."""
    if not path.exists():
        raise MicrogptError(f"there is no file {printable(str(path))}; expected such as mine.py")
