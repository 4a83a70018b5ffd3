"""examples/crosscheck.ipynb: its cells run in order, without Jupyter, and say what they promise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples" / "crosscheck.ipynb"


def test_the_cells_run_in_order_and_tell_right_from_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    names: dict[str, object] = {}
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    said = capsys.readouterr().out
    assert "the second term of the norm's derivative is missing" in said
    assert "right so far" in said
    assert names["status"] == 3


def test_the_notebook_holds_no_outputs_and_fits_a_screen() -> None:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert not any(cell.get("outputs") for cell in cells)
    assert sum(len(cell["source"]) for cell in cells) < 60
