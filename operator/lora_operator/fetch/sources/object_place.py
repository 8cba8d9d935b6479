"""The content of one place of a source on the volume: finished objects, unfinished ones, and what their bytes hashed to when they arrived.

    <scheme>/<name>-<hash of the place>/blobs/<key>-<version>              finished, and what snapshots link to
                                        blobs/<key>-<version>.incomplete   one per object; locked while somebody writes to it (see `file_locks`)
                                        sums/<key>-<version>               sha256 of the finished one

Names are hashes: keys are data. The key is in the name beside version and size, so content that came under one key is never handed out
for another one. A blob without its sum counts as absent. Finished blobs are replaced, never removed: engines may read them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from lora_operator.fetch.content.select import RemoteFile
from lora_operator.fetch.volume import file_locks

_SUM: Final = re.compile(r"[0-9a-f]{64}")
_NOT_PLAIN: Final = re.compile(r"[^a-z0-9]+")
_SLUG_CHARS: Final = 40
_NAME_CHARS: Final = 32


def blob_name(key: str, version: str, size: int) -> str:
    """The name of an object's blob: the key's hash, then that of its version."""
    return f"{_hash(key)}-{_hash(version, str(size))}"


@dataclass(frozen=True)
class ObjectPlace:
    """One bucket's, host's, claim's or the like's folder."""

    folder: Path
    arrived: dict[str, str] = field(
        default_factory=dict, compare=False
    )  # sha256 of what this process finished, by name

    @classmethod
    def of(cls, root: Path, scheme: str, *, name: str, identity: tuple[str, ...]) -> ObjectPlace:
        """A place on the volume mounted at `root`, by a readable name and what tells it from all others of its scheme."""
        slug = _NOT_PLAIN.sub("-", name.lower()).strip("-")[:_SLUG_CHARS]
        return cls(root / scheme / f"{slug}-{_hash(*identity)[:16]}")

    @property
    def blobs(self) -> Path:
        """The folder of finished and unfinished blobs."""
        return self.folder / "blobs"

    def prepare(self) -> None:
        """Makes the folders of blobs and of their sums. Raises OSError."""
        for folder in (self.blobs, self.folder / "sums"):
            folder.mkdir(parents=True, exist_ok=True)

    def blob(self, file: RemoteFile) -> Path:
        """Where the finished blob lies."""
        return self.blobs / file.blob

    def partial(self, file: RemoteFile) -> Path:
        """Where the unfinished one lies."""
        return self.blobs / f"{file.blob}.incomplete"

    def recorded(self, file: RemoteFile) -> str | None:
        """The sha256 of the blob when it arrived; None where it is not known."""
        try:
            found = (self.folder / "sums" / file.blob).read_text("ascii").strip()
        except (OSError, UnicodeDecodeError):
            return None
        return found if _SUM.fullmatch(found) else None

    def has(self, file: RemoteFile) -> bool:
        """Whether a finished blob is there whose sum is known."""
        return self.recorded(file) is not None and self.blob(file).is_file()

    def missing_bytes(self, files: Iterable[RemoteFile]) -> int:
        """What a download of `files` still has to write."""
        unique = {file.blob: file for file in files if not self.has(file)}.values()
        return sum(max(0, file.size - _size(self.partial(file))) for file in unique)

    def finish(self, file: RemoteFile, partial: Path, sha256: str) -> None:
        """Makes the complete partial file the blob: the sum first, so that no blob is ever without. Raises locks.Overtaken."""
        target = self.folder / "sums" / file.blob
        fresh = file_locks.own(target.with_name(f"{target.name}.tmp"))
        try:
            fresh.write_text(sha256 + "\n", "ascii")
        except OSError:
            fresh.unlink(missing_ok=True)
            raise
        fresh.replace(target)
        try:
            partial.replace(self.blob(file))
        except FileNotFoundError as error:
            raise file_locks.Overtaken(str(partial)) from error
        self.arrived[file.blob] = sha256

    def forget(self, file: RemoteFile) -> None:
        """Lets the blob count as absent; the next download takes its place."""
        self.arrived.pop(file.blob, None)
        (self.folder / "sums" / file.blob).unlink(missing_ok=True)

    def discard_partial(self, files: Iterable[RemoteFile]) -> None:
        """Gives the space of unfinished downloads back, where nobody else is working on them."""
        for file in files:
            file_locks.own(self.partial(file)).unlink(missing_ok=True)
            file_locks.discard_left(self.partial(file))

    def unfinished(self) -> list[Path]:
        """What all downloads have begun; read once, for there may be thousands of objects."""
        return list(self.blobs.glob("*.incomplete"))

    def discard_older(self, file: RemoteFile, begun: Iterable[Path]) -> None:
        """Removes what downloads of the object left unfinished and nobody goes on with: of other versions, or by other processes."""
        current, mine = self.partial(file), f"{file.blob.partition('-')[0]}-"
        for path in begun:
            if path.name.startswith(mine) and path not in (current, file_locks.own(current)):
                file_locks.discard_left(path)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:_NAME_CHARS]
