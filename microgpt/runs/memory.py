"""How much memory a run or a file would take, compared with the machine's memory.

The estimates tell a model that can fit from one that never will: measured, they are right to within
a factor of two. Where the system does not say how much memory it has, nothing is refused.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from microgpt.config import Config
from microgpt.errors import MicrogptError
from microgpt.layout import count_params
from microgpt.settings import config_from, flag

SIZES = ("n_layer", "n_embd", "block_size", "batch_size", "num_samples")  # the options to lower

# Bytes, measured. scalar keeps the graph of a step until the graph of the next step is complete.
VALUE, TERM = 450, 48  # of a graph: an activation, and each product that a dot() adds up
SPARE = 1.4  # times the activations of vectorized, for NumPy's temporary arrays
SCALAR_PARAM = 200  # a parameter, its gradient and moments, and the list that it was drawn into
BUFFERS = 8  # of vectorized, each as large as all parameters
DOCUMENT = 200  # a list of tokens
TEXT, LINE = 3, 80  # each byte of a text file, and each line

# of vectorized
COLUMNS = 512  # positions of a micro-batch; a longer document is one of its own
SMALL_MODEL = 2**14  # n_embd^2 * block_size, up to which samples are drawn side by side
CACHED = 2**21  # numbers in the KV cache of all samples that are drawn side by side

# where Linux gives the memory limit of a container, in either version of cgroups
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def check_memory(
    config: Config, vocab_size: int, documents: Sequence[str], backend_name: str
) -> None:
    """Raise MicrogptError, which names the option to lower, if a model and its batch do not fit."""
    others = vocab_size, documents, backend_name
    needed, memory = estimate(config, *others), machine_memory()
    if needed > memory:
        usual = config_from({}, "the default preset")
        as_usual = {x: replace(config, **{x: getattr(usual, x)}) for x in SIZES}
        name = min(SIZES, key=lambda x: estimate(as_usual[x], *others))
        raise MicrogptError(
            f"{flag(name)} {getattr(config, name):,}: with the {backend_name} backend this would"
            f" take about {_words(needed)} of memory, and this machine has {_words(memory)};"
            f" lower {flag(name)}"
        )


def check_file(path: Path, lines: bool = False) -> None:
    """Raise MicrogptError if a file, or its list of lines with `lines`, exceeds the memory."""
    memory, size = machine_memory(), path.stat().st_size
    needed = size
    if lines and size < memory < size * (TEXT + LINE):
        with open(path, "rb") as file:
            ends = sum(block.count(b"\n") for block in iter(partial(file.read, 2**20), b""))
        needed = TEXT * size + LINE * ends
    if needed > memory:
        raise MicrogptError(
            f"{path}: to read it would take about {_words(needed)} of memory, and this machine has"
            f" {_words(memory)}"
        )


def machine_memory() -> float:
    """The bytes of memory that this machine or container has; infinite where it is not known."""
    memory = float("inf")
    with suppress(AttributeError, ValueError, OSError):  # Windows has no sysconf
        memory = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for limit in LIMITS:
        with suppress(ValueError, OSError):  # "max", or no such file
            memory = min(memory, float(Path(limit).read_text(encoding="utf-8")))
    return memory


def estimate(config: Config, V: int, documents: Sequence[str], backend_name: str) -> float:
    """The bytes of parameters, activations and samples.

    A batch has batch_size documents of average length, or the longest document if that is more.
    """
    L, C, T, B = config.n_layer, config.n_embd, config.block_size, config.batch_size
    scalar, itemsize = backend_name == "scalar", 4 if config.dtype == "float32" else 8

    def activations(positions: float, length: float) -> float:
        numbers = positions * (L + 1) * (16 * C + length * config.n_head) + positions * 4 * V
        if scalar:
            return VALUE * numbers + TERM * positions * (12 * L * C * C + V * C)
        return SPARE * itemsize * numbers

    lengths = [min(len(document) + 2, config.max_tokens) - 1 for document in documents] or [1]
    longest, mean = max(lengths), sum(lengths) / len(lengths)
    positions = B * mean if scalar else min(B * mean, max(COLUMNS, longest))
    batch = max(activations(longest, longest), activations(positions, mean))
    params = (SCALAR_PARAM if scalar else BUFFERS * itemsize) * count_params(config, V)
    walkers = min(most_walkers(config), config.num_samples * (T // 2 + 1))
    caches = walkers * 4 * itemsize * L * C * T  # of keys and values; to grow, a cache is copied
    return config.cores * (params + batch) + caches + DOCUMENT * (B + config.num_samples)


def most_walkers(config: Config) -> int:
    """How many samples vectorized draws side by side at most (see vectorized.sample).

    Side by side takes fewer calls and more arithmetic, so that a large model draws one by one.
    """
    if config.n_embd**2 * config.block_size > SMALL_MODEL:
        return 1
    return max(1, CACHED // (2 * config.n_layer * config.n_embd * config.block_size))


def _words(size: float) -> str:
    """A number of bytes in words."""
    return f"{size / 1e9:,.1f} GB" if size < 1e15 else f"{size / 1e9:.0e} GB"
