"""Files that several processes write: whole lines, whole files, and locks that end with the process that holds them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: one process for each folder
    fcntl = None


def lock(file, wait: bool = True) -> bool:
    """Locks an open file until it is closed or its process ends, however it ends.

    Args:
        file: open for writing.
        wait: until nobody else holds it.

    Returns:
        Whether it is ours now; always true with ``wait``.
    """
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Nobody else is in here with the same path."""
    with open(path, "ab") as file:
        lock(file)
        yield


def append_lines(path: Path, text: str, unless: Callable[[], bool] = lambda: False) -> None:
    """Appends whole lines of JSON in one write, on disk before this returns; several processes may do so at once.

    A last line that an earlier end cut short is dropped first; if the write fails, what it left is taken back.

    Args:
        path: the file, made if it isn't there.
        text: lines, the last one ended too.
        unless: asked when nobody else can append; true leaves the file as it is.

    Raises:
        OSError: it could not be written (a full disk, say). The file is as it was.
    """
    with open(path, "a+b", buffering=0) as file:
        lock(file)
        size = _whole(file)
        if unless():
            return
        rest = memoryview(text.encode())
        try:
            while rest:  # again only if the disk fills up: the second write then says so
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        except OSError as error:
            file.truncate(size)
            raise OSError(error.errno, error.strerror, str(path)) from error


def _whole(file) -> int:
    """Size of a file of whole lines: what follows the last one is ended if it is a record, else dropped."""
    size = file.seek(0, os.SEEK_END)
    if size:
        file.seek(size - 1)
        if file.read(1) != b"\n":
            file.seek(0)
            content = file.read()
            start = content.rfind(b"\n") + 1
            try:
                json.loads(content[start:])
                return size + file.write(b"\n")
            except ValueError:
                return file.truncate(start)
    return size


def write_whole(path: Path, text: str) -> None:
    """Writes the file, or leaves it as it was: a reader never sees a part."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_text(text)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
