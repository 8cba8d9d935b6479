"""What follows for a LoRAAdapter: the artifact that it wants, its place in the module list, and its status."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Final

from lora_operator.api.adapter import LoRAAdapter, LoRAAdapterStatus
from lora_operator.api.artifact import ModelArtifact
from lora_operator.api.cache import ModelCache
from lora_operator.api.deployment import VLLMDeployment
from lora_operator.conditions import Verdict, failing, find, ok
from lora_operator.constants import CACHE_MOUNT, Condition, Reason
from lora_operator.plan.adapter_content import AdapterContent, AdapterObservation, find_content, too_large
from lora_operator.plan.adapter_list import ArtifactReference, Decision, Drop, Entry, Keep, Module, Serve, Unknown
from lora_operator.plan.adapter_status import adapter_status, loaded_verdict, not_loaded
from lora_operator.plan.admission import admit, public_name, yield_name
from lora_operator.plan.source_policy import source_refused

SECRET_POLL_SECONDS: Final = 10.0
BLOCKED_POLL_SECONDS: Final = 10.0
PODS_POLL_SECONDS: Final = 5.0
REFUSED_POLL_SECONDS: Final = 60.0


@dataclass(frozen=True)
class AdapterPlan:
    """What is to be done and said."""

    decision: Decision
    artifact: dict[str, Any] | None  # to be applied
    status: LoRAAdapterStatus | None  # None: nothing is known well enough to change it
    requeue_after: float | None = None


def plan_adapter(seen: AdapterObservation, *, now: datetime) -> AdapterPlan:
    """Whether it is admitted, which artifact and list entry it is to have, and what its status reports."""
    adapter = seen.adapter
    accepted = admit(adapter, seen.deployment, namespace_labels=seen.namespace_labels)
    if accepted.status is None:
        return AdapterPlan(unknown(adapter), None, None, requeue_after=1.0)
    if accepted.is_true:
        accepted = _source_allowed(seen) or accepted
    if not accepted.is_true or seen.deployment is None:
        status = adapter_status(seen, {Condition.ACCEPTED: accepted}, now=now)
        return AdapterPlan(_decision(adapter, Drop()), None, status)
    return _plan_admitted(seen, seen.deployment, _conflict(seen) or accepted, now=now)


def _conflict(seen: AdapterObservation) -> Verdict | None:
    if seen.deployment is None:
        return None
    return yield_name(seen.adapter, seen.deployment, seen.rivals, held=seen.name_held, holder=seen.name_holder)


def _plan_admitted(
    seen: AdapterObservation, deployment: VLLMDeployment, accepted: Verdict, *, now: datetime
) -> AdapterPlan:
    """One that has to yield its name stands by: all is made ready, so that it takes the name over in one swap."""
    adapter = seen.adapter
    content = find_content(seen, deployment, now=now)
    if content is None:
        return _plan_without_base(seen, deployment, accepted, now=now)
    refused = too_large(content.ready, deployment) if content.ready is not None else None
    accepted = refused or accepted
    entry = _entry(adapter, deployment, content) if refused is None else Drop()
    module = entry.module if isinstance(entry, Serve) else None
    credentials = seen.credentials if isinstance(seen.credentials, tuple) else None
    decision = _decision(adapter, entry, ArtifactReference(content.key, credentials, content.refreshing))
    if accepted.is_true and module is not None and seen.served is None:
        # Nothing is known of the pods yet (the operator has just started): what stands in the status stays.
        return AdapterPlan(decision, content.wanted, None, PODS_POLL_SECONDS)
    load = None
    loaded = _loaded_without_module(adapter, accepted)
    if accepted.is_true and module is not None and seen.served is not None:
        loaded, load = loaded_verdict(seen, deployment, module, seen.served)
    verdicts = {Condition.ACCEPTED: accepted, Condition.DOWNLOADED: content.downloaded, Condition.LOADED: loaded}
    status = adapter_status(seen, verdicts, now=now, content=content, load=load)
    return AdapterPlan(decision, content.wanted, status, _look_again(adapter, content, now=now))


def _look_again(adapter: LoRAAdapter, content: AdapterContent, *, now: datetime) -> float | None:
    waits_for_secret = adapter.spec.source.secret is not None and not content.downloaded.is_true
    again = [SECRET_POLL_SECONDS] if waits_for_secret else []
    if content.again_at is not None:
        again.append(max(1.0, (content.again_at - now).total_seconds()))
    return min(again, default=None)


def _entry(adapter: LoRAAdapter, deployment: VLLMDeployment, content: AdapterContent) -> Entry:
    if adapter.spec.suspend:
        return Drop()
    if content.ready is not None:
        return Serve(_module(adapter, deployment, content.ready))
    return Keep(_path(content.refused) if content.refused is not None else None)


def _module(adapter: LoRAAdapter, deployment: VLLMDeployment, artifact: ModelArtifact) -> Module:
    return Module(
        name=public_name(adapter, deployment),
        path=_path(artifact),
        base_model_name=adapter.spec.base_model_name or deployment.spec.model.served_names[0],
        revision=artifact.status.resolved_revision or "",
        adapter=f"{adapter.metadata.namespace}/{adapter.metadata.name}",
        uid=adapter.metadata.uid,
        lazy=adapter.spec.load_policy == "Lazy",
        preload=adapter.spec.placement.preload or 0,
    )


def _path(artifact: ModelArtifact) -> str:
    """Where its content lies in the pods."""
    return f"{CACHE_MOUNT}/{artifact.status.path}"


def _loaded_without_module(adapter: LoRAAdapter, accepted: Verdict) -> Verdict:
    if accepted.is_true and adapter.spec.suspend:
        return failing(Reason.SUSPENDED, "spec.suspend is true: the adapter is kept, and not served")
    return not_loaded(accepted)


def _plan_without_base(
    seen: AdapterObservation, deployment: VLLMDeployment, accepted: Verdict, *, now: datetime
) -> AdapterPlan:
    """The plan while the base model's artifact is not known; where the deployment says why, that is told."""
    adapter = seen.adapter
    blocked = _base_model_blocked(deployment)
    if blocked is None:
        return AdapterPlan(unknown(adapter), None, None, requeue_after=1.0)
    verdicts = {
        Condition.ACCEPTED: accepted,
        Condition.DOWNLOADED: blocked,
        Condition.LOADED: _loaded_without_module(adapter, accepted),
    }
    decision = _decision(adapter, _kept_unless_suspended(adapter), _in_use(adapter))
    return AdapterPlan(decision, None, adapter_status(seen, verdicts, now=now), BLOCKED_POLL_SECONDS)


def plan_refused(seen: AdapterObservation, plan: AdapterPlan, cause: Verdict, *, now: datetime) -> AdapterPlan:
    """The plan where the wanted artifact can't be made: quota, admission, a taken name. The adapter keeps what it has."""
    reference = plan.decision.reference
    if reference.refreshing is not None:
        again = plan_adapter(replace(seen, not_made=cause), now=now)
        # What has the name is somebody else's, so nothing is lent to it.
        decision = replace(again.decision, reference=replace(again.decision.reference, refreshing=None))
        return replace(again, decision=decision, artifact=None, requeue_after=REFUSED_POLL_SECONDS)
    accepted = _conflict(seen) or ok(Reason.ACCEPTED, "the deployment admits the adapter")
    verdicts = {
        Condition.ACCEPTED: accepted,
        Condition.DOWNLOADED: cause,
        Condition.LOADED: _loaded_without_module(seen.adapter, accepted),
    }
    entry = _kept_unless_suspended(seen.adapter)
    decision = _decision(seen.adapter, entry, ArtifactReference(reference.artifact))
    return AdapterPlan(decision, None, adapter_status(seen, verdicts, now=now), REFUSED_POLL_SECONDS)


def _source_allowed(seen: AdapterObservation) -> Verdict | None:
    adapter, cache = seen.adapter, seen.cache
    if not isinstance(cache, ModelCache):
        return None
    refused = source_refused(adapter.spec.source, cache, namespace=adapter.metadata.namespace)
    return failing(refused.reason, refused.message) if refused is not None else None


def _base_model_blocked(deployment: VLLMDeployment) -> Verdict | None:
    """Queued, where the deployment says of its present spec that it can't even want a base model."""
    condition = find(deployment.status.conditions, Condition.MODEL_READY)
    if condition is None or condition.status == "True" or deployment.status.model_artifact is not None:
        return None
    if condition.observed_generation != deployment.metadata.generation:
        return None
    return failing(
        Reason.QUEUED,
        f"waits for the base model of VLLMDeployment {deployment.metadata.namespace}/{deployment.metadata.name}, "
        f"which is held up by {condition.reason}: see its status",
    )


def unknown(adapter: LoRAAdapter) -> Decision:
    """The decision on an adapter of which too little is known: what it has, it keeps."""
    return _decision(adapter, Unknown())


def undecidable(adapter: LoRAAdapter) -> Decision:
    """The decision on an adapter on which the operator fails: what it has, and what its status says is in use, it keeps."""
    return _decision(adapter, Unknown(failed=True), _in_use(adapter))


def _in_use(adapter: LoRAAdapter) -> ArtifactReference:
    ref = adapter.status.artifact_ref
    return ArtifactReference((ref.namespace, ref.name) if ref is not None else None)


def _decision(adapter: LoRAAdapter, entry: Entry, reference: ArtifactReference | None = None) -> Decision:
    metadata = adapter.metadata
    return Decision(metadata.uid, metadata.generation, entry, reference or ArtifactReference())


def _kept_unless_suspended(adapter: LoRAAdapter) -> Entry:
    return Drop() if adapter.spec.suspend else Keep()
