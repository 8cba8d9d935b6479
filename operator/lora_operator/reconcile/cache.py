"""One ModelCache: look at its claim, or make it, and write its status."""

from __future__ import annotations

from lora_operator.api.cache import ModelCache
from lora_operator.constants import LABEL_CACHE, Reason
from lora_operator.desired.claim import build_claim, wanted_owners
from lora_operator.errors import ForbiddenError, InvalidObjectError, KubeError, NotFoundError, ReasonError
from lora_operator.kube.kinds import CLAIMS, STORAGE_CLASSES
from lora_operator.kube.objects import Claim, mapping
from lora_operator.kube.pods import Pod
from lora_operator.names import label_value
from lora_operator.plan.cache import CacheObservation, plan_cache, why_not_ours
from lora_operator.reconcile.context import Context
from lora_operator.reconcile.eviction import Eviction, reconcile_eviction, remove_recorded_jobs
from lora_operator.reconcile.store import Key


async def reconcile_cache(context: Context, key: Key) -> float | None:
    """Bring one cache's status to what is true. Returns after how many seconds to look again by itself."""
    cache = context.store.caches.get((key.namespace, key.name))
    if cache is None:
        context.records.caches.pop((key.namespace, key.name), None)
        context.records.turns.prune(context.store.caches)
        return None
    refused: ReasonError | None = None
    try:
        claim = await _claim(context, cache)
    except ReasonError as error:
        claim, refused = None, error
    failed: KubeError | None = None
    try:
        eviction = await reconcile_eviction(context, cache)
    except KubeError as error:  # what is true of the cache itself is said all the same
        failed, eviction = error, Eviction(cache.status.eviction, cache.status.reclaimable_bytes or 0)
    observation = CacheObservation(
        cache=cache,
        claim=claim,
        artifacts=context.store.artifacts_of(cache.key),
        refused=refused,
        binding_mode=await _binding_mode(context, claim) if claim else None,
        pods=_pods(context, cache),
        eviction=eviction.status,
        reclaimable=eviction.reclaimable,
        volume=context.records.caches.peek(cache.key).volume,
    )
    status, again = plan_cache(observation, now=context.clock.now())
    await context.statuses.write(cache, status)
    if failed is not None:
        raise failed
    await remove_recorded_jobs(context, key)
    return again if eviction.requeue_after is None else min(again, eviction.requeue_after)


async def _claim(context: Context, cache: ModelCache) -> Claim | None:
    """The claim, made where a template says so; None where one that should exist does not. Raises ReasonError."""
    namespace, name = cache.metadata.namespace, cache.claim_name
    try:
        body = await context.kube.get(CLAIMS, namespace, name)
    except NotFoundError:
        body = None
    claim = Claim.parse(body) if body is not None else None
    if cache.spec.storage.existing_claim is not None:
        return claim
    try:
        if body is None or claim is None:
            return Claim.parse(await context.kube.create(build_claim(cache)))
        if (error := why_not_ours(cache, claim)) is not None:
            raise error
        present = mapping(body.get("metadata")).get("ownerReferences") or []
        if (wanted := wanted_owners(cache, present)) != present:
            metadata = {"ownerReferences": wanted, "resourceVersion": claim.resource_version}
            return Claim.parse(await context.kube.patch(CLAIMS, namespace, name, {"metadata": metadata}))
    except (ForbiddenError, InvalidObjectError) as error:
        raise ReasonError(Reason.CLAIM_REFUSED, f"spec.storage.volumeClaimTemplate: {error}") from error
    return claim


async def _binding_mode(context: Context, claim: Claim) -> str | None:
    """The volumeBindingMode of the class of a claim that is not bound; None where there is no class of that name."""
    if not claim.storage_class or claim.is_bound:
        return None
    try:
        found = await context.kube.get(STORAGE_CLASSES, "", claim.storage_class)
    except NotFoundError:
        return None
    return str(found.get("volumeBindingMode"))


def _pods(context: Context, cache: ModelCache) -> list[Pod]:
    """Pods labelled as this cache's; only such that are kept on one node are."""
    value = label_value(cache.metadata.name)
    return [
        pod
        for (namespace, _), pod in sorted(context.store.pods.items())
        if namespace == cache.metadata.namespace and pod.labels.get(LABEL_CACHE) == value
    ]
