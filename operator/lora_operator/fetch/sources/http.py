"""Files of HTTP servers as a source, or one tar or zip archive. Imports httpx2, so `environment.prepare` comes first.

A file is what has the sha256 that the source declares; so there is no listing that could change, and the revision is a hash of the
declarations. A blob's name holds its address, so nobody gets by a sum alone what another one's credentials brought.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from lora_operator.constants import Reason
from lora_operator.errors import ReasonError
from lora_operator.fetch import environment, text
from lora_operator.fetch.content.select import RemoteFile
from lora_operator.fetch.progress import Reporter
from lora_operator.fetch.sources import unpack
from lora_operator.fetch.sources.archives import Packed, PackedStore, collecting
from lora_operator.fetch.sources.base import FilteredSource, Source
from lora_operator.fetch.sources.http_client import Client, ServedFile, origin, shown, translate, unreachable
from lora_operator.fetch.sources.object_place import ObjectPlace, blob_name
from lora_operator.fetch.sources.object_store import ObjectStore, translated
from lora_operator.fetch.volume import layout
from lora_operator.wire.jobs import FetchRequest, HttpRequest

FOLDER: Final = "http"
_PROBES: Final = 8  # at once


def connect(request: HttpRequest, credentials: dict[str, str] | None) -> Client:
    """A client for this source; sends nothing."""
    urls = (request.url,) if request.url is not None else tuple(file.url for file in request.files)
    return Client.of(request.allowed_endpoints, urls, credentials)


@dataclass
class HttpSource(FilteredSource):
    """Files that the source declares one by one, each with its address and sha256."""

    request: HttpRequest
    client: Client
    found: dict[str, ServedFile] = field(default_factory=dict)  # by path

    @staticmethod
    def open(http: HttpRequest, job: FetchRequest) -> Source:
        """The files or the archive as the Job's credentials, or nobody, see them; sends nothing. Raises ReasonError for unusable ones."""
        client = connect(http, environment.read_keys(job))
        if http.url is None or http.sha256 is None:
            return HttpSource(http, client)
        unfit = Reason.INVALID_ADAPTER if job.type == "Adapter" else Reason.INCOMPLETE_MODEL
        return HttpArchive(http, job, client, http.url, http.sha256, unfit)

    @property
    def title(self) -> str:
        return self.request.files[0].url.partition("?")[0].rpartition("/")[0]

    @property
    def folder(self) -> str:
        return FOLDER

    @property
    def urls(self) -> dict[str, str]:
        """The address of each file by its path in the source."""
        return {file.path: file.url for file in self.request.files}

    def authorise(self) -> str:
        paths, urls = zip(*self.urls.items(), strict=True)
        with ThreadPoolExecutor(_PROBES, thread_name_prefix="authorise") as pool, translated(self):
            self.found = dict(zip(paths, pool.map(self.client.probe, urls), strict=True))
        total = hashlib.sha256()
        for file in sorted(self.request.files, key=lambda file: file.path):
            total.update(f"{file.path}\0{file.sha256}\0\n".encode())
        return total.hexdigest()

    def listing(self) -> Sequence[RemoteFile]:
        return [
            RemoteFile(
                path=file.path,
                size=self.found[file.path].size,
                sha256=file.sha256,
                stored_as=blob_name(file.url, file.sha256, self.found[file.path].size),
            )
            for file in self.request.files
        ]

    def prove_readable(self, files: Sequence[RemoteFile]) -> None:
        """`authorise` asked for a byte of every file."""

    def chunks(self, file: RemoteFile, start: int) -> AbstractContextManager[Iterator[bytes]]:
        return self.client.read(self.urls[file.path], start, self.found[file.path].etag)

    def translate(self, error: Exception) -> ReasonError:
        return translate(error, self.title)

    def confirm(self) -> None:
        """What has the declared sums can't be of another version."""

    def open_store(self, root: Path) -> ObjectStore:
        return ObjectStore.at(place_of(root, self.request.files[0].url), self, self.workers)

    def stalled(self, seconds: float) -> ReasonError:
        return unreachable(self.title, f"nothing arrived for {seconds:.0f} s; what was downloaded is kept")


@dataclass
class HttpArchive(FilteredSource):
    """One archive by its address."""

    request: HttpRequest
    job: FetchRequest
    client: Client
    url: str
    sha256: str
    unfit: Reason  # of an archive that can't be used
    found: ServedFile = field(default_factory=lambda: ServedFile(0, ""))
    files: tuple[RemoteFile, ...] = ()
    place: ObjectPlace = field(default_factory=lambda: ObjectPlace(Path()))
    packed: dict[str, tuple[Packed, str]] = field(default_factory=dict)  # by the path of a file: where it is packed

    @property
    def title(self) -> str:
        return self.url.partition("?")[0]

    @property
    def folder(self) -> str:
        return FOLDER

    def authorise(self) -> str:
        with translated(self):
            self.found = self.client.probe(self.url)
        return self.sha256

    @contextmanager
    def collected(self, root: Path, reporter: Reporter) -> Iterator[None]:
        size = self.found.size
        self._require_small(size)
        layout.prepare(root, self.folder)
        self.place = place_of(root, self.url)
        with translated(self):
            self.place.prepare()
        archive = RemoteFile(self.title, size, sha256=self.sha256, stored_as=blob_name(self.url, self.sha256, size))
        limits = self.job.limits
        packed = Packed(self, self.place, archive, key=self.url, limit=self.request.max_bytes, root=root, limits=limits)
        with collecting(self.job, self.place, [packed]):
            names = packed.names(reporter)
            self._require_small(sum(names.values()))
            self.files = tuple(packed.member(name, size) for name, size in sorted(names.items()))
            self.packed = {file.path: (packed, file.path) for file in self.files}
            yield

    def listing(self) -> Sequence[RemoteFile]:
        return self.files

    def prove_readable(self, files: Sequence[RemoteFile]) -> None:
        """`authorise` asked for a byte of the archive."""

    def open_store(self, root: Path) -> PackedStore:
        return PackedStore(ObjectStore(self, self.place, self.workers), self.packed)

    def stalled(self, seconds: float) -> ReasonError:
        return unreachable(self.url, f"nothing arrived for {seconds:.0f} s; what was downloaded is kept")

    def chunks(self, file: RemoteFile, start: int) -> AbstractContextManager[Iterator[bytes]]:
        return self.client.read(self.url, start, self.found.etag)

    def translate(self, error: Exception) -> ReasonError:
        if isinstance(error, unpack.UnfitError):
            return ReasonError(self.unfit, text.clean(f"{shown(self.url)} {error}"))
        return translate(error, self.title)

    def confirm(self) -> None:
        """What has the declared sum can't be of another version."""

    def _require_small(self, size: int) -> None:
        if size > self.request.max_bytes:
            raise ReasonError(
                self.unfit,
                f"{shown(self.url)} has {text.size(size)}, more than the {text.size(self.request.max_bytes)} of maxSize; raise it if "
                "that is right",
            )


def place_of(root: Path, url: str) -> ObjectPlace:
    """Where content of the address's server lies."""
    home = origin(url)
    return ObjectPlace.of(root, FOLDER, name=home.partition("://")[2], identity=(home,))
