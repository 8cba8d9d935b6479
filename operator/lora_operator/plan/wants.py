"""Which ModelArtifact an adapter or a deployment wants. Equal wants have equal names, and so share one download."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_operator.api.artifact import ModelArtifactSpec
from lora_operator.api.cache import ModelCache
from lora_operator.api.source import Source
from lora_operator.conditions import find
from lora_operator.constants import (
    ANNOTATION_DEFAULT_CACHE,
    API_VERSION,
    LABEL_MANAGED_BY,
    MANAGED_BY,
    Condition,
    Reason,
)
from lora_operator.errors import ReasonError
from lora_operator.names import artifact_name

Credentials = tuple[str, str, str, str]  # namespace, name, key and UID of a Secret


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


def source_refused(source: Source, cache: ModelCache) -> ReasonError | None:
    """SourceNotAllowed where the source names an endpoint that the cache does not allow, character by character."""
    endpoint = source.s3.endpoint if source.s3 is not None else None
    if endpoint is None or endpoint in cache.spec.s3.allowed_endpoints:
        return None
    return ReasonError(
        Reason.SOURCE_NOT_ALLOWED,
        f"ModelCache {cache.metadata.namespace}/{cache.metadata.name} does not allow the S3 endpoint {endpoint}: use one that "
        "it allows, or ask its owner to add this one to spec.s3.allowedEndpoints",
    )


def build_artifact(
    *, cache: ModelCache, source: Source, base_artifact: str | None, credentials: Credentials | None
) -> dict[str, Any]:
    """The ModelArtifact for a want: an adapter's where `base_artifact` is given, else a base model's."""
    spec = ModelArtifactSpec.model_validate(
        {
            "cacheRef": {"name": cache.metadata.name},
            "type": "BaseModel" if base_artifact is None else "Adapter",
            "source": source.anonymous().to_wire(),
            "baseModelRef": {"name": base_artifact} if base_artifact is not None else None,
            "credentials": dict(zip(("namespace", "name", "key", "uid"), credentials, strict=True))
            if credentials
            else None,
        }
    ).to_wire()
    want = {"spec": spec, "cache": cache.content_identity}
    if source.hugging_face is not None:
        want["endpoint"] = cache.spec.hugging_face.endpoint
    return {
        "apiVersion": API_VERSION,
        "kind": "ModelArtifact",
        "metadata": {
            "name": artifact_name(source=source.anonymous().member.title, want=want),
            "namespace": cache.metadata.namespace,
            "labels": {LABEL_MANAGED_BY: MANAGED_BY},
        },
        "spec": spec,
    }
