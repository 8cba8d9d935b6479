"""The contents that a deployment's engines read beside adapters: base model, tokenizer, draft model. As far as they are known."""

from __future__ import annotations

from dataclasses import dataclass

from lora_operator.api.artifact import ModelArtifact
from lora_operator.api.cache import ModelCache
from lora_operator.conditions import is_true
from lora_operator.constants import CACHE_MOUNT, Condition
from lora_operator.desired.command_line import Auxiliary
from lora_operator.errors import ReasonError
from lora_operator.plan.wants import Role


@dataclass(frozen=True)
class Content:
    """One content that the engines read, as far as it can be wanted."""

    role: Role
    artifact_name: str | None
    artifact: ModelArtifact | None
    blocked: ReasonError | None  # why no artifact can be wanted: cache or credentials


@dataclass(frozen=True)
class ModelContents:
    """All of them, the base model first."""

    cache: ModelCache | None
    contents: tuple[Content, ...]
    refresh: str | None = None  # value of the refresh annotation that the contents are from
    note: str = ""  # what becomes of a refresh that is not done

    @property
    def base(self) -> Content:
        """The base model, which every deployment has and which stands first."""
        return self.contents[0]

    @property
    def is_ready(self) -> bool:
        """Whether everything is complete in the cache."""
        return all(model_is_ready(content.artifact) for content in self.contents)

    @property
    def is_blocked(self) -> bool:
        """Whether something can't even be wanted."""
        return any(content.blocked is not None for content in self.contents)

    def path(self, role: Role) -> str | None:
        """Where a content lies in the pods; None where the spec has none of it."""
        artifact = next((content.artifact for content in self.contents if content.role == role), None)
        return f"{CACHE_MOUNT}/{artifact.status.path}" if artifact is not None else None

    @property
    def auxiliary(self) -> Auxiliary:
        """Where in the pods that lies which goes with the base model."""
        return Auxiliary(tokenizer=self.path("tokenizer"), draft_model=self.path("draftModel"))


def model_is_ready(artifact: ModelArtifact | None) -> bool:
    """Whether one of these contents is complete in the cache."""
    return artifact is not None and is_true(artifact.status.conditions, Condition.READY)
