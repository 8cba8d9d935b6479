"""What is true of a VLLMDeployment: its base model, its pods, and what they serve."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from lora_operator.api.artifact import ModelArtifact
from lora_operator.api.deployment import PodState, VLLMDeployment, VLLMDeploymentStatus
from lora_operator.conditions import (
    Verdict,
    failing,
    find,
    merge,
    ok,
    reason_of,
    with_ready_and_stalled,
    with_stalled,
)
from lora_operator.constants import ANNOTATION_ARGUMENTS, CACHE_MOUNT, ROLLOUT, Condition, Reason
from lora_operator.errors import ReasonError
from lora_operator.kube.pods import Pod
from lora_operator.kube.workloads import Workload
from lora_operator.names import engine_selector
from lora_operator.plan.adapter_list import ModuleList
from lora_operator.plan.deployment import DeploymentObservation, DeploymentPlan
from lora_operator.plan.deployment_list import ListPlan
from lora_operator.plan.deployment_pods import (
    DeploymentPod,
    DeploymentPods,
    PodView,
    is_lazy_on,
    serves,
    too_old_message,
    waits,
)
from lora_operator.plan.list_limits import MAX_PACKED_BYTES
from lora_operator.plan.model_contents import Content
from lora_operator.plan.pod_trouble import find_trouble
from lora_operator.plan.refresh import describe
from lora_operator.plan.rollout import MAX_ARGUMENT_BYTES, as_rolled, parse_rolled
from lora_operator.plan.wants import Role

MAX_MISSING = 10
ROLE_NAMES: Mapping[Role, str] = {"tokenizer": "tokenizer", "draftModel": "draft model"}
MAX_ORPHANS = 20


@dataclass(frozen=True)
class DeploymentOutcome:
    """What was seen of a deployment, planned and refused, as far as its status reports it."""

    deployment: VLLMDeployment
    artifact_name: str | None
    artifact: ModelArtifact | None  # the base model's
    blocked: ReasonError | None  # why no artifact can be wanted: cache or credentials
    workload: Workload | None  # the apps/v1 Deployment, with what was applied
    template_error: ReasonError | None  # why the pods that the spec leads to can't be made
    pods: Sequence[Pod]  # those that have ended too
    served: DeploymentPods
    modules: ModuleList | None
    auxiliary: Sequence[Content] = ()  # tokenizer and draft model, where the spec has them
    waits_for: str | None = None  # with updateStrategy Rollout: what its roll-out of the list waits for
    left_out: Mapping[Reason, int] = field(
        default_factory=dict
    )  # how many adapters there is no room for, by the reason
    warnings: Mapping[str, str] = field(default_factory=dict)  # what Events say of a pod that is not set up, by its UID
    refresh: str | None = None  # the value of the refresh annotation that the artifacts are from
    refresh_note: str = ""  # what becomes of the refresh that is not done yet


def outcome(
    seen: DeploymentObservation,
    served: DeploymentPods,
    plan: DeploymentPlan,
    *,
    workload: Workload | None,
    refused: ReasonError | None,
) -> DeploymentOutcome:
    """What a pass came to; `workload` is the Deployment as it left it."""
    rolled = parse_rolled(workload.annotations.get(ANNOTATION_ARGUMENTS) if workload is not None else None)
    modules, waits_for = as_rolled(plan.modules, plan.rollout, rolled)
    base = seen.model.base
    return DeploymentOutcome(
        deployment=seen.deployment,
        artifact_name=base.artifact_name,
        artifact=base.artifact,
        blocked=base.blocked,
        workload=workload,
        template_error=refused,
        pods=seen.pods,
        served=served,
        modules=modules,
        waits_for=waits_for,
        left_out=Counter(plan.adapters.left_out.values() if isinstance(plan.adapters, ListPlan) else ()),
        auxiliary=seen.model.contents[1:],
        warnings=seen.warnings,
        refresh=seen.model.refresh,
        refresh_note=seen.model.note,
    )


def service_url(deployment: VLLMDeployment) -> str:
    """Where the deployment is served inside the cluster."""
    metadata = deployment.metadata
    return f"http://{metadata.name}.{metadata.namespace}.svc:{deployment.spec.engine.port}"


def plan_status(seen: DeploymentOutcome, *, now: datetime) -> VLLMDeploymentStatus:
    """The conditions in the order in which a reader asks: model, pods, adapters; then the figures."""
    deployment, served = seen.deployment, seen.served
    ready = [pod for pod in served.pods if pod.ready]
    missing = _missing(served, seen.modules)
    trouble = find_trouble(seen.pods, seen.workload, warnings=seen.warnings, now=now)
    verdicts = {
        Condition.MODEL_READY: _model_ready(seen),
        Condition.AVAILABLE: _available(seen, ready, trouble),
        Condition.ADAPTERS_IN_SYNC: _in_sync(seen, ready, missing),
    }
    conditions = with_ready_and_stalled(verdicts, f"{len(ready)} of {served.replicas} pods ready")
    if verdicts[Condition.MODEL_READY].is_true and verdicts[Condition.AVAILABLE].is_true:
        incomplete = _incomplete(seen, len(ready), trouble)
        # What keeps a pod away is said before what the others still have to load; that they are coming, after it.
        lasting = incomplete is not None and incomplete.reason is not Reason.PROGRESSING
        if incomplete is not None and (lasting or conditions[Condition.READY].is_true):
            conditions = with_stalled(conditions | {Condition.READY: incomplete})
    orphans = tuple(f"{pod.name}/{name}" for pod in ready if pod.view for name in _unwanted(pod.view, seen))
    path = seen.artifact.status.path if seen.artifact and verdicts[Condition.MODEL_READY].is_true else None
    names = {content.role: content.artifact_name for content in seen.auxiliary}
    return VLLMDeploymentStatus(
        conditions=merge(deployment.status.conditions, conditions, generation=deployment.metadata.generation, now=now),
        observed_generation=deployment.metadata.generation,
        replicas=len(served.pods),
        ready_replicas=len(ready),
        ready_pods=f"{len(ready)}/{served.replicas}",
        selector=engine_selector(deployment.metadata.name),
        url=service_url(deployment),
        model_path=f"{CACHE_MOUNT}/{path}" if path else None,
        model_artifact=seen.artifact_name,
        tokenizer_artifact=names.get("tokenizer"),
        draft_model_artifact=names.get("draftModel"),
        refresh=seen.refresh,
        list_generation=seen.modules.generation if seen.modules else None,
        adapters=len(seen.modules.modules) if seen.modules else None,
        pods=tuple(_pod_state(pod, missing[pod.name], seen.modules) for pod in served.pods) or None,
        orphans=orphans[:MAX_ORPHANS] or None,
    )


def _incomplete(seen: DeploymentOutcome, ready: int, trouble: Verdict | None) -> Verdict | None:
    """Why the pods that serve are not all that the spec asks for, or None: what keeps the others away, else that it goes on."""
    if seen.template_error is not None:
        return failing(seen.template_error.reason, f"{seen.template_error.message}; the pods that run go on serving")
    workload = seen.workload
    current = workload is None or workload.observed_generation >= workload.generation
    updated, total = (workload.updated_pods, workload.pods) if workload is not None else (0, 0)
    if current and updated == total == seen.served.replicas <= ready:
        return None
    progress = f"{ready} of {seen.served.replicas} pods ready"
    if ready >= seen.served.replicas:
        progress = f"rolling out: {updated if current else 0} of {seen.served.replicas} pods are of the present spec"
    return (
        failing(trouble.reason, f"{trouble.message}; {progress}") if trouble else failing(Reason.PROGRESSING, progress)
    )


def _model_ready(seen: DeploymentOutcome) -> Verdict:
    """Of all that the engines read; what else there is than a base model is named in the message."""
    verdict = _content_ready(Content("model", seen.artifact_name, seen.artifact, seen.blocked))
    messages = [verdict.message]
    for content in seen.auxiliary:
        if not verdict.is_true:
            break
        verdict = _content_ready(content)
        messages.append(f"{ROLE_NAMES[content.role]}: {verdict.message}")
    if not verdict.is_true:
        return failing(verdict.reason, messages[-1])
    return ok(Reason.MODEL_READY, "; ".join(messages) + seen.refresh_note)


def _content_ready(content: Content) -> Verdict:
    if content.blocked is not None:
        return failing(content.blocked.reason, content.blocked.message)
    condition = find(content.artifact.status.conditions, Condition.READY) if content.artifact else None
    if condition is None:
        return failing(Reason.QUEUED, f"ModelArtifact {content.artifact_name} has not started")
    if condition.status == "True":
        return ok(Reason.MODEL_READY, condition.message)
    return failing(reason_of(condition.reason), condition.message)


def describe_refresh(coming: Sequence[Content]) -> str:
    """What is told of a refresh of all contents that is not done, what holds it up first; nothing where it found the same."""
    verdicts = map(_content_ready, sorted(coming, key=lambda content: content.blocked is None))
    return next((describe(verdict) for verdict in verdicts if not verdict.is_true), "")


def _available(seen: DeploymentOutcome, ready: list[DeploymentPod], trouble: Verdict | None) -> Verdict:
    views = [pod.view for pod in ready if pod.view is not None]
    unguarded = [pod.name for pod in ready if pod.view and pod.view.error is None and not pod.view.guarded]
    if unguarded:
        return failing(
            Reason.GATE_MISSING,
            f"pod {unguarded[0]}: the engine lets clients load adapters: the plugin is not active; "
            "check that engine.command starts vLLM's API server and takes --middleware",
        )
    old = [view for view in views if view.too_old]
    if old:
        return failing(Reason.ENGINE_TOO_OLD, too_old_message(old[0]))
    if any(view.guarded for view in views):
        return ok(Reason.AVAILABLE, f"{len(ready)} of {seen.served.replicas} pods ready")
    if ready:
        view = ready[0].view
        return failing(
            Reason.ENGINE_UNREACHABLE,
            f"pod {ready[0].name} is ready, but its engine was not seen to refuse clients' loads: "
            f"{(view.error if view else None) or 'not asked yet'}",
        )
    if seen.template_error is not None:
        return failing(seen.template_error.reason, seen.template_error.message)
    if seen.workload is None and not _model_ready(seen).is_true:
        return failing(
            Reason.MODEL_NOT_READY,
            f"no pod is made before the base model is in the cache: {_model_ready(seen).message}",
        )
    if seen.workload is None and seen.waits_for is not None:
        return failing(Reason.PROGRESSING, f"the first pod is made with its adapters: it waits {seen.waits_for}")
    if seen.workload is not None and seen.served.replicas == 0:
        return failing(Reason.SCALED_TO_ZERO, "spec.replicas is 0")
    if trouble is not None:
        return trouble
    return failing(Reason.PROGRESSING, f"0 of {seen.served.replicas} pods ready; engines are starting")


def _in_sync(seen: DeploymentOutcome, ready: list[DeploymentPod], missing: Mapping[str, Sequence[str]]) -> Verdict:
    modules = seen.modules
    if modules is None:
        return failing(Reason.SYNC_PENDING, "the adapters have not all been looked at yet")
    if seen.waits_for is not None:
        return failing(
            Reason.SYNC_PENDING, f"list {modules.generation} is not rolled out yet: it waits {seen.waits_for}"
        )
    rolls = seen.deployment.spec.lora.update_strategy == ROLLOUT
    for pod in ready:
        why = _behind(pod, modules.generation, absent=missing[pod.name], rolls=rolls) or _at_fault(pod, rolls=rolls)
        if why is not None:
            return why
    if seen.left_out:
        return _left_out(seen.left_out)
    refused = {name for pod in ready for name in missing[pod.name]}
    if refused:
        return ok(
            Reason.IN_SYNC,
            f"list {modules.generation}; not served: {', '.join(sorted(refused)[:5])} (see their status)",
        )
    return ok(Reason.IN_SYNC, f"list {modules.generation} with {len(modules.by_name())} adapters")


def _behind(pod: DeploymentPod, generation: int, *, absent: Sequence[str], rolls: bool) -> Verdict | None:
    """SyncPending while a pod is not known to serve what the list of that generation has; what it refused is not awaited."""
    view = pod.view
    if view is None or view.error is not None:
        return failing(Reason.SYNC_PENDING, f"pod {pod.name}: {view.error if view else 'not asked yet'}")
    if view.list_generation != generation:
        return failing(
            Reason.SYNC_PENDING,
            f"pod {pod.name} holds list {view.list_generation}, the current one is {generation}"
            + ("; the pods are being replaced" if rolls else ""),
        )
    loading = set(absent) - set(view.failures)
    if loading:
        return failing(Reason.SYNC_PENDING, f"pod {pod.name} is loading {min(loading)}")
    return None


def _at_fault(pod: DeploymentPod, *, rolls: bool) -> Verdict | None:
    """What is wrong with a pod that has the current list: it answers what nobody wants, or can't change an adapter in one step."""
    view = pod.view
    if view is None:
        return None
    if view.orphans:
        return failing(
            Reason.ORPHANS_LOADED, f"pod {pod.name} answers {', '.join(view.orphans[:5])}, which no object wants"
        )
    if not view.atomic_swap and not rolls:
        return failing(
            Reason.NO_ATOMIC_SWAP,
            f"pod {pod.name}: vLLM {view.version} has no registry that the plugin knows: "
            "while an adapter changes its revision, a few requests for it may get 404",
        )
    return None


def _left_out(counts: Mapping[Reason, int]) -> Verdict:
    if arguments := counts.get(Reason.ARGUMENTS_TOO_LONG):
        return failing(
            Reason.ARGUMENTS_TOO_LONG,
            f"{arguments} adapters don't fit into the pods' arguments ({MAX_ARGUMENT_BYTES >> 10} KiB): use "
            "spec.lora.updateStrategy: HotLoad, or serve some of them by another VLLMDeployment",
        )
    return failing(
        Reason.LIST_TOO_LONG,
        f"{counts[Reason.LIST_TOO_LONG]} adapters don't fit into the list that pods are told ({MAX_PACKED_BYTES >> 10} KiB, packed), the "
        "youngest of the namespaces that have most: delete some, give them shorter names, or serve some of them by another VLLMDeployment",
    )


def _unwanted(view: PodView, seen: DeploymentOutcome) -> list[str]:
    """Names that a pod answers and nobody wants. One that rolls answers them until it is replaced, so they are told as well."""
    if seen.deployment.spec.lora.update_strategy != ROLLOUT or seen.modules is None:
        return list(view.orphans)
    return sorted({*view.orphans, *view.served} - set(seen.modules.by_name()))


def _missing(served: DeploymentPods, modules: ModuleList | None) -> dict[str, list[str]]:
    """By pod the names that it should have loaded and has not; what it loads on the first request is not missing."""
    names = {pod.name for pod in served.pods}
    return {
        pod.name: [
            module.name
            for module in (modules.modules if modules is not None else ())
            if view is not None
            and not serves(view, module)
            and not (waits(view, module) and is_lazy_on(module, pod.name, names))
        ]
        for pod in served.pods
        for view in (pod.view,)
    }


def _pod_state(pod: DeploymentPod, missing: Sequence[str], modules: ModuleList | None) -> PodState:
    view = pod.view
    return PodState(
        name=pod.name,
        ready=pod.ready,
        list_generation=view.list_generation if view else None,
        loaded=sum(serves(view, module) for module in modules.modules) if view and modules else 0,
        missing=tuple(missing[:MAX_MISSING]) or None,
        version=view.version if view else None,
    )
