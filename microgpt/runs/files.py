"""Files that are seen whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from microgpt.errors import MicrogptError

MOST_LINKS = 40  # one after another, which Linux follows
TRIES, PAUSE = 20, 0.05  # seconds between them


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it is seen whole or not at all, also after a power cut."""
    with whole(path) as begun, open(begun, "xb") as file:
        file.write(content)


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Where to write a file that is to be seen whole or not at all, also after a power cut.

    That place is in a folder of its own, since a library may put files beside what it writes.

    Raises MicrogptError if the file cannot be written, or if a folder, device or pipe is there.
    """
    check_target(path)
    # names end at 255 bytes, of which a character takes up to four
    folder = path.with_name(f".{path.name[:50]}.{os.getpid()}.{secrets.token_hex(4)}")
    file = folder / path.name
    try:
        with writing(path):
            make_folder(path.parent)
            folder.mkdir()
            yield file
            with open(file, "rb+") as written:
                os.fsync(written.fileno())
            _rename(file, path)
            sync_folder(path.parent)
    finally:
        remove_begun(folder)


def _rename(file: Path, path: Path) -> None:
    """Put a file in its place. Windows refuses while another program reads what is there."""
    for left in reversed(range(TRIES if sys.platform == "win32" else 1)):
        try:
            return os.replace(file, path)
        except PermissionError:
            if not left:
                raise
            time.sleep(PAUSE)


def check_target(path: Path, name: str = "") -> None:
    """Refuse to write where a folder, a device, a pipe or a link to one is.

    Writing puts a new file in the place of what is there, so these would be gone.

    name    of the option that names this one file; its folder must be there, since a folder that
            does not exist is mostly a slip of the keyboard
    """
    where = f"{name}: " if name else ""
    if path == Path():  # of an empty name
        raise MicrogptError(f"{where}expected the name of a file")
    try:
        kind = path.stat().st_mode
    except FileNotFoundError:
        if name and not path.parent.is_dir():
            raise MicrogptError(f"{where}there is no folder {path.parent}; make it first") from None
        return
    except OSError as error:
        raise MicrogptError(f"{where}{path}: cannot be written: {error.strerror}") from None
    what = "a folder" if stat.S_ISDIR(kind) else "a device or a pipe"
    if stat.S_ISREG(kind):
        if not _leads_to_open_file(path):
            return
        what = "a link to an open file"
    raise MicrogptError(f"{where}{path}: is {what}, not a file; choose another name")


def _leads_to_open_file(path: Path) -> bool:
    """Whether a path is a link of the system's, as /dev/stdout, or a link to one.

    Standard output may be a regular file, and yet a file would be put in the place of the link.
    """
    for _ in range(MOST_LINKS):
        if not os.path.islink(path):
            return False
        folder = os.path.realpath(path.parent)
        if folder == "/dev" or folder.startswith("/proc/"):
            return True
        path = path.parent / os.readlink(path)
    return False


def make_folder(folder: Path) -> None:
    """Make a folder and its parents, where they are not there yet."""
    try:
        os.makedirs(folder, exist_ok=True)
    except RecursionError:  # makedirs calls itself for each of a thousand folders
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG)) from None


def remove_begun(begun: Path) -> None:
    """Remove a folder and the files in it, as far as possible; of a link, the link alone."""
    with contextlib.suppress(OSError):
        if begun.is_symlink() or not begun.is_dir():
            begun.unlink()
            return
        for path in begun.iterdir():
            path.unlink()
        begun.rmdir()


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the system refuses becomes a MicrogptError that names the file."""
    try:
        yield
    except OSError as error:
        raise MicrogptError(f"{path}: cannot be written: {error.strerror}") from None


def sync_folder(folder: Path) -> None:
    """See the names in a folder onto the disk: what was renamed there stays renamed."""
    if sys.platform == "win32":  # which does so by itself, and opens no folders
        return
    try:
        fd = os.open(folder, os.O_RDONLY)
    except PermissionError:  # a folder that may be written to and not listed
        return
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:  # which a file system without such a thing says
            raise
    finally:
        os.close(fd)
