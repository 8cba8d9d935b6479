"""When a Job is over: by its own word, or because its node is lost."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Any, Final

from lora_operator.kube.objects import is_controlled_by
from lora_operator.plan.pod_trouble import parse_time

LOST: Final = timedelta(
    seconds=60
)  # after a pod was to be gone; by then kubelets have long told, also those of slow nodes
_DECIDED: Final = ("FailureTarget", "SuccessCriteriaMet")


def true_conditions(job: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """A Job's conditions that are true, by type."""
    return {c["type"]: c for c in (job.get("status") or {}).get("conditions") or () if c.get("status") == "True"}


def has_ended(job: dict[str, Any], pods: Iterable[dict[str, Any]], *, now: datetime | None) -> bool:
    """Whether a Job is over. `pods` may be of others as well; without a time only what the Job says itself counts."""
    says = not true_conditions(job).keys().isdisjoint(("Complete", "Failed"))
    return says or lost_since(job, pods, now=now) is not None


def lost_since(job: dict[str, Any], pods: Iterable[dict[str, Any]], *, now: datetime | None) -> datetime | None:
    """When the pods of a Job whose end is decided were to be gone, where a minute has passed since and nobody tells that they are.

    Kubernetes says Complete or Failed only once no pod of the Job is terminating (1.34, job_controller.go, enactJobFinished), and
    nobody confirms the end of a pod on a lost node until somebody deletes the node. A pod's deletionTimestamp has its grace
    period in it.
    """
    metadata, conditions = job["metadata"], true_conditions(job)
    decided = bool(metadata.get("deletionTimestamp")) or any(type_ in conditions for type_ in _DECIDED)
    if now is None or not decided or {"Complete", "Failed"} & conditions.keys():
        return None
    mine = [pod for pod in pods if is_controlled_by(pod, metadata["uid"])]
    alive = [pod for pod in mine if (pod.get("status") or {}).get("phase") not in ("Succeeded", "Failed")]
    due = [parse_time(pod["metadata"].get("deletionTimestamp")) for pod in alive]
    last = max((at for at in due if at is not None), default=None)
    return last if last is not None and None not in due and now - last >= LOST else None
