"""`python -m crosscheck`: what it says before, during and after."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from crosscheck.__main__ import main
from crosscheck.cases import case_names
from crosscheck.domain import mutations
from crosscheck.mutants import (
    DIFFERS,
    MEMORY,
    SURVIVES,
    Mutant,
    Score,
    _changes_memory,
    domain_mutants,
    tried,
)
from microgpt.gpt import GPT
from microgpt.settings import FIXTURES

ROOT = FIXTURES.parent


def _run(*arguments: str, flags: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *flags, "-m", "crosscheck", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_help_of_test_names_the_options_and_the_cases(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["test", "--help"]) == 0
    words = capsys.readouterr().out
    for option in ("--backend", "--reference", "--dtype", "--case", "--seed", "--save-case",
                   "--candidate", "--hint"):  # fmt: skip
        assert option in words
    assert all(name in "".join(words.split()) for name in case_names())


def test_a_file_of_ones_own_is_no_test_and_the_command_for_it_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text("def rmsnorm_backward(dy, y, scale):\n    return dy\n", encoding="utf-8")
    assert main(["test", "-q", "--collect-only", str(mine)]) == 2
    assert f"python -m crosscheck check {mine}" in capsys.readouterr().err


def test_the_first_line_names_the_copies() -> None:
    done = _run("test", "-q", "--collect-only", "--case", "one-position")
    assert done.stdout.startswith(f"crosscheck of scalar/ and vectorized/ in {ROOT}\n")
    assert done.stdout.count("crosscheck of") == 1
    done = _run("defects", "rmsnorm-backward-one-term")
    assert done.stdout.startswith(f"defects planted in scalar/ and vectorized/ in {ROOT}\n")


def test_another_copy_than_the_checkouts_is_refused_in_one_line(tmp_path: Path) -> None:
    for package in ("scalar", "vectorized", "crosscheck"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    (tmp_path / "pyproject.toml").touch()
    inside = tmp_path / "tests"
    inside.mkdir()
    for module in (["crosscheck", "test"], ["crosscheck", "defects"], ["microgpt", "train"]):
        done = subprocess.run(
            [sys.executable, "-m", *module],
            cwd=inside,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2, done.stderr
        assert "would come from" in done.stderr
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("flag", ["-O", "-OO"])
def test_without_assertions_it_works_or_says_why_not(flag: str, tmp_path: Path) -> None:
    done = _run("test", flags=(flag,))
    assert done.returncode == 2
    assert done.stderr.startswith("python -m crosscheck test: error: python -O leaves out")
    assert done.stderr.count("\n") == 1
    done = _run("defects", "rmsnorm-backward-one-term", flags=(flag,))
    assert done.returncode == 0, done.stderr
    assert "1 of 1 caught" in done.stdout
    out = str(tmp_path / "a.safetensors")
    arguments = ["trace", "--case", "one-position", "--backend", "scalar", "--out", out]
    assert _run(*arguments, flags=(flag,)).returncode == 0
    assert _run("diff", out, out, flags=(flag,)).returncode == 0
    assert _run("--help", flags=(flag,)).returncode == 0


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_defects_are_printed_as_they_go_and_end_on_ctrl_c_in_one_line() -> None:
    command = [sys.executable, "-m", "crosscheck", "defects"]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout
    assert process.stderr
    for line in process.stdout:
        if line.startswith("repeated-tokens-once"):  # the first of all, while others are to come
            break
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate()
    assert process.returncode == 130
    assert errors == "python -m crosscheck defects: interrupted\n"
    assert "caught" not in rest


# --- files of cases and kits ---------------------------------------------------------------------


def test_the_command_that_draws_parameters_says_what_it_has_drawn(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written: list[Path] = []
    monkeypatch.setattr("crosscheck.__main__.save_params", lambda path, _: written.append(path))
    assert main(["params", "gelu"]) == 0
    assert [path.name for path in written] == ["gelu.safetensors"]
    assert re.fullmatch(r"15 parameters drawn, beside .*gelu\.yaml\n", capsys.readouterr().out)


def test_a_kit_is_not_written_over_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.c").write_text("int main;\n", encoding="utf-8")
    assert main(["kit", str(tmp_path / "mine.c")]) == 2
    assert "mine.c is a file; name a folder for the kit" in capsys.readouterr().err


# --- mutants -------------------------------------------------------------------------------------

SOURCE = """\
def f(x, w, tap):
    a = tap.a = x @ w.T + 2.0 * x  # (B, T, C)
    b = einsum("bto,bti->oi", a, x)  # (C, C)
    s = b.sum(axis=-1)
    return g(a, x) * s
"""


def test_domain_mutants_of_every_kind_are_programs() -> None:
    found = list(mutations(SOURCE, lists=False))
    assert {what for what, _ in found} == {
        "a factor dropped",
        "a term dropped",
        "tensors exchanged",
        "axes transposed",
        "another axis",
        "another sum",
        "not transposed",
        "transposed",
    }
    for _, source in found:
        compile(source, "mutant", "exec")
    lines = {new for _, source in found for new in source.splitlines()}
    assert "    a = tap.a = (x @ w.T)  # (B, T, C)" in lines
    assert "    return (g(x, a)) * s" in lines
    assert "    b = einsum(('bto,bti->io'), a, x)  # (C, C)" in lines


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["nothere.py"], "nothere.py has no mechanical mutants; vectorized/model.py"),
        (["vectorized/adam.py", "nothere.py"], "nothere.py has no mechanical mutants"),
        (
            ["--kind", "domain", "vectorized/record.py"],
            "vectorized/record.py has no domain mutants",
        ),
        (["--sample", "0"], "--sample: expected 1 or more, got 0"),
        (["--sample", "x"], "--sample: expected a whole number, got 'x'"),
    ],
)
def test_a_wrong_call_of_mutants_is_refused_before_any_mutant_is_made(
    words: list[str],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def made(*_: object) -> None:
        pytest.fail("a mutant is made")

    for function in ("mechanical_mutants", "domain_mutants"):
        monkeypatch.setattr(f"crosscheck.mutants.{function}", made)
    assert main(["mutants", *words]) == 2
    assert told in capsys.readouterr().err


def test_every_line_of_the_text_that_computes_has_domain_mutants() -> None:
    mutated = {mutant.line for mutant in domain_mutants() if mutant.file == "vectorized/model.py"}
    text = (ROOT / "vectorized" / "model.py").read_text(encoding="utf-8").splitlines()
    computing = {n for n, line in enumerate(text, 1) if re.search(r"[*/+@(].*  # \(", line)}
    assert len(computing) > 60
    # the mask, the ReLU, the heads' channels: nothing there to drop or to exchange
    assert len(computing - mutated) <= 3, [text[n - 1] for n in computing - mutated]


def test_a_mutant_is_caught_and_a_harmless_one_survives() -> None:
    path = ROOT / "vectorized" / "model.py"
    source = path.read_text(encoding="utf-8")

    def mutant(old: str, new: str) -> Mutant:
        return Mutant("vectorized/model.py", 1, "", old, new, source.replace(old, new))

    wrong = mutant("return dy * (x > 0.0)", "return dy + (x > 0.0)")
    harmless = mutant("return dy * (x > 0.0)", "return (x > 0.0) * dy")
    assert [outcome for _, outcome in tried([wrong, harmless])] == [DIFFERS, SURVIVES]


@pytest.mark.parametrize("file", MEMORY)
def test_what_is_said_to_change_memory_alone_is_in_its_file(file: str) -> None:
    text = (ROOT / file).read_text(encoding="utf-8")
    for name in MEMORY[file]:
        assert re.search(rf"^(    )?(def |class )?{name}\b", text, re.MULTILINE), name


def test_rates_are_given_raw_and_without_lines_that_change_memory() -> None:
    file = "vectorized/lower.py"
    source = (ROOT / file).read_text(encoding="utf-8")
    line = 1 + source[: source.index("def placed(")].count("\n")
    memory = Mutant(file, line + 1, "", "", "", source)
    numbers = Mutant("vectorized/model.py", 3, "", "", "", "a = 1\nb = 2\nc = 3\n")
    assert _changes_memory(memory)
    assert not _changes_memory(numbers)
    score = Score()
    score.add(memory, SURVIVES)
    score.add(numbers, DIFFERS)
    last = str(score).splitlines()[-2].split()
    assert last == ["all", "2", "1", "0", "1", "50.0%", "100.0%"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("/dev/null", "/dev/null is a device or a pipe, not a file; expected such as mine.py"),
        (".", "this folder is no package: it has no __init__.py; name a file, such as mine.py"),
        ("mine.py", "there is no file mine.py; expected such as mine.py"),
    ],
)
def test_what_is_no_candidate_is_called_what_it_is(
    name: str,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["check", name]) == 2
    assert capsys.readouterr().err == f"python -m crosscheck check: error: {words}\n"


def test_a_checkpoint_is_not_compared_as_a_trace(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model"
    GPT(["ab"], n_embd=4, n_head=2).save(path)
    assert main(["diff", str(path), str(path)]) == 2
    said = capsys.readouterr().err
    assert "is a checkpoint, not a trace; record one with python -m crosscheck trace" in said


@pytest.mark.parametrize(
    "arguments",
    [
        ["trace", "--case", "one-position", "--backend", "scalar", "--out", "nowhere/a"],
        ["diff", "a", "b", "--html", "nowhere/a"],
        ["port", "--program", "{in}{out}", "--html", "nowhere/a"],
    ],
)
def test_a_single_file_gets_no_new_folder(
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert "there is no folder nowhere; make it first" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


def test_outside_a_checkout_nothing_is_left_in_the_users_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "crosscheck", "-q", "-p", "no:cacheprovider",
               "-k", "test_random_models and 0"]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert not [*tmp_path.iterdir()]
