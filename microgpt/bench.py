"""Speed, with the equality beside it: a wrong answer has no speed.

All contestants train the same model on the same documents. Their steps are timed in turn, so that
what disturbs the machine disturbs all alike. When the time is up, each takes one more step on every
batch. That on the first is held against scalar/ from the same state on the same documents, the
others against vectorized/ in double precision, all of a batch at once. Where the first would take
scalar/ minutes, it gets as many tokens as it can do in seconds, and the whole is held against
vectorized/ as well. Of a program that is not ours, the losses are known that it prints.
"""

from __future__ import annotations

import gc
import math
import os
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle, islice
from pathlib import Path
from random import Random
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from microgpt.backend import Backend, Docs, State, Tensors, fresh_state, load_backend
from microgpt.config import Config
from microgpt.data import load_documents
from microgpt.errors import MicrogptError
from microgpt.init import init_params
from microgpt.memory import check_memory
from microgpt.opponents import Program, torch_backends
from microgpt.tokenizer import build_tokenizer
from microgpt.train import batch, learning_rate

Step = tuple[float, Tensors, Tensors]  # the loss, the gradient, the change of the parameters

ROUNDS = 15  # of which the median is taken
ROUND_SECONDS = 0.05  # how long each contestant has in a round
CHUNK = 16  # documents whose graph scalar/ holds at a time
SCALAR_WORK = 20_000_000  # parameters times tokens, which take scalar/ some seconds
ALLOWED = {"float64": 1e-9, "float32": 1e-3}  # see difference()
PRINTED = 1e-4  # allowed where a loss is known to four digits
LEARNING_RATE = 1e-3
# what is reported of the seconds of a step
TIMES: dict[str, Callable[[list[float]], float]] = {
    "seconds_per_step": median,
    "fastest": min,
    "slowest": max,
}
# how variables begin by which an environment steers the libraries that compute
STEERING = ("OPENBLAS_", "MKL_", "BLIS_", "VECLIB_", "OMP_", "KMP_", "NPY_", "ATEN_", "ONEDNN_")


@dataclass
class Contestant:
    """Somebody who can train, and how long the steps took."""

    name: str
    config: Config
    backend: Any  # a Backend, or as much of one as can be had
    batches: list[Docs]  # taken in turn
    seconds: list[float] = field(default_factory=list)  # a step, in each round
    difference: float = 0.0  # the largest of all batches

    @property
    def label(self) -> str:
        """The name, the precision, and how many cores if it is more than one."""
        cores = f" x{self.config.cores}" if self.config.cores > 1 else ""
        return f"{self.name} {self.config.dtype}{cores}"

    @property
    def tokens(self) -> float:
        """The positions of a step, on average."""
        return sum(len(doc) - 1 for docs in self.batches for doc in docs) / len(self.batches)

    @property
    def right(self) -> bool:
        """Whether loss, gradient and update are those of scalar, to within rounding."""
        return self.difference <= self.allowed

    @property
    def allowed(self) -> float:
        """How far it may be from them."""
        return PRINTED if self.foreign else ALLOWED[self.config.dtype]

    @property
    def foreign(self) -> bool:
        """Whether nothing is known of it but the losses that it prints."""
        return isinstance(self.backend, Program)

    @property
    def partly(self) -> bool:
        """Whether scalar does a part of the first batch only."""
        return not self.foreign and _few(self.batches[0], self) != self.batches[0]

    def step(self, docs: Docs) -> None:
        """One step of training."""
        self.backend.forward(docs)
        self.backend.backward()
        self.backend.update(LEARNING_RATE)


def bench(
    config: Config,
    batch_sizes: Sequence[int],
    against: Sequence[str] = (),
    cores: int = 1,
    rounds: int = ROUNDS,
) -> list[Contestant]:
    """Time scalar, vectorized and whoever they are up against, at each batch size.

    against    torch, or a program's file: see microgpt.opponents

    scalar and programs take part with a batch of one, scalar if it does one in seconds (see
    SCALAR_WORK); vectorized once more on several cores, where the batch has a document for each.
    Raises MicrogptError if an opponent is unknown or ends before its time, or if a loss is not
    finite.
    """
    scalar = _enter("scalar", replace(config, batch_size=1, dtype="float64", cores=1))
    contestants = [] if any(_few(docs, scalar) != docs for docs in scalar.batches) else [scalar]
    programs = [name for name in against if name.endswith(".py")]
    contestants += [_enter_program(Path(name), scalar.config) for name in programs]
    for size in batch_sizes:
        for dtype in ("float64", "float32"):
            entry = replace(config, batch_size=size, dtype=dtype, cores=1)
            contestants.append(_enter("vectorized", entry))
        if 1 < cores <= size:
            contestants.append(_enter("vectorized", replace(entry, cores=cores)))
        for opponent in against:
            if opponent not in programs:
                contestants += _opponents(opponent, entry)
    try:
        with np.errstate(all="ignore"):  # what overflows ends in a loss that is not finite
            _take_turns(contestants, rounds)
            for one in contestants:
                one.difference = difference(one)
    except ArithmeticError as error:
        raise MicrogptError(
            f"this model cannot be trained: {error}; try a smaller init_std than {config.init_std}"
        ) from None
    return contestants


def _take_turns(contestants: Sequence[Contestant], rounds: int) -> None:
    turns = [cycle(one.batches) for one in contestants]
    counts = []
    for one, turn in zip(contestants, turns):
        slow = one.name == "scalar" or one.foreign
        warm_up = 2 if slow else len(one.batches)  # each shape once: it may be compiled for it
        for docs in islice(turn, warm_up):
            one.step(docs)
        start = perf_counter()
        for docs in islice(turn, 2):
            one.step(docs)
        counts.append(max(1, int(ROUND_SECONDS * 2 / (perf_counter() - start))))
    gc.collect()
    gc.disable()  # as timeit does: whose garbage it finds is chance
    try:
        for _ in range(rounds):
            for one, turn, count in zip(contestants, turns, counts):
                start = perf_counter()
                for docs in islice(turn, count):
                    one.step(docs)
                one.seconds.append((perf_counter() - start) / count)
    finally:
        gc.enable()


def difference(one: Contestant) -> float:
    """How far a contestant's steps are from the right ones, at most, over one step on every batch.

    The largest of: the loss, as a share of itself; the gradient, of the largest number in it; and
    the change of the parameters, of the largest, held against what Adam makes of that gradient.

    In single precision an input of a ReLU can fall on the other side of 0, where the gradient is
    another: in one of 150 batches of names-fast that is more than is allowed. One step later it is
    gone, so whoever is wrong may try again.
    """
    if one.foreign:
        return _off_course(one)

    def apart(docs: Docs, right: Callable[..., Step]) -> float:
        first = _apart(one, docs, right)
        return first if first <= one.allowed else min(first, _apart(one, docs, right))

    first, *others = one.batches
    from_scalar = apart(_few(first, one), _scalar_step)
    if one.name == "scalar":
        return from_scalar
    whole = one.batches if one.partly else others
    return max(from_scalar, *(apart(docs, _whole_step) for docs in whole))


def _off_course(one: Contestant) -> float:
    """How far a program's losses are from those of vectorized, which trains as long as it has."""
    state, batches = _start(one.config, "vectorized")
    ours = load_backend("vectorized", one.config, state)
    apart = 0.0
    for step, (docs, printed) in enumerate(zip(batches, one.backend.losses)):
        loss = ours.forward(docs)
        ours.backward()
        ours.update(learning_rate(step, one.config))
        apart = max(apart, abs(printed - loss) / loss)
    return apart


def _apart(one: Contestant, docs: Docs, right: Callable[..., Step]) -> float:
    before = one.backend.state()
    params, m, v = (
        {name: np.array(x, "float64") for name, x in named.items()}
        for named in (before.params, before.m, before.v)
    )
    state = State(params, m, v, before.updates)
    loss = one.backend.forward(docs)
    one.backend.backward()
    grads = {name: np.array(tensor, "float64") for name, tensor in one.backend.grads().items()}
    one.backend.update(LEARNING_RATE)
    after = one.backend.state().params
    change = {name: np.asarray(after[name]) - params[name] for name in after}
    right_loss, right_grads, right_change = right(
        replace(one.config, dtype="float64", cores=1), state, docs, grads
    )
    return max(
        abs(loss - right_loss) / right_loss,
        _farthest(grads, right_grads),
        _farthest(change, right_change),
    )


def _farthest(theirs: Tensors, ours: Tensors) -> float:
    largest = max(float(np.abs(tensor).max()) for tensor in ours.values())
    apart = np.array([np.abs(theirs[name] - ours[name]).max() for name in ours])
    return float(apart.max()) / largest if np.isfinite(apart).all() and largest > 0 else math.inf


def _scalar_step(config: Config, state: State, docs: Docs, grads: Tensors) -> Step:
    """The loss and the gradient, and how the parameters change by an update with `grads`."""
    scalar = load_backend("scalar", config, state)
    loss, sums = 0.0, {name: np.zeros_like(tensor) for name, tensor in state.params.items()}
    for start in range(0, len(docs), CHUNK):
        part = docs[start : start + CHUNK]
        loss += scalar.forward(part) * (len(part) / len(docs))
        scalar.backward()
        for name, tensor in scalar.grads().items():
            sums[name] += np.asarray(tensor) * (len(part) / len(docs))
    return loss, sums, _change(scalar, state, grads)


def _whole_step(config: Config, state: State, docs: Docs, grads: Tensors) -> Step:
    """The same by vectorized/, all of the batch at once."""
    vectorized = load_backend("vectorized", config, state, watch=True)
    loss = vectorized.forward(docs)
    vectorized.backward()
    found = {name: np.array(tensor) for name, tensor in vectorized.grads().items()}
    return loss, found, _change(vectorized, state, grads)


def _change(backend: Backend, state: State, grads: Tensors) -> Tensors:
    backend.set_grads(grads)
    backend.update(LEARNING_RATE)
    after = backend.state().params
    return {name: np.asarray(after[name]) - state.params[name] for name in after}


def _few(docs: Docs, one: Contestant) -> Docs:
    """As much of a batch as scalar can do in seconds, and at least one token."""
    size = sum(np.size(tensor) for tensor in one.backend.state().params.values())
    left = max(1, SCALAR_WORK // size)  # tokens
    few = []
    for doc in docs:
        if left > 0:
            few.append(doc[: left + 1])
            left -= len(few[-1]) - 1
    return few


def table(contestants: Sequence[Contestant]) -> str:
    """The results at 80 columns."""
    scalar = [median(one.seconds) for one in contestants if one.name == "scalar"]
    lines = [
        f"{'':22} {'batch':>5} {'us/step':>9} {'spread':>6} {'us/doc':>9} {'us/token':>8}"
        f" {'x scalar':>8} {'apart':>6}"
    ]
    for one in contestants:
        size, step = one.config.batch_size, median(one.seconds)
        start, end = f"{one.label:22} {size:5} ", f" {one.difference:6.0e}"
        if not one.right:
            lines.append(f"{start}{'WRONG':>9} {'-':>6} {'-':>9} {'-':>8} {'-':>8}{end}")
            continue
        spread = (max(one.seconds) - min(one.seconds)) / step
        ratio = scalar[0] / (step / size) if scalar else None
        times = f"{ratio:8,.{0 if ratio > 10 else 2}f}" if ratio else f"{'-':>8}"
        lines.append(
            f"{start}{_fit(step * 1e6, 9, 1)} {spread:6.0%} {_fit(step / size * 1e6, 9, 2)}"
            f" {_fit(step / one.tokens * 1e6, 8, 2)} {times}{end}"
        )
    return "\n".join(lines)


def _fit(number: float, width: int, decimals: int) -> str:
    """A number with so many decimals, or with none if it is too wide."""
    text = f"{number:{width},.{decimals}f}"
    return text if len(text) <= width else f"{number:{width},.0f}"


def machine() -> dict[str, str]:
    """Where it was measured, and what the environment told the libraries that compute.

    OPENBLAS_CORETYPE, say, makes OpenBLAS take the kernels for another CPU than this one.
    """
    torch = sys.modules.get("torch")  # if it took part
    return {
        "cpu": _cpu(),
        "cores": str(os.cpu_count()),
        "threads of BLAS": os.environ["OPENBLAS_NUM_THREADS"],
        "blas": _blas(),
        "environment": _steered(),
        "numpy": np.__version__,
        "python": platform.python_version(),
        **(
            {"torch": f"{torch.__version__} with {torch.get_num_threads()} threads"}
            if torch
            else {}
        ),
        "system": f"{platform.system()} {platform.machine()}",
    }


def as_json(contestants: Sequence[Contestant]) -> dict[str, object]:
    """The same for other programs; times in seconds, none where the answer is wrong."""
    return {
        "machine": machine(),
        "results": [
            {
                "name": one.name,
                "dtype": one.config.dtype,
                "cores": one.config.cores,
                "batch_size": one.config.batch_size,
                "tokens_per_step": one.tokens,
                **{name: of(one.seconds) if one.right else None for name, of in TIMES.items()},
                "difference": one.difference if math.isfinite(one.difference) else None,
                "right": one.right,
            }
            for one in contestants
        ],
    }


def _enter(name: str, config: Config) -> Contestant:
    state, batches = _start(config, name)
    return Contestant(name, config, load_backend(name, config, state), batches)


def _enter_program(path: Path, config: Config) -> Contestant:
    _, batches = _start(config, "vectorized")
    return Contestant(
        path.name[:14], config, Program(path, load_documents(config.dataset)), batches
    )


def _opponents(name: str, config: Config) -> list[Contestant]:
    if name != "torch":
        raise MicrogptError(f"--against {name}: unknown; expected torch, or a program, FILE.py")
    state, batches = _start(config, name)
    found = torch_backends()
    return [
        Contestant(name, config, backend(config, state), batches) for name, backend in found.items()
    ]


def _start(config: Config, backend_name: str) -> tuple[State, list[Docs]]:
    """The parameters and the first batches of a run."""
    rng = Random(config.seed)
    documents = load_documents(config.dataset)
    rng.shuffle(documents)
    tokenizer = build_tokenizer("".join(documents), config)
    trained = replace(config, num_samples=0)  # nothing is drawn here
    check_memory(trained, tokenizer.vocab_size, documents, backend_name)
    state = fresh_state(init_params(config, tokenizer.vocab_size, rng))
    batches = max(4, 64 // config.batch_size)
    return state, [batch(step, documents, tokenizer, config) for step in range(batches)]


def _cpu() -> str:
    if sys.platform == "linux":
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _steered() -> str:
    told = (f"{name}={value}" for name, value in sorted(os.environ.items()) if _steers(name))
    return " ".join(told) or "nothing set"


def _steers(name: str) -> bool:
    return name.startswith(STEERING) and name != "OPENBLAS_NUM_THREADS"  # which is stated anyway


def _blas() -> str:
    config = np.show_config(mode="dicts") or {}
    blas = config.get("Build Dependencies", {}).get("blas", {})
    return f"{blas.get('name', 'unknown')} {blas.get('version', '')}".strip()
