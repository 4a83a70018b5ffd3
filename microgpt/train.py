"""The training loop, and the run directory that it fills.

config.yaml              the configuration, complete
metrics.jsonl            one object per step: step (from 1), loss, lr, seconds (that this step took)
checkpoint.safetensors   see microgpt.checkpoint
samples.txt              what the trained model wrote, one document per line
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from random import Random
from time import perf_counter

import numpy as np
import yaml

from microgpt.backend import Backend, fresh_state, load_backend
from microgpt.checkpoint import FILE_NAME, Checkpoint, load_checkpoint, save_checkpoint
from microgpt.config import Config, checked
from microgpt.data import load_documents, located, write_whole
from microgpt.errors import MicrogptError
from microgpt.init import init_params
from microgpt.layout import param_shapes
from microgpt.memory import check_memory
from microgpt.tokenizer import Tokenizer, build_tokenizer

RUN_FILES = ("config.yaml", "metrics.jsonl", FILE_NAME, "samples.txt")

# what --resume may change: nothing that the model or the order of the data depends on
RESUMABLE = ("steps", "learning_rate", "num_samples", "temperature")

Progress = Callable[[int, float, float], None]  # step, from 1, its loss and its seconds


@dataclass
class Run:
    """A training run between two steps."""

    config: Config
    tokenizer: Tokenizer
    documents: list[str]  # shuffled; the last held_out of them are kept from training
    backend: Backend
    rng: Random  # as the initialisation left it: the samples are drawn from here on
    out: Path
    step: int = 0  # how many steps are done

    def train(self, progress: Progress) -> bool:
        """Run the steps that are left. False if a signal ended it early.

        Raises MicrogptError, before anything is written, if the loss is not finite.
        """
        with (
            open(self.out / "metrics.jsonl", "a", encoding="utf-8") as log,
            _signals() as stopping,
            np.errstate(all="ignore"),  # what overflows ends in a loss that is not finite
        ):
            while self.step < self.config.steps and not stopping:
                start = perf_counter()
                lr_t = learning_rate(self.step, self.config)
                loss = self._step(lr_t)
                self.step += 1
                seconds = perf_counter() - start
                log.write(
                    f'{{"step": {self.step}, "loss": {loss!r}, "lr": {lr_t!r},'
                    f' "seconds": {seconds:.9f}}}\n'
                )
                try:
                    progress(self.step, loss, seconds)
                except BrokenPipeError:  # nobody reads the progress any more
                    log.flush()
                    self.save()
                    raise
        self.save()
        return self.step == self.config.steps

    def _step(self, lr_t: float) -> float:
        docs = batch(self.step, self.training, self.tokenizer, self.config)
        try:
            loss = self.backend.forward(docs)
            self.backend.backward()
            self.backend.update(lr_t)
        except ArithmeticError as error:
            raise MicrogptError(self._diverged(str(error))) from None
        return loss

    def _diverged(self, what: str) -> str:
        if self.step == 0:
            advice = f"try a smaller --init-std than {self.config.init_std}"
        else:
            advice = f"try a smaller --learning-rate than {self.config.learning_rate}"
        return f"step {self.step + 1}: {what}; stopped without writing a checkpoint; {advice}"

    def save(self) -> None:
        """Write the checkpoint."""
        save_checkpoint(self.out / FILE_NAME, self.checkpoint())

    def __post_init__(self) -> None:
        if self.config.held_out >= len(self.documents):
            raise MicrogptError(
                f"--held-out {self.config.held_out}: the data set has {len(self.documents):,}"
                " documents, and none would be left to train on"
            )
        self.training = self.documents[: len(self.documents) - self.config.held_out]

    @property
    def held_out(self) -> list[str]:
        """The documents that training does not see."""
        return self.documents[len(self.training) :]

    @property
    def num_params(self) -> int:
        """How many numbers the model consists of."""
        shapes = param_shapes(self.config, self.tokenizer.vocab_size)
        return sum(n_out * n_in for n_out, n_in in shapes.values())

    def checkpoint(self) -> Checkpoint:
        """The run as it stands."""
        return Checkpoint(
            self.config, self.tokenizer, self.backend.state(), self.rng, digest(self.documents)
        )


def new_run(
    config: Config, backend_name: str, out: Path | None, name: str, overwrite: bool = False
) -> Run:
    """A run from its beginning: documents shuffled, weights drawn, directory made.

    Without `out`, the run goes to runs/<name>, or to runs/<name>-2 and so on if there is one.
    Everything that can be wrong with the input is found before the directory is touched.
    """
    if out is None:
        if overwrite:
            raise MicrogptError("--overwrite: which run? Name its directory with --out DIR")
        out = _free_directory(Path("runs") / name)
    if holds_run(out) and not overwrite:
        raise MicrogptError(
            f"--out {out}: holds a run already; choose another directory, continue that run with"
            " --resume, or replace it with --overwrite"
        )
    rng = Random(config.seed)
    documents = load_documents(config.dataset)
    config = replace(config, dataset=located(config.dataset))
    rng.shuffle(documents)
    tokenizer = build_tokenizer("".join(documents), config)
    check_memory(config, tokenizer.vocab_size, documents, backend_name)
    params = init_params(config, tokenizer.vocab_size, rng)
    backend = load_backend(backend_name, config, fresh_state(params))
    run = Run(config, tokenizer, documents, backend, rng, out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for run_file in RUN_FILES:
            (out / run_file).unlink(missing_ok=True)
    except OSError as error:
        raise MicrogptError(f"--out {out}: {error.strerror}") from None
    _write_config(out, config)
    return run


def holds_run(out: Path) -> bool:
    """Whether a directory has any file of a run in it."""
    return any(os.path.exists(out / run_file) for run_file in RUN_FILES)


def _free_directory(first: Path) -> Path:
    names = (first if i == 1 else first.with_name(f"{first.name}-{i}") for i in count(1))
    return next(path for path in names if not holds_run(path))


def resumed_run(out: Path, backend_name: str, overrides: dict[str, object]) -> Run:
    """A run that goes on from the checkpoint in its directory."""
    held = load_checkpoint(out)
    for name, value in overrides.items():
        value = located(str(value)) if name == "dataset" else value
        if name not in RESUMABLE and value != getattr(held.config, name):
            raise MicrogptError(
                f"--resume: {name} is part of what was trained and cannot change on the way;"
                f" what can is {', '.join(RESUMABLE)}"
            )
    changes = {name: value for name, value in overrides.items() if name in RESUMABLE}
    config = checked({**dataclasses.asdict(held.config), **changes})
    updates = held.state.updates
    if updates >= config.steps:
        raise MicrogptError(
            f"{out}: has had all of its {updates} steps; to train on, ask for more with --steps"
        )
    documents = load_documents(config.dataset)
    Random(config.seed).shuffle(documents)
    if digest(documents) != held.documents:
        raise MicrogptError(
            f"{config.dataset}: has changed since the run in {out} began; bring the data set back,"
            " or start a new run"
        )
    check_memory(config, held.tokenizer.vocab_size, documents, backend_name)
    backend = load_backend(backend_name, config, held.state)
    _keep_metrics(out / "metrics.jsonl", updates)
    _write_config(out, config)
    return Run(config, held.tokenizer, documents, backend, held.rng, out, updates)


def batch(step: int, documents: list[str], tokenizer: Tokenizer, config: Config) -> list[list[int]]:
    """The tokens of this step's documents: the next batch_size ones, round and round."""
    first = step * config.batch_size
    return [
        tokenizer.document(documents[(first + i) % len(documents)], config.max_tokens)
        for i in range(config.batch_size)
    ]


def learning_rate(step: int, config: Config) -> float:
    """lr_t = learning_rate * (1 - step / steps), steps counted from 0

    With another schedule (1 + cos(pi step / steps)) / 2 or 1 for the second factor. Where there
    are warm-up steps, step / steps counts from their end, and the rate rises to there in a line.
    """
    warmup = config.warmup_steps
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    done = (step - warmup) / (config.steps - warmup)
    if config.schedule == "linear":
        return config.learning_rate * (1 - done)
    if config.schedule == "cosine":
        return config.learning_rate * (1 + math.cos(math.pi * done)) / 2
    return config.learning_rate


def digest(documents: list[str]) -> str:
    """The SHA-256 of documents in their order."""
    return hashlib.sha256("\n".join(documents).encode()).hexdigest()


def write_samples(out: Path, samples: list[str]) -> None:
    """samples.txt: one sample per line."""
    write_whole(out / "samples.txt", "".join(f"{sample}\n" for sample in samples).encode())


def _write_config(out: Path, config: Config) -> None:
    text = yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)
    write_whole(out / "config.yaml", text.encode())


def _keep_metrics(path: Path, updates: int) -> None:
    """Drop the lines of steps that the checkpoint has not seen."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    write_whole(path, "".join(f"{line}\n" for line in lines[:updates]).encode())


@contextmanager
def _signals() -> Iterator[list[int]]:
    """A list that is empty until the first Ctrl-C or SIGTERM; a second one ends at once."""
    received: list[int] = []

    def receive(number: int, frame: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    handled = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, receive) for number in handled]
    try:
        yield received
    finally:
        for number, handler in zip(handled, before):
            signal.signal(number, handler)
