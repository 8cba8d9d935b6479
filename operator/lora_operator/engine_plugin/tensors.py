"""Reads the headers of safetensors files as untrusted bytes.

A safetensors file is eight bytes of header length, a JSON header that names each tensor's type, shape and place, and the
tensors' bytes without gaps. Everything is checked as the safetensors library does and stricter, and nothing is read before its
size is known to be sane. Where the library is there (in engines and download Jobs), it is asked as well: what it reads is what
the engine can read.
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

from .clean_text import clean, quoted

ADAPTER_HEADER_BYTES: Final = 16 << 20
MODEL_HEADER_BYTES: Final = 100_000_000  # what the safetensors library allows
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
_METADATA: Final = "__metadata__"
_FIELDS: Final = frozenset({"dtype", "shape", "data_offsets"})
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


def parse_json(raw: bytes, *, sizes_only: bool = False) -> Any:
    """JSON of UTF-8 bytes; raises FileProblem for what is no JSON, repeats a key, or nests too deeply.

    With `sizes_only`, for all numbers but whole ones from 0 on, too: the library's parser takes -0 for a fraction.
    """
    hooks: dict[str, Any] = {"object_pairs_hook": _unique, "parse_constant": _no_constant}
    if sizes_only:
        hooks |= {"parse_int": _size, "parse_float": _no_size}
    try:
        return json.loads(raw.decode("utf-8"), **hooks)
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


def _size(text: str) -> int:
    return _no_size(text) if text.startswith("-") else int(text)


def _no_size(text: str) -> Any:
    raise ValueError(f"{clean(text, limit=30)} is no whole number from 0 on")


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
        header = parse_json(raw, sizes_only=True)
    except FileProblem as problem:
        raise FileProblem(f"has a damaged header, which {problem}") from None
    if not isinstance(header, dict):
        raise FileProblem("has a header that is no JSON object")
    _check_metadata(header.pop(_METADATA, None))
    tensors = {name: _tensor(name, entry, known_types_only) for name, entry in header.items()}
    _check_places(tensors, size - 8 - length)
    return tensors, 8 + length


def _check_metadata(metadata: Any) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict) or not all(_is_text(key) and _is_text(text) for key, text in metadata.items()):
        raise FileProblem(f"has a header whose {_METADATA} holds something else than texts; export it again")


def _is_text(value: object) -> bool:
    """Whether it is text that UTF-8 can hold: JSON's escapes allow for halves of characters, the library does not."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _tensor(name: str, entry: Any, known_types_only: bool) -> Tensor:
    if not isinstance(entry, Mapping) or entry.keys() != _FIELDS or not _is_text(name):
        raise FileProblem(f"describes the tensor {quoted(name)} wrongly")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if (
        not _is_text(dtype)
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
            if bits >= 1 << 63:  # also where a later side is 0: the library multiplies with 64 bits
                raise FileProblem(f"describes the tensor {quoted(name)} as larger than any file")
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


def require_readable(file: BinaryIO) -> None:
    """Raises FileProblem when the safetensors library, where it is installed, can't read the file's header.

    It maps the file, reads the header, and only then looks for a framework to make tensors with, whose absence is no complaint.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        return
    try:
        with safe_open(f"/proc/self/fd/{file.fileno()}", framework="numpy"):
            pass
    except (ImportError, FileNotFoundError):  # the latter only where there is no /proc
        pass
    except (SafetensorError, ValueError, OSError) as error:
        raise FileProblem(
            f"can't be read by the safetensors library: {clean(error, limit=200)}; export it again"
        ) from None
