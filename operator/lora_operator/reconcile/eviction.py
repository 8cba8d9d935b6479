"""Removing content from one cache's volume: observe, plan, delete the artifacts, make the Job, and read what it told."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Literal

from lora_operator.api.cache import EvictionStatus, ModelCache, VolumeFigures
from lora_operator.constants import ANNOTATION_EVICT, ANNOTATION_REFRESH, CACHE_MOUNT
from lora_operator.desired.evict_job import build_evict_job, evict_job_name
from lora_operator.desired.job_placement import job_placement
from lora_operator.errors import ConflictError, ForbiddenError, InvalidObjectError
from lora_operator.kube.kinds import JOBS, MODEL_ARTIFACTS, PODS, Kind
from lora_operator.kube.pods import Pod
from lora_operator.kube.workloads import Job
from lora_operator.plan.eviction import (
    MAX_VIEWS,
    POLL_SECONDS,
    POLL_UNSURE_SECONDS,
    EvictionPlan,
    could_not,
    encode_keep,
    is_due,
    plan_eviction,
    read_result,
)
from lora_operator.plan.eviction_candidates import (
    EvictionObservation,
    EvictJob,
    reclaimable_bytes,
    short_of_room,
    view_name,
)
from lora_operator.plan.job_view import attempt_of, job_container, lost_since, silent_object, view_job
from lora_operator.reconcile.adapter import cache_of
from lora_operator.reconcile.context import Context
from lora_operator.reconcile.download_queue import caches_of, claim_of, has_ended, is_evicting
from lora_operator.reconcile.pod_events import last_warning
from lora_operator.reconcile.store import Key, ObjectKey
from lora_operator.reconcile.stored_lists import read_lists
from lora_operator.reconcile.usage import used_views
from lora_operator.wire.jobs import EvictRequest


@dataclass(frozen=True)
class Eviction:
    """What the cache's status says of it, and what is to be done once it does."""

    status: EvictionStatus | None
    reclaimable: int
    requeue_after: float | None = None


async def reconcile_eviction(context: Context, cache: ModelCache) -> Eviction:
    """Look at one cache, and begin or end a removal where one is due."""
    seen = await _observe(context, cache)
    volume = context.records.caches.peek(cache.key).volume or cache.status.volume
    used = volume.used_bytes if volume is not None and seen.fetching_since is None else 0
    reclaimable = reclaimable_bytes((*seen.artifacts, *seen.beside), seen.unwanted, used=used)
    plan = plan_eviction(seen, now=context.clock.now())
    claim = claim_of(context, cache.key)
    if plan.start is not None and is_evicting(context, cache.key):  # from another cache over the claim
        plan = EvictionPlan(cache.status.eviction, requeue_after=POLL_SECONDS)
    if plan.start is not None:
        context.records.evicting.add(claim)
        try:
            plan = await _start(context, cache, plan, plan.start)
        finally:
            context.records.evicting.discard(claim)  # the Job is in the store by now
    if plan.status is not None and plan.status.message != (cache.status.eviction or EvictionStatus()).message:
        for artifact in short_of_room(seen):  # which say it, too
            context.enqueue(Key(Kind.MODEL_ARTIFACT, *artifact.key), after=1.0)
    if plan.ended:
        for key in caches_of(context, claim):
            for artifact in context.store.artifacts_of(key):
                context.enqueue(Key(Kind.MODEL_ARTIFACT, *artifact.key), after=1.0)  # the status is written first
    return Eviction(plan.status, reclaimable, plan.requeue_after)


async def remove_recorded_jobs(context: Context, key: Key) -> None:
    """Remove the Jobs whose ends stand in the cache's status, and those that it gives up: they count until their pods are gone."""
    cache = context.store.caches.get((key.namespace, key.name))
    if cache is None or cache.status.eviction is None:
        return
    for (namespace, name), job in list(context.store.jobs.items()):
        ours = namespace == key.namespace and job.is_controlled_by(cache.metadata.uid)
        if ours and not job.is_deleting and attempt_of(job) <= cache.status.eviction.attempt:
            how: Literal["Background", "Foreground"] = "Background" if has_ended(context, job) else "Foreground"
            await context.kube.delete(JOBS, namespace, name, uid=job.uid, propagation=how)


async def _observe(context: Context, cache: ModelCache) -> EvictionObservation:
    attempt = (cache.status.eviction.attempt if cache.status.eviction else 0) + 1
    known = context.store.jobs.get((cache.metadata.namespace, evict_job_name(cache.metadata.name, attempt)))
    job = await _look(context, cache, known) if known and known.is_controlled_by(cache.metadata.uid) else None
    if job is not None and job.result is not None and (told := job.result.volume) is not None:
        context.records.caches[cache.key].volume = VolumeFigures(
            total_bytes=told.total_bytes,
            free_bytes=told.free_bytes,
            used_bytes=told.used_bytes,
            time=context.clock.now().replace(microsecond=0),
        )
    await read_lists(context, cache.metadata.namespace)
    # From here on nothing is awaited: what is seen and what follows from it are of one moment.
    store, records, namespace = context.store, context.records, cache.metadata.namespace
    artifacts = store.artifacts_of(cache.key)
    caches = caches_of(context, claim_of(context, cache.key))
    beside = [artifact for key in caches if key != cache.key for artifact in store.artifacts_of(key)]
    views = frozenset(view_name(a) for a in (*artifacts, *beside)) - {""}
    swept = _is_swept(context, cache, views)
    seen = EvictionObservation(
        cache=cache,
        artifacts=artifacts,
        beside=beside,
        unwanted=frozenset(
            a.metadata.name for a in artifacts if not records.wanters(a.key) and not store.is_told(a.key)
        ),
        used=frozenset(),
        unsure=None,
        job=job,
        fetching_since=_fetching_since(context, caches),
        unread=any(_is_unread(context, job) for job in store.jobs.values() if job.namespace == namespace),
        swept=swept,
    )
    if not is_due(seen, now=context.clock.now()):
        return seen
    used, unsure = used_views(context, namespace)
    if len(views | used) > MAX_VIEWS:
        unsure = unsure or f"there are more than {MAX_VIEWS} contents, more than one Job is told"
    return replace(seen, used=used, unsure=unsure)


def _is_swept(context: Context, cache: ModelCache, views: frozenset[str]) -> bool:
    """Whether somebody has deleted an artifact whose content no pod has any more, and the status does not say so yet.

    Those that refreshes were for are deleted when they are superseded: their content is unused like other, and may be gone back to.
    """
    store, record, eviction = context.store, context.records.caches[cache.key], cache.status.eviction
    before = record.contents
    gone = {key: view for key, view in before.items() if key not in store.artifacts and view not in views}
    used, unsure = used_views(context, cache.metadata.namespace) if gone else (frozenset(), None)
    held = {key: view for key, view in gone.items() if view in used or unsure is not None}
    if len(held) < len(gone) and cache.spec.eviction.policy != "Never" and not (eviction and eviction.left_over):
        return True
    lasting = (a for a in store.artifacts_of(cache.key) if ANNOTATION_REFRESH not in a.metadata.annotations)
    record.contents = {a.key: view for a in lasting if (view := view_name(a))} | held
    return False


def _fetching_since(context: Context, caches: Collection[ObjectKey]) -> datetime | None:
    """When the oldest download began whose end is not known; one may have ended long ago on a node that is lost."""
    store, now = context.store, context.clock.now()
    began = [now for key in caches if context.records.turns.starting(key)]
    for (namespace, _), job in store.jobs.items():
        if job.owner is None or job.owner.kind != Kind.MODEL_ARTIFACT or has_ended(context, job):
            continue
        artifact = store.artifacts.get((namespace, job.owner.name))
        if artifact is not None and (namespace, artifact.spec.cache_ref.name) in caches:
            began.append(job.created or now)
    return min(began, default=None)


def _is_unread(context: Context, job: Job) -> bool:
    """Whether a download's Job has ended, and what it published may not be in its artifact's status yet."""
    owner = job.owner
    if owner is None or owner.kind != Kind.MODEL_ARTIFACT or not has_ended(context, job):
        return False
    artifact = context.store.artifacts.get((job.namespace, owner.name))
    if artifact is None or artifact.metadata.uid != owner.uid:
        return False
    return attempt_of(job) > (artifact.status.finished_attempt or 0)


async def _look(context: Context, cache: ModelCache, job: Job) -> EvictJob:
    found = EvictJob(job.name, since=job.created, requested=job.annotations.get(ANNOTATION_EVICT))
    known = list(context.store.pods.values())
    lost = lost_since(job, known, now=context.clock.now())
    if not has_ended(context, job):
        silent = silent_object(job, known, now=context.clock.now())
        asked = context.records.caches[cache.key].warnings
        warning = await last_warning(context, silent, known=asked) if silent is not None else None
        view = view_job(job, known, warning=warning)
        suspended = f"Job {view.name} is suspended, and not by this operator: resume it" if view.suspended else None
        return replace(found, started=view.pod is not None, trouble=view.waiting[1] if view.waiting else suspended)
    selector = f"batch.kubernetes.io/job-name={job.name}"
    listed, _ = await context.kube.list(PODS, namespace=job.namespace, label_selector=selector)
    own = [pod for pod in known if pod.is_controlled_by(job.uid)]
    ends = (job_container(pod).ended for pod in (*map(Pod.parse, listed), *own))
    message = next((ended.message for ended in ends if ended is not None and ended.message), None)
    return replace(found, result=read_result(job, message, lost=lost), lost=lost is not None)


async def _start(context: Context, cache: ModelCache, plan: EvictionPlan, attempt: int) -> EvictionPlan:
    """Delete the artifacts whose content goes, then make the Job that keeps what the others have by then."""
    claim = claim_of(context, cache.key)  # as long as the cache is known
    refused = await _delete_artifacts(context, plan)
    if refused is not None:
        return EvictionPlan(could_not(plan.status, refused, now=context.clock.now()))
    await read_lists(context, cache.metadata.namespace)
    keep, unsure = _kept(context, claim, plan)
    if unsure is not None:
        return EvictionPlan(cache.status.eviction, requeue_after=POLL_UNSURE_SECONDS)
    manifest = _manifest(context, cache, plan, attempt, keep=keep)
    try:
        context.answers.take(Kind.JOB, await context.kube.create(manifest))
    except ConflictError:
        if await _is_there(context, cache, manifest["metadata"]["name"]):
            return plan
        return EvictionPlan(cache.status.eviction, requeue_after=POLL_UNSURE_SECONDS)
    except (ForbiddenError, InvalidObjectError) as error:
        return EvictionPlan(could_not(plan.status, f"the Job was refused: {error}", now=context.clock.now()))
    return plan


async def _delete_artifacts(context: Context, plan: EvictionPlan) -> str | None:
    """Deletes those that nobody has come for meanwhile; says what keeps one from being deleted."""
    records, store = context.records, context.store
    for artifact in plan.remove:
        if records.wanters(artifact.key) or store.is_told(artifact.key):
            continue  # somebody has come while we deleted others
        try:
            await context.kube.delete(MODEL_ARTIFACTS, *artifact.key, uid=artifact.metadata.uid)
        except (ForbiddenError, InvalidObjectError) as error:
            return f"its object can't be deleted: {error}"
        change = store.remove(Kind.MODEL_ARTIFACT, *artifact.key, uid=artifact.metadata.uid)
        if change is not None:  # whoever wants it from now on makes it anew
            context.enqueue(change.key)
    return None


def _kept(context: Context, claim: ObjectKey, plan: EvictionPlan) -> tuple[Collection[str], str | None]:
    """The snapshots that artifacts or engines have now; or why it can't be known what engines have."""
    records, store = context.records, context.store
    used, unsure = used_views(context, claim[0])
    if unsure is not None:
        return used, unsure
    views = {view_name(a) for key in caches_of(context, claim) for a in store.artifacts_of(key)} - {""}
    # Who saw one Ready until just now may be telling pods of it.
    views |= {view_name(a) for a in plan.remove if records.wanters(a.key) or store.is_told(a.key)}
    return views | used, None


def _manifest(
    context: Context, cache: ModelCache, plan: EvictionPlan, attempt: int, *, keep: Collection[str]
) -> dict[str, Any]:
    """The eviction's Job, on nodes where the pods of deployments that use the cache run."""
    request = EvictRequest(
        cache_root=CACHE_MOUNT,
        owner=cache.status.claim_uid,
        keep=encode_keep(keep),
        built=plan.built.timestamp() if plan.built is not None else None,
    )
    beside = [d for d in context.store.deployments.values() if d.metadata.namespace == cache.metadata.namespace]
    users = [d for d in beside if isinstance(found := cache_of(context, d), ModelCache) and found.key == cache.key]
    settings = context.settings
    return build_evict_job(
        cache,
        request,
        attempt=attempt,
        requested=plan.status.requested if plan.status is not None else None,
        image=settings.operator_image,
        image_pull_policy=settings.operator_image_pull_policy,
        resources=dict(settings.job_resources),
        placement=job_placement(cache, users),
    )


async def _is_there(context: Context, cache: ModelCache, name: str) -> bool:
    """Whether the Job of that name is this cache's own; an earlier cache's goes."""
    namespace = cache.metadata.namespace
    body = await context.kube.get(JOBS, namespace, name)
    job = Job.parse(body)
    if job.is_controlled_by(cache.metadata.uid):
        context.answers.take(Kind.JOB, body)
        return True
    if job.owner is not None and job.owner.kind == Kind.MODEL_CACHE:  # an earlier cache's of this name
        await context.kube.delete(JOBS, namespace, job.name)
    return False
