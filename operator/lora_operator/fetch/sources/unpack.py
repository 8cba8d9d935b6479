"""Reads tar, tar.gz and zip archives from anywhere: what is in them, and the content of chosen files. Writes nothing.

Archives are hostile data. Only regular files count: links, devices and sparse files are passed over, so nothing in an archive can
point out of it. Names are judged where files are chosen, and are never used as paths. All that is expanded is bounded by what the
caller declares; the number of entries, their names, and the size of a header or of a zip's directory by this module. Memory does not grow
with any of it but the names: so of a zip's compressions only those are read that give no more at once than is asked for.
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
from lora_operator.fetch.content.select import MAX_LISTED
from lora_operator.fetch.heartbeat import HEARTBEAT

log = logging.getLogger(__name__)

_CHUNK: Final = 256 << 10
MAX_NAMES_BYTES: Final = 16 << 20  # of all together
_NAME_BYTES: Final = 1024
_HEADER_BYTES: Final = 128 << 10  # of one extended header of a tar archive, which is read at once
_DIRECTORY_BYTES: Final = 16 << 20  # of a zip archive, which is read at once too
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
    RecursionError,  # headers of headers of headers
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
    left = MAX_NAMES_BYTES
    try:
        for name, size, chunks in _walk_any(archive, magic, limit):
            bytes_ = len(name.encode("utf-8", "surrogatepass"))
            left -= bytes_
            if bytes_ > _NAME_BYTES:
                raise UnfitError(f"has a name of {bytes_} bytes, {text.clean(name, limit=100)!r}; {_NAME_BYTES} may be")
            if left < 0:
                raise UnfitError(f"has names of more than {text.size(MAX_NAMES_BYTES)} together")
            yield name, size, chunks
    except _DAMAGED as error:
        raise _damaged(error) from error


def _walk_any(archive: IO[bytes], magic: bytes, limit: int) -> Iterator[tuple[str, int, Chunks]]:
    if magic.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        yield from _walk_zip(archive)
    elif magic.startswith(b"\x1f\x8b"):
        with gzip.GzipFile(fileobj=archive, mode="rb") as plain:
            yield from _walk_tar(plain, limit)
    else:
        yield from _walk_tar(archive, limit)


def _walk_zip(archive: IO[bytes]) -> Iterator[tuple[str, int, Chunks]]:
    with zipfile.ZipFile(_Bounded(archive)) as content:  # as much of a file as it needs
        _require_few(len(content.infolist()))
        for entry in content.infolist():
            mode = stat.S_IFMT(entry.external_attr >> 16)
            if entry.is_dir() or mode not in (0, stat.S_IFREG):
                _passed_over(entry.filename, is_folder=entry.is_dir())
                continue
            if entry.flag_bits & 0x1:
                raise UnfitError(f"has an encrypted file, {text.clean(entry.filename, limit=200)!r}")
            if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise UnfitError(
                    f"has {text.clean(entry.filename, limit=200)!r} in a compression (method {entry.compress_type}) that is not read; pack "
                    "it anew, stored or deflated"
                )
            yield entry.filename, entry.file_size, _zip_chunks(content, entry)


def _zip_chunks(content: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Chunks:
    with content.open(entry) as file:
        while chunk := file.read(_CHUNK):
            yield chunk


class _Bounded:
    """A file of which nobody reads more at once than any honest zip archive's directory has."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, count: int = -1) -> bytes:
        data = self._file.read(count) if 0 <= count <= _DIRECTORY_BYTES else self._file.read(_DIRECTORY_BYTES + 1)
        if len(data) > _DIRECTORY_BYTES:
            raise UnfitError(f"has a directory of more than {text.size(_DIRECTORY_BYTES)}")
        return data


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
            content.members, content.pax_headers = [], {}  # it keeps every header else
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
        self._left = limit + MAX_LISTED * 4 * _BLOCK
        self._limit = limit

    def read(self, count: int) -> bytes:
        data = self._plain.read(count)
        HEARTBEAT.add(len(data))  # also what is passed over
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
    if count > MAX_LISTED:
        raise UnfitError(f"has more than {MAX_LISTED} entries")


def _passed_over(name: str, *, is_folder: bool) -> None:
    if not is_folder:
        log.warning("%s in the archive is a link or no file, and passed over", text.clean(name, limit=200))
