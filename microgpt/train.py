"""The training loop, and how a run begins or goes on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Container, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from time import perf_counter

import numpy as np

from microgpt.backend import (
    Backend,
    Docs,
    State,
    check_backend,
    fresh_state,
    load_backend,
)
from microgpt.config import NOT_TRAINED, Config
from microgpt.data import digest, load_documents, located, nth, parts
from microgpt.errors import MicrogptError, as_typed
from microgpt.evaluate import evaluation
from microgpt.init import init_params
from microgpt.layout import MANY, count_params, param_shapes
from microgpt.runs.checkpoint import (
    FILE_NAME,
    Checkpoint,
    load_checkpoint,
    not_finite,
    save_checkpoint,
)
from microgpt.runs.directory import (
    RUN_FILES,
    SAMPLES,
    Metrics,
    RunLock,
    best_held_out,
    check_free,
    claim,
    claim_free,
    discard,
    metrics_until,
    released_on_error,
    remove_samples,
    tidy,
    unlike,
    write_config,
    write_metrics,
)
from microgpt.runs.files import check_target
from microgpt.runs.memory import check_memory
from microgpt.runs.ranks import ALONE, Alone
from microgpt.runs.signals import between_steps
from microgpt.settings import TINIEST, checked, flag
from microgpt.tokenizer import Tokenizer, build_tokenizer
from microgpt.windows import Windows

# What --resume may change: nothing that the model or the order of the documents depends on.
# `dataset` may name another path, but the text there must be the same.
RESUMABLE = (*NOT_TRAINED, "steps", "learning_rate", "weight_decay", "grad_clip", "adam_eps")

OnStep = Callable[[int, float, float], None]  # step, from 1, its loss and its seconds
OnMeasured = Callable[[int, float], None]  # step, from 1, and the held-out loss

# Options that can make a run diverge: a good value, and the sign of the change that does harm.
USUAL = {
    "init_std": (0.08, 1),
    "learning_rate": (0.01, 1),
    "weight_decay": (0.1, 1),
    "adam_eps": (1e-8, -1),
    "norm_eps": (1e-5, -1),
}
BEFORE_STEP_1 = ("init_std", "norm_eps")  # the likeliest first
LATER = ("learning_rate", "weight_decay", "adam_eps", "norm_eps", "init_std")


@dataclass
class Run:
    """A training run between two steps."""

    config: Config
    tokenizer: Tokenizer
    documents: list[str]  # shuffled; the last held_out of them are kept from training
    backend: Backend
    rng: Random  # as the initialisation left it: the samples are drawn from here on
    lock: RunLock  # on the run's directory
    step: int = 0  # how many steps are done
    best: tuple[float, int] | None = None  # the lowest held-out loss, and its step
    latest: tuple[float, int] | None = None  # the latest held-out loss, and its step
    numbered: bool = False  # whether the directory was named without --out
    saved: int = -1  # how many steps the checkpoint on disk has had
    signal: int = 0  # the signal that ended training early
    unlike: str = ""  # the values of config.yaml that differed from the checkpoint's on --resume
    remedy: str | None = ""  # what --resume needs after a divergence; None: nothing would help
    ranks: Alone = ALONE  # the processes that share each batch; this process is rank 0

    def train(self, progress: OnStep, measured: OnMeasured = lambda *_: None) -> bool:
        """Run the steps that are left, within max_seconds. False if a signal ended training.

        metrics.jsonl has the steps of a checkpoint before the checkpoint replaces the previous one.

        Raises MicrogptError if a number is not finite or a file cannot be written; the previous
        checkpoint stays. A numbered directory is removed if its only checkpoint is of step 0.
        """
        try:
            with (
                Metrics(self.out) as metrics,
                between_steps() as received,
                np.errstate(all="ignore"),  # an overflow leads to a loss that is not finite
            ):
                self._steps(progress, measured, metrics, received)
        except MicrogptError as error:
            if self.numbered and self.saved == 0 and self.lock.stands:
                discard(self.lock)
            raise MicrogptError(f"{error}{self._kept_checkpoint()}") from None
        self.signal = received[0] if received else 0
        return not received

    def _steps(
        self, progress: OnStep, measured: OnMeasured, metrics: Metrics, received: list[int]
    ) -> None:
        every = self.config.checkpoint_every
        deadline = perf_counter() + (self.config.max_seconds or math.inf)
        while not self.ranks.any(
            bool(received) or self.step >= self.config.steps or perf_counter() >= deadline
        ):
            start = perf_counter()
            lr_t = learning_rate(self.step, self.config)
            loss = self._step(lr_t)
            self.step += 1
            seconds = perf_counter() - start
            held_out = self._measure()
            metrics.write(self.step, loss, lr_t, seconds, held_out)
            if every and self.step % every == 0:
                self._save(metrics)
            try:
                progress(self.step, loss, seconds)
                if held_out is not None:
                    measured(self.step, held_out)
            except OSError:  # the reader of the progress has gone
                if not received:
                    self._save(metrics)
                    raise
        self._save(metrics)

    def _step(self, lr_t: float) -> float:
        docs = batch(self.step, self.training, self.tokenizer, self.config)
        try:
            loss = self.backend.forward(docs)
            self.backend.backward()
            self.backend.update(lr_t)
        except ArithmeticError as error:
            what = f"{error.args[-1]}; {self._first_not_finite(docs)}"
            raise self._diverged(self.step + 1, what) from None
        return loss

    def _measure(self) -> float | None:
        """The held-out loss, if this step measures it and it is finite; else None."""
        every = self.config.eval_every
        if not (every and self.held_out and self.step % every == 0):
            return None
        try:
            loss = evaluation(self.backend, self.held_out, self.tokenizer, self.config).loss
        except ArithmeticError:
            return None
        self.latest = loss, self.step
        self.best = min(self.best or self.latest, self.latest)
        return loss

    def _save(self, metrics: Metrics) -> None:
        if self.saved != self.step:
            metrics.sync()
            self.save()

    def save(self) -> None:
        """Write the checkpoint."""
        try:
            save_checkpoint(self.out / FILE_NAME, self.checkpoint())
        except FloatingPointError as error:
            raise self._diverged(self.step, str(error)) from None
        self.saved = self.step

    def _diverged(self, step: int, what: str) -> MicrogptError:
        name, direction, better = suspect(self.config, self.step)
        self.remedy = f"{flag(name)} {better:g}" if name in RESUMABLE else None
        than = f"{'smaller' if direction > 0 else 'larger'} {flag(name)} than"
        advice = f"try a {than} {getattr(self.config, name):g}, such as {better:g}"
        return MicrogptError(f"step {step}: {what}; {advice}")

    def _first_not_finite(self, docs: Docs) -> str:
        """The first tap and parameter that are not finite, from a forward pass that keeps taps."""
        state = self.backend.state()
        watched = load_backend("vectorized", self.config, state, watch=True)
        with suppress(FloatingPointError):
            watched.forward(docs)
        return (
            f"first not finite: tap {not_finite(watched.taps()) or 'none'},"
            f" parameter {not_finite(state.params) or 'none'}"
        )

    def _kept_checkpoint(self) -> str:
        if self.step == 0 or self.remedy is None:
            return ""
        if not self.lock.stands or not (self.out / FILE_NAME).is_file():
            return ""
        return f"; the checkpoint of step {self.saved} is kept: {self.how_to_resume}"

    @property
    def how_to_resume(self) -> str:
        """The command that resumes the run from its last checkpoint."""
        remedy = f" {self.remedy}" if self.remedy else ""
        return f"go on with: microgpt train --resume --out {as_typed(self.out)}{remedy}"

    @property
    def out(self) -> Path:
        """The run's directory."""
        return self.lock.out

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.lock.release()

    def __post_init__(self) -> None:
        self.digest = digest(self.documents)
        self.training, self.held_out = parts(self.documents, self.config)

    def __repr__(self) -> str:
        return f"Run({self.out}, step {self.step} of {self.config.steps})"

    @property
    def num_params(self) -> int:
        """How many parameters the model has."""
        return count_params(self.config, self.tokenizer.vocab_size)

    def checkpoint(self) -> Checkpoint:
        """The checkpoint of the run's current state."""
        return Checkpoint(self.config, self.tokenizer, self.backend.state(), self.rng, self.digest)


def new_run(
    config: Config,
    backend_name: str,
    out: Path | None,
    name: str,
    overwrite: bool = False,
    say: Callable[[str], object] = id,
    ranks: Alone = ALONE,
) -> Run:
    """A run from its beginning: documents shuffled, weights drawn, directory made.

    Without `out`, the run goes to runs/<name>, or to runs/<name>-2 and so on if there is one.
    Where drawing the weights takes long, `say` gets a line about it.
    All input is checked before the directory is touched, and a run that is replaced stays there
    until the new run's checkpoint of step 0 is complete.

    Raises MicrogptError if the directory belongs to another run.
    """
    if out is None and overwrite:
        raise MicrogptError("--overwrite: which run? Name its directory with --out DIR")
    if out is not None:
        check_free(out, overwrite)
    rng = Random(config.seed)
    documents = load_documents(config.dataset, config.documents)
    config = replace(config, dataset=located(config.dataset))
    rng.shuffle(documents)
    tokenizer = build_tokenizer("".join(documents), config)
    here = replace(config, cores=ranks.here)
    check_memory(here, tokenizer.vocab_size, documents, backend_name)
    parts(documents, config)
    num_params = count_params(config, tokenizer.vocab_size)
    if num_params > MANY:
        say(f"drawing {num_params:,} weights and writing the first checkpoint ..")
    params = init_params(config, tokenizer.vocab_size, rng)
    backend = _backend(ranks, backend_name, config, tokenizer, documents, fresh_state(params))
    lock = claim_free(Path("runs") / name) if out is None else claim(out, overwrite)
    with released_on_error(lock):
        run = Run(config, tokenizer, documents, backend, rng, lock, numbered=out is None)
        run.ranks = ranks
        try:
            _begin(run, b"")
        except MicrogptError:
            if run.numbered:
                discard(lock)
            raise
    return run


def resumed_run(
    out: Path, backend_name: str, overrides: dict[str, object], ranks: Alone = ALONE
) -> Run:
    """A run that goes on from the checkpoint in its directory.

    Raises MicrogptError if the run cannot go on, and leaves the directory as it was.
    """
    if not (out / FILE_NAME).is_file():
        raise MicrogptError(
            f"{out / FILE_NAME}: there is no such file, and nothing to go on from; start a run"
            " without --resume"
        )
    lock = RunLock(out)
    with released_on_error(lock):
        held = load_checkpoint(out)
        config = _changed(held.config, overrides)
        updates = held.state.updates
        if updates > config.steps or (updates == config.steps and (out / SAMPLES).exists()):
            steps = "its only step" if updates == 1 else f"all of its {updates:,} steps"
            raise MicrogptError(f"{out}: has had {steps}; to train on, ask for more with --steps")
        documents = _documents(config, out)
        Random(config.seed).shuffle(documents)
        if digest(documents) != held.documents:
            if config.dataset != held.config.dataset:
                raise MicrogptError(
                    f"--dataset {overrides['dataset']}: is not the text that the run in {out} was"
                    " trained on; leave out --dataset"
                )
            raise MicrogptError(
                f"{config.dataset}: has changed since the run in {out} began; bring the data set"
                " back, or start a new run"
            )
        here = replace(config, cores=ranks.here)
        check_memory(here, held.tokenizer.vocab_size, documents, backend_name)
        backend = _backend(ranks, backend_name, config, held.tokenizer, documents, held.state)
        lines = metrics_until(out, updates)
        best = best_held_out(lines)
        run = Run(config, held.tokenizer, documents, backend, held.rng, lock, updates, best)
        run.unlike, run.ranks = unlike(out, held.config), ranks
        _begin(run, lines)
    return run


def _backend(
    ranks: Alone,
    name: str,
    config: Config,
    tokenizer: Tokenizer,
    documents: list[str],
    state: State,
) -> Backend:
    """The backend of rank 0, once all ranks know what to train and have room for it."""
    ranks.tell((name, config, tokenizer, documents, state.updates))
    with ranks.agreed():
        check_backend(name, config)
    return load_backend(name, config, state, comm=ranks)


def follow(ranks: Alone) -> None:
    """Take every step of rank 0 with rank 0, on every other rank.

    Raises AgreedError if a rank cannot train what rank 0 wants to.
    """
    name, config, tokenizer, documents, step = ranks.tell()
    with ranks.agreed():
        check_memory(replace(config, cores=ranks.here), tokenizer.vocab_size, documents, name)
    shapes = param_shapes(config, tokenizer.vocab_size)
    zeros = {tensor: np.zeros(shape) for tensor, shape in shapes.items()}
    state = replace(fresh_state(zeros), updates=step)  # rank 0 sends its numbers
    backend = load_backend(name, config, state, comm=ranks)
    training, _ = parts(documents, config)
    with np.errstate(all="ignore"), suppress(ArithmeticError):  # rank 0 reports the error
        while not ranks.any(False):
            backend.forward(batch(step, training, tokenizer, config))
            backend.backward()
            backend.update(learning_rate(step, config))
            step += 1


def _documents(config: Config, out: Path) -> list[str]:
    try:
        return load_documents(config.dataset, config.documents)
    except MicrogptError as error:
        raise MicrogptError(
            f"the run in {out} began with another place for its data; say where it is now with"
            f" --dataset ({error})"
        ) from None


def _changed(config: Config, overrides: dict[str, object]) -> Config:
    for name, value in overrides.items():
        if name not in RESUMABLE and value != getattr(config, name):
            raise MicrogptError(
                f"--resume: {name} is part of what was trained and cannot change on the way;"
                f" what can is {', '.join(RESUMABLE[1:])}"
            )
    changes = {name: value for name, value in overrides.items() if name in RESUMABLE}
    if "dataset" in changes:
        changes["dataset"] = located(str(changes["dataset"]))
    changed = checked({**dataclasses.asdict(config), **changes})
    check_measured(changed, overrides)
    return changed


def check_measured(config: Config, given: Container[str]) -> None:
    """Raise MicrogptError if --eval-every is given and no document is held out."""
    if "eval_every" in given and config.eval_every and not config.held_out:
        raise MicrogptError("--eval-every: nothing is held out of training; add --held-out N")


def _begin(run: Run, metrics: bytes) -> None:
    """Write the files of a run into its directory. After a kill in between, --resume goes on."""
    for name in RUN_FILES:
        check_target(run.out / name)
    tidy(run.out)  # first: unfinished files of a killed run may fill the disk
    run.save()
    write_metrics(run.out, metrics)
    write_config(run.out, run.config)
    remove_samples(run.out)


def batch(
    step: int, documents: Sequence[str] | Windows, tokenizer: Tokenizer, config: Config
) -> list[list[int]]:
    """The tokens of this step's documents: the next batch_size ones."""
    first = step * config.batch_size
    return [
        tokenizer.document(nth(documents, first + i), config.max_tokens)
        for i in range(config.batch_size)
    ]


def learning_rate(step: int, config: Config) -> float:
    """lr_t = learning_rate * (1 - step / steps), steps counted from 0

    The second factor is (1 + cos(pi step / steps)) / 2 with schedule cosine, 1 with constant. The
    rate rises linearly in the warm-up; step and steps then count from the end of the warm-up.
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


def suspect(config: Config, step: int) -> tuple[str, int, float]:
    """The option that probably made a run diverge; 1 if too large, -1 if too small; a better value.

    The learning rate (init_std before the first update) is taken unless another option is beyond
    its usual value by two orders of magnitude or more, and by more than the learning rate is.
    """
    orders = {
        name: direction * math.log10(max(getattr(config, name), TINIEST) / usual)
        for name, (usual, direction) in USUAL.items()
    }
    likeliest, *others = LATER if step else BEFORE_STEP_1
    name = max(others, key=orders.__getitem__)
    if orders[name] < max(2, orders[likeliest]):
        name = likeliest
    usual, direction = USUAL[name]
    return name, direction, usual if orders[name] > 1 else getattr(config, name) / 10**direction
