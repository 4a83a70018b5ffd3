"""Two implementations agree on random models; hypothesis draws and shrinks them."""

from __future__ import annotations

from contextlib import suppress
from functools import cache
from typing import Any

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase, given, settings

from crosscheck.cases import Case, draw_params, save_case, with_params
from crosscheck.compare import Outcome, compare_teacher_forced
from crosscheck.conftest import REFERENCE_STEPS, Choice
from crosscheck.models import cases, described
from crosscheck.noise import Noise, noise
from crosscheck.sides import IncompleteError
from crosscheck.tolerance import decided_by_rounding, float32, float64
from crosscheck.trace import trace

SHARES = 3  # tests, which several processes can run side by side
EXAMPLES = 50  # models of each test


@pytest.mark.about("random models")
@pytest.mark.parametrize("share", range(SHARES))
def test_random_models(
    share: int, choice: Choice, settle: Any, pytestconfig: pytest.Config
) -> None:
    """Each step starts from the reference's state, so that Adam does not amplify rounding.

    Both precisions are compared. A model is left out of single precision if it differs there and a
    ReLU input is so near its kink that single precision may give it the other slope.
    """
    total = Outcome("random models")
    smallest: list[tuple[Case, Outcome]] = []

    @hypothesis.seed(SHARES * (choice.seed or 0) + share)
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
            steps = len(case.batches)
            reference_steps = list(trace(case, choice.reference, "float64", steps, draws=False))
        except IncompleteError as error:
            if error.stop.not_finite:
                hypothesis.reject()  # a probability of 0: neither side can take its logarithm
            reference_steps = [error.step]

        @cache
        def rounding() -> list[Noise]:
            return noise(case, reference_steps) if choice.reference == "scalar" else []

        standards = [float64(rounding, case.config)] if choice.dtype == "float64" else []
        if choice.candidate != "scalar" and choice.reference == "scalar":
            standards.append(float32(case, rounding))
        for standard in standards:
            outcome = compare_teacher_forced(
                case, reference_steps, choice.candidate, standard, choice.reference
            )
            if outcome.found and standard.dtype == "float32":
                kinked = map(decided_by_rounding, reference_steps, rounding())
                if not rounding() or any(kinked):
                    continue
            if outcome.found:
                smallest[:] = [(case, outcome)]  # the last one to fail
                raise AssertionError
            if standard.dtype == choice.dtype:
                total.tally.add(outcome.tally)
                total.shares[len(total.shares) + 1] = outcome.worst()  # a column of the map

    with suppress(AssertionError):
        agree()
    for case, outcome in smallest:
        more = f"\n{described(case)}"
        done = [pytestconfig.stash[REFERENCE_STEPS] / f"saved-{n}" for n in range(share + 1)]
        if choice.save_case and not any(path.exists() for path in done):  # only the first is saved
            done[share].touch()
            save_case(case, choice.save_case)
            more += f"\nsaved as {choice.save_case}"
        settle(outcome, more=more)
    settle(total)
