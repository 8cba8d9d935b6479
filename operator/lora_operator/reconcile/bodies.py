"""What is kept of the API server's words: of objects that are not ours only what is read, and of none what others wrote on it.

Anybody may put our label on his own objects, and fill these up to a megabyte each. Pure.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from lora_operator.constants import GROUP
from lora_operator.plan.unused import views_in

Body = dict[str, Any]

MAX_NESTING: Final = 100  # levels of an object; pods nest less than 20 deep, and what writes JSON gives up at some 250
_KEPT_OF_JOB: Final = ("suspend", "activeDeadlineSeconds")
_KEPT_OF_POD: Final = ("nodeName", "volumes")
_KEPT_OF_CONTAINER: Final = ("name", "ports")
_KEPT_OF_WORKLOAD: Final = ("replicas", "selector", "minReadySeconds", "progressDeadlineSeconds")


def slim(kind: str, body: Mapping[str, Any]) -> Body:
    """What the store keeps of an object; it shares its parts with `body`. A kind of our own keeps its whole spec and status."""
    metadata = {name: value for name, value in body["metadata"].items() if name != "managedFields"}
    annotations = metadata.pop("annotations", None) or {}
    if ours := {name: value for name, value in annotations.items() if name.startswith(f"{GROUP}/")}:
        metadata["annotations"] = ours
    found = {**body, "metadata": metadata}
    if kind in ("ConfigMap", "Service", "Namespace"):
        return {name: found[name] for name in ("apiVersion", "kind", "metadata") if name in found}
    spec = found.get("spec")
    if not isinstance(spec, dict):
        return found
    if kind == "Job":
        found["spec"] = _some(spec, _KEPT_OF_JOB)
    elif kind == "Pod":
        found["spec"] = _slim_pod(spec)
    elif kind == "Deployment":
        template = spec.get("template") or {}
        labels = {"labels": (template.get("metadata") or {}).get("labels") or {}}
        found["spec"] = _some(spec, _KEPT_OF_WORKLOAD)
        found["spec"]["template"] = {"metadata": labels, "spec": _slim_pod(template.get("spec") or {})}
    return found


def is_too_deep(body: Mapping[str, Any]) -> bool:
    """Whether something of it nests deeper than what writes and compares it can follow."""
    level: list[Any] = [body]
    for _ in range(MAX_NESTING):
        below = (child for node in level for child in (node.values() if isinstance(node, dict) else node))
        level = [child for child in below if isinstance(child, dict | list)]
        if not level:
            return False
    return True


def _some(spec: Mapping[str, Any], names: tuple[str, ...]) -> Body:
    return {name: spec[name] for name in names if name in spec}


def _slim_pod(spec: Mapping[str, Any]) -> Body:
    """Where it runs, its ports, which ConfigMaps and Secrets it mounts, and which content it names anywhere."""
    kept = _some(spec, _KEPT_OF_POD)
    kept["containers"] = [_some(container, _KEPT_OF_CONTAINER) for container in spec.get("containers") or ()]
    if "volumes" in kept:
        kept["volumes"] = [slim for volume in kept["volumes"] or () if (slim := _slim_volume(volume))]
    if views := sorted(views_in(json.dumps(spec))):
        kept["views"] = [f"artifacts/{view}" for view in views]
    return kept


def _slim_volume(volume: Mapping[str, Any]) -> Body | None:
    for source, name in (("configMap", "name"), ("secret", "secretName")):
        if volume.get(source):
            return {"name": volume.get("name"), source: _some(volume[source], (name,))}
    return None
