"""Folders of volumes as sources: of another claim's, which the operator lets the Job mount read-only, and of the cache's own.

Files of another claim are copied into the cache. A folder of the cache's own volume is read to be checked, linked to from the snapshot, and
never written or removed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

from lora_operator.constants import Reason
from lora_operator.errors import ReasonError
from lora_operator.fetch import text
from lora_operator.fetch.content.select import RemoteFile
from lora_operator.fetch.sources.folder import Tree
from lora_operator.fetch.sources.listed import ListedSource
from lora_operator.fetch.sources.object_place import ObjectPlace
from lora_operator.fetch.sources.object_store import ObjectStore
from lora_operator.fetch.volume import layout
from lora_operator.source_kinds import RESERVED_FOLDERS
from lora_operator.wire.jobs import ClaimRequest, FetchRequest, LocalRequest


class FolderSource(ListedSource):
    """A folder below a mount."""

    tree: Tree

    @property
    def title(self) -> str:
        return self.tree.title

    def list_files(self) -> tuple[RemoteFile, ...]:
        return self.tree.listing()

    def changed(self, what: str) -> ReasonError:
        return self.tree.changed(what)

    def prove_readable(self, files: Sequence[RemoteFile]) -> None:
        self.tree.require_readable(files)


@dataclass
class ClaimSource(FolderSource):
    """One folder of one claim. That it may be named was the operator's to decide; that the Job's user may read it is the volume's."""

    request: ClaimRequest
    tree: Tree
    files: tuple[RemoteFile, ...] = ()

    @classmethod
    def open(cls, claim: ClaimRequest, _job: FetchRequest) -> ClaimSource:
        """The folder below the claim's mount; reads nothing."""
        title = f"pvc://{claim.claim_name}/{claim.path}".rstrip("/")
        field = "source.persistentVolumeClaim.path"
        return cls(claim, Tree(Path(claim.mount), claim.path, title, field, by_inode=True))

    @property
    def folder(self) -> str:
        return "persistentVolumeClaim"

    def chunks(self, file: RemoteFile, start: int) -> AbstractContextManager[Iterator[bytes]]:
        return self.tree.chunks(file, start)

    def translate(self, error: Exception) -> ReasonError:
        if isinstance(error, ReasonError):
            return error
        known = layout.from_system(error) if isinstance(error, OSError) else None
        return known or ReasonError(Reason.JOB_FAILED, text.clean(f"{self.title}: {type(error).__name__}: {error}"))

    def open_store(self, root: Path) -> ObjectStore:
        claim = self.request
        identity = (claim.claim_namespace, claim.claim_name, claim.claim_uid, claim.path.strip("/"))
        place = ObjectPlace.of(root, self.folder, name=claim.claim_name, identity=identity)
        return ObjectStore.at(place, self, self.workers)

    def stalled(self, seconds: float) -> ReasonError:
        return ReasonError(
            Reason.SOURCE_UNREACHABLE,
            f"nothing could be read from {self.title} for {seconds:.0f} s; what was copied is kept",
        )


@dataclass
class LocalSource(FolderSource):
    """One folder of the cache's own volume, used in place."""

    request: LocalRequest
    tree: Tree
    files: tuple[RemoteFile, ...] = ()

    @classmethod
    def open(cls, local: LocalRequest, job: FetchRequest) -> LocalSource:
        """The folder below the cache's root; reads nothing."""
        title = f"local://{local.path}".rstrip("/")
        return cls(local, Tree(Path(job.cache_root), local.path, title, "source.local.path"))

    @property
    def folder(self) -> str:
        return layout.ARTIFACTS

    def authorise(self) -> str:
        """That the path may be named was the operator's to decide; what sources brought is closed to every path."""
        self._require_foreign()
        return super().authorise()

    def open_store(self, root: Path) -> LocalStore:
        return LocalStore(self, Path(os.path.realpath(root), self.request.path.strip("/")))

    def stalled(self, seconds: float) -> ReasonError:
        return ReasonError(Reason.SOURCE_UNREACHABLE, f"nothing could be read from {self.title} for {seconds:.0f} s")

    def _require_foreign(self) -> None:
        """No part of the path is one of our own folders, in whatever spelling that the volume takes for it."""
        root = self.tree.mount
        own = []
        for name in RESERVED_FOLDERS:
            with contextlib.suppress(OSError):
                own.append((root / name).stat())
        first = root / (self.request.path.strip("/").split("/")[0] or ".")
        names = [name.lower() for name in RESERVED_FOLDERS]
        with contextlib.suppress(OSError):
            if first.name.lower() in names or any(os.path.samestat(first.stat(), found) for found in own):
                raise ReasonError(
                    Reason.SOURCE_NOT_ALLOWED,
                    f"{self.title} is in a folder of the operator's own; correct source.local.path",
                )


@dataclass(frozen=True)
class LocalStore:
    """The folder as its own store: everything is there already, and nothing is ever written."""

    source: LocalSource
    blobs: Path

    def has(self, file: RemoteFile) -> bool:
        return True

    def missing_bytes(self, files: Sequence[RemoteFile]) -> int:
        return 0

    def download(self, files: Sequence[RemoteFile], *, moving: Callable[[], int]) -> dict[str, Path]:
        return {file.path: self.blobs / file.path for file in files}

    def arrived(self, file: RemoteFile) -> str | None:
        return None

    def expected(self, file: RemoteFile) -> RemoteFile:
        return replace(file, sha256=None, git_oid="")  # nothing is declared but the size

    def download_again(self, file: RemoteFile) -> None:
        raise self.source.tree.changed(f"{file.path!r} is not the one that was listed")

    def forget(self, file: RemoteFile) -> None:
        """Nothing is removed: the files are the user's."""

    def confirm(self) -> None:
        self.source.confirm()
