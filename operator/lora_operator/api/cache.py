"""ModelCache: a shared volume that Jobs fill and engines read. Written by the platform team."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lora_operator.api.common import (
    AGE,
    ApiModel,
    Conditions,
    ObjectName,
    PrinterColumn,
    Resource,
    ResourceInfo,
    reason_column,
)
from lora_operator.api.source import S3_ENDPOINT

DEFAULT_ENDPOINT = "https://huggingface.co"


class StorageSpec(ApiModel):
    """The volume."""

    existing_claim: ObjectName = Field(
        description="A PersistentVolumeClaim in the cache's namespace; ReadWriteMany when pods run on several nodes."
    )


class HuggingFaceCacheSpec(ApiModel):
    """The Hub that all sources of this cache are read from."""

    endpoint: str = Field(
        default=DEFAULT_ENDPOINT,
        description="Address of the Hugging Face Hub or of a mirror. A property of the cache, never of a tenant.",
        max_length=512,
        pattern=r"^https?://[A-Za-z0-9.\[\]:-]+(/[A-Za-z0-9._/-]*)?$",
    )


class S3CacheSpec(ApiModel):
    """Which S3-compatible services sources of this cache may name."""

    allowed_endpoints: tuple[Annotated[str, Field(max_length=512, pattern=S3_ENDPOINT)], ...] = Field(
        default=(),
        description="Endpoints that sources may name, character by character; AWS itself needs no entry.",
        max_length=32,
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


class ModelCacheSpec(ApiModel):
    """A shared volume."""

    storage: StorageSpec = Field(description="The volume.")
    hugging_face: HuggingFaceCacheSpec = Field(
        default=HuggingFaceCacheSpec(), description="The Hub that sources of this cache are read from."
    )
    s3: S3CacheSpec = Field(
        default=S3CacheSpec(), description="Which S3-compatible services sources of this cache may name."
    )
    security_context: CacheSecurityContext = Field(
        default=CacheSecurityContext(), description="Under which identity Jobs write to the volume."
    )


class ModelCacheStatus(ApiModel):
    """What is true of the cache now."""

    conditions: Conditions = ()
    observed_generation: int | None = Field(default=None, description="The generation that this status speaks of.")
    claim_name: str | None = Field(default=None, description="The claim that is used.")
    capacity: str | None = Field(default=None, description="Capacity of the claim, as its volume says.")
    access_modes: tuple[str, ...] | None = Field(default=None, description="Access modes of the claim.")
    artifacts: int | None = Field(default=None, description="Artifacts that are Ready in this cache.")
    size: str | None = Field(default=None, description="Sum of their sizes.")


class ModelCache(Resource):
    """A cache as read from the API server."""

    kind: Literal["ModelCache"] = "ModelCache"
    spec: ModelCacheSpec
    status: ModelCacheStatus = ModelCacheStatus()


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
        reason_column(),
        AGE,
    ),
)
