"""One VLLMDeployment: observe it, plan, apply the plan, and write one status of what was seen, planned and refused.

A pass plans from one moment: `_observe` first asks for what it must, then reads everything else without an await, and nothing is
awaited before the plan is published. So no list is applied that was not planned from what stands beside it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Mapping
from dataclasses import replace
from typing import TypeVar

from lora_operator.api.adapter import LoRAAdapter
from lora_operator.api.deployment import VLLMDeployment
from lora_operator.constants import Reason
from lora_operator.desired.children import build_guard_secret, guard_token
from lora_operator.errors import ForbiddenError, InvalidObjectError, KubeError, ReasonError
from lora_operator.kube.kinds import DEPLOYMENTS, Kind
from lora_operator.names import plugin_config_map
from lora_operator.plan.adapter_list import ModuleList
from lora_operator.plan.admission import Candidate
from lora_operator.plan.deployment import (
    BLOCKED_SECONDS,
    Children,
    DeploymentObservation,
    DeploymentPlan,
    LeavePods,
    PodNeeds,
    RollPods,
    ScalePods,
    look_again,
    plan_deployment,
)
from lora_operator.plan.deployment_list import ListObservation, ListPlan
from lora_operator.plan.deployment_status import outcome, plan_status
from lora_operator.plan.model_contents import ModelContents
from lora_operator.reconcile.adapter import namespace_labels, unreadable_adapters
from lora_operator.reconcile.base_model import want_model
from lora_operator.reconcile.context import Context
from lora_operator.reconcile.disruption_budget import keep_budget
from lora_operator.reconcile.own_pods import all_own_pods, learn_owners, observe_pods, report_readiness
from lora_operator.reconcile.pod_events import warnings_of
from lora_operator.reconcile.records import PodRecord
from lora_operator.reconcile.store import Body, Key, ObjectKey
from lora_operator.reconcile.stored_lists import held_list, stored_list
from lora_operator.reconcile.upkeep import keep_replicas, remove_old_plugins

NOT_ASKED_SECONDS = 1.0  # between looks just after a start, while pods have not all been asked
T = TypeVar("T")


async def reconcile_deployment(context: Context, key: Key) -> float | None:
    """Bring one deployment to what its spec says. Returns after how many seconds to look again by itself."""
    place = (key.namespace, key.name)
    deployment = context.store.deployments.get(place)
    if deployment is None:
        _forget(context, place)
        return None
    await keep_replicas(context, deployment)
    model = await want_model(context, deployment)
    seen = await _observe(context, deployment, model)
    plan = plan_deployment(seen, now=context.clock.now())
    _publish(context, deployment, plan)
    refused = await _apply(context, seen, plan)
    served = seen.served
    if served is None:
        return NOT_ASKED_SECONDS  # what stands in the status stays until the pods were asked
    seen = await _with_events(context, seen)
    workload = context.store.workloads.get(place)
    found = outcome(seen, served, plan, workload=workload, refused=refused)
    status = plan_status(found, now=context.clock.now())
    written = await context.statuses.write(deployment, status)
    if written or status == deployment.status:  # else it is reported later, and adapters read it there
        report_readiness(context, deployment, served, status)
    await remove_old_plugins(context, deployment)
    await keep_budget(context, deployment)
    return look_again(seen, plan, refused)


def _forget(context: Context, place: ObjectKey) -> None:
    for artifact in context.records.forget_deployment(place):
        context.enqueue(Key(Kind.MODEL_ARTIFACT, *artifact))


async def _observe(context: Context, deployment: VLLMDeployment, model: ModelContents) -> DeploymentObservation:
    """All that is known at one moment."""
    token_secret = await _token_secret(context, deployment)
    record = context.records.deployments[deployment.key]
    await learn_owners(context, deployment)
    stored = None if record.modules is not None else await stored_list(context, deployment)
    # From here on nothing is awaited.
    pods = tuple(all_own_pods(context, deployment))
    known = {pod.name: context.records.pods.peek(pod.key) for pod in pods}
    namespace, name = deployment.key
    live = context.store.workloads.get(deployment.key)
    is_ours = live is not None and live.is_controlled_by(deployment.metadata.uid)
    return DeploymentObservation(
        deployment=deployment,
        model=model,
        adapters=_observe_list(
            context, deployment, stored, {pod.name: known[pod.name] for pod in pods if not pod.has_ended}
        ),
        workload=live,
        # Judged only where it could be made anew: until then, what somebody changed by hand is taken as it is.
        is_as_made=live is None or not is_ours or not model.is_ready or context.children.adopt(deployment.key, live),
        token_secret=token_secret,
        plugin=context.plugin_hash,
        plugin_files=context.plugin_files,
        is_plugin_there=(namespace, plugin_config_map(name, context.plugin_hash)) in context.store.config_maps,
        pods=pods,
        served=observe_pods(context, deployment),
        views={pod: one.view for pod, one in known.items() if one.view is not None},
        asked=frozenset(pod for pod, one in known.items() if one.asked),
        unrolled=record.unrolled,
    )


async def _with_events(context: Context, seen: DeploymentObservation) -> DeploymentObservation:
    """With what Events say of its pods. They are asked for last, as the status alone speaks of them: nothing else waits for that."""
    known = context.records.deployments[seen.deployment.key].warnings
    is_setting_up, warnings = await warnings_of(context, seen.pods, known=known)
    return replace(seen, is_setting_up=is_setting_up, warnings=warnings)


async def _token_secret(context: Context, deployment: VLLMDeployment) -> Body | ReasonError:
    """The Secret that pods need, or why its token can't be known."""
    master_key = await _tried(context.secrets.master_key())
    if isinstance(master_key, ReasonError):
        return master_key
    return build_guard_secret(deployment, guard_token(master_key, deployment))


def _observe_list(
    context: Context, deployment: VLLMDeployment, stored: ModuleList | None, pods: Mapping[str, PodRecord]
) -> ListObservation:
    """What is known of the adapters, and of the list that its live `pods` were told; `stored` is what its ConfigMap had."""
    store, record, key = context.store, context.records.deployments[deployment.key], deployment.key
    previous = record.modules or stored
    return ListObservation(
        candidates=tuple(_candidate(context, adapter) for adapter in store.adapters_of(key)),
        previous=previous,
        recovered=held_list(context, deployment, [(key[0], pod) for pod in pods]) if previous is None else None,
        unasked=tuple(pod for pod, one in pods.items() if not (one.asked or one.silent)),
        has_pods=bool(store.pods_of_deployment(key)),
        highest=record.held,
        unreadable=frozenset(unreadable_adapters(context)),
        left_out=record.left_out,
        crowd=record.crowd,
    )


def _candidate(context: Context, adapter: LoRAAdapter) -> Candidate:
    metadata = adapter.metadata
    decision = context.records.decision(adapter.key)
    if decision is not None and (decision.uid, decision.generation) != (metadata.uid, metadata.generation):
        decision = None
    reference = decision.reference.artifact if decision else None
    artifact = context.store.artifacts.get(reference) if reference else None
    return Candidate(adapter, namespace_labels(context, metadata.namespace), decision, artifact)


def _publish(context: Context, deployment: VLLMDeployment, plan: DeploymentPlan) -> None:
    """Record the list for whoever looks at a pod or an adapter, and wake those whom it concerns."""
    record = context.records.deployments[deployment.key]
    if isinstance(plan.adapters, ListPlan):
        record.modules = plan.adapters.modules
        record.left_out = plan.adapters.left_out
        record.crowd = plan.adapters.crowd
    record.unrolled = plan.rollout.plan.unrolled if plan.rollout is not None else None
    for adapter in plan.adapters.adapters:
        context.enqueue(Key(Kind.LORA_ADAPTER, *adapter))
    for pod in sorted(plan.look_at):
        context.enqueue(Key(Kind.POD, deployment.key[0], pod))


async def _apply(context: Context, seen: DeploymentObservation, plan: DeploymentPlan) -> ReasonError | None:
    """Make what the deployment owns; returns why not all of that can be. What is refused holds up only what needs it."""
    pods, made = plan.pods, plan.children
    listed = served = engines = None
    is_rolled = False
    if made is not None:
        listed = await _tried(_apply_list(context, seen.deployment, made, plan.modules))
        served = await _tried(_apply_child(context, made.service))
        if not _is_foreign(seen, listed):
            engines = await _tried(_apply_pods(context, seen.deployment, made.needs, pods))
            is_rolled = engines is None and isinstance(pods, RollPods)
    instead = pods.otherwise if isinstance(pods, RollPods) else pods
    scaled = None
    if isinstance(instead, ScalePods) and not is_rolled:
        scaled = await _tried(_scale(context, seen.deployment, instead.replicas))
    return engines or scaled or served or listed


def _is_foreign(seen: DeploymentObservation, listed: ReasonError | None) -> bool:
    """Whether new pods would mount somebody else's list: the object of its name is not ours, or not yet again."""
    if listed is None:
        return False
    return listed.reason is Reason.NAME_TAKEN or (seen.workload is None and listed.reason is Reason.PROGRESSING)


async def _tried(work: Awaitable[T]) -> T | ReasonError:
    """What comes of it, or why one of the objects can't be made, changed or read."""
    try:
        return await work
    except ReasonError as error:
        return error
    except (ForbiddenError, InvalidObjectError) as error:
        return ReasonError(Reason.PODS_REFUSED, f"{error}; change what refuses it: quota, policy or right")
    except KubeError as error:
        # An admission webhook is down, or somebody wrote at the same time; or the API server is away, and then the status can't
        # be written either.
        return ReasonError(Reason.PROGRESSING, f"{error}; tried again every {BLOCKED_SECONDS:.0f} s")


async def _apply_child(context: Context, manifest: Body) -> None:
    store, metadata = context.store, manifest["metadata"]
    known = store.services if manifest["kind"] == "Service" else store.config_maps
    await context.children.apply(manifest, known.get((metadata["namespace"], metadata["name"])))


async def _apply_list(context: Context, deployment: VLLMDeployment, made: Children, modules: ModuleList | None) -> None:
    live = context.store.config_maps.get((deployment.key[0], made.modules["metadata"]["name"]))
    applied = await context.children.apply(made.modules, live)
    context.records.deployments[deployment.key].stored = (applied.version, modules)


async def _apply_pods(
    context: Context, deployment: VLLMDeployment, needs: PodNeeds, pods: RollPods | ScalePods | LeavePods
) -> None:
    """What the pods need, and then their Deployment where they roll. Raises what is refused, and makes nothing after it."""
    if isinstance(needs.token_secret, ReasonError):
        raise needs.token_secret
    try:
        await context.children.ensure_secret(needs.token_secret, doubtful=needs.is_secret_doubtful)
    except ForbiddenError as error:
        # A full quota is told before the name is looked at, so also where the Secret exists. Pods that lack it say so themselves.
        if not needs.is_secret_mounted or "exceeded quota" not in str(error):
            raise
    if needs.chat is not None:
        await _apply_child(context, needs.chat)
    if needs.plugin is not None:
        await _apply_child(context, needs.plugin)
    if needs.blocked is not None:
        raise needs.blocked
    if isinstance(pods, RollPods):
        await _roll(context, deployment, pods.manifest)


async def _roll(context: Context, deployment: VLLMDeployment, manifest: Body) -> None:
    await context.children.refuse_foreign(manifest, context.store.workloads.get(deployment.key))
    try:
        context.children.note(deployment.key, await context.kube.apply(manifest))
    except InvalidObjectError as error:
        raise ReasonError(Reason.POD_TEMPLATE_INVALID, f"{error}; change spec.podTemplate or spec.engine") from error


async def _scale(context: Context, deployment: VLLMDeployment, replicas: int) -> None:
    live = context.store.workloads.get(deployment.key)
    if live is None or not live.is_controlled_by(deployment.metadata.uid) or live.replicas == replicas:
        return  # somebody was quicker
    as_made = context.children.adopt(deployment.key, live)
    patched = await context.kube.patch(DEPLOYMENTS, *deployment.key, {"spec": {"replicas": replicas}})
    if as_made:
        context.children.note(deployment.key, patched)
    else:  # somebody changed it by hand: that is still to be repaired, whatever the number of pods
        context.answers.take(Kind.DEPLOYMENT, patched)
