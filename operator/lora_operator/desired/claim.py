"""The claim that a ModelCache's volumeClaimTemplate leads to. Made once, never changed: but for whose it is."""

from __future__ import annotations

from typing import Any

from lora_operator.api.cache import ModelCache
from lora_operator.constants import LABEL_CACHE, LABEL_MANAGED_BY, MANAGED_BY
from lora_operator.desired.common import owner_reference
from lora_operator.names import label_value


def claim_labels(cache: ModelCache) -> dict[str, str]:
    """Labels by which a claim that was made is known again, also by a ModelCache made anew."""
    return {LABEL_MANAGED_BY: MANAGED_BY, LABEL_CACHE: label_value(cache.metadata.name)}


def build_claim(cache: ModelCache) -> dict[str, Any]:
    """The PersistentVolumeClaim; with Retain nobody owns it, so it outlives its ModelCache."""
    template = cache.spec.storage.volume_claim_template
    assert template is not None  # noqa: S101  checked by the caller; a narrowing for the type checker
    metadata: dict[str, Any] = {
        "name": cache.claim_name,
        "namespace": cache.metadata.namespace,
        "labels": template.metadata.labels | claim_labels(cache),
        "annotations": dict(template.metadata.annotations),
        "ownerReferences": wanted_owners(cache, []),
    }
    spec: dict[str, Any] = {
        "accessModes": list(template.spec.access_modes),
        "resources": {"requests": {"storage": template.spec.resources.requests.storage}},
    }
    if template.spec.storage_class_name is not None:  # empty says something else than absent
        spec["storageClassName"] = template.spec.storage_class_name
    return {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": metadata, "spec": spec}


def wanted_owners(cache: ModelCache, present: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The claim's owner references: others' stay, this cache's is there where the claim is to go with it."""
    others = [owner for owner in present if owner.get("uid") != cache.metadata.uid]
    mine = [owner_reference(cache, "ModelCache")] if cache.spec.storage.reclaim_policy == "Delete" else []
    return others + mine
