"""Which ModelArtifact an adapter or a deployment wants. Equal wants have equal names, and so share one download."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lora_operator.api.artifact import ModelArtifactSpec
from lora_operator.api.cache import ModelCache
from lora_operator.api.model import ModelSpec
from lora_operator.api.sources.source import Source
from lora_operator.conditions import find
from lora_operator.constants import (
    ANNOTATION_DEFAULT_CACHE,
    ANNOTATION_REFRESH,
    API_VERSION,
    LABEL_MANAGED_BY,
    MANAGED_BY,
    Condition,
    Reason,
)
from lora_operator.errors import ReasonError
from lora_operator.names import artifact_name

Credentials = tuple[str, str, str, str]  # namespace, name, key and UID of a Secret


Role = Literal["model", "tokenizer", "draftModel"]  # the field of a deployment's spec.model that asks for it


@dataclass(frozen=True)
class ContentWant:
    """One content that a deployment's engines read: its base model, or what goes with it."""

    role: Role
    source: Source
    details: Mapping[
        str, Any
    ]  # of the artifact's spec, in wire form; a default is left out, so names stay what they were


def model_wants(model: ModelSpec) -> tuple[ContentWant, ...]:
    """All that the engines read, the base model first."""
    code: dict[str, Any] = {"trustRemoteCode": True} if model.trust_remote_code else {}
    # vLLM loads a draft model in the base model's format.
    weights = code if model.load_format == "auto" else {**code, "loadFormat": model.load_format}
    without = {"withoutTokenizer": True}
    wants = [ContentWant("model", model.source, {**weights, **(without if model.tokenizer else {})})]
    if model.tokenizer is not None:
        wants.append(ContentWant("tokenizer", model.tokenizer.source, {"type": "Tokenizer", **code}))
    if model.draft_model is not None:
        wants.append(ContentWant("draftModel", model.draft_model.source, {**weights, **without}))
    return tuple(wants)


def find_cache(
    caches: Mapping[tuple[str, str], ModelCache], *, namespace: str, ref: str | None, used_by: str
) -> ModelCache:
    """The ModelCache of a deployment: the named one, else the namespace's default.

    Raises ReasonError(CacheNotReady) where there is none, more than one default, or no claim that content could be in.
    """
    cache = _chosen_cache(caches, namespace=namespace, ref=ref, used_by=used_by)
    if cache.content_identity is None:
        ready = find(cache.status.conditions, Condition.READY)
        raise ReasonError(
            Reason.CACHE_NOT_READY,
            f"ModelCache {namespace}/{cache.metadata.name} has no claim yet: {ready.message if ready else 'it is new'}",
        )
    return cache


def _chosen_cache(
    caches: Mapping[tuple[str, str], ModelCache], *, namespace: str, ref: str | None, used_by: str
) -> ModelCache:
    if ref is not None:
        cache = caches.get((namespace, ref))
        if cache is None:
            raise ReasonError(
                Reason.CACHE_NOT_READY,
                f"ModelCache {namespace}/{ref}, named by {used_by}, does not exist: create it or change cacheRef",
            )
        return cache
    defaults = [
        cache
        for (cache_namespace, _), cache in caches.items()
        if cache_namespace == namespace and cache.metadata.annotations.get(ANNOTATION_DEFAULT_CACHE) == "true"
    ]
    if len(defaults) != 1:
        raise ReasonError(
            Reason.CACHE_NOT_READY,
            f"{used_by} names no ModelCache and namespace {namespace} has {len(defaults)} annotated "
            f'{ANNOTATION_DEFAULT_CACHE}="true": set cacheRef, or annotate exactly one',
        )
    return defaults[0]


def build_artifact(
    *,
    cache: ModelCache,
    source: Source,
    base_artifact: str | None,
    credentials: Credentials | None,
    details: Mapping[str, Any] | None = None,
    refresh: str | None = None,
) -> dict[str, Any]:
    """The ModelArtifact for a want: an adapter's where `base_artifact` is given, else what `details` say, or a base model's.

    `refresh` tells one resolving of a moving ref from the others; None: the first.
    """
    spec = ModelArtifactSpec.model_validate(
        {
            "cacheRef": {"name": cache.metadata.name},
            "type": "BaseModel" if base_artifact is None else "Adapter",
            "source": source.anonymous().to_wire(),
            "baseModelRef": {"name": base_artifact} if base_artifact is not None else None,
            "credentials": dict(zip(("namespace", "name", "key", "uid"), credentials, strict=True))
            if credentials
            else None,
            "assumeRole": source.role.to_wire() if source.role is not None and not cache.spec.offline else None,
            **(details or {}),
        }
    )
    metadata: dict[str, Any] = {
        "name": wanted_name(spec, cache, refresh=refresh),
        "namespace": cache.metadata.namespace,
        "labels": {LABEL_MANAGED_BY: MANAGED_BY},
    }
    if refresh is not None:
        metadata["annotations"] = {ANNOTATION_REFRESH: refresh}
    return {"apiVersion": API_VERSION, "kind": "ModelArtifact", "metadata": metadata, "spec": spec.to_wire()}


def wanted_name(spec: ModelArtifactSpec, cache: ModelCache, *, refresh: str | None) -> str:
    """The name that the ModelArtifact of such a spec has as a want's: by it wanters know it, and lend it their credentials."""
    want: dict[str, Any] = {"spec": spec.to_wire(), "cache": cache.content_identity}
    if spec.source.hugging_face is not None:
        want["endpoint"] = cache.spec.hugging_face.endpoint
    if refresh is not None:
        want["refresh"] = refresh
    return artifact_name(source=spec.source.member.title, want=want)
