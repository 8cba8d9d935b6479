"""Brings objects of a bucket into their final place on the volume, several at a time, each from where it stopped.

An object is hashed while it arrives: what it hashed to is recorded with it, and every later run compares. Nothing here decides which
version of an object is right; `s3` reads only the one that was listed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from lora_operator.constants import Reason
from lora_operator.errors import ReasonError
from lora_operator.fetch import locks, text
from lora_operator.fetch.choose import RemoteFile
from lora_operator.fetch.locks import Guarded
from lora_operator.fetch.persist import persist
from lora_operator.fetch.s3_errors import translate, unreachable
from lora_operator.fetch.s3_place import Place
from lora_operator.fetch.s3_sums import Sums

if TYPE_CHECKING:
    from lora_operator.fetch.s3 import S3Source

log = logging.getLogger(__name__)

_WORKERS: Final = 4
_CHUNK: Final = 256 << 10


@dataclass(frozen=True)
class S3Store:
    """The bucket's content on the volume, and how it gets there."""

    source: S3Source
    place: Place
    left: dict[str, int] = field(default_factory=dict)  # unfinished files by name, as long as this process left them

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
        return replace(file, sha256=self.place.recorded(file) or "")

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
        with self.source.translated():
            self.place.discard_older(file)
            while True:
                with contextlib.suppress(locks.Overtaken), locks.claimed(self.place.partial(file)) as (path, target):
                    if self.place.has(file) and not again:  # another Job was first
                        path.unlink()
                        return
                    self.place.finish(file, path, self._fill(file, target, stop))
                    return

    def _fill(self, file: RemoteFile, target: Guarded, stop: threading.Event) -> str:
        try:
            return self._complete(file, target, stop)
        except locks.Overtaken:
            raise
        except Exception as error:
            known = translate(error, self.source.subject)
            if known.reason in (Reason.INSUFFICIENT_SPACE, Reason.CHECKSUM_MISMATCH):
                target.truncate(0)  # gives the space back; what arrived wrong is not gone on with
            self.left[file.blob] = target.size
            raise known from error

    def _complete(self, file: RemoteFile, target: Guarded, stop: threading.Event) -> str:
        """Appends what `target` lacks of the object; returns its sha256. What is wrong is not kept."""
        while True:
            began = target.size
            own = began == self.left.get(file.blob)
            if began > file.size or not (own or file.path in self.source.declared):
                target.truncate(0)  # what a dead Job left can be gone on with only where the whole is proved in the end
                began = 0
            sums = Sums.of(target, self.source.declared.get(file.path))
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

    def _append(self, file: RemoteFile, target: Guarded, sums: Sums, stop: threading.Event) -> None:
        log.info("downloading %s from byte %d of %d", file.path, sums.size, file.size)
        with closing(self.source.read(file, f"bytes={sums.size}-" if sums.size else "")["Body"]) as body:
            for chunk in body.iter_chunks(_CHUNK):
                target.write(chunk)
                sums.add(chunk)
                if sums.size > file.size:
                    return
                if stop.is_set():
                    raise unreachable(self.source.subject, "ended with the download of another object")
