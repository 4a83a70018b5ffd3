"""Untrusted input: files made to mislead are refused in one line, before any harm."""

from __future__ import annotations

import gc
import json
import os
import re
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from time import process_time
from typing import Any

import numpy as np
import pytest
from mutations import made_up
from safetensors.numpy import save_file

from crosscheck.__main__ import main as crosscheck
from crosscheck.cases import CASES, load_case, read_case
from crosscheck.trace import trace
from crosscheck.traces import load_trace, save_trace
from microgpt import data
from microgpt.backend import BACKENDS, fresh_state, load_backend
from microgpt.cli.commands import main as microgpt
from microgpt.config import Config
from microgpt.data import load_documents
from microgpt.errors import MicrogptError
from microgpt.evaluate import evaluation
from microgpt.gpt import GPT
from microgpt.init import init_params
from microgpt.runs import memory
from microgpt.runs.checkpoint import Checkpoint, load_checkpoint, load_params, save_checkpoint
from microgpt.settings import load_config
from microgpt.tokenizer import build_tokenizer

Edit = Callable[[Any, Any], object]  # of tensors and metadata
Rewrite = Callable[[Path, Path, Edit], None]

SECONDS = 3.0  # of this process's own time, that any refusal may take
ROOT = Path(__file__).resolve().parents[2]


def refusal(read: Callable[[], object]) -> str:
    """The one line of the error with which `read` refuses its input in time."""
    start = process_time()
    with pytest.raises(MicrogptError) as refused:
        read()
    assert process_time() - start < SECONDS
    message = str(refused.value)
    assert "\n" not in message
    assert len(message) < 1000
    return message


def test_mutated_files_are_refused_or_loaded() -> None:
    """The short form of `python -m tests.faults mutations`, in a process whose memory is bound."""
    command = "from tests.mutations import main; raise SystemExit(main(600, seed=11))"
    done = subprocess.run(
        [sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("600 mutated files: ")
    assert done.stdout.endswith(" loaded, 0 tracebacks\n")
    assert " 0 loaded" not in done.stdout
    assert " 0 refused" not in done.stdout


# Checkpoints


@pytest.fixture(scope="module")
def whole(tiny_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint to damage."""
    file = tmp_path_factory.mktemp("whole") / "checkpoint.safetensors"
    tokenizer, rng = build_tokenizer("ab", tiny_config), Random(5)
    state = made_up(tiny_config, tokenizer, rng)
    save_checkpoint(file, Checkpoint(tiny_config, tokenizer, state, rng, "0" * 64))
    return file


def test_every_flipped_bit_of_a_checkpoint_is_noticed(whole: Path, tmp_path: Path) -> None:
    content, rng, file = whole.read_bytes(), Random(7), tmp_path / "flipped"
    header = 8 + int.from_bytes(content[:8], "little")
    front = [rng.randrange(8 * header) for _ in range(300)]
    for bit in front + [rng.randrange(8 * header, 8 * len(content)) for _ in range(300)]:
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        with pytest.raises(MicrogptError):
            load_checkpoint(file)


def test_the_last_bit_of_a_number_is_noticed_as_such(whole: Path, tmp_path: Path) -> None:
    content = bytearray(whole.read_bytes())
    content[-8] ^= 1
    (tmp_path / "flipped").write_bytes(content)
    message = refusal(lambda: load_checkpoint(tmp_path / "flipped"))
    assert message.endswith("damaged: what it holds is not what was written (SHA-256)")


def config_with(**fields: object) -> Edit:
    """Other fields in the configuration."""

    def edit(_: Any, metadata: Any) -> None:
        metadata["config"] = json.dumps({**json.loads(metadata["config"]), **fields})

    return edit


def text(name: str, value: str) -> Edit:
    return lambda _, metadata: metadata.update({name: value})


def stream(place: int, value: object) -> Edit:
    """Another state of the random stream."""

    def edit(_: Any, metadata: Any) -> None:
        state = json.loads(metadata["random"])
        state[place] = value
        metadata["random"] = json.dumps(state)

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (config_with(n_layer=10**9), "n_layer: expected 10,000 at most, got 1000000000"),
        (config_with(n_layer=10_000), "the tensor 'layer2.attn_wq' is missing"),
        (config_with(n_layer=1), "the tensor 'adam.m.layer1.attn_wk' is none that its"),
        (config_with(n_embd=10**12), "asks for (3, 1000000000000)"),
        (config_with(block_size=10**12), "asks for (1000000000000, 4)"),
        (config_with(n_embd=10**400), "n_embd: expected 1,000,000,000,000,000,000 at most"),
        (config_with(learning_rate=10**400), "learning_rate: expected 1,000,000,000,000,000,000"),
        (config_with(learning_rate=float("nan")), "learning_rate: expected a finite number"),
        (config_with(adam_eps=float("inf")), "adam_eps: expected a finite number"),
        (config_with(**{"x" * 10**6: 1}), "unknown key"),
        (text("config", "[" * 100_000), "RecursionError"),
        (text("config", '{"n_layer": ' + "9" * 10**6 + "}"), "ValueError"),
        (text("config", '"' + "x" * 10**6 + '"'), "its configuration lacks 'n_layer'"),
        (text("chars", "".join(map(chr, range(32, 50_000)))), "'wte' is (3, 4)"),
        (text("updates", "13"), "13 updates of 12"),
        (text("updates", "9" * 10**6), "ValueError"),
        (text("updates", "x" * 10**6), "ValueError"),
        *(
            (text("updates", written), "for a whole number")
            for written in ("\u0663", "1_0", " 3", "+3", "03", "-1")
        ),
        (text("chars", "aa"), "chars are not sorted, or one of them is there twice"),
        (text("chars", "ba"), "chars are not sorted, or one of them is there twice"),
        (text("config", '{"n_layer": 1, "n_layer": 2}'), "a key is there twice"),
        (stream(2, True), "True as the next number"),
        (stream(2, 1), "1 as the next number"),
        (stream(1, [1.0] * 624 + [1]), "not of whole numbers"),
        (stream(1, [True] * 624 + [1]), "not of whole numbers"),
        (stream(0, "3"), "damaged"),
        (stream(1, list(range(10**5))), "damaged"),
        (stream(1, [2**70] * 625), "damaged"),
        (stream(2, "x"), "damaged"),
        (stream(2, float("nan")), "damaged"),
        (stream(2, [1.0]), "damaged"),
        (text("version", "9" * 10**6), "a checkpoint of version '999"),
        (lambda tensors, _: tensors.update(more=np.zeros(3)), "the tensor 'more' is none"),
        (
            lambda tensors, _: tensors.update({f"t{i}": np.zeros(1) for i in range(10_000)}),
            "the tensor 't0' is none",
        ),
    ],
)
def test_a_checkpoint_that_contradicts_itself_is_refused(
    edit: Edit, message: str, whole: Path, rewrite: Rewrite, tmp_path: Path
) -> None:
    rewrite(whole, tmp_path / "edited", edit)
    refused = refusal(lambda: load_checkpoint(tmp_path / "edited"))
    assert message in refused
    assert refused.startswith(str(tmp_path / "edited"))


# Headers. What the format itself forbids is safetensors' to refuse, and it does.


def tensor_file(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    """A file in the safetensors format, whatever its header says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if length is None else length
    path.write_bytes(length.to_bytes(8, "little") + text + data)
    return path


def entry(shape: object, start: int = 0, end: int = 8, dtype: str = "F64") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("header", "data", "length"),
    [
        (b"{}", b"", 2**60),
        (b"{}", b"", 2**64 - 1),
        (b"{}", b"", 3),
        (b"[" * 100_000, b"", None),
        (b'{"__metadata__":{"a":"1","a":"2"}}', b"", None),
        (b'{"__metadata__":{"a":"1"},"__metadata__":{"a":"2"}}', b"", None),
        (b'{"a":' * 100_000, b"", None),
        (b" " * 11_000_000, b"", None),
        ({f"t{i}": entry([0], 0, 0) for i in range(200_000)}, b"", None),
        ({"wte": entry([2**40, 2**40])}, b"8 bytes.", None),
        ({"wte": entry([2**62, 4])}, b"8 bytes.", None),
        ({"wte": entry([0, 2**62, 2**62], 0, 0)}, b"", None),
        ({"wte": entry([10**400])}, b"8 bytes.", None),
        ({"wte": entry([-1])}, b"8 bytes.", None),
        ({"wte": entry([1] * 99)}, b"8 bytes.", None),
        ({"wte": entry([1], 0, 800)}, b"8 bytes.", None),
        ({"wte": entry([1], 8, 16)}, b"16 bytes of them", None),
        ({"wte": entry([1], 8, 0)}, b"8 bytes.", None),
        ({"wte": entry([1]), "wpe": entry([1])}, b"8 bytes.", None),
        ({"wte": entry([1], dtype="F65")}, b"8 bytes.", None),
        ({"wte": entry([4], dtype="BF16")}, b"8 bytes.", None),
        ({"wte": entry([8], dtype="F8_E4M3")}, b"8 bytes.", None),
        ({"wte": entry([1], dtype="C64")}, b"8 bytes.", None),
        ({"__metadata__": {"format": 1}}, b"", None),
        ({"__metadata__": {"chars": "x" * 11_000_000}}, b"", None),
    ],
)
def test_an_absurd_header_is_refused(
    header: object, data: bytes, length: int | None, tmp_path: Path
) -> None:
    file = tensor_file(tmp_path / "absurd", header, data, length)
    for read in (load_checkpoint, load_trace, lambda path: load_params(path, {"wte": (1, 1)})):
        assert str(file) in refusal(lambda read=read: read(file))


def test_a_header_is_no_longer_than_there_is_to_describe(tmp_path: Path) -> None:
    many = {f"t{i}": entry([1], 8 * i, 8 * i + 8) for i in range(200_000)}
    file = tensor_file(tmp_path / "many", many, bytes(1_600_000))
    assert "'wte' is missing" in refusal(lambda: load_params(file, {"wte": (1, 1)}))
    empty = {f"t{i}": entry([0], 0, 0) for i in range(200_000)}
    file = tensor_file(tmp_path / "empty", empty)
    assert "a header of 13," in refusal(lambda: load_params(file, {"wte": (1, 1)}))


@pytest.mark.skipif(os.name == "nt", reason="NTFS would really set aside a terabyte")
def test_a_tensor_is_not_read_before_its_size_is_known_to_be_right(tmp_path: Path) -> None:
    size = 10**12  # bytes, of which the disk holds none
    file = tensor_file(tmp_path / "vast", {"wte": entry([size // 8], 0, size)})
    os.truncate(file, file.stat().st_size + size)
    message = refusal(lambda: load_params(file, {"wte": (3, 4)}))
    assert "'wte' is (125000000000,), and its configuration asks for (" in message
    message = refusal(lambda: load_params(file, {"wte": (size // 8,)}))  # as if asked for
    assert "vast: to read it would take about 1,000.0 GB of memory, and this machine has" in message


@pytest.fixture(params=["folder", "FIFO", "/dev/zero", "no permission"])
def no_file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """An existing path that cannot be read as a file."""
    path = tmp_path / "odd.yaml"
    if request.param == "folder":
        path.mkdir()
    elif os.name != "posix":
        pytest.skip("Windows has no such file")
    elif request.param == "FIFO":
        os.mkfifo(path)
    elif request.param == "/dev/zero":
        path = Path("/dev/zero")
    else:
        path.write_text("why: x", encoding="utf-8")
        path.chmod(0)
        if os.access(path, os.R_OK):
            pytest.skip("root may read everything")
    return path


def test_what_is_no_readable_file_is_refused_wherever_a_file_is_read(no_file: Path) -> None:
    readings: list[Callable[[Path], object]] = [
        load_checkpoint,
        load_trace,
        lambda path: load_params(path, {"wte": (1, 1)}),
        lambda path: load_config(str(path)),
        lambda path: load_case(str(path)),
        lambda path: load_documents(str(path)),
    ]
    for read in readings:
        assert str(no_file) in refusal(lambda read=read: read(no_file))


# Parameters and traces


def test_parameters_with_one_more_tensor_are_refused(tmp_path: Path) -> None:
    save_file({"wte": np.zeros((1, 1)), "wpe": np.zeros((1, 1))}, tmp_path / "params")
    message = refusal(lambda: load_params(tmp_path / "params", {"wte": (1, 1)}))
    assert "the tensor 'wpe' is none that its configuration asks for" in message


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trace to damage."""
    path, case = tmp_path_factory.mktemp("trace") / "whole", load_case("one-document")
    save_trace(path, case, "vectorized", "float64", trace(case, "vectorized", "float64", 2))
    return path


def renamed(old: str, new: str) -> Edit:
    return lambda tensors, _: tensors.update({new: tensors.pop(old)})


def changed(name: str, change: Callable[[Any], Any]) -> Edit:
    return lambda tensors, _: tensors.update({name: change(tensors[name])})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (text("steps", "1000000000"), "1000000000 steps of"),
        (text("steps", "9" * 10**6), "damaged: ValueError"),
        (text("steps", "0"), "damaged: ValueError"),
        (text("dtype", "float16"), "dtype 'float16'"),
        (text("case", "\x1b[2J"), "damaged: ValueError"),
        (text("version", "2"), "not a trace of version 1"),
        (text("config", "[" * 100_000), "RecursionError"),
        (config_with(n_layer=10**9), "n_layer: expected 10,000 at most"),
        (config_with(n_embd=10**12), "is float64 (27, 16), and should be floating numbers"),
        (config_with(block_size=10**12), "and should be floating numbers (1000000000000, 16)"),
        (renamed("step1/batch/tokens", "step1/entry/wte"), "step 1 lacks batch/tokens"),
        (changed("step1/forward/loss", lambda x: x.reshape(1)), "forward/loss is float64 (1,)"),
        (changed("step1/forward/emb", lambda x: x[:, :-1].copy()), "forward/emb is float64 (1, "),
        (changed("step2/gradient/dwte", lambda x: x.astype(int)), "gradient/dwte is int64"),
        (changed("step1/sample/documents", lambda x: x[:, :0].copy()), "sample/documents is int64"),
        (changed("step1/batch/tokens", lambda x: x + 99), "batch/tokens: expected whole numbers"),
        (changed("step1/batch/tokens", lambda x: x - 1 - x), "batch/tokens: expected whole"),
        (changed("step1/batch/tokens", lambda x: x * 1.0), "batch/tokens: expected whole"),
        (changed("step1/batch/tokens", lambda x: x[0]), "batch/tokens: expected whole"),
    ],
)
def test_a_trace_that_contradicts_itself_cannot_be_compared(
    edit: Edit,
    message: str,
    recorded: Path,
    rewrite: Rewrite,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    edited = tmp_path / "edited"
    rewrite(recorded, edited, edit)
    assert crosscheck(["diff", str(edited), str(edited)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert printed.err.count("\n") == 1


def test_either_trace_is_held_against_its_model(
    recorded: Path, rewrite: Rewrite, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edited = tmp_path / "edited"
    rewrite(recorded, edited, changed("step2/forward/logits", lambda x: x.ravel()))
    for pair in ((recorded, edited), (edited, recorded)):
        assert crosscheck(["diff", *map(str, pair)]) == 2
        assert f"{edited}: step 2: forward/logits is float64" in capsys.readouterr().err


def test_a_trace_that_is_not_finite_differs(
    recorded: Path, rewrite: Rewrite, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(recorded, tmp_path / "nan", changed("step2/forward/logits", lambda x: x * np.nan))
    for pair in ((recorded, tmp_path / "nan"), (tmp_path / "nan", recorded)):
        assert crosscheck(["diff", *map(str, pair)]) == 1
        assert "step 2, forward pass:\nlogits disagrees" in capsys.readouterr().out


# YAML


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("n_layer: 1\nn_embd: 8\nn_layer: 2", "line 3: the key 'n_layer' is there twice, first"
         " on line 1"),
        ("n_layer: 1\n\nwombat: 1", "unknown key 'wombat'"),
        ("n_layer: 1\n\nn_layers: 1", "did you mean 'n_layer'? (line 3)"),
        ("a: &a [x]\nb: [*a, *a]", "line 2: aliases are not read"),
        ("&a [*a]", "line 1: aliases are not read"),
        ("<<: {n_layer: 2}", "line 1: could not determine a constructor"),
        ("dataset: !!python/object/apply:os.getcwd []", "line 1: tags are not read"),
        ("tie_lm_head: !!bool maybe", "line 1: tags are not read"),
        ("n_layer: " + "[" * 100_000, "line 1: nested more than 20 levels deep"),
        ("- " * 100_000, "line 1: nested more than 20 levels deep"),
        ("n_layer: 1" + ":1" * 100_000, "line 1: a number of 200,001 characters"),
        ("n_layer: 0x" + "f" * 100_000, "line 1: a number of 100,002 characters"),
        ("n_layer: 0x" + "f" * 90, "line 1: YAML reads 0xfff"),
        ("init_std: 1" + ":1" * 1000 + ".5", "line 1: a number of 2,003 characters"),
        ("init_std: " + "9" * 99, "init_std: expected 1,000,000,000,000,000,000 at most"),
        ("n_layer: " + "x" * 900_000, "expected a whole number, got 'xxx"),
        ("? [a]\n: b", "line 1: a key that is a list or a mapping"),
        ("x" * 1_000_001, "more than 1,000,000 bytes"),
        ("dataset: a\0b", "not readable as YAML"),
        ("a: 1\n---\nb: 2", "not readable as YAML"),
    ],
)  # fmt: skip
def test_yaml_that_asks_for_too_much_is_refused(content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(content, encoding="utf-8")
    refused = refusal(lambda: load_config(str(file)))
    assert message in refused
    assert refused.startswith(str(file))


CASE_FILE = """why: x
chars: abc
batches: [[ab]]
"""


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("shift: {wte: .nan}", "shift: expected numbers by name, got {'wte': nan}"),
        ("shift: {wombat: 1}", "'wombat' is no parameter of this model"),
        ("rows: {wte: {4: 1.0}}", "rows: wte has rows 0 to 3"),
        ("rows: {wte: {-1: 1.0}}", "rows: wte has rows 0 to 3"),
        ("rows: {wte: 1.0}", "rows: expected numbers by name and row"),
        ("zero: {dwte: 1}", "zero: expected strings by name"),
        ("zero_rows: {dwte: {chars: a}}", "zero_rows: 'dwte': expected chars and why"),
        ("float32: {slack: much}", "float32: expected slack, a number"),
        ("config: {n_layer: 1, n_layer: 2}", "line 4: the key 'n_layer' is there twice"),
        ("config: {preset: ../microgpt}", "unknown preset '../microgpt'"),
        ("config: {steps: 1}", "steps 1: step 2 of this case would have no learning rate left"),
        ("wombat: 1", "unknown key 'wombat' (line 4)"),
        ("kink: 2024-01-01", "kink: expected a string"),
    ],
)
def test_a_case_is_held_to_its_types_and_its_model(more: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "case.yaml"
    file.write_text(CASE_FILE + more, encoding="utf-8")
    assert message in refusal(lambda: read_case(file))


@pytest.mark.parametrize("batches", ["[]", "[[]]", "[ab]", "[[1]]", "[[2024-01-01]]", "{a: b}"])
def test_batches_are_lists_of_texts(batches: str, tmp_path: Path) -> None:
    file = tmp_path / "case.yaml"
    file.write_text(CASE_FILE.replace("[[ab]]", batches), encoding="utf-8")
    assert "batches" in refusal(lambda: read_case(file))


def test_a_batch_of_other_characters_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "case.yaml"
    file.write_text(CASE_FILE.replace("[[ab]]", "[[abd]]"), encoding="utf-8")
    assert "the character 'd' (U+0064) in 'abd'" in refusal(lambda: read_case(file))


@pytest.mark.parametrize("name", ["../cases/one-head", "one-head.yaml", "", "nowhere", "/etc/x"])
def test_the_name_of_a_case_does_not_leave_its_folder(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in CASES.iterdir()}
    assert crosscheck(["params", name]) == 2
    assert f"there is no case {name!r}" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in CASES.iterdir()} == before
    assert f"there is no case and no file {name!r}" in refusal(lambda: load_case(name))


# Memory, and data sets


@pytest.fixture
def small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of 8 GB."""
    monkeypatch.setattr(memory, "machine_memory", lambda: 8e9)


@pytest.mark.usefixtures("small_machine")
@pytest.mark.parametrize(
    ("command", "fields", "message"),
    [
        ("train", "n_embd: 100000", "--n-embd 100,000: with the"),
        ("bench", "n_embd: 100000", "--n-embd 100,000: with the"),
        ("train", "n_layer: 10000\nn_embd: 1000\nn_head: 1", "--n-layer 10,000: with the"),
        ("train", "block_size: 10000000", "--block-size 10,000,000: with the"),
        ("train", "num_samples: 100000000000", "--num-samples 100,000,000,000: with the"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_before_it_is_drawn(
    command: str,
    fields: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "mine.yaml").write_text(fields, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    start = process_time()
    assert microgpt([command, "--config", "mine.yaml"]) == 2
    assert process_time() - start < SECONDS
    printed = capsys.readouterr()
    assert printed.err.startswith(f"microgpt {command}: error: {message}")
    assert re.search(r"take about [0-9,.]+ GB of memory, and this machine has 8.0 GB", printed.err)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


@pytest.mark.usefixtures("small_machine")
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_a_batch_takes_depends_on_the_documents(
    backend: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "long").write_text("ab" * 5_000_000, encoding="utf-8")
    (tmp_path / "short").write_text("ab\nba", encoding="utf-8")
    out = ["--backend", backend, "--steps", "1", "--num-samples", "0", "--out", str(tmp_path / "r")]
    long, short = (["--dataset", str(tmp_path / name), *out] for name in ("long", "short"))
    assert microgpt(["train", "--batch-size", "100000000", *short]) == 2
    assert "error: --batch-size 100,000,000: with the" in capsys.readouterr().err
    assert microgpt(["train", "--block-size", "10000", *long]) == 2
    assert "error: --block-size 10,000: with the" in capsys.readouterr().err
    assert microgpt(["train", "--block-size", "10000", *short]) == 0
    assert microgpt(["train", *long, "--overwrite"]) == 0


def test_a_container_may_use_less_than_the_machine_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = memory.machine_memory()
    limits = [tmp_path / "none", tmp_path / "unlimited", tmp_path / "limited"]
    limits[1].write_text("max\n")
    monkeypatch.setattr(memory, "LIMITS", limits)
    limits[2].write_text(f"{10**6}\n")
    assert memory.machine_memory() == 1e6 < machine
    limits[2].write_text("9223372036854771712\n")
    assert memory.machine_memory() == machine


def test_memory_that_runs_out_after_all_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def drawn(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("microgpt.train.init_params", drawn)
    assert microgpt(["train", "--out", str(tmp_path / "run")]) == 2
    assert "error: there is not enough memory; try a smaller" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_where_the_memory_is_not_known_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "LIMITS", ())
    monkeypatch.delattr(os, "sysconf", raising=False)
    assert memory.machine_memory() == float("inf")
    memory.check_memory(load_config(overrides={"n_embd": "100000"}), 27, ["emma"], "scalar")


LONG = "ab" * 600  # longer than any context below


def train_and_draw(backend: str, config: Config, documents: list[str]) -> None:
    """Two steps, and samples that go on until the context is full."""
    tokenizer = build_tokenizer("ab", config)
    docs = [tokenizer.document(document, config.max_tokens) for document in documents]
    state = fresh_state(init_params(config, tokenizer.vocab_size, Random(1)))
    model = load_backend(backend, config, state)
    for _ in range(2):
        model.forward(docs)
        model.backward()
        model.update(0.01)
    endless = replace(tokenizer, chars=("a",), eos=-1)
    model.sample(endless, Random(1), config.num_samples, 1.0, [])


@pytest.mark.parametrize(
    "sizes", [{"n_embd": "64"}, {"n_layer": "2", "batch_size": "2"}, {"block_size": "40"}], ids=str
)
def test_the_estimate_for_scalar_is_of_the_size_of_what_is_taken(sizes: dict[str, str]) -> None:
    config = load_config(overrides={"block_size": "16", "num_samples": "0", **sizes})
    documents = [LONG] * config.batch_size
    gc.collect()
    tracemalloc.start()
    try:
        train_and_draw("scalar", config, documents)
        taken = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 0.5 < memory.estimate(config, 3, documents, "scalar") / taken < 2


# the bytes that a process takes from here on
TAKEN = """
import sys
import numpy as np
import vectorized.backend
from test_untrusted import load_config, train_and_draw

def memory(which):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(which))

first, length, *fields = sys.argv[1:]
config = load_config(overrides=dict(pair.split("=") for pair in fields))
np.ones((64, 64)).dot(np.ones((64, 1024)))  # BLAS takes its own
before = memory("VmRSS")
train_and_draw("vectorized", config, [first, *[first[: int(length)]] * (config.batch_size - 1)])
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only there does a process know what it took")
@pytest.mark.parametrize(
    ("length", "sizes"),
    [
        (1200, {"n_embd": "256"}),
        (1200, {"n_layer": "2", "n_embd": "64", "batch_size": "60"}),
        (1200, {"block_size": "600"}),
        (1200, {"block_size": "1030", "n_head": "1"}),
        (4, {"batch_size": "2000"}),  # in many micro-batches
        (1200, {"num_samples": "200"}),
        (1200, {"num_samples": "50", "n_layer": "3", "block_size": "60"}),
        (1200, {"num_samples": "1", "n_embd": "256", "block_size": "60"}),
    ],
    ids=str,
)
def test_the_estimate_for_vectorized_is_of_the_size_of_what_is_taken(
    length: int, sizes: dict[str, str]
) -> None:
    sizes = {"block_size": "16", "num_samples": "0", **sizes}
    config = load_config(overrides=sizes)
    documents = [LONG, *[LONG[:length]] * (config.batch_size - 1)]
    fields = [f"{name}={value}" for name, value in sizes.items()]
    run = subprocess.run(
        [sys.executable, "-c", TAKEN, LONG, str(length), *fields],
        cwd=ROOT / "tests" / "runs",
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    assert 0.5 < memory.estimate(config, 3, documents, "vectorized") / int(run.stdout) < 2


@pytest.mark.skipif(os.name == "nt", reason="NTFS would really set aside a terabyte")
def test_a_data_set_larger_than_memory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "vast").write_bytes(b"ab\n" * 100_000)
    os.truncate(tmp_path / "vast", 10**12)
    message = refusal(lambda: load_documents(str(tmp_path / "vast")))
    assert "vast: to read it would take about " in message


def test_a_device_or_a_pipe_is_no_data_set(tmp_path: Path) -> None:
    if os.name != "posix":
        pytest.skip("Windows has no FIFO")
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", Path("/dev/zero")):
        assert "is a device or a pipe" in refusal(lambda path=path: load_documents(str(path)))


@pytest.mark.parametrize("content", [b"ab\xed\xa0\x80\n", b"ab\n\xed\xb2\x80", b"\xff" * 9])
def test_half_a_character_is_not_text(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "half").write_bytes(content)
    assert "is not UTF-8 text" in refusal(lambda: load_documents(str(tmp_path / "half")))


@pytest.mark.parametrize(
    "documents",
    [
        ["a\0b", "\0", "\0\0"],
        [chr(first + i) * 2 for first in (0x21, 0x5D0, 0x900, 0x4E00, 0x1F600) for i in range(60)],
        ["".join(map(chr, range(0x4E00 + 10 * i, 0x4E0A + 10 * i))) for i in range(500)],
        ["e\u0301\u200d\ufe0f", "\U0001f468\u200d\U0001f469"],
    ],
)
def test_every_code_point_is_a_token(documents: list[str], tmp_path: Path) -> None:
    (tmp_path / "text").write_text("\n".join(documents), encoding="utf-8")
    out = tmp_path / "run"
    line = ["train", "--dataset", str(tmp_path / "text"), "--steps", "2", "--num-samples", "3"]
    assert microgpt([*line, "--out", str(out)]) == 0
    held = load_checkpoint(out)
    assert held.tokenizer.chars == tuple(sorted(set("".join(documents))))
    assert microgpt(["eval", str(out)]) == 0


class Unread(str):
    """A text that fails if more than its beginning is read."""

    def __iter__(self) -> Any:
        raise AssertionError("all of it was looked at")


def test_of_a_book_only_what_is_kept_is_encoded() -> None:
    config = load_config()
    tokenizer = build_tokenizer("ab", config)
    tokens = tokenizer.document(Unread("ab" * 5_000_000), config.max_tokens)
    assert tokens == tokenizer.document("ab" * 8)[:17]
    for length in (0, 1, 15, 16, 17):
        for longest in (2, 3, 17):
            text = "ab" * 10
            whole = tokenizer.document(text[:length])
            assert tokenizer.document(text[:length], longest) == whole[:longest]


def test_a_long_document_is_evaluated_in_a_batch_of_its_own(
    tiny_config: Config, whole: Path
) -> None:
    held = load_checkpoint(whole)
    config = replace(held.config, block_size=3000)
    params = init_params(config, held.tokenizer.vocab_size, Random(1))
    model = load_backend("vectorized", config, fresh_state(params))
    shown: list[list[int]] = []
    position_losses = model.position_losses
    model.position_losses = lambda docs: (  # type: ignore[method-assign]
        shown.append([len(doc) - 1 for doc in docs]) or position_losses(docs)
    )
    documents = ["ab"] * 300 + ["ab" * 1000, "a" * 2999]
    evaluation(model, documents, held.tokenizer, config)
    assert shown == [[3000], [2001], [3] * 256, [3] * 44]


# Forged runs whose checksums are right


def made(folder: Path) -> Path:
    """A run of three words."""
    words = folder / "words.txt"
    words.write_text("emma\nnoah\nal\n", encoding="utf-8")
    out = folder / "run"
    small = ["--n-embd", "4", "--n-head", "2", "--num-samples", "1", "--dataset", str(words)]
    assert microgpt(["train", "--out", str(out), "--steps", "2", *small]) == 0
    return out


@pytest.mark.parametrize(
    ("command", "edit", "message"),
    [
        ("train --resume --steps 9 --out", config_with(held_out=10**9), "--held-out 1000000000: "),
        ("train --resume --steps 9 --out", config_with(cores=10**6), "cores: expected 256 at most"),
        ("sample", lambda x, _: x["adam.v.wpe"].fill(-1), "Adam's mean of squares is negative"),
        ("sample", lambda x, _: x["lm_head"].fill(1e308), "too large to draw from"),
    ],
)
def test_a_forged_run_is_refused(
    tmp_path: Path,
    rewrite: Rewrite,
    capsys: pytest.CaptureFixture[str],
    command: str,
    edit: Edit,
    message: str,
) -> None:
    out = made(tmp_path)
    rewrite(out / "checkpoint.safetensors", tmp_path / "forged", edit)
    (tmp_path / "forged").replace(out / "checkpoint.safetensors")
    capsys.readouterr()
    assert microgpt([*command.split(), str(out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_samples_are_text_and_no_commands(
    tmp_path: Path, rewrite: Rewrite, capsys: pytest.CaptureFixture[str]
) -> None:
    out = made(tmp_path)
    rewrite(out / "checkpoint.safetensors", tmp_path / "forged", text("chars", "\x07\x1bahlm\x9b"))
    capsys.readouterr()
    assert microgpt(["sample", str(tmp_path / "forged"), "--num", "50", "--temperature", "9"]) == 0
    out_text = capsys.readouterr().out
    assert not set("\x1b\x07\x9b") & set(out_text)
    assert r"\x1b" in out_text


def test_many_samples_are_those_that_are_drawn_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = made(tmp_path)
    capsys.readouterr()
    assert microgpt(["sample", str(out), "--num", "2025"]) == 0
    assert capsys.readouterr().out.splitlines() == GPT.load(out).sample(2025)


def test_without_a_home_a_cache_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for an unknown user
    monkeypatch.delenv("MICROGPT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert data.cache_folder() == Path("/somewhere/microgpt")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert "name a folder with MICROGPT_CACHE" in refusal(data.cache_folder)
