"""Where content comes from: shared by adapters, base models and artifacts."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from lora_operator.api.common import ApiModel, SecretKeyRef, cel, matches

_REPO = r"^[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)?$"
_REVISION = r"^[A-Za-z0-9_][A-Za-z0-9._/-]*$"

Pattern = Annotated[str, Field(min_length=1, max_length=256)]


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
    allow_patterns: tuple[Pattern, ...] = Field(
        default=(),
        description="Only files that match one of these (as fnmatch does, * crosses folders); default: what vLLM needs.",
        max_length=64,
    )
    ignore_patterns: tuple[Pattern, ...] = Field(
        default=(), description="No file that matches one of these.", max_length=64
    )
    token_secret_ref: SecretKeyRef | None = Field(
        default=None,
        description="Token for private and gated repositories. Without it access is anonymous.",
    )


class Source(ApiModel):
    """Exactly one kind of source, and a folder inside it."""

    hugging_face: HuggingFaceSource | None = Field(default=None, description="A repository on the Hugging Face Hub.")
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


# CEL that belongs to a field of type Source; the message names the field for the reader of a refused manifest.
SOURCE_RULES = cel(("has(self.huggingFace)", "source must have exactly one of: huggingFace"))
