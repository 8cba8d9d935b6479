"""Brings objects of a source into their final place on the volume, several at a time, each from where it stopped.

An object is hashed while it arrives: what it hashed to is recorded with it, and every later run compares. Nothing here decides which
version of an object is right; the source reads only the one that was listed.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from io import FileIO
from pathlib import Path
from typing import Final, Protocol

from lora_operator.constants import Reason
from lora_operator.errors import ReasonError
from lora_operator.fetch import text
from lora_operator.fetch.choose import RemoteFile
from lora_operator.fetch.persist import persist
from lora_operator.fetch.place import Place, claimed, write_all

log = logging.getLogger(__name__)

_WORKERS: Final = 4
CHUNK: Final = 256 << 10


class Objects(Protocol):
    """What a store reads of its source."""

    def chunks(self, file: RemoteFile, start: int) -> AbstractContextManager[Iterator[bytes]]:
        """The object's bytes from `start` on, of the version that was listed."""

    def md5_of(self, file: RemoteFile) -> str:
        """The MD5 that the source declares; empty where it declares none."""

    def translate(self, error: Exception) -> ReasonError:
        """The reason behind an error of the source or of the volume."""

    def confirm(self) -> None:
        """Raises SourceChanged where the listing is not what it was."""


def revision_of(files: Sequence[RemoteFile]) -> str:
    """The revision of a listing: hex sha256 over one line per object, path, NUL, version, NUL, size, NUL; sorted by the path's bytes."""
    total = hashlib.sha256()
    for file in sorted(files, key=lambda file: file.path.encode("utf-8", "surrogatepass")):
        total.update(f"{file.path}\0{file.version}\0{file.size}\0\n".encode("utf-8", "surrogatepass"))
    return total.hexdigest()


@contextmanager
def translated(source: Objects) -> Iterator[None]:
    """Foreign exceptions as ReasonError."""
    try:
        yield
    except Exception as error:
        raise source.translate(error) from error


@dataclass(frozen=True)
class ObjectStore:
    """A source's objects on the volume, and how they get there."""

    source: Objects
    place: Place

    @property
    def blobs(self) -> Path:
        return self.place.blobs

    def has(self, file: RemoteFile) -> bool:
        return self.place.has(file)

    def missing_bytes(self, files: Sequence[RemoteFile]) -> int:
        return self.place.missing_bytes(files)

    def download(self, files: Sequence[RemoteFile], *, moving: Callable[[], int]) -> dict[str, Path]:
        persist(lambda: self._download_once(files), moving=moving)
        return {file.path: Path(os.path.realpath(self.place.blob(file))) for file in files}

    def expected(self, file: RemoteFile) -> RemoteFile:
        return replace(file, sha256=file.sha256 or self.place.recorded(file) or "")

    def download_again(self, file: RemoteFile) -> None:
        self._download_one(file, threading.Event(), again=True)

    def forget(self, file: RemoteFile) -> None:
        self.place.forget(file)

    def confirm(self) -> None:
        self.source.confirm()

    def _download_once(self, files: Sequence[RemoteFile]) -> None:
        stop = threading.Event()
        with ThreadPoolExecutor(_WORKERS, thread_name_prefix="download") as pool:
            futures = [pool.submit(self._download_one, file, stop) for file in files if not self.place.has(file)]
            try:
                for future in as_completed(futures):
                    future.result()
            finally:  # after a failure the others end with their next bytes, and keep what they have
                stop.set()
                pool.shutdown(cancel_futures=True)

    def _download_one(self, file: RemoteFile, stop: threading.Event, *, again: bool = False) -> None:
        with translated(self.source):
            self.place.discard_older(file)
            with claimed(self.place.partial(file)) as target:
                if self.place.has(file) and not again:  # another Job was first
                    self.place.partial(file).unlink()
                    return
                try:
                    sha256 = self.complete(file, target, stop)
                except Exception as error:
                    known = self.source.translate(error)
                    if known.reason in (Reason.INSUFFICIENT_SPACE, Reason.CHECKSUM_MISMATCH):
                        target.truncate(0)  # gives the space back; what arrived wrong is not gone on with
                    raise known from error
                self.place.finish(file, sha256)

    def complete(self, file: RemoteFile, target: FileIO, stop: threading.Event) -> str:
        """Appends what `target` lacks of the object; returns its sha256. What is wrong is not kept."""
        while True:
            began = os.fstat(target.fileno()).st_size
            if began > file.size:
                target.truncate(0)
                began = 0
            md5 = self.source.md5_of(file)
            sums = Sums.of(target, with_md5=bool(md5))
            if sums.size < file.size:
                self._append(file, target, sums, stop)
            fault = sums.fault(file, md5)
            if not fault:
                os.fsync(target.fileno())
                return sums.sha256.hexdigest()
            target.truncate(0)
            if not began:
                raise ReasonError(
                    Reason.CHECKSUM_MISMATCH,
                    f"{text.clean(file.path, limit=200)!r} arrived wrong: {fault}; tried again",
                )
            log.warning("%s, which was begun before, is wrong: %s; downloading it anew", file.path, fault)

    def _append(self, file: RemoteFile, target: FileIO, sums: Sums, stop: threading.Event) -> None:
        log.info("downloading %s from byte %d of %d", file.path, sums.size, file.size)
        with self.source.chunks(file, sums.size) as chunks:
            for chunk in chunks:
                write_all(target, chunk)
                sums.add(chunk)
                if sums.size > file.size:
                    return
                if stop.is_set():
                    raise ReasonError(Reason.SOURCE_UNREACHABLE, "ended with the download of another object")


@dataclass
class Sums:
    """Size and hashes of what an unfinished file holds so far."""

    size: int = 0
    sha256: hashlib._Hash = field(default_factory=hashlib.sha256)
    md5: hashlib._Hash | None = None

    @classmethod
    def of(cls, file: FileIO, *, with_md5: bool = False) -> Sums:
        """Of all that is in the file, whose end is then its position."""
        sums = cls(md5=hashlib.md5(usedforsecurity=False) if with_md5 else None)
        file.seek(0)
        while chunk := file.read(CHUNK):
            sums.add(chunk)
        return sums

    def add(self, chunk: bytes) -> None:
        """Counts further bytes in."""
        self.size += len(chunk)
        self.sha256.update(chunk)
        if self.md5 is not None:
            self.md5.update(chunk)

    def fault(self, file: RemoteFile, md5: str = "") -> str:
        """How it differs from what the source declares; empty where it does not."""
        if self.size != file.size:
            return f"it has {self.size} bytes, the source declares {file.size}"
        if file.sha256 is not None and self.sha256.hexdigest() != file.sha256:
            return f"its sha256 is {self.sha256.hexdigest()}, the source declares {file.sha256}"
        if self.md5 is not None and self.md5.hexdigest() != md5:
            return f"its MD5 is {self.md5.hexdigest()}, the source declares {md5}"
        return ""
