"""Files of HTTP servers as a source; an archive is `http_archive`'s. Imports httpx2, so `environment.prepare` comes first.

A file is what has the sha256 that the source declares; so there is no listing that could change, and the revision is a hash of the
declarations. A payload's name holds its address, so nobody gets by a sum alone what another one's credentials brought.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from lora_operator.errors import ReasonError
from lora_operator.fetch import environment
from lora_operator.fetch.content.select import RemoteFile
from lora_operator.fetch.sources.base import FilteredSource, Source
from lora_operator.fetch.sources.http_client import Client, Found, origin, translate, unreachable
from lora_operator.fetch.sources.object_place import Place, blob_name
from lora_operator.fetch.sources.object_store import ObjectStore, translated
from lora_operator.manifest import FetchRequest, HttpRequest

FOLDER: Final = "http"
_PROBES: Final = 8  # at once


def connect(request: HttpRequest, credentials: dict[str, str] | None) -> Client:
    """A client for this source; sends nothing."""
    urls = (request.url,) if request.url is not None else tuple(file.url for file in request.files)
    return Client.of(request.allowed_endpoints, urls, credentials)


@dataclass
class HttpSource(FilteredSource):
    """Files by their addresses."""

    request: HttpRequest
    client: Client
    found: dict[str, Found] = field(default_factory=dict)  # by path

    @staticmethod
    def open(request: FetchRequest) -> Source:
        """The request's files or archive, with the Job's credentials."""
        assert request.http is not None  # noqa: S101  a narrowing for the type checker
        client = connect(request.http, environment.read_keys(request))
        if request.http.url is None:
            return HttpSource(request.http, client)
        from lora_operator.fetch.sources.http_archive import HttpArchive

        return HttpArchive.of(request, client)

    @property
    def title(self) -> str:
        return self.request.files[0].url.partition("?")[0].rpartition("/")[0]

    @property
    def folder(self) -> str:
        return FOLDER

    @property
    def urls(self) -> dict[str, str]:
        """Addresses by path."""
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
        place = place_of(root, self.request.files[0].url)
        with translated(self):
            place.prepare()
        return ObjectStore(self, place, self.workers)

    def stalled(self, seconds: float) -> ReasonError:
        return unreachable(self.title, f"nothing arrived for {seconds:.0f} s; what was downloaded is kept")


def place_of(root: Path, url: str) -> Place:
    """Where content of the address's server lies."""
    home = origin(url)
    return Place.of(root, FOLDER, name=home.partition("://")[2], identity=(home,))
