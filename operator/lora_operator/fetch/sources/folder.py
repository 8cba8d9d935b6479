"""Folders of mounted volumes as a source's files: listed and read without following any link, so nothing leads out of them.

Whoever may write to the volume may change it at any time, also between a look and a reading of it. So every part of a path is opened
on its own, never through a link, and what is read has the size and the times that were listed.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lora_operator.constants import Reason
from lora_operator.errors import ReasonError
from lora_operator.fetch import text
from lora_operator.fetch.content.select import MAX_LISTED, RemoteFile
from lora_operator.fetch.sources import errors
from lora_operator.fetch.sources.object_place import blob_name
from lora_operator.fetch.sources.object_store import CHUNK

log = logging.getLogger(__name__)

_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@dataclass(frozen=True)
class Tree:
    """One folder below a mount, by the parts of its path; `title` and `field` are for messages.

    With `by_inode` a file's version holds the time at which its inode changed too, which nobody can set back: what unpacked or copied
    files keep of their origin, size and time, may be that of other content. Not its number, which some mounts give out anew.
    """

    mount: Path
    path: str
    title: str
    field: str
    by_inode: bool = False

    def listing(self) -> tuple[RemoteFile, ...]:
        """Every regular file by its path in the folder; links and the like are passed over. Raises ReasonError."""
        found: list[RemoteFile] = []
        with self._reading(Reason.ENTRY_NOT_FOUND), self._opened() as folder:
            for where, _, names, handle in os.fwalk(".", dir_fd=folder, follow_symlinks=False, onerror=_raise):
                for name in names:
                    path = os.path.normpath(f"{where}/{name}")
                    status = os.stat(name, dir_fd=handle, follow_symlinks=False)
                    if stat.S_ISREG(status.st_mode):
                        found.append(self._remote(path, status))
                    else:
                        log.warning("%s is a link or no file, and passed over", text.clean(path, limit=200))
                if len(found) > MAX_LISTED:
                    raise ReasonError(
                        Reason.JOB_FAILED, f"{self.title} has more than {MAX_LISTED} files; narrow {self.field}"
                    )
        if not found:
            raise ReasonError(Reason.ENTRY_NOT_FOUND, f"{self.title} has no files; correct {self.field}")
        return tuple(sorted(found, key=lambda file: file.path))

    def require_readable(self, files: Sequence[RemoteFile]) -> None:
        """Raises ReasonError where one can't be opened, or is not what was listed."""
        for file in files:
            os.close(self._open(file))

    @contextlib.contextmanager
    def chunks(self, file: RemoteFile, start: int) -> Iterator[Iterator[bytes]]:
        """The bytes of a listed file from `start` on."""
        handle = self._open(file)
        try:
            os.lseek(handle, start, os.SEEK_SET)
            yield iter(lambda: os.read(handle, CHUNK), b"")
        finally:
            os.close(handle)

    def changed(self, what: str) -> ReasonError:
        """SourceChanged, with advice for folders."""
        advice = "put new content into a new folder instead of changing what is used"
        return errors.changed(self.title, f"meanwhile: {what}", advice=advice)

    def _open(self, file: RemoteFile) -> int:
        *folders, name = file.path.split("/")
        with self._reading(Reason.SOURCE_CHANGED), self._opened(folders) as folder:
            handle = os.open(name, _FILE, dir_fd=folder)
            status = os.fstat(handle)
            if stat.S_ISREG(status.st_mode) and self._remote(file.path, status) == file:
                return handle
            os.close(handle)
            raise self.changed(f"{text.clean(file.path, limit=200)!r} is not the one that was listed")

    def _remote(self, path: str, status: os.stat_result) -> RemoteFile:
        version = f"{status.st_mtime_ns} {status.st_ctime_ns}" if self.by_inode else str(status.st_mtime_ns)
        stored = blob_name(path, version, status.st_size)
        return RemoteFile(path=path, size=status.st_size, version=version, stored_as=stored)

    @contextlib.contextmanager
    def _opened(self, folders: Sequence[str] = ()) -> Iterator[int]:
        handle = os.open(self.mount, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for part in [part for part in self.path.split("/") if part] + list(folders):
                if part in (".", ".."):
                    raise ReasonError(Reason.ENTRY_NOT_FOUND, f"{self.field} is not a folder inside the volume")
                inner = os.open(part, _FOLDER, dir_fd=handle)
                os.close(handle)
                handle = inner
            yield handle
        finally:
            os.close(handle)

    @contextlib.contextmanager
    def _reading(self, missing: Reason) -> Iterator[None]:
        """Errors of the folder as ReasonError."""
        try:
            yield
        except (FileNotFoundError, NotADirectoryError) as error:
            if missing is Reason.SOURCE_CHANGED:
                raise self.changed(f"{error.strerror}: {error.filename}") from error
            raise ReasonError(
                missing,
                text.clean(f"{self.title} does not exist, or is no folder, or is behind a link; correct {self.field}"),
            ) from error
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise self.changed(f"{error.filename!r} became a link") from error
            if not isinstance(error, PermissionError):
                raise
            groups = ",".join(str(group) for group in sorted({os.getegid(), *os.getgroups()}))
            raise ReasonError(
                Reason.UNAUTHORIZED,
                text.clean(
                    f"{self.title}: the Job's user {os.geteuid()} (groups {groups}) can't read {error.filename!r}; change its mode, or set "
                    "the ModelCache's securityContext (supplementalGroups, runAsUser)"
                ),
            ) from error


def _raise(error: OSError) -> None:
    raise error
