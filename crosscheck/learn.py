"""A folder of exercises: writing the files, checking them, and the learner's progress.

The file progress.json in the folder holds the state of each exercise. An exercise is judged again
when the learner's file or the exercise itself has changed.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any
from unittest.mock import patch

from crosscheck.candidate import Told
from crosscheck.exercises import (
    Exercise,
    exercise_about,
    exercise_named,
    exercises,
    filename,
    made,
    solution,
    source_text,
)
from crosscheck.judge import DONE, RIGHT_SO_FAR, UNTRIED, WRONG, Verdict, as_wrong, judge
from crosscheck.report import wrapped
from microgpt.errors import MicrogptError, as_typed, printable
from microgpt.runs.files import check_target, write_whole

DIRECTORY = Path("exercises")
PROGRESS = "progress.json"
FORMAT = 1


@dataclass
class Kept:
    """What progress.json holds of an exercise."""

    file: str = ""
    stub: str = ""  # a hash of the file before the learner changed it
    state: str = UNTRIED
    written: list[str] = field(default_factory=list)
    judged: str = ""  # a hash of the learner's file and the exercise that the state belongs to
    attempts: int = 0
    asked: bool = False  # whether the learner has asked for the solution


KINDS = {name: type(value) for name, value in vars(Kept()).items()}  # what progress.json must have


# --- the folder ----------------------------------------------------------------------------------


def write_exercises(folder: Path) -> list[Path]:
    """The paths of the exercises that were written; files that a learner has changed are kept.

    Raises MicrogptError if the folder is a file, or has Python files that are no exercises.
    """
    if folder.exists() and not folder.is_dir():
        raise MicrogptError(f"{printable(str(folder))} is a file; name a folder for the exercises")
    check_target(folder / PROGRESS)
    begun = (folder / PROGRESS).exists()
    others = [path for path in folder.glob("*.py") if not re.match(r"\d+_", path.name)]
    if not begun and others:
        raise MicrogptError(
            f"{printable(str(folder))} has other Python files; name a folder for the exercises"
        )
    progress = read_progress(folder) if begun else {}
    written = []
    for exercise in exercises():
        kept = progress.setdefault(exercise.name, Kept())
        path, text = place(folder, exercise), made(exercise)
        there = path.read_bytes() if path.exists() else b""
        if there == text.encode() or (there and _hash(there) != kept.stub):
            continue
        write_whole(path, text.encode())
        kept.file, kept.stub = path.name, _hash(text.encode())
        written.append(path)
    write_progress(folder, progress)
    return written


def place(folder: Path, exercise: Exercise) -> Path:
    """The path of an exercise: that of an existing file, whatever its number, or a new path.

    Raises MicrogptError if the path is a folder, a device or a pipe.
    """
    form = re.compile(rf"\d+_{exercise.name}\.py")
    there = sorted(path for path in folder.glob("*.py") if form.fullmatch(path.name))
    path = there[0] if there else folder / filename(exercise)
    check_target(path)
    return path


def found_folder(folder: Path | None) -> Path:
    """The folder of the exercises; if none is named, the current folder or `exercises` in it.

    Raises MicrogptError if the folder is a file, or has no exercises.
    """
    tried = [folder] if folder else [Path(), DIRECTORY]
    for one in tried:
        if (one / PROGRESS).is_file():
            return one
    if folder and folder.is_file():
        raise MicrogptError(f"{printable(str(folder))} is a file; name the folder of the exercises")
    name = as_typed(printable(str(folder))) if folder else "this folder"
    again = f"microgpt learn {name}" if folder else "microgpt learn"
    raise MicrogptError(f"there are no exercises in {name}; to write them: {again}")


def read_progress(folder: Path) -> dict[str, Kept]:
    """What progress.json holds of each exercise, by name.

    Raises MicrogptError if progress.json is damaged.
    """
    path = folder / PROGRESS
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["format"] != FORMAT:
            raise ValueError
        found = {}
        for name, values in kept["exercises"].items():
            if {key: type(value) for key, value in values.items()} != KINDS:
                raise ValueError
            found[str(name)] = Kept(**values)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise MicrogptError(
            f"{printable(str(path))} is damaged; delete it and type microgpt learn"
            f" {as_typed(printable(str(folder)))}: what you have written stays as it is"
        ) from None
    return found


def write_progress(folder: Path, progress: Mapping[str, Kept]) -> None:
    """Write progress.json, whole or not at all."""
    kept = {"format": FORMAT, "exercises": {name: vars(one) for name, one in progress.items()}}
    write_whole(folder / PROGRESS, (json.dumps(kept, indent=1) + "\n").encode())


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


# --- the check -----------------------------------------------------------------------------------


@dataclass
class Check:
    """The verdicts on all exercises of a folder."""

    folder: Path
    verdicts: dict[str, Verdict]
    hint: int = 0

    @property
    def first(self) -> Exercise | None:
        """The first exercise that is not done."""
        return next((x for x in exercises() if self.verdicts[x.name].state != DONE), None)

    @property
    def exit_status(self) -> int:
        """0: all done; 1: something is wrong; 3: right so far."""
        states = {verdict.state for verdict in self.verdicts.values()}
        return 1 if WRONG in states else 0 if states == {DONE} else 3

    def __str__(self) -> str:
        return "\n".join([*self._list(), *self._report(), "", *self._end()])

    def _list(self) -> list[str]:
        """A line for each exercise."""
        lines = []
        for number, exercise in enumerate(exercises(), 1):
            verdict = self.verdicts[exercise.name]
            words = verdict.state
            if words == RIGHT_SO_FAR:
                words += f", {len(verdict.written)} of {len(exercise.functions)} functions"
            elif words == WRONG and verdict.function in exercise.functions:
                words += f": {verdict.function}" * (len(exercise.functions) > 1)
            lines.append(f"{number:4}  {exercise.name:24}  {words}")
        return lines

    def _report(self) -> list[str]:
        """The report on the first exercise that is not done."""
        return [*self.verdicts[self.first.name].report] if self.first else []

    def _end(self) -> list[str]:
        """How many exercises are done, and what to do next."""
        first, done = self.first, self.done
        if not first:
            return [f"All {done} exercises are done."]
        number = exercises().index(first) + 1
        path = printable(str(place(self.folder, first)))
        verdict = self.verdicts[first.name]
        again = self.again
        lines = []
        if all(one.state == UNTRIED for one in self.verdicts.values()):
            lines += wrapped(
                f"Nothing is broken: nothing has been written yet. This is exercise {number}."
            )
        else:
            lines.append(f"{done} of {len(self.verdicts)} done; this is exercise {number}.")
        if verdict.state == WRONG:
            lines += wrapped(f"next: mend {path}, then: {again}", "", "  ")
            if self.hint < 2:
                hints = " --hint" * (self.hint + 1)
                more = "the equation with its numbers" if self.hint else "what it looks like"
                lines += wrapped(f"for {more}: {again}{hints}", "", "  ")
        else:
            left = [name for name in first.functions if name not in verdict.written]
            what = f"write {left[0]} in" if left else "find what is wrong in"
            lines += wrapped(f"next: {what} {path}, then: {again}", "", "  ")
        return lines

    @property
    def again(self) -> str:
        """The command that checks this folder."""
        here = self.folder in (Path(), DIRECTORY)
        return (
            "microgpt check" if here else f"microgpt check {as_typed(printable(str(self.folder)))}"
        )

    @property
    def done(self) -> int:
        """How many exercises are done."""
        return sum(verdict.state == DONE for verdict in self.verdicts.values())

    def as_json(self) -> dict[str, Any]:
        """The verdicts for JSON."""
        return {
            "done": self.done,
            "first": self.first.name if self.first else None,
            "exercises": {
                name: {
                    "state": verdict.state,
                    "written": list(verdict.written),
                    "function": verdict.function,
                    "report": list(verdict.report),
                }
                for name, verdict in self.verdicts.items()
            },
        }


def check(folder: Path, hint: int = 0, text: Callable[[Check], str] = str) -> Check:
    """The verdicts on all exercises; an exercise that has not changed is not judged again.

    text    what is printed of them if a function has to be ended together with the process
    """
    progress = read_progress(folder)
    before = json.dumps([vars(one) for one in progress.values()])
    verdicts: dict[str, Verdict] = {}
    shown = False  # whether an exercise before has a report: only the first report is shown

    def last_words(told: Told) -> str:
        left = [(one.name, progress.get(one.name, Kept())) for one in exercises()]
        states = {name: Verdict(kept.state, tuple(kept.written)) for name, kept in left}
        return text(Check(folder, {**states, **verdicts, exercise.name: as_wrong((), told)}, hint))

    for exercise in exercises():
        kept = progress.setdefault(exercise.name, Kept())
        path = place(folder, exercise)
        if not path.exists():
            verdicts[exercise.name] = Verdict(UNTRIED)
            continue
        now = _hash(path.read_bytes() + (made(exercise) + source_text(exercise.source)).encode())
        if now == kept.judged and (kept.state != WRONG or shown):
            verdicts[exercise.name] = Verdict(kept.state, tuple(kept.written))
        else:
            with patch("crosscheck.candidate.last_words", last_words):
                verdict = judge(exercise, path, hint)
            verdicts[exercise.name] = verdict
            if now != kept.judged:
                kept.attempts += verdict.state != UNTRIED
            kept.file, kept.state, kept.judged = path.name, verdict.state, now
            kept.written = list(verdict.written)
        shown = shown or verdicts[exercise.name].state != DONE
    if json.dumps([vars(one) for one in progress.values()]) != before:
        write_progress(folder, progress)
    return Check(folder, verdicts, hint)


def shown_solution(folder: Path, name: str) -> str:
    """The solution of an exercise; before a first attempt a warning, and the solution if repeated.

    Raises MicrogptError if there is no exercise of that name or number.
    """
    numbered = {str(i): exercise for i, exercise in enumerate(exercises(), 1)}
    plain = re.sub(r"^\d+_|\.py$", "", Path(name).name)
    exercise = numbered.get(name.lstrip("0")) or exercise_named(plain) or exercise_about(plain)
    if exercise is None:
        known = [one.name for one in exercises()]
        known += [function for one in exercises() for function in one.functions]
        near = get_close_matches(plain, known, n=1)
        meant = f"did you mean {near[0]}? " if near else ""
        raise MicrogptError(
            f"--solution: no exercise is called {printable(name)!r}, or about a function of that"
            f" name; {meant}microgpt check lists the exercises"
        )
    check(folder)
    progress = read_progress(folder)
    kept = progress[exercise.name]
    if not kept.attempts and not kept.asked:
        kept.asked = True
        write_progress(folder, progress)
        return "\n".join(
            wrapped(
                f"You have not tried {exercise.name} yet. Seeing the solution first would spoil the"
                " exercise; to see it all the same, repeat the command."
            )
        )
    about = "" if exercise.defect else f"# {exercise.source}\n\n"
    return about + solution(exercise)


def watch(folder: Path, hint: int = 0, every: float = 1.0) -> None:
    """Check the folder and print the result whenever a file has changed, until interrupted."""
    seen: list[tuple[str, int, int]] = []
    before: Mapping[str, Verdict] = {}
    while True:
        stats = [(path.name, path.stat()) for path in sorted(folder.glob("*.py"))]
        now = [(name, stat.st_mtime_ns, stat.st_size) for name, stat in stats]
        if now != seen:
            seen, found = now, check(folder, hint)
            changes = [
                f"{name}: {before[name].state} -> {verdict.state}"
                for name, verdict in found.verdicts.items()
                if name in before and before[name].state != verdict.state
            ]
            print("\n".join([str(found), *changes, "-" * 80]), flush=True)
            before = found.verdicts
        time.sleep(every)
