"""Conditions as values: set one, keep its transition time when its status did not change, read one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime

from lora_operator.api.common import StatusCondition
from lora_operator.constants import REASONS, Condition, Reason

MAX_MESSAGE = 2048
_PASSING = (Reason.LOADING, Reason.PARTIALLY_LOADED, Reason.SYNC_PENDING)


@dataclass(frozen=True)
class Verdict:
    """What a condition is found to be."""

    status: bool | None  # None is Unknown
    reason: Reason
    message: str = ""

    @property
    def is_true(self) -> bool:
        """Whether it holds for certain: Unknown is not true."""
        return self.status is True


def ok(reason: Reason, message: str = "") -> Verdict:
    """A condition that holds; most need no message."""
    return Verdict(True, reason, message)


def failing(reason: Reason, message: str) -> Verdict:
    """A condition that does not hold."""
    return Verdict(False, reason, message)


def with_ready_and_stalled(verdicts: Mapping[Condition, Verdict], ready_message: str) -> dict[Condition, Verdict]:
    """`verdicts` followed by Ready (the first that does not hold, else True) and, where only a user can help, Stalled."""
    first = next((verdict for verdict in verdicts.values() if not verdict.is_true), None)
    result = dict(verdicts)
    result[Condition.READY] = ok(Reason.READY, ready_message) if first is None else failing(first.reason, first.message)
    return with_stalled(result)


def with_stalled(verdicts: Mapping[Condition, Verdict]) -> dict[Condition, Verdict]:
    """`verdicts` followed by Stalled=True when Ready=False has a reason that only a change by a user can help."""
    result = dict(verdicts)
    ready = result[Condition.READY]
    if not ready.is_true and REASONS[ready.reason].stalled:
        result[Condition.STALLED] = Verdict(True, ready.reason, ready.message)
    return result


def merge(
    previous: Iterable[StatusCondition],
    verdicts: Mapping[Condition, Verdict],
    *,
    generation: int,
    now: datetime,
) -> tuple[StatusCondition, ...]:
    """The conditions for `verdicts`: a condition whose status did not change keeps its lastTransitionTime.

    Condition types that `verdicts` does not name are dropped.
    """
    before = {condition.type: condition for condition in previous}
    result = []
    for type_, verdict in verdicts.items():
        status = {True: "True", False: "False", None: "Unknown"}[verdict.status]
        old = before.get(type_)
        result.append(
            StatusCondition(
                type=type_,
                status=status,
                reason=verdict.reason,
                message=verdict.message[:MAX_MESSAGE],
                last_transition_time=(
                    old.last_transition_time if old and old.status == status else now.replace(microsecond=0)
                ),
                observed_generation=generation,
            )
        )
    return tuple(result)


def reason_of(text: str) -> Reason:
    """A stored reason; JobFailed for one that only a later version knows, so that a roll-back leaves nothing stuck."""
    try:
        return Reason(text)
    except ValueError:
        return Reason.JOB_FAILED


def find(conditions: Iterable[StatusCondition], type_: Condition) -> StatusCondition | None:
    """The condition of that type, if there is one."""
    return next((condition for condition in conditions if condition.type == type_), None)


def is_true(conditions: Iterable[StatusCondition], type_: Condition) -> bool:
    """Whether the condition of that type is there and True."""
    condition = find(conditions, type_)
    return condition is not None and condition.status == "True"


def is_passing(conditions: Iterable[StatusCondition]) -> bool:
    """Whether an object is not Ready only because pods have not yet acknowledged what they were just told."""
    ready = find(conditions, Condition.READY)
    return ready is not None and ready.status != "True" and ready.reason in _PASSING
