"""The Hugging Face Hub as a source."""

from __future__ import annotations

from typing import Self

from pydantic import Field

from lora_operator.api.common import SecretKeyRef, cel, matches
from lora_operator.api.sources.base import AllowPatterns, IgnorePatterns, SourceMember
from lora_operator.names import is_pinned

_REPO = r"^[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)?$"
_REVISION = r"^[A-Za-z0-9_][A-Za-z0-9._/-]*$"


class HuggingFaceSource(SourceMember):
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
        return self.repo

    @property
    def asked(self) -> str:
        return f"{self.repo}@{self.revision}"

    @property
    def requested(self) -> str:
        return self.revision

    @property
    def pinned(self) -> bool:
        return is_pinned(self.revision)

    @property
    def secret(self) -> tuple[str, str] | None:
        return (self.token_secret_ref.name, self.token_secret_ref.key) if self.token_secret_ref else None

    def anonymous(self) -> Self:
        return self.model_copy(update={"token_secret_ref": None})
