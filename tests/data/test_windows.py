"""A text in windows: which windows training sees, which are held out, and in which order."""

from __future__ import annotations

import re
from pathlib import Path
from random import Random

import faults
import numpy as np
import pytest
from faults import metrics_of, microgpt
from hypothesis import given
from hypothesis import strategies as st

from microgpt.backend import BACKENDS
from microgpt.cli.report import DASHES
from microgpt.data import EMBEDDED, cropped, load_documents, parts
from microgpt.errors import MicrogptError
from microgpt.runs.checkpoint import load_checkpoint
from microgpt.settings import load_config
from microgpt.tokenizer import build_tokenizer
from microgpt.train import batch
from microgpt.windows import Windows, cut

TEXT = "It is a truth\nuniversally acknowledged,\n\nthat a single man.\n"
SMALL = "--n-embd 4 --n-head 2 --block-size 5 --init-std 0.5 --learning-rate 0.05 --batch-size 2"
WINDOWED = [*SMALL.split(), "--documents", "windows", "--num-samples", "3", "--temperature", "1"]


@pytest.fixture
def book(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A book of sixty characters, in the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path / "book.txt"


# which windows


def test_a_preset_learns_a_book_in_windows() -> None:
    config = load_config("text")
    training, held_out = parts(load_documents(config.dataset, config.documents), config)
    assert isinstance(training, Windows)
    assert 0.09 < len(held_out) / (len(held_out) + training.per_epoch) < 0.11
    assert config.steps * config.batch_size > 20 * training.per_epoch


@given(length=st.integers(1, 60), n=st.integers(1, 12), epoch=st.integers(0, 3))
def test_the_windows_of_an_epoch_stand_side_by_side_each_once(
    length: int, n: int, epoch: int
) -> None:
    text = "".join(map(chr, range(200, 200 + max(n, length))))  # every character once
    windows = Windows(text, n, seed=1)
    seen = [windows[epoch * windows.per_epoch + i] for i in range(windows.per_epoch)]
    joined = "".join(sorted(seen))
    assert {len(window) for window in seen} == {n}
    assert joined in text
    assert len(joined) > len(text) - 2 * n


@pytest.mark.quick
def test_every_epoch_cuts_elsewhere_and_in_another_order_and_all_is_seen() -> None:
    windows = Windows(TEXT, 5, seed=1)
    n = windows.per_epoch
    epochs = [[windows[epoch * n + i] for i in range(n)] for epoch in range(50)]
    assert len({tuple(epoch) for epoch in epochs}) == 50
    assert len({frozenset(epoch) for epoch in epochs}) > 5
    assert {window for epoch in epochs for window in epoch} >= {TEXT[:5], TEXT[-5:]}


def test_which_window_comes_when_follows_from_the_seed_and_its_number_alone() -> None:
    forward, backward, other = Windows(TEXT, 5, 1), Windows(TEXT, 5, 1), Windows(TEXT, 5, 2)
    numbers = range(100)
    expected = [forward[i] for i in numbers]
    assert [backward[i] for i in reversed(numbers)] == expected[::-1]
    assert [other[i] for i in numbers] != expected


@pytest.mark.quick
def test_the_windows_of_a_seed_are_these() -> None:
    windows = Windows(TEXT, 5, seed=42)
    assert [windows[i] for i in (0, 1, 2, windows.per_epoch)] == GOLDEN


GOLDEN = [" a si", " a tr", "ged,\n", "ed,\n\n"]


@pytest.mark.quick
@pytest.mark.parametrize("preset", ["microgpt", "microgpt-243"])
def test_a_window_fills_the_context_and_has_no_closing_token(preset: str) -> None:
    config = load_config(preset, {"documents": "windows", "block_size": "5", "batch_size": "3"})
    tokenizer = build_tokenizer(TEXT, config)
    windows = Windows(TEXT, config.window, config.seed)
    docs = batch(7, windows, tokenizer, config)
    assert [tokenizer.decode(doc[1:]) for doc in docs] == [windows[i] for i in (21, 22, 23)]
    assert {(doc[0], len(doc)) for doc in docs} == {(tokenizer.bos, config.max_tokens)}


@pytest.mark.quick
def test_what_is_held_out_is_the_end_of_the_text_and_never_trained_on() -> None:
    config = load_config(overrides={"documents": "windows", "block_size": "5", "held_out": "3"})
    training, held_out = parts([TEXT], config)
    assert isinstance(training, Windows)
    assert training.text + "".join(held_out) == TEXT
    assert [len(window) for window in held_out] == [5, 5, 5]


def test_what_does_not_fill_a_window_is_left_over() -> None:
    assert cut("abcdefgh", 3) == ["abc", "def"]
    assert cut("ab", 3) == []


@pytest.mark.parametrize(("held_out", "block_size"), [("12", "5"), ("0", "61"), ("1", "31")])
def test_a_text_without_a_window_to_train_on_is_refused(held_out: str, block_size: str) -> None:
    sizes = {"documents": "windows", "block_size": block_size, "held_out": held_out}
    with pytest.raises(MicrogptError, match=r"none would be left|fewer than a window"):
        parts([TEXT], load_config(overrides=sizes))


def test_a_text_is_read_whole_with_its_lines_and_blanks(tmp_path: Path) -> None:
    file = tmp_path / "poem.txt"
    file.write_bytes(b"\xef\xbb\xbf  One \r\n\r\nTwo\r\n")
    assert load_documents(str(file), "windows") == ["  One \n\nTwo\n"]
    file.write_bytes(b" \n\n")
    with pytest.raises(MicrogptError, match="there is no text in it"):
        load_documents(str(file), "windows")


def test_what_is_embedded_is_small_and_ascii() -> None:
    contents = [path.read_bytes() for path in EMBEDDED.values()]
    assert sum(map(len, contents)) < 300_000
    assert all(content.isascii() for content in contents)


# runs


def test_both_backends_learn_the_same_windows(book: Path) -> None:
    for backend in BACKENDS:
        flags = [*WINDOWED, "--dataset", book, "--steps", 15, "--held-out", 2, "--eval-every", 5]
        assert microgpt("train", *flags, "--backend", backend, "--out", backend) == 0
    scalar, vectorized = map(metrics_of, BACKENDS)
    assert [sorted(line) for line in scalar] == [sorted(line) for line in vectorized]
    for key in ("loss", "held_out"):
        ours, theirs = ([x[key] for x in lines if key in x] for lines in (scalar, vectorized))
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)
    assert (
        Path("scalar", "samples.txt").read_bytes() == Path("vectorized", "samples.txt").read_bytes()
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_run_on_windows_that_was_interrupted_goes_on_bit_for_bit(
    backend: str, book: Path
) -> None:
    flags = [*WINDOWED, "--dataset", str(book), "--backend", backend, "--held-out", "2"]
    start = ["train", *flags, "--steps", "23", "--eval-every", "4"]  # in epochs of nine windows
    assert faults.quiet([*start, "--out", "whole"]) == (0, "")
    faults.stop_after(7, [*start, "--out", "run"])
    faults.stop_after(16, ["train", "--resume", "--out", "run", "--backend", backend])
    assert faults.quiet(["train", "--resume", "--out", "run", "--backend", backend]) == (0, "")
    assert faults.differences(Path("run"), Path("whole")) == []
    assert metrics_of("run") == metrics_of("whole")


def test_a_text_that_changed_is_not_gone_on_with(
    book: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    faults.stop_after(2, ["train", *WINDOWED, "--dataset", str(book), "--out", "run"])
    book.write_text(TEXT.replace("truth", "Truth"), encoding="utf-8")
    assert microgpt("train", "--resume", "--out", "run") == 2
    assert "has changed since the run in run began" in capsys.readouterr().err


def test_a_model_of_windows_writes_lines(book: Path, capsys: pytest.CaptureFixture[str]) -> None:
    book.write_text("\na\n" * 40, encoding="utf-8")
    assert microgpt("train", *WINDOWED, "--dataset", book, "--steps", 30, "--out", "run") == 0
    assert re.search(r"sample  1:\n(.*\n){2,}sample  2:\n", capsys.readouterr().out)
    assert "\n" in load_checkpoint(Path("run")).tokenizer.chars
    assert microgpt("sample", "run", "--num", 3, "--prompt", "a\n") == 0
    printed = capsys.readouterr().out
    samples = printed.split(f"{DASHES}\n")
    assert len(samples) == 3
    assert all(sample.startswith("a\n") for sample in samples)
    assert Path("run", "samples.txt").read_text(encoding="utf-8").count(f"{DASHES}\n") == 2


def test_eval_measures_the_windows_that_were_held_out(
    book: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*WINDOWED, "--dataset", book, "--steps", 4, "--held-out", 3]
    assert microgpt("train", *flags, "--out", "run") == 0
    (told,) = re.findall(r"loss (\S+) on 3 windows kept from", capsys.readouterr().out)
    for more, part, windows in (
        ([], "held out of training", 3),
        (["--part", "training"], "without what is held out", len(cut(TEXT, 5)) - 3),
        (["--part", "all"], "all", len(cut(TEXT, 5))),
        (["--dataset", book], "all", len(cut(TEXT, 5))),
    ):
        assert microgpt("eval", "run", *more) == 0
        first, *_, last, _ = capsys.readouterr().out.splitlines()
        assert first == f"book.txt, {part}: {windows} windows"
        assert f"mean over {windows} windows;" in last
        assert last.startswith(f"loss {told},") == (part == "held out of training")


# lines about documents longer than the context

HINT = "to learn all of it: --documents windows"


def test_how_much_of_a_text_is_seen_is_said(book: Path, capsys: pytest.CaptureFixture[str]) -> None:
    book.write_text("x" * 1_600_000, encoding="utf-8")
    flags = ["--n-embd", 4, "--steps", 1, "--num-samples", 0, "--dataset", book]
    assert microgpt("train", *flags) == 0
    assert capsys.readouterr().out.splitlines()[1:3] == [
        "1 of 1 documents is longer than the context: 0.001 % of the text is seen",
        HINT,
    ]


def test_windows_are_counted_by_what_they_are_for(
    book: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--block-size", 20, "--held-out", 1, "--dataset", book, "--steps", 1]
    book.write_text("abcdefghij" * 6, encoding="utf-8")
    assert microgpt("train", *WINDOWED, *sizes) == 0
    assert capsys.readouterr().out.startswith(
        "1 window of 20 characters to train on, 1 more held out | vocabulary 11"
    )


@pytest.mark.parametrize(
    ("documents", "said"),
    [
        (["abcd", "a"], []),
        (["abcde", "abcd"], ["1 of 2 documents is longer than the context: 88.9 % of"]),
        (
            ["abcdefg", "abcde", "a"],
            ["2 of 3 documents are longer than the context: 69.2 % of", HINT],
        ),
        (
            ["abcde" * 2, "abcdef", "a", "b"],
            ["2 of 4 documents are longer than the context: 55.6 % of"],
        ),
        (["abcde"] + ["a"] * 9999, ["1 of 10,000 documents is longer than the context: 99.9 % of"]),
    ],
)
def test_documents_longer_than_the_context_are_counted(
    documents: list[str], said: list[str]
) -> None:
    assert [line.removesuffix(" the text is seen") for line in cropped(documents, 4)] == said


def test_shuffling_a_text_draws_nothing() -> None:
    rng, untouched = Random(42), Random(42)
    rng.shuffle([TEXT])
    assert rng.getstate() == untouched.getstate()
