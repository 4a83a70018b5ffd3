"""What a training run prints: where it begins, how it goes, what it has learned."""

from __future__ import annotations

import math
import sys
from collections import deque
from time import perf_counter
from typing import TYPE_CHECKING, Any, TextIO

from microgpt.cli.shell import bare
from microgpt.data import cropped
from microgpt.errors import printable
from microgpt.windows import Windows

if TYPE_CHECKING:
    from microgpt.config import Config
    from microgpt.evaluate import Evaluation
    from microgpt.train import Run

RECENT = 100  # how many losses the final mean is over
PIPE_LINES = 20  # of progress that a pipe gets in a run
SILENCE = 10  # seconds without a line after which a pipe gets one more
FLUSH, REFRESH = 1.0, 0.1  # seconds between writes to a pipe, and to a terminal
WIDTH = 80
DASHES = "-" * 40  # between samples of several lines


class Progress:
    """A bar on a terminal, plain lines elsewhere and where --log-every asks for them.

    every    steps between lines; 0: PIPE_LINES lines in a pipe, none above a bar
    quiet    no bar and no lines
    """

    def __init__(self, step: int, steps: int, every: int = 0, quiet: bool = False) -> None:
        self.steps = steps
        self.recent: deque[float] = deque(maxlen=RECENT)
        self.done = 0  # steps that this process has done, and their seconds
        self.seconds = 0.0
        self.quiet = quiet
        self.bar = None if quiet else bar(sys.stdout, steps, "step", step)
        self.every = every or (0 if self.bar else max(1, steps // PIPE_LINES))
        self.asked = bool(every)
        self.printed = self.flushed = perf_counter()

    def update(self, step: int, loss: float, seconds: float) -> None:
        """Take in the loss and the seconds of a step, counted from 1, and show them."""
        self.recent.append(loss)
        self.done += 1
        self.seconds += seconds
        if self.quiet:
            return
        now = perf_counter()
        if self.bar is not None:
            if now > self.flushed + REFRESH or step == self.steps:
                self.bar.set_postfix_str(f"loss {figure(self.mean())}", refresh=False)
                self.flushed = now
            self.bar.update()
        late = self.bar is None and not self.asked and now > self.printed + SILENCE
        if late or (self.every and (step % self.every == 0 or step in (1, self.steps))):
            self.say(step, f"loss {figure(loss)}")
        if self.bar is None and now > self.flushed + FLUSH:
            sys.stdout.flush()
            self.flushed = now

    def measured(self, step: int, loss: float) -> None:
        """Show the held-out loss that was measured after a step."""
        if not self.quiet:
            self.say(step, f"held out {figure(loss)}")

    def say(self, step: int, what: str) -> None:
        """Print one line, above the bar if there is one."""
        line = f"step {step:{len(str(self.steps))}} / {self.steps} | {what}"
        if self.bar is None:
            print(line)
        else:
            self.bar.write(line, file=self.bar.fp)
        self.printed = perf_counter()

    def mean(self) -> float:
        """The mean loss of the recent steps."""
        return math.fsum(self.recent) / len(self.recent)

    def close(self) -> None:
        """Close the bar, and leave it on the terminal."""
        if self.bar is not None:
            self.bar.close()


def figure(loss: float) -> str:
    """A loss as it is printed."""
    return f"{loss:.4f}" if loss < 1e6 else f"{loss:.3g}"


def bar(file: TextIO, total: int, unit: str, initial: int = 0) -> Any:
    """A bar with rate and time left if the file is a terminal, else None."""
    if not file.isatty():
        return None
    from tqdm import tqdm

    return tqdm(
        total=total, initial=initial, unit=unit, file=bare(file), dynamic_ncols=True, ascii=True
    )


class Evaluating:
    """The progress of an evaluation on stderr: a bar on a terminal, else a line now and then."""

    def __init__(self, documents: int, quiet: bool = False) -> None:
        self.documents, self.quiet = documents, quiet
        self.bar = None if quiet else bar(sys.stderr, documents, "doc")
        self.printed = perf_counter()

    def update(self, done: int) -> None:
        """Show how many documents are done."""
        if self.bar is not None:
            self.bar.update(done - self.bar.n)
        elif not self.quiet and perf_counter() > self.printed + SILENCE:
            print(f"{done:,} of {self.documents:,} documents", file=sys.stderr, flush=True)
            self.printed = perf_counter()

    def close(self) -> None:
        """Close the bar, and remove it from the terminal."""
        if self.bar is not None:
            self.bar.leave = False
            self.bar.close()


def beginning(run: Run) -> str:
    """The sizes of data set, vocabulary, model and training, and how much of a text is seen."""
    config, more = run.config, ""
    if isinstance(run.training, Windows):
        n, more = run.training.per_epoch, " more"
        windows = "window" if n == 1 else "windows"
        count = f"{n:,} {windows} of {config.window:,} characters to train on"
        seen = []
    else:
        count = f"documents {len(run.training):,}"
        seen = cropped(run.documents, config.window)
    figures = [
        f"{count}, {len(run.held_out):,}{more} held out" if run.held_out else count,
        f"vocabulary {run.tokenizer.vocab_size:,}",
        f"parameters {run.num_params:,}",
        f"steps {config.steps:,} x {config.batch_size:,}",
    ]
    lines = [figures[0]]
    for figure in figures[1:]:
        joined = f"{lines[-1]} | {figure}"
        lines = [*lines[:-1], joined] if len(joined) <= WIDTH else [*lines, figure]
    return "\n".join([*lines, *seen])


def numbered(samples: list[str], windows: bool) -> str:
    """The samples with their numbers; a sample of several lines stands below its number."""
    between = "\n" if windows else " "
    return "\n".join(
        f"sample {i:2}:{between}{shown(sample, windows)}" for i, sample in enumerate(samples, 1)
    )


def shown(text: str, windows: bool) -> str:
    """A sample with control characters escaped, but not the line ends of windows."""
    return "\n".join(map(printable, text.split("\n") if windows else [text]))


def counted(documents: int, config: Config) -> str:
    """A count with its word: 1 document, 2 documents, 2 windows."""
    return f"{documents:,} {config.documents_are if documents != 1 else config.documents_are[:-1]}"


def ending(
    progress: Progress, vocab_size: int, held_out: float | None = None, kept: str = ""
) -> str:
    """The loss beside that of a uniform guess, what the loss means, and the time of training.

    held_out    the held-out loss; if given, the meaning is that of this loss
    kept        a line about the held-out loss
    """
    loss, uniform = progress.mean(), math.log(vocab_size)
    steps = len(progress.recent)
    over = f"the last {steps} steps" if steps > 1 else "the last step"
    lines = [
        f"loss {figure(loss)}, mean of {over}; knowing nothing would be"
        f" ln {vocab_size} = {uniform:.4f}",
        kept,
        meaning(loss if held_out is None else held_out, vocab_size),
        f"{progress.done:,} step{'' if progress.done == 1 else 's'} in {progress.seconds:.2f} s,"
        f" {1000 * progress.seconds / progress.done:.3f} ms a step",
    ]
    return "\n".join(line for line in lines if line)


def evaluated(result: Evaluation, vocab_size: int) -> dict[str, Any]:
    """An evaluation as JSON."""
    return {
        "loss": result.loss,
        "uniform": math.log(vocab_size),
        "by_position": [
            {"position": position, "documents": reach, "loss": loss}
            for position, (reach, loss) in enumerate(result.by_position, 1)
        ],
    }


def meaning(loss: float, vocab_size: int) -> str:
    """One sentence on what a loss says."""
    if loss > math.log(vocab_size):
        return f"That is worse than knowing nothing, which is a fair choice among all {vocab_size}."
    return (
        f"The next token is as uncertain as a fair choice among {math.exp(loss):.1f}"
        f" instead of all {vocab_size}."
    )
