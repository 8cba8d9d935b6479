"""ModelCache: a shared volume that Jobs fill and engines read. Written by the platform team."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from lora_operator.api.access import JobTemplate, Network, WorkloadIdentity
from lora_operator.api.bounds import EVICTION_RULES, DownloadSpec, EvictionSpec
from lora_operator.api.common import (
    AGE,
    ApiModel,
    Conditions,
    PrinterColumn,
    Resource,
    ResourceInfo,
    asked_of_new,
    cel,
    reason_column,
)
from lora_operator.api.sources.base import HOST, HOSTS, Endpoint
from lora_operator.api.sources.buckets import AzureCacheSpec, GcsCacheSpec
from lora_operator.api.sources.http import HttpCacheSpec
from lora_operator.api.sources.oci import OciCacheSpec
from lora_operator.api.sources.volumes import ClaimCacheSpec, LocalCacheSpec
from lora_operator.api.storage import READ_WRITE_MANY, STORAGE_RULES, Quantity, StorageSpec

DEFAULT_ENDPOINT = "https://huggingface.co"
_FOLDER = "(/[A-Za-z0-9._/-]*)?"


class HuggingFaceCacheSpec(ApiModel):
    """The Hub that all sources of this cache are read from."""

    endpoint: str = Field(
        default=DEFAULT_ENDPOINT,
        description="Address of the Hugging Face Hub or of a mirror. A property of the cache, never of a tenant.",
        max_length=512,
        pattern=rf"^https?://[A-Za-z0-9.\[\]:-]+{_FOLDER}$",
        json_schema_extra=asked_of_new(
            f"^https?://{HOST}{_FOLDER}$", f"endpoint must be http:// or https:// and a host: {HOSTS}"
        ),
    )


class StsEndpoint(ApiModel):
    """The token service of one S3-compatible service."""

    s3_endpoint: Endpoint = Field(description="The endpoint, as in allowedEndpoints.")
    address: Endpoint = Field(description="Address of its STS.")


class S3CacheSpec(ApiModel):
    """Which S3-compatible services sources of this cache may name."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            (
                "!has(self.stsEndpoints) || self.stsEndpoints.all(sts, "
                "has(self.allowedEndpoints) && sts.s3Endpoint in self.allowedEndpoints)",
                "s3Endpoint of stsEndpoints must be one of allowedEndpoints, character by character",
            )
        )
    )

    allowed_endpoints: tuple[Endpoint, ...] = Field(
        default=(),
        description="Endpoints that sources may name, character by character; AWS itself needs no entry.",
        max_length=32,
    )
    sts_endpoints: tuple[StsEndpoint, ...] = Field(
        default=(),
        description="Where roles are assumed (source.s3.assumeRole) for an endpoint that is not its own STS. Without an entry it is the "
        "endpoint itself, and for AWS the STS of the source's region.",
        max_length=32,
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["s3Endpoint"]},
    )


class CacheSecurityContext(ApiModel):
    """Under which identity Jobs write to the volume."""

    run_as_user: int | None = Field(
        default=None, ge=1, description="User id of the Jobs; never root. Default: the image's."
    )
    fs_group: int | None = Field(
        default=None, ge=0, description="Group that the volume is made writable for, where it supports that."
    )
    fs_group_change_policy: Literal["OnRootMismatch", "Always"] | None = Field(
        default=None, description="When ownership of the volume is changed."
    )
    supplemental_groups: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        default=(), description="Further groups of the Jobs and engines, as the volume's owner needs.", max_length=16
    )


class VolumeFigures(ApiModel):
    """The volume, as the last Job found it."""

    total_bytes: int = Field(description="Size of the file system; 0 where it does not tell.")
    free_bytes: int = Field(description="What the Jobs' user may still write.")
    used_bytes: int = Field(description="Content of this cache's sources, finished or not; every file once.")
    time: datetime = Field(description="When the Job ended.")
    claim_capacity: str | None = Field(default=None, description="The claim's capacity then.")


class EvictionStatus(ApiModel):
    """The last removal of content that nothing uses, and the one that is under way or waits."""

    requested: str | None = Field(
        default=None, max_length=256, description="Value of the annotation lora-operator.dev/evict that was seen to."
    )
    attempt: int = Field(default=0, description="Number of the last Job, <cache>-evict-<attempt>.")
    running: bool = Field(default=False, description="Whether that Job is under way; downloads wait meanwhile.")
    waiting: bool = Field(default=False, description="Whether one is due that can't begin; message says why.")
    left_over: bool = Field(
        default=False,
        description="Whether content may still lie on the volume whose ModelArtifacts are deleted; a Job is made for it in the end.",
    )
    failures: int = Field(
        default=0,
        description="Removals in a row that could not be done. The next one that you don't ask for waits for 10 minutes, then for 20, 40 "
        "and 80.",
    )
    lost_since: datetime | None = Field(
        default=None,
        description="When the last Job was made, where its node was lost before it told its end. The next one leaves what is newer, and "
        "frees no room yet.",
    )
    time: datetime | None = Field(default=None, description="When the last one ended.")
    views: int | None = Field(default=None, description="Contents that it removed.")
    freed: str | None = Field(default=None, description="Bytes that it freed; what other content shares stays.")
    message: str | None = Field(
        default=None, max_length=1024, description="What it or its Job waits for, or why nothing could be removed."
    )


class ModelCacheSpec(ApiModel):
    """A shared volume."""

    storage: StorageSpec = Field(
        description="The volume: exactly one of existingClaim and volumeClaimTemplate.", json_schema_extra=STORAGE_RULES
    )
    hugging_face: HuggingFaceCacheSpec = Field(
        default=HuggingFaceCacheSpec(), description="The Hub that sources of this cache are read from."
    )
    s3: S3CacheSpec = Field(
        default=S3CacheSpec(), description="Which S3-compatible services sources of this cache may name."
    )
    http: HttpCacheSpec = Field(
        default=HttpCacheSpec(), description="Which HTTP servers sources of this cache may name."
    )
    persistent_volume_claim: ClaimCacheSpec = Field(
        default=ClaimCacheSpec(), description="Which other claims sources of this cache may name."
    )
    local: LocalCacheSpec = Field(
        default=LocalCacheSpec(), description="Which folders of the cache's own volume sources may name."
    )
    gcs: GcsCacheSpec = Field(
        default=GcsCacheSpec(), description="Which services like Google Cloud Storage sources of this cache may name."
    )
    azure: AzureCacheSpec = Field(
        default=AzureCacheSpec(), description="Which services like Azure Blob Storage sources of this cache may name."
    )
    oci: OciCacheSpec = Field(default=OciCacheSpec(), description="Which registries sources of this cache may name.")
    security_context: CacheSecurityContext = Field(
        default=CacheSecurityContext(), description="Under which identity Jobs write to the volume."
    )
    workload_identity: WorkloadIdentity | None = Field(
        default=None,
        description="A service account that Jobs of some sources run as, to read them by the cloud's workload identity. Without it "
        "no Job has an identity but that of a Secret.",
    )
    offline: bool = Field(
        default=False,
        description="true: nothing is downloaded, and no request is sent. Content that was put on the volume, by `hf download --cache-dir "
        "<volume>/hub` or as the plain folder <organisation>/<name> or <bucket>/<prefix>, is verified as far as it declares sums, and used; "
        "sources by http and oci are refused. "
        "It is open to whoever may use the cache; Secrets that sources name are not looked at.",
    )
    network: Network = Field(default=Network(), description="The way from Jobs to sources: proxies and authorities.")
    job_template: JobTemplate = Field(default=JobTemplate(), description="What is added to the pods of Jobs.")
    capacity: Quantity | None = Field(
        default=None,
        description="How much content the cache may hold, whatever the volume has; a download that would exceed it is refused before "
        "its first byte (InsufficientSpace).",
    )
    min_free: Quantity | None = Field(
        default=None,
        description="How much of the volume stays free: a download that would leave less is refused before its first byte "
        "(InsufficientSpace).",
    )
    warn_at_percent: int = Field(
        default=90,
        ge=1,
        le=100,
        description="From how full the volume, or capacity, is on the condition SpaceLow is True, in percent.",
    )
    max_artifact_size: Quantity | None = Field(
        default=None,
        description="How big one source's content may be; bigger content is TooLarge, before its first byte.",
    )
    eviction: EvictionSpec = Field(
        default=EvictionSpec(),
        description="What becomes of content that nothing wants any more.",
        json_schema_extra=EVICTION_RULES,
    )
    download: DownloadSpec = Field(default=DownloadSpec(), description="How the Jobs run.")


class ModelCacheStatus(ApiModel):
    """What is true of the cache now."""

    conditions: Conditions = ()
    observed_generation: int | None = Field(default=None, description="The generation that this status speaks of.")
    claim_name: str | None = Field(default=None, description="The claim that is used.")
    capacity: str | None = Field(default=None, description="Capacity of the claim, as its volume says.")
    claim_uid: str | None = Field(default=None, description="UID of the claim; of another claim nothing here speaks.")
    access_modes: tuple[str, ...] | None = Field(default=None, description="Access modes that the claim asks for.")
    artifacts: int | None = Field(default=None, description="Artifacts that are Ready in this cache.")
    size: str | None = Field(default=None, description="Sum of their sizes.")
    volume: VolumeFigures | None = Field(
        default=None, description="Room on the volume, as the last Job found it: the operator itself mounts nothing."
    )
    used: str | None = Field(default=None, description="volume.usedBytes for kubectl get.")
    free: str | None = Field(default=None, description="volume.freeBytes for kubectl get.")
    reclaimable_bytes: int | None = Field(
        default=None,
        description="Sizes of the content that nothing wants. An eviction frees this at most: what other content shares stays.",
    )
    reclaimable: str | None = Field(default=None, description="reclaimableBytes for kubectl get.")
    eviction: EvictionStatus | None = Field(
        default=None, description="The last removal of content; absent where there was none."
    )


class ModelCache(Resource):
    """A cache as read from the API server."""

    kind: Literal["ModelCache"] = "ModelCache"
    spec: ModelCacheSpec
    status: ModelCacheStatus = ModelCacheStatus()

    @property
    def claim_name(self) -> str:
        """The claim that everybody mounts: the one that exists already, else the one that is made with this cache's name."""
        return self.spec.storage.existing_claim or self.metadata.name

    @property
    def access_modes(self) -> tuple[str, ...] | None:
        """What the claim asks for; None until it was looked at, and nothing that mounts it is made before."""
        return self.status.access_modes if self.status.claim_name == self.claim_name else None

    @property
    def single_node(self) -> bool:
        """Whether only one node can mount the claim: Jobs write while engines read, so ReadOnlyMany does not help."""
        return self.access_modes is not None and READ_WRITE_MANY not in self.access_modes

    @property
    def content_identity(self) -> str | None:
        """What tells content in this cache from that in others. A claim that was made may outlive its cache, and is its own
        identity, None until there is one; a claim of somebody else's is this cache's for as long as the cache lives."""
        if self.spec.storage.volume_claim_template is None:
            return self.metadata.uid
        return self.status.claim_uid if self.status.claim_name == self.claim_name else None


RESOURCE = ResourceInfo(
    kind="ModelCache",
    plural="modelcaches",
    singular="modelcache",
    short_names=("mcache",),
    spec=ModelCacheSpec,
    status=ModelCacheStatus,
    description="A shared volume that download Jobs fill and vLLM pods read.",
    columns=(
        PrinterColumn("Claim", ".status.claimName"),
        PrinterColumn("Capacity", ".status.capacity"),
        PrinterColumn("Artifacts", ".status.artifacts", "integer"),
        PrinterColumn("Size", ".status.size"),
        PrinterColumn("Used", ".status.used", description="On the volume, every file once."),
        PrinterColumn("Free", ".status.free", description="On the volume, when the last Job ended."),
        PrinterColumn("Reclaimable", ".status.reclaimable", description="What nothing wants any more."),
        reason_column(),
        AGE,
    ),
)
