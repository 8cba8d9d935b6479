"""Which content goes and when: nothing that may be in use, the oldest first, no more than is needed."""

from __future__ import annotations

import base64
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import pytest

from lora_operator.api import ModelArtifact, ModelCache
from lora_operator.api.sources.source import Source
from lora_operator.constants import ANNOTATION_EVICT
from lora_operator.kube.workloads import Job
from lora_operator.plan.cache import CacheObservation, plan_cache
from lora_operator.plan.eviction import encode_keep, is_due, plan_eviction, read_result
from lora_operator.plan.eviction_candidates import EvictionObservation, EvictJob, reclaimable_bytes
from lora_operator.wire.jobs import KEEP_BYTES, EvictResult, keep_mark, views_in
from tests.unit.builders import (
    CREATED,
    NOW,
    make_artifact,
    make_cache,
    not_ready,
    ready_artifact,
    through_the_api,
    told,
)

GIB = 1 << 30
LRU: dict[str, Any] = {"eviction": {"policy": "LeastRecentlyUsed"}}


def cache(*, asked: str | None = None, status: dict[str, Any] | None = None, **spec: Any) -> ModelCache:
    found = make_cache(**spec)
    annotations = {ANNOTATION_EVICT: asked} if asked is not None else {}
    metadata = found.metadata.model_copy(update={"annotations": annotations})
    more = {"status": found.status.model_validate({**found.status.to_wire(), "eviction": status})} if status else {}
    return found.model_copy(update={"metadata": metadata, **more})


def unused(name: str, days: float, *, size: int = 1, path: str = "", **more: Any) -> ModelArtifact:
    """A Ready artifact that nothing has wanted for so many days, of so many GiB."""
    since = (NOW - timedelta(days=days)).isoformat()
    status = {"unreferencedSince": since, "sizeBytes": size * GIB, "path": path or f"artifacts/{name}"}
    return ready_artifact(name, status=status, **more)


def held_up(name: str = "new", *, needed: int = 1, at: datetime = NOW, **more: Any) -> ModelArtifact:
    """A wanted one that does not fit."""
    failure = {
        "attempt": 1,
        "reason": "InsufficientSpace",
        "message": "full",
        "time": at.isoformat(),
        "neededBytes": needed * GIB,
    }
    return make_artifact(name, status={"lastFailure": failure}, conditions=not_ready("InsufficientSpace"), **more)


MARKED: dict[str, Any] = {"leftOver": True}  # written down before the first artifact is deleted


def seen(*artifacts: ModelArtifact, of: ModelCache | None = None, **more: Any) -> EvictionObservation:
    unwanted = {a.metadata.name for a in artifacts if a.status.unreferenced_since is not None}
    values: dict[str, Any] = {
        "cache": of or cache(**LRU),
        "artifacts": artifacts,
        "unwanted": frozenset(unwanted),
        "used": frozenset(),
        "unsure": None,
        "job": None,
    }
    return EvictionObservation(**(values | more))


def removed(observation: EvictionObservation) -> list[str] | None:
    """The names of what goes; None where nothing is begun."""
    plan = plan_eviction(observation, now=NOW)
    if plan.start is None and plan.status is not None and plan.status.left_over:
        marked = observation.cache.status.model_copy(update={"eviction": plan.status})
        of = observation.cache.model_copy(update={"status": marked})
        plan = plan_eviction(replace(observation, cache=of), now=NOW)
    return [a.metadata.name for a in plan.remove] if plan.start is not None else None


def test_what_was_wanted_longest_ago_goes_first_and_no_more_than_is_needed() -> None:
    contents = [unused("young", 1), unused("oldest", 9), unused("old", 5)]
    assert removed(seen(*contents, held_up(needed=1))) == ["oldest"]
    assert removed(seen(*contents, held_up(needed=2))) == ["oldest", "old"]
    assert removed(seen(*contents, held_up("a", needed=1), held_up("b", needed=1))) == ["oldest", "old"]
    assert removed(seen(*contents, held_up(needed=50))) == ["oldest", "old", "young"]
    assert removed(seen(held_up())) == [], "what lies there without any artifact may be enough"


def test_content_that_somebody_warms_by_hand_gets_room_too() -> None:
    warm, unwanted = held_up("warm", by_hand=True), frozenset({"old", "warm", "left"})
    assert removed(seen(unused("old", 9), warm, unwanted=unwanted)) == ["old"]
    assert removed(seen(unused("old", 9), held_up("left"), unwanted=unwanted)) is None, "nothing wants it any more"


def test_nothing_goes_without_a_reason_or_by_the_policy_never() -> None:
    contents = [unused("old", 99)]
    assert removed(seen(*contents)) is None
    assert removed(seen(*contents, held_up(), of=cache())) is None


def test_what_an_artifact_left_that_somebody_deleted_goes() -> None:
    plan = plan_eviction(seen(swept=True), now=NOW)
    assert plan.status is not None
    assert (plan.status.left_over, plan.requeue_after, plan.start) == (True, 0, None), "it is written down first"


def test_that_artifacts_are_deleted_is_written_down_before_the_first_is() -> None:
    plan = plan_eviction(seen(unused("old", 9), held_up()), now=NOW)
    assert plan.status is not None
    assert (plan.start, plan.remove, plan.requeue_after) == (None, (), 0)
    assert (plan.status.left_over, plan.status.running) == (True, False)
    plan = plan_eviction(seen(unused("old", 9), held_up(), of=cache(status=MARKED, **LRU)), now=NOW)
    assert (plan.start, [a.metadata.name for a in plan.remove]) == (1, ["old"])


@pytest.mark.parametrize("policy", [{}, LRU], ids=["Never", "LeastRecentlyUsed"])
def test_what_deleted_artifacts_left_goes_in_the_end(policy: dict[str, Any]) -> None:
    """The operator died, or the Job was refused or failed, or a download had the files."""
    kept = unused("kept", 9)
    assert removed(seen(kept, of=cache(status=MARKED, **policy))) == []
    for result in (
        EvictResult(ok=False, message="no"),
        EvictResult(ok=True, busy=1),
        EvictResult(ok=True, left_bytes=1),
    ):
        job = EvictJob("default-evict-1", result)
        status = plan_eviction(seen(of=cache(status=MARKED, **policy), job=job), now=NOW).status
        assert status is not None
        later = seen(kept, of=cache(status=status.to_wire(), **policy))
        assert not is_due(later, now=NOW + timedelta(minutes=9))
        assert is_due(later, now=NOW + timedelta(minutes=10))
    fine = EvictJob("default-evict-1", EvictResult(ok=True))
    status = plan_eviction(seen(of=cache(status=MARKED, **policy), job=fine), now=NOW).status
    assert status is not None
    assert not status.left_over


def test_what_deleted_artifacts_left_is_no_reason_to_keep_downloads_waiting() -> None:
    assert not is_due(seen(of=cache(status=MARKED, **LRU), fetching_since=NOW), now=NOW)


def test_content_that_is_too_old_goes_though_there_is_room() -> None:
    aged = cache(eviction={"policy": "LeastRecentlyUsed", "keepUnreferencedFor": "72h"})
    assert removed(seen(unused("young", 2.9), unused("old", 3), of=aged)) == ["old"]
    assert removed(seen(unused("young", 2.9), of=aged)) is None
    assert removed(seen(unused("old", 3), of=aged, used=frozenset({"old"}))) is None, "it is still in use, so no Job"


@pytest.mark.parametrize("policy", [{}, LRU], ids=["Never", "LeastRecentlyUsed"])
def test_all_that_is_unused_goes_when_it_is_asked_for_once(policy: dict[str, Any]) -> None:
    contents = [unused("young", 0.001), unused("old", 9)]
    asked = cache(asked="now", status=MARKED, **policy)
    plan = plan_eviction(seen(*contents, of=asked), now=NOW)
    assert [a.metadata.name for a in plan.remove] == ["old", "young"]
    assert plan.status is not None
    assert (plan.status.requested, plan.status.running) == ("now", True)
    done = cache(asked="now", status={"requested": "now", "attempt": 1}, **policy)
    assert removed(seen(*contents, of=done)) is None
    again = cache(asked="later", status={"requested": "now", "attempt": 1, **MARKED}, **policy)
    assert plan_eviction(seen(*contents, of=again), now=NOW).start == 2


def test_what_may_be_in_use_stays() -> None:
    asked = cache(asked="now")
    listed = unused("listed", 9)
    by_hand = unused("warm", 9, by_hand=True)
    wanted = ready_artifact("wanted")
    kept = unused("told", 9)
    free = unused("free", 9)
    observation = seen(listed, by_hand, wanted, kept, free, of=asked, used=frozenset({"listed"}))
    observation = EvictionObservation(
        **{**observation.__dict__, "unwanted": frozenset({"listed", "warm", "free"})}  # a status says that it is in use
    )
    assert removed(observation) == ["free"]


def test_what_is_not_known_for_certain_holds_up_everything_and_is_said() -> None:
    asked = cache(asked="now")
    plan = plan_eviction(seen(unused("old", 9), of=asked, unsure="pod serving/x may be serving"), now=NOW)
    assert (plan.start, plan.remove) == (None, ())
    assert plan.status is not None
    assert plan.status.message == "waits, for nothing may go now: pod serving/x may be serving"
    assert plan.status.waiting
    assert plan.status.requested is None, "so it is not forgotten"
    plan = plan_eviction(seen(unused("old", 9), of=asked, unread=True), now=NOW)
    assert (plan.start, plan.requeue_after) == (None, 2.0)


def test_downloads_that_are_under_way_are_reckoned_with() -> None:
    asked = cache(asked="now")
    assert plan_eviction(seen(of=asked, fetching_since=NOW), now=NOW).built == NOW
    assert plan_eviction(seen(of=asked), now=NOW).built is None


def test_content_that_the_job_would_leave_for_a_download_s_sake_keeps_its_artifact() -> None:
    came = datetime.fromisoformat(CREATED)
    for age, goes in ((timedelta(seconds=119), []), (timedelta(seconds=121), ["old"])):
        assert removed(seen(unused("old", 9), held_up(), fetching_since=came + age)) == goes


def test_content_of_two_artifacts_counts_once_and_only_when_both_go() -> None:
    twins = [unused("one", 9, path="artifacts/same"), unused("two", 8, path="artifacts/same"), unused("three", 7)]
    assert removed(seen(*twins, held_up(needed=2))) == ["one", "two", "three"]
    wanted = ready_artifact("wanted", status={"path": "artifacts/same"})
    assert removed(seen(twins[0], wanted, unused("three", 7), held_up(needed=1))) == ["one", "three"]
    beside = seen(twins[0], unused("three", 7), held_up(needed=1), beside=(wanted,))
    assert removed(beside) == ["one", "three"], "another cache over the claim has it, too"


def test_a_job_that_runs_is_awaited_and_its_end_recorded() -> None:
    job = EvictJob("default-evict-1")
    plan = plan_eviction(seen(held_up(), job=job), now=NOW)
    assert (plan.start, plan.ended, plan.requeue_after) == (None, False, 5.0)
    result = EvictResult(ok=True, views=3, freed_bytes=5 * GIB)
    plan = plan_eviction(seen(held_up(), job=EvictJob("default-evict-1", result)), now=NOW)
    assert plan.ended
    assert plan.status is not None
    assert through_the_api(plan.status).to_wire() == {
        "attempt": 1,
        "running": False,
        "waiting": False,
        "leftOver": False,
        "failures": 0,
        "time": "2026-01-02T03:04:05Z",
        "views": 3,
        "freed": "5Gi",
    }


def test_a_job_that_does_not_start_says_why_and_is_given_up_so_that_downloads_go_on() -> None:
    trouble = "pod evict: 0/3 nodes are available"
    pending = EvictJob("default-evict-1", since=NOW, trouble=trouble)
    plan = plan_eviction(seen(held_up(), job=pending), now=NOW + timedelta(seconds=119))
    assert plan.status is not None
    assert (plan.status.running, plan.status.message, plan.ended) == (True, trouble, False)
    plan = plan_eviction(seen(held_up(), job=pending), now=NOW + timedelta(seconds=120))
    assert plan.status is not None
    assert (plan.status.running, plan.status.attempt, plan.status.failures, plan.ended) == (False, 1, 1, True)
    assert plan.status.message == (
        f"Job default-evict-1 was given up, for downloads wait for it: it had not started after 120 s: {trouble}"
    )
    started = EvictJob("default-evict-1", since=NOW, started=True)
    assert not plan_eviction(seen(held_up(), job=started), now=NOW + timedelta(minutes=9)).ended


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        ({}, ("False", "NotHeldUp")),
        ({"running": True, "attempt": 1}, ("False", "NotHeldUp")),
        ({"message": "2 sources were being downloaded from"}, ("False", "NotHeldUp")),
        ({"waiting": True, "message": "pod x can't be asked"}, ("True", "EvictionWaits")),
        ({"running": True, "message": "pod e: 0/3 nodes are available"}, ("True", "JobNotStarted")),
        ({"failures": 2, "message": "no locks"}, ("True", "EvictionFailed")),
        ({"failures": 2, "running": True}, ("True", "EvictionFailed")),
    ],
)
def test_what_holds_up_an_eviction_is_a_condition(status: dict[str, Any], expected: tuple[str, str]) -> None:
    of = cache(status=status or {"attempt": 0})
    found, _ = plan_cache(CacheObservation(of, None, (), eviction=of.status.eviction), now=NOW)
    condition = told(found.conditions)["EvictionHeldUp"]
    assert condition[:2] == expected
    assert status.get("message", "") in condition[2] or expected[0] == "False"


def test_where_nothing_was_ever_to_be_removed_no_condition_speaks_of_it() -> None:
    assert "EvictionHeldUp" not in told(plan_cache(CacheObservation(cache(), None, ()), now=NOW)[0].conditions)


def test_one_that_could_not_is_not_tried_again_at_once() -> None:
    result = EvictResult(ok=False, message="nothing is evicted: no locks")
    observation = seen(unused("old", 9), held_up(), job=EvictJob("default-evict-1", result))
    status = plan_eviction(observation, now=NOW).status
    assert status is not None
    assert status.message == "nothing is evicted: no locks"
    later = seen(unused("old", 9), held_up(at=NOW + timedelta(minutes=5)), of=cache(status=status.to_wire(), **LRU))
    assert not is_due(later, now=NOW + timedelta(minutes=6))
    assert is_due(later, now=NOW + timedelta(minutes=11))
    asked = seen(of=cache(status=status.to_wire(), asked="now", **LRU))
    assert is_due(asked, now=NOW + timedelta(minutes=6))


def test_the_more_often_it_could_not_the_later_it_is_tried_again() -> None:
    result, status = EvictResult(ok=False, message="no locks"), None
    for failures, minutes in ((1, 10), (2, 20), (3, 40), (4, 80), (5, 80)):
        job = EvictJob(f"default-evict-{failures}", result)
        status = plan_eviction(seen(of=cache(status=status, **LRU), job=job), now=NOW).status.to_wire()  # type: ignore[union-attr]
        assert status["failures"] == failures
        wants = seen(unused("old", 9), held_up(at=NOW + timedelta(minutes=1)), of=cache(status=status, **LRU))
        assert not is_due(wants, now=NOW + timedelta(minutes=minutes - 1))
        assert is_due(wants, now=NOW + timedelta(minutes=minutes))
    fine = EvictJob("default-evict-6", EvictResult(ok=True))
    ended = plan_eviction(seen(of=cache(status=status, **LRU), job=fine), now=NOW).status
    assert ended is not None
    assert (ended.failures, ended.message) == (0, None)


def test_one_that_left_alone_what_downloads_had_is_no_failure() -> None:
    job = EvictJob("default-evict-1", EvictResult(ok=True, busy=1))
    status = plan_eviction(seen(job=job), now=NOW).status
    assert status is not None
    assert status.message == "1 sources were being downloaded from, so what is theirs stayed"
    later = seen(unused("old", 9), held_up(at=NOW + timedelta(minutes=1)), of=cache(status=status.to_wire(), **LRU))
    assert is_due(later, now=NOW + timedelta(minutes=1))


def test_after_an_eviction_only_a_download_that_failed_since_needs_another() -> None:
    status = {"attempt": 1, "time": NOW.isoformat(), "views": 1}
    before, after = NOW - timedelta(seconds=1), NOW + timedelta(seconds=1)
    assert removed(seen(unused("old", 9), held_up(at=before), of=cache(status=status, **LRU))) is None
    assert removed(seen(unused("old", 9), held_up(at=after), of=cache(status=status, **LRU))) == ["old"]


def test_what_can_be_reclaimed() -> None:
    wanted = ready_artifact("wanted", status={"path": "artifacts/a", "sizeBytes": GIB})
    same = unused("same", 1, path="artifacts/a")
    twins = [unused("one", 1, path="artifacts/b"), unused("two", 1, path="artifacts/b")]
    unwanted = frozenset({"same", "one", "two"})
    everything = [wanted, same, *twins]
    assert reclaimable_bytes(everything, unwanted, used=0) == GIB
    assert reclaimable_bytes(everything, unwanted, used=5 * GIB) == 4 * GIB, "what lies there without an artifact, too"
    assert reclaimable_bytes([], frozenset(), used=0) == 0


def test_what_is_used_in_place_makes_no_room_and_goes_only_with_age() -> None:
    copy, local = unused("copy", 2), unused("local", 9)
    source = Source.model_validate({"local": {"path": "by-hand/sql"}})
    local = local.model_copy(update={"spec": local.spec.model_copy(update={"source": source})})
    assert removed(seen(held_up(), copy, local)) == ["copy"]
    short: dict[str, Any] = {"eviction": {**LRU["eviction"], "keepUnreferencedFor": "200h"}}
    assert removed(seen(copy, local, of=cache(**short))) == ["local"]
    assert reclaimable_bytes([copy, local], frozenset({"copy", "local"}), used=0) == GIB


def test_what_is_to_stay_is_told_in_few_bytes() -> None:
    kept = encode_keep(["b", "a", "a"])
    data = base64.b64decode(kept)
    assert sorted([keep_mark("a"), keep_mark("b")]) == [data[:KEEP_BYTES], data[KEEP_BYTES:]]
    assert len(encode_keep(f"view-{n}" for n in range(10_000))) < 110_000, "fits one environment variable"


def test_views_in_a_text() -> None:
    text = '["--model", "/model-cache/artifacts/llama-0a", "{\\"path\\": \\"/model-cache/artifacts/sql-1.b_c/sub\\"}"]'
    assert views_in(text) == {"llama-0a", "sql-1.b_c"}


def test_the_last_words_of_a_job() -> None:
    failed = {"type": "Failed", "status": "True", "reason": "DeadlineExceeded"}
    ended = Job.parse({"status": {"conditions": [failed]}})
    assert read_result(Job.parse({"status": {}}), "{}") is None
    assert read_result(ended, '{"ok": true, "views": 2}') == EvictResult(ok=True, views=2)
    found = read_result(ended, "Traceback")
    assert found is not None
    assert (found.ok, found.message) == (False, "the Job ended without a result: DeadlineExceeded Traceback")


def test_what_pods_are_just_giving_up_is_waited_for_when_it_is_asked_for() -> None:
    asked = cache(asked="now")
    just, long_ago = unused("just", 0.001), unused("stuck", 1)
    plan = plan_eviction(seen(just, long_ago, of=asked, used=frozenset({"just", "stuck"})), now=NOW)
    assert (plan.start, plan.requeue_after) == (None, 2.0)
    assert plan.status is not None
    assert "pods still have just, which nothing wants since" in (plan.status.message or "")
    assert removed(seen(just, long_ago, of=asked, used=frozenset({"stuck"}))) == ["just"]


def test_what_waits_goes_on_waiting_and_says_so_once() -> None:
    contents = [unused("old", 9), held_up(at=NOW + timedelta(seconds=30))]
    done = {"attempt": 1, "time": NOW.isoformat(), "views": 1}
    now = NOW + timedelta(minutes=1)
    first = plan_eviction(seen(*contents, of=cache(status=done, **LRU), unsure="x"), now=now).status
    assert first is not None
    assert not first.left_over
    later = cache(status=through_the_api(first).to_wire(), **LRU)
    assert plan_eviction(seen(*contents, of=later, unsure="x"), now=now).status == first
    later = cache(status=through_the_api(first).to_wire() | MARKED, **LRU)
    assert [a.metadata.name for a in plan_eviction(seen(*contents, of=later), now=now).remove] == ["old"]


def test_one_whose_node_was_lost_is_reckoned_with_until_another_one_has_ended_well() -> None:
    made = NOW - timedelta(minutes=20)
    lost = EvictJob("j", result=EvictResult(ok=False, message="lost"), since=made, lost=True)
    status = plan_eviction(seen(job=lost), now=NOW).status
    assert status is not None
    assert status.lost_since == made
    for result, since in ((EvictResult(ok=False, message="no"), made), (EvictResult(ok=True), None)):
        after = seen(job=EvictJob("k", result=result, since=NOW), of=cache(status=status.to_wire(), **LRU))
        assert after.built == made
        found = plan_eviction(after, now=NOW).status
        assert found is not None
        assert found.lost_since == since
