"""The Hugging Face Hub as a source: what `client` and `resume` do, behind the protocol of `base`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lora_operator.constants import Reason
from lora_operator.errors import ReasonError
from lora_operator.fetch import environment
from lora_operator.fetch.content.select import RemoteFile
from lora_operator.fetch.sources.base import PlainSource
from lora_operator.fetch.sources.huggingface import client, resume
from lora_operator.fetch.volume import layout, store_locks
from lora_operator.wire.jobs import FetchRequest, HuggingFaceRequest


@dataclass(frozen=True)
class HubStore:
    """One repository in the Hub's own cache layout, at one commit."""

    hub: client.Hub
    place: resume.HubPlace
    commit: str

    @property
    def blobs(self) -> Path:
        return self.place.blobs

    def has(self, file: RemoteFile) -> bool:
        return (self.blobs / file.blob).exists()

    def missing_bytes(self, files: Sequence[RemoteFile]) -> int:
        return resume.missing_bytes(self.place, files)

    def download(self, files: Sequence[RemoteFile], *, moving: Callable[[], int]) -> dict[str, Path]:
        store_locks.note_commit(self.place.hub.parent, self.place.storage, self.commit)
        return client.download(self.hub, self.place, files, commit=self.commit, moving=moving)

    def arrived(self, file: RemoteFile) -> str | None:
        return self.place.arrived.get(file.blob)

    def expected(self, file: RemoteFile) -> RemoteFile:
        return file  # the Hub declares a checksum for every file

    def download_again(self, file: RemoteFile) -> None:
        client.download_again(self.hub, self.place, file, commit=self.commit)

    def forget(self, file: RemoteFile) -> None:
        client.forget(self.place, self.commit, file)

    def confirm(self) -> None:
        """Nothing to compare: everything was read at one commit."""


@dataclass
class HubSource(PlainSource):
    """One repository of one Hub."""

    hub: client.Hub
    commit: str = ""

    @classmethod
    def open(cls, repository: HuggingFaceRequest, job: FetchRequest) -> HubSource:
        """The repository as the Job's token, or nobody, sees it; sends nothing. Raises ReasonError for an unusable token."""
        return cls(client.connect(repository, environment.read_token(job)))

    @property
    def title(self) -> str:
        return self.hub.request.repo

    @property
    def folder(self) -> str:
        return layout.HUB

    @property
    def allow_patterns(self) -> Sequence[str]:
        return self.hub.request.allow_patterns

    @property
    def ignore_patterns(self) -> Sequence[str]:
        return self.hub.request.ignore_patterns

    def authorise(self) -> str:
        self.commit = client.authorise(self.hub)
        return self.commit

    def listing(self) -> Sequence[RemoteFile]:
        return client.listing(self.hub, self.commit)

    def prove_readable(self, files: Sequence[RemoteFile]) -> None:
        client.prove_readable(self.hub, self.commit, files[0].path)  # the right is the repository's, not a file's

    def open_store(self, root: Path) -> HubStore:
        place = resume.HubPlace(hub=root / layout.HUB, repo=self.hub.request.repo)
        resume.spare_library_locks(place)
        return HubStore(replace(self.hub, workers=self.workers), place, self.commit)

    def stalled(self, seconds: float) -> ReasonError:
        endpoint, status = self.hub.endpoint, self.hub.complaints.status
        if status == 429:
            return ReasonError(Reason.RATE_LIMITED, f"{endpoint} asks for fewer requests (429)")
        last = f"; its last answer was {status}" if status is not None else ""
        return ReasonError(
            Reason.SOURCE_UNREACHABLE,
            f"nothing arrived from {endpoint} for {seconds:.0f} s{last}; what was downloaded is kept",
        )
