"""Models that nobody thought of: hypothesis draws them, and shrinks what disagrees."""

from __future__ import annotations

from typing import Any

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase, given, settings

from crosscheck.cases import Case, draw_params, save_case, with_params
from crosscheck.compare import Outcome, compare_taught
from crosscheck.conftest import Choice
from crosscheck.models import cases, described
from crosscheck.report import render
from crosscheck.trace import trace

EXAMPLES = 150


def test_random_models(choice: Choice, settle: Any) -> None:
    """Each step starts from the reference's state: no rounding is amplified by Adam."""
    if choice.dtype == "float32":
        pytest.skip("a random model can lose any number of digits; single precision has few")
    total = Outcome("random models")

    @hypothesis.seed(choice.seed or 0)
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(cases())
    def agree(drawn: Case) -> None:
        case = with_params(drawn, draw_params(drawn))
        try:
            lessons = list(trace(case, choice.reference, "float64", len(case.batches)))
        except FloatingPointError:
            hypothesis.reject()  # a probability of 0, whose logarithm neither side has
        outcome = compare_taught(case, lessons, choice.candidate, choice.standard(case, lessons))
        if outcome.found:
            if choice.save_case:
                save_case(case, choice.save_case)  # the last one to fail is the smallest
            words = render(outcome.found[0], choice.reference, choice.candidate)
            raise AssertionError(f"{words}\n{described(case)}")
        total.tally.add(outcome.tally)

    words = ""
    try:
        agree()
    except AssertionError as error:
        words = str(error)
    if words:
        saved = f"\nsaved as {choice.save_case}" if choice.save_case else ""
        pytest.fail(words + saved, pytrace=False)
    settle(total)
