"""What a training run prints: where it begins, how it goes, what it has learned."""

from __future__ import annotations

import math
import sys
from collections import deque
from typing import Any

from microgpt.config import Config

RECENT = 100  # how many losses the closing figure is the mean of
LINES = 20  # how many lines of progress a pipe gets


class Progress:
    """A bar on a terminal, plain lines elsewhere."""

    def __init__(self, step: int, steps: int) -> None:
        self.steps = steps
        self.recent: deque[float] = deque(maxlen=RECENT)
        self.done = 0  # steps of this run, and the seconds they took together
        self.seconds = 0.0
        self.every = max(1, steps // LINES)
        self.bar: Any = None
        if sys.stdout.isatty():
            from tqdm import tqdm

            self.bar = tqdm(
                total=steps,
                initial=step,
                unit="step",
                file=sys.stdout,
                dynamic_ncols=True,
                ascii=True,
            )

    def update(self, step: int, loss: float, seconds: float) -> None:
        """After each step, counted from 1."""
        self.recent.append(loss)
        self.done += 1
        self.seconds += seconds
        if step % self.every == 0 or step in (1, self.steps):
            if self.bar is None:
                print(f"step {step:{len(str(self.steps))}} / {self.steps} | loss {loss:.4f}")
            else:
                self.bar.set_postfix_str(f"loss {self.mean():.4f}", refresh=False)
        if self.bar is not None:
            self.bar.update()

    def mean(self) -> float:
        """The mean loss of the recent steps."""
        return math.fsum(self.recent) / len(self.recent)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self.bar is not None:
            self.bar.close()


def beginning(config: Config, documents: int, vocab_size: int, parameters: int) -> str:
    """The figures by which two runs are recognised as the same."""
    return (
        f"documents {documents:,} | vocabulary {vocab_size:,} | parameters {parameters:,}"
        f" | steps {config.steps:,} x {config.batch_size:,}"
    )


def ending(progress: Progress, vocab_size: int) -> str:
    """The loss beside that of a model that knows nothing, what that means, and the time it took."""
    loss, uniform = progress.mean(), math.log(vocab_size)
    steps = len(progress.recent)
    over = f"the last {steps} steps" if steps > 1 else "the last step"
    return (
        f"loss {loss:.4f}, mean of {over}; knowing nothing would be"
        f" ln {vocab_size} = {uniform:.4f}\n{meaning(loss, vocab_size)}\n"
        f"{progress.done:,} steps in {progress.seconds:.2f} s,"
        f" {1000 * progress.seconds / progress.done:.3f} ms a step"
    )


def meaning(loss: float, vocab_size: int) -> str:
    """One sentence on what a loss says."""
    choices = f"{math.exp(loss):.1f}" if loss < 20 else f"e^{loss:.0f}"
    return (
        f"The next token is as uncertain as a fair choice among {choices}"
        f" instead of all {vocab_size}."
    )
