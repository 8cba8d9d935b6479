"""What is known of a deployment's pods, as values: one view per pod, and what each adapter may conclude from them.

Which of them load an adapter in advance is found by rendezvous hashing, so that a pod that comes or goes moves as few adapters
as can be.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final

from lora_operator.api.deployment import VLLMDeployment
from lora_operator.constants import HOT_LOAD, ROLLOUT
from lora_operator.kube.workloads import Workload
from lora_operator.plan.adapter_list import Module, ModuleList

_REMEMBERED: Final = 20_000  # adapters that preload, of all deployments


@dataclass(frozen=True)
class Served:
    """One name that a pod's engine lists in /v1/models, under its public name."""

    path: str
    parent: str | None
    internal_name: str


@dataclass(frozen=True)
class PodView:
    """What one look at a pod's engine showed. A pod that can't be asked has `error` and nothing else."""

    uid: str
    container_id: str
    error: str | None = None
    guarded: bool = False
    version: str | None = None
    too_old: bool = False
    list_generation: int | None = None
    list_digest: str | None = None  # None: the plugin is of an operator that told every pod the same
    settled: bool = False
    served: Mapping[str, Served] = field(default_factory=dict)
    waiting: Mapping[str, str] = field(default_factory=dict)  # served name -> path of what the first request will load
    failures: Mapping[str, str] = field(default_factory=dict)  # served name -> what the engine or the checks said
    retired: tuple[str, ...] = ()  # paths of content that requests may still use
    orphans: tuple[str, ...] = ()  # names that the engine lists and its plugin does not know
    atomic_swap: bool = True
    update_strategy: str = HOT_LOAD  # of the pod; another one than the deployment's while that changes


@dataclass(frozen=True)
class DeploymentPod:
    """One pod of the deployment, and the last look at its engine if there was one for this container."""

    name: str
    ready: bool
    view: PodView | None


@dataclass(frozen=True)
class AdapterLoad:
    """How one module stands on the deployment's ready pods."""

    wanted: int
    loaded: int
    unreachable: int
    refused: bool
    failures: tuple[tuple[str, str], ...]  # (pod, message)
    waiting: int = 0  # of `loaded`: pods that will load it on the first request


@dataclass(frozen=True)
class DeploymentPods:
    """The pods of a deployment at one moment."""

    replicas: int
    pods: tuple[DeploymentPod, ...]
    modules: ModuleList | None = None  # None: no list is known yet, so no pod was told of one

    def load_of(self, module: Module) -> AdapterLoad:
        """Count the ready pods that serve exactly this module: name, path and lineage; or will on the first request.

        Of a pod that was last looked at under an earlier list than the one that gave the module its name, nothing is concluded:
        by a list in between it may have stopped to serve what it served then.
        """
        wanted = loaded = unreachable = waiting = 0
        names = {pod.name for pod in self.pods}
        refused = False
        failures: list[tuple[str, str]] = []
        for pod in self.pods:
            if not pod.ready:
                continue
            wanted += 1
            view = pod.view
            if view is None or view.error is not None or not view.guarded:
                unreachable += 1
                failures.append((pod.name, view.error or "its gate is missing" if view else "not asked yet"))
            elif view.too_old:
                refused = True
                failures.append((pod.name, too_old_message(view)))
            elif self._is_outdated(view, module):
                continue
            elif serves(view, module):
                loaded += 1
            elif waits(view, module) and is_lazy_on(module, pod.name, names):
                loaded += 1
                waiting += 1
            elif module.name in view.failures:
                refused = True
                failures.append((pod.name, view.failures[module.name]))
        return AdapterLoad(wanted, loaded, unreachable, refused, tuple(failures), waiting)

    def _is_outdated(self, view: PodView, module: Module) -> bool:
        """Whether a look is older than the module's entry; a pod with its list in its arguments serves that as long as it lives."""
        if self.modules is None or view.update_strategy == ROLLOUT:
            return False
        brought = self.modules.brought(module)
        return brought is None or view.list_generation is None or view.list_generation < brought


def too_old_message(view: PodView) -> str:
    """What to do about a pod's version."""
    if view.update_strategy == ROLLOUT:
        return f"vLLM {view.version} is too old: use 0.10 or newer"
    return f"vLLM {view.version} can't be hot-loaded safely: use 0.26 or newer, or spec.lora.updateStrategy: Rollout"


def serves(view: PodView, module: Module) -> bool:
    """Whether the pod answers the module's name with the module's content and lineage."""
    served = view.served.get(module.name)
    return served is not None and served.path == module.path and served.parent == module.base_model_name


def waits(view: PodView, module: Module) -> bool:
    """Whether the pod acknowledged a list by which the first request for the module's name loads the module's content."""
    return view.waiting.get(module.name) == module.path and module.name not in view.failures


def is_lazy_on(module: Module, pod: str, pods: Collection[str]) -> bool:
    """Whether a pod loads the module on the first request only. `pods` are all pods of the deployment by name."""
    if module.preload:
        return pod not in preloading_pods(module.uid, module.preload, pods)
    return module.lazy


def preloading_pods(uid: str, count: int, pods: Collection[str]) -> frozenset[str]:
    """The `count` pods with the highest weights for an adapter. A pod's weight depends on no other pod."""
    return _chosen(uid, count, frozenset(pods))


@lru_cache(maxsize=_REMEMBERED)
def _chosen(uid: str, count: int, pods: frozenset[str]) -> frozenset[str]:
    """Asked for every adapter on behalf of every pod, so it is found once for all pods."""
    return frozenset(sorted(pods, key=lambda pod: _weight(uid, pod), reverse=True)[:count])


def _weight(uid: str, pod: str) -> bytes:
    return hashlib.sha256(f"{uid}/{pod}".encode()).digest()


def replicas_wanted(deployment: VLLMDeployment, workload: Workload | None) -> int:
    """Pods that should exist: the spec's, else what its own Deployment has (an autoscaler's), else 1."""
    if deployment.spec.replicas is not None:
        return deployment.spec.replicas
    if workload is None or not workload.is_controlled_by(deployment.metadata.uid):
        return 1  # there is none yet, or that of an earlier VLLMDeployment of this name is still going
    return workload.replicas
