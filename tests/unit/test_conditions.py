"""Conditions: what a reader sees follows from the verdicts alone, and a transition time tells of a transition."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_operator.api.common import StatusCondition
from lora_operator.conditions import (
    MAX_MESSAGE,
    Verdict,
    failing,
    find,
    is_true,
    merge,
    ok,
    with_ready_and_stalled,
    with_stalled,
)
from lora_operator.constants import REASONS, Condition, Reason
from tests.unit.builders import LATER, NOW, through_the_api, told

ACCEPTED, DOWNLOADED, LOADED = Condition.ACCEPTED, Condition.DOWNLOADED, Condition.LOADED

READY_TABLE: dict[str, tuple[dict[Condition, Verdict], dict[str, tuple[str, str, str]]]] = {
    "Ready is True, with its own message, when all the others hold": (
        {ACCEPTED: ok(Reason.ACCEPTED), LOADED: ok(Reason.LOADED, "2 of 2")},
        {"Ready": ("True", "Ready", "all is well")},
    ),
    "Ready has reason and message of the first that does not hold": (
        {
            ACCEPTED: ok(Reason.ACCEPTED),
            DOWNLOADED: failing(Reason.DOWNLOADING, "40% of 1Gi"),
            LOADED: failing(Reason.NOT_DOWNLOADED, "not looked at"),
        },
        {"Ready": ("False", "Downloading", "40% of 1Gi")},
    ),
    "an Unknown verdict is not True": (
        {ACCEPTED: Verdict(None, Reason.NAMESPACE_NOT_ALLOWED, "labels are not known")},
        {
            "Ready": ("False", "NamespaceNotAllowed", "labels are not known"),
            "Stalled": ("True", "NamespaceNotAllowed", "labels are not known"),
        },
    ),
    "Stalled stands beside Ready=False when only a user can help": (
        {ACCEPTED: failing(Reason.NAME_CONFLICT, "taken")},
        {"Ready": ("False", "NameConflict", "taken"), "Stalled": ("True", "NameConflict", "taken")},
    ),
    "Stalled follows the first reason, not a later one": (
        {DOWNLOADED: failing(Reason.DOWNLOADING, "1%"), LOADED: failing(Reason.GATE_MISSING, "open")},
        {"Ready": ("False", "Downloading", "1%")},
    ),
}


@pytest.mark.parametrize("case", READY_TABLE)
def test_ready_and_stalled(case: str) -> None:
    verdicts, expected = READY_TABLE[case]
    result = with_ready_and_stalled(verdicts, "all is well")
    assert list(result)[: len(verdicts)] == list(verdicts)
    shown = told(merge((), result, generation=1, now=NOW))
    assert {key: value for key, value in shown.items() if key in ("Ready", "Stalled")} == expected


@pytest.mark.parametrize("reason", [r for r in Reason if REASONS[r].stalled])
def test_every_reason_that_only_a_user_can_help_stalls(reason: Reason) -> None:
    result = with_stalled({Condition.READY: failing(reason, "m")})
    assert result[Condition.STALLED] == Verdict(True, reason, "m")


@pytest.mark.parametrize("reason", [r for r in Reason if not REASONS[r].stalled])
def test_no_other_reason_stalls(reason: Reason) -> None:
    assert Condition.STALLED not in with_stalled({Condition.READY: failing(reason, "m")})


def test_a_true_ready_never_stalls_whatever_its_reason() -> None:
    assert Condition.STALLED not in with_stalled({Condition.READY: ok(Reason.NAME_CONFLICT)})


def condition(status: str = "True", reason: str = "Ready", at: datetime = NOW) -> StatusCondition:
    return StatusCondition.model_validate(
        {"type": "Ready", "status": status, "reason": reason, "message": "m", "lastTransitionTime": at}
    )


def test_a_changed_reason_is_no_transition() -> None:
    before = condition("False", "Queued")
    (after,) = merge([before], {Condition.READY: failing(Reason.DOWNLOADING, "1%")}, generation=2, now=LATER)
    assert (after.reason, after.message, after.observed_generation) == ("Downloading", "1%", 2)
    assert after.last_transition_time == NOW


def test_a_changed_status_is_one_and_has_whole_seconds_as_the_api_server_keeps_them() -> None:
    now = LATER + timedelta(microseconds=123456)
    (after,) = merge([condition("False")], {Condition.READY: ok(Reason.READY)}, generation=1, now=now)
    assert after.last_transition_time == LATER


def test_conditions_that_are_not_named_go() -> None:
    before = merge((), with_stalled({Condition.READY: failing(Reason.NAME_CONFLICT, "x")}), generation=1, now=NOW)
    assert {c.type for c in before} == {"Ready", "Stalled"}
    after = merge(before, with_stalled({Condition.READY: ok(Reason.READY)}), generation=1, now=LATER)
    assert told(after) == {"Ready": ("True", "Ready", "")}


def test_a_message_is_cut_to_what_a_status_should_hold() -> None:
    (after,) = merge((), {Condition.READY: failing(Reason.JOB_FAILED, "x" * 9000)}, generation=1, now=NOW)
    assert len(after.message) == MAX_MESSAGE


def test_find_and_is_true() -> None:
    conditions = (condition("False"),)
    assert find(conditions, Condition.READY) is conditions[0]
    assert find(conditions, Condition.LOADED) is None
    assert not is_true(conditions, Condition.READY)
    assert not is_true(conditions, Condition.LOADED)
    assert is_true((condition("True"),), Condition.READY)


verdicts_strategy = st.dictionaries(
    st.sampled_from(list(Condition)),
    st.builds(
        Verdict,
        st.sampled_from([True, False, None]),
        st.sampled_from(list(Reason)),
        st.text(max_size=50),
    ),
)
moments = st.datetimes(min_value=datetime(2020, 1, 1), max_value=datetime(2040, 1, 1), timezones=st.just(UTC))


@given(first=verdicts_strategy, second=verdicts_strategy, now=moments, later=moments)
def test_the_same_verdicts_again_change_nothing(
    first: dict[Condition, Verdict], second: dict[Condition, Verdict], now: datetime, later: datetime
) -> None:
    before = merge((), first, generation=1, now=now)
    once = merge(before, second, generation=2, now=now)
    stored = tuple(through_the_api(c) for c in once)
    assert stored == once
    assert merge(stored, second, generation=2, now=later) == once
