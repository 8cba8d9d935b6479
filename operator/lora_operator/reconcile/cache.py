"""One ModelCache: look at its claim, write its status."""

from __future__ import annotations

from lora_operator.errors import NotFoundError
from lora_operator.kube import CLAIMS, MODEL_CACHES
from lora_operator.plan.cache import CacheObservation, plan_cache
from lora_operator.reconcile.context import Context
from lora_operator.reconcile.store import Key, Kind


async def reconcile_cache(context: Context, key: Key) -> float | None:
    """Bring one cache's status to what is true. Returns after how many seconds to look again by itself."""
    cache = context.store.caches.get((key.namespace, key.name))
    if cache is None:
        return None
    try:
        claim = await context.kube.get(CLAIMS, key.namespace, cache.spec.storage.existing_claim)
    except NotFoundError:
        claim = None
    observation = CacheObservation(cache=cache, claim=claim, artifacts=context.store.artifacts_of(cache.key))
    status, again = plan_cache(observation, now=context.now())
    await context.write_status(MODEL_CACHES, Kind.MODEL_CACHE, cache, status)
    return again
