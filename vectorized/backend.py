"""The vectorized GPT as the shell and the crosscheck see it: numbers in, numbers out.

Same as scalar:         the methods, and what each leaves for the next.
Different from scalar:  parameters, gradients and moments -> a buffer for all of each;
                        the graph of a batch -> workers, who keep what their shares need.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random

import numpy as np

from microgpt.backend import Docs, State, Tensors
from microgpt.config import Config
from microgpt.errors import MicrogptError
from microgpt.layout import Tree, pick, tap_names
from microgpt.tokenizer import Tokenizer
from vectorized.adam import adam
from vectorized.arrays import Array, activations, flatten, named_views
from vectorized.batch import Batch, arrange, pad
from vectorized.model import loss_forward
from vectorized.sample import empty_past, read, sample
from vectorized.worker import Remote, Worker, deal, shared


class Backend:
    """See microgpt.backend.Backend."""

    def __init__(self, config: Config, state: State, watch: bool = False) -> None:
        self.config = config
        self.shapes = {name: np.shape(tensor) for name, tensor in state.params.items()}
        dtype = np.dtype(config.dtype)
        self.flat, self.m, self.v = (
            flatten(tensors, dtype) for tensors in (state.params, state.m, state.v)
        )  # (P,)
        self.updates = state.updates
        self.others: list[Remote] = []  # who work beside this process
        self.busy: list[Remote] = []  # those of them who have a share of the batch
        if config.cores > 1 and not watch:
            try:
                memory = shared(self.flat.nbytes)
                self.others = [Remote(config, self.shapes, memory) for _ in range(1, config.cores)]
            except OSError as error:
                raise MicrogptError(
                    f"--cores {config.cores}: the system starts no more processes"
                    f" ({error.strerror}); take fewer cores"
                ) from None
            numbers = np.frombuffer(memory, dtype)
            numbers[:] = self.flat
            self.flat = numbers
        self.flat_grads = np.zeros(len(self.flat), dtype)  # takes no memory yet; zeros_like would
        self.worker = Worker(config, self.shapes, self.flat, self.flat_grads, watch)
        self.params = self.worker.params

    def forward(self, docs: Docs) -> float:
        own, *shares = deal(docs, 1 + len(self.others))
        self.busy = []
        for other, share in zip(self.others, shares):
            if share:
                other.begin(share, of=len(docs))
                self.busy.append(other)
        loss = self.worker.forward(own, of=len(docs))
        for other in self.busy:
            loss += other.forward()
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss}")
        return loss

    def backward(self) -> None:
        self.worker.backward()
        for other in self.busy:
            other.backward()
            self.flat_grads += other.flat_grads

    def update(self, lr_t: float) -> None:
        scratch = self.worker.flat_piece  # free between two batches
        adam(self.flat, self.flat_grads, self.m, self.v, self.updates, lr_t, self.config, scratch)
        self.updates += 1

    def set_grads(self, grads: Tensors) -> None:
        self.flat_grads[:] = flatten(grads, self.flat.dtype)

    def position_losses(self, docs: Docs) -> list[list[float]]:
        batch = pad(docs, self.flat.dtype)
        V, new = len(self.params.wte), self.worker.workspace.new
        tap = activations(self.config, V, batch.shape, batch.shape.T, False, new)
        arrange(batch, tap)
        with np.errstate(all="ignore"):  # padding need not be finite
            loss_forward(batch, self.params, self.config, tap)
        by_doc = tap.loss_t.reshape(len(docs), -1)
        if not np.isfinite(by_doc).all():
            raise FloatingPointError("the loss of a position is not finite")
        return [losses[: len(doc) - 1].tolist() for doc, losses in zip(docs, by_doc)]

    def read(self, tokens: Sequence[int]) -> Array:
        past = empty_past(self.params, self.config)
        with np.errstate(all="ignore"):  # logits that are not finite say it all
            columns = [
                read(np.array([[token]]), self.params, past, self.config) for token in tokens
            ]
        return np.concatenate(columns, axis=1).T

    def sample(
        self, tokenizer: Tokenizer, rng: Random, num: int, temperature: float, prompt: Sequence[int]
    ) -> list[list[int]]:
        with np.errstate(all="ignore"):
            return sample(self.params, self.config, tokenizer, rng, num, temperature, prompt)

    def state(self) -> State:
        params, m, v = (named_views(flat, self.shapes) for flat in (self.flat, self.m, self.v))
        return State(params, m, v, self.updates)

    def grads(self) -> dict[str, Array]:
        return named_views(self.flat_grads, self.shapes)

    def taps(self) -> dict[str, Array]:
        ((batch, tap, _),) = self.worker.work
        return self._batched(batch, tap)

    def dtaps(self) -> dict[str, Array]:
        ((batch, _, dtap),) = self.worker.work
        return self._batched(batch, dtap)

    def _batched(self, batch: Batch, taps: Tree) -> dict[str, Array]:
        """The taps by name, their columns turned into documents and positions."""
        B, T, _ = batch.shape
        real = batch.weights.reshape(B, T) > 0
        looked_at = np.tril(np.ones((T, T), bool)) & real[:, None, :, None]  # (B, 1, T, T)
        batched: dict[str, Array] = {}
        for name in tap_names(self.config):
            tap = np.asarray(pick(taps, name), self.flat.dtype)
            if name == "loss":
                batched[name] = tap
            elif name == "loss_t":
                batched[name] = np.where(real, tap.reshape(B, T), 0.0)
            elif name.endswith((".attn_logits", ".attn_weights")):
                by_query = tap.reshape(T, -1, B, T).transpose(2, 1, 3, 0)  # (B, H, T, T)
                batched[name] = np.where(looked_at, by_query, 0.0)
            else:
                if tap.ndim == 4:  # q, k, v: (H, B, D, T)
                    tap = tap.transpose(0, 2, 1, 3)
                columns = tap.reshape(-1, B, T)
                batched[name] = np.where(real[..., None], columns.transpose(1, 2, 0), 0.0)
        return batched
