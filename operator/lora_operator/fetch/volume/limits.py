"""Whether content may come into the cache, before its first byte: its own size, the cache's capacity, the volume's room.

The figures are the source's own listing and the volume's. What a source sends beyond its listing is ended by the download itself, and
a volume that fills while a Job writes to it ends that Job as InsufficientSpace.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from lora_operator.constants import Reason
from lora_operator.errors import ReasonError
from lora_operator.fetch import text
from lora_operator.fetch.volume.layout import BLOBS
from lora_operator.wire.jobs import VolumeLimits, VolumeState

_MOST: Final = 2**63 - 1  # that an integer in a status can be


class NoRoomError(ReasonError):
    """InsufficientSpace, with the number of bytes that would have to go."""

    def __init__(self, message: str, needed: int) -> None:
        super().__init__(Reason.INSUFFICIENT_SPACE, message)
        self.needed = min(max(1, needed), _MOST)


def with_need(error: ReasonError, root: Path, *, missing: int, limits: VolumeLimits, reserved: int) -> ReasonError:
    """A full volume's error with what it would take to go on; any other one as it is."""
    if error.reason is not Reason.INSUFFICIENT_SPACE or isinstance(error, NoRoomError):
        return error
    found = os.statvfs(root)
    free = found.f_bavail * found.f_frsize
    return NoRoomError(error.message, missing + reserved + limits.min_free_bytes - free)


def require_size(size: int, files: int, limits: VolumeLimits) -> None:
    """Raises TooLarge where content of `size` bytes in so many files is more than an artifact may have."""
    size = max(size, limits.hint_bytes)
    if limits.max_artifact_bytes is not None and size > limits.max_artifact_bytes:
        raise ReasonError(
            Reason.TOO_LARGE,
            f"the content has {text.size(size)} in {files} files, and the ModelCache takes {text.size(limits.max_artifact_bytes)} at "
            "most (spec.maxArtifactSize); choose fewer files by allowPatterns, or raise it",
        )


def to_write(*, size: int, missing: int, limits: VolumeLimits) -> int:
    """How many bytes are to be written where so many are missing of content of `size`, or of more by its user's own word."""
    return max(missing, limits.hint_bytes - (size - missing)) if missing else 0


def require_room(root: Path, *, needed: int, limits: VolumeLimits, reserved: int) -> None:
    """Raises InsufficientSpace where `needed` bytes don't fit; the `reserved` ones, which other Jobs will write, count as written.

    File systems that don't tell their size are believed to have space.
    """
    wanted = f"{text.size(needed)} are to be downloaded"
    others = f", other Jobs will write {text.size(reserved)}" if reserved else ""
    found = os.statvfs(root)
    free = found.f_bavail * found.f_frsize
    if found.f_blocks and needed + reserved + limits.min_free_bytes > free:
        kept = f" of which {text.size(limits.min_free_bytes)} stay free (spec.minFree)" if limits.min_free_bytes else ""
        raise NoRoomError(
            f"{wanted}, but the cache's volume has {text.size(free)} free{kept}{others}; free space on it or enlarge it",
            needed + reserved + limits.min_free_bytes - free,
        )
    if limits.capacity_bytes is None:
        return
    used = used_bytes(root)
    if used + needed + reserved > limits.capacity_bytes:
        raise NoRoomError(
            f"{wanted}, but the cache holds {text.size(used)} of the {text.size(limits.capacity_bytes)} that it may "
            f"(spec.capacity){others}; remove content that is not used, or raise it",
            used + needed + reserved - limits.capacity_bytes,
        )


def volume_state(root: Path) -> VolumeState | None:
    """The volume as it is now; None where it can't be looked at."""
    try:
        found = os.statvfs(root)
        total = found.f_blocks * found.f_frsize
        return VolumeState(total_bytes=total, free_bytes=found.f_bavail * found.f_frsize, used_bytes=used_bytes(root))
    except OSError:
        return None


def used_bytes(root: Path) -> int:
    """What sources' blobs take, finished or not: <folder>/<store>/blobs/*; snapshots are links, and cost nothing."""
    return sum(_sizes(store / BLOBS) for folder in _folders(root) for store in _folders(folder))


def _folders(path: Path) -> list[Path]:
    try:
        with os.scandir(path) as entries:
            return [Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []


def _sizes(blobs: Path) -> int:
    total = 0
    try:
        with os.scandir(blobs) as entries:
            for entry in entries:
                try:
                    if entry.is_file(follow_symlinks=False):
                        total += entry.stat(follow_symlinks=False).st_size
                except OSError:
                    continue  # finished or removed just now
    except OSError:
        pass
    return total
