"""Where content comes from: shared by adapters, base models and artifacts. The members are those of `schemes`."""

from __future__ import annotations

from pydantic import Field

from lora_operator.api.common import ApiModel, cel
from lora_operator.api.sources.base import SourceMember
from lora_operator.api.sources.buckets import AzureSource, GcsSource
from lora_operator.api.sources.http import HttpSource
from lora_operator.api.sources.huggingface import HuggingFaceSource
from lora_operator.api.sources.oci import OciSource
from lora_operator.api.sources.s3 import S3_RULES, AssumeRole, S3Source
from lora_operator.api.sources.volumes import ClaimSource, LocalSource
from lora_operator.api.storage import Quantity
from lora_operator.source_kinds import BY_MEMBER, MEMBERS, SCHEMES, Scheme


def _of(member: str) -> str:
    return BY_MEMBER[member].description


class Source(ApiModel):
    """Exactly one kind of source, and a folder inside it."""

    hugging_face: HuggingFaceSource | None = Field(default=None, description=_of("huggingFace"))
    s3: S3Source | None = Field(default=None, description=_of("s3"), json_schema_extra=S3_RULES)
    http: HttpSource | None = Field(default=None, description=_of("http"))
    persistent_volume_claim: ClaimSource | None = Field(default=None, description=_of("persistentVolumeClaim"))
    local: LocalSource | None = Field(default=None, description=_of("local"))
    gcs: GcsSource | None = Field(default=None, description=_of("gcs"))
    azure: AzureSource | None = Field(default=None, description=_of("azure"))
    oci: OciSource | None = Field(default=None, description=_of("oci"))
    size_hint: Quantity | None = Field(
        default=None,
        description="How big the content is at least, for a source that can't be listed: checked before the first byte, like a listing, "
        "against the cache's maxArtifactSize, capacity and free space.",
    )
    path: str = Field(
        default="",
        description="A folder inside the source, for instance checkpoint-500; default: its root.",
        max_length=512,
        json_schema_extra=cel(
            (
                "!self.startsWith('/') && !self.split('/').exists(p, p == '..' || p == '.')",
                "path must be a folder inside the source: relative, without '.' and '..' parts",
            )
        ),
    )

    digest: str | None = Field(
        default=None,
        description="Pin of the content: only content of this digest, as status.digest tells it (sha256:…), is accepted. Where "
        "and how it is downloaded does not depend on it.",
        max_length=71,
        pattern=r"^sha256:[0-9a-f]{64}$",
    )

    @property
    def scheme(self) -> Scheme:
        """The row of the table of sources for the member that is given."""
        return next(scheme for scheme in SCHEMES if getattr(self, scheme.field) is not None)

    @property
    def member(self) -> SourceMember:
        """The one member that is given."""
        member: SourceMember = getattr(self, self.scheme.field)
        return member

    @property
    def secret(self) -> tuple[str, str] | None:
        """Name and key of the Secret that reads it; None for anonymous access."""
        return self.member.secret

    @property
    def role(self) -> AssumeRole | None:
        """The role in which it is read; None: as who the credentials are."""
        return self.s3.assume_role if self.s3 is not None else None

    def anonymous(self) -> Source:
        """The same content, without whose credentials read it, nor who accepts it."""
        member = self.member.anonymous()
        return self.model_copy(update={self.scheme.field: member, "path": self.path.strip("/"), "digest": None})


_GIVEN = ", ".join(f"has(self.{scheme.member})" for scheme in SCHEMES)
# CEL that belongs to a field of type Source; the message names the field for the reader of a refused manifest.
SOURCE_RULES = cel((f"[{_GIVEN}].exists_one(given, given)", f"source must have exactly one of: {MEMBERS}"))
# CEL of an artifact's spec: what the operator lends it excludes what it names itself.
CREDENTIALS_RULES = tuple(
    (
        f"!has(self.credentials) || !has(self.source.{scheme.member}) "
        f"|| !has(self.source.{scheme.member}.{scheme.secrets.field})",
        f"credentials and source.{scheme.member}.{scheme.secrets.field} exclude each other",
    )
    for scheme in SCHEMES
    if scheme.secrets is not None
)
