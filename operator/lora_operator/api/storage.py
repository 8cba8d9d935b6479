"""The volume of a ModelCache: a claim that is there, or the template of one that the operator makes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, WithJsonSchema

from lora_operator.api.common import ApiModel, ObjectName, cel

READ_WRITE_MANY = "ReadWriteMany"
READ_WRITE_ONCE = "ReadWriteOnce"

# A quantity, as far as one can be a size.
Quantity = Annotated[
    int | str,
    WithJsonSchema(
        {
            "x-kubernetes-int-or-string": True,
            "minimum": 0,
            "maxLength": 32,
            "pattern": r"^[0-9]+(\.[0-9]+)?([KMGTPE]i|[kMGTPE]|[eE][0-9]{1,2})?$",
        }
    ),
]
AccessMode = Literal["ReadWriteMany", "ReadWriteOnce", "ReadOnlyMany", "ReadWriteOncePod"]
LabelText = Annotated[str, Field(max_length=63)]
AnnotationText = Annotated[str, Field(max_length=4096)]


class StorageRequests(ApiModel):
    """How much is asked for."""

    storage: Quantity = Field(description="Size of the volume, for instance 500Gi.")


class ClaimResources(ApiModel):
    """The resources of a claim."""

    requests: StorageRequests = Field(description="How much is asked for.")


class ClaimMetadata(ApiModel):
    """Metadata of a claim that is made."""

    labels: dict[str, LabelText] = Field(
        default={}, description="Labels, beside those that the operator sets.", max_length=32
    )
    annotations: dict[str, AnnotationText] = Field(default={}, description="Annotations.", max_length=32)


class ClaimSpec(ApiModel):
    """The spec of a claim that is made."""

    access_modes: tuple[AccessMode, ...] = Field(
        description="ReadWriteMany for engines on several nodes. With ReadWriteOnce alone all pods of the cache are kept on one node.",
        min_length=1,
        max_length=4,
        json_schema_extra={
            "x-kubernetes-list-type": "set",
            **cel(
                (
                    "self.exists(m, m == 'ReadWriteMany' || m == 'ReadWriteOnce')",
                    "accessModes must have ReadWriteMany, or ReadWriteOnce for one node: Jobs write to the volume while engines read",
                ),
                (
                    "!self.exists(m, m == 'ReadWriteOncePod')",
                    "accessModes can't have ReadWriteOncePod: a Job and an engine could never mount the volume together",
                ),
            ),
        },
    )
    resources: ClaimResources = Field(description="How much is asked for.")
    storage_class_name: str | None = Field(
        default=None,
        description="The StorageClass; default: the cluster's default one; empty: a volume that was made by hand.",
        max_length=253,
        pattern=r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?)?$",
    )


class VolumeClaimTemplate(ApiModel):
    """A PersistentVolumeClaim that the operator makes, with the ModelCache's name."""

    metadata: ClaimMetadata = Field(default=ClaimMetadata(), description="Metadata of the claim.")
    spec: ClaimSpec = Field(description="Spec of the claim.")


class StorageSpec(ApiModel):
    """The volume: exactly one of existingClaim and volumeClaimTemplate."""

    existing_claim: ObjectName | None = Field(
        default=None,
        description="A PersistentVolumeClaim in the cache's namespace; ReadWriteMany when pods run on several nodes.",
    )
    volume_claim_template: VolumeClaimTemplate | None = Field(
        default=None, description="A claim that the operator makes once, with the ModelCache's name. Immutable."
    )
    reclaim_policy: Literal["Retain", "Delete"] | None = Field(
        default=None,
        description="What becomes of a claim that the operator made when its ModelCache is deleted. Retain, the default, keeps it, "
        "and a new ModelCache of the same name takes it over; Delete deletes it with all that is in it.",
    )


STORAGE_RULES = cel(
    (
        "has(self.existingClaim) != has(self.volumeClaimTemplate)",
        "storage must have exactly one of: existingClaim, volumeClaimTemplate",
    ),
    (
        "!has(self.reclaimPolicy) || has(self.volumeClaimTemplate)",
        "reclaimPolicy is only for volumeClaimTemplate: a claim that exists already is never deleted",
    ),
    (
        "!has(self.volumeClaimTemplate) || !has(oldSelf.volumeClaimTemplate) "
        "|| self.volumeClaimTemplate == oldSelf.volumeClaimTemplate",
        "volumeClaimTemplate is immutable: to grow the volume, raise spec.resources.requests.storage of the claim itself, "
        "which has this ModelCache's name",
    ),
)
