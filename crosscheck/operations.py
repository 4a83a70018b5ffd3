"""The arithmetic of each operation of the table (microgpt.taps), and of its derivatives.

Where two sides disagree, this arithmetic says which side is right. An operation is a function of
whole tensors. It returns terms by name, whose sum is the result. A derivative is one such function
for each operand. Constants and indices (a scale, an epsilon, token ids) are arguments like the
operands, so that a diagnosis can exchange any argument for something else.

Arrays are as in a trace: (B, T, ..), 0 in padding and for positions to come.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from inspect import signature
from math import sqrt
from typing import Any

import numpy as np

from crosscheck.formulas import value
from crosscheck.trace import DERIVED, Array, Step, axes, split_key
from microgpt.config import Config
from microgpt.errors import MicrogptError
from microgpt.taps import (
    ACTIVATIONS,
    EMBEDDING,
    LAYER,
    OUTPUT,
    Tap,
    axes_of,
    consumers,
    shape_of,
    sizes,
    taps,
)

Terms = dict[str, Array]


@dataclass(frozen=True)
class Around:
    """A step of a trace and the model's configuration, with what operations take from them."""

    config: Config
    step: Step

    @cached_property
    def tokens(self) -> Array:
        """(B, T + 1) token ids, -1 where a document has ended."""
        return self.step["batch/tokens"]

    @cached_property
    def real(self) -> Array:
        """(B, T): whether a document has that position, or padding stands there."""
        return self.tokens[:, 1:] >= 0

    @cached_property
    def looked_at(self) -> Array:
        """(B, 1, T, U): whether position t may look at position u."""
        T = self.real.shape[1]
        return self.real[:, None, :, None] & np.tril(np.ones((T, T), bool))

    @cached_property
    def n(self) -> Array:
        """(B,): how many positions each document has."""
        return self.real.sum(axis=1)

    @cached_property
    def token(self) -> Array:
        """(B, T): the token at each position, 0 in padding."""
        return np.where(self.real, self.tokens[:, :-1], 0)

    @cached_property
    def target(self) -> Array:
        """(B, T): the token after each position, 0 in padding."""
        return np.where(self.real, self.tokens[:, 1:], 0)

    @cached_property
    def position(self) -> Array:
        """(B, T): 0, 1, 2 .."""
        return np.broadcast_to(np.arange(self.real.shape[1]), self.real.shape)

    @cached_property
    def weights(self) -> Array:
        """(B, T): the weight of each position's loss in the mean."""
        return self.real / (len(self.n) * self.n[:, None])

    def heads(self, x: Array) -> Array:
        """(B, T, C) -> (B, T, H, D)"""
        return x.reshape(*x.shape[:-1], self.config.n_head, -1)

    @cached_property
    def sizes(self) -> dict[str, int]:
        """The number that each letter of a shape stands for."""
        V = (*self.step["entry/wte"].shape, 0)[0]
        return sizes(self.config, V, *self.real.shape)

    def tensor(self, key: str) -> Array:
        """The tensor of that key.

        Raises KeyError if the step has no such tensor, or not as numbers in the shape of the table.
        """
        found = self.step[key]
        if found.dtype.kind == "O" or found.shape != shape_of(axes(key), self.sizes):
            raise KeyError(key)
        return found

    def __getitem__(self, name: str) -> Array:
        """The tap of that full name, or the parameter before the step; KeyError as in `tensor`."""
        key = f"forward/{name}"
        return self.tensor(key if key in self.step else f"entry/{name}")


def row_sum(x: Array) -> Array:
    """The sum over the last axis, (.., n) -> (.., 1)."""
    return x.sum(axis=-1, keepdims=True)


def row_mean(x: Array) -> Array:
    """The mean over the last axis, (.., n) -> (.., 1)."""
    return x.mean(axis=-1, keepdims=True)


def merge(x: Array) -> Array:
    """(B, T, H, D) -> (B, T, C)"""
    return x.reshape(*x.shape[:2], -1)


# the functions and numbers that a formula of the table may use
ELEMENTARY: dict[str, Any] = {
    "relu": lambda x: np.maximum(x, 0.0), "tanh": np.tanh, "exp": np.exp, "log": np.log,
    "mean": row_mean, "sum": row_sum, "pi": np.pi,
}  # fmt: skip


def elementwise(formula: str, x: Array) -> Array:
    """The value of an activation's formula, or of its slope's, as the table has it.

    Raises MicrogptError if the formula is no Python, or has a name that ELEMENTARY has not.
    """
    try:
        return value(formula, {**ELEMENTARY, "x": x})
    except (NameError, SyntaxError) as error:
        kind = next(kind for kind, own in ACTIVATIONS.items() if formula in own)
        problem = (
            f"{error.msg}: {formula!r}"
            if isinstance(error, SyntaxError)
            else (f"{error.name!r} is not known to crosscheck/operations.py (elementwise)")
        )
        raise MicrogptError(f'microgpt/taps.py: ACTIVATIONS["{kind}"]: {problem}') from None


def refuse_unknown_names() -> None:
    """Raise MicrogptError if a formula or an operation of the table cannot be computed."""
    for activation in ACTIVATIONS.values():
        for formula in activation:
            elementwise(formula, np.ones(1))
    for tap in (*EMBEDDING, *LAYER, *OUTPUT):
        known, wanted = len(FUNCTIONS.get(tap.operation, ())), len(tap.operands) + 1
        if known != wanted:
            raise MicrogptError(
                f'microgpt/taps.py: Tap("{tap.name}"): the operation {tap.operation!r} needs'
                f" {wanted} functions in crosscheck/operations.py (FUNCTIONS), its value and a"
                f" derivative for each operand, and has {known or 'none'}"
            )


def embedding(a: Around, wte: Array, wpe: Array, token: Array, position: Array) -> Terms:
    real = a.real[..., None]
    return {
        "wte": wte[token % len(wte)] * real,
        "wpe": wpe[np.clip(position, 0, len(wpe) - 1)] * real,
    }


def _scattered(rows: Array, dy: Array, like: Array) -> Array:
    """A table of the shape of `like`, to whose rows dy is added, each vector at its index."""
    total = np.zeros_like(like)
    np.add.at(total, np.clip(rows, 0, len(like) - 1), dy)
    return total


def d_wte(a: Around, dy: Array, wte: Array, wpe: Array, token: Array, position: Array) -> Terms:
    return {"": _scattered(token, dy, wte)}


def d_wpe(a: Around, dy: Array, wte: Array, wpe: Array, token: Array, position: Array) -> Terms:
    return {"": _scattered(position, dy, wpe)}


def rmsnorm(a: Around, x: Array, eps: float) -> Terms:
    return {"": x * (row_mean(x * x) + eps) ** -0.5}


def d_rmsnorm(a: Around, dy: Array, y: Array, scale: Array) -> Terms:
    return {
        "the first term of the norm's derivative": scale * dy,
        "the second term of the norm's derivative": -scale * y * row_mean(dy * y),
    }


def linear(a: Around, x: Array, w: Array) -> Terms:
    return {"": x @ w.T}


def d_input(a: Around, dy: Array, w: Array) -> Terms:
    return {"": dy @ w}


def d_weight(a: Around, dy: Array, x: Array) -> Terms:
    return {"": np.einsum("bto,bti->oi", dy, x)}


def linear_residual(a: Around, x: Array, w: Array, res: Array) -> Terms:
    return {"the projection": x @ w.T, "the residual": res}


def d_residual(a: Around, dy: Array) -> Terms:
    return {"": dy}


def scores(a: Around, q: Array, k: Array, scale: float) -> Terms:
    products = np.einsum("bthd,buhd->bhtu", a.heads(q), a.heads(k)) / scale
    return {"": np.where(a.looked_at, products, 0.0)}


def d_query(a: Around, dy: Array, k: Array, scale: float) -> Terms:
    return {"": merge(np.einsum("bhtu,buhd->bthd", dy, a.heads(k))) / scale}


def d_key(a: Around, dy: Array, q: Array, scale: float) -> Terms:
    return {"": merge(np.einsum("bhtu,bthd->buhd", dy, a.heads(q))) / scale}


def softmax(a: Around, x: Array) -> Terms:
    seen = np.where(a.looked_at, x, -np.inf)
    least = np.finfo(seen.dtype).min  # where t looks at nothing
    exps = np.exp(seen - seen.max(axis=-1, keepdims=True, initial=least))
    return {"": exps / np.maximum(row_sum(exps), np.finfo(seen.dtype).tiny)}


def d_softmax(a: Around, dy: Array, y: Array) -> Terms:
    return {
        "the first term of the softmax's derivative": y * dy,
        "the sum over the row in the softmax's derivative": -y * row_sum(dy * y),
    }


def weighted_sum(a: Around, weights: Array, v: Array) -> Terms:
    return {"": merge(np.einsum("bhtu,buhd->bthd", weights, a.heads(v)))}


def d_weights(a: Around, dy: Array, v: Array) -> Terms:
    products = np.einsum("bthd,buhd->bhtu", a.heads(dy), a.heads(v))
    return {"": np.where(a.looked_at, products, 0.0)}


def d_value(a: Around, dy: Array, weights: Array) -> Terms:
    return {"": merge(np.einsum("bthd,bhtu->buhd", a.heads(dy), weights))}


def activation(a: Around, x: Array, kind: str) -> Terms:
    return {"": elementwise(ACTIVATIONS[kind].value, x) * a.real[..., None]}


def d_activation(a: Around, dy: Array, x: Array, kind: str) -> Terms:
    return {"": dy * elementwise(ACTIVATIONS[kind].slope, x)}


def _probabilities(logits: Array) -> Array:
    """softmax(logits)"""
    exps = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exps / row_sum(exps)


def _at(target: Array, like: Array) -> Array:
    """One-hot rows: 1 at the target, else 0."""
    return (np.arange(like.shape[-1]) == target[..., None]).astype("float64")


def cross_entropy(a: Around, logits: Array, target: Array) -> Terms:
    x = logits - logits.max(axis=-1, keepdims=True)
    loss_t = np.log(np.exp(x).sum(axis=-1)) - (x * _at(target, x)).sum(axis=-1)
    return {"": loss_t * a.real}


def d_cross_entropy(a: Around, dy: Array, logits: Array, target: Array) -> Terms:
    return {
        "the softmax": dy[..., None] * _probabilities(logits),
        "the - 1 at the target": -dy[..., None] * _at(target, logits),
    }


def mean(a: Around, loss_t: Array, weights: Array) -> Terms:
    return {"": np.asarray((loss_t * weights).sum())}


def d_mean(a: Around, dy: Array, weights: Array) -> Terms:
    return {"": dy * weights}


@dataclass(frozen=True)
class Slot:
    """An argument of an operation: its name in the model, and its value."""

    name: str  # of a tap or parameter in full, with d before it for a derivative; or in words
    value: Any
    axes: tuple[str, ...] = ()

    @property
    def is_tensor(self) -> bool:
        """Whether the argument is a tensor of the trace, or computed from one."""
        return bool(self.axes)


@dataclass(frozen=True)
class Call:
    """An operation with its arguments: one contribution to a tensor."""

    operation: str
    label: str  # what a diagnosis calls the contribution
    function: Callable[..., Terms]
    around: Around
    slots: Mapping[str, Slot] = field(default_factory=dict)

    def terms(self, **exchanged: Any) -> Terms:
        """The terms of the result, with some arguments exchanged for others."""
        return self.function(
            self.around, **{name: slot.value for name, slot in self.slots.items()} | exchanged
        )

    def total(self, **exchanged: Any) -> Array:
        """The result: the sum of its terms, with some arguments exchanged for others."""
        total: Array = sum(self.terms(**exchanged).values(), start=np.float64(0.0))
        return total


# for each operation, its function, and that of the derivative with respect to each operand;
# their arguments have the names of operands, and dy for the derivative with respect to the result
FUNCTIONS: dict[str, list[Callable[..., Terms]]] = {
    "embedding": [embedding, d_wte, d_wpe],
    "rmsnorm": [rmsnorm, d_rmsnorm],
    "linear": [linear, d_input, d_weight],
    "linear_residual": [linear_residual, d_input, d_weight, d_residual],
    "scores": [scores, d_query, d_key],
    "softmax": [softmax, d_softmax],
    "weighted_sum": [weighted_sum, d_weights, d_value],
    "activation": [activation, d_activation],
    "cross_entropy": [cross_entropy, d_cross_entropy],
    "mean": [mean, d_mean],
}


@cache
def _arguments(function: Callable[..., Terms]) -> list[str]:
    """The names of a function's arguments after the first, which is an Around."""
    return list(signature(function).parameters)[1:]


def calls(around: Around, key: str) -> list[Call]:
    """The operations whose results add up to a tap, a derivative or a gradient; [] for the rest.

    Raises KeyError if an operand is missing, or is not numbers in the shape of the table.
    """
    phase, name = split_key(key)
    if phase in ("forward", "eval") or key == "unwatched/loss":
        return [_call(around, taps(around.config)[name], None)]
    if phase in DERIVED:
        users = consumers(around.config)[name.removeprefix("d")]
        return [_call(around, tap, i) for tap, i in users]
    return []


def _call(around: Around, tap: Tap, operand: int | None) -> Call:
    """The operation of a tap, or the operation's derivative with respect to one of its operands."""
    functions = FUNCTIONS[tap.operation]
    function, own = functions[0 if operand is None else operand + 1], _arguments(functions[0])
    slots = {name: _slot(around, tap, own, name) for name in _arguments(function)}
    label = f"the contribution of {tap.name}"
    if function is d_residual:
        label = f"the residual's contribution, d{tap.name}"
    elif tap.operation == "rmsnorm":
        label = f"the contribution through the norm, {tap.name}"
    elif function is d_wte:
        label = "the contribution of the embedding"
    elif function is d_weight and operand is not None and tap.operands[operand] == "wte":
        label = "the contribution of wte as lm_head"
    return Call(tap.operation, label, function, around, slots)


def _slot(a: Around, tap: Tap, own: list[str], name: str) -> Slot:
    """The argument of that name; own: the arguments of the operation's own function."""
    if name in own and own.index(name) < len(tap.operands):
        operand = tap.operands[own.index(name)]
        return Slot(operand, a[operand], axes_of(operand))
    if name == "dy":
        return Slot(f"d{tap.name}", a.tensor(f"backward/d{tap.name}"), tap.axes)
    if name == "y":
        return Slot(tap.name, a[tap.name], tap.axes)
    if tap.operation == "rmsnorm" and name == "scale":
        x = a[tap.operands[0]]
        scale = (row_mean(x * x) + a.config.norm_eps) ** -0.5
        return Slot(f"the scale of {tap.name}", scale, (*tap.axes[:-1], "1"))
    return {
        "eps": Slot("eps", a.config.norm_eps),
        "scale": Slot("sqrt(D)", sqrt(a.config.head_dim)),
        "kind": Slot("activation", a.config.activation),
        "token": Slot("the token", a.token),
        "position": Slot("the position", a.position),
        "target": Slot("the target", a.target),
        "weights": Slot("the weights", a.weights),
    }[name]


def total(around: Around, key: str) -> Array | None:
    """A tensor computed from its own operands; None if the table has no operation for it."""
    if key == "backward/dloss":
        return np.ones(())
    parts = [call.total() for call in calls(around, key)]
    return sum(parts[1:], start=parts[0]) if parts else None
