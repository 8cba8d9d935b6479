"""One ModelArtifact: its Jobs, their Secrets and logs, its status; the only place where a Secret's values are held, for a moment."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace

from pydantic import ValidationError

from lora_operator.api.artifact import ModelArtifact
from lora_operator.api.cache import ModelCache
from lora_operator.api.deployment import VLLMDeployment
from lora_operator.conditions import find, is_true
from lora_operator.constants import FETCH_CONTAINER, Condition, Reason
from lora_operator.desired.job import build_credentials_secret, build_job, build_request, credentials_secret
from lora_operator.desired.job_placement import job_placement
from lora_operator.errors import (
    AlreadyExistsError,
    ConflictError,
    ForbiddenError,
    InvalidObjectError,
    KubeError,
    NotFoundError,
    ReasonError,
)
from lora_operator.kube.kinds import CLAIMS, JOBS, MODEL_ARTIFACTS, PODS, SECRETS, Kind
from lora_operator.kube.pods import Pod
from lora_operator.kube.workloads import Job
from lora_operator.names import job_name
from lora_operator.plan.artifact import ArtifactObservation, SecretVersion, is_by_hand, plan_artifact, plan_failure
from lora_operator.plan.job_view import JobView, silent_object, view_job
from lora_operator.plan.preconditions import wanters_credentials
from lora_operator.plan.progress import MIRRORED_SECONDS
from lora_operator.plan.source_policy import workload_identity
from lora_operator.plan.wants import Credentials
from lora_operator.reconcile.adapter import cache_of
from lora_operator.reconcile.context import Context
from lora_operator.reconcile.download_queue import note_ended_jobs, take_turn
from lora_operator.reconcile.pod_events import last_warning
from lora_operator.reconcile.records import Announced
from lora_operator.reconcile.store import Body, Key, ObjectKey
from lora_operator.wire.jobs import FetchProgress, FetchRequest

LOG_LINES = 20


async def reconcile_artifact(context: Context, key: Key) -> float | None:
    """Bring one artifact to what its spec says. Returns after how many seconds to look again by itself."""
    place = (key.namespace, key.name)
    artifact = context.store.artifacts.get(place)
    if artifact is None:
        context.records.artifacts.pop(place, None)
        context.records.turns.forget(place)
        context.records.turns.prune(context.store.caches)
        for name in context.records.turns.heads(key.namespace):
            context.enqueue(Key(Kind.MODEL_ARTIFACT, key.namespace, name))
        for wanter in context.records.wanters(place):
            context.enqueue(wanter)
        return None
    gathered = await _gather(context, artifact)
    # From here until something is done nothing is awaited: who wants the artifact now is not overlooked.
    now = context.clock.now()
    seen = take_turn(context, _observe(context, artifact, gathered), now=now)
    plan = plan_artifact(seen, now=now)
    note_ended_jobs(context, seen)
    if plan.delete_artifact:
        await context.kube.delete(MODEL_ARTIFACTS, *place, uid=artifact.metadata.uid)
        return None
    status, delete_jobs = plan.status, plan.delete_jobs
    if plan.start is not None:
        try:
            await _start(context, artifact, plan.start, gathered.credentials)
        except ReasonError as error:
            begun = artifact.model_copy(update={"status": plan.status or artifact.status})
            status = plan_failure(begun, error.reason, error.message, attempt=plan.start, now=context.clock.now())
            delete_jobs += _left_by(context, artifact, plan.start)
        finally:
            context.records.turns.started(_cache_key(artifact), artifact.metadata.name)
    if status not in (None, artifact.status):
        assert status is not None  # noqa: S101  a narrowing for the type checker
        if not await context.statuses.write(artifact, status):
            delete_jobs = ()  # what they led to is not written down
    _announce(context, key)  # whatever becomes of the Jobs
    for name in delete_jobs:
        await context.kube.delete(JOBS, key.namespace, name)
    return plan.requeue_after


def _cache_key(artifact: ModelArtifact) -> ObjectKey:
    return (artifact.metadata.namespace, artifact.spec.cache_ref.name)


def _announce(context: Context, key: Key) -> None:
    """Wake who wants the artifact, where what they go by has changed; for figures that move, adapters only now and then."""
    place = (key.namespace, key.name)
    artifact = context.store.artifacts.get(place)
    if artifact is None:
        return
    ready = find(artifact.status.conditions, Condition.READY)
    status, moves = artifact.status, artifact.status.progress is not None
    news = (ready and (ready.status, ready.reason), moves or (ready and ready.message), status.path, status.digest)
    message = ready.message if ready else None
    wanters, record = context.records.wanters(place), context.records.artifacts[place]
    before, now = record.announced, context.clock.monotonic()
    if before is None or before.news != news or (moves and now - before.time >= MIRRORED_SECONDS):
        if before is None or (before.news, before.adapters) != (news, message):
            record.announced = Announced(news, message, message, now)
            for wanter in wanters:
                context.enqueue(wanter)
    elif moves and before.others != message:
        record.announced = replace(before, others=message)
        for wanter in wanters:
            if wanter.kind is not Kind.LORA_ADAPTER:
                context.enqueue(wanter)


def _credentials(context: Context, artifact: ModelArtifact) -> Credentials | ReasonError | None:
    offered = {lent: None for lent in context.records.wanters(artifact.key).values() if lent is not None}
    cache = context.store.caches.get((artifact.metadata.namespace, artifact.spec.cache_ref.name))
    return wanters_credentials(artifact, cache, offered)


@dataclass(frozen=True)
class _Gathered:
    """What had to be asked for."""

    credentials: Credentials | ReasonError | None
    secret: SecretVersion | ReasonError | None
    jobs: tuple[JobView, ...]
    progress: FetchProgress | None


async def _gather(context: Context, artifact: ModelArtifact) -> _Gathered:
    """Ask for what the store does not have: Events, the Job's log, the Secret's version."""
    credentials, pods = _credentials(context, artifact), context.store.pods_of_artifact(artifact.key)
    jobs = tuple([await _view(context, artifact, job, pods) for job in context.store.jobs_of_artifact(artifact.key)])
    running = next((job for job in jobs if not job.finished and job.owner_uid == artifact.metadata.uid), None)
    secret: SecretVersion | ReasonError | None = credentials if isinstance(credentials, ReasonError) else None
    idle = running is None and not is_true(artifact.status.conditions, Condition.READY)
    if isinstance(credentials, tuple) and idle:
        secret = await _secret_version(context, credentials)
    progress = await _progress(context, artifact.metadata.namespace, running) if running else None
    return _Gathered(credentials, secret, jobs, progress)


def _observe(context: Context, artifact: ModelArtifact, gathered: _Gathered) -> ArtifactObservation:
    """All that the plan goes by, but for the artifact's turn."""
    store, namespace = context.store, artifact.metadata.namespace
    wanted: bool | None = bool(context.records.wanters(artifact.key)) or is_by_hand(artifact)
    doubtful = not wanted and (store.is_told(artifact.key) or context.records.is_made_for(artifact.key))
    if not wanted and (doubtful or not context.records.all_decided(store, namespace)):
        wanted = None  # what a status says is in use is gone by after a restart, or where a decision is taken back
    base_ref = artifact.spec.base_model_ref
    return ArtifactObservation(
        artifact=artifact,
        cache=store.caches.get(_cache_key(artifact)),
        base=store.artifacts.get((namespace, base_ref.name)) if base_ref else None,
        wanted=wanted,
        secret=gathered.secret,
        jobs=gathered.jobs,
        progress=gathered.progress,
        running=len(store.jobs),
        others_wait=context.records.turns.waits(_cache_key(artifact)),
    )


async def _view(context: Context, artifact: ModelArtifact, job: Job, known: list[Pod]) -> JobView:
    pods = await _pods_of(context, job, known)
    now = context.clock.now()
    silent = silent_object(job, pods, now=now)
    asked = context.records.artifacts[artifact.key].warnings
    warning = await last_warning(context, silent, known=asked) if silent is not None else None
    return view_job(job, pods, warning=warning, now=now)


async def _pods_of(context: Context, job: Job, known: list[Pod]) -> list[Pod]:
    """A Job's pods; asked for where the Job has ended and none of them is known to have: its watch may be ahead of the pods'."""
    view = view_job(job, known, now=context.clock.now())
    if not view.finished or view.left_result:
        return known
    selector = f"batch.kubernetes.io/job-name={job.name}"
    listed, _ = await context.kube.list(PODS, namespace=job.namespace, label_selector=selector)
    return [Pod.parse(body) for body in listed]


async def _secret_version(context: Context, credentials: Credentials) -> SecretVersion | ReasonError:
    found = await context.secrets.credentials(*credentials[:3])
    if isinstance(found, ReasonError):
        return found
    try:
        metadata = await context.kube.get_metadata(SECRETS, credentials[0], credentials[1])
    except NotFoundError:
        return ReasonError(
            Reason.CREDENTIALS_NOT_FOUND, f"Secret {credentials[0]}/{credentials[1]} does not exist: create it"
        )
    return SecretVersion(credentials=credentials, version=metadata["metadata"]["resourceVersion"])


async def _progress(context: Context, namespace: str, job: JobView) -> FetchProgress | None:
    """The last progress line in the log of the Job's pod; None where there is none yet or the log can't be had."""
    if job.pod is None:
        return None
    try:
        text = await context.kube.pod_log(namespace, job.pod, container=FETCH_CONTAINER, tail_lines=LOG_LINES)
    except KubeError:
        return None
    for line in reversed(text.splitlines()):
        try:
            return FetchProgress.model_validate_json(line)
        except ValidationError:
            continue
    return None


async def _start(
    context: Context, artifact: ModelArtifact, attempt: int, credentials: Credentials | ReasonError | None
) -> None:
    """Create the attempt's Job; with credentials: suspended, then its Secret, then let it go.

    Repeatable at every step but one: a Secret that is there before its Job was let go is not known to be ours, and may not be
    read. Such a Job never runs; the next attempt's has another Secret.
    """
    if isinstance(credentials, ReasonError):
        raise credentials
    values = await context.secrets.values(credentials) if credentials else None
    job = await _create_job(context, artifact, attempt, with_credentials=values is not None)
    if job is None:
        return
    if not job["spec"].get("suspend"):
        return  # it asks for none, or has been let go
    namespace, name, secret = artifact.metadata.namespace, job["metadata"]["name"], credentials_secret(job)
    if values is None or secret is None:
        raise ReasonError(Reason.JOB_FAILED, f"Job {namespace}/{name} was made for credentials that are not used now")
    try:
        await context.kube.create(build_credentials_secret(artifact, job=job, name=secret, values=values))
        patched = await context.kube.patch(JOBS, namespace, name, {"spec": {"suspend": False}})
        context.answers.take(Kind.JOB, patched)
    except AlreadyExistsError as error:
        raise ReasonError(
            Reason.JOB_NOT_STARTED,
            f"Secret {namespace}/{secret} exists before Job {namespace}/{name} was given its credentials, by an answer that was lost or by "
            "somebody else: the Job is deleted, and the next one has a Secret of another name",
        ) from error
    except (ForbiddenError, InvalidObjectError) as error:
        raise ReasonError(
            Reason.JOB_NOT_STARTED,
            f"Job {namespace}/{name} can't be given its credentials: {error}; raise the namespace's quota for Secrets, or change "
            "the policy that refuses it",
        ) from error


def _left_by(context: Context, artifact: ModelArtifact, attempt: int) -> tuple[str, ...]:
    """The Job of an attempt that could not be let go, where it was made: suspended, it would never come to a deadline."""
    views = (view_job(job, ()) for job in context.store.jobs_of_artifact(artifact.key))
    return tuple(job.name for job in views if (job.attempt, job.owner_uid) == (attempt, artifact.metadata.uid))


def fleets_of(context: Context, artifact: ModelArtifact) -> list[VLLMDeployment]:
    """Whose engines the content is for: the deployments that want it, also through an adapter; for what somebody made by hand
    those of its cache."""
    store, keys = context.store, set[ObjectKey]()
    for wanter in context.records.wanters(artifact.key):
        place = (wanter.namespace, wanter.name)
        if wanter.kind is Kind.VLLM_DEPLOYMENT:
            keys.add(place)
        elif (adapter := store.adapters.get(place)) is not None:
            keys.add(adapter.deployment_key)
    if found := [store.deployments[key] for key in keys if key in store.deployments]:
        return found
    beside = [d for d in store.deployments.values() if d.metadata.namespace == artifact.metadata.namespace]
    caches = ((deployment, cache_of(context, deployment)) for deployment in beside)
    cache_key = (artifact.metadata.namespace, artifact.spec.cache_ref.name)
    return [deployment for deployment, cache in caches if not isinstance(cache, ReasonError) and cache.key == cache_key]


async def _claim_uid(context: Context, artifact: ModelArtifact) -> str:
    """The UID of the claim that is the source; empty where there is none, or another source."""
    claim = artifact.spec.source.persistent_volume_claim
    if claim is None:
        return ""
    try:
        found = await context.kube.get_metadata(CLAIMS, artifact.metadata.namespace, claim.claim_name)
    except NotFoundError:
        return ""
    return str(found["metadata"]["uid"])


async def _create_job(
    context: Context, artifact: ModelArtifact, attempt: int, *, with_credentials: bool
) -> Body | None:
    """The attempt's Job, made now or before; None while a Job of an earlier artifact of this name is still going."""
    namespace = artifact.metadata.namespace
    cache = context.store.caches[(namespace, artifact.spec.cache_ref.name)]
    request = await _request(context, artifact, cache, with_credentials=with_credentials)
    placement = job_placement(cache, fleets_of(context, artifact))
    settings = context.settings
    manifest = build_job(
        artifact,
        cache,
        request,
        attempt=attempt,
        image=settings.operator_image,
        image_pull_policy=settings.operator_image_pull_policy,
        deadline_seconds=settings.job_deadline_seconds,
        resources=dict(settings.job_resources),
        nonce=secrets.token_hex(8),
        placement=placement,
    )
    try:
        job = await context.kube.create(manifest)
    except ConflictError:
        return await _existing_job(context, artifact, attempt)
    except ForbiddenError as error:
        raise ReasonError(Reason.JOB_UNSCHEDULABLE, f"the download Job was refused: {error}") from error
    except InvalidObjectError as error:
        part = f" (its node constraints are those of {placement.origin}'s podTemplate)" if placement.origin else ""
        raise ReasonError(Reason.JOB_FAILED, f"the download Job was not accepted{part}: {error}") from error
    context.answers.take(Kind.JOB, job)
    return job


async def _request(
    context: Context, artifact: ModelArtifact, cache: ModelCache, *, with_credentials: bool
) -> FetchRequest:
    base_ref = artifact.spec.base_model_ref
    base = context.store.artifacts.get((artifact.metadata.namespace, base_ref.name)) if base_ref else None
    return build_request(
        artifact,
        cache,
        base_model_path=base.status.path if base else None,
        with_credentials=with_credentials,
        workload_identity=workload_identity(artifact.spec.source, cache, with_credentials=with_credentials),
        claim_uid=await _claim_uid(context, artifact),
    )


async def _existing_job(context: Context, artifact: ModelArtifact, attempt: int) -> Body | None:
    """The Job that has the attempt's name already; None where it is of an earlier artifact of this name."""
    namespace = artifact.metadata.namespace
    job = await context.kube.get(JOBS, namespace, job_name(artifact.metadata.name, attempt))
    owner = Job.parse(job).owner
    if owner is None or owner[:2] != (Kind.MODEL_ARTIFACT, artifact.metadata.name):
        raise ReasonError(
            Reason.JOB_FAILED,
            f"Job {namespace}/{job['metadata']['name']} exists and is not this artifact's: delete it",
        ) from None
    if owner.uid != artifact.metadata.uid:
        return None
    context.answers.take(Kind.JOB, job)
    return job
