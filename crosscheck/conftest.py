"""What `pytest crosscheck` can be told, and what it says at the end."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from crosscheck.cases import Case, case_names, draw_params, load_case, with_params
from crosscheck.compare import Outcome, Tally
from crosscheck.report import as_json, render, summary
from crosscheck.tolerance import FLOAT64, Standard, float32
from crosscheck.trace import Step, trace
from microgpt.backend import NAMES
from microgpt.errors import MicrogptError
from microgpt.whereabouts import described, refuse_another_copy

STEPS = 5


@dataclass(frozen=True)
class Choice:
    """What is held against what."""

    reference: str
    candidate: str
    dtype: str
    steps: int
    seed: int | None
    save_case: Path | None

    def case(self, name: str) -> Case:
        """A case, with its own parameters, or those of the chosen seed."""
        case = load_case(name)
        return case if self.seed is None else with_params(case, draw_params(case, self.seed))

    def standard(self, case: Case) -> Standard:
        """What the candidate is held to."""
        return float32(case) if self.dtype == "float32" else FLOAT64


@dataclass
class Record:
    """What has been compared in this session."""

    tallies: list[Tally]
    disagreements: list[dict[str, Any]]
    notes: list[str]


CHOICE = pytest.StashKey[Choice]()
RECORD = pytest.StashKey[Record]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("crosscheck")
    group.addoption("--backend", default="vectorized", help="what is checked (vectorized)")
    group.addoption("--reference", default="scalar", help="what it is held against (scalar)")
    group.addoption(
        "--dtype", default="float64", help="precision of what is checked: float64, float32"
    )
    group.addoption("--case", action="append", help="only this case, by its name or YAML file")
    group.addoption("--steps", type=int, default=STEPS, help=f"steps of every case ({STEPS})")
    group.addoption("--seed", type=int, help="draw other parameters, and other random models")
    group.addoption("--save-case", type=Path, help="where to put the smallest random model that"
                    " disagrees, as a case (FILE.yaml)")  # fmt: skip
    group.addoption("--json", type=Path, help="write what was compared and found to this file")


def pytest_configure(config: pytest.Config) -> None:
    try:
        refuse_another_copy()
    except MicrogptError as error:
        raise pytest.UsageError(str(error)) from None
    option = config.getoption
    reference, candidate, dtype = option("--reference"), option("--backend"), option("--dtype")
    for name in (reference, candidate):
        if name not in NAMES:
            raise pytest.UsageError(f"unknown backend {name!r}; expected {' or '.join(NAMES)}")
    if dtype not in ("float64", "float32"):
        raise pytest.UsageError(f"unknown dtype {dtype!r}; expected float64 or float32")
    if candidate == "scalar" and dtype == "float32":
        raise pytest.UsageError("scalar computes in float64; use --backend vectorized")
    if reference == candidate and dtype == "float64":
        raise pytest.UsageError(
            f"{candidate} against itself proves nothing; choose another --reference, or --dtype"
        )
    if option("--save-case") and option("--save-case").suffix != ".yaml":
        raise pytest.UsageError(f"--save-case {option('--save-case')}: expected a name in .yaml")
    if option("--steps") < 1:
        raise pytest.UsageError(f"--steps {option('--steps')}: expected 1 or more")
    for name in option("--case") or []:
        try:
            load_case(name)
        except MicrogptError as error:
            raise pytest.UsageError(str(error)) from None
    config.stash[CHOICE] = Choice(
        reference, candidate, dtype, option("--steps"), option("--seed"), option("--save-case")
    )
    config.stash[RECORD] = Record([], [], [])


def pytest_report_header() -> str:
    return f"crosscheck of {described()}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With --case, only what runs on a case."""
    if config.getoption("--case"):
        chosen = [item for item in items if "case_name" in getattr(item, "fixturenames", ())]
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case_name" in metafunc.fixturenames:
        metafunc.parametrize("case_name", metafunc.config.getoption("--case") or case_names())


@pytest.fixture
def choice(pytestconfig: pytest.Config) -> Choice:
    """What the command line asks for."""
    return pytestconfig.stash[CHOICE]


@pytest.fixture
def case(choice: Choice, case_name: str) -> Case:
    """A case, as the command line asks for it."""
    return choice.case(case_name)


@pytest.fixture
def lessons(choice: Choice, case_name: str) -> tuple[Step, ...]:
    """The steps of the case as the reference computes them, once for all tests."""
    return _steps(choice, case_name)


@cache
def _steps(choice: Choice, case_name: str) -> tuple[Step, ...]:
    case = choice.case(case_name)
    return tuple(trace(case, choice.reference, "float64", choice.steps))


@pytest.fixture
def tallies(pytestconfig: pytest.Config) -> list[Tally]:
    """Where a test leaves the count of what it compared."""
    return pytestconfig.stash[RECORD].tallies


@pytest.fixture
def notes(pytestconfig: pytest.Config) -> list[str]:
    """Where a test leaves a line for the summary."""
    return pytestconfig.stash[RECORD].notes


@pytest.fixture
def settle(pytestconfig: pytest.Config) -> Any:
    """Takes an outcome: counts it if all agreed, and fails with the report if not.

    What is held to other bounds than the rest is not counted with them.
    """
    choice, record = pytestconfig.stash[CHOICE], pytestconfig.stash[RECORD]
    candidate = choice.candidate
    if candidate == choice.reference:
        candidate += f" {choice.dtype}"

    def settle(outcome: Outcome, counted: bool = True) -> None:
        if outcome.found:
            first = outcome.found[0]
            record.disagreements.append(as_json(first))
            pytest.fail(render(first, choice.reference, candidate), pytrace=False)
        if counted:
            record.tallies.append(replace(outcome.tally))

    return settle


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    record = terminalreporter.config.stash[RECORD]
    lines = [summary(_total(record.tallies), len(record.tallies))] if record.tallies else []
    if lines or record.notes:
        terminalreporter.write_sep("-", "crosscheck")
        for line in [*lines, *record.notes]:
            terminalreporter.write_line(line)


def pytest_sessionfinish(session: pytest.Session) -> None:
    path, record = session.config.getoption("--json"), session.config.stash[RECORD]
    if path:
        report = {
            "compared": vars(_total(record.tallies)),
            "notes": record.notes,
            "disagreements": record.disagreements,
        }
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _total(tallies: list[Tally]) -> Tally:
    total = Tally()
    for tally in tallies:
        total.add(tally)
    return total
