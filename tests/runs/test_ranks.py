"""Runs on several ranks: the same files as a run of one process, and an end whatever happens."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest

from microgpt.cli.commands import main
from microgpt.runs.checkpoint import load_checkpoint
from microgpt.runs.launch import mpiexec

needs_mpi = pytest.mark.skipif(
    mpiexec() is None, reason="MPI is not installed: pip install -e '.[mpi]'"
)
MODEL = ["--batch-size", "6", "--num-samples", "3", "--held-out", "20", "--checkpoint-every", "5"]
ENDLESS = [*MODEL, "--steps", "10000000"]
SECONDS = 120  # within which a run of a few steps has ended, on a busy machine
ROOT = Path(__file__).resolve().parents[2]

# what every rank runs: the command, with a fault planted in it
FAULTY = """
import os, signal, sys
from microgpt.runs import launch, ranks
launch.begin()
from microgpt import train
from microgpt.cli.commands import main
from microgpt.runs import memory
ranks.BEAT = 0.2
rank, steps, step = int(os.environ["PMI_RANK"]), [], train.learning_rate

def fault():
    {fault}

def at_step_8(number, config):
    if rank == {rank} and number == 8:
        fault()
    return step(number, config)

train.learning_rate = at_step_8
{more}
sys.exit(main(sys.argv[1:]))
"""


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=SECONDS, cwd=ROOT
    )


def train(*options: object, ranks: int = 0) -> subprocess.CompletedProcess[str]:
    start = [mpiexec(), "-n", ranks] if ranks else []
    model = [] if "--resume" in options else MODEL
    return run(*start, sys.executable, "-m", "microgpt", "train", *model, *options)


def losses(out: Path) -> list[float]:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def same_files(ours: Path, theirs: Path) -> bool:
    names = ("checkpoint.safetensors", "samples.txt")
    same = all((ours / name).read_bytes() == (theirs / name).read_bytes() for name in names)
    return same and losses(ours) == losses(theirs)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    assert train("--steps", 12, "--out", out).returncode == 0
    return out


@needs_mpi
def test_one_rank_is_the_run_without_ranks(tmp_path: Path, alone: Path) -> None:
    done = train("--steps", 12, "--out", tmp_path, ranks=1)
    assert (done.returncode, done.stderr) == (0, "")
    assert same_files(tmp_path, alone)


@needs_mpi
@pytest.mark.parametrize("ranks", [2, 3])
def test_runs_of_as_many_ranks_are_alike_to_the_last_bit(
    tmp_path: Path, alone: Path, ranks: int
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    done = train("--steps", 12, "--out", first, ranks=ranks)
    assert (done.returncode, done.stderr) == (0, "")
    assert losses(first) == pytest.approx(losses(alone), rel=1e-12)
    assert (first / "samples.txt").read_text() == (alone / "samples.txt").read_text()
    assert train("--steps", 12, "--out", second, "--cores", ranks).returncode == 0
    assert same_files(first, second)
    assert faulty(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)", ranks=ranks).returncode == 2
    assert train("--resume", "--out", tmp_path / "run", ranks=ranks).returncode == 0
    assert same_files(first, tmp_path / "run")


@needs_mpi
def test_held_out_documents_are_measured_and_the_output_is_that_of_one_process(
    tmp_path: Path, alone: Path
) -> None:
    ours = train("--steps", 12, "--eval-every", 4, "--out", tmp_path / "a", "--cores", 2)
    theirs = train("--steps", 12, "--eval-every", 4, "--out", tmp_path / "a", "--overwrite")

    def kept(text: str) -> list[str]:
        return [line for line in text.splitlines() if " ms a step" not in line]

    assert kept(ours.stdout) == kept(theirs.stdout)
    assert "held out" in ours.stdout


@needs_mpi
@pytest.mark.parametrize(
    ("options", "ranks", "said"),
    [
        (["--cores", 3], 2, "--cores 3: mpiexec has started 2 ranks; leave one out"),
        (["--batch-size", 2], 3, "--cores 3 needs --batch-size 3 or more; it is 2"),
        (["--backend", "scalar"], 2, "--cores 2: scalar computes one number after another"),
        (["--steps", "x"], 2, "--steps: expected a whole number"),
        (["--nonsense"], 2, "unrecognized arguments: --nonsense"),
        (["--n-embd", 3000000, "--n-head", 1], 2, "this machine has"),
    ],
)
def test_a_refusal_is_one_line(
    tmp_path: Path, options: list[object], ranks: int, said: str
) -> None:
    out = tmp_path / "run"
    done = train("--steps", 12, "--out", out, *options, ranks=ranks)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert said in done.stderr
    assert not out.exists()


def faulty(
    tmp_path: Path, fault: str = "pass", rank: int = 1, more: str = "", ranks: int = 3
) -> subprocess.CompletedProcess[str]:
    program = tmp_path / "faulty.py"
    program.write_text(FAULTY.format(fault=fault, rank=rank, more=more))
    return run(mpiexec(), "-n", ranks, sys.executable, program, "train", *MODEL, "--steps", 12,
               "--out", tmp_path / "run")  # fmt: skip


@needs_mpi
def test_what_one_rank_refuses_is_refused_by_all(tmp_path: Path) -> None:
    little = "if rank == 2: memory.machine_memory = lambda: 1.0"
    done = faulty(tmp_path, more=little)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "rank 2 (process" in done.stderr
    assert "this machine has 0.0 GB" in done.stderr
    assert not (tmp_path / "run").exists()


@needs_mpi
@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="no signals")
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("raise ValueError('a bug')", "ValueError: a bug"),
        ("raise MemoryError", "there is not enough memory"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "was killed by signal 9"),
        ("os.kill(os.getpid(), signal.SIGSTOP)", "gives no sign of life"),
    ],
)
def test_a_rank_that_fails_ends_all_and_is_named(
    tmp_path: Path, fault: str, said: str, rank: int
) -> None:
    done = faulty(tmp_path, fault, rank)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert f"rank {rank} (process" in done.stderr
    assert said in done.stderr
    assert load_checkpoint(tmp_path / "run").state.updates == 5
    assert main(["train", "--resume", "--cores", "1", "--out", str(tmp_path / "run")]) == 0


@needs_mpi
def test_what_fails_on_all_ranks_is_said_once(tmp_path: Path) -> None:
    forward = "from vectorized import model; model.activation_forward = lambda *_: fault()"
    done = faulty(tmp_path, "raise ValueError('a bug')", more=forward)
    assert done.returncode == 2
    assert re.fullmatch(
        r"microgpt: error: rank 0 \(process .*\): .*faulty.py:\d+: ValueError: a bug\n", done.stderr
    )


def eventually(holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + SECONDS
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.05)
    return holds()


def started(out: Path, *start: object, cores: int = 2) -> subprocess.Popen[str]:
    """A run without end, a few steps in, in a process group of its own, as of a shell."""
    command = [sys.executable, "-m", "microgpt", "train", *ENDLESS]
    process = subprocess.Popen(
        [*map(str, start), *command, "--out", str(out), "--cores", str(cores)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        preexec_fn=os.setpgrp,
    )
    assert eventually(lambda: "\n" in metrics(out))
    return process


def metrics(out: Path) -> str:
    path = out / "metrics.jsonl"
    return path.read_text() if path.exists() else ""


@needs_mpi
@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_as_without_ranks(tmp_path: Path, number: int, by_hand: bool) -> None:
    process = started(tmp_path / "run", *([mpiexec(), "-n", 2] if by_hand else []))
    process.send_signal(number)
    out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 128 + number
    assert "go on with: microgpt train --resume" in out
    assert err == ""
    assert load_checkpoint(tmp_path / "run").state.updates == len(losses(tmp_path / "run"))


@needs_mpi
@pytest.mark.parametrize(("cores", "seconds"), [(1, 1), (2, 15)])  # ranks miss others after 10
def test_a_run_that_was_stopped_goes_on(tmp_path: Path, cores: int, seconds: int) -> None:
    process = started(tmp_path / "run", cores=cores)
    os.killpg(process.pid, signal.SIGTSTP)
    time.sleep(1)
    before = metrics(tmp_path / "run")
    time.sleep(seconds)
    assert metrics(tmp_path / "run") == before
    os.killpg(process.pid, signal.SIGCONT)
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=SECONDS)
    assert (process.returncode, err) == (128 + signal.SIGINT, "")
    assert load_checkpoint(tmp_path / "run").state.updates == len(losses(tmp_path / "run"))
    assert metrics(tmp_path / "run") != before


@needs_mpi
@pytest.mark.parametrize("stopped", [False, True])
def test_ranks_end_with_the_command_that_was_killed(tmp_path: Path, stopped: bool) -> None:
    process = started(tmp_path / "run")
    if stopped:
        process.send_signal(signal.SIGTSTP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
    process.kill()
    process.communicate(timeout=SECONDS)
    assert eventually(lambda: not (tmp_path / "run" / "run.lock").exists())
    assert main(["train", "--resume", "--cores", "1", "--max-seconds", "0.1", "--out",
                 str(tmp_path / "run")]) == 0  # fmt: skip


@needs_mpi
def test_rank_0_has_the_terminal(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    command = [sys.executable, "-m", "microgpt", "train", *MODEL, "--steps", "12", "--cores", "2"]
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path / "run")], stdout=theirs, stderr=theirs, cwd=ROOT
    )
    os.close(theirs)
    shown = b""
    while b"everything is in" not in shown:
        shown += os.read(ours, 1 << 16)
    assert process.wait(SECONDS) == 0
    assert b"12/12" in shown  # of the bar


@needs_mpi
def test_more_ranks_than_cores_are_at_work(tmp_path: Path) -> None:
    ranks = (os.cpu_count() or 1) + 2
    done = train("--steps", 5, "--batch-size", ranks, "--out", tmp_path / "run", ranks=ranks)
    assert (done.returncode, done.stderr) == (0, "")


def test_without_mpi_the_command_says_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with patch("microgpt.runs.launch.mpiexec", return_value=None):
        assert main(["train", "--cores", "2", *MODEL, "--out", str(tmp_path / "run")]) == 2
    assert "install it with: python -m pip install mpi4py mpich" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_without_ranks_does_not_import_mpi(tmp_path: Path) -> None:
    program = (
        "import sys; from microgpt.__main__ import main; main();sys.exit('mpi4py' in sys.modules)"
    )
    options = [*MODEL, "--steps", "2", "--out", str(tmp_path / "run")]
    assert run(sys.executable, "-c", program, "train", *options).returncode == 0


@needs_mpi
@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0 or not shutil.which("ip"),
    reason="network namespaces need root and ip",
)
def test_two_machines(tmp_path: Path, alone: Path) -> None:
    """Two network namespaces, joined by a cable, and a launcher that enters the one it is told."""
    a, b = (f"microgpt{os.getpid()}{side}" for side in "ab")
    launcher = tmp_path / "enter"
    launcher.write_text(
        '#!/bin/sh\nwhile [ "${1#-}" != "$1" ]; do shift; done\n'
        f'case $1 in *.1) n={a};; *) n={b};; esac; shift; exec ip netns exec $n sh -c "$*"\n'
    )
    launcher.chmod(0o755)
    for command in (
        f"netns add {a}", f"netns add {b}",
        f"link add name m{os.getpid()}a netns {a} type veth peer name m{os.getpid()}b netns {b}",
        f"-n {a} addr add 10.71.0.1/24 dev m{os.getpid()}a",
        f"-n {b} addr add 10.71.0.2/24 dev m{os.getpid()}b",
        f"-n {a} link set m{os.getpid()}a name veth0 up", f"-n {a} link set lo up",
        f"-n {b} link set m{os.getpid()}b name veth0 up", f"-n {b} link set lo up",
    ):  # fmt: skip
        if (made := run("ip", *command.split())).returncode:
            pytest.skip(f"no network namespaces here: {made.stderr}")
    try:
        done = run(
            "ip", "netns", "exec", a, mpiexec(), "-launcher", "ssh", "-launcher-exec", launcher,
            "-iface", "veth0", "-hosts", "10.71.0.1:1,10.71.0.2:1", "-n", 2,
            sys.executable, "-m", "microgpt", "train", *MODEL, "--steps", 12,
            "--out", tmp_path / "run",
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
        assert losses(tmp_path / "run") == pytest.approx(losses(alone), rel=1e-12)
    finally:
        run("ip", "netns", "del", a)
        run("ip", "netns", "del", b)
