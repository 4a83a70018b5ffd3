"""How much memory a run or a file would take, compared with the machine's memory.

The estimates tell a model that can fit from one that never will: measured, they are right to within
a factor of two. Where the system does not say how much memory it has, nothing is refused.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from microgpt.config import Config
from microgpt.errors import MicrogptError
from microgpt.layout import count_params
from microgpt.settings import config_from, flag

SIZES = ("n_layer", "n_embd", "block_size", "batch_size", "num_samples")  # the options to lower

# Bytes, measured. scalar keeps the graph of a step until the graph of the next step is complete.
VALUE, TERM = 440, 48  # of a graph: a Value, and each product that a dot() adds up
SCALAR_PARAM = 200  # a parameter, its gradient and moments, and the list that it was drawn into
DRAWN, BUFFERS = 8, 8  # vectorized: a drawn weight; how many buffers are as large as all parameters
SPARE = 1.4  # times the arrays of a step, for NumPy's temporary arrays
CACHE_COPIES = 2  # of the KV cache in sampling
DOCUMENT = 200  # a list of tokens
PROCESS = 60e6  # one more rank, without a model
LINE = 80  # a line of a text file, without its characters
COPIES = 3  # of a text file's characters, at most
BLOCKS, BLOCK = 64, 2**14  # how many blocks of a text file are read, and bytes of a block

COLUMNS = 512  # positions of a micro-batch; a longer document is one of its own

# how many documents vectorized.sample draws side by side
SMALL_MODEL = 2**14  # n_embd^2 * block_size, up to which side by side is faster
CACHED = 2**21  # numbers in the KV cache of all documents that are drawn side by side

# where Linux gives the memory limit of a container: cgroups version 2, cgroups version 1
CONTAINER = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


def check_memory(
    config: Config, vocab_size: int, documents: Sequence[str], backend_name: str
) -> None:
    """Raise MicrogptError if a model and a batch of these documents do not fit into memory.

    The message says how much memory they would take, and which option to lower.
    """

    def bytes_of(config: Config) -> float:
        return estimate(config, vocab_size, documents, backend_name)

    needed, memory = bytes_of(config), machine_memory()
    if needed > memory:
        usual = config_from({}, "the default preset")
        one_as_usual = {
            name: bytes_of(replace(config, **{name: getattr(usual, name)})) for name in SIZES
        }
        name = min(SIZES, key=lambda name: one_as_usual[name])
        raise MicrogptError(
            f"{flag(name)} {getattr(config, name):,}: with the {backend_name} backend this would"
            f" take about {_words(needed)} of memory, and this machine has {_words(memory)};"
            f" lower {flag(name)}"
        )


def check_file(path: Path, lines: bool = False) -> None:
    """Raise MicrogptError if a file, or its list of lines with `lines`, exceeds the memory."""
    size = path.stat().st_size
    needed = float(size)
    if lines:
        needed = size * (COPIES + LINE * _line_ends(path, size))
    if needed > machine_memory():
        raise MicrogptError(
            f"{path}: to read it would take about {_words(needed)} of memory, and this machine has"
            f" {_words(machine_memory())}"
        )


def _line_ends(path: Path, size: int) -> float:
    """The share of line ends among the bytes of a file, from blocks all over the file."""
    read = b""
    with open(path, "rb") as file:
        for i in range(BLOCKS):
            file.seek(i * size // BLOCKS)
            read += file.read(min(BLOCK, size // BLOCKS + 1))
    return read.count(b"\n") / max(1, len(read))


def machine_memory() -> float:
    """The bytes of memory that this machine or container has; infinite where it is not known."""
    memory = float("inf")
    with suppress(AttributeError, ValueError, OSError):  # Windows has no sysconf
        memory = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for limit in CONTAINER:
        with suppress(ValueError, OSError):  # "max", or no such file
            memory = min(memory, float(limit.read_text()))
    return memory


def estimate(config: Config, vocab_size: int, documents: Sequence[str], backend_name: str) -> float:
    """The bytes of parameters, gradients, moments, activations and samples.

    A batch has batch_size documents of average length, or the longest document if that is more.
    """
    B = config.batch_size
    scalar, num = backend_name == "scalar", config.num_samples
    itemsize = 4 if config.dtype == "float32" else 8
    param = SCALAR_PARAM if scalar else DRAWN + BUFFERS * itemsize
    params = count_params(config, vocab_size)
    lengths = Counter(map(len, documents)) or {0: 1}  # how many documents have each length
    sizes = [(min(length + 2, config.max_tokens) - 1, count) for length, count in lengths.items()]
    longest, positions = max(sizes)[0], sum(n * count for n, count in sizes)
    squares = sum(n * n * count for n, count in sizes)
    each = B / sum(lengths.values())
    if not scalar:  # a micro-batch at a time
        each = min(each, max(COLUMNS, longest) / positions)
    batch = max(
        _step(config, vocab_size, longest, longest**2, scalar, itemsize),
        _step(config, vocab_size, each * positions, each * squares, scalar, itemsize),
    )
    walks = 0.0 if scalar else _walks(config, vocab_size, itemsize)
    others = (config.cores - 1) * (PROCESS + BUFFERS * itemsize * params + batch)
    return param * float(params) + batch + walks + DOCUMENT * (B + num) + others


def most_walkers(config: Config) -> int:
    """How many documents vectorized draws side by side at most (see vectorized.sample).

    Drawing side by side takes fewer calls, but keeps one document of n, where n is the length of a
    document. A larger model draws one by one, since arithmetic outweighs calls there.
    """
    if config.n_embd**2 * config.block_size > SMALL_MODEL:
        return 1
    return max(1, CACHED // (2 * config.n_layer * config.n_embd * config.block_size))


def _walks(config: Config, V: int, itemsize: int) -> float:
    """The bytes of drawing side by side, with a KV cache that is copied when it grows."""
    L, C, T = config.n_layer, config.n_embd, config.block_size
    rows = min(most_walkers(config), config.num_samples * (T // 2 + 1))
    cache = CACHE_COPIES * itemsize * 2 * L * C * T
    return rows * (cache + 8 * T) + _step(config, V, rows, rows * T, False, itemsize)


def _step(
    config: Config, V: int, positions: float, squares: float, scalar: bool, itemsize: int
) -> float:
    """The bytes of a step; squares: positions squared, summed over the documents."""
    L, C, H = config.n_layer, config.n_embd, config.n_head
    if scalar:
        values = positions * (25 * L * C + 5 * V) + squares * L * 3 * H
        terms = positions * (12 * L * C * C + V * C) + squares * L * C
        return VALUE * values + TERM * terms
    numbers = positions * (15 * L * C + 12 * C + 3 * V) + squares * (H * (L + 1) + 1)
    return SPARE * itemsize * numbers


def _words(size: float) -> str:
    """A number of bytes in words."""
    return f"{size / 1e9:,.1f} GB" if size < 1e15 else f"{size / 1e9:.0e} GB"
