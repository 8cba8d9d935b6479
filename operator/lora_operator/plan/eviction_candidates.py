"""What of a cache's content nothing uses, and how much of it has to go: oldest last use first, and no more than is needed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from lora_operator.api.artifact import ModelArtifact
from lora_operator.api.cache import ModelCache
from lora_operator.conditions import find, is_true
from lora_operator.constants import ANNOTATION_EVICT, Condition, Reason
from lora_operator.names import parse_duration
from lora_operator.plan.artifact import is_by_hand
from lora_operator.wire.jobs import EvictResult

CLOCKS: Final = timedelta(minutes=2)  # by which clocks may differ, as the Job has it


@dataclass(frozen=True)
class EvictJob:
    """An eviction's Job, as far as it matters."""

    name: str
    result: EvictResult | None = None  # when finished; never None then
    since: datetime | None = None  # when it was made
    started: bool = False
    trouble: str | None = None  # why it has not started, where that is known
    requested: str | None = None  # the annotation's value that it sees to, or that was seen to before
    lost: bool = False  # finished because its node is lost: it may yet be at work


@dataclass(frozen=True)
class EvictionObservation:
    """All that is known when an eviction is planned."""

    cache: ModelCache
    artifacts: Sequence[ModelArtifact]  # of the cache
    unwanted: frozenset[str]  # names of those that nothing wants, and of which no status says that they are in use
    used: frozenset[str]  # names of views that something uses, or may
    unsure: str | None  # why that can't be known just now
    job: EvictJob | None  # of the attempt after the last that is recorded
    beside: Sequence[ModelArtifact] = ()  # of other caches over the same claim, whose content stays
    fetching_since: datetime | None = None  # when the oldest download of the claim began that is under way
    unread: bool = False  # a download Job has ended whose result is not recorded yet
    swept: bool = False  # an artifact that had content was deleted

    @property
    def built(self) -> datetime | None:
        """Since when content may have come of which not all is known: what is newer stays, and all blobs do."""
        status = self.cache.status.eviction
        since = (self.fetching_since, status.lost_since if status is not None else None)
        return min((one for one in since if one is not None), default=None)


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
        and not _is_spared(artifact, seen.built)
    ]
    return sorted(found, key=lambda a: (a.status.unreferenced_since or datetime.max, a.metadata.name))


def _is_spared(artifact: ModelArtifact, since: datetime | None) -> bool:
    """Whether the Job would leave its content, which is not older than what it is told."""
    ready = find(artifact.status.conditions, Condition.READY)
    return since is not None and ready is not None and ready.last_transition_time > since - CLOCKS


def victims(seen: EvictionObservation, *, now: datetime) -> list[ModelArtifact]:
    """What goes now: all that may where it was asked for, else what is too old, and as much as downloads need."""
    going = candidates(seen)
    if is_asked_for(seen):
        return going
    if seen.cache.spec.eviction.policy == "Never":
        return []
    stays = {a.metadata.name for a in (*seen.artifacts, *seen.beside)} - {a.metadata.name for a in going}
    shared = {view_name(a) for a in (*seen.artifacts, *seen.beside) if a.metadata.name in stays}
    needed = sum(
        artifact.status.last_failure.needed_bytes or artifact.status.size_bytes or 1
        for artifact in held_up(seen)
        if artifact.status.last_failure is not None
    )
    chosen: list[ModelArtifact] = []
    for artifact in going:
        if needed <= 0 and not is_expired(artifact, seen.cache, now):
            break
        if artifact.spec.source.scheme.is_in_place and not is_expired(artifact, seen.cache, now):
            continue
        chosen.append(artifact)
        if view_name(artifact) not in shared:  # else another artifact keeps the files
            needed -= _bytes_of(artifact)
            shared.add(view_name(artifact))
    return chosen


def reclaimable_bytes(artifacts: Iterable[ModelArtifact], unwanted: frozenset[str], *, used: int) -> int:
    """The sizes of contents that only unwanted artifacts have, or that none has any more; each counts once.

    `artifacts`: of all caches over the claim. `used`: what lies on the volume, or 0 where it is not known or just growing.
    """
    artifacts = list(artifacts)
    wanted = {a.status.path for a in artifacts if a.metadata.name not in unwanted or is_by_hand(a)}
    sizes = {a.status.path: _bytes_of(a) for a in artifacts if a.status.path not in wanted}
    needed = {a.status.path: _bytes_of(a) for a in artifacts if a.status.path in wanted}
    return max(sum(size for path, size in sizes.items() if path is not None), used - sum(needed.values()))


def is_asked_for(seen: EvictionObservation) -> bool:
    """Whether the annotation asks for a removal that was not seen to."""
    value = seen.cache.metadata.annotations.get(ANNOTATION_EVICT)
    status = seen.cache.status.eviction
    return value is not None and (status is None or status.requested != value[:256])


def held_up(seen: EvictionObservation) -> list[ModelArtifact]:
    """Wanted artifacts that the lack of room keeps away since the last eviction."""
    status = seen.cache.status.eviction
    last = status.time if status is not None else None
    return [
        artifact
        for artifact in short_of_room(seen)
        if last is None or (artifact.status.last_failure is not None and artifact.status.last_failure.time > last)
    ]


def short_of_room(seen: EvictionObservation) -> list[ModelArtifact]:
    """Wanted artifacts that the lack of room keeps away, also those for which room was made just now."""
    return [
        artifact
        for artifact in seen.artifacts
        if artifact.status.last_failure is not None
        and artifact.status.last_failure.reason == Reason.INSUFFICIENT_SPACE
        and not is_true(artifact.status.conditions, Condition.READY)
        and (artifact.metadata.name not in seen.unwanted or is_by_hand(artifact))
    ]


def is_expired(artifact: ModelArtifact, cache: ModelCache, now: datetime) -> bool:
    """Whether nothing has wanted it for longer than the cache keeps such content."""
    longest = parse_duration(cache.spec.eviction.keep_unreferenced_for)
    since = artifact.status.unreferenced_since
    if cache.spec.eviction.keep_unreferenced_for is None or since is None or cache.spec.eviction.policy == "Never":
        return False
    return (now - since).total_seconds() >= (longest or 0)


def _bytes_of(artifact: ModelArtifact) -> int:
    """What its content takes of the cache; nothing of what somebody put there and is used in place."""
    return 0 if artifact.spec.source.scheme.is_in_place else artifact.status.size_bytes or 0


def view_name(artifact: ModelArtifact) -> str:
    """The name of an artifact's view; empty without content."""
    return (artifact.status.path or "").rpartition("/")[2]
