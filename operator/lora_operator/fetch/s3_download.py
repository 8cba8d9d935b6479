"""Brings objects of a bucket into their final place on the volume, several at a time, each from where it stopped.

An object is hashed while it arrives: what it hashed to is recorded with it, and every later run compares. Nothing here decides which
version of an object is right; `s3` reads only the one that was listed.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from dataclasses import dataclass, field, replace
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Final

from lora_operator.constants import Reason
from lora_operator.errors import ReasonError
from lora_operator.fetch import text
from lora_operator.fetch.choose import RemoteFile
from lora_operator.fetch.persist import persist
from lora_operator.fetch.s3_errors import translate, unreachable
from lora_operator.fetch.s3_place import Place, claimed, write_all

if TYPE_CHECKING:
    from lora_operator.fetch.s3 import S3Source

log = logging.getLogger(__name__)

_CHUNK: Final = 256 << 10


@dataclass(frozen=True)
class S3Store:
    """The bucket's content on the volume, and how it gets there."""

    source: S3Source
    place: Place
    workers: int = 4

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

    def expected(self, file: RemoteFile) -> RemoteFile:
        return replace(file, sha256=self.place.recorded(file) or "")

    def download_again(self, file: RemoteFile) -> None:
        self._download_one(file, threading.Event(), again=True)

    def forget(self, file: RemoteFile) -> None:
        self.place.forget(file)

    def confirm(self) -> None:
        self.source.confirm()

    def _download_once(self, files: Sequence[RemoteFile]) -> None:
        stop = threading.Event()
        with ThreadPoolExecutor(self.workers, thread_name_prefix="download") as pool:
            futures = [pool.submit(self._download_one, file, stop) for file in files if not self.place.has(file)]
            try:
                for future in as_completed(futures):
                    future.result()
            finally:  # after a failure the others end with their next bytes, and keep what they have
                stop.set()
                pool.shutdown(cancel_futures=True)

    def _download_one(self, file: RemoteFile, stop: threading.Event, *, again: bool = False) -> None:
        with self.source.translated():
            self.place.discard_older(file)
            with claimed(self.place.partial(file)) as target:
                if self.place.has(file) and not again:  # another Job was first
                    self.place.partial(file).unlink()
                    return
                try:
                    sha256 = self._complete(file, target, stop)
                except Exception as error:
                    known = translate(error, self.source.subject)
                    if known.reason in (Reason.INSUFFICIENT_SPACE, Reason.CHECKSUM_MISMATCH):
                        target.truncate(0)  # gives the space back; what arrived wrong is not gone on with
                    raise known from error
                self.place.finish(file, sha256)

    def _complete(self, file: RemoteFile, target: FileIO, stop: threading.Event) -> str:
        """Appends what `target` lacks of the object; returns its sha256. What is wrong is not kept."""
        while True:
            began = os.fstat(target.fileno()).st_size
            if began > file.size:
                target.truncate(0)
                began = 0
            sums = _Sums.of(target)
            if sums.size < file.size:
                self._append(file, target, sums, stop)
            fault = sums.fault(file, self.source.md5.get(file.path, ""))
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

    def _append(self, file: RemoteFile, target: FileIO, sums: _Sums, stop: threading.Event) -> None:
        log.info("downloading %s from byte %d of %d", file.path, sums.size, file.size)
        with closing(self.source.read(file, f"bytes={sums.size}-" if sums.size else "")["Body"]) as body:
            for chunk in body.iter_chunks(_CHUNK):
                write_all(target, chunk)
                sums.add(chunk)
                if sums.size > file.size:
                    return
                if stop.is_set():
                    raise unreachable(self.source.subject, "ended with the download of another object")


@dataclass
class _Sums:
    """Size and hashes of what an unfinished file holds so far."""

    size: int = 0
    sha256: hashlib._Hash = field(default_factory=hashlib.sha256)
    md5: hashlib._Hash = field(default_factory=lambda: hashlib.md5(usedforsecurity=False))

    @classmethod
    def of(cls, file: FileIO) -> _Sums:
        sums = cls()
        file.seek(0)
        while chunk := file.read(_CHUNK):
            sums.add(chunk)
        return sums

    def add(self, chunk: bytes) -> None:
        self.size += len(chunk)
        self.sha256.update(chunk)
        self.md5.update(chunk)

    def fault(self, file: RemoteFile, md5: str) -> str:
        """How it differs from what the source declares; empty where it does not."""
        if self.size != file.size:
            return f"it has {self.size} bytes, the source declares {file.size}"
        if md5 and self.md5.hexdigest() != md5:
            return f"its MD5 is {self.md5.hexdigest()}, the source declares {md5}"
        return ""
