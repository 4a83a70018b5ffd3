"""Speed, and beside it correctness: a contestant with a wrong result gets no time.

All contestants train the same model on the same documents. Their steps are timed in turn, so that a
disturbance of the machine reaches all of them. Afterwards each takes one more step on every batch.
The step on the first batch is compared with scalar/ from the same state, the steps on the others
with vectorized/ in float64, without micro-batches. Where the first batch would take scalar/
minutes, scalar/ computes as many of its tokens as it can in seconds, and the whole first batch is
compared with vectorized/ as well. Of a foreign program, only the losses that it prints are known.
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
from microgpt.bench import calls
from microgpt.bench.opponents import Program, torch_backends
from microgpt.bench.ranks import OnRanks
from microgpt.config import Config
from microgpt.data import load_documents, parts
from microgpt.errors import MicrogptError
from microgpt.init import init_params
from microgpt.layout import count_params
from microgpt.runs.memory import check_memory
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
DTYPES = ("float64", "float32")
MANY_LENGTHS = 100  # documents that `lengths` times
AGAIN = 2  # rounds of `lengths` in which every shape is known
HELD = 4  # documents of `lengths` that are compared, or a whole batch
# statistics of the seconds of a step
TIMES: dict[str, Callable[[list[float]], float]] = {
    "seconds_per_step": median,
    "fastest": min,
    "slowest": max,
}
# prefixes of the environment variables that steer numerical libraries
STEERING = ("OPENBLAS_", "MKL_", "BLIS_", "VECLIB_", "OMP_", "KMP_", "NPY_", "ATEN_", "ONEDNN_")


@dataclass
class Contestant:
    """A backend that trains, and how long its steps took."""

    name: str
    config: Config
    backend: Any  # a Backend, or the part of one that an opponent has
    batches: list[Docs]  # taken in turn
    seconds: list[float] = field(default_factory=list)  # of a step, one number per round
    difference: float = 0.0  # the largest over all batches
    calls: float | None = None  # NumPy calls per step, on average: see bench.calls
    reduction: float | None = None  # seconds of a step in which ranks add up their gradients

    @property
    def label(self) -> str:
        """The name, the precision, and how many ranks if it is more than one."""
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
        """The largest difference that counts as right."""
        return PRINTED if self.foreign else ALLOWED[self.config.dtype]

    @property
    def foreign(self) -> bool:
        """Whether this is a program of which only the printed losses are known."""
        return isinstance(self.backend, Program)

    @property
    def partly(self) -> bool:
        """Whether scalar computes only a part of the first batch."""
        return not self.foreign and _few(self.batches[0], self) != self.batches[0]

    def step(self, docs: Docs) -> None:
        """One step of training."""
        self.backend.forward(docs)
        self.backend.backward()
        self.backend.update(LEARNING_RATE)

    def steps(self, batches: Sequence[Docs]) -> float:
        """Seconds that a step on each of these batches takes, all together."""
        if isinstance(self.backend, OnRanks):
            return self.backend.steps(batches, LEARNING_RATE)
        start = perf_counter()
        for docs in batches:
            self.step(docs)
        return perf_counter() - start


def bench(
    config: Config,
    batch_sizes: Sequence[int],
    against: Sequence[str] = (),
    cores: int = 1,
    rounds: int = ROUNDS,
    dtypes: Sequence[str] = DTYPES,
    torch_threads: int | None = None,
) -> list[Contestant]:
    """Time scalar, vectorized and their opponents at each batch size.

    against          torch, or a program's file: see microgpt.bench.opponents
    dtypes           of vectorized; torch, and vectorized on several ranks, use the last of them
    torch_threads    None leaves the number of threads to PyTorch

    scalar and programs take part with a batch of one, scalar only if such a step takes seconds
    (see SCALAR_WORK); vectorized takes part again on several ranks, where each has a document.
    Raises MicrogptError if an opponent is unknown or ends too early, or if a loss is not
    finite.
    """
    single = replace(config, batch_size=1, dtype="float64", cores=1)
    state, batches = _start(single, "scalar")
    alike = Contestant("vectorized", single, load_backend("vectorized", single, state), batches)
    few = any(_few(docs, alike) != docs for docs in batches)
    contestants = [] if few else [_enter("scalar", single)]
    programs = [name for name in against if name.endswith(".py")]
    contestants += [_enter_program(Path(name), single) for name in programs]
    for size in batch_sizes:
        for dtype in dtypes:
            entry = replace(config, batch_size=size, dtype=dtype, cores=1)
            contestants.append(_enter("vectorized", entry))
        if 1 < cores <= size:
            contestants.append(_enter_ranks(replace(entry, cores=cores)))
        for opponent in against:
            if opponent not in programs:
                contestants += _opponents(opponent, entry, torch_threads)
    try:
        with np.errstate(all="ignore"):  # an overflow leads to a loss that is not finite
            take_turns(contestants, rounds)
            for one in contestants:
                one.difference = difference(one)
                one.calls = calls.per_step(one.backend, one.batches)
                if isinstance(one.backend, OnRanks):
                    one.reduction = one.backend.reduction()
    except ArithmeticError as error:
        raise _untrainable(error, config) from None
    return contestants


def listed(config: Config) -> calls.Listing:
    """The calls of a step of vectorized on the first batch."""
    state, (first, *_) = _start(config, "vectorized")
    label = f"vectorized {config.dtype}, batch of {config.batch_size}"
    try:
        with np.errstate(all="ignore"):
            return calls.listed(label, lambda: load_backend("vectorized", config, state), first)
    except ArithmeticError as error:
        raise _untrainable(error, config) from None


@dataclass
class Lengths(Contestant):
    """A contestant on documents of many lengths."""

    longest: int = 0  # positions
    first: float = 0.0  # seconds of a step in the first round, which records the shapes
    shapes: int = 0  # how many were recorded

    @property
    def of_lengths(self) -> dict[str, float]:
        """The entries that a report has in addition."""
        return {"longest": self.longest, "seconds_at_first": self.first, "shapes": self.shapes}


def lengths(
    config: Config, longest: int, batch_sizes: Sequence[int], dtypes: Sequence[str] = DTYPES
) -> list[Lengths]:
    """Time vectorized on documents from 1 to `longest` positions, spread evenly, in shuffled order.

    A round is a step on each batch. In the first round the shapes are new, in the others they are
    known. The text of the documents is cut from the data set.

    Raises MicrogptError if the model does not fit into memory, or if a loss is not finite.
    """
    room = longest if config.crop == "positions" else longest + 1
    config = replace(config, block_size=room, cores=1)
    corpus = "".join(load_documents(config.dataset))
    check_memory(replace(config, num_samples=0), len(set(corpus)), [], "vectorized")
    corpus *= 1 + longest // len(corpus)
    found = []
    for size in batch_sizes:
        count = -(-MANY_LENGTHS // size) * size
        ends = [round((longest - 1) * i / max(1, count - 1)) for i in range(count)]
        documents = [corpus[:end] for end in ends]
        for dtype in dtypes:
            entry = replace(config, batch_size=size, dtype=dtype)
            state, batches = _start(entry, "vectorized", documents)
            backend = load_backend("vectorized", entry, state)
            one = Lengths("vectorized", entry, backend, batches, longest=longest)
            with np.errstate(all="ignore"):
                _meet(one)
            found.append(one)
    return found


def _meet(one: Lengths) -> None:
    rounds: list[list[float]] = []
    try:
        for _ in range(1 + AGAIN):
            rounds.append([])
            for docs in one.batches:
                start = perf_counter()
                one.step(docs)
                rounds[-1].append(perf_counter() - start)
        held = one.batches[: max(1, HELD // one.config.batch_size)]
        one.difference = max(_twice_apart(one, docs, _by_document) for docs in held)
    except ArithmeticError as error:
        raise _untrainable(error, one.config) from None
    one.first = sum(rounds[0]) / len(one.batches)
    one.seconds = [sum(map(min, *rounds)) / len(one.batches)]  # each batch at its fastest
    one.calls = calls.per_step(one.backend, one.batches)
    recordings = (shape for docs in one.batches for shape, _ in one.backend.recordings(docs))
    one.shapes = len(set(recordings) - {()})


def _untrainable(error: ArithmeticError, config: Config) -> MicrogptError:
    return MicrogptError(
        f"this model cannot be trained: {error}; try a smaller init_std than {config.init_std}"
    )


def take_turns(contestants: Sequence[Contestant], rounds: int) -> None:
    """Time steps of all contestants, one contestant after another in every round."""
    turns = [cycle(one.batches) for one in contestants]
    counts = []
    for one, turn in zip(contestants, turns):
        slow = one.name == "scalar" or one.foreign
        warm_up = 2 if slow else len(one.batches)  # each shape once: torch may compile for it
        for docs in islice(turn, warm_up):
            one.step(docs)
        counts.append(max(1, int(ROUND_SECONDS * 2 / one.steps(list(islice(turn, 2))))))
    gc.collect()
    gc.disable()  # as timeit does: a collection would hit any contestant by chance
    try:
        for _ in range(rounds):
            for one, turn, count in zip(contestants, turns, counts):
                one.seconds.append(one.steps(list(islice(turn, count))) / count)
    finally:
        gc.enable()


def difference(one: Contestant) -> float:
    """The largest relative difference between a contestant's steps and the right ones.

    Compared are the loss; the gradient, relative to its largest number; and the change of the
    parameters, relative to the largest change, with Adam's update by the contestant's gradient.

    In single precision an input of a ReLU can fall on the other side of 0, where the gradient is
    different: in one of 150 batches of names-fast by more than is allowed. The next step is right
    again, so a contestant whose step is wrong takes a second one.
    """
    if one.foreign:
        return _off_course(one)

    first, *others = one.batches
    from_scalar = _twice_apart(one, _few(first, one), _scalar_step)
    if one.name == "scalar":
        return from_scalar
    whole = one.batches if one.partly else others
    return max(from_scalar, *(_twice_apart(one, docs, _whole_step) for docs in whole))


def _twice_apart(one: Contestant, docs: Docs, right: Callable[..., Step]) -> float:
    first = _apart(one, docs, right)
    return first if first <= one.allowed else min(first, _apart(one, docs, right))


def _off_course(one: Contestant) -> float:
    """The largest relative difference between a program's losses and those of vectorized."""
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
    return _in_parts(load_backend("scalar", config, state), CHUNK, state, docs, grads)


def _by_document(config: Config, state: State, docs: Docs, grads: Tensors) -> Step:
    """The same by vectorized/, one document at a time, since a batch would be mostly padding."""
    vectorized = load_backend("vectorized", config, state, watch=True)
    return _in_parts(vectorized, 1, state, docs, grads)


def _in_parts(backend: Backend, most: int, state: State, docs: Docs, grads: Tensors) -> Step:
    loss, sums = 0.0, {name: np.zeros_like(tensor) for name, tensor in state.params.items()}
    for start in range(0, len(docs), most):
        part = docs[start : start + most]
        loss += backend.forward(part) * (len(part) / len(docs))
        backend.backward()
        for name, tensor in backend.grads().items():
            sums[name] += np.asarray(tensor) * (len(part) / len(docs))
    return loss, sums, _change(backend, state, grads)


def _whole_step(config: Config, state: State, docs: Docs, grads: Tensors) -> Step:
    """The same by vectorized/, without micro-batches."""
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


def floors(contestants: Sequence[Contestant]) -> list[str]:
    """The calls of a step of vectorized, and the share of the step that empty calls would take.

    A line for each batch size.
    """
    lines: dict[str, list[str]] = {}
    for one in contestants:
        if one.calls is not None and one.right:
            took = one.calls * calls.empty_call()
            share = f"{took / median(one.seconds):.0%} of {one.config.dtype}"
            start = f"{one.config.batch_size:9} {one.calls:8,.0f} {took * 1e6:10,.1f}"
            lines.setdefault(start, []).append(share)
    rows = [f"{start}   {', '.join(shares)}" for start, shares in lines.items()]
    empty = f"at {calls.empty_call() * 1e6:.3f} us for an empty call"
    return [f"batch     {'calls':>8} {'empty us':>10}   {empty}", *rows] if rows else []


def reductions(contestants: Sequence[Contestant]) -> list[str]:
    """A line for each size of a batch on several ranks: how long they add up their gradients."""
    return [
        f"{one.config.batch_size:5} x{one.config.cores}: to add up the gradients of the ranks takes"
        f" {one.reduction * 1e6:,.1f} us, {one.reduction / median(one.seconds):.0%}"
        for one in contestants
        if one.reduction is not None and one.right
    ]


def table_of_lengths(found: Sequence[Lengths]) -> str:
    """The results of `lengths` at 80 columns."""
    lines = [
        f"{'':22} {'batch':>5} {'us/step':>9} {'at first':>9} {'recording':>9} {'shapes':>6}"
        f" {'calls':>7} {'apart':>6}"
    ]
    for one in found:
        start, end = f"{one.label:22} {one.config.batch_size:5} ", f" {one.difference:6.0e}"
        if not one.right:
            lines.append(f"{start}{'WRONG':>9} {'-':>9} {'-':>9} {'-':>6} {'-':>7}{end}")
            continue
        (known,) = one.seconds
        lines.append(
            f"{start}{_fit(known * 1e6, 9, 1)} {_fit(one.first * 1e6, 9, 1)}"
            f" {1 - known / one.first:9.0%} {one.shapes:6} {one.calls:7,.0f}{end}"
        )
    return "\n".join(lines)


def _fit(number: float, width: int, decimals: int) -> str:
    """A number with `decimals` decimals, or with none if that is too wide."""
    text = f"{number:{width},.{decimals}f}"
    return text if len(text) <= width else f"{number:{width},.0f}"


def machine() -> dict[str, str]:
    """The machine, the libraries, and the environment variables that steer the libraries.

    For example, OPENBLAS_CORETYPE makes OpenBLAS use its kernels for another CPU.
    """
    torch = sys.modules.get("torch")  # if PyTorch took part
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
    """The results as JSON; times in seconds, null for a contestant that is wrong."""
    return {
        "machine": machine(),
        "seconds_per_empty_call": calls.empty_call(),
        "results": [
            {
                "name": one.name,
                "dtype": one.config.dtype,
                "cores": one.config.cores,
                "batch_size": one.config.batch_size,
                "tokens_per_step": one.tokens,
                **{name: of(one.seconds) if one.right else None for name, of in TIMES.items()},
                "calls_per_step": one.calls,
                "seconds_of_reduction": one.reduction,
                **(one.of_lengths if isinstance(one, Lengths) else {}),
                "difference": one.difference if math.isfinite(one.difference) else None,
                "right": one.right,
            }
            for one in contestants
        ],
    }


def _enter(name: str, config: Config) -> Contestant:
    state, batches = _start(config, name)
    return Contestant(name, config, load_backend(name, config, state), batches)


def _enter_ranks(config: Config) -> Contestant:
    state, batches = _start(config, "vectorized")
    return Contestant("vectorized", config, OnRanks(config, state), batches)


def _enter_program(path: Path, config: Config) -> Contestant:
    _, batches = _start(config, "vectorized")
    return Contestant(
        path.name[:14], config, Program(path, load_documents(config.dataset)), batches
    )


def _opponents(name: str, config: Config, threads: int | None) -> list[Contestant]:
    if name != "torch":
        raise MicrogptError(f"--against {name}: unknown; expected torch, or a program, FILE.py")
    state, batches = _start(config, name)
    found = torch_backends(threads)
    return [
        Contestant(name, config, backend(config, state), batches) for name, backend in found.items()
    ]


def _start(
    config: Config, backend_name: str, given: Sequence[str] = ()
) -> tuple[State, list[Docs]]:
    """The parameters and the first batches of a run, or all batches of the documents given."""
    rng = Random(config.seed)
    documents = load_documents(config.dataset, config.documents)
    tokenizer = build_tokenizer("".join(documents), config)
    documents = list(given) or documents
    rng.shuffle(documents)
    training = documents if given else parts(documents, replace(config, held_out=0))[0]
    trained = replace(config, num_samples=0)  # the bench draws no samples
    seen = documents
    if backend_name == "scalar":  # scalar computes as much as it can in seconds
        size = count_params(config, tokenizer.vocab_size)
        seen = [document[: SCALAR_WORK // size] for document in documents]
    check_memory(trained, tokenizer.vocab_size, seen, backend_name)
    state = fresh_state(init_params(config, tokenizer.vocab_size, rng))
    batches = (len(given) or max(4 * config.batch_size, 64)) // config.batch_size
    return state, [batch(step, training, tokenizer, config) for step in range(batches)]


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
    return name.startswith(STEERING) and name != "OPENBLAS_NUM_THREADS"  # machine() states it


def _blas() -> str:
    config = np.show_config(mode="dicts") or {}
    blas = config.get("Build Dependencies", {}).get("blas", {})
    return f"{blas.get('name', 'unknown')} {blas.get('version', '')}".strip()
