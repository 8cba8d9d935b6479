"""Why engine pods don't run, in words that name the object, the cause and what to do. A pod's status is data from outside.

A reason stays while a container is restarted again and again: what flips would be written on every adapter each time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from typing import Any, Final

from lora_operator.conditions import Verdict, failing
from lora_operator.constants import ENGINE_CONTAINER, Reason
from lora_operator.kube.objects import is_ready

IMAGE_PROBLEMS: Final = frozenset(
    {
        "ErrImagePull",
        "ImagePullBackOff",
        "InvalidImageName",
        "ErrImageNeverPull",
        "ImageInspectError",
        "RegistryUnavailable",
        "SignatureValidationFailed",
    }
)
NO_PROBLEMS: Final = frozenset({"", "ContainerCreating", "PodInitializing", "CrashLoopBackOff"})
NEVER_STARTED: Final = frozenset({"StartError", "ContainerCannotRun"})
SIGNALS: Final[Mapping[int, str]] = {
    137: " (SIGKILL: by its liveness probe, or for the node's memory)",
    139: " (SIGSEGV)",
}
SETUP_SECONDS: Final = 5.0  # volumes and network take about one; then the pod's Events are asked
SLOW_SETUP_SECONDS: Final = 30.0
REPLACEMENT: Final = timedelta(seconds=60)  # a pod that was made so soon after another ended is there in its place
MAX_LINES, MAX_LOG, MAX_WORDS = 5, 800, 1000


def find_trouble(
    pods: Iterable[dict[str, Any]],
    workload: Mapping[str, Any] | None,
    *,
    warnings: Mapping[str, str],
    now: datetime,
) -> Verdict | None:
    """Why not all of a Deployment's pods run, where Kubernetes says so; `warnings`: what Events say, by the pod's UID."""
    pods = list(pods)
    waiting = [pod for pod in pods if is_alive(pod) and not is_ready(pod)]
    told = [pod_trouble(pod, warnings=warnings, now=now) for pod in waiting]
    known = [trouble for trouble in (*told, _refused(workload)) if trouble is not None]
    found = next((trouble for trouble in known if trouble.reason is not Reason.PROGRESSING), next(iter(known), None))
    ended = _replaced(pods, waiting)
    if ended is None or (found is not None and found.reason is not Reason.UNSCHEDULABLE):
        return found
    return failing(*((found.reason, f"{found.message}; {ended}") if found else (Reason.PROGRESSING, ended)))


def is_alive(pod: dict[str, Any]) -> bool:
    """Whether the pod is neither at its end nor being deleted."""
    return not pod["metadata"].get("deletionTimestamp") and _status(pod).get("phase") not in ("Succeeded", "Failed")


def pod_trouble(pod: dict[str, Any], *, warnings: Mapping[str, str], now: datetime) -> Verdict | None:
    """Why one pod does not run."""
    name, status = pod["metadata"]["name"], _status(pod)
    scheduled = _condition(pod, "PodScheduled")
    if scheduled.get("status") == "False":
        return failing(
            Reason.UNSCHEDULABLE,
            f"pod {name}: {_words(scheduled.get('message')) or 'no node fits'}; free or add what it asks for, "
            "or change spec.engine.resources or spec.podTemplate",
        )
    for kind in ("initContainerStatuses", "containerStatuses"):
        for container in status.get(kind) or ():
            found = _container_trouble(name, container)
            if found is not None:
                return found
    if is_setting_up(pod, now=now, seconds=SETUP_SECONDS):
        warning = warnings.get(pod["metadata"].get("uid", ""))
        if warning is not None:
            return failing(
                Reason.POD_NOT_STARTED, f"pod {name}: {_words(warning)}; it is tried again until that is there"
            )
        if is_setting_up(pod, now=now, seconds=SLOW_SETUP_SECONDS):
            return failing(
                Reason.PROGRESSING,
                f"pod {name}: its volumes and network are being set up since {status['startTime']}; see its Events",
            )
    containers = status.get("containerStatuses") or ()
    if containers and all(container.get("ready") for container in containers):
        where = (pod.get("spec") or {}).get("nodeName") or "?"
        return failing(
            Reason.PROGRESSING,
            f"pod {name}: its containers are ready and the pod is not: node {where} is lost, or a readiness gate is not met",
        )
    return None


def is_setting_up(pod: dict[str, Any], *, now: datetime, seconds: float) -> bool:
    """Whether the kubelet has had the pod for so long, and its volumes or network are still not there."""
    if not is_alive(pod) or _condition(pod, "PodReadyToStartContainers").get("status") == "True":
        return False
    status = _status(pod)
    containers = [*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())]
    started = any("waiting" not in (container.get("state") or {}) for container in containers)
    since = parse_time(status.get("startTime"))
    return not started and since is not None and now - since >= timedelta(seconds=seconds)


def parse_time(text: Any) -> datetime | None:
    """A timestamp of the API server, None where there is none."""
    try:
        return datetime.fromisoformat(text)
    except (TypeError, ValueError):
        return None


def _container_trouble(pod: str, status: dict[str, Any]) -> Verdict | None:
    if status.get("ready"):
        return None
    name = str(status.get("name", ""))
    what = "the engine" if name == ENGINE_CONTAINER else f"container {name}"
    state = status.get("state") or {}
    waiting = state.get("waiting") or {}
    reason = str(waiting.get("reason") or "")
    words = f"pod {pod}: {what}: {reason}: {_words(waiting.get('message')) or 'no message'}"
    if reason in IMAGE_PROBLEMS:
        return failing(Reason.IMAGE_PULL, f"{words}; check the image's name, its registry and imagePullSecrets")
    ended = state.get("terminated") or (status.get("lastState") or {}).get("terminated") or {}
    if reason not in NO_PROBLEMS and ended.get("reason") not in NEVER_STARTED:
        return failing(Reason.POD_NOT_STARTED, f"{words}; it is tried again until that is there")
    return _exit_trouble(pod, what, status, ended) if ended else None


def _exit_trouble(pod: str, what: str, status: dict[str, Any], ended: dict[str, Any]) -> Verdict | None:
    message = str(ended.get("message") or "")
    if ended.get("reason") == "OOMKilled" or (ended.get("reason") in NEVER_STARTED and "OOM-killed" in message):
        limit = "spec.engine.resources.limits.memory" if what == "the engine" else "its memory limit in podTemplate"
        return failing(Reason.OUT_OF_MEMORY, f"pod {pod}: {what} was killed for its memory use; raise {limit}")
    if ended.get("reason") in NEVER_STARTED:
        return failing(Reason.POD_NOT_STARTED, f"pod {pod}: {what} can't be started: {_words(message)}")
    code, restarts = ended.get("exitCode"), status.get("restartCount", 0)
    if what != "the engine" and code == 0:
        return None  # an init container that has done its work, or a sidecar that is started again
    lines = " | ".join(line.strip() for line in message.splitlines()[-MAX_LINES:] if line.strip())
    again = f" and was restarted {restarts} time{'s' if restarts > 1 else ''}" if restarts else ""
    running = (status.get("state") or {}).get("running")
    again += f", last at {running.get('startedAt')}" if running else ""
    option = "" if what == "the engine" else f" -c {status.get('name')}"
    hint = "" if lines else f" (see kubectl logs {pod}{option}{' --previous' if restarts else ''})"
    return failing(
        Reason.CRASH_LOOPING,
        f"pod {pod}: {what} exited with code {code}{SIGNALS.get(code or 0, '')}{again}; "
        f"last lines: {lines[-MAX_LOG:] or 'none'}{hint}",
    )


def _refused(workload: Mapping[str, Any] | None) -> Verdict | None:
    for condition in ((workload or {}).get("status") or {}).get("conditions") or ():
        if condition.get("type") == "ReplicaFailure" and condition.get("status") == "True":
            words = _words(condition.get("message")) or "the API server refuses the pods"
            by_quota = "quota" in words
            hint = (
                "raise the quota, or ask for less"
                if by_quota
                else "change what is refused, or the policy that refuses it"
            )
            return failing(Reason.PODS_REFUSED, f"{words}; {hint}: see spec.engine and spec.podTemplate")
    return None


def _replaced(pods: list[dict[str, Any]], waiting: list[dict[str, Any]]) -> str | None:
    """What ended the pod that one of these is there for: evicted, preempted, refused by its node."""
    made = [at for pod in waiting if (at := parse_time(pod["metadata"].get("creationTimestamp")))]
    for pod in pods:
        status, disrupted = _status(pod), _condition(pod, "DisruptionTarget")
        if is_alive(pod) or not (disrupted.get("status") == "True" or status.get("phase") == "Failed"):
            continue
        at = parse_time(disrupted.get("lastTransitionTime") or status.get("startTime"))
        if at is not None and any(abs(start - at) <= REPLACEMENT for start in made):
            cause = status.get("reason") or disrupted.get("reason") or "ended"
            words = _words(status.get("message") or disrupted.get("message"))
            return f"pod {pod['metadata']['name']} before it: {cause}: {words or 'no message'}"
    return None


def _status(pod: dict[str, Any]) -> dict[str, Any]:
    return pod.get("status") or {}


def _condition(pod: dict[str, Any], type_: str) -> dict[str, Any]:
    return next((c for c in _status(pod).get("conditions") or () if c.get("type") == type_), {})


def _words(text: Any) -> str:
    """A message from outside on one line, bounded."""
    return " ".join(str(text or "").split())[:MAX_WORDS]
