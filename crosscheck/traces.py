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
from safetensors.numpy import save

from crosscheck.cases import Case, case_names, load_case
from crosscheck.compare import FLOAT64, Outcome, compare_step, explained, float32
from crosscheck.trace import Step, keys, split_key
from microgpt.checkpoint import read_tensors
from microgpt.config import stored_config
from microgpt.data import write_whole
from microgpt.errors import MicrogptError

FORMAT = "microgpt trace"
VERSION = "1"
TOKENS = "batch/tokens"


def save_trace(path: Path, case: Case, backend: str, dtype: str, steps: Iterable[Step]) -> int:
    """Write the steps of a trace; returns how many there are."""
    tensors: dict[str, Any] = {}
    number = 0
    for number, step in enumerate(steps, 1):
        for key, tensor in step.items():
            tensors[f"step{number}/{key}"] = np.array(tensor, order="C")
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
    write_whole(path, save(tensors, metadata))
    return number


def load_trace(path: Path) -> tuple[Case, str, list[Step]]:
    """The case of a trace (without its parameters), its precision, and its steps."""
    tensors, metadata = read_tensors(path)
    if metadata.get("format") != FORMAT or metadata.get("version") != VERSION:
        raise MicrogptError(
            f"{path}: not a trace of version {VERSION}; see crosscheck/TRACES.md for the format"
        )
    try:
        config = stored_config(json.loads(metadata["config"]), str(path))
        chars, dtype = metadata["chars"], metadata["dtype"]
        steps: list[Step] = [{} for _ in range(int(metadata["steps"]))]
        for key, tensor in tensors.items():
            number, _, rest = key.partition("/")
            if number not in {f"step{n}" for n in range(1, len(steps) + 1)}:
                raise ValueError(f"{key!r} in a trace of {len(steps)} steps")
            steps[int(number.removeprefix("step")) - 1][rest] = tensor
        if dtype not in ("float64", "float32") or not steps:
            raise ValueError(f"dtype {dtype!r}, {len(steps)} steps")
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise MicrogptError(f"{path}: damaged: {error!r}") from None
    name = metadata.get("case", path.stem)
    case = Case(name, "a trace", config, chars, [], kink="read from a trace")
    if name in case_names():  # it knows what may be zero, and what single precision loses
        known = load_case(name)
        case = replace(case, zero=known.zero, float32=known.float32, random=known.random)
    order = keys(config, case.tokenizer.vocab_size)
    for step in steps:
        unknown = [key for key in step if key not in order]
        if unknown:
            raise MicrogptError(f"{path}: {unknown[0]!r} is no name of a tensor of this model")
    return case, dtype, [{key: step[key] for key in order if key in step} for step in steps]


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
        shared = {key: a[key] for key in [TOKENS, *wanted]}
        theirs_wanted = {TOKENS: a[TOKENS], **{key: b[key] for key in wanted}}
        compare_step(case, number, shared, theirs_wanted, standard, outcome)
        if outcome.found:
            outcome.found[0] = explained(case, outcome.found, a, b, before, standard)
            return outcome
        outcome.tally.steps += 1
        before = a, b
    return outcome
