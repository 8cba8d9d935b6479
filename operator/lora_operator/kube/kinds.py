"""The kinds of objects that the operator reads or writes: one table of those that are watched, and the URLs of all. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Final
from urllib.parse import quote

from lora_operator.api import (
    LoRAAdapter,
    ModelArtifact,
    ModelCache,
    VLLMDeployment,
    adapter,
    artifact,
    cache,
    deployment,
)
from lora_operator.api.common import ApiModel, Resource, ResourceInfo
from lora_operator.constants import GROUP, LABEL_MANAGED_BY, MANAGED_BY, VERSION
from lora_operator.kube.objects import KubeObject, Namespace
from lora_operator.kube.pods import Pod
from lora_operator.kube.workloads import Job, Workload


@dataclass(frozen=True)
class ResourceType:
    """One kind of object, as its URL needs it."""

    group: str
    version: str
    plural: str
    kind: str
    namespaced: bool = True

    @property
    def api_version(self) -> str:
        """apps/v1, or v1 in the core group."""
        return f"{self.group}/{self.version}" if self.group else self.version

    def path(self, namespace: str | None = None, name: str | None = None, subresource: str | None = None) -> str:
        """Path of the collection, of the collection in a namespace, of an object, or of a subresource of it."""
        parts = ["apis", self.group, self.version] if self.group else ["api", self.version]
        if self.namespaced and namespace:
            parts += ["namespaces", namespace]
        parts.append(self.plural)
        parts += [part for part in (name, subresource) if part]
        return "/" + "/".join(quote(part, safe="") for part in parts)


def _own(info: ResourceInfo) -> ResourceType:
    return ResourceType(GROUP, VERSION, info.plural, info.kind)


LORA_ADAPTERS: Final = _own(adapter.RESOURCE)
VLLM_DEPLOYMENTS: Final = _own(deployment.RESOURCE)
MODEL_CACHES: Final = _own(cache.RESOURCE)
MODEL_ARTIFACTS: Final = _own(artifact.RESOURCE)
JOBS: Final = ResourceType("batch", "v1", "jobs", "Job")
DEPLOYMENTS: Final = ResourceType("apps", "v1", "deployments", "Deployment")
REPLICA_SETS: Final = ResourceType("apps", "v1", "replicasets", "ReplicaSet")
PODS: Final = ResourceType("", "v1", "pods", "Pod")
SERVICES: Final = ResourceType("", "v1", "services", "Service")
CONFIG_MAPS: Final = ResourceType("", "v1", "configmaps", "ConfigMap")
SECRETS: Final = ResourceType("", "v1", "secrets", "Secret")
CLAIMS: Final = ResourceType("", "v1", "persistentvolumeclaims", "PersistentVolumeClaim")
DISRUPTION_BUDGETS: Final = ResourceType("policy", "v1", "poddisruptionbudgets", "PodDisruptionBudget")
STORAGE_CLASSES: Final = ResourceType("storage.k8s.io", "v1", "storageclasses", "StorageClass", namespaced=False)
NAMESPACES: Final = ResourceType("", "v1", "namespaces", "Namespace", namespaced=False)
EVENTS: Final = ResourceType("", "v1", "events", "Event")


class Kind(StrEnum):
    """The kinds that are watched, as manifests name them."""

    LORA_ADAPTER = "LoRAAdapter"
    VLLM_DEPLOYMENT = "VLLMDeployment"
    MODEL_CACHE = "ModelCache"
    MODEL_ARTIFACT = "ModelArtifact"
    JOB = "Job"
    POD = "Pod"
    DEPLOYMENT = "Deployment"
    NAMESPACE = "Namespace"
    CONFIG_MAP = "ConfigMap"
    SERVICE = "Service"

    @property
    def info(self) -> KindInfo:
        """Its line in the table."""
        return KINDS[self]


@dataclass(frozen=True)
class KindInfo:
    """What is known of a watched kind: where its URL is, what it is parsed into, what of it is asked for, who owns such objects."""

    rt: ResourceType
    model: type[Resource] | None = None  # of a kind of ours
    status: type[ApiModel] | None = None  # of the model
    view: type[KubeObject] = KubeObject  # of another kind
    label_selector: str | None = None
    metadata_only: bool = False  # the rest may be a megabyte each, of anybody's objects
    owners: tuple[Kind, ...] = ()  # kinds of ours that control objects of this one themselves


_OURS: Final = f"{LABEL_MANAGED_BY}={MANAGED_BY}"
_FLEET: Final = (Kind.VLLM_DEPLOYMENT,)

KINDS: Final[Mapping[Kind, KindInfo]] = MappingProxyType(
    {
        Kind.LORA_ADAPTER: KindInfo(LORA_ADAPTERS, LoRAAdapter, adapter.RESOURCE.status),
        Kind.VLLM_DEPLOYMENT: KindInfo(VLLM_DEPLOYMENTS, VLLMDeployment, deployment.RESOURCE.status),
        Kind.MODEL_CACHE: KindInfo(MODEL_CACHES, ModelCache, cache.RESOURCE.status),
        Kind.MODEL_ARTIFACT: KindInfo(MODEL_ARTIFACTS, ModelArtifact, artifact.RESOURCE.status),
        Kind.NAMESPACE: KindInfo(NAMESPACES, view=Namespace, metadata_only=True),
        Kind.JOB: KindInfo(JOBS, view=Job, label_selector=_OURS, owners=(Kind.MODEL_ARTIFACT, Kind.MODEL_CACHE)),
        Kind.POD: KindInfo(PODS, view=Pod, label_selector=_OURS),
        Kind.DEPLOYMENT: KindInfo(DEPLOYMENTS, view=Workload, label_selector=_OURS, owners=_FLEET),
        Kind.CONFIG_MAP: KindInfo(CONFIG_MAPS, label_selector=_OURS, metadata_only=True, owners=_FLEET),
        Kind.SERVICE: KindInfo(SERVICES, label_selector=_OURS, metadata_only=True, owners=_FLEET),
    }
)
OWN_KINDS: Final = tuple(kind for kind, info in KINDS.items() if info.model is not None)
KIND_BY_PATH: Final[Mapping[str, Kind]] = MappingProxyType({info.rt.path(): kind for kind, info in KINDS.items()})
METADATA_ONLY: Final = frozenset(info.rt.path() for info in KINDS.values() if info.metadata_only)

_UNWATCHED: Final = (REPLICA_SETS, SECRETS, CLAIMS, DISRUPTION_BUDGETS, STORAGE_CLASSES, EVENTS)
_BY_KIND: Final = {(rt.api_version, rt.kind): rt for rt in (*(info.rt for info in KINDS.values()), *_UNWATCHED)}


def type_of(manifest: Mapping[str, Any]) -> ResourceType:
    """The type of an object that says its apiVersion and kind."""
    return _BY_KIND[manifest["apiVersion"], manifest["kind"]]


def kind_of(resource: Resource) -> Kind:
    """The kind of an object of ours."""
    return next(kind for kind in OWN_KINDS if KINDS[kind].model is type(resource))
