"""A ModelArtifact: when a Job starts, what its end means, when the next attempt is due, and when the artifact may go."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

import pytest

from lora_operator.api import ModelArtifact, ModelCache
from lora_operator.api.sources.source import Source
from lora_operator.constants import ANNOTATION_REFRESH, REASONS, Reason, Retry
from lora_operator.errors import ReasonError
from lora_operator.plan.artifact import (
    ArtifactObservation,
    ArtifactPlan,
    SecretVersion,
    plan_artifact,
    plan_failure,
    waits_for_turn,
)
from lora_operator.plan.job_view import JobView
from lora_operator.plan.preconditions import wanters_credentials
from lora_operator.plan.wants import build_artifact
from lora_operator.wire.jobs import FetchProgress, FetchResult
from tests.unit.builders import (
    COMMIT,
    LATER,
    NOW,
    OTHER_COMMIT,
    make_artifact,
    make_cache,
    not_ready,
    ready_artifact,
    ready_reason,
    through_the_api,
    told,
)

SECRET = ("team-a", "hf", "token", "uid-secret")
PRIVATE = make_artifact(credentials=SECRET)


def seen(artifact: ModelArtifact | None = None, **more: Any) -> ArtifactObservation:
    """An artifact that is wanted, in a cache that is Ready, anonymously."""
    values: dict[str, Any] = {
        "artifact": artifact or make_artifact(),
        "cache": make_cache(),
        "base": None,
        "wanted": True,
        "secret": None,
        "jobs": (),
        "progress": None,
    }
    return ArtifactObservation(**(values | more))


def job(attempt: int = 1, **more: Any) -> JobView:
    """A Job that runs and whose pod has not started."""
    values: dict[str, Any] = {
        "name": f"sql-0a1b2c3d4e-{attempt}",
        "uid": "uid-job",
        "attempt": attempt,
        "owner_uid": "uid-artifact",
        "suspended": False,
        "finished": False,
        "result": None,
        "pod": None,
        "waiting": None,
    }
    return JobView(**(values | more))


def result_of(attempt: int = 1, **result: Any) -> JobView:
    return job(attempt, finished=True, result=FetchResult(**result))


def failed(reason: Reason, attempt: int = 1, message: str = "it said no") -> JobView:
    return result_of(attempt, ok=False, reason=reason, message=message)


def succeeded(attempt: int = 1, commit: str = COMMIT) -> JobView:
    return result_of(
        attempt,
        ok=True,
        resolved_revision=commit,
        digest="sha256:aa",
        size_bytes=131072,
        files=2,
        path=f"artifacts/sql-0a1b2c3d4e-{commit}",
        rank=8,
        target_modules=("q_proj",),
    )


def secret(version: str = "1") -> SecretVersion:
    return SecretVersion(credentials=SECRET, version=version)


def after(artifact: ModelArtifact, plan: ArtifactPlan) -> ModelArtifact:
    """The artifact as it is read back once the plan's status was written."""
    if plan.status is None:
        return artifact
    return artifact.model_copy(update={"status": through_the_api(plan.status)})


def failed_artifact(
    reason: Reason, *, artifact: ModelArtifact | None = None, version: str | None = None
) -> ModelArtifact:
    """An artifact whose first attempt ended so, at NOW."""
    first = seen(artifact, secret=secret(version) if version else None)
    started = after(first.artifact, plan_artifact(first, now=NOW))
    return after(started, plan_artifact(replace(first, artifact=started, jobs=(failed(reason),)), now=NOW))


S3_CACHE = make_cache(s3_endpoints=("https://s3.test",))
BASE_READY = ready_artifact("base-1", type="BaseModel", rank=None)
NEEDS_BASE = make_artifact(base="base-1")


@dataclass(frozen=True)
class Said:
    """What a plan says and does."""

    ready: tuple[str, str, str] | None  # (status, reason, message); None: no status is written
    start: int | None = None
    again: float | None = None
    stalled: bool = False
    delete_jobs: tuple[str, ...] = ()
    delete_artifact: bool = False


CASES: dict[str, tuple[ArtifactObservation, Said]] = {
    "while a wanter may yet turn up, nothing is done": (seen(wanted=None), Said(None, again=5.0)),
    "while a wanter may yet turn up, a Ready one stays as it is": (
        seen(ready_artifact(), wanted=None),
        Said(None, again=5.0),
    ),
    "one that never got Ready goes with its last wanter": (seen(wanted=False), Said(None, delete_artifact=True)),
    "a new one starts": (
        seen(),
        Said(("False", "Queued", "attempt 1: waits for its Job's pod to start"), start=1, again=2.0),
    ),
    "one made by hand is wanted as long as it exists": (
        seen(make_artifact(by_hand=True), wanted=False),
        Said(("False", "Queued", "attempt 1: waits for its Job's pod to start"), start=1, again=2.0),
    ),
    "without its cache": (
        seen(cache=None),
        Said(("False", "CacheNotReady", "ModelCache serving/default does not exist"), again=30.0),
    ),
    "from an S3 endpoint that the cache does not allow": (
        seen(make_artifact(by_hand=True, s3={"bucket": "models", "endpoint": "https://s3.test"})),
        Said(
            (
                "False",
                "SourceNotAllowed",
                "ModelCache serving/default does not allow the S3 endpoint https://s3.test: use one that it allows, or ask "
                "its owner to add this one to spec.s3.allowedEndpoints",
            ),
            again=30.0,
            stalled=True,
        ),
    ),
    "from an S3 endpoint that the cache allows": (
        seen(make_artifact(s3={"bucket": "models", "endpoint": "https://s3.test"}), cache=S3_CACHE),
        Said(("False", "Queued", "attempt 1: waits for its Job's pod to start"), start=1, again=2.0),
    ),
    "with a cache that has no status yet": (
        seen(cache=make_cache(conditions={})),
        Said(("False", "CacheNotReady", "ModelCache serving/default is not ready"), again=30.0),
    ),
    "with a cache whose claim is not there": (
        seen(cache=make_cache(conditions=not_ready("ClaimNotFound", "no claim"))),
        Said(("False", "CacheNotReady", "ModelCache serving/default is not ready: no claim"), again=30.0),
    ),
    "with a claim that was not looked at: whether the Job belongs on one node with others is not known": (
        seen(cache=make_cache(status={})),
        Said(
            ("False", "CacheNotReady", "the claim of ModelCache serving/default was not looked at yet"),
            again=30.0,
        ),
    ),
    "with a claim that waits for its first consumer, which the Job's pod is": (
        seen(cache=make_cache(conditions=not_ready("ClaimPending", "not bound"))),
        Said(("False", "Queued", "attempt 1: waits for its Job's pod to start"), start=1, again=2.0),
    ),
    "with a cache that could not be written: trying is how that is found to be over": (
        seen(cache=make_cache(conditions=not_ready("CacheNotWritable"))),
        Said(("False", "Queued", "attempt 1: waits for its Job's pod to start"), start=1, again=2.0),
    ),
    "before its base model exists": (
        seen(NEEDS_BASE),
        Said(("False", "Queued", "waits for the base model: ModelArtifact serving/base-1 is not Ready"), again=30.0),
    ),
    "before its base model is Ready": (
        seen(NEEDS_BASE, base=make_artifact("base-1", type="BaseModel", conditions=not_ready("Downloading"))),
        Said(("False", "Queued", "waits for the base model: ModelArtifact serving/base-1 is not Ready"), again=30.0),
    ),
    "once its base model is Ready": (
        seen(NEEDS_BASE, base=BASE_READY),
        Said(("False", "Queued", "attempt 1: waits for its Job's pod to start"), start=1, again=2.0),
    ),
    "without its Secret": (
        seen(PRIVATE, secret=ReasonError(Reason.CREDENTIALS_NOT_FOUND, "Secret team-a/hf does not exist: create it")),
        Said(
            (
                "False",
                "CredentialsNotFound",
                "Secret team-a/hf does not exist: create it; looked for every 10 s",
            ),
            again=10.0,
            stalled=True,
        ),
    ),
    "its Job's pod waits for a node": (
        seen(jobs=(job(waiting=(Reason.JOB_UNSCHEDULABLE, "pod x: 0/1 nodes")),)),
        Said(("False", "JobUnschedulable", "pod x: 0/1 nodes"), again=2.0, stalled=True),
    ),
    "its Job's pod has not started": (
        seen(jobs=(job(),)),
        Said(("False", "Queued", "attempt 1: waits for its Job's pod to start"), again=2.0),
    ),
    "its Job was left suspended: it is gone on with": (
        seen(PRIVATE, jobs=(job(suspended=True),)),
        Said(("False", "Queued", "attempt 1: waits for its Job's pod to start"), start=1, again=2.0),
    ),
    "its Job asks the source": (
        seen(jobs=(job(pod="x"),)),
        Said(("False", "Downloading", "downloading org/sql@main: asks the source"), again=2.0),
    ),
    "its Job authorises": (
        seen(jobs=(job(pod="x"),), progress=FetchProgress(phase="Authorising")),
        Said(("False", "Downloading", "downloading org/sql@main: asks the source"), again=2.0),
    ),
    "its Job downloads": (
        seen(
            jobs=(job(pod="x"),),
            progress=FetchProgress(phase="Downloading", bytes_done=419430400, bytes_total=2**30),
        ),
        Said(("False", "Downloading", "downloading org/sql@main: 39% of 1Gi"), again=2.0),
    ),
    "its Job downloads and does not know how much": (
        seen(jobs=(job(pod="x"),), progress=FetchProgress(phase="Downloading", bytes_done=1, bytes_total=0)),
        Said(("False", "Downloading", "downloading org/sql@main: 0% of 0"), again=2.0),
    ),
    "its Job verifies": (
        seen(
            jobs=(job(pod="x"),),
            progress=FetchProgress(phase="Verifying", bytes_done=2**30, bytes_total=2**30),
        ),
        Said(("False", "Verifying", "downloading org/sql@main: verifying 1Gi"), again=2.0),
    ),
    "its Job succeeded": (
        seen(jobs=(succeeded(),)),
        Said(("True", "Ready", "org/sql@01234567, 128Ki"), delete_jobs=("sql-0a1b2c3d4e-1",)),
    ),
    "its Job failed": (
        seen(jobs=(failed(Reason.SOURCE_UNREACHABLE),)),
        Said(
            ("False", "SourceUnreachable", "it said no; attempt 1 failed, tried again at 03:04:15Z"),
            again=0,
            delete_jobs=("sql-0a1b2c3d4e-1",),
        ),
    ),
    "its Job failed in a way that only a user can help": (
        seen(jobs=(failed(Reason.UNAUTHORIZED),)),
        Said(
            ("False", "Unauthorized", "it said no; attempt 1 failed, tried again at 03:04:15Z"),
            again=0,
            stalled=True,
            delete_jobs=("sql-0a1b2c3d4e-1",),
        ),
    ),
    "its Job failed for good": (
        seen(jobs=(failed(Reason.INVALID_ADAPTER),)),
        Said(
            (
                "False",
                "InvalidAdapter",
                "it said no; not tried again until the spec changes or the object is made anew",
            ),
            again=0,
            stalled=True,
            delete_jobs=("sql-0a1b2c3d4e-1",),
        ),
    ),
    "a Job that failed without a reason": (
        seen(jobs=(result_of(ok=False, message="?"),)),
        Said(
            ("False", "JobFailed", "?; attempt 1 failed, tried again at 03:04:15Z"),
            again=0,
            delete_jobs=("sql-0a1b2c3d4e-1",),
        ),
    ),
    "a Job of an earlier artifact of the same name does not count": (
        seen(jobs=(replace(succeeded(), owner_uid="uid-of-another"),)),
        Said(("False", "Queued", "attempt 1: waits for its Job's pod to start"), start=1, again=2.0),
    ),
    "a Job whose result is in the status goes": (
        seen(ready_artifact(), jobs=(succeeded(),)),
        Said(None, delete_jobs=("sql-0a1b2c3d4e-1",)),
    ),
    "a Ready one is left alone": (seen(ready_artifact()), Said(None)),
    "a Ready one without its cache too: what stands in it is still true": (
        seen(ready_artifact(), cache=None),
        Said(None),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_plan_artifact(case: str) -> None:
    observation, expected = CASES[case]
    plan = plan_artifact(observation, now=NOW)
    conditions = told(plan.status.conditions) if plan.status else {}
    assert conditions.get("Ready") == expected.ready
    assert ("Stalled" in conditions) is expected.stalled
    assert (plan.start, plan.requeue_after) == (expected.start, expected.again)
    assert (plan.delete_jobs, plan.delete_artifact) == (expected.delete_jobs, expected.delete_artifact)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("moment", ["at the same time", "later"])
def test_a_second_look_at_the_same_world_changes_nothing(case: str, moment: str) -> None:
    """What a Job's end changes is that the Job is done with: it is not looked at again."""
    observation, _ = CASES[case]
    first = plan_artifact(observation, now=NOW)
    jobs = () if any(j.finished for j in observation.jobs) else observation.jobs
    artifact = after(observation.artifact, first)
    again = replace(observation, artifact=artifact, jobs=jobs)
    second = plan_artifact(again, now=NOW if moment == "at the same time" else NOW + timedelta(seconds=3))
    assert second.status in (None, artifact.status)
    if first.start is not None:
        assert second.start == first.start


def test_what_a_success_records() -> None:
    before = failed_artifact(Reason.UNAUTHORIZED, artifact=PRIVATE, version="7")
    plan = plan_artifact(seen(before, jobs=(succeeded(2),)), now=LATER)
    assert plan.status is not None
    status = plan.status.to_wire()
    assert [c["type"] for c in status.pop("conditions")] == ["Ready"]
    assert status == {
        "source": "org/sql",
        "observedGeneration": 1,
        "attempt": 2,
        "finishedAttempt": 2,
        "failedAttempts": 0,
        "credentialsVersion": "7",
        "resolvedRevision": COMMIT,
        "revision": COMMIT[:8],
        "digest": "sha256:aa",
        "sizeBytes": 131072,
        "size": "128Ki",
        "files": 2,
        "path": f"artifacts/sql-0a1b2c3d4e-{COMMIT}",
        "rank": 8,
        "targetModules": ["q_proj"],
    }


def test_what_a_failure_records() -> None:
    plan = plan_artifact(seen(jobs=(failed(Reason.RATE_LIMITED, message="429"),)), now=NOW)
    assert plan.status is not None
    status = plan.status
    assert status.last_failure is not None
    assert (status.last_failure.attempt, status.last_failure.reason, status.last_failure.message) == (
        1,
        "RateLimited",
        "429",
    )
    assert (status.attempt, status.finished_attempt, status.failed_attempts) == (1, 1, 1)
    assert status.next_attempt_time == NOW + timedelta(seconds=10)
    assert status.progress is None


def test_a_long_message_does_not_hide_what_happens_next() -> None:
    plan = plan_artifact(seen(jobs=(failed(Reason.RATE_LIMITED, message="x" * 3000),)), now=NOW)
    assert plan.status is not None
    message = told(plan.status.conditions)["Ready"][2]
    assert message.endswith("; attempt 1 failed, tried again at 03:04:15Z")
    assert len(message) <= 2048


def test_progress_is_shown_and_goes() -> None:
    progress = FetchProgress(phase="Downloading", bytes_done=50, bytes_total=200, bytes_per_second=10)
    plan = plan_artifact(seen(jobs=(job(pod="x"),), progress=progress), now=NOW)
    assert plan.status is not None
    assert plan.status.progress is not None
    assert plan.status.progress.to_wire() == {
        "phase": "Downloading",
        "bytesDone": 50,
        "bytesTotal": 200,
        "percent": 25,
        "bytesPerSecond": 10,
        "rate": "10B/s",
        "etaSeconds": 15,
        "eta": "15s",
        "time": "2026-01-02T03:04:05Z",
    }
    done = plan_artifact(seen(after(make_artifact(), plan), jobs=(succeeded(),)), now=NOW)
    assert done.status is not None
    assert done.status.progress is None


def test_more_than_all_is_all() -> None:
    progress = FetchProgress(phase="Downloading", bytes_done=300, bytes_total=200)
    plan = plan_artifact(seen(jobs=(job(pod="x"),), progress=progress), now=NOW)
    assert plan.status is not None
    assert plan.status.progress is not None
    assert plan.status.progress.percent == 100


# Back-off

DELAYS = {
    Retry.BACKOFF: [10, 20, 40, 80, 160, 300, 300, 300],
    Retry.OUTSIDE: [10, 20, 40, 80, 160, 320, 600, 600],
    # A Job can meet what is otherwise waited for (the volume is not mounted); waiting is not giving up.
    Retry.WAIT: [10, 20, 40, 80, 160, 300, 300, 300],
}


@pytest.mark.parametrize("reason", [r for r in Reason if REASONS[r].retry in DELAYS])
def test_back_off(reason: Reason) -> None:
    artifact = make_artifact()
    now, delays = NOW, []
    for attempt in range(1, 9):
        status = plan_failure(artifact, reason, "m", attempt=attempt, now=now)
        assert status.next_attempt_time is not None
        delays.append((status.next_attempt_time - now).total_seconds())
        artifact = artifact.model_copy(update={"status": through_the_api(status)})
        now = status.next_attempt_time
    assert delays == DELAYS[REASONS[reason].retry]


def test_back_off_stays_bounded_for_ever() -> None:
    artifact = make_artifact(status={"failedAttempts": 10**6})
    status = plan_failure(artifact, Reason.UNAUTHORIZED, "m", attempt=10**6 + 1, now=NOW)
    assert status.next_attempt_time == NOW + timedelta(seconds=600)


def test_a_success_starts_the_back_off_anew() -> None:
    before = failed_artifact(Reason.SOURCE_UNREACHABLE)
    good = after(before, plan_artifact(seen(before, jobs=(succeeded(2),)), now=LATER))
    assert plan_failure(good, Reason.SOURCE_UNREACHABLE, "m", attempt=3, now=LATER).failed_attempts == 1


def starts(artifact: ModelArtifact, now: datetime, **more: Any) -> int | None:
    return plan_artifact(seen(artifact, **more), now=now).start


def test_the_next_attempt_starts_when_it_is_due_and_not_before() -> None:
    artifact = failed_artifact(Reason.SOURCE_UNREACHABLE)
    plan = plan_artifact(seen(artifact), now=NOW + timedelta(seconds=4))
    assert (plan.start, plan.requeue_after) == (None, 6.0)
    assert starts(artifact, NOW + timedelta(seconds=9.9)) is None
    assert starts(artifact, NOW + timedelta(seconds=10)) == 2


def test_what_the_last_attempt_met_stays_readable_while_the_next_starts() -> None:
    artifact = failed_artifact(Reason.UNAUTHORIZED)
    due = NOW + timedelta(seconds=10)
    plan = plan_artifact(seen(artifact), now=due)
    assert plan.status is not None
    words = ("False", "Unauthorized", "it said no; attempt 2 is starting")
    assert told(plan.status.conditions)["Ready"] == words
    started = after(artifact, plan)
    running = plan_artifact(seen(started, jobs=(job(2),)), now=due)
    assert running.status == started.status
    asking = plan_artifact(seen(started, jobs=(job(2, pod="x"),)), now=due)
    assert asking.status is not None
    assert ready_reason(asking.status.conditions) == "Downloading"


@pytest.mark.parametrize("reason", [r for r in Reason if REASONS[r].retry is Retry.NONE])
def test_a_permanent_error_is_never_tried_again(reason: Reason) -> None:
    artifact = failed_artifact(reason, artifact=PRIVATE, version="1")
    for now in (NOW, LATER, LATER + timedelta(days=1000)):
        plan = plan_artifact(seen(artifact, secret=secret("1")), now=now)
        assert (plan.start, plan.requeue_after, plan.status in (None, artifact.status)) == (None, None, True)
    assert starts(artifact, LATER, secret=secret("2")) is None, "another token makes no other content"


@pytest.mark.parametrize("reason", [r for r in Reason if REASONS[r].retry is Retry.OUTSIDE])
def test_an_outside_error_is_tried_again_at_once_when_the_secret_changed(reason: Reason) -> None:
    artifact = failed_artifact(reason, artifact=PRIVATE, version="1")
    assert starts(artifact, NOW, secret=secret("1")) is None
    plan = plan_artifact(seen(artifact, secret=secret("2")), now=NOW)
    assert plan.start == 2
    assert plan.status is not None
    assert plan.status.credentials_version == "2"
    again = failed(reason, 2)
    third = after(artifact, plan)
    third = after(third, plan_artifact(seen(third, jobs=(again,), secret=secret("2")), now=NOW))
    assert starts(third, NOW, secret=secret("2")) is None, "once per change"


@pytest.mark.parametrize("reason", [r for r in Reason if REASONS[r].retry is Retry.BACKOFF])
def test_a_transient_errors_back_off_is_not_cut_short_by_the_secret(reason: Reason) -> None:
    artifact = failed_artifact(reason, artifact=PRIVATE, version="1")
    assert starts(artifact, NOW, secret=secret("2")) is None


def test_a_secret_is_looked_at_more_often_than_the_back_off_is_long() -> None:
    artifact = failed_artifact(Reason.UNAUTHORIZED, artifact=PRIVATE, version="1")
    far = artifact.model_copy(
        update={"status": artifact.status.model_copy(update={"next_attempt_time": NOW + timedelta(seconds=600)})}
    )
    assert plan_artifact(seen(far, secret=secret("1")), now=NOW).requeue_after == 10.0
    assert plan_artifact(seen(far), now=NOW).requeue_after == 600.0


WAITS: dict[str, dict[str, Any]] = {
    "its cache was away for a time": {"cache": None},
    "its Secret was away for a time": {"secret": ReasonError(Reason.CREDENTIALS_NOT_FOUND, "no Secret")},
}


@pytest.mark.parametrize("case", WAITS)
@pytest.mark.parametrize("reason", [Reason.UNAUTHORIZED, Reason.INVALID_ADAPTER])
def test_a_back_off_is_told_of_again_when_what_came_between_is_over(case: str, reason: Reason) -> None:
    artifact = failed_artifact(reason, artifact=PRIVATE, version="1")
    between = after(artifact, plan_artifact(seen(artifact, **({"secret": secret("1")} | WAITS[case])), now=NOW))
    assert ready_reason(between.status.conditions) not in (reason, "Ready")
    over = plan_artifact(seen(between, secret=secret("1")), now=NOW)
    assert over.start is None
    assert over.status == artifact.status


# Wanted, unwanted, wanted again


def test_a_ready_one_that_nothing_wants_stays_and_says_since_when() -> None:
    artifact = ready_artifact()
    plan = plan_artifact(seen(artifact, wanted=False), now=NOW + timedelta(microseconds=5))
    assert not plan.delete_artifact
    assert plan.status is not None
    assert plan.status.unreferenced_since == NOW
    assert plan.status.conditions == artifact.status.conditions
    assert plan_artifact(seen(after(artifact, plan), wanted=False), now=LATER) == ArtifactPlan(status=None)


def test_the_jobs_of_one_that_nothing_wants_go_so_that_none_is_believed_later() -> None:
    artifact = ready_artifact()
    jobs = (job(2), job(2, name="another's", owner_uid="uid-2"))
    plan = plan_artifact(seen(artifact, wanted=False, jobs=jobs), now=NOW)
    assert plan.delete_jobs == (job(2).name,)
    unwanted = after(artifact, plan)
    ended = succeeded(3)
    assert plan_artifact(seen(unwanted, wanted=False, jobs=(ended,)), now=LATER).delete_jobs == (ended.name,)


def test_what_an_earlier_refresh_was_for_goes_when_nothing_wants_it() -> None:
    artifact = ready_artifact(annotations={ANNOTATION_REFRESH: "requested=1"})
    assert plan_artifact(seen(artifact, wanted=False), now=NOW) == ArtifactPlan(status=None, delete_artifact=True)
    assert not plan_artifact(seen(artifact, wanted=None), now=NOW).delete_artifact, "unknown is not unwanted"
    by_hand = ready_artifact(annotations={ANNOTATION_REFRESH: "1"}, by_hand=True)
    assert not plan_artifact(seen(by_hand, wanted=False), now=NOW).delete_artifact


def test_a_moving_revision_that_is_wanted_again_is_resolved_anew() -> None:
    artifact = ready_artifact(status={"unreferencedSince": "2026-01-01T00:00:00Z"})
    plan = plan_artifact(seen(artifact), now=NOW)
    assert plan.status is not None
    assert told(plan.status.conditions)["Ready"] == ("False", "Queued", "wanted again: resolves main anew")
    assert plan.requeue_after == 0
    asked = after(artifact, plan)
    assert starts(asked, NOW) == 2
    done = after(asked, plan_artifact(seen(asked, jobs=(succeeded(2, OTHER_COMMIT),)), now=LATER))
    assert done.status.resolved_revision == OTHER_COMMIT
    assert done.status.path == f"artifacts/sql-0a1b2c3d4e-{OTHER_COMMIT}"
    assert done.status.unreferenced_since is None
    assert plan_artifact(seen(done), now=LATER).status is None


def test_a_full_commit_that_is_wanted_again_is_used_as_it_is() -> None:
    artifact = ready_artifact(revision=COMMIT, status={"unreferencedSince": "2026-01-01T00:00:00Z"})
    plan = plan_artifact(seen(artifact), now=NOW)
    assert plan.start is None
    assert plan.status is not None
    assert plan.status.unreferenced_since is None
    assert ready_reason(plan.status.conditions) == "Ready"


@pytest.mark.parametrize(
    ("artifact", "source"),
    [
        (make_artifact(repo="org/other"), "org/other"),
        (make_artifact(s3={"bucket": "models", "prefix": "team-a/sql"}), "s3://models/team-a/sql"),
        (make_artifact(s3={"bucket": "models"}), "s3://models"),
    ],
)
def test_the_source_is_always_written(artifact: ModelArtifact, source: str) -> None:
    started = plan_artifact(seen(artifact), now=NOW)
    assert started.status is not None
    assert started.status.source == source
    older = after(artifact, plan_artifact(seen(after(artifact, started), jobs=(succeeded(),)), now=NOW))
    before = older.model_copy(update={"status": older.status.model_copy(update={"source": None})})
    again = plan_artifact(seen(before), now=NOW)
    assert again.status == older.status  # one that an older operator left Ready gets it too


# Whose credentials


def made_for_a_want(**more: Any) -> ModelArtifact:
    """A private artifact as a wanter makes it; `more` is build_artifact's."""
    source = Source.model_validate(more.pop("source", {"huggingFace": {"repo": "org/sql", "revision": "main"}}))
    values: dict[str, Any] = {"cache": make_cache(), "base_artifact": "base-1", "credentials": SECRET} | more
    return ModelArtifact.model_validate(build_artifact(source=source, **values))


def of_another_source(artifact: ModelArtifact) -> ModelArtifact:
    """The same name, and what its maker chose in the spec."""
    source = Source.model_validate({"huggingFace": {"repo": "mallory/sql"}})
    return artifact.model_copy(update={"spec": artifact.spec.model_copy(update={"source": source})})


LENT: dict[tuple[str, str, str, str], object] = {SECRET: None}
CREDENTIALS: dict[str, tuple[ModelArtifact, dict[tuple[str, str, str, str], object], Any]] = {
    "none are asked for": (make_artifact(), LENT, None),
    "a live wanter lends them": (made_for_a_want(), LENT, SECRET),
    "to what a refresh is for": (made_for_a_want(refresh="requested=1"), LENT, SECRET),
    "to a base model's": (made_for_a_want(base_artifact=None), LENT, SECRET),
    "for S3": (made_for_a_want(source={"s3": {"bucket": "models", "prefix": "a/"}}), LENT, SECRET),
    "one made by hand from S3 reads the keys of the Secret beside it": (
        make_artifact(by_hand=True, secret="keys", s3={"bucket": "models"}),
        {},
        ("serving", "keys", "AWS_*", ""),
    ),
    "one made by hand may name a Secret beside it": (
        make_artifact(by_hand=True, secret="hf"),
        {},
        ("serving", "hf", "token", ""),
    ),
}


@pytest.mark.parametrize("case", CREDENTIALS)
def test_wanters_credentials(case: str) -> None:
    artifact, offered, expected = CREDENTIALS[case]
    assert wanters_credentials(artifact, make_cache(), offered) == expected


NOT_LENT: dict[str, tuple[ModelArtifact, dict[tuple[str, str, str, str], object]]] = {
    "nobody lends them": (made_for_a_want(), {}),
    "the name is that of another source's": (of_another_source(made_for_a_want()), LENT),
    "the name is that of another source's refresh": (of_another_source(made_for_a_want(refresh="requested=1")), LENT),
    "the name is any": (PRIVATE, LENT),
    "one made by hand writes down another namespace's": (make_artifact(by_hand=True, credentials=SECRET), {}),
    "a Secret of the same name in another namespace": (made_for_a_want(), {("team-b", *SECRET[1:]): None}),
    "a Secret that was made anew": (made_for_a_want(), {(*SECRET[:3], "uid-2"): None}),
    "another key": (made_for_a_want(), {("team-a", "hf", "other", "uid-secret"): None}),
}


@pytest.mark.parametrize("case", NOT_LENT)
def test_credentials_of_another_namespace_come_only_through_who_wants_the_content(case: str) -> None:
    artifact, offered = NOT_LENT[case]
    assert_refused(wanters_credentials(artifact, make_cache(), offered))


@pytest.mark.parametrize(
    "cache",
    [None, make_cache(uid="uid-2"), make_cache(endpoint="https://elsewhere.test")],
    ids=["gone", "made anew", "of another Hub"],
)
def test_credentials_are_not_lent_for_another_cache(cache: ModelCache | None) -> None:
    assert_refused(wanters_credentials(made_for_a_want(), cache, LENT))


def assert_refused(found: Any) -> None:
    assert isinstance(found, ReasonError)
    assert (found.reason, found.message) == (
        "CredentialsForbidden",
        "no accepted LoRAAdapter or VLLMDeployment of namespace team-a asks for this content with Secret "
        "hf: credentials of another namespace come only through such an object",
    )


def test_a_start_that_fails_is_recorded_over_what_the_plan_wrote_so_that_a_repaired_secret_is_tried_at_once() -> None:
    """A Secret without the key is found out only while the Job is made: after the plan, before its status is written."""
    plan = plan_artifact(seen(PRIVATE, secret=secret("1")), now=NOW)
    planned = after(PRIVATE, plan)
    assert plan.start == 1
    status = plan_failure(planned, Reason.CREDENTIALS_KEY_MISSING, "no key token", attempt=1, now=NOW)
    assert status.credentials_version == "1"
    waiting = PRIVATE.model_copy(update={"status": through_the_api(status)})
    assert starts(waiting, NOW, secret=secret("1")) is None
    assert starts(waiting, NOW, secret=secret("2")) == 2


def test_a_job_that_never_started_does_not_end_as_only_late() -> None:
    """Its deadline comes hours after the cause, which only the status still knows."""
    cause = "no pod of Job sql-0a1b2c3d4e-1 can be made: exceeded quota"
    first = seen(jobs=(job(waiting=(Reason.JOB_UNSCHEDULABLE, cause)),))
    waiting = after(first.artifact, plan_artifact(first, now=NOW))
    late = failed(Reason.JOB_TIMEOUT, message="the Job took longer than its deadline")
    ended = after(waiting, plan_artifact(seen(waiting, jobs=(late,)), now=NOW))
    assert ended.status.last_failure is not None
    assert (ended.status.last_failure.reason, ended.status.last_failure.message) == (
        "JobUnschedulable",
        f"{cause}; so the Job came to its deadline",
    )


def test_one_whose_turn_it_is_not_says_how_many_are_ahead_and_starts_no_job() -> None:
    cache = make_cache(download={"maxConcurrent": 2})
    plan = plan_artifact(seen(cache=cache, ahead=3), now=NOW)
    assert (plan.start, plan.requeue_after) == (None, 10.0)
    assert waits_for_turn(seen(cache=cache, ahead=3), now=NOW)
    assert plan.status is not None
    said = told(plan.status.conditions)["Ready"]
    assert said[1] == "Queued"
    assert "3 downloads are ahead of it in ModelCache serving/default, which runs 2 at once" in said[2]
    assert plan.status.attempt is None


def test_one_that_failed_keeps_saying_why_while_it_waits_for_its_turn() -> None:
    failing = failed_artifact(Reason.SOURCE_UNREACHABLE)
    plan = plan_artifact(seen(failing, ahead=3), now=NOW + timedelta(hours=1))
    assert plan.status is not None
    said = told(plan.status.conditions)["Ready"]
    assert said[1] == "SourceUnreachable"
    assert "it said no; tried again in turn: 3 downloads are ahead" in said[2]


def test_only_one_that_could_start_waits_for_a_turn() -> None:
    assert waits_for_turn(seen(), now=NOW)
    for other in (seen(wanted=False), seen(cache=None), seen(ready_artifact()), seen(NEEDS_BASE), seen(jobs=(job(),))):
        assert not waits_for_turn(other, now=NOW)


def test_what_its_user_says_is_too_big_needs_no_job() -> None:
    artifact = make_artifact()
    source = artifact.spec.source.model_copy(update={"size_hint": "11Gi"})
    artifact = artifact.model_copy(update={"spec": artifact.spec.model_copy(update={"source": source})})
    plan = plan_artifact(seen(artifact, cache=make_cache(maxArtifactSize="10Gi")), now=NOW)
    assert plan.start is None
    assert plan.status is not None
    conditions = told(plan.status.conditions)
    assert conditions["Ready"][1] == conditions["Stalled"][1] == "TooLarge"
    assert "source.sizeHint says 11Gi, and ModelCache serving/default takes 10Gi at most" in conditions["Ready"][2]
    assert plan_artifact(seen(artifact, cache=make_cache(maxArtifactSize="11Gi")), now=NOW).start == 1


def test_a_job_that_does_not_start_gives_its_place_to_others_alone() -> None:
    stuck = job(idle_since=NOW - timedelta(hours=1), waiting=(Reason.JOB_UNSCHEDULABLE, "pod x: no node"))
    alone = plan_artifact(seen(jobs=(stuck,)), now=NOW)
    assert (alone.delete_jobs, alone.status and ready_reason(alone.status.conditions)) == ((), "JobUnschedulable")
    found = plan_artifact(seen(jobs=(stuck,), others_wait=True), now=NOW)
    assert found.delete_jobs == (stuck.name,)
    assert found.status is not None
    assert (found.status.finished_attempt, found.status.failed_attempts) == (1, 1)
    assert found.status.next_attempt_time == NOW + timedelta(seconds=10)
    said = told(found.status.conditions)["Ready"]
    assert said[1] == "JobUnschedulable"
    assert "pod x: no node; ended after 15m, for other downloads wait for its place; attempt 1 failed" in said[2]
