"""Brings objects of a source into their final place on the volume, several at a time, each from where it stopped.

An object is hashed while it arrives: what it hashed to is recorded with it, and every later run compares. Nothing here decides which
version of an object is right; the source reads only the one that was listed.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Protocol

from lora_operator.constants import Reason
from lora_operator.errors import ReasonError
from lora_operator.fetch import text
from lora_operator.fetch.content.select import RemoteFile
from lora_operator.fetch.sources.checksums import Declared, Sums
from lora_operator.fetch.sources.object_place import ObjectPlace
from lora_operator.fetch.sources.retries import persist
from lora_operator.fetch.volume import file_locks
from lora_operator.fetch.volume.file_locks import Guarded

log = logging.getLogger(__name__)

CHUNK: Final = 256 << 10


class Objects(Protocol):
    """What a store reads of its source."""

    def chunks(self, file: RemoteFile, start: int) -> AbstractContextManager[Iterator[bytes]]:
        """The object's bytes from `start` on, of the version that was listed."""

    def declared_of(self, file: RemoteFile) -> Declared | None:
        """The checksum that the source declares, beside a sha256 that `file` itself has; None where it declares none."""

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
    """Raises the source's ReasonError for whatever is raised inside."""
    try:
        yield
    except Exception as error:
        raise source.translate(error) from error


@dataclass(frozen=True)
class ObjectStore:
    """A source's objects on the volume, and how they get there."""

    source: Objects
    place: ObjectPlace
    workers: int = 4
    left: dict[str, int] = field(default_factory=dict)  # unfinished files by name, as long as this process left them

    @classmethod
    def at(cls, place: ObjectPlace, source: Objects, workers: int) -> ObjectStore:
        """The store of a source at a place, whose folders are made. Raises ReasonError."""
        with translated(source):
            place.prepare()
        return cls(source, place, workers)

    @property
    def blobs(self) -> Path:
        return self.place.blobs

    def has(self, file: RemoteFile) -> bool:
        return self.place.has(file)

    def missing_bytes(self, files: Sequence[RemoteFile]) -> int:
        return self.place.missing_bytes(files)

    def download(self, files: Sequence[RemoteFile], *, moving: Callable[[], int]) -> dict[str, Path]:
        try:
            persist(lambda: self._download_once(files), moving=moving)
        except ReasonError as error:
            if error.reason is Reason.INSUFFICIENT_SPACE:
                self.place.discard_partial(files)
            raise
        return {file.path: Path(os.path.realpath(self.place.blob(file))) for file in files}

    def arrived(self, file: RemoteFile) -> str | None:
        return self.place.arrived.get(file.blob)

    def expected(self, file: RemoteFile) -> RemoteFile:
        return replace(file, sha256=file.sha256 or self.place.recorded(file) or "")

    def download_again(self, file: RemoteFile) -> None:
        self._download_one(file, threading.Event(), self.place.unfinished(), again=True)

    def forget(self, file: RemoteFile) -> None:
        self.place.forget(file)

    def confirm(self) -> None:
        self.source.confirm()

    def _download_once(self, files: Sequence[RemoteFile]) -> None:
        stop, begun = threading.Event(), self.place.unfinished()
        with ThreadPoolExecutor(self.workers, thread_name_prefix="download") as pool:
            wanted = [file for file in files if not self.place.has(file)]
            futures = [pool.submit(self._download_one, file, stop, begun) for file in wanted]
            try:
                for future in as_completed(futures):
                    future.result()
            finally:  # after a failure the others end with their next bytes, and keep what they have
                stop.set()
                pool.shutdown(cancel_futures=True)

    def _download_one(
        self, file: RemoteFile, stop: threading.Event, begun: Sequence[Path], *, again: bool = False
    ) -> None:
        with translated(self.source):
            self.place.discard_older(file, begun)
            while True:
                with (
                    contextlib.suppress(file_locks.Overtaken),
                    file_locks.claimed(self.place.partial(file)) as (path, target),
                ):
                    if self.place.has(file) and not again:  # another Job was first
                        path.unlink()
                        return
                    self.place.finish(file, path, self.complete(file, target, stop))
                    return

    def complete(self, file: RemoteFile, target: Guarded, stop: threading.Event) -> str:
        """Brings what `target` lacks of the object; returns its sha256. What is wrong is not kept. Raises locks.Overtaken, ReasonError."""
        try:
            return self._complete(file, target, stop)
        except file_locks.Overtaken:
            raise
        except Exception as error:
            known = self.source.translate(error)
            if known.reason in (Reason.INSUFFICIENT_SPACE, Reason.CHECKSUM_MISMATCH):
                target.truncate(0)  # gives the space back; what arrived wrong is not gone on with
            self.left[file.blob] = target.size
            raise known from error

    def _complete(self, file: RemoteFile, target: Guarded, stop: threading.Event) -> str:
        declared = self._declared(file)
        while True:
            began = target.size
            own = began == self.left.get(file.blob)
            if began > file.size or not (own or declared is not None):
                target.truncate(0)  # what a dead Job left can be gone on with only where the whole is proved in the end
                began = 0
            sums = Sums.of(target, declared)
            if sums.size < file.size:
                self._append(file, target, sums, stop)
            fault = sums.fault(file.size)
            if not fault:
                target.sync()
                return sums.sha256
            target.truncate(0)
            if not began or own:
                raise ReasonError(
                    Reason.CHECKSUM_MISMATCH,
                    f"{text.clean(file.path, limit=200)!r} arrived wrong: {fault}; tried again",
                )
            log.warning("%s, which was begun before, is wrong: %s; downloading it anew", file.path, fault)

    def _declared(self, file: RemoteFile) -> Declared | None:
        if file.sha256 is not None:
            return Declared("SHA256", bytes.fromhex(file.sha256))
        return self.source.declared_of(file)

    def _append(self, file: RemoteFile, target: Guarded, sums: Sums, stop: threading.Event) -> None:
        log.info("downloading %s from byte %d of %d", file.path, sums.size, file.size)
        with self.source.chunks(file, sums.size) as chunks:
            for chunk in chunks:
                target.write(chunk)
                sums.add(chunk)
                if sums.size > file.size:
                    return
                if stop.is_set():
                    raise ReasonError(Reason.SOURCE_UNREACHABLE, "ended with the download of another object")
