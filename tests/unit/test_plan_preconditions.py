"""What a download that waits for room says of what is done about it."""

from __future__ import annotations

from typing import Any

import pytest

from lora_operator.api.artifact import Failure, ModelArtifact
from lora_operator.constants import Reason
from lora_operator.plan.artifact import ArtifactObservation, plan_artifact
from tests.unit.builders import NOW, make_artifact, make_cache, not_ready, told

SHORT: dict[str, Any] = {
    "attempt": 1,
    "reason": "InsufficientSpace",
    "message": "5Gi are needed and 1Gi is free",
    "time": "2026-01-02T03:00:00Z",
}
HELD_UP = {"Ready": ("True", "Bound", ""), "EvictionHeldUp": ("True", "EvictionWaits", "waits: pod x can't be asked")}


def said(*, failure: dict[str, Any] = SHORT, cache: dict[str, Any], **more: Any) -> str:
    status = {"lastFailure": failure, "finishedAttempt": 1, "nextAttemptTime": "2026-01-02T03:09:00Z"} | more
    artifact: ModelArtifact = make_artifact(status=status, conditions=not_ready(failure["reason"]))
    seen = ArtifactObservation(
        artifact, make_cache(**cache), None, wanted=True, secret=None, jobs=(), progress=None, evicting=bool(more)
    )
    status_ = plan_artifact(seen, now=NOW).status
    assert status_ is not None
    return told(status_.conditions)["Ready"][2]


def test_one_for_which_no_room_can_be_made_says_why() -> None:
    message = said(cache={"conditions": HELD_UP})
    assert message == (
        "5Gi are needed and 1Gi is free; attempt 1 failed, tried again at 03:09:00Z; ModelCache serving/default can't make room: "
        "waits: pod x can't be asked"
    )


@pytest.mark.parametrize(
    ("failure", "conditions"),
    [
        (SHORT, HELD_UP | {"EvictionHeldUp": ("False", "NotHeldUp", "")}),
        (SHORT | {"reason": "SourceUnreachable"}, HELD_UP),
    ],
    ids=["nothing is held up", "it does not lack room"],
)
def test_others_don_t_speak_of_it(failure: dict[str, Any], conditions: dict[str, Any]) -> None:
    assert "can't make room" not in said(failure=failure, cache={"conditions": conditions})
    assert Failure.model_validate(failure).reason in (Reason.INSUFFICIENT_SPACE, Reason.SOURCE_UNREACHABLE)


def test_one_that_waits_for_an_eviction_says_what_keeps_that_from_starting() -> None:
    eviction = {"running": True, "message": "pod e: 0/3 nodes are available"}
    status = {"claimName": "models", "accessModes": ["ReadWriteMany"], "eviction": eviction}
    message = said(cache={"status": status}, nextAttemptTime="2026-01-02T03:01:00Z")
    assert message.endswith(
        "is being removed from ModelCache serving/default, which comes first: pod e: 0/3 nodes are available"
    )
