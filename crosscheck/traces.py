"""Traces as files, written, read and compared; TRACES.md in this folder says what they hold."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from crosscheck.cases import Case, case_names, load_case
from crosscheck.compare import Outcome, compare_step, explained
from crosscheck.noise import noise
from crosscheck.tolerance import FLOAT64, Standard, float32, float64
from crosscheck.trace import GIVEN, Array, Step, expected_shape, keys, split_key
from microgpt.config import FIELDS, Config
from microgpt.errors import MicrogptError, shortened
from microgpt.runs.checkpoint import (
    BAD_METADATA,
    TensorFile,
    read_json,
    whole_number,
    write_tensors,
)
from microgpt.runs.checkpoint import FORMAT as CHECKPOINT
from microgpt.settings import stored_config

FORMAT = "microgpt trace"
VERSION = "1"
METADATA = ("format", "version", "dtype", "steps", "config", "chars")  # required of a trace
TOKENS = "batch/tokens"


def save_trace(path: Path, case: Case, backend: str, dtype: str, steps: Iterable[Step]) -> int:
    """The number of steps, all of which are written to a file."""
    tensors: dict[str, Any] = {}
    number = 0
    for number, step in enumerate(steps, 1):
        for key, tensor in step.items():
            tensors[f"step{number}/{key}"] = np.array(tensor)
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "case": case.name,
        "backend": backend,
        "dtype": dtype,
        "steps": str(number),
        "config": json.dumps(dataclasses.asdict(case.config)),
        "chars": case.chars,
    }
    write_tensors(path, tensors, metadata)
    return number


class Trace(NamedTuple):
    """A trace as a file holds it."""

    case: Case  # without its parameters
    dtype: str
    steps: list[Step]
    backend: str
    others: list[str]  # tensors that no step of this model has


def load_trace(path: Path) -> Trace:
    """The trace in a file.

    Raises MicrogptError if the file is no trace, or its metadata are damaged or lack something.
    """
    file = TensorFile(path)
    metadata = file.metadata
    if metadata.get("format") == CHECKPOINT:
        raise MicrogptError(
            f"{path}: is a checkpoint, not a trace; record one with python -m crosscheck trace"
        )
    if lacking := [key for key in METADATA if key not in metadata]:
        raise MicrogptError(
            f"{path}: its metadata lack {', '.join(lacking)}; see crosscheck/TRACES.md"
        )
    if (metadata["format"], metadata["version"]) != (FORMAT, VERSION):
        raise MicrogptError(
            f"{path}: not a trace of version {VERSION}: format and version are"
            f" {shortened(metadata['format'])} and {shortened(metadata['version'])}"
        )
    try:
        config = _config(path, read_json(metadata["config"]))
        chars, dtype, name = metadata["chars"], metadata["dtype"], metadata.get("case", path.stem)
        count = whole_number(metadata["steps"])
        if dtype not in ("float64", "float32") or not 1 <= count <= len(file.layouts):
            raise ValueError(f"dtype {dtype!r}, {count} steps of {len(file.layouts)} tensors")
        if not name.isprintable():
            raise ValueError(f"the case {name!r}")
    except BAD_METADATA as error:
        raise MicrogptError(f"{path}: damaged: {shortened(error, 200)}") from None
    case = Case(name, "a trace", config, chars, [], kink="read from a trace")
    if name in case_names():  # the case declares what may be 0, and what single precision loses
        known = load_case(name)
        case = replace(case, zero=known.zero, float32=known.float32, random=known.random)
    order = keys(config, case.tokenizer.vocab_size)
    known_keys, numbers = set(order), {f"step{n}": n for n in range(1, count + 1)}
    steps: list[Step] = [{} for _ in range(count)]
    others = []
    for tensor_name, tensor in file.tensors().items():
        number, _, key = tensor_name.partition("/")
        if number in numbers and key in known_keys:
            steps[numbers[number] - 1][key] = tensor
        else:
            others.append(tensor_name)
    ordered = [{key: step[key] for key in order if key in step} for step in steps]
    return Trace(case, dtype, ordered, metadata.get("backend", ""), others)


def _config(path: Path, fields: Any) -> Config:
    """The configuration in a trace's metadata.

    Raises MicrogptError if it is none, or lacks a field.
    """
    if isinstance(fields, dict):
        lacking = [name for name in FIELDS if name not in fields]
        with suppress(MicrogptError):  # a configuration of an earlier format lacks known fields
            return stored_config(fields, str(path))
        if lacking:
            raise MicrogptError(
                f"{path}: config, in its metadata, lacks {', '.join(lacking)}; take over the text"
                " of config from the reference's metadata"
            )
    return stored_config(fields, str(path))


def _check_tokens(path: Path, number: int, tokens: Array, case: Case) -> None:
    """Raise MicrogptError if these are no tokens of a batch."""
    V = case.tokenizer.vocab_size
    sound = tokens.ndim == 2 and tokens.size and tokens.shape[1] >= 2 and tokens.dtype.kind == "i"
    if sound:
        there = tokens >= 0
        closed = there[:, :2].all() and (there[:, 1:] <= there[:, :-1]).all()
        sound = closed and tokens.min() >= -1 and tokens.max() < V
    if not sound:
        raise MicrogptError(
            f"{path}: step {number}: {TOKENS}: expected whole numbers (B, T + 1) below {V}, two or"
            " more to a document, and -1 only behind them"
        )


def _check_step(path: Path, number: int, step: Step, case: Case, tokens: Array) -> None:
    """Raise MicrogptError if a tensor's shape or kind of numbers is not that of model and batch."""
    for key, tensor in step.items():
        wanted = expected_shape(key, case, tokens)
        whole = split_key(key)[0] in ("batch", "sample")
        kind, word = ("i", "whole") if whole else ("f", "floating")
        if tensor.dtype.kind != kind or wanted not in (None, tensor.shape) or not tensor.size:
            shape = "" if wanted is None else f" {wanted}"
            raise MicrogptError(
                f"{path}: step {number}: {key} is {tensor.dtype} {tensor.shape}, and should be"
                f" {word} numbers{shape}"
            )


def diff(reference: Path, candidate: Path, only: Sequence[str] = ("*",)) -> Outcome:
    """The outcome of comparing two traces, up to the first difference.

    only    patterns; of the candidate's tensors, those that match one of them are compared

    The candidate may have fewer steps, and in each of them any tensors. Tensors that the model does
    not have are not compared, and are counted in the outcome's notes.

    Raises MicrogptError if the candidate has no computed tensor that can be compared.
    """
    case, _, ours, writer, _ = load_trace(reference)
    other, dtype, theirs, _, others = load_trace(candidate)
    _check_model(reference, case, candidate, other)
    standard = float32(case) if dtype == "float32" else FLOAT64
    outcome = Outcome(case.name)
    if others:
        outcome.notes.append(
            f"{len(others)} tensors not compared, unknown names such as {others[0]}"
        )
    if len(theirs) != len(ours):
        outcome.notes.append(f"{len(theirs)} steps; {reference.stem} has {len(ours)}")
    wanted = [
        [
            key
            for key in b
            if any(fnmatch(key, pattern) for pattern in only)
            and split_key(key)[0] in standard.tolerances  # single precision draws other samples
        ]
        for _, b in zip(ours, theirs)
    ]
    _check_wanted(candidate, wanted, only)
    for number, (a, b, keys_of_b) in enumerate(zip(ours, theirs, wanted), 1):
        lacking = [key for key in [TOKENS, *keys_of_b] if key not in a]
        if lacking and keys_of_b:
            problem = f"step {number} lacks {lacking[0]}, so there is nothing to compare with"
            raise MicrogptError(f"{reference}: {problem}")
        if keys_of_b:
            _check_tokens(reference, number, a[TOKENS], case)
            _check_step(reference, number, a, case, a[TOKENS])
            _check_step(candidate, number, b, case, a[TOKENS])
    if writer == "scalar" and dtype == "float64":
        standard = float64(noise(case, ours[: len(theirs)]))
    _compare(case, ours, theirs, wanted, standard, outcome)
    return outcome


def _check_wanted(candidate: Path, wanted: Sequence[Sequence[str]], only: Sequence[str]) -> None:
    """Raise MicrogptError if none of these tensors of the candidate's steps is computed."""
    if any(split_key(key)[0] not in GIVEN for step in wanted for key in step):
        return
    there = next((step for step in wanted if step), None)
    what = f"like {', '.join(only)} in a step that the reference has"
    if there:
        what = f"to compare, only {there[0]} and what else both sides are given"
    raise MicrogptError(f"{candidate}: holds no computed tensor {what}")


def _compare(
    case: Case,
    ours: Sequence[Step],
    theirs: Sequence[Step],
    wanted: Sequence[Sequence[str]],
    standard: Standard,
    outcome: Outcome,
) -> None:
    """Compare the wanted tensors of each step, up to the first difference."""
    before: tuple[Step, Step] | None = None
    for number, (a, b, keys_of_b) in enumerate(zip(ours, theirs, wanted), 1):
        if not keys_of_b:
            continue
        shared = {key: a[key] for key in [TOKENS, *keys_of_b]}
        theirs_wanted = {TOKENS: a[TOKENS], **{key: b[key] for key in keys_of_b}}
        with np.errstate(all="ignore"):  # a number that is not finite counts as a difference
            compare_step(case, number, shared, theirs_wanted, standard, outcome)
            if outcome.found:
                outcome.found[0] = explained(case, outcome.found, a, b, before, standard)
                return
        outcome.tally.steps += 1
        if TOKENS not in keys_of_b:  # taken over from the reference, not compared
            outcome.tally.tensors -= 1
            outcome.tally.elements -= a[TOKENS].size
        before = a, b


def _check_model(reference: Path, ours: Case, candidate: Path, theirs: Case) -> None:
    """Raise MicrogptError if two traces are of different models."""
    a, b = dataclasses.asdict(ours.config), dataclasses.asdict(theirs.config)
    unlike = [f"{name} is {b[name]}, not {a[name]}" for name in a if a[name] != b[name]]
    if theirs.chars != ours.chars:
        unlike.append(f"chars are {shortened(theirs.chars)}, not {shortened(ours.chars)}")
    if unlike:
        raise MicrogptError(f"{candidate}: is of another model than {reference}: {unlike[0]}")
