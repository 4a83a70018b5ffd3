"""The verdict on a candidate: each function by itself, then all of them in the whole model."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from crosscheck.alone import WHOLE, Wrong, alone
from crosscheck.candidate import HELPERS, RESULTS, Candidate, Told, load_candidate
from crosscheck.compare import Disagreement
from crosscheck.functions import inputs
from crosscheck.hints import hints, parts_of
from crosscheck.own_value import value_alone
from crosscheck.placed import in_whole
from crosscheck.report import WIDTH, as_json, render, wrapped
from crosscheck.tolerance import RTOL
from microgpt.errors import printable

RIGHT, WRONG, CANNOT, INCOMPLETE = 0, 1, 2, 3  # exit status
# the fields of a disagreement that a learner does not see without asking for hints
QUIET = {"lines": (), "function": "", "operands": {}, "formula": "", "diagnosis": ""}


@dataclass
class Verdict:
    """What a candidate gets right and wrong."""

    status: int
    first: str  # which functions it has
    functions: dict[str, str] = field(default_factory=dict)  # right, wrong, not attempted, ..
    report: list[str] = field(default_factory=list)  # the lines on the first mistake
    fields: dict[str, Any] = field(default_factory=dict)  # the report for other programs
    end: list[str] = field(default_factory=list)  # the lines on what is right, and what is next
    seconds: float = 0.0

    def __str__(self) -> str:
        return "\n".join([*wrapped(self.first, "", "  "), *self.report, *self.end])

    def tell(self, told: Told) -> None:
        """Add what a function did besides computing numbers."""
        self.functions[told.function] = "not attempted" if told.undone else "wrong"
        self.status = INCOMPLETE if told.undone else WRONG
        self.report = report_told(told)
        self.fields = {"function": told.function, "problem": told.words, "line": told.line}

    def as_json(self) -> str:
        """The verdict for other programs."""
        return json.dumps({**asdict(self), "text": str(self)}, indent=1, default=str)


def check(path: Path, hint: int = 0, time_limit: float = 5.0) -> Verdict:
    """The verdict on the candidate in a file or package.

    hint    how much the report says; 0: where the numbers are wrong, 1: what the mistake looks
            like as well, 2: the equation as well

    Raises MicrogptError if nothing can be checked.
    """
    since = time.monotonic()
    again = f"python -m crosscheck check {printable(str(path))}"
    try:
        candidate = load_candidate(path, time_limit)
    except Told as told:
        verdict = Verdict(CANNOT if told.function == path.name else WRONG, "")
        verdict.report = report_told(told)
        verdict.end = ["", f"next: mend it, then: {again}"]
        return verdict
    verdict = Verdict(RIGHT, candidate.describe())
    for name in (*candidate.stubs, *candidate.absent):
        verdict.functions[name] = "not attempted"
    try:
        _judge(candidate, verdict, hint)
    except Told as told:
        verdict.tell(told)
    for name, line in candidate.said.items():
        verdict.report += ["", f"{name} prints; left out here: {printable(line)}"[:WIDTH]]
    verdict.seconds = time.monotonic() - since
    if verdict.status == RIGHT and "not attempted" in verdict.functions.values():
        verdict.status = INCOMPLETE
    verdict.end = _end(candidate, verdict, again, hint)
    return verdict


def _judge(candidate: Candidate, verdict: Verdict, hint: int) -> None:
    """Fill in the verdict: each function by itself, then the whole model, up to the first error."""
    if not candidate.functions:
        return
    wrong = _each_alone(candidate, verdict) if candidate.side == "vectorized" else None
    if "Value" in candidate.functions:
        wrong = value_alone(candidate)
    if wrong:
        verdict.functions[wrong.function], verdict.status = "wrong", WRONG
        verdict.report = report_alone(wrong, hints(candidate, wrong, hint))
        verdict.fields = {k: v for k, v in vars(wrong).items() if k != "evidence"}
        _parts(candidate, verdict, wrong, hint)
        return
    found = in_whole(candidate) if candidate.functions else None
    if found:
        name = _at_fault(candidate, found)
        verdict.functions[name or next(iter(candidate.functions))] = "wrong"
        verdict.status = WRONG
        verdict.report = ["", *_shown(found, candidate, hint).splitlines()]
        verdict.fields = as_json(found)
        return
    for name in candidate.functions:
        if not candidate.calls[name]:
            raise Told(name, "was never called, so it was not checked", candidate.line_of(name))
        verdict.functions[name] = "right"
    _parts(candidate, verdict, None, hint)


def _each_alone(candidate: Candidate, verdict: Verdict) -> Wrong | None:
    """The first function that is wrong by itself. Functions not attempted are taken out."""
    names = [name for name in candidate.functions if name in RESULTS or name == WHOLE]
    names = [name for name in names if name != "read"]
    given = inputs(names, candidate.seed)
    for name in names:
        try:
            wrong = alone(candidate, name, given[name])
        except Told as told:
            if not told.undone:
                raise
            del candidate.functions[name]
            verdict.functions[name] = "not attempted"
        else:
            if wrong:
                return wrong
            verdict.functions[name] = "right alone"
    return None


def _parts(candidate: Candidate, verdict: Verdict, whole: Wrong | None, hint: int) -> None:
    """Add to the verdict on a whole model which other functions of the file differ from the text's.

    A whole model may divide the work as it likes, so such a difference does not change the status.
    If the whole model is wrong, the first function that is wrong is likely to be the cause.
    """
    only = replace(candidate, functions=candidate.parts, parts={})
    names = [name for name in only.functions if name in RESULTS]
    given = inputs(names, candidate.seed) if names else {}
    others: list[str] = []
    faulty: Wrong | None = None
    for name, own in given.items():
        try:
            wrong = alone(only, name, own)
            words = wrong.problem if wrong else ""
        except Told as told:
            wrong, words = None, told.words.partition("\n")[0]
        verdict.functions[name] = f"differs from the text's: {words}" if words else "right alone"
        if whole and wrong and wrong.numbers and not faulty:
            faulty = wrong
        elif words:
            others += wrapped(f"{name} {words}, on the inputs of the text's", "  ", "    ")
    if faulty:
        verdict.report += report_alone(faulty, hints(only, faulty, hint))
    elif whole and whole.numbers:
        verdict.report += _where_to_look(whole, [*given])
    if others:
        verdict.report += ["", "besides, without an effect on the verdict:", *others]


def _where_to_look(whole: Wrong, known: Sequence[str]) -> list[str]:
    """Which functions of the text compute the wrong tensor, and how to check each by itself."""
    suspects = [name for name in parts_of(whole.label) if name not in known]
    if not suspects:
        return []
    order = "forward" if whole.label == "loss" else "backward"
    words = f"In the order of the {order} pass, {whole.label} is the first that is wrong."
    words += (
        f" In the text, {' and '.join(suspects)} lead to it. Each can be checked by itself: write"
        " it under that name, with the arguments that it has in vectorized/model.py, in a file"
        " without loss_and_grads."
    )
    return ["", *wrapped(words)]


def report_told(told: Told) -> list[str]:
    """The report on a mistake that is not a wrong number."""
    first, *rest = told.words.split("\n")
    lines = ["", *wrapped(f"{told.function} {first}")]
    for words in rest:
        lines += wrapped(words, "  ", "    ")
    return [*lines, *([f"  your line   {told.line}"[:WIDTH]] if told.line else [])]


def report_alone(wrong: Wrong, hints: Sequence[tuple[str, str]] = ()) -> list[str]:
    """The report on a function that is wrong by itself."""
    rows: list[tuple[str, str]] = []
    if wrong.numbers:
        at = f"{wrong.label}[{', '.join(map(str, wrong.index))}]" if wrong.index else wrong.label
        apart = abs(wrong.candidate - wrong.reference)
        relative = f"{apart / abs(wrong.reference):.3g} relative" if wrong.reference else "inf"
        rows += [
            ("at", f"{at} of {wrong.shape}" if wrong.shape else at),
            ("should be", repr(wrong.reference)),
            ("yours", repr(wrong.candidate)),
            ("difference", f"{apart:.3g} absolute, {relative}; allowed {RTOL:.0e} relative"),
        ]
        if wrong.elements > 1:
            rows.append(("wrong", f"{wrong.exceeding:,} of {wrong.elements:,} elements"))
    if wrong.right or wrong.wrong:
        rows += [("wrong too", ", ".join(wrong.wrong)), ("right", ", ".join(wrong.right))]
    rows += [("given", wrong.arguments), ("fails for", wrong.share), ("your line", wrong.line[:64])]
    lines = ["", *wrapped(f"{wrong.function} {wrong.problem}, by itself, on {wrong.origin}:")]
    for label, text in [*rows, *hints]:
        lines += wrapped(text, f"  {label:10}  ", " " * 14) if text else []
    return lines


# --- the whole model -----------------------------------------------------------------------------


def _at_fault(candidate: Candidate, found: Disagreement) -> str:
    """The candidate's function that a disagreement points at; "" if that is not certain."""
    named, only = found.function.partition(",")[0], [*candidate.functions]
    return named if named in only else only[0] if len(only) == 1 else ""


def _shown(found: Disagreement, candidate: Candidate, hint: int) -> str:
    """The report on a disagreement, with the hints that were asked for and without our lines."""
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
    """The lines on what is right, and the next command to type."""
    took = f"({verdict.seconds:.1f} s)"
    if verdict.status == WRONG:
        wrong = next((k for k, words in verdict.functions.items() if words == "wrong"), "it")
        right = [k for k, words in verdict.functions.items() if words.startswith("right")]
        before = f"right: {', '.join(right)} {took}" if right else took
        there = verdict.fields.get("exceeding") and wrong != "Value"
        more = " --hint" * (hint + 1) if hint < 2 and there else ""
        words = f"for a hint about {wrong}" if more else f"mend {wrong}, then type"
        return ["", *wrapped(before), f"{words}:", f"  {again}{more}"]
    done = [name for name, words in verdict.functions.items() if words == "right"]
    lines = wrapped(f"right: {', '.join(done)} {took}") if done else []
    if candidate.borrowed:
        ours = [name for name in candidate.borrowed if name not in HELPERS]
        lines += wrapped(f"it uses {', '.join(ours)} of vectorized/, not checked here")
    if verdict.status == INCOMPLETE:
        left = [name for name, words in verdict.functions.items() if words == "not attempted"]
        so_far = "right so far; not complete" if done else "nothing is written yet"
        lines += wrapped(f"{so_far}. Next is {left[0]}; then type:")
        return ["", *lines, f"  {again}"]
    return ["", *lines, "all right"]


# --- the command ---------------------------------------------------------------------------------


def run(path: Path, hint: int, as_text: bool, time_limit: float) -> int:
    """The exit status of the verdict, which is printed."""
    shown = str if as_text else Verdict.as_json

    def last_words(told: Told) -> str:
        name = printable(path.name)
        verdict = Verdict(WRONG, f"{name} was ended by force: it sleeps, or catches all errors")
        verdict.tell(told)
        return shown(verdict)

    with patch("crosscheck.candidate.last_words", last_words):
        verdict = check(path, hint, time_limit)
    print(shown(verdict))
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
                    if before.get(name, words) != words
                ]
                print("\n".join([found["text"], *changes, "-" * 80]), flush=True)
                before = states
        time.sleep(every)
