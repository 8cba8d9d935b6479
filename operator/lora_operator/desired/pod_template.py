"""Merging a user's podTemplate over the operator's own: lists of named things by name, tolerations by appending.

The same keys as kubectl's strategic merge; everything else in the user's template replaces ours, null too; but a heading with
nothing below it (`env:` is null in YAML) takes nothing away. What would take the plugin out of the engine is refused here, and what
has another shape than a pod template where that matters for merging; the rest is checked by the API server when the Deployment
is applied.
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable
from typing import Any, Final

from lora_operator.api.deployment import RESERVED_ENV, RESERVED_ENV_PREFIXES
from lora_operator.constants import (
    CACHE_MOUNT,
    ENGINE_CONTAINER,
    GUARD_MOUNT,
    MODULES_MOUNT,
    PLUGIN_MOUNT,
    PLUGIN_STATE_MOUNT,
    Reason,
)
from lora_operator.engine_plugin.ignored_env import is_ignored
from lora_operator.errors import ReasonError

MERGE_KEYS: Final[dict[str, str]] = {
    "containers": "name",
    "initContainers": "name",
    "env": "name",
    "volumes": "name",
    "volumeMounts": "mountPath",
    "volumeDevices": "devicePath",
    "ports": "containerPort",
    "imagePullSecrets": "name",
    "topologySpreadConstraints": "topologyKey",
    "hostAliases": "ip",
}
APPENDED: Final = ("tolerations",)
HEADINGS: Final = ("metadata", "spec", "labels", "annotations", *APPENDED, *MERGE_KEYS)
OWN_VOLUMES: Final = ("model-cache", "engine-kit", "modules", "gate", "kit-state")
OWN_PLACES: Final = (CACHE_MOUNT, PLUGIN_MOUNT, MODULES_MOUNT, GUARD_MOUNT, PLUGIN_STATE_MOUNT)


def merge_pod_template(ours: dict[str, Any], theirs: dict[str, Any], *, where: str) -> dict[str, Any]:
    """`theirs` over `ours`. Raises ReasonError(PodTemplateInvalid) where it would disable what the operator relies on."""
    unknown = set(theirs) - {"metadata", "spec"}
    if unknown:
        raise _invalid(
            where, f"has {', '.join(sorted(unknown))}: it takes metadata and spec, as a Deployment's template"
        )
    metadata = _object(theirs, "metadata", "podTemplate", where)
    labels = _object(metadata, "labels", "podTemplate.metadata", where)
    _refuse(_object(theirs, "spec", "podTemplate", where), where)
    merged = _merge(ours, theirs, where)
    assert isinstance(merged, dict)  # noqa: S101  both sides are mappings
    merged["metadata"]["labels"] = labels | ours["metadata"]["labels"]
    return merged


def _invalid(where: str, what: str) -> ReasonError:
    return ReasonError(Reason.POD_TEMPLATE_INVALID, f"{where}: podTemplate {what}")


def _object(parent: dict[str, Any], field: str, path: str, where: str) -> dict[str, Any]:
    found = parent.get(field)
    if found is not None and not isinstance(found, dict):
        raise ReasonError(Reason.POD_TEMPLATE_INVALID, f"{where}: {path}.{field} is no object")
    return found or {}


def _objects(parent: dict[str, Any], field: str) -> list[dict[str, Any]]:
    """The objects in a list of theirs; whatever else is in it, or there instead, is not for this module to judge."""
    found = parent.get(field)
    return [item for item in found if isinstance(item, dict)] if isinstance(found, list) else []


def _refuse(spec: dict[str, Any], where: str) -> None:
    for volume in _objects(spec, "volumes"):
        if volume.get("name") in OWN_VOLUMES:
            raise _invalid(where, f"sets volume {volume['name']}, which is the operator's own: use another name")
    for container in _objects(spec, "containers"):
        if container.get("name") == ENGINE_CONTAINER:
            _refuse_engine(container, where)


def _refuse_engine(container: dict[str, Any], where: str) -> None:
    of_engine = f"of container {ENGINE_CONTAINER}"
    for field in ("command", "args", "image"):
        if field in container:
            raise _invalid(where, f"sets {field} {of_engine}: use spec.engine.{field}")
    for variable in _objects(container, "env"):
        name = str(variable.get("name", ""))
        if is_ignored(name):
            raise _invalid(
                where,
                f"sets {name} {of_engine}: the engine's gate or adapters would be out of the plugin's hands; leave it out",
            )
        if name in RESERVED_ENV or name.startswith(RESERVED_ENV_PREFIXES):
            raise _invalid(where, f"sets {name} {of_engine}: the operator does; use spec.engine.env for yours")
    for mount in _objects(container, "volumeMounts"):
        path = str(mount.get("mountPath", ""))
        clean = posixpath.normpath("/" + path.lstrip("/"))
        if any(clean == own or clean.startswith(f"{own}/") for own in OWN_PLACES):
            raise _invalid(where, f"mounts {path} {of_engine}, which is the operator's own place: use another")


def _merge(ours: Any, theirs: Any, where: str, field: str = "") -> Any:
    if theirs is None and field in HEADINGS:
        return ours
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return ours | {
            key: _merge(ours[key], value, where, key) if key in ours else value for key, value in theirs.items()
        }
    if isinstance(ours, list) and isinstance(theirs, list):
        if field in APPENDED:
            return ours + [item for item in theirs if item not in ours]
        if field in MERGE_KEYS:
            return _merge_list(
                ours, theirs, key=MERGE_KEYS[field], combine=lambda a, b: _merge(a, b, where), where=where
            )
    return theirs


def _merge_list(
    ours: list[Any], theirs: list[Any], *, key: str, combine: Callable[[Any, Any], Any], where: str
) -> list[Any]:
    result = {item[key]: item for item in ours}
    for item in theirs:
        if not isinstance(item, dict) or not isinstance(item.get(key), (str, int)):
            raise _invalid(where, f"has an entry without {key}: {str(item)[:120]}")
        result[item[key]] = combine(result[item[key]], item) if item[key] in result else item
    return list(result.values())
