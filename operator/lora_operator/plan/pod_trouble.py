"""Why engine pods don't run, in words that name the object, the cause and what to do. A pod's status is data from outside.

A reason stays while a container is restarted again and again: what flips would be written on every adapter each time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from typing import Final

from lora_operator.conditions import Verdict, failing
from lora_operator.constants import ENGINE_CONTAINER, Reason
from lora_operator.kube.pods import ContainerStatus, Ended, Pod
from lora_operator.kube.workloads import Workload

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
    pods: Iterable[Pod],
    workload: Workload | None,
    *,
    warnings: Mapping[str, str],
    now: datetime,
) -> Verdict | None:
    """Why not all of a Deployment's pods run, where Kubernetes says so; `warnings`: what Events say, by the pod's UID."""
    pods = list(pods)
    waiting = [pod for pod in pods if pod.is_alive and not pod.is_ready]
    told = [pod_trouble(pod, warnings=warnings, now=now) for pod in waiting]
    known = [trouble for trouble in (*told, _refused(workload)) if trouble is not None]
    found = next((trouble for trouble in known if trouble.reason is not Reason.PROGRESSING), next(iter(known), None))
    ended = _replaced(pods, waiting)
    if ended is None or (found is not None and found.reason is not Reason.UNSCHEDULABLE):
        return found
    return failing(*((found.reason, f"{found.message}; {ended}") if found else (Reason.PROGRESSING, ended)))


def pod_trouble(pod: Pod, *, warnings: Mapping[str, str], now: datetime) -> Verdict | None:
    """Why one pod does not run."""
    name, scheduled = pod.name, pod.condition("PodScheduled")
    if scheduled.is_false:
        return failing(
            Reason.UNSCHEDULABLE,
            f"pod {name}: {_words(scheduled.message) or 'no node fits'}; free or add what it asks for, "
            "or change spec.engine.resources or spec.podTemplate",
        )
    for container in (*pod.init_containers, *pod.containers):
        found = _container_trouble(name, container)
        if found is not None:
            return found
    if is_setting_up(pod, now=now, seconds=SETUP_SECONDS):
        warning = warnings.get(pod.uid)
        if warning is not None:
            return failing(
                Reason.POD_NOT_STARTED, f"pod {name}: {_words(warning)}; it is tried again until that is there"
            )
        if is_setting_up(pod, now=now, seconds=SLOW_SETUP_SECONDS):
            return failing(
                Reason.PROGRESSING,
                f"pod {name}: its volumes and network are being set up since {pod.started_at}; see its Events",
            )
    if pod.containers and all(container.is_ready for container in pod.containers):
        where = pod.spec.node or "?"
        return failing(
            Reason.PROGRESSING,
            f"pod {name}: its containers are ready and the pod is not: node {where} is lost, or a readiness gate is not met",
        )
    return None


def is_setting_up(pod: Pod, *, now: datetime, seconds: float) -> bool:
    """Whether the kubelet has had the pod for so long, and its volumes or network are still not there."""
    if not pod.is_alive or pod.condition("PodReadyToStartContainers").is_true:
        return False
    started = any(not container.is_waiting for container in (*pod.init_containers, *pod.containers))
    return not started and pod.started is not None and now - pod.started >= timedelta(seconds=seconds)


def _container_trouble(pod: str, status: ContainerStatus) -> Verdict | None:
    if status.is_ready:
        return None
    what = "the engine" if status.name == ENGINE_CONTAINER else f"container {status.name}"
    reason = status.waiting_reason
    words = f"pod {pod}: {what}: {reason}: {_words(status.waiting_message) or 'no message'}"
    if reason in IMAGE_PROBLEMS:
        return failing(Reason.IMAGE_PULL, f"{words}; check the image's name, its registry and imagePullSecrets")
    ended = status.ended or status.ended_before
    if reason not in NO_PROBLEMS and (ended is None or ended.reason not in NEVER_STARTED):
        return failing(Reason.POD_NOT_STARTED, f"{words}; it is tried again until that is there")
    return _exit_trouble(pod, what, status, ended) if ended else None


def _exit_trouble(pod: str, what: str, status: ContainerStatus, ended: Ended) -> Verdict | None:
    message = ended.message
    if ended.reason == "OOMKilled" or (ended.reason in NEVER_STARTED and "OOM-killed" in message):
        limit = "spec.engine.resources.limits.memory" if what == "the engine" else "its memory limit in podTemplate"
        return failing(Reason.OUT_OF_MEMORY, f"pod {pod}: {what} was killed for its memory use; raise {limit}")
    if ended.reason in NEVER_STARTED:
        return failing(Reason.POD_NOT_STARTED, f"pod {pod}: {what} can't be started: {_words(message)}")
    code, restarts = ended.exit_code, status.restarts
    if what != "the engine" and code == 0:
        return None  # an init container that has done its work, or a sidecar that is started again
    lines = " | ".join(line.strip() for line in message.splitlines()[-MAX_LINES:] if line.strip())
    again = f" and was restarted {restarts} time{'s' if restarts > 1 else ''}" if restarts else ""
    again += f", last at {status.started_at}" if status.started_at else ""
    option = "" if what == "the engine" else f" -c {status.name}"
    hint = "" if lines else f" (see kubectl logs {pod}{option}{' --previous' if restarts else ''})"
    return failing(
        Reason.CRASH_LOOPING,
        f"pod {pod}: {what} exited with code {code}{SIGNALS.get(code or 0, '')}{again}; "
        f"last lines: {lines[-MAX_LOG:] or 'none'}{hint}",
    )


def _refused(workload: Workload | None) -> Verdict | None:
    if workload is None or not (failure := workload.condition("ReplicaFailure")).is_true:
        return None
    words = _words(failure.message) or "the API server refuses the pods"
    by_quota = "quota" in words
    hint = "raise the quota, or ask for less" if by_quota else "change what is refused, or the policy that refuses it"
    return failing(Reason.PODS_REFUSED, f"{words}; {hint}: see spec.engine and spec.podTemplate")


def _replaced(pods: list[Pod], waiting: list[Pod]) -> str | None:
    """What ended the pod that one of these is there for: evicted, preempted, refused by its node."""
    made = [pod.created for pod in waiting if pod.created is not None]
    for pod in pods:
        disrupted = pod.condition("DisruptionTarget")
        if pod.is_alive or not (disrupted.is_true or pod.phase == "Failed"):
            continue
        at = disrupted.since or pod.started
        if at is not None and any(abs(start - at) <= REPLACEMENT for start in made):
            cause = pod.reason or disrupted.reason or "ended"
            words = _words(pod.message or disrupted.message)
            return f"pod {pod.name} before it: {cause}: {words or 'no message'}"
    return None


def _words(text: str) -> str:
    """A message from outside on one line, bounded."""
    return " ".join(text.split())[:MAX_WORDS]
