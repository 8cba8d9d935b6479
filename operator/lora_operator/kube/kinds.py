"""The kinds of objects that the operator reads or writes, as their URLs need them. Pure: kube.py hands them on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final
from urllib.parse import quote

from lora_operator.constants import GROUP, VERSION


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


LORA_ADAPTERS: Final = ResourceType(GROUP, VERSION, "loraadapters", "LoRAAdapter")
VLLM_DEPLOYMENTS: Final = ResourceType(GROUP, VERSION, "vllmdeployments", "VLLMDeployment")
MODEL_CACHES: Final = ResourceType(GROUP, VERSION, "modelcaches", "ModelCache")
MODEL_ARTIFACTS: Final = ResourceType(GROUP, VERSION, "modelartifacts", "ModelArtifact")
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

BY_KIND: Final = {
    (known.api_version, known.kind): known
    for known in (
        LORA_ADAPTERS,
        VLLM_DEPLOYMENTS,
        MODEL_CACHES,
        MODEL_ARTIFACTS,
        JOBS,
        DEPLOYMENTS,
        REPLICA_SETS,
        PODS,
        SERVICES,
        CONFIG_MAPS,
        SECRETS,
        CLAIMS,
        DISRUPTION_BUDGETS,
        STORAGE_CLASSES,
        NAMESPACES,
        EVENTS,
    )
}
