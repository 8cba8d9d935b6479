"""Reads safetensors files as untrusted bytes: the header alone, and, where asked, whether all values are finite.

A safetensors file is eight bytes of header length, a JSON header that names each tensor's type, shape and place, and the
tensors' bytes without gaps. Everything is checked as the safetensors library does (a file that this accepts, the engine can
read), and nothing is read before its size is known to be sane.
"""

from __future__ import annotations

import json
import os
import stat
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

from .text import clean, quoted

ADAPTER_HEADER_BYTES: Final = 16 << 20
MODEL_HEADER_BYTES: Final = 100_000_000  # what the safetensors library allows
_CHUNK: Final = 8 << 20
_MAX_DIMENSIONS: Final = 16

_BITS: Final = {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E5M2FNUZ", "F8_E4M3FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}
FLOATS: Final = frozenset({"F64", "F32", "F16", "BF16", "F8_E5M2", "F8_E4M3"})


class FileProblem(Exception):  # noqa: N818
    """A file that can't be used; the message says why, and does not name the file."""


@dataclass(frozen=True)
class Tensor:
    """One entry of a header; `start` and `end` count from the first byte after the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def open_regular(path: Path, *, root: Path | None) -> BinaryIO:
    """Open a file for reading; raises FileProblem when it is missing, no regular file, or leads out of `root`."""
    real = Path(os.path.realpath(path))
    if root is not None and not is_inside(real, root):
        raise FileProblem("is a link that leads out of the cache")
    try:
        descriptor = os.open(real, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        raise FileProblem("is missing") from None
    except OSError as error:
        raise FileProblem(f"can't be read: {clean(error.strerror)}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FileProblem("is not a regular file")
    return os.fdopen(descriptor, "rb")


def kind_of(path: Path, test: Callable[[int], bool] = bool) -> bool:
    """Whether `path` exists and its mode passes `test`; a path that can't be looked at does not exist."""
    try:
        return test(path.stat().st_mode)
    except (OSError, ValueError):
        return False


def is_inside(real: Path, root: Path) -> bool:
    """Whether a resolved path lies below `root`."""
    return real.is_relative_to(os.path.realpath(root))


def parse_json(raw: bytes) -> Any:
    """JSON of UTF-8 bytes; raises FileProblem for what is no JSON, repeats a key, or nests too deeply."""
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except UnicodeDecodeError:
        raise FileProblem("is not UTF-8 text") from None
    except ValueError as error:
        raise FileProblem(f"is not valid JSON: {clean(error, limit=200)}") from None
    except RecursionError:
        raise FileProblem("is nested too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {quoted(twice)} is there twice")
    return result


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number")


def read_header(file: BinaryIO, *, limit: int, known_types_only: bool = True) -> tuple[dict[str, Tensor], int]:
    """The tensors of a safetensors file and the offset of their bytes.

    Raises FileProblem when the header is damaged, or the file is not exactly as long as the header says. With
    `known_types_only` false, tensors of types that this module does not know are taken as they are.
    """
    size = os.fstat(file.fileno()).st_size
    if size < 8:
        raise FileProblem("is too short to be a safetensors file; download or export it again")
    (length,) = struct.unpack("<Q", file.read(8))
    if length > limit:
        raise FileProblem(f"has a header of {length} bytes, more than the {limit} that are allowed")
    if length > size - 8:
        raise FileProblem("is cut off inside its header; download or export it again")
    raw = file.read(length)
    if len(raw) != length or not raw.startswith(b"{"):
        raise FileProblem("has a damaged header; download or export it again")
    try:
        header = parse_json(raw)
    except FileProblem as problem:
        raise FileProblem(f"has a damaged header, which {problem}") from None
    if not isinstance(header, dict):
        raise FileProblem("has a header that is no JSON object")
    tensors = {name: _tensor(name, entry, known_types_only) for name, entry in header.items() if name != "__metadata__"}
    _check_places(tensors, size - 8 - length)
    return tensors, 8 + length


def _tensor(name: str, entry: Any, known_types_only: bool) -> Tensor:
    if not isinstance(entry, Mapping):
        raise FileProblem(f"describes the tensor {quoted(name)} wrongly")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if (
        not isinstance(dtype, str)
        or not (isinstance(shape, list) and len(shape) <= _MAX_DIMENSIONS and all(map(_is_count, shape)))
        or not (isinstance(offsets, list) and len(offsets) == 2 and all(map(_is_count, offsets)))
    ):
        raise FileProblem(f"describes the tensor {quoted(name)} wrongly")
    bits = _BITS.get(dtype)
    if bits is None:
        if known_types_only:
            raise FileProblem(f"has the tensor {quoted(name)} of the unknown type {quoted(dtype)}")
    else:
        for side in shape:
            bits *= side
        if bits % 8 or bits // 8 != offsets[1] - offsets[0]:
            raise FileProblem(f"gives the tensor {quoted(name)} another number of bytes than its shape needs")
    return Tensor(dtype, tuple(shape), offsets[0], offsets[1])


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _check_places(tensors: Mapping[str, Tensor], size: int) -> None:
    """Tensors follow each other without gap or overlap and fill the file to its end."""
    position = 0
    for tensor in sorted(tensors.values(), key=lambda one: (one.start, one.end)):
        if tensor.start != position or tensor.end < tensor.start:
            raise FileProblem("has tensors that overlap or leave gaps")
        position = tensor.end
    if position > size:
        raise FileProblem(f"is cut off: {position - size} bytes are missing at its end; download or export it again")
    if position < size:
        raise FileProblem(f"has {size - position} bytes too many at its end")


# Where a floating-point value is not finite: (bytes per value, bits of its highest byte that are all set, and of the next one).
_SPECIAL: Final = {
    "F64": (8, 0x7F, 0xF0),
    "F32": (4, 0x7F, 0x80),
    "BF16": (2, 0x7F, 0x80),
    "F16": (2, 0x7C, None),
    "F8_E5M2": (1, 0x7C, None),
    "F8_E4M3": (1, 0x7F, None),
}


def first_not_finite(file: BinaryIO, tensors: Mapping[str, Tensor], body: int) -> str | None:
    """The name of a tensor that holds NaN or infinity, or None; `body` is the offset that read_header gave.

    Reads the whole file (about a second per GiB, without making a Python object per value).
    """
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
        special = _SPECIAL.get(tensor.dtype)
        if special is None:
            continue
        file.seek(body + tensor.start)
        left = tensor.end - tensor.start
        while left:
            chunk = file.read(min(left, _CHUNK))
            if not chunk:
                raise FileProblem("became shorter while it was read")
            left -= len(chunk)
            if _has_special(chunk, *special):
                return name
    return None


_MARKS: Final = {
    mask: bytes(1 if value & mask == mask else 0 for value in range(256)) for mask in (0x7F, 0x7C, 0x80, 0xF0)
}


def _has_special(chunk: bytes, width: int, high: int, low: int | None) -> bool:
    marked = chunk[width - 1 :: width].translate(_MARKS[high])
    if b"\x01" not in marked:
        return False
    if low is None:
        return True
    also = chunk[width - 2 :: width].translate(_MARKS[low])
    return bool(int.from_bytes(marked, "little") & int.from_bytes(also, "little"))
