"""The S3 source: authorise, list, download. Imports boto3, so `environment.prepare` comes first.

Requests are signed with the keys of the Job's Secret, or with those of a role that they assume, or not at all: the client has no
provider of credentials that could find others. A revision is a hash of the listing. Every byte is read under the ETag that was
listed, and the listing is taken again at the end, so content is of one listing or it is not published.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import boto3
import botocore.session
from botocore import UNSIGNED
from botocore.config import Config
from botocore.credentials import CredentialProvider, CredentialResolver, create_credential_resolver
from botocore.exceptions import ClientError

from lora_operator.constants import Reason
from lora_operator.errors import ReasonError
from lora_operator.fetch import environment, text
from lora_operator.fetch.content.select import RemoteFile
from lora_operator.fetch.sources import ranges
from lora_operator.fetch.sources.base import FilteredSource, key_prefix
from lora_operator.fetch.sources.checksums import Declared
from lora_operator.fetch.sources.object_place import Place, blob_name
from lora_operator.fetch.sources.object_store import CHUNK, ObjectStore, revision_of, translated
from lora_operator.fetch.sources.s3.checksums import from_etag, from_head, from_parts, parts_of
from lora_operator.fetch.sources.s3.errors import Subject, changed, translate, unreachable
from lora_operator.fetch.sources.s3.roles import AssumedRole, Fixed
from lora_operator.wire.jobs import FetchRequest, S3Request

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client
    from types_boto3_s3.type_defs import GetObjectOutputTypeDef, HeadObjectOutputTypeDef

CONNECT_TIMEOUT_S: Final = 10
READ_TIMEOUT_S: Final = 30  # without a byte
_PROBES: Final = 16  # at once
_TRIES: Final = 3  # of one request, by the library; what breaks in mid-object is taken up again here
_MAX_LISTED: Final = 50_000
# By a token of the service account, and by the agent that EKS runs for that; not by instance metadata, which is the node's.
_IDENTITY_METHODS: Final = ("assume-role-with-web-identity", "container-role")
_STYLES: Final[Mapping[str | None, Literal["path", "virtual", "auto"]]] = {
    "Path": "path",
    "VirtualHost": "virtual",
    None: "auto",
}
_NO_SUMS: Final = (400, 403, 405, 416, 501)  # from services that don't know what was asked for


@dataclass(frozen=True)
class S3Keys:
    """What requests to S3 are signed with."""

    access_key_id: str
    secret_access_key: str = field(repr=False)
    session_token: str | None = field(default=None, repr=False)

    @classmethod
    def read(cls, request: FetchRequest) -> S3Keys | None:
        """The Job's keys, or None for anonymous access. Raises ReasonError where they were promised and are not usable."""
        values = environment.read_keys(request)
        return None if values is None else cls(*values.values())


@dataclass
class S3Source(FilteredSource):
    """One folder of one bucket as one set of credentials, or nobody, sees it."""

    request: S3Request
    client: S3Client
    subject: Subject
    revision: str = ""
    files: tuple[RemoteFile, ...] = ()
    declared: dict[str, Declared] = field(default_factory=dict)  # by path, of the files for which there is one

    @classmethod
    def open(cls, bucket: S3Request, job: FetchRequest) -> S3Source:
        """The bucket as the Job's keys, its service account or nobody sees it; sends nothing. Raises ReasonError for unusable keys."""
        keys = S3Keys.read(job)
        identity = job.workload_identity if keys is None else None
        if bucket.role is not None and keys is None and identity is None:
            raise ReasonError(Reason.UNAUTHORIZED, f"nobody may assume role {bucket.role.arn}: this Job has no keys")
        subject = Subject(bucket, authenticated=keys is not None, identity=identity)
        return cls(bucket, build_client(bucket, keys, subject), subject)

    @property
    def title(self) -> str:
        return self.subject.title

    @property
    def folder(self) -> str:
        return "s3"

    @property
    def prefix(self) -> str:
        """What every key begins with."""
        return key_prefix(self.request.prefix)

    def authorise(self) -> str:
        self.files = self.list_files()
        if not self.files:
            raise ReasonError(
                Reason.ENTRY_NOT_FOUND,
                f"{self.title} at {self.subject.endpoint} has no objects; correct source.s3.prefix",
            )
        self.revision = revision_of(self.files)
        return self.revision

    def listing(self) -> Sequence[RemoteFile]:
        return self.files

    def list_files(self) -> tuple[RemoteFile, ...]:
        """The objects below the prefix, without markers of folders, by the key's rest. Raises ReasonError."""
        found: dict[str, RemoteFile] = {}
        with translated(self):
            pages = self.client.get_paginator("list_objects_v2").paginate(
                Bucket=self.request.bucket, Prefix=self.prefix
            )
            for page in pages:
                if "Name" not in page:
                    raise unreachable(self.subject, "it does not answer like S3: its listing names no bucket")
                for entry in page.get("Contents", ()):
                    file = self._remote(entry.get("Key"), entry.get("ETag"), entry.get("Size"))
                    if file is not None:
                        found[file.path] = file
                if len(found) > _MAX_LISTED:
                    raise ReasonError(
                        Reason.JOB_FAILED,
                        f"{self.title} has more than {_MAX_LISTED} objects, more than this program lists; narrow the prefix",
                    )
        return tuple(found[path] for path in sorted(found))

    def _remote(self, key: object, etag: object, size: object) -> RemoteFile | None:
        if not (isinstance(key, str) and isinstance(etag, str) and isinstance(size, int)) or size < 0 or not etag:
            raise unreachable(self.subject, "its listing has no usable keys, ETags or sizes")
        if not key.startswith(self.prefix) or key.endswith("/"):
            return None
        return RemoteFile(path=key[len(self.prefix) :], size=size, version=etag, stored_as=blob_name(key, etag, size))

    def prove_readable(self, files: Sequence[RemoteFile]) -> None:
        """Reads one byte of every wanted object: rights are an object's own, and another Job may have put it into the cache."""
        with ThreadPoolExecutor(_PROBES, thread_name_prefix="authorise") as pool:
            futures = [pool.submit(self._probe, file) for file in files]
            try:
                for future in as_completed(futures):
                    path, declared = future.result()
                    if declared is not None:
                        self.declared[path] = declared
            finally:
                pool.shutdown(cancel_futures=True)

    def _probe(self, file: RemoteFile) -> tuple[str, Declared | None]:
        found: GetObjectOutputTypeDef | HeadObjectOutputTypeDef
        with translated(self):
            if file.size:
                found = self.read(file, "bytes=0-0")
                with closing(found["Body"]) as body:
                    body.read(1)
            else:
                found = self._head(file)
            server_side = str(found.get("ServerSideEncryption", ""))
            encrypted = bool(found.get("SSECustomerAlgorithm")) or server_side.startswith("aws:")
            return file.path, from_etag(file.version, encrypted=encrypted) or self._sums(file, encrypted=encrypted)

    def _sums(self, file: RemoteFile, *, encrypted: bool) -> Declared | None:
        """What is declared of an object whose ETag is no MD5."""
        try:
            head = self._head(file, ChecksumMode="ENABLED")
            whole = from_head(head)
            count = parts_of(file.version)
            if whole is not None or not count:
                return whole
            first, last = (self._head(file, PartNumber=n).get("ContentLength", 0) for n in (1, count))
        except ClientError as error:
            if int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)) not in _NO_SUMS:
                raise
            return None  # it can be read; what nobody declares can't be compared
        return from_parts(head, etag=file.version, size=file.size, first=first, last=last, encrypted=encrypted)

    def _head(self, file: RemoteFile, **more: Any) -> HeadObjectOutputTypeDef:
        where = {"Bucket": self.request.bucket, "Key": self.prefix + file.path, "IfMatch": file.version}
        return self.client.head_object(**where, **more)  # type: ignore[arg-type]

    def read(self, file: RemoteFile, range_: str = "") -> GetObjectOutputTypeDef:
        """The answer with the object's bytes, of the version that was listed."""
        where = {"Bucket": self.request.bucket, "Key": self.prefix + file.path, "IfMatch": file.version}
        answer = self.client.get_object(**where, **({"Range": range_} if range_ else {}))  # type: ignore[arg-type]
        if answer.get("ETag", "").strip('"') != file.version.strip('"'):  # not every service heeds If-Match
            raise changed(self.subject, f"{text.clean(file.path, limit=200)!r} has another ETag than was listed")
        if range_ and not answer.get("ContentRange", "").startswith(range_.replace("=", " ")):
            raise unreachable(self.subject, "it does not answer to a range with that range")
        return answer

    def confirm(self) -> None:
        """Raises SourceChanged where the listing is not what it was."""
        if revision_of(self.list_files()) != self.revision:
            raise changed(self.subject, "its listing is another one than at the beginning")

    @contextmanager
    def chunks(self, file: RemoteFile, start: int) -> Iterator[Iterator[bytes]]:
        requests = ranges.at_once(self.workers)
        if requests == 1 or file.size - start <= ranges.PART:
            with self._chunks(file, f"bytes={start}-" if start else "") as chunks:
                yield chunks
        else:

            def read(first: int, behind: int) -> AbstractContextManager[Iterator[bytes]]:
                return self._chunks(file, f"bytes={first}-{behind - 1}")

            with ranges.in_order(read, start, file.size, requests=requests) as chunks:
                yield chunks

    @contextmanager
    def _chunks(self, file: RemoteFile, range_: str) -> Iterator[Iterator[bytes]]:
        with closing(self.read(file, range_)["Body"]) as body:
            yield body.iter_chunks(CHUNK)

    def declared_of(self, file: RemoteFile) -> Declared | None:
        return self.declared.get(file.path)

    def translate(self, error: Exception) -> ReasonError:
        return translate(error, self.subject)

    def open_store(self, root: Path) -> ObjectStore:
        bucket = self.request.bucket
        place = Place.of(root, self.folder, name=bucket, identity=(self.request.endpoint or "aws", bucket))
        with translated(self):
            place.prepare()
        return ObjectStore(self, place, self.workers)

    def stalled(self, seconds: float) -> ReasonError:
        return unreachable(self.subject, f"nothing arrived for {seconds:.0f} s; what was downloaded is kept")


def build_client(request: S3Request, keys: S3Keys | None, subject: Subject) -> S3Client:
    """A client with these keys, or with those that the pod's service account is good for, or one that signs nothing; in the
    request's role, where it has one.

    Its resolver finds no others, wherever they may lie.
    """
    core = botocore.session.Session()
    region = request.region or "us-east-1"
    config = Config(
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=READ_TIMEOUT_S,
        retries={"mode": "standard", "total_max_attempts": _TRIES},
    )
    mine = _providers(core, keys, subject)
    if request.role is not None:
        mine = [AssumedRole(core, request.role, region, mine, config, subject)]
    core.register_component("credential_provider", CredentialResolver(providers=mine))
    own = Config(
        signature_version="s3v4" if mine else UNSIGNED,
        max_pool_connections=max(_PROBES, ranges.REQUESTS),
        s3={"addressing_style": _STYLES[request.addressing_style or ("Path" if request.endpoint else None)]},
    )
    return boto3.session.Session(botocore_session=core).client(
        "s3", region_name=region, endpoint_url=request.endpoint, config=config.merge(own)
    )


def _providers(core: botocore.session.Session, keys: S3Keys | None, subject: Subject) -> list[CredentialProvider]:
    if keys is not None:
        return [Fixed(keys.access_key_id, keys.secret_access_key, keys.session_token)]
    if subject.identity is None:
        return []
    return [one for one in create_credential_resolver(core).providers if one.METHOD in _IDENTITY_METHODS]
