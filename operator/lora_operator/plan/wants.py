"""Which ModelArtifact an adapter or a deployment wants. Equal wants have equal names, and so share one download."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_operator.api.artifact import ModelArtifactSpec
from lora_operator.api.cache import ModelCache
from lora_operator.api.source import Source
from lora_operator.constants import (
    ANNOTATION_DEFAULT_CACHE,
    ANNOTATION_REFRESH,
    API_VERSION,
    LABEL_MANAGED_BY,
    MANAGED_BY,
    Reason,
)
from lora_operator.errors import ReasonError
from lora_operator.names import artifact_name

Credentials = tuple[str, str, str, str]  # namespace, name, key and UID of a Secret


def find_cache(
    caches: Mapping[tuple[str, str], ModelCache], *, namespace: str, ref: str | None, used_by: str
) -> ModelCache:
    """The ModelCache of a deployment: the named one, else the namespace's default.

    Raises ReasonError(CacheNotReady) where there is none, or more than one default.
    """
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
    refresh: str | None = None,
) -> dict[str, Any]:
    """The ModelArtifact for a want: an adapter's where `base_artifact` is given, else a base model's.

    `refresh` tells one resolving of a moving ref from the others; None: the first.
    """
    assert source.hugging_face is not None  # noqa: S101  the schema's rule; a narrowing for the type checker
    huggingface = source.hugging_face.model_copy(update={"token_secret_ref": None})
    spec = ModelArtifactSpec.model_validate(
        {
            "cacheRef": {"name": cache.metadata.name},
            "type": "BaseModel" if base_artifact is None else "Adapter",
            "source": {"huggingFace": huggingface.to_wire(), "path": source.path.strip("/")},
            "baseModelRef": {"name": base_artifact} if base_artifact is not None else None,
            "credentials": dict(zip(("namespace", "name", "key", "uid"), credentials, strict=True))
            if credentials
            else None,
        }
    ).to_wire()
    want = {"spec": spec, "cache": cache.metadata.uid, "endpoint": cache.spec.hugging_face.endpoint}
    if refresh is not None:
        want["refresh"] = refresh
    metadata: dict[str, Any] = {
        "name": artifact_name(repo=huggingface.repo, want=want),
        "namespace": cache.metadata.namespace,
        "labels": {LABEL_MANAGED_BY: MANAGED_BY},
    }
    if refresh is not None:
        metadata["annotations"] = {ANNOTATION_REFRESH: refresh}
    return {"apiVersion": API_VERSION, "kind": "ModelArtifact", "metadata": metadata, "spec": spec}
