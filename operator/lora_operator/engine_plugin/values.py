"""Looks through the values of a safetensors file: what is not finite, what is absurdly large, and which tensors are all zero.

The whole file is read once, without a Python object per value: bytes of one significance are taken out of a chunk and compared
as a whole, the most significant first, so of an honest file little more than one byte of each value is looked at (about a second
per GiB).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import BinaryIO, Final

from .clean_text import quoted
from .tensors import FileProblem, Tensor

_CHUNK: Final = 8 << 20
# The largest value that half precision holds. Weights of adapters that work are below 1000; what is larger makes infinities of
# answers in engines that calculate in half precision, and in others soon after.
_LARGEST: Final = 65504.0

# By type, as the bytes of the absolute value, the most significant first: the largest that is allowed, and the largest that is finite.
# Of BF16, which is the upper half of an F32, the largest that is not above _LARGEST is 65280.
_LIMITS: Final = {
    "F64": (struct.pack(">d", _LARGEST), bytes.fromhex("7fefffffffffffff")),
    "F32": (struct.pack(">f", _LARGEST), bytes.fromhex("7f7fffff")),
    "BF16": (struct.pack(">f", _LARGEST)[:2], bytes.fromhex("7f7f")),
    "F16": (bytes.fromhex("7bff"), bytes.fromhex("7bff")),
    "F8_E5M2": (bytes.fromhex("7b"), bytes.fromhex("7b")),
    "F8_E4M3": (bytes.fromhex("7e"), bytes.fromhex("7e")),
}


def scan_values(file: BinaryIO, tensors: Mapping[str, Tensor], body: int) -> frozenset[str]:
    """The names of the tensors that hold nothing but zeros; `body` is the offset that read_header gave.

    Raises FileProblem for NaN, infinity, and values beyond what half precision holds.
    """
    zeros = set()
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
        if tensor.dtype not in _LIMITS:
            continue
        largest, finite = _LIMITS[tensor.dtype]
        is_zero = True
        file.seek(body + tensor.start)
        left = tensor.end - tensor.start
        while left:
            chunk = file.read(min(left, _CHUNK))
            if not chunk:
                raise FileProblem("became shorter while it was read")
            left -= len(chunk)
            if _exceeds(chunk, largest):
                raise FileProblem(_complaint(name, is_finite=not _exceeds(chunk, finite)))
            is_zero = is_zero and not _exceeds(chunk, bytes(len(largest)))
        if is_zero:
            zeros.add(name)
    return frozenset(zeros)


def _complaint(name: str, *, is_finite: bool) -> str:
    if is_finite:
        return (
            f"holds a value beyond {_LARGEST:.0f}, the largest of half precision, in the tensor {quoted(name)}: the training diverged,"
            " export an earlier checkpoint"
        )
    return f"holds NaN or infinity in the tensor {quoted(name)}: the training diverged, export an earlier checkpoint"


def _table(test: int, *, above: bool, mask: int) -> bytes:
    return bytes(1 if ((value & mask) > test if above else (value & mask) == test) else 0 for value in range(256))


# For each byte of a limit: which bytes are above it, and which equal it; those of the most significant byte without the sign.
_TABLES: Final = {
    (test, mask): (_table(test, above=True, mask=mask), _table(test, above=False, mask=mask))
    for test in {0, *(byte for limits in _LIMITS.values() for limit in limits for byte in limit)}
    for mask in (0x7F, 0xFF)
}


def _exceeds(chunk: bytes, limit: bytes) -> bool:
    """Whether the absolute value of any of the chunk's little-endian values is above the limit, as numbers are by their bytes."""
    width = len(limit)
    equal = None  # values whose bytes so far are the limit's, a byte for each, as one large number
    for place, byte in enumerate(limit):
        plane = chunk[width - 1 - place :: width]
        above, same = _TABLES[byte, 0xFF if place else 0x7F]
        higher, alike = plane.translate(above), plane.translate(same)
        if equal is None:
            if b"\x01" in higher:
                return True
            if b"\x01" not in alike:
                return False
            equal = int.from_bytes(alike, "little")
            continue
        if equal & int.from_bytes(higher, "little"):
            return True
        equal &= int.from_bytes(alike, "little")
        if not equal:
            return False
    return False
