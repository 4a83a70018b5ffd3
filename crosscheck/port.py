"""The check of a port: a program in any language that reads a file and writes a file.

The author of the program goes by GUIDE.md in this folder. The program runs once for a case, or once
for a step in single precision. Its results are compared stage by stage: the stages are a ladder,
and each is a rung. The program may not end, and its file may not be what its header says.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from crosscheck.cases import Case, load_case
from crosscheck.compare import Disagreement, Outcome, compare_step, explained
from crosscheck.kit import STAGES, TOKENS, expected_keys, inputs, reference_steps, stage
from crosscheck.report import as_json, render
from crosscheck.tolerance import FLOAT64, Standard, float32
from crosscheck.trace import AFTER, ENTRY, Step, keys, part, split_key, state_of, suited
from microgpt.backend import load_backend
from microgpt.errors import MicrogptError, printable, shortened
from microgpt.runs.checkpoint import LARGEST_HEADER, TensorFile, write_tensors
from microgpt.train import learning_rate

SEVERAL = STAGES[-1]  # the stage of all steps after the first
ITEM_BYTES = {"F64": 8, "F32": 4, "I64": 8, "I32": 4}
TAPS = ("forward", "backward")
CLIMB = (
    "the mistake may be anywhere before this tensor: write the tensors of step1/forward/ and"
    " step1/backward/ as well; the mistake is at the first that is wrong"
)
CAUSE = re.compile("error|exception|panic", re.IGNORECASE)  # a line that says why a program failed
LAST_WORDS = 4096  # how many bytes at the end of a failed program's output are searched for CAUSE


class PortError(Exception):
    """A program wrote no trace; the message says in one line what the program did."""


@dataclass
class Rung:
    """One stage of the ladder, over all cases."""

    stage: str
    expected: int = 0  # how many tensors a complete port writes
    agreed: int = 0  # how many of these the program wrote rightly
    cases: set[str] = field(default_factory=set)  # the cases that have tensors of this stage
    wrong: dict[str, Disagreement] = field(default_factory=dict)  # the first of each case
    reached: bool = True  # whether all stages before this one are right

    @property
    def status(self) -> str:
        """The state of the stage, in one to three words."""
        if not self.reached:
            return "not reached"
        if self.wrong:
            return "wrong"
        if not self.expected:
            return "does not apply"
        if not self.agreed:
            return "not attempted"
        return "passed" if self.agreed == self.expected else "incomplete"

    def __str__(self) -> str:
        cases = _counted(len(self.cases), "case")
        said = {
            "passed": f"{_counted(self.agreed, 'tensor')}, {cases}",
            "incomplete": f"{self.agreed:,} of {self.expected:,} tensors are there, and right",
            "wrong": f"in {len(self.wrong)} of {cases}",
        }
        return f"  {self.stage:13}  {self.status:14}  {said.get(self.status, '')}".rstrip()


@dataclass
class Climb:
    """The result of a check: the state of every stage."""

    rungs: list[Rung]
    problems: list[str] = field(default_factory=list)  # a line for each case without a trace
    outcomes: list[Outcome] = field(default_factory=list)  # of each case as a whole, for the map

    @property
    def exit_status(self) -> int:
        """0: complete and right; 1: something is wrong; 3: nothing is wrong, and some missing."""
        if self.problems or any(rung.wrong for rung in self.rungs):
            return 1
        whole = all(rung.status in ("passed", "does not apply") for rung in self.rungs)
        return 0 if whole else 3

    def __str__(self) -> str:
        reports = [
            render(next(iter(rung.wrong.values())), "reference", "port")
            for rung in self.rungs
            if rung.status == "wrong"
        ]
        ladder = ["\n".join(map(str, self.rungs))] if self.climbed else []
        ends = {0: ["all is there, and right"], 3: ["nothing is wrong, and not all is there"]}
        return "\n\n".join([*self.problems, *ladder, *reports, *ends.get(self.exit_status, [])])

    @property
    def climbed(self) -> bool:
        """Whether anything was compared."""
        return any(rung.expected for rung in self.rungs)

    def as_json(self) -> dict[str, Any]:
        """The result for JSON."""
        return {
            "exit_status": self.exit_status,
            "problems": self.problems,
            "stages": [
                {
                    "stage": rung.stage,
                    "status": rung.status,
                    "expected": rung.expected,
                    "agreed": rung.agreed,
                    "wrong": [as_json(found) for found in rung.wrong.values()],
                }
                for rung in self.rungs
            ],
        }


@dataclass(frozen=True)
class Taken:
    """A step by the reference and by the program."""

    number: int  # of the step, from 1
    first: bool  # whether it is the first step that the program was asked for
    ours: Step
    theirs: Step
    before: tuple[Step, Step] | None  # ours and theirs of the step before


def command_line(program: str) -> list[str]:
    """The words of a command line that contain {in} and {out}.

    Raises MicrogptError if it cannot be split into words, lacks either, or names no program.
    """
    try:
        words = shlex.split(program, posix=os.name != "nt")
    except ValueError as error:
        raise MicrogptError(f"--program: {shortened(program)}: {error}") from None
    if os.name == "nt":  # on Windows shlex keeps backslashes, as paths need, but quotes too
        words = [word.strip("\"'") for word in words]
    for mark in ("{in}", "{out}"):
        if not any(mark in word for word in words[1:]):
            raise MicrogptError(
                f"--program: {shortened(program)} has no {mark}; expected such as"
                " './mine {in} {out}', in which {in} and {out} become the names of two files"
            )
    if shutil.which(words[0]) is None:
        raise MicrogptError(f"--program: {shortened(words[0])} is no program that can be run")
    return words


def climb(
    program: Sequence[str],
    names: Sequence[str],
    stages: Sequence[str],
    dtype: str,
    reference: str,
    time_limit: float,
    go_on: bool,
) -> Climb:
    """How far a program agrees with the reference on the cases, stage by stage.

    go_on    whether stages after the first wrong stage are compared, and cases after a case on
             which the program failed

    Raises MicrogptError if no case has tensors of these stages.
    """
    rungs = {name: Rung(name) for name in STAGES if name in stages}
    result = Climb(list(rungs.values()))
    for name in tqdm(names, unit="case", leave=False, disable=None):
        case, outcome = load_case(name), Outcome(name)
        standard = float32(case) if dtype == "float32" else FLOAT64
        result.outcomes.append(outcome)
        try:
            for taken in _steps(case, program, dtype, reference, time_limit):
                _judge(case, taken, standard, rungs)
                _compare_whole(case, taken, standard, outcome)
        except PortError as error:
            result.problems.append(f"case {case.name}: {printable(str(error))}")
            if not go_on:
                return replace(result, rungs=result.rungs if result.climbed else [])
    if not result.climbed and not result.problems:
        raise MicrogptError(f"none of these cases has tensors of the stage {', '.join(rungs)}")
    wrong = [i for i, rung in enumerate(result.rungs) if rung.wrong]
    if wrong and not go_on:
        for rung in result.rungs[wrong[0] + 1 :]:
            rung.reached = False
    return result


def _steps(
    case: Case, program: Sequence[str], dtype: str, reference: str, time_limit: float
) -> Iterator[Taken]:
    """The steps of a case by the reference and by the program.

    In single precision the program runs once for each step, from the reference's state, since the
    next step would amplify the errors of a step.
    """
    steps, single = reference_steps(case, reference), dtype == "float32"
    for run in [{number: step} for number, step in steps.items()] if single else [steps]:
        written = _written(case, run, program, dtype, time_limit)
        start = run[min(run)]
        state = {key: x.astype(dtype) for key, x in start.items() if split_key(key)[0] in ENTRY}
        before: tuple[Step, Step] | None = None
        for number, ours in run.items():
            theirs = {**written[number], **state}
            theirs |= {f"update/{name}": x for name, x in _differences(theirs).items()}
            if single:
                ours = _with_their_gradients(case, number, ours, theirs, reference)
            yield Taken(number, number == min(steps), ours, theirs, before)
            before = ours, theirs
            state = {
                f"{entry}/{name}": tensor
                for entry, after in zip(ENTRY, AFTER)
                for name, tensor in part(theirs, after).items()
            }


def _differences(step: Step) -> Step:
    """What a step added to each parameter that is known before and after it."""
    entry, after = part(step, "entry"), part(step, "params")
    with np.errstate(all="ignore"):
        return {
            name: after[name] - entry[name]
            for name in after
            if name in entry and after[name].shape == entry[name].shape
        }


def _with_their_gradients(
    case: Case, number: int, ours: Step, theirs: Step, reference: str
) -> Step:
    """The reference's step, updated by the program's gradients: a wrong update is Adam's mistake.

    If the program has not written all gradients, the step has no update.
    """
    ours = {key: x for key, x in ours.items() if split_key(key)[0] not in (*AFTER, "update")}
    start, grads = state_of(ours, ENTRY, number - 1), part(theirs, "gradient", "d")
    if any(k not in grads or grads[k].shape != np.shape(x) for k, x in start.params.items()):
        return ours
    backend = load_backend(reference, suited(case.config, reference, "float64"), start)
    backend.set_grads({name: grads[name].astype("float64") for name in start.params})
    backend.update(learning_rate(number - 1, case.config))
    after = backend.state()
    for phase, tensors in zip(AFTER, (after.params, after.m, after.v)):
        ours |= {f"{phase}/{name}": np.array(tensor) for name, tensor in tensors.items()}
    return ours | {f"update/{name}": x for name, x in _differences(ours).items()}


def _judge(case: Case, taken: Taken, standard: Standard, rungs: Mapping[str, Rung]) -> None:
    """Count the tensors that agree at each stage, and keep the first that does not."""
    expected = set(expected_keys(case))
    by_stage: dict[str, list[str]] = {name: [] for name in rungs}
    for key in keys(case.config, case.tokenizer.vocab_size):
        where = stage(key) if taken.first or not stage(key) else SEVERAL
        if where in by_stage:
            by_stage[where].append(key)
    for name, keys_there in by_stage.items():
        rung, asked = rungs[name], expected.intersection(keys_there)
        written = [key for key in keys_there if key in taken.theirs and key in taken.ours]
        if asked:
            rung.expected += len(asked)
            rung.cases.add(case.name)
        found = _first_difference(case, taken, written, standard)
        if found is None:
            rung.agreed += len(asked.intersection(written))
        else:
            rung.wrong.setdefault(case.name, found)


def _compare_whole(case: Case, taken: Taken, standard: Standard, outcome: Outcome) -> None:
    """Add a step to the outcome of its case, if the steps before agreed."""
    if outcome.found:
        return
    _compare(case, taken, _shared(taken), standard, outcome)
    if outcome.found:
        outcome.found[0] = _explained(case, taken, outcome.found, standard)
    else:
        outcome.tally.steps += 1


def _first_difference(
    case: Case, taken: Taken, written: list[str], standard: Standard
) -> Disagreement | None:
    """The first of these tensors that disagrees, explained; None if all agree."""
    found = _compare(case, taken, written, standard, Outcome(case.name))
    if not found:
        return None
    everywhere = _compare(case, taken, _shared(taken), standard, Outcome(case.name))
    if everywhere[0].key == found[0].key:
        found = everywhere
    return _explained(case, taken, found, standard)


def _shared(taken: Taken) -> list[str]:
    """The tensors of a step that both sides have computed."""
    return [key for key in taken.ours if key in taken.theirs and stage(key)]


def _compare(
    case: Case, taken: Taken, some: list[str], standard: Standard, outcome: Outcome
) -> list[Disagreement]:
    """The disagreements of some tensors of a step, which are added to the outcome."""
    theirs = {TOKENS: taken.ours[TOKENS], **taken.theirs}
    a, b = ({key: step[key] for key in [TOKENS, *some]} for step in (taken.ours, theirs))
    with np.errstate(all="ignore"):  # a number that is not finite counts as a difference
        compare_step(case, taken.number, a, b, standard, outcome)
    return outcome.found


def _explained(
    case: Case, taken: Taken, found: list[Disagreement], standard: Standard
) -> Disagreement:
    """The first of these disagreements, with its diagnosis."""
    ours = taken.ours
    sound = {  # a tensor of another shape or kind of numbers explains nothing
        key: x
        for key, x in {TOKENS: ours[TOKENS], **taken.theirs}.items()
        if key == found[0].key
        or (key in ours and x.shape == ours[key].shape and x.dtype.kind == ours[key].dtype.kind)
    }
    with np.errstate(all="ignore"):
        first = explained(case, found, ours, sound, taken.before, standard)
    if first.shape is None or any(split_key(key)[0] in TAPS for key in taken.theirs):
        return first
    return replace(first, diagnosis="; ".join(filter(None, (first.diagnosis, CLIMB))))


def _written(
    case: Case, steps: Mapping[int, Step], program: Sequence[str], dtype: str, time_limit: float
) -> dict[int, Step]:
    """The steps that the program writes for a case, by number.

    Raises PortError if the program fails, or what it writes is no trace of these steps.
    """
    with tempfile.TemporaryDirectory(prefix="crosscheck-", ignore_cleanup_errors=True) as folder:
        given = Path(folder) / f"{case.name}.in.safetensors"
        out = Path(folder) / f"{case.name}.out.safetensors"
        write_tensors(given, inputs(case, dict(steps)))
        words = [word.replace("{in}", str(given)).replace("{out}", str(out)) for word in program]
        _run(words, time_limit, Path(folder) / "said")
        tensors = read_output(out)
    known = keys(case.config, case.tokenizer.vocab_size)
    names = {f"step{number}/{key}": (number, key) for number in steps for key in known}
    written: dict[int, Step] = {number: {} for number in steps}
    for name, tensor in tensors.items():
        if name not in names:
            close = difflib.get_close_matches(name[:200], names, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else "; see GUIDE.md for the names"
            raise PortError(f"wrote {shortened(name)}, which is no name of a tensor here{hint}")
        number, key = names[name]
        written[number][key] = tensor
    kinds = {tensor.dtype.name for tensor in tensors.values()}
    if kinds == {"float32"} and dtype != "float32":
        raise PortError("its file holds float32 numbers; to compare them, add --dtype float32")
    return written


def _run(words: Sequence[str], time_limit: float, said: Path) -> None:
    """Run a program to its end, in a process group of its own, so that its children end too.

    Raises PortError if the program fails or takes too long, MicrogptError if it cannot be started.
    """
    with open(said, "w+b") as file:
        try:
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            raise MicrogptError(f"--program: {words[0]}: {error.strerror}") from None
        try:
            status = process.wait(time_limit)
        except subprocess.TimeoutExpired:
            raise PortError(f"not done after {time_limit:g} seconds (--time-limit)") from None
        finally:
            _end(process)
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - LAST_WORDS))
        lines = file.read().decode("utf-8", "replace").split("\n")
    if status:
        words = [line.strip() for line in reversed(lines) if line.strip()]
        last = next(filter(CAUSE.search, words), words[0] if words else "")
        ending = f"ended with exit status {status}"
        if status < 0:
            ending = f"was ended by signal {-status} ({signal.strsignal(-status)})"
        raise PortError(f"the program {ending}" + (f": {last[:200]}" if last else ""))


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a program that still runs, and its children."""
    if os.name == "nt":
        process.kill()
    else:
        # ProcessLookupError: all have ended; on macOS the error is PermissionError
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def read_output(path: Path) -> Step:
    """The tensors of a file that a program has written.

    Raises PortError, which says how the file departs from the safetensors format.
    """
    if not os.path.isfile(path):
        raise PortError("the program ended well, and wrote no file {out}")
    try:
        _check_format(path)
        return TensorFile(path).tensors()
    except MicrogptError as error:
        raise PortError(f"its file is refused: {str(error).removeprefix(f'{path}: ')}") from None


def _check_format(path: Path) -> None:
    """Raise PortError if a file is no safetensors file, in words for the author of the program."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            claim = f"says that its header has {length:,} bytes, and " if size >= 8 else ""
            raise PortError(f"its file {claim}has {size:,} bytes in all: cut short?")
        if length > LARGEST_HEADER:
            raise PortError(f"its file has a header of {length:,} bytes, too many")
        text = file.read(length)
    try:
        header = json.loads(text)
        tensors = {name: x for name, x in header.items() if name != "__metadata__"}
        spans = sorted((*_span(name, x), name) for name, x in tensors.items())
    except (ValueError, AttributeError, RecursionError):  # ValueError: also of what is not UTF-8
        raise PortError("its file has a header that is not JSON as the guide shows it") from None
    end = 0
    for begin, stop, name in spans:
        if begin != end:
            raise PortError(
                f"in its file, {shortened(name)} begins at byte {begin:,}; expected {end:,}"
            )
        end = stop
    if end != size - 8 - length:
        cut = ": cut short?" if end > size - 8 - length else ""
        raise PortError(
            f"its file has {size - 8 - length:,} bytes of numbers, and its header says {end:,}{cut}"
        )


def _span(name: str, described: Any) -> tuple[int, int]:
    """The offsets of a tensor's first byte and of the byte behind its last, from the header."""
    try:
        dtype, shape = described["dtype"], described["shape"]
        begin, end = described["data_offsets"]
        whole = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
    except (LookupError, TypeError, ValueError):
        raise PortError(
            f"its file has {shortened(name)} without dtype, shape or data_offsets"
        ) from None
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise PortError(f"its file has {shortened(name)} of {dtype!r}; expected F64 or F32")
    if not whole or end - begin != ITEM_BYTES[dtype] * math.prod(shape):
        raise PortError(
            f"in its file, {shortened(name)} lies at the bytes {begin} to {end}; that is not the"
            f" size of a tensor of shape {shape} and {dtype}"
        )
    return begin, end


def _counted(count: int, thing: str) -> str:
    """A count with its noun, in the singular or plural."""
    return f"{count:,} {thing}" if count == 1 else f"{count:,} {thing}s"
