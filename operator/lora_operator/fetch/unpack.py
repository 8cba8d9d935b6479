"""Reads tar, tar.gz and zip archives from anywhere: what is in them, and the content of chosen files. Writes nothing.

Archives are hostile data. Only regular files count: links, devices and sparse files are passed over, so nothing in an archive can
point out of it. Names are judged where files are chosen, and are never used as paths. All that is expanded is bounded by what the
caller declares, the number of entries and the size of a header by this module; memory does not grow with any of it but the names.
"""

from __future__ import annotations

import gzip
import logging
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from typing import IO, Final

from lora_operator.fetch import text
from lora_operator.fetch.meter import GETTING_ON

log = logging.getLogger(__name__)

MAX_ENTRIES: Final = 50_000
_CHUNK: Final = 256 << 10
_HEADER_BYTES: Final = 1 << 20  # of one extended header of a tar archive, which is read at once
_BLOCK: Final = 512
_EXTENDED: Final = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
_DAMAGED: Final = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    gzip.BadGzipFile,
    EOFError,
    NotImplementedError,
    UnicodeError,
)

Chunks = Iterator[bytes]


class UnfitError(Exception):
    """The archive can't be used; the message goes on after its name."""


def entries(archive: IO[bytes], *, limit: int) -> dict[str, int]:
    """The sizes of the regular files by name. Raises UnfitError: damaged, twice the same name, or more than `limit` bytes in all."""
    found: dict[str, int] = {}
    left = limit
    for name, size, _ in _walk(archive, limit):
        if name in found:
            raise UnfitError(f"has {text.clean(name, limit=200)!r} twice")
        left -= size
        if left < 0:
            raise UnfitError(f"expands to more than the {text.size(limit)} of maxSize; raise it if that is right")
        found[name] = size
    return found


def contents(archive: IO[bytes], wanted: frozenset[str], *, limit: int) -> Iterator[tuple[str, Chunks]]:
    """The content of each wanted file, to be read before the next one is asked for. Raises UnfitError."""
    left = set(wanted)
    for name, size, chunks in _walk(archive, limit):
        if name in left:
            left.remove(name)
            yield name, _bounded(chunks, size, name)
        if not left:
            return
    if left:
        raise UnfitError(f"has no {text.clean(min(left), limit=200)!r} any more")


def _walk(archive: IO[bytes], limit: int) -> Iterator[tuple[str, int, Chunks]]:
    archive.seek(0)
    magic = archive.read(4)
    archive.seek(0)
    try:
        if magic.startswith((b"PK\x03\x04", b"PK\x05\x06")):
            yield from _walk_zip(archive)
        elif magic.startswith(b"\x1f\x8b"):
            with gzip.GzipFile(fileobj=archive, mode="rb") as plain:
                yield from _walk_tar(plain, limit)
        else:
            yield from _walk_tar(archive, limit)
    except _DAMAGED as error:
        raise _damaged(error) from error


def _walk_zip(archive: IO[bytes]) -> Iterator[tuple[str, int, Chunks]]:
    with zipfile.ZipFile(archive) as content:
        _require_few(len(content.infolist()))
        for entry in content.infolist():
            mode = stat.S_IFMT(entry.external_attr >> 16)
            if entry.is_dir() or mode not in (0, stat.S_IFREG):
                _passed_over(entry.filename, is_folder=entry.is_dir())
                continue
            if entry.flag_bits & 0x1:
                raise UnfitError(f"has an encrypted file, {text.clean(entry.filename, limit=200)!r}")
            yield entry.filename, entry.file_size, _zip_chunks(content, entry)


def _zip_chunks(content: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Chunks:
    with content.open(entry) as file:
        while chunk := file.read(_CHUNK):
            yield chunk


class _Member(tarfile.TarInfo):
    """A header that is not read when it is larger than any honest one."""

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in _EXTENDED and self.size > _HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {self.size} bytes")
        return super()._proc_member(tar)  # type: ignore[misc, no-any-return]  # the method to override, as tarfile says


def _walk_tar(plain: IO[bytes] | gzip.GzipFile, limit: int) -> Iterator[tuple[str, int, Chunks]]:
    with tarfile.open(fileobj=_Limited(plain, limit), mode="r|", tarinfo=_Member) as content:  # type: ignore[call-overload]
        for count, entry in enumerate(content, start=1):
            _require_few(count)
            content.members = []  # it keeps every header else
            if not entry.isreg() or entry.issparse():
                _passed_over(entry.name, is_folder=entry.isdir())
                continue
            yield entry.name.removeprefix("./"), entry.size, _tar_chunks(content, entry)


def _tar_chunks(content: tarfile.TarFile, entry: tarfile.TarInfo) -> Chunks:
    file = content.extractfile(entry)
    while file is not None and (chunk := file.read(_CHUNK)):
        yield chunk


class _Limited:
    """A stream that ends in an error where it gives more than files of the declared size and their headers can be."""

    def __init__(self, plain: IO[bytes] | gzip.GzipFile, limit: int) -> None:
        self._plain = plain
        self._left = limit + MAX_ENTRIES * 4 * _BLOCK
        self._limit = limit

    def read(self, count: int) -> bytes:
        data = self._plain.read(count)
        GETTING_ON.add(len(data))  # also what is passed over
        self._left -= len(data)
        if self._left < 0:
            raise UnfitError(f"expands to more than the {text.size(self._limit)} of maxSize; raise it if that is right")
        return data


def _bounded(chunks: Chunks, size: int, name: str) -> Chunks:
    try:
        for chunk in chunks:
            size -= len(chunk)
            if size < 0:
                raise UnfitError(f"is damaged: {text.clean(name, limit=200)!r} is longer than it says")
            yield chunk
    except _DAMAGED as error:
        raise _damaged(error) from error


def _damaged(error: Exception) -> UnfitError:
    return UnfitError(f"is no tar, tar.gz or zip archive that can be read: {type(error).__name__}: {error}")


def _require_few(count: int) -> None:
    if count > MAX_ENTRIES:
        raise UnfitError(f"has more than {MAX_ENTRIES} entries")


def _passed_over(name: str, *, is_folder: bool) -> None:
    if not is_folder:
        log.warning("%s in the archive is a link or no file, and passed over", text.clean(name, limit=200))
