"""Where pods of a cache run: Jobs where the engines may, so that a volume lands there; all on one node where no other could mount it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

from lora_operator.api.cache import ModelCache
from lora_operator.api.deployment import VLLMDeployment
from lora_operator.conditions import find
from lora_operator.constants import LABEL_CACHE, Condition, Reason
from lora_operator.names import label_value

_HOST: Final = "kubernetes.io/hostname"
_REQUIRED: Final = "requiredDuringSchedulingIgnoredDuringExecution"
_LATEST: Final = datetime.max.replace(tzinfo=UTC)


@dataclass(frozen=True)
class JobPlacement:
    """Parts of a Job's pod spec, and whose podTemplate they are from."""

    pod_spec: dict[str, Any] = field(default_factory=dict)
    origin: str = ""


def job_placement(cache: ModelCache, deployments: Iterable[VLLMDeployment]) -> JobPlacement:
    """The node constraints for a Job whose content these deployments want: those of the oldest one's podTemplate.

    nodeSelector and node affinity decide where a volume is made, and which node a ReadWriteOnce one is tied to. Once a volume is
    there and several nodes can mount it, the scheduler knows where it can be used, and a download need not take an engine's
    node: then only the tolerations are left, without which a pod may not be able to get to the volume at all.
    The template is a user's: what has another shape than a pod's is left to the API server to refuse, on the engines.
    """
    oldest = min(deployments, key=_age, default=None)
    if oldest is None:
        return JobPlacement()
    spec = (oldest.spec.pod_template or {}).get("spec")
    if not isinstance(spec, dict):
        return JobPlacement()
    found: dict[str, Any] = {}
    if isinstance(tolerations := spec.get("tolerations"), list) and tolerations:
        found["tolerations"] = tolerations
    if cache.single_node or _is_unbound(cache):
        if isinstance(selector := spec.get("nodeSelector"), dict) and selector:
            found["nodeSelector"] = selector
        affinity = spec.get("affinity")
        if isinstance(affinity, dict) and isinstance(node := affinity.get("nodeAffinity"), dict) and node:
            found["affinity"] = {"nodeAffinity": node}
    return JobPlacement(found, f"VLLMDeployment {oldest.metadata.namespace}/{oldest.metadata.name}" if found else "")


def keep_on_one_node(template: dict[str, Any], cache: ModelCache) -> dict[str, Any]:
    """A pod template whose pods run on the node of the cache's other pods, where only one node can mount the claim.

    Kubernetes lets the first pod of such a group choose its node. Templates for other caches are returned as they are.
    """
    if not cache.single_node:
        return template
    label = {LABEL_CACHE: label_value(cache.metadata.name)}
    metadata, spec = template["metadata"], template["spec"]
    affinity = spec.get("affinity") or {}
    pods = (affinity.get("podAffinity") or {}) if isinstance(affinity, dict) else None
    if not isinstance(pods, dict) or not isinstance(terms := pods.get(_REQUIRED) or [], list):
        return template  # the API server refuses it, with the field's name
    together = {"labelSelector": {"matchLabels": label}, "topologyKey": _HOST}
    return {
        "metadata": {**metadata, "labels": metadata["labels"] | label},
        "spec": {**spec, "affinity": {**affinity, "podAffinity": {**pods, _REQUIRED: [*terms, together]}}},
    }


def _age(deployment: VLLMDeployment) -> tuple[datetime, str]:
    return (deployment.metadata.creation_timestamp or _LATEST, deployment.metadata.name)


def _is_unbound(cache: ModelCache) -> bool:
    ready = find(cache.status.conditions, Condition.READY)
    return ready is None or ready.reason == Reason.CLAIM_PENDING
