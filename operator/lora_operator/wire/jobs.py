"""What the operator and its Jobs send each other, and what a Job writes beside the files it publishes.

FetchRequest goes into the Job's environment (FETCH_REQUEST_ENV), FetchProgress lines come from its log, FetchResult from its
termination message (at most 3 KiB), and Manifest is published inside the snapshot directory.
"""

from __future__ import annotations

import hashlib
import re
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from lora_operator.constants import Reason
from lora_operator.source_kinds import BY_MEMBER, Scheme

FETCH_REQUEST_ENV: Final = "LORA_OPERATOR_FETCH"
TERMINATION_LOG_ENV: Final = "LORA_OPERATOR_TERMINATION_LOG"
TERMINATION_LOG_DEFAULT: Final = "/dev/termination-log"
TERMINATION_LOG_BYTES: Final = 3072
EVICT_REQUEST_ENV: Final = "LORA_OPERATOR_EVICT"
KEEP_BYTES: Final = 8
MANIFEST_FILE: Final = ".lora-operator.json"
_VIEW: Final = re.compile(r"artifacts/([A-Za-z0-9][A-Za-z0-9._-]*)")


ContentType = Literal["Adapter", "BaseModel", "Tokenizer"]


class _Wire(BaseModel):
    model_config = ConfigDict(frozen=True, alias_generator=to_camel, populate_by_name=True, extra="ignore")


class _SourceRequest(_Wire):
    """Which files of a source are wanted. Each kind's `kind` is its member of `source` in the manifest."""

    allow_patterns: tuple[str, ...] = ()
    ignore_patterns: tuple[str, ...] = ()


class HuggingFaceRequest(_SourceRequest):
    """One repository of a Hugging Face-compatible Hub at a requested revision."""

    kind: Literal["huggingFace"] = "huggingFace"
    repo: str
    revision: str = "main"
    endpoint: str = "https://huggingface.co"


class RoleRequest(_Wire):
    """A role that is assumed before anything is read; without an endpoint at AWS's STS of the region."""

    arn: str
    external_id: str | None = None
    session_name: str
    sts_endpoint: str | None = None


class S3Request(_SourceRequest):
    """A folder of a bucket; without an endpoint on AWS."""

    kind: Literal["s3"] = "s3"
    bucket: str
    prefix: str = ""
    endpoint: str | None = None
    region: str | None = None
    addressing_style: Literal["Path", "VirtualHost"] | None = None
    role: RoleRequest | None = None


class HttpFileRequest(_Wire):
    """One file on an HTTP server."""

    path: str
    url: str
    sha256: str


class HttpRequest(_SourceRequest):
    """Files, or an archive where there is a `url`."""

    kind: Literal["http"] = "http"
    url: str | None = None
    sha256: str | None = None
    max_bytes: int = 0  # of the archive, and of what is in it
    files: tuple[HttpFileRequest, ...] = ()
    allowed_endpoints: tuple[str, ...] = ()  # where servers may redirect to


class ClaimRequest(_SourceRequest):
    """A folder of another claim, which is mounted at `mount`."""

    kind: Literal["persistentVolumeClaim"] = "persistentVolumeClaim"
    claim_name: str
    claim_namespace: str = ""
    claim_uid: str = (
        ""  # what tells it from another one of its name; empty where it did not exist when the Job was made
    )
    path: str = ""
    mount: str


class LocalRequest(_SourceRequest):
    """A folder of the cache's own volume."""

    kind: Literal["local"] = "local"
    path: str


class GcsRequest(_SourceRequest):
    """A folder of a bucket; without an endpoint on Google Cloud Storage."""

    kind: Literal["gcs"] = "gcs"
    bucket: str
    prefix: str = ""
    endpoint: str | None = None


class AzureRequest(_SourceRequest):
    """A folder of a container of an account; without an endpoint on Azure."""

    kind: Literal["azure"] = "azure"
    account: str
    container: str
    prefix: str = ""
    endpoint: str | None = None


class OciRequest(_SourceRequest):
    """An artifact or image of a registry."""

    kind: Literal["oci"] = "oci"
    reference: str
    max_bytes: int  # that archives among its layers may hold
    allowed_endpoints: tuple[str, ...] = ()  # the registry, and where it may send us


SourceRequest = (
    HuggingFaceRequest | S3Request | HttpRequest | ClaimRequest | LocalRequest | GcsRequest | AzureRequest | OciRequest
)


class VolumeLimits(_Wire):
    """What the cache allows a Job, in bytes; None: no bound."""

    max_artifact_bytes: int | None = None
    capacity_bytes: int | None = None  # of all content on the volume
    min_free_bytes: int = 0
    holder: str = ""  # the name of its Job's reservation on the volume
    hint_bytes: int = 0  # how big the content is at least, by who wants it


class VolumeState(_Wire):
    """The volume at a Job's end."""

    total_bytes: int
    free_bytes: int
    used_bytes: int  # by content of sources, finished or not


class FetchRequest(_Wire):
    """What a download Job is asked to do, with its one source; nothing in it is secret (that lies in files of `credentials`)."""

    artifact: str
    type: ContentType
    source: Annotated[SourceRequest, Field(discriminator="kind")]
    path: str = ""
    cache_root: str
    credentials: str | None = None  # a folder with one file per key; None for anonymous access
    offline: bool = False  # nothing is asked: what is on the volume is used
    workload_identity: str | None = None  # the service account, where its identity may be used
    ca_bundle: str | None = None  # a file with further authorities
    load_format: str = "auto"  # which weights of a base model
    trust_remote_code: bool = False  # whether Python files are wanted
    pickled_weights: bool = False  # whether an adapter's may be taken, once scanned
    without_tokenizer: bool = False  # whether a base model is complete without one
    limits: VolumeLimits = VolumeLimits()
    owner: str | None = None  # UID of the claim
    max_workers: int = 4
    base_model_path: str | None = None  # relative to cache_root: the base model's published snapshot, for adapters

    @property
    def scheme(self) -> Scheme:
        """The row of the table of sources that describes its source."""
        return BY_MEMBER[self.source.kind]

    @property
    def is_in_place(self) -> bool:
        """Whether files are used where somebody put them, so that they may change at any time."""
        return self.scheme.is_in_place or (self.offline and self.scheme.is_remote)


class FetchProgress(_Wire):
    """One line of the Job's log: where it is. Bytes count what is wanted, cached or downloaded."""

    phase: Literal["Authorising", "Downloading", "Verifying", "Publishing"]
    bytes_done: int = 0
    bytes_total: int = 0
    bytes_per_second: int = 0  # over the last seconds of this phase


class FetchResult(_Wire):
    """How a Job ended. On success all but reason and message is set; on failure reason and message are."""

    ok: bool
    reason: Reason | None = None
    message: str = ""
    resolved_revision: str = ""
    digest: str = ""  # "sha256:<hex>" over the sorted (path, size, sha256) of the manifest's files
    size_bytes: int = 0
    files: int = 0
    path: str = ""  # of the snapshot, relative to the cache's root: artifacts/<title>-<hash of the content>
    rank: int | None = None
    target_modules: tuple[str, ...] = ()
    volume: VolumeState | None = None
    needed_bytes: int | None = None  # of an InsufficientSpace: what would have to go


class EvictRequest(_Wire):
    """What an eviction Job is asked to do."""

    cache_root: str
    owner: str | None = None  # UID of the claim
    keep: str = ""  # snapshots that stay: base64 of KEEP_BYTES of the sha256 of each name, one after the other
    built: float | None = (
        None  # Unix time of this request, where downloads were under way: what is published since stays, and all blobs do
    )
    unfinished_seconds: float = 24 * 3600  # what no snapshot links to stays so long: a download may go on from it


class EvictResult(_Wire):
    """How an eviction Job ended."""

    ok: bool
    message: str = ""
    views: int = 0  # snapshots that were removed
    freed_bytes: int = 0
    busy: int = 0  # stores that downloads had just then
    left_bytes: int = 0  # of what no snapshot links to any more, and stayed for the downloads under way: the next eviction without any takes it
    volume: VolumeState | None = None


def keep_mark(snapshot: str) -> bytes:
    """What stands for a snapshot's name in `EvictRequest.keep`: two that are alike by chance keep one snapshot too many."""
    return hashlib.sha256(snapshot.encode("utf-8", "surrogatepass")).digest()[:KEEP_BYTES]


def views_in(text: str) -> set[str]:
    """The names of all views whose paths stand in a text: a pod's arguments, an engine's answer."""
    return set(_VIEW.findall(text))


class ManifestFile(_Wire):
    """One published file; `path` is relative to the snapshot."""

    path: str
    size: int
    sha256: str


class Manifest(_Wire):
    """What a snapshot directory holds: exactly these files. Nothing in it is of one artifact or revision: several may share a snapshot."""

    version: Literal[1] = 1
    type: ContentType
    repo: str  # the source's title: a repository, or an address like s3://bucket/prefix
    digest: str
    files: tuple[ManifestFile, ...] = Field(default=())
    pickles: tuple[str, ...] = ()  # files of it that were scanned, and found to hold nothing but tensors
    rank: int | None = None
    target_modules: tuple[str, ...] = ()
