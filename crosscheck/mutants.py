"""Mechanical mutants of vectorized/: every operator, number and condition changed, one at a time.

The mutations are those of cosmic-ray (an extra: `pip install '.[mutants]'`); each is planted as a
named defect is, and put before all cases in a process of its own, since it may never end. What
survives is printed; crosscheck/MUTANTS.md says of every survivor why it changes nothing.
"""

from __future__ import annotations

import ast
import multiprocessing
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np

from crosscheck.cases import case_names, load_case
from crosscheck.compare import compare
from crosscheck.defects import ROOT, Defect, Patch, judge, lessons, planted
from crosscheck.trace import trace
from microgpt.errors import MicrogptError

FILES = (
    "vectorized/model.py",
    "vectorized/record.py",
    "vectorized/replay.py",
    "vectorized/batch.py",
    "vectorized/adam.py",
    "vectorized/sample.py",
    "vectorized/worker.py",
)
TIMEOUT = 20  # seconds; what takes longer is a loop without an end, and is noticed


@dataclass(frozen=True)
class Mutant:
    """One change of one source."""

    file: str
    line: int
    operator: str
    before: str  # the line, and what became of it
    after: str
    source: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.before.strip()}  ->  {self.after.strip()}"


def all_mutants() -> Iterator[Mutant]:
    """Every mutant that is a different program: annotations and docstrings are left alone."""
    try:
        from cosmic_ray.mutating import mutate_code
        from cosmic_ray.plugins import get_operator, operator_names
    except ImportError:
        raise MicrogptError("cosmic-ray is not installed: pip install '.[mutants]'") from None
    for file in FILES:
        source = (ROOT / file).read_text(encoding="utf-8")
        same = ast.dump(_without_annotations(source))
        for name in operator_names():
            if get_operator(name).arguments():
                continue
            for occurrence in range(len(source)):
                mutated = mutate_code(source, get_operator(name)(), occurrence)
                if mutated is None:
                    break
                with suppress(SyntaxError):  # not a program at all
                    if ast.dump(_without_annotations(mutated)) != same:
                        yield _mutant(file, name, source, mutated)


def survivors(report: bool = True) -> tuple[list[Mutant], int]:
    """The mutants that no case catches, and how many there were."""
    for name in case_names():
        lessons(name, "scalar")  # before the processes are forked, once for all
    mutants = list(all_mutants())
    found = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for number, (mutant, survived) in enumerate(zip(mutants, pool.map(_survives, mutants)), 1):
            if survived:
                found.append(mutant)
            if report and sys.stderr.isatty():
                print(f"\r{number} of {len(mutants)}", end="", file=sys.stderr)
    return found, len(mutants)


def _survives(mutant: Mutant) -> bool:
    """Whether all cases agree in spite of it."""
    child = multiprocessing.get_context("fork").Process(target=_try, args=(mutant,))
    child.start()
    child.join(TIMEOUT)
    if child.is_alive():
        child.kill()
        child.join()
    return child.exitcode == 0


def _try(mutant: Mutant) -> None:
    """Exit status 0 if no case catches it; anything that goes wrong is noticed, and is not 0."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    original = (ROOT / mutant.file).read_text(encoding="utf-8")
    defect = Defect(str(mutant), "", (Patch(mutant.file, original, mutant.source),), first="")
    with np.errstate(all="ignore"):
        caught = (
            judge(defect, case_names()).first is not None
            or _differs_in_micro_batches(defect)
            or _differs_on_cores(defect)
        )
    os._exit(int(caught))


def _differs_in_micro_batches(defect: Defect) -> bool:
    """Whether a batch cut into micro-batches tells the mutant from the original, with and without
    the recorder's tricks for small arrays."""
    for columns, padding, lowered in ((1, 0, False), (32, 100, True)):
        with planted(defect.patches):
            from vectorized import batch, record

            vars(batch).update(COLUMNS=columns, PADDING=padding)
            if not lowered:
                vars(record).update(EQUAL_ROWS=0, ONE_HOT=0)
            for name in ("ragged-batch", "three-layers", "impossible-padding"):
                case, steps = load_case(name), lessons(name, "scalar")
                if compare(case, steps, trace(case, "vectorized", "float64", len(steps))).found:
                    return True
    return False


def _differs_on_cores(defect: Defect) -> bool:
    """Whether a batch shared with two more processes tells the mutant from the original."""
    with planted(defect.patches):
        case, steps = load_case("ragged-batch"), lessons("ragged-batch", "scalar")
        shared = replace(case, config=replace(case.config, cores=3))
        found = compare(case, steps, trace(shared, "vectorized", "float64", len(steps))).found
    return bool(found)


def _mutant(file: str, operator: str, source: str, mutated: str) -> Mutant:
    pairs = enumerate(zip(source.splitlines(), mutated.splitlines()), 1)
    line, (before, after) = next((n, pair) for n, pair in pairs if pair[0] != pair[1])
    return Mutant(file, line, operator, before, after, mutated)


def _without_annotations(source: str) -> ast.AST:
    """The program without what has no effect when it runs."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            node.returns = None
        elif isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
    return tree
