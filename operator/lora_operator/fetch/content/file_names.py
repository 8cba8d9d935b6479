"""Judges the names of wanted files: one that could leave the snapshot, hide, or collide with another one is refused. Pure."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Final

from lora_operator.constants import Reason
from lora_operator.errors import ReasonError
from lora_operator.wire.jobs import MANIFEST_FILE

MAX_FILES: Final = 2000
_MAX_PART_BYTES: Final = 255
_MAX_PATH_BYTES: Final = 1024


def require(names: Sequence[str], reason: Reason) -> None:
    """Raises ReasonError(reason) for the first name that can't be published, or too many of them."""
    if len(names) > MAX_FILES:
        raise ReasonError(
            reason, f"{len(names)} files are wanted, more than {MAX_FILES}; narrow allowPatterns or set source.path"
        )
    taken: dict[str, str] = {}
    folders = {
        "/".join(parts[:depth]) for parts in (name.split("/") for name in names) for depth in range(1, len(parts))
    }
    for name in names:
        fault = _fault(name)
        if fault:
            raise ReasonError(
                reason, f"the file name {ascii(name)[:200]} {fault}; rename it or leave it out by ignorePatterns"
            )
        # Folders count too: `a` and `A/b` collide on a volume that ignores case.
        parts = name.split("/")
        for depth in range(1, len(parts) + 1):
            path = "/".join(parts[:depth])
            other = taken.setdefault(unicodedata.normalize("NFKC", path).casefold(), path)
            if other != path or (depth == len(parts) and path in folders):
                raise ReasonError(
                    reason,
                    f"the file names {ascii(other)[:200]} and {ascii(path)[:200]} collide; rename one or leave it out",
                )


def _fault(name: str) -> str:
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts) or "\\" in name:
        return "leads out of its folder"
    if any(unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") for c in name):
        return "has control characters"
    if len(name.encode()) > _MAX_PATH_BYTES or any(len(part.encode()) > _MAX_PART_BYTES for part in parts):
        return "is too long"
    if MANIFEST_FILE in parts:
        return "is reserved"
    return ""
