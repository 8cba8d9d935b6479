"""What is kept of the API server's words: of objects that are not ours only what is read, and of none what others wrote on it.

Anybody may put our label on his own objects, and fill these up to a megabyte each. Pure.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import islice
from typing import Any, Final

from lora_operator.constants import ANNOTATIONS, LABELS
from lora_operator.plan.eviction_candidates import views_in

Body = dict[str, Any]

MAX_NESTING: Final = 100  # levels of an object; pods nest less than 20 deep, and what writes JSON gives up at some 250
_MOST_LABELS: Final = 100  # that pods get
_MOST_CONTAINERS: Final = 30
_LONGEST: Final = 1024  # characters of an annotation
_DROPPED: Final = ("managedFields", "finalizers", "labels", "annotations", "ownerReferences")
_KEPT_OF_JOB: Final = ("suspend", "activeDeadlineSeconds")
_KEPT_OF_POD: Final = ("nodeName", "volumes")
_KEPT_OF_CONTAINER: Final = ("name", "ports")
_KEPT_OF_WORKLOAD: Final = ("replicas", "selector", "minReadySeconds", "progressDeadlineSeconds")


def slim(kind: str, body: Mapping[str, Any]) -> Body:
    """What the store keeps of an object; it shares its parts with `body`. A kind of our own keeps its whole spec and status."""
    found = {**body, "metadata": _slim_metadata(kind, body["metadata"])}
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
        labels = {"labels": dict(islice(((template.get("metadata") or {}).get("labels") or {}).items(), _MOST_LABELS))}
        found["spec"] = _some(spec, _KEPT_OF_WORKLOAD)
        found["spec"]["template"] = {"metadata": labels, "spec": _slim_pod(template.get("spec") or {})}
    return found


def _slim_metadata(kind: str, metadata: Mapping[str, Any]) -> Body:
    """Without what anybody may fill with any amount: of labels and annotations those that are read, of owners the controller."""
    kept = {name: value for name, value in metadata.items() if name not in _DROPPED}
    labels, annotations = metadata.get("labels") or {}, metadata.get("annotations") or {}
    if labels := labels if kind == "Namespace" else _some(labels, LABELS):
        kept["labels"] = labels  # those of a namespace are asked by selectors, and are its administrator's
    if annotations := {name: value[:_LONGEST] for name, value in _some(annotations, ANNOTATIONS).items()}:
        kept["annotations"] = annotations
    if owners := [owner for owner in metadata.get("ownerReferences") or () if owner.get("controller")]:
        kept["ownerReferences"] = owners[:1]
    return kept


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
    kept["containers"] = [_slim_container(container) for container in (spec.get("containers") or ())[:_MOST_CONTAINERS]]
    if "volumes" in kept:
        kept["volumes"] = [slim for volume in kept["volumes"] or () if (slim := _slim_volume(volume))]
    if views := sorted(views_in(json.dumps(spec))):
        kept["views"] = [f"artifacts/{view}" for view in views]
    return kept


def _slim_container(container: Mapping[str, Any]) -> Body:
    kept = _some(container, _KEPT_OF_CONTAINER)
    asked = [port for port in kept.pop("ports", None) or () if port.get("name") == "http"]
    return kept | {"ports": asked[:1]} if asked else kept


def _slim_volume(volume: Mapping[str, Any]) -> Body | None:
    for source, name in (("configMap", "name"), ("secret", "secretName")):
        if volume.get(source):
            return {"name": volume.get("name"), source: _some(volume[source], (name,))}
    return None
