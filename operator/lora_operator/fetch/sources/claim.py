"""A folder of another claim as a source: the operator lets the Job mount it, read-only, and its files are copied into the cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from lora_operator.constants import Reason
from lora_operator.errors import ReasonError
from lora_operator.fetch import text
from lora_operator.fetch.content.select import RemoteFile
from lora_operator.fetch.sources.base import FilteredSource
from lora_operator.fetch.sources.folder import Tree
from lora_operator.fetch.sources.object_place import Place
from lora_operator.fetch.sources.object_store import ObjectStore, revision_of, translated
from lora_operator.fetch.volume import layout
from lora_operator.manifest import ClaimRequest, FetchRequest


@dataclass
class ClaimSource(FilteredSource):
    """One folder of one claim."""

    request: ClaimRequest
    tree: Tree
    files: tuple[RemoteFile, ...] = ()

    @classmethod
    def open(cls, request: FetchRequest) -> ClaimSource:
        """The request's folder."""
        claim = request.persistent_volume_claim
        assert claim is not None  # noqa: S101  a narrowing for the type checker
        title = f"pvc://{claim.claim_name}/{claim.path}".rstrip("/")
        field = "source.persistentVolumeClaim.path"
        return cls(claim, Tree(Path(claim.mount), claim.path, title, field, by_inode=True))

    @property
    def title(self) -> str:
        return self.tree.title

    @property
    def folder(self) -> str:
        return "persistentVolumeClaim"

    def authorise(self) -> str:
        """That the claim may be named was the operator's to decide; that the Job's user may read it is the volume's."""
        self.files = self.tree.listing()
        return revision_of(self.files)

    def listing(self) -> Sequence[RemoteFile]:
        return self.files

    def prove_readable(self, files: Sequence[RemoteFile]) -> None:
        self.tree.require_readable(files)

    def chunks(self, file: RemoteFile, start: int) -> AbstractContextManager[Iterator[bytes]]:
        return self.tree.chunks(file, start)

    def translate(self, error: Exception) -> ReasonError:
        if isinstance(error, ReasonError):
            return error
        known = layout.from_system(error) if isinstance(error, OSError) else None
        return known or ReasonError(Reason.JOB_FAILED, text.clean(f"{self.title}: {type(error).__name__}: {error}"))

    def confirm(self) -> None:
        if self.tree.listing() != self.files:
            raise self.tree.changed("its listing is another one than at the beginning")

    def open_store(self, root: Path) -> ObjectStore:
        claim = self.request
        identity = (claim.claim_namespace, claim.claim_name, claim.claim_uid, claim.path.strip("/"))
        place = Place.of(root, self.folder, name=claim.claim_name, identity=identity)
        with translated(self):
            place.prepare()
        return ObjectStore(self, place, self.workers)

    def stalled(self, seconds: float) -> ReasonError:
        return ReasonError(
            Reason.SOURCE_UNREACHABLE,
            f"nothing could be read from {self.title} for {seconds:.0f} s; what was copied is kept",
        )
