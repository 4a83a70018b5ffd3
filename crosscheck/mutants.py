"""Mutants: the sources changed at one place at a time, to see what the crosscheck does not notice.

mechanical    every operator, number and condition of vectorized/, changed by cosmic-ray
              (an extra: `pip install '.[mutants]'`)
domain        what people get wrong in a model, in both texts: see crosscheck/domain.py

Each mutant is planted as a named defect is. All cases run on the mutant, in a process of its own,
since a mutant may never end. crosscheck/MUTANTS.md says why those that survive change no number.
"""

from __future__ import annotations

import ast
import multiprocessing
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from unittest.mock import patch

import numpy as np

from crosscheck import domain
from crosscheck.cases import case_names, load_case
from crosscheck.compare import compare
from crosscheck.defects import ROOT, Defect, Patch, judge, planted, reference_steps, standard
from crosscheck.processes import can_fork
from crosscheck.recorded import CUTS, in_micro_batches
from crosscheck.trace import trace
from microgpt.errors import MicrogptError

FILES = (
    "vectorized/model.py",
    "vectorized/record.py",
    "vectorized/lower.py",
    "vectorized/replay.py",
    "vectorized/batch.py",
    "vectorized/adam.py",
    "vectorized/sample.py",
    "vectorized/ranks.py",
)
TIMEOUT = 300  # seconds; a mutant that takes longer counts as stopped
SURVIVES, DIFFERS, STOPS = range(3)  # exit status of the process that runs the cases on a mutant
# functions, classes and constants that decide on memory, speed or refusals, and on no number
MEMORY = {
    "vectorized/batch.py": ("micro_batches", "rounded", "ROW", "PRICE"),
    "vectorized/record.py": ("refusal", "EQUAL_ROWS", "LOOK_UP", "ONE_HOT", "SPREAD"),
    "vectorized/lower.py": ("placed", "fits_over", "alike", "_fused", "ALIGN", "NEAR"),
    "vectorized/replay.py": ("CALLS", "CHUNK", "ROOM"),
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """A source with one change."""

    file: str
    line: int
    operator: str
    before: str  # the line as it was
    after: str  # and as it is
    source: str  # the whole file, changed

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}: {self.operator}"
        return f"{where}\n    {self.before.strip()}\n    {self.after.strip()}"


@dataclass
class Score:
    """How many mutants of each file survive, differ and stop."""

    found: dict[str, Counter[int]] = field(default_factory=dict)
    of_numbers: dict[str, Counter[int]] = field(default_factory=dict)  # without the lines of MEMORY

    def add(self, mutant: Mutant, outcome: int) -> None:
        """Count a mutant."""
        self.found.setdefault(mutant.file, Counter())[outcome] += 1
        if not _changes_memory(mutant):
            self.of_numbers.setdefault(mutant.file, Counter())[outcome] += 1

    def __str__(self) -> str:
        lines = [
            f"{'':24}{'mutants':>9}{'differ':>9}{'stop':>7}{'survive':>9}{'caught':>9}  numbers"
        ]
        for file, counts in [*self.found.items(), ("all", sum(self.found.values(), Counter()))]:
            parts = self.of_numbers.values()
            numbers = sum(parts, Counter()) if file == "all" else self.of_numbers.get(file)
            lines.append(
                f"{file:24}{counts.total():9,}{counts[DIFFERS]:9,}{counts[STOPS]:7,}"
                f"{counts[SURVIVES]:9,}{_rate(counts):>9}  {_rate(numbers or Counter()):>7}"
            )
        lines.append("numbers: caught, without the lines that change memory or speed alone")
        return "\n".join(lines)


def _rate(counts: Counter[int]) -> str:
    """The share of mutants that do not survive."""
    whole = counts.total()
    return f"{(whole - counts[SURVIVES]) / whole:.1%}" if whole else "-"


def _changes_memory(mutant: Mutant) -> bool:
    """Whether a mutant's line is in a function, a class or a constant of MEMORY."""
    lines = mutant.source.splitlines()[: mutant.line]
    owners = [re.match(r"(?:def|class) (\w+)|(\w+)(?:: \w+)? =", line) for line in lines]
    methods = [re.match(r"    def (\w+)", line) for line in lines]
    names = {one[1] or one[2] for one in owners[-1:] if one}
    for found in (owners, methods):
        last = next((one for one in reversed(found) if one and one[1]), None)
        names |= {last[1]} if last else set()
    return not names.isdisjoint(MEMORY.get(mutant.file, ()))


def mechanical_mutants(files: Sequence[str] = ()) -> Iterator[Mutant]:
    """Every mechanical mutant that is another program; annotations are left as they are.

    files    those of FILES that are changed; all if none of them is named

    Raises MicrogptError if cosmic-ray is not installed.
    """
    try:
        from cosmic_ray.mutating import mutate_code
        from cosmic_ray.plugins import get_operator, operator_names
    except ImportError:
        raise MicrogptError(
            "cosmic-ray is not installed: python -m pip install cosmic-ray"
        ) from None
    for file in [file for file in FILES if file in files] or FILES:
        source = (ROOT / file).read_text(encoding="utf-8")
        same = ast.dump(_without_annotations(source))
        for name in operator_names():
            if get_operator(name).arguments():
                continue
            for occurrence in range(len(source)):
                mutated = mutate_code(source, get_operator(name)(), occurrence)
                if mutated is None:
                    break
                with suppress(SyntaxError):  # the mutant is no program
                    if ast.dump(_without_annotations(mutated)) != same:
                        yield _mutant(file, name, source, mutated)


def domain_mutants() -> Iterator[Mutant]:
    """Every domain mutant that is another program, once."""
    for file in domain.FILES:
        source = (ROOT / file).read_text(encoding="utf-8")
        seen = {ast.dump(_without_annotations(source))}
        for what, mutated in domain.mutations(source, lists=file.startswith("scalar")):
            program = ast.dump(_without_annotations(mutated))
            if program not in seen:
                seen.add(program)
                yield _mutant(file, what, source, mutated)


def tried(mutants: Sequence[Mutant]) -> Iterator[tuple[Mutant, int]]:
    """Each mutant and its outcome: SURVIVES, DIFFERS or STOPS.

    Raises MicrogptError on a system that cannot copy a process.
    """
    if not can_fork():
        raise MicrogptError("mutants run in copies of a process, which this system cannot make")
    for name in case_names():
        for backend in ("scalar", "vectorized"):
            reference_steps(name, backend)  # computed once, before the process is copied
        standard(name)
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        yield from zip(mutants, pool.map(_outcome, mutants))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _outcome(mutant: Mutant) -> int:
    """SURVIVES, DIFFERS or STOPS, from a process of the mutant's own."""
    child = multiprocessing.get_context("fork").Process(target=_try, args=(mutant,))
    child.start()
    child.join(TIMEOUT)
    if child.is_alive():
        child.kill()
        child.join()
    return child.exitcode if child.exitcode in (SURVIVES, DIFFERS) else STOPS


def _try(mutant: Mutant) -> None:
    """End the process with the exit status SURVIVES, DIFFERS or STOPS; any other means STOPS."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    original = (ROOT / mutant.file).read_text(encoding="utf-8")
    defect = Defect(str(mutant), "", (Patch(mutant.file, original, mutant.source),), first="")
    with np.errstate(all="ignore"):
        first = judge(defect, case_names()).first
        if first is not None:
            stops = first.stop is not None or first.problem.startswith("stops")
            os._exit(STOPS if stops else DIFFERS)
        caught = _differs_in_micro_batches(defect) or _differs_on_ranks(defect)
    os._exit(DIFFERS if caught else SURVIVES)


def _differs_in_micro_batches(defect: Defect) -> bool:
    """Whether a mutant gives other numbers for batches that are cut into micro-batches."""
    alone = patch("vectorized.backend.most_walkers", lambda config: 1)  # one document at a time
    for way in CUTS.values():
        drawing = nullcontext() if way == CUTS["cut"] else alone
        with planted(defect.patches), in_micro_batches(*way), drawing:
            for name in ("ragged-batch", "three-layers", "impossible-padding"):
                case, steps = load_case(name), reference_steps(name, "scalar")
                found = trace(case, "vectorized", "float64", len(steps))
                if compare(case, steps, found, standard(name)).found:
                    return True
    return False


def _differs_on_ranks(defect: Defect) -> bool:
    """Whether a mutant gives other numbers for a batch that three ranks share."""
    with planted(defect.patches):
        case, steps = load_case("ragged-batch"), reference_steps("ragged-batch", "scalar")
        shared = replace(case, config=replace(case.config, cores=3))
        found = trace(shared, "vectorized", "float64", len(steps))
        return bool(compare(case, steps, found, standard("ragged-batch")).found)


def _mutant(file: str, operator: str, source: str, mutated: str) -> Mutant:
    """The mutant, with the first line that differs."""
    pairs = enumerate(zip(source.splitlines(), mutated.splitlines()), 1)
    line, (before, after) = next((n, pair) for n, pair in pairs if pair[0] != pair[1])
    return Mutant(file, line, operator, before, after, mutated)


def _without_annotations(source: str) -> ast.AST:
    """The program without annotations, which have no effect when it runs."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            node.returns = None
        elif isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
    return tree
