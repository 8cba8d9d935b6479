"""A tar or zip archive from an HTTP server as a source.

The archive is downloaded into one unfinished file of the store, checked against its sha256, and read from there: first for the list
of its files, then for the wanted ones. It goes as soon as these are extracted, or the Job is told that they can't be; only a broken
download is kept, for the next attempt. The list stays, so that a Job that finds all wanted files in the cache downloads nothing.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from io import FileIO
from pathlib import Path
from typing import Final

from lora_operator.constants import Reason
from lora_operator.errors import ReasonError
from lora_operator.fetch import text, unpack, volume
from lora_operator.fetch.choose import RemoteFile
from lora_operator.fetch.http import FOLDER, place_of
from lora_operator.fetch.http_client import Client, Found, shown, translate, unreachable
from lora_operator.fetch.objects import ObjectStore, Sums, translated
from lora_operator.fetch.persist import persist
from lora_operator.fetch.place import Place, blob_name, claimed, write_all
from lora_operator.fetch.progress import Reporter, measure_blobs
from lora_operator.fetch.source import PlainSource
from lora_operator.manifest import FetchRequest, HttpRequest

log = logging.getLogger(__name__)

_INDEX_BYTES: Final = 32 << 20


@dataclass
class HttpArchive(PlainSource):
    """One archive by its address."""

    request: HttpRequest
    client: Client
    url: str
    sha256: str
    unfit: Reason  # of an archive that can't be used
    found: Found = field(default_factory=lambda: Found(0, ""))
    files: tuple[RemoteFile, ...] = ()
    place: Place = field(default_factory=lambda: Place(Path()))
    used: bool = False  # whether this process needed the archive itself

    @classmethod
    def of(cls, request: FetchRequest, client: Client) -> HttpArchive:
        """The request's archive."""
        http = request.http
        assert http is not None  # noqa: S101  narrowings for the type checker
        assert http.url is not None  # noqa: S101
        assert http.sha256 is not None  # noqa: S101
        unfit = Reason.INVALID_ADAPTER if request.type == "Adapter" else Reason.INCOMPLETE_MODEL
        return cls(http, client, http.url, http.sha256, unfit)

    @property
    def title(self) -> str:
        return self.url.partition("?")[0]

    @property
    def folder(self) -> str:
        return FOLDER

    @property
    def allow_patterns(self) -> Sequence[str]:
        return self.request.allow_patterns

    @property
    def ignore_patterns(self) -> Sequence[str]:
        return self.request.ignore_patterns

    @property
    def archive(self) -> RemoteFile:
        """The archive as a file of the store; only ever an unfinished one."""
        size = self.found.size
        return RemoteFile(
            path=self.title, size=size, sha256=self.sha256, stored_as=blob_name(self.url, self.sha256, size)
        )

    def authorise(self) -> str:
        with translated(self):
            self.found = self.client.probe(self.url)
        return self.sha256

    @contextmanager
    def collected(self, root: Path, reporter: Reporter) -> Iterator[None]:
        """Brings the list of the archive's files, and removes the archive at the end unless its download is to be gone on with."""
        self._require_small(self.found.size)
        volume.prepare(root, self.folder)
        self.place = place_of(root, self.url)
        with translated(self):
            self.place.prepare()
        try:
            names = self._read_index()
            if names is None:
                volume.require_space(root, self.place.missing_bytes([self.archive]))
                measure = measure_blobs(self.place.blobs, [self.archive])
                reporter.enter("Downloading", total=self.found.size, measure=measure)
                with translated(self), self.brought(moving=lambda: measure()[1]) as archive:
                    reporter.enter("Verifying", total=self.found.size, measure=_position(archive))
                    names = unpack.entries(archive, limit=self.request.max_bytes)
                self._write_index(names)
            self._require_small(sum(names.values()))
            self.files = tuple(self._member(name, size) for name, size in sorted(names.items()))
            yield
        except ReasonError as error:
            if error.reason is not Reason.SOURCE_UNREACHABLE:
                self._discard()
            raise
        else:
            self._discard()

    def listing(self) -> Sequence[RemoteFile]:
        return self.files

    def prove_readable(self, files: Sequence[RemoteFile]) -> None:
        """`authorise` asked for a byte of the archive."""

    def open_store(self, root: Path) -> ArchiveStore:
        return ArchiveStore(ObjectStore(self, self.place), self)

    def stalled(self, seconds: float) -> ReasonError:
        return unreachable(self.url, f"nothing arrived for {seconds:.0f} s; what was downloaded is kept")

    @contextmanager
    def brought(self, *, moving: Callable[[], int]) -> Iterator[FileIO]:
        """The archive, complete and right; for this process alone."""
        self.used = True
        with claimed(self.place.partial(self.archive)) as target:
            store = ObjectStore(self, self.place)
            with translated(self):
                persist(lambda: store.complete(self.archive, target, threading.Event()), moving=moving)
            target.seek(0)
            yield target

    def chunks(self, file: RemoteFile, start: int) -> AbstractContextManager[Iterator[bytes]]:
        return self.client.read(self.url, start, self.found.etag)

    def md5_of(self, file: RemoteFile) -> str:
        return ""

    def translate(self, error: Exception) -> ReasonError:
        if isinstance(error, unpack.UnfitError):
            return ReasonError(self.unfit, text.clean(f"{shown(self.url)} {error}"))
        return translate(error, self.title)

    def confirm(self) -> None:
        """What has the declared sum can't be of another version."""

    def _member(self, name: str, size: int) -> RemoteFile:
        stored = blob_name(f"{self.url}\0{name}", self.sha256, size)
        return RemoteFile(path=name, size=size, version=self.sha256, stored_as=stored)

    def _require_small(self, size: int) -> None:
        if size > self.request.max_bytes:
            raise ReasonError(
                self.unfit,
                f"{shown(self.url)} has {text.size(size)}, more than the {text.size(self.request.max_bytes)} of source.http.maxSize; "
                "raise it if that is right",
            )

    def _discard(self) -> None:
        if self.used:
            self.place.partial(self.archive).unlink(missing_ok=True)

    @property
    def _index(self) -> Path:
        return self.place.folder / "archives" / self.archive.blob

    def _read_index(self) -> dict[str, int] | None:
        try:
            with self._index.open("rb") as file:
                found = json.loads(file.read(_INDEX_BYTES))
            return {str(name): int(size) for name, size in found.items()}
        except (OSError, ValueError, AttributeError):
            return None

    def _write_index(self, names: dict[str, int]) -> None:
        with translated(self):
            self._index.parent.mkdir(exist_ok=True)
            fresh = self._index.with_name(f"{self._index.name}.{os.getpid()}.tmp")
            fresh.write_text(json.dumps(names))
            fresh.replace(self._index)


def _position(archive: FileIO) -> Callable[[], tuple[int, int]]:
    """How far the archive is read, for progress."""

    def measure() -> tuple[int, int]:
        try:
            at = archive.tell()
        except ValueError:  # closed meanwhile
            at = 0
        return at, at

    return measure


@dataclass(frozen=True)
class ArchiveStore:
    """The archive's files on the volume."""

    objects: ObjectStore
    source: HttpArchive

    @property
    def blobs(self) -> Path:
        return self.objects.blobs

    def has(self, file: RemoteFile) -> bool:
        return self.objects.has(file)

    def missing_bytes(self, files: Sequence[RemoteFile]) -> int:
        missing = self.objects.missing_bytes(files)
        return missing + (self.objects.missing_bytes([self.source.archive]) if missing else 0)

    def download(self, files: Sequence[RemoteFile], *, moving: Callable[[], int]) -> dict[str, Path]:
        missing = [file for file in files if not self.has(file)]
        if missing:
            self._extract(missing, moving=moving)
        return {file.path: Path(os.path.realpath(self.objects.place.blob(file))) for file in files}

    def expected(self, file: RemoteFile) -> RemoteFile:
        return replace(file, sha256=self.objects.place.recorded(file) or "")

    def download_again(self, file: RemoteFile) -> None:
        self._extract([file], moving=lambda: 0)

    def forget(self, file: RemoteFile) -> None:
        self.objects.forget(file)

    def confirm(self) -> None:
        """What has the declared sum can't be of another version."""

    def _extract(self, files: Sequence[RemoteFile], *, moving: Callable[[], int]) -> None:
        wanted = {file.path: file for file in files}
        place = self.objects.place
        with translated(self.source), self.source.brought(moving=moving) as archive:
            for name, chunks in unpack.contents(archive, frozenset(wanted), limit=self.source.request.max_bytes):
                file = wanted[name]
                log.info("extracting %s", text.clean(name, limit=200))
                with claimed(place.partial(file)) as target:
                    target.truncate(0)
                    sums = Sums()
                    for chunk in chunks:
                        write_all(target, chunk)
                        sums.add(chunk)
                    if fault := sums.fault(file):
                        raise unpack.UnfitError(f"is damaged: {text.clean(name, limit=200)!r}: {fault}")
                    os.fsync(target.fileno())
                    place.finish(file, sums.sha256.hexdigest())
