"""The arithmetic of the operations is right: it computes every tensor of an implementation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from crosscheck import operations
from crosscheck.cases import case_names, load_case
from crosscheck.explain import WORDS
from crosscheck.operations import FUNCTIONS, Around, calls, refuse_unknown_names, total
from crosscheck.report import render
from crosscheck.sides import IncompleteError
from crosscheck.table import NAME, held_to_table
from crosscheck.trace import DERIVED, real, split_key, trace
from crosscheck.variants import OTHER_FORMS
from microgpt.errors import MicrogptError
from microgpt.taps import ACTIVATIONS, EMBEDDING, LAYER, OUTPUT, Activation
from scalar import model as scalar_model
from scalar.value import Value
from vectorized import model as vectorized_model

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("name", case_names())
def test_every_tensor_is_the_sum_of_its_operations(name: str) -> None:
    case = load_case(name)
    try:
        (step,) = trace(case, "vectorized", "float64", 1)
    except IncompleteError as error:  # the crosscheck reports that once, for all cases
        pytest.fail(f"vectorized stops with {error.stop.error}", pytrace=False)
    around = Around(case.config, step)
    found = {key for key in step if split_key(key)[0] in ("forward", "eval", *DERIVED)}
    for key in found:
        there = real(key, step[key].shape, step["batch/tokens"])
        value = total(around, key)
        assert value is not None
        np.testing.assert_allclose(value, step[key], rtol=1e-9, atol=1e-12, err_msg=key)
        assert not np.any(np.asarray(value)[~there]), f"{key} is not zero in padding"


def test_a_term_that_is_left_out_shows() -> None:
    case = load_case("two-layers")
    (step,) = trace(case, "vectorized", "float64", 1)
    (call,) = calls(Around(case.config, step), "backward/dlayer1.attn_logits")
    first, second = call.terms().values()
    np.testing.assert_allclose(first + second, step["backward/dlayer1.attn_logits"], atol=1e-12)
    assert np.abs(second).max() > 1e-9


def test_every_operation_of_the_table_has_its_arithmetic_and_its_words() -> None:
    for tap in (*EMBEDDING, *LAYER, *OUTPUT):
        functions = FUNCTIONS[tap.operation]
        assert len(functions) == len(tap.operands) + 1
        assert all(function.__name__ in WORDS for function in functions)


def test_the_wrong_forms_are_of_operations_that_there_are() -> None:
    names = {function.__name__ for functions in FUNCTIONS.values() for function in functions}
    assert {*OTHER_FORMS} <= names


@pytest.mark.parametrize(
    ("activation", "key"),
    [
        (Activation("x", "(x > 0)"), "forward/layer1.mlp_act"),
        (Activation("relu(x)", "1.0 * (x > 0) + 1"), "backward/dlayer1.mlp_pre"),
    ],
)
def test_texts_that_agree_with_each_other_are_held_to_the_table(
    activation: Activation, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = load_case("two-layers")
    steps = list(trace(case, "scalar", "float64", 1))
    assert not held_to_table(case, lambda: steps, "scalar").found
    monkeypatch.setitem(ACTIVATIONS, case.config.activation, activation)
    found = held_to_table(case, lambda: steps, "scalar").found[0]
    assert split_key(found.key)[1].partition(".")[2] == key.partition(".")[2]
    report = render(found, "scalar", NAME)
    for words in ("microgpt/taps.py:", "Activation(", "vectorized/model.py"):
        assert words in report


def test_an_unknown_name_in_the_table_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ACTIVATIONS, "silu", Activation("x * sigmoid(x)", "1"))
    with pytest.raises(MicrogptError, match=r'ACTIVATIONS\["silu"\]: \'sigmoid\' is not known'):
        refuse_unknown_names()


@pytest.mark.parametrize(
    ("tap", "words"),
    [
        ({"operation": "layernorm"}, r"operation 'layernorm' needs 2 functions .* and has none"),
        ({"operands": ("emb", "gain")}, r"operation 'rmsnorm' needs 3 functions .* and has 2"),
    ],
)
def test_an_operation_of_the_table_without_its_arithmetic_is_refused(
    tap: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = [one._replace(**tap) if one.name == "emb_norm" else one for one in EMBEDDING]
    monkeypatch.setattr(operations, "EMBEDDING", changed)
    with pytest.raises(MicrogptError, match=rf'Tap\("emb_norm"\): the {words}'):
        refuse_unknown_names()


def test_an_activation_without_a_formula_is_refused() -> None:
    x = np.ones(2)
    for call in (
        lambda: scalar_model.activation([Value(1.0)], "silu"),
        lambda: vectorized_model.activation_forward(x, "silu"),
        lambda: vectorized_model.activation_backward(x, x, "silu"),
    ):
        with pytest.raises(ValueError, match="no formula here for the activation 'silu'"):
            call()
