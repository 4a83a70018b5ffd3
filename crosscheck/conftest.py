"""The options of `pytest crosscheck`, the order and processes of its tests, and its summary."""

from __future__ import annotations

import atexit
import gc
import json
import shutil
import tempfile
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from hypothesis.configuration import set_hypothesis_home_dir

from crosscheck.cases import Case, case_names, draw_params, load_case, with_params
from crosscheck.causes import RUN_AS, VALUE, Cause, Finding, Run, causes, consequences
from crosscheck.compare import SIDES, Disagreement, Outcome, Tally, simplicity, stopped
from crosscheck.operations import refuse_unknown_names
from crosscheck.processes import can_fork, cores, in_processes
from crosscheck.reference_steps import ReferenceSteps
from crosscheck.report import PLACE, as_json, headline, place, render, summary, wrapped
from crosscheck.sides import stop_of
from crosscheck.tolerance import FLOAT64, Standard, float32
from microgpt.backend import BACKENDS
from microgpt.cli.shell import page_libraries
from microgpt.cli.whereabouts import checkout, described, refuse_another_copy
from microgpt.errors import MicrogptError, printable
from microgpt.runs.files import check_target, write_whole

SHOWN = 2  # causes whose report is printed in full without -v
FIRST = ("test_first_step",)  # tests that are cheap and find most, so they run first
SLOW = ("test_a_thousand_steps", "test_random_models")
NOT_QUICK = (  # left out by -m quick: tests that take long, or look at what others look at, too
    *SLOW,
    "test_later_steps_by_the_table",
    "test_teacher_forced",
    "test_free_running",
    "test_in_single_precision",
    "test_in_micro_batches",
    "test_on_two_ranks",
    "test_documents_drawn",
    "test_every_expression_gives_its_element",
    "test_every_parameter_by_complex_step",
    "test_scalar_along_random_directions_by_differences",
)
# cases that -m quick runs in micro-batches, too: of one position, of several shapes and batches
IN_MICRO_BATCHES = "single-character", "unused-row", "unlikely-target", "tied-two-layers"
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Choice:
    """What the command line asks for: which sides are compared, and on what."""

    reference: str
    candidate: str
    dtype: str
    steps: int | None  # of every case; None: each of its batches once, then the first again
    seed: int | None
    save_case: Path | None

    def case(self, name: str) -> Case:
        """A case with its own parameters, or with those of the seed that was asked for."""
        case = _loaded(name)
        return case if self.seed is None else with_params(case, draw_params(case, self.seed))

    def steps_of(self, case: Case) -> int:
        """How many steps of a case are run."""
        return self.steps or len(case.batches) + 1

    def coarse(self, case: Case) -> Standard:
        """The tolerances of the candidate, without the noise of each tensor."""
        return float32(case) if self.dtype == "float32" else FLOAT64

    @property
    def labels(self) -> tuple[str, str]:
        """What reports call the two sides."""
        same = self.candidate == self.reference
        return self.reference, f"{self.candidate} {self.dtype}" if same else self.candidate


@cache
def _loaded(name: str) -> Case:
    return load_case(name)


@dataclass
class Left:
    """What a test leaves for the summary."""

    about: str
    tallies: list[Tally] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    parts: list[dict[str, Any]] = field(default_factory=list)  # of the map; see crosscheck.html
    order: tuple[int, ...] = ()  # by which findings are sorted if pytest-xdist runs the tests


CHOICE = pytest.StashKey[Choice]()
LEFT = pytest.StashKey[Left]()
REFERENCE_STEPS = pytest.StashKey[Path]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("crosscheck")
    group.addoption("--backend", default="vectorized", help="what is checked (vectorized)")
    group.addoption("--reference", default="scalar", help="what it is held against (scalar)")
    group.addoption(
        "--dtype", default="float64", help="precision of what is checked: float64, float32"
    )
    group.addoption("--case", action="append", help="only this case, by its name or YAML file")
    group.addoption(
        "--steps",
        type=int,
        help="steps of every case (each of its batches once, then the first again)",
    )
    group.addoption("--seed", type=int, help="draw other parameters, and other random models")
    group.addoption("--save-case", type=Path, help="where to put the smallest random model that"
                    " disagrees, as a case (FILE.yaml)")  # fmt: skip
    group.addoption("--json", type=Path, help="write what was compared and found to this file")
    group.addoption("--html", type=Path, help="draw a map of what was compared and found as a page")
    group.addoption("--processes", type=int, help="how many share the tests (as many as cores)")


def pytest_configure(config: pytest.Config) -> None:
    with _usage_errors():
        refuse_another_copy()
        refuse_unknown_names()
    config.addinivalue_line("markers", "about(words): what a test of the crosscheck compares")
    config.addinivalue_line("markers", "quick: some seconds: first steps, gradients, sources")
    option = config.getoption
    _check_sides(option("--reference"), option("--backend"), option("--dtype"))
    _check_targets(option)
    if option("--html"):
        with _usage_errors(), page_libraries():
            import_module("crosscheck.html")
    for name in ("--steps", "--processes"):
        if option(name) is not None and option(name) < 1:
            raise pytest.UsageError(f"{name} {option(name)}: expected 1 or more")
    if (option("--processes") or 1) > 1 and not can_fork():
        raise pytest.UsageError("--processes: this system cannot fork processes; leave it out")
    with _usage_errors():
        for name in option("--case") or []:
            load_case(name)
    _import_sides()
    asked = ("--reference", "--backend", "--dtype", "--steps", "--seed", "--save-case")
    config.stash[CHOICE] = Choice(*map(option, asked))
    config.stash[REFERENCE_STEPS] = Path(tempfile.mkdtemp(prefix="crosscheck-"))
    if not checkout(Path.cwd()):  # hypothesis would make a folder in the user's folder
        set_hypothesis_home_dir(config.stash[REFERENCE_STEPS])
    atexit.register(shutil.rmtree, config.stash[REFERENCE_STEPS], ignore_errors=True)
    config.pluginmanager.register(Session(config), "crosscheck-session")


@contextmanager
def _usage_errors() -> Iterator[None]:
    """Within this context, MicrogptError is raised as pytest's UsageError."""
    try:
        yield
    except MicrogptError as error:
        raise pytest.UsageError(printable(str(error))) from None


def _check_sides(reference: str, candidate: str, dtype: str) -> None:
    """Refuse sides that do not exist, or that prove nothing."""
    for name in (reference, candidate):
        if name not in BACKENDS:
            raise pytest.UsageError(f"unknown backend {name!r}; expected {' or '.join(BACKENDS)}")
    if dtype not in ("float64", "float32"):
        raise pytest.UsageError(f"unknown dtype {dtype!r}; expected float64 or float32")
    if candidate == "scalar" and dtype == "float32":
        raise pytest.UsageError("scalar computes in float64; use --backend vectorized")
    if reference == candidate and dtype == "float64":
        raise pytest.UsageError(
            f"{candidate} against itself proves nothing; choose another --reference, or --dtype"
        )


def _check_targets(option: Any) -> None:
    """Refuse files that cannot be written, before the tests run."""
    for name in ("--json", "--html", "--save-case"):
        path = option(name)
        if path is None:
            continue
        if name == "--save-case" and path.suffix != ".yaml":
            raise pytest.UsageError(printable(f"--save-case {path}: expected a name in .yaml"))
        with _usage_errors():
            check_target(path, name)
            if name == "--save-case":
                check_target(path.with_suffix(".safetensors"), name)


def _import_sides() -> None:
    """Refuse a side that cannot be imported."""
    for name in BACKENDS:
        try:
            import_module(f"{name}.backend")
        except Exception as error:
            stop = stop_of(error)
            if stop is None:
                raise
            words = f"{name}/ cannot be imported: {stop.error}\n{stop.line}: {stop.text}"
            raise pytest.UsageError(words) from None


def pytest_unconfigure(config: pytest.Config) -> None:
    if REFERENCE_STEPS in config.stash:
        shutil.rmtree(config.stash[REFERENCE_STEPS], ignore_errors=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark quick tests, sort all by _order, and with --case keep those of Value and of cases."""
    for item in filter(_ours, items):
        cut = _name(item) == "test_in_micro_batches" and _case_of(item) in IN_MICRO_BATCHES
        if cut or _name(item) not in NOT_QUICK:
            item.add_marker("quick")
    if config.getoption("--case"):
        chosen = [item for item in items if _on_value(item) or _case_of(item)]
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen
    items.sort(key=_order)


def _ours(item: pytest.Item) -> bool:
    return item.path.parent == HERE


def _name(item: pytest.Item) -> str:
    return str(getattr(item, "originalname", item.name))


def _about(item: pytest.Item) -> str:
    """What a test compares, in words."""
    marker = item.get_closest_marker("about")
    return str(marker.args[0]) if marker else ""


def _on_value(item: pytest.Item) -> bool:
    return _about(item) == VALUE


def _order(item: pytest.Item) -> tuple[int, ...]:
    """A key by which to sort tests: those outside this folder; Value; first steps, simple cases
    first; the other tests of cases; the rest; those that take long."""
    if not _ours(item):
        return (-1,)
    if _on_value(item):
        return (0,)
    if _name(item) in SLOW:
        return 4, SLOW.index(_name(item))
    case = _case_of(item)
    if not case:
        return (3,)
    return 1 if _name(item) in FIRST else 2, *simplicity(_loaded(case), 1)


def _case_of(item: pytest.Item) -> str:
    """The case that a test runs on; "" if the test does not run on every case."""
    callspec = getattr(item, "callspec", None)
    return str(callspec.params.get("case_name", "")) if callspec else ""


def _place_of(item: pytest.Item) -> str:
    """What a report names as the case of a test: its case, or else what the test compares."""
    callspec = getattr(item, "callspec", None)
    named = str(callspec.params.get("name", "")) if callspec else ""
    return "" if _on_value(item) else _case_of(item) or named or _about(item)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case_name" in metafunc.fixturenames:
        names = metafunc.config.getoption("--case") or case_names()
        metafunc.parametrize("case_name", names)


@pytest.fixture(autouse=True)
def graphs_are_not_searched() -> Iterator[None]:
    """Python does not search for cycles of objects: scalar's graphs have none, and the search takes
    a quarter of scalar's time."""
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def choice(pytestconfig: pytest.Config) -> Choice:
    """What the command line asks for."""
    return pytestconfig.stash[CHOICE]


@pytest.fixture
def case(choice: Choice, case_name: str) -> Case:
    """A case with the parameters that the command line asks for."""
    return choice.case(case_name)


@pytest.fixture
def reference_steps(pytestconfig: pytest.Config, choice: Choice, case_name: str) -> ReferenceSteps:
    """The steps of the case by the reference, computed once for all tests."""
    return _reference_steps(choice, case_name, pytestconfig.stash[REFERENCE_STEPS])


@pytest.fixture
def standard(choice: Choice, case: Case, reference_steps: ReferenceSteps) -> Standard:
    """The tolerances of the candidate in this case."""
    if choice.dtype == "float32" or reference_steps.failed.exists():
        return choice.coarse(case)
    return reference_steps.standard


@cache
def _reference_steps(choice: Choice, case_name: str, folder: Path) -> ReferenceSteps:
    case = choice.case(case_name)
    return ReferenceSteps(case, choice.reference, choice.steps_of(case), folder, case.name)


@pytest.fixture
def left(request: pytest.FixtureRequest) -> Left:
    """What this test leaves for the summary."""
    return request.node.stash.setdefault(LEFT, Left(_about(request.node)))


@pytest.fixture
def tallies(left: Left) -> list[Tally]:
    """The list to which a test adds the count of what it compared."""
    return left.tallies


@pytest.fixture
def notes(left: Left) -> list[str]:
    """The list to which a test adds a line for the summary."""
    return left.notes


@pytest.fixture
def settle(choice: Choice, left: Left, pytestconfig: pytest.Config) -> Any:
    """A function that takes an outcome: it counts what agreed, or fails the test in one line.

    counted    False: do not count it, since other bounds hold than in the rest of the run
    more       lines to add to the report
    """

    def settle(
        outcome: Outcome,
        counted: bool = True,
        more: str = "",
        labels: tuple[str, str] = choice.labels,
    ) -> None:
        failed = outcome.found[0].step if outcome.found else 0
        if outcome.case:
            left.runs.append(Run(left.about, outcome.case, outcome.tally.steps, failed))
        if pytestconfig.getoption("--html") and outcome.case:
            from crosscheck.html import part

            left.parts.append(asdict(part(outcome, left.about)))
        if outcome.found:
            left.findings.append(_finding(outcome.found[0], labels, left.about, more))
            pytest.fail(left.findings[-1].headline, pytrace=False)
        if counted:
            left.tallies.append(replace(outcome.tally))

    return settle


def _finding(found: Disagreement, labels: tuple[str, str], about: str, more: str = "") -> Finding:
    sides = dict(zip(SIDES, labels))
    return Finding(
        about=about,
        case=found.case,
        step=found.step,
        key=found.key,
        headline=headline(found, *labels),
        diagnosis=found.diagnosis,
        report=render(found, *labels, RUN_AS.get(about, "")) + more,
        stopped=f"{found.stop.line} {found.stop.error}" if found.stop and not found.key else "",
        fields=as_json(found),
        side=sides.get(found.at_fault, "").partition(" ")[0],
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """The report on a test, with what it leaves; an exception of a side becomes a finding, too."""
    report = yield
    if not _ours(item) or (call.when == "setup" and report.passed):
        return report
    left = item.stash.setdefault(LEFT, Left(_about(item)))
    stop = stop_of(call.excinfo.value) if report.failed and call.excinfo else None
    if stop and not left.findings:
        labels = item.config.stash[CHOICE].labels
        at_fault = "reference" if stop.side == labels[0] else "candidate"
        found = stopped(_place_of(item), 0, at_fault, stop)
        left.findings.append(_finding(found, labels, left.about))
        report.longrepr = left.findings[-1].headline
    left.order = _order(item)
    if call.when != "teardown":
        report.crosscheck = json.dumps(asdict(left))  # type: ignore[attr-defined]
    return report


class Session:
    """What all tests of a run leave, and the summary of it."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.choice = config.stash[CHOICE]
        self.left = Left("")
        self.findings: dict[str, list[Finding]] = {}  # by the test's name
        self.order: dict[str, Any] = {}  # by the test's name, what findings are sorted by
        # the finding whose report was printed while tests were still running
        self.announced: Finding | None = None
        self.told = ""  # what it looked like then
        self.undone: set[str] | None = set()  # tests not done in other processes; None: unknown

    @property
    def terminal(self) -> Any:
        return self.config.pluginmanager.getplugin("terminalreporter")

    @property
    def in_order(self) -> list[Finding]:
        """All findings, the simplest first; those of the recorder's refusals last."""
        names = sorted(self.findings, key=lambda name: self.order[name])
        found = [finding for name in names for finding in self.findings[name]]
        return sorted(found, key=lambda finding: finding.refused)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionstart(self) -> None:
        if self.terminal and not hasattr(self.config, "workerinput"):
            self.terminal.write_line(f"crosscheck of {described()}")

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.order = {item.nodeid: i for i, item in enumerate(session.items)}
        gc.freeze()  # what is there before the tests need not be searched for cycles again

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        """Run the tests of other folders and of Value, then the rest in several processes."""
        option = self.config.getoption
        count = option("--processes") or cores()
        alone = option("usepdb", False) or option("capture") == "no" or option("collectonly")
        ours = [item for item in session.items if _ours(item) and not _on_value(item)]
        if self.config.pluginmanager.hasplugin("dsession") or hasattr(self.config, "workerinput"):
            self.undone = None  # pytest-xdist runs the tests in an order of its own
            return None
        if alone or count < 2 or len(ours) < 2 or session.testsfailed:
            return None
        others = [item for item in session.items if item not in ours]
        for item, following in zip(others, [*others[1:], None]):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            _stop_if_asked(session)
        self.terminal.showfspath = False
        for done, reports, undone in in_processes(ours, count, _chooser(ours)):
            self.undone = {ours[i].nodeid for i in undone}
            item, hook = ours[done], ours[done].ihook
            hook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
            for plain in reports:
                read = self.config.hook.pytest_report_from_serializable
                hook.pytest_runtest_logreport(report=read(config=self.config, data=plain))
            hook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
            self.announce()
            _stop_if_asked(session)
        return True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        plain = json.loads(getattr(report, "crosscheck", "{}"))
        if not plain or hasattr(self.config, "workerinput"):
            return
        self.left.tallies += [Tally(**one) for one in plain["tallies"]]
        self.left.notes += plain["notes"]
        self.left.runs += [Run(**one) for one in plain["runs"]]
        self.left.parts += plain["parts"]
        if plain["findings"]:
            self.order.setdefault(report.nodeid, tuple(plain["order"]))
            self.findings[report.nodeid] = [Finding(**one) for one in plain["findings"]]

    def pytest_runtest_logfinish(self) -> None:
        if self.undone == set():  # all tests run in this process, in order
            self.announce()

    def announce(self) -> None:
        """Print the first report, once no unfinished test can have a simpler one."""
        wrong = [name for name, found in self.findings.items() if not found[0].refused]
        if self.announced or not wrong or self.undone is None:
            return
        name = min(wrong, key=lambda name: self.order[name])
        if any(self.order[one] < self.order[name] for one in self.undone):
            return
        cause = causes(self.in_order)[0]
        if not cause.confirmed and any(one.partition("::")[2].startswith(FIRST)
                                       for one in self.undone):  # fmt: skip
            return
        self.announced, self.told = cause.first, cause.diagnosis
        self.terminal.ensure_newline()
        self.terminal.write_line("")
        self.terminal.write_line(cause.report)
        self.terminal.write_line("")

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_terminal_summary(self) -> Generator[None, None, None]:
        """Print our summary, and not pytest's report on every test that found something."""
        stats = self.terminal.stats
        kept = stats.pop("failed", [])
        if others := [one for one in kept if one.nodeid not in self.findings]:
            stats["failed"] = others
        try:
            yield
            self._summarize()
        finally:
            if kept:
                stats["failed"] = kept

    def _summarize(self) -> None:
        left, write = self.left, self.terminal.write_line
        if not (left.tallies or left.notes or self.findings):
            return
        self.terminal.write_sep("-", "crosscheck")
        if left.tallies:
            write(summary(_total(left.tallies), len(left.tallies)))
        for note in [] if self.findings else left.notes:
            write(note)
        found = causes(self.in_order)
        for number, cause in enumerate(found):
            for line in self._lines(cause, number, len(found)):
                write(line)
        if self.config.option.verbose > 0:
            for name in sorted(self.findings, key=lambda name: self.order[name]):
                for finding in self.findings[name]:
                    write("")
                    write(f"{name}:")
                    write(finding.report)

    def _lines(self, cause: Cause, number: int, of: int) -> list[str]:
        """The lines on a cause in the summary."""
        first = cause.first
        at = place(first.case, first.step, first.key, RUN_AS.get(first.about, ""))
        if number >= SHOWN:
            return wrapped(
                f"cause {number + 1} of {of}: {at}: {first.headline} (-v shows the report)"
            )
        lines = [""]
        if first == self.announced:
            title = "one cause" if of == 1 else f"cause {number + 1} of {of}"
            lines += wrapped(f"{title}, reported above: {at}: {first.headline}")
            if cause.diagnosis != self.told and not self.told.startswith(PLACE):
                now = cause.diagnosis or "nothing that all of them share"
                lines += wrapped(f"with the other cases it looks like: {now}", "  ", "  ")
        else:
            lines += [f"cause {number + 1} of {of}:"] * (of > 1) + cause.report.splitlines()
        for line in self._consequences(cause):
            lines += wrapped(line, "  ", "  ")
        return lines

    def _consequences(self, cause: Cause) -> tuple[str, str, str]:
        files = {Path(name).stem: name for name in self.config.getoption("--case") or case_names()}
        runs = [run for run in self.left.runs if run.case in files]  # not those of random models
        return consequences(cause, runs, lambda name: _loaded(files[name]), files)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(self.config, "workerinput"):
            return
        try:
            self._write(self.config.getoption("--html"), self.config.getoption("--json"))
        except MicrogptError as error:
            self.terminal.ensure_newline()
            self.terminal.write_line(f"error: {printable(str(error))}")
            session.exitstatus = pytest.ExitCode.USAGE_ERROR

    def _write(self, html: Path | None, path: Path | None) -> None:
        """Write the files that were asked for."""
        if html:
            from crosscheck.html import Part, page, write

            parts = [Part(**one) for one in self.left.parts]
            tallies = self.left.tallies
            compared = summary(_total(tallies), len(tallies)) if tallies else ""
            write(html, page(parts, causes(self.in_order), compared, self.choice.labels))
        if path:
            report = {
                "compared": vars(_total(self.left.tallies)),
                "notes": self.left.notes,
                "causes": [
                    {
                        **cause.first.fields,
                        "diagnosis": cause.diagnosis,
                        "about": cause.first.about,
                        "shared": self._consequences(cause)[0],
                        "also_fails": [{"about": one.about, **one.fields} for one in cause.others],
                    }
                    for cause in causes(self.in_order)
                ],
            }
            write_whole(path, (json.dumps(report, indent=1) + "\n").encode())


def _stop_if_asked(session: pytest.Session) -> None:
    if session.shouldfail:
        raise session.Failed(session.shouldfail)
    if session.shouldstop:
        raise session.Interrupted(session.shouldstop)


def _chooser(items: list[pytest.Item]) -> Any:
    """A function that picks the next test: in order, if possible of a case that no other process
    runs, and one that takes long as soon as all first steps have begun."""
    slow = [_name(item) in SLOW for item in items]
    first = [_name(item) in FIRST for item in items]
    cases = [_case_of(item) for item in items]

    def choose(waiting: list[int], running: list[int]) -> int:
        long = [i for i in waiting if slow[i]]
        if long and not any(first[i] for i in waiting) and not any(slow[i] for i in running):
            return long[0]
        busy = {cases[i] for i in running} - {""}
        short = [i for i in waiting if not slow[i]]
        free = [i for i in short if cases[i] not in busy]
        return (free or short or long)[0]

    return choose


def _total(tallies: list[Tally]) -> Tally:
    total = Tally()
    for tally in tallies:
        total.add(tally)
    return total
