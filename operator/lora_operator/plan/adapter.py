"""What follows for a LoRAAdapter: the artifact that it wants, its place in the module list, and its status."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from lora_operator.api.adapter import (
    ArtifactRef,
    LoRAAdapter,
    LoRAAdapterStatus,
    PodCounts,
    PodFailure,
)
from lora_operator.api.artifact import ModelArtifact
from lora_operator.api.cache import ModelCache
from lora_operator.api.deployment import VLLMDeployment
from lora_operator.conditions import Verdict, failing, find, is_true, merge, ok, reason_of, with_ready_and_stalled
from lora_operator.constants import CACHE_MOUNT, Condition, Reason
from lora_operator.errors import ReasonError
from lora_operator.plan.admission import admit, yield_name
from lora_operator.plan.fleet import AdapterLoad, Fleet
from lora_operator.plan.modules import Decision, Module
from lora_operator.plan.refresh import Epoch, Refresh, describe, parse_interval, plan_refresh
from lora_operator.plan.wants import Credentials, build_artifact

MAX_FAILURES = 5
SECRET_POLL_SECONDS = 10.0
BLOCKED_POLL_SECONDS = 10.0
FLEET_POLL_SECONDS = 5.0
REFUSED_POLL_SECONDS = 60.0


@dataclass(frozen=True)
class AdapterObservation:
    """All that is known when an adapter is planned."""

    adapter: LoRAAdapter
    deployment: VLLMDeployment | None
    namespace_labels: Mapping[str, str] | None
    rivals: tuple[LoRAAdapter, ...]  # admitted adapters of the same deployment with the same served name
    cache: ModelCache | ReasonError | None
    base_artifact: str | None  # name of the base model's ModelArtifact; None while the deployment has not been planned
    credentials: Credentials | ReasonError | None
    artifacts: Mapping[tuple[str, str], ModelArtifact]
    fleet: Fleet | None  # None while nothing is known of the pods
    url: str | None
    not_made: Verdict | None = None  # why the wanted artifact could not be made just now


@dataclass(frozen=True)
class AdapterPlan:
    """What is to be done and said."""

    decision: Decision
    artifact: dict[str, Any] | None  # to be applied
    status: LoRAAdapterStatus | None  # None: nothing is known well enough to change it
    requeue_after: float | None = None


def plan_adapter(seen: AdapterObservation, *, now: datetime) -> AdapterPlan:
    """Decide on one adapter."""
    adapter = seen.adapter
    accepted = admit(adapter, seen.deployment, namespace_labels=seen.namespace_labels)
    if accepted.status is None:
        return AdapterPlan(unknown(adapter), None, None, requeue_after=1.0)
    if accepted.is_true:
        accepted = yield_name(adapter, seen.rivals) or accepted
    if not accepted.is_true or seen.deployment is None:
        return AdapterPlan(
            _decision(adapter, accepted=False), None, _status(seen, {Condition.ACCEPTED: accepted}, now=now)
        )
    return _plan_accepted(seen, seen.deployment, accepted, now=now)


def _plan_accepted(
    seen: AdapterObservation, deployment: VLLMDeployment, accepted: Verdict, *, now: datetime
) -> AdapterPlan:
    adapter = seen.adapter
    refresh = _refresh(seen, now)
    wanted, downloaded = _wanted_artifact(seen, refresh)
    if wanted is None and downloaded is None:  # the base model's artifact is not known yet
        blocked = _base_model_blocked(deployment)
        if blocked is None:
            return AdapterPlan(unknown(adapter), None, None, requeue_after=1.0)
        verdicts = {
            Condition.ACCEPTED: accepted,
            Condition.DOWNLOADED: blocked,
            Condition.LOADED: _not_loaded(accepted),
        }
        ref = adapter.status.artifact_ref  # what it has stays wanted
        decision = _decision(
            adapter,
            accepted=True,
            artifact=(ref.namespace, ref.name) if ref is not None else None,
            keep=not adapter.spec.suspend,
        )
        return AdapterPlan(decision, None, _status(seen, verdicts, now=now), BLOCKED_POLL_SECONDS)
    key = (wanted["metadata"]["namespace"], wanted["metadata"]["name"]) if wanted else None
    artifact = seen.artifacts.get(key) if key else None
    if downloaded is None:
        downloaded = seen.not_made or _downloaded(artifact, key)
    refreshing, note = None, ""
    unusable = _unusable(downloaded, artifact, deployment)
    if refresh.is_due and refresh.content is not None and unusable is not None:
        refreshing = key  # what is served stays, and stays good, while the refresh runs or fails
        artifact, key = refresh.content, refresh.content.key
        downloaded = _downloaded(artifact, key)
        note = describe(unusable, refresh.again_at)
    elif isinstance(seen.credentials, ReasonError) and refresh.wanted != refresh.served:
        note = describe(failing(seen.credentials.reason, seen.credentials.message))
    if downloaded.is_true:
        downloaded = replace(downloaded, message=downloaded.message + note)
    ready = downloaded.is_true and artifact is not None
    if ready and artifact is not None:
        accepted = _too_large(artifact, deployment) or accepted
    module = None
    if ready and accepted.is_true and artifact is not None and not adapter.spec.suspend:
        module = Module(
            name=adapter.served_name,
            path=f"{CACHE_MOUNT}/{artifact.status.path}",
            base_model_name=adapter.spec.base_model_name or deployment.spec.model.served_names[0],
            revision=artifact.status.resolved_revision or "",
            adapter=f"{adapter.metadata.namespace}/{adapter.metadata.name}",
            uid=adapter.metadata.uid,
            lazy=adapter.spec.load_policy == "Lazy",
            preload=adapter.spec.placement.preload or 0,
        )
    credentials = seen.credentials if isinstance(seen.credentials, tuple) else None
    decision = _decision(
        adapter,
        accepted=True,
        artifact=key,
        credentials=credentials,
        module=module,
        keep=module is None and accepted.is_true and not adapter.spec.suspend,
        refreshing=refreshing,
    )
    if ready and module is not None and seen.fleet is None:
        # Nothing is known of the pods yet (the operator has just started): what stands in the status stays.
        return AdapterPlan(decision, wanted, None, FLEET_POLL_SECONDS)
    verdicts = {Condition.ACCEPTED: accepted, Condition.DOWNLOADED: downloaded}
    load = None
    if accepted.is_true and adapter.spec.suspend:
        verdicts[Condition.LOADED] = failing(
            Reason.SUSPENDED, "spec.suspend is true: the adapter is kept, and not served"
        )
    elif module is None:
        verdicts[Condition.LOADED] = _not_loaded(accepted)
    elif seen.fleet is not None:
        load = seen.fleet.load_of(module)
        verdicts[Condition.LOADED] = _loaded(seen.fleet, load)
    status = _status(seen, verdicts, now=now, artifact=artifact, key=key, load=load, note=note, refresh=refresh)
    waits_for_secret = (
        adapter.spec.source.hugging_face is not None
        and not downloaded.is_true
        and (adapter.spec.source.hugging_face.token_secret_ref is not None)
    )
    again = [SECRET_POLL_SECONDS] if waits_for_secret else []
    again += [max(1.0, (refresh.again_at - now).total_seconds())] if refresh.again_at is not None else []
    return AdapterPlan(decision, wanted, status, min(again, default=None))


def _refresh(seen: AdapterObservation, now: datetime) -> Refresh:
    """What is to be resolved anew; nothing where it is not known what the adapter wants, or with which credentials."""
    adapter, cache, base = seen.adapter, seen.cache, seen.base_artifact

    def artifact_at(epoch: Epoch) -> ModelArtifact | None:
        if not isinstance(cache, ModelCache) or base is None or isinstance(seen.credentials, ReasonError):
            return None
        metadata = build_artifact(
            cache=cache,
            source=adapter.spec.source,
            base_artifact=base,
            credentials=seen.credentials,
            refresh=epoch.text,
        )["metadata"]
        return seen.artifacts.get((metadata["namespace"], metadata["name"]))

    return plan_refresh(
        annotations=adapter.metadata.annotations,
        interval=parse_interval(adapter.spec.refresh_interval),
        source=adapter.spec.source,
        state=adapter.status.refresh,
        artifact_at=artifact_at,
        now=now,
    )


def _unusable(downloaded: Verdict, artifact: ModelArtifact | None, deployment: VLLMDeployment) -> Verdict | None:
    """Why what a refresh is to bring can't be served; None where it can."""
    if not downloaded.is_true or artifact is None:
        return downloaded
    return _too_large(artifact, deployment)


def _too_large(artifact: ModelArtifact, deployment: VLLMDeployment) -> Verdict | None:
    if (artifact.status.rank or 0) <= deployment.spec.lora.max_lora_rank:
        return None
    return failing(
        Reason.RANK_TOO_LARGE,
        f"the adapter's rank is {artifact.status.rank}, VLLMDeployment {deployment.metadata.namespace}/"
        f"{deployment.metadata.name} allows {deployment.spec.lora.max_lora_rank}: use an adapter of a smaller "
        "rank, or raise spec.lora.maxLoraRank there",
    )


def plan_refused(seen: AdapterObservation, plan: AdapterPlan, cause: Verdict, *, now: datetime) -> AdapterPlan:
    """The plan where the wanted artifact can't be made: quota, admission, a taken name. The adapter keeps what it has."""
    if plan.decision.refreshing is not None:
        again = plan_adapter(replace(seen, not_made=cause), now=now)
        return replace(again, artifact=None, requeue_after=REFUSED_POLL_SECONDS)
    accepted = ok(Reason.ACCEPTED, "the deployment admits the adapter")
    verdicts = {Condition.ACCEPTED: accepted, Condition.DOWNLOADED: cause, Condition.LOADED: _not_loaded(accepted)}
    keep = not seen.adapter.spec.suspend
    decision = _decision(seen.adapter, accepted=True, artifact=plan.decision.artifact, keep=keep)
    return AdapterPlan(decision, None, _status(seen, verdicts, now=now), REFUSED_POLL_SECONDS)


def _wanted_artifact(seen: AdapterObservation, refresh: Refresh) -> tuple[dict[str, Any] | None, Verdict | None]:
    """The artifact to be applied, or why there can't be one; (None, None) where it can't be known yet.

    An adapter whose artifact is Ready keeps it when its Secret is gone: the content was authorised when it was fetched.
    """
    if isinstance(seen.credentials, ReasonError):
        artifact = _authorised(seen)
        if artifact is not None and (seen.cache is None or seen.base_artifact is None):
            return None, None
        if artifact is not None and _fits(artifact, seen):
            return {
                "apiVersion": artifact.api_version,
                "kind": artifact.kind,
                "metadata": {"name": artifact.metadata.name, "namespace": artifact.metadata.namespace},
                "spec": artifact.spec.to_wire(),
            }, None
        return None, failing(seen.credentials.reason, seen.credentials.message)
    if isinstance(seen.cache, ReasonError):
        return None, failing(seen.cache.reason, seen.cache.message)
    if seen.cache is None or seen.base_artifact is None:
        return None, None
    return (
        build_artifact(
            cache=seen.cache,
            source=seen.adapter.spec.source,
            base_artifact=seen.base_artifact,
            credentials=seen.credentials,
            refresh=refresh.wanted.text,
        ),
        None,
    )


def _authorised(seen: AdapterObservation) -> ModelArtifact | None:
    """The Ready artifact that the adapter's present spec led to before."""
    status = seen.adapter.status
    if status.artifact_ref is None or status.observed_generation != seen.adapter.metadata.generation:
        return None
    artifact = seen.artifacts.get((status.artifact_ref.namespace, status.artifact_ref.name))
    return artifact if artifact is not None and is_true(artifact.status.conditions, Condition.READY) else None


def _fits(artifact: ModelArtifact, seen: AdapterObservation) -> bool:
    """Whether the pods' cache holds the artifact, and it was checked against the pods' base model."""
    if not isinstance(seen.cache, ModelCache):
        return False
    base = artifact.spec.base_model_ref.name if artifact.spec.base_model_ref else None
    in_cache = (artifact.metadata.namespace, artifact.spec.cache_ref.name) == seen.cache.key
    return in_cache and base == seen.base_artifact


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
    return Decision(
        uid=adapter.metadata.uid, generation=adapter.metadata.generation, accepted=False, keep=True, keep_unknown=True
    )


def _decision(
    adapter: LoRAAdapter,
    *,
    accepted: bool,
    artifact: tuple[str, str] | None = None,
    credentials: Credentials | None = None,
    module: Module | None = None,
    keep: bool = False,
    refreshing: tuple[str, str] | None = None,
) -> Decision:
    return Decision(
        uid=adapter.metadata.uid,
        generation=adapter.metadata.generation,
        accepted=accepted,
        artifact=artifact,
        credentials=credentials,
        module=module,
        keep=keep,
        refreshing=refreshing,
    )


def _downloaded(artifact: ModelArtifact | None, key: tuple[str, str] | None) -> Verdict:
    where = f"ModelArtifact {key[0]}/{key[1]}" if key else "ModelArtifact"
    ready = find(artifact.status.conditions, Condition.READY) if artifact else None
    if ready is None:
        return failing(Reason.QUEUED, f"{where} has not started")
    if ready.status == "True":
        return ok(Reason.DOWNLOADED, f"{where}: {ready.message}")
    return failing(reason_of(ready.reason), ready.message)


def _not_loaded(accepted: Verdict) -> Verdict:
    if accepted.is_true:
        return failing(Reason.NOT_DOWNLOADED, "the wanted revision is not downloaded")
    return failing(Reason.NOT_ACCEPTED, "the adapter is not accepted")


def _loaded(fleet: Fleet, load: AdapterLoad) -> Verdict:
    if load.wanted == 0:
        if fleet.replicas == 0:
            return failing(Reason.SCALED_TO_ZERO, "the deployment is scaled to zero replicas")
        return failing(Reason.NO_READY_PODS, f"none of the deployment's {len(fleet.pods)} pods is ready")
    counts = f"{load.loaded} of {load.wanted} ready pods serve it"
    if load.waiting:
        counts += f", {load.waiting} of them from the first request on"
    if load.loaded == load.wanted:
        return ok(Reason.LOADED, counts)
    cause = f"; {load.failures[0][0]}: {load.failures[0][1]}" if load.failures else ""
    if load.refused:
        return failing(Reason.ENGINE_REFUSED, f"{counts}{cause}")
    if load.unreachable and load.loaded + load.unreachable == load.wanted:
        return failing(Reason.ENGINE_UNREACHABLE, f"{counts}{cause}")
    return failing(Reason.PARTIALLY_LOADED if load.loaded else Reason.LOADING, f"{counts}{cause}")


def _status(
    seen: AdapterObservation,
    verdicts: dict[Condition, Verdict],
    *,
    now: datetime,
    artifact: ModelArtifact | None = None,
    key: tuple[str, str] | None = None,
    load: AdapterLoad | None = None,
    note: str = "",
    refresh: Refresh | None = None,
) -> LoRAAdapterStatus:
    adapter, deployment = seen.adapter, seen.deployment
    if Condition.DOWNLOADED not in verdicts:
        verdicts[Condition.DOWNLOADED] = failing(
            Reason.NOT_ACCEPTED, "nothing is downloaded before the adapter is accepted"
        )
    if Condition.LOADED not in verdicts:
        verdicts[Condition.LOADED] = _not_loaded(verdicts[Condition.ACCEPTED])
    content = artifact.status if artifact and verdicts[Condition.DOWNLOADED].is_true else None
    # Who is not admitted learns nothing of the deployment.
    admitted = verdicts[Condition.ACCEPTED].reason is not Reason.NAMESPACE_NOT_ALLOWED
    wanted = load.wanted if load else 0
    loaded = load.loaded if load else 0
    conditions = with_ready_and_stalled(verdicts, f"{loaded} of {wanted} ready pods serve {adapter.served_name}{note}")
    return LoRAAdapterStatus(
        conditions=merge(adapter.status.conditions, conditions, generation=adapter.metadata.generation, now=now),
        observed_generation=adapter.metadata.generation,
        served_name=adapter.served_name,
        base_model_name=adapter.spec.base_model_name
        or (deployment.spec.model.served_names[0] if deployment and admitted else None),
        url=seen.url,
        resolved_revision=content.resolved_revision if content else None,
        revision=content.revision if content else None,
        digest=content.digest if content else None,
        size_bytes=content.size_bytes if content else None,
        size=content.size if content else None,
        rank=content.rank if content else None,
        target_modules=content.target_modules if content else None,
        artifact_ref=ArtifactRef(namespace=key[0], name=key[1]) if key else None,
        refresh=adapter.status.refresh
        if refresh is None or isinstance(seen.credentials, ReasonError)
        else refresh.state(done=not note),
        ready_pods=f"{loaded}/{wanted}",
        pods=PodCounts(wanted=wanted, loaded=loaded),
        failures=tuple(PodFailure(pod=pod, message=message[:1024]) for pod, message in load.failures[:MAX_FAILURES])
        if load and load.failures
        else None,
    )
