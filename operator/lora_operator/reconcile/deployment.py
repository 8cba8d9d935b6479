"""One VLLMDeployment: the base model's artifact, the module list, the objects that it owns, and its status."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable

from lora_operator.api.deployment import VLLMDeployment
from lora_operator.constants import ANNOTATION_KIT, ANNOTATION_TEMPLATE_HASH, ROLLOUT, Reason
from lora_operator.desired.children import (
    build_chat_config_map,
    build_gate_secret,
    build_kit_config_map,
    build_modules_config_map,
    build_service,
    gate_token,
)
from lora_operator.desired.deployment import build_deployment, mounted_gate, template_hash
from lora_operator.errors import ForbiddenError, InvalidObjectError, KubeError, ReasonError
from lora_operator.kube.kinds import DEPLOYMENTS, Kind
from lora_operator.kube.workloads import Workload
from lora_operator.names import is_of_another_token, kit_config_map
from lora_operator.plan.adapter_list import ModuleList, encode_for_config_map, names_passed_on
from lora_operator.plan.claims import Candidate, settle_claims
from lora_operator.plan.deployment_status import DeploymentObservation, plan_deployment, replicas_wanted
from lora_operator.reconcile.adapter import namespace_labels, unreadable_adapters
from lora_operator.reconcile.base_model import BLOCKED_SECONDS, Model, want_model
from lora_operator.reconcile.context import Context
from lora_operator.reconcile.disruption_budget import keep_budget
from lora_operator.reconcile.fleet import all_own_pods, learn_owners, observe_fleet, own_pods, tell_adapters
from lora_operator.reconcile.kits import remove_old_kits
from lora_operator.reconcile.lists import held_list, next_list, stored_list
from lora_operator.reconcile.pod_events import SILENT_SECONDS, warnings_of
from lora_operator.reconcile.replicas import keep_replicas
from lora_operator.reconcile.rollout import Rollout, as_rolled, look_at_rollout
from lora_operator.reconcile.store import Key


async def reconcile_deployment(context: Context, key: Key) -> float | None:
    """Bring one deployment to what its spec says. Returns after how many seconds to look again by itself."""
    place = (key.namespace, key.name)
    deployment = context.store.deployments.get(place)
    if deployment is None:
        for artifact in context.records.forget_deployment(place):
            context.enqueue(Key(Kind.MODEL_ARTIFACT, *artifact))
        return None
    await keep_replicas(context, deployment)
    model = await want_model(context, deployment)
    await learn_owners(context, deployment)
    modules = await _update_list(context, deployment)
    rollout = look_at_rollout(context, deployment, modules)
    template_error = await _apply(context, deployment, model, modules, rollout)
    _ask_pods(context, deployment, modules, rollout)
    fleet = observe_fleet(context, deployment)
    if fleet is None:
        return 1.0  # just started: what stands in the status stays until the pods were asked
    pods = all_own_pods(context, deployment)
    silent, warnings = await warnings_of(context, pods, known=context.records.deployments[place].warnings)
    told, waits_for = as_rolled(context, deployment, modules, rollout)
    status = plan_deployment(
        DeploymentObservation(
            deployment=deployment,
            artifact_name=model.base.artifact_name,
            artifact=model.base.artifact,
            blocked=model.base.blocked,
            workload=context.store.workloads.get(place),
            template_error=template_error,
            pods=pods,
            fleet=fleet,
            modules=told,
            waits_for=waits_for,
            left_out=Counter(context.records.deployments.peek(place).left_out.values()),
            auxiliary=model.contents[1:],
            warnings=warnings,
            refresh=model.refresh,
            refresh_note=model.note,
        ),
        now=context.clock.now(),
    )
    written = await context.statuses.write(deployment, status)
    if written or status == deployment.status:  # else it is told later, and they read it there
        tell_adapters(context, deployment, fleet, status)
    await remove_old_kits(context, deployment)
    await keep_budget(context, deployment)
    again = 60.0 if not model.is_blocked and template_error is None else BLOCKED_SECONDS
    if silent:
        again = min(again, SILENT_SECONDS)
    return min(again, rollout.plan.look_again) if rollout and rollout.plan.look_again is not None else again


async def _apply(
    context: Context, deployment: VLLMDeployment, model: Model, modules: ModuleList | None, rollout: Rollout | None
) -> ReasonError | None:
    """Make what the deployment owns; returns why not all of that can be. What is refused holds up only what needs it."""
    listed = served = engines = None
    made = model.is_ready or deployment.key in context.store.workloads
    if modules is not None and model.cache is not None and made:
        listed = await _refusal(_apply_list(context, deployment, modules))
        service = context.store.services.get(deployment.key)
        served = await _refusal(context.children.apply(build_service(deployment), service))
        if not _is_foreign(context, deployment, listed):
            engines = await _refusal(_apply_engines(context, deployment, model, rollout))
    scaled = await _refusal(_scale(context, deployment))
    return engines or scaled or served or listed


def _is_foreign(context: Context, deployment: VLLMDeployment, listed: ReasonError | None) -> bool:
    """Whether new pods would mount somebody else's list: the object of its name is not ours, or not yet again."""
    if listed is None:
        return False
    new = deployment.key not in context.store.workloads
    return listed.reason is Reason.NAME_TAKEN or (new and listed.reason is Reason.PROGRESSING)


async def _refusal(work: Awaitable[object]) -> ReasonError | None:
    """Why one of the objects can't be made or changed; None where it was."""
    try:
        await work
    except ReasonError as error:
        return error
    except (ForbiddenError, InvalidObjectError) as error:
        return ReasonError(Reason.PODS_REFUSED, f"{error}; change what refuses it: quota, policy or right")
    except KubeError as error:
        # An admission webhook is down, or somebody wrote at the same time; or the API server is away, and then the status can't
        # be written either.
        return ReasonError(Reason.PROGRESSING, f"{error}; tried again every {BLOCKED_SECONDS:.0f} s")
    return None


def _ask_pods(
    context: Context, deployment: VLLMDeployment, modules: ModuleList | None, rollout: Rollout | None
) -> None:
    """Have those pods looked at of which nothing is known, and those that hold an older list and can be told a newer one."""
    for pod in own_pods(context, deployment):
        place_of_pod = pod.key
        record = context.records.pods.peek(place_of_pod)
        view = record.view
        behind = modules and view and view.gate_closed and view.error is None and not view.too_old
        behind = behind and rollout is None and view and view.update_strategy != ROLLOUT
        if not record.asked or (behind and modules and view and view.list_generation != modules.generation):
            context.enqueue(Key(Kind.POD, *place_of_pod))


async def _update_list(context: Context, deployment: VLLMDeployment) -> ModuleList | None:
    """The module list after all decisions; None while an adapter has not been decided on in its present form."""
    store, record = context.store, context.records.deployments[deployment.key]
    previous = record.modules or await stored_list(context, deployment)
    previous = record.modules or previous  # from here on nothing is awaited
    if previous is None:
        if not _all_asked(context, deployment):
            return None  # the ConfigMap was lost: the pods tell what was listed, and how far the generations had come
        previous = held_list(context, deployment)
    candidates = []
    for adapter in store.adapters_of(deployment.key):
        decision = context.records.decision(adapter.key)
        form = (adapter.metadata.uid, adapter.metadata.generation)
        if decision is None or (decision.uid, decision.generation) != form:
            context.enqueue(Key(Kind.LORA_ADAPTER, *adapter.key))
            if previous is None:
                return None
            decision = None  # one that can't be decided on keeps what it has, and holds up nobody else
        elif previous is None and decision.keep_unknown and store.pods_of_deployment(deployment.key):
            return None  # what it has, nobody knows: pods may hold a list with it; without any nothing can be lost
        candidates.append(Candidate(adapter, namespace_labels(context, adapter.metadata.namespace), decision))
    decisions = settle_claims(
        candidates, deployment=deployment, previous=previous, unreadable=unreadable_adapters(context)
    )
    updated = next_list(context, deployment, previous, decisions)
    record.modules = updated
    for passed in names_passed_on(previous, updated):
        context.enqueue(Key(Kind.LORA_ADAPTER, *passed))
    if previous is None or updated.generation != previous.generation:
        for pod in own_pods(context, deployment):
            context.enqueue(Key(Kind.POD, *pod.key))
    return updated


def _all_asked(context: Context, deployment: VLLMDeployment) -> bool:
    pods = {pod.key for pod in own_pods(context, deployment)}
    records = {pod: context.records.pods.peek(pod) for pod in pods}
    missing = [pod for pod, record in records.items() if not (record.asked or record.silent)]
    for pod in missing:
        context.enqueue(Key(Kind.POD, *pod))
    return not missing


async def _apply_list(context: Context, deployment: VLLMDeployment, modules: ModuleList) -> None:
    manifest = build_modules_config_map(deployment, encode_for_config_map(modules))
    live = context.store.config_maps.get((deployment.key[0], manifest["metadata"]["name"]))
    applied = await context.children.apply(manifest, live)
    context.records.deployments[deployment.key].stored = (applied.version, modules)


async def _apply_engines(context: Context, deployment: VLLMDeployment, model: Model, rollout: Rollout | None) -> None:
    """The engines' Deployment, with what its pods need."""
    store, place = context.store, deployment.key
    assert model.cache is not None  # noqa: S101  checked by the caller; a narrowing for the type checker
    secret = build_gate_secret(deployment, gate_token(await context.secrets.master_key(), deployment))
    gate = secret["metadata"]["name"]
    live = store.workloads.get(place)
    try:
        await context.children.ensure_secret(secret, doubtful=_lacks_a_pod(context, deployment))
    except ForbiddenError as error:
        # A full quota is told before the name is looked at, so also where the Secret exists. Pods that lack it say so themselves.
        mounted = mounted_gate(live) if live is not None and live.is_controlled_by(deployment.metadata.uid) else None
        if mounted != gate or "exceeded quota" not in str(error):
            raise
    model_path = model.path("model")
    if not model.is_ready or model_path is None:
        return  # the pods that run keep the model that they have
    chat = build_chat_config_map(deployment)
    if chat is not None:
        await context.children.apply(chat, store.config_maps.get((place[0], chat["metadata"]["name"])))
    if model.cache.access_modes is None:  # unknown: whether the pods belong on one node
        where = f"{place[0]}/{model.cache.metadata.name}"
        raise ReasonError(Reason.CACHE_NOT_READY, f"the claim of ModelCache {where} can't be looked at: see its status")
    wanted = template_hash(deployment, model.cache, model_path=model_path, auxiliary=model.auxiliary)
    if (
        live is not None
        and live.is_controlled_by(deployment.metadata.uid)
        and live.annotations.get(ANNOTATION_TEMPLATE_HASH) == wanted
        and not (rollout and rollout.plan.roll)
        and not is_of_another_token(mounted_gate(live) or gate, gate)  # else no pod answers until it has the new one
        and (context.children.adopt(deployment.key, live) or live.annotations.get(ANNOTATION_KIT) != context.kit)
    ):  # as it was made; or changed by hand, but to be made again only with another kit, which would roll the fleet
        await _keep_kit(context, deployment, live)
        return
    if live is None and rollout and not rollout.plan.roll:
        return
    kit = build_kit_config_map(deployment, context.kit_files)
    await context.children.apply(kit, store.config_maps.get((place[0], kit["metadata"]["name"])))
    manifest = build_deployment(
        deployment,
        model.cache,
        model_path=model_path,
        replicas=replicas_wanted(deployment, live),
        gate=gate,
        kit=context.kit,
        kit_files=tuple(sorted(context.kit_files)),
        auxiliary=model.auxiliary,
        static=rollout.static if rollout else None,
    )
    await context.children.refuse_foreign(manifest, live)
    try:
        context.children.note(deployment.key, await context.kube.apply(manifest))
    except InvalidObjectError as error:
        raise ReasonError(Reason.POD_TEMPLATE_INVALID, f"{error}; change spec.podTemplate or spec.engine") from error


async def _scale(context: Context, deployment: VLLMDeployment) -> None:
    """As many pods as are asked for, where the Deployment is ours and was not made anew with that number: that needs no model."""
    live = context.store.workloads.get(deployment.key)
    if live is None or not live.is_controlled_by(deployment.metadata.uid):
        return
    replicas = replicas_wanted(deployment, live)
    if live.replicas != replicas:
        as_made = context.children.adopt(deployment.key, live)
        patched = await context.kube.patch(DEPLOYMENTS, *deployment.key, {"spec": {"replicas": replicas}})
        if as_made:
            context.children.note(deployment.key, patched)
        else:  # somebody changed it by hand: that is still to be repaired, whatever the number of pods
            context.answers.take(Kind.DEPLOYMENT, patched)


def _lacks_a_pod(context: Context, deployment: VLLMDeployment) -> bool:
    """Whether a pod does not start or does not answer, as without its Secret."""
    for pod in own_pods(context, deployment):
        view = context.records.pods.peek(pod.key).view
        if pod.running_engine is None or (view is not None and view.error is not None):
            return True
    return False


async def _keep_kit(context: Context, deployment: VLLMDeployment, live: Workload) -> None:
    """Repair the kit's ConfigMap where it is this operator's kit; an older operator's kit can't be made again."""
    if live.annotations.get(ANNOTATION_KIT) != context.kit:
        return
    place = (deployment.key[0], kit_config_map(deployment.key[1], context.kit))
    if place not in context.store.config_maps:
        await context.children.apply(build_kit_config_map(deployment, context.kit_files), None)
