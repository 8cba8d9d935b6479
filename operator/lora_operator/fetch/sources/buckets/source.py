"""Google Cloud Storage and Azure Blob Storage as sources, by obstore; so `environment.prepare` comes first: it reads settings from there.

Requests are signed with the keys of the Job's Secret, or not at all: the signature is skipped, and no metadata service is asked. As for
S3 a revision is a hash of the listing, every byte is read under the ETag that was listed, each wanted object is proved readable with
these credentials, and the listing is taken again at the end.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
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
from lora_operator.fetch.sources.buckets import checksums as bucket_checksums
from lora_operator.fetch.sources.buckets.errors import BucketSubject, translate, translate_listing
from lora_operator.fetch.sources.checksums import Declared
from lora_operator.fetch.sources.http_client import new_transport
from lora_operator.fetch.sources.listed import ListedBucket
from lora_operator.fetch.sources.object_place import ObjectPlace
from lora_operator.fetch.sources.object_store import CHUNK, ObjectStore
from lora_operator.wire.jobs import AzureRequest, FetchRequest, GcsRequest

if TYPE_CHECKING:
    from obstore import GetOptions
    from obstore.store import AzureConfig, ClientConfig, GCSConfig, RetryConfig

GOOGLE: Final = "https://storage.googleapis.com"
# What a key file may say beside these (another address, no signatures) is not for a tenant to say.
_KEY_FIELDS: Final = ("type", "project_id", "client_email", "private_key", "private_key_id")


@dataclass
class BucketSource(ListedBucket):
    """One folder of one bucket or container as one set of credentials, or nobody, sees it."""

    request: GcsRequest | AzureRequest
    client: GCSStore | AzureStore
    subject: BucketSubject
    address: Callable[[str], str]  # where a HEAD of a key is asked for, signed
    transport: httpx2.Client = field(default_factory=new_transport)
    files: tuple[RemoteFile, ...] = ()
    declared: dict[str, Declared] = field(default_factory=dict)
    probes: int = 8

    def objects(self) -> Iterator[tuple[str, str, int]]:
        try:
            for page in obstore.list(self.client, self.prefix or None, chunk_size=1000):
                for entry in page:
                    etag = entry.get("e_tag")
                    if not etag:
                        raise self.subject.unreachable("its listing has no ETags")
                    yield entry["path"], etag, entry["size"]
        except Exception as error:
            raise translate_listing(error, self.subject) from error

    def probe(self, file: RemoteFile) -> Declared | None:
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
            raise self.changed(f"{text.clean(file.path, limit=200)!r} has another ETag than was listed")
        return found

    def open_store(self, root: Path) -> ObjectStore:
        bucket = self.subject.bucket
        place = ObjectPlace.of(root, self.folder, name=bucket, identity=(self.subject.endpoint, bucket))
        return ObjectStore.at(place, self, self.workers)

    def translate(self, error: Exception) -> ReasonError:
        return translate(error, self.subject)

    def changed(self, what: str) -> ReasonError:
        return self.subject.moved(what)


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
        subject = BucketSubject(title, endpoint, keys is not None, gcs.kind, gcs.bucket)
        return BucketSource(gcs, client, subject, address)


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
        subject = BucketSubject(title, endpoint, keys is not None, azure.kind, bucket)
        return BucketSource(azure, client, subject, address)


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
