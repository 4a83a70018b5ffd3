"""A trace: everything that one implementation computes in one step of training, under its name.

Keys are "phase/name", in the order in which they are compared:

batch/tokens       the token ids of the documents, padded with -1
entry/<p>          the parameter p before the step
entry_m/<p>        Adam's running mean of the gradient of p before the step
entry_v/<p>        Adam's running mean of the squared gradient of p before the step
forward/<tap>      a tensor of the forward pass, (B, T, ..), 0 in padding and for positions to come
eval/loss_t        the loss of every position, computed by the code for evaluation
read/logits        the logits of the first document, read token by token as in sampling
backward/d<tap>    the derivative of the loss with respect to the tap, in reverse order
gradient/d<p>      the derivative of the loss with respect to p
unwatched/loss     the loss as training computes it, by the recorded calls
unwatched/d<p>     the derivative of the loss with respect to p, by the recorded calls
adam_m/<p>         Adam's m after the step
adam_v/<p>         Adam's v after the step
update/<p>         what the step added to p
params/<p>         p after the step
sample/documents   token ids of documents drawn from the model, padded with -1
sample/likeliest   token ids of a document drawn with top_k, and of one drawn at temperature 0
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
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

SAMPLES, TOP_K = 2, 2  # documents that are drawn, with a prompt and without; top_k of another

ENTRY = ("entry", "entry_m", "entry_v")  # phases of the state before a step
AFTER = ("params", "adam_m", "adam_v")  # phases of the state after it
GIVEN = ("batch", *ENTRY)  # phases that no side has to compute

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
    """The steps of a case, each from the state that the step before it left.

    start    the state to begin with; without it, the case's own parameters before any update
    draws    whether documents are drawn from the model after the first and the last step

    Raises IncompleteError where the implementation does not finish a step.
    """
    config = suited(case.config, backend_name, dtype)
    state = start or fresh_state(case.params)
    tokens = padded_tokens(case.docs(state.updates))
    with stopping({"batch/tokens": tokens}, backend_name, config):
        pair = both_backends(backend_name, config, state)
    yield from steps_by(pair, case, range(state.updates, state.updates + steps), draws)


def steps_by(
    pair: WatchedAndTrained, case: Case, steps: range, draws: bool, grads: Tensors | None = None
) -> Iterator[Step]:
    """The steps of a case by two backends, each from the state that the step before left.

    draws    whether documents are drawn from the model after step 0 and the last step
    grads    the gradients that the updates are made from, in place of the steps' own
    """
    for step in steps:
        record = trace_step(pair, case.docs(step), learning_rate(step, pair.config), grads)
        if draws and step in (0, steps[-1]):
            with stopping(record, pair.name, pair.config):
                record = {**record, **drawn(case, pair.trained, step)}
        yield record


def teacher_forced(
    case: Case, backend_name: str, dtype: str, reference_steps: Iterable[Step]
) -> Iterator[Step]:
    """The steps of a case, each from the reference's state and updated by its gradients.

    So a mistake in one step does not reach the next, and a wrong update is a mistake of Adam alone.
    """
    config = suited(case.config, backend_name, dtype)
    for step, reference_step in enumerate(reference_steps):
        start = state_of(reference_step, ENTRY, step)
        with stopping({"batch/tokens": reference_step["batch/tokens"]}, backend_name, config):
            pair = both_backends(backend_name, config, start)
        grads = part(reference_step, "gradient", "d")
        yield trace_step(pair, case.docs(step), learning_rate(step, config), grads)


def suited(config: Config, backend_name: str, dtype: str) -> Config:
    """The configuration in that precision, and for scalar on a single core."""
    return replace(config, dtype=dtype, cores=1 if backend_name == "scalar" else config.cores)


@dataclass
class WatchedAndTrained:
    """Two backends of one implementation: one that keeps all taps, and one as training runs it.

    In scalar both run the same code, so one object serves as both. Its evaluation and reading would
    repeat the forward pass: they are computed in the first step alone, and copied afterwards.
    """

    name: str
    config: Config
    watched: Backend
    trained: Any
    begun: float  # the step after which evaluation and reading are copied


def both_backends(name: str, config: Config, state: State) -> WatchedAndTrained:
    """The two backends of an implementation, in a state; on several ranks, ranks in threads."""
    watched = load_backend(name, config, state, watch=True)
    if name == "scalar":
        return WatchedAndTrained(name, config, watched, watched, state.updates)
    trained = (Together if config.cores > 1 else load_backend)(name, config, state)
    return WatchedAndTrained(name, config, watched, trained, state.updates)


@contextmanager
def stopping(record: Step, side: str, config: Config) -> Iterator[None]:
    """Within this context, an exception from a side becomes an IncompleteError with this record."""
    try:
        yield
    except IncompleteError:
        raise
    except Exception as error:
        stop = stop_of(error, config)
        if stop is None:  # no line of the side raised it
            raise
        raise IncompleteError(in_order(record), replace(stop, side=side)) from None


def trace_step(
    pair: WatchedAndTrained, docs: Docs, lr_t: float, grads: Tensors | None = None
) -> Step:
    """Everything that one step of training computes, under its keys.

    grads    the gradients that the update is made from, in place of the step's own

    Raises IncompleteError if the implementation does not finish the step.
    """
    record: Step = {"batch/tokens": padded_tokens(docs)}
    with stopping(record, pair.name, pair.config):
        _watch(pair, docs, lr_t, grads, record)
    return in_order(record)


def _watch(
    pair: WatchedAndTrained, docs: Docs, lr_t: float, grads: Tensors | None, record: Step
) -> None:
    """Put what a step computes into the record, phase by phase."""
    before = pair.trained.state()
    for phase, tensors in zip(ENTRY, (before.params, before.m, before.v)):
        _keep(record, phase, tensors)
    backends = dict.fromkeys((pair.watched, pair.trained))
    for backend in backends:
        with marked_memory() if backend is pair.watched else nullcontext():
            loss = _forward(pair, backend, docs, before.updates, record)
            try:
                backend.backward()
            except Exception:
                with suppress(Exception):  # what there is of the derivatives
                    _keep_backward(record, backend)
                raise
        if backend is pair.watched:
            _keep_backward(record, backend)
            _keep(record, "gradient", _gradients(backend), prefix="d")
        if backend is pair.trained:
            _keep(record, "unwatched", {"loss": loss})
            _keep(record, "unwatched", _gradients(backend), prefix="d")
    for backend in backends:
        if grads:
            backend.set_grads({name: grads[name] for name in before.params})
        backend.update(lr_t)
    after = pair.trained.state()
    _keep(record, "adam_m", after.m)
    _keep(record, "adam_v", after.v)
    added = {p: np.array(after.params[p]) - record[f"entry/{p}"] for p in after.params}
    _keep(record, "update", added)
    _keep(record, "params", after.params)


def _forward(
    pair: WatchedAndTrained, backend: Backend, docs: Docs, updates: int, record: Step
) -> float:
    """The loss of one of the two backends; taps, reading and evaluation go into the record."""
    loss, failure, repeated = math.nan, None, False
    try:
        loss = backend.forward(docs)
    except FloatingPointError as error:  # the taps show where it began, if there are any
        failure = error
    except Exception:
        with suppress(Exception):  # what there is of the taps
            _keep(record, "forward", backend.taps())
        raise
    if backend is pair.watched:
        try:
            _keep(record, "forward", backend.taps())
        except FloatingPointError as error:
            raise failure or error from None
        has_taps = {"forward/logits", "forward/loss_t"} <= record.keys()
        repeated = has_taps and pair.trained is backend and updates > pair.begun
        if repeated:
            _keep(record, "read", {"logits": record["forward/logits"][0, : len(docs[0]) - 1]})
            _keep(record, "eval", {"loss_t": record["forward/loss_t"]})
        else:
            _keep(record, "read", {"logits": backend.read(docs[0][:-1])})
    if backend is pair.trained and not repeated:
        try:
            by_position = np.array(backend.position_losses(docs))
        except FloatingPointError:
            by_position = np.full((len(docs), max(map(len, docs)) - 1), math.nan)
        _keep(record, "eval", {"loss_t": by_position})
    return loss


def _keep(record: Step, phase: str, tensors: Tensors, prefix: str = "") -> None:
    """Put the tensors of a phase into the record."""
    for name, tensor in tensors.items():
        record[f"{phase}/{prefix}{name}"] = as_array(tensor)


def _keep_backward(record: Step, backend: Backend) -> None:
    """Put the derivatives with respect to the taps into the record, from the loss back."""
    _keep(record, "backward", dict(reversed(list(backend.dtaps().items()))), prefix="d")


def _gradients(backend: Backend) -> Tensors:
    """The gradients in the order in which the backward pass finds them."""
    found = backend.grads()
    return {name: found[name] for name in backward_order(found) if name in found}


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


def state_of(step: Step, phases: Sequence[str], updates: int) -> State:
    """The state before a step (phases: ENTRY) or after it (AFTER).

    updates    how many updates have been made by then
    """
    params, m, v = (part(step, phase) for phase in phases)
    return State(params, m, v, updates)


def drawn(case: Case, backend: Backend, seed: int) -> Step:
    """The token ids of documents that are drawn from a model, under their keys.

    Half of them begin with a prompt, if the context has room for one.
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
    """The letters of a tensor's axes (B, T, ..); () for a single number."""
    phase, name = split_key(key)
    if phase in ("batch", "sample"):
        return "B", "T"
    if phase == "read":  # of the first document
        return "T", "V"
    return axes_of(name.removeprefix("d") if phase in DERIVED else name)


def expected_shape(key: str, case: Case, tokens: Array) -> tuple[int, ...] | None:
    """The shape that a tensor should have; None for drawn documents, whose length is drawn too."""
    phase, _ = split_key(key)
    B, columns = tokens.shape
    if phase in ("batch", "sample"):
        return (B, columns) if phase == "batch" else None
    T = int((tokens[0] >= 0).sum()) - 1 if phase == "read" else columns - 1
    return shape_of(axes(key), sizes(case.config, case.tokenizer.vocab_size, B, T))


def real(key: str, shape: tuple[int, ...], tokens: Array) -> Array:
    """Which elements are compared: all but those in padding and for positions to come."""
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
    """The phase and the name of a key."""
    phase, _, name = key.partition("/")
    return phase, name
