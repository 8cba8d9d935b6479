"""Which of a deployment's engine kits nothing can start from any more. Pure.

A kit is mounted by name, so a pod that is made from an older ReplicaSet (a roll-back, a pod replaced in mid-roll-out) needs the
kit of its time. Unknown is not empty: with ReplicaSets that could not be listed, nothing may be planned here.
"""

from __future__ import annotations

from collections.abc import Iterable

from lora_operator.kube.objects import KubeObject
from lora_operator.kube.pods import PodSpec
from lora_operator.names import kit_config_map


def owned_kits(config_maps: Iterable[KubeObject], *, deployment: str, uid: str) -> frozenset[str]:
    """Names of the kit ConfigMaps that the VLLMDeployment of that name and UID owns."""
    prefix = kit_config_map(deployment, "")
    return frozenset(
        found.name for found in config_maps if found.name.startswith(prefix) and found.is_controlled_by(uid)
    )


def mounted(specs: Iterable[PodSpec]) -> frozenset[str]:
    """Names of the ConfigMaps that Deployments, ReplicaSets and pods mount as volumes."""
    return frozenset[str]().union(*(spec.config_maps for spec in specs))


def kits_to_remove(kits: frozenset[str], *, current: str, users: Iterable[PodSpec]) -> frozenset[str]:
    """Kits that none of `users` (the Deployment, all its ReplicaSets, all its pods) mounts; never the operator's own."""
    return kits - mounted(users) - {current}
