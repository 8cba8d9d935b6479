"""What keeps a download that could start from starting: its turn, room on the volume, its size by its user's own word."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from lora_operator.api.artifact import Failure, ModelArtifact, ModelArtifactStatus
from lora_operator.api.cache import ModelCache
from lora_operator.api.sources.source import Source
from lora_operator.conditions import Verdict, failing, find, reason_of
from lora_operator.constants import Condition, Reason
from lora_operator.names import parse_size
from lora_operator.plan.fair_share import FEWEST_TO_KEEP_ONE, describe_ahead

MAX_FAILURE_SHOWN: Final = (
    1900  # characters of a Job's message in a condition, so that what happens next is not cut off
)


def queued(artifact: ModelArtifact, cache: ModelCache | None, failure: Failure | None, *, ahead: int | None) -> Verdict:
    """What one that waits says, and what it failed with before; `ahead` is None while content is being removed."""
    where = f"ModelCache {artifact.metadata.namespace}/{artifact.spec.cache_ref.name}"
    eviction = cache.status.eviction if cache else None
    detail = f": {eviction.message}" if eviction is not None and eviction.message is not None else ""
    text = f"content that nothing uses is being removed from {where}, which comes first{detail}"
    if ahead is not None:
        limit = cache.spec.download.max_concurrent if cache else 0
        one = ahead == 1
        kept = "; one namespace never has all, where others use the cache" if limit >= FEWEST_TO_KEEP_ONE else ""
        text = (
            f"{describe_ahead(ahead)} download{'' if one else 's'} {'is' if one else 'are'} ahead of it in {where}, which runs "
            f"{limit} at once (spec.download.maxConcurrent{kept})"
        )
    if failure is None:
        return failing(Reason.QUEUED, text)
    return failing(reason_of(failure.reason), f"{failure.message[:MAX_FAILURE_SHOWN]}; tried again in turn: {text}")


def without_room(verdict: Verdict, failure: Failure, cache: ModelCache | None) -> Verdict:
    """The verdict on one that failed, with what keeps the cache from making room for it."""
    condition = find(cache.status.conditions, Condition.EVICTION_HELD_UP) if cache else None
    if cache is None or condition is None or condition.status != "True" or failure.reason != Reason.INSUFFICIENT_SPACE:
        return verdict
    where = f"ModelCache {cache.metadata.namespace}/{cache.metadata.name}"
    return replace(verdict, message=f"{verdict.message}; {where} can't make room: {condition.message}")


def has_new_room(status: ModelArtifactStatus, cache: ModelCache | None) -> bool:
    """Whether content was removed since the last attempt failed for the lack of room: then it is tried again at once."""
    failure, eviction = status.last_failure, cache.status.eviction if cache else None
    if failure is None or failure.reason != Reason.INSUFFICIENT_SPACE or eviction is None or eviction.time is None:
        return False
    return eviction.time >= failure.time and bool(eviction.views)


def too_large(source: Source, cache: ModelCache) -> Verdict | None:
    """TooLarge by what the user says of the size, before any Job."""
    hint, most = parse_size(source.size_hint), parse_size(cache.spec.max_artifact_size)
    if hint is None or most is None or hint <= most:
        return None
    return failing(
        Reason.TOO_LARGE,
        f"source.sizeHint says {source.size_hint}, and ModelCache {cache.metadata.namespace}/{cache.metadata.name} takes "
        f"{cache.spec.max_artifact_size} at most (spec.maxArtifactSize): ask its owner to raise it",
    )
