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
sample/likeliest   the same for one drawn from the likeliest tokens, and one of the likeliest each
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import lru_cache
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crosscheck.cases import Case
from crosscheck.ranks import Together
from crosscheck.sides import IncompleteError, as_array, marked_memory, stop_of
from microgpt.backend import Backend, Docs, State, Tensors, fresh_state, load_backend
from microgpt.config import Config
from microgpt.layout import param_shapes, tap_names
from microgpt.taps import axes_of, shape_of, sizes
from microgpt.train import learning_rate

Array = NDArray[Any]
Step = dict[str, Array]

SAMPLES, TOP_K = 2, 2

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
    "unwatched": "the recorded training run",
    "adam_m": "Adam's m",
    "adam_v": "Adam's v",
    "update": "Adam's update",
    "params": "parameters after the step",
    "sample": "documents drawn",
}
DERIVED = ("backward", "gradient", "unwatched")  # phases whose names begin with d


def trace(
    case: Case,
    backend_name: str,
    dtype: str,
    steps: int,
    start: State | None = None,
    draws: bool = True,
) -> Iterator[Step]:
    """The steps of a case, each from where the one before it ended, as they are asked for.

    start    the state to begin from, if not the case's own parameters before any update
    draws    whether documents are drawn in a model's first step, and in the last of these

    Raises IncompleteError where the implementation does not finish a step.
    """
    config = suited(case.config, backend_name, dtype)
    state = start or fresh_state(case.params)
    first, pair = state.updates, None
    for step in range(first, first + steps):
        docs = case.docs(step)
        with stopping({"batch/tokens": padded_tokens(docs)}, backend_name, config):
            pair = pair or WatchedAndTrained(backend_name, config, state)
        record = trace_step(pair, docs, learning_rate(step, config))
        if draws and step in (0, first + steps - 1):
            with stopping(record, backend_name, config):
                record = {**record, **drawn(case, pair.trained, step)}
        yield record


def teacher_forced(
    case: Case, backend_name: str, dtype: str, reference_steps: Iterable[Step]
) -> Iterator[Step]:
    """The same steps, each begun where another trace began it, and updated by its gradients.

    What one step gets wrong does not reach the next, and what Adam gets wrong is Adam's alone.
    """
    config = suited(case.config, backend_name, dtype)
    for step, reference_step in enumerate(reference_steps):
        params, m, v = (part(reference_step, phase) for phase in ("entry", "entry_m", "entry_v"))
        with stopping({"batch/tokens": reference_step["batch/tokens"]}, backend_name, config):
            pair = WatchedAndTrained(backend_name, config, State(params, m, v, step))
        grads = part(reference_step, "gradient", "d")
        yield trace_step(pair, case.docs(step), learning_rate(step, config), grads)


def suited(config: Config, backend_name: str, dtype: str) -> Config:
    """The configuration in that precision; scalar has a single core's work to do."""
    return replace(config, dtype=dtype, cores=1 if backend_name == "scalar" else config.cores)


class WatchedAndTrained:
    """Two backends of one implementation: one watched, which keeps all taps, and one as training
    runs it, so that the watched one does not stand in for the trained one.

    In scalar both run the same code, so one object serves as both. Its evaluation and reading would
    repeat the forward pass: they are computed in the first step alone, and copied afterwards.
    """

    def __init__(self, name: str, config: Config, state: State) -> None:
        self.name, self.config = name, config
        self.watched = load_backend(name, config, state, watch=True)
        self.trained: Any = self.watched
        if name != "scalar":
            several = config.cores > 1
            self.trained = (Together if several else load_backend)(name, config, state)
        self.begun = state.updates


@contextmanager
def stopping(record: Step, side: str, config: Config) -> Iterator[None]:
    """Within this context, what a side raises becomes an IncompleteError with this record."""
    try:
        yield
    except IncompleteError:
        raise
    except Exception as error:
        stop = stop_of(error, config)
        if stop is None:  # the fault is none of the side's
            raise
        raise IncompleteError(in_order(record), replace(stop, side=side)) from None


def trace_step(
    pair: WatchedAndTrained, docs: Docs, lr_t: float, grads: Tensors | None = None
) -> Step:
    """One step of training, watched; with the update made from `grads`, if they are given.

    Raises IncompleteError if the implementation does not finish it.
    """
    record: Step = {"batch/tokens": padded_tokens(docs)}
    with stopping(record, pair.name, pair.config):
        _watch(pair, docs, lr_t, grads, record)
    return in_order(record)


def _watch(
    pair: WatchedAndTrained, docs: Docs, lr_t: float, grads: Tensors | None, record: Step
) -> None:
    """Put what a step computes into the record, phase by phase."""

    def keep(phase: str, tensors: Tensors, prefix: str = "") -> None:
        for name, tensor in tensors.items():
            record[f"{phase}/{prefix}{name}"] = as_array(tensor)

    def gradients(backend: Backend) -> Tensors:
        found = backend.grads()
        return {name: found[name] for name in backward_order(found) if name in found}

    before = pair.trained.state()
    keep("entry", before.params)
    keep("entry_m", before.m)
    keep("entry_v", before.v)
    for backend in dict.fromkeys((pair.watched, pair.trained)):
        watched, trained = backend is pair.watched, backend is pair.trained
        loss, failure, repeated = math.nan, None, False
        with marked_memory() if watched else nullcontext():
            try:
                loss = backend.forward(docs)
            except FloatingPointError as error:  # the taps show where it began, if there are any
                failure = error
            except Exception:
                with suppress(Exception):  # what there is of them
                    keep("forward", backend.taps())
                raise
            if watched:
                try:
                    keep("forward", backend.taps())
                except FloatingPointError as error:
                    raise failure or error from None
                known = {"forward/logits", "forward/loss_t"} <= record.keys()
                repeated = known and pair.trained is pair.watched and before.updates > pair.begun
                if repeated:
                    logits = record["forward/logits"][0, : len(docs[0]) - 1]
                    keep("read", {"logits": logits})
                    keep("eval", {"loss_t": record["forward/loss_t"]})
                else:
                    keep("read", {"logits": backend.read(docs[0][:-1])})
            if trained and not repeated:
                try:
                    by_position = np.array(backend.position_losses(docs))
                except FloatingPointError:
                    by_position = np.full((len(docs), max(map(len, docs)) - 1), math.nan)
                keep("eval", {"loss_t": by_position})
            try:
                backend.backward()
            except Exception:
                with suppress(Exception):
                    keep("backward", dict(reversed(list(backend.dtaps().items()))), prefix="d")
                raise
        if watched:
            keep("backward", dict(reversed(list(backend.dtaps().items()))), prefix="d")
            keep("gradient", gradients(backend), prefix="d")
        if trained:
            keep("unwatched", {"loss": loss})
            keep("unwatched", gradients(backend), prefix="d")
    for backend in dict.fromkeys((pair.watched, pair.trained)):
        if grads:
            backend.set_grads({name: grads[name] for name in before.params})
        backend.update(lr_t)
    after = pair.trained.state()
    keep("adam_m", after.m)
    keep("adam_v", after.v)
    keep("update", {p: np.array(after.params[p]) - record[f"entry/{p}"] for p in after.params})
    keep("params", after.params)


def backward_order(params: Iterable[str]) -> list[str]:
    """The names of parameters in the order in which the backward pass finds their gradients."""
    embedding = ("wte", "wpe")
    names = list(params)
    layers = [name for name in names if name.startswith("layer")]
    others = [name for name in names if name not in layers and name not in embedding]
    return [*others, *reversed(layers), *embedding]


def keys(config: Config, vocab_size: int) -> list[str]:
    """The keys of a whole step, in the order of comparison."""
    taps, params = tap_names(config), list(param_shapes(config, vocab_size))
    names = {
        "batch": ["tokens"],
        "forward": taps,
        "backward": [f"d{name}" for name in reversed(taps)],
        "eval": ["loss_t"],
        "read": ["logits"],
        "gradient": [f"d{name}" for name in backward_order(params)],
        "unwatched": ["loss", *[f"d{name}" for name in backward_order(params)]],
        "sample": ["documents", "likeliest"],
    }
    return [f"{phase}/{name}" for phase in PHASES for name in names.get(phase, params)]


def in_order(step: Step) -> Step:
    """The tensors of a step, phase by phase."""
    phases = list(PHASES)
    return {key: step[key] for key in sorted(step, key=lambda key: phases.index(split_key(key)[0]))}


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
        for doc in backend.sample(tokenizer, rng, SAMPLES, case.temperature, start)
    ]
    likeliest = [
        [tokenizer.bos, *doc]
        for temperature, top_k in ((case.temperature, TOP_K), (0.0, 0))
        for doc in backend.sample(tokenizer, rng, 1, temperature, [], top_k)
    ]
    longest = case.config.block_size + 1
    return {
        f"sample/{name}": np.array([[*doc, *[-1] * (longest - len(doc))] for doc in some])
        for name, some in (("documents", docs), ("likeliest", likeliest))
    }


def padded_tokens(docs: Docs) -> Array:
    """(B, T + 1) token ids, -1 where a document has ended."""
    longest = max(map(len, docs))
    return np.array([[*tokens, *[-1] * (longest - len(tokens))] for tokens in docs])


def axes(key: str) -> tuple[str, ...]:
    """What the indices of a tensor count, in letters; () for a single number."""
    phase, name = split_key(key)
    if phase in ("batch", "sample"):
        return "B", "T"
    if phase == "read":  # of the first document
        return "T", "V"
    return axes_of(name.removeprefix("d") if phase in DERIVED else name)


def expected_shape(key: str, case: Case, tokens: Array) -> tuple[int, ...] | None:
    """The shape that a tensor should have; None where it depends on what was drawn."""
    phase, _ = split_key(key)
    B, columns = tokens.shape
    if phase in ("batch", "sample"):
        return (B, columns) if phase == "batch" else None
    T = int((tokens[0] >= 0).sum()) - 1 if phase == "read" else columns - 1
    return shape_of(axes(key), sizes(case.config, case.tokenizer.vocab_size, B, T))


def real(key: str, shape: tuple[int, ...], tokens: Array) -> Array:
    """Which elements of a tensor there are: not those of padding, nor of positions to come."""
    letters, B = axes(key), len(tokens)
    if split_key(key)[0] in ("batch", "sample") or letters[:1] != ("B",) or shape[:1] != (B,):
        return _real(shape, b"", False)
    return _real(shape, (tokens[:, 1:] >= 0).tobytes(), "U" in letters)


@lru_cache(maxsize=512)
def _real(shape: tuple[int, ...], positions: bytes, causal: bool) -> Array:
    """The same, of a tensor (B, T, ..) or, if causal, (B, H, T, U); kept, and not to be written."""
    there = np.ones(shape, bool)
    if positions:
        rows = np.frombuffer(positions, bool).reshape(shape[0], -1)  # (B, T)
        B, T = rows.shape
        if causal:
            there = there & np.tril(np.ones((T, T), bool)) & rows[:, None, :, None]
        else:
            there = there & rows.reshape(B, T, *[1] * (len(shape) - 2))
    there.flags.writeable = False
    return there


def split_key(key: str) -> tuple[str, str]:
    """The phase and the name."""
    phase, _, name = key.partition("/")
    return phase, name
