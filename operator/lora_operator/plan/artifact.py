"""What follows for a ModelArtifact: when a Job starts, what its end means, when the next attempt is due, when it may go."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from lora_operator.api.artifact import Failure, ModelArtifact, ModelArtifactStatus
from lora_operator.api.cache import ModelCache
from lora_operator.conditions import Verdict, failing, find, is_true, merge, ok, reason_of, with_stalled
from lora_operator.constants import ANNOTATION_REFRESH, LABEL_MANAGED_BY, MANAGED_BY, REASONS, Condition, Reason, Retry
from lora_operator.errors import ReasonError
from lora_operator.names import format_size, short_revision
from lora_operator.plan.job_view import JobView, given_up
from lora_operator.plan.preconditions import MAX_FAILURE_SHOWN, has_new_room, held_up, queued, without_room
from lora_operator.plan.progress import describe, look_every, told
from lora_operator.plan.source_policy import refused_by_pin
from lora_operator.plan.wants import Credentials
from lora_operator.wire.jobs import FetchProgress, FetchResult

FIRST_BACKOFF_SECONDS = 10
# By the class of the reason; one that is otherwise waited for (a Job found the volume not mounted) is no reason to give up.
MAX_BACKOFF_SECONDS = {Retry.BACKOFF: 300, Retry.OUTSIDE: 600, Retry.WAIT: 300, Retry.NONE: None}
NEVER_STARTED = (Reason.JOB_UNSCHEDULABLE, Reason.JOB_IMAGE_PULL, Reason.JOB_NOT_STARTED)
POLL_SECRET_SECONDS = 10.0
POLL_TURN_SECONDS = 10.0


@dataclass(frozen=True)
class SecretVersion:
    """The Secret that an attempt would use, as far as its metadata tells."""

    credentials: Credentials
    version: str  # resourceVersion


@dataclass(frozen=True)
class ArtifactObservation:
    """All that is known when an artifact is planned."""

    artifact: ModelArtifact
    cache: ModelCache | None
    base: ModelArtifact | None  # the base model's, where the spec names one
    wanted: bool | None  # None: not every adapter and deployment has been looked at yet, or a status still names it
    secret: SecretVersion | ReasonError | None  # None: access is anonymous
    jobs: tuple[JobView, ...]
    progress: FetchProgress | None
    running: int = 1  # Jobs of all artifacts
    evicting: bool = False  # content is being removed from the volume, where it waits for its turn
    ahead: int = 0  # downloads in the same cache that start before it; 0: it has its turn, where it waits for it
    others_wait: bool = False  # for a place in the same cache


@dataclass(frozen=True)
class ArtifactPlan:
    """What is to be done and said."""

    status: ModelArtifactStatus | None
    start: int | None = None  # the attempt whose Job is to be created, or completed where it was left half made
    delete_jobs: tuple[str, ...] = ()
    delete_artifact: bool = False
    requeue_after: float | None = None


def is_by_hand(artifact: ModelArtifact) -> bool:
    """Whether a user made the artifact: to warm a cache. It is wanted as long as it exists."""
    return artifact.metadata.labels.get(LABEL_MANAGED_BY) != MANAGED_BY


def plan_artifact(seen: ArtifactObservation, *, now: datetime) -> ArtifactPlan:
    """What is done for one artifact now: at most one Job is started or given up, and its status says why."""
    plan, status = _plan(seen, now=now), seen.artifact.status
    title = seen.artifact.spec.source.member.title
    if plan.status is None and (not status.conditions or status.source == title):
        return plan
    return replace(plan, status=_update(plan.status or status, source=title))


def waits_for_turn(seen: ArtifactObservation, *, now: datetime) -> bool:
    """Whether nothing but its turn can keep it from starting a Job; what is seen of turns does not matter."""
    return _before_start(seen, now=now) is None


def _plan(seen: ArtifactObservation, *, now: datetime) -> ArtifactPlan:
    return _before_start(seen, now=now) or _plan_start(seen, now=now)


def _before_start(seen: ArtifactObservation, *, now: datetime) -> ArtifactPlan | None:
    """What is to be done where no Job may start, whoever waits beside it; None where one may."""
    artifact = seen.artifact
    status = artifact.status
    if seen.wanted is None:
        return ArtifactPlan(status=None, requeue_after=5.0)
    if not seen.wanted and not is_by_hand(artifact):
        return _plan_unwanted(seen, now=now)
    delete, finished_attempt = _recorded_jobs(seen), status.finished_attempt or 0
    current = next((job for job in _own_jobs(seen) if job.attempt == finished_attempt + 1), None)
    if current is not None and current.result is not None:
        return _plan_finished(seen, current, current.result, now=now)
    if current is not None and seen.others_wait and (late := given_up(current, now=now)) is not None:
        return _plan_finished(seen, current, late, now=now)
    if current is not None:
        return _plan_running(seen, current, delete, now=now)
    if is_true(status.conditions, Condition.READY):
        if status.unreferenced_since is not None and not artifact.spec.source.member.pinned:
            verdict = failing(Reason.QUEUED, f"wanted again: resolves {artifact.spec.source.member.requested} anew")
            return ArtifactPlan(_write(seen, verdict, now=now, unreferenced_since=None), None, delete, requeue_after=0)
        unchanged = status.unreferenced_since is None
        return ArtifactPlan(None if unchanged else _update(status, unreferenced_since=None), delete_jobs=delete)
    return _held_back(seen, delete, now=now)


def _own_jobs(seen: ArtifactObservation) -> list[JobView]:
    return [job for job in seen.jobs if job.owner_uid == seen.artifact.metadata.uid]


def _recorded_jobs(seen: ArtifactObservation) -> tuple[str, ...]:
    """The Jobs whose ends stand in the status."""
    return tuple(job.name for job in _own_jobs(seen) if job.attempt <= (seen.artifact.status.finished_attempt or 0))


def _plan_unwanted(seen: ArtifactObservation, *, now: datetime) -> ArtifactPlan:
    status = seen.artifact.status
    jobs = tuple(job.name for job in _own_jobs(seen))
    # One that an earlier refresh was for is never gone back to; its files stay like all others.
    if status.path is None or ANNOTATION_REFRESH in seen.artifact.metadata.annotations:
        return ArtifactPlan(status=None, delete_artifact=True)
    if status.unreferenced_since is not None:
        return ArtifactPlan(status=None, delete_jobs=jobs)
    return ArtifactPlan(_update(status, unreferenced_since=now.replace(microsecond=0)), delete_jobs=jobs)


def _held_back(seen: ArtifactObservation, delete: tuple[str, ...], *, now: datetime) -> ArtifactPlan | None:
    """What waits for the cache, for the Secret, or for the next attempt's time; None: for none of these."""
    status = seen.artifact.status
    waits = held_up(seen.artifact, seen.cache, seen.base)
    if waits is not None:
        return ArtifactPlan(_write(seen, waits, now=now), delete_jobs=delete, requeue_after=30.0)
    if isinstance(seen.secret, ReasonError):
        return ArtifactPlan(
            _write(
                seen,
                failing(seen.secret.reason, f"{seen.secret.message}; looked for every {POLL_SECRET_SECONDS:.0f} s"),
                now=now,
            ),
            delete_jobs=delete,
            requeue_after=POLL_SECRET_SECONDS,
        )
    version = seen.secret.version if seen.secret else None
    failure = status.last_failure
    outside = failure is not None and REASONS[reason_of(failure.reason)].retry is Retry.OUTSIDE
    renewed = outside and version is not None and status.credentials_version not in (None, version)
    renewed = renewed or has_new_room(status, seen.cache)
    if failure is not None and not renewed:
        # Written again, for something else (a cache that was away) may have been said in between.
        waiting = _write(
            seen, without_room(_failed(failure, due=status.next_attempt_time), failure, seen.cache), now=now
        )
        if status.next_attempt_time is None:  # permanent
            return ArtifactPlan(waiting, delete_jobs=delete)
        wait = (status.next_attempt_time - now).total_seconds()
        if wait > 0:
            poll = POLL_SECRET_SECONDS if outside and version is not None else wait
            return ArtifactPlan(waiting, delete_jobs=delete, requeue_after=min(wait, poll))
    return None


def _plan_start(seen: ArtifactObservation, *, now: datetime) -> ArtifactPlan:
    status, delete = seen.artifact.status, _recorded_jobs(seen)
    failure, attempt = status.last_failure, (status.finished_attempt or 0) + 1
    if seen.ahead or seen.evicting:
        return ArtifactPlan(
            _write(
                seen, queued(seen.artifact, seen.cache, failure, ahead=None if seen.evicting else seen.ahead), now=now
            ),
            delete_jobs=delete,
            # Whose turn comes is woken; this is for what it says, and each look asks for its Secret.
            requeue_after=max(POLL_TURN_SECONDS, min(float(seen.ahead), 300.0)),
        )
    verdict = _starting(failure, attempt)
    version = seen.secret.version if isinstance(seen.secret, SecretVersion) else None
    return ArtifactPlan(
        _write(seen, verdict, now=now, attempt=attempt, credentials_version=version, progress=None),
        start=attempt,
        delete_jobs=delete,
        requeue_after=look_every(seen.running),
    )


def _plan_running(seen: ArtifactObservation, job: JobView, delete: tuple[str, ...], *, now: datetime) -> ArtifactPlan:
    start = job.attempt if job.suspended else None
    progress = told(seen.artifact.status.progress, seen.progress, now=now)
    if job.waiting is not None:
        verdict = failing(*job.waiting)
    elif progress is not None and progress.phase in ("Verifying", "Publishing"):
        verdict = failing(
            Reason.VERIFYING, f"{_what(seen.artifact)}: {progress.phase.lower()} {format_size(progress.bytes_total)}"
        )
    elif progress is not None and progress.phase == "Downloading":
        verdict = failing(
            Reason.DOWNLOADING,
            f"{_what(seen.artifact)}: {describe(progress)}",
        )
    elif job.pod is not None:
        verdict = failing(Reason.DOWNLOADING, f"{_what(seen.artifact)}: asks the source")
    else:
        verdict = _starting(seen.artifact.status.last_failure, job.attempt)
    return ArtifactPlan(
        _write(seen, verdict, now=now, attempt=job.attempt, progress=progress),
        start=start,
        delete_jobs=delete,
        requeue_after=look_every(seen.running),
    )


def _plan_failed(artifact: ModelArtifact, job: JobView, result: FetchResult, *, now: datetime) -> ArtifactPlan:
    """The attempt is over without content. A Job that never got to run says what kept it, not that its time was over."""
    reason, message = result.reason or Reason.JOB_FAILED, result.message
    shown = find(artifact.status.conditions, Condition.READY)
    if reason is Reason.JOB_TIMEOUT and shown is not None and shown.reason in NEVER_STARTED:
        reason = reason_of(shown.reason)
        message = f"{shown.message[:MAX_FAILURE_SHOWN]}; so the Job came to its deadline"
    failed = plan_failure(artifact, reason, message, attempt=job.attempt, now=now, needed_bytes=result.needed_bytes)
    return ArtifactPlan(failed, delete_jobs=(job.name,), requeue_after=0)


def _plan_finished(seen: ArtifactObservation, job: JobView, result: FetchResult, *, now: datetime) -> ArtifactPlan:
    status = seen.artifact.status
    refused = refused_by_pin(seen.artifact.spec.source, result.digest) if result.ok else None
    if refused is not None:
        result = FetchResult(ok=False, reason=refused.reason, message=refused.message)
    if not result.ok:
        return _plan_failed(seen.artifact, job, result, now=now)
    size = format_size(result.size_bytes)
    verdict = ok(
        Reason.READY, f"{seen.artifact.spec.source.member.title}@{short_revision(result.resolved_revision)}, {size}"
    )
    return ArtifactPlan(
        ModelArtifactStatus(
            conditions=_conditions(seen.artifact, verdict, now=now),
            observed_generation=seen.artifact.metadata.generation,
            attempt=job.attempt,
            finished_attempt=job.attempt,
            failed_attempts=0,
            credentials_version=status.credentials_version,
            resolved_revision=result.resolved_revision,
            revision=short_revision(result.resolved_revision),
            digest=result.digest,
            size_bytes=result.size_bytes,
            size=size,
            files=result.files,
            path=result.path,
            rank=result.rank,
            target_modules=result.target_modules or None,
        ),
        delete_jobs=(job.name,),
    )


def plan_failure(
    artifact: ModelArtifact,
    reason: Reason,
    message: str,
    *,
    attempt: int,
    now: datetime,
    needed_bytes: int | None = None,
) -> ModelArtifactStatus:
    """The status after an attempt failed: back-off by the reason's class, kept here so that it survives restarts."""
    status = artifact.status
    failed = (status.failed_attempts or 0) + 1
    limit = MAX_BACKOFF_SECONDS[REASONS[reason].retry]
    due = None
    if limit is not None:
        delay = min(FIRST_BACKOFF_SECONDS * 2 ** min(failed - 1, 10), limit)
        due = now.replace(microsecond=0) + timedelta(seconds=delay)
    failure = Failure(
        attempt=attempt,
        reason=reason,
        message=message[:2048],
        time=now.replace(microsecond=0),
        needed_bytes=needed_bytes,
    )
    return _update(
        status,
        conditions=_conditions(artifact, _failed(failure, due=due), now=now),
        observed_generation=artifact.metadata.generation,
        attempt=attempt,
        finished_attempt=attempt,
        failed_attempts=failed,
        next_attempt_time=due,
        last_failure=failure,
        progress=None,
    )


def _starting(failure: Failure | None, attempt: int) -> Verdict:
    """What the last attempt met stays readable until this one is further."""
    if failure is None:
        return failing(Reason.QUEUED, f"attempt {attempt}: waits for its Job's pod to start")
    return failing(reason_of(failure.reason), f"{failure.message[:MAX_FAILURE_SHOWN]}; attempt {attempt} is starting")


def _failed(failure: Failure, *, due: datetime | None) -> Verdict:
    message = failure.message[:MAX_FAILURE_SHOWN]
    if due is None:
        message += "; not tried again until the spec changes or the object is made anew"
    else:
        message += f"; attempt {failure.attempt} failed, tried again at {due:%H:%M:%S}Z"
    return failing(reason_of(failure.reason), message)


def _conditions(artifact: ModelArtifact, verdict: Verdict, *, now: datetime) -> tuple[object, ...]:
    return merge(
        artifact.status.conditions,
        with_stalled({Condition.READY: verdict}),
        generation=artifact.metadata.generation,
        now=now,
    )


def _write(seen: ArtifactObservation, verdict: Verdict, *, now: datetime, **changes: object) -> ModelArtifactStatus:
    return _update(
        seen.artifact.status,
        conditions=_conditions(seen.artifact, verdict, now=now),
        observed_generation=seen.artifact.metadata.generation,
        **changes,
    )


def _update(status: ModelArtifactStatus, **changes: object) -> ModelArtifactStatus:
    return status.model_copy(update=changes)


def _what(artifact: ModelArtifact) -> str:
    return f"downloading {artifact.spec.source.member.asked}"
