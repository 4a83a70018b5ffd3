"""The table of taps agrees with both texts and with the page of traces."""

from __future__ import annotations

import ast
import itertools
from pathlib import Path

import pytest
from hypothesis import Phase, find, settings

from crosscheck.functions import drawn_cases
from crosscheck.models import cases
from microgpt.config import FIELDS, Config
from microgpt.settings import load_config
from microgpt.taps import EMBEDDING, LAYER, LAYER_PARAMS, OUTPUT, PARAMS, Tap, consumers, taps

pytestmark = pytest.mark.quick

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "crosscheck" / "TRACES.md").read_text(encoding="utf-8")
TEXTS = {name: (ROOT / name / "model.py").read_text("utf-8") for name in ("scalar", "vectorized")}
TABLE = (*EMBEDDING, *LAYER, *OUTPUT)


def rows_of_taps() -> list[str]:
    return [
        f"| `{'layer<i>.' if tap in LAYER else ''}{tap.name}` | ({', '.join(tap.axes)})"
        f" | {tap.equation} | `{tap.within}` |"
        for tap in TABLE
    ]


def rows_of_params() -> list[str]:
    users = {p.name: [tap.name for tap in TABLE if p.name in tap.operands]
             for p in (*PARAMS, *LAYER_PARAMS)}  # fmt: skip
    return [
        f"| `{'layer<i>.' if param in LAYER_PARAMS else ''}{param.name}`"
        f" | ({', '.join(param.axes)}) | {', '.join(users[param.name])} |"
        for param in (*PARAMS, *LAYER_PARAMS)
    ]


@pytest.mark.parametrize("rows", [rows_of_taps(), rows_of_params()], ids=["taps", "parameters"])
def test_the_page_of_traces_is_the_table(rows: list[str]) -> None:
    assert "\n".join(["|", *rows, "\n"]).strip("|") in PAGE, "\n".join(rows)


def writers(text: str) -> dict[str, str]:
    """The function that puts each name into `tap`."""
    return {
        node.attr: function.name
        for function in ast.parse(text).body
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "tap"
    }


@pytest.mark.parametrize("tap", TABLE, ids=lambda tap: tap.name)
def test_a_tap_is_computed_in_the_functions_that_the_table_names(tap: Tap) -> None:
    scalar, vectorized = writers(TEXTS["scalar"]), writers(TEXTS["vectorized"])
    assert scalar.get(tap.name, "loss") == tap.within
    assert vectorized[tap.name] == f"{tap.within}_forward"
    if tap.function:
        assert tap.function in called(TEXTS["scalar"], tap.within)
        for way in ("forward", "backward"):
            name = f"{tap.function}_{way}"
            assert name in called(TEXTS["vectorized"], f"{tap.within}_{way}")


def called(text: str, within: str) -> set[str]:
    """The functions that a function calls by name."""
    (function,) = (
        node
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef) and node.name == within
    )
    calls = [node.func for node in ast.walk(function) if isinstance(node, ast.Call)]
    return {func.id for func in calls if isinstance(func, ast.Name)}


def models() -> list[Config]:
    switches = itertools.product(["1", "3"], ["true", "false"], ["true", "false"])
    return [
        load_config(overrides={"n_layer": a, "norm_embedding": b, "tie_lm_head": c})
        for a, b, c in switches
    ]


@pytest.mark.parametrize("config", models())
def test_every_operand_is_there_before_it_is_used_and_is_used(config: Config) -> None:
    known = {name for name in consumers(config) if name not in taps(config)}
    for tap in taps(config).values():
        assert set(tap.operands) <= known
        known.add(tap.name)
    assert [name for name, users in consumers(config).items() if not users] == ["loss"]


# what a model is, and not how a run trains it or where its documents come from
CHOICES = [
    (name, choice)
    for name, field in FIELDS.items()
    for choice in field.metadata["choices"]
    if name not in ("schedule", "dtype", "documents")
]


@pytest.mark.parametrize(("name", "choice"), CHOICES)
def test_models_drawn_at_random_are_of_every_choice(name: str, choice: str) -> None:
    generated = [Phase.generate]  # the simplest such case is not looked for
    once = settings(max_examples=500, database=None, derandomize=True, phases=generated)
    find(cases(), lambda case: getattr(case.config, name) == choice, settings=once)
    if name not in ("vocabulary", "crop"):  # functions by themselves are given token ids
        assert choice in {getattr(case.config, name) for case in drawn_cases(0)}


def test_the_residual_stream_goes_by_and_through_each_block() -> None:
    config = load_config(overrides={"n_layer": "2", "tie_lm_head": "true"})
    users = {name: [tap.name for tap, _ in found] for name, found in consumers(config).items()}
    assert users["layer0.mlp_res"] == ["layer1.attn_norm", "layer1.attn_res"]
    assert users["layer1.mlp_res"] == ["logits"]
    assert users["layer0.attn_norm"] == ["layer0.q", "layer0.k", "layer0.v"]
    assert users["wte"] == ["emb", "logits"]
