"""Which of a deployment's engine kits nothing can start from any more. Pure.

A kit is mounted by name, so a pod that is made from an older ReplicaSet (a roll-back, a pod replaced in mid-roll-out) needs the
kit of its time. Unknown is not empty: with ReplicaSets that could not be listed, nothing may be planned here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lora_operator.kube.objects import is_controlled_by
from lora_operator.names import kit_config_map

Body = dict[str, Any]


def owned_kits(config_maps: Iterable[Body], *, deployment: str, uid: str) -> frozenset[str]:
    """Names of the kit ConfigMaps that the VLLMDeployment of that name and UID owns."""
    prefix = kit_config_map(deployment, "")
    return frozenset(
        body["metadata"]["name"]
        for body in config_maps
        if body["metadata"]["name"].startswith(prefix) and is_controlled_by(body, uid)
    )


def mounted(templates: Iterable[Body]) -> frozenset[str]:
    """Names of the ConfigMaps that Deployments, ReplicaSets and pods mount as volumes."""
    specs = [template["spec"].get("template", template)["spec"] for template in templates]
    return frozenset(
        volume["configMap"]["name"]
        for spec in specs
        for volume in spec.get("volumes") or ()
        if (volume.get("configMap") or {}).get("name")
    )


def kits_to_remove(kits: frozenset[str], *, current: str, users: Iterable[Body]) -> frozenset[str]:
    """Kits that none of `users` (the Deployment, all its ReplicaSets, all its pods) mounts; never the operator's own."""
    return kits - mounted(users) - {current}
