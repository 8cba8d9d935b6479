"""What the operator and a download Job say to each other, and what a Job writes beside the files it publishes.

FetchRequest goes into the Job's environment (FETCH_REQUEST_ENV), FetchProgress lines come from its log, FetchResult from its
termination message (at most 3 KiB), and Manifest is published inside the view directory.
"""

from __future__ import annotations

import hashlib
import re
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from lora_operator.constants import Reason
from lora_operator.source_kinds import SCHEMES, Scheme

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


class HuggingFaceRequest(_Wire):
    """One repository of a Hugging Face-compatible Hub at a requested revision."""

    repo: str
    revision: str = "main"
    allow_patterns: tuple[str, ...] = ()
    ignore_patterns: tuple[str, ...] = ()
    endpoint: str = "https://huggingface.co"


class RoleRequest(_Wire):
    """A role that is assumed before anything is read; without an endpoint at AWS's STS of the region."""

    arn: str
    external_id: str | None = None
    session_name: str
    sts_endpoint: str | None = None


class S3Request(_Wire):
    """A folder of a bucket; without an endpoint on AWS."""

    bucket: str
    prefix: str = ""
    endpoint: str | None = None
    region: str | None = None
    addressing_style: Literal["Path", "VirtualHost"] | None = None
    role: RoleRequest | None = None
    allow_patterns: tuple[str, ...] = ()
    ignore_patterns: tuple[str, ...] = ()


class HttpFileRequest(_Wire):
    """One file on an HTTP server."""

    path: str
    url: str
    sha256: str


class HttpRequest(_Wire):
    """Files, or an archive where there is a `url`."""

    url: str | None = None
    sha256: str | None = None
    max_bytes: int = 0  # of the archive, and of what is in it
    files: tuple[HttpFileRequest, ...] = ()
    allowed_endpoints: tuple[str, ...] = ()  # where servers may redirect to
    allow_patterns: tuple[str, ...] = ()
    ignore_patterns: tuple[str, ...] = ()


class ClaimRequest(_Wire):
    """A folder of another claim, which is mounted at `mount`."""

    claim_name: str
    claim_namespace: str = ""
    claim_uid: str = (
        ""  # what tells it from another one of its name; empty where it did not exist when the Job was made
    )
    path: str = ""
    mount: str
    allow_patterns: tuple[str, ...] = ()
    ignore_patterns: tuple[str, ...] = ()


class LocalRequest(_Wire):
    """A folder of the cache's own volume."""

    path: str
    allow_patterns: tuple[str, ...] = ()
    ignore_patterns: tuple[str, ...] = ()


class GcsRequest(_Wire):
    """A folder of a bucket; without an endpoint on Google Cloud Storage."""

    bucket: str
    prefix: str = ""
    endpoint: str | None = None
    allow_patterns: tuple[str, ...] = ()
    ignore_patterns: tuple[str, ...] = ()


class AzureRequest(_Wire):
    """A folder of a container of an account; without an endpoint on Azure."""

    account: str
    container: str
    prefix: str = ""
    endpoint: str | None = None
    allow_patterns: tuple[str, ...] = ()
    ignore_patterns: tuple[str, ...] = ()


class OciRequest(_Wire):
    """An artifact or image of a registry."""

    reference: str
    max_bytes: int  # that archives among its layers may hold
    allowed_endpoints: tuple[str, ...] = ()  # the registry, and where it may send us
    allow_patterns: tuple[str, ...] = ()
    ignore_patterns: tuple[str, ...] = ()


class Limits(_Wire):
    """What the cache allows a Job, in bytes; None: no bound."""

    max_artifact_bytes: int | None = None
    capacity_bytes: int | None = None  # of all content on the volume
    min_free_bytes: int = 0
    holder: str = ""  # under which name its Job keeps room on the volume
    hint_bytes: int = 0  # how big the content is at least, by who wants it


class VolumeState(_Wire):
    """The volume at a Job's end."""

    total_bytes: int
    free_bytes: int
    used_bytes: int  # by content of sources, finished or not


class FetchRequest(_Wire):
    """All that a download Job is told, with one source; nothing in it is secret (that lies in files of `credentials`)."""

    artifact: str
    type: ContentType
    hugging_face: HuggingFaceRequest | None = None
    s3: S3Request | None = None
    http: HttpRequest | None = None
    persistent_volume_claim: ClaimRequest | None = None
    local: LocalRequest | None = None
    gcs: GcsRequest | None = None
    azure: AzureRequest | None = None
    oci: OciRequest | None = None
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
    limits: Limits = Limits()
    owner: str | None = None  # UID of the claim
    max_workers: int = 4
    base_model_path: str | None = None  # relative to cache_root: the base model's published view, for adapters

    @property
    def scheme(self) -> Scheme | None:
        """Which source it has; None unless it has exactly one."""
        given = [scheme for scheme in SCHEMES if getattr(self, scheme.field) is not None]
        return given[0] if len(given) == 1 else None

    @property
    def is_in_place(self) -> bool:
        """Whether files are used where somebody put them, so that they may change at any time."""
        scheme = self.scheme
        return scheme is not None and (scheme.is_in_place or (self.offline and scheme.is_remote))


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
    path: str = ""  # of the view, relative to the cache's root: artifacts/<title>-<hash of the content>
    rank: int | None = None
    target_modules: tuple[str, ...] = ()
    volume: VolumeState | None = None
    needed_bytes: int | None = None  # of an InsufficientSpace: what would have to go


class EvictRequest(_Wire):
    """What an eviction Job is told."""

    cache_root: str
    owner: str | None = None  # UID of the claim
    keep: str = ""  # views that stay: base64 of KEEP_BYTES of the sha256 of each name, one after the other
    built: float | None = (
        None  # Unix time of this request, where downloads were under way: what is published since stays, and all payloads do
    )
    unfinished_seconds: float = 24 * 3600  # what no view links to stays so long: a download may go on from it


class EvictResult(_Wire):
    """How an eviction Job ended."""

    ok: bool
    message: str = ""
    views: int = 0  # removed
    freed_bytes: int = 0
    busy: int = 0  # stores that downloads had just then
    left_bytes: int = 0  # of what no view links to any more, and stayed for the downloads under way: the next eviction without any takes it
    volume: VolumeState | None = None


def keep_mark(view: str) -> bytes:
    """What stands for a view's name in `EvictRequest.keep`: two that are alike by chance keep one view too many."""
    return hashlib.sha256(view.encode("utf-8", "surrogatepass")).digest()[:KEEP_BYTES]


def views_in(text: str) -> set[str]:
    """The names of all views whose paths stand in a text: a pod's arguments, an engine's answer."""
    return set(_VIEW.findall(text))


class ManifestFile(_Wire):
    """One published file; `path` is relative to the view."""

    path: str
    size: int
    sha256: str


class Manifest(_Wire):
    """What a view directory holds: exactly these files. Nothing in it is of one artifact or revision: several may share a view."""

    version: Literal[1] = 1
    type: ContentType
    repo: str  # the source's title: a repository, or an address like s3://bucket/prefix
    digest: str
    files: tuple[ManifestFile, ...] = Field(default=())
    pickles: tuple[str, ...] = ()  # files of it that were scanned, and found to hold nothing but tensors
    rank: int | None = None
    target_modules: tuple[str, ...] = ()
