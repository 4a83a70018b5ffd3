"""The contract between the shell and the two implementations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from random import Random
from typing import Any, Protocol

from microgpt.config import Config
from microgpt.errors import MicrogptError
from microgpt.layout import rows
from microgpt.runs.ranks import ALONE, Comm
from microgpt.tokenizer import Tokenizer

# A backend takes and returns tensors as nested lists (scalar/) or arrays (vectorized/): both can be
# iterated by rows, and numpy.asarray reads both. Their names are those of microgpt.layout.
Tensors = Mapping[str, Any]
Docs = Sequence[Sequence[int]]  # token ids by document, BOS and closing token included

BACKENDS = ("scalar", "vectorized")


@dataclass(frozen=True)
class State:
    """Everything that training changes."""

    params: Tensors
    m: Tensors  # Adam's running mean of the gradient
    v: Tensors  # Adam's running mean of the squared gradient
    updates: int  # how many updates led here

    def __repr__(self) -> str:
        numbers = sum(len(rows(x)) * len(rows(x)[0]) for x in self.params.values())
        return (
            f"State({numbers:,} parameters in {len(self.params)} tensors, {self.updates} updates)"
        )


def fresh_state(params: Tensors) -> State:
    """The state before the first update: these parameters, and moments of zero."""
    zeros = {name: _zeros(tensor) for name, tensor in params.items()}
    return State(params, zeros, zeros, 0)


def _zeros(tensor: Any) -> list[Any]:
    row = [0.0] * len(rows(tensor)[0])
    return row if rows(tensor) is not tensor else [row] * len(tensor)


class Backend(Protocol):
    """A GPT that can be trained, evaluated and sampled.

    A step of training is forward, backward, update, in this order. Taps and gradients are those of
    the latest step; the next step may overwrite them.
    """

    def forward(self, docs: Docs) -> float:
        """The loss of a batch: the mean over its documents of the mean over their positions.

        Raises FloatingPointError if the loss is not finite.
        """

    def backward(self) -> None:
        """Find the gradient of the latest forward's loss with respect to every parameter."""

    def update(self, lr_t: float) -> None:
        """One update by Adam with this learning rate."""

    def set_grads(self, grads: Tensors) -> None:
        """Replace the gradients that backward found; the next update uses these gradients."""

    def position_losses(self, docs: Docs) -> Sequence[Sequence[float]]:
        """-log p(next token) at every position of every document; the model is not changed.

        A row for each document, (B, T), with zeros after the document's last position.

        Raises FloatingPointError if a loss is not finite.
        """

    def read(self, tokens: Sequence[int]) -> Any:
        """The logits (T, V) after each token, found token by token with the KV cache."""

    def sample(
        self,
        tokenizer: Tokenizer,
        rng: Random,
        num: int,
        temperature: float,
        prompt: Sequence[int],
        top_k: int = 0,
    ) -> list[list[int]]:
        """Documents drawn from the model, without BOS and closing token, prompt included.

        temperature    0: the likeliest token each time
        top_k          draw from the top_k likeliest tokens; 0: from all

        Takes from rng what rng.choices takes for one token after another, document by document.

        Raises FloatingPointError if the logits of a drawn token are not finite.
        """

    def state(self) -> State:
        """Parameters and Adam's moments; some are views that update changes, so copy to keep."""

    def taps(self) -> Tensors:
        """The intermediates of the latest forward, by document and position, zero in padding.

        Batched shapes: (B, T, channels), attention (B, H, T, T), loss_t (B, T), loss ().
        Needs `watch`: without `watch`, later intermediates overwrite earlier ones.
        """

    def dtaps(self) -> Tensors:
        """The derivative of the loss with respect to each tap; needs `watch`."""

    def grads(self) -> Tensors:
        """The derivative of the loss with respect to each parameter."""


def load_backend(
    name: str, config: Config, state: State, watch: bool = False, comm: Comm = ALONE
) -> Backend:
    """The implementation of that name, starting from a state.

    watch    keep all taps and their derivatives, which training does not need
    comm     the ranks that share every batch; all of them start from the state of rank 0

    Raises MicrogptError, as check_backend does.
    """
    check_backend(name, config)
    make = import_module(f"{name}.backend").Backend
    several = {"comm": comm} if comm.size > 1 else {}
    backend: Backend = make(config, state, watch, **several)
    return backend


def check_backend(name: str, config: Config) -> None:
    """Raise MicrogptError if there is none of that name, or if it cannot do what config asks."""
    if name not in BACKENDS:
        raise MicrogptError(
            f"--backend: unknown backend {name!r}; expected {' or '.join(BACKENDS)}"
        )
    if name == "scalar" and config.dtype != "float64":
        raise MicrogptError(
            f"--dtype {config.dtype}: scalar computes with Python's floats, which are float64;"
            " use --dtype float64 or --backend vectorized"
        )
    if name == "scalar" and config.cores > 1:
        raise MicrogptError(
            f"--cores {config.cores}: scalar computes one number after another;"
            " use --cores 1 or --backend vectorized"
        )


@contextmanager
def drawing(where: str = "") -> Iterator[None]:
    """Raise MicrogptError where Backend.sample meets logits that are not finite."""
    try:
        yield
    except ArithmeticError as error:
        raise MicrogptError(
            f"{where}{error}; the model's numbers are too large to draw from"
        ) from None
