"""Sources that are listed: a revision is a hash of the listing, which is taken again at the end and compared.

So content is of one listing or it is not published: a source without versions can change at any moment, also file by file.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

from lora_operator.constants import Reason
from lora_operator.errors import ReasonError
from lora_operator.fetch.content.select import MAX_LISTED, RemoteFile
from lora_operator.fetch.sources.base import FilteredSource
from lora_operator.fetch.sources.checksums import Declared
from lora_operator.fetch.sources.errors import Subject
from lora_operator.fetch.sources.object_place import blob_name
from lora_operator.fetch.sources.object_store import revision_of
from lora_operator.wire.jobs import AzureRequest, GcsRequest, S3Request


class ListedSource(FilteredSource):
    """One that has no names for its versions."""

    files: tuple[RemoteFile, ...]

    def authorise(self) -> str:
        self.files = self.list_files()
        return revision_of(self.files)

    def listing(self) -> Sequence[RemoteFile]:
        return self.files

    def confirm(self) -> None:
        if revision_of(self.list_files()) != revision_of(self.files):
            raise self.changed("its listing is another one than at the beginning")

    @abstractmethod
    def list_files(self) -> tuple[RemoteFile, ...]:
        """Every file that there is now, sorted by path. Raises ReasonError."""

    @abstractmethod
    def changed(self, what: str) -> ReasonError:
        """SourceChanged, with advice on how to replace content of this kind."""


class ListedBucket(ListedSource):
    """A folder of a bucket or container: the keys below a prefix, each with a size and an ETag."""

    request: S3Request | GcsRequest | AzureRequest
    subject: Subject
    probes: int  # requests at once that prove objects readable
    declared: dict[str, Declared]  # by path, of the files for which there is one

    @property
    def title(self) -> str:
        return self.subject.title

    @property
    def folder(self) -> str:
        return self.request.kind

    @property
    def prefix(self) -> str:
        """What every key begins with: empty, or ending in a slash."""
        plain = self.request.prefix.strip("/")
        return f"{plain}/" if plain else ""

    def authorise(self) -> str:
        revision = super().authorise()
        if not self.files:
            raise ReasonError(
                Reason.ENTRY_NOT_FOUND,
                f"{self.title} at {self.subject.endpoint} has no objects; correct source.{self.folder}.prefix",
            )
        return revision

    def list_files(self) -> tuple[RemoteFile, ...]:
        found: dict[str, RemoteFile] = {}
        for key, etag, size in self.objects():
            if key.startswith(self.prefix) and not key.endswith("/"):  # a marker of a folder has no content
                path = key[len(self.prefix) :]
                found[path] = RemoteFile(path, size, version=etag, stored_as=blob_name(key, etag, size))
            if len(found) > MAX_LISTED:
                raise ReasonError(
                    Reason.JOB_FAILED,
                    f"{self.title} has more than {MAX_LISTED} objects, more than this program lists; narrow the prefix",
                )
        return tuple(found[path] for path in sorted(found))

    @abstractmethod
    def objects(self) -> Iterable[tuple[str, str, int]]:
        """Key, ETag and size of every object below the prefix. Raises ReasonError."""

    def prove_readable(self, files: Sequence[RemoteFile]) -> None:
        """Reads one byte of every wanted object: rights are an object's own, and another Job may have put it into the cache."""
        with ThreadPoolExecutor(self.probes, thread_name_prefix="authorise") as pool:
            futures = {pool.submit(self._probe, file): file for file in files}
            try:
                for future in as_completed(futures):
                    if (declared := future.result()) is not None:
                        self.declared[futures[future].path] = declared
            finally:
                pool.shutdown(cancel_futures=True)

    def _probe(self, file: RemoteFile) -> Declared | None:
        try:
            return self.probe(file)
        except Exception as error:
            raise self.translate(error) from error

    @abstractmethod
    def probe(self, file: RemoteFile) -> Declared | None:
        """Reads a byte of the object; returns the checksum that the service declares of it. Raises whatever the library does."""

    @abstractmethod
    def translate(self, error: Exception) -> ReasonError:
        """The reason behind an error of the library or of the volume."""

    def declared_of(self, file: RemoteFile) -> Declared | None:
        return self.declared.get(file.path)

    def stalled(self, seconds: float) -> ReasonError:
        return self.subject.unreachable(f"nothing arrived for {seconds:.0f} s; what was downloaded is kept")
