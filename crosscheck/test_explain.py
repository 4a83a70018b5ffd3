"""The expressions of reports give the element that they explain."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from crosscheck.cases import load_case
from crosscheck.compare import Disagreement, Outcome, misshapen
from crosscheck.explain import expression, shown
from crosscheck.lines import lines_of
from crosscheck.tolerance import FLOAT64
from crosscheck.trace import GIVEN, expected_shape, real, split_key, trace


@pytest.mark.about("the formulas of reports")
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
                    wrong = Disagreement(
                        name,
                        number,
                        key,
                        f"is not what its own inputs give, in {backend}",
                        shape=tensor.shape,
                        index=index,
                        reference=float(found.value),
                        candidate=float(tensor[index]),
                        tolerance=FLOAT64.tolerances[split_key(key)[0]],
                        exceeding=1,
                        elements=1,
                        formula=found.formula,
                        operands={one: shown(value) for one, value in found.operands.items()},
                        expected=float(found.value),
                        lines=lines_of(key, case.config),
                    )
                    settle(Outcome(name, found=[wrong]), labels=("recomputed", backend))
                explained.add(split_key(key)[0])
    assert len(explained) == 10
