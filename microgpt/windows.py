"""A text that is no list of documents, cut into windows of the context.

A window is a document like any other, as long as the context: BOS, and then as many characters as
there are positions. The closing token has no place in it, so a model of windows writes on until
its context is full.
"""

from __future__ import annotations

from array import array
from random import Random

from microgpt.errors import MicrogptError


class Windows:
    """Windows of n characters without end: windows[i] is the one that training sees as its i-th.

    In every epoch the text is cut at other places, and its windows come in another order. Both
    follow from the seed and the epoch alone, so a run that goes on needs to know no more than its
    number of steps. Up to 2 n characters at the two ends are left out, others in each epoch.
    """

    def __init__(self, text: str, n: int, seed: int) -> None:
        self.text, self.n, self.seed = text, n, seed
        self.per_epoch = max(1, len(text) // n - 1)
        self.epoch = -1  # whose windows begin at self.starts

    def __getitem__(self, i: int) -> str:
        epoch, place = divmod(i, self.per_epoch)
        if epoch != self.epoch:
            self.epoch, self.starts = epoch, self._starts(epoch)
        start = self.starts[place]
        return self.text[start : start + self.n]

    def _starts(self, epoch: int) -> array[int]:
        rng = Random(f"epoch {epoch} of seed {self.seed}")
        length = self.per_epoch * self.n
        first = rng.randrange(len(self.text) - length + 1)
        starts = array("q", range(first, first + length, self.n))
        rng.shuffle(starts)
        return starts


def cut(text: str, n: int) -> list[str]:
    """The windows of a text one after another, without what is left over at its end."""
    return [text[start : start + n] for start in range(0, len(text) - n + 1, n)]


def check_window(text: str, n: int, where: str) -> None:
    """Refuse a text that has not a single window."""
    if len(text) < n:
        raise MicrogptError(
            f"{where}: has {len(text):,} characters, fewer than a window of {n:,}; take a smaller"
            " --block-size, or --documents lines"
        )
