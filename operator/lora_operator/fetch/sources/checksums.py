"""Hashing while bytes arrive, to compare with what a source declares of an object's content: of the whole, or of its parts."""

from __future__ import annotations

import base64
import binascii
import hashlib
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Protocol

from awscrt import checksums  # type: ignore[import-untyped]

from lora_operator.fetch.heartbeat import HEARTBEAT
from lora_operator.fetch.volume.file_locks import Guarded

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


class _None:
    """In the place of a checksum that nobody declares."""

    def update(self, data: bytes, /) -> None: ...

    def digest(self) -> bytes:
        return b""


# The strongest first.
ALGORITHMS: Final[Mapping[str, Callable[[], _Hash]]] = {
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
        """What a message calls the checksum."""
        return f"{self.algorithm} of its parts" if self.part else self.algorithm


class Sums:
    """Size, sha256 and the declared checksum of what an unfinished file holds so far."""

    def __init__(self, declared: Declared | None = None) -> None:
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
            HEARTBEAT.add(len(chunk))
        return sums

    def add(self, chunk: bytes) -> None:
        """Takes the bytes that follow those before."""
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
        """In lower-case hex, of all bytes so far."""
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
            return self._sha256.digest() if declared.algorithm == "SHA256" else self._hash.digest()
        if self._in_part:
            self._end_part()
        whole = self._new()
        whole.update(b"".join(self._parts))
        return whole.digest()

    def _end_part(self) -> None:
        self._parts.append(self._hash.digest())
        self._hash, self._in_part = self._new(), 0

    def _new(self) -> _Hash:
        declared = self._declared
        if declared is None or (declared.algorithm == "SHA256" and not declared.part):  # which is counted anyway
            return _None()
        return ALGORITHMS[declared.algorithm]()


def decoded(value: object) -> bytes:
    """The bytes of a checksum header; empty for what is none."""
    try:
        return base64.b64decode(str(value or ""), validate=True)
    except (binascii.Error, ValueError):
        return b""
