"""What follows for a VLLMDeployment: its adapter list, the objects that it owns, and whether its pods are replaced.

Starting an engine takes minutes of GPU time, so that is decided in one place: pods roll only for what they can't do without.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Final

from lora_operator.api.cache import ModelCache
from lora_operator.api.deployment import VLLMDeployment
from lora_operator.constants import ANNOTATION_ARGUMENTS, ANNOTATION_PLUGIN, ANNOTATION_TEMPLATE_HASH, ROLLOUT, Reason
from lora_operator.desired.children import (
    build_chat_config_map,
    build_modules_config_map,
    build_plugin_config_map,
    build_service,
)
from lora_operator.desired.deployment import build_deployment, mounted_guard_secret, template_hash
from lora_operator.errors import ReasonError
from lora_operator.kube.pods import Pod
from lora_operator.kube.workloads import Workload
from lora_operator.names import is_of_another_token
from lora_operator.plan.adapter_list import ModuleList, encode_for_config_map
from lora_operator.plan.deployment_list import ListObservation, ListPlan, ListUnknown, plan_deployment_list
from lora_operator.plan.deployment_pods import DeploymentPods, PodView, replicas_wanted
from lora_operator.plan.model_contents import ModelContents
from lora_operator.plan.pod_trouble import find_trouble
from lora_operator.plan.rollout import (
    Rollout,
    RolloutPlan,
    Unrolled,
    build_static,
    is_coming,
    is_rolling,
    parse_rolled,
    plan_rollout,
)

Body = dict[str, Any]
LOOK_SECONDS: Final = 60.0
BLOCKED_SECONDS: Final = 10.0  # until it is looked again whether what can't be wanted, or made, can be by now
SETTING_UP_SECONDS: Final = 5.0  # while a pod's volumes and network are: only its Events tell of them


@dataclass(frozen=True)
class DeploymentObservation:
    """All that is known of a deployment at one moment. What is None there, or missing, is unknown and not empty."""

    deployment: VLLMDeployment
    model: ModelContents
    adapters: ListObservation
    workload: Workload | None  # the apps/v1 Deployment of its name, whoever's it is
    is_as_made: bool  # the workload: as this operator made or first saw it
    token_secret: Body | ReasonError  # the Secret with the token of the admin API's guard; or why there is none
    plugin: str  # the hash that names this operator's engine plugin
    plugin_files: Mapping[str, str]
    is_plugin_there: bool  # whether its ConfigMap is, for this deployment
    pods: tuple[Pod, ...]  # its own, with those that have ended
    served: DeploymentPods | None  # None while a pod's owner is not known, or a ready pod was not asked yet
    views: Mapping[str, PodView] = field(default_factory=dict)  # what pods showed last, also before a restart, by name
    asked: frozenset[str] = frozenset()  # pods that were asked since this operator started, by name
    is_setting_up: bool = False  # whether a pod is
    warnings: Mapping[str, str] = field(default_factory=dict)  # what Events say of a pod that is not set up, by its UID
    unrolled: Unrolled | None = None  # the list that pods' arguments don't hold yet, as far as is remembered

    @property
    def own_workload(self) -> Workload | None:
        """The Deployment, where it is this object's own."""
        live = self.workload
        return live if live is not None and live.is_controlled_by(self.deployment.metadata.uid) else None

    @property
    def annotations(self) -> Mapping[str, str]:
        """The Deployment's; none where there is no Deployment."""
        return self.workload.annotations if self.workload is not None else {}


@dataclass(frozen=True)
class LeavePods:
    """They run on as they are."""


@dataclass(frozen=True)
class ScalePods:
    """Their number is changed, and nothing else of their Deployment."""

    replicas: int


@dataclass(frozen=True)
class RollPods:
    """Their Deployment is made, or made anew: Kubernetes replaces them where its template differs."""

    manifest: Body
    otherwise: ScalePods | LeavePods  # where something refuses it, or what pods need


@dataclass(frozen=True)
class PodNeeds:
    """What the pods start with, made in this order; what is refused holds up all that comes after it."""

    token_secret: Body | ReasonError
    is_secret_doubtful: bool  # a pod does not start or answer, as without the Secret
    is_secret_mounted: (
        bool  # its Deployment has the Secret of this name: a full quota is then no reason to make no pods
    )
    chat: Body | None = None  # the chat template's ConfigMap
    plugin: Body | None = None  # the engine plugin's, where it is missing or new pods need it
    blocked: ReasonError | None = None  # why the pods that the spec leads to can't be planned


@dataclass(frozen=True)
class Children:
    """The objects beside the pods' Deployment."""

    modules: Body
    service: Body
    needs: PodNeeds


@dataclass(frozen=True)
class DeploymentPlan:
    """What is to be done."""

    adapters: ListPlan | ListUnknown
    rollout: Rollout | None  # with updateStrategy Rollout, once the list is known
    children: Children | None  # None while no list is known, or no pod could be made
    pods: RollPods | ScalePods | LeavePods
    look_at: frozenset[str]  # pods that are to be asked, by name

    @property
    def modules(self) -> ModuleList | None:
        """The adapter list; None while it can't be known."""
        return self.adapters.modules if isinstance(self.adapters, ListPlan) else None


def plan_deployment(seen: DeploymentObservation, *, now: datetime) -> DeploymentPlan:
    """The list, the objects and what becomes of the pods, each as far as it can be known."""
    adapters = plan_deployment_list(seen.deployment, seen.adapters)
    modules = adapters.modules if isinstance(adapters, ListPlan) else None
    rollout = _plan_rollout(seen, modules, now=now) if modules is not None else None
    children: Children | None = None
    scaled = _plan_scale(seen)
    pods: RollPods | ScalePods | LeavePods = scaled
    cache = seen.model.cache
    if modules is not None and cache is not None and (seen.model.is_ready or seen.workload is not None):
        needs, manifest = _plan_pods(seen, cache, rollout)
        children = Children(
            build_modules_config_map(seen.deployment, encode_for_config_map(modules)),
            build_service(seen.deployment),
            needs,
        )
        pods = RollPods(manifest, otherwise=scaled) if manifest is not None else scaled
    return DeploymentPlan(adapters, rollout, children, pods, _pods_to_look_at(seen, adapters, rollout))


def look_again(seen: DeploymentObservation, plan: DeploymentPlan, refused: ReasonError | None) -> float:
    """After how many seconds the deployment is looked at without an event."""
    again = [BLOCKED_SECONDS if seen.model.is_blocked or refused is not None else LOOK_SECONDS]
    if seen.is_setting_up:
        again.append(SETTING_UP_SECONDS)
    if plan.rollout is not None and plan.rollout.plan.look_again is not None:
        again.append(plan.rollout.plan.look_again)
    return min(again)


def _plan_scale(seen: DeploymentObservation) -> ScalePods | LeavePods:
    """As many pods as are asked for, where the Deployment is ours: that needs no model, no list and no quota but the pods'."""
    live = seen.own_workload
    replicas = replicas_wanted(seen.deployment, seen.workload)
    return LeavePods() if live is None or live.replicas == replicas else ScalePods(replicas)


def _plan_pods(seen: DeploymentObservation, cache: ModelCache, rollout: Rollout | None) -> tuple[PodNeeds, Body | None]:
    """What pods need, and the Deployment where it is to be made anew."""
    needs, secret = _token_secret_of(seen)
    model_path = seen.model.path("model")
    if not seen.model.is_ready or model_path is None or secret is None:
        return needs, None  # the pods that run keep the model that they have
    needs = replace(needs, chat=build_chat_config_map(seen.deployment))
    if cache.access_modes is None:  # unknown: whether the pods belong on one node
        where = f"{cache.metadata.namespace}/{cache.metadata.name}"
        message = f"the claim of ModelCache {where} can't be looked at: see its status"
        return replace(needs, blocked=ReasonError(Reason.CACHE_NOT_READY, message)), None
    if not _must_roll(seen, cache, secret, rollout):
        return replace(
            needs, plugin=build_plugin_config_map(seen.deployment, seen.plugin_files) if _lost_plugin(seen) else None
        ), None
    needs = replace(needs, plugin=build_plugin_config_map(seen.deployment, seen.plugin_files))
    try:
        return needs, _build(seen, cache, model_path, secret, rollout)
    except ReasonError as error:
        return replace(needs, blocked=error), None


def _token_secret_of(seen: DeploymentObservation) -> tuple[PodNeeds, str | None]:
    """What pods need first, and the name of its Secret where that can be known."""
    live = seen.own_workload
    mounted = mounted_guard_secret(live) if live is not None else None
    secret: str | None = None if isinstance(seen.token_secret, ReasonError) else seen.token_secret["metadata"]["name"]
    needs = PodNeeds(
        seen.token_secret,
        is_secret_doubtful=any(_is_dumb(pod, seen.views.get(pod.name)) for pod in seen.pods if not pod.has_ended),
        is_secret_mounted=secret is not None and mounted == secret,
    )
    return needs, secret


def _must_roll(seen: DeploymentObservation, cache: ModelCache, secret: str, rollout: Rollout | None) -> bool:
    """Whether the pods' Deployment is made, or made anew."""
    live = seen.workload
    if live is None:
        return rollout is None or rollout.plan.roll
    if seen.own_workload is None:
        return True  # which is refused, and says whose it is
    if rollout is not None and rollout.plan.roll:
        return True
    if seen.annotations.get(ANNOTATION_TEMPLATE_HASH) != _template_hash(seen, cache):
        return True
    if is_of_another_token(mounted_guard_secret(live) or secret, secret):
        return True  # no pod answers until it has the new one
    # What somebody changed by hand is made again, but not where that would also bring another plugin, which rolls all pods.
    return not seen.is_as_made and seen.annotations.get(ANNOTATION_PLUGIN) == seen.plugin


def _lost_plugin(seen: DeploymentObservation) -> bool:
    """Whether the plugin that pods start with is gone, and is this operator's: an older one's can't be made again."""
    return seen.annotations.get(ANNOTATION_PLUGIN) == seen.plugin and not seen.is_plugin_there


def _template_hash(seen: DeploymentObservation, cache: ModelCache) -> str:
    path = seen.model.path("model") or ""
    return template_hash(seen.deployment, cache, model_path=path, auxiliary=seen.model.auxiliary)


def _build(
    seen: DeploymentObservation, cache: ModelCache, model_path: str, secret: str, rollout: Rollout | None
) -> Body:
    return build_deployment(
        seen.deployment,
        cache,
        model_path=model_path,
        replicas=replicas_wanted(seen.deployment, seen.workload),
        token_secret=secret,
        plugin=seen.plugin,
        plugin_files=tuple(sorted(seen.plugin_files)),
        auxiliary=seen.model.auxiliary,
        static=rollout.static if rollout is not None else None,
    )


def _plan_rollout(seen: DeploymentObservation, modules: ModuleList, *, now: datetime) -> Rollout | None:
    """Whether the list is rolled out now; None where pods are told of it instead."""
    if seen.deployment.spec.lora.update_strategy != ROLLOUT:
        return None
    static, rolled = build_static(modules), parse_rolled(seen.annotations.get(ANNOTATION_ARGUMENTS))
    if rolled is not None and rolled.digest == static.digest:
        static = replace(static, generation=rolled.generation)  # another number alone is no reason for other pods
    candidates = seen.adapters.candidates
    coming = sorted(
        f"LoRAAdapter {one.adapter.metadata.namespace}/{one.adapter.metadata.name}"
        for one in candidates
        if is_coming(one.decision, one.artifact)
    )
    # Without what Events say: a pod whose volume is not there yet may still come.
    trouble = find_trouble(seen.pods, seen.workload, warnings={}, now=now)
    plan: RolloutPlan = plan_rollout(
        static, rolled, seen.unrolled, coming=tuple(coming), rolling=is_rolling(seen.workload, trouble), now=now
    )
    return Rollout(static, plan)


def _pods_to_look_at(
    seen: DeploymentObservation, adapters: ListPlan | ListUnknown, rollout: Rollout | None
) -> frozenset[str]:
    """Pods of which nothing is known, and those that hold an older list and can be told a newer one."""
    names = [pod.name for pod in seen.pods if not pod.has_ended]
    found = {name for name in names if name not in seen.asked}
    if isinstance(adapters, ListUnknown):
        return frozenset(found.union(adapters.pods))
    if adapters.is_new:
        return frozenset(names)
    if rollout is None:
        found |= {name for name in names if _is_behind(seen.views.get(name), adapters.modules)}
    return frozenset(found)


def _is_behind(view: PodView | None, modules: ModuleList) -> bool:
    if view is None or not view.guarded or view.error is not None or view.too_old:
        return False
    return view.update_strategy != ROLLOUT and view.list_generation != modules.generation


def _is_dumb(pod: Pod, view: PodView | None) -> bool:
    """Whether it does not start or does not answer."""
    return pod.running_engine is None or (view is not None and view.error is not None)
