"""Google Cloud Storage and Azure Blob Storage as sources."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from lora_operator.api.common import ApiModel, LocalRef, cel, matches
from lora_operator.api.sources.base import AllowPatterns, BucketMember, Endpoint, IgnorePatterns, Prefix

_BUCKET = r"^[a-z0-9][a-z0-9._-]*[a-z0-9]$"
_ACCOUNT = r"^[a-z0-9]{3,24}$"
_CONTAINER = r"^(\$root|\$web|[a-z0-9](-?[a-z0-9])+)$"


class GcsSource(BucketMember):
    """A folder of a bucket on Google Cloud Storage, or on a compatible service that the cache allows."""

    kind: ClassVar = "gcs"

    bucket: str = Field(
        description="Name of the bucket.",
        min_length=3,
        max_length=222,
        pattern=_BUCKET,
        json_schema_extra=cel(
            (matches(_BUCKET), "bucket must be a bucket's name alone: small letters, digits, '.', '_' and '-'")
        ),
    )
    prefix: Prefix = ""
    endpoint: Endpoint | None = Field(
        default=None,
        description="Address of another service, one of the ModelCache's spec.gcs.allowedEndpoints; default: Google's.",
    )
    allow_patterns: AllowPatterns = ()
    ignore_patterns: IgnorePatterns = ()
    credentials_secret_ref: LocalRef | None = Field(
        default=None,
        description="Secret with key.json, the key of a service account, in the same namespace as this object. Without it access "
        "is anonymous.",
    )

    @property
    def bucket_title(self) -> str:
        return f"gs://{self.bucket}"


class AzureSource(BucketMember):
    """A folder of a container of Azure Blob Storage, or of a compatible service that the cache allows."""

    kind: ClassVar = "azure"

    account: str = Field(
        description="Name of the storage account.",
        min_length=3,
        max_length=24,
        pattern=_ACCOUNT,
        json_schema_extra=cel(
            (matches(_ACCOUNT), "account must be a storage account's name: small letters and digits")
        ),
    )
    container: str = Field(
        description="Name of the container.",
        min_length=3,
        max_length=63,
        pattern=_CONTAINER,
        json_schema_extra=cel(
            (matches(_CONTAINER), "container must be a container's name alone: small letters, digits and single '-'")
        ),
    )
    prefix: Prefix = Field(
        default="",
        description="The folder inside the container; default: the whole container. All of it counts for the revision.",
    )
    endpoint: Endpoint | None = Field(
        default=None,
        description="Address of the account's blobs elsewhere, one of the ModelCache's spec.azure.allowedEndpoints; default: "
        "https://<account>.blob.core.windows.net.",
    )
    allow_patterns: AllowPatterns = ()
    ignore_patterns: IgnorePatterns = ()
    credentials_secret_ref: LocalRef | None = Field(
        default=None,
        description="Secret with AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN, in the same namespace as this object. Without it "
        "access is anonymous.",
    )

    @property
    def bucket_title(self) -> str:
        return f"azure://{self.account}/{self.container}"


class GcsCacheSpec(ApiModel):
    """Which services that speak Google Cloud Storage's API sources of this cache may name."""

    allowed_endpoints: tuple[Endpoint, ...] = Field(
        default=(),
        description="Endpoints that sources may name, character by character; Google's own needs no entry.",
        max_length=32,
    )


class AzureCacheSpec(ApiModel):
    """Which services that speak Azure Blob Storage's API sources of this cache may name."""

    allowed_endpoints: tuple[Endpoint, ...] = Field(
        default=(),
        description="Endpoints that sources may name, character by character; Azure's own need no entry.",
        max_length=32,
    )
