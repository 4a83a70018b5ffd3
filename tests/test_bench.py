"""The benchmark is honest: beside every speed stands whether the answer is right."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from microgpt import bench
from microgpt.backend import Docs
from microgpt.cli import main
from microgpt.config import Config, load_config
from vectorized.backend import Backend


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A small model on a small data set."""
    words = tmp_path / "words.txt"
    words.write_text("\n".join(["emma", "noah", "al", "isabella", "jo"]), encoding="utf-8")
    return load_config(overrides={"n_embd": "4", "n_head": "2", "dataset": str(words)})


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """One round, no longer than it must be."""
    monkeypatch.setattr(bench, "ROUND_SECONDS", 0.0)


@pytest.mark.usefixtures("quick")
def test_all_contestants_are_timed_and_right(config: Config) -> None:
    contestants = bench.bench(config, [1, 3], cores=2, rounds=2)
    assert [(one.label, one.config.batch_size) for one in contestants] == [
        ("scalar float64", 1),
        ("vectorized float64", 1),
        ("vectorized float32", 1),
        ("vectorized float64", 3),
        ("vectorized float32", 3),
        ("vectorized float32 x2", 3),
    ]
    assert all(len(one.seconds) == 2 and min(one.seconds) > 0 for one in contestants)
    assert all(one.right for one in contestants)
    assert contestants[0].difference == 0
    assert 0 < contestants[3].difference < 1e-13 < contestants[4].difference < 1e-4
    assert max(map(len, bench.table(contestants).splitlines())) <= 80


@pytest.mark.usefixtures("quick")
def test_whoever_skips_work_is_wrong(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Backend.forward

    def half(self: Backend, docs: Docs) -> float:
        return forward(self, docs[: (len(docs) + 1) // 2])

    monkeypatch.setattr(Backend, "forward", half)
    contestants = bench.bench(config, [3], rounds=1)
    assert not any(one.right for one in contestants[1:])
    assert bench.table(contestants).count("WRONG") == 2


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("skipped", ["loss", "update"])
def test_whoever_skips_the_loss_or_the_update_is_wrong(
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
def test_whoever_does_not_wait_for_the_others_is_wrong(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Backend, "backward", lambda self: self.worker.backward())
    contestants = bench.bench(config, [3], cores=2, rounds=1)
    assert [one.label for one in contestants if not one.right] == ["vectorized float32 x2"]


@pytest.mark.usefixtures("quick")
def test_what_scalar_would_take_minutes_for_is_held_to_it_on_a_few_tokens(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "SCALAR_WORK", 8 * 352)  # tokens, parameters
    contestants = bench.bench(config, [3], cores=2, rounds=1)
    assert {one.name for one in contestants} == {"vectorized"}
    assert all(one.right for one in contestants)

    few, whole = [], []
    scalar_step, whole_step = bench._scalar_step, bench._whole_step
    monkeypatch.setattr(
        bench, "_scalar_step", lambda c, s, docs, g: few.append(docs) or scalar_step(c, s, docs, g)
    )
    monkeypatch.setattr(
        bench, "_whole_step", lambda c, s, docs, g: whole.append(docs) or whole_step(c, s, docs, g)
    )
    bench.bench(config, [3], rounds=1)
    assert all(sum(len(doc) - 1 for doc in docs) <= 8 for docs in few)
    assert [len(docs) for docs in whole] == [3, 3]


@pytest.mark.usefixtures("quick")
def test_the_command_reports_for_other_programs(
    config: Config,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in os.environ:
        if bench._steers(name):
            monkeypatch.delenv(name)
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    file = tmp_path / "small.yaml"
    file.write_text(f"n_embd: 4\nn_head: 2\ndataset: {config.dataset}\n", encoding="utf-8")
    assert (
        main(["bench", "--config", str(file), "--batch-size", "2", "--cores", "2", "--json"]) == 0
    )
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert {one["batch_size"] for one in report["results"]} == {1, 2}
    assert all(one["right"] for one in report["results"])
    assert report["machine"]["numpy"]
    assert report["machine"]["environment"] == "OPENBLAS_CORETYPE=Haswell"
    assert {one["cores"] for one in report["results"]} == {1, 2}
    assert main(["bench", "--batch-size", "0"]) == 2
    assert main(["bench", "--cores", "0"]) == 2
    assert main(["bench", "--cores", "3", "--batch-size", "2"]) == 2
    assert main(["bench", "--against", "abacus", "--batch-size", "1"]) == 2
    assert "abacus" in capsys.readouterr().err
