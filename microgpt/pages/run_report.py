"""The report of one or several runs: how the loss went, what was learned, and where they differ."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from microgpt.backend import load_backend
from microgpt.cli.report import RECENT, meaning
from microgpt.config import FIELDS, NOT_TRAINED, Config
from microgpt.data import in_order, load_documents, parts
from microgpt.errors import MicrogptError, as_typed
from microgpt.pages.page import render
from microgpt.pages.pictures import Array, Chart, Line, chart, heat, label
from microgpt.runs.checkpoint import Checkpoint, load_checkpoint
from microgpt.runs.directory import CONFIG, METRICS, SAMPLES, holds_run
from microgpt.runs.memory import check_file
from microgpt.settings import DEFAULT_PRESET, flag, load_config, presets, read_yaml, stored_config

TEXTS = 3  # documents whose attention is shown of a single run; of several runs, one each
SLOW = 5  # medians, the most that a step is drawn to take
MAPS = 48  # heads that are drawn for a document
PORTION = 1000  # lines of metrics that are read at once
DAMAGED = (ValueError, TypeError, AttributeError, OverflowError, RecursionError)
FIGURES = ("step", "loss", "lr", "seconds", "held_out")


@dataclass(frozen=True)
class Sample:
    """A document that the model wrote."""

    text: str
    found: str  # "data set", "held out" or "" where it is new


@dataclass(frozen=True)
class Size:
    """How large a parameter, its gradient and its update are: roots of mean squares."""

    name: str
    shape: str
    weight: float
    gradient: float
    update: float


@dataclass(frozen=True)
class Head:
    """The attention weights of one head."""

    title: str
    image: str


@dataclass(frozen=True)
class Attention:
    """Where the heads look in a document."""

    text: str
    letters: list[str]
    heads: list[Head]
    left_out: int


@dataclass
class RunSeen:
    """A run directory as the report shows it."""

    path: Path
    number: int
    name: str
    config: Config
    metrics: dict[str, Array]
    damaged: int  # lines of metrics that could not be read
    checkpoint: Checkpoint | None
    notes: list[str]
    samples: list[Sample] = field(default_factory=list)
    attention: list[Attention] = field(default_factory=list)
    sizes: list[Size] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """How many steps have been recorded."""
        return len(self.metrics["step"])

    @property
    def loss(self) -> float | None:
        """The mean loss of the recent steps."""
        losses = self.metrics["loss"]
        return float(losses[-RECENT:].mean()) if len(losses) else None

    @property
    def held_out(self) -> float | None:
        """The latest held-out loss."""
        measured = self.metrics["held_out"]
        known = measured[~np.isnan(measured)]
        return float(known[-1]) if len(known) else None

    @property
    def seconds(self) -> float | None:
        """The median of the seconds that a step took."""
        return float(np.median(self.metrics["seconds"])) if self.steps else None

    @property
    def uniform(self) -> float | None:
        """ln V: the loss of a model that knows nothing."""
        return math.log(self.checkpoint.tokenizer.vocab_size) if self.checkpoint else None

    @property
    def says(self) -> str:
        """A sentence on the held-out loss, or on the training loss if none was measured."""
        loss = self.loss if self.held_out is None else self.held_out
        if loss is None or self.checkpoint is None:
            return ""
        return meaning(loss, self.checkpoint.tokenizer.vocab_size)

    @property
    def command(self) -> str:
        """The command that makes this run."""
        return command(self.config, self.path)


def report(paths: Sequence[Path]) -> str:
    """The page for these run directories.

    Raises MicrogptError if one of them holds no run.
    """
    runs = [seen(path, i, len(paths) == 1) for i, path in enumerate(paths)]
    return render(
        "report.html.j2",
        title="Run " + ", ".join(run.name for run in runs[:5]) + (" .." if runs[5:] else ""),
        runs=runs,
        charts=[one for one in charts(runs) if one],
        fields=fields(runs),
        twins=twins(runs),
        recent=RECENT,
    )


def seen(path: Path, number: int, alone: bool) -> RunSeen:
    """A run as its directory has it. The page names files that are missing or damaged."""
    if not path.is_dir() or not holds_run(path):
        raise MicrogptError(f"{path}: not a run directory; expected one that `train` has written")
    notes: list[str] = []
    checkpoint = None
    try:
        checkpoint = load_checkpoint(path)
        config = checkpoint.config
    except MicrogptError as error:
        notes.append(str(error))
        config = stored_config(read_yaml(path / CONFIG), str(path / CONFIG))
    metrics, damaged = read_metrics(path / METRICS, notes)
    run = RunSeen(path, number, path.resolve().name, config, metrics, damaged, checkpoint, notes)
    run.samples = _samples(run)
    if checkpoint:
        run.sizes = sizes(checkpoint)
        with suppress(FloatingPointError):
            run.attention = attention(checkpoint, _texts(run, TEXTS if alone else 1))
    return run


def read_metrics(path: Path, notes: list[str]) -> tuple[dict[str, Array], int]:
    """The figures of every step by name, and how many lines could not be read."""
    try:
        check_file(path, lines=True)
        lines = path.read_bytes().splitlines()
    except OSError as error:
        notes.append(f"{path}: {error.strerror}")
        lines = []
    rows = [row for start in range(0, len(lines), PORTION) for row in _rows(lines, start)]
    table = np.array(rows, float).reshape(-1, len(FIGURES))
    table = table[np.isfinite(table[:, :4]).all(axis=1)]
    return dict(zip(FIGURES, table.T)), len(lines) - len(table)


def _rows(lines: list[bytes], start: int) -> list[list[float]]:
    """The figures of a portion of lines: all at once, or if one is damaged, one by one."""
    portion = lines[start : start + PORTION]
    try:
        entries = json.loads(b"[%b]" % b",".join(portion))
        return [[float(entry.get(name, math.nan)) for name in FIGURES] for entry in entries]
    except DAMAGED:
        pass
    rows = []
    for line in portion:
        with suppress(*DAMAGED):
            entry = json.loads(line)
            rows.append([float(entry.get(name, math.nan)) for name in FIGURES])
    return rows


def _samples(run: RunSeen) -> list[Sample]:
    """The samples, each with the part of the data set that holds it, if that can be read."""
    path, config = run.path / SAMPLES, run.config
    try:
        check_file(path, lines=True)
        texts = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        run.notes.append("no samples: training has not come to its end")
        return []
    if config.documents == "windows":
        return [Sample(text, "") for text in texts]
    try:
        places = _places(config)
    except MicrogptError as error:
        run.notes.append(f"whether samples are in the data set cannot be told: {error}")
        return [Sample(text, "") for text in texts]
    return [
        Sample(text, next((name for name, place in places.items() if text in place), ""))
        for text in texts
    ]


@cache
def _places(config: Config) -> dict[str, set[str]]:
    """The documents of a run's data set, by whether training sees them."""
    documents = load_documents(config.dataset)
    Random(config.seed).shuffle(documents)
    training, held_out = parts(documents, config)
    return {"data set": set(in_order(training)), "held out": set(held_out)}


def sizes(checkpoint: Checkpoint) -> list[Size]:
    """The size of each parameter, and by Adam's moments of its gradients and updates."""
    config, state = checkpoint.config, checkpoint.state
    n = max(1, state.updates)
    found = []
    for name, weights in state.params.items():
        w, m, v = (np.asarray(x[name], float) for x in (state.params, state.m, state.v))
        m_hat, v_hat = m / (1 - config.beta1**n), v / (1 - config.beta2**n)
        update = config.learning_rate * m_hat / (np.sqrt(v_hat) + config.adam_eps)
        shape = " x ".join(map(str, np.shape(weights)))
        found.append(Size(name, shape, _rms(w), math.sqrt(float(v_hat.mean())), _rms(update)))
    return found


def _rms(numbers: Array) -> float:
    return math.sqrt(float((numbers * numbers).mean()))


def _texts(run: RunSeen, count: int) -> list[str]:
    """A few documents: emma, if the model knows its letters, and what the model has written."""
    known = set(run.checkpoint.tokenizer.chars) if run.checkpoint else set()
    wished = ["emma", *(sample.text for sample in run.samples), "".join(sorted(known))[:4]]
    usable = [text for text in wished if text and set(text) <= known]
    return list(dict.fromkeys(usable))[:count]


def attention(checkpoint: Checkpoint, texts: Sequence[str]) -> list[Attention]:
    """Where each head looks, in each of these documents."""
    config = replace(checkpoint.config, cores=1, batch_size=1)
    backend = load_backend("vectorized", config, checkpoint.state, watch=True)
    found = []
    for text in texts:
        tokens = checkpoint.tokenizer.document(text, config.max_tokens)
        backend.forward([tokens])
        weights = [
            (name.partition(".")[0].replace("layer", "layer "), np.asarray(tensor)[0])
            for name, tensor in backend.taps().items()
            if name.endswith("attn_weights")
        ]
        T = len(tokens) - 1
        there = np.tril(np.ones((T, T), bool))
        heads = [
            Head(f"{layer}, head {h}", heat(of_head, 1.0, there))
            for layer, tensor in weights
            for h, of_head in enumerate(tensor)
        ]
        letters = ["BOS", *map(label, text)][:T]
        found.append(Attention(text, letters, heads[:MAPS], max(0, len(heads) - MAPS)))
    return found


def charts(runs: Sequence[RunSeen]) -> list[Chart | None]:
    """Loss, held-out loss, learning rate and seconds a step, each over the steps."""
    alone = runs[0] if len(runs) == 1 else None
    uniform = {run.uniform for run in runs}
    (level,) = uniform if len(uniform) == 1 else (None,)
    losses = [
        Line(run.name, run.metrics["step"], running_mean(run.metrics["loss"]), colour=run.number)
        for run in runs
    ]
    for run in runs:
        measured = ~np.isnan(run.metrics["held_out"])
        steps, held_out = run.metrics["step"][measured], run.metrics["held_out"][measured]
        name = "held out" if alone else f"{run.name}, held out"
        losses.append(Line(name, steps, held_out, "points", run.number))
    band = Line("", alone.metrics["step"], alone.metrics["loss"]) if alone else None
    V = alone.checkpoint.tokenizer.vocab_size if alone and alone.checkpoint else "V"
    found = [chart("Loss", losses, band, level, f"ln {V}: knowing nothing")]
    slow = f"Milliseconds a step, at most {SLOW} times the median of the run"
    for title, of in (("Learning rate", lambda run: run.metrics["lr"]), (slow, milliseconds)):
        lines = [Line(run.name, run.metrics["step"], of(run), colour=run.number) for run in runs]
        found.append(chart(title, lines))
    return found


def milliseconds(run: RunSeen) -> Array:
    """How long each step took, up to SLOW medians: longer ones would flatten the curve."""
    return 1000.0 * np.minimum(run.metrics["seconds"], SLOW * (run.seconds or 0.0))


def running_mean(losses: Array) -> Array:
    """The mean of each loss and the RECENT - 1 before it, or as many as there are."""
    sums = np.concatenate([[0.0], np.cumsum(losses)])
    ends = np.arange(1, len(losses) + 1)
    starts = np.maximum(0, ends - RECENT)
    return (sums[ends] - sums[starts]) / (ends - starts)


def fields(runs: Sequence[RunSeen]) -> list[tuple[str, list[Any], bool]]:
    """Every field of the configuration, its value in each run, and whether they differ."""
    found = []
    for name in FIELDS:
        values = [getattr(run.config, name) for run in runs]
        found.append((name, values, any(value != values[0] for value in values)))
    return found


@dataclass(frozen=True)
class Twin:
    """A run that should have been equal to another."""

    name: str
    other: str
    common: int  # steps that both have
    step: int | None  # the first that differs
    losses: tuple[float, float]  # there
    largest: float


def twins(runs: Sequence[RunSeen]) -> list[Twin]:
    """Each run beside the first with its configuration, and which step differs first."""
    found = []
    for i, run in enumerate(runs):
        same = [a for a in runs[:i] if _trained(a.config) == _trained(run.config)]
        if not same or not (run.steps and same[0].steps):
            continue
        _, mine, theirs = np.intersect1d(
            run.metrics["step"], same[0].metrics["step"], return_indices=True
        )
        x, y = run.metrics["loss"][mine], same[0].metrics["loss"][theirs]
        apart = np.flatnonzero(x != y)
        step, losses = None, (0.0, 0.0)
        if len(apart):
            first = apart[0]
            step = int(run.metrics["step"][mine][first])
            losses = float(x[first]), float(y[first])
        largest = float(np.abs(x - y).max(initial=0.0))
        found.append(Twin(run.name, same[0].name, len(x), step, losses, largest))
    return found


def _trained(config: Config) -> dict[str, Any]:
    """The fields that change the losses of a run."""
    every = dataclasses.asdict(config)
    return {name: value for name, value in every.items() if name not in NOT_TRAINED}


def command(config: Config, out: Path) -> str:
    """The command that trains with this configuration, by the preset that is nearest to it."""
    choices = []
    for preset in presets():
        given = dataclasses.asdict(load_config(preset))
        flags = [
            f"{flag(name)} {as_typed(_typed(value))}"
            for name, value in dataclasses.asdict(config).items()
            if value != given[name]
        ]
        choices.append((len(flags), preset != DEFAULT_PRESET, preset, flags))
    _, _, preset, flags = min(choices)
    by_preset = [] if preset == DEFAULT_PRESET else [f"--config {preset}"]
    return " ".join(["microgpt train", *by_preset, *flags, f"--out {as_typed(out)}"])


def _typed(value: Any) -> str:
    """A value as it is typed on the command line."""
    return str(value).lower() if isinstance(value, bool) else str(value)
