"""The benchmark reports beside every speed whether the result is right."""

from __future__ import annotations

import json
import math
import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from microgpt.backend import Docs, State, load_backend
from microgpt.bench import contest as bench
from microgpt.bench.ranks import OnRanks
from microgpt.cli.commands import main
from microgpt.config import Config
from microgpt.runs.launch import mpiexec
from microgpt.settings import load_config
from vectorized.backend import Backend

RANKS = 2 if mpiexec() else 1


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A small model on a small data set."""
    words = tmp_path / "words.txt"
    words.write_text("\n".join(["emma", "noah", "al", "isabella", "jo"]), encoding="utf-8")
    return load_config(overrides={"n_embd": "4", "n_head": "2", "dataset": str(words)})


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds of one step per contestant."""
    monkeypatch.setattr(bench, "ROUND_SECONDS", 0.0)


def unchanged(backend: Any, name: str) -> None:
    """Leave a backend as it is."""


def change_backends(
    monkeypatch: pytest.MonkeyPatch,
    contestant: Callable[[Any, str], None] = unchanged,
    judge: Callable[[Any, str], None] = unchanged,
) -> None:
    """Change every backend of the benchmark; the judges are scalar, and those that watch."""

    def changed(name: str, config: Config, state: State, watch: bool = False) -> Any:
        backend = load_backend(name, config, state, watch)
        change = judge if watch or name == "scalar" else contestant
        change(backend, name)
        return backend

    monkeypatch.setattr(bench, "load_backend", changed)


@pytest.mark.usefixtures("quick")
def test_all_contestants_are_timed_and_right(config: Config) -> None:
    contestants = bench.bench(config, [1, 3], cores=RANKS, rounds=2)
    assert [(one.label, one.config.batch_size) for one in contestants] == [
        ("scalar float64", 1),
        ("vectorized float64", 1),
        ("vectorized float32", 1),
        ("vectorized float64", 3),
        ("vectorized float32", 3),
        *[("vectorized float32 x2", 3)][: RANKS - 1],
    ]
    assert all(len(one.seconds) == 2 and min(one.seconds) > 0 for one in contestants)
    assert all(one.right for one in contestants)
    assert contestants[0].difference == 0
    assert 0 < contestants[3].difference < 1e-13 < contestants[4].difference < 1e-4
    lines = [*bench.table(contestants).splitlines(), *bench.reductions(contestants)]
    assert max(map(len, lines)) <= 80
    assert len(bench.reductions(contestants)) == RANKS - 1


@pytest.mark.usefixtures("quick")
def test_a_contestant_that_skips_work_is_wrong(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = Backend.forward

    def half(self: Backend, docs: Docs) -> float:
        return forward(self, docs[: (len(docs) + 1) // 2])

    monkeypatch.setattr(Backend, "forward", half)
    contestants = bench.bench(config, [3], rounds=1)
    assert not any(one.right for one in contestants[1:])
    assert bench.table(contestants).count("WRONG") == 2


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("skipped", ["loss", "update"])
def test_a_contestant_without_the_loss_or_the_update_is_wrong(
    config: Config, monkeypatch: pytest.MonkeyPatch, skipped: str
) -> None:
    forward = Backend.forward
    if skipped == "update":
        monkeypatch.setattr(Backend, "update", lambda self, lr_t: None)
    else:
        monkeypatch.setattr(Backend, "forward", lambda self, docs: 0.99 * forward(self, docs))
    contestants = bench.bench(config, [3], rounds=1)
    assert [one.right for one in contestants] == [True, False, False]


@pytest.mark.usefixtures("quick")
@pytest.mark.skipif(RANKS == 1, reason="MPI is not installed: pip install -e '.[mpi]'")
def test_ranks_that_skip_the_backward_pass_are_wrong(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OnRanks, "backward", lambda self: None)
    contestants = bench.bench(config, [3], cores=2, rounds=1)
    assert [one.label for one in contestants if not one.right] == ["vectorized float32 x2"]


@pytest.mark.usefixtures("quick")
def test_what_scalar_would_take_minutes_for_is_held_to_it_on_a_few_tokens(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "SCALAR_WORK", 8 * 352)  # tokens, parameters
    contestants = bench.bench(config, [3], rounds=1)
    assert {one.name for one in contestants} == {"vectorized"}
    assert all(one.right for one in contestants)

    judges: dict[str, list[Docs]] = {"scalar": [], "vectorized": []}

    def watched(backend: Any, name: str) -> None:
        forward = backend.forward
        backend.forward = lambda docs: judges[name].append(docs) or forward(docs)

    change_backends(monkeypatch, judge=watched)
    bench.bench(config, [3], rounds=1)
    assert all(sum(len(doc) - 1 for doc in docs) <= 8 for docs in judges["scalar"])
    assert len(judges["scalar"]) == 2
    assert [len(docs) for docs in judges["vectorized"]] == [3] * 2 * len(contestants[0].batches)


@pytest.mark.usefixtures("quick")
def test_a_contestant_that_skips_what_scalar_does_not_see_is_wrong(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def first_two(backend: Any, _: str) -> None:
        forward = backend.forward
        backend.forward = lambda docs: forward(docs[:2])

    monkeypatch.setattr(bench, "SCALAR_WORK", 8 * 352)
    change_backends(monkeypatch, contestant=first_two)
    contestants = bench.bench(config, [3], rounds=1)
    assert not any(one.right for one in contestants)


@pytest.mark.usefixtures("quick")
def test_a_contestant_that_is_right_on_the_first_batch_only_is_wrong(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def remembers(backend: Any, _: str) -> None:
        forward, first = backend.forward, []
        backend.forward = lambda docs: first.append(docs) or forward(first[0])

    def tires(backend: Any, _: str) -> None:
        update = backend.update
        backend.update = lambda lr_t: update(lr_t) if backend.updates < 9 else None

    with monkeypatch.context() as patch:
        change_backends(patch, contestant=remembers)
        contestants = bench.bench(config, [1, 3], rounds=1)
    assert [one.right for one in contestants] == [True, False, False, False, False]
    change_backends(monkeypatch, contestant=tires)
    contestants = bench.bench(config, [1], rounds=9)
    assert [one.right for one in contestants] == [True, False, False]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", ["wte", "layer0.mlp_fc2"])
def test_what_is_no_number_is_infinitely_far_off(config: Config, name: str) -> None:
    (one,) = bench.bench(config, [3], rounds=1, dtypes=["float64"])[1:]
    grads = one.backend.grads
    one.backend.grads = lambda: {**grads(), name: grads()[name] * math.nan}
    assert bench.difference(one) == math.inf


@pytest.mark.parametrize("init_std", ["5.0", "1.0e+200"])
def test_a_model_that_cannot_be_trained_is_refused(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str], init_std: str
) -> None:
    file = tmp_path / "wild.yaml"
    file.write_text(f"dataset: {config.dataset}\ninit_std: {init_std}\n", encoding="utf-8")
    assert main(["bench", "--config", str(file), "--batch-size", "3", "--cores", "1"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot be trained: " in line
    assert f"a smaller init_std than {float(init_std)}" in line


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("kinks", "right"), [(1, True), (2, False)])
def test_a_wrong_step_may_be_repeated_once(config: Config, kinks: int, right: bool) -> None:
    (one,) = bench.bench(config, [3], rounds=1, dtypes=["float32"])[1:]
    forward, tries = one.backend.forward, []

    def at_a_kink(docs: Docs) -> float:
        tries.extend([docs] * (docs is one.batches[2]))
        return float(forward(docs) * (1.002 if docs in tries and len(tries) <= kinks else 1))

    one.backend.forward = at_a_kink
    assert (bench.difference(one) <= one.allowed) == right
    assert len(tries) == 2


def test_steps_are_whole_taken_in_turn_and_divided_by_their_number(
    monkeypatch: pytest.MonkeyPatch, config: Config
) -> None:
    clock = count()
    monkeypatch.setattr(bench, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(bench, "ROUND_SECONDS", 1.5)  # three steps of half a second
    did: list[str] = []

    def contestant(name: str) -> bench.Contestant:
        backend: Any = SimpleNamespace(
            forward=lambda docs: did.append(f"{name} forward"),
            backward=lambda: did.append(f"{name} backward"),
            update=lambda lr_t: did.append(f"{name} update"),
        )
        return bench.Contestant(name, replace(config, batch_size=2), backend, [[[0, 1], [0, 2, 1]]])

    contestants = [contestant("one"), contestant("other")]
    bench.take_turns(contestants, rounds=2)
    steps = [
        [f"{name} {part}" for part in ("forward", "backward", "update")] * 3
        for name in ("one", "other")
    ]
    assert did == (steps[0] + steps[1]) * 3  # the first to warm up, and to time a step
    assert [one.seconds for one in contestants] == [[1 / 3, 1 / 3]] * 2
    contestants[0].seconds = [0.001, 0.002, 0.003]
    row = bench.table(contestants[:1]).splitlines()[1]
    assert row.split() == [
        "one",
        "float64",
        "2",
        "2,000.0",
        "100%",
        "1,000.00",
        "666.67",
        "-",
        "0e+00",
    ]
    contestants[1] = replace(contestants[1], name="scalar", seconds=[0.04, 0.01, 0.01])
    rows = [row.split() for row in bench.table(contestants).splitlines()[1:]]
    assert [row[-2] for row in rows] == ["10.00", "2.00"]  # per document of a batch of two
    contestants[1].seconds = [0.45004144] * 3
    assert max(map(len, bench.table(contestants).splitlines())) <= 80
    contestants[0].difference = 2e-9
    row = bench.table(contestants[:1]).splitlines()[1]
    assert row.split() == ["one", "float64", "2", "WRONG", *"----", "2e-09"]


@pytest.mark.usefixtures("quick")
def test_the_command_reports_for_other_programs(
    config: Config,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in os.environ:
        if name.startswith(bench.STEERING) and name != "OPENBLAS_NUM_THREADS":
            monkeypatch.delenv(name)
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    file = tmp_path / "small.yaml"
    file.write_text(f"n_embd: 4\nn_head: 2\ndataset: {config.dataset}\n", encoding="utf-8")
    assert (
        main(["bench", "--config", str(file), "--batch-size", "2", "--cores", str(RANKS), "--json"])
        == 0
    )
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert {one["batch_size"] for one in report["results"]} == {1, 2}
    assert all(one["right"] for one in report["results"])
    assert report["machine"]["numpy"]
    assert report["machine"]["environment"] == "OPENBLAS_CORETYPE=Haswell"
    assert {one["cores"] for one in report["results"]} == {1, RANKS}
    assert main(["bench", "--batch-size", "0"]) == 2
    assert main(["bench", "--cores", "0"]) == 2
    assert main(["bench", "--cores", "3", "--batch-size", "2"]) == 2
    assert main(["bench", "--against", "abacus", "--batch-size", "1"]) == 2
    assert "abacus" in capsys.readouterr().err


def program(path: Path, losses: list[float], last: str = "") -> Path:
    """A program that prints these losses in the form of the original."""
    path.write_text(
        "documents = open('input.txt', encoding='utf-8').read().split('\\n')\n"
        "print('num docs:', len(documents))\n"
        f"for step, loss in enumerate({losses}):\n"
        "    open('did', 'a').write('x')\n"
        "    print(f'step {step + 1:4d} / 1000 | loss {loss:.4f}', end='\\r')\n"
        f"{last}\n",
        encoding="utf-8",
    )
    return path


@pytest.mark.usefixtures("quick")
def test_a_program_is_held_to_the_losses_that_it_prints(
    tmp_path: Path, golden: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    processes = []
    begin = subprocess.Popen.__init__

    def noted(self: Any, *arguments: Any, **options: Any) -> None:
        begin(self, *arguments, **options)
        processes.append((self, options["cwd"]))

    monkeypatch.setattr(subprocess.Popen, "__init__", noted)
    right = program(tmp_path / "right.py", golden["loss"][:20])
    wrong = program(tmp_path / "wrong.py", [*golden["loss"][:5], golden["loss"][5] * 1.001] * 2)
    contestants = bench.bench(load_config(), [], [str(right), str(wrong)], rounds=5)
    assert [one.name for one in contestants] == ["scalar", "right.py", "wrong.py"]
    assert [one.right for one in contestants] == [True, True, False]
    assert [len(one.backend.losses) for one in contestants[1:]] == [9, 9]  # 2 + 2 + 5
    assert 0 < contestants[1].difference < 5e-5
    assert all(process.poll() is None for process, _ in processes)
    time.sleep(0.1)  # the programs stand still meanwhile
    assert [len(Path(folder, "did").read_text()) for _, folder in processes] == [9, 9]
    del contestants
    assert len(processes) == 2
    for process, folder in processes:
        assert process.poll() is not None
        assert not Path(folder).exists()


@pytest.mark.parametrize(
    ("losses", "last", "message"),
    [
        ([3.3, 3.2], "print('no more')", "has ended after 2 steps; the last that it said: no more"),
        (
            [],
            "raise OSError('no disk')",
            "has ended after 0 steps; the last that it said: OSError: no",
        ),
        (None, "", "there is no such file"),
    ],
)
def test_a_program_that_does_not_train_is_refused(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    losses: list[float] | None,
    last: str,
    message: str,
) -> None:
    file = tmp_path / "program.py"
    if losses is not None:
        program(file, losses, last)
    assert main(["bench", "--batch-size", "1", "--against", str(file)]) == 2
    assert f"--against {file}: {message}" in capsys.readouterr().err
