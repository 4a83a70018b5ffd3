"""`python -m crosscheck`: run the crosscheck, plant defects, check a port or functions."""

from __future__ import annotations

import sys

from microgpt.runs.signals import begin

if __name__ == "__main__":
    begin("python -m crosscheck")  # before NumPy, whose import takes a moment

import argparse
import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from crosscheck.cases import case_names, case_path, draw_params, load_case, read_case, with_params
from crosscheck.compare import Outcome
from crosscheck.kit import STAGES, kit_cases
from crosscheck.report import as_json, render, summary
from crosscheck.tolerance import FLOAT32_MEASURED
from crosscheck.trace import PHASES, Step, real, split_key, teacher_forced, trace
from microgpt.backend import BACKENDS
from microgpt.cli import shell
from microgpt.cli.shell import Parser, bare, directory, page_libraries
from microgpt.cli.whereabouts import described
from microgpt.errors import MicrogptError
from microgpt.runs.checkpoint import save_params
from microgpt.runs.files import check_target

TAKE_FILES = ("--candidate", "--ignore")  # options of pytest and of ours
SEEDS = 9  # sets of parameters on which the error of single precision is measured
T = TypeVar("T")


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status of a command; 0: all agrees, 1: a difference, 2: a mistake in the call."""
    return shell.run(_parser, arguments)


def test(options: argparse.Namespace) -> int:
    """Run `pytest crosscheck` from any folder, with the options of pytest."""
    import pytest

    if {"-h", "--help"} & set(options.rest):
        print(_help_of_test())
        return 0
    if not __debug__:
        raise MicrogptError(
            "python -O leaves out assertions, and the tests are made of them; run it without -O"
            " and PYTHONOPTIMIZE"
        )

    class Ended:
        """Keeps the interrupt, which pytest would turn into an exit status of its own."""

        def pytest_keyboard_interrupt(self, excinfo: pytest.ExceptionInfo[BaseException]) -> None:
            self.by = excinfo.value

    for before, word in pairwise(["", *options.rest]):
        if word.endswith(".py") and before not in TAKE_FILES and Path(word).is_file():
            raise MicrogptError(
                f"{word}: the tests are those of the crosscheck; to check functions of your own:"
                f" python -m crosscheck check {word}"
            )
    ended = Ended()
    with contextlib.redirect_stdout(bare(sys.stdout)):  # pytest writes in colours
        # pytest warns that it cannot rewrite the asserts of a package that is imported already, and
        # that it cannot write its cache into a folder of another user
        ignored = ("PytestAssertRewriteWarning", "PytestCacheWarning")
        known = [word for name in ignored for word in ("-W", f"ignore::pytest.{name}")]
        status = pytest.main([str(Path(__file__).parent), *known, *options.rest], plugins=[ended])
    if isinstance(getattr(ended, "by", None), KeyboardInterrupt):
        raise ended.by
    return int(status)


def _help_of_test() -> str:
    """The help of `test`: the crosscheck's own options, and the cases."""
    from crosscheck import conftest, plugin

    class Options(argparse.ArgumentParser):
        """Takes the place of pytest's parser, whose help would list pytest's options as well."""

        addoption = argparse.ArgumentParser.add_argument

        def getgroup(self, *_: str) -> Options:
            return self

    parser = Options(
        prog="python -m crosscheck test",
        description="Hold two implementations against each other: `pytest crosscheck`, from any"
        " folder. The options of pytest can be given as well (pytest --help), such as -k NAME, -x,"
        " -q.",
        epilog="cases, the smallest first: " + ", ".join(case_names()),
    )
    for module in (conftest, plugin):
        module.pytest_addoption(parser)
    return parser.format_help().rstrip()


def defects(options: argparse.Namespace) -> int:
    """Plant every named defect and print what catches it."""
    from crosscheck.defects import LEGEND, judge, load_defects, row, total

    chosen = [one for one in load_defects() if not options.name or one.name in options.name]
    unknown = set(options.name) - {one.name for one in chosen}
    if unknown:
        raise MicrogptError(f"there is no defect {min(unknown)!r}; see fixtures/defects.yaml")
    verdicts = []
    if not options.json:
        print(f"defects planted in {described()}\n\n{LEGEND}", flush=True)
    for defect in _progress(chosen, "defect"):
        verdicts.append(judge(defect))
        if not options.json:
            tqdm.write(row(verdicts[-1]))
            sys.stdout.flush()
    if options.json:
        report = [
            {
                "defect": verdict.defect.name,
                "caught_by": sorted(verdict.caught_by),
                "located": verdict.located,
                "first": as_json(verdict.first) if verdict.first else None,
            }
            for verdict in verdicts
        ]
        print(json.dumps(report, indent=1))
    else:
        print(f"\n{total(verdicts)}")
    return 0 if all(verdict.first and verdict.understood for verdict in verdicts) else 1


def mutants(options: argparse.Namespace) -> int:
    """Change the sources at one place at a time and print the changes that no case notices."""
    from random import Random

    from crosscheck.domain import FILES as DOMAIN_FILES
    from crosscheck.mutants import FILES, SURVIVES, Score, domain_mutants, mechanical_mutants, tried

    mechanical = options.kind == "mechanical"
    known = FILES if mechanical else DOMAIN_FILES
    for file in options.file:
        if file not in known:
            raise MicrogptError(f"{file} has no {options.kind} mutants; {', '.join(known)} have")
    if options.sample is not None and options.sample < 1:
        raise MicrogptError(f"--sample: expected 1 or more, got {options.sample}")
    chosen = [*(mechanical_mutants(options.file) if mechanical else domain_mutants())]
    chosen = [one for one in chosen if not options.file or one.file in options.file]
    if options.sample is not None:
        chosen = Random(0).sample(chosen, min(options.sample, len(chosen)))
    score = Score()
    print(f"mutants of {described()}\n", flush=True)
    for mutant, outcome in _progress(tried(chosen), "mutant", len(chosen)):
        score.add(mutant, outcome)
        if outcome == SURVIVES:
            tqdm.write(str(mutant))
            sys.stdout.flush()
    print(f"\n{score}")
    return 0


def record(options: argparse.Namespace) -> int:
    """Write a trace."""
    from crosscheck.traces import save_trace

    case = load_case(options.case)
    if options.steps < 1:
        raise MicrogptError(f"--steps: expected 1 or more, got {options.steps}")
    check_target(options.out, "--out")
    steps = trace(case, options.backend, options.dtype, options.steps)
    steps = _progress(steps, "step", options.steps)
    count = save_trace(options.out, case, options.backend, options.dtype, steps)
    print(f"{options.out}: {count} steps of {case.name} by {options.backend}, {options.dtype}")
    return 0


def _progress(items: Iterable[T], unit: str, count: int | None = None) -> Iterator[T]:
    """The items, with a bar on a terminal."""
    yield from tqdm(items, unit=unit, total=count, leave=False, disable=None)


def diff(options: argparse.Namespace) -> int:
    """Compare two traces."""
    from crosscheck.traces import diff

    if options.html:
        check_target(options.html, "--html")
    only = [pattern for text in options.only or ["*"] for pattern in text.split(",")]
    outcome = diff(options.reference, options.candidate, only)
    first = outcome.found[0] if outcome.found else None
    if options.html:
        names = options.reference.stem, options.candidate.stem
        _draw(options.html, "traces", [outcome], names)
    if options.json:
        report = {
            "compared": dataclasses.asdict(outcome.tally),
            "notes": outcome.notes,
            "disagreement": as_json(first) if first else None,
        }
        print(json.dumps(report, indent=1))
        return 1 if first else 0
    for note in outcome.notes:
        print(f"{options.candidate.stem}: {note}")
    if first:
        print(render(first, options.reference.stem, options.candidate.stem))
    else:
        print(summary(outcome.tally, 1))
    return 1 if first else 0


def kit(options: argparse.Namespace) -> int:
    """Write what a port in another language needs: a guide, and the inputs of the cases."""
    from crosscheck.kit import write_kit

    written = write_kit(options.folder, options.case or kit_cases(), options.answers)
    print(f"{len(written)} files in {options.folder}; begin with {written[0]}")
    return 0


def port(options: argparse.Namespace) -> int:
    """Check what a program computes. Exit status 3: nothing is wrong, but something is missing."""
    from crosscheck.port import climb, command_line

    _check_time_limit(options.time_limit)
    if options.html:
        check_target(options.html, "--html")
    result = climb(
        command_line(options.program),
        options.case or kit_cases(),
        options.stage or STAGES,
        options.dtype,
        options.reference,
        options.time_limit,
        options.all,
    )
    if options.html:
        _draw(options.html, "the ladder", result.outcomes, (options.reference, "port"))
    print(json.dumps(result.as_json(), indent=1) if options.json else result)
    return result.exit_status


def check(options: argparse.Namespace) -> int:
    """Check functions of your own. Exit status 3: right so far, but some are not written yet."""
    from crosscheck.candidate import source_file
    from crosscheck.check import run, watch

    source_file(options.candidate)
    _check_time_limit(options.time_limit)
    if options.watch:
        return watch(options.candidate, options.hint, options.time_limit)
    return run(options.candidate, options.hint, not options.json, options.time_limit)


def _check_time_limit(seconds: float) -> None:
    if not 0 < seconds < float("inf"):
        raise MicrogptError(f"--time-limit: expected seconds above 0, got {seconds}")


def _draw(path: Path, about: str, outcomes: Sequence[Outcome], labels: tuple[str, str]) -> None:
    """Write the map of these comparisons, as a page."""
    with page_libraries():
        from crosscheck.html import of_outcomes, write
    write(path, of_outcomes(about, outcomes, *labels))


def params(options: argparse.Namespace) -> int:
    """Draw the parameters of cases and store them beside the cases."""
    for name in options.case or case_names():
        path = case_path(name)
        drawn = draw_params(read_case(path))
        save_params(path.with_suffix(".safetensors"), drawn)
        print(f"{len(drawn)} parameters drawn, beside {path}")
    return 0


def float32_losses(options: argparse.Namespace) -> int:
    """Measure the error of single precision, as a share of the largest number of each tensor."""
    worst: dict[str, tuple[float, str]] = dict.fromkeys(FLOAT32_MEASURED, (0.0, ""))
    for name in case_names():
        stored = load_case(name)
        if stored.float32:
            continue  # a case whose file declares a larger error
        for seed in range(SEEDS):
            case = with_params(stored, draw_params(stored, seed)) if seed else stored
            steps = list(trace(case, "vectorized", "float64", 5))
            for pair in zip(steps, teacher_forced(case, "vectorized", "float32", steps)):
                for key, error in _errors(*pair):
                    phase = split_key(key)[0]
                    worst[phase] = max(worst[phase], (error, f"{name}, seed {seed}: {key}"))
    for phase, (error, where) in worst.items():
        allowed = f"(allowed four times {FLOAT32_MEASURED[phase]:.1e})"
        print(f"{PHASES[phase]:26} {error:8.1e}  {allowed}  {where}")
    return 0


def _errors(reference: Step, step: Step) -> Iterator[tuple[str, float]]:
    """The key and the largest error of each tensor, as a share of the tensor's largest number."""
    for key, tensor in step.items():
        there = real(key, tensor.shape, reference["batch/tokens"])
        size = np.abs(reference[key][there]).max(initial=0.0)
        yield key, float(np.abs(tensor - reference[key])[there].max() / size) if size else 0.0


Argument = tuple[str, dict[str, Any]]  # what argparse's add_argument takes
JSON = ("--json", {"action": "store_true", "help": "for other programs"})
HTML = ("--html", {"type": Path, "metavar": "FILE", "help": "draw a map of it as a page"})
DTYPE = ("--dtype", {"default": "float64", "choices": ("float64", "float32")})
CASES = ("--case", {"nargs": "+", "metavar": "NAME|FILE", "help": "only these (default: all)"})


def _time_limit(of: str, default: float) -> Argument:
    words = f"for one {of} (default: {default:g})"
    return "--time-limit", {"type": float, "default": default, "metavar": "SECONDS", "help": words}


COMMANDS: dict[str, tuple[Callable[[argparse.Namespace], int], list[Argument]]] = {
    "test": (test, []),
    "defects": (defects, [("name", {"nargs": "*", "help": "only these (default: all)"}), JSON]),
    "mutants": (mutants, [
        ("file", {"nargs": "*", "help": "only in these, such as vectorized/model.py"}),
        ("--kind", {"choices": ("mechanical", "domain"), "default": "mechanical",
                    "help": "every operator and number (default), or what people get wrong"}),
        ("--sample", {"type": int, "metavar": "N", "help": "only N of them, drawn at random"}),
    ]),
    "trace": (record, [
        ("--case", {"required": True, "metavar": "NAME|FILE", "help": "a case"}),
        ("--backend", {"required": True, "choices": BACKENDS}),
        DTYPE,
        ("--steps", {"type": int, "default": 3, "metavar": "N", "help": "how many (default: 3)"}),
        ("--out", {"required": True, "type": Path, "metavar": "FILE",
                   "help": "a safetensors file"}),
    ]),
    "diff": (diff, [
        ("reference", {"type": Path}),
        ("candidate", {"type": Path}),
        ("--only", {"action": "append", "metavar": "PATTERNS", "help": "of phase/name, such as"
                    " 'gradient/*' or 'gradient/*,forward/loss'; may be given again"}),
        HTML,
        JSON,
    ]),
    "kit": (kit, [
        ("folder", {"type": directory, "metavar": "DIR", "help": "where to put them"}),
        CASES,
        ("--answers", {"action": "store_true", "help": "write what a port should compute, too"}),
    ]),
    "port": (port, [
        ("--program", {"required": True, "metavar": "COMMAND", "help": "such as './mine {in}"
                       " {out}'; {in} and {out} become the names of two files"}),
        CASES,
        ("--stage", {"nargs": "+", "choices": STAGES, "metavar": "STAGE",
                     "help": f"only these of {', '.join(STAGES)}"}),
        DTYPE,
        ("--reference", {"default": "vectorized", "choices": BACKENDS,
                         "help": "what it is held against (default: vectorized)"}),
        _time_limit("case", 60.0),
        ("--all", {"action": "store_true", "help": "go on after the first wrong stage"}),
        HTML,
        JSON,
    ]),
    "check": (check, [
        ("candidate", {"type": Path, "metavar": "FILE", "help": "such as mine.py, or a package,"
                       " with functions of vectorized/ or scalar/, or loss_and_grads(params, docs,"
                       " config), or a class Backend or Value"}),
        ("--hint", {"action": "count", "default": 0, "help": "say what it looks like; given"
                    " twice, the equation with its numbers as well"}),
        ("--watch", {"action": "store_true", "help": "check again whenever the file changes"}),
        _time_limit("call", 5.0),
        JSON,
    ]),
    "float32": (float32_losses, []),
    "params": (params, [("case", {"nargs": "*", "help": "which cases (default: all)"})]),
}  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m crosscheck", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (run, arguments) in COMMANDS.items():
        about = (run.__doc__ or f"{name}.").rstrip(".")  # python -OO leaves docstrings out
        one: argparse.ArgumentParser = commands.add_parser(
            name,
            help=about[0].lower() + about[1:],
            description=about,
            allow_abbrev=False,
            add_help=run is not test,
        )
        one.set_defaults(run=run, parser=one)
        for flag, settings in arguments:
            one.add_argument(flag, **settings)
    commands.choices["test"].set_defaults(rest=[])
    return parser


if __name__ == "__main__":
    sys.exit(main())
