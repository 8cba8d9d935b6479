"""Google Cloud Storage and Azure Blob Storage as sources, by obstore; so `environment.prepare` comes first: it reads settings from there.

Requests are signed with the keys of the Job's Secret, or not at all: the signature is skipped, and no metadata service is asked. As for
S3 a revision is a hash of the listing, every byte is read under the ETag that was listed, each wanted object is proved readable with
these credentials, and the listing is taken again at the end.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import httpx2
import obstore
from obstore import exceptions
from obstore.store import AzureStore, GCSStore

from lora_operator.constants import Reason
from lora_operator.errors import ReasonError
from lora_operator.fetch import environment, text
from lora_operator.fetch.content.select import RemoteFile
from lora_operator.fetch.sources import bucket_checksums
from lora_operator.fetch.sources.base import FilteredSource, key_prefix
from lora_operator.fetch.sources.checksums import Declared
from lora_operator.fetch.sources.http_client import new_transport
from lora_operator.fetch.sources.object_place import Place, blob_name
from lora_operator.fetch.sources.object_store import CHUNK, ObjectStore, revision_of, translated
from lora_operator.fetch.volume import layout
from lora_operator.wire.jobs import AzureRequest, FetchRequest, GcsRequest

if TYPE_CHECKING:
    from obstore import GetOptions
    from obstore.store import AzureConfig, ClientConfig, GCSConfig, RetryConfig

GOOGLE: Final = "https://storage.googleapis.com"
_PROBES: Final = 8  # at once
_MAX_LISTED: Final = 50_000
_STATUS: Final = re.compile(r"status code: (\d{3})\b")
# What a key file may say beside these (another address, no signatures) is not for a tenant to say.
_KEY_FIELDS: Final = ("type", "project_id", "client_email", "private_key", "private_key_id")


@dataclass
class BucketSource(FilteredSource):
    """One folder of one bucket or container as one set of credentials, or nobody, sees it."""

    scheme: str
    title_: str
    endpoint: str
    bucket: str
    request: GcsRequest | AzureRequest
    client: GCSStore | AzureStore
    authenticated: bool
    address: Callable[[str], str]  # where a HEAD of a key is asked for, signed
    transport: httpx2.Client = field(default_factory=new_transport)
    files: tuple[RemoteFile, ...] = ()
    declared: dict[str, Declared] = field(default_factory=dict)  # by path, of the files for which there is one

    @property
    def title(self) -> str:
        return self.title_

    @property
    def folder(self) -> str:
        return self.scheme

    @property
    def prefix(self) -> str:
        """What every key begins with."""
        return key_prefix(self.request.prefix)

    def authorise(self) -> str:
        self.files = self.list_files()
        if not self.files:
            raise ReasonError(
                Reason.ENTRY_NOT_FOUND,
                f"{self.title} at {self.endpoint} has no objects; correct source.{self.scheme}.prefix",
            )
        return revision_of(self.files)

    def list_files(self) -> tuple[RemoteFile, ...]:
        """The objects below the prefix, without markers of folders. Raises ReasonError."""
        found: dict[str, RemoteFile] = {}
        try:
            for page in obstore.list(self.client, self.prefix or None, chunk_size=1000):
                for entry in page:
                    path, size, etag = entry["path"], entry["size"], entry.get("e_tag")
                    if not etag:
                        raise self._unreachable("its listing has no ETags")
                    if path.startswith(self.prefix) and not path.endswith("/"):
                        name = path[len(self.prefix) :]
                        found[name] = RemoteFile(name, size, version=etag, stored_as=blob_name(path, etag, size))
                if len(found) > _MAX_LISTED:
                    raise ReasonError(
                        Reason.JOB_FAILED,
                        f"{self.title} has more than {_MAX_LISTED} objects, more than this program lists; narrow the prefix",
                    )
        except Exception as error:
            if isinstance(error, FileNotFoundError) or _status_of(error) == 404:
                raise ReasonError(
                    Reason.REPOSITORY_NOT_FOUND,
                    f"{self.bucket} does not exist at {self.endpoint}; correct source.{self.scheme}",
                ) from error
            raise self.translate(error) from error
        return tuple(found[name] for name in sorted(found))

    def listing(self) -> Sequence[RemoteFile]:
        return self.files

    def prove_readable(self, files: Sequence[RemoteFile]) -> None:
        """Reads a byte of every wanted object: another Job may have put it into the cache."""
        with ThreadPoolExecutor(_PROBES, thread_name_prefix="authorise") as pool:
            for file, declared in zip(files, pool.map(self._probe, files), strict=True):
                if declared is not None:
                    self.declared[file.path] = declared

    def _probe(self, file: RemoteFile) -> Declared | None:
        with translated(self):
            if file.size:
                self._get(file, {"range": (0, 1)}).bytes()
            else:
                self._get(file, {"head": True})
            return bucket_checksums.ask(self.transport, self.address(self.prefix + file.path), etag=file.version)

    @contextmanager
    def chunks(self, file: RemoteFile, start: int) -> Iterator[Iterator[bytes]]:
        if start >= file.size:
            yield iter(())
            return
        found = self._get(file, {"range": {"offset": start}} if start else {})
        yield (bytes(chunk) for chunk in found.stream(min_chunk_size=CHUNK))

    def _get(self, file: RemoteFile, options: GetOptions) -> obstore.GetResult:
        found = obstore.get(self.client, self.prefix + file.path, options={"if_match": file.version, **options})
        etag = found.meta.get("e_tag")
        if etag is not None and etag.strip('"') != file.version.strip('"'):  # not every service heeds If-Match
            raise self._changed(f"{text.clean(file.path, limit=200)!r} has another ETag than was listed")
        return found

    def declared_of(self, file: RemoteFile) -> Declared | None:
        return self.declared.get(file.path)

    def confirm(self) -> None:
        if revision_of(self.list_files()) != revision_of(self.files):
            raise self._changed("its listing is another one than at the beginning")

    def open_store(self, root: Path) -> ObjectStore:
        place = Place.of(root, self.scheme, name=self.bucket, identity=(self.endpoint, self.bucket))
        with translated(self):
            place.prepare()
        return ObjectStore(self, place, self.workers)

    def stalled(self, seconds: float) -> ReasonError:
        return self._unreachable(f"nothing arrived for {seconds:.0f} s; what was downloaded is kept")

    def translate(self, error: Exception) -> ReasonError:
        match error:
            case ReasonError():
                return error
            case exceptions.PermissionDeniedError() | exceptions.UnauthenticatedError():
                return ReasonError(Reason.UNAUTHORIZED, self._refused())
            case exceptions.PreconditionError() | bucket_checksums.ChangedError():
                return self._changed("an object is not the one that was listed")
            case FileNotFoundError() if error.errno is None:
                return self._changed("an object that was listed is gone")
            case exceptions.BaseError():
                return self._from_status(_status_of(error), error)
            case httpx2.HTTPError() | bucket_checksums.NoAnswerError():
                return self._unreachable(f"{type(error).__name__}: {error}")
            case OSError():
                return layout.from_system(error) or self._unreachable(f"{type(error).__name__}: {error}")
        return ReasonError(Reason.JOB_FAILED, text.clean(f"{type(error).__name__}: {error}"))

    def _from_status(self, status: int | None, error: Exception) -> ReasonError:
        if status in (401, 403):
            return ReasonError(Reason.UNAUTHORIZED, self._refused())
        if status == 429:
            return ReasonError(Reason.RATE_LIMITED, f"{self.endpoint} asks for fewer requests (429)")
        return self._unreachable(str(error))

    def _refused(self) -> str:
        if self.authenticated:
            return (
                f"{self.title} at {self.endpoint} is denied to the credentials of the Secret; put valid ones into it, allow them to list "
                "and to read, or correct the source"
            )
        return (
            f"{self.title} at {self.endpoint} can't be read anonymously; set source.{self.scheme}.credentialsSecretRef, or correct the "
            "source"
        )

    def _unreachable(self, why: str) -> ReasonError:
        return ReasonError(Reason.SOURCE_UNREACHABLE, text.clean(f"{self.endpoint}: {why}"))

    def _changed(self, what: str) -> ReasonError:
        return ReasonError(
            Reason.SOURCE_CHANGED,
            text.clean(
                f"{self.title} changed during the download: {what}; nothing was published, the next attempt takes what is there then; "
                "write each version to a prefix of its own"
            ),
        )


class GcsSource:
    """A bucket of Google Cloud Storage."""

    @staticmethod
    def open(gcs: GcsRequest, job: FetchRequest) -> BucketSource:
        """The bucket as the Job's key, or nobody, sees it; sends nothing. Raises ReasonError for an unusable key."""
        keys = environment.read_keys(job)
        endpoint = gcs.endpoint or GOOGLE
        config: GCSConfig = {"base_url": endpoint}
        if keys is None:
            config["skip_signature"] = True
        else:
            config["service_account_key"] = _key_alone(keys["key.json"])
        try:
            client = GCSStore(gcs.bucket, config=config, **_transport(job, endpoint))
        except (exceptions.BaseError, ValueError) as error:
            raise _unusable(error) from error
        title = f"gs://{gcs.bucket}/{gcs.prefix}".rstrip("/")
        address = (
            bucket_checksums.plain(f"{endpoint}/{gcs.bucket}") if keys is None else bucket_checksums.signed(client)
        )
        return BucketSource("gcs", title, endpoint, gcs.bucket, gcs, client, keys is not None, address)


class AzureSource:
    """A container of Azure Blob Storage."""

    @staticmethod
    def open(azure: AzureRequest, job: FetchRequest) -> BucketSource:
        """The container as the Job's key or signature, or nobody, sees it; sends nothing. Raises ReasonError for an unusable key."""
        keys = environment.read_keys(job)
        endpoint = azure.endpoint or f"https://{azure.account}.blob.core.windows.net"
        config: AzureConfig = {"account_name": azure.account, "endpoint": endpoint}
        if keys is None:
            config["skip_signature"] = True
        elif "AZURE_STORAGE_ACCOUNT_KEY" in keys:
            config["account_key"] = keys["AZURE_STORAGE_ACCOUNT_KEY"]
        else:
            config["sas_key"] = keys["AZURE_STORAGE_SAS_TOKEN"].removeprefix("?")
        try:
            client = AzureStore(azure.container, config=config, **_transport(job, endpoint))
            query = config.get("sas_key", "")
            if "account_key" in config:
                query = bucket_checksums.shared_access(azure.account, config["account_key"], azure.container)
        except (exceptions.BaseError, ValueError) as error:
            raise _unusable(error) from error
        title = f"azure://{azure.account}/{azure.container}/{azure.prefix}".rstrip("/")
        bucket = f"{azure.account}/{azure.container}"
        address = bucket_checksums.plain(f"{endpoint}/{azure.container}", query=query)
        return BucketSource("azure", title, endpoint, bucket, azure, client, keys is not None, address)


def _status_of(error: Exception) -> int | None:
    """The status of an answer that obstore has no exception for: those of listings. It stands in the library's own words alone."""
    match = _STATUS.search(str(error)) if isinstance(error, exceptions.BaseError) else None
    return int(match[1]) if match else None


def _transport(request: FetchRequest, endpoint: str) -> dict[str, Any]:
    """Proxies are the environment's; it looks for authorities of a cache's own nowhere by itself."""
    options: ClientConfig = {
        "connect_timeout": timedelta(seconds=10),
        "read_timeout": timedelta(seconds=30),  # without a byte
        "timeout": timedelta(days=7),  # of a whole object
        "allow_http": endpoint.startswith("http://"),
    }
    if request.ca_bundle is not None:
        options["root_certificate"] = Path(request.ca_bundle).read_bytes()
    retries: RetryConfig = {"max_retries": 2, "retry_timeout": timedelta(seconds=60)}
    return {"client_options": options, "retry_config": retries}


def _key_alone(document: str) -> str:
    """The service account's key, without whatever else its file says. Raises ReasonError."""
    try:
        key = json.loads(document)
        kept = {name: key[name] for name in _KEY_FIELDS if name in key}
        text.protect(kept["private_key"])
        if not all(isinstance(value, str) for value in kept.values()) or "client_email" not in kept:
            raise TypeError("fields of a service account's key are missing")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unusable(error) from error
    return json.dumps(kept)


def _unusable(error: Exception) -> ReasonError:
    return ReasonError(
        Reason.UNAUTHORIZED, f"the Secret's credentials can't be used ({type(error).__name__}); put valid ones into it"
    )
