"""`python -m crosscheck`: what belongs to the crosscheck and is not a test."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np

from crosscheck.cases import case_names, case_path, draw_params, load_case, read_case, with_params
from crosscheck.kit import STAGES, kit_cases
from crosscheck.report import as_json, render, summary
from crosscheck.tolerance import FLOAT32_MEASURED
from crosscheck.trace import PHASES, real, split_key, taught, trace
from microgpt.backend import NAMES
from microgpt.checkpoint import save_params
from microgpt.errors import MicrogptError

BROKEN_PIPE = 141  # 128 + SIGPIPE, as shells have it
SEEDS = 9  # sets of parameters for which single precision is measured


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Exit status 0: as it should be; 1: a difference; 2: a mistake in the call."""
    options, rest = _parser().parse_known_args(arguments)
    if rest and options.run is not test:
        options.parser.error(f"unrecognized arguments: {' '.join(rest)}")
    options.rest = rest
    try:
        status: int = options.run(options)
        sys.stdout.flush()
    except MicrogptError as error:
        print(f"python -m crosscheck {options.command}: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    return status


def test(options: argparse.Namespace) -> int:
    """Run `pytest crosscheck` from anywhere; options are pytest's."""
    import pytest

    return int(pytest.main([str(Path(__file__).parent), *options.rest]))


def defects(options: argparse.Namespace) -> int:
    """Plant every named defect and print what catches it."""
    from crosscheck.defects import judge, kill_matrix, load_defects

    chosen = [one for one in load_defects() if not options.name or one.name in options.name]
    unknown = set(options.name) - {one.name for one in chosen}
    if unknown:
        raise MicrogptError(f"there is no defect {min(unknown)!r}; see fixtures/defects.yaml")
    verdicts = [judge(defect) for defect in chosen]
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
        print(kill_matrix(verdicts))
    return 0 if all(verdict.first and verdict.understood for verdict in verdicts) else 1


def mutants(options: argparse.Namespace) -> int:
    """Plant every mechanical mutant of vectorized/ and print what survives."""
    from crosscheck.mutants import survivors

    found, count = survivors()
    for mutant in found:
        print(mutant)
    print(f"{count - len(found):,} of {count:,} mutants caught, {len(found)} survive")
    return 0


def record(options: argparse.Namespace) -> int:
    """Write a trace."""
    from crosscheck.traces import save_trace

    case = load_case(options.case)
    if options.steps < 1:
        raise MicrogptError(f"--steps: expected 1 or more, got {options.steps}")
    steps = trace(case, options.backend, options.dtype, options.steps)
    count = save_trace(options.out, case, options.backend, options.dtype, steps)
    print(f"{options.out}: {count} steps of {case.name} by {options.backend}, {options.dtype}")
    return 0


def diff(options: argparse.Namespace) -> int:
    """Compare two traces."""
    from crosscheck.traces import diff

    outcome = diff(options.reference, options.candidate, options.only)
    first = outcome.found[0] if outcome.found else None
    if options.json:
        report = {
            "compared": dataclasses.asdict(outcome.tally),
            "disagreement": as_json(first) if first else None,
        }
        print(json.dumps(report, indent=1))
    elif first:
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
    """Check what a program computes. Exit status 3: nothing is wrong, and not all is there."""
    from crosscheck.port import climb, command_line

    if not 0 < options.time_limit < float("inf"):
        raise MicrogptError(f"--time-limit: expected seconds above 0, got {options.time_limit}")
    result = climb(
        command_line(options.program),
        options.case or kit_cases(),
        options.stage or STAGES,
        options.dtype,
        options.reference,
        options.time_limit,
        options.all,
    )
    print(json.dumps(result.as_json(), indent=1) if options.json else result)
    return result.exit_status


def params(options: argparse.Namespace) -> int:
    """Draw the parameters of cases and store them beside the cases."""
    for name in options.case or case_names():
        path = case_path(name)
        save_params(path.with_suffix(".safetensors"), draw_params(read_case(path)))
    return 0


def float32(options: argparse.Namespace) -> int:
    """Measure what single precision loses, as a share of the largest number of each tensor."""
    worst: dict[str, tuple[float, str]] = dict.fromkeys(FLOAT32_MEASURED, (0.0, ""))
    for name in case_names():
        stored = load_case(name)
        if stored.float32:
            continue  # it declares that it loses more
        for seed in range(SEEDS):
            case = with_params(stored, draw_params(stored, seed)) if seed else stored
            lessons = list(trace(case, "vectorized", "float64", 5))
            for lesson, step in zip(lessons, taught(case, "vectorized", "float32", lessons)):
                for key, tensor in step.items():
                    phase, where = split_key(key)[0], f"{name}, seed {seed}: {key}"
                    there = real(key, tensor.shape, lesson["batch/tokens"])
                    size = np.abs(lesson[key][there]).max(initial=0.0)
                    error = np.abs(tensor - lesson[key])[there].max() / size if size else 0.0
                    worst[phase] = max(worst[phase], (float(error), where))
    for phase, (error, where) in worst.items():
        print(
            f"{PHASES[phase]:26} {error:8.1e}  (allowed four times"
            f" {FLOAT32_MEASURED[phase]:.1e})  {where}"
        )
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: error: {message}; see {self.prog} --help", file=sys.stderr)
        sys.exit(2)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m crosscheck", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, run: object) -> argparse.ArgumentParser:
        help = (run.__doc__ or "").rstrip(".")
        added: argparse.ArgumentParser = commands.add_parser(
            name, help=help[0].lower() + help[1:], description=run.__doc__, allow_abbrev=False
        )
        added.set_defaults(run=run, parser=added)
        return added

    command("test", test)

    one = command("defects", defects)
    one.add_argument("name", nargs="*", help="only these (default: all)")
    one.add_argument("--json", action="store_true", help="for other programs")

    command("mutants", mutants)

    one = command("trace", record)
    one.add_argument("--case", required=True, metavar="NAME|FILE", help="a case")
    one.add_argument("--backend", required=True, choices=NAMES)
    one.add_argument("--dtype", default="float64", choices=("float64", "float32"))
    one.add_argument("--steps", type=int, default=3, metavar="N", help="how many (default: 3)")
    one.add_argument("--out", required=True, type=Path, metavar="FILE", help="a safetensors file")

    one = command("diff", diff)
    one.add_argument("reference", type=Path)
    one.add_argument("candidate", type=Path)
    one.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="of phase/name,"
                     " such as 'gradient/*'")  # fmt: skip
    one.add_argument("--json", action="store_true", help="for other programs")

    one = command("kit", kit)
    one.add_argument("folder", type=Path, metavar="DIR", help="where to put them")
    one.add_argument("--case", nargs="+", metavar="NAME|FILE", help="only these (default: all)")
    one.add_argument("--answers", action="store_true", help="and what a port should compute")

    one = command("port", port)
    one.add_argument("--program", required=True, metavar="COMMAND", help="such as './mine {in}"
                     " {out}', where the names of two files are put")  # fmt: skip
    one.add_argument("--case", nargs="+", metavar="NAME|FILE", help="only these (default: all)")
    one.add_argument("--stage", nargs="+", choices=STAGES, metavar="STAGE", help="only these of"
                     f" {', '.join(STAGES)}")  # fmt: skip
    one.add_argument("--dtype", default="float64", choices=("float64", "float32"))
    one.add_argument("--reference", default="vectorized", choices=NAMES, help="what it is held"
                     " against (default: vectorized)")  # fmt: skip
    one.add_argument("--time-limit", type=float, default=60.0, metavar="SECONDS", help="for one"
                     " case (default: 60)")  # fmt: skip
    one.add_argument("--all", action="store_true", help="go on behind the first wrong stage")
    one.add_argument("--json", action="store_true", help="for other programs")

    command("float32", float32)

    one = command("params", params)
    one.add_argument("case", nargs="*", help="which cases (default: all)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
