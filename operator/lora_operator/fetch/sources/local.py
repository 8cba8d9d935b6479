"""A folder of the cache's own volume as a source: read to be checked, linked to from the view, and never written or removed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lora_operator.constants import Reason
from lora_operator.errors import ReasonError
from lora_operator.fetch.content.select import RemoteFile
from lora_operator.fetch.sources.base import FilteredSource
from lora_operator.fetch.sources.folder import Tree
from lora_operator.fetch.sources.object_store import revision_of
from lora_operator.fetch.volume import layout
from lora_operator.manifest import FetchRequest, LocalRequest
from lora_operator.schemes import RESERVED_FOLDERS


@dataclass
class LocalSource(FilteredSource):
    """One folder."""

    request: LocalRequest
    tree: Tree
    files: tuple[RemoteFile, ...] = ()

    @classmethod
    def open(cls, request: FetchRequest) -> LocalSource:
        """The request's folder."""
        local = request.local
        assert local is not None  # noqa: S101  a narrowing for the type checker
        title = f"local://{local.path}".rstrip("/")
        return cls(local, Tree(Path(request.cache_root), local.path, title, "source.local.path"))

    @property
    def title(self) -> str:
        return self.tree.title

    @property
    def folder(self) -> str:
        return layout.ARTIFACTS

    def authorise(self) -> str:
        """That the path may be named was the operator's to decide; what sources brought is closed to every path."""
        self._require_foreign()
        self.files = self.tree.listing()
        return revision_of(self.files)

    def listing(self) -> Sequence[RemoteFile]:
        return self.files

    def prove_readable(self, files: Sequence[RemoteFile]) -> None:
        self.tree.require_readable(files)

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
    """The folder itself."""

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
        """It is not ours."""

    def confirm(self) -> None:
        if self.source.tree.listing() != self.source.files:
            raise self.source.tree.changed("its listing is another one than at the beginning")
