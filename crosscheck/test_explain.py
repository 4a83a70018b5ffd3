"""The expressions of reports give the element that they explain."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from crosscheck.cases import load_case
from crosscheck.compare import Disagreement, Outcome, misshapen
from crosscheck.explain import expression
from crosscheck.trace import GIVEN, expected_shape, real, split_key, trace


@pytest.mark.about("the expressions of reports")
@pytest.mark.parametrize("name", ["two-layers", "tied-two-layers", "microgpt-243", "ragged-batch"])
@pytest.mark.parametrize("backend", ["scalar", "vectorized"])
def test_every_expression_gives_its_element(name: str, backend: str, settle: Any) -> None:
    case = load_case(name)
    rng = np.random.default_rng(1)
    explained = set()
    for number, step in enumerate(trace(case, backend, "float64", 2, draws=False), 1):
        for key, tensor in step.items():
            wanted = expected_shape(key, case, step["batch/tokens"])
            wrong = misshapen(case, number, key, tensor, wanted or (), "reference")
            if wrong:  # nothing can be computed from this tensor
                settle(Outcome(name, found=[wrong]), labels=(backend, backend))
            places = np.argwhere(real(key, tensor.shape, step["batch/tokens"]))
            for place in rng.permutation(places)[:6]:
                index = tuple(map(int, place))
                found = expression(case, number, key, index, step)
                if found is None:
                    assert split_key(key)[0] in GIVEN
                    continue
                if found.value != pytest.approx(float(tensor[index]), rel=1e-9, abs=1e-12):
                    problem = f"is not what its operands come to, in {backend}"
                    settle(Outcome(name, found=[Disagreement(name, number, key, problem)]))
                explained.add(split_key(key)[0])
    assert len(explained) == 10
