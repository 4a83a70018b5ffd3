"""A file from the network, of known size and digest."""

from __future__ import annotations

from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

from microgpt.data import sha256_of
from microgpt.errors import MicrogptError
from microgpt.runs.files import write_whole

TIMEOUT = 30  # seconds without an answer


def download(url: str, sha256: str, size: int, path: Path) -> None:
    """Download a file, whole or not at all, even if two processes download it at once.

    Raises MicrogptError if the file cannot be downloaded, or has another digest.
    """
    by_hand = f"download it elsewhere and put it at {path}, or use --dataset names"
    try:
        with urlopen(url, timeout=TIMEOUT) as answer:
            content: bytes = answer.read(size + 1)  # one byte too many: another file
    except (OSError, HTTPException) as error:
        if isinstance(error, HTTPError):
            error.close()
        reason = error.reason if isinstance(error, URLError) else error
        why = "timed out" if isinstance(reason, TimeoutError) else reason
        raise MicrogptError(f"{url}: cannot be downloaded ({why}); {by_hand}") from None
    if sha256_of(content) != sha256:
        raise MicrogptError(
            f"{url}: is not the file it should be (SHA-256 {sha256_of(content)[:12]}..,"
            f" expected {sha256[:12]}..); {by_hand}"
        )
    write_whole(path, content)
