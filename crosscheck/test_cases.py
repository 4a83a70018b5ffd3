"""Every case, step by step: scalar and vectorized compute the same."""

from __future__ import annotations

import pytest

from crosscheck.cases import case_names, load_case
from crosscheck.compare import Tally, compare
from crosscheck.report import render
from crosscheck.trace import trace

STEPS = 5


@pytest.mark.parametrize("name", case_names())
def test_backends_agree(name: str, tallies: list[Tally]) -> None:
    case = load_case(name)
    outcome = compare(
        case,
        trace(case, "scalar", "float64", STEPS),
        trace(case, "vectorized", "float64", STEPS),
    )
    if outcome.found:
        pytest.fail(render(outcome.found[0], "scalar", "vectorized"), pytrace=False)
    tallies.append(outcome.tally)
