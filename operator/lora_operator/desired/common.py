"""What several builders share: owner references and the restricted security context."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from lora_operator.api.common import Resource

CONTAINER_SECURITY: Final[dict[str, Any]] = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "seccompProfile": {"type": "RuntimeDefault"},
}


def owner_reference(owner: Resource, kind: str) -> dict[str, Any]:
    """A controlling reference to one of our objects in the same namespace, for garbage collection."""
    return {
        "apiVersion": owner.api_version,
        "kind": kind,
        "name": owner.metadata.name,
        "uid": owner.metadata.uid,
        "controller": True,
        "blockOwnerDeletion": False,
    }


def mounted_secret(pod: Mapping[str, Any], volume: str) -> str | None:
    """Name of the Secret that a volume of a pod's spec is; None without such a volume."""
    for one in pod.get("volumes") or ():
        if one.get("name") == volume:
            name: str | None = (one.get("secret") or {}).get("secretName")
            return name
    return None


def literal(text: str) -> str:
    """`text` for a container's command, args or env value, safe from the kubelet's $(VAR) expansion."""
    return text.replace("$", "$$")
