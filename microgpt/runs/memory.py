"""How much memory a run or a file would take, held against what the machine has.

The figures are estimates, made to tell what fits from what never will: measured, they are right to
within a factor of two. Where nobody knows how much memory there is, nothing is refused.
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
from microgpt.settings import config_from, flag

SIZES = ("n_layer", "n_embd", "block_size", "batch_size", "num_samples")  # what one can lower

# Bytes, measured. The graph of a step of scalar stays until that of the next one stands.
VALUE, TERM = 440, 48  # of such a graph: a Value, and each product that a dot() adds up
SCALAR_PARAM = 200  # a parameter, its gradient and moments, and the list that it was drawn into
DRAWN, BUFFERS = 8, 8  # of vectorized: what was drawn, and how many buffers hold every parameter
SPARE = 1.4  # times the arrays of a step: what NumPy needs in between
PAST_COPIES = 2  # of the keys and values of what is drawn
DOCUMENT = 200  # a list of tokens
PROCESS = 35e6  # one more of those that share a batch
LINE = 80  # a line of a text file, beside its characters
COPIES = 3  # of a text file's characters, at most
PIECES, PIECE = 64, 2**14  # of a text file that are looked at, and bytes of each

COLUMNS = 512  # positions that vectorized works on at once, or those of one document

# what vectorized.sample draws side by side
SMALL_MODEL = 2**14  # n_embd^2 block_size, up to which that saves time
CACHED = 2**21  # numbers that the keys and values of all walkers may be

# where Linux says what a container may use, in the second and the first version of its groups
CONTAINER = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


def check_memory(
    config: Config, vocab_size: int, documents: Sequence[str], backend_name: str
) -> None:
    """Refuse a model, and a batch of these documents, that do not fit into this machine's memory.

    The MicrogptError says how much they would take, and which option it is that asks for so much.
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
    """Refuse a file that does not fit into this machine's memory; of text, in lines."""
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
    """The share of line ends in a file, by pieces from all over it."""
    pieces = b""
    with open(path, "rb") as file:
        for i in range(PIECES):
            file.seek(i * size // PIECES)
            pieces += file.read(min(PIECE, size // PIECES + 1))
    return pieces.count(b"\n") / max(1, len(pieces))


def machine_memory() -> float:
    """The bytes of memory that this machine or container has; infinite where nobody knows."""
    memory = float("inf")
    with suppress(AttributeError, ValueError, OSError):  # Windows has no sysconf
        memory = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for limit in CONTAINER:
        with suppress(ValueError, OSError):  # "max", or no such file
            memory = min(memory, float(limit.read_text()))
    return memory


def estimate(config: Config, vocab_size: int, documents: Sequence[str], backend_name: str) -> float:
    """The bytes of parameters, gradients, moments and activations, and of what is drawn in the end.

    A batch is taken to be as long as the documents are on average, but no shorter than the longest.
    """
    L, C, T, B = config.n_layer, config.n_embd, config.block_size, config.batch_size
    scalar, num = backend_name == "scalar", config.num_samples
    itemsize = 4 if config.dtype == "float32" else 8
    param = SCALAR_PARAM if scalar else DRAWN + BUFFERS * itemsize
    params = 12 * L * C * C + T * C + (1 if config.tie_lm_head else 2) * vocab_size * C
    lengths = Counter(map(len, documents)) or {0: 1}  # and how many documents have them
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
    others = (config.cores - 1) * (PROCESS + 2.0 * itemsize * params)
    return param * float(params) + batch + walks + DOCUMENT * (B + num) + others


def most_walkers(config: Config) -> int:
    """How many documents vectorized draws side by side at most (see vectorized.sample).

    That spares calls, but of as many walkers as a document is long, one is of use: in a larger
    model, where a call takes its time from the numbers in it, they go one by one.
    """
    if config.n_embd**2 * config.block_size > SMALL_MODEL:
        return 1
    return max(1, CACHED // (2 * config.n_layer * config.n_embd * config.block_size))


def _walks(config: Config, V: int, itemsize: int) -> float:
    """The bytes of what walks side by side, whose past is copied when it grows."""
    L, C, T = config.n_layer, config.n_embd, config.block_size
    walkers = min(most_walkers(config), config.num_samples * (T // 2 + 1))
    past = PAST_COPIES * itemsize * 2 * L * C * T
    return walkers * (past + 8 * T) + _step(config, V, walkers, walkers * T, False, itemsize)


def _step(
    config: Config, V: int, positions: float, squares: float, scalar: bool, itemsize: int
) -> float:
    """The bytes of a step over so many positions; squares: of each document's positions."""
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
