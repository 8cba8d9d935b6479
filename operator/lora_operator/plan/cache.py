"""What follows for a ModelCache: whether its claim can be used, and what is in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from lora_operator.api.artifact import ModelArtifact
from lora_operator.api.cache import ModelCache, ModelCacheStatus
from lora_operator.conditions import Verdict, failing, is_true, merge, ok, with_stalled
from lora_operator.constants import Condition, Reason
from lora_operator.names import format_size

POLL_SECONDS = {
    Reason.BOUND: 300.0,
    Reason.CLAIM_PENDING: 3.0,
    Reason.CLAIM_NOT_FOUND: 5.0,
    Reason.CACHE_NOT_WRITABLE: 60.0,
}


@dataclass(frozen=True)
class CacheObservation:
    """All that is known when a cache is planned."""

    cache: ModelCache
    claim: dict[str, Any] | None  # None: it does not exist
    artifacts: Sequence[ModelArtifact]  # of this cache


def plan_cache(seen: CacheObservation, *, now: datetime) -> tuple[ModelCacheStatus, float]:
    """The status, and after how many seconds to look again: claims are not watched."""
    cache = seen.cache
    verdict = _ready(seen)
    ready = [a for a in seen.artifacts if is_true(a.status.conditions, Condition.READY)]
    claim_status = (seen.claim or {}).get("status") or {}
    status = ModelCacheStatus(
        conditions=merge(
            cache.status.conditions,
            with_stalled({Condition.READY: verdict}),
            generation=cache.metadata.generation,
            now=now,
        ),
        observed_generation=cache.metadata.generation,
        claim_name=cache.spec.storage.existing_claim,
        capacity=(claim_status.get("capacity") or {}).get("storage"),
        access_modes=tuple(claim_status.get("accessModes") or ()) or None,
        artifacts=len(ready),
        size=format_size(sum(a.status.size_bytes or 0 for a in ready)),
    )
    return status, POLL_SECONDS[verdict.reason]


def _ready(seen: CacheObservation) -> Verdict:
    namespace, name = seen.cache.metadata.namespace, seen.cache.spec.storage.existing_claim
    if seen.claim is None:
        return failing(
            Reason.CLAIM_NOT_FOUND,
            f"PersistentVolumeClaim {namespace}/{name} does not exist: create it or change spec.storage.existingClaim",
        )
    phase = (seen.claim.get("status") or {}).get("phase", "Pending")
    if phase == "Lost":
        return failing(Reason.CLAIM_NOT_FOUND, f"PersistentVolumeClaim {namespace}/{name} has lost its volume")
    unwritable = [
        artifact.status.last_failure
        for artifact in seen.artifacts
        if artifact.status.last_failure is not None
        and artifact.status.last_failure.reason == Reason.CACHE_NOT_WRITABLE
        and not is_true(artifact.status.conditions, Condition.READY)
    ]
    if unwritable:
        return failing(Reason.CACHE_NOT_WRITABLE, max(unwritable, key=lambda failure: failure.time).message)
    if phase != "Bound":
        return _pending(seen.claim, namespace, name)
    return ok(Reason.BOUND, f"PersistentVolumeClaim {name} is bound")


def _pending(claim: dict[str, Any], namespace: str, name: str) -> Verdict:
    return failing(
        Reason.CLAIM_PENDING,
        f"PersistentVolumeClaim {namespace}/{name} is not bound: class "
        f"{claim.get('spec', {}).get('storageClassName') or 'none'}; see its events",
    )
