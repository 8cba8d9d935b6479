"""What the artifacts of one cache share: turns to run a Job, and what Jobs told of the volume."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime

from lora_operator.api.artifact import ModelArtifact
from lora_operator.api.bounds import DEFAULT_MAX_CONCURRENT
from lora_operator.api.cache import VolumeFigures
from lora_operator.kube.kinds import Kind
from lora_operator.kube.workloads import Job
from lora_operator.plan import job_view
from lora_operator.plan.artifact import ArtifactObservation, waits_for_turn
from lora_operator.plan.fair_share import Ticket
from lora_operator.reconcile.context import Context
from lora_operator.reconcile.store import Key, ObjectKey
from lora_operator.reconcile.turns import Running


def take_turn(context: Context, seen: ArtifactObservation, *, now: datetime) -> ArtifactObservation:
    """What is seen, with whether it is the artifact's turn where it waits for that. Awaits nothing: turns are taken one by one.

    One whose turn it is has its place from here on: `Turns.started` must follow.
    """
    artifact, turns, cache = seen.artifact, context.records.turns, _cache_key(seen.artifact)
    namespaces = wanting_namespaces(context, artifact)
    turns.use(cache, artifact.metadata.name, namespaces if seen.wanted else ())
    if not waits_for_turn(seen, now=now):
        turns.leave(artifact.key)
        return seen
    if is_evicting(context, cache):
        return replace(seen, evicting=True)
    since = artifact.status.next_attempt_time or artifact.metadata.creation_timestamp or now
    ticket = Ticket(since, artifact.metadata.name, namespaces, adapter=artifact.spec.type == "Adapter")
    limit = seen.cache.spec.download.max_concurrent if seen.cache else DEFAULT_MAX_CONCURRENT
    ahead = turns.ahead(cache, ticket, running_jobs(context, cache), limit=limit)
    if not ahead:
        turns.start(cache, artifact.metadata.name)
    return replace(seen, ahead=ahead)


def claim_of(context: Context, cache: ObjectKey) -> ObjectKey:
    """The claim behind a cache: several caches may have one."""
    found = context.store.caches.get(cache)
    return (cache[0], found.claim_name if found is not None else cache[1])


def caches_of(context: Context, claim: ObjectKey) -> list[ObjectKey]:
    """The caches over a claim, and those of its namespace that artifacts name and nobody knows: theirs may be this one."""
    caches, namespace = context.store.caches, claim[0]
    named = {(namespace, a.spec.cache_ref.name) for a in context.store.artifacts.values() if a.key[0] == namespace}
    return [key for key in caches if claim_of(context, key) == claim] + sorted(named - caches.keys())


def is_evicting(context: Context, cache: ObjectKey) -> bool:
    """Whether content is being removed from the cache's volume, or is about to be."""
    claim = claim_of(context, cache)
    if claim in context.records.evicting:
        return True
    for (namespace, _), job in context.store.jobs.items():
        if namespace != cache[0] or job.owner is None or job.owner.kind != Kind.MODEL_CACHE or has_ended(context, job):
            continue
        if claim_of(context, (namespace, job.owner.name)) == claim:
            return True
    return False


def wanting_namespaces(context: Context, artifact: ModelArtifact) -> tuple[str, ...]:
    """On whose account a download goes: its wanters' namespaces; its own for one made by hand."""
    wanters = context.records.wanters(artifact.key)
    return tuple(sorted({key.namespace for key in wanters})) or (artifact.metadata.namespace,)


def running_jobs(context: Context, cache: ObjectKey) -> Running:
    """The artifacts of a cache whose Job is under way, with the namespaces that it is for."""
    found: Running = {}
    for artifact in _running(context, cache):
        found[artifact.metadata.name] = wanting_namespaces(context, artifact)
    return found


def note_ended_jobs(context: Context, seen: ArtifactObservation) -> None:
    """A Job has ended: the next ones may start, and the cache learns what the Job told of the volume."""
    artifact = seen.artifact
    own = [job for job in seen.jobs if job.owner_uid == artifact.metadata.uid]
    new = [job for job in own if job.attempt > (artifact.status.finished_attempt or 0)]
    ended = [job.result for job in new if job.result is not None]
    if not ended:
        return
    cache = _cache_key(artifact)
    for name in context.records.turns.next(cache, len(ended), running_jobs(context, cache)):
        context.enqueue(Key(Kind.MODEL_ARTIFACT, artifact.metadata.namespace, name))
    told = [result.volume for result in ended if result.volume is not None]
    if told:
        volume = told[-1]
        context.records.caches[cache].volume = VolumeFigures(
            total_bytes=volume.total_bytes,
            free_bytes=volume.free_bytes,
            used_bytes=volume.used_bytes,
            time=context.clock.now().replace(microsecond=0),
        )
        context.enqueue(Key(Kind.MODEL_CACHE, *cache))


def _running(context: Context, cache: ObjectKey) -> list[ModelArtifact]:
    store, found = context.store, []
    for (namespace, _), job in store.jobs.items():
        if (
            namespace != cache[0]
            or job.owner is None
            or job.owner.kind != Kind.MODEL_ARTIFACT
            or has_ended(context, job)
        ):
            continue
        artifact = store.artifacts.get((namespace, job.owner.name))
        if artifact is not None and artifact.spec.cache_ref.name == cache[1]:
            found.append(artifact)
    return found


def has_ended(context: Context, job: Job) -> bool:
    """Whether a Job is over, as far as its pods are known."""
    return job_view.has_ended(job, context.store.pods.values(), now=context.clock.now())


def _cache_key(artifact: ModelArtifact) -> ObjectKey:
    return (artifact.metadata.namespace, artifact.spec.cache_ref.name)
