"""The scalar GPT as the shell and the crosscheck see it: numbers in, numbers out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from random import Random
from typing import Any

from microgpt.backend import Docs, State, Tensors
from microgpt.config import Config
from microgpt.layout import Tree, grow, mapped, pick, rows, written
from microgpt.taps import taps as table
from microgpt.tokenizer import Tokenizer
from scalar.adam import adam
from scalar.model import Matrix, gpt, loss
from scalar.sample import sample
from scalar.value import Value

Nested = dict[str, list[Any]]


class Backend:
    """See microgpt.backend.Backend. A tap keeps its gradient here, so `watch` changes nothing."""

    def __init__(self, config: Config, state: State, watch: bool = False) -> None:
        self.config = config
        self.matrices = {
            name: mapped(lambda x: Value(float(x)), tensor) for name, tensor in state.params.items()
        }
        self.params = grow(self.matrices, config.n_layer)
        self.flat = [p for tensor in self.matrices.values() for row in rows(tensor) for p in row]
        self.m = [float(x) for tensor in state.m.values() for row in rows(tensor) for x in row]
        self.v = [float(x) for tensor in state.v.values() for row in rows(tensor) for x in row]
        self.updates = state.updates
        self.doc_taps: list[list[Tree]] = []

    def forward(self, docs: Docs) -> float:
        self.doc_taps = []
        self.loss, self.doc_taps = self._loss(docs)
        if not math.isfinite(self.loss.data):
            raise FloatingPointError(f"the loss is {self.loss.data}")
        return self.loss.data

    def backward(self) -> None:
        for p in self.flat:
            p.grad = 0.0
        self.loss.backward()

    def update(self, lr_t: float) -> None:
        adam(self.flat, self.m, self.v, self.updates, lr_t, self.config)
        self.updates += 1

    def set_grads(self, grads: Tensors) -> None:
        numbers = [float(x) for name in self.matrices for row in rows(grads[name]) for x in row]
        for p, grad in zip(self.flat, numbers):
            p.grad = grad

    def position_losses(self, docs: Docs) -> list[list[float]]:
        _, doc_taps = self._loss(docs)
        by_doc = [[tap.loss_t.data for tap in taps] for taps in doc_taps]
        if not all(math.isfinite(loss_t) for losses in by_doc for loss_t in losses):
            raise FloatingPointError("the loss of a position is not finite")
        T = max(map(len, by_doc))
        return [_padded(losses, T, 0.0) for losses in by_doc]

    def read(self, tokens: Sequence[int]) -> list[list[float]]:
        keys: list[Matrix] = [[] for _ in range(self.config.n_layer)]
        values: list[Matrix] = [[] for _ in range(self.config.n_layer)]
        rows = [
            gpt(token, t, self.params, keys, values, self.config, Tree(self.config.n_layer))
            for t, token in enumerate(tokens)
        ]
        return [[logit.data for logit in row] for row in rows]

    def sample(
        self,
        tokenizer: Tokenizer,
        rng: Random,
        num: int,
        temperature: float,
        prompt: Sequence[int],
        top_k: int = 0,
    ) -> list[list[int]]:
        model = self.params, self.config, tokenizer, rng
        with _overflows():
            return [sample(*model, temperature, prompt, top_k) for _ in range(num)]

    def state(self) -> State:
        params = self._by_name(p.data for p in self.flat)
        return State(params, self._by_name(self.m), self._by_name(self.v), self.updates)

    def grads(self) -> Nested:
        return self._by_name(p.grad for p in self.flat)

    def taps(self) -> Nested:
        return self._batched("data")

    def dtaps(self) -> Nested:
        return self._batched("grad")

    def _loss(self, docs: Docs) -> tuple[Value, list[list[Tree]]]:
        with _overflows():
            return loss(docs, self.params, self.config)

    def _by_name(self, numbers: Iterable[float]) -> Nested:
        """Tensors by name, filled with these numbers, one for each parameter."""
        rest = iter(numbers)
        return {
            name: mapped(lambda _: next(rest), tensor) for name, tensor in self.matrices.items()
        }

    def _batched(self, field: str) -> Nested:
        """`field` of every tap by name, with documents padded with zeros to one length."""
        if not self.doc_taps:
            raise FloatingPointError("the forward pass has not been finished")
        T = max(map(len, self.doc_taps))
        batched: Nested = {}
        for name in written(self.doc_taps[0][0], table(self.config)):  # all taps but `loss`
            entry = table(self.config)[name]
            docs = [[_numbers(pick(tap, name), field) for tap in taps] for taps in self.doc_taps]
            if "U" in entry.axes:
                batched[name] = [
                    [
                        _padded([_padded(by_head[h], T, 0.0) for by_head in doc], T, [0.0] * T)
                        for h in range(len(docs[0][0]))
                    ]
                    for doc in docs
                ]  # [B][H][T][T]
            else:
                zero = [0.0] * len(docs[0][0]) if len(entry.axes) > 2 else 0.0
                batched[name] = [_padded(doc, T, zero) for doc in docs]  # [B][T][channels]
        return {**batched, "loss": getattr(self.loss, field)}


@contextmanager
def _overflows() -> Iterator[None]:
    """Raise FloatingPointError where a power overflows: Python raises OverflowError, not inf."""
    try:
        yield
    except OverflowError:
        raise FloatingPointError("a power is too large for a number") from None


def _numbers(tap: Any, field: str) -> Any:
    """`field` of a Value, or of every Value in a nested list; None for any other object."""
    return [_numbers(x, field) for x in tap] if isinstance(tap, list) else getattr(tap, field, None)


def _padded(items: list[Any], length: int, padding: Any) -> list[Any]:
    return items + [padding] * (length - len(items))
