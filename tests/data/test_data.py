"""Data sets: what is read as a document, what is refused, and the one that is downloaded."""

from __future__ import annotations

import hashlib
import os
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Barrier, Event, Thread
from typing import Any
from urllib.error import HTTPError

import pytest

from microgpt import data
from microgpt import download as network
from microgpt.data import load_documents, makemore, nth, parts
from microgpt.download import download
from microgpt.errors import MicrogptError
from microgpt.runs.files import write_whole
from microgpt.settings import load_config

LOCALHOST = Path(__file__).with_name("localhost.pem")  # for 127.0.0.1, signed by itself
TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
TLS.load_cert_chain(LOCALHOST)

LIST = b"kamon\nann\nkarai\n"
DIGEST = hashlib.sha256(LIST).hexdigest()


def test_the_embedded_names_are_the_32469_of_the_data_set() -> None:
    documents = load_documents("names")
    assert len(documents) == 32_469
    assert (documents[0], documents[-1]) == ("emma", "zyrie")
    assert len(set(documents)) < len(documents)  # some names are given to girls and boys
    joined = "\n".join(documents) + "\n"
    assert joined.encode() == data.NAMES_FILE.read_bytes()


@pytest.mark.quick
@pytest.mark.parametrize(
    ("content", "documents"),
    [
        (b"emma\nava\n", ["emma", "ava"]),
        (b"emma\r\nava\r\n", ["emma", "ava"]),
        (b"emma\rava\r", ["emma", "ava"]),
        (b"emma\nava", ["emma", "ava"]),
        (b"\n\nemma\n \t\n\r\nava\n\n", ["emma", "ava"]),
        (b"  emma \nmary ann\t\n", ["emma", "mary ann"]),
        (b"ava\nemma\nava\n", ["ava", "emma", "ava"]),
        (b"\xef\xbb\xbfemma\nava\n", ["emma", "ava"]),
        ("zo\u00e9\nna\u00efve\n".encode(), ["zo\u00e9", "na\u00efve"]),
        ("zoe\u0301\n".encode(), ["zoe\u0301"]),  # not composed: read as it is
        ("a\u2028b\nc\x85d\ne\x0cf\x1cg\n".encode(), ["a\u2028b", "c\x85d", "e\x0cf\x1cg"]),
        ("\U0001f600\n".encode(), ["\U0001f600"]),
    ],
)
def test_each_line_of_a_file_is_a_document(
    content: bytes, documents: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "some.txt"
    file.write_bytes(content)
    assert load_documents(str(file)) == documents


@pytest.mark.quick
@pytest.mark.parametrize(("held_out", "held"), [("0", ""), ("1", "d"), ("3", "bcd")])
def test_what_is_held_out_of_lines_is_their_end_and_never_trained_on(
    held_out: str, held: str
) -> None:
    config = load_config(overrides={"held_out": held_out})
    training, measured = parts(list("abcd"), config)
    assert (list(training) + measured, "".join(measured)) == (list("abcd"), held)
    assert [nth(training, i) for i in range(9)] == (list(training) * 9)[:9]


@pytest.mark.parametrize("content", [b"", b"\n", b"  \r\n\t\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n"])
def test_a_file_without_a_document_is_refused(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "empty.txt"
    file.write_bytes(content)
    with pytest.raises(MicrogptError) as refusal:
        load_documents(str(file))
    assert str(refusal.value) == f"{file}: no documents; expected one on each line"


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"caf\xe9\n", 1),
        (b"emma\nava\ncaf\xe9\nmia\n", 3),
        (b"emma\r\nava\r\ncaf\xe9\r\n", 3),
        (b"emma\rava\rcaf\xe9\r", 3),
        (b"\n\xff", 2),
        (b"\xef\xbb\xbfab\n\xe9\n", 2),
        ("emma\n".encode("utf-16"), 1),
    ],
)
def test_a_file_that_is_not_utf_8_is_refused_with_the_line(
    content: bytes, line: int, tmp_path: Path
) -> None:
    file = tmp_path / "latin.txt"
    file.write_bytes(content)
    with pytest.raises(MicrogptError) as refusal:
        load_documents(str(file))
    assert str(refusal.value) == f"{file}: line {line} is not UTF-8 text; save it as UTF-8"


def test_a_missing_file_is_refused_with_what_is_expected(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.txt")
    with pytest.raises(MicrogptError) as refusal:
        load_documents(missing)
    message = str(refusal.value)
    assert message.startswith(f"--dataset: {missing!r} names no data set and no file;")
    assert "expected names, pride, makemore, or the path of a text file" in message


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        MicrogptError, match="is a folder, not a file; expected names, pride, makemore"
    ):
        load_documents(str(tmp_path))


def test_a_name_too_long_for_a_file_is_refused() -> None:
    with pytest.raises(MicrogptError):
        load_documents("x" * 300)


def test_a_file_is_replaced_whole_or_left_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "new" / "file"
    write_whole(file, b"before")

    def full(*paths: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(MicrogptError) as refusal:
            write_whole(file, b"after")
    assert str(refusal.value) == f"{file}: cannot be written: No space left on device"
    assert file.read_bytes() == b"before"
    write_whole(file, b"after")
    assert file.read_bytes() == b"after"
    assert list(file.parent.iterdir()) == [file]


# The download, against a server of our own.

Answer = Callable[[BaseHTTPRequestHandler], object]


def file_sent(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(LIST)))
    handler.end_headers()
    handler.wfile.write(LIST)


def cut_short(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(LIST)))
    handler.end_headers()
    handler.wfile.write(LIST[:7])


def cut_short_in_a_chunk(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    handler.wfile.write(b"10\r\nkam")


def another_file(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(LIST.replace(b"ann", b"anx"))


def longer_file(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(LIST + b"\n")


def not_found(handler: BaseHTTPRequestHandler) -> None:
    handler.send_error(404)


def not_http(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"220 this is no web server\r\n")


def hung_up(handler: BaseHTTPRequestHandler) -> None:
    handler.close_connection = True


@contextmanager
def serving(answer: Answer) -> Iterator[tuple[str, list[str]]]:
    """A server on this machine: its address, and the paths that it was asked for."""
    asked: list[str] = []

    def get(handler: BaseHTTPRequestHandler) -> None:
        asked.append(handler.path)
        answer(handler)

    handler = type(
        "Handler", (BaseHTTPRequestHandler,), {"do_GET": get, "log_message": lambda *_: None}
    )
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        server.socket = TLS.wrap_socket(server.socket, server_side=True)
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"https://127.0.0.1:{server.server_port}/names.txt", asked
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(autouse=True)
def _this_machine_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("SSL_CERT_FILE", str(LOCALHOST))  # who is trusted


def test_a_download_with_the_right_digest_is_put_in_place(tmp_path: Path) -> None:
    path = tmp_path / "cache" / "names.txt"
    with serving(file_sent) as (url, asked):
        download(url, DIGEST, len(LIST), path)
    assert path.read_bytes() == LIST
    assert list(path.parent.iterdir()) == [path]
    assert asked == ["/names.txt"]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (another_file, "is not the file it should be (SHA-256 "),
        (longer_file, "is not the file it should be (SHA-256 "),
        (cut_short, ""),
        (cut_short_in_a_chunk, "cannot be downloaded ("),
        (not_found, "cannot be downloaded (Not Found)"),
        (not_http, "cannot be downloaded ("),
        (hung_up, "cannot be downloaded ("),
    ],
)
def test_any_other_answer_leaves_nothing_behind(
    answer: Answer, reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "names.txt"
    with serving(answer) as (url, _), pytest.raises(MicrogptError) as refusal:
        download(url, DIGEST, len(LIST), path)
    message = str(refusal.value)
    assert message.startswith(f"{url}: {reason}")
    assert message.endswith(f"download it elsewhere and put it at {path}, or use --dataset names")
    assert list(tmp_path.iterdir()) == []


def test_an_answer_that_says_no_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[HTTPError] = []

    urlopen = network.urlopen

    def urlopen_noted(*arguments: Any, **more: Any) -> Any:
        try:
            return urlopen(*arguments, **more)
        except HTTPError as error:
            answers.append(error)
            raise

    monkeypatch.setattr(network, "urlopen", urlopen_noted)
    with serving(not_found) as (url, _), pytest.raises(MicrogptError):
        download(url, DIGEST, len(LIST), tmp_path / "names.txt")
    (answer,) = answers
    closed = answer.closed
    answer.close()  # whatever comes of it, leave no connection to later tests
    assert closed


def test_a_server_that_is_not_there_is_said_in_one_line(tmp_path: Path) -> None:
    with socket.socket() as bound:  # bound, but not listening: connections are refused
        bound.bind(("127.0.0.1", 0))
        url = f"https://127.0.0.1:{bound.getsockname()[1]}/names.txt"
        with pytest.raises(MicrogptError) as refusal:
            download(url, DIGEST, len(LIST), tmp_path / "names.txt")
    message = str(refusal.value)
    assert message.startswith(f"{url}: cannot be downloaded (")
    assert "\n" not in message
    assert "use --dataset names" in message
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_says_nothing_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network, "TIMEOUT", 0.05)
    over = Event()
    with serving(lambda handler: over.wait(2)) as (url, _):
        with pytest.raises(MicrogptError, match=r"cannot be downloaded \(timed out\)"):
            download(url, DIGEST, len(LIST), tmp_path / "names.txt")
        over.set()
    assert list(tmp_path.iterdir()) == []


def sent_on(to: str) -> Answer:
    """A redirect."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(302)
        handler.send_header("Location", to)
        handler.end_headers()

    return answer


def test_a_server_may_send_us_on(tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    with serving(file_sent) as (last, asked), serving(sent_on(last)) as (first, _):
        download(first, DIGEST, len(LIST), path)
    assert path.read_bytes() == LIST
    assert asked == ["/names.txt"]


def test_a_server_that_nobody_vouches_for_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")
    with serving(file_sent) as (url, asked):
        with pytest.raises(MicrogptError, match="CERTIFICATE_VERIFY_FAILED"):
            download(url, DIGEST, len(LIST), tmp_path / "names.txt")
        assert asked == []
    assert list(tmp_path.iterdir()) == []


def test_two_downloads_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    path, both = tmp_path / "cache" / "names.txt", Barrier(2)
    failures: list[BaseException] = []

    def start(url: str) -> None:
        try:
            download(url, DIGEST, len(LIST), path)
        except BaseException as error:
            failures.append(error)

    def together(handler: BaseHTTPRequestHandler) -> None:
        both.wait(5)
        file_sent(handler)

    with serving(together) as (one, _), serving(together) as (other, _):
        threads = [Thread(target=start, args=(url,)) for url in (one, other)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []
    assert path.read_bytes() == LIST
    assert list(path.parent.iterdir()) == [path]


def test_an_empty_name_of_the_cache_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MICROGPT_CACHE", "")
    usual = data.cache_folder()
    monkeypatch.delenv("MICROGPT_CACHE")
    assert usual == data.cache_folder() != Path()


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the list is to be kept; the one expected is LIST."""
    monkeypatch.setenv("MICROGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(data, "MAKEMORE_SHA256", DIGEST)
    monkeypatch.setattr(data, "MAKEMORE_BYTES", len(LIST))
    return tmp_path / "cache" / "makemore-names.txt"


def test_the_original_list_is_pinned_by_revision_and_digest() -> None:
    assert "988aa59" in data.MAKEMORE_URL
    assert data.MAKEMORE_SHA256 == (
        "0a30b5557f192f32ab962680889aac5f6fda0f4cecf40a6d0b5694f58ea8cc4d"
    )
    assert data.MAKEMORE_BYTES == 228_145


def test_the_list_is_downloaded_once(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(file_sent) as (url, asked):
        monkeypatch.setattr(data, "MAKEMORE_URL", url)
        assert load_documents("makemore") == ["kamon", "ann", "karai"]
        assert makemore() == cached
        assert load_documents("makemore") == ["kamon", "ann", "karai"]
    assert asked == ["/names.txt"]
    assert cached.read_bytes() == LIST


def test_a_list_that_changed_in_the_cache_is_refused_and_kept(cached: Path) -> None:
    cached.parent.mkdir()
    cached.write_bytes(LIST + b"intruder\n")
    with pytest.raises(MicrogptError) as refusal:
        load_documents("makemore")
    assert str(refusal.value) == (
        f"{cached}: changed since it was downloaded; delete it to download again"
    )
    assert cached.read_bytes() == LIST + b"intruder\n"


def test_a_cache_that_cannot_be_written_is_said_in_one_line(
    cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached.parent.write_bytes(b"in the way")
    with serving(file_sent) as (url, _):
        monkeypatch.setattr(data, "MAKEMORE_URL", url)
        with pytest.raises(MicrogptError, match="cannot be written"):
            makemore()
    assert cached.parent.read_bytes() == b"in the way"
