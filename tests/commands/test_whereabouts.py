"""The edited copy is the checked one: in a checkout, no other copy is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from microgpt.cli.whereabouts import checkout, described, imported_from, refuse_another_copy
from microgpt.errors import MicrogptError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A checkout that is not the one under test."""
    for package in ("scalar", "vectorized", "crosscheck"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "tests").mkdir()
    return tmp_path.resolve()


def test_the_copy_that_is_imported_is_named() -> None:
    assert described() == f"scalar/ and vectorized/ in {ROOT}"
    assert imported_from("scalar") == ROOT


def test_a_checkout_is_found_from_any_folder_in_it(other: Path) -> None:
    assert checkout(other) == checkout(other / "tests") == other
    (other / "pyproject.toml").unlink()
    assert checkout(other / "tests") is None


def test_a_run_in_another_checkout_is_refused_in_one_line(other: Path) -> None:
    refuse_another_copy(ROOT / "tests")
    refuse_another_copy(Path("/"))
    with pytest.raises(MicrogptError, match=r"scalar/ would come from .*pip install") as refused:
        refuse_another_copy(other / "tests")
    assert "\n" not in str(refused.value)


def test_pytest_crosscheck_refuses_too(other: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(ROOT / "crosscheck")]
    done = subprocess.run(command, cwd=other / "tests", capture_output=True, text=True, check=False)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "would come from" in done.stderr
    assert done.stdout == ""


def test_the_tests_of_another_copy_are_refused_before_they_are_imported(other: Path) -> None:
    (other / "crosscheck" / "conftest.py").write_text("raise SystemExit('imported')")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(other / "crosscheck")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert done.stderr.startswith("ERROR: scalar/ would come from")
