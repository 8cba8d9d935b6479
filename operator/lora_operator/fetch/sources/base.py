"""What the program needs of a source: one protocol, whatever the content comes from. `schemes` names those that there are.

A source is asked in the order of the methods below. Nothing of it may look at the cache before `collected`, and what `authorise`
returns is the revision that all the rest speaks of. Every method raises ReasonError, and nothing else that a source can cause.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from lora_operator.errors import ReasonError
from lora_operator.fetch.content.select import RemoteFile
from lora_operator.fetch.progress import Reporter
from lora_operator.source_kinds import OFFLINE_FETCHER
from lora_operator.wire.jobs import FetchRequest

if TYPE_CHECKING:
    from lora_operator.fetch.sources.checksums import Declared


class ContentStore(Protocol):
    """The source's content on the volume, in the layout that is the source's own."""

    @property
    def blobs(self) -> Path:
        """The folder with finished blobs, named by `RemoteFile.blob`, and unfinished ones, `<blob>….incomplete`."""

    def has(self, file: RemoteFile) -> bool:
        """Whether a finished blob is there; not whether it is right."""

    def missing_bytes(self, files: Sequence[RemoteFile]) -> int:
        """What a download of `files` still has to write."""

    def download(self, files: Sequence[RemoteFile], *, moving: Callable[[], int]) -> dict[str, Path]:
        """Brings `files` into their final place; returns each blob by the file's path. `moving` grows with what is written."""

    def arrived(self, file: RemoteFile) -> str | None:
        """The sha256 of all that this process wrote of the file, taken while it did; None where it did not write all of it."""

    def expected(self, file: RemoteFile) -> RemoteFile:
        """The file with the checksum that its blob must have."""

    def download_again(self, file: RemoteFile) -> None:
        """Replaces a wrong blob by one rename: who has the old one open keeps it, and no moment is without one."""

    def forget(self, file: RemoteFile) -> None:
        """Makes sure that the next attempt downloads the file again."""

    def confirm(self) -> None:
        """Raises SourceChanged where the revision is not what it was. Asked last: nothing that changed during the download is published."""


class Source(Protocol):
    """One source as this Job's credentials see it."""

    workers: int  # files that are downloaded at once

    @property
    def title(self) -> str:
        """What stands in the manifest: a repository, or an address without credentials."""

    @property
    def folder(self) -> str:
        """The folder of the cache that the source's stores lie in."""

    @property
    def allow_patterns(self) -> Sequence[str]:
        """What the user wants of the listing, as fnmatch has it; empty: what vLLM needs."""

    @property
    def ignore_patterns(self) -> Sequence[str]:
        """What the user leaves out, whatever else matches."""

    def authorise(self) -> str:
        """The revision, once the source let the Job's own credentials see the content."""

    def collected(self, root: Path, reporter: Reporter) -> AbstractContextManager[None]:
        """Around all that follows: brings what has to be on the volume at `root` before the files are known, and tidies up."""

    def listing(self) -> Sequence[RemoteFile]:
        """Every file of that revision."""

    def prove_readable(self, files: Sequence[RemoteFile]) -> None:
        """The last word on whether these credentials may read the wanted files' content."""

    def open_store(self, root: Path) -> ContentStore:
        """Where the content lies on the volume that is mounted at `root`."""

    def stalled(self, seconds: float) -> ReasonError:
        """Why nothing has arrived for so long."""


class Patterned(Protocol):
    """A request that says which files are wanted."""

    @property
    def allow_patterns(self) -> Sequence[str]: ...

    @property
    def ignore_patterns(self) -> Sequence[str]: ...


class PlainSource:
    """What a source has in common with most others."""

    workers: int = 4

    def collected(self, root: Path, reporter: Reporter) -> AbstractContextManager[None]:
        return nullcontext()

    def declared_of(self, file: RemoteFile) -> Declared | None:
        return None


class FilteredSource(PlainSource):
    """One whose own request says which files are wanted."""

    request: Patterned

    @property
    def allow_patterns(self) -> Sequence[str]:
        return self.request.allow_patterns

    @property
    def ignore_patterns(self) -> Sequence[str]:
        return self.request.ignore_patterns


def open_source(request: FetchRequest) -> Source:
    """The source of a request; sends nothing. Libraries are imported only here, once the environment is prepared."""
    scheme = request.scheme
    fetcher = OFFLINE_FETCHER if request.offline and scheme.is_remote else scheme.fetcher
    module, _, name = fetcher.partition(":")
    found: Source = getattr(import_module(f"{__package__}.{module}"), name).open(request.source, request)
    found.workers = request.max_workers
    return found
