"""A batch that the recorded calls get wrong, computed again in parts: which parts are right?"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from importlib import import_module
from math import isfinite
from typing import Any, NamedTuple

import numpy as np

from crosscheck.cases import Case
from crosscheck.lines import place_of
from crosscheck.recorded import leaves_text
from crosscheck.trace import ENTRY, Array, Step, part, split_key, state_of
from microgpt.backend import Docs, State, load_backend
from microgpt.config import Config
from microgpt.layout import Tree, written
from microgpt.train import learning_rate

CLOSE = {"float64": 1e-9, "float32": 1e-3}  # of the largest number of a tensor
RECORDED = ("eval", "unwatched")  # the phases of recorded calls
UPDATED = ("adam_m", "adam_v", "update", "params")  # the phases of Adam
RECORDER = "vectorized/record.py, lower.py, replay.py"
ON_RANKS = "one rank is right: wrong where ranks share a batch"
IN_ROWS = "each document begins at position 0, and the mask is another in every row"
NEARER = 0.1  # of the distance between what is wrong and what is right
LEFT = "it reads what was left before, or memory that was never written"
LEFT_IN = "vectorized/replay.py, batch.py"


class Again(NamedTuple):
    """What the trials showed, and the files that this leads to; "" for the text itself."""

    words: str
    files: str
    leaves: str = ""  # the first tap that the recorded calls get wrong, as a sentence


def again(case: Case, number: int, phase: str, step: Step, dtype: str) -> Again | None:
    """Which parts of a batch the recorded calls get right, by new backends held to the text.

    number    of the step, from 1
    phase     in which a loss or gradient is wrong: eval (evaluation) or unwatched (training)
    step      of the side that records
    dtype     its precision

    What is wrong in single precision is tried in double precision first, where rounding is no
    matter. Returns None if the text stops.
    """
    docs = case.docs(number - 1)
    state = state_of(step, ENTRY, number - 1)
    with suppress(Exception), np.errstate(all="ignore"):  # a text at fault may raise any exception
        trial = Trial(replace(case.config, cores=1, dtype="float64"), state, phase)
        if dtype == "float64" or not trial.right(docs):
            return _told(trial, docs, case, number)
        told = _told(trial._replace(config=replace(trial.config, dtype=dtype)), docs, case, number)
        return told._replace(words=f"{told.words}; in double precision it is right")
    return None


def _told(trial: Trial, docs: Docs, case: Case, number: int) -> Again:
    cores, batches = case.config.cores, [case.docs(i) for i in range(number)]
    if cores == 1 or trial.phase == "eval":
        if trial.right(docs):
            return Again(f"in a new backend it is right: {LEFT}", LEFT_IN)
        return _parts(trial, docs)
    for rank in range(cores):
        *earlier, own = trial.shares(rank, cores, batches)
        if own and not trial.right(own):
            told = _parts(trial, own)
            return told._replace(words=f"the documents of rank {rank}, on one rank: {told.words}")
        if not trial.right(own, after=earlier):
            words = f"rank {rank} has {'other' if own else 'no'} documents in this step, and {LEFT}"
            return Again(words, LEFT_IN)
    return Again(ON_RANKS, "vectorized/ranks.py, backend.py")


def _parts(trial: Trial, docs: Docs) -> Again:
    """The same for documents that a new backend gets wrong."""
    if trial.phase != "eval" and trial.right(docs, evaluated=False):
        words = "it is right unless evaluation comes between the forward and the backward pass"
        return Again(words, "vectorized/backend.py, replay.py")
    if alone := next((doc for doc in docs if not trial.right([doc])), None):
        leaves = trial.leaves([alone])
        why = ": the recording is not the text, or a result is overwritten too early"
        return Again(f"a document by itself is wrong{why * (not leaves)}", RECORDER, leaves=leaves)
    if trial.phase == "eval":
        words = "document by document it is right: wrong where several are padded to one length"
        return Again(words, f"vectorized/batch.py, {RECORDER.removeprefix('vectorized/')}")
    parts = import_module("vectorized.batch").micro_batches(docs, trial.config)
    wrong = [part for part in parts if not trial.right(part.docs)]
    if len(parts) > 1 and not wrong:
        each = [part.docs for part in parts]
        if not all(trial.right(one, after=each[:i]) for i, one in enumerate(each)):
            words = f"each micro-batch is right in a new backend: {LEFT}"
            return Again(words, LEFT_IN)
        words = "micro-batch by micro-batch it is right: wrong where they are added up"
        return Again(words, "vectorized/replay.py")
    words = "document by document it is right: wrong where "
    if which := next(filter(None, map(trial.wrong_array, parts)), ""):
        return Again(f"{words}they are packed into rows: {which}", "vectorized/batch.py")
    if all(trial.packed_right(part) for part in parts):
        leaves = trial.leaves(wrong[0].docs) if wrong else ""
        words += "several are recorded; unrecorded, they are right"
        return Again(words, RECORDER, leaves=leaves)
    return Again(f"{words}they are packed into rows, recorded or not: {IN_ROWS}", "")


def packed(case: Case, number: int, step: Step) -> str:
    """A sentence if the text, unrecorded, is wrong where several documents share a row, or "".

    For a text that cannot be recorded, and so is not compared in packed rows.
    """
    state = state_of(step, ENTRY, number - 1)
    trial = Trial(replace(case.config, cores=1, dtype="float64"), state, "unwatched")
    with suppress(Exception), np.errstate(all="ignore"):  # a text at fault may raise any exception
        batches = [case.docs(i) for i in range(len(case.batches))]
        micro_batches = import_module("vectorized.batch").micro_batches
        parts = [part for docs in batches for part in micro_batches(docs, trial.config)]
        if not all(trial.packed_right(part) for part in parts if part.starts):
            return f"where documents share a row, the text itself is wrong: {IN_ROWS}"
    return ""


def updated_again(
    case: Case,
    number: int,
    key: str,
    index: tuple[int, ...],
    numbers: tuple[float, float],
    step: Step,
    dtype: str,
) -> Again | None:
    """Whose update is right: by the text's adam alone, unrecorded, by new recorded calls.

    key, index    of an element after the update that is wrong
    numbers       what that element should be, and what it is
    """
    right, wrong = numbers
    config = replace(case.config, cores=1, dtype=dtype)
    entry, lr_t = state_of(step, ENTRY, number - 1), learning_rate(number - 1, config)
    phase, name = split_key(key)

    def is_right(watch: bool, by_itself: bool = False) -> bool:
        backend: Any = load_backend("vectorized", config, entry, watch=watch)
        backend.forward(case.docs(number - 1))
        backend.backward()
        backend.set_grads(part(step, "gradient", "d"))
        if by_itself:
            text = import_module("vectorized.adam")
            factor = text.clip(backend.flat_grads, config.grad_clip) if config.grad_clip else 1.0
            arrays = backend.flat, factor * backend.flat_grads, backend.m, backend.v
            text.adam(*arrays, number - 1, lr_t, config)
        else:
            backend.update(lr_t)
        after = backend.state()
        found = {"adam_m": after.m, "adam_v": after.v}.get(phase, after.params)[name][index]
        found = found - step[f"entry/{name}"][index] if phase == "update" else found
        apart = abs(wrong - right) if isfinite(wrong) else abs(right)
        return bool(abs(found - right) <= NEARER * apart)

    with suppress(Exception), np.errstate(all="ignore"):  # one at fault may raise any exception
        if not is_right(watch=True, by_itself=True):
            return None
        if not is_right(watch=True):
            words = "adam is right by itself: wrong where it is called"
            return Again(words, place_of("vectorized/backend.py", "update"))
        if not is_right(watch=False):
            return Again("unrecorded, it is right", RECORDER)
        if case.config.cores > 1:
            return Again(ON_RANKS, "vectorized/ranks.py, backend.py")
        words = "in a new backend it is right: it keeps numbers of an update before"
        return Again(words, "vectorized/replay.py")
    return None


class Trial(NamedTuple):
    """A model in the state before a step."""

    config: Config
    state: State
    phase: str  # "eval" or "unwatched"

    def right(self, docs: Docs, after: Sequence[Docs] = (), evaluated: bool = True) -> bool:
        """Whether the recorded calls of a new backend compute what the text computes.

        after        what the backend computes before
        evaluated    whether evaluation comes between the forward and the backward pass
        """
        watched, trained = self._backend(watch=True), self._backend(watch=False)
        try:
            for earlier in after:
                self._computed(trained, earlier, evaluated)
            if not docs:  # all ranks have the gradient of the batch before
                trained.set_grads({name: np.ones_like(w) for name, w in self.state.params.items()})
            found = self._computed(trained, docs, evaluated)
        except Exception:  # what is at fault may raise any
            return False
        wanted = self._computed(watched, docs, evaluated) if docs else self._nothing()
        return self._close(wanted, found)

    def shares(self, rank: int, cores: int, batches: Sequence[Docs]) -> list[Docs]:
        """The documents of each batch that a rank works on."""
        share = import_module("vectorized.ranks").share
        return [share(docs, rank, cores) for docs in batches]

    def leaves(self, docs: Docs) -> str:
        """Where the calls that are recorded for documents leave the text; see leaves_text."""
        trained = self._backend(watch=False)
        with suppress(Exception):  # calls at fault may raise any exception
            self._computed(trained, docs, evaluated=True)
            replay = trained.evaluation if self.phase == "eval" else trained.worker
            (*_, step) = replay.kept.values()
            return leaves_text(self.config, trained.params, step)
        return ""

    def packed_right(self, part: Any) -> bool:
        """Whether the text, unrecorded, finds loss and gradients of a packed micro-batch."""
        watched = self._backend(watch=True)
        tap, dtap, dparams = (Tree(self.config.n_layer) for _ in range(3))
        model, batch = import_module("vectorized.model"), self._packed(part)
        loss = model.loss_forward(batch, watched.params, self.config, tap)
        model.loss_backward(batch, watched.params, dparams, self.config, tap, dtap)
        wanted = self._computed(watched, part.docs, evaluated=False)
        return self._close(wanted, [loss, *written(dparams, watched.grads()).values()])

    def wrong_array(self, part: Any) -> str:
        """What is wrong with the packed arrays of a micro-batch, in words; "" if nothing is."""
        found, (B, T) = self._packed(part), part.shape
        names = "tokens", "targets", "weights", "positions"
        wanted = {name: np.zeros((B, T)) for name in names}
        owner = np.full((B, T), -1)  # which document is there; -1: none
        for number, (doc, start) in enumerate(zip(part.docs, part.starts)):
            row, t = divmod(start, T)
            own = row, slice(t, t + len(doc) - 1)
            if t + len(doc) - 1 > T:
                return "a document is longer than the room in its row"
            if (owner[own] >= 0).any():
                return "two documents lie on each other"
            owner[own] = number
            wanted["tokens"][own], wanted["targets"][own] = doc[:-1], doc[1:]
            wanted["positions"][own] = np.arange(len(doc) - 1)
            wanted["weights"][own] = 1 / len(part.docs) / (len(doc) - 1)
        real = owner >= 0
        for name, array in wanted.items():
            where = np.ones_like(real) if name == "weights" else real
            if not np.allclose(getattr(found, name)[where], array[where], rtol=1e-6):
                padding = name == "weights" and np.allclose(found.weights[real], array[real])
                return f"the {name} are wrong{' in padding' * padding}"
        seen = (owner[:, :, None] == owner[:, None, :]) & np.tri(T, dtype=bool)  # (B, T, U)
        hidden = np.isneginf(found.mask[:, 0])[real]
        return "" if (hidden == ~seen[real]).all() else "the mask is wrong"

    def _packed(self, part: Any) -> Any:
        """The arrays of a micro-batch."""
        batch = import_module("vectorized.batch")
        arrays = batch.empty_batch(*part.shape, np.dtype(self.config.dtype), packed=True)
        batch.fill_packed(arrays, part, len(part.docs))
        return arrays

    def _backend(self, watch: bool) -> Any:
        return load_backend("vectorized", self.config, self.state, watch=watch)

    def _computed(self, backend: Any, docs: Docs, evaluated: bool) -> Sequence[Any]:
        """The losses in evaluation, or the loss and its gradients in training."""
        if self.phase == "eval":
            return [backend.position_losses(docs)]
        loss = backend.forward(docs)
        if evaluated and docs:  # as in a trace
            backend.position_losses(docs)
        backend.backward()
        return [loss, *backend.grads().values()]

    def _nothing(self) -> Sequence[Any]:
        """The loss and the gradients of a rank without documents."""
        return [0.0, *map(np.zeros_like, self.state.params.values())]

    def _close(self, wanted: Sequence[Array], found: Sequence[Array]) -> bool:
        allowed = CLOSE[self.config.dtype]
        apart = (np.abs(np.subtract(a, b)).max() <= allowed * np.abs(a).max()
                 for a, b in zip(wanted, found))  # fmt: skip
        return all(apart)
