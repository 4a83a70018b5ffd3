"""The lines that a run prints in training, and its advice when it diverges."""

from __future__ import annotations

import io
import json
import re
import shlex
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
from faults import metrics_of, microgpt

from microgpt.cli import report
from microgpt.cli.report import Evaluating, Progress
from microgpt.config import FIELDS, Config
from microgpt.errors import MicrogptError
from microgpt.runs.checkpoint import load_checkpoint
from microgpt.settings import flag, load_config
from microgpt.train import RESUMABLE, USUAL, suspect


@pytest.fixture
def start(tiny: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command line of a small run, in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    return ["train", *(word for name, text in tiny.items() for word in (flag(name), text))]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def steps_in(lines: str) -> list[int]:
    return [int(step) for step in re.findall(r"step +(\d+) / \d+ \| loss", lines)]


# how it goes


def test_a_slow_run_in_a_pipe_says_something_every_ten_seconds(
    capsys: pytest.CaptureFixture[str],
) -> None:
    now = 0.0
    with patch.object(report, "perf_counter", lambda: now):
        progress = Progress(0, 200_000)
        for step in range(1, 41):
            now += 4
            progress.update(step, 1.0, 4.0)
    assert steps_in(capsys.readouterr().out) == [1, *range(4, 41, 3)]


def test_lines_to_a_pipe_are_sent_on_within_a_second() -> None:
    now, sent = 0.0, io.BytesIO()
    pipe = io.TextIOWrapper(io.BufferedWriter(sent), encoding="ascii")  # type: ignore[arg-type]
    with patch.object(report, "perf_counter", lambda: now), patch.object(sys, "stdout", pipe):
        progress = Progress(0, 1000)
        progress.update(1, 1.0, 0.1)
        assert sent.getvalue() == b""
        now = 1.1
        progress.update(2, 1.0, 0.1)
    assert b"step    1 / 1000 | loss 1.0000" in sent.getvalue()


@pytest.mark.parametrize("stdout", [io.StringIO, Terminal])
def test_log_every_asks_for_lines_also_above_a_bar(
    stdout: type[io.StringIO], start: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", stdout())
    assert microgpt(*start, "--log-every", 5) == 0
    assert steps_in(sys.stdout.getvalue()) == [1, 5, 10, 12]  # type: ignore[attr-defined]


@pytest.mark.parametrize("stdout", [io.StringIO, Terminal])
def test_quiet_says_nothing_but_where_everything_is(
    stdout: type[io.StringIO], start: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", stdout())
    assert microgpt(*start, "--quiet", "--held-out", 2, "--eval-every", 4, "--out", "run") == 0
    assert sys.stdout.getvalue() == "everything is in run\n"  # type: ignore[attr-defined]
    assert len(Path("run", "samples.txt").read_text(encoding="utf-8").splitlines()) == 6


def test_a_bar_has_the_rate_and_the_time_that_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", Terminal())
    now = 0.0
    monkeypatch.setattr(report, "perf_counter", lambda: now)
    progress = Progress(0, 10)
    for step in range(1, 6):
        now += 0.2
        progress.update(step, 2.5, 0.1)
    progress.bar.refresh()
    progress.close()
    assert re.search(r"5/10 \[\d\d:\d\d<\d\d:\d\d, .*step.*loss 2\.5000\]", sys.stdout.getvalue())


@pytest.mark.parametrize("slow", [True, False])
def test_an_evaluation_shows_its_progress(slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(report, "perf_counter", lambda: now)
    for stderr, shown in ((Terminal(), "200/300"), (io.StringIO(), "200 of 300 documents\n")):
        monkeypatch.setattr(sys, "stderr", stderr)
        evaluating = Evaluating(300)
        now += 11 if slow else 0
        evaluating.update(200)
        if evaluating.bar is not None:
            evaluating.bar.refresh()
        evaluating.close()
        assert (shown in stderr.getvalue()) == (slow or isinstance(stderr, Terminal))


# what is held out


def test_the_loss_of_what_is_held_out_is_told_kept_and_the_best_is_said(
    start: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    begin = [*start, "--held-out", 3, "--eval-every", 4, "--learning-rate", "0.5"]
    assert microgpt(*begin, "--out", "run") == 0
    printed = capsys.readouterr().out
    first, *_ = printed.splitlines()
    assert first.startswith("documents 6, 3 held out | vocabulary ")
    told = re.findall(r"step +(\d+) / 12 \| held out (\S+)\n", printed)
    kept = {line["step"]: line["held_out"] for line in metrics_of("run") if "held_out" in line}
    assert told == [(str(step), f"{loss:.4f}") for step, loss in kept.items()]
    assert list(kept) == [4, 8, 12]
    step = min(kept, key=kept.__getitem__)
    assert step != 12
    assert (
        f"loss {kept[12]:.4f} on 3 documents kept from training,"
        f" best {kept[step]:.4f} at step {step}\n" in printed
    )


def test_measuring_changes_nothing_else_and_the_best_is_known_after_a_resume(
    start: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    begin = [*start, "--held-out", "3", "--learning-rate", "0.5"]
    assert microgpt(*begin, "--out", "unmeasured") == 0
    assert microgpt(*begin, "--eval-every", 4, "--steps", 12, "--out", "run") == 0
    capsys.readouterr()
    for line, measured in zip(metrics_of("unmeasured"), metrics_of("run")):
        assert line == {key: measured[key] for key in line}
    kept = [line["held_out"] for line in metrics_of("run") if "held_out" in line]
    assert microgpt("train", "--resume", "--out", "run", "--steps", 13) == 0
    (last, best) = re.findall(r"loss (\S+) on 3 .*, best (\S+) at step", capsys.readouterr().out)[0]
    assert float(best) == round(min(*kept, float(last)), 4)
    assert float(best) < float(last) or float(last) < min(kept)


def test_what_is_measured_at_the_end_is_kept_and_told_as_the_meaning(
    start: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert microgpt(*start, "--held-out", 1, "--out", "run") == 0
    (last,) = [line for line in metrics_of("run") if "held_out" in line]
    loss = last["held_out"]
    printed = capsys.readouterr().out
    assert last["step"] == 12
    said = report.meaning(loss, load_checkpoint(Path("run")).tokenizer.vocab_size)
    assert f"loss {loss:.4f} on 1 document kept from training\n{said}\n" in printed
    assert microgpt("report", "run", "--out", "page.html") == 0
    page = Path("page.html").read_text(encoding="utf-8")
    assert f">{loss:.4f}</td>" in page
    assert said in page
    assert microgpt("train", "--resume", "--out", "run", "--steps", 14) == 0
    assert [line["step"] for line in metrics_of("run") if "held_out" in line] == [12, 14]


def test_what_was_measured_after_the_last_step_is_not_measured_again(start: list[str]) -> None:
    with patch("microgpt.evaluate.evaluation", side_effect=AssertionError("again")):
        assert microgpt(*start, "--held-out", 3, "--eval-every", 4, "--out", "run") == 0


def test_what_is_held_out_may_have_no_finite_loss(start: list[str]) -> None:
    inf = {"side_effect": FloatingPointError("inf")}
    with patch("microgpt.train.evaluation", **inf), patch("microgpt.evaluate.evaluation", **inf):
        assert microgpt(*start, "--held-out", 3, "--eval-every", 4, "--out", "run") == 0
    assert not any("held_out" in line for line in metrics_of("run"))


def test_eval_measures_what_was_held_out_unless_told_otherwise(
    start: list[str], words: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert microgpt(*start, "--held-out", 3, "--out", "run") == 0
    (told,) = re.findall(r"loss (\S+) on 3 documents kept from", capsys.readouterr().out)
    found = {}
    for part, documents in (("held-out", 3), ("training", 6), ("all", 9)):
        assert microgpt("eval", "run", "--json", "--part", part) == 0
        said = json.loads(capsys.readouterr().out)
        assert (said["part"], said["documents"], said["kind"]) == (part, documents, "lines")
        assert said["by_position"][0]["documents"] == documents
        found[part] = said["loss"]
    assert f"{found['held-out']:.4f}" == told
    assert 3 * found["held-out"] + 6 * found["training"] == pytest.approx(9 * found["all"])
    for more, first in (
        ([], "words.txt, held out of training: 3 documents"),
        (["--dataset", words], "words.txt, all: 9 documents"),
    ):
        assert microgpt("eval", "run", *more) == 0
        assert capsys.readouterr().out.splitlines()[0] == first


def test_what_was_held_out_of_a_data_set_that_changed_is_not_known(
    start: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    own = Path("own.txt")
    own.write_text("emma\nana\nmia\n", encoding="utf-8")
    assert microgpt(*start, "--held-out", 1, "--dataset", own, "--out", "run") == 0
    own.write_text("emma\nana\nmm\n", encoding="utf-8")
    assert microgpt("eval", "run") == 2
    assert "has changed since the model was trained" in capsys.readouterr().err
    assert microgpt("eval", "run", "--part", "all") == 0


# divergence


@pytest.mark.parametrize(
    ("changes", "option"),
    [
        ({}, "learning_rate 0.001"),
        ({"learning_rate": "1e300"}, "learning_rate 0.01"),
        ({"learning_rate": "0.5"}, "learning_rate 0.01"),
        ({"weight_decay": "1000"}, "weight_decay 0.1"),
        ({"adam_eps": "1e-60"}, "adam_eps 1e-08"),
        ({"norm_eps": "1e-200"}, "norm_eps 1e-05"),
        ({"learning_rate": "1e-4", "adam_eps": "1e-9"}, "learning_rate 1e-05"),
        ({"init_std": "1e100"}, "init_std 0.08"),
    ],
)
def test_the_option_that_is_farthest_from_the_usual_is_the_suspect(
    changes: dict[str, str], option: str
) -> None:
    name, _, better = suspect(load_config(overrides=changes), 5)
    assert f"{name} {better:g}" == option


def test_before_the_first_update_the_initial_weights_are_the_suspect() -> None:
    config = load_config(overrides={"init_std": "50", "learning_rate": "1e300"})
    assert suspect(config, 0) == ("init_std", 1, 0.08)
    assert suspect(load_config(overrides={"norm_eps": "1e-200"}), 0)[0] == "norm_eps"


def test_a_suspect_is_a_number_of_the_configuration() -> None:
    assert all(FIELDS[name].type == "float" for name in USUAL)


@pytest.mark.parametrize(
    "cause",
    [["--learning-rate", "1e300"], ["--weight-decay", "1e200"],
     ["--adam-eps", "1e-60", "--dtype", "float32", "--learning-rate", "0.01"]],
)  # fmt: skip
def test_the_command_that_is_advised_goes_on_to_the_end(
    cause: list[str], start: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert microgpt(*start, *cause, "--out", "run") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f" {cause[0]} than {float(cause[1]):g}, such as " in line
    command = line.partition("go on with: microgpt ")[2]
    assert cause[0] in command
    assert cause[0][2:].replace("-", "_") in RESUMABLE
    assert microgpt(*shlex.split(command)) == 0


def test_initial_weights_that_are_too_large_are_no_reason_to_go_on(
    tiny_config: Config, start: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert microgpt(*start, "--init-std", "1e154", "--out", "run") == 2
    line = capsys.readouterr().err.rstrip()
    assert line.endswith("try a smaller --init-std than 1e+154, such as 0.08")


@pytest.mark.parametrize("cause", [["--init-std", "1e154"], ["--learning-rate", "1e300"]])
def test_a_run_that_failed_leaves_no_numbered_directory(
    cause: list[str], start: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert microgpt(*start, *cause) == 2
    assert "--resume" not in capsys.readouterr().err
    assert list(Path().iterdir()) == []
    assert microgpt(*start, *cause, "--checkpoint-every", 1, "--out", "named") == 2
    assert Path("named").is_dir()


def test_what_others_put_into_a_numbered_directory_stays(start: list[str]) -> None:
    (Path("runs") / "microgpt").mkdir(parents=True)
    notes = Path("runs", "microgpt", "notes.txt")
    notes.write_text("precious", encoding="utf-8")
    assert microgpt(*start, "--init-std", "1e154") == 2
    assert list(Path("runs", "microgpt").iterdir()) == [notes]


def test_a_numbered_run_that_has_a_checkpoint_to_go_on_from_stays(start: list[str]) -> None:
    full = MicrogptError("the disk is full")
    with patch("microgpt.train.batch", side_effect=[[[0, 0]], [[0, 0]], full]):
        assert microgpt(*start, "--checkpoint-every", 2) == 2
    assert load_checkpoint(Path("runs", "microgpt")).state.updates == 2
    assert len(metrics_of("runs/microgpt")) == 2
