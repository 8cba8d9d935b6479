"""What is true of a VLLMDeployment: its base model, its pods, and what they serve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from lora_operator.api.artifact import ModelArtifact
from lora_operator.api.deployment import PodState, VLLMDeployment, VLLMDeploymentStatus
from lora_operator.conditions import Verdict, failing, find, is_true, merge, ok, reason_of, with_ready_and_stalled
from lora_operator.constants import CACHE_MOUNT, Condition, Reason
from lora_operator.errors import ReasonError
from lora_operator.names import engine_selector
from lora_operator.plan.fleet import Fleet, FleetPod, serves, waits
from lora_operator.plan.modules import ModuleList
from lora_operator.plan.placement import is_lazy_on
from lora_operator.plan.pods import problem

MAX_MISSING = 10
MAX_ORPHANS = 20


@dataclass(frozen=True)
class DeploymentObservation:
    """All that is known when a deployment's status is planned."""

    deployment: VLLMDeployment
    artifact_name: str | None
    artifact: ModelArtifact | None  # the base model's
    blocked: ReasonError | None  # why no artifact can be wanted: cache or credentials
    workload: dict[str, Any] | None  # the apps/v1 Deployment
    template_error: ReasonError | None  # why the pods that the spec leads to can't be made
    pods: Sequence[dict[str, Any]]
    fleet: Fleet
    modules: ModuleList | None
    refresh: str | None = None  # the value of the refresh annotation that `artifact` is from
    refresh_note: str = ""  # what becomes of the refresh that is not done yet


def service_url(deployment: VLLMDeployment) -> str:
    """Where the fleet is served inside the cluster."""
    metadata = deployment.metadata
    return f"http://{metadata.name}.{metadata.namespace}.svc:{deployment.spec.engine.port}"


def plan_deployment(seen: DeploymentObservation, *, now: datetime) -> VLLMDeploymentStatus:
    """The status."""
    deployment, fleet = seen.deployment, seen.fleet
    ready = [pod for pod in fleet.pods if pod.ready]
    verdicts = {
        Condition.MODEL_READY: _model_ready(seen),
        Condition.AVAILABLE: _available(seen, ready),
        Condition.ADAPTERS_IN_SYNC: _in_sync(seen, ready),
    }
    conditions = with_ready_and_stalled(verdicts, f"{len(ready)} of {fleet.replicas} pods ready")
    if conditions[Condition.READY].is_true and len(ready) < fleet.replicas:
        conditions[Condition.READY] = failing(Reason.PROGRESSING, f"{len(ready)} of {fleet.replicas} pods ready")
    rolling = _rolling_out(seen)
    if conditions[Condition.READY].is_true and rolling is not None:
        conditions[Condition.READY] = rolling
    orphans = tuple(f"{pod.name}/{name}" for pod in ready if pod.view for name in pod.view.orphans)
    path = seen.artifact.status.path if seen.artifact and verdicts[Condition.MODEL_READY].is_true else None
    return VLLMDeploymentStatus(
        conditions=merge(deployment.status.conditions, conditions, generation=deployment.metadata.generation, now=now),
        observed_generation=deployment.metadata.generation,
        replicas=len(fleet.pods),
        ready_replicas=len(ready),
        ready_pods=f"{len(ready)}/{fleet.replicas}",
        selector=engine_selector(deployment.metadata.name),
        url=service_url(deployment),
        model_path=f"{CACHE_MOUNT}/{path}" if path else None,
        model_artifact=seen.artifact_name,
        refresh=seen.refresh,
        list_generation=seen.modules.generation if seen.modules else None,
        adapters=len(seen.modules.modules) if seen.modules else None,
        pods=tuple(_pod_state(pod, fleet, seen.modules) for pod in fleet.pods) or None,
        orphans=orphans[:MAX_ORPHANS] or None,
    )


def _rolling_out(seen: DeploymentObservation) -> Verdict | None:
    """Why the pods are not all of the present spec, or None: what a pod of the new spec meets, else only that it goes on."""
    workload = seen.workload or {"metadata": {}}
    status = workload.get("status") or {}
    current = status.get("observedGeneration", 0) >= workload["metadata"].get("generation", 0)
    updated, total = status.get("updatedReplicas", 0), status.get("replicas", 0)
    if current and updated == total == seen.fleet.replicas:
        return None
    ready = {pod.name for pod in seen.fleet.pods if pod.ready}
    found = next((p for pod in seen.pods if pod["metadata"]["name"] not in ready and (p := problem(pod))), None)
    progress = f"rolling out: {updated if current else 0} of {seen.fleet.replicas} pods are of the present spec"
    return failing(found[0], f"{found[1]}; {progress}") if found else failing(Reason.PROGRESSING, progress)


def _model_ready(seen: DeploymentObservation) -> Verdict:
    if seen.blocked is not None:
        return failing(seen.blocked.reason, seen.blocked.message)
    condition = find(seen.artifact.status.conditions, Condition.READY) if seen.artifact else None
    if condition is None:
        return failing(Reason.QUEUED, f"ModelArtifact {seen.artifact_name} has not started")
    if condition.status == "True":
        return ok(Reason.MODEL_READY, condition.message + seen.refresh_note)
    return failing(reason_of(condition.reason), condition.message)


def _available(seen: DeploymentObservation, ready: list[FleetPod]) -> Verdict:
    views = [pod.view for pod in ready if pod.view is not None]
    open_gates = [pod.name for pod in ready if pod.view and pod.view.error is None and not pod.view.gate_closed]
    if open_gates:
        return failing(
            Reason.GATE_MISSING,
            f"pod {open_gates[0]}: the engine lets clients load adapters: the kit is not active; "
            "check that engine.command starts vLLM's API server and takes --middleware",
        )
    old = [view for view in views if view.too_old]
    if old:
        return failing(Reason.ENGINE_TOO_OLD, f"vLLM {old[0].version} can't be hot-loaded safely: use 0.26 or newer")
    if seen.template_error is not None:
        return failing(seen.template_error.reason, seen.template_error.message)
    if any(view.gate_closed for view in views):
        return ok(Reason.AVAILABLE, f"{len(ready)} of {seen.fleet.replicas} pods ready")
    if ready:
        view = ready[0].view
        return failing(
            Reason.ENGINE_UNREACHABLE,
            f"pod {ready[0].name} is ready, but its engine was not seen to refuse clients' loads: "
            f"{(view.error if view else None) or 'not asked yet'}",
        )
    if seen.workload is None and not _model_ready(seen).is_true:
        return failing(
            Reason.MODEL_NOT_READY,
            f"no pod is made before the base model is in the cache: {_model_ready(seen).message}",
        )
    if seen.workload is not None and seen.fleet.replicas == 0:
        return failing(Reason.SCALED_TO_ZERO, "spec.replicas is 0")
    for pod in seen.pods:
        found = problem(pod)
        if found is not None:
            return failing(*found)
    for condition in ((seen.workload or {}).get("status") or {}).get("conditions") or ():
        if condition.get("type") == "ReplicaFailure" and condition.get("status") == "True":
            return failing(Reason.PODS_REFUSED, condition.get("message") or "the API server refuses the pods")
    return failing(Reason.PROGRESSING, f"0 of {seen.fleet.replicas} pods ready; engines are starting")


def _in_sync(seen: DeploymentObservation, ready: list[FleetPod]) -> Verdict:
    if seen.modules is None:
        return failing(Reason.SYNC_PENDING, "the adapters have not all been looked at yet")
    wanted = seen.modules.by_name()
    refused: set[str] = set()
    for pod in ready:
        view = pod.view
        if view is None or view.error is not None:
            return failing(Reason.SYNC_PENDING, f"pod {pod.name}: {view.error if view else 'not asked yet'}")
        if view.list_generation != seen.modules.generation:
            return failing(
                Reason.SYNC_PENDING,
                f"pod {pod.name} holds list {view.list_generation}, the current one is {seen.modules.generation}",
            )
        missing = set(_missing(pod, seen.fleet, seen.modules))
        if missing - set(view.failures):
            return failing(Reason.SYNC_PENDING, f"pod {pod.name} is loading {sorted(missing - set(view.failures))[0]}")
        refused |= missing
        if view.orphans:
            return failing(
                Reason.ORPHANS_LOADED, f"pod {pod.name} answers {', '.join(view.orphans[:5])}, which no object wants"
            )
        if not view.atomic_swap:
            return failing(
                Reason.NO_ATOMIC_SWAP,
                f"pod {pod.name}: vLLM {view.version} has no registry that the kit knows: "
                "while an adapter changes its revision, a few requests for it may get 404",
            )
    if refused:
        return ok(
            Reason.IN_SYNC,
            f"list {seen.modules.generation}; not served: {', '.join(sorted(refused)[:5])} (see their status)",
        )
    return ok(Reason.IN_SYNC, f"list {seen.modules.generation} with {len(wanted)} adapters")


def _missing(pod: FleetPod, fleet: Fleet, modules: ModuleList) -> list[str]:
    """Names that the pod should have loaded and has not; what it loads on the first request is not missing."""
    view, names = pod.view, {other.name for other in fleet.pods}
    return [
        module.name
        for module in modules.modules
        if view is not None
        and not serves(view, module)
        and not (waits(view, module) and is_lazy_on(module, pod.name, names))
    ]


def _pod_state(pod: FleetPod, fleet: Fleet, modules: ModuleList | None) -> PodState:
    view = pod.view
    missing = _missing(pod, fleet, modules) if view and modules else []
    return PodState(
        name=pod.name,
        ready=pod.ready,
        list_generation=view.list_generation if view else None,
        loaded=sum(serves(view, module) for module in modules.modules) if view and modules else 0,
        missing=tuple(missing[:MAX_MISSING]) or None,
        version=view.version if view else None,
    )


def replicas_wanted(deployment: VLLMDeployment, workload: dict[str, Any] | None) -> int:
    """Pods that should exist: the spec's, else what the Deployment has (an autoscaler's), else 1."""
    if deployment.spec.replicas is not None:
        return deployment.spec.replicas
    return int(((workload or {}).get("spec") or {}).get("replicas", 1))


def model_is_ready(artifact: ModelArtifact | None) -> bool:
    """Whether the base model is complete in the cache."""
    return artifact is not None and is_true(artifact.status.conditions, Condition.READY)
