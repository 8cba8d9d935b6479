"""Archives of a source on the volume: each is one unfinished file of the store for as long as it is needed, and never more.

It is downloaded, checked against its sha256, and read from there: first for the list of its files, then for the wanted ones. It goes
as soon as these are extracted, before the next archive's are, or the Job is told that they can't be; else it is kept for the next
attempt. The list stays, so that a Job that finds all wanted files in the cache downloads nothing.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Final

from lora_operator.constants import Reason
from lora_operator.errors import ReasonError
from lora_operator.fetch import text
from lora_operator.fetch.content.select import MAX_LISTED, RemoteFile
from lora_operator.fetch.progress import Reporter, measure_blobs
from lora_operator.fetch.sources import unpack
from lora_operator.fetch.sources.checksums import Sums
from lora_operator.fetch.sources.object_place import ObjectPlace, blob_name
from lora_operator.fetch.sources.object_store import Objects, ObjectStore, translated
from lora_operator.fetch.sources.retries import persist
from lora_operator.fetch.volume import file_locks, reservations, store_locks
from lora_operator.fetch.volume.limits import require_size
from lora_operator.wire.jobs import FetchRequest, VolumeLimits

log = logging.getLogger(__name__)

_INDEX_BYTES: Final = 6 * unpack.MAX_NAMES_BYTES + 32 * MAX_LISTED  # of names in JSON: \u and four digits for a byte
_AT_FAULT: Final = (  # what no further download of an archive can change, or what its space is needed for
    Reason.CHECKSUM_MISMATCH,
    Reason.INSUFFICIENT_SPACE,
    Reason.TOO_LARGE,
    Reason.INVALID_ADAPTER,
    Reason.INCOMPLETE_MODEL,
    Reason.INCOMPATIBLE_BASE_MODEL,
    Reason.UNSAFE_FORMAT,
    Reason.ENTRY_NOT_FOUND,  # the archive itself, or the wanted folder in it
)


@dataclass
class Packed:
    """One archive. `key` tells where it is from: nobody gets by its sum alone what another one's credentials brought."""

    source: Objects
    place: ObjectPlace
    archive: RemoteFile  # with its sha256
    key: str
    limit: int  # bytes that may be in it
    root: Path  # of the volume
    limits: VolumeLimits
    used: set[Path] = field(default_factory=set)  # where this process had the archive itself
    verified: tuple[int, ...] = ()  # stamp of the archive that this process has hashed

    def names(self, reporter: Reporter) -> dict[str, int]:
        """The sizes of its files by name; brings the archive where that is not known yet. Raises ReasonError."""
        known = self._read_index()
        if known is not None:
            return known
        measure = measure_blobs(self.place.blobs, [self.archive])
        with reservations.reserved(
            self.root,
            size=self.archive.size,
            missing=lambda: self.place.missing_bytes([self.archive]),
            done=lambda: measure()[0],
            limits=self.limits,
        ):
            reporter.enter("Downloading", total=self.archive.size, measure=measure)
            brought = self._brought(lambda: self._read_index() is None, moving=lambda: measure()[1])
            with translated(self.source), brought as archive:
                if archive is None:
                    return self._read_index() or {}
                reporter.enter("Verifying", total=self.archive.size, measure=_position(archive))
                found = unpack.entries(archive, limit=self.limit)
                self._write_index(found)
        return found

    def member(self, name: str, size: int) -> RemoteFile:
        """One of its files as an object of the store."""
        sha256 = self.archive.sha256 or ""
        return RemoteFile(
            path=name, size=size, version=sha256, stored_as=blob_name(f"{self.key}\0{name}", sha256, size)
        )

    def extract(self, files: Mapping[str, RemoteFile], *, moving: Callable[[], int], again: bool = False) -> None:
        """Brings these files, by their names in the archive, into their final place, unless another Job has. Raises ReasonError."""

        def missing() -> frozenset[str]:
            return frozenset(name for name, file in files.items() if again or not self.place.has(file))

        with translated(self.source), self._brought(lambda: bool(missing()), moving=moving, is_last=True) as archive:
            if archive is not None:
                for name, chunks in unpack.contents(archive, missing(), limit=self.limit):
                    log.info("extracting %s", text.clean(name, limit=200))
                    self._write(files[name], chunks)

    def discard(self) -> None:
        """Removes the archive, if this process needed it and no other one has it now."""
        for path in self.used:
            if path == self.place.partial(self.archive):
                file_locks.discard_left(path)
            else:
                path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _brought(
        self, needed: Callable[[], bool], *, moving: Callable[[], int], is_last: bool = False
    ) -> Iterator[FileIO | None]:
        """The archive, complete and right, for this process alone; None where another Job was first, so that it is not needed any more.

        With `is_last` it goes at the end.
        """
        store = ObjectStore(self.source, self.place)
        self.place.discard_older(self.archive, self.place.unfinished())
        while True:
            with file_locks.claimed(self.place.partial(self.archive)) as (path, target):
                self.used.add(path)
                wanted = needed()
                try:
                    if wanted and self.verified != _stamp(target):
                        persist(partial(store.complete, self.archive, target, threading.Event()), moving=moving)
                        self.verified = _stamp(target)
                except file_locks.Overtaken:  # another Job is done with it, and removed it
                    continue
                target.seek(0)
                yield target.plain if wanted else None
                if is_last and file_locks.is_same(path, target.plain):
                    path.unlink(missing_ok=True)
                return

    def _write(self, file: RemoteFile, chunks: Iterator[bytes]) -> None:
        try:
            with file_locks.claimed(self.place.partial(file)) as (path, target):
                target.truncate(0)
                sums = Sums()
                try:
                    for chunk in chunks:
                        target.write(chunk)
                        sums.add(chunk)
                    if fault := sums.fault(file.size):
                        raise unpack.UnfitError(f"is damaged: {text.clean(file.path, limit=200)!r}: {fault}")
                    target.sync()
                except (OSError, unpack.UnfitError):
                    target.truncate(0)  # it is never gone on with
                    raise
                self.place.finish(file, path, sums.sha256)
        except file_locks.Overtaken as error:
            if not self.place.has(file):
                what = f"{text.clean(file.path, limit=200)!r} was taken away while it was being extracted; tried again"
                raise ReasonError(Reason.CHECKSUM_MISMATCH, what) from error

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

    def _write_index(self, names: Mapping[str, int]) -> None:
        self._index.parent.mkdir(exist_ok=True)
        fresh = self._index.with_name(f"{self._index.name}.{os.getpid()}.tmp")
        fresh.write_text(json.dumps(dict(names)))
        fresh.replace(self._index)


@contextlib.contextmanager
def collecting(request: FetchRequest, place: ObjectPlace, archives: Sequence[Packed]) -> Iterator[None]:
    """Around all that is done with archives of one place: refuses too big ones, and keeps evictions away."""
    require_size(sum(found.archive.size for found in archives), len(archives), request.limits)
    with store_locks.held(Path(request.cache_root), place.blobs, owner=request.owner), tidied(archives):
        yield


@contextlib.contextmanager
def tidied(archives: Sequence[Packed]) -> Iterator[None]:
    """Removes the archives at the end, unless they are to be gone on with: a server that refuses meanwhile is no fault of theirs."""
    try:
        yield
    except ReasonError as error:
        if error.reason in _AT_FAULT:
            for archive in archives:
                archive.discard()
        raise
    else:
        for archive in archives:
            archive.discard()


@dataclass(frozen=True)
class PackedStore:
    """Files of archives on the volume, beside those that are objects of their own."""

    objects: ObjectStore
    packed: Mapping[str, tuple[Packed, str]] = field(default_factory=dict)  # by path: the archive, and the name in it

    @property
    def blobs(self) -> Path:
        return self.objects.blobs

    def has(self, file: RemoteFile) -> bool:
        return self.objects.has(file)

    def missing_bytes(self, files: Sequence[RemoteFile]) -> int:
        """At the peak: each archive goes when its files are extracted, before the next one's are."""
        now = peak = 0
        for archive, members in self._by_archive(files):
            now += self.objects.missing_bytes([archive.archive, *members.values()])
            peak = max(peak, now)
            now -= archive.archive.size
        plain = [file for file in files if file.path not in self.packed]
        return max(peak, now + self.objects.missing_bytes(plain))

    def download(self, files: Sequence[RemoteFile], *, moving: Callable[[], int]) -> dict[str, Path]:
        for archive, members in self._by_archive(files):
            archive.extract(members, moving=moving)
        return self.objects.download(files, moving=moving)

    def arrived(self, file: RemoteFile) -> str | None:
        return self.objects.arrived(file)

    def expected(self, file: RemoteFile) -> RemoteFile:
        return replace(file, sha256=file.sha256 or self.objects.place.recorded(file) or "")

    def download_again(self, file: RemoteFile) -> None:
        if file.path in self.packed:
            archive, name = self.packed[file.path]
            archive.extract({name: file}, moving=lambda: 0, again=True)
        else:
            self.objects.download_again(file)

    def forget(self, file: RemoteFile) -> None:
        self.objects.forget(file)

    def confirm(self) -> None:
        self.objects.confirm()

    def _by_archive(self, files: Sequence[RemoteFile]) -> list[tuple[Packed, dict[str, RemoteFile]]]:
        """The missing ones of `files` by their names in each archive."""
        wanted: dict[int, tuple[Packed, dict[str, RemoteFile]]] = {}
        for file in files:
            if file.path in self.packed and not self.has(file):
                archive, name = self.packed[file.path]
                wanted.setdefault(id(archive), (archive, {}))[1][name] = file
        return list(wanted.values())


def _stamp(target: file_locks.Guarded) -> tuple[int, ...]:
    found = os.fstat(target.plain.fileno())
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _position(archive: FileIO) -> Callable[[], tuple[int, int]]:
    """How far the archive is read, for progress."""

    def measure() -> tuple[int, int]:
        try:
            at = archive.tell()
        except ValueError:  # closed meanwhile
            at = 0
        return at, at

    return measure
