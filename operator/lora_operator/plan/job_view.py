"""Reading a download Job and its pods: what happened, as a value. Everything in a pod's status is data from outside."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from pydantic import ValidationError

from lora_operator.constants import ANNOTATION_ATTEMPT, Reason
from lora_operator.plan.jobs import has_ended, lost_since, true_conditions
from lora_operator.plan.pod_trouble import IMAGE_PROBLEMS, NO_PROBLEMS, SETUP_SECONDS, is_setting_up, parse_time
from lora_operator.plan.progress import format_seconds
from lora_operator.wire.jobs import FetchResult

_VIEW_PATH = re.compile(r"artifacts/[A-Za-z0-9][A-Za-z0-9._-]*")  # what a Job may publish, and engines be told to load

_WORDS: Final = 1500  # of Kubernetes', so that what follows is not cut off
START_SECONDS: Final = 900.0  # adding a node takes up to ten minutes, and making a volume some more


@dataclass(frozen=True)
class JobView:
    """One attempt's Job."""

    name: str
    uid: str
    attempt: int
    owner_uid: str
    suspended: bool
    finished: bool
    result: FetchResult | None  # when finished; never None then
    pod: str | None  # a pod whose log can be read
    waiting: tuple[Reason, str] | None  # why the pod has not started, where Kubernetes says so
    left_result: bool = False  # a container of it was seen to have ended
    idle_since: datetime | None = None  # since when it could have started, and has not


def silent_object(job: dict[str, Any], pods: Iterable[dict[str, Any]], *, now: datetime) -> dict[str, Any] | None:
    """What only Events tell of, if anything: the Job, where no pod of it was made; its pod, where that is not set up."""
    mine = [pod for pod in pods if _owner_uid(pod) == job["metadata"]["uid"]]
    if mine:
        return next((pod for pod in mine if is_setting_up(pod, now=now, seconds=SETUP_SECONDS)), None)
    status = job.get("status") or {}
    since = parse_time(status.get("startTime"))
    ended = any(condition.get("status") == "True" for condition in status.get("conditions") or ())
    if ended or job["spec"].get("suspend") or since is None or now - since < timedelta(seconds=SETUP_SECONDS):
        return None
    return job


def view_job(
    job: dict[str, Any], pods: Iterable[dict[str, Any]], *, warning: str | None = None, now: datetime | None = None
) -> JobView:
    """What the Job and its pods say; `warning`: what Events say of its `silent_object`. Without a time no node is lost."""
    metadata, status = job["metadata"], job.get("status") or {}
    conditions = true_conditions(job)
    failed = conditions.get("Failed") or conditions.get("FailureTarget")
    mine = [pod for pod in pods if _owner_uid(pod) == metadata["uid"]]
    container = next((state for pod in mine if (state := _container_status(pod))), None)
    finished, lost = has_ended(job, mine, now=now), lost_since(job, mine, now=now)
    started = [pod for pod in mine if _container_state(pod, "running") or _container_state(pod, "terminated")]
    return JobView(
        name=metadata["name"],
        uid=metadata["uid"],
        attempt=_attempt(job),
        owner_uid=_owner_uid(job) or "",
        suspended=bool(job["spec"].get("suspend")),
        finished=finished,
        result=_result(container, failed, deadline=job["spec"].get("activeDeadlineSeconds"), lost=lost)
        if finished
        else None,
        pod=started[0]["metadata"]["name"] if started else None,
        left_result=any(_container_state(pod, "terminated") for pod in mine),
        waiting=None if finished or job["spec"].get("suspend") else _waiting(job, mine, warning),
        idle_since=None if finished or started or job["spec"].get("suspend") else parse_time(status.get("startTime")),
    )


def given_up(job: JobView, *, now: datetime) -> FetchResult | None:
    """The failure of a Job that has not started for so long that its place goes to another one; None: it may yet start."""
    if job.idle_since is None or (now - job.idle_since).total_seconds() < START_SECONDS:
        return None
    reason, words = job.waiting or (Reason.JOB_NOT_STARTED, f"the pod of Job {job.name} does not start")
    ended = f"; ended after {format_seconds(START_SECONDS)}, for other downloads wait for its place"
    return FetchResult(ok=False, reason=reason, message=words[:_WORDS] + ended)


def _attempt(job: dict[str, Any]) -> int:
    text = (job["metadata"].get("annotations") or {}).get(ANNOTATION_ATTEMPT, "")
    return int(text) if text.isdecimal() else 0


def _owner_uid(obj: dict[str, Any]) -> str | None:
    return next((o["uid"] for o in obj["metadata"].get("ownerReferences") or () if o.get("controller")), None)


def _container_status(pod: dict[str, Any]) -> dict[str, Any] | None:
    statuses = (pod.get("status") or {}).get("containerStatuses") or []
    return statuses[0] if statuses else None


def _container_state(pod: dict[str, Any], state: str) -> dict[str, Any] | None:
    container = _container_status(pod)
    return ((container or {}).get("state") or {}).get(state)


def _result(
    container: dict[str, Any] | None, failed: dict[str, Any] | None, *, deadline: int | None, lost: datetime | None
) -> FetchResult:
    terminated = ((container or {}).get("state") or {}).get("terminated") or {}
    message = terminated.get("message") or ""
    if lost is not None and not terminated:
        words = f"the Job's node was lost: its pod was to be gone at {lost:%H:%M:%S}Z, and nothing tells that it is"
        return FetchResult(ok=False, reason=Reason.JOB_FAILED, message=words)
    try:
        result = FetchResult.model_validate_json(message)
    except ValidationError:
        result = None
    late = failed is not None and failed.get("reason") == "DeadlineExceeded"
    if result is not None and result.ok and result.resolved_revision and _VIEW_PATH.fullmatch(result.path):
        return result
    if (
        result is not None and not result.ok and not late
    ):  # one that is ended for its deadline only says that it was ended
        return result
    if late:
        allowed = f" of {format_seconds(deadline)}" if deadline else ""
        return FetchResult(
            ok=False,
            reason=Reason.JOB_TIMEOUT,
            message=f"the Job took longer than its deadline{allowed}: raise the ModelCache's spec.download.timeout",
        )
    if terminated.get("reason") == "OOMKilled":
        return FetchResult(
            ok=False,
            reason=Reason.JOB_OUT_OF_MEMORY,
            message="the Job's pod was killed for its memory use: raise its limit",
        )
    if not terminated:
        return FetchResult(
            ok=False,
            reason=Reason.JOB_FAILED,
            message="the Job's pod is gone and left no result: evicted, deleted, or its node was lost",
        )
    code = terminated.get("exitCode")
    tail = " ".join(message.split())[-600:]
    return FetchResult(
        ok=False,
        reason=Reason.JOB_FAILED,
        message=f"the Job exited with code {code} and no result; last lines: {tail or 'none'}",
    )


def _waiting(job: dict[str, Any], pods: list[dict[str, Any]], warning: str | None) -> tuple[Reason, str] | None:
    for pod in pods:
        name, waiting = pod["metadata"]["name"], _container_state(pod, "waiting") or {}
        reason = waiting.get("reason") or ""
        words = f"pod {name}: {reason}: {waiting.get('message', '')}"
        if reason in IMAGE_PROBLEMS:
            return Reason.JOB_IMAGE_PULL, words
        if reason not in NO_PROBLEMS:
            return Reason.JOB_NOT_STARTED, words
        for condition in (pod.get("status") or {}).get("conditions") or ():
            if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
                return Reason.JOB_UNSCHEDULABLE, f"pod {name}: {condition.get('message', '')}"
        if warning is not None:
            return Reason.JOB_NOT_STARTED, f"pod {name}: {warning}"
    if warning is not None:
        return (
            Reason.JOB_UNSCHEDULABLE,
            f"no pod of Job {job['metadata']['name']} can be made: {warning}; raise the quota, or change the policy that refuses it",
        )
    return None
