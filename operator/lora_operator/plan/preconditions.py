"""What an attempt needs before it may start: what it waits for, and whose Secret it may use."""

from __future__ import annotations

from collections.abc import Mapping

from lora_operator.api.artifact import ModelArtifact
from lora_operator.api.cache import ModelCache
from lora_operator.conditions import Verdict, failing, find, is_true
from lora_operator.constants import ANNOTATION_REFRESH, Condition, Reason
from lora_operator.errors import ReasonError
from lora_operator.plan.identity import role_refused
from lora_operator.plan.room import too_large
from lora_operator.plan.source_policy import source_refused
from lora_operator.plan.wants import Credentials, wanted_name


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
