"""Merging a user's podTemplate over the operator's own: lists of named things by name, tolerations by appending.

The same keys as kubectl's strategic merge; everything else in the user's template replaces ours. What would take the kit
out of the engine is refused here, the rest is checked by the API server when the Deployment is applied.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from lora_operator.api.deployment import RESERVED_ENV
from lora_operator.constants import ENGINE_CONTAINER, Reason
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


def merge_pod_template(ours: dict[str, Any], theirs: dict[str, Any], *, where: str) -> dict[str, Any]:
    """`theirs` over `ours`. Raises ReasonError(PodTemplateInvalid) where it would disable what the operator relies on."""
    unknown = set(theirs) - {"metadata", "spec"}
    if unknown:
        raise ReasonError(
            Reason.POD_TEMPLATE_INVALID,
            f"{where}: podTemplate has {', '.join(sorted(unknown))}: it takes metadata and spec, as a Deployment's template",
        )
    _refuse(theirs, where)
    merged = _merge(ours, theirs, where)
    assert isinstance(merged, dict)  # noqa: S101  both sides are mappings
    merged["metadata"]["labels"] = (theirs.get("metadata") or {}).get("labels", {}) | ours["metadata"]["labels"]
    return merged


def _refuse(theirs: dict[str, Any], where: str) -> None:
    spec = theirs.get("spec")
    containers = spec.get("containers") if isinstance(spec, dict) else None
    for container in containers if isinstance(containers, list) else ():
        if not isinstance(container, dict) or container.get("name") != ENGINE_CONTAINER:
            continue
        for field in ("command", "args", "image"):
            if field in container:
                raise ReasonError(
                    Reason.POD_TEMPLATE_INVALID,
                    f"{where}: podTemplate sets {field} of container {ENGINE_CONTAINER}: use spec.engine.{field}",
                )
        env = container.get("env")
        for variable in env if isinstance(env, list) else ():
            name = str(variable.get("name", "")) if isinstance(variable, dict) else ""
            if name.startswith("LORA_OPERATOR_") or name in (*RESERVED_ENV, "PYTHONPATH"):
                raise ReasonError(
                    Reason.POD_TEMPLATE_INVALID,
                    f"{where}: podTemplate sets {name} of container {ENGINE_CONTAINER}: the operator does; use spec.engine.env for yours",
                )


def _merge(ours: Any, theirs: Any, where: str, field: str = "") -> Any:
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
        if not isinstance(item, dict) or key not in item:
            raise ReasonError(
                Reason.POD_TEMPLATE_INVALID, f"{where}: podTemplate has an entry without {key}: {str(item)[:120]}"
            )
        result[item[key]] = combine(result[item[key]], item) if item[key] in result else item
    return list(result.values())
