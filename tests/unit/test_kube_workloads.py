"""When a Job is over: by its own word, or because its node is lost."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import pytest

from lora_operator.constants import Reason
from lora_operator.kube.pods import Pod
from lora_operator.kube.workloads import Job
from lora_operator.plan.job_view import has_ended
from tests.unit.builders import NOW, job_pod, jobs_view, make_job
from tests.unit.test_plan_job_view import GOOD, ended

Json = dict[str, Any]
RUNNING: Json = {"running": {}}


def decided(condition: str = "FailureTarget", reason: str = "BackoffLimitExceeded") -> Json:
    """A Job whose end is decided, and that does not say Complete or Failed."""
    return make_job() | {"status": {"conditions": [{"type": condition, "status": "True", "reason": reason}]}}


def pod(state: Json | None = None, *, gone: float | None = 60.0, phase: str = "Running", attempt: int = 1) -> Json:
    """A pod of it that was to be gone so many seconds ago; None: nobody has deleted it."""
    found = job_pod(RUNNING if state is None else state, attempt=attempt)
    found["status"]["phase"] = phase
    if gone is not None:
        found["metadata"]["deletionTimestamp"] = (NOW - timedelta(seconds=gone)).isoformat()
    return found


CASES: dict[str, tuple[Json, list[Json], bool]] = {
    "the node of a Job that has failed is lost": (decided(), [pod()], True),
    "the same at its deadline": (decided(reason="DeadlineExceeded"), [pod()], True),
    "one of a Job that has met its criteria": (decided("SuccessCriteriaMet"), [pod()], True),
    "a Job that is being deleted, and waits for its pods": (
        make_job() | {"metadata": make_job()["metadata"] | {"deletionTimestamp": NOW.isoformat()}},
        [pod()],
        True,
    ),
    "its pod may yet end by itself": (decided(), [pod(gone=59)], False),
    "its pod was not deleted": (decided(), [pod(gone=None)], False),
    "one of two pods was not": (decided(), [pod(), pod(gone=None)], False),
    "one of two pods has ended": (decided(), [pod(), pod(gone=None, phase="Failed")], True),
    "all pods have ended: the Job says so in a moment": (decided(), [pod(phase="Failed")], False),
    "no pod is known": (decided(), [], False),
    "pods of others": (decided(), [pod(attempt=2)], False),
    "its end is not decided: the pod's may be its node's drain": (make_job(), [pod()], False),
    "it says so itself": (make_job(failed="BackoffLimitExceeded"), [pod(gone=None)], True),
}


@pytest.mark.parametrize("case", CASES)
def test_a_job_is_over(case: str) -> None:
    job, pods, expected = CASES[case]
    assert has_ended(Job.parse(job), map(Pod.parse, pods), now=NOW) is expected
    assert jobs_view(job, pods, now=NOW).finished is expected


@pytest.mark.parametrize("job", [decided(), decided(reason="DeadlineExceeded"), decided("SuccessCriteriaMet")])
def test_a_lost_node_is_told_as_the_cause(job: Json) -> None:
    result = jobs_view(job, [pod(gone=90)], now=NOW).result
    assert result is not None
    at = NOW - timedelta(seconds=90)
    assert (result.ok, result.reason) == (False, Reason.JOB_FAILED)
    assert result.message == (
        f"the Job's node was lost: its pod was to be gone at {at:%H:%M:%S}Z, and nothing tells that it is"
    )


def test_what_its_container_told_before_is_believed() -> None:
    result = jobs_view(decided("SuccessCriteriaMet"), [pod(ended(GOOD, code=0))], now=NOW).result
    assert result is not None
    assert result.ok


@pytest.mark.parametrize("text", ["", "yesterday", None, 5])
def test_a_time_that_is_none_loses_nothing(text: Any) -> None:
    odd = pod(gone=None)
    odd["metadata"]["deletionTimestamp"] = text
    assert not has_ended(Job.parse(decided()), [Pod.parse(odd)], now=datetime.max.replace(tzinfo=NOW.tzinfo))
