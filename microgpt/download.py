"""Files from the network, over HTTPS, of known digest."""

from __future__ import annotations

from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import (
    HTTPDefaultErrorHandler,
    HTTPErrorProcessor,
    HTTPRedirectHandler,
    HTTPSHandler,
    OpenerDirector,
    ProxyHandler,
    UnknownHandler,
)

from microgpt.data import sha256_of
from microgpt.errors import MicrogptError
from microgpt.runs.files import write_whole

TIMEOUT = 30  # seconds without an answer
LONGEST = 120  # seconds for all of it


def download(url: str, sha256: str, size: int, path: Path) -> None:
    """Put a file of known digest in place, whole or not at all, also when two do so at once.

    Raises MicrogptError if it cannot be had over HTTPS, in time, or is another file.
    """
    by_hand = f"download it elsewhere and put it at {path}, or use --dataset names"
    content = _within(LONGEST, lambda: _fetched(url, size + 1))
    if not isinstance(content, bytes):
        raise MicrogptError(f"{url}: cannot be downloaded ({content}); {by_hand}")
    if sha256_of(content) != sha256:
        raise MicrogptError(
            f"{url}: is not the file it should be (SHA-256 {sha256_of(content)[:12]}..,"
            f" expected {sha256[:12]}..); {by_hand}"
        )
    write_whole(path, content)


def _fetched(url: str, most: int) -> bytes | str:
    """The beginning of what is at an address, or in words why it cannot be had."""
    try:
        with urlopen(url, timeout=TIMEOUT) as answer:
            content: bytes = answer.read(most)
            return content
    except (URLError, OSError, HTTPException, ValueError) as error:
        if isinstance(error, HTTPError):
            error.close()
        reason = getattr(error, "reason", None) or error
        return "timed out" if isinstance(reason, TimeoutError) else str(reason)


def urlopen(url: str, timeout: float) -> Any:
    """As urllib has it, over HTTPS alone, wherever the server may send us on to."""
    opener = OpenerDirector()
    for handler in (
        ProxyHandler,
        HTTPSHandler,
        HTTPRedirectHandler,
        HTTPErrorProcessor,
        HTTPDefaultErrorHandler,
        UnknownHandler,  # takes http:, file: and all others, and says so
    ):
        opener.add_handler(handler())
    return opener.open(url, timeout=timeout)


def _within(seconds: float, job: Callable[[], bytes | str]) -> bytes | str:
    """What a job returns, if it does in time; a server may drip byte by byte for ever."""
    done: list[bytes | str] = []
    worker = Thread(target=lambda: done.append(job()), daemon=True)
    worker.start()
    worker.join(seconds)
    return done[0] if done else f"not done after {seconds:g} seconds"
