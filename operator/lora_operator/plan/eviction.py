"""What of a cache's content goes, and when: only what nothing wants, no pod lists and no request can use; oldest last use first.

Unknown is not empty. Whatever is not known for certain (`unsure`) holds up every removal, and is said.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from pydantic import ValidationError

from lora_operator.api.artifact import ModelArtifact
from lora_operator.api.cache import EvictionStatus, ModelCache
from lora_operator.conditions import is_true
from lora_operator.constants import ANNOTATION_EVICT, Condition, Reason
from lora_operator.manifest import EvictResult, keep_mark
from lora_operator.names import format_size, parse_duration
from lora_operator.plan.artifact import is_by_hand

POLL_SECONDS: Final = 5.0
POLL_UNSURE_SECONDS: Final = 15.0
WAITS: Final = "waits, for nothing may go now"
RETRY: Final = timedelta(minutes=10)  # after a Job that could not
JUST: Final = timedelta(minutes=2)  # in which pods let go of what nothing wants any more
MAX_VIEWS: Final = 10_000  # whose names fit the Job's environment
_VIEW: Final = re.compile(r"artifacts/([A-Za-z0-9][A-Za-z0-9._-]*)")


@dataclass(frozen=True)
class EvictJob:
    """An eviction's Job, as far as it matters."""

    name: str
    finished: bool
    result: EvictResult | None  # when finished; never None then


@dataclass(frozen=True)
class EvictionObservation:
    """All that is known when an eviction is planned."""

    cache: ModelCache
    artifacts: Sequence[ModelArtifact]  # of the cache
    unwanted: frozenset[str]  # names of those that nothing wants, and of which no status says that they are in use
    used: frozenset[str]  # names of views that something uses, or may
    unsure: str | None  # why that can't be known just now
    job: EvictJob | None  # of the attempt after the last that is recorded
    fetching: int = 0  # download Jobs of the claim that are under way
    unread: bool = False  # a download Job has ended whose result is not recorded yet
    swept: bool = False  # an artifact that had content was deleted


@dataclass(frozen=True)
class EvictionPlan:
    """What is to be done and said."""

    status: EvictionStatus | None
    remove: tuple[ModelArtifact, ...] = ()  # objects to be deleted before the Job is made
    start: int | None = None  # attempt whose Job is to be made
    careful: bool = False  # downloads are under way, which may publish what is not known here
    delete_job: str | None = None
    ended: bool = False  # downloads may go on
    requeue_after: float | None = None


def plan_eviction(seen: EvictionObservation, *, now: datetime) -> EvictionPlan:
    """Decide on one cache."""
    status = seen.cache.status.eviction
    if seen.job is not None and seen.job.result is not None:
        return _ended(seen, seen.job, seen.job.result, now=now)
    if seen.job is not None:
        running = _update(status, running=True, message=None)
        return EvictionPlan(running, requeue_after=POLL_SECONDS)
    why = _why(seen, now)
    if why is None:
        if status is None or not (status.running or _waits(status)):
            return EvictionPlan(status)
        return EvictionPlan(_update(status, running=False, message=None), ended=status.running)
    cause = seen.unsure or ("a download has just ended" if seen.unread else _still_served(seen, now))
    if cause is not None:
        waiting = _update(status, running=False, message=f"{WAITS}: {cause}"[:1024])
        return EvictionPlan(waiting, requeue_after=POLL_UNSURE_SECONDS if seen.unsure else 2.0)
    remove = tuple(victims(seen, now=now))
    if not (remove or seen.swept or _held_up(seen) or _is_asked_for(seen)):
        return EvictionPlan(status, requeue_after=POLL_UNSURE_SECONDS)  # what is too old is still in use
    attempt = (status.attempt if status else 0) + 1
    requested = seen.cache.metadata.annotations.get(ANNOTATION_EVICT, status.requested if status else None)
    return EvictionPlan(
        _update(status, running=True, message=None, requested=requested[:256] if requested else None),
        remove=remove,
        start=attempt,
        careful=seen.fetching > 0,
        requeue_after=POLL_SECONDS,
    )


def is_due(seen: EvictionObservation, *, now: datetime) -> bool:
    """Whether there is a reason to remove anything, so that it has to be known what is in use."""
    return seen.job is None and _why(seen, now) is not None


def candidates(seen: EvictionObservation) -> list[ModelArtifact]:
    """What may go, by its last use."""
    found = [
        artifact
        for artifact in seen.artifacts
        if artifact.metadata.name in seen.unwanted
        and not is_by_hand(artifact)
        and artifact.status.unreferenced_since is not None
        and artifact.status.path is not None
        and view_name(artifact) not in seen.used
    ]
    return sorted(found, key=lambda a: (a.status.unreferenced_since or datetime.max, a.metadata.name))


def victims(seen: EvictionObservation, *, now: datetime) -> list[ModelArtifact]:
    """What goes now: all that may where it was asked for, else what is too old, and as much as downloads need."""
    going = candidates(seen)
    if _is_asked_for(seen):
        return going
    shared = {view_name(a) for a in seen.artifacts if a.metadata.name not in {c.metadata.name for c in going}}
    needed = sum(
        artifact.status.last_failure.needed_bytes or artifact.status.size_bytes or 1
        for artifact in _held_up(seen)
        if artifact.status.last_failure is not None
    )
    chosen: list[ModelArtifact] = []
    for artifact in going:
        if needed <= 0 and not _is_expired(artifact, seen.cache, now):
            break
        if artifact.spec.source.scheme.is_in_place and not _is_expired(artifact, seen.cache, now):
            continue
        chosen.append(artifact)
        if view_name(artifact) not in shared:  # else another artifact keeps the files
            needed -= _bytes_of(artifact)
            shared.add(view_name(artifact))
    return chosen


def reclaimable_bytes(artifacts: Iterable[ModelArtifact], unwanted: frozenset[str], *, used: int) -> int:
    """The sizes of contents that only unwanted artifacts have, or that none has any more; each counts once.

    `used`: what lies on the volume, or 0 where it is not known or just growing.
    """
    artifacts = list(artifacts)
    wanted = {a.status.path for a in artifacts if a.metadata.name not in unwanted or is_by_hand(a)}
    sizes = {a.status.path: _bytes_of(a) for a in artifacts if a.status.path not in wanted}
    needed = {a.status.path: _bytes_of(a) for a in artifacts if a.status.path in wanted}
    return max(sum(size for path, size in sizes.items() if path is not None), used - sum(needed.values()))


def encode_keep(views: Iterable[str]) -> str:
    """The views that stay, for the Job."""
    return base64.b64encode(b"".join(sorted({keep_mark(view) for view in views}))).decode()


def _bytes_of(artifact: ModelArtifact) -> int:
    """What its content takes of the cache; nothing of what somebody put there and is used in place."""
    return 0 if artifact.spec.source.scheme.is_in_place else artifact.status.size_bytes or 0


def view_name(artifact: ModelArtifact) -> str:
    """The name of an artifact's view; empty without content."""
    return (artifact.status.path or "").rpartition("/")[2]


def views_in(text: str) -> set[str]:
    """The names of all views whose paths stand in a text: a pod's arguments, an engine's answer."""
    return set(_VIEW.findall(text))


def read_result(job: Mapping[str, Any], message: str | None) -> EvictResult | None:
    """How an eviction's Job ended, by its pod's last words; None while it runs."""
    conditions = {c["type"]: c for c in (job.get("status") or {}).get("conditions") or () if c.get("status") == "True"}
    if not {"Complete", "Failed"} & conditions.keys():
        return None
    try:
        return EvictResult.model_validate_json(message or "")
    except ValidationError:
        why = (conditions.get("Failed") or {}).get("reason", "no result")
        return EvictResult(
            ok=False, message=f"the Job ended without a result: {why} {' '.join((message or '').split())[-300:]}"
        )


def _why(seen: EvictionObservation, now: datetime) -> str | None:
    """What a removal is for, if there is to be one."""
    if _is_asked_for(seen):
        return "asked for"
    status, cache = seen.cache.status.eviction, seen.cache
    if cache.spec.eviction.policy == "Never":
        return None
    if status is not None and status.message is not None and not _waits(status) and _is_recent(status, now):
        return None  # it could not
    if seen.swept:
        return "an artifact is gone"
    if _held_up(seen):
        return "a download needs room"
    return "too old" if any(_is_expired(artifact, cache, now) for artifact in candidates(seen)) else None


def _waits(status: EvictionStatus) -> bool:
    return (status.message or "").startswith(WAITS)


def _is_recent(status: EvictionStatus, now: datetime) -> bool:
    return status.time is not None and now - status.time < RETRY


def _is_asked_for(seen: EvictionObservation) -> bool:
    value = seen.cache.metadata.annotations.get(ANNOTATION_EVICT)
    status = seen.cache.status.eviction
    return value is not None and (status is None or status.requested != value[:256])


def _held_up(seen: EvictionObservation) -> list[ModelArtifact]:
    """Wanted artifacts that the lack of room keeps away since the last eviction."""
    status = seen.cache.status.eviction
    last = status.time if status is not None else None
    return [
        artifact
        for artifact in seen.artifacts
        if (failure := artifact.status.last_failure) is not None
        and failure.reason == Reason.INSUFFICIENT_SPACE
        and not is_true(artifact.status.conditions, Condition.READY)
        and artifact.metadata.name not in seen.unwanted
        and (last is None or failure.time > last)
    ]


def _still_served(seen: EvictionObservation, now: datetime) -> str | None:
    """What was asked for a moment ago, while pods give up what was just deleted, is not to miss just that."""
    if not _is_asked_for(seen):
        return None
    for artifact in seen.artifacts:
        since = artifact.status.unreferenced_since
        just = since is not None and now - since < JUST
        if just and artifact.metadata.name in seen.unwanted and view_name(artifact) in seen.used:
            return f"pods still have {artifact.metadata.name}, which nothing wants since {since:%H:%M:%S}Z"
    return None


def _is_expired(artifact: ModelArtifact, cache: ModelCache, now: datetime) -> bool:
    longest = parse_duration(cache.spec.eviction.keep_unreferenced_for)
    since = artifact.status.unreferenced_since
    if cache.spec.eviction.keep_unreferenced_for is None or since is None or cache.spec.eviction.policy == "Never":
        return False
    return (now - since).total_seconds() >= (longest or 0)


def _ended(seen: EvictionObservation, job: EvictJob, result: EvictResult, *, now: datetime) -> EvictionPlan:
    status = seen.cache.status.eviction
    busy = f"{result.busy} sources were being downloaded from, so what is theirs stayed" if result.busy else None
    return EvictionPlan(
        _update(
            status,
            attempt=(status.attempt if status else 0) + 1,
            running=False,
            time=now.replace(microsecond=0),
            views=result.views,
            freed=format_size(result.freed_bytes),
            message=busy if result.ok else result.message[:1024],
        ),
        delete_job=job.name,
        ended=True,
        requeue_after=0,
    )


def _update(status: EvictionStatus | None, **changes: object) -> EvictionStatus:
    return (status or EvictionStatus()).model_copy(update=changes)
