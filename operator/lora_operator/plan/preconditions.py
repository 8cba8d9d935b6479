"""What an attempt needs before it may start: what it waits for, its turn and space among that, and whose Secret it may use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from lora_operator.api.artifact import Failure, ModelArtifact, ModelArtifactStatus
from lora_operator.api.cache import ModelCache
from lora_operator.api.sources.source import Source
from lora_operator.conditions import Verdict, failing, find, is_true, reason_of
from lora_operator.constants import ANNOTATION_REFRESH, Condition, Reason
from lora_operator.errors import ReasonError
from lora_operator.names import parse_size
from lora_operator.plan.fair_share import FEWEST_TO_KEEP_ONE, describe_ahead
from lora_operator.plan.source_policy import role_refused, source_refused
from lora_operator.plan.wants import Credentials, wanted_name

MAX_FAILURE_SHOWN: Final = (
    1900  # characters of a Job's message in a condition, so that what happens next is not cut off
)


def held_up(artifact: ModelArtifact, cache: ModelCache | None, base: ModelArtifact | None) -> Verdict | None:
    """What is lacking beside its Secret and its turn: a cache that can take it and allows its source, and the base model."""
    spec, namespace = artifact.spec, artifact.metadata.namespace
    if cache is None:
        return failing(Reason.CACHE_NOT_READY, f"ModelCache {namespace}/{spec.cache_ref.name} does not exist")
    if not is_true(cache.status.conditions, Condition.READY):
        condition = find(cache.status.conditions, Condition.READY)
        detail = f": {condition.message}" if condition else ""
        # A claim may be bound only when its first consumer is scheduled, and that is a Job's pod; and only a Job finds out
        # that a volume can be written again.
        if condition is None or condition.reason not in (Reason.CLAIM_PENDING, Reason.CACHE_NOT_WRITABLE):
            return failing(Reason.CACHE_NOT_READY, f"ModelCache {namespace}/{spec.cache_ref.name} is not ready{detail}")
    with_credentials = spec.credentials is not None or spec.source.secret is not None
    refused = source_refused(spec.source, cache, namespace=namespace) or role_refused(
        spec.assume_role, spec.source, cache, namespace=namespace, with_credentials=with_credentials
    )
    if refused is not None:
        return failing(refused.reason, refused.message)
    if cache.access_modes is None:  # which nodes may mount it is not known
        return failing(
            Reason.CACHE_NOT_READY, f"the claim of ModelCache {namespace}/{spec.cache_ref.name} was not looked at yet"
        )
    if (refusal := too_large(spec.source, cache)) is not None:
        return refusal
    if spec.base_model_ref is None:
        return None
    if base is None or not is_true(base.status.conditions, Condition.READY):
        return failing(
            Reason.QUEUED,
            f"waits for the base model: ModelArtifact {namespace}/{spec.base_model_ref.name} is not Ready",
        )
    return None


def wanters_credentials(
    artifact: ModelArtifact, cache: ModelCache | None, offered: Mapping[Credentials, object]
) -> Credentials | ReasonError | None:
    """Which Secret an attempt may use: one that a live, accepted wanter offers, or for a hand-made artifact one beside it.

    Wanters know an artifact by its name alone, so what they offer goes only to one whose name is that of its own content.
    """
    if cache is not None and cache.spec.offline:
        return None
    secret = artifact.spec.source.secret
    identity = artifact.spec.credentials
    if identity is not None:
        credentials = (identity.namespace, identity.name, identity.key, identity.uid)
        if credentials in offered and cache is not None and artifact.metadata.name == _own_name(artifact, cache):
            return credentials
        return ReasonError(
            Reason.CREDENTIALS_FORBIDDEN,
            f"no accepted LoRAAdapter or VLLMDeployment of namespace {identity.namespace} asks for this content with Secret "
            f"{identity.name}: credentials of another namespace come only through such an object",
        )
    return (artifact.metadata.namespace, *secret, "") if secret is not None else None


def _own_name(artifact: ModelArtifact, cache: ModelCache) -> str:
    return wanted_name(artifact.spec, cache, refresh=artifact.metadata.annotations.get(ANNOTATION_REFRESH))


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
