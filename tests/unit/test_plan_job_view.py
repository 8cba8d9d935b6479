"""What a download Job and its pods say, whatever stands in them: they are data from outside."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_operator.constants import Reason
from lora_operator.kube.pods import Pod
from lora_operator.kube.workloads import Job
from lora_operator.plan.job_view import given_up, silent_object
from lora_operator.wire.jobs import FetchResult
from tests.unit.builders import COMMIT, NOW, job_pod, jobs_view, make_job

GOOD = FetchResult(
    ok=True, resolved_revision=COMMIT, digest="sha256:aa", size_bytes=1, files=1, path=f"artifacts/x-{COMMIT}"
).model_dump_json(by_alias=True)
BAD = FetchResult(ok=False, reason=Reason.UNAUTHORIZED, message="401").model_dump_json(by_alias=True)


def ended(message: str | None, *, code: int = 1, reason: str = "Error") -> dict[str, Any]:
    return {"terminated": {"exitCode": code, "reason": reason} | ({"message": message} if message is not None else {})}


Outcome = tuple[bool, str | None, str]
FINISHED: dict[str, tuple[dict[str, Any], list[dict[str, Any]], Outcome]] = {
    "a result": (make_job(complete=True), [job_pod(ended(GOOD, code=0))], (True, None, "")),
    "a failure that the Job classified": (
        make_job(failed="BackoffLimitExceeded"),
        [job_pod(ended(BAD))],
        (False, "Unauthorized", "401"),
    ),
    "a result is believed though the Job ran into its deadline after it": (
        make_job(failed="DeadlineExceeded"),
        [job_pod(ended(GOOD, code=0))],
        (True, None, ""),
    ),
    "what a Job says that is ended for its deadline is not the cause": (
        make_job(failed="DeadlineExceeded"),
        [job_pod(ended('{"ok": false, "reason": "JobFailed", "message": "ended from outside"}', code=1))],
        (False, "JobTimeout", "the Job took longer than its deadline: raise the ModelCache's spec.download.timeout"),
    ),
    "the deadline, which takes the pod away": (
        make_job(failed="DeadlineExceeded"),
        [],
        (False, "JobTimeout", "the Job took longer than its deadline: raise the ModelCache's spec.download.timeout"),
    ),
    "killed for its memory": (
        make_job(failed="BackoffLimitExceeded"),
        [job_pod(ended(None, code=137, reason="OOMKilled"))],
        (False, "JobOutOfMemory", "the Job's pod was killed for its memory use: raise its limit"),
    ),
    "the pod is gone": (
        make_job(failed="BackoffLimitExceeded"),
        [],
        (
            False,
            "JobFailed",
            "the Job's pod is gone and left no result: evicted, deleted, or its node was lost",
        ),
    ),
    "an exit without a result, with the log's last lines": (
        make_job(failed="BackoffLimitExceeded"),
        [job_pod(ended("Traceback\n  line 1\n  boom"))],
        (False, "JobFailed", "the Job exited with code 1 and no result; last lines: Traceback line 1 boom"),
    ),
    "an exit without a word": (
        make_job(failed="BackoffLimitExceeded"),
        [job_pod(ended(None))],
        (False, "JobFailed", "the Job exited with code 1 and no result; last lines: none"),
    ),
    "a lost termination message means a new attempt, though the Job is complete": (
        make_job(complete=True),
        [job_pod(ended("", code=0))],
        (False, "JobFailed", "the Job exited with code 0 and no result; last lines: none"),
    ),
    "a result that was cut": (
        make_job(complete=True),
        [job_pod(ended('{"ok": true, "resolv', code=0))],
        (False, "JobFailed", 'the Job exited with code 0 and no result; last lines: {"ok": true, "resolv'),
    ),
    "a line of progress is no result": (
        make_job(failed="BackoffLimitExceeded"),
        [job_pod(ended('{"phase": "Downloading", "bytesDone": 1}'))],
        (
            False,
            "JobFailed",
            'the Job exited with code 1 and no result; last lines: {"phase": "Downloading", "bytesDone": 1}',
        ),
    ),
    "a reason that there is not": (
        make_job(failed="BackoffLimitExceeded"),
        [job_pod(ended('{"ok": false, "reason": "Nonsense"}'))],
        (
            False,
            "JobFailed",
            'the Job exited with code 1 and no result; last lines: {"ok": false, "reason": "Nonsense"}',
        ),
    ),
    "success without what was fetched is none": (
        make_job(complete=True),
        [job_pod(ended('{"ok": true}', code=0))],
        (False, "JobFailed", 'the Job exited with code 0 and no result; last lines: {"ok": true}'),
    ),
    "a pod of somebody else with the right label does not speak for the Job": (
        make_job(failed="BackoffLimitExceeded"),
        [job_pod(ended(GOOD, code=0), attempt=2)],
        (
            False,
            "JobFailed",
            "the Job's pod is gone and left no result: evicted, deleted, or its node was lost",
        ),
    ),
}


@pytest.mark.parametrize("case", FINISHED)
def test_a_finished_job(case: str) -> None:
    job, pods, expected = FINISHED[case]
    view = jobs_view(job, pods)
    assert view.finished
    assert view.waiting is None
    assert view.result is not None
    assert (view.result.ok, view.result.reason, view.result.message) == expected


def test_a_path_that_leaves_the_cache_is_no_result() -> None:
    for path in (
        "../../etc",
        "/etc",
        "artifacts/../../etc",
        "artifacts/..",
        "artifacts/",
        "hub/blobs",
        "artifacts/a/b",
    ):
        text = FetchResult.model_validate_json(GOOD).model_copy(update={"path": path}).model_dump_json(by_alias=True)
        view = jobs_view(make_job(complete=True), [job_pod(ended(text, code=0))])
        assert view.result is not None
        assert (view.result.ok, view.result.reason) == (False, "JobFailed"), path


RUNNING: dict[str, tuple[dict[str, Any], list[dict[str, Any]], tuple[str | None, tuple[str, str] | None]]] = {
    "no pod yet": (make_job(), [], (None, None)),
    "a pod that runs": (make_job(), [job_pod({"running": {"startedAt": "2026-01-01T00:00:00Z"}})], ("fetch-1-x", None)),
    "a pod that has ended and whose Job does not say so yet": (
        make_job(),
        [job_pod(ended(GOOD, code=0))],
        ("fetch-1-x", None),
    ),
    "a pod that is made": (make_job(), [job_pod({"waiting": {"reason": "ContainerCreating"}})], (None, None)),
    "an image that can't be pulled": (
        make_job(),
        [job_pod({"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}})],
        (None, ("JobImagePull", "pod fetch-1-x: ImagePullBackOff: no such image")),
    ),
    "a Secret or a right that is missing is no image": (
        make_job(),
        [job_pod({"waiting": {"reason": "CreateContainerConfigError", "message": "image will run as root"}})],
        (None, ("JobNotStarted", "pod fetch-1-x: CreateContainerConfigError: image will run as root")),
    ),
    "no node": (
        make_job(),
        [job_pod(unscheduled="0/3 nodes are available")],
        (None, ("JobUnschedulable", "pod fetch-1-x: 0/3 nodes are available")),
    ),
}


@pytest.mark.parametrize("case", RUNNING)
def test_a_job_that_goes_on(case: str) -> None:
    job, pods, (pod, waiting) = RUNNING[case]
    view = jobs_view(job, pods)
    assert not view.finished
    assert view.result is None
    assert (view.pod, view.waiting) == (pod, waiting)


def started(seconds: float, **more: Any) -> dict[str, Any]:
    """A Job or a pod that was begun so long ago."""
    status = {"startTime": (NOW - timedelta(seconds=seconds)).isoformat()}
    return {**more, "status": {**more.get("status", {}), **status}}


CREATING = job_pod({"waiting": {"reason": "ContainerCreating"}})
SILENT: dict[str, tuple[dict[str, Any], list[dict[str, Any]], bool]] = {
    "a Job that has only just begun": (started(1, **make_job()), [], False),
    "a Job whose pods are not made": (started(6, **make_job()), [], True),
    "a Job that waits for its Secret": (started(6, **make_job(suspend=True)), [], False),
    "a Job that has ended": (started(6, **make_job(failed="DeadlineExceeded")), [], False),
    "a Job with a pod": (started(6, **make_job()), [job_pod({"running": {}})], False),
    "a Job that its controller has not seen": (make_job(), [], False),
    "a Job's pod that is not set up": (started(9, **make_job()), [started(6, **CREATING)], True),
}


@pytest.mark.parametrize("case", SILENT)
def test_of_what_only_events_tell(case: str) -> None:
    job, pods = Job.parse(SILENT[case][0]), [Pod.parse(pod) for pod in SILENT[case][1]]
    expected = SILENT[case][2]
    assert silent_object(job, pods, now=NOW) is ((pods[0] if pods else job) if expected else None)


def test_what_events_say_is_told() -> None:
    refused = jobs_view(started(6, **make_job()), [], warning='FailedCreate: pods "x" is forbidden: exceeded quota')
    assert refused.waiting == (
        "JobUnschedulable",
        'no pod of Job sql-0a1b2c3d4e-1 can be made: FailedCreate: pods "x" is forbidden: exceeded quota; '
        "raise the quota, or change the policy that refuses it",
    )
    unmounted = jobs_view(started(6, **make_job()), [started(6, **CREATING)], warning="FailedMount: no such volume")
    assert unmounted.waiting == ("JobNotStarted", "pod fetch-1-x: FailedMount: no such volume")


IDLE: dict[str, tuple[float, dict[str, Any], list[dict[str, Any]], str | None, tuple[str, str] | None]] = {
    "a node may yet be added": (899, make_job(), [job_pod(unscheduled="0/3 nodes")], None, None),
    "no node came": (
        *(900, make_job(), [job_pod(unscheduled="0/3 nodes")], None),
        ("JobUnschedulable", "pod fetch-1-x: 0/3 nodes; ended after 15m, for other downloads wait for its place"),
    ),
    "it is not set up": (
        *(900, make_job(), [CREATING], "FailedMount: no ConfigMap"),
        (
            "JobNotStarted",
            "pod fetch-1-x: FailedMount: no ConfigMap; ended after 15m, for other downloads wait for its place",
        ),
    ),
    "nothing says why": (
        *(900, make_job(), [CREATING], None),
        (
            "JobNotStarted",
            "the pod of Job sql-0a1b2c3d4e-1 does not start; ended after 15m, for other downloads wait for its place",
        ),
    ),
    "it runs": (90000, make_job(), [job_pod({"running": {"startedAt": "x"}})], None, None),
    "it was not let go": (90000, make_job(suspend=True), [], None, None),
    "it is over": (90000, make_job(complete=True), [], None, None),
}


@pytest.mark.parametrize("case", IDLE)
def test_a_job_that_does_not_start_is_given_up(case: str) -> None:
    seconds, job, pods, warning, expected = IDLE[case]
    found = given_up(jobs_view(started(seconds, **job), pods, warning=warning), now=NOW)
    assert (found and (found.reason, found.message)) == expected


def test_which_attempt_it_is_and_whose() -> None:
    view = jobs_view(make_job(7, suspend=True), [])
    assert (view.name, view.attempt, view.owner_uid, view.suspended) == ("sql-0a1b2c3d4e-7", 7, "uid-artifact", True)


@pytest.mark.parametrize("text", ["", "x", "-1", "1.5"])
def test_an_attempt_that_is_none_counts_as_one_long_done(text: str) -> None:
    job = make_job()
    job["metadata"]["annotations"] = {"lora-operator.dev/attempt": text}
    assert jobs_view(job, []).attempt == 0
    job["metadata"]["annotations"] = None
    assert jobs_view(job, []).attempt == 0


@given(st.text())
def test_no_termination_message_whatever_ends_a_reconcile(message: str) -> None:
    view = jobs_view(make_job(failed="BackoffLimitExceeded"), [job_pod(ended(message))])
    assert view.result is not None
    assert len(view.result.message) < 1000
