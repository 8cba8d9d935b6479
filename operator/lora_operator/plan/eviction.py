"""When content of a cache is removed, and what its Jobs' ends mean; what of it goes is told by `eviction_candidates`.

Unknown is not empty. Whatever is not known for certain (`unsure`) holds up every removal, and is said.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from pydantic import ValidationError

from lora_operator.api.artifact import ModelArtifact
from lora_operator.api.cache import EvictionStatus
from lora_operator.conditions import Verdict, failing, ok
from lora_operator.constants import ANNOTATION_EVICT, Reason
from lora_operator.kube.workloads import Job
from lora_operator.names import format_size
from lora_operator.plan.eviction_candidates import (
    EvictionObservation,
    EvictJob,
    candidates,
    held_up,
    is_asked_for,
    is_expired,
    victims,
    view_name,
)
from lora_operator.wire.jobs import EvictResult, keep_mark

POLL_SECONDS: Final = 5.0
POLL_UNSURE_SECONDS: Final = 15.0
WAITS: Final = "waits, for nothing may go now"
RETRY: Final = timedelta(minutes=10)  # after the first that could not; the double after each further one
MAX_DOUBLED: Final = 3
START: Final = timedelta(minutes=2)  # in which a Job has to start, for downloads wait for it
JUST: Final = timedelta(minutes=2)  # in which pods let go of what nothing wants any more
MAX_VIEWS: Final = 10_000  # whose names fit the Job's environment


@dataclass(frozen=True)
class EvictionPlan:
    """What is to be done and said."""

    status: EvictionStatus | None
    remove: tuple[ModelArtifact, ...] = ()  # objects to be deleted before the Job is made
    start: int | None = None  # attempt whose Job is to be made
    built: datetime | None = None  # since when downloads may have published what is not known here
    ended: bool = False  # downloads may go on
    requeue_after: float | None = None


def plan_eviction(seen: EvictionObservation, *, now: datetime) -> EvictionPlan:
    """What one cache's eviction does next: begin, await its Job, record the end, or nothing."""
    status = seen.cache.status.eviction
    if seen.job is not None:
        status = _update(status, requested=seen.job.requested or (status.requested if status else None))
        if seen.job.result is not None:
            return _ended(status, seen.job, seen.job.result, now=now)
        return _awaited(status, seen.job, now=now)
    if seen.swept:
        return EvictionPlan(_update(status, left_over=True), requeue_after=0)
    if _why(seen, now) is None:
        if status is None or not (status.running or status.waiting):
            return EvictionPlan(status)
        return EvictionPlan(_update(status, running=False, waiting=False, message=None), ended=status.running)
    cause = seen.unsure or ("a download has just ended" if seen.unread else _still_served(seen, now))
    if cause is not None:
        waiting = _update(status, running=False, waiting=True, message=f"{WAITS}: {cause}"[:1024])
        return EvictionPlan(waiting, requeue_after=POLL_UNSURE_SECONDS if seen.unsure else 2.0)
    remove = tuple(victims(seen, now=now))
    if remove and not (status and status.left_over):  # whoever goes on after us has to know
        return EvictionPlan(_update(status, waiting=False, message=None, left_over=True), requeue_after=0)
    attempt = (status.attempt if status else 0) + 1
    requested = seen.cache.metadata.annotations.get(ANNOTATION_EVICT, status.requested if status else None)
    return EvictionPlan(
        _update(
            status,
            running=True,
            waiting=False,
            message=None,
            left_over=True,
            requested=requested[:256] if requested else None,
        ),
        remove=remove,
        start=attempt,
        built=seen.built,
        requeue_after=POLL_SECONDS,
    )


def is_due(seen: EvictionObservation, *, now: datetime) -> bool:
    """Whether there is a reason to remove anything, so that it has to be known what is in use."""
    return seen.job is None and _why(seen, now) is not None


def held_up_verdict(status: EvictionStatus) -> Verdict:
    """Whether content that is to go can't."""
    if status.waiting:
        return ok(Reason.EVICTION_WAITS, status.message or "")
    if status.running and status.message is not None:
        return ok(Reason.JOB_NOT_STARTED, status.message)
    if status.failures:
        times = "the last removal" if status.failures == 1 else f"each of the last {status.failures} removals"
        return ok(Reason.EVICTION_FAILED, f"{times} failed: {status.message or 'the next one is under way'}")
    return failing(Reason.NOT_HELD_UP, "no removal of content waits or has failed")


def encode_keep(views: Iterable[str]) -> str:
    """The views that stay, for the Job."""
    return base64.b64encode(b"".join(sorted({keep_mark(view) for view in views}))).decode()


def read_result(job: Job, message: str | None, *, lost: datetime | None = None) -> EvictResult | None:
    """How an eviction's Job ended, by its pod's last words; None while it runs. `lost`: as job_view.lost_since has it."""
    if not job.says_ended and lost is None:
        return None
    try:
        return EvictResult.model_validate_json(message or "")
    except ValidationError:
        if lost is not None:
            gone = f"its pod was to be gone at {lost:%H:%M:%S}Z, and nothing tells that it is"
            return EvictResult(ok=False, message=f"the node of Job {job.name} was lost: {gone}")
        failed = job.says("Failed")
        why = failed.reason if failed is not None else "no result"
        return EvictResult(
            ok=False, message=f"the Job ended without a result: {why} {' '.join((message or '').split())[-300:]}"
        )


def _why(seen: EvictionObservation, now: datetime) -> str | None:
    """What a removal is for, if there is to be one."""
    if is_asked_for(seen):
        return "asked for"
    status, cache = seen.cache.status.eviction, seen.cache
    if status is not None and _is_recent(status, now, _pause(status)):
        return None
    if cache.spec.eviction.policy != "Never":
        if held_up(seen):
            return "a download needs room"
        if any(is_expired(artifact, cache, now) for artifact in candidates(seen)):
            return "too old"
    # There is no hurry, so it keeps no download waiting.
    due = status is not None and status.left_over and not _is_recent(status, now, RETRY) and seen.fetching_since is None
    return "artifacts are gone whose files are not" if due else None


def _pause(status: EvictionStatus) -> timedelta:
    """For how long nothing is tried after the last one, where nobody asks."""
    return RETRY * 2 ** min(status.failures - 1, MAX_DOUBLED) if status.failures else timedelta(0)


def _is_recent(status: EvictionStatus, now: datetime, longest: timedelta) -> bool:
    return status.time is not None and now - status.time < longest


def _still_served(seen: EvictionObservation, now: datetime) -> str | None:
    """What was asked for a moment ago, while pods give up what was just deleted, is not to miss just that."""
    if not is_asked_for(seen):
        return None
    for artifact in seen.artifacts:
        since = artifact.status.unreferenced_since
        just = since is not None and now - since < JUST
        if just and artifact.metadata.name in seen.unwanted and view_name(artifact) in seen.used:
            return f"pods still have {artifact.metadata.name}, which nothing wants since {since:%H:%M:%S}Z"
    return None


def _awaited(status: EvictionStatus, job: EvictJob, *, now: datetime) -> EvictionPlan:
    if job.started or job.since is None or now - job.since < START:
        message = job.trouble[:1024] if job.trouble is not None else None
        running = _update(status, running=True, waiting=False, message=message)
        return EvictionPlan(running, requeue_after=POLL_SECONDS)
    why = f"Job {job.name} was given up, for downloads wait for it: it had not started after {START.seconds} s"
    why += f": {job.trouble}" if job.trouble is not None else ""
    gone = could_not(_update(status, attempt=status.attempt + 1), why, now=now)
    return EvictionPlan(gone, ended=True, requeue_after=0)


def could_not(status: EvictionStatus | None, why: str, *, now: datetime) -> EvictionStatus:
    """What is said when nothing could be removed."""
    failures = (status.failures if status else 0) + 1
    changes = {
        "running": False,
        "waiting": False,
        "failures": failures,
        "views": 0,
        "freed": "0",
        "message": why[:1024],
    }
    return _update(status, time=now.replace(microsecond=0), **changes)


def _ended(status: EvictionStatus, job: EvictJob, result: EvictResult, *, now: datetime) -> EvictionPlan:
    # What it removes yet, if it does, is nothing that came after it; and so the next one goes by it, too.
    since = (job.since if job.lost else None) or (None if result.ok else status.lost_since)
    status = _update(status, attempt=status.attempt + 1, lost_since=since)
    busy = f"{result.busy} sources were being downloaded from, so what is theirs stayed" if result.busy else None
    if result.ok:
        status = _update(
            status,
            running=False,
            waiting=False,
            left_over=result.busy > 0 or result.left_bytes > 0,
            failures=0,
            time=now.replace(microsecond=0),
            views=result.views,
            freed=format_size(result.freed_bytes),
            message=busy,
        )
    else:
        status = could_not(status, result.message, now=now)
    return EvictionPlan(status, ended=True, requeue_after=0)  # then the Job goes


def _update(status: EvictionStatus | None, **changes: object) -> EvictionStatus:
    return (status or EvictionStatus()).model_copy(update=changes)
