"""Traces as files: see TRACES.md beside this one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np

from crosscheck.cases import Case, case_names, load_case
from crosscheck.compare import Outcome, compare_step, explained
from crosscheck.tolerance import FLOAT64, float32
from crosscheck.trace import Array, Step, expected_shape, keys, split_key
from microgpt.checkpoint import DAMAGED, TensorFile, write_tensors
from microgpt.config import stored_config
from microgpt.errors import MicrogptError, shortened

FORMAT = "microgpt trace"
VERSION = "1"
TOKENS = "batch/tokens"


def save_trace(path: Path, case: Case, backend: str, dtype: str, steps: Iterable[Step]) -> int:
    """Write the steps of a trace; returns how many there are."""
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


def load_trace(path: Path) -> tuple[Case, str, list[Step]]:
    """The case of a trace (without its parameters), its precision, and its steps.

    Raises MicrogptError if it is no trace, or not one of the model that it names.
    """
    file = TensorFile(path)
    metadata = file.metadata
    if metadata.get("format") != FORMAT or metadata.get("version") != VERSION:
        raise MicrogptError(
            f"{path}: not a trace of version {VERSION}; see crosscheck/TRACES.md for the format"
        )
    try:
        config = stored_config(json.loads(metadata["config"]), str(path))
        chars, dtype, name = metadata["chars"], metadata["dtype"], metadata.get("case", path.stem)
        count = int(metadata["steps"])
        if dtype not in ("float64", "float32") or not 1 <= count <= len(file.layouts):
            raise ValueError(f"dtype {dtype!r}, {count} steps of {len(file.layouts)} tensors")
        if not name.isprintable():
            raise ValueError(f"the case {name!r}")
    except DAMAGED as error:
        raise MicrogptError(f"{path}: damaged: {shortened(error, 200)}") from None
    case = Case(name, "a trace", config, chars, [], kink="read from a trace")
    if name in case_names():  # it knows what may be zero, and what single precision loses
        known = load_case(name)
        case = replace(case, zero=known.zero, float32=known.float32, random=known.random)
    order = keys(config, case.tokenizer.vocab_size)
    known_keys, numbers = set(order), {f"step{n}": n for n in range(1, count + 1)}
    for tensor_name in file.layouts:
        number, _, key = tensor_name.partition("/")
        if number not in numbers or key not in known_keys:
            raise MicrogptError(
                f"{path}: {shortened(tensor_name)} is no name of a tensor of this model, in"
                f" {count:,} steps"
            )
    tensors = file.tensors()
    steps: list[Step] = [{} for _ in range(count)]
    for tensor_name, tensor in tensors.items():
        number, _, key = tensor_name.partition("/")
        steps[numbers[number] - 1][key] = tensor
    return case, dtype, [{key: step[key] for key in order if key in step} for step in steps]


def _check_tokens(path: Path, number: int, tokens: Array, case: Case) -> None:
    """Refuse tokens that cannot be those of a batch."""
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
    """Refuse tensors that are not of the kind and shape that a model and a batch give them."""
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
    """Compare what the candidate has and matches one of the patterns, up to the first difference.

    Raises MicrogptError if there is nothing to compare, or nothing to compare it with.
    """
    case, _, ours = load_trace(reference)
    other, dtype, theirs = load_trace(candidate)
    if (other.config, other.chars) != (case.config, case.chars):
        raise MicrogptError(f"{candidate}: is of another model, or vocabulary, than {reference}")
    if len(ours) != len(theirs):
        raise MicrogptError(f"{candidate}: {len(theirs)} steps, and {reference} has {len(ours)}")
    standard = float32(case) if dtype == "float32" else FLOAT64
    outcome = Outcome(case.name)
    before: tuple[Step, Step] | None = None
    for number, (a, b) in enumerate(zip(ours, theirs), 1):
        wanted = [
            key
            for key in b
            if any(fnmatch(key, pattern) for pattern in only)
            and split_key(key)[0] in standard.tolerances  # single precision draws other samples
        ]
        lacking = [key for key in [TOKENS, *wanted] if key not in a]
        if not wanted or lacking:
            problem = f"lacks {lacking[0]!r}" if lacking else f"has nothing like {', '.join(only)}"
            where = reference if lacking else candidate
            raise MicrogptError(f"{where}: step {number} {problem}, so there is nothing to compare")
        _check_tokens(reference, number, a[TOKENS], case)
        _check_step(reference, number, a, case, a[TOKENS])
        _check_step(candidate, number, b, case, a[TOKENS])
        shared = {key: a[key] for key in [TOKENS, *wanted]}
        theirs_wanted = {TOKENS: a[TOKENS], **{key: b[key] for key in wanted}}
        with np.errstate(all="ignore"):  # what is not finite differs, and that says it all
            compare_step(case, number, shared, theirs_wanted, standard, outcome)
            if outcome.found:
                outcome.found[0] = explained(case, outcome.found, a, b, before, standard)
                return outcome
        outcome.tally.steps += 1
        before = a, b
    return outcome
