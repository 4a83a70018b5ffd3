"""Checkpoints are read as they were written, and no other file is read as a checkpoint."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutations import made_up
from safetensors.numpy import save_file

from microgpt.backend import BACKENDS, State, load_backend
from microgpt.config import Config
from microgpt.errors import MicrogptError
from microgpt.layout import param_shapes
from microgpt.runs.checkpoint import (
    FILE_NAME,
    Checkpoint,
    load_checkpoint,
    load_params,
    read_tensors,
    save_checkpoint,
    save_params,
)
from microgpt.tokenizer import build_tokenizer
from microgpt.train import resumed_run

Edit = Callable[[Any, Any], object]  # of tensors and metadata
Trained = Callable[[str], tuple[Path, Checkpoint]]
Rewrite = Callable[[Path, Path, Edit], None]

METADATA = {"format", "version", "config", "chars", "updates", "random", "documents", "sha256"}


def assert_same(loaded: State, saved: State) -> None:
    """Bit for bit."""
    assert loaded.updates == saved.updates
    for field in ("params", "m", "v"):
        tensors, expected = getattr(loaded, field), getattr(saved, field)
        assert list(tensors) == list(expected)
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(tensor, np.asarray(expected[name]))


@pytest.mark.quick
@pytest.mark.parametrize("writer", BACKENDS)
@pytest.mark.parametrize("reader", BACKENDS)
def test_either_backend_reads_what_either_wrote(writer: str, reader: str, trained: Trained) -> None:
    out, saved = trained(writer)
    loaded = load_checkpoint(out)
    assert (loaded.config, loaded.tokenizer) == (saved.config, saved.tokenizer)
    assert (loaded.documents, loaded.state.updates) == (saved.documents, saved.config.steps)
    assert loaded.rng.getstate() == saved.rng.getstate()
    assert_same(loaded.state, saved.state)
    assert_same(load_backend(reader, loaded.config, loaded.state).state(), saved.state)


@pytest.mark.quick
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_run_goes_on_from_the_parameters_moments_and_draws_of_its_checkpoint(
    backend: str, trained: Trained
) -> None:
    out, saved = trained(backend)
    with resumed_run(out, backend, {"steps": saved.config.steps + 1}) as run:
        assert_same(run.backend.state(), saved.state)
        assert (run.step, run.rng.getstate()) == (saved.state.updates, saved.rng.getstate())


def test_both_backends_write_the_same_file(trained: Trained) -> None:
    (scalar, scalar_meta), (vectorized, vectorized_meta) = (
        read_tensors(trained(backend)[0] / FILE_NAME) for backend in BACKENDS
    )
    assert set(scalar_meta) == METADATA
    for metadata in (scalar_meta, vectorized_meta):
        assert len(metadata.pop("sha256")) == 64  # the numbers differ in their last digits
    assert scalar_meta == vectorized_meta
    assert set(scalar) == set(vectorized)
    for name, tensor in scalar.items():
        assert tensor.dtype == vectorized[name].dtype == "float64"
        np.testing.assert_allclose(tensor, vectorized[name], rtol=0, atol=1e-12)


@pytest.fixture
def fresh(tiny_config: Config) -> Checkpoint:
    """A checkpoint without a step, whose moments m and v differ in every number."""
    tokenizer = build_tokenizer("ab\u00e9\U0001f600", tiny_config)
    rng = Random(5)
    return Checkpoint(tiny_config, tokenizer, made_up(tiny_config, tokenizer, rng), rng, "0" * 64)


def test_the_random_stream_goes_on_where_it_was(fresh: Checkpoint, tmp_path: Path) -> None:
    file = tmp_path / FILE_NAME
    fresh.rng.gauss(0, 1)  # gauss draws two numbers, and keeps one for later
    assert fresh.rng.getstate()[2] is not None
    save_checkpoint(file, fresh)
    rng = load_checkpoint(file).rng
    assert [rng.gauss(0, 1), rng.random()] == [fresh.rng.gauss(0, 1), fresh.rng.random()]


def test_parameters_and_moments_are_not_exchanged(fresh: Checkpoint, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / FILE_NAME, fresh)
    loaded = load_checkpoint(tmp_path)
    assert loaded.tokenizer == fresh.tokenizer
    assert_same(loaded.state, fresh.state)


def test_float32_is_kept_as_float32(fresh: Checkpoint, tmp_path: Path) -> None:
    single = dataclasses.replace(fresh, config=dataclasses.replace(fresh.config, dtype="float32"))
    save_checkpoint(tmp_path / FILE_NAME, single)
    loaded = load_checkpoint(tmp_path)
    assert loaded.config.dtype == "float32"
    for name, tensor in loaded.state.params.items():
        assert tensor.dtype == "float32"
        np.testing.assert_array_equal(tensor, np.array(single.state.params[name], "float32"))


def test_parameters_alone_are_read_as_they_were_written(
    fresh: Checkpoint, tiny_config: Config, tmp_path: Path
) -> None:
    shapes = param_shapes(tiny_config, fresh.tokenizer.vocab_size)
    save_params(tmp_path / "params", fresh.state.params)
    loaded = load_params(tmp_path / "params", shapes)
    for name, matrix in fresh.state.params.items():
        np.testing.assert_array_equal(loaded[name], np.array(matrix))


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(
    fresh: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / FILE_NAME
    save_checkpoint(file, fresh)
    before = file.read_bytes()

    def full(*paths: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(MicrogptError, match="cannot be written: No space left on device"):
        save_checkpoint(file, fresh)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_a_checkpoint_has_the_permissions_of_a_new_file(fresh: Checkpoint, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / FILE_NAME, fresh)
    (tmp_path / "other").write_text("other", encoding="utf-8")
    checkpoint, other = ((tmp_path / name).stat().st_mode for name in (FILE_NAME, "other"))
    assert checkpoint == other


# Files that are refused, always with a MicrogptError that names the file.


def refusal_of(path: Path) -> str:
    with pytest.raises(MicrogptError) as refusal:
        load_checkpoint(path)
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


@pytest.fixture(scope="module")
def whole(tiny_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint to damage."""
    file = tmp_path_factory.mktemp("whole") / FILE_NAME
    tokenizer = build_tokenizer("ab", tiny_config)
    rng = Random(5)
    state = made_up(tiny_config, tokenizer, rng)
    save_checkpoint(file, Checkpoint(tiny_config, tokenizer, state, rng, "0" * 64))
    return file


def test_a_missing_file_and_a_folder_without_one_are_refused(tmp_path: Path) -> None:
    assert "there is no run and no checkpoint" in refusal_of(tmp_path / "missing.safetensors")
    assert f"{FILE_NAME}: there is no such file" in refusal_of(tmp_path)


def test_a_name_too_long_for_a_file_is_refused() -> None:
    refusal_of(Path("x" * 300))


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 500, 5_000, 10_000, -1])
def test_a_truncated_checkpoint_is_refused(length: int, whole: Path, tmp_path: Path) -> None:
    content = whole.read_bytes()
    assert len(content) > 10_000
    (tmp_path / "cut").write_bytes(content[:length])
    assert "not a readable safetensors file" in refusal_of(tmp_path / "cut")


def test_a_checkpoint_with_something_after_it_is_refused(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "long").write_bytes(whole.read_bytes() + b"\0")
    assert "not a readable safetensors file" in refusal_of(tmp_path / "long")


@given(content=st.binary(max_size=200), length=st.none() | st.integers(0, 300))
def test_random_bytes_are_refused(content: bytes, length: int | None, whole: Path) -> None:
    file = whole.with_name("random")
    header = b"" if length is None else length.to_bytes(8, "little")
    file.write_bytes(header + content)
    refusal_of(file)


def test_a_file_of_other_tensors_is_refused(fresh: Checkpoint, tmp_path: Path) -> None:
    save_params(tmp_path / "params", fresh.state.params)
    assert "not a checkpoint of microgpt" in refusal_of(tmp_path / "params")
    save_file({"x": np.zeros(3)}, tmp_path / "other", {"format": "pt"})
    assert "not a checkpoint of microgpt" in refusal_of(tmp_path / "other")


def drop(name: str) -> Edit:
    return lambda tensors, metadata: tensors.pop(name)


def put(name: str, tensor: Any) -> Edit:
    return lambda tensors, metadata: tensors.update({name: tensor(tensors[name])})


def spoil(x: np.ndarray, value: float) -> np.ndarray:
    spoiled = x.copy()
    spoiled[-1, -1] = value
    return spoiled


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (drop("wte"), "the tensor 'wte' is missing"),
        (drop("layer1.mlp_fc2"), "the tensor 'layer1.mlp_fc2' is missing"),
        (drop("adam.m.lm_head"), "the tensor 'adam.m.lm_head' is missing"),
        (drop("adam.v.wpe"), "the tensor 'adam.v.wpe' is missing"),
        (put("wpe", lambda x: x[:-1]), "'wpe' is (4, 4), and its configuration asks for"),
        (put("layer0.mlp_fc1", lambda x: x.T.copy()), "'layer0.mlp_fc1' is (4, 16)"),
        (put("wte", lambda x: x.ravel()), "'wte' is (12,)"),
        (put("adam.v.wte", lambda x: x[:, :2].copy()), "'adam.v.wte' is (3, 2)"),
        (put("wte", lambda x: x.astype("float32")), "'wte' is float32 (3, 4)"),
        (put("adam.m.wte", lambda x: x.astype("int64")), "'adam.m.wte' is int64 (3, 4)"),
        (put("lm_head", lambda x: spoil(x, np.nan)), "'lm_head' is not finite everywhere"),
        (put("adam.m.wpe", lambda x: spoil(x, np.inf)), "'adam.m.wpe' is not finite everywhere"),
    ],
)
def test_tensors_that_are_not_those_of_the_configuration_are_refused(
    edit: Edit, message: str, whole: Path, rewrite: Rewrite, tmp_path: Path
) -> None:
    rewrite(whole, tmp_path / "edited", edit)
    assert message in refusal_of(tmp_path / "edited")


@pytest.mark.parametrize("version", ["1", "3", "", "0.1", None])
def test_another_version_is_refused(
    version: str | None, whole: Path, rewrite: Rewrite, tmp_path: Path
) -> None:
    def edit(tensors: Any, metadata: Any) -> None:
        metadata.pop("version")
        metadata.update({"version": version} if version is not None else {})

    rewrite(whole, tmp_path / "edited", edit)
    assert f"a checkpoint of version {version!r}" in refusal_of(tmp_path / "edited")


STREAM = Random(5).getstate()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *((name, None) for name in sorted(METADATA - {"format", "version"})),
        ("config", ""),
        ("config", "null"),
        ("config", "[]"),
        ("config", "{}"),
        ("config", '{"n_layer": 1}'),
        ("config", '{"n_layer": "1"}'),
        ("config", '{"wombat": 1}'),
        ("updates", "three"),
        ("updates", "-1"),
        ("random", "[]"),
        ("random", "[3, [], null]"),
        ("random", "[3, 7, null]"),
        ("random", json.dumps([9, *STREAM[1:]])),
        ("random", json.dumps([3, [-1, *STREAM[1][1:]], None])),
        ("random", json.dumps([3, [0.5, *STREAM[1][1:]], None])),
        ("chars", "abc"),
    ],
)
def test_damaged_metadata_is_refused(
    name: str, text: str | None, whole: Path, rewrite: Rewrite, tmp_path: Path
) -> None:
    def edit(tensors: Any, metadata: Any) -> None:
        metadata.pop(name)
        metadata.update({name: text} if text is not None else {})

    rewrite(whole, tmp_path / "edited", edit)
    refusal_of(tmp_path / "edited")


@given(data=st.data())
def test_a_damaged_byte_is_refused_or_changes_no_shape(data: st.DataObject, whole: Path) -> None:
    content = bytearray(whole.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    place = data.draw(st.integers(0, header - 1) | st.integers(header, len(content) - 1))
    content[place] = data.draw(st.integers(0, 255))
    file = whole.with_name("damaged")
    file.write_bytes(content)
    before = load_checkpoint(whole)
    try:
        after = load_checkpoint(file)
    except MicrogptError:
        return
    for field in ("params", "m", "v"):
        tensors = getattr(after.state, field)
        expected = getattr(before.state, field)
        assert {name: x.shape for name, x in tensors.items()} == {
            name: x.shape for name, x in expected.items()
        }
