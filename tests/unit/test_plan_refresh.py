"""Refreshes: what is resolved anew and when, and that an adapter goes on serving what it has until the new content is there."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from lora_operator.api import LoRAAdapter, ModelArtifact
from lora_operator.api.artifact import ModelArtifactSpec
from lora_operator.api.sources.source import Source
from lora_operator.conditions import failing
from lora_operator.constants import ANNOTATION_REFRESH, Reason
from lora_operator.errors import ReasonError
from lora_operator.plan.adapter import AdapterPlan, plan_adapter, plan_refused
from lora_operator.plan.adapter_list import Keep, Serve
from lora_operator.plan.refresh import Epoch, parse_interval
from lora_operator.plan.wants import build_artifact
from tests.unit.builders import (
    COMMIT,
    OTHER_COMMIT,
    make_adapter,
    make_artifact,
    make_cache,
    make_module,
    make_pod,
    make_pods,
    make_view,
    ready_artifact,
    served_by,
    through_the_api,
    told,
)
from tests.unit.test_plan_adapter import BASE, NO_SECRET, SECRET, seen

READY_AT = datetime(2026, 1, 1, tzinfo=UTC)  # when artifacts of the builders became Ready
HOUR = timedelta(hours=1)
SOON = READY_AT + timedelta(minutes=5)


def wanted_of(adapter: LoRAAdapter, epoch: Epoch, credentials: Any = None) -> dict[str, Any]:
    return build_artifact(
        cache=make_cache(),
        source=adapter.spec.source,
        base_artifact=BASE,
        credentials=credentials,
        refresh=epoch.text,
    )


def key_of(adapter: LoRAAdapter, epoch: Epoch, credentials: Any = None) -> tuple[str, str]:
    metadata = wanted_of(adapter, epoch, credentials)["metadata"]
    return metadata["namespace"], metadata["name"]


def good(adapter: LoRAAdapter, epoch: Epoch = Epoch(), **more: Any) -> ModelArtifact:  # noqa: B008 - frozen
    wanted = wanted_of(adapter, epoch, more.get("credentials"))
    made = ready_artifact(wanted["metadata"]["name"], base=BASE, **more)
    return made.model_copy(update={"spec": ModelArtifactSpec.model_validate(wanted["spec"])})


def foreign(artifact: ModelArtifact) -> ModelArtifact:
    """Somebody's own artifact of that name, of other content, and Ready."""
    source = Source.model_validate({"huggingFace": {"repo": "org/other"}})
    return artifact.model_copy(update={"spec": artifact.spec.model_copy(update={"source": source})})


def bad(
    adapter: LoRAAdapter, epoch: Epoch, reason: str, message: str = "why", *, again: str | None = None
) -> ModelArtifact:
    failure = {"attempt": 1, "reason": reason, "message": message, "time": "2026-01-01T00:30:00Z"}
    status: dict[str, Any] = {"lastFailure": failure} if reason not in ("Queued", "Downloading") else {}
    status |= {"nextAttemptTime": again} if again else {}
    return make_artifact(
        key_of(adapter, epoch)[1], base=BASE, status=status, conditions={"Ready": ("False", reason, message)}
    )


def annotated(adapter: LoRAAdapter, value: str | None) -> LoRAAdapter:
    annotations = {} if value is None else {ANNOTATION_REFRESH: value}
    return adapter.model_copy(update={"metadata": adapter.metadata.model_copy(update={"annotations": annotations})})


def pods_of(artifact: ModelArtifact) -> Any:
    path = f"/model-cache/{artifact.status.path}"
    return make_pods(make_pod("a", make_view(make_module(path=path))))


def settle(adapter: LoRAAdapter, *artifacts: ModelArtifact, now: datetime = SOON, **more: Any) -> LoRAAdapter:
    """The adapter with the status that a look at this world leaves."""
    plan = plan_adapter(seen(adapter, *artifacts, served=pods_of(artifacts[0]), **more), now=now)
    assert plan.status is not None
    return adapter.model_copy(update={"status": through_the_api(plan.status)})


def look(adapter: LoRAAdapter, *artifacts: ModelArtifact, now: datetime = SOON, **more: Any) -> AdapterPlan:
    """A plan where the pods serve the first artifact."""
    return plan_adapter(seen(adapter, *artifacts, served=pods_of(artifacts[0]), **more), now=now)


SERVED = settle(make_adapter(), good(make_adapter()))
ASKED = annotated(SERVED, "1")
ONE = Epoch("1")


def message(plan: AdapterPlan, condition: str = "Ready") -> str:
    assert plan.status is not None
    status, _, text = told(plan.status.conditions)[condition]
    assert status == "True", text
    return text


def test_an_adapter_that_was_never_refreshed_has_the_name_that_it_always_had() -> None:
    assert Epoch().text is None
    assert SERVED.status.refresh is None
    assert SERVED.status.artifact_ref is not None
    assert SERVED.status.artifact_ref.name == key_of(SERVED, Epoch())[1]


def test_the_annotation_asks_for_another_artifact_and_what_is_served_stays_ready() -> None:
    plan = look(ASKED, good(ASKED))
    assert plan.artifact is not None
    assert plan.artifact["metadata"]["name"] == key_of(ASKED, ONE)[1]
    assert (plan.decision.reference.artifact, plan.decision.reference.refreshing) == (
        key_of(ASKED, Epoch()),
        key_of(ASKED, ONE),
    )
    module = served_by(plan.decision)
    assert module is not None
    assert module.path.endswith(COMMIT)
    assert message(plan) == "1 of 1 ready pods serve sql; a refresh is running (Queued)"
    assert message(plan, "Downloaded").endswith("; a refresh is running (Queued)")
    assert plan.status is not None
    assert plan.status.refresh is None, "what it speaks of is the content that is served"


@pytest.mark.parametrize("value", ["", "now", "2026-11-21", "x" * 5000, "ü\n"])
def test_any_value_will_do(value: str) -> None:
    adapter = annotated(SERVED, value)
    plan = look(adapter, good(adapter))
    assert plan.decision.reference.refreshing is not None
    adapter = settle(adapter, *[ready_artifact(plan.decision.reference.refreshing[1], base=BASE)])
    assert adapter.status.refresh is not None
    assert len(adapter.status.refresh.requested or "") <= 64
    assert (
        look(adapter, ready_artifact(plan.decision.reference.refreshing[1], base=BASE)).decision.reference.refreshing
        is None
    )


FAILURES = {
    "SourceUnreachable": "the last refresh failed, this content stays: SourceUnreachable: why",
    "Unauthorized": "the last refresh failed, this content stays: Unauthorized: why",
    "InvalidAdapter": "the last refresh failed, this content stays: InvalidAdapter: why",
    "Downloading": "a refresh is running (Downloading)",
}


@pytest.mark.parametrize("reason", FAILURES)
def test_a_refresh_that_fails_leaves_the_adapter_ready_and_says_so(reason: str) -> None:
    first = look(ASKED, good(ASKED), bad(ASKED, ONE, reason))
    assert message(first) == f"1 of 1 ready pods serve sql; {FAILURES[reason]}"
    assert first.status is not None
    stored = ASKED.model_copy(update={"status": through_the_api(first.status)})
    assert look(stored, good(ASKED), bad(ASKED, ONE, reason), now=SOON + HOUR).status == stored.status, "no flapping"
    since = {c.type: c.last_transition_time for c in SERVED.status.conditions}
    assert {c.type: c.last_transition_time for c in stored.status.conditions} == since


def test_a_refresh_that_is_done_is_served_and_the_old_artifact_no_longer_wanted() -> None:
    fresh = good(ASKED, ONE, commit=OTHER_COMMIT)
    plan = look(ASKED, good(ASKED), fresh)
    assert (plan.decision.reference.artifact, plan.decision.reference.refreshing) == (fresh.key, None)
    module = served_by(plan.decision)
    assert module is not None
    assert module.revision == OTHER_COMMIT
    after = settle(ASKED, fresh)
    assert after.status.refresh is not None
    assert (after.status.refresh.requested, after.status.resolved_revision) == ("1", OTHER_COMMIT)
    assert look(after, fresh).status == after.status


def test_a_refresh_whose_content_is_of_too_large_a_rank_has_failed() -> None:
    text = message(look(ASKED, good(ASKED), good(ASKED, ONE, rank=128)))
    assert "this content stays: RankTooLarge: the adapter's rank is 128" in text


def test_a_refresh_whose_artifact_can_not_be_made_has_failed() -> None:
    observation = seen(ASKED, good(ASKED), served=pods_of(good(ASKED)))
    cause = failing(Reason.NAME_TAKEN, "ModelArtifact serving/x exists with another spec: delete it")
    plan = plan_refused(observation, plan_adapter(observation, now=SOON), cause, now=SOON)
    assert "this content stays: NameTaken: ModelArtifact serving/x exists with another spec" in message(plan)
    module = served_by(plan.decision)
    assert module is not None
    assert plan.artifact is None


def test_what_somebody_made_by_hand_under_the_name_of_a_refresh_is_not_its_content() -> None:
    before = good(ASKED)
    plan = look(ASKED, before, foreign(good(ASKED, ONE, commit=OTHER_COMMIT)))
    assert plan.decision.reference.artifact == before.key
    module = served_by(plan.decision)
    assert module is not None
    assert module.revision == COMMIT
    name = key_of(ASKED, ONE)[1]
    cause = f"this content stays: NameTaken: ModelArtifact serving/{name} exists with another spec: delete it"
    assert cause in message(plan)


def test_what_somebody_made_by_hand_in_the_place_of_what_was_served_is_not_its_content() -> None:
    fresh = make_adapter()
    plan = look(settle(fresh, good(fresh)), foreign(good(fresh)))
    assert not isinstance(plan.decision.entry, Serve)
    assert plan.decision.entry == Keep()
    assert plan.status is not None
    assert told(plan.status.conditions)["Downloaded"][:2] == ("False", "NameTaken")


def test_a_refresh_lends_no_credentials_to_what_has_its_name() -> None:
    adapter = make_adapter(secret="hf")
    first = good(adapter, credentials=SECRET)
    asked = annotated(settle(adapter, first, credentials=SECRET), "1")
    observation = seen(asked, first, served=pods_of(first), credentials=SECRET)
    planned = plan_adapter(observation, now=SOON)
    assert planned.decision.reference.lent() == {first.key: SECRET, key_of(asked, ONE, SECRET): SECRET}
    refused = plan_refused(observation, planned, failing(Reason.NAME_TAKEN, "exists with another spec"), now=SOON)
    assert refused.decision.reference.lent() == {first.key: SECRET}


def test_a_change_of_the_spec_meanwhile_takes_effect_at_once_and_the_refresh_goes_on() -> None:
    renamed = ASKED.model_copy(
        update={
            "spec": ASKED.spec.model_copy(update={"served_name": "other"}),
            "metadata": ASKED.metadata.model_copy(update={"generation": 2}),
        }
    )
    decision = look(renamed, good(ASKED), bad(ASKED, ONE, "SourceUnreachable")).decision
    module = served_by(decision)
    assert module is not None
    assert (module.name, decision.reference.refreshing) == ("other", key_of(ASKED, ONE))


def test_another_source_has_nothing_to_do_with_what_was_served() -> None:
    other = annotated(make_adapter(revision="v2"), "1").model_copy(update={"status": SERVED.status})
    plan = look(other, good(ASKED))
    assert (plan.decision.reference.artifact, plan.decision.reference.refreshing) == (key_of(other, ONE), None)
    assert plan.decision.entry == Keep()


def test_an_annotation_that_is_taken_away_never_goes_back_in_time() -> None:
    fresh = good(ASKED, ONE, commit=OTHER_COMMIT)
    after = annotated(settle(ASKED, fresh), None)
    old = bad(after, Epoch(), "Queued", "wanted again: resolves main anew")
    plan = look(after, fresh, old)
    assert (plan.decision.reference.artifact, plan.decision.reference.refreshing) == (fresh.key, old.key)
    assert message(plan).endswith("a refresh is running (Queued)")


def test_a_secret_that_is_gone_holds_a_refresh_up_and_nothing_else() -> None:
    private = make_adapter(secret="hf")
    artifact = good(private, credentials=SECRET)
    served = settle(private, artifact, credentials=SECRET)
    plan = look(annotated(served, "1"), artifact, credentials=NO_SECRET)
    assert "the last refresh failed, this content stays: CredentialsNotFound: Secret team-a/hf" in message(plan)
    assert plan.status is not None
    assert plan.status.refresh is None
    again = look(annotated(served, "1"), artifact, credentials=SECRET)
    assert again.decision.reference.refreshing == key_of(private, ONE, SECRET), "it runs once the Secret is back"


def test_a_cache_that_is_away_ends_no_refresh() -> None:
    away = ReasonError(Reason.CACHE_NOT_READY, "none")
    plan = look(ASKED, good(ASKED), cache=away)
    assert plan.status is not None
    assert plan.status.refresh is None, "nothing was refreshed"
    back = ASKED.model_copy(update={"status": through_the_api(plan.status)})
    assert look(back, good(ASKED)).decision.reference.refreshing == key_of(ASKED, ONE)


def test_one_that_stands_by_for_its_name_is_refreshed_too() -> None:
    rival = make_adapter("older", created="2025-01-01T00:00:00Z")
    decision = look(ASKED, good(ASKED), rivals=(rival,)).decision
    assert (decision.reference.artifact, decision.reference.refreshing) == (key_of(ASKED, Epoch()), key_of(ASKED, ONE))


def test_a_folder_of_a_bucket_is_listed_anew() -> None:
    bucket = make_adapter().spec.model_copy(update={"source": Source.model_validate({"s3": {"bucket": "models"}})})
    adapter = make_adapter().model_copy(update={"spec": bucket})
    served = settle(adapter, good(adapter))
    assert look(annotated(served, "1"), good(adapter)).decision.reference.refreshing == key_of(adapter, ONE)


# By interval

HOURLY = settle(make_adapter(refreshInterval="1h"), good(make_adapter()))


def at(hours: float) -> datetime:
    return READY_AT + hours * HOUR


def due(hours: float) -> Epoch:
    return Epoch(None, at(hours))


def test_it_is_looked_at_again_when_the_interval_has_passed_since_the_content_was_resolved() -> None:
    plan = look(HOURLY, good(HOURLY), now=at(0.25))
    assert (plan.decision.reference.refreshing, plan.requeue_after) == (None, 2700.0)
    plan = look(HOURLY, good(HOURLY), now=at(1))
    assert (plan.decision.reference.refreshing, plan.requeue_after) == (key_of(HOURLY, due(1)), 3600.0)
    assert plan.status is not None
    assert plan.status.refresh is not None
    assert (plan.status.refresh.pending, plan.status.refresh.due) == (at(1), None)
    late = look(HOURLY, good(HOURLY), now=at(7.5))
    assert late.decision.reference.refreshing == key_of(HOURLY, due(7)), (
        "what was missed while nobody looked is done once"
    )


def test_one_that_goes_on_is_not_begun_anew_and_one_that_failed_for_good_is() -> None:
    pending = settle(HOURLY, good(HOURLY), now=at(1))
    for artifact in (
        bad(HOURLY, due(1), "Downloading"),
        bad(HOURLY, due(1), "SourceUnreachable", again="2026-01-01T04:00:00Z"),
    ):
        plan = look(pending, good(HOURLY), artifact, now=at(3.5))
        assert plan.decision.reference.refreshing == key_of(HOURLY, due(1))
    broken = bad(HOURLY, due(1), "InvalidAdapter")
    assert look(pending, good(HOURLY), broken, now=at(1.5)).decision.reference.refreshing == broken.key
    assert message(look(pending, good(HOURLY), broken, now=at(1.5))).endswith("; the next refresh is due at 02:00:00Z")
    assert look(pending, good(HOURLY), broken, now=at(2)).decision.reference.refreshing == key_of(HOURLY, due(2))


def test_one_whose_content_can_not_be_served_is_followed_by_the_next() -> None:
    pending = settle(HOURLY, good(HOURLY), now=at(1))
    large = good(HOURLY, due(1), rank=128)
    plan = look(pending, good(HOURLY), large, now=at(1.5))
    assert plan.decision.reference.refreshing == large.key
    assert message(plan).endswith("or raise spec.lora.maxLoraRank there; the next refresh is due at 02:00:00Z")
    assert look(pending, good(HOURLY), large, now=at(2)).decision.reference.refreshing == key_of(HOURLY, due(2))
    usable = good(HOURLY, due(1), commit=OTHER_COMMIT)
    assert look(pending, good(HOURLY), usable, now=at(2)).decision.reference.artifact == usable.key, (
        "one that is good is taken"
    )


def test_what_is_served_by_now_stays_when_the_content_before_is_gone_and_the_status_still_speaks_of_that() -> None:
    fresh = good(HOURLY, due(1), commit=OTHER_COMMIT)
    pending = settle(settle(HOURLY, good(HOURLY), now=at(1)), fresh, good(HOURLY), now=at(1.1))
    ready = fresh.status.conditions[0].model_copy(update={"last_transition_time": at(1.1)})
    fresh = fresh.model_copy(update={"status": fresh.status.model_copy(update={"conditions": (ready,)})})
    pending = settle(pending, fresh, now=at(2.1))
    assert pending.status.refresh is not None
    assert (pending.status.refresh.due, pending.status.refresh.pending) == (at(1), at(2.1))
    second = good(HOURLY, due(2.1))
    assert look(pending, second, fresh, now=at(2.2)).decision.reference.artifact == second.key
    for interval in ("1h", None):
        spec = pending.spec.model_copy(update={"refresh_interval": interval})
        plan = look(pending.model_copy(update={"spec": spec}), second, now=at(2.2))
        assert (plan.decision.reference.artifact, plan.decision.reference.refreshing) == (second.key, None)
        assert plan.status is not None
        assert plan.status.refresh is not None
        assert (plan.status.refresh.due, plan.status.refresh.pending) == (at(2.1), None)


def test_the_next_one_counts_from_the_last_that_was_done() -> None:
    fresh = good(HOURLY, due(1))
    ready = fresh.status.conditions[0].model_copy(update={"last_transition_time": at(1.1)})
    fresh = fresh.model_copy(update={"status": fresh.status.model_copy(update={"conditions": (ready,)})})
    done = settle(settle(HOURLY, good(HOURLY), now=at(1)), fresh, good(HOURLY), now=at(1.2))
    assert done.status.refresh is not None
    assert (done.status.refresh.due, done.status.refresh.pending) == (at(1), None)
    assert look(done, fresh, now=at(2)).decision.reference.refreshing is None
    assert look(done, fresh, now=at(2.1)).decision.reference.refreshing == key_of(HOURLY, due(2.1))
    without = done.model_copy(update={"spec": done.spec.model_copy(update={"refresh_interval": None})})
    plan = look(without, fresh, now=at(9))
    assert (plan.decision.reference.artifact, plan.decision.reference.refreshing, plan.requeue_after) == (
        fresh.key,
        None,
        None,
    )


def test_a_full_commit_is_never_resolved_anew_by_interval_but_on_demand() -> None:
    pinned = make_adapter(revision=COMMIT, refreshInterval="1h")
    pinned = settle(pinned, good(pinned))
    plan = look(pinned, good(pinned), now=at(50))
    assert (plan.decision.reference.refreshing, plan.requeue_after) == (None, None)
    assert look(annotated(pinned, "1"), good(pinned), now=at(50)).decision.reference.refreshing == key_of(pinned, ONE)


def test_nothing_is_refreshed_before_there_is_anything() -> None:
    adapter = annotated(make_adapter(refreshInterval="1m"), "1")
    plan = plan_adapter(seen(adapter), now=at(9))
    assert (plan.decision.reference.artifact, plan.decision.reference.refreshing) == (key_of(adapter, ONE), None)
    blocked = plan_adapter(seen(adapter, cache=ReasonError(Reason.CACHE_NOT_READY, "none")), now=at(9))
    assert blocked.decision.reference.refreshing is None


@pytest.mark.parametrize(
    ("text", "seconds"), [("30m", 1800), ("1h30m", 5400), ("90s", 90), ("1.5h", 5400), (None, None), ("", None)]
)
def test_durations(text: str | None, seconds: float | None) -> None:
    assert parse_interval(text) == (None if seconds is None else timedelta(seconds=seconds))
