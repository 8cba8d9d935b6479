"""When a source that has not changed is resolved anew, and what is said of it meanwhile.

A refresh is another artifact for the same want: the annotation's value, or the time at which the interval had passed, is part of its
name. What is served stays until the new artifact is Ready. All of it is found again from the status and the artifacts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from lora_operator.api.adapter import RefreshState
from lora_operator.api.artifact import ModelArtifact
from lora_operator.api.sources.source import Source
from lora_operator.conditions import Verdict, find, is_true
from lora_operator.constants import ANNOTATION_REFRESH, REASONS, Condition, Reason, Retry
from lora_operator.names import bounded, parse_duration

_MAX_VALUE = 64


@dataclass(frozen=True)
class Epoch:
    """Which refresh an artifact is for; Epoch() is the first resolving."""

    requested: str | None = None  # the annotation's value
    due: datetime | None = None  # when the interval had passed

    @property
    def text(self) -> str | None:
        """As part of an artifact's want; None for the first resolving."""
        parts = [f"requested={self.requested}"] if self.requested is not None else []
        parts += [f"due={self.due:%Y-%m-%dT%H:%M:%SZ}"] if self.due is not None else []
        return " ".join(parts) or None


@dataclass(frozen=True)
class Refresh:
    """What is wanted now, and what is served until it is there."""

    wanted: Epoch
    served: Epoch  # what the status speaks of
    content: ModelArtifact | None  # Ready, and of the same want but for the epoch; None where nothing is served yet
    again_at: datetime | None  # when the interval will have passed next

    @property
    def is_due(self) -> bool:
        """Whether there is something to refresh, and it is not refreshed yet."""
        return self.content is not None and self.wanted != self.served

    def state(self, *, done: bool) -> RefreshState | None:
        """For the status, where the wanted content is served (`done`) or still what was served before."""
        epoch = self.wanted if done else self.served
        pending = None if done or self.wanted.due == self.served.due else self.wanted.due
        if epoch == Epoch() and pending is None:
            return None
        return RefreshState(requested=epoch.requested, due=epoch.due, pending=pending)


def requested(annotations: Mapping[str, str]) -> str | None:
    """The refresh annotation's value, cut to what a status holds."""
    value = annotations.get(ANNOTATION_REFRESH)
    return None if value is None else bounded(value, _MAX_VALUE)


def parse_interval(text: str | None) -> timedelta | None:
    """A duration like 1h30m; None where there is none."""
    seconds = parse_duration(text)
    return None if seconds is None else timedelta(seconds=seconds)


def plan_refresh(
    *,
    annotations: Mapping[str, str],
    interval: timedelta | None,
    source: Source,
    state: RefreshState | None,
    artifact_at: Callable[[Epoch], ModelArtifact | None],
    is_usable: Callable[[ModelArtifact], bool],
    now: datetime,
) -> Refresh:
    """Which epoch of a want is wanted. `artifact_at` finds the want's artifact of an epoch, `is_usable` judges one that is Ready."""
    served = Epoch(state.requested, state.due) if state else Epoch()
    content = artifact_at(served)
    if content is not None and not is_true(content.status.conditions, Condition.READY):
        content = None
    asked = requested(annotations)
    if source.member.pinned:
        return Refresh(Epoch(asked), served, content, None)
    due, again_at = served.due, None
    pending = state.pending if state else None
    if content is None and pending is not None:
        due = pending  # what was served is gone: there is no going back from what was begun
    ready = find(content.status.conditions, Condition.READY) if content else None
    if interval is not None and ready is not None:
        passed = max(0, (now - ready.last_transition_time) // interval)
        again_at = ready.last_transition_time + (passed + 1) * interval
        if passed:
            due = ready.last_transition_time + passed * interval
            if pending is not None and ready.last_transition_time < pending < due:
                given_up = _given_up(artifact_at(Epoch(asked, pending)), is_usable)
                due = due if given_up else pending  # one that goes on, or is tried again, is not begun anew
    return Refresh(Epoch(asked, due), served, content, again_at)


def _given_up(artifact: ModelArtifact | None, is_usable: Callable[[ModelArtifact], bool]) -> bool:
    """Whether an artifact failed for good, or is there and can't be served."""
    if artifact is None:
        return False
    if is_true(artifact.status.conditions, Condition.READY):
        return not is_usable(artifact)
    return artifact.status.last_failure is not None and artifact.status.next_attempt_time is None


def describe(pending: Verdict, again_at: datetime | None = None) -> str:
    """What a reader is told of a refresh that is not done, to be put behind what is true."""
    info = REASONS[pending.reason]
    if info.retry is Retry.WAIT and not info.stalled:
        return f"; a refresh is running ({pending.reason})"
    note = f"; the last refresh failed, this content stays: {pending.reason}: {pending.message}"
    given_up = info.retry is Retry.NONE or pending.reason is Reason.RANK_TOO_LARGE
    if given_up and again_at is not None:
        note += f"; the next refresh is due at {again_at:%H:%M:%S}Z"
    return note
