"""A text cut into windows, each as long as the context.

A window is a document of BOS and as many characters as the context has positions. The context has
no room for its closing token, so a model trained on windows samples until the context is full.
"""

from __future__ import annotations

from array import array
from random import Random

from microgpt.errors import MicrogptError


class Windows:
    """An endless sequence of windows of n characters: windows[i] is the i-th document of training.

    Every epoch cuts the text at other offsets and shuffles the windows again. Both depend on the
    seed and the epoch alone, so a resumed run needs only its number of steps. Every epoch leaves
    out less than 2 n characters at the two ends of the text together.
    """

    def __init__(self, text: str, n: int, seed: int) -> None:
        self.text, self.n, self.seed = text, n, seed
        self.per_epoch = max(1, len(text) // n - 1)
        self.epoch = -1  # the epoch of self.starts; -1: none yet

    def __getitem__(self, i: int) -> str:
        epoch, index = divmod(i, self.per_epoch)
        if epoch != self.epoch:
            self.epoch, self.starts = epoch, self._starts(epoch)
        start = self.starts[index]
        return self.text[start : start + self.n]

    def _starts(self, epoch: int) -> array[int]:
        rng = Random(f"epoch {epoch} of seed {self.seed}")
        length = self.per_epoch * self.n
        first = rng.randrange(len(self.text) - length + 1)
        starts = array("q", range(first, first + length, self.n))
        rng.shuffle(starts)
        return starts


def cut(text: str, n: int) -> list[str]:
    """The windows of a text one after another; the rest at its end, shorter than n, is left out."""
    return [text[start : start + n] for start in range(0, len(text) - n + 1, n)]


def check_window(text: str, n: int, where: str) -> None:
    """Raise MicrogptError if a text is shorter than one window."""
    if len(text) < n:
        raise MicrogptError(
            f"{where}: has {len(text):,} characters, fewer than a window of {n:,}; take a smaller"
            " --block-size, or --documents lines"
        )
