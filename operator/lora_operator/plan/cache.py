"""What follows for a ModelCache: whether its claim can be used, which nodes can mount it, and what is in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from lora_operator.api.artifact import ModelArtifact
from lora_operator.api.cache import EvictionStatus, ModelCache, ModelCacheStatus, VolumeFigures
from lora_operator.api.storage import READ_WRITE_MANY, READ_WRITE_ONCE
from lora_operator.conditions import Verdict, failing, is_true, merge, ok, with_stalled
from lora_operator.constants import Condition, Reason
from lora_operator.desired.claim import claim_labels
from lora_operator.errors import ReasonError
from lora_operator.kube.objects import Claim
from lora_operator.kube.pods import Pod
from lora_operator.names import format_size, parse_size
from lora_operator.plan.eviction import held_up_verdict

POLL_SECONDS = {
    Reason.BOUND: 300.0,
    Reason.CLAIM_PENDING: 3.0,
    Reason.CLAIM_NOT_FOUND: 5.0,
    Reason.CLAIM_UNUSABLE: 5.0,
    Reason.CLAIM_REFUSED: 10.0,
    Reason.NAME_TAKEN: 10.0,
    Reason.CACHE_NOT_WRITABLE: 60.0,
}


@dataclass(frozen=True)
class CacheObservation:
    """All that is known when a cache is planned."""

    cache: ModelCache
    claim: Claim | None  # None: it does not exist, or is not this cache's
    artifacts: Sequence[ModelArtifact]  # of this cache
    refused: ReasonError | None = None  # why the claim that the template leads to can't be had
    binding_mode: str | None = None  # of the StorageClass of a claim that is not bound; None: there is no such class
    pods: Sequence[Pod] = ()  # that are labelled as this cache's: those that are kept on one node
    eviction: EvictionStatus | None = None
    reclaimable: int = 0  # bytes
    volume: VolumeFigures | None = None  # what a Job told since it was last written down


def plan_cache(seen: CacheObservation, *, now: datetime) -> tuple[ModelCacheStatus, float]:
    """The status, and after how many seconds to look again: claims are not watched."""
    cache = seen.cache
    claim = seen.claim
    ready = _ready(seen)
    verdicts = with_stalled({Condition.READY: ready})
    verdicts[Condition.SINGLE_NODE] = _single_node(seen, ready)
    volume = _volume(seen)
    if volume is not None:
        verdicts[Condition.SPACE_LOW] = space_verdict(cache, volume, claim_capacity=claim.capacity if claim else None)
    if seen.eviction is not None:
        verdicts[Condition.EVICTION_HELD_UP] = held_up_verdict(seen.eviction)
    present = [a for a in seen.artifacts if is_true(a.status.conditions, Condition.READY)]
    status = ModelCacheStatus(
        conditions=merge(cache.status.conditions, verdicts, generation=cache.metadata.generation, now=now),
        observed_generation=cache.metadata.generation,
        claim_name=cache.claim_name,
        claim_uid=claim.uid if claim else None,
        capacity=claim.capacity if claim else None,
        access_modes=(claim.access_modes if claim else ()) or None,
        artifacts=len(present),
        size=format_size(sum(a.status.size_bytes or 0 for a in present)),
        reclaimable_bytes=seen.reclaimable,
        reclaimable=format_size(seen.reclaimable),
        eviction=seen.eviction,
        volume=volume,
        used=format_size(volume.used_bytes) if volume else None,
        free=format_size(volume.free_bytes) if volume and volume.total_bytes else None,
    )
    return status, POLL_SECONDS[ready.reason]


def _volume(seen: CacheObservation) -> VolumeFigures | None:
    """The newest figures, with the capacity that the claim had when they came; those of another claim are nothing to go by."""
    status = seen.cache.status
    uid = seen.claim.uid if seen.claim else None
    same = uid is None or status.claim_uid in (None, uid)
    known = [figures for figures in (status.volume if same else None, seen.volume) if figures is not None]
    newest = max(known, key=lambda figures: figures.time, default=None)
    if newest is None or newest.claim_capacity is not None:
        return newest
    return newest.model_copy(update={"claim_capacity": seen.claim.capacity if seen.claim else None})


def space_verdict(cache: ModelCache, volume: VolumeFigures, *, claim_capacity: str | None) -> Verdict:
    """Whether the volume, or what the cache may hold of it, is as full as its owner wants to be warned of."""
    warn = cache.spec.warn_at_percent
    fullness = []
    resized = claim_capacity is not None and volume.claim_capacity not in (None, claim_capacity)
    since = f", as of {volume.time:%Y-%m-%d %H:%M:%S}Z; the next Job looks again"
    if volume.total_bytes and not resized:
        taken = volume.total_bytes - volume.free_bytes
        fullness.append(
            (
                taken * 100 // volume.total_bytes,
                f"{format_size(taken)} of the volume's {format_size(volume.total_bytes)}",
            )
        )
    capacity = parse_size(cache.spec.capacity)
    if capacity:
        fullness.append(
            (
                volume.used_bytes * 100 // capacity,
                f"{format_size(volume.used_bytes)} of the {cache.spec.capacity} that the cache may hold",
            )
        )
    percent, text = max(fullness, default=(0, "the volume does not tell its size"))
    if fullness and percent >= warn:
        return ok(
            Reason.NEARLY_FULL,
            f"{text} are taken, {percent}% (spec.warnAtPercent: {warn}){since}: enlarge it, or remove content that nothing uses",
        )
    if resized:
        return Verdict(
            None,
            Reason.VOLUME_RESIZED,
            f"PersistentVolumeClaim {cache.claim_name} has {claim_capacity}, and had {volume.claim_capacity} when a Job last looked{since}",
        )
    return failing(Reason.ENOUGH_SPACE, f"{text} are taken, {percent}%{since}" if fullness else text)


def why_not_ours(cache: ModelCache, claim: Claim) -> ReasonError | None:
    """Why a claim of the name that a template leads to can't be taken; None where it was made for a cache of this name."""
    where = f"PersistentVolumeClaim {cache.metadata.namespace}/{cache.claim_name}"
    if any(claim.labels.get(name) != value for name, value in claim_labels(cache).items()):
        return ReasonError(
            Reason.NAME_TAKEN,
            f"{where} exists and was not made for this ModelCache: name it in spec.storage.existingClaim to use it, "
            "or give the ModelCache another name",
        )
    owner = claim.owner
    if owner is not None and owner.uid != cache.metadata.uid:
        return ReasonError(
            Reason.CLAIM_UNUSABLE,
            f"{where} belongs to {owner.kind} {owner.name} of before and is deleted with it, once no pod mounts it: end those",
        )
    return None


def _ready(seen: CacheObservation) -> Verdict:
    name = seen.cache.claim_name
    where = f"PersistentVolumeClaim {seen.cache.metadata.namespace}/{name}"
    if seen.refused is not None:
        return failing(seen.refused.reason, seen.refused.message)
    if seen.claim is None:
        return failing(
            Reason.CLAIM_NOT_FOUND, f"{where} does not exist: create it or change spec.storage.existingClaim"
        )
    unusable = _why_unusable(seen.claim)
    if unusable is not None:
        return failing(Reason.CLAIM_UNUSABLE, f"{where} {unusable}")
    unwritable = [
        artifact.status.last_failure
        for artifact in seen.artifacts
        if artifact.status.last_failure is not None
        and artifact.status.last_failure.reason == Reason.CACHE_NOT_WRITABLE
        and not is_true(artifact.status.conditions, Condition.READY)
        and artifact.status.unreferenced_since is None  # else no Job will find out that it can be written again
    ]
    if unwritable:
        return failing(Reason.CACHE_NOT_WRITABLE, max(unwritable, key=lambda failure: failure.time).message)
    if not seen.claim.is_bound:
        return failing(Reason.CLAIM_PENDING, f"{where} is not bound: {_why_pending(seen, seen.claim)}")
    return ok(Reason.BOUND, f"PersistentVolumeClaim {name} is bound")


def _why_unusable(claim: Claim) -> str | None:
    if claim.is_deleting:
        return "is being deleted, which waits for the pods that mount it: end those, then it can be made anew"
    if claim.phase == "Lost":
        return "has lost its volume"
    if claim.volume_mode == "Block":
        return "has volumeMode Block: a cache needs a file system, make a claim with volumeMode Filesystem"
    if not {READ_WRITE_MANY, READ_WRITE_ONCE} & set(claim.access_modes):
        return (
            f"asks for {', '.join(claim.access_modes) or 'no access mode'}: a Job writes to the volume while engines read, "
            "so make a claim with ReadWriteMany, or with ReadWriteOnce for one node"
        )
    return None


def _why_pending(seen: CacheObservation, claim: Claim) -> str:
    """What it waits for: the first consumer, which is in order, or something that may never come."""
    name = claim.storage_class
    look = f"see kubectl describe pvc -n {seen.cache.metadata.namespace} {seen.cache.claim_name}"
    if name is None:
        return f"it names no StorageClass, and the cluster has no default one; {look}"
    if name == "":
        return f"it has an empty storageClassName, so it waits for a PersistentVolume that fits; {look}"
    if seen.binding_mode is None:
        return f"StorageClass {name} does not exist: create it, or make the claim with another one"
    if seen.binding_mode != "WaitForFirstConsumer":
        return f"StorageClass {name} has not given it a volume; where that lasts, {look}"
    node = claim.selected_node
    if node is not None:
        return f"its first consumer goes to node {node}, and StorageClass {name} makes the volume; where that lasts, {look}"
    return f"StorageClass {name} waits for the first consumer, which will be a download Job's pod; nothing is wrong"


def _single_node(seen: CacheObservation, ready: Verdict) -> Verdict:
    modes = seen.claim.access_modes if seen.claim else ()
    if not modes:
        return Verdict(None, ready.reason, ready.message)
    if READ_WRITE_MANY in modes:
        return failing(Reason.READ_WRITE_MANY, "pods on any node can mount the claim")
    seated: dict[str, int] = {}
    waiting = 0
    for pod in seen.pods:
        if pod.has_ended:
            continue
        if node := pod.spec.node:
            seated[node] = seated.get(node, 0) + 1
        else:
            waiting += 1
    where = ", ".join(f"node {node} ({_pods(count)})" for node, count in sorted(seated.items())) or "no node yet"
    return ok(
        Reason.READ_WRITE_ONCE,
        f"PersistentVolumeClaim {seen.cache.claim_name} is not ReadWriteMany, so engines and Jobs are kept on one node: "
        f"{where}; {_pods(waiting)} waiting for a place there",
    )


def _pods(count: int) -> str:
    return f"{count} pod{'' if count == 1 else 's'}"
