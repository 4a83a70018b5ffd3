"""Valid files, damaged at random, and read: each is to be loaded or refused, and nothing else.

`main` is the long form; tests/runs/test_untrusted.py runs a short one.
"""

from __future__ import annotations

import faulthandler
import json
import re
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from time import perf_counter
from traceback import format_exc

import numpy as np

from crosscheck.cases import CASES, load_case
from crosscheck.trace import trace
from crosscheck.traces import diff, save_trace
from microgpt.backend import State
from microgpt.config import Config
from microgpt.errors import MicrogptError
from microgpt.init import init_params
from microgpt.runs.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from microgpt.settings import CONFIGS, load_config
from microgpt.tokenizer import Tokenizer, build_tokenizer

SLOWEST = 5.0  # seconds that a file may take
ENDLESS = 60.0  # seconds after which it is given up, with a traceback of where it hangs
MEMORY = 4 << 30  # bytes of addresses, where the system can limit them

CASE = "two-layers"
NUMBERS = ["-1", "0", "1.5", "1e999", "1e-400", "NaN", "Infinity", "true", "null", '""', "[]", "{}",
           "1000000000", "1000000000000", "9223372036854775808", "18446744073709551616", "1" * 5000,
           "0x" + "f" * 5000, "." + "9" * 400, "[" * 3000, '{"a":' * 3000]  # fmt: skip

Mutation = Callable[[bytes, Random], bytes]


def made_up(config: Config, tokenizer: Tokenizer, rng: Random) -> State:
    """Parameters and moments as they might be after three updates."""
    params, m, v = (init_params(config, tokenizer.vocab_size, rng) for _ in range(3))
    squares = {name: [[x * x for x in row] for row in matrix] for name, matrix in v.items()}
    return State(params, m, squares, 3)


def flip(content: bytes, rng: Random) -> bytes:
    """One bit, or a few."""
    damaged = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def flip_in_front(content: bytes, rng: Random) -> bytes:
    """The same where headers are."""
    return flip(content[:2000], rng) + content[2000:]


def truncate(content: bytes, rng: Random) -> bytes:
    """The beginning."""
    return content[: rng.randrange(len(content))]


def splice(content: bytes, rng: Random) -> bytes:
    """A piece of the file over another, or in front of it."""
    start, end = sorted(rng.randrange(len(content)) for _ in range(2))
    at = rng.randrange(len(content))
    return content[:at] + content[start:end] + content[rng.choice((at, at + end - start)) :]


def scatter(content: bytes, rng: Random) -> bytes:
    """Some bytes that mean nothing."""
    at = rng.randrange(len(content))
    return content[:at] + rng.randbytes(rng.randrange(1, 50)) + content[at + rng.randrange(50) :]


def number(content: bytes, rng: Random) -> bytes:
    """Another number in the place of one in the header, or anywhere in a text."""
    head, tail = _split(content)
    places = list(re.finditer(rb"(?<![\w.])-?\d[\d.e+-]*", head))
    if not places:
        return content
    place = rng.choice(places)
    head = head[: place.start()] + rng.choice(NUMBERS).encode() + head[place.end() :]
    return _join(head, tail, content)


def header(content: bytes, rng: Random) -> bytes:
    """A header that says something else: an entry less, twice, under another name, or another."""
    head, tail = _split(content)
    try:
        entries = json.loads(head)
        texts = entries.get("__metadata__", {})
    except (ValueError, AttributeError):
        return splice(content, rng)
    inside = rng.choice((entries, texts)) if texts else entries
    name = rng.choice(list(inside))
    entry = inside.pop(name)
    what = rng.choice(("drop", "rename", "value", "other", "more", "field"))
    if what == "rename":
        inside[rng.choice((name + "x", "", "layer9.q", "step1/forward/loss"))] = entry
    elif what == "value":
        inside[name] = rng.choice((None, 1, "", "x" * 10_000, [], {}, rng.choice(NUMBERS)))
    elif what == "other":
        inside[name] = rng.choice(list(inside.values()))
    elif what == "more":
        inside[name] = entry
        inside.update({f"more{i}": entry for i in range(rng.choice((1, 10_000)))})
    elif what == "field" and isinstance(entry, dict):
        field = rng.choice(list(entry))
        entry[field] = rng.choice(
            ("F32", "I64", "BF16", [0], [2**40, 2**40], [2**62, 4], [0, 2**62], [8, 0], [1] * 99)
        )
        inside[name] = entry
    return _join(json.dumps(entries).encode(), tail, content)


def line(content: bytes, rng: Random) -> bytes:
    """A line of a text twice, or one that was never there."""
    lines = content.split(b"\n")
    extra = (b"a: &a [x]", b"b: *a", b"<<: {n_layer: 2}", b"- " * 50, b"? [a]", b"!!set x",
             b"wombat: 1", b"n_layer: 0x" + b"f" * 30, b"\0", b"\xff", b"seed: 1:59")  # fmt: skip
    lines.insert(rng.randrange(len(lines) + 1), rng.choice((*extra, *lines)))
    return b"\n".join(lines)


MUTATIONS = (flip, flip_in_front, truncate, splice, scatter, number, header, line)


def _split(content: bytes) -> tuple[bytes, bytes]:
    """A safetensors file's header and numbers; of a text, all and nothing."""
    end = 8 + int.from_bytes(content[:8], "little")
    return (content[8:end], content[end:]) if end <= len(content) else (content, b"")


def _join(head: bytes, tail: bytes, content: bytes) -> bytes:
    is_text = _split(content)[0] == content
    return head if is_text else len(head).to_bytes(8, "little") + head + tail


@dataclass(frozen=True)
class Subject:
    """A file to be damaged, and the reading of it."""

    path: Path
    content: bytes
    read: Callable[[Path], object]

    def verdict(self, damaged: bytes) -> str:
        """What comes of reading the file with another content, in a word or a traceback."""
        self.path.write_bytes(damaged)
        start = perf_counter()
        try:
            self.read(self.path)
            verdict = "loaded"
        except MicrogptError as error:
            verdict = "refused" if len(str(error)) < 2000 else f"too long a message: {error}"
        except BaseException:
            verdict = format_exc()
        seconds = perf_counter() - start
        return verdict if seconds < SLOWEST else f"{verdict} after {seconds:.1f} s"


def subjects(folder: Path) -> list[Subject]:
    """One of each kind."""
    config = load_config(overrides={"n_embd": "4", "n_head": "2", "block_size": "5"})
    tokenizer, rng = build_tokenizer("abc", config), Random(5)
    state = made_up(config, tokenizer, rng)
    saved = Checkpoint(config, tokenizer, state, rng, "0" * 64)
    checkpoint, whole = folder / "checkpoint", folder / "whole"
    save_checkpoint(checkpoint, saved)

    case, reference = load_case(CASE), folder / "reference"
    save_trace(reference, case, "vectorized", "float64", trace(case, "vectorized", "float64", 2))
    shutil.copy(reference, whole)

    for suffix in (".yaml", ".safetensors"):
        shutil.copy(CASES / f"{CASE}{suffix}", folder)
        shutil.copy(CASES / f"{CASE}{suffix}", folder / f"params{suffix}")
    shutil.copy(CONFIGS / "microgpt.yaml", folder / "config.yaml")

    def same_checkpoint(path: Path) -> None:
        """A checkpoint that is loaded is the one that was written."""
        loaded = load_checkpoint(path)
        assert (loaded.config, loaded.tokenizer) == (saved.config, saved.tokenizer)
        assert (loaded.documents, loaded.state.updates) == (saved.documents, saved.state.updates)
        assert loaded.rng.getstate() == saved.rng.getstate()
        for name in state.params:
            np.testing.assert_array_equal(loaded.state.params[name], state.params[name])
            np.testing.assert_array_equal(loaded.state.m[name], state.m[name])
            np.testing.assert_array_equal(loaded.state.v[name], state.v[name])

    same_checkpoint(checkpoint)  # hardly a damaged one is loaded: that this works is seen here
    readings: list[tuple[str, Callable[[Path], object]]] = [
        ("checkpoint", same_checkpoint),
        ("reference", lambda path: diff(path, whole)),
        ("reference", lambda path: diff(whole, path)),
        ("config.yaml", lambda path: load_config(str(path))),
        (f"{CASE}.yaml", lambda path: load_case(str(path))),
        ("params.safetensors", lambda path: load_case(str(path.with_suffix(".yaml")))),
    ]
    return [
        Subject(folder / name, (folder / name).read_bytes(), reading) for name, reading in readings
    ]


def main(count: int, seed: int) -> int:
    """Damage and read so many files; 0 if each was loaded or refused, in time and memory."""
    with suppress(ImportError, ValueError, OSError):  # Windows has none, others need not grant it
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    rng = Random(seed)
    found: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("error")
        kinds = subjects(Path(folder))
        for i in range(count):
            subject, mutation = kinds[i % len(kinds)], rng.choice(MUTATIONS)
            faulthandler.dump_traceback_later(ENDLESS, exit=True)
            verdict = subject.verdict(mutation(subject.content, rng))
            faulthandler.cancel_dump_traceback_later()
            found[verdict if verdict in ("loaded", "refused") else "else"] += 1
            if verdict not in ("loaded", "refused"):
                print(
                    f"file {i} of seed {seed}, {subject.path.name}, {mutation.__name__}:", verdict
                )
    print(
        f"{count:,} mutated files: {found['refused']:,} refused, {found['loaded']:,} loaded,"
        f" {found['else']:,} tracebacks"
    )
    return 1 if found["else"] else 0
