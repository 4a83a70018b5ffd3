"""All entry points: what holds for one command, option and backend holds for all of them.

Special files at every option that writes, every command under closed, full and broken output,
signals from the first import on, and all of it as an ordinary user as well.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from faults import quiet, training
from mutations import made_up

import microgpt as library
from crosscheck.__main__ import main as crosscheck
from crosscheck.cases import load_case, save_case
from crosscheck.kit import write_kit
from crosscheck.trace import trace
from crosscheck.traces import save_trace
from microgpt import strict_yaml
from microgpt.backend import BACKENDS
from microgpt.cli.commands import main as microgpt
from microgpt.data import load_documents
from microgpt.errors import MicrogptError
from microgpt.runs import directory as rundir
from microgpt.runs import memory
from microgpt.runs.checkpoint import FILE_NAME, Checkpoint, save_checkpoint
from microgpt.runs.directory import METRICS, RUN_FILES
from microgpt.runs.files import write_whole
from microgpt.settings import load_config
from microgpt.tokenizer import build_tokenizer

ROOT = Path(__file__).resolve().parents[2]
COLLECT = ["test", "--collect-only", "-q", "--case", "one-position"]  # ends soon if it begins
posix = pytest.mark.skipif(os.name != "posix", reason="special files, signals, users")
pytestmark = posix


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    out = tmp_path_factory.mktemp("doors") / "run"
    start = training(out.parent, "vectorized", 6, 3)
    assert quiet([*start, "--out", str(out)]) == (0, "")
    return out


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trace."""
    path, case = tmp_path_factory.mktemp("doors") / "trace", load_case("one-position")
    save_trace(path, case, "vectorized", "float64", trace(case, "vectorized", "float64", 1))
    return path


# Special files at every option that writes


def special(kind: str, path: Path) -> None:
    """Make something that is no regular file, never a real device."""
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link":
        os.mkfifo(path.with_name("elsewhere"))
        path.symlink_to(path.with_name("elsewhere"))
    elif kind == "open file":  # as /dev/stdout is where standard output goes to a file
        if not Path("/proc/self/fd").exists():
            pytest.skip("a system without /proc")
        path.symlink_to(f"/proc/self/fd/{os.open(__file__, os.O_RDONLY)}")
    else:
        try:
            os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 3))
        except PermissionError:
            pytest.skip("only root makes devices")


def _case(path: Path) -> None:
    save_case(load_case("one-position"), path)


def _gpt(path: Path) -> None:
    if path.is_dir():
        pytest.skip("a checkpoint goes into a folder")
    library.GPT(["ab"], n_embd=4, n_head=2).save(path)


def _trace(path: Path) -> int:
    case = ["--case", "one-position", "--backend", "vectorized", "--steps", "1"]
    return crosscheck(["trace", *case, "--out", str(path)])


def _kit(name: str) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        path.rename(path.with_name(name))
        write_kit(path.parent, ["one-position"], answers=True)

    return write


FULL = "error: what is printed cannot be written: No space left on device"

WRITERS: dict[str, Callable[[Path], object]] = {
    "trace --out": _trace,
    "test --json": lambda path: crosscheck([*COLLECT, "--json", str(path)]),
    "test --html": lambda path: crosscheck([*COLLECT, "--html", str(path)]),
    "test --save-case": lambda path: crosscheck([*COLLECT, "--save-case", str(path)]),
    "a case": _case,
    "a library's checkpoint": _gpt,
    "port --html": lambda path: crosscheck(["port", "--program", "{in}{out}", "--html", str(path)]),
    "report --out": lambda path: microgpt(["report", "run", "--out", str(path)]),
    "atlas --out": lambda path: microgpt(["atlas", "--out", str(path)]),
    "diff --html": lambda path: crosscheck(["diff", "a", "b", "--html", str(path)]),
    **{
        f"kit: {name}": _kit(name)
        for name in ("GUIDE.md", "CASES.md", "one-position.in.safetensors",
                     "one-position.answers.safetensors")
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", ["FIFO", "device", "link", "folder", "open file"])
@pytest.mark.parametrize("writer", WRITERS)
def test_what_is_no_file_is_refused_and_stays_wherever_a_file_is_written(
    writer: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "target.yaml"
    special(kind, path)
    before = os.lstat(path)
    try:
        status = WRITERS[writer](path)
        said = capsys.readouterr().err.strip()
    except MicrogptError as error:
        status, said = 2, str(error)
    kept = path if os.path.lexists(path) else tmp_path / writer.partition(": ")[2]
    assert os.lstat(kept).st_mode == before.st_mode
    assert os.lstat(kept).st_ino == before.st_ino
    assert status == (pytest.ExitCode.USAGE_ERROR if writer.startswith("test") else 2)
    assert "not a file; choose another name" in said
    assert "\n" not in said


@pytest.mark.parametrize("name", ["a" * 255, "\u00e9" * 127, "b" * 240])
def test_a_file_may_have_any_name_that_the_system_takes(name: str, tmp_path: Path) -> None:
    write_whole(tmp_path / name, b"whole")
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_bytes() == b"whole"


@pytest.mark.parametrize("count", [1500, 3000])
def test_a_folder_in_too_many_folders_is_refused_in_one_line(count: int, tmp_path: Path) -> None:
    deep = str(tmp_path / "/".join("d" * count))
    status, said = quiet([*training(tmp_path, "vectorized", 2, 0), "--out", deep])
    assert status == 2
    assert said.count("\n") == 1
    assert "File name too long" in said


@pytest.mark.parametrize("name", ["progress.json", "01_value.py"])
@pytest.mark.parametrize("begun", [False, True])
def test_exercises_that_are_no_files_are_neither_read_nor_replaced(
    name: str, begun: bool, tmp_path: Path
) -> None:
    if begun:
        assert quiet(["learn", str(tmp_path)]) == (0, "")
        (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    for command in ("learn", "check"):
        status, said = quiet([command, str(tmp_path)])
        assert status == 2
        assert said.count("\n") == 1
    assert stat.S_ISFIFO((tmp_path / name).stat().st_mode)


@pytest.mark.parametrize("name", RUN_FILES)
@pytest.mark.parametrize("more", [["--resume"], ["--overwrite"]])
def test_a_run_leaves_what_is_no_file_as_it_is(
    more: list[str], name: str, run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(run, out)
    (out / name).unlink()
    os.mkfifo(out / name)
    before = {path.name: path.lstat() for path in out.iterdir()}
    start = training(tmp_path, "vectorized", 6, 3)
    begin = ["train", "--steps", "9"] if more == ["--resume"] else start
    status, said = quiet([*begin, *more, "--out", str(out)])
    assert status == 2
    assert said.count("\n") == 1
    after = {path.name: path.lstat() for path in out.iterdir()}
    assert {n: s.st_ino for n, s in after.items()} == {n: s.st_ino for n, s in before.items()}


@pytest.mark.parametrize(
    "arguments",
    [
        ["trace", "--case", "one-position", "--backend", "scalar", "--out", ""],
        ["diff", "a", "b", "--html", ""],
        ["kit", ""],
    ],
)
def test_an_empty_name_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert crosscheck(arguments) == 2
    said = capsys.readouterr().err
    assert "expected the name of a" in said
    assert said.count("\n") == 1
    for command in ("report", "atlas"):
        assert microgpt([command, *["run"] * (command == "report"), "--out", ""]) == 2
        assert "expected the name of a file" in capsys.readouterr().err
    assert crosscheck([*COLLECT, "--json", ""]) == pytest.ExitCode.USAGE_ERROR
    assert "--json: expected the name of a file" in capsys.readouterr().err


def test_whole_files_are_written_in_one_place() -> None:
    """A file that is opened to be written elsewhere would lack the refusals of write_whole."""
    allowed = {"files.py", "directory.py", "shell.py", "opponents.py", "mutants.py", "processes.py"}
    writing = {"write_text", "write_bytes", "copyfile", "copy", "copy2", "save_file", "dump"}
    found = set()
    for package in ("microgpt", "crosscheck", "scalar", "vectorized"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if not isinstance(node, ast.Call):
                    continue
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                module = getattr(getattr(node.func, "value", None), "id", "")
                modes = [x.value for x in node.args[1:2] if isinstance(x, ast.Constant)]
                opens = name == "open" and set("wax+") & set(str(modes))
                if (opens or name in writing) and module not in ("copy", "ast") and name != "copy":
                    found.add(path.name)
    assert found - allowed <= {"port.py", "ranks.py"}  # a folder of its own, and pipes


# Output that is closed, full, or has no reader


def commands(folder: Path, run: Path, recorded: Path) -> dict[str, list[str]]:
    case = ["trace", "--case", "one-position", "--steps", "1"]
    port = f"{sys.executable} -c pass {{in}} {{out}}"
    return {
        "train": ["microgpt", *training(folder, "vectorized", 3, 3), "--out", str(folder / "new")],
        "sample": ["microgpt", "sample", str(run)],
        "eval": ["microgpt", "eval", str(run)],
        "report": ["microgpt", "report", str(run), "--out", str(folder / "report.html")],
        "help": ["microgpt", "--help"],
        "version": ["microgpt", "--version"],
        "crosscheck help": ["crosscheck", "--help"],
        "test": ["crosscheck", "test", "-q", "--case", "one-position", "-k", "first_step"],
        "defects": ["crosscheck", "defects", "rmsnorm-backward-one-term"],
        "trace": ["crosscheck", *case, "--backend", "scalar", "--out", str(folder / "trace")],
        "diff": ["crosscheck", "diff", str(recorded), str(recorded)],
        "kit": ["crosscheck", "kit", str(folder / "kit"), "--case", "one-position"],
        "port": ["crosscheck", "port", "--program", port, "--case", "one-position"],
    }


COMMANDS = (
    *("train", "sample", "eval", "report", "help", "version", "crosscheck help", "test"),
    *("defects", "trace", "diff", "kit", "port"),
)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_whose_output_is_closed_full_or_unread_ends_in_a_line_or_none(
    command: str, run: Path, recorded: Path, tmp_path: Path
) -> None:
    words = [sys.executable, "-m", *commands(tmp_path, run, recorded)[command]]
    at_most = {"full": (2, 1), "closed": (1 if command == "port" else 0, 0), "unread": (141, 0)}
    for output, (status, lines) in at_most.items():
        shutil.rmtree(tmp_path / "new", ignore_errors=True)
        read, write = os.pipe()
        os.close(read)
        with open("/dev/full", "w", encoding="utf-8") as full:
            done = subprocess.run(
                words if output != "closed" else ["sh", "-c", 'exec "$@" >&-', "sh", *words],
                cwd=ROOT,
                stdout={"full": full, "unread": write, "closed": None}[output],
                stderr=subprocess.PIPE,
                text=True,
            )
        os.close(write)
        assert (done.returncode, done.stderr.count("\n")) == (status, lines), (output, done.stderr)
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["train", "test"])
def test_a_command_without_any_stream_does_what_it_should(
    command: str, run: Path, recorded: Path, tmp_path: Path
) -> None:
    words = [sys.executable, "-m", *commands(tmp_path, run, recorded)[command]]
    closed = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *words]
    assert subprocess.run(closed, cwd=ROOT).returncode == 0
    if command == "train":
        assert {path.name for path in (tmp_path / "new").iterdir()} == set(RUN_FILES)


@pytest.mark.parametrize("program", ["microgpt", "crosscheck"])
def test_what_cannot_be_said_on_a_closed_stderr_is_said_nowhere(program: str) -> None:
    words = [sys.executable, "-m", program, "wombat"]
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" 2>&-', "sh", *words], cwd=ROOT, capture_output=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (2, b"", b"")


# Signals from the first import on

COUNTED = """
import os, runpy, signal, sys
at, number, count = int(sys.argv.pop(1)), int(sys.argv.pop(1)), 0
def seen(event, arguments):
    global count
    if event == "import" and callable(signal.getsignal(signal.SIGTERM)):
        count += 1
        if count == at:
            os.kill(os.getpid(), number)
sys.addaudithook(seen)
sys.argv[0] = sys.argv[1]
del sys.argv[1]
try:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
finally:
    print(f"imports {count}", file=sys.stderr)
"""


def imported(at: int, number: int, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command that gets a signal at the n-th import after its entry began."""
    words = [sys.executable, "-c", COUNTED, str(at), str(number), *command]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize(
    "command", [("microgpt", "sample", "RUN"), ("crosscheck", "diff", "TRACE", "TRACE")]
)
def test_a_signal_at_any_moment_of_the_start_ends_a_command_in_one_line(
    command: tuple[str, ...], run: Path, recorded: Path
) -> None:
    places = {"RUN": str(run), "TRACE": str(recorded)}
    words = [places.get(word, word) for word in command]
    undisturbed = imported(0, 0, *words)
    assert undisturbed.returncode == 0, undisturbed.stderr
    count = int(undisturbed.stderr.split()[-1])
    assert count > 100
    name = "microgpt" if command[0] == "microgpt" else "python -m crosscheck"
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    for moment in range(20):
        number = numbers[moment % 3]
        done = imported(1 + moment * (count - 1) // 20, number, *words)
        said = done.stderr.partition("imports ")[0]
        assert done.returncode == 128 + number, (moment, done.stderr)
        assert said.startswith(name), (moment, done.stderr)
        assert said.endswith(": interrupted\n")
        assert said.count("\n") == 1
        assert done.stdout == ""


def test_the_entry_imports_next_to_nothing_before_it_handles_signals() -> None:
    code = (
        "import sys; before = set(sys.modules); import microgpt.runs.signals; print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True)
    assert not {"numpy", "argparse", "typing", "re", "yaml"} & set(done.stdout.decode().split())
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'microgpt = "microgpt.__main__:main"' in text


def test_a_signal_that_python_cannot_raise_is_not_lost() -> None:
    code = """
import os, signal
from microgpt.runs.signals import at_once, begin
class Deleted:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
begin("microgpt")
with at_once():
    Deleted()
    print("went on")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (143, "", "microgpt: interrupted\n")


# Escapes


def test_what_a_file_says_cannot_command_the_terminal(
    recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = tmp_path / "evil\x1b[31m"
    shutil.copy(recorded, evil)
    assert crosscheck(["diff", str(recorded), str(evil), "--only", "wombat"]) == 2
    assert crosscheck(["diff", str(evil), str(evil)]) == 0
    assert _trace(evil) == 0
    header = {"wte": {"dtype": "F\x1b[31m", "shape": [1], "data_offsets": [0, 8]}}
    text = json.dumps(header).encode()
    evil.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    assert crosscheck(["diff", str(recorded), str(evil)]) == 2
    assert crosscheck(["kit", str(tmp_path / "kit"), "--case", str(evil)]) == 2
    assert crosscheck(["trace", f"--wombat{evil}"]) == 2
    said = "".join(capsys.readouterr())
    assert "\x1b" not in said
    assert r"\x1b[31m" in said


def test_an_option_of_pytest_cannot_command_the_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert crosscheck([*COLLECT, "--save-case", "a\x1b[2J"]) == pytest.ExitCode.USAGE_ERROR
    said = capsys.readouterr().err.strip()
    assert said == r"ERROR: --save-case a\x1b[2J: expected a name in .yaml"


def test_a_case_whose_name_commands_the_terminal_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MicrogptError, match="take printable characters"):
        load_case(str(_written(tmp_path / "a\x1b[2J.yaml", "why: x\nchars: a\nbatches: [[a]]\n")))


def _written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_memory_that_runs_out_is_said_in_one_line(
    recorded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with patch("crosscheck.traces.diff", side_effect=MemoryError):
        assert crosscheck(["diff", str(recorded), str(recorded)]) == 2
    assert capsys.readouterr().err.startswith("python -m crosscheck diff: error: there is not en")


def test_memory_that_runs_out_in_an_import_is_said_in_one_line() -> None:
    code = "from microgpt.runs.signals import begin; begin('microgpt'); raise MemoryError"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    said = "microgpt: error: there is not enough memory\n"
    assert (done.returncode, done.stderr) == (2, said)


def test_a_second_signal_says_nothing_twice() -> None:
    code = """
import os, signal
from unittest.mock import patch
from microgpt.runs.signals import begin
begin("microgpt")
write = os.write
def interrupted(*arguments):
    write(*arguments)
    os.kill(os.getpid(), signal.SIGTERM)
with patch("os.write", interrupted):
    os.kill(os.getpid(), signal.SIGINT)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "microgpt: interrupted\n")


# Sampling


def outsized(path: Path, size: float) -> str:
    """A sound checkpoint whose logits are about that large after every token but BOS."""
    config = load_config(overrides={"n_embd": "4", "n_head": "2", "block_size": "5"})
    tokenizer = build_tokenizer("ab", config)
    state = made_up(config, tokenizer, Random(5))
    params = {name: np.zeros(np.shape(x)) for name, x in state.params.items()}
    params["wte"][:] = [[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0], [1.0, -1.0, 0.0, 0.0]]
    params["lm_head"][:2] = size
    held = Checkpoint(config, tokenizer, replace(state, params=params, updates=0), Random(1), "0")
    save_checkpoint(path, held)
    return str(path)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("size", "temperature"), [(1.7e308, "1.0"), (1e20, "1e-300")])
def test_logits_that_overflow_after_the_first_are_not_drawn_from(
    size: float,
    temperature: str,
    backend: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    held = outsized(tmp_path / FILE_NAME, size)
    words = ["sample", held, "--backend", backend, "--temperature"]
    assert microgpt([*words, temperature]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "a logit is not finite; the model's numbers are too large to draw from" in printed.err
    assert printed.err.count("\n") == 1
    if size < 1e308:
        assert microgpt([*words, "1.0"]) == 0


def test_a_text_that_is_not_drawn_does_not_refuse_those_that_are_drawn(run: Path) -> None:
    gpt = library.GPT.load(run)
    expected = gpt.sample(5, seed=1)
    with patch("vectorized.sample.draw", side_effect=FloatingPointError):
        assert gpt.sample(5, seed=1) == expected


# Candidates

ALONE = "def rmsnorm_backward(dy, y, scale):\n    {}\n"


@pytest.mark.parametrize("form", ["{}\n", ALONE], ids=["import", "call"])
@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise SystemExit(0)", "ends the program; leave exit() out"),
        ("import os; os._exit(0)", "ends the program; leave exit() out"),
        ("raise GeneratorExit", "raises GeneratorExit"),
        ("import os; os.fork() or os._exit(0); os.wait(); 1 / 0", "raises ZeroDivisionError"),
        ("import itertools; all(x >= 0 for x in itertools.count())", "is not done after"),
    ],
)
def test_a_candidate_that_ends_the_program_is_wrong(
    body: str, said: str, form: str, tmp_path: Path
) -> None:
    """Exit status 0, which it may give to the process, would say that it is right."""
    mine = _written(tmp_path / "mine.py", form.format(body))
    words = [sys.executable, "-m", "crosscheck", "check", str(mine), "--time-limit", "0.2"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2 if form != ALONE else 1, "")
    assert said in done.stdout
    assert done.stdout.count("your line") == 1


FORKS_ONCE = """import os
    if "FORKED" not in os.environ:
        os.environ["FORKED"] = "1"
        if os.fork():
            os.wait()
    return dy"""


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (FORKS_ONCE, "gives wrong numbers in dx"),
        ("pass\nrmsnorm_backward = max", "raises ValueError"),
        ("return type('R', (), {'__array__': lambda self: exit(0)})()", "returns ragged lists"),
        ("raise type('E', (Exception,), {'__str__': lambda self: 1 / 0})", "raises E"),
    ],
)
def test_a_candidate_is_judged_once_in_one_process(body: str, said: str, tmp_path: Path) -> None:
    mine = _written(tmp_path / "mine.py", ALONE.format(body))
    words = [sys.executable, "-m", "crosscheck", "check", str(mine)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "")
    assert said in done.stdout
    assert done.stdout.count("python -m crosscheck check") == 1


def test_what_ends_the_program_does_not_give_it_its_status(
    recorded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with patch("crosscheck.traces.diff", side_effect=SystemExit(0)):
        assert crosscheck(["diff", str(recorded), str(recorded)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_candidate_that_sleeps_is_ended_though_its_output_is_full(tmp_path: Path) -> None:
    mine = _written(tmp_path / "mine.py", ALONE.format("import time; time.sleep(60)"))
    words = [sys.executable, "-m", "crosscheck", "check", str(mine), "--time-limit", "0.2"]
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = subprocess.run(words, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, timeout=40)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize("body", ["{}; 1 / 0", "import time; {}; time.sleep(60)"])
def test_a_candidate_cannot_command_the_terminal(body: str, tmp_path: Path) -> None:
    said = "import sys; print('\x1b[31m', file=sys.stderr)"
    mine = _written(tmp_path / "mine.py", ALONE.format(body.format(said)))
    words = [sys.executable, "-m", "crosscheck", "check", str(mine), "--time-limit", "0.2"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "\x1b" not in done.stdout + done.stderr
    assert r"\x1b[31m" in done.stderr


@pytest.mark.parametrize("body", ["raise SystemExit(0)", "raise GeneratorExit"])
def test_an_exercise_that_ends_the_program_is_wrong(body: str, tmp_path: Path) -> None:
    assert quiet(["learn", str(tmp_path)]) == (0, "")
    first = tmp_path / "01_value.py"
    text = first.read_text(encoding="utf-8").replace("raise NotImplementedError", body, 1)
    first.write_text(text, encoding="utf-8")
    assert microgpt(["check", str(tmp_path)]) == 1


@pytest.mark.parametrize(
    ("text", "output", "status", "said"),
    [
        (ALONE.format("raise KeyboardInterrupt"), None, 130, "interrupted"),
        (ALONE.format("return dy"), "/dev/full", 2, FULL),
    ],
)
def test_a_verdict_by_pytest_has_the_protections_of_the_commands(
    text: str, output: str | None, status: int, said: str, tmp_path: Path
) -> None:
    mine = _written(tmp_path / "mine.py", text)
    words = [sys.executable, "-m", "pytest", "--candidate", str(mine)]
    with open(output or os.devnull, "w", encoding="utf-8") as out:
        done = subprocess.run(words, cwd=tmp_path, stdout=out, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (status, f"pytest --candidate: {said}\n")


def test_a_verdict_by_pytest_cannot_command_the_terminal(tmp_path: Path) -> None:
    mine = _written(tmp_path / "mine.py", "x = '\x1b[31m' +\n")
    words = [sys.executable, "-m", "pytest", "--candidate", str(mine)]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert r"\x1b[31m" in done.stdout
    assert "\x1b" not in done.stdout


# Configurations


@pytest.mark.parametrize("name", ["...yaml", ".hidden.yaml", "a b.yaml", "a\x1b[31m.yaml"])
def test_a_run_is_named_after_its_file_only_where_that_is_a_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    _written(tmp_path / name, "steps: 2\n")
    assert microgpt(["train", "--config", name]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "name a directory with --out DIR" in said
    assert "\x1b" not in said
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("text", ["1_2", "\u0663", " 3", "3\n", "0x3"])
def test_a_number_on_the_command_line_is_decimal(text: str) -> None:
    for name, kind in (("steps", "a whole number"), ("temperature", "a number")):
        with pytest.raises(MicrogptError, match=f"--{name}: expected {kind}, got [^(]*$"):
            load_config(overrides={name: text})


def test_a_name_of_a_data_set_is_quoted_at_no_great_length() -> None:
    with pytest.raises(MicrogptError) as refused:
        load_documents("x" * 900_000)
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize("loader", [strict_yaml.PythonLoader, strict_yaml.Loader])
@pytest.mark.parametrize("text", ["a: [" + "1," * 499_000 + "1]", "k: 1\n" * 200_000])
def test_large_yaml_is_read_no_further_than_it_is_believed(loader: Any, text: str) -> None:
    if text.startswith("k"):
        text = "".join(f"k{i}: 1\n" for i in range(80_000))
    read = loader(text)
    with pytest.raises(strict_yaml.yaml.MarkedYAMLError, match="more than 10,000 keys and values"):
        read.get_single_data()
    assert read.count == 1 + strict_yaml.MOST


def test_a_configuration_that_was_changed_by_hand_is_said(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(run, out)
    config = out / "config.yaml"
    config.write_text(
        config.read_text(encoding="utf-8").replace("learning_rate: 0.", "learning_rate: 7."),
        encoding="utf-8",
    )
    assert microgpt(["train", "--resume", "--out", str(out), "--steps", "8"]) == 0
    said = capsys.readouterr().out.splitlines()[0]
    assert said.startswith("config.yaml had learning_rate 7.")
    assert microgpt(["train", "--resume", "--out", str(out), "--steps", "9"]) == 0
    assert "config.yaml" not in capsys.readouterr().out


# Data


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="a system without /proc")
def test_files_of_the_system_that_do_not_say_how_long_they_are_are_not_read() -> None:
    """/proc/kmsg is such a file, whose reader waits for ever."""
    opened = open

    def unread(path: Any, *more: Any, **others: Any) -> Any:
        assert not str(path).startswith("/proc")
        return opened(path, *more, **others)

    for arguments in (
        ["train", "--dataset", "/proc/self/status"],
        ["train", "--config", "/proc/self/status", "--out", "none"],
        ["sample", "/proc/self/status"],
    ):
        with patch("builtins.open", unread):
            status, said = quiet(arguments)
        assert status == 2
        assert said.count("\n") == 1


def test_the_lines_of_a_file_are_counted_all_over_it(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_bytes(b"x" * (1 << 20) + b"\n" * (9 << 20))
    lines = 9 << 20
    needed = lines * memory.LINE * 0.9
    with (
        patch("microgpt.runs.memory.machine_memory", lambda: needed),
        pytest.raises(MicrogptError, match="to read it would take about"),
    ):
        memory.check_file(file, lines=True)
    with patch("microgpt.runs.memory.machine_memory", lambda: 2 * needed):
        memory.check_file(file, lines=True)


def test_foreign_lines_in_metrics_are_not_read(run: Path, tmp_path: Path) -> None:
    lines = (run / METRICS).read_bytes()
    (tmp_path / METRICS).write_bytes(lines + b"ab\n" * 4_000_000)
    tracemalloc.start()
    assert rundir.metrics_until(tmp_path, 6) == lines
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


def test_where_drawing_the_weights_takes_long_it_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("microgpt.train.MANY", 100)
    start = training(tmp_path, "vectorized", 2, 0)
    assert microgpt([*start, "--out", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.startswith("drawing ")


def test_where_drawing_documents_takes_long_it_is_said_beside_them(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert microgpt(["sample", str(run), "--num", "2"]) == 0
    plain = capsys.readouterr()
    monkeypatch.setattr("microgpt.layout.MANY", 100)
    assert microgpt(["sample", str(run), "--num", "2"]) == 0
    said = capsys.readouterr()
    assert said.out == plain.out
    assert plain.err == ""
    assert said.err.startswith("drawing 2 samples from ")
    assert said.err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["eval", "RUN", "--dataset", ""],
        ["train", "--config", "", "--out", "NONE"],
        ["bench", "--config", ""],
    ],
)
def test_an_empty_name_means_no_default(arguments: list[str], run: Path, tmp_path: Path) -> None:
    places = {"RUN": str(run), "NONE": str(tmp_path / "none")}
    status, said = quiet([places.get(word, word) for word in arguments])
    assert status == 2
    assert "no preset and no file ''" in said or "'' names no data set and no file" in said
    assert said.count("\n") == 1


# As an ordinary user

ORDINARY = """
import json, os, sys
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from io import StringIO
for name in sys.argv[1].split():
    import_module(name)
if os.getuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
if not os.access(sys.argv[2], os.R_OK | os.X_OK):
    raise SystemExit("unreadable")
for program, *words in json.load(sys.stdin):
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()) as said:
        status = sys.modules[program].main(words)
    print(json.dumps([status, said.getvalue()]))
"""
# imported first: an ordinary user may not be allowed to read the interpreter's files
BEFOREHAND = """microgpt.cli.commands crosscheck.__main__ crosscheck.traces microgpt.train
microgpt.cli.report microgpt.pages.run_report microgpt.runs.directory
vectorized.backend scalar.backend microgpt.evaluate encodings.idna
encodings.utf_8_sig encodings.unicode_escape yaml safetensors.numpy
multiprocessing.context filelock decimal shlex"""


@posix
def test_an_ordinary_user_is_refused_in_one_line(run: Path) -> None:
    train, check = "microgpt.cli.commands", "crosscheck.__main__"
    case = ["trace", "--case", "one-position", "--backend", "vectorized"]
    with tempfile.TemporaryDirectory(prefix="ordinary-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        start = training(folder, "vectorized", 2, 0)
        closed, secret = folder / "closed", folder / "secret.yaml"
        (folder / "mine").mkdir()
        (folder / "mine").chmod(0o777)
        closed.mkdir()
        closed.chmod(0o555)
        secret.write_text("n_layer: 1\n", encoding="utf-8")
        secret.chmod(0)
        shutil.copytree(run, folder / "theirs")
        (folder / "theirs").chmod(0o555)
        refused = [
            [train, *start, "--out", "closed/run"],
            [train, *start, "--out", "theirs", "--overwrite"],
            [train, "train", "--resume", "--steps", "9", "--out", "theirs"],
            [train, "train", "--config", "secret.yaml", "--out", "mine/other"],
            [train, "train", "--dataset", "secret.yaml", "--out", "mine/other"],
            [train, "sample", "secret.yaml"],
            [train, "report", "mine/run", "--out", "closed/page.html"],
            [check, *case, "--out", "closed/trace"],
            [check, "diff", "secret.yaml", "secret.yaml"],
            [check, "kit", "closed/kit", "--case", "one-position"],
        ]
        commands = [[train, *start, "--out", "mine/run"], *refused]
        done = subprocess.run(
            [sys.executable, "-c", ORDINARY, BEFOREHAND, str(ROOT)],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            input=json.dumps(commands),
            capture_output=True,
            text=True,
        )
        if done.stderr == "unreadable\n":
            pytest.skip("an ordinary user may not read this checkout")
        assert done.returncode == 0, done.stderr
        first, *others = map(json.loads, done.stdout.splitlines())
        assert first == [0, ""]
        assert len(others) == len(refused)
        for words, (status, said) in zip(refused, others):
            assert status == 2, (words, said)
            assert said.count("\n") == 1
            assert ": error: " in said
        assert list(closed.iterdir()) == []
        assert [path.name for path in (folder / "mine").iterdir()] == ["run"]
