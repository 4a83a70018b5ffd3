"""The configuration: presets field by field, what overrides what, and every refusal."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microgpt.config import FIELDS
from microgpt.data import NAMES_FILE, read_documents
from microgpt.errors import MicrogptError
from microgpt.layout import param_shapes
from microgpt.settings import CONFIGS, load_config, presets, read_yaml, stored_config, typed_flag
from microgpt.tokenizer import build_tokenizer

pytestmark = pytest.mark.quick

COMMON = {
    "n_layer": 1,
    "n_embd": 16,
    "n_head": 4,
    "norm_eps": 1e-5,
    "steps": 1000,
    "batch_size": 1,
    "learning_rate": 0.01,
    "adam_eps": 1e-8,
    "dtype": "float64",
    "seed": 42,
    "dataset": "names",
}

LATER_ADDITIONS: dict[str, Any] = {  # off in both presets
    "schedule": "linear",
    "warmup_steps": 0,
    "weight_decay": 0.0,
    "grad_clip": 0.0,
    "documents": "lines",
    "held_out": 0,
    "cores": 1,
    "max_seconds": 0.0,
    "checkpoint_every": 0,
    "eval_every": 0,
    "top_k": 0,
}
PRESETS: dict[str, dict[str, Any]] = {
    "microgpt": {
        **COMMON,
        **LATER_ADDITIONS,
        "block_size": 16,
        "vocabulary": "chars-bos",
        "crop": "positions",
        "norm_embedding": True,
        "activation": "relu",
        "tie_lm_head": False,
        "init_std": 0.08,
        "init_std_residual": 0.08,
        "beta1": 0.85,
        "beta2": 0.99,
        "num_samples": 20,
        "temperature": 0.5,
    },
    "microgpt-243": {
        **COMMON,
        **LATER_ADDITIONS,
        "block_size": 8,
        "vocabulary": "bos-eos-chars",
        "crop": "tokens",
        "norm_embedding": False,
        "activation": "squared_relu",
        "tie_lm_head": True,
        "init_std": 0.02,
        "init_std_residual": 0.0,
        "beta1": 0.9,
        "beta2": 0.95,
        "num_samples": 5,
        "temperature": 1.0,
    },
}


def test_there_are_these_presets_and_the_default_is_the_original() -> None:
    assert presets() == [*PRESETS, "names-fast", "text"]
    assert load_config() == load_config("microgpt")


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_the_published_one_field_by_field(preset: str) -> None:
    assert dataclasses.asdict(load_config(preset)) == PRESETS[preset]


@pytest.mark.parametrize("preset", presets())
def test_a_preset_lists_every_field(preset: str) -> None:
    assert list(read_yaml(CONFIGS / f"{preset}.yaml")) == list(FIELDS)


@pytest.mark.parametrize(("preset", "parameters"), [("microgpt", 4192), ("microgpt-243", 3648)])
def test_a_preset_has_as_many_parameters_as_the_original(preset: str, parameters: int) -> None:
    config = load_config(preset)
    V = build_tokenizer("".join(read_documents(NAMES_FILE)), config).vocab_size
    assert sum(n_out * n_in for n_out, n_in in param_shapes(config, V).values()) == parameters


@pytest.mark.parametrize(("preset", "max_tokens"), [("microgpt", 17), ("microgpt-243", 8)])
def test_block_size_counts_positions_or_tokens(preset: str, max_tokens: int) -> None:
    assert load_config(preset).max_tokens == max_tokens


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("n_layer", "3", 3),
        ("learning_rate", "1", 1.0),
        ("adam_eps", "1e-8", 1e-8),
        ("activation", "squared_relu", "squared_relu"),
        ("norm_embedding", "false", False),
        ("vocabulary", "bos-eos-chars", "bos-eos-chars"),
        ("dtype", "float32", "float32"),
        ("dataset", "12", "12"),
        ("seed", "0", 0),
        ("beta1", "0", 0.0),
        ("num_samples", "0", 0),
    ],
)
def test_a_flag_replaces_its_field_and_no_other(name: str, text: str, value: object) -> None:
    config = load_config("microgpt", {name: text})
    assert dataclasses.asdict(config) == {**PRESETS["microgpt"], name: value}
    assert type(getattr(config, name)) is type(value)


# --- files of earlier formats: see also test_releases.py ---------------------------------------


@pytest.mark.parametrize(
    ("earlier", "activation"),
    [({}, "relu"), ({"squared_relu": False}, "relu"), ({"squared_relu": True}, "squared_relu")],
)
def test_a_stored_configuration_without_a_later_field_has_its_value_of_before(
    earlier: dict[str, bool], activation: str
) -> None:
    fields = dataclasses.asdict(load_config())
    del fields["activation"]
    assert stored_config({**fields, **earlier}, "a file").activation == activation
    del fields["n_layer"]
    with pytest.raises(MicrogptError, match="lacks 'n_layer'"):
        stored_config(fields, "a file")


def test_a_file_that_names_no_preset_starts_from_the_default(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("n_embd: 8\nlearning_rate: 1\n", encoding="utf-8")
    config = load_config(str(file))
    assert dataclasses.asdict(config) == {
        **PRESETS["microgpt"],
        "n_embd": 8,
        "learning_rate": 1.0,
    }
    assert type(config.learning_rate) is float


def test_a_flag_goes_before_a_file_and_a_file_before_its_preset(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("n_embd: 8\npreset: microgpt-243\nsteps: 7\n", encoding="utf-8")
    config = load_config(str(file), {"steps": "9"})
    assert dataclasses.asdict(config) == {**PRESETS["microgpt-243"], "n_embd": 8, "steps": 9}


REFUSED_IN_A_FILE = [
    ("n_layers: 2", "unknown key 'n_layers'; did you mean 'n_layer'?"),
    ("wombat: 2", "unknown key 'wombat'; the keys are n_layer, n_embd, "),
    ("7: 2", "unknown key '7'"),
    ("preset: tiny", "unknown preset 'tiny'; the presets are microgpt, microgpt-243"),
    ("preset:", "unknown preset None"),
    ("adam_eps: 1e-8", "adam_eps: expected a number, got '1e-8' (YAML reads 1e-8 as text:"
                       " write 1.0e-8)"),
    ("learning_rate: 1e3", "write 1.0e+3)"),
    ("learning_rate: fast", "learning_rate: expected a number, got 'fast'"),
    ("learning_rate: true", "learning_rate: expected a number, got True"),
    ("learning_rate:", "learning_rate: expected a number, got None"),
    ("n_layer: true", "n_layer: expected a whole number, got True"),
    ("n_layer: 2.0", "n_layer: expected a whole number, got 2.0"),
    ("n_layer: '2'", "n_layer: expected a whole number, got '2'"),
    ("n_layer: [2]", "n_layer: expected a whole number, got [2]"),
    ("squared_relu: 1", "squared_relu: expected true or false, got 1"),
    ("dataset: 12", "dataset: expected text, got 12"),
    ("dtype: float16", "dtype: expected float64 or float32, got 'float16'"),
    ("crop: characters", "crop: expected positions or tokens, got 'characters'"),
    ("learning_rate: .nan", "learning_rate: expected a finite number, got nan"),
    ("init_std: .inf", "init_std: expected a finite number, got inf"),
    ("n_head: 3", "n_head 3 does not divide n_embd 16"),
    ("preset: microgpt-243\nblock_size: 1", "block_size 1 with crop 'tokens'"),
    ("- n_layer", "expected lines of the form 'key: value'"),
    ("", "expected lines of the form 'key: value'"),
    ("n_layer: [", "not readable as YAML: "),
    ("dataset: 2024-99-99", "not readable as YAML: "),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), REFUSED_IN_A_FILE)
def test_a_file_is_refused_with_a_reason_in_one_line(
    text: str, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(MicrogptError) as refusal:
        load_config(str(file))
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)
    # a reason that concerns the file names it
    assert str(file) in str(refusal.value) or message.startswith(("n_head 3", "block_size 1"))


@pytest.mark.parametrize("name", ["n_layer", "n_embd", "n_head", "block_size", "steps",
                                  "batch_size"])  # fmt: skip
@pytest.mark.parametrize("text", ["0", "-2"])
def test_a_size_is_positive(name: str, text: str) -> None:
    with pytest.raises(MicrogptError, match=f"^--.*: expected 1 or more, got {text}$"):
        load_config(overrides={name: text})


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("beta1", "1", "less than 1, got 1.0"),
        ("beta1", "-0.1", "0 or more, got -0.1"),
        ("beta2", "1.5", "less than 1, got 1.5"),
        ("beta2", "-1", "0 or more, got -1.0"),
        ("learning_rate", "0", "more than 0, got 0.0"),
        ("learning_rate", "-1", "more than 0, got -1.0"),
        ("adam_eps", "0", "more than 0, got 0.0"),
        ("norm_eps", "0", "more than 0, got 0.0"),
        ("temperature", "-1", "0 or more, got -1.0"),
        ("top_k", "-1", "0 or more, got -1"),
        ("init_std", "-0.1", "0 or more, got -0.1"),
        ("init_std_residual", "-0.1", "0 or more, got -0.1"),
        ("num_samples", "-1", "0 or more, got -1"),
        ("seed", "-5", "0 or more, got -5; a negative seed would draw the same as its positive"),
        ("temperature", "nan", "a finite number, got nan"),
        ("beta1", "nan", "a finite number, got nan"),
        ("learning_rate", "inf", "a finite number, got inf"),
        ("n_layer", "2.0", "a whole number, got '2.0'"),
        ("n_layer", "true", "a whole number, got 'true'"),
        ("learning_rate", "fast", "a number, got 'fast'"),
        ("norm_embedding", "1", "true or false, got '1'"),
        ("vocabulary", "bytes", "chars-bos or bos-eos-chars, got 'bytes'"),
    ],
)
def test_a_flag_out_of_range_is_refused_by_its_name(name: str, text: str, expected: str) -> None:
    with pytest.raises(MicrogptError) as refusal:
        load_config(overrides={name: text})
    assert str(refusal.value) == f"--{name.replace('_', '-')}: expected {expected}"


def test_a_flag_by_another_name_is_refused_by_that_name() -> None:
    with pytest.raises(MicrogptError, match=r"^--num: expected 0 or more, got -1$"):
        typed_flag("num_samples", "-1", "--num")


@given(n_embd=st.integers(1, 48), n_head=st.integers(1, 48))
def test_heads_share_the_channels_equally_or_are_refused_with_what_would_do(
    n_embd: int, n_head: int
) -> None:
    sizes = {"n_embd": str(n_embd), "n_head": str(n_head)}
    if n_embd % n_head == 0:
        assert load_config(overrides=sizes).head_dim * n_head == n_embd
        return
    with pytest.raises(MicrogptError, match=f"^n_head {n_head} does not divide") as refusal:
        load_config(overrides=sizes)
    offered = str(refusal.value).partition("n_head can be ")[2].split(", ")
    assert all(n_embd % int(divisor) == 0 for divisor in offered)


@pytest.mark.parametrize("source", ["microgpt-200", "no/such.yaml", ".", ""])
def test_an_unknown_preset_is_refused_with_the_names_of_all(source: str) -> None:
    with pytest.raises(MicrogptError) as refusal:
        load_config(source)
    assert str(refusal.value) == (
        f"--config: there is no preset and no file {source!r};"
        " the presets are microgpt, microgpt-243, names-fast, text"
    )


def test_a_file_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_bytes(b"dataset: caf\xe9\n")
    with pytest.raises(MicrogptError, match="not readable as YAML"):
        load_config(str(file))
