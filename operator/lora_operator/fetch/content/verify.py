"""Proves that files in the cache are what the source declares, in one pass over each and with bounded memory.

A plain download is checked for its size only, and a cached file was not checked at all; so every file is hashed on every run, either
while this process writes it, or here. Files in LFS declare a sha256; the others have a git blob id: sha1 over "blob <size>\\0" and the content.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lora_operator.fetch.content.select import RemoteFile
from lora_operator.wire.jobs import ManifestFile

_CHUNK: Final = 1 << 20
_WORKERS: Final = 2


@dataclass(frozen=True)
class FileVerdict:
    """What was found in one file: its content's size and sha256, and in words how it differs from the declaration, if it does."""

    size: int
    sha256: str
    fault: str = ""


def verify(
    files: Mapping[Path, RemoteFile], *, count: Callable[[int], None], arrived: Mapping[Path, str] | None = None
) -> dict[Path, FileVerdict]:
    """Hashes every file but those whose sha256 was taken as they `arrived`: a big one would be read once more, over some network.

    An unreadable or missing one gets a verdict with a fault, like a wrong one.
    """
    known = arrived or {}
    with ThreadPoolExecutor(_WORKERS, thread_name_prefix="verify") as pool:
        verdicts = pool.map(lambda item: _verify_one(*item, count=count, arrived=known.get(item[0])), files.items())
        return dict(zip(files, verdicts, strict=True))


def digest(files: Iterable[ManifestFile]) -> str:
    """The digest of a set of files: "sha256:" + hex sha256 of one line per file.

    A line is path, NUL, size in decimal, NUL, sha256 in lower-case hex, newline, in UTF-8; lines are sorted by the path's bytes. Paths
    have neither NUL nor newline in them (names with control characters are refused), so different sets have different lines.
    """
    total = hashlib.sha256()
    for file in sorted(files, key=lambda file: file.path.encode()):
        total.update(f"{file.path}\0{file.size}\0{file.sha256}\n".encode())
    return f"sha256:{total.hexdigest()}"


def _verify_one(path: Path, declared: RemoteFile, *, count: Callable[[int], None], arrived: str | None) -> FileVerdict:
    sha256 = hashlib.sha256()
    size = 0
    try:
        with path.open("rb", buffering=0) as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                return FileVerdict(0, "", "it is not a file")
            if arrived is not None and (declared.sha256 is not None or not declared.git_oid):
                count(found.st_size)
                return FileVerdict(found.st_size, arrived, _fault(declared, found.st_size, arrived, ""))
            git = hashlib.sha1(b"blob %d\0" % found.st_size, usedforsecurity=False)
            while chunk := file.read(_CHUNK):
                sha256.update(chunk)
                if declared.git_oid and declared.sha256 is None:
                    git.update(chunk)
                size += len(chunk)
                count(len(chunk))
    except OSError as error:
        return FileVerdict(size, "", f"it can't be read: {error.strerror}")
    return FileVerdict(size, sha256.hexdigest(), _fault(declared, size, sha256.hexdigest(), git.hexdigest()))


def _fault(declared: RemoteFile, size: int, sha256: str, git_oid: str) -> str:
    if size != declared.size:
        return f"it has {size} bytes, the source declares {declared.size}"
    if declared.sha256 is not None:
        return "" if sha256 == declared.sha256 else f"its sha256 is {sha256}, the source declares {declared.sha256}"
    if not declared.git_oid:
        return ""  # a source that declares no checksum
    return (
        "" if git_oid == declared.git_oid else f"its git blob id is {git_oid}, the source declares {declared.git_oid}"
    )
