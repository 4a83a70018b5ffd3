"""Speed, with the equality beside it: a wrong answer has no speed.

All contestants train the same model on the same documents. Their steps are timed in turn, so that
what disturbs the machine disturbs all alike. When the time is up, each computes one more gradient,
which is held against that of scalar/ on the same parameters and documents.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle, islice
from random import Random
from statistics import median
from time import perf_counter

import numpy as np

from microgpt.backend import Backend, Docs, State, fresh_state, load_backend
from microgpt.config import Config
from microgpt.data import load_documents
from microgpt.errors import MicrogptError
from microgpt.init import init_params
from microgpt.memory import check_memory
from microgpt.tokenizer import build_tokenizer
from microgpt.train import batch

ROUNDS = 15  # of which the median is taken
ROUND_SECONDS = 0.05  # how long each contestant has in a round
WARM_UP = 3  # steps that are not timed
CHUNK = 16  # documents whose graph scalar/ holds at a time
ALLOWED = {"float64": 1e-9, "float32": 1e-3}  # of the largest gradient
LEARNING_RATE = 1e-3


@dataclass
class Contestant:
    """Somebody who can train, and how long the steps took."""

    name: str
    config: Config
    backend: Backend
    docs: list[Docs]  # the batches, taken in turn
    seconds: list[float] = field(default_factory=list)  # a step, in each round
    difference: float = 0.0  # from scalar, as a share of the largest gradient

    @property
    def tokens(self) -> float:
        """The positions of a step, on average."""
        return sum(len(doc) - 1 for docs in self.docs for doc in docs) / len(self.docs)

    @property
    def right(self) -> bool:
        """Whether the gradient is that of scalar, to within rounding."""
        return self.difference <= ALLOWED[self.config.dtype]

    def step(self, docs: Docs) -> None:
        """One step of training."""
        self.backend.forward(docs)
        self.backend.backward()
        self.backend.update(LEARNING_RATE)


def bench(
    config: Config, batch_sizes: Sequence[int], against: Sequence[str] = (), rounds: int = ROUNDS
) -> list[Contestant]:
    """Time scalar, vectorized and whoever they are up against, at each batch size.

    scalar takes part with a batch of one. Raises MicrogptError if an opponent is unknown.
    """
    contestants = [_enter("scalar", replace(config, batch_size=1, dtype="float64"))]
    for size in batch_sizes:
        for dtype in ("float64", "float32"):
            entry = replace(config, batch_size=size, dtype=dtype)
            contestants.append(_enter("vectorized", entry))
        for opponent in against:
            contestants += _opponents(opponent, replace(config, batch_size=size, dtype="float32"))
    turns = [cycle(one.docs) for one in contestants]
    counts = []
    for one, turn in zip(contestants, turns):
        start = perf_counter()
        for docs in islice(turn, WARM_UP):
            one.step(docs)
        counts.append(max(1, int(ROUND_SECONDS * WARM_UP / (perf_counter() - start))))
    for _ in range(rounds):
        for one, turn, count in zip(contestants, turns, counts):
            start = perf_counter()
            for docs in islice(turn, count):
                one.step(docs)
            one.seconds.append((perf_counter() - start) / count)
    for one, turn in zip(contestants, turns):
        one.difference = difference(one.backend, next(turn), one.config)
    return contestants


def difference(backend: Backend, docs: Docs, config: Config) -> float:
    """How far a backend's next gradient is from scalar's, as a share of the largest in it."""
    state = backend.state()
    params = {name: np.array(tensor, "float64") for name, tensor in state.params.items()}
    backend.forward(docs)
    backend.backward()
    theirs = {name: np.array(tensor) for name, tensor in backend.grads().items()}
    witness = load_backend("scalar", replace(config, dtype="float64"), fresh_state(params))
    ours = {name: np.zeros_like(tensor) for name, tensor in params.items()}
    for start in range(0, len(docs), CHUNK):
        part = docs[start : start + CHUNK]
        witness.forward(part)
        witness.backward()
        for name, tensor in witness.grads().items():
            ours[name] += np.asarray(tensor) * (len(part) / len(docs))
    largest = max(float(np.abs(tensor).max()) for tensor in ours.values())
    apart = max(float(np.abs(theirs[name] - ours[name]).max()) for name in ours)
    return apart / largest if np.isfinite(apart) else float("inf")


def table(contestants: Sequence[Contestant]) -> str:
    """The results at 80 columns."""
    scalar = median(contestants[0].seconds)
    lines = [
        f"{'':20} {'batch':>5}  {'us/step':>9} {'spread':>6} {'us/doc':>9} {'us/token':>8}"
        f" {'x scalar':>8} {'apart':>7}"
    ]
    for one in contestants:
        size, step = one.config.batch_size, median(one.seconds)
        spread = (max(one.seconds) - min(one.seconds)) / step
        name = f"{one.name} {one.config.dtype}"
        verdict = f"{one.difference:7.0e}" if one.right else "  WRONG"
        lines.append(
            f"{name:20} {size:5}  {step * 1e6:9,.1f} {spread:6.0%} {step / size * 1e6:9,.2f}"
            f" {step / one.tokens * 1e6:8,.2f} {scalar / (step / size):8,.0f} {verdict}"
        )
    return "\n".join(lines)


def machine() -> dict[str, str]:
    """Where it was measured."""
    return {
        "cpu": _cpu(),
        "cores": str(os.cpu_count()),
        "threads": os.environ.get("OPENBLAS_NUM_THREADS") or "as BLAS has it",
        "blas": _blas(),
        "numpy": np.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def as_json(contestants: Sequence[Contestant]) -> dict[str, object]:
    """The same for other programs; times in seconds."""
    return {
        "machine": machine(),
        "results": [
            {
                "name": one.name,
                "dtype": one.config.dtype,
                "batch_size": one.config.batch_size,
                "tokens_per_step": one.tokens,
                "seconds_per_step": median(one.seconds),
                "fastest": min(one.seconds),
                "slowest": max(one.seconds),
                "difference": one.difference,
                "right": one.right,
            }
            for one in contestants
        ],
    }


def _enter(name: str, config: Config) -> Contestant:
    state, docs = _start(config, name)
    return Contestant(name, config, load_backend(name, config, state), docs)


def _opponents(name: str, config: Config) -> list[Contestant]:
    if name != "torch":
        raise MicrogptError(f"--against {name}: unknown; expected torch")
    from microgpt.opponents import torch_backends

    state, docs = _start(config, name)
    found: dict[str, Callable[[Config, State], Backend]] = torch_backends()
    return [
        Contestant(name, config, backend(config, state), docs) for name, backend in found.items()
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


def _blas() -> str:
    config = np.show_config(mode="dicts") or {}
    blas = config.get("Build Dependencies", {}).get("blas", {})
    return f"{blas.get('name', 'unknown')} {blas.get('version', '')}".strip()
