"""Reading engine pods: which belong to whom, and which are ready. A pod's status is data from outside."""

from __future__ import annotations

from typing import Any

from lora_operator.constants import ENGINE_CONTAINER


def is_ready(pod: dict[str, Any]) -> bool:
    """Whether Kubernetes sends requests to the pod."""
    if pod["metadata"].get("deletionTimestamp"):
        return False
    conditions = (pod.get("status") or {}).get("conditions") or ()
    return any(c.get("type") == "Ready" and c.get("status") == "True" for c in conditions)


def controller(obj: dict[str, Any]) -> tuple[str, str, str] | None:
    """(kind, name, uid) of the object's controlling owner."""
    for owner in obj["metadata"].get("ownerReferences") or ():
        if owner.get("controller"):
            return owner["kind"], owner["name"], owner["uid"]
    return None


def is_controlled_by(obj: dict[str, Any], uid: str) -> bool:
    """Whether the object's controlling owner is the one with this UID."""
    owner = controller(obj)
    return owner is not None and owner[2] == uid


def engine_status(pod: dict[str, Any]) -> dict[str, Any]:
    """The engine container's status, {} where there is none yet."""
    statuses = (pod.get("status") or {}).get("containerStatuses") or ()
    return next((status for status in statuses if status.get("name") == ENGINE_CONTAINER), {})


def running_container(pod: dict[str, Any]) -> str | None:
    """The id of the engine container where it runs, else None."""
    status = engine_status(pod)
    if "running" not in (status.get("state") or {}):
        return None
    return status.get("containerID")


def pod_ip(pod: dict[str, Any]) -> str | None:
    """The pod's address."""
    return (pod.get("status") or {}).get("podIP")


def engine_port(pod: dict[str, Any]) -> int | None:
    """The port that this pod's engine listens on, which an older pod need not share with the present spec."""
    for container in pod["spec"].get("containers") or ():
        if container.get("name") == ENGINE_CONTAINER:
            return next((p["containerPort"] for p in container.get("ports") or () if p.get("name") == "http"), None)
    return None
