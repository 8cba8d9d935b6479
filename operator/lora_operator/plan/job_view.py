"""A Job and its pods: when it is over, and what happened, as a value. Everything in a pod's status is data from outside."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from pydantic import ValidationError

from lora_operator.constants import ANNOTATION_ATTEMPT, EVICT_CONTAINER, FETCH_CONTAINER, Reason
from lora_operator.kube.objects import KubeObject
from lora_operator.kube.pods import ContainerStatus, Ended, Pod
from lora_operator.kube.workloads import Job
from lora_operator.plan.pod_trouble import IMAGE_PROBLEMS, NO_PROBLEMS, SETUP_SECONDS, is_setting_up
from lora_operator.plan.progress import format_seconds
from lora_operator.wire.jobs import FetchResult

_VIEW_PATH = re.compile(r"artifacts/[A-Za-z0-9][A-Za-z0-9._-]*")  # what a Job may publish, and engines be told to load

_WORDS: Final = 1500  # of Kubernetes', so that what follows is not cut off
LOST: Final = timedelta(
    seconds=60
)  # after a pod was to be gone; by then kubelets have long told, also those of slow nodes
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


def has_ended(job: Job, pods: Iterable[Pod], *, now: datetime | None) -> bool:
    """Whether a Job is over: by its own word, or because its node is lost.

    `pods` may be of others as well; without a time only what the Job says itself counts.
    """
    return job.says_ended or lost_since(job, pods, now=now) is not None


def lost_since(job: Job, pods: Iterable[Pod], *, now: datetime | None) -> datetime | None:
    """When the pods of a Job whose end is decided were to be gone, where a minute has passed since and nobody tells that they are.

    Kubernetes says Complete or Failed only once no pod of the Job is terminating (1.34, job_controller.go, enactJobFinished), and
    nobody confirms the end of a pod on a lost node until somebody deletes the node.
    """
    if now is None or not job.end_is_decided or job.says_ended:
        return None
    due = [pod.gone_by for pod in pods if pod.is_controlled_by(job.uid) and not pod.has_ended]
    last = max((at for at in due if at is not None), default=None)
    return last if last is not None and None not in due and now - last >= LOST else None


def silent_object(job: Job, pods: Iterable[Pod], *, now: datetime) -> KubeObject | None:
    """What only Events tell of, if anything: the Job, where no pod of it was made; its pod, where that is not set up."""
    mine = [pod for pod in pods if pod.is_controlled_by(job.uid)]
    if mine:
        return next((pod for pod in mine if is_setting_up(pod, now=now, seconds=SETUP_SECONDS)), None)
    is_over = bool(job.conditions)
    if is_over or job.is_suspended or job.started is None or now - job.started < timedelta(seconds=SETUP_SECONDS):
        return None
    return job


def view_job(job: Job, pods: Iterable[Pod], *, warning: str | None = None, now: datetime | None = None) -> JobView:
    """What the Job and its pods say; `warning`: what Events say of its `silent_object`. Without a time no node is lost."""
    mine = [pod for pod in pods if pod.is_controlled_by(job.uid)]
    states = [job_container(pod) for pod in mine]
    finished, lost = has_ended(job, mine, now=now), lost_since(job, mine, now=now)
    started = [pod.name for pod, state in zip(mine, states, strict=True) if state.is_running or state.ended]
    is_open = not finished and not job.is_suspended
    return JobView(
        name=job.name,
        uid=job.uid,
        attempt=attempt_of(job),
        owner_uid=job.owner.uid if job.owner is not None else "",
        suspended=job.is_suspended,
        finished=finished,
        result=_result(job, next((s.ended for s in states if s.ended is not None), None), lost=lost)
        if finished
        else None,
        pod=next(iter(started), None),
        left_result=any(state.ended is not None for state in states),
        waiting=_waiting(job, mine, warning) if is_open else None,
        idle_since=job.started if is_open and not started else None,
    )


def given_up(job: JobView, *, now: datetime) -> FetchResult | None:
    """The failure of a Job that has not started for so long that its place goes to another one; None: it may yet start."""
    if job.idle_since is None or (now - job.idle_since).total_seconds() < START_SECONDS:
        return None
    reason, words = job.waiting or (Reason.JOB_NOT_STARTED, f"the pod of Job {job.name} does not start")
    ended = f"; ended after {format_seconds(START_SECONDS)}, for other downloads wait for its place"
    return FetchResult(ok=False, reason=reason, message=words[:_WORDS] + ended)


def job_container(pod: Pod) -> ContainerStatus:
    """The status of the container that does a Job's work; a jobTemplate or a webhook may have put others beside it."""
    known = (one for one in pod.containers if one.name in (FETCH_CONTAINER, EVICT_CONTAINER))
    return next(known, ContainerStatus(FETCH_CONTAINER))


def attempt_of(job: Job) -> int:
    """The number of the attempt that the Job is; 0 where it says none."""
    text = job.annotations.get(ANNOTATION_ATTEMPT, "")
    return int(text) if text.isdecimal() else 0


def _result(job: Job, ended: Ended | None, *, lost: datetime | None) -> FetchResult:
    message = ended.message if ended is not None else ""
    if lost is not None and ended is None:
        words = f"the Job's node was lost: its pod was to be gone at {lost:%H:%M:%S}Z, and nothing tells that it is"
        return FetchResult(ok=False, reason=Reason.JOB_FAILED, message=words)
    try:
        result = FetchResult.model_validate_json(message)
    except ValidationError:
        result = None
    late = job.failure is not None and job.failure.reason == "DeadlineExceeded"
    if result is not None and result.ok and result.resolved_revision and _VIEW_PATH.fullmatch(result.path):
        return result
    if (
        result is not None and not result.ok and not late
    ):  # one that is ended for its deadline only says that it was ended
        return result
    return _no_result(job, ended, late=late)


def _no_result(job: Job, ended: Ended | None, *, late: bool) -> FetchResult:
    """What is made of a Job that has ended and left no result that counts."""
    if late:
        allowed = f" of {format_seconds(job.deadline)}" if job.deadline else ""
        return FetchResult(
            ok=False,
            reason=Reason.JOB_TIMEOUT,
            message=f"the Job took longer than its deadline{allowed}: raise the ModelCache's spec.download.timeout",
        )
    if ended is not None and ended.reason == "OOMKilled":
        return FetchResult(
            ok=False,
            reason=Reason.JOB_OUT_OF_MEMORY,
            message="the Job's pod was killed for its memory use: raise its limit",
        )
    if ended is None:
        return FetchResult(
            ok=False,
            reason=Reason.JOB_FAILED,
            message="the Job's pod is gone and left no result: evicted, deleted, or its node was lost",
        )
    tail = " ".join(ended.message.split())[-600:]
    return FetchResult(
        ok=False,
        reason=Reason.JOB_FAILED,
        message=f"the Job exited with code {ended.exit_code} and no result; last lines: {tail or 'none'}",
    )


def _waiting(job: Job, pods: list[Pod], warning: str | None) -> tuple[Reason, str] | None:
    for pod in pods:
        state = job_container(pod)
        reason, words = state.waiting_reason, f"pod {pod.name}: {state.waiting_reason}: {state.waiting_message}"
        if reason in IMAGE_PROBLEMS:
            return Reason.JOB_IMAGE_PULL, words
        if reason not in NO_PROBLEMS:
            return Reason.JOB_NOT_STARTED, words
        if (scheduled := pod.condition("PodScheduled")).is_false:
            return Reason.JOB_UNSCHEDULABLE, f"pod {pod.name}: {scheduled.message}"
        if warning is not None:
            return Reason.JOB_NOT_STARTED, f"pod {pod.name}: {warning}"
    if warning is not None:
        return (
            Reason.JOB_UNSCHEDULABLE,
            f"no pod of Job {job.name} can be made: {warning}; raise the quota, or change the policy that refuses it",
        )
    return None
