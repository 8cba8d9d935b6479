"""Whose unfinished file it is, on volumes with locks, without them, and with some that are none.

A lock is the kernel's (flock): one whose holder died is nobody's, whatever files it left. Where a volume has none, no process goes on
with another one's file: each writes to its own, and what is left behind goes by age. Where a volume claims to have locks that hold for
one node alone, two may write to one file; the one that is overtaken notices before its next write, so that it never writes into what
the other has published, and who publishes reads all of it again before.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import IO, BinaryIO, Final, cast

from lora_operator.fetch.heartbeat import HEARTBEAT
from lora_operator.fetch.volume.layout import PROCESS

LEFT_AFTER_S: Final = 3600.0  # a Job that writes nothing for two minutes is ended
_PATIENCE_S: Final = 600.0
_POLL_S: Final = 0.05
_NONE: Final = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


class Overtaken(Exception):  # noqa: N818 - it is a finding
    """Somebody else finished or took away the file that was being written."""


def supported(folder: Path) -> bool:
    """Whether files in `folder` can be locked. Raises OSError where none can be made."""
    with _nameless(folder) as file:
        return flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)


def _nameless(folder: Path) -> IO[bytes]:
    """A file that a kill leaves nothing of; on volumes that only know files by name, one that other downloads remove when it is old."""
    return tempfile.TemporaryFile(dir=folder, prefix="tmp_")


def own(partial: Path) -> Path:
    """This process's own unfinished file in the place of a shared one: <name>.<process>.incomplete."""
    name, _, suffix = partial.name.rpartition(".")
    return partial.with_name(f"{name}.{PROCESS}.{suffix}")


@contextlib.contextmanager
def claimed(partial: Path) -> Iterator[tuple[Path, Guarded]]:
    """The unfinished file and its path, for appending, for this process and thread alone; made when it is not there.

    Waits for who has it. On a volume without locks it is one that only this process knows.
    """
    path = partial
    while True:
        with path.open("a+b", buffering=0) as file:
            if not _wait(file.fileno()) and path == partial:
                if not os.fstat(file.fileno()).st_size:
                    partial.unlink(missing_ok=True)  # it was made just now, and nobody writes to it
                path = own(partial)
                continue
            if not is_same(path, file):  # who held it has finished it meanwhile
                continue
            yield path, Guarded(path, file)
            return


def _wait(descriptor: int) -> bool:
    """Whether there are locks, and this one is ours now. For a time the wait itself is getting on: who has it may be hashing gigabytes."""
    end = time.monotonic() + _PATIENCE_S
    while True:
        try:
            return flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() < end:
                HEARTBEAT.add(1)
            time.sleep(_POLL_S)


@contextlib.contextmanager
def held(lock: Path, *, wait: bool = True) -> Iterator[bool]:
    """A lock by a file of its own; False where it is somebody else's and `wait` is not asked for, or where there are no locks."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a+b", buffering=0) as file:
        try:
            got = flock(file.fileno(), fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            got = False
        yield got


def discard_left(path: Path) -> None:
    """Removes an unfinished file that nobody is working on: one that can be locked, or that is old where there are no locks."""
    with contextlib.suppress(OSError), path.open("r+b") as file:
        if flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB) or _is_old(path):
            path.unlink(missing_ok=True)


def discard_old(path: Path) -> None:
    """Removes a file that nobody locks and that nobody can be using any more."""
    with contextlib.suppress(OSError):
        if _is_old(path):
            path.unlink(missing_ok=True)


def _is_old(path: Path) -> bool:
    """By the volume's own clock."""
    with _nameless(path.parent) as fresh:
        return os.fstat(fresh.fileno()).st_mtime - path.stat().st_mtime > LEFT_AFTER_S


class Guarded:
    """A file that is written to only while it is still the one of its path; as much of a file as downloads need."""

    def __init__(self, path: Path, file: FileIO) -> None:
        self._path, self._file = path, file

    def write(self, data: bytes) -> int:
        """All of `data`, though a volume takes less at once; unbuffered, so nothing is left to be written to a full one."""
        if not is_same(self._path, self._file):
            raise Overtaken(str(self._path))
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) :]
        return len(data)

    def truncate(self, size: int | None = None) -> int:
        """Cuts the file to `size` bytes. Raises Overtaken where another process has replaced it."""
        if not is_same(self._path, self._file):
            raise Overtaken(str(self._path))
        return self._file.truncate(size)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Moves to an offset, from which `read` goes on; writes always append."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """The offset at which `read` goes on."""
        return self._file.tell()

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes; empty at the end."""
        return self._file.read(size) or b""

    def flush(self) -> None:
        """Nothing to do: the file is unbuffered."""

    def sync(self) -> None:
        """Makes what was written durable."""
        os.fsync(self._file.fileno())

    @property
    def size(self) -> int:
        """Bytes that are in it."""
        return os.fstat(self._file.fileno()).st_size

    @property
    def plain(self) -> FileIO:
        """The file itself, only to be read."""
        return self._file

    def as_file(self) -> BinaryIO:
        """For a library that wants a file."""
        return cast(BinaryIO, self)


def is_same(path: Path, file: FileIO) -> bool:
    """Whether `file` is still what lies at `path`."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def flock(descriptor: int, how: int) -> bool:
    """As the system's; False where the volume has no locks. Raises BlockingIOError with LOCK_NB where somebody else has it."""
    try:
        fcntl.flock(descriptor, how)
    except OSError as error:
        if error.errno not in _NONE:
            raise
        return False
    return True
