"""Where content comes from: shared by adapters, base models and artifacts."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from lora_operator.api.common import ApiModel, LocalRef, SecretKeyRef, cel, matches
from lora_operator.api.storage import Quantity
from lora_operator.constants import S3_KEYS

_REPO = r"^[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)?$"
_REVISION = r"^[A-Za-z0-9_][A-Za-z0-9._/-]*$"
_BUCKET = r"^[A-Za-z0-9][A-Za-z0-9._-]*[A-Za-z0-9]$"
_PREFIX_PART = "p == '..' || p == '.'"
S3_ENDPOINT = r"^https?://[A-Za-z0-9.\[\]:-]+(/[A-Za-z0-9._/-]*[A-Za-z0-9._-])?$"

Pattern = Annotated[str, Field(min_length=1, max_length=256)]
AllowPatterns = Annotated[
    tuple[Pattern, ...],
    Field(
        description="Only files that match one of these (as fnmatch does, * crosses folders); default: what vLLM needs.",
        max_length=64,
    ),
]
IgnorePatterns = Annotated[tuple[Pattern, ...], Field(description="No file that matches one of these.", max_length=64)]


class HuggingFaceSource(ApiModel):
    """One repository of the cache's Hugging Face Hub endpoint."""

    repo: str = Field(
        description="Repository id on the cache's Hub, <organisation>/<name>.",
        min_length=1,
        max_length=96,
        pattern=_REPO,
        json_schema_extra=cel(
            (matches(_REPO), "repo must be a repository id like organisation/name"),
            (
                "!self.contains('--') && !self.contains('..') && !self.endsWith('.git')",
                "repo must be a repository id without '--', '..' or a trailing '.git'",
            ),
        ),
    )
    revision: str = Field(
        default="main",
        description="Branch, tag or full commit. What it resolved to is in the status; it stays pinned there.",
        min_length=1,
        max_length=255,
        pattern=_REVISION,
        json_schema_extra=cel(
            (matches(_REVISION), "revision must be a branch, tag or commit"),
            ("!self.contains('..')", "revision must be a branch, tag or commit, without '..'"),
        ),
    )
    allow_patterns: AllowPatterns = ()
    ignore_patterns: IgnorePatterns = ()
    token_secret_ref: SecretKeyRef | None = Field(
        default=None,
        description="Token for private and gated repositories. Without it access is anonymous.",
    )

    @property
    def title(self) -> str:
        """What it is, for people."""
        return self.repo

    @property
    def requested(self) -> str:
        """What is asked for of it: resolved to a revision by the source."""
        return self.revision

    @property
    def secret(self) -> tuple[str, str] | None:
        """Name and key of the Secret beside it; None for anonymous access."""
        return (self.token_secret_ref.name, self.token_secret_ref.key) if self.token_secret_ref else None

    def anonymous(self) -> HuggingFaceSource:
        """The same content, without whose credentials read it."""
        return self.model_copy(update={"token_secret_ref": None})


class S3Source(ApiModel):
    """A folder of a bucket on AWS S3, or on a compatible service that the cache allows."""

    bucket: str = Field(
        description="Name of the bucket.",
        min_length=3,
        max_length=255,
        pattern=_BUCKET,
        json_schema_extra=cel(
            (matches(_BUCKET), "bucket must be a bucket's name alone: letters, digits, '.', '_' and '-'")
        ),
    )
    prefix: str = Field(
        default="",
        description="The folder inside the bucket; default: the whole bucket. All of it counts for the revision.",
        max_length=512,
        json_schema_extra=cel(
            (
                f"!self.startsWith('/') && !self.contains('//') && !self.split('/').exists(p, {_PREFIX_PART})",
                "prefix must be a folder inside the bucket: without a leading '/', empty parts, '.' and '..'",
            )
        ),
    )
    endpoint: str | None = Field(
        default=None,
        description="Address of an S3-compatible service, one of the ModelCache's spec.s3.allowedEndpoints; default: AWS.",
        max_length=512,
        pattern=S3_ENDPOINT,
    )
    region: str | None = Field(
        default=None,
        description="Region of the bucket; default: us-east-1.",
        min_length=1,
        max_length=64,
        pattern=r"^[a-z0-9-]+$",
    )
    allow_patterns: AllowPatterns = ()
    ignore_patterns: IgnorePatterns = ()
    credentials_secret_ref: LocalRef | None = Field(
        default=None,
        description="Secret with AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, where needed, AWS_SESSION_TOKEN, in the same "
        "namespace as this object. Without it access is anonymous.",
    )

    @property
    def title(self) -> str:
        """What it is, for people."""
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    @property
    def requested(self) -> str:
        """What is asked for of it: resolved to a revision by the source."""
        return "listing"

    @property
    def secret(self) -> tuple[str, str] | None:
        """Name of the Secret beside it, and what stands for its keys; None for anonymous access."""
        return (self.credentials_secret_ref.name, S3_KEYS) if self.credentials_secret_ref else None

    def anonymous(self) -> S3Source:
        """The same content, without whose credentials read it."""
        return self.model_copy(update={"credentials_secret_ref": None, "prefix": self.prefix.strip("/")})


class Source(ApiModel):
    """Exactly one kind of source, and a folder inside it."""

    hugging_face: HuggingFaceSource | None = Field(default=None, description="A repository on the Hugging Face Hub.")
    s3: S3Source | None = Field(default=None, description="A folder of an S3 bucket.")
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

    @property
    def member(self) -> HuggingFaceSource | S3Source:
        """The one member that is given."""
        member = self.hugging_face or self.s3
        assert member is not None  # noqa: S101  the schema's rule; a narrowing for the type checker
        return member

    @property
    def secret(self) -> tuple[str, str] | None:
        """Name and key of the Secret that reads it; None for anonymous access."""
        return self.member.secret

    def anonymous(self) -> Source:
        """The same content, without whose credentials read it."""
        kind = "hugging_face" if self.hugging_face is not None else "s3"
        return self.model_copy(update={kind: self.member.anonymous(), "path": self.path.strip("/")})


# CEL that belongs to a field of type Source; the message names the field for the reader of a refused manifest.
SOURCE_RULES = cel(("has(self.huggingFace) != has(self.s3)", "source must have exactly one of: huggingFace, s3"))
