"""Files of tensors: parameters and checkpoints, in the safetensors format.

A parameter file holds the tensors of `param_shapes` under their names. A checkpoint holds them,
Adam's moments as `adam.m.<name>` and `adam.v.<name>`, and these texts as metadata:

format      "microgpt checkpoint"
version     "2"
config      the configuration, as JSON
chars       the characters of the vocabulary, as one text
updates     how many updates the model has had
random      the state of the random stream from which the samples are drawn, as JSON
documents   the SHA-256 of the data set's documents
sha256      the SHA-256 of everything else in the file: see `checksum`

The position in the data set follows from `updates`: the documents are shuffled by the seed of the
configuration; every update takes the next batch_size documents, and starts over after the last.

Files are not trusted. The names, dtypes and shapes in a header are compared with those that the
configuration asks for before any tensor is read into memory.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, cast

import numpy as np
from safetensors import SafetensorError, safe_open

from microgpt.backend import State
from microgpt.config import Config
from microgpt.errors import MicrogptError, shortened
from microgpt.layout import param_shapes
from microgpt.runs.files import write_whole
from microgpt.runs.memory import check_file
from microgpt.settings import stored_config
from microgpt.tokenizer import Tokenizer, build_tokenizer

FORMAT = "microgpt checkpoint"
VERSION = "2"
FILE_NAME = "checkpoint.safetensors"
MOMENTS = ("", "adam.m.", "adam.v.")  # prefixes of tensor names: parameters, m, v
LARGEST_HEADER = 10_000_000  # bytes, plus four for every byte of tensors
SMALL_HEADER = 1_000_000  # bytes: headers up to this size are searched for duplicate names

# what reading bad metadata raises, and what reading an unreadable safetensors file raises
BAD_METADATA = (LookupError, ValueError, TypeError, AttributeError, ArithmeticError, RecursionError)
UNREADABLE = (SafetensorError, OSError, ValueError, TypeError, AttributeError, RecursionError)

Layout = tuple[str, tuple[int, ...]]  # the dtype and shape of a tensor


@dataclass(frozen=True)
class Checkpoint:
    """A model between two training steps: all that resuming and sampling need."""

    config: Config
    tokenizer: Tokenizer
    state: State
    rng: Random
    documents: str  # the SHA-256 of the data set

    def __repr__(self) -> str:
        return f"Checkpoint({self.state!r}, vocabulary {self.tokenizer.vocab_size})"


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint, whole or not at all.

    Raises FloatingPointError, before anything is written, if a tensor is not finite everywhere.
    """
    state = checkpoint.state
    tensors = {
        prefix + name: np.asarray(tensor, checkpoint.config.dtype)
        for prefix, named in zip(MOMENTS, (state.params, state.m, state.v))
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
    metadata["sha256"] = checksum(tensors, metadata)
    write_tensors(path, tensors, metadata)


def write_tensors(
    path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file, whole or not at all; the same tensors give the same bytes.

    The form of the header is promised in crosscheck/TRACES.md: sorted keys, no blanks.
    """
    arrays = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    in_order = sorted(arrays, key=lambda name: (-arrays[name].itemsize, name))  # large items first
    end = 0
    for name in in_order:
        x, begin = arrays[name], end
        end += x.nbytes
        dtype = {"f": "F", "i": "I"}[x.dtype.kind] + str(8 * x.itemsize)
        header[name] = {"dtype": dtype, "shape": x.shape, "data_offsets": (begin, end)}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    data = [
        arrays[name].astype(arrays[name].dtype.newbyteorder("<"), copy=False) for name in in_order
    ]
    content = b"".join([len(text).to_bytes(8, "little"), text, *(x.tobytes() for x in data)])
    write_whole(path, content)


def not_finite(tensors: Mapping[str, Any]) -> str | None:
    """The name of the first tensor that is not finite everywhere."""
    return next((name for name, x in tensors.items() if not np.isfinite(x).all()), None)


def checksum(tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> str:
    """The SHA-256 of the metadata, and of the names, dtypes, shapes and bytes of the tensors."""
    texts = {name: text for name, text in metadata.items() if name != "sha256"}
    layouts = {name: (str(tensor.dtype), tensor.shape) for name, tensor in tensors.items()}
    found = hashlib.sha256(json.dumps([texts, layouts], sort_keys=True).encode())
    for name in sorted(tensors):
        found.update(np.ascontiguousarray(tensors[name]).data)
    return found.hexdigest()


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint; for a run directory, the one that it holds.

    Raises MicrogptError if the file is missing, damaged, no checkpoint, of another version, or if
    the tensors are not those that the configuration asks for.
    """
    if os.path.isdir(path):
        path = path / FILE_NAME
    elif not os.path.lexists(path):
        raise MicrogptError(f"{path}: there is no run and no checkpoint of that name")
    try:
        file = TensorFile(path)
        metadata = file.metadata
    except NoTensorsError:
        metadata = {}
    if metadata.get("format") != FORMAT:
        raise MicrogptError(
            f"{path}: not a checkpoint of microgpt; expected a {FILE_NAME} or a run directory"
        )
    if metadata.get("version") != VERSION:
        raise MicrogptError(
            f"{path}: a checkpoint of version {shortened(metadata.get('version'))}, and this"
            f" program reads version {VERSION!r}; use the release that wrote it"
        )
    try:
        config = stored_config(read_json(metadata["config"]), str(path))
        tokenizer = build_tokenizer(metadata["chars"], config)
        if "".join(tokenizer.chars) != metadata["chars"]:
            raise ValueError("chars are not sorted, or one of them is there twice")
        updates = whole_number(metadata["updates"])
        if updates > config.steps:
            raise ValueError(f"{updates} updates of {config.steps}")
        rng = _random_stream(*read_json(metadata["random"]))
        documents, sha256 = metadata["documents"], metadata["sha256"]
    except BAD_METADATA as error:
        raise MicrogptError(
            f"{path}: damaged: its metadata cannot be read ({shortened(error, 200)})"
        ) from None
    shapes = param_shapes(config, tokenizer.vocab_size)
    file.expect(
        {prefix + name: shapes[name] for prefix in MOMENTS for name in shapes}, config.dtype
    )
    tensors = file.finite_tensors()
    if checksum(tensors, metadata) != sha256:
        raise MicrogptError(f"{path}: damaged: what it holds is not what was written (SHA-256)")
    params, m, v = ({name: tensors[prefix + name] for name in shapes} for prefix in MOMENTS)
    if any((mean_square < 0).any() for mean_square in v.values()):
        raise MicrogptError(f"{path}: damaged: Adam's mean of squares is negative")
    return Checkpoint(config, tokenizer, State(params, m, v, updates), rng, documents)


def whole_number(text: str) -> int:
    """The whole number in a metadata text; ValueError unless written as str() writes it."""
    if not re.fullmatch("0|[1-9][0-9]{0,18}", text):
        raise ValueError(f"{shortened(text)} for a whole number")
    return int(text)


def read_json(text: str) -> Any:
    """The value of a JSON text; ValueError if an object has a key twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a key is there twice")
        return found

    return json.loads(text, object_pairs_hook=unique)


def _random_stream(version: int, numbers: list[int], gauss_next: float | None) -> Random:
    """A random stream in this state."""
    if gauss_next is not None and not (type(gauss_next) is float and math.isfinite(gauss_next)):
        raise ValueError(f"{gauss_next} as the next number")
    if not all(type(number) is int for number in (version, *numbers)):
        raise ValueError("a random state that is not of whole numbers")
    rng = Random()
    rng.setstate((version, tuple(numbers), gauss_next))
    return rng


def save_params(path: Path, params: Mapping[str, Any]) -> None:
    """Write a file of parameters alone, in float64."""
    write_tensors(path, {name: np.array(tensor, "float64") for name, tensor in params.items()})


def load_params(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The parameters of a file that holds nothing else, float64, in the order of `shapes`."""
    file = TensorFile(path)
    file.expect(shapes, "float64")
    tensors = file.finite_tensors()
    return {name: tensors[name] for name in shapes}


class NoTensorsError(MicrogptError):
    """A file that is not a safetensors file."""


class TensorFile:
    """A safetensors file, of which only the header has been read.

    Raises MicrogptError if the file is missing, not regular, or does not match its header.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not os.path.isfile(path):
            there = "not a regular file" if os.path.exists(path) else "there is no such file"
            raise MicrogptError(f"{path}: {there}")
        try:
            if not path.stat().st_size:  # some files in /proc say 0, and a read of them never ends
                raise ValueError("it is empty")
            self._check_header()
            self._file = cast("Any", safe_open(path, framework="numpy"))
            self.metadata: dict[str, str] = self._file.metadata() or {}
            self.layouts = {name: self._layout(name) for name in self._file.keys()}  # noqa: SIM118
        except UNREADABLE as error:
            raise self._unreadable(error) from None

    def expect(self, shapes: Mapping[str, tuple[int, ...]], dtype: str) -> None:
        """Refuse the file unless it holds tensors of these names and shapes, and no others."""
        for name, shape in shapes.items():
            if name not in self.layouts:
                raise MicrogptError(f"{self.path}: the tensor {name!r} is missing")
            found, has = self.layouts[name]
            if (found, has) != (dtype, shape):
                types = ("", "") if found == dtype else (f"{found} ", f"{dtype} ")
                raise MicrogptError(
                    f"{self.path}: the tensor {name!r} is {types[0]}{has},"
                    f" and its configuration asks for {types[1]}{shape}"
                )
        surplus = self.layouts.keys() - shapes.keys()
        if surplus:
            raise MicrogptError(
                f"{self.path}: the tensor {shortened(min(surplus))} is none that its"
                " configuration asks for"
            )

    def tensors(self) -> dict[str, Any]:
        """All tensors, by name."""
        check_file(self.path)
        try:
            return {name: self._file.get_tensor(name) for name in self.layouts}
        except UNREADABLE as error:
            raise self._unreadable(error) from None

    def finite_tensors(self) -> dict[str, Any]:
        """All tensors, by name; refused if one is not finite everywhere."""
        tensors = self.tensors()
        for name, tensor in tensors.items():
            if not np.isfinite(tensor).all():
                raise MicrogptError(f"{self.path}: the tensor {name!r} is not finite everywhere")
        return tensors

    def _check_header(self) -> None:
        """Refuse long headers: safetensors takes ten times the memory of a header to read it."""
        with open(self.path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if file.read(1) not in (b"{", b""):
                raise NoTensorsError(f"{self.path}: not a safetensors file")
            data = os.fstat(file.fileno()).st_size - 8 - length
            file.seek(8)
            text = file.read(length) if length <= SMALL_HEADER else b"{}"
        read_json(text.decode())  # of two tensors with one name, safetensors takes the last
        if length > LARGEST_HEADER + 4 * max(0, data):
            raise ValueError(f"a header of {length:,} bytes")

    def _layout(self, name: str) -> Layout:
        described = self._file.get_slice(name)
        dtype = described.get_dtype()  # such as F64, which numpy calls float64
        words = {"F": "float", "I": "int", "U": "uint"}
        if dtype[0] in words and dtype[1:].isdigit():
            dtype = words[dtype[0]] + dtype[1:]
        return dtype, tuple(described.get_shape())

    def _unreadable(self, error: Exception) -> MicrogptError:
        reason = error.strerror if isinstance(error, OSError) else None
        reason = reason or " ".join(str(error).split())
        of_json = isinstance(error, (json.JSONDecodeError, UnicodeDecodeError))
        if of_json or "not fully covered" in reason:  # words that are about no file
            reason = "it is cut short, or damaged"
        return MicrogptError(f"{self.path}: not a readable safetensors file: {reason[:300]}")


def read_tensors(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Everything in a safetensors file: arrays by name, and metadata."""
    file = TensorFile(path)
    return file.tensors(), file.metadata
