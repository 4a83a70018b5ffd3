"""A document computed by both implementations, with every += of scalar's backward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from crosscheck.additions import Additions, Place
from crosscheck.cases import Case
from crosscheck.trace import Step, padded_tokens, real, suited
from microgpt.backend import Backend, State, load_backend
from microgpt.errors import MicrogptError
from microgpt.pages.pictures import label
from microgpt.runs.checkpoint import not_finite
from microgpt.taps import axes_of, consumers, params, taps
from microgpt.train import learning_rate
from scalar.backend import Backend as Scalar

MOST = 1_000_000  # products in scalar's graph: weights times positions


class Document:
    """The tensors of a model on the first document of a case, forward and backward.

    update        compute the document a second time, after an update

    scalar        every tensor by its key, as in a trace
    vectorized    the same
    after         the same of vectorized after the update, if there is one
    additions     what scalar adds to the elements that are followed

    Raises MicrogptError if the graph would be too large, FloatingPointError if a number is not
    finite.
    """

    def __init__(self, case: Case, state: State, update: bool) -> None:
        self.case, self.config, self.number = case, case.config, state.updates + 1
        self.docs = case.docs(0)[:1]
        self.tokens = self.docs[0]
        self.table, self.params = taps(self.config), params(self.config)
        self.users = {
            name: list(dict.fromkeys(user.name for user, _ in found))
            for name, found in consumers(self.config).items()
        }
        self.weights = sum(np.size(tensor) for tensor in state.params.values())
        self._check_size()
        self._compute(state, update)

    def _check_size(self) -> None:
        positions = len(self.tokens) - 1
        if self.weights * positions > MOST:
            raise MicrogptError(
                f"{self.weights:,} weights at {positions} positions are more than the atlas can"
                f" show ({MOST:,} products); take a shorter --text, or a smaller model"
            )

    def _compute(self, state: State, update: bool) -> None:
        """Run both implementations: vectorized first, since its derivatives say which elements are
        followed through scalar's."""
        config = replace(suited(self.config, "vectorized", "float64"), cores=1)
        theirs, ours = load_backend("vectorized", config, state, True), Scalar(config, state)
        self.vectorized = self._traced("vectorized", theirs, theirs.backward)
        followed = {self.followed(name) for name in (*self.table, *self.params)}
        several = {name for name, users in self.users.items() if len(users) > 1}

        def backward() -> None:
            self.additions = Additions(ours, followed, several)

        self.scalar = self._traced("scalar", ours, backward)
        self.after: Step = {}
        if update:
            theirs.update(learning_rate(min(state.updates, self.config.steps - 1), self.config))
            self.after = self._traced("vectorized, after the update,", theirs, theirs.backward)

    def _traced(self, name: str, backend: Backend, backward: Callable[[], None]) -> Step:
        """The tensors of a step without its update."""
        try:
            backend.forward(self.docs)
            backward()
        except FloatingPointError as error:
            raise FloatingPointError(f"{name} stops: {error}") from None
        state, step = backend.state(), {"batch/tokens": padded_tokens(self.docs)}
        for start, tensors in (
            ("entry/", state.params),
            ("adam_m/", state.m),
            ("adam_v/", state.v),
            ("forward/", backend.taps()),
            ("backward/d", backend.dtaps()),
            ("gradient/d", backend.grads()),
        ):
            step |= {f"{start}{key}": np.array(tensor) for key, tensor in tensors.items()}
        spoiled = not_finite({key: x for key, x in step.items() if x.dtype.kind == "f"})
        if spoiled:
            raise FloatingPointError(f"{spoiled} is not finite everywhere")
        return step

    def followed(self, name: str) -> Place:
        """Where the derivative is largest, at the second position if the tensor has positions; of
        attention, at the last position, which looks at most."""
        axes, phase = axes_of(name), "backward" if name in self.table else "gradient"
        sizes = np.abs(self.vectorized[f"{phase}/d{name}"])
        there = real(f"{phase}/d{name}", sizes.shape, self.vectorized["batch/tokens"])
        if "T" in axes:
            T = sizes.shape[axes.index("T")]
            wanted = T - 1 if "U" in axes else min(1, T - 1)
            positions = np.arange(T).reshape([-1 if a == "T" else 1 for a in axes])
            there = there & (positions == wanted)
        found = np.unravel_index(np.argmax(np.where(there, sizes, -1.0)), sizes.shape)
        return Place(name, tuple(map(int, found)))

    def token(self, i: int) -> str:
        """A token as it is written beside a row."""
        tokenizer = self.case.tokenizer
        if i in (tokenizer.bos, tokenizer.eos):
            return "BOS" if i == tokenizer.bos else "EOS"
        return label(tokenizer.decode([i]))

    def letters(self) -> list[str]:
        """The document's tokens."""
        return [self.token(i) for i in self.tokens]
