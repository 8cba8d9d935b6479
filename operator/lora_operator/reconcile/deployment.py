"""One VLLMDeployment: the base model's artifact, the module list, the objects that it owns, and its status."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_operator.api.artifact import ModelArtifact
from lora_operator.api.cache import ModelCache
from lora_operator.api.deployment import VLLMDeployment
from lora_operator.constants import ANNOTATION_KIT, ANNOTATION_TEMPLATE_HASH, CACHE_MOUNT, MODULES_KEY, Reason
from lora_operator.desired.children import (
    build_gate_secret,
    build_kit_config_map,
    build_modules_config_map,
    build_service,
    gate_token,
    kit_hash,
)
from lora_operator.desired.deployment import build_deployment, template_hash
from lora_operator.errors import ConflictError, ForbiddenError, InvalidObjectError, ReasonError
from lora_operator.kube import DEPLOYMENTS, VLLM_DEPLOYMENTS
from lora_operator.names import kit_config_map, modules_config_map
from lora_operator.plan.claims import Candidate, settle_claims
from lora_operator.plan.deployment import DeploymentObservation, model_is_ready, plan_deployment
from lora_operator.plan.fleet import Fleet
from lora_operator.plan.modules import (
    ModuleList,
    decode_from_config_map,
    encode_for_config_map,
    plan_list,
)
from lora_operator.plan.pods import controller
from lora_operator.plan.wants import Credentials, build_artifact
from lora_operator.reconcile.adapter import cache_of, namespace_labels, unreadable_adapters
from lora_operator.reconcile.context import Context
from lora_operator.reconcile.fleet import learn_owners, observe_fleet, own_pods
from lora_operator.reconcile.registry import ModelWant
from lora_operator.reconcile.store import Key, Kind, ObjectKey


@dataclass(frozen=True)
class _Model:
    """The base model's artifact as far as it can be wanted."""

    cache: ModelCache | None
    key: ObjectKey | None
    artifact: ModelArtifact | None
    blocked: ReasonError | None


async def reconcile_deployment(context: Context, key: Key) -> float | None:
    """Bring one deployment to what its spec says. Returns after how many seconds to look again by itself."""
    place = (key.namespace, key.name)
    deployment = context.store.deployments.get(place)
    if deployment is None:
        for artifact in context.registry.withdraw_deployment(place):
            context.enqueue(Key(Kind.MODEL_ARTIFACT, *artifact))
        return None
    model = await _want_model(context, deployment)
    await learn_owners(context, context.store.pods_of_deployment(place))
    modules = _update_list(context, deployment)
    template_error: ReasonError | None = None
    if (
        modules is not None
        and model.cache is not None
        and (model_is_ready(model.artifact) or place in context.store.workloads)
    ):
        try:
            await _apply_list(context, deployment, modules)
            await _apply_children(context, deployment, model)
        except ReasonError as error:
            template_error = error
        except (InvalidObjectError, ForbiddenError, ConflictError) as error:
            template_error = ReasonError(Reason.POD_TEMPLATE_INVALID, str(error))
    pods = own_pods(context, deployment)
    for pod in pods:
        place_of_pod = (pod["metadata"]["namespace"], pod["metadata"]["name"])
        view = context.registry.views.get(place_of_pod)
        behind = modules and view and view.gate_closed and view.error is None and not view.too_old
        if place_of_pod not in context.registry.asked or (
            behind and modules and view and view.list_generation != modules.generation
        ):
            context.enqueue(Key(Kind.POD, *place_of_pod))
    fleet = observe_fleet(context, deployment)
    if fleet is None:
        return 1.0  # just started: what stands in the status stays until the pods were asked
    _tell_adapters(context, deployment, fleet)
    workload = context.store.workloads.get(place)
    status = plan_deployment(
        DeploymentObservation(
            deployment=deployment,
            artifact_name=model.key[1] if model.key else None,
            artifact=model.artifact,
            blocked=model.blocked,
            workload=workload,
            template_error=template_error,
            pods=pods,
            fleet=fleet,
            modules=modules,
        ),
        now=context.now(),
    )
    await context.write_status(VLLM_DEPLOYMENTS, Kind.VLLM_DEPLOYMENT, deployment, status)
    return 60.0 if model.blocked is None and template_error is None else 10.0


def _tell_adapters(context: Context, deployment: VLLMDeployment, fleet: Fleet) -> None:
    """Wake the adapters when pods came, went, or changed their readiness; of what engines serve, pods' own looks tell."""
    readiness = (fleet.replicas, tuple((pod.name, pod.ready, pod.view is None) for pod in fleet.pods))
    if context.registry.readiness.get(deployment.key) != readiness:
        context.registry.readiness[deployment.key] = readiness
        for adapter in context.store.adapters_of(deployment.key):
            context.enqueue(Key(Kind.LORA_ADAPTER, *adapter.key))


async def _want_model(context: Context, deployment: VLLMDeployment) -> _Model:
    """Find the cache and the credentials, and make sure that the base model's artifact exists."""
    cache = cache_of(context, deployment)
    source = deployment.spec.model.source.hugging_face
    ref = source.token_secret_ref if source else None
    credentials: Credentials | ReasonError | None = None
    if ref is not None:
        credentials = await context.credentials(deployment.metadata.namespace, ref.name, ref.key)
    blocked = next((error for error in (cache, credentials) if isinstance(error, ReasonError)), None)
    if isinstance(cache, ReasonError) or isinstance(credentials, ReasonError):
        key = _recorded_artifact(context, deployment)
        _publish_want(context, deployment, key, None)
        artifact = context.store.artifacts.get(key) if key else None
        usable = model_is_ready(artifact) and not isinstance(cache, ReasonError)
        return _Model(None if isinstance(cache, ReasonError) else cache, key, artifact, None if usable else blocked)
    manifest = build_artifact(
        cache=cache, source=deployment.spec.model.source, base_artifact=None, credentials=credentials
    )
    key = (manifest["metadata"]["namespace"], manifest["metadata"]["name"])
    if key not in context.store.artifacts:
        context.take(Kind.MODEL_ARTIFACT, await context.kube.apply(manifest))
        context.enqueue(Key(Kind.MODEL_ARTIFACT, *key))
    _publish_want(context, deployment, key, credentials)
    artifact = context.store.artifacts.get(key)
    if artifact is not None and artifact.spec.to_wire() != manifest["spec"]:
        taken = f"ModelArtifact {key[0]}/{key[1]} exists with another spec: delete it"
        return _Model(cache, key, None, ReasonError(Reason.NAME_TAKEN, taken))
    return _Model(cache, key, artifact, None)


def _recorded_artifact(context: Context, deployment: VLLMDeployment) -> ObjectKey | None:
    """The artifact in use, where the Secret or cache that it came through is gone but the spec is the same."""
    status = deployment.status
    if status.model_artifact is None or status.observed_generation != deployment.metadata.generation:
        return None
    key = (deployment.metadata.namespace, status.model_artifact)
    return key if key in context.store.artifacts else None


def _publish_want(
    context: Context, deployment: VLLMDeployment, key: ObjectKey | None, credentials: Credentials | None
) -> None:
    want = ModelWant(deployment.metadata.uid, deployment.metadata.generation, key, credentials)
    changed = context.registry.publish_model_want(deployment.key, want)
    if changed is None:
        return
    for artifact in changed:
        context.enqueue(Key(Kind.MODEL_ARTIFACT, *artifact))
    for adapter in context.store.adapters_of(deployment.key):
        context.enqueue(Key(Kind.LORA_ADAPTER, *adapter.key))


def _update_list(context: Context, deployment: VLLMDeployment) -> ModuleList | None:
    """The module list after all decisions; None while an adapter has not been decided on in its present form."""
    registry, store = context.registry, context.store
    previous = registry.lists.get(deployment.key) or _stored_list(context, deployment)
    if previous is None and not _all_asked(context, deployment):
        return None  # the ConfigMap was lost: what the pods hold tells how far the generations had come
    candidates = []
    for adapter in store.adapters_of(deployment.key):
        decision = registry.decision(adapter.key)
        form = (adapter.metadata.uid, adapter.metadata.generation)
        if decision is None or (decision.uid, decision.generation) != form:
            context.enqueue(Key(Kind.LORA_ADAPTER, *adapter.key))
            if previous is None:
                return None
            decision = None  # one that can't be decided on keeps what it has, and holds up nobody else
        elif previous is None and decision.keep_unknown:
            return None  # what it has, nobody knows: pods may hold a list with it
        candidates.append(Candidate(adapter, namespace_labels(context, adapter.metadata.namespace), decision))
    decisions = settle_claims(
        candidates, deployment=deployment, previous=previous, unreadable=unreadable_adapters(context)
    )
    updated = plan_list(
        previous,
        decisions,
        deployment=f"{deployment.metadata.namespace}/{deployment.metadata.name}",
        above=registry.held.get(deployment.key, 0),
    )
    registry.lists[deployment.key] = updated
    if previous is None or updated.generation != previous.generation:
        for pod in own_pods(context, deployment):
            context.enqueue(Key(Kind.POD, pod["metadata"]["namespace"], pod["metadata"]["name"]))
    return updated


def _all_asked(context: Context, deployment: VLLMDeployment) -> bool:
    asked = context.registry.asked | context.registry.silent
    pods = {(pod["metadata"]["namespace"], pod["metadata"]["name"]) for pod in own_pods(context, deployment)}
    for pod in pods - asked:
        context.enqueue(Key(Kind.POD, *pod))
    return pods <= asked


def _stored_list(context: Context, deployment: VLLMDeployment) -> ModuleList | None:
    """The list in the ConfigMap: what pods were last told, before this operator started."""
    namespace, name = deployment.key
    body = context.store.config_maps.get((namespace, modules_config_map(name)))
    owner = controller(body) if body else None
    if body is None or owner is None or owner[2] != deployment.metadata.uid:
        return None
    data = (body.get("binaryData") or {}).get(MODULES_KEY)
    return decode_from_config_map(data) if isinstance(data, str) else None


async def _apply_list(context: Context, deployment: VLLMDeployment, modules: ModuleList) -> None:
    manifest = build_modules_config_map(deployment, encode_for_config_map(modules))
    live = context.store.config_maps.get((deployment.key[0], manifest["metadata"]["name"]))
    await context.apply_child(manifest, live)


async def _apply_children(context: Context, deployment: VLLMDeployment, model: _Model) -> None:
    store, place = context.store, deployment.key
    assert model.cache is not None  # noqa: S101  checked by the caller; a narrowing for the type checker
    service = build_service(deployment)
    await context.apply_child(service, store.services.get(place))
    token = gate_token(await context.master_key(), deployment)
    await context.ensure_secret(build_gate_secret(deployment, token))
    if not model_is_ready(model.artifact) or model.artifact is None:
        return  # the pods that run keep the model that they have
    model_path = f"{CACHE_MOUNT}/{model.artifact.status.path}"
    live = store.workloads.get(place)
    wanted = template_hash(deployment, model.cache, model_path=model_path)
    if (
        live is not None
        and _owned(live, deployment)
        and _annotations(live).get(ANNOTATION_TEMPLATE_HASH) == wanted
        and (context.adopt_child(live) or _annotations(live).get(ANNOTATION_KIT) != kit_hash(context.kit_files))
    ):  # as it was made; or changed by hand, but to be made again only with another kit, which would roll the fleet
        await _keep_kit(context, deployment, live)
        if deployment.spec.replicas is not None and live["spec"].get("replicas") != deployment.spec.replicas:
            patched = await context.kube.patch(DEPLOYMENTS, *place, {"spec": {"replicas": deployment.spec.replicas}})
            context.note_child(patched)
        return
    kit = build_kit_config_map(deployment, context.kit_files)
    await context.apply_child(kit, store.config_maps.get((place[0], kit["metadata"]["name"])))
    manifest = build_deployment(
        deployment,
        model.cache,
        model_path=model_path,
        kit=kit_hash(context.kit_files),
        kit_files=tuple(sorted(context.kit_files)),
    )
    await context.refuse_foreign(manifest, live)
    context.note_child(await context.kube.apply(manifest))


async def _keep_kit(context: Context, deployment: VLLMDeployment, live: Mapping[str, Any]) -> None:
    """Repair the kit's ConfigMap where it is this operator's kit; an older operator's kit can't be made again."""
    if _annotations(live).get(ANNOTATION_KIT) != kit_hash(context.kit_files):
        return
    place = (deployment.key[0], kit_config_map(deployment.key[1], kit_hash(context.kit_files)))
    if place not in context.store.config_maps:
        await context.apply_child(build_kit_config_map(deployment, context.kit_files), None)


def _owned(obj: Mapping[str, Any], deployment: VLLMDeployment) -> bool:
    owner = controller(dict(obj))
    return owner is not None and owner[2] == deployment.metadata.uid


def _annotations(obj: Mapping[str, Any]) -> dict[str, str]:
    return obj["metadata"].get("annotations") or {}
