"""One document computed by both implementations, with the terms of scalar's derivatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from crosscheck.additions import Additions, Index, Place
from crosscheck.cases import Case
from crosscheck.trace import Step, padded_tokens, suited
from microgpt.backend import Backend, State, load_backend
from microgpt.errors import MicrogptError
from microgpt.pages.pictures import label
from microgpt.runs.checkpoint import not_finite
from microgpt.taps import Tap, consumers, params, taps
from microgpt.train import learning_rate
from scalar.backend import Backend as Scalar

MOST = 1_000_000  # products in scalar's graph: weights times positions


class Document:
    """The tensors of a model on the first document of a case, forward and backward.

    update        update the model, and compute the document a second time

    scalar        scalar's tensors by their keys, as in a trace
    vectorized    vectorized's tensors by their keys
    after         vectorized's tensors after the update, if there is one
    chain         the element that is followed, of every tensor
    additions     the terms that scalar adds to these elements

    Raises MicrogptError if scalar's graph would be too large, FloatingPointError if a number is
    not finite.
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
        """Run both implementations; vectorized first, since the elements that are followed through
        scalar's graph are chosen by its numbers."""
        config = replace(suited(self.config, "vectorized", "float64"), cores=1)
        theirs, ours = load_backend("vectorized", config, state, True), Scalar(config, state)
        self.vectorized = self._traced("vectorized", theirs, theirs.backward)
        self.chain = self._chain()
        several = {name for name, users in self.users.items() if len(users) > 1}

        def backward() -> None:
            self.additions = Additions(ours, set(self.chain.values()), several)

        self.scalar = self._traced("scalar", ours, backward)
        self.after: Step = {}
        if update:
            theirs.update(learning_rate(min(state.updates, self.config.steps - 1), self.config))
            self.after = self._traced("vectorized, after the update,", theirs, theirs.backward)

    def _traced(self, name: str, backend: Backend, backward: Callable[[], None]) -> Step:
        """The tensors of a forward and a backward pass."""
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

    def _chain(self) -> dict[str, Place]:
        """One element of every tensor: from the loss backwards, the one that contributes most to
        the chosen element of the tensor's first consumer."""
        found: dict[str, Place] = {}
        for name in (*reversed(self.table), *self.params):
            users = consumers(self.config)[name]
            at = self._used(*users[0], found[users[0][0].name].at) if users else ()
            found[name] = Place(name, tuple(at))
        return found

    def _used(self, tap: Tap, operand: int, at: Index) -> Sequence[int]:
        """The index of the element of an operand that contributes most to an element of a tap."""
        x, *others = (
            self.vectorized[f"{'forward' if name in self.table else 'entry'}/{name}"]
            for name in tap.operands
        )
        D = self.config.head_dim
        if tap.operation == "mean":  # at a position neither first nor last, if there are three
            T = x.shape[1]
            return 0, max(range(1, T - 1) if T > 2 else range(T), key=lambda t: float(x[0, t]))
        b, t, c = at[0], at[-2], at[-1]
        if tap.operation == "cross_entropy":
            return *at, self.tokens[at[-1] + 1]
        if tap.operation == "embedding":
            return (self.tokens[t], t)[operand], c
        if tap.operation.startswith("linear") and operand < 2:
            i = int(np.argmax(np.abs(others[0][c] * x[b, t])))
            return (c, i) if operand else (b, t, i)
        if tap.operation == "scores":
            _, h, t, u = at
            head = slice(h * D, h * D + D)
            d = int(np.argmax(np.abs(x[b, t, head] * others[0][b, u, head])))
            return b, (t, u)[operand], h * D + d
        if tap.operation == "weighted_sum":
            u = int(np.argmax(np.abs(x[b, c // D, t] * others[0][b, :, c])))
            return (b, u, c) if operand else (b, c // D, t, u)
        return at

    def token(self, i: int) -> str:
        """The label of a token."""
        tokenizer = self.case.tokenizer
        if i in (tokenizer.bos, tokenizer.eos):
            return "BOS" if i == tokenizer.bos else "EOS"
        return label(tokenizer.decode([i]))

    def letters(self) -> list[str]:
        """The labels of the document's tokens."""
        return [self.token(i) for i in self.tokens]
