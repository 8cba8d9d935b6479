"""The S3 source: authorise, list, download. Imports boto3, so `environment.prepare` comes first.

Requests are signed with the keys of the Job's Secret, or with those of a role that they assume, or not at all: the client has no
provider of credentials that could find others. A revision is a hash of the listing. Every byte is read under the ETag that was
listed, and the listing is taken again at the end, so content is of one listing or it is not published.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
from lora_operator.fetch.sources.checksums import Declared
from lora_operator.fetch.sources.listed import ListedBucket
from lora_operator.fetch.sources.object_place import ObjectPlace
from lora_operator.fetch.sources.object_store import CHUNK, ObjectStore, translated
from lora_operator.fetch.sources.s3.checksums import from_etag, from_head, from_parts, parts_of
from lora_operator.fetch.sources.s3.errors import S3Subject, changed, translate
from lora_operator.fetch.sources.s3.roles import AssumedRole, Fixed
from lora_operator.wire.jobs import FetchRequest, S3Request

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client
    from types_boto3_s3.type_defs import GetObjectOutputTypeDef, HeadObjectOutputTypeDef

CONNECT_TIMEOUT_S: Final = 10
READ_TIMEOUT_S: Final = 30  # without a byte
_PROBES: Final = 16  # at once
_TRIES: Final = 3  # of one request, by the library; what breaks in mid-object is taken up again here
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
class S3Source(ListedBucket):
    """One folder of one bucket as one set of credentials, or nobody, sees it."""

    request: S3Request
    client: S3Client
    subject: S3Subject
    files: tuple[RemoteFile, ...] = ()
    declared: dict[str, Declared] = field(default_factory=dict)
    probes: int = _PROBES

    @classmethod
    def open(cls, bucket: S3Request, job: FetchRequest) -> S3Source:
        """The bucket as the Job's keys, its service account or nobody sees it; sends nothing. Raises ReasonError for unusable keys."""
        keys = S3Keys.read(job)
        identity = job.workload_identity if keys is None else None
        if bucket.role is not None and keys is None and identity is None:
            raise ReasonError(Reason.UNAUTHORIZED, f"nobody may assume role {bucket.role.arn}: this Job has no keys")
        subject = S3Subject.of(bucket, authenticated=keys is not None, identity=identity)
        return cls(bucket, build_client(bucket, keys, subject), subject)

    def objects(self) -> Iterator[tuple[str, str, int]]:
        with translated(self):
            pages = self.client.get_paginator("list_objects_v2").paginate(
                Bucket=self.request.bucket, Prefix=self.prefix
            )
            for page in pages:
                if "Name" not in page:
                    raise self.subject.unreachable("it does not answer like S3: its listing names no bucket")
                for entry in page.get("Contents", ()):
                    key, etag, size = entry.get("Key"), entry.get("ETag"), entry.get("Size")
                    if (
                        not (isinstance(key, str) and isinstance(etag, str) and isinstance(size, int))
                        or size < 0
                        or not etag
                    ):
                        raise self.subject.unreachable("its listing has no usable keys, ETags or sizes")
                    yield key, etag, size

    def probe(self, file: RemoteFile) -> Declared | None:
        found: GetObjectOutputTypeDef | HeadObjectOutputTypeDef
        if file.size:
            found = self.read(file, "bytes=0-0")
            with closing(found["Body"]) as body:
                body.read(1)
        else:
            found = self._head(file)
        server_side = str(found.get("ServerSideEncryption", ""))
        encrypted = bool(found.get("SSECustomerAlgorithm")) or server_side.startswith("aws:")
        return from_etag(file.version, encrypted=encrypted) or self._sums(file, encrypted=encrypted)

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
            raise self.changed(f"{text.clean(file.path, limit=200)!r} has another ETag than was listed")
        if range_ and not answer.get("ContentRange", "").startswith(range_.replace("=", " ")):
            raise self.subject.unreachable("it does not answer to a range with that range")
        return answer

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

    def translate(self, error: Exception) -> ReasonError:
        return translate(error, self.subject)

    def changed(self, what: str) -> ReasonError:
        return changed(self.subject, what)

    def open_store(self, root: Path) -> ObjectStore:
        bucket = self.request.bucket
        place = ObjectPlace.of(root, self.folder, name=bucket, identity=(self.request.endpoint or "aws", bucket))
        return ObjectStore.at(place, self, self.workers)


def build_client(request: S3Request, keys: S3Keys | None, subject: S3Subject) -> S3Client:
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


def _providers(core: botocore.session.Session, keys: S3Keys | None, subject: S3Subject) -> list[CredentialProvider]:
    if keys is not None:
        return [Fixed(keys.access_key_id, keys.secret_access_key, keys.session_token)]
    if subject.identity is None:
        return []
    return [one for one in create_credential_resolver(core).providers if one.METHOD in _IDENTITY_METHODS]
