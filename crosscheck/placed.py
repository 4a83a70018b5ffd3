"""The check of a candidate in the model: with its functions in the text, or as a whole model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from inspect import signature
from typing import Any
from unittest.mock import patch

import numpy as np

from crosscheck.candidate import Candidate, Told, as_our_array, guarded_whole, in_place, watched
from crosscheck.cases import Case, load_case
from crosscheck.compare import Disagreement, compare, explained
from crosscheck.functions import drawn_cases, stored_cases
from crosscheck.noise import noise
from crosscheck.sides import IncompleteError, then_stopped
from crosscheck.tolerance import FLOAT64, float64
from crosscheck.trace import (
    Step,
    WatchedAndTrained,
    backward_order,
    in_order,
    padded_tokens,
    split_key,
    steps_by,
    suited,
    trace,
)
from microgpt.backend import fresh_state
from microgpt.runs.memory import most_walkers
from microgpt.train import learning_rate
from scalar.backend import Backend as Scalar
from vectorized.backend import Backend as Watched

# cases that together run every line of the text, and how many steps of each are run
PANEL = {
    "cold-samples": 3,
    "single-character": 2,
    "decay-and-clip": 3,
    "microgpt-243": 1,
    "two-layers": 1,
}
SLOW = {"single-character": 2, "microgpt-243": 1}  # the same for a candidate's own Value
ONE_BY_ONE = "single-character"  # the case in which `sample` draws documents, not `sample_many`


def in_whole(candidate: Candidate) -> Disagreement | None:
    """The first disagreement of the model that has all the candidate's functions, or None.

    The reference is the other text: scalar for functions of vectorized, and the other way round.
    """
    names = [*candidate.functions]
    slow = "Value" in names  # each operation on a Value makes a node of the graph
    for name, steps in (SLOW if slow else PANEL).items():
        case = load_case(name)
        draws = bool({"sample", "probabilities", "sample_many"} & set(names))
        reference = list(trace(case, "scalar", "float64", steps, draws=draws))
        standard = float64(cache(partial(noise, case, reference)))
        if candidate.side == "scalar":
            reference = list(steps_of(candidate, case, steps, (), draws))
        found = compared(candidate, case, reference, names, steps, standard, draws)
        if found:
            return found
    cases = [*stored_cases(), *drawn_cases(candidate.seed)] if candidate.whole == "Backend" else []
    if candidate.side == "scalar" and not slow:
        cases = sorted(drawn_cases(candidate.seed), key=_work)[:3]
    for case in cases:
        found = compared(candidate, case, reference_steps(case), names, 1, FLOAT64)
        if found:
            return found
    return None


def reference_steps(case: Case, steps: int = 1) -> list[Step]:
    """The first steps of a case as vectorized/ computes them."""
    config = suited(case.config, "vectorized", "float64")
    backend: Any = Watched(config, fresh_state(case.params), watch=True)
    pair = WatchedAndTrained("vectorized", config, backend, backend, math.inf)
    return list(steps_by(pair, case, range(steps), draws=False))


def _work(case: Case) -> int:
    """About how many multiplications a step takes, up to a factor."""
    return case.config.n_layer * case.config.n_embd**2 * sum(map(len, case.docs(0)))


def compared(
    candidate: Candidate,
    case: Case,
    reference: Sequence[Step],
    names: Sequence[str],
    steps: int,
    standard: Any,
    draws: bool = False,
) -> Disagreement | None:
    """The first disagreement on a case, over the tensors that the candidate has; or None."""
    theirs: list[Step] = []
    stopped: IncompleteError | None = None
    try:
        theirs.extend(steps_of(candidate, case, steps, names, draws))
    except IncompleteError as error:
        stopped = error
        theirs.append(error.step)
    ours = whole = list(reference)
    if candidate.whole:
        ours = [{key: x for key, x in a.items() if key in b} for a, b in zip(ours, theirs)]
    elif stopped is None:
        optional = ("backward", "forward")
        ours = [
            {k: x for k, x in a.items() if k in b or split_key(k)[0] not in optional}
            for a, b in zip(ours, theirs)
        ]

    sides = ("scalar", "vectorized")
    names_of_sides = sides if candidate.side == "vectorized" else sides[::-1]
    with np.errstate(all="ignore"):
        found = compare(
            case, ours[: len(theirs)], then_stopped(theirs, stopped), standard, names_of_sides
        ).found
        if found and found[0].shape is not None and not found[0].stop:
            at = found[0].step - 1  # explained again with all tensors of the reference's step
            before = (whole[at - 1], theirs[at - 1]) if at else None
            found = [
                explained(case, found, whole[at], theirs[at], before, standard, names_of_sides)
            ]
    return found[0] if found else None


def steps_of(
    candidate: Candidate, case: Case, steps: int, names: Sequence[str], draws: bool = False
) -> Iterator[Step]:
    """The steps of a case by the text with these functions of the candidate's in their place."""
    side = candidate.side if names else "vectorized"
    config = suited(case.config, side, "float64")
    many = "sample_many" in names and case.name != ONE_BY_ONE
    walkers = most_walkers if many else lambda _: 1
    with in_place(candidate, names), patch("vectorized.backend.most_walkers", walkers):
        if candidate.whole and names:
            own = Own(candidate, config, case)
            for step in range(steps):
                yield own.step(case.docs(step), learning_rate(step, config))
            return
        make = Scalar if side == "scalar" else Watched
        backend: Any = make(config, fresh_state(case.params), watch=True)
        begun = 0 if "Value" in names else math.inf  # Value is slow: later steps copy what they can
        pair = WatchedAndTrained(side, config, backend, backend, begun)
        yield from steps_by(pair, case, range(steps), draws)


class Own:
    """A whole model of the candidate's: its loss, its gradients, and its update or vectorized's."""

    def __init__(self, candidate: Candidate, config: Any, case: Case) -> None:
        self.candidate, self.config = candidate, config
        self.params = {name: np.array(x) for name, x in case.params.items()}
        self.updating = candidate.whole == "Backend"
        state = fresh_state({name: x.copy() for name, x in self.params.items()})
        make = candidate.functions["Backend"] if self.updating else Watched
        watch = [True] if len(signature(make).parameters) > 2 else []
        self.backend: Any = self._asked(lambda: make(config, state, *watch))

    def _asked(self, call: Callable[[], Any]) -> Any:
        """What a call of the candidate's code returns. Raises Told if the call fails."""
        return watched(self.candidate, self.candidate.whole, call)

    def step(self, docs: Any, lr_t: float) -> Step:
        """The tensors of a step that the candidate computes."""
        record: Step = {"batch/tokens": padded_tokens(docs)}
        record |= {f"entry/{name}": x for name, x in self.params.items()}
        if self.updating:
            self.candidate.calls["Backend"] += 1
            loss = self._asked(lambda: self.backend.forward(docs))
            self._asked(self.backend.backward)
            grads = self._arrays("grads()", self._asked(self.backend.grads))
        else:
            given = {name: x.copy() for name, x in self.params.items()}
            found = guarded_whole(self.candidate, [given, docs, self.config])
            loss = found.pop("loss")
            grads = {name.removeprefix("d"): x for name, x in found.items()}
            if any(k not in grads or grads[k].shape != x.shape for k, x in self.params.items()):
                return self._record(record, loss, grads)  # an update needs all gradients
            self.backend.set_grads(grads)
        record = self._record(record, loss, grads)
        self._asked(lambda: self.backend.update(lr_t))
        after = self._arrays("state().params", self._asked(self.backend.state).params)
        record |= {f"update/{name}": after[name] - x for name, x in self.params.items()}
        record |= {f"params/{name}": x for name, x in after.items()}
        self.params = after
        return in_order(record)

    def _record(self, record: Step, loss: Any, grads: dict[str, Any]) -> Step:
        """The record with the loss and the gradients."""
        found = {f"gradient/d{name}": grads[name] for name in backward_order(self.params)
                 if name in grads}  # fmt: skip
        return {**record, "forward/loss": np.array(loss, "float64"), **found}

    def _arrays(self, what: str, found: Any) -> dict[str, Any]:
        """Copies of the candidate's tensors by name, one for each parameter.

        Raises Told if there is none of a name, or one that is no array.
        """
        try:
            return {name: np.array(as_our_array(found[name])) for name in self.params}
        except (KeyError, TypeError, ValueError) as error:
            words = f"gives no arrays by name in {what}: {type(error).__name__} {error}"
            raise Told("Backend", words, self.candidate.line_of("Backend")) from None
