"""Reading engine pods: which belong to whom, which are ready, and why one is not. A pod's status is data from outside."""

from __future__ import annotations

from typing import Any

from lora_operator.constants import ENGINE_CONTAINER, Reason

IMAGE_PROBLEMS = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull")
CONFIG_PROBLEMS = ("CreateContainerConfigError", "CreateContainerError", "RunContainerError")


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


def problem(pod: dict[str, Any]) -> tuple[Reason, str] | None:
    """Why the pod does not run, where Kubernetes says so."""
    name = pod["metadata"]["name"]
    status = pod.get("status") or {}
    for condition in status.get("conditions") or ():
        if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
            return Reason.UNSCHEDULABLE, f"pod {name}: {condition.get('message') or 'no node fits'}"
    engine = engine_status(pod)
    waiting = (engine.get("state") or {}).get("waiting") or {}
    ended = (engine.get("state") or {}).get("terminated") or (engine.get("lastState") or {}).get("terminated") or {}
    if waiting.get("reason") in IMAGE_PROBLEMS:
        return Reason.IMAGE_PULL, f"pod {name}: {waiting['reason']}: {waiting.get('message', '')}"
    if waiting.get("reason") in CONFIG_PROBLEMS:
        return Reason.CRASH_LOOPING, f"pod {name}: {waiting['reason']}: {waiting.get('message', '')}"
    if engine.get("ready") or not ended:
        return None
    if ended.get("reason") == "OOMKilled":
        return (
            Reason.OUT_OF_MEMORY,
            f"pod {name}: the engine was killed for its memory use; raise engine.resources.limits.memory",
        )
    if engine.get("restartCount", 0) >= 1:
        lines = " | ".join(line.strip() for line in (ended.get("message") or "").splitlines()[-5:] if line.strip())
        return Reason.CRASH_LOOPING, (
            f"pod {name}: the engine exited with code {ended.get('exitCode')} and was restarted "
            f"{engine['restartCount']} times; last lines: {lines[-800:] or 'none'}"
        )
    return None
