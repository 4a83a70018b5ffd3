"""The vectorized GPT as the shell and the crosscheck see it: numbers in, numbers out.

Same as scalar:         the methods, but for `recordings`.
Different from scalar:  parameters, gradients and moments -> a buffer for all of each;
                        graph -> the text (model.py, adam.py) if watched, else what it recorded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from random import Random
from typing import Any

import numpy as np

from microgpt.backend import Docs, State, Tensors
from microgpt.config import Config
from microgpt.layout import Tree, written
from microgpt.runs.memory import most_walkers
from microgpt.runs.ranks import ALONE, Comm
from microgpt.taps import taps as table
from microgpt.tokenizer import Tokenizer
from vectorized.adam import adam, clip
from vectorized.batch import lengths, micro_batches, pad
from vectorized.flat import Shapes, flatten, model_tree, named_views
from vectorized.model import Array, loss_backward, loss_forward
from vectorized.ranks import Sums, share
from vectorized.replay import Replay
from vectorized.sample import empty_caches, read, sample, sample_many


class Watched:
    """Forward, backward, update and losses by the text as it stands. All taps are kept."""

    def __init__(
        self, config: Config, shapes: Shapes, flat: Array, flat_grads: Array, m: Array, v: Array
    ) -> None:
        self.config = config
        self.params = model_tree(flat, shapes, config.n_layer)
        self.flat, self.flat_grads, self.m, self.v = flat, flat_grads, m, v
        self.grads = named_views(flat_grads, shapes)
        self.found: dict[str, Any] = dict(self.grads)  # gradients as the text returns them

    def forward(self, docs: Docs, of: int) -> float:
        self.batch = pad(docs, self.flat.dtype, of)
        self.lengths = lengths(docs)
        self.tap = Tree(self.config.n_layer)
        with np.errstate(all="ignore"):
            return float(loss_forward(self.batch, self.params, self.config, self.tap))

    def backward(self) -> None:
        self.dtap, dparams = Tree(self.config.n_layer), Tree(self.config.n_layer)
        with np.errstate(all="ignore"):
            loss_backward(self.batch, self.params, dparams, self.config, self.tap, self.dtap)
        self.flat_grads.fill(np.nan)
        self.found = written(dparams, self.grads)
        for name, found in self.found.items():
            if np.shape(found) == self.grads[name].shape:
                self.grads[name][:] = found

    def update(self, step: int, lr_t: float, factor: float) -> None:
        adam(self.flat, factor * self.flat_grads, self.m, self.v, step, lr_t, self.config)

    def losses(self, docs: Docs) -> Any:
        tap = Tree(self.config.n_layer)
        with np.errstate(all="ignore"):
            loss_forward(pad(docs, self.flat.dtype), self.params, self.config, tap)
        return tap.loss_t


class Backend:
    """See microgpt.backend.Backend."""

    def __init__(
        self, config: Config, state: State, watch: bool = False, *, comm: Comm = ALONE
    ) -> None:
        self.config = config
        self.shapes = {name: np.shape(tensor) for name, tensor in state.params.items()}
        dtype = np.dtype(config.dtype)
        self.flat, self.m, self.v = (
            self._flat(tensors, dtype) for tensors in (state.params, state.m, state.v)
        )  # (P,)
        self.updates = state.updates
        for numbers in (self.flat, self.m, self.v):
            comm.send(numbers)  # all ranks begin with those of rank 0
        self.comm = comm
        self.sums = Sums(comm, len(self.flat), dtype)
        self.flat_grads = self.sums.grads
        arrays = self.shapes, self.flat, self.flat_grads, self.m, self.v
        self.worker: Any = Watched(config, *arrays) if watch else Replay(config, *arrays)
        # evaluation has memory of its own, so that it can come between forward and backward
        self.evaluation: Any = self.worker if watch else Replay(config, *arrays)
        self.params = model_tree(self.flat, self.shapes, config.n_layer)

    def forward(self, docs: Docs) -> float:
        own = self.worker.forward(self._share(docs), of=len(docs))
        loss = self.sums.loss(own)
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss}")
        return loss

    def backward(self) -> None:
        self.worker.backward()
        self.sums.gradient()

    def update(self, lr_t: float) -> None:
        factor = clip(self.flat_grads, self.config.grad_clip) if self.config.grad_clip else 1.0
        self.worker.update(self.updates, lr_t, factor)
        self.updates += 1

    def recordings(self, docs: Docs) -> list[tuple[tuple[int, ...], Any]]:
        """What this process replays in a step on these documents, and for what shape (B, T).

        A recording for each micro-batch, and that of the update, for (), if there has been one.
        """
        own = self._share(docs)
        steps = [self.worker.training(part) for part in micro_batches(own, self.config)]
        shaped = [(step.batch.tokens.shape, step.recording) for step in steps]
        update = self.worker.adam
        return [*shaped, ((), update)] if update else shaped

    def _share(self, docs: Docs) -> Docs:
        return share(docs, self.comm.rank, self.comm.size)

    def set_grads(self, grads: Tensors) -> None:
        self.flat_grads[:] = self._flat(grads, self.flat.dtype)

    def _flat(self, tensors: Tensors, dtype: np.dtype) -> Array:
        return flatten({name: tensors[name] for name in self.shapes}, dtype)

    def position_losses(self, docs: Docs) -> Array:
        n = lengths(docs)[:, None]  # (B, 1)
        T = n.max()
        losses = np.where(np.arange(T) < n, self.evaluation.losses(docs)[:, :T], 0.0)  # (B, T)
        if not np.isfinite(losses).all():
            raise FloatingPointError("the loss of a position is not finite")
        return losses

    def read(self, tokens: Sequence[int]) -> Array:
        caches = empty_caches(self.params, self.config)
        with np.errstate(all="ignore"):  # an overflow shows in the logits
            model = self.params, caches, self.config
            rows = [read(np.array([token]), t, *model)[0] for t, token in enumerate(tokens)]
        return np.array(rows)

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
        with np.errstate(all="ignore"):
            if most_walkers(self.config) > 1:
                return sample_many(*model, num, temperature, prompt, top_k)
            return [sample(*model, temperature, prompt, top_k) for _ in range(num)]

    def state(self) -> State:
        params, m, v = (named_views(flat, self.shapes) for flat in (self.flat, self.m, self.v))
        return State(params, m, v, self.updates)

    def grads(self) -> dict[str, Array]:
        views = named_views(self.flat_grads, self.shapes)
        if not isinstance(self.worker, Watched):
            return views
        found = self.worker.found  # those that were written; one of another shape stays as it is
        return {
            name: view if np.shape(found[name]) == view.shape else found[name]
            for name, view in views.items()
            if name in found
        }

    def taps(self) -> dict[str, Array]:
        return self._named(self.worker.tap)

    def dtaps(self) -> dict[str, Array]:
        return self._named(self.worker.dtap)

    def _named(self, taps: Tree) -> dict[str, Any]:
        """The taps by name, with zeros in padding and at later positions.

        A tap that was never written is left out; one whose shape does not fit stays as it is.
        """
        B, T = self.worker.batch.tokens.shape
        real = np.arange(T) < self.worker.lengths[:, None]  # (B, T)
        looked_at = np.tril(np.ones((T, T), bool)) & real[:, None, :, None]  # (B, 1, T, U)
        entries = table(self.config)
        named = written(taps, entries)
        for name, tap in named.items():
            if tap is None:
                continue
            with suppress(TypeError, ValueError):
                array = np.asarray(tap, self.flat.dtype)
                if "U" in entries[name].axes:
                    array = np.where(looked_at, array, 0.0)
                elif "T" in entries[name].axes:
                    array = np.where(real.reshape(B, T, *[1] * (array.ndim - 2)), array, 0.0)
                named[name] = array
        return named
