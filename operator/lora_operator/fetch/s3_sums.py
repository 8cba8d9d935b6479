"""What an S3 service declares of an object's content, and hashing while the bytes arrive, to compare with it.

An ETag is the content's MD5 where the object came in one piece and is not encrypted with a key of KMS or the client's. An object that
came in parts declares a checksum of all of it (FULL_OBJECT; AWS keeps CRC64NVME unless told otherwise), or one of its parts' checksums
one behind the other (COMPOSITE, and the ETag with `-<parts>`), which takes knowing how long a part is. Foreign data, all of it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

from awscrt import checksums  # type: ignore[import-untyped]

from lora_operator.fetch.locks import Guarded

_MD5: Final = re.compile(r"[0-9a-f]{32}")
_PARTS: Final = re.compile(r"(.+)-([1-9][0-9]{0,4})")
_CHUNK: Final = 256 << 10


class _Hash(Protocol):
    def update(self, data: bytes, /) -> None: ...

    def digest(self) -> bytes: ...


class _Cyclic:
    """A checksum that is carried on from the one before, behind the interface of a hash."""

    def __init__(self, function: Callable[[bytes, int], int], size: int) -> None:
        self._function, self._size, self._value = function, size, 0

    def update(self, data: bytes, /) -> None:
        self._value = self._function(data, self._value)

    def digest(self) -> bytes:
        return self._value.to_bytes(self._size, "big")


_HASHES: Final[Mapping[str, Callable[[], _Hash]]] = {
    "SHA256": hashlib.sha256,
    "MD5": lambda: hashlib.md5(usedforsecurity=False),
    "SHA1": lambda: hashlib.sha1(usedforsecurity=False),
    "CRC64NVME": lambda: _Cyclic(checksums.crc64nvme, 8),
    "CRC32C": lambda: _Cyclic(checksums.crc32c, 4),
    "CRC32": lambda: _Cyclic(zlib.crc32, 4),
}


@dataclass(frozen=True)
class Declared:
    """One checksum: of the whole object, or, with `part`, of the checksums of its parts, each of so many bytes but the last."""

    algorithm: str
    value: bytes
    part: int = 0

    @property
    def title(self) -> str:
        """For messages."""
        return f"{self.algorithm} of its parts" if self.part else self.algorithm


def from_etag(etag: str, *, encrypted: bool) -> Declared | None:
    """The MD5 that an ETag is; None where it is none."""
    text = etag.strip('"').lower()
    return Declared("MD5", bytes.fromhex(text)) if _MD5.fullmatch(text) and not encrypted else None


def from_head(head: Mapping[str, Any]) -> Declared | None:
    """The checksum of the whole object in the answer to a HEAD that asked for checksums; None where there is none."""
    if head.get("ChecksumType", "FULL_OBJECT") == "FULL_OBJECT":
        for algorithm in _HASHES:
            if value := _decoded(head.get(f"Checksum{algorithm}")):
                return Declared(algorithm, value)
    return None


def parts_of(etag: str) -> int:
    """How many parts an object's ETag says that it has; 0 where it does not say."""
    found = _PARTS.fullmatch(etag.strip('"'))
    return int(found[2]) if found else 0


def from_parts(
    head: Mapping[str, Any], *, etag: str, size: int, first: int, last: int, encrypted: bool
) -> Declared | None:
    """The checksum over parts, where the object's first and last part fit parts of equal length; None where they do not."""
    count = parts_of(etag)
    if count == 0 or first < 1 or (count - 1) * first + last != size or not 0 < last <= first:
        return None
    for algorithm in _HASHES:
        if value := _decoded((_PARTS.fullmatch(str(head.get(f"Checksum{algorithm}", ""))) or ("", ""))[1]):
            return Declared(algorithm, value, part=first)
    md5 = etag.strip('"').lower().partition("-")[0]
    return Declared("MD5", bytes.fromhex(md5), part=first) if _MD5.fullmatch(md5) and not encrypted else None


class Sums:
    """Size, sha256 and the declared checksum of what an unfinished file holds so far."""

    def __init__(self, declared: Declared | None) -> None:
        self.size = 0
        self._sha256 = hashlib.sha256()
        self._declared = declared
        self._parts: list[bytes] = []
        self._in_part = 0
        self._hash = self._new()

    @classmethod
    def of(cls, file: Guarded, declared: Declared | None) -> Sums:
        """Of all that is in a file; leaves it at its end."""
        sums = cls(declared)
        file.seek(0)
        while chunk := file.read(_CHUNK):
            sums.add(chunk)
        return sums

    def add(self, chunk: bytes) -> None:
        """The next bytes."""
        self.size += len(chunk)
        self._sha256.update(chunk)
        part = self._declared.part if self._declared else 0
        while part and self._in_part + len(chunk) >= part:
            rest = part - self._in_part
            self._hash.update(chunk[:rest])
            self._end_part()
            chunk = chunk[rest:]
        self._hash.update(chunk)
        self._in_part += len(chunk)

    @property
    def sha256(self) -> str:
        """Hex."""
        return self._sha256.hexdigest()

    def fault(self, size: int) -> str:
        """How it differs from what the source declares; empty where it does not. To be asked once, at the end."""
        if self.size != size:
            return f"it has {self.size} bytes, the source declares {size}"
        if self._declared is None:
            return ""
        found = self._digest(self._declared)
        if found == self._declared.value:
            return ""
        return f"its {self._declared.title} is {found.hex()}, the source declares {self._declared.value.hex()}"

    def _digest(self, declared: Declared) -> bytes:
        if not declared.part:
            return self._hash.digest()
        if self._in_part:
            self._end_part()
        whole = self._new()
        whole.update(b"".join(self._parts))
        return whole.digest()

    def _end_part(self) -> None:
        self._parts.append(self._hash.digest())
        self._hash, self._in_part = self._new(), 0

    def _new(self) -> _Hash:
        return _HASHES[self._declared.algorithm]() if self._declared else _None()


class _None:
    """In the place of a checksum that nobody declares."""

    def update(self, data: bytes, /) -> None: ...

    def digest(self) -> bytes:
        return b""


def _decoded(value: object) -> bytes:
    """The bytes of a checksum header; empty for what is none."""
    try:
        return base64.b64decode(str(value or ""), validate=True)
    except (binascii.Error, ValueError):
        return b""
