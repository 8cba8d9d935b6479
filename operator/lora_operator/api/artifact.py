"""ModelArtifact: one source at one requested revision in one cache. Written by the operator, or by hand to warm a cache."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import ConfigDict, Field

from lora_operator.api.common import (
    AGE,
    ApiModel,
    Conditions,
    LocalRef,
    PrinterColumn,
    Resource,
    ResourceInfo,
    cel,
    reason_column,
)
from lora_operator.api.model import LoadFormat
from lora_operator.api.progress import Progress
from lora_operator.api.sources.s3 import AssumeRole
from lora_operator.api.sources.source import CREDENTIALS_RULES, SOURCE_RULES, Source
from lora_operator.source_kinds import KEYS

_SEVERAL = ", ".join(KEYS)


class CredentialsIdentity(ApiModel):
    """Which Secret's key the content is read with, by identity, never by value.

    Used only while a live, accepted LoRAAdapter or VLLMDeployment in that namespace asks for exactly this Secret; an artifact
    made by hand can't lend itself another namespace's credentials by writing this.
    """

    namespace: str = Field(description="Namespace of the Secret.", max_length=63)
    name: str = Field(description="Name of the Secret.", max_length=253)
    key: str = Field(
        description=f"Key inside the Secret; {_SEVERAL} for the several that such a source reads.", max_length=253
    )
    uid: str = Field(description="UID of the Secret: a re-created Secret is another identity.", max_length=64)


class ModelArtifactSpec(ApiModel):
    """What is to be in the cache. Immutable: another want is another artifact."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            ("self == oldSelf", "spec is immutable: another source or revision is another ModelArtifact"),
            ("self.type == 'Adapter' || !has(self.baseModelRef)", "baseModelRef is only for type: Adapter"),
            ("self.type == 'Adapter' || !has(self.pickledWeights)", "pickledWeights is only for type: Adapter"),
            (
                "self.type == 'BaseModel' || !has(self.loadFormat) && !has(self.withoutTokenizer) && "
                "(self.type == 'Tokenizer' || !has(self.trustRemoteCode))",
                "loadFormat and withoutTokenizer are only for type: BaseModel, trustRemoteCode for it and for type: Tokenizer",
            ),
            *CREDENTIALS_RULES,
            (
                "!has(self.assumeRole) || has(self.source.s3) && !has(self.source.s3.assumeRole)",
                "assumeRole is for source.s3, and excludes source.s3.assumeRole",
            ),
        )
    )

    cache_ref: LocalRef = Field(description="The ModelCache, in the same namespace.")
    type: Literal["Adapter", "BaseModel", "Tokenizer"] = Field(
        description="What the content is, and so which files of it are wanted, and how they are checked."
    )
    source: Source = Field(description="Where the content comes from.", json_schema_extra=SOURCE_RULES)
    base_model_ref: LocalRef | None = Field(
        default=None, description="For an adapter: the base model's ModelArtifact, which it is checked against."
    )
    # Absent means the default in all three: a name is the hash of what is there.
    load_format: LoadFormat | None = Field(
        default=None,
        description="For a base model: which weights are wanted, as in a VLLMDeployment's model.loadFormat.",
    )
    trust_remote_code: bool | None = Field(
        default=None, description="Whether Python files of the repository are wanted too; otherwise they never are."
    )
    without_tokenizer: bool | None = Field(
        default=None, description="For a base model or draft model: whether it is complete without a tokenizer."
    )
    pickled_weights: Literal["AllowScanned"] | None = Field(
        default=None,
        description="For an adapter: pickled weights are taken where there are no others, once a scan found nothing but tensors.",
    )
    credentials: CredentialsIdentity | None = Field(
        default=None, description="Set by the operator: the Secret of the adapter or deployment that wants the content."
    )
    assume_role: AssumeRole | None = Field(
        default=None,
        description="Set by the operator: the role in which the adapter or deployment reads its source.s3.",
    )

    @property
    def role(self) -> AssumeRole | None:
        """The role in which the source is read, whoever named it."""
        return self.assume_role or self.source.role


class Failure(ApiModel):
    """How the last attempt failed."""

    attempt: int = Field(description="Which attempt.")
    reason: str = Field(description="The reason, as in the Ready condition.")
    message: str = Field(description="What happened.", max_length=2048)
    time: datetime = Field(description="When.")
    needed_bytes: int | None = Field(
        default=None, description="With InsufficientSpace: how many bytes would have to go first."
    )


class ModelArtifactStatus(ApiModel):
    """What is true of the content now."""

    conditions: Conditions = ()
    observed_generation: int | None = Field(default=None, description="The generation that this status speaks of.")
    source: str | None = Field(
        default=None, description="The source for kubectl get: a repository, or s3://bucket/prefix."
    )
    attempt: int | None = Field(
        default=None, description="Number of the current or last attempt; its Job is <artifact>-<attempt>."
    )
    finished_attempt: int | None = Field(
        default=None, description="Number of the last attempt whose result is recorded here."
    )
    failed_attempts: int | None = Field(
        default=None, description="Failures since the last success; they set the back-off."
    )
    next_attempt_time: datetime | None = Field(default=None, description="When the next attempt starts by itself.")
    last_failure: Failure | None = Field(default=None, description="How the last failed attempt ended.")
    credentials_version: str | None = Field(
        default=None,
        description="resourceVersion of the Secret that the last attempt used: a changed one is tried at once.",
    )
    unreferenced_since: datetime | None = Field(default=None, description="Since when nothing wants the content.")
    resolved_revision: str | None = Field(
        default=None,
        description="The commit that the revision resolved to; for a source without revisions a hash of its listing.",
    )
    revision: str | None = Field(default=None, description="resolvedRevision, shortened for kubectl get.")
    digest: str | None = Field(default=None, description="Digest over the content's sorted (path, size, sha256).")
    size_bytes: int | None = Field(default=None, description="Size of the content in bytes.")
    size: str | None = Field(default=None, description="Size for kubectl get.")
    files: int | None = Field(default=None, description="Number of files.")
    path: str | None = Field(default=None, description="Path of the content, relative to the cache's root.")
    rank: int | None = Field(default=None, description="Largest rank, of an adapter.")
    target_modules: tuple[str, ...] | None = Field(default=None, description="Modules that an adapter changes.")
    progress: Progress | None = Field(
        default=None, description="Where the running download is; written every 2 s at most."
    )


class ModelArtifact(Resource):
    """An artifact as read from the API server."""

    kind: Literal["ModelArtifact"] = "ModelArtifact"
    spec: ModelArtifactSpec
    status: ModelArtifactStatus = ModelArtifactStatus()


RESOURCE = ResourceInfo(
    kind="ModelArtifact",
    plural="modelartifacts",
    singular="modelartifact",
    short_names=("mart",),
    spec=ModelArtifactSpec,
    status=ModelArtifactStatus,
    description="One source at one requested revision in one ModelCache: downloaded once, verified, shared.",
    columns=(
        PrinterColumn("Type", ".spec.type"),
        PrinterColumn("Source", ".status.source"),
        PrinterColumn("Revision", ".status.revision"),
        PrinterColumn("Size", ".status.size"),
        PrinterColumn("Percent", ".status.progress.percent", "integer"),
        PrinterColumn("Rate", ".status.progress.rate"),
        PrinterColumn("ETA", ".status.progress.eta", description="Time left at this rate."),
        PrinterColumn("Unused", ".status.unreferencedSince", "date", description="Since when nothing wants it."),
        reason_column(),
        AGE,
        PrinterColumn("Message", '.status.conditions[?(@.type=="Ready")].message', priority=1),
    ),
)
