"""The command line. Each command imports what it uses, and nothing else."""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from microgpt import __version__
from microgpt.cli import shell
from microgpt.cli.shell import Parser, directory, one_line, page_libraries, say
from microgpt.config import FIELDS, Config
from microgpt.errors import MicrogptError, as_typed
from microgpt.runs.launch import launch, mpiexec
from microgpt.runs.ranks import ALONE, Alone, end, joined
from microgpt.runs.signals import SIGNALLED
from microgpt.settings import DEFAULT_PRESET, flag, load_config, presets, typed_flag

if TYPE_CHECKING:
    from microgpt.train import Run

DRAWN_AT_ONCE = 1000  # samples that are drawn before they are printed
RUN_NAME = re.compile(r"\w[\w.-]*")
PARTS = {"held-out": "held out of training", "training": "without what is held out", "all": "all"}
BATCH_SIZES = ("1", "16", "64", "256")  # of `bench`


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status, which is 2 for anything the user can mend."""
    return end(shell.run(_parser, arguments))


def train(options: argparse.Namespace) -> int:
    """`microgpt train`: 0 at the end, 128 plus the number of a signal that ended training early."""
    ranks = joined()
    if ranks is ALONE and (cores := _cores(options)) > 1:
        return launch(cores, options.arguments)
    with ranks.failing():
        if ranks.rank == 0:
            return _lead(options, ranks)
        from microgpt.train import follow

        follow(ranks)
    return 0


def _lead(options: argparse.Namespace, ranks: Alone) -> int:
    from microgpt.runs.directory import SAMPLES

    log_every(options)
    if ranks is not ALONE:
        if options.cores not in (None, str(ranks.size)):
            raise MicrogptError(
                f"--cores {options.cores}: mpiexec has started {ranks.size} ranks; leave one out"
            )
        options.cores = str(ranks.size)
    with _resumed(options, ranks) if options.resume else _new(options, ranks) as run:
        if run.lock.left_by and not options.quiet:
            left_by = one_line(run.lock.left_by)
            print(f"the run before ({left_by}) was cut short; its lock is void")
        if run.unlike:
            print(
                f"config.yaml had {run.unlike}, unlike the checkpoint, which counts; to change how"
                " a run goes on, use the options"
            )
        try:
            return _train(run, options)
        except KeyboardInterrupt:
            say(f"everything up to step {run.saved:,} is in {run.out}\n{run.how_to_resume}")
            raise
        except OSError as error:  # of standard output: those of files name the file
            if error.filename or (run.out / SAMPLES).exists():
                raise
            raise OSError(error.errno, f"{error.strerror}; {run.how_to_resume}") from None


def _train(run: Run, options: argparse.Namespace) -> int:
    from microgpt.backend import drawing
    from microgpt.cli import report
    from microgpt.layout import MANY
    from microgpt.runs.directory import write_samples

    config, tokenizer = run.config, run.tokenizer
    if not options.quiet:
        print(report.beginning(run))
    progress = report.Progress(run.step, config.steps, log_every(options), options.quiet)
    try:
        finished = run.train(progress.update, progress.measured)
    finally:
        progress.close()
    if not finished:
        say(
            f"stopped after step {run.step:,} of {config.steps:,}; everything is in {run.out}\n"
            f"{run.how_to_resume}"
        )
        return SIGNALLED + run.signal
    if run.step < config.steps:
        print(f"time is up after step {run.step:,} of {config.steps:,}; {run.how_to_resume}")
    loss, kept = _loss_of_held_out(run, options.quiet) if run.held_out else (None, "")
    said = [kept] if kept else []
    if progress.done:
        said = [report.ending(progress, tokenizer.vocab_size, loss, kept)]
    if run.num_params > MANY and not options.quiet:
        print(f"drawing {config.num_samples:,} samples ..", flush=True)
    with drawing():
        documents = run.backend.sample(
            tokenizer, run.rng, config.num_samples, config.temperature, [], config.top_k
        )
    samples = [tokenizer.decode(ids) for ids in documents]
    windows = config.documents == "windows"
    write_samples(run.out, samples, f"{report.DASHES}\n" if windows else "")
    said += [report.numbered(samples, windows)] if samples else []
    if not options.quiet:
        print("\n".join(said))
    look = "" if options.quiet else f"; to look at it: microgpt report {as_typed(run.out)}"
    print(f"everything is in {run.out}{look}")
    return 0


def log_every(options: argparse.Namespace) -> int:
    """Steps between lines of progress; 0: report.Progress decides."""
    if options.log_every is None:
        return 0
    if options.quiet:
        raise MicrogptError("--log-every: does not go with --quiet; leave one out")
    every: int = typed_flag("steps", options.log_every, "--log-every")
    return every


def _loss_of_held_out(run: Run, quiet: bool) -> tuple[float | None, str]:
    """The held-out loss, which is added to metrics.jsonl as well, and a line about it."""
    from microgpt.cli import report
    from microgpt.evaluate import evaluation
    from microgpt.runs.directory import keep_held_out

    kept = f"on {report.counted(len(run.held_out), run.config)} kept from training"
    loss, step = run.latest or (math.nan, -1)
    if step != run.step:
        progress = report.Evaluating(len(run.held_out), quiet)
        model = run.backend, run.held_out, run.tokenizer, run.config
        try:
            loss = evaluation(*model, progress.update).loss
        except ArithmeticError as error:
            return None, f"no loss {kept}: {error}"
        finally:
            progress.close()
        keep_held_out(run.out, run.step, loss)
    best = min(run.best or (loss, run.step), (loss, run.step))
    more = f", best {best[0]:.4f} at step {best[1]:,}" if run.best else ""
    return loss, f"loss {loss:.4f} {kept}{more}"


def sample(options: argparse.Namespace) -> int:
    """`microgpt sample`: prints one sample per line, or with a line of dashes between them."""
    from microgpt.backend import drawing, load_backend
    from microgpt.cli import report
    from microgpt.layout import MANY
    from microgpt.runs.checkpoint import load_checkpoint
    from microgpt.runs.memory import check_memory
    from microgpt.tokenizer import prompt_ids

    held = load_checkpoint(options.checkpoint)
    config, tokenizer = held.config, held.tokenizer
    prompt = prompt_ids(options.prompt, tokenizer, config, "--prompt")
    temperature = config.temperature
    if options.temperature is not None:
        temperature = typed_flag("temperature", options.temperature)
    top_k = config.top_k
    if options.top_k is not None:
        top_k = typed_flag("top_k", options.top_k)
    num = config.num_samples if temperature else 1  # at temperature 0, all samples are the same
    if options.num is not None:
        num = typed_flag("num_samples", options.num, "--num")
    config = replace(_reading(config, options.backend), num_samples=min(num, DRAWN_AT_ONCE))
    check_memory(config, tokenizer.vocab_size, [], options.backend)
    rng = held.rng if options.seed is None else Random(typed_flag("seed", options.seed))
    backend = load_backend(options.backend, config, held.state)
    weights = sum(tensor.size for tensor in held.state.params.values())
    if weights > MANY:  # standard output is for samples alone
        say(f"drawing {num:,} samples from {weights:,} weights ..", sys.stderr)
    windows = config.documents == "windows"
    for left in range(num, 0, -DRAWN_AT_ONCE):  # each portion is printed before the next is drawn
        with drawing():
            drawn = backend.sample(
                tokenizer, rng, min(left, DRAWN_AT_ONCE), temperature, prompt, top_k
            )
        for i, ids in enumerate(drawn, num - left):
            if windows and i:
                print(report.DASHES)
            print(report.shown(tokenizer.decode(ids), windows))
    return 0


def evaluate(options: argparse.Namespace) -> int:
    """`microgpt eval`: prints the loss, by position and over all."""
    import json

    from microgpt.backend import load_backend
    from microgpt.cli import report
    from microgpt.evaluate import check_evaluation, chosen, evaluation
    from microgpt.runs.checkpoint import load_checkpoint

    held = load_checkpoint(options.checkpoint)
    config = held.config
    dataset, part, documents = chosen(held, options.dataset, options.part)
    check_evaluation(options.backend, documents, held.tokenizer, config)
    backend = load_backend(options.backend, _reading(config, options.backend), held.state)
    progress = report.Evaluating(len(documents))
    try:
        result = evaluation(backend, documents, held.tokenizer, config, progress.update)
    except ArithmeticError as error:
        raise MicrogptError(
            f"{dataset}: {error}; the model gives one of its characters no chance at all"
        ) from None
    finally:
        progress.close()
    V = held.tokenizer.vocab_size
    if options.json:
        said = {
            "dataset": dataset,
            "part": part,
            "kind": config.documents,
            "documents": len(documents),
        }
        print(json.dumps({**said, **report.evaluated(result, V)}, indent=1))
        return 0
    count = report.counted(len(documents), config)
    print(f"{Path(dataset).name}, {PARTS[part]}: {count}")
    print(f"{'position':>8}  {config.documents_are:>9}  {'loss':>7}")
    for position, (reach, loss) in enumerate(result.by_position, 1):
        print(f"{position:8}  {reach:9,}  {loss:7.4f}")
    print(
        f"loss {result.loss:.4f}, mean over {count};"
        f" knowing nothing would be ln {V} = {math.log(V):.4f}\n" + report.meaning(result.loss, V)
    )
    return 0


def bench(options: argparse.Namespace) -> int:
    """`microgpt bench`: 1 if a contestant is wrong."""
    import json
    from textwrap import fill

    from microgpt.bench import contest as timing

    config = load_config(_preset(options))
    dtypes = [typed_flag("dtype", options.dtype)] if options.dtype else timing.DTYPES
    if options.calls:
        return _calls(options, config)
    if options.lengths:
        return _lengths(options, config, dtypes)
    sizes = [typed_flag("batch_size", text) for text in options.batch_size or BATCH_SIZES]
    cores = min(2, os.cpu_count() or 1) if mpiexec() else 1
    if options.cores:
        cores = typed_flag("cores", options.cores)
    if options.cores and cores > max(sizes):
        raise MicrogptError(f"--cores {cores}: no batch has a document for each of them")
    threads = None
    if options.torch_threads:
        threads = typed_flag("cores", options.torch_threads, "--torch-threads")
        if "torch" not in options.against:
            raise MicrogptError("--torch-threads: PyTorch takes no part; add --against torch")
    contestants = timing.bench(
        config, sizes, options.against, cores, dtypes=dtypes, torch_threads=threads
    )
    if options.json:
        print(json.dumps(timing.as_json(contestants), indent=1))
    else:
        print("\n".join([timing.table(contestants), *timing.reductions(contestants)]))
        print("\n".join(timing.floors(contestants)))
        remarks = [
            ", ".join(f"{name}: {value}" for name, value in timing.machine().items()),
            "medians of steps taken in turn; apart: the largest difference of loss, gradient and"
            " update, as a share of the largest number, from those of scalar on the first batch and"
            " of vectorized, float64 and without micro-batches, on the others; calls: the NumPy"
            " calls of a step of vectorized, and the time that as many empty calls would take",
        ]
        if any(one.partly for one in contestants):
            remarks.append(
                "a batch would take scalar minutes: scalar computes a few of its tokens, and all"
                " batches are compared with vectorized"
            )
        if any(one.foreign for one in contestants):
            remarks.append("of a program, only the losses that it prints are compared")
        print("\n".join(fill(remark, 80, break_long_words=False) for remark in remarks))
    return 0 if all(one.right for one in contestants) else 1


def atlas(options: argparse.Namespace) -> int:
    """`microgpt atlas`: writes a page with every tensor that both texts keep on a document."""
    from microgpt.runs.files import check_target

    with page_libraries():
        from crosscheck import atlas as drawn
        from microgpt.pages.page import write

    check_target(options.out, "--out")
    step = typed_flag("steps", options.step, "--step") if options.step is not None else None
    _write_page(options.out, drawn.of_run(options.run_directory, options.text, step), write)
    return 0


def report(options: argparse.Namespace) -> int:
    """`microgpt report`: writes a page about one or several runs."""
    from microgpt.runs.files import check_target

    with page_libraries():
        from microgpt.pages import run_report
        from microgpt.pages.page import write

    check_target(options.out, "--out")
    _write_page(options.out, run_report.report(options.runs), write)
    return 0


def learn(options: argparse.Namespace) -> int:
    """`microgpt learn`: writes the exercises, except files that the learner has changed."""
    from crosscheck.learn import DIRECTORY, write_exercises

    folder = options.folder or DIRECTORY
    written = write_exercises(folder)
    name = as_typed(folder)
    if written:
        print(f"{len(written)} exercises in {name}; the first is {written[0].name}")
    else:
        print(f"all exercises are in {name} already; none has been touched")
    print(f"to see where you stand: microgpt check {name}")
    return 0


def check(options: argparse.Namespace) -> int:
    """`microgpt check`: 0 when all exercises are done, 1 if one is wrong, 3 if none is."""
    import json

    from crosscheck import learn as exercises

    folder = exercises.found_folder(options.folder)
    if options.solution is not None:
        print(exercises.shown_solution(folder, options.solution))
        return 0
    if options.watch:
        exercises.watch(folder, options.hint)

    def text(found: exercises.Check) -> str:
        return json.dumps(found.as_json(), indent=1) if options.json else str(found)

    found = exercises.check(folder, options.hint, text)
    print(text(found))
    return found.exit_status


def _write_page(path: Path, html: str, write: Callable[[Path, str], None]) -> None:
    write(path, html)
    print(f"{path}: {path.stat().st_size:,} bytes; open it in a browser, no network is needed")


def _calls(options: argparse.Namespace, config: Config) -> int:
    """`microgpt bench --calls`"""
    import json
    from shutil import get_terminal_size

    from microgpt.bench import calls
    from microgpt.bench import contest as timing

    _refuse_beside(options, "calls", ("lengths", "cores", "against", "torch_threads"))
    size, *others = options.batch_size or [str(config.batch_size)]
    if others:
        raise MicrogptError("--calls: lists one step; give --batch-size once")
    dtype = typed_flag("dtype", options.dtype or config.dtype)
    listing = timing.listed(
        replace(config, batch_size=typed_flag("batch_size", size), dtype=dtype, cores=1)
    )
    if options.json:
        print(json.dumps({"machine": timing.machine(), **calls.as_json(listing)}, indent=1))
    else:
        print("\n".join(calls.lines(listing, max(80, get_terminal_size().columns))))
    return 0


def _lengths(options: argparse.Namespace, config: Config, dtypes: Sequence[str]) -> int:
    """`microgpt bench --lengths`: 1 if a result is wrong."""
    import json

    from microgpt.bench import contest as timing

    _refuse_beside(options, "lengths", ("cores", "against", "torch_threads"))
    longest = typed_flag("block_size", options.lengths, "--lengths")
    sizes = [typed_flag("batch_size", text) for text in options.batch_size or ["1"]]
    try:
        found = timing.lengths(config, longest, sizes, dtypes)
    except MicrogptError as error:  # such as one about memory
        raise MicrogptError(str(error).replace("--block-size", "--lengths")) from None
    print(json.dumps(timing.as_json(found), indent=1) if options.json
          else timing.table_of_lengths(found))  # fmt: skip
    return 0 if all(one.right for one in found) else 1


def _refuse_beside(options: argparse.Namespace, name: str, others: Sequence[str]) -> None:
    """Raise MicrogptError if an option is given that has no meaning beside this one."""
    for other in others:
        if getattr(options, other):
            raise MicrogptError(f"{flag(name)}: does not go with {flag(other)}; leave one out")


def _new(options: argparse.Namespace, ranks: Alone) -> Run:
    from microgpt.train import check_measured, new_run

    source, overrides = _preset(options), _overrides(options)
    config = load_config(source, overrides)
    check_measured(config, overrides)
    name = source if source in presets() else Path(source).stem
    if not options.out and not RUN_NAME.fullmatch(name):
        raise MicrogptError(
            f"--config {source}: its name would be the run's, which has letters, digits, '-', '_'"
            " and '.', and begins with a letter or digit; name a directory with --out DIR"
        )
    say_so = id if options.quiet else partial(print, flush=True)
    return new_run(config, options.backend, options.out, name, options.overwrite, say_so, ranks)


def _resumed(options: argparse.Namespace, ranks: Alone) -> Run:
    from microgpt.train import resumed_run

    if options.config is not None or options.overwrite:
        clash = "--overwrite" if options.overwrite else "--config"
        raise MicrogptError(f"{clash}: does not go with --resume, which continues a run as it is")
    if options.out is None:
        raise MicrogptError("--resume: which run? Name its directory with --out DIR")
    fields = {name: typed_flag(name, text) for name, text in _overrides(options).items()}
    return resumed_run(options.out, options.backend, fields, ranks)


def _cores(options: argparse.Namespace) -> int:
    """How many ranks the options, the configuration or the checkpoint ask for."""
    from microgpt.backend import check_backend

    if not options.resume:
        config = load_config(options.config or DEFAULT_PRESET, _overrides(options))
    elif options.cores or not options.out:
        return typed_flag("cores", options.cores or "1")
    else:
        from microgpt.runs.checkpoint import FILE_NAME, load_checkpoint

        if not (options.out / FILE_NAME).is_file():
            return 1  # resumed_run refuses
        config = load_checkpoint(options.out).config
    check_backend(options.backend, config)
    return config.cores


def _reading(config: Config, backend_name: str) -> Config:
    """The configuration for sampling and evaluation: one core, no batch; float64 for scalar."""
    dtype = "float64" if backend_name == "scalar" else config.dtype
    return replace(config, cores=1, dtype=dtype, batch_size=1)


def _preset(options: argparse.Namespace) -> str:
    return DEFAULT_PRESET if options.config is None else str(options.config)


def _overrides(options: argparse.Namespace) -> dict[str, str]:
    return {name: getattr(options, name) for name in FIELDS if getattr(options, name) is not None}


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="microgpt",
        description="One GPT, written twice: train it, sample it, evaluate it, with either"
        " implementation.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"microgpt {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_train(commands)
    _add_sample(commands)
    _add_eval(commands)
    _add_atlas(commands)
    _add_report(commands)
    _add_learn(commands)
    _add_check(commands)
    _add_bench(commands)
    return parser


def _add_train(commands: Any) -> None:
    command = _model_command(commands, "train", train, "learn a data set and write samples")
    command.add_argument(
        "--config",
        metavar="NAME|FILE",
        help=f"a preset ({', '.join(presets())}) or a YAML file, where `preset: NAME` says what it"
        f" differs from (default: {DEFAULT_PRESET})",
    )
    command.add_argument("--out", type=directory, metavar="DIR", help="the run directory"
                         " (default: a new one under runs/)")  # fmt: skip
    command.add_argument("--resume", action="store_true", help="go on with the run in --out DIR")
    command.add_argument(
        "--overwrite", action="store_true", help="replace the run that --out DIR holds"
    )
    command.add_argument(
        "--log-every",
        metavar="N",
        help="steps between lines of progress (default: 20 lines in a pipe)",
    )
    command.add_argument(
        "--quiet", action="store_true", help="print nothing but where everything is"
    )
    fields = command.add_argument_group(
        "configuration", "Each option replaces a field of the preset or file."
    )
    for name, field in FIELDS.items():
        choices = field.metadata["choices"]
        metavar = "|".join(choices) if choices else METAVARS[str(field.type)]
        fields.add_argument(flag(name), metavar=metavar, help=field.metadata["help"])


def _add_sample(commands: Any) -> None:
    command = _model_command(commands, "sample", sample, "write documents with a trained model")
    _add_checkpoint(command)
    command.add_argument("--prompt", default="", metavar="TEXT", help="how each sample begins")
    command.add_argument(
        "--temperature",
        metavar="X",
        help="divides the logits; 0: the likeliest token each time (default: the run's)",
    )
    command.add_argument(
        "--top-k",
        metavar="K",
        help="draw from the K likeliest tokens; 0: from all (default: the run's)",
    )
    command.add_argument("--num", metavar="N", help="how many samples (default: the run's;"
                         " at temperature 0 one)")  # fmt: skip
    command.add_argument(
        "--seed", metavar="S", help="of the draws (default: the random stream of the run goes on)"
    )


def _add_eval(commands: Any) -> None:
    command = _model_command(commands, "eval", evaluate, "measure a trained model's loss")
    _add_checkpoint(command)
    command.add_argument("--dataset", metavar="NAME|FILE", help="names, makemore, pride, or a text"
                         " file (default: the run's)")  # fmt: skip
    command.add_argument(
        "--part",
        metavar="|".join(PARTS),
        help="of the run's data set (default: what was held out, if anything was, else all)",
    )
    command.add_argument("--json", action="store_true", help="for other programs")


def _add_atlas(commands: Any) -> None:
    command = _page_command(commands, "atlas", atlas, "draw every tensor that both texts keep"
                    " on one document")  # fmt: skip
    command.add_argument("run_directory", nargs="?", type=directory, metavar="RUN", help="a"
                         " checkpoint or run directory (default: the default preset)")  # fmt: skip
    command.add_argument(
        "--text", metavar="TEXT", help="the document (default: emma; with --step, that step's)"
    )
    command.add_argument("--step", metavar="N", help="before and after this step of the run")


def _add_report(commands: Any) -> None:
    command = _page_command(commands, "report", report, "draw how runs went, and where they differ")
    command.add_argument("runs", nargs="+", type=directory, metavar="RUN", help="a run directory")


def _add_learn(commands: Any) -> None:
    command = _command(commands, "learn", learn, "write exercises: this GPT, with bodies taken out")
    command.add_argument("folder", nargs="?", type=directory, metavar="DIR", help="where to put"
                         " them (default: exercises)")  # fmt: skip


def _add_check(commands: Any) -> None:
    command = _command(commands, "check", check, "check the exercises, and say how far you are")
    command.add_argument("folder", nargs="?", type=directory, metavar="DIR", help="where they are"
                         " (default: this folder, or exercises in it)")  # fmt: skip
    command.add_argument("--hint", action="count", default=0, help="say what a mistake looks like;"
                         " given twice, the equation with its numbers as well")  # fmt: skip
    command.add_argument("--solution", metavar="NAME", help="show how the text does an exercise")
    command.add_argument(
        "--watch", action="store_true", help="check again whenever a file has changed"
    )
    command.add_argument("--json", action="store_true", help="for other programs")


def _add_bench(commands: Any) -> None:
    command = commands.add_parser(
        "bench",
        help="time both implementations, side by side",
        description="Time both implementations, side by side, and compare their results.",
        allow_abbrev=False,
    )
    command.set_defaults(run=bench, parser=command)
    command.add_argument("--config", metavar="NAME|FILE", help="the model (default: microgpt)")
    command.add_argument(
        "--batch-size",
        action="append",
        metavar="N",
        help=f"may be repeated (default: {', '.join(BATCH_SIZES)})",
    )
    command.add_argument(
        "--cores",
        metavar="N",
        help="time vectorized on N ranks as well (default: 2, with MPI and two cores)",
    )
    command.add_argument(
        "--against",
        action="append",
        default=[],
        metavar="torch|FILE.py",
        help="an opponent, may be repeated; a program reads input.txt and prints each loss, as the"
        " original microgpt.py does",
    )
    command.add_argument(
        "--torch-threads", metavar="N", help="threads of PyTorch (default: its own)"
    )
    command.add_argument(
        "--dtype", metavar="float32|float64", help="one precision only (default: both)"
    )
    command.add_argument(
        "--calls",
        action="store_true",
        help="list the calls of NumPy that a step of vectorized consists of, each timed",
    )
    command.add_argument(
        "--lengths",
        metavar="N",
        help="time vectorized on documents from 1 to N positions, new and known lengths",
    )
    command.add_argument("--json", action="store_true", help="for other programs")


METAVARS = {"int": "N", "float": "X", "bool": "true|false", "str": "NAME|FILE"}


def _command(commands: Any, name: str, run: Any, help: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=help, description=help[0].upper() + help[1:] + ".", allow_abbrev=False
    )
    command.set_defaults(run=run, parser=command)
    return command


def _model_command(commands: Any, name: str, run: Any, help: str) -> argparse.ArgumentParser:
    command = _command(commands, name, run, help)
    command.add_argument(
        "--backend",
        default="vectorized",
        metavar="scalar|vectorized",
        help="which implementation (default: vectorized)",
    )
    return command


def _page_command(commands: Any, name: str, run: Any, help: str) -> argparse.ArgumentParser:
    command = _command(commands, name, run, help)
    command.add_argument(
        "--out",
        type=Path,
        default=Path(f"{name}.html"),
        metavar="FILE",
        help=f"the page (default: {name}.html)",
    )
    return command


def _add_checkpoint(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT", help="a checkpoint or a run directory"
    )
