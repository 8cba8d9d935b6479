"""Folders of volumes as sources: of another claim, which is copied, and of the cache's own volume, which is used in place."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Final, Self

from pydantic import Field

from lora_operator.api.common import ApiModel, ObjectName, cel
from lora_operator.api.sources.base import AllowPatterns, IgnorePatterns, SourceMember
from lora_operator.source_kinds import RESERVED_FOLDERS

_INSIDE: Final = "!self.startsWith('/') && !self.contains('//') && !self.split('/').exists(p, p == '..' || p == '.')"
_RESERVED: Final = ", ".join(f"'{name.lower()}'" for name in RESERVED_FOLDERS)
_OWN: Final = (
    f"!self.startsWith('.') && !(self.split('/')[0].lowerAscii() in [{_RESERVED}])",
    f"path must not be in a folder of the operator's own: one that begins with '.', {', '.join(RESERVED_FOLDERS)}",
)

NamespaceOrAll = Annotated[str, Field(max_length=63, pattern=r"^(\*|[a-z0-9]([-a-z0-9]*[a-z0-9])?)$")]
Namespaces = Annotated[
    tuple[NamespaceOrAll, ...],
    Field(
        description="Namespaces whose adapters may name it too, * for all. Objects in the cache's own namespace always may.",
        max_length=64,
        json_schema_extra={"x-kubernetes-list-type": "set"},
    ),
]


class ClaimSource(SourceMember):
    """A folder of a PersistentVolumeClaim in the cache's namespace; it is mounted read-only and copied into the cache."""

    claim_name: ObjectName = Field(
        description="Name of the claim, one of the ModelCache's spec.persistentVolumeClaim.allowedClaims."
    )
    path: str = Field(
        default="",
        description="The folder inside the claim's volume; default: its root.",
        max_length=512,
        json_schema_extra=cel(
            (_INSIDE, "path must be a folder inside the volume: relative, without empty parts, '.' and '..'")
        ),
    )
    allow_patterns: AllowPatterns = ()
    ignore_patterns: IgnorePatterns = ()

    @property
    def title(self) -> str:
        return f"pvc://{self.claim_name}/{self.path}".rstrip("/")

    def anonymous(self) -> Self:
        return self.model_copy(update={"path": self.path.strip("/")})


class LocalSource(SourceMember):
    """A folder that is in the cache's volume already; its files are checked and used in place, never written or removed."""

    path: str = Field(
        description="The folder, relative to the volume's root; in one of the ModelCache's spec.local.allowedPaths.",
        min_length=1,
        max_length=512,
        json_schema_extra=cel(
            (_INSIDE, "path must be a folder inside the cache's volume: relative, without empty parts, '.' and '..'"),
            _OWN,
        ),
    )
    allow_patterns: AllowPatterns = ()
    ignore_patterns: IgnorePatterns = ()

    @property
    def title(self) -> str:
        return f"local://{self.path}".rstrip("/")

    def anonymous(self) -> Self:
        return self.model_copy(update={"path": self.path.strip("/")})


class AllowedClaim(ApiModel):
    """One claim that sources may name."""

    claim_name: ObjectName = Field(description="Name of the claim, in the cache's namespace.")
    namespaces: Namespaces = ()

    def admits(self, namespace: str) -> bool:
        """Whether an adapter of this namespace, which is not the cache's own, may name it."""
        return admits(self.namespaces, namespace)


class ClaimCacheSpec(ApiModel):
    """Which claims sources of this cache may name."""

    allowed_claims: tuple[AllowedClaim, ...] = Field(
        default=(),
        description="Claims, and for whom. Who may name a claim can have all model files of it served.",
        max_length=32,
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["claimName"]},
    )


class AllowedPath(ApiModel):
    """One folder of the volume that sources may name, with all below it."""

    path: str = Field(
        description="The folder, relative to the volume's root.",
        min_length=1,
        max_length=512,
        json_schema_extra=cel(
            (_INSIDE, "path must be a folder inside the cache's volume: relative, without empty parts, '.' and '..'"),
            _OWN,
        ),
    )
    namespaces: Namespaces = ()

    def admits(self, path: str, namespace: str | None) -> bool:
        """Whether the folder `path` is this one or below it, for this namespace; None: the cache's own."""
        inside = f"{path.strip('/')}/".startswith(f"{self.path.strip('/')}/")
        return inside and (namespace is None or admits(self.namespaces, namespace))


class LocalCacheSpec(ApiModel):
    """Which folders of the cache's own volume sources may name."""

    allowed_paths: tuple[AllowedPath, ...] = Field(
        default=(),
        description="Folders, and for whom. Don't change files in them that are served: put new ones into a new folder.",
        max_length=32,
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["path"]},
    )


def admits(namespaces: Iterable[str], namespace: str) -> bool:
    """Whether a list of namespaces has this one, or all."""
    return any(name in ("*", namespace) for name in namespaces)
