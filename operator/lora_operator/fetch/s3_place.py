"""The content of one bucket on the volume: finished objects, unfinished ones, and what their bytes hashed to when they arrived.

    s3/<bucket>-<hash of endpoint and bucket>/blobs/<key>-<version>              finished, and what views link to
                                              blobs/<key>-<version>.incomplete   one per object; locked while somebody writes to it
                                              sums/<key>-<version>               sha256 of the finished one

Names are hashes: keys are data. The key is in the name beside ETag and size, so content that came under one key is never handed out
for another one. A payload without its sum counts as absent. Finished payloads are replaced, never removed: engines may read them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Final

from lora_operator.fetch.choose import RemoteFile

FOLDER: Final = "s3"
_SUM: Final = re.compile(r"[0-9a-f]{64}")
_NOT_PLAIN: Final = re.compile(r"[^a-z0-9]+")
_SLUG_CHARS: Final = 40
_NAME_CHARS: Final = 32
_NO_LOCKS: Final = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


def blob_name(key: str, etag: str, size: int) -> str:
    """The name of an object's payload: the key's hash, then that of its version."""
    return f"{_hash(key)}-{_hash(etag, str(size))}"


@dataclass(frozen=True)
class Place:
    """One bucket's folder."""

    folder: Path

    @classmethod
    def of(cls, root: Path, *, endpoint: str, bucket: str) -> Place:
        """The bucket's place on the volume mounted at `root`; another endpoint's bucket of the same name is another one."""
        slug = _NOT_PLAIN.sub("-", bucket.lower()).strip("-")[:_SLUG_CHARS]
        return cls(root / FOLDER / f"{slug}-{_hash(endpoint, bucket)[:16]}")

    @property
    def blobs(self) -> Path:
        """Where payloads lie."""
        return self.folder / "blobs"

    def prepare(self) -> None:
        """Makes the folders."""
        for folder in (self.blobs, self.folder / "sums"):
            folder.mkdir(parents=True, exist_ok=True)

    def blob(self, file: RemoteFile) -> Path:
        """Where the finished payload lies."""
        return self.blobs / file.blob

    def partial(self, file: RemoteFile) -> Path:
        """Where the unfinished one lies."""
        return self.blobs / f"{file.blob}.incomplete"

    def recorded(self, file: RemoteFile) -> str | None:
        """The sha256 of the payload when it arrived; None where it is not known."""
        try:
            found = (self.folder / "sums" / file.blob).read_text("ascii").strip()
        except (OSError, UnicodeDecodeError):
            return None
        return found if _SUM.fullmatch(found) else None

    def has(self, file: RemoteFile) -> bool:
        """Whether a finished payload is there whose sum is known."""
        return self.recorded(file) is not None and self.blob(file).is_file()

    def missing_bytes(self, files: Iterable[RemoteFile]) -> int:
        """What a download of `files` still has to write."""
        unique = {file.blob: file for file in files if not self.has(file)}.values()
        return sum(max(0, file.size - _size(self.partial(file))) for file in unique)

    def finish(self, file: RemoteFile, sha256: str) -> None:
        """Makes the complete partial file the payload: the sum first, so that no payload is ever without."""
        target = self.folder / "sums" / file.blob
        fresh = target.with_name(f"{target.name}.tmp")
        try:
            fresh.write_text(sha256 + "\n", "ascii")
        except OSError:
            fresh.unlink(missing_ok=True)
            raise
        fresh.replace(target)
        self.partial(file).replace(self.blob(file))

    def forget(self, file: RemoteFile) -> None:
        """Lets the payload count as absent; the next download takes its place."""
        (self.folder / "sums" / file.blob).unlink(missing_ok=True)

    def discard_partial(self, files: Iterable[RemoteFile]) -> None:
        """Gives the space of unfinished downloads back, where nobody is working on them."""
        for file in files:
            self._discard(self.partial(file))

    def discard_older(self, file: RemoteFile) -> None:
        """Removes what downloads of other versions of the object left unfinished, where nobody is working on them."""
        current = self.partial(file)
        for path in self.blobs.glob(f"{file.blob.partition('-')[0]}-*.incomplete"):
            if path != current:
                self._discard(path)

    @staticmethod
    def _discard(path: Path) -> None:
        with contextlib.suppress(OSError), path.open("r+b") as unfinished:
            fcntl.flock(unfinished, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def claimed(partial: Path) -> Iterator[FileIO]:
    """The unfinished file, for appending, for this process and thread alone; made when it is not there. Waits for others.

    On a volume without locks two Jobs may write to it at once; its sum is wrong then, and it is downloaded again.
    """
    while True:
        with partial.open("a+b", buffering=0) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
            if not _is(partial, file):  # who held it has finished it meanwhile
                continue
            yield file
            return


def write_all(file: FileIO, data: bytes) -> None:
    """All of `data`, though a volume takes less at once; unbuffered, so that nothing is left to be written to a full one."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _is(path: Path, file: FileIO) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:_NAME_CHARS]
