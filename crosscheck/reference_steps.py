"""The steps of a case by the reference, computed once for all tests and all processes."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path

from crosscheck.cases import Case
from crosscheck.noise import Noise, noise
from crosscheck.sides import IncompleteError, Stop
from crosscheck.tolerance import float64
from crosscheck.trace import AFTER, Step, state_of, trace
from microgpt.backend import State
from microgpt.runs.files import write_whole


class ReferenceSteps:
    """An iterable of steps; each step is computed when it is first asked for.

    folder    where steps are kept as files for other processes
    name      how the names of these files begin
    """

    def __init__(self, case: Case, reference: str, steps: int, folder: Path, name: str) -> None:
        self.case, self.reference, self.steps = case, reference, steps
        self.folder, self.name = folder, name
        self.known: list[tuple[Step, Stop | None]] = []
        self.measured: Sequence[Noise] | None = None
        self.standard = float64(self.noise, case.config)  # with what it keeps for each step
        self.rest: Iterator[Step] | None = None  # computes the steps after those that are known

    def __iter__(self) -> Iterator[Step]:
        for number in range(self.steps):
            if number == len(self.known):
                self.known.append(self._next())
            step, stop = self.known[number]
            if stop:
                raise IncompleteError(step, stop)
            yield step

    def first(self, steps: int) -> Iterator[Step]:
        """The first steps, so many of them."""
        return islice(self, steps)

    def later(self) -> Iterator[Step]:
        """All steps but the first; none if the reference does not finish that."""
        steps = iter(self)
        with suppress(IncompleteError):
            next(steps)
        return steps

    @property
    def failed(self) -> Path:
        """The file whose existence says that the test of the first step has failed."""
        return self.folder / f"{self.name}-failed"

    def noise(self) -> Sequence[Noise]:
        """The noise of each step; [] if the reference is not scalar."""
        path = self.folder / f"{self.name}-noise"
        if self.measured is None and path.exists():
            self.measured = pickle.loads(path.read_bytes())
        if self.measured is None:
            steps: list[Step] = []
            with suppress(IncompleteError):
                steps.extend(self)
            self.measured = noise(self.case, steps) if self.reference == "scalar" else []
            write_whole(path, pickle.dumps(self.measured))
        return self.measured

    def _next(self) -> tuple[Step, Stop | None]:
        """The step after those that are known, and how the reference stopped in it, if it did."""
        path = self.folder / f"{self.name}-{len(self.known)}"
        if path.exists():
            self.rest = None
            found: tuple[Step, Stop | None] = pickle.loads(path.read_bytes())
            return found
        if self.rest is None:
            left = self.steps - len(self.known)
            self.rest = trace(self.case, self.reference, "float64", left, self._state())
        try:
            found = next(self.rest), None
        except IncompleteError as error:
            found = error.step, error.stop
        if len(self.known) + 1 == self.steps:
            self.rest = None  # and with it the graph of the last step
        write_whole(path, pickle.dumps(found))
        return found

    def _state(self) -> State | None:
        """The state after the last known step; None before the first step."""
        return state_of(self.known[-1][0], AFTER, len(self.known)) if self.known else None
