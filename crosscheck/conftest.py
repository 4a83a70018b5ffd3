"""What `pytest crosscheck` can be told, and what it says at the end."""

from __future__ import annotations

import pytest

from crosscheck.compare import Tally
from crosscheck.report import summary

TALLIES = pytest.StashKey[list[Tally]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TALLIES] = []


@pytest.fixture
def tallies(pytestconfig: pytest.Config) -> list[Tally]:
    """Where a test leaves the count of what it compared."""
    return pytestconfig.stash[TALLIES]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    tallies = terminalreporter.config.stash[TALLIES]
    if tallies:
        total = Tally()
        for tally in tallies:
            total.add(tally)
        terminalreporter.write_sep("-", "crosscheck")
        terminalreporter.write_line(summary(total, len(tallies)))
