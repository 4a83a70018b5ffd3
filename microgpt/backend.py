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
from microgpt.tokenizer import Tokenizer

# A tensor at the border is what numpy.asarray reads and what iterates as rows of numbers: nested
# lists from scalar/, arrays from vectorized/. Tensors go by the names of microgpt.layout.
Tensors = Mapping[str, Any]
Docs = Sequence[Sequence[int]]  # token ids by document, BOS and closing token included

BACKENDS = ("scalar", "vectorized")


@dataclass(frozen=True)
class State:
    """All that training changes."""

    params: Tensors
    m: Tensors  # Adam's running mean of the gradient
    v: Tensors  # and of its square
    updates: int  # how many updates led here

    def __repr__(self) -> str:
        numbers = sum(len(matrix) * len(matrix[0]) for matrix in self.params.values())
        return (
            f"State({numbers:,} parameters in {len(self.params)} tensors, {self.updates} updates)"
        )


def fresh_state(params: Tensors) -> State:
    """The state before the first update: these parameters, and moments of zero."""
    zeros = {name: [[0.0] * len(matrix[0])] * len(matrix) for name, matrix in params.items()}
    return State(params, zeros, zeros, 0)


class Backend(Protocol):
    """A GPT that can be trained, evaluated and sampled.

    A step of training is forward, backward, update; each reads what the one before it left. Taps
    and gradients are those of the latest step, and may be overwritten by the next.
    """

    def forward(self, docs: Docs) -> float:
        """The loss of a batch: the mean over its documents of the mean over their positions.

        Raises FloatingPointError if it is not finite.
        """

    def backward(self) -> None:
        """The gradient of the loss that forward found, in every parameter."""

    def update(self, lr_t: float) -> None:
        """One update by Adam with this learning rate."""

    def set_grads(self, grads: Tensors) -> None:
        """Put these in the place of what backward found, for update to go by."""

    def position_losses(self, docs: Docs) -> Sequence[Sequence[float]]:
        """-log p(next token) at every position of every document; nothing is learned.

        A row for each document, (B, T), with zeros after its last position.

        Raises FloatingPointError if one is not finite.
        """

    def read(self, tokens: Sequence[int]) -> Any:
        """The logits (T, V) that follow each token, read one at a time as in sampling."""

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
        top_k          only from so many of the likeliest tokens; 0: from all

        Draws from rng as one document after another would with rng.choices, a token a draw.

        Raises FloatingPointError if a logit that is drawn from is not finite.
        """

    def state(self) -> State:
        """Parameters and Adam's moments. Views where that costs nothing: copy to keep."""

    def taps(self) -> Tensors:
        """What forward computed in between, by document and position, zero where there is none.

        Batched shapes: (B, T, channels), attention (B, H, T, T), loss_t (B, T), loss ().
        Needs `watch`, without which some are overwritten.
        """

    def dtaps(self) -> Tensors:
        """The derivative of the loss with respect to each tap; needs `watch`."""

    def grads(self) -> Tensors:
        """The derivative of the loss with respect to each parameter."""


def load_backend(name: str, config: Config, state: State, watch: bool = False) -> Backend:
    """The implementation of that name, starting from a state.

    watch    keep all taps and their derivatives, which training has no use for

    Raises MicrogptError if there is none of that name, or if it cannot do what config asks.
    """
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
    backend: Backend = import_module(f"{name}.backend").Backend(config, state, watch)
    return backend


@contextmanager
def drawing(where: str = "") -> Iterator[None]:
    """Where Backend.sample is called: numbers that nothing can be drawn from are refused."""
    try:
        yield
    except ArithmeticError as error:
        raise MicrogptError(
            f"{where}{error}; the model's numbers are too large to draw from"
        ) from None
