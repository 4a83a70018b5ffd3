"""The start of training: documents, then weights, in the original's order; its learning rate."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from crosscheck.additions import Additions, Place
from crosscheck.cases import Case, draw_params
from microgpt import taps
from microgpt.backend import fresh_state, load_backend
from microgpt.config import Config
from microgpt.data import load_documents
from microgpt.init import init_params
from microgpt.layout import count_params, param_shapes
from microgpt.runs.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from microgpt.settings import FIXTURES, load_config
from microgpt.taps import Param
from microgpt.tokenizer import build_tokenizer
from microgpt.train import batch, learning_rate, new_run

pytestmark = pytest.mark.quick

LAYER = ("attn_wq", "attn_wk", "attn_wv", "attn_wo", "mlp_fc1", "mlp_fc2")
RESIDUAL = {"layer0.attn_wo", "layer0.mlp_fc2"}


def test_documents_come_in_the_order_of_the_original(golden: dict[str, Any]) -> None:
    config = load_config()
    documents = load_documents(config.dataset)
    Random(config.seed).shuffle(documents)
    tokenizer = build_tokenizer("".join(documents), config)
    for step in (0, 1, 9):
        (tokens,) = batch(step, documents, tokenizer, config)
        assert tokenizer.decode(tokens[1:-1]) == golden["docs"][str(step)]


@pytest.mark.parametrize(
    ("step", "documents"),
    [(0, ["abcdef", "b"]), (1, ["cc", "abcdef"]), (2, ["b", "cc"]), (300, ["abcdef", "b"])],
)
@pytest.mark.parametrize(
    ("preset", "opening", "closing", "longest"),
    [("microgpt", [6], [6], 4), ("microgpt-243", [0], [1], 3)],
)
def test_a_batch_takes_the_next_documents_round_and_round(
    step: int,
    documents: list[str],
    preset: str,
    opening: list[int],
    closing: list[int],
    longest: int,
) -> None:
    config = load_config(preset, {"batch_size": "2", "block_size": "3"})
    tokenizer = build_tokenizer("abcdef", config)
    assert batch(step, ["abcdef", "b", "cc"], tokenizer, config) == [
        [*opening, *tokenizer.encode(document), *closing][:longest] for document in documents
    ]


def test_a_new_run_begins_with_the_weights_of_the_original(tmp_path: Path) -> None:
    params = new_run(load_config(), "scalar", tmp_path / "run", "").backend.state().params
    tensors = load_file(FIXTURES / "golden" / "microgpt-names.safetensors")
    recorded = {name: tensor for name, tensor in tensors.items() if name.startswith("init/")}
    assert {f"init/{name}" for name in params} == set(recorded)
    for name, matrix in params.items():
        np.testing.assert_array_equal(np.array(matrix), recorded[f"init/{name}"])


@pytest.mark.parametrize(("tied", "head"), [("false", ["lm_head"]), ("true", [])])
def test_parameters_are_drawn_in_the_order_of_their_names(tied: str, head: list[str]) -> None:
    config = load_config(overrides={"n_layer": "2", "n_embd": "4", "tie_lm_head": tied})
    params = init_params(config, 3, Random(7))
    names = ["wte", "wpe", *head, *(f"layer{i}.{name}" for i in (0, 1) for name in LAYER)]
    assert list(params) == names
    assert {name: np.shape(matrix) for name, matrix in params.items()} == param_shapes(config, 3)
    stream = Random(7)
    drawn = [x for matrix in params.values() for row in matrix for x in row]
    assert drawn == [stream.gauss(0, 0.08) for _ in drawn]


def test_a_standard_deviation_of_zero_takes_its_draws_all_the_same() -> None:
    rng, stream = Random(42), Random(42)
    for name, matrix in init_params(load_config("microgpt-243"), 28, rng).items():
        std = 0.0 if name in RESIDUAL else 0.02
        assert [list(row) for row in matrix] == [
            [stream.gauss(0, std) for _ in row] for row in matrix
        ]
        assert np.any(matrix) == (name not in RESIDUAL)
    assert rng.getstate() == stream.getstate()


def test_residual_projections_have_a_standard_deviation_of_their_own() -> None:
    overrides = {"init_std": "1", "init_std_residual": "3"}
    equal = init_params(load_config(overrides={**overrides, "init_std": "3"}), 2, Random(1))
    for name, matrix in init_params(load_config(overrides=overrides), 2, Random(1)).items():
        assert (matrix == equal[name]) == (name in RESIDUAL)


@pytest.fixture
def gains(monkeypatch: pytest.MonkeyPatch) -> Iterator[Config]:
    """A model whose table has a vector in every layer that begins at 1, if a field says so."""
    gain = Param("gain", "C", init=1.0, switch="activation=gelu norm_embedding")
    monkeypatch.setattr(taps, "LAYER_PARAMS", (gain, *taps.LAYER_PARAMS))
    taps.params.cache_clear()
    yield load_config(overrides={"activation": "gelu", "n_layer": "2", "n_embd": "4"})
    taps.params.cache_clear()


def test_a_vector_of_the_table_begins_with_its_number_and_takes_no_draw(gains: Config) -> None:
    params, stream = init_params(gains, 3, Random(7)), Random(7)
    assert [name for name in params if "gain" in name] == ["layer0.gain", "layer1.gain"]
    for name, tensor in params.items():
        shape = param_shapes(gains, 3)[name]
        wanted = [1.0 if "gain" in name else stream.gauss(0, 0.08) for _ in range(np.prod(shape))]
        np.testing.assert_array_equal(np.asarray(tensor), np.reshape(wanted, shape))
    without = replace(gains, norm_embedding=False)
    assert not any("gain" in name for name in init_params(without, 3, Random(7)))


def test_a_case_tells_the_vectors_of_its_layers_apart(gains: Config) -> None:
    case = Case(
        "", "", gains, "ab", [["a"]], shift={"layer0.gain": 2.0}, rows={"layer1.gain": {1: 9}}
    )
    first, second = (draw_params(case)[f"layer{i}.gain"] for i in (0, 1))
    assert len({*first, *second}) == 8
    assert np.mean(first) == pytest.approx(3, abs=0.7)
    assert second[1] == pytest.approx(9, abs=1.5)


def test_the_additions_to_a_vector_go_by_its_index(gains: Config) -> None:
    backend = load_backend("scalar", gains, fresh_state(init_params(gains, 3, Random(7))))
    backend.forward([[2, 0, 1, 2]])
    gain = backend.matrices["layer1.gain"]  # type: ignore[attr-defined]
    followed = Place("layer1.gain", (3,))
    additions = Additions(backend, [followed], ["layer0.gain"])  # type: ignore[arg-type]
    assert additions.places[gain[3]] == followed
    assert additions.places[gain[0]] == Place("layer1.gain", (0,))


def test_a_vector_is_trained_and_kept_as_a_matrix_is(gains: Config, tmp_path: Path) -> None:
    tokenizer = build_tokenizer("ab", gains)
    state = fresh_state(init_params(gains, 3, Random(7)))
    assert f"{count_params(gains, 3):,} parameters" in repr(state)
    backend = load_backend("scalar", gains, state)
    backend.forward([tokenizer.document("ab")])
    backend.backward()
    assert list(backend.grads()["layer1.gain"]) == [0.0] * 4  # no operation reads the gain
    backend.set_grads({**backend.grads(), "layer1.gain": [1.0, -1.0, 2.0, 0.0]})
    backend.update(0.5)
    moved = backend.state()
    np.testing.assert_allclose(moved.params["layer1.gain"], [0.5, 1.5, 0.5, 1.0], rtol=1e-6)
    save_checkpoint(tmp_path / "it", Checkpoint(gains, tokenizer, moved, Random(7), ""))
    held = load_checkpoint(tmp_path / "it").state
    for name in moved.params:
        for kept, known in zip((held.params, held.m, held.v), (moved.params, moved.m, moved.v)):
            np.testing.assert_array_equal(kept[name], known[name])


ROOT_2 = 2**0.5


@pytest.mark.parametrize(
    ("schedule", "warmup_steps", "rates"),
    [
        ("linear", 0, [1, 3 / 4, 1 / 2, 1 / 4]),
        ("linear", 2, [1 / 2, 1, 1, 3 / 4, 1 / 2, 1 / 4]),
        ("cosine", 0, [1, (2 + ROOT_2) / 4, 1 / 2, (2 - ROOT_2) / 4]),
        ("cosine", 3, [1 / 3, 2 / 3, 1, 1, (2 + ROOT_2) / 4, 1 / 2, (2 - ROOT_2) / 4]),
        ("constant", 1, [1, 1, 1]),
        ("constant", 0, [1, 1]),
    ],
)
def test_the_learning_rate_rises_in_a_line_and_falls_as_scheduled(
    schedule: str, warmup_steps: int, rates: list[float]
) -> None:
    config = replace(
        load_config(),
        schedule=schedule,
        warmup_steps=warmup_steps,
        steps=len(rates),
        learning_rate=0.5,
    )
    found = [learning_rate(step, config) for step in range(len(rates))]
    assert found == pytest.approx([rate / 2 for rate in rates], rel=1e-15)
