"""A batch on several cores: the same gradient, and processes that end when they should."""

from __future__ import annotations

import errno
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vectorized.worker import Line, Remote, Worker, deal, serve

from microgpt.backend import Docs, State, fresh_state, load_backend
from microgpt.cli.commands import main
from microgpt.errors import MicrogptError
from microgpt.init import init_params
from microgpt.layout import param_shapes
from microgpt.runs.checkpoint import load_checkpoint
from microgpt.settings import load_config
from microgpt.tokenizer import build_tokenizer
from vectorized import worker

CONFIG = replace(load_config(), n_embd=4, n_head=2, init_std=0.5, init_std_residual=0.5)
TOKENIZER = build_tokenizer("abc", CONFIG)
DOCS = [TOKENIZER.document(text) for text in ("a", "abcabc", "cab", "bb", "abcc")]
ALONE = 5  # seconds within which a process that is not needed has ended


def fresh() -> State:
    return fresh_state(init_params(CONFIG, TOKENIZER.vocab_size, Random(1)))


def trained(
    cores: int, docs: Docs = DOCS, steps: int = 3, state: State | None = None
) -> tuple[list[float], State]:
    """The losses of a few steps, and the state that they lead to."""
    config = replace(CONFIG, cores=cores)
    backend = load_backend("vectorized", config, state or fresh())
    losses = []
    for _ in range(steps):
        losses.append(backend.forward(docs))
        backend.backward()
        backend.update(0.01)
    return losses, backend.state()


def assert_close(ours: State, theirs: State) -> None:
    for name, tensor in ours.params.items():
        np.testing.assert_allclose(theirs.params[name], tensor, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("cores", [2, 3])
def test_a_shared_batch_is_the_batch(cores: int) -> None:
    ours, theirs = trained(1), trained(cores)
    np.testing.assert_allclose(theirs[0], ours[0], rtol=1e-14)
    assert_close(theirs[1], ours[1])


def test_a_run_that_goes_on_with_as_many_cores_is_the_same_to_the_last_bit() -> None:
    losses, state = trained(3, steps=6)
    begun, half = trained(3)
    rest, resumed = trained(3, state=half)
    assert [*begun, *rest] == losses
    for kind in ("params", "m", "v"):
        for name, tensor in getattr(state, kind).items():
            assert (tensor == getattr(resumed, kind)[name]).all()


def test_more_cores_than_documents() -> None:
    ours, theirs = trained(1, DOCS[:1]), trained(3, DOCS[:1])
    assert_close(theirs[1], ours[1])


def test_a_forward_pass_whose_gradient_nobody_wants() -> None:
    backend = load_backend("vectorized", replace(CONFIG, cores=2), fresh())
    backend.forward(DOCS[:3])
    assert backend.forward(DOCS) == pytest.approx(trained(1, steps=1)[0][0], rel=1e-14)


@given(lengths=st.lists(st.integers(2, 9), max_size=12), shares=st.integers(2, 4))
def test_shares_are_alike(lengths: list[int], shares: int) -> None:
    docs = [list(range(i, i + n)) for i, n in enumerate(lengths)]
    dealt = deal(docs, shares)
    assert sorted(doc for share in dealt for doc in share) == sorted(docs)
    sizes = [sum(map(len, share)) for share in dealt]
    assert max(sizes) - min(sizes) <= 9  # a document


def eventually(holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + ALONE
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.01)
    return holds()


def test_a_process_ends_with_its_backend() -> None:
    trained(3)
    gc.collect()
    assert eventually(lambda: not multiprocessing.active_children())


def test_a_process_that_was_killed_is_missed() -> None:
    gc.collect()
    assert eventually(lambda: not multiprocessing.active_children())
    backend = load_backend("vectorized", replace(CONFIG, cores=2), fresh())
    backend.forward(DOCS)
    backend.backward()
    (process,) = multiprocessing.active_children()
    process.kill()
    process.join()
    with pytest.raises(MicrogptError, match="a process that worked on a share"):
        backend.forward(DOCS)


def start(folder: Path) -> subprocess.Popen[str]:
    """A long training run on two cores, a few steps in."""
    options = ["--cores", "2", "--batch-size", "8", "--steps", "10000000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "microgpt", "train", "--out", str(folder / "run"), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a process group, as a terminal makes one
    )
    metrics = folder / "run" / "metrics.jsonl"
    assert eventually(lambda: metrics.exists() and metrics.stat().st_size > 0)
    return process


def group(leader: int) -> list[int]:
    """The processes of a group that are alive."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except (OSError, IndexError):
            continue
        if fields[0] != "Z" and int(fields[2]) == leader:
            found.append(int(entry.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_all_ends_all(tmp_path: Path, number: signal.Signals) -> None:
    process = start(tmp_path)
    assert len(group(process.pid)) >= 2
    if number == signal.SIGKILL:
        process.kill()  # alone: the others notice
    else:
        os.killpg(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert eventually(lambda: not group(process.pid))
    assert err == ""
    if number != signal.SIGKILL:
        assert "go on with" in out
        assert process.returncode in (130, 143)


def test_what_was_learned_is_kept_when_a_process_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begin = Remote.begin
    begun = []

    def until_the_fourth(self: Remote, docs: Docs, of: int) -> None:
        begun.append(docs)
        if len(begun) == 4:
            for process in multiprocessing.active_children():
                process.kill()
                process.join()
        begin(self, docs, of)

    monkeypatch.setattr(Remote, "begin", until_the_fourth)
    out = tmp_path / "run"
    command = ["train", "--out", str(out), "--cores", "2", "--batch-size", "4", "--steps", "9"]
    assert main(command) == 2
    assert "a process that worked on a share of the batch has ended" in capsys.readouterr().err
    assert load_checkpoint(out).state.updates == 3
    assert main(["train", "--resume", "--out", str(out), "--cores", "1"]) == 0


def test_a_process_that_cannot_be_started_is_told_in_one_line() -> None:
    refused = OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
    spawned = multiprocessing.get_context("spawn").Process
    with patch.object(spawned, "start", side_effect=refused), pytest.raises(MicrogptError) as error:
        load_backend("vectorized", replace(CONFIG, cores=3), fresh())
    assert str(error.value).startswith("--cores 3: the system starts no more processes (Resource")


def test_the_gradient_is_there_when_the_other_process_says_so() -> None:
    config = replace(CONFIG, cores=2)
    shapes = param_shapes(config, TOKENIZER.vocab_size)
    numbers = sum(n_out * n_in for n_out, n_in in shapes.values())
    ours, theirs = map(Line, multiprocessing.Pipe())
    go_on = threading.Event()

    def slowly(worker: Worker) -> None:
        go_on.wait()

    arguments = (theirs.pipe, config, shapes, bytearray(8 * numbers), bytearray(8 * numbers))
    with patch.object(Worker, "backward", slowly):
        thread = threading.Thread(target=serve, args=arguments, daemon=True)
        thread.start()
        ours.send((DOCS, len(DOCS)))
        assert ours.receive() > 0.0  # the loss
        assert not ours.pipe.poll(0.1)
        go_on.set()
        assert ours.receive() is None
        ours.pipe.close()
        thread.join()


def test_after_a_late_message_the_next_is_slept_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "AWAKE", 0.1)
    ours, theirs = map(Line, multiprocessing.Pipe())
    looked: list[int] = []
    monkeypatch.setattr(ours, "arrived", lambda wait: looked.append(wait) or ours.pipe.poll(wait))

    def received(message: str, after: float) -> bool:
        """Whether the message was looked out for."""
        looked.clear()
        threading.Timer(after, theirs.send, [message]).start()
        assert ours.receive() == message
        return bool(looked)

    assert received("soon", 0.01)
    assert received("late", 0.5)
    assert not received("soon", 0.01)
    assert received("soon", 0.01)


def run_script(folder: Path, *lines: str) -> subprocess.CompletedProcess[str]:
    """Run a program that has all that this file has."""
    root = Path(__file__).resolve().parents[2]
    script = folder / "script.py"
    script.write_text("\n".join(["from tests.model.test_cores import *", *lines, ""]))
    return subprocess.run(
        [sys.executable, str(script)],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        timeout=60,
        capture_output=True,
        text=True,
    )


def test_a_program_ends_while_its_helpers_are_at_work(tmp_path: Path) -> None:
    done = run_script(
        tmp_path,
        "if __name__ == '__main__':",
        "    backend = load_backend('vectorized', replace(CONFIG, cores=3), fresh())",
        "    backend.forward(DOCS * 1000)",
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_script_that_would_start_itself_again_is_told(tmp_path: Path) -> None:
    done = run_script(
        tmp_path,
        "backend = load_backend('vectorized', replace(CONFIG, cores=2), fresh())",
        "backend.forward(DOCS)",
    )
    assert done.returncode == 1
    assert "has not started; a script that asks for one needs `if __name__" in done.stderr


@pytest.mark.parametrize("backend", ["scalar", "vectorized"])
@pytest.mark.parametrize("command", ["sample", "eval"])
def test_a_model_is_read_on_one_core_by_either_backend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str, command: str
) -> None:
    words = tmp_path / "words.txt"
    words.write_text("emma\nnoah\nal\n")
    out = str(tmp_path / "run")
    train = ["train", "--out", out, "--cores", "2", "--batch-size", "2", "--dtype", "float32"]
    assert main([*train, "--steps", "2", "--num-samples", "1", "--dataset", str(words)]) == 0
    monkeypatch.setattr(Remote, "__init__", None)  # nobody starts one
    assert main([command, out, "--backend", backend]) == 0
