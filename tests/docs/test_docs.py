"""README.md and docs/: links lead somewhere, commands parse, figures and quotations are current."""

from __future__ import annotations

import ast
import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from crosscheck import __main__ as crosscheck
from microgpt.cli import commands as microgpt

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
PARSERS = {
    "microgpt": (microgpt._parser, 1),
    "python -m crosscheck": (crosscheck._parser, 3),
}


def texts() -> Iterator[tuple[str, str]]:
    for page in PAGES:
        yield page.name, page.read_text(encoding="utf-8")


# --- links ---------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """What headings are called in links."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def link_complaints(page: Path, text: str) -> Iterator[str]:
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        if not file.exists():
            yield f"{page.name}: {target} leads nowhere"
        elif anchor and anchor not in anchors(file):
            yield f"{page.name}: {target}: there is no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    assert list(link_complaints(page, page.read_text(encoding="utf-8"))) == []


def test_a_link_that_leads_nowhere_is_found() -> None:
    text = "[a](docs/missing.md) [b](#missing) [c](docs/proof.md#missing) [d](docs/proof.md)"
    assert len(list(link_complaints(ROOT / "README.md", text))) == 3


def test_every_page_is_linked_from_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in PAGES[1:] if f"{page.name})" not in readme] == []


# --- commands ------------------------------------------------------------------------------------


def command_lines(text: str) -> Iterator[str]:
    """Every command line that a page shows: in blocks from their beginning, in a sentence whole."""
    for block in re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            command = line.removeprefix("$ ").rpartition("&& ")[2].removeprefix(".venv/bin/")
            yield re.split(r"  +", command)[0]
    prose = re.sub(r"^```\w*\n.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    for quoted in re.findall(r"`([^`\n]+)`", prose):
        yield re.sub(r"^uvx --from git\+URL ", "", quoted)


def command_complaint(line: str) -> str:
    """What a parser says against a command line; nothing if it is none of ours."""
    for program, (parser, length) in PARSERS.items():
        if line.startswith(f"{program} "):
            words = shlex.split(re.sub(r"\[[^\]]*\]", "", line))
            if len(words) == length + 1:  # a command by its name alone
                words.append("--help")
            said = io.StringIO()
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
                try:
                    parser().parse_known_args(words[length:]) if "test" in words else (
                        parser().parse_args(words[length:])
                    )
                except SystemExit as end:
                    return f"{line}: {said.getvalue()}" if end.code else ""
    return ""


def test_every_command_line_shown_parses() -> None:
    shown = [(page, line) for page, text in texts() for line in command_lines(text)]
    ours = [line for _, line in shown if line.startswith(tuple(f"{one} " for one in PARSERS))]
    assert len(ours) > 40
    assert [(page, said) for page, line in shown if (said := command_complaint(line))] == []


def test_a_command_line_that_does_not_parse_is_found() -> None:
    assert "unrecognized" in command_complaint("microgpt train --epochs 3")
    assert "there is no command fly" in command_complaint("microgpt fly high")
    assert "unrecognized" in command_complaint("python -m crosscheck check mine.py --hints")


def test_every_call_of_pytest_finds_its_tests() -> None:
    known = subprocess.run(
        [sys.executable, "-m", "pytest", "crosscheck", "--help"],
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
        check=True,
    ).stdout
    shown = {line for _, text in texts() for line in command_lines(text)}
    calls = [shlex.split(line)[1:] for line in shown if line.startswith("pytest ")]
    assert len(calls) > 8
    for words in calls:
        for option in (word for word in words if word.startswith("-")):
            assert re.search(rf"^ .*(?<![\w-]){option}(?![\w-])", known, re.MULTILINE), words
        paths = [word for word in words if word.startswith(("tests", "crosscheck"))]
        assert all((ROOT / path).exists() for path in paths), words
        if "-k" in words:
            names = [
                node.name
                for node in ast.walk(ast.parse((ROOT / paths[0]).read_text(encoding="utf-8")))
                if isinstance(node, ast.FunctionDef)
            ]
            for word in words[words.index("-k") + 1].split(" or "):
                assert any(word in name for name in names), words


def test_the_programs_of_tests_take_what_is_shown() -> None:
    shown = {line for _, text in texts() for line in command_lines(text)}
    calls = [shlex.split(line) for line in shown if line.startswith("python -m tests.")]
    assert len(calls) >= 4
    for _, _, module, *words in calls:
        assert (ROOT / f"{module.replace('.', '/')}.py").exists()
        source = (ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
        assert all(word.isdigit() or f'"{word}"' in source for word in words), (module, words)


# --- what the pages say --------------------------------------------------------------------------


def test_the_readme_has_fewer_than_150_lines_and_its_test_command() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(readme) < 150
    assert len([line for line in readme if re.fullmatch(r"\$ python3 .*pytest", line)]) == 1


def figures(*arguments: str) -> subprocess.CompletedProcess[str]:
    script = [sys.executable, str(ROOT / "docs" / "figures"), *arguments]
    return subprocess.run(script, capture_output=True, encoding="utf-8", check=False)


def test_no_figure_that_is_cheap_to_make_is_stale() -> None:
    done = figures("--check")
    assert (done.returncode, done.stdout) == (0, "every figure is as its command has it\n")


def test_a_stale_figure_and_a_mark_without_a_command_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!--defects-->12<!--/--> and <!--wombats-->3<!--/-->", encoding="utf-8")
    script = ROOT / "docs" / "figures"
    names = {"__name__": "figures", "__file__": str(script)}
    exec(compile(script.read_text(encoding="utf-8"), str(script), "exec"), names)
    names["PAGES"] = [page]
    arguments: Any = names["arguments"]
    options = arguments().parse_args(["--check"])
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert options.run(options) == 1
    assert "defects is stale: python -m crosscheck defects" in said.getvalue()
    assert "no command makes the figure wombats" in said.getvalue()
    assert "<!--defects-->12<!--/-->" in page.read_text(encoding="utf-8")


def test_the_script_of_figures_lists_a_command_for_each() -> None:
    lines = figures("--list").stdout.splitlines()
    assert len(lines) > 30
    assert all(len(line.split(maxsplit=1)) == 2 for line in lines), lines


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permission")
def test_the_script_of_figures_can_be_run() -> None:
    assert os.access(ROOT / "docs" / "figures", os.X_OK)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_are_ascii(page: Path) -> None:
    assert page.read_text(encoding="utf-8").isascii()


def operation_complaints(text: str) -> Iterator[str]:
    """Places of the page about operations that are not there, and lines that are not in them."""
    for heading, rest in re.findall(
        r"^## (\d.*?)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL
    ):
        file = ROOT / heading.split("`")[1]
        if not file.is_file():
            yield f"{heading}: there is no such file"
            continue
        source = file.read_text(encoding="utf-8")
        for line in re.findall(r"^\+ *(.+)$", rest, re.MULTILINE):
            if line not in source:
                yield f"{file.name} has no {line}"
    for path in re.findall(r"`((?:\w+/)+\w+\.\w+)`", text):
        if not (ROOT / path).is_file():
            yield f"there is no {path}"


def test_the_places_that_an_operation_costs_are_there() -> None:
    text = (ROOT / "docs" / "add-an-operation.md").read_text(encoding="utf-8")
    assert len(re.findall(r"^\+", text, re.MULTILINE)) > 20
    assert list(operation_complaints(text)) == []


def test_a_place_of_an_operation_that_is_gone_is_found() -> None:
    text = "## 1. Here: `scalar/model.py`\n+ wombat = 3\n\n## 2. There: `scalar/wombat.py`\n"
    assert len(list(operation_complaints(text))) == 3


def test_the_workflow_runs_what_is_run_here_on_three_systems() -> None:
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    job = yaml.safe_load(text)["jobs"]["test"]
    assert len(job["strategy"]["matrix"]["os"]) == 3
    assert job["strategy"]["matrix"]["python"][0] == "3.10"
    assert job["steps"][-1]["run"] == ".ci/run"
    template = ROOT / ".github" / "ISSUE_TEMPLATE" / "my-port-disagrees.yml"
    fields = yaml.safe_load(template.read_text(encoding="utf-8"))["body"]
    names = [field["id"] for field in fields if field["type"] != "markdown"]
    assert len(set(names)) == len(names) == 6
