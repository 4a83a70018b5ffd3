"""Data sets: texts with one document per line, or a text that is learned in windows."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

from platformdirs import user_cache_path

from microgpt.config import Config
from microgpt.errors import MicrogptError, shortened
from microgpt.runs.memory import check_file
from microgpt.settings import FIXTURES
from microgpt.windows import Windows, check_window, cut

NAMES_FILE = FIXTURES / "data" / "names.txt"
PRIDE_FILE = FIXTURES / "data" / "pride.txt"
EMBEDDED = {"names": NAMES_FILE, "pride": PRIDE_FILE}
IN_PYTHON = "(given in Python)"  # the data set of a model that was given a list of texts
TEXTS_ARE_GONE = "this model was trained on texts given in Python, which are not in its checkpoint"

# the list that the original program downloads
MAKEMORE_URL = "https://raw.githubusercontent.com/karpathy/makemore/988aa59/names.txt"
MAKEMORE_SHA256 = "0a30b5557f192f32ab962680889aac5f6fda0f4cecf40a6d0b5694f58ea8cc4d"
MAKEMORE_BYTES = 228_145


def load_documents(dataset: str, documents: str = "lines") -> list[str]:
    """The documents of a data set, in the order of the file; for windows, the text as one document.

    dataset      names, pride, makemore, or a UTF-8 text file
    documents    lines (stripped, without blank lines) or windows

    Raises MicrogptError if the file cannot be read as text, or holds no document.
    """
    read = read_documents if documents == "lines" else read_text
    if dataset in EMBEDDED:
        return read(EMBEDDED[dataset])
    if dataset == "makemore":
        return read(makemore())
    if dataset == IN_PYTHON:
        raise MicrogptError(f"{TEXTS_ARE_GONE}; name a text file with --dataset")
    if not os.path.isfile(dataset):
        kind = "is a folder, not a" if os.path.isdir(dataset) else "names no data set and no"
        if os.path.exists(dataset) and not os.path.isdir(dataset):
            kind = "is a device or a pipe, not a"
        known = (*EMBEDDED, "makemore")
        close = difflib.get_close_matches(dataset[:80], known, n=1)
        expected = f"expected {', '.join(known)}, or the path of a text file"
        hint = f"did you mean {close[0]!r}?" if close else expected
        raise MicrogptError(f"--dataset: {shortened(dataset, 300)} {kind} file; {hint}")
    return read(Path(dataset))


def located(dataset: str) -> str:
    """The name of a data set, or the absolute path of its file."""
    return dataset if dataset in (*EMBEDDED, "makemore") else os.path.abspath(dataset)


def parts(documents: list[str], config: Config) -> tuple[list[str] | Windows, list[str]]:
    """The training documents, and the held-out documents, which are the last of those given.

    Raises MicrogptError if no document would be left to train on.
    """
    left = len(documents) - config.held_out
    if config.documents == "lines":
        if left < 1:
            raise MicrogptError(
                f"--held-out {config.held_out}: the data set has {len(documents):,}"
                " documents, and none would be left to train on"
            )
        return documents[:left], documents[left:]
    (text,), n = documents, config.window
    check_window(text, n, config.dataset)
    left = len(text) - config.held_out * n
    if left < n:
        raise MicrogptError(
            f"--held-out {config.held_out}: the text has {len(text) // n:,} windows of {n}"
            " characters, and none would be left to train on"
        )
    return Windows(text[:left], n, config.seed), cut(text[left:], n)


def nth(documents: Sequence[str] | Windows, i: int) -> str:
    """The i-th document of training, which starts over after the last line."""
    return documents[i] if isinstance(documents, Windows) else documents[i % len(documents)]


def in_order(training: list[str] | Windows) -> list[str]:
    """Every training document once; windows in the order of the text."""
    return cut(training.text, training.n) if isinstance(training, Windows) else training


def cropped(documents: list[str], window: int) -> list[str]:
    """Lines on how much of the text fits into the context; none if every document does."""
    longer = sum(len(document) > window for document in documents)
    if not longer:
        return []
    share = sum(min(len(document), window) for document in documents) / sum(map(len, documents))
    percent = f"{min(100 * share, 99.9):.1f}" if share >= 0.01 else f"{100 * share:.1g}"
    said = (
        f"{longer:,} of {len(documents):,} documents {'is' if longer == 1 else 'are'} longer than"
        f" the context: {percent} % of the text is seen"
    )
    much = share < 0.5 or 2 * longer > len(documents)
    return [said, "to learn all of it: --documents windows"] if much else [said]


def digest(documents: list[str]) -> str:
    """The SHA-256 of these documents in this order."""
    return sha256_of("\n".join(documents).encode())


def read_documents(path: Path) -> list[str]:
    """The lines of a UTF-8 text file, stripped, without blank lines.

    A line ends at \\n, \\r\\n or \\r, and not at Unicode's other line separators.
    """
    with _text(path) as file:
        documents = [document for line in file if (document := line.strip())]
    if not documents:
        raise MicrogptError(f"{path}: no documents; expected one on each line")
    return documents


def read_text(path: Path) -> list[str]:
    """The whole of a UTF-8 text file, as the one document in a list; lines end in \\n."""
    with _text(path) as file:
        text = file.read()
    if not text.strip():
        raise MicrogptError(f"{path}: there is no text in it")
    return [text]


@contextlib.contextmanager
def _text(path: Path) -> Iterator[TextIO]:
    """An open UTF-8 text file; MicrogptError if the file cannot be read."""
    try:
        if not path.stat().st_size:  # some files in /proc say 0, and a read of them never ends
            yield io.StringIO()
            return
        check_file(path, lines=True)
        with open(path, encoding="utf-8-sig") as file:
            yield file
    except UnicodeDecodeError:
        number = _first_line_that_is_not_utf_8(path)
        raise MicrogptError(f"{path}: line {number} is not UTF-8 text; save it as UTF-8") from None
    except OSError as error:
        raise MicrogptError(f"{path}: {error.strerror}") from None


def _first_line_that_is_not_utf_8(path: Path) -> int:
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            if any("\udc80" <= char <= "\udcff" for char in line):
                return number
    return 0  # the file was replaced after the first attempt to read it


def makemore() -> Path:
    """The original program's names.txt in the user's cache, downloaded if it is not there yet."""
    from microgpt.download import download  # its imports take a tenth of a short run

    path = cache_folder() / "makemore-names.txt"
    if not path.is_file():
        download(MAKEMORE_URL, MAKEMORE_SHA256, MAKEMORE_BYTES, path)
    elif path.stat().st_size != MAKEMORE_BYTES or sha256_of(path.read_bytes()) != MAKEMORE_SHA256:
        raise MicrogptError(f"{path}: changed since it was downloaded; delete it to download again")
    return path


def cache_folder() -> Path:
    """Where downloads are kept: MICROGPT_CACHE, or the system's folder for such things."""
    if os.environ.get("MICROGPT_CACHE"):
        return Path(os.environ["MICROGPT_CACHE"])
    try:
        folder = user_cache_path("microgpt", appauthor=False)
    except RuntimeError:  # platformdirs up to 4.12 returns a path that begins with ~ instead
        folder = Path("~")
    if not folder.is_absolute():  # the system knows no home of this user
        raise MicrogptError(
            "there is no home directory to keep downloads in; name a folder with MICROGPT_CACHE"
        )
    return folder


def sha256_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
