"""S3 and compatible services as a source, and the role in which it is read."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field

from lora_operator.api.common import ApiModel, LocalRef, cel, matches
from lora_operator.api.sources.base import AllowPatterns, BucketMember, Endpoint, IgnorePatterns, Prefix

_BUCKET = r"^[A-Za-z0-9][A-Za-z0-9._-]*[A-Za-z0-9]$"
# Without an account, as Ceph and MinIO have them, too.
_ROLE = r"^arn:[a-z0-9-]+:iam::[A-Za-z0-9_-]*:role/[A-Za-z0-9+=,.@_/-]+$"
_EXTERNAL_ID = r"^[A-Za-z0-9_+=,.@:/-]*$"

RoleArn = Annotated[
    str,
    Field(
        min_length=20,
        max_length=2048,
        pattern=_ROLE,
        json_schema_extra=cel((matches(_ROLE), "arn must be a role's: arn:aws:iam::<account>:role/<name>")),
    ),
]


class AssumeRole(ApiModel):
    """A role that is taken on before anything is read, by AssumeRole of the service's STS."""

    arn: RoleArn = Field(description="The role.")
    external_id: str | None = Field(
        default=None,
        description="External id that the role's trust policy asks for. It is sent to the STS; AWS does not treat it as a secret.",
        min_length=2,
        max_length=1224,
        pattern=_EXTERNAL_ID,
        json_schema_extra=cel(
            (
                matches(_EXTERNAL_ID),
                "externalId must be letters, digits and '_', '+', '=', ',', '.', '@', ':', '/', '-'",
            )
        ),
    )


S3_RULES = cel(
    (
        "!has(self.addressingStyle) || has(self.endpoint)",
        "addressingStyle is for a service with an endpoint: AWS is asked as the bucket's name allows",
    )
)


class S3Source(BucketMember):
    """A folder of a bucket on AWS S3, or on a compatible service that the cache allows."""

    kind: ClassVar = "s3"

    bucket: str = Field(
        description="Name of the bucket.",
        min_length=3,
        max_length=255,
        pattern=_BUCKET,
        json_schema_extra=cel(
            (matches(_BUCKET), "bucket must be a bucket's name alone: letters, digits, '.', '_' and '-'")
        ),
    )
    prefix: Prefix = ""
    endpoint: Endpoint | None = Field(
        default=None,
        description="Address of an S3-compatible service, one of the ModelCache's spec.s3.allowedEndpoints; default: AWS.",
    )
    region: str | None = Field(
        default=None,
        description="Region of the bucket; default: us-east-1.",
        min_length=1,
        max_length=64,
        pattern=r"^[a-z0-9-]+$",
    )
    addressing_style: Literal["Path", "VirtualHost"] | None = Field(
        default=None,
        description="How the endpoint's service wants buckets named: Path, https://s3.example.com/bucket, or VirtualHost, "
        "https://bucket.s3.example.com; default: Path. AWS is asked by either, as the bucket's name allows.",
    )
    allow_patterns: AllowPatterns = ()
    ignore_patterns: IgnorePatterns = ()
    credentials_secret_ref: LocalRef | None = Field(
        default=None,
        description="Secret with AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, where needed, AWS_SESSION_TOKEN, in the same "
        "namespace as this object. Without it access is anonymous.",
    )
    assume_role: AssumeRole | None = Field(
        default=None,
        description="Role in which the bucket is read: the Secret's keys assume it. Without a Secret the ModelCache's spec.workloadIdentity "
        "does, for sources and roles that it allows.",
    )

    @property
    def bucket_title(self) -> str:
        return f"s3://{self.bucket}"

    def anonymous(self) -> Self:
        return super().anonymous().model_copy(update={"assume_role": None})

    def to_request(self) -> dict[str, Any]:
        return self.model_copy(update={"assume_role": None}).to_wire()  # a Job is told more of it
