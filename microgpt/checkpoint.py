"""Files of tensors: parameters and checkpoints, in the safetensors format.

A parameter file holds the tensors of `param_shapes` under their names. A checkpoint holds them,
Adam's moments as `adam.m.<name>` and `adam.v.<name>`, and these texts as metadata:

format      "microgpt checkpoint"
version     "1"
config      the configuration, as JSON
chars       the characters of the vocabulary, as one text
updates     how many updates the model has had
random      the state of the random stream from which the samples are drawn, as JSON
documents   the SHA-256 of the data set's documents

The position in the data follows: the documents are shuffled by the seed of the configuration and
taken round and round, batch_size of them for every update.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from microgpt.backend import State
from microgpt.config import Config, stored_config
from microgpt.data import write_whole
from microgpt.errors import MicrogptError
from microgpt.layout import param_shapes
from microgpt.tokenizer import Tokenizer, build_tokenizer

FORMAT = "microgpt checkpoint"
VERSION = "1"
FILE_NAME = "checkpoint.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A model between two steps of its training: all that is needed to go on, or to sample."""

    config: Config
    tokenizer: Tokenizer
    state: State
    rng: Random
    documents: str  # the SHA-256 of the data set


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint, whole or not at all.

    Raises FloatingPointError, before anything is written, if a tensor is not finite everywhere.
    """
    state = checkpoint.state
    tensors = {
        prefix + name: np.ascontiguousarray(tensor, checkpoint.config.dtype)
        for prefix, named in (("", state.params), ("adam.m.", state.m), ("adam.v.", state.v))
        for name, tensor in named.items()
    }
    spoiled = not_finite(tensors)
    if spoiled:
        raise FloatingPointError(f"{spoiled} is not finite everywhere")
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "config": json.dumps(dataclasses.asdict(checkpoint.config)),
        "chars": "".join(checkpoint.tokenizer.chars),
        "updates": str(state.updates),
        "random": json.dumps(checkpoint.rng.getstate()),
        "documents": checkpoint.documents,
    }
    write_whole(path, save(tensors, metadata))


def not_finite(tensors: Mapping[str, Any]) -> str | None:
    """The name of the first tensor that is not finite everywhere."""
    return next((name for name, x in tensors.items() if not np.isfinite(x).all()), None)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint; for a run directory, the one that it holds.

    Raises MicrogptError if it is missing, damaged, no checkpoint, of another version, or if its
    tensors do not have the shapes that its configuration asks for.
    """
    if os.path.isdir(path):
        path = path / FILE_NAME
    tensors, metadata = read_tensors(path)
    if metadata.get("format") != FORMAT:
        raise MicrogptError(
            f"{path}: not a checkpoint of microgpt; expected a {FILE_NAME} or a run directory"
        )
    if metadata.get("version") != VERSION:
        raise MicrogptError(
            f"{path}: a checkpoint of version {metadata.get('version')!r}, and this program reads"
            f" version {VERSION!r}; use the release that wrote it"
        )
    try:
        fields = json.loads(metadata["config"])
        config = stored_config(fields, str(path))
        tokenizer = build_tokenizer(metadata["chars"], config)
        updates = int(metadata["updates"])
        if updates < 0:
            raise ValueError(f"{updates} updates")
        version, numbers, gauss_next = json.loads(metadata["random"])
        rng = Random()
        rng.setstate((version, tuple(numbers), gauss_next))
        documents = metadata["documents"]
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise MicrogptError(f"{path}: damaged: its metadata cannot be read ({error!r})") from None
    shapes = param_shapes(config, tokenizer.vocab_size)
    params, m, v = (
        _select(tensors, prefix, shapes, config.dtype, path)
        for prefix in ("", "adam.m.", "adam.v.")
    )
    return Checkpoint(config, tokenizer, State(params, m, v, updates), rng, documents)


def save_params(path: Path, params: Mapping[str, Any]) -> None:
    """Write parameters alone, float64."""
    write_whole(path, save({name: np.array(tensor, "float64") for name, tensor in params.items()}))


def load_params(path: Path, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """The parameters of a file that holds nothing else, float64."""
    return _select(read_tensors(path)[0], "", shapes, "float64", path)


def read_tensors(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Everything in a safetensors file: arrays by name, and metadata."""
    if not os.path.isfile(path):
        raise MicrogptError(f"{path}: there is no such file")
    try:
        with safe_open(path, framework="numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:
        raise MicrogptError(f"{path}: not a readable safetensors file: {error}") from None


def _select(
    tensors: Mapping[str, Any],
    prefix: str,
    shapes: Mapping[str, tuple[int, int]],
    dtype: str,
    path: Path,
) -> dict[str, Any]:
    selected = {}
    for name, shape in shapes.items():
        tensor = tensors.get(prefix + name)
        if tensor is None:
            raise MicrogptError(f"{path}: the tensor {prefix + name!r} is missing")
        if tensor.shape != shape or tensor.dtype != dtype:
            raise MicrogptError(
                f"{path}: the tensor {prefix + name!r} is {tensor.dtype} {tensor.shape},"
                f" and its configuration asks for {dtype} {shape}"
            )
        if not np.isfinite(tensor).all():
            raise MicrogptError(f"{path}: the tensor {prefix + name!r} is not finite everywhere")
        selected[name] = tensor
    return selected
