"""The arithmetic of the operations is right: it computes every tensor of an implementation."""

from __future__ import annotations

import numpy as np
import pytest

from crosscheck.cases import case_names, load_case
from crosscheck.explain import WORDS
from crosscheck.operations import ARGUMENTS, Around, calls, total
from crosscheck.trace import DERIVED, real, split_key, trace
from microgpt.taps import EMBEDDING, LAYER, OUTPUT

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("name", case_names())
def test_every_tensor_is_the_sum_of_its_operations(name: str) -> None:
    case = load_case(name)
    (step,) = trace(case, "vectorized", "float64", 1)
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
        functions = [function for function, _ in ARGUMENTS[tap.operation]]
        assert len(functions) == len(tap.operands) + 1
        assert all(function.__name__ in WORDS for function in functions)
