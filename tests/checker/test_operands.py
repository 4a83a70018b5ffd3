"""Tensors that are no numbers in their shape, printed formulas, and equal logits."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crosscheck.cases import load_case
from crosscheck.compare import compare
from crosscheck.defects import Patch, planted
from crosscheck.explain import expression
from crosscheck.noise import of_operands
from crosscheck.operations import ELEMENTARY, Around, calls
from crosscheck.report import render
from crosscheck.sides import as_array
from crosscheck.tolerance import float64
from crosscheck.trace import GIVEN, split_key, trace

NAMES = ("scalar", "vectorized")
SCALAR = "scalar/model.py"
LISTS = """        keys: list[Matrix] = [[] for _ in range(config.n_layer)]
        values: list[Matrix] = [[] for _ in range(config.n_layer)]
"""
DOCS = "    for tokens, doc_taps in zip(docs, taps):\n"
OF_LAYERS = Patch(SCALAR, LISTS, LISTS.replace("[[] for _ in range(config.n_layer)]",
                                               "[[]] * config.n_layer"))  # fmt: skip
OF_DOCUMENTS = Patch(SCALAR, DOCS + LISTS, LISTS.replace("        ", "    ") + DOCS)
SLICES = "[slice(h, h + config.head_dim) for h in range(0, config.n_embd, config.head_dim)]"
HEADS = Patch(SCALAR, SLICES, SLICES.replace("head_dim", "n_head"))
MISSHAPEN = [("two-layers", OF_LAYERS), ("unused-row", OF_DOCUMENTS), ("one-head", HEADS)]


def said(patch: Patch, case_name: str) -> str:
    """What a case says to a patch, where the tolerances go by the noise."""
    case = load_case(case_name)
    with planted([patch]), np.errstate(all="ignore"):
        ours, theirs = (trace(case, name, "float64", 1) for name in NAMES)
        standard = float64(lambda: [], case.config)
        found = compare(case, ours, theirs, standard, NAMES).found[0]
    return re.sub(r"\s+", " ", render(found, *NAMES))


def checked(patch: Patch, folder: Path, *tests: str) -> str:
    """What tests of the crosscheck print, run in a copy of the project that has a patch."""
    root = Path(__file__).resolve().parents[2]
    for name in ("scalar", "vectorized", "microgpt", "crosscheck", "fixtures"):
        ignored = shutil.ignore_patterns("__pycache__", "names.txt", "golden")
        shutil.copytree(root / name, folder / name, ignore=ignored)
    source = (folder / patch.file).read_text(encoding="utf-8")
    assert source.count(patch.old) == 1
    (folder / patch.file).write_text(source.replace(patch.old, patch.new), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "E   " not in done.stdout  # no line of pytest on an exception
    return re.sub(r"\s+", " ", done.stdout)


@pytest.mark.parametrize(("case_name", "patch"), MISSHAPEN)
def test_a_tensor_that_is_no_numbers_in_its_shape_is_no_operand(
    case_name: str, patch: Patch
) -> None:
    case = load_case(case_name)
    with planted([patch]):
        (step,) = trace(case, "scalar", "float64", 1, draws=False)
    noise = of_operands(case.config, step)
    assert "forward/layer0.v" in noise
    assert "forward/layer0.attn_logits" not in noise
    assert "forward/layer0.attn_out" not in noise
    with pytest.raises(KeyError):
        calls(Around(case.config, step), "forward/layer0.attn_weights")
    assert "layer0.attn_logits" in said(patch, case_name)


@pytest.mark.parametrize(
    ("patch", "words"),
    [(OF_LAYERS, "attn_logits is ragged: lists of"), (OF_DOCUMENTS, "ragged"), (HEADS, "4 heads")],
)
def test_tests_that_a_misshapen_tensor_reaches_have_a_report(
    patch: Patch, words: str, tmp_path: Path
) -> None:
    of_cases = (f"test_{name}" for name in ("in_micro_batches", "free_running", "teacher_forced"))
    tests = [
        f"crosscheck/test_cases.py::{name}[{way}]"
        for name in of_cases
        for way in (["single-character-cut"] if "micro" in name else ["single-character"])
    ]
    assert words in checked(patch, tmp_path, "crosscheck/test_explain.py", *tests)


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        ([[[1, 2], [3, 4]], [[1, 2, 3], [4, 5, 6]]], "lists of 2 and 3 numbers"),
        ([[], [1, 2]], "lists of 0 and 2 numbers"),
        ([[[1], [2, 3]], [[4], [5, 6, 7]]], "lists of 1, 2 and 3 numbers"),
    ],
)
def test_the_lengths_of_ragged_lists_are_told(tensor: Any, words: str) -> None:
    assert as_array(tensor)[()] == f"is ragged: {words} side by side"


def test_heads_are_counted() -> None:
    assert "looks like 16 heads, and n_head is 1" in said(HEADS, "one-head")


@pytest.mark.parametrize(
    ("case_name", "old", "new"),
    [
        ("large-attention-logits", "exp(x - largest)", "exp(x)"),
        ("large-logits", "x = logits - logits.max(axis=-1, keepdims=True)", "x = logits"),
    ],
)
def test_an_exp_that_overflows_is_told(case_name: str, old: str, new: str) -> None:
    words = said(Patch("vectorized/model.py", old, new), case_name)
    assert "looks like exp overflows: the maximum is not subtracted first" in words
    assert "absolute" not in words
    assert "ulp" not in words


@pytest.mark.parametrize(
    ("patch", "words"),
    [
        (
            Patch("vectorized/sample.py",
                  "np.put_along_axis(scaled, by_size[:, most:], -np.inf, axis=1)",
                  "scaled[scaled < np.take_along_axis(scaled, by_size, 1)[:, most - 1]] = -np.inf"),
            "3 tokens have a probability, where 1 should: of equal logits, only those with the",
        ),
        (
            Patch("scalar/sample.py", "key=lambda i: -scaled[i].data",
                  "key=lambda i: (-scaled[i].data, -i)"),
            "of equal logits, others are kept than those with the lower token ids",
        ),
    ],
)  # fmt: skip
def test_equal_logits_are_held_to_the_rule(patch: Patch, words: str, tmp_path: Path) -> None:
    assert words in checked(patch, tmp_path, "crosscheck/test_sampling.py::test_equal_logits")


# --- printed formulas ----------------------------------------------------------------------------

IN_WORDS = ("mean over documents", "logits[")  # how formulas begin that are sentences


def dot(a: Any, b: Any) -> Any:
    return (np.asarray(a) * b).sum()


def evaluated(formula: str, operands: Mapping[str, Any]) -> float:
    """The value of a formula as it is printed, with the operands that are printed below it."""
    known = {**ELEMENTARY, "sqrt": sqrt, "dot": dot}
    known |= {"softmax": lambda x: np.exp(x - x.max()) / np.exp(x - x.max()).sum(),
              "mean": np.mean, "sum": np.sum, "max": np.max}  # fmt: skip
    for name, number in operands.items():  # "m before", "q[t=1]", "layer0.emb", "x = emb"
        known[re.sub(r" before| = .*|\[.*", "", name).replace(".", "_")] = number
    text = re.sub(r"(layer\d+)\.", r"\1_", formula.rpartition(" = ")[2]).replace("^", "**")
    text = re.sub(r"sum of (\w+)\[\d+\] where the token is \d+", r"sum(\1)", text)
    text = re.sub(r"sum over documents of (\w+)\[.*\]", r"sum(\1)", text)
    text = re.sub(r"sum over positions of (\w+)\[\d+\] (\w+)\[\d+\]", r"dot(\1, \2)", text)
    vector = r"(\w+)(?:\[[^\]]*\])?"
    text = re.sub(rf"{vector} \. {vector}", r"dot(\1, \2)", text)
    text = re.sub(r"(\w+)\[\d+\]", lambda x: x[0] if np.ndim(known[x[1]]) else x[1], text)
    text = re.sub(r"(?<=[\w\])]) (?=[\w(])", " * ", text)  # two factors side by side
    return float(eval(text, {}, known))


@pytest.mark.parametrize(
    "case_name", ["two-layers", "tied-two-layers", "microgpt-243", "gelu", "decay-and-clip"]
)
def test_a_printed_formula_has_the_value_that_is_printed_behind_it(case_name: str) -> None:
    case, rng = load_case(case_name), np.random.default_rng(5)
    tried = set()
    for number, step in enumerate(trace(case, "scalar", "float64", 2, draws=False), 1):
        for key, tensor in step.items():
            for place in rng.permutation(np.argwhere(tensor))[:4]:
                found = expression(case, number, key, tuple(map(int, place)), step)
                if found is None or found.formula.startswith(IN_WORDS):
                    continue
                own = evaluated(found.formula, found.operands)
                assert own == pytest.approx(found.value, 1e-5), (key, found)
                tried.add(split_key(key)[0])
    assert tried >= {"forward", "backward", "gradient", "adam_m", "adam_v", "update", "params"}
    assert not tried & {*GIVEN}
