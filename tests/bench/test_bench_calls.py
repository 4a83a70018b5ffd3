"""`microgpt bench` is right about the calls of NumPy, and about documents of many lengths."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from microgpt.backend import State, load_backend
from microgpt.bench import calls
from microgpt.bench import contest as bench
from microgpt.bench.opponents import torch_backends
from microgpt.cli.commands import main
from microgpt.config import Config
from microgpt.data import load_documents
from microgpt.errors import MicrogptError
from microgpt.runs import memory
from microgpt.settings import load_config
from vectorized.backend import Backend

LONG = ("isabella" * 8)[:63]  # as long as a row, so that short documents have rows of their own


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A small model, and short documents beside long ones."""
    words = tmp_path / "words.txt"
    words.write_text("\n".join(["al", LONG] * 8), encoding="utf-8")
    overrides = {"n_embd": "16", "n_head": "2", "block_size": "64", "dataset": str(words)}
    return load_config(overrides=overrides)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few replays."""
    monkeypatch.setattr(calls, "SECONDS", 0.0)
    monkeypatch.setattr(bench, "ROUND_SECONDS", 0.0)
    monkeypatch.setattr(bench, "MANY_LENGTHS", 8)


CACHED = [function for function in vars(calls).values() if hasattr(function, "cache_clear")]


class Clock:
    """A clock that moves only when told to, and by 40 ns whenever it is read."""

    now = 0  # nanoseconds

    def look(self) -> int:
        self.now += 40
        return self.now

    def passes(self, nanoseconds: int, _: Any = None) -> None:
        self.now += nanoseconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    """The clock that microgpt.bench.calls reads."""
    clock = Clock()
    monkeypatch.setattr(calls, "perf_counter", lambda: clock.now * 1e-9)
    monkeypatch.setattr(calls, "perf_counter_ns", clock.look)
    for cached in CACHED:
        cached.cache_clear()
    yield clock
    for cached in CACHED:
        cached.cache_clear()


@pytest.mark.usefixtures("quick")
def test_each_call_is_timed_in_place_without_the_reading_of_the_clock(clock: Clock) -> None:
    line = __file__, 1

    def recording(*parts: list[int]) -> Any:
        runs = [[(partial(clock.passes, n), (np.zeros(3),)) for n in part] for part in parts]
        return SimpleNamespace(runs=runs, lines=[[("work", line)] * len(part) for part in parts])

    recordings = [((2, 3), recording([700, 200], [300])), ((), recording([900]))]

    class Slow:
        """A backend with a first pass of 1 ms, later passes of 10 us, updates of 5 us."""

        passed = 1_000_000

        def forward(self, docs: Any) -> None:
            clock.passes(self.passed)
            self.passed = 10_000

        def backward(self) -> None:
            """Takes no time."""

        def update(self, lr_t: float) -> None:
            assert lr_t == 0  # so that every step is the same
            clock.passes(5_000)

        def recordings(self, docs: Any) -> Any:
            return recordings

    listing = calls.listed("slow", Slow, [[0, 1]])
    timed = {part.name: [call.seconds for call in part.calls] for part in listing.parts}
    assert timed["forward"] == pytest.approx([700e-9, 200e-9])
    assert timed["backward"] == pytest.approx([300e-9])
    assert timed["update"] == pytest.approx([900e-9])
    assert listing.step == pytest.approx(15e-6)
    assert listing.recording == pytest.approx(1e-3 - 10e-6)
    *_, calls_take, empty, recorded = calls.lines(listing, 80)
    assert calls_take == "4 calls take 2.1 us of it, 14%"
    assert empty == "as many empty ones, 0.000 us each, would take 0.0 us, 0%"
    assert recorded == "recording one shape takes as long as 66 steps"


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_listing_has_every_call_that_a_step_makes(config: Config, dtype: str) -> None:
    entry = replace(config, batch_size=16, dtype=dtype)
    listing = bench.listed(entry)
    *_, one = bench.bench(entry, [16], rounds=1, dtypes=[dtype])
    counted = count_calls(Backend(entry, one.backend.state()), one.batches[0])
    assert counted == len(listing.calls) > 100
    assert len(listing.shapes) == 2
    names = [part.name for part in listing.parts]
    assert names == ["forward", "backward", "forward", "backward", "update"]
    itemsize = np.dtype(dtype).itemsize
    for call in listing.calls:
        assert Path(call.file).parent.name == "vectorized"
        *inputs, out = call.shapes
        if call.name == "dot" and len(out) == 2:
            assert out == (inputs[0][0], inputs[1][1])
        if call.name in ("dot", "multiply", "take", "copy") and "targets" not in call.source:
            assert call.written == prod(out) * itemsize
        if call.name == "put":  # an index and a number for every position
            assert call.written == prod(inputs[1]) * itemsize < prod(out) * itemsize
    assert any("tap.mlp_norm, w.mlp_fc1" in call.source or "@ w.T" in call.source
               for call in listing.parts[0].calls)  # fmt: skip


def count_calls(backend: Any, docs: Any) -> int:
    """How many calls one step replays, counted as they are made."""

    def step() -> None:
        backend.forward(docs)
        backend.backward()
        backend.update(0.0)

    made: list[Any] = []

    def counting(f: Any) -> Any:
        return lambda *arguments: made.append(f) or f(*arguments)

    step()
    for _, recording in backend.recordings(docs):
        recording.runs = [[(counting(f), given) for f, given in run] for run in recording.runs]
    step()
    return len(made)


@pytest.mark.usefixtures("quick")
def test_the_listing_fits_the_terminal_and_shows_the_largest_micro_batch(
    config: Config, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    file = tmp_path / "small.yaml"
    file.write_text(
        f"n_embd: 16\nn_head: 2\nblock_size: 64\ndataset: {config.dataset}\n", encoding="utf-8"
    )
    command = ["bench", "--calls", "--config", str(file), "--batch-size", "16"]
    shown = {}
    for columns in (40, 80, 160):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert main(command) == 0
        shown[columns] = capsys.readouterr().out.splitlines()
        assert max(map(len, shown[columns])) <= max(80, columns)
    assert "forward of 8 x 64 positions, the largest of 2 micro-batches" in shown[80]
    assert not any("2 x 16 positions" in line for line in shown[80])
    full = "x = logits - logits.max(axis=-1, keepdims=True)"
    assert any(line.endswith(full) for line in shown[160])
    assert not any(line.endswith(full) for line in shown[80])
    assert len(shown[40]) == len(shown[160])
    assert main([*command, "--dtype", "float32", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["label"] == "vectorized float32, batch of 16"
    assert [part["shape"] for part in report["parts"]] == [[8, 64]] * 2 + [[2, 16]] * 2 + [[]]
    assert sum(len(part["calls"]) for part in report["parts"]) == report["calls_per_step"]
    assert report["machine"]["numpy"]


@pytest.mark.usefixtures("quick")
def test_the_table_has_the_calls_of_a_step_and_the_share_of_empty_ones(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["al"] + [LONG] * 9
    Path(config.dataset).write_text("\n".join(words), encoding="utf-8")
    contestants = bench.bench(config, [1, 8], rounds=1)
    assert contestants[0].calls is None  # scalar
    for one in contestants[1:]:
        steps = [count_calls(Backend(one.config, one.backend.state()), docs)
                 for docs in one.batches]  # fmt: skip
        assert one.calls == pytest.approx(np.mean(steps))
        assert (len(set(steps)) > 1) == (one.config.batch_size > 1)
    monkeypatch.setattr(calls, "empty_call", lambda: 1e-7)
    for one in contestants:
        one.seconds = [4e-5]
    contestants[1].calls = contestants[2].calls = 100
    contestants[2].difference = 1.0
    head, row, other = bench.floors(contestants)
    assert head.endswith("at 0.100 us for an empty call")
    assert row.split() == ["1", "100", "10.0", "25%", "of", "float64"]  # no speed, no share
    assert other.count("%") == 2
    report: Any = bench.as_json(contestants)
    assert report["seconds_per_empty_call"] == 1e-7
    assert [one["calls_per_step"] for one in report["results"]] == [
        one.calls for one in contestants
    ]


@pytest.mark.usefixtures("quick")
def test_a_contestant_that_updates_nothing_has_calls_too(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Backend, "update", lambda self, lr_t: None)
    _, one = bench.bench(config, [1], rounds=1, dtypes=["float64"])
    ((_, recording),) = one.backend.recordings(one.batches[0])
    assert calls.per_step(one.backend, one.batches[:1]) == recording.size > 0


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("crop", ["positions", "tokens"])
def test_lengths_are_spread_evenly_and_new_ones_timed_apart_from_known_ones(
    config: Config, monkeypatch: pytest.MonkeyPatch, crop: str
) -> None:
    (one,) = bench.lengths(replace(config, crop=crop), 50, [1], ["float64"])
    positions = [len(doc) - 1 for (doc,) in one.batches]
    assert sorted(positions) == [1, 8, 15, 22, 29, 36, 43, 50] != positions
    assert one.right
    assert one.shapes == len({shape for docs in one.batches
                              for shape, _ in one.backend.recordings(docs) if shape})  # fmt: skip
    assert one.shapes == 8
    took = [10.0] * 8 + [0.5, 9.0] * 4 + [9.0, 1.5] * 4  # three rounds of eight steps
    times = iter([time for seconds in took for time in (0.0, seconds)])
    monkeypatch.setattr(bench, "perf_counter", lambda: next(times))
    (one,) = bench.lengths(replace(config, crop=crop), 50, [1], ["float64"])
    assert (one.first, one.seconds) == (10.0, [1.0])
    row = bench.table_of_lengths([one]).splitlines()[1].split()
    assert row[:7] == ["vectorized", "float64", "1", "1,000,000", "10,000,000", "90%", "8"]


@pytest.mark.usefixtures("quick")
def test_a_contestant_that_is_wrong_on_documents_of_many_lengths_has_no_speed(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def slower(name: str, config: Config, state: State, watch: bool = False) -> Any:
        backend: Any = load_backend(name, config, state, watch)
        if not watch:  # as the judge does
            update = backend.update
            backend.update = lambda lr_t: update(lr_t / 2)
        return backend

    monkeypatch.setattr(bench, "load_backend", slower)
    file = tmp_path / "small.yaml"
    file.write_text(f"dataset: {config.dataset}\n", encoding="utf-8")
    command = ["bench", "--config", str(file), "--lengths", "40", "--batch-size", "4"]
    assert main(command) == 1
    out = capsys.readouterr().out
    assert out.count("WRONG") == 2
    assert max(map(len, out.splitlines())) <= 80
    assert main([*command, "--json", "--dtype", "float32"]) == 1
    (result,) = json.loads(capsys.readouterr().out)["results"]
    assert (result["longest"], result["dtype"], result["right"]) == (40, "float32", False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--calls --cores 2", "--calls: does not go with --cores"),
        ("--calls --against torch", "--calls: does not go with --against"),
        ("--calls --lengths 9", "--calls: does not go with --lengths"),
        ("--calls --batch-size 1 --batch-size 2", "--calls: lists one step; give --batch-size"),
        ("--calls --batch-size 0", "--batch-size: expected 1 or more, got 0"),
        ("--calls --dtype float16", "--dtype: expected float64 or float32"),
        ("--lengths 9 --cores 2", "--lengths: does not go with --cores"),
        ("--lengths 0", "--lengths: expected 1 or more, got 0"),
        ("--lengths many", "--lengths: expected a whole number, got 'many'"),
        ("--lengths 1000000000000000", "--lengths 1,000,000,000,000,000: with the vectorized"),
        ("--lengths 1000000", "; lower --lengths"),
        ("--torch-threads 1", "--torch-threads: PyTorch takes no part; add --against torch"),
        ("--against torch --torch-threads 0", "--torch-threads: expected 1 or more, got 0"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], options: str, message: str
) -> None:
    assert main(["bench", *options.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("what", ["--calls", "--lengths=9"])
def test_a_model_that_cannot_be_trained_is_refused(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    file = tmp_path / "wild.yaml"
    file.write_text(f"dataset: {config.dataset}\ninit_std: 1.0e+200\n", encoding="utf-8")
    assert main(["bench", "--config", str(file), what]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "this model cannot be trained: " in line


def test_torch_gets_the_threads_that_it_is_given(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given: list[Any] = []
    dynamo = SimpleNamespace(config=SimpleNamespace())
    torch = SimpleNamespace(set_num_threads=given.append, _dynamo=dynamo)
    monkeypatch.setitem(sys.modules, "torch", torch)
    command = ["bench", "--against", "torch"]
    assert list(torch_backends(3)) == ["torch", "torch compiled"]
    torch_backends()
    assert given == [3]
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(bench, "bench", lambda *_, **options: given.append(options) or [])
    assert main([*command, "--torch-threads", "2", "--dtype", "float64"]) == 0
    assert given[1] == {"dtypes": ["float64"], "torch_threads": 2}
    assert capsys.readouterr().out


@pytest.mark.usefixtures("quick")
def test_a_model_is_timed_of_which_scalar_has_memory_for_a_few_tokens_only(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    single = replace(config, batch_size=1, num_samples=0)
    whole = memory.estimate(single, 10, load_documents(config.dataset), "scalar")
    monkeypatch.setattr(memory, "machine_memory", lambda: whole * 0.9)
    with pytest.raises(MicrogptError, match="with the scalar backend"):
        bench.bench(config, [1], rounds=1)
    monkeypatch.setattr(bench, "SCALAR_WORK", 10_000)  # two tokens
    assert {one.name for one in bench.bench(config, [1], rounds=1)} == {"vectorized"}
