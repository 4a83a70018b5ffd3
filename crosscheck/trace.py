"""A trace: everything that one implementation computes in one step of training, under its name.

Keys are "phase/name", in the order in which they are compared:

batch/tokens       the token ids of the documents, padded with -1
entry/<p>          parameters before the step
entry_m/<p>        Adam's running mean of the gradient before the step
entry_v/<p>        and of its square
forward/<tap>      what the forward pass computes in between, (B, T, ..), zero where there is none
eval/loss_t        the loss of every position, as it is computed where nothing is learned
read/logits        the logits of the first document, read token by token as when sampling
backward/d<tap>    the derivative of the loss with respect to each, in reverse order
gradient/d<p>      the same for each parameter
unwatched/loss     the loss as training computes it, by the recorded calls
unwatched/d<p>     and its derivatives
adam_m/<p>         Adam's m after the step
adam_v/<p>         Adam's v after the step
update/<p>         what the step added to the parameters
params/<p>         parameters after the step
sample/documents   token ids of documents drawn from the model, padded with -1
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crosscheck.cases import Case
from microgpt.backend import Backend, Docs, State, Tensors, fresh_state, load_backend
from microgpt.config import Config
from microgpt.layout import param_shapes, tap_names
from microgpt.train import learning_rate

Array = NDArray[Any]
Step = dict[str, Array]

SAMPLES, TEMPERATURE = 2, 2.0

PHASES = {
    "batch": "the batch",
    "entry": "parameters at entry",
    "entry_m": "Adam's m at entry",
    "entry_v": "Adam's v at entry",
    "forward": "forward pass",
    "eval": "evaluation",
    "read": "reading token by token",
    "backward": "backward pass",
    "gradient": "parameter gradients",
    "unwatched": "training unwatched",
    "adam_m": "Adam's m",
    "adam_v": "Adam's v",
    "update": "Adam's update",
    "params": "parameters after the step",
    "sample": "documents drawn",
}


def trace(case: Case, backend_name: str, dtype: str, steps: int) -> Iterator[Step]:
    """The steps of a case, each from where the one before it ended, as they are asked for."""
    config = suited(case.config, backend_name, dtype)
    pair = Pair(backend_name, config, fresh_state(case.params))
    for step in range(steps):
        record = trace_step(pair, case.docs(step), learning_rate(step, config))
        yield {**record, **drawn(case, pair.trained, step)}


def taught(case: Case, backend_name: str, dtype: str, lessons: Iterable[Step]) -> Iterator[Step]:
    """The same steps, each begun where another trace began it, and updated by its gradients.

    What one step gets wrong does not reach the next, and what Adam gets wrong is Adam's alone.
    """
    config = suited(case.config, backend_name, dtype)
    for step, lesson in enumerate(lessons):
        params, m, v = (part(lesson, phase) for phase in ("entry", "entry_m", "entry_v"))
        pair = Pair(backend_name, config, State(params, m, v, step))
        grads = part(lesson, "gradient", "d")
        yield trace_step(pair, case.docs(step), learning_rate(step, config), grads)


def suited(config: Config, backend_name: str, dtype: str) -> Config:
    """The configuration in that precision; scalar has a single core's work to do."""
    return replace(config, dtype=dtype, cores=1 if backend_name == "scalar" else config.cores)


class Pair:
    """An implementation twice: as it is when it trains, and with somebody watching.

    Whoever watches has arrays kept that training overwrites, so that one does not prove the other.
    """

    def __init__(self, name: str, config: Config, state: State) -> None:
        self.trained = load_backend(name, config, state)
        self.watched = load_backend(name, config, state, watch=True)


def trace_step(pair: Pair, docs: Docs, lr_t: float, grads: Tensors | None = None) -> Step:
    """One step of training, watched; with the update made from `grads`, if they are given."""
    record: Step = {"batch/tokens": padded_tokens(docs)}

    def keep(phase: str, tensors: Tensors, prefix: str = "") -> None:
        for name, tensor in tensors.items():
            record[f"{phase}/{prefix}{name}"] = np.array(tensor)

    before = pair.trained.state()
    keep("entry", before.params)
    keep("entry_m", before.m)
    keep("entry_v", before.v)
    failure, losses = None, dict.fromkeys((pair.trained, pair.watched), math.nan)
    for backend in losses:
        try:
            losses[backend] = backend.forward(docs)
        except FloatingPointError as error:  # the taps show where it began, if there are any
            failure = error
    try:
        keep("forward", pair.watched.taps())
    except FloatingPointError as error:
        raise failure or error from None
    try:
        by_position = np.array(pair.trained.position_losses(docs))
    except FloatingPointError:
        by_position = np.full((len(docs), max(map(len, docs)) - 1), math.nan)
    keep("eval", {"loss_t": by_position})
    keep("read", {"logits": pair.watched.read(docs[0][:-1])})
    for backend in (pair.trained, pair.watched):
        backend.backward()
    keep("backward", dict(reversed(list(pair.watched.dtaps().items()))), prefix="d")
    keep("gradient", pair.watched.grads(), prefix="d")
    keep("unwatched", {"loss": losses[pair.trained]})
    keep("unwatched", pair.trained.grads(), prefix="d")
    for backend in (pair.trained, pair.watched):
        if grads is not None:
            backend.set_grads(grads)
        backend.update(lr_t)
    after = pair.trained.state()
    keep("adam_m", after.m)
    keep("adam_v", after.v)
    keep("update", {p: np.array(after.params[p]) - record[f"entry/{p}"] for p in after.params})
    keep("params", after.params)
    return record


def keys(config: Config, vocab_size: int) -> list[str]:
    """The keys of a whole step, in the order of comparison."""
    taps, params = tap_names(config), list(param_shapes(config, vocab_size))
    names = {
        "batch": ["tokens"],
        "forward": taps,
        "backward": [f"d{name}" for name in reversed(taps)],
        "eval": ["loss_t"],
        "read": ["logits"],
        "gradient": [f"d{name}" for name in params],
        "unwatched": ["loss", *[f"d{name}" for name in params]],
        "sample": ["documents"],
    }
    return [f"{phase}/{name}" for phase in PHASES for name in names.get(phase, params)]


def part(step: Step, phase: str, prefix: str = "") -> dict[str, Array]:
    """The tensors of one phase, by their names without the prefix."""
    start = f"{phase}/{prefix}"
    return {key.removeprefix(start): step[key] for key in step if key.startswith(start)}


def drawn(case: Case, backend: Backend, seed: int) -> Step:
    """Documents from the model as it stands, at a temperature that makes them differ.

    The last ones begin with a prompt, if the context has room for one.
    """
    tokenizer, rng = case.tokenizer, Random(seed)
    prompt = tokenizer.encode(case.chars[:2])[: case.config.block_size - 1]
    docs = [
        [tokenizer.bos, *doc]
        for start in ([], prompt)
        for doc in backend.sample(tokenizer, rng, SAMPLES, TEMPERATURE, start)
    ]
    longest = case.config.block_size + 1
    return {"sample/documents": np.array([[*doc, *[-1] * (longest - len(doc))] for doc in docs])}


def padded_tokens(docs: Docs) -> Array:
    """(B, T + 1) token ids, -1 where a document has ended."""
    longest = max(map(len, docs))
    return np.array([[*tokens, *[-1] * (longest - len(tokens))] for tokens in docs])


def real(key: str, shape: tuple[int, ...], tokens: Array) -> Array:
    """Which elements of a tensor there are: not those of padding, nor of positions to come."""
    phase, name = split_key(key)
    if phase not in ("forward", "eval", "backward") or name.endswith("loss"):
        return np.ones(shape, bool)
    positions = tokens[:, 1:] >= 0  # (B, T)
    B, T = positions.shape
    if shape[:1] != (B,):
        return np.ones(shape, bool)
    if name.endswith((".attn_logits", ".attn_weights")):
        looked_at = np.tril(np.ones((T, T), bool)) & positions[:, None, :, None]  # (B, 1, T, T)
        return np.broadcast_to(looked_at, shape)
    return np.broadcast_to(positions.reshape(B, T, *[1] * (len(shape) - 2)), shape)


def split_key(key: str) -> tuple[str, str]:
    """The phase and the name."""
    phase, _, name = key.partition("/")
    return phase, name
