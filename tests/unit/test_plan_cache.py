"""A ModelCache says whether its claim can be used, and how soon it looks again."""

from __future__ import annotations

from typing import Any

import pytest

from lora_operator.api import ModelArtifact
from lora_operator.plan.cache import CacheObservation, plan_cache
from tests.unit.builders import (
    LATER,
    NOW,
    make_artifact,
    make_cache,
    not_ready,
    ready_artifact,
    through_the_api,
    told,
)


def claim(phase: str | None, **spec: Any) -> dict[str, Any]:
    status = {"phase": phase} if phase else {}
    return {
        "metadata": {"name": "models"},
        "spec": spec,
        "status": status | {"capacity": {"storage": "10Gi"}, "accessModes": ["ReadWriteMany"]},
    }


def unwritable(message: str, time: str = "2026-01-01T00:00:00Z", **more: Any) -> ModelArtifact:
    failure = {"attempt": 1, "reason": "CacheNotWritable", "message": message, "time": time}
    return make_artifact(status={"lastFailure": failure}, conditions=not_ready("CacheNotWritable", message), **more)


WORDS = "user 10001 may not write to /model-cache"
Case = tuple[dict[str, Any] | None, list[ModelArtifact], dict[str, tuple[str, str, str]], float]
CACHES: dict[str, Case] = {
    "a bound claim": (
        claim("Bound"),
        [],
        {"Ready": ("True", "Bound", "PersistentVolumeClaim models is bound")},
        300,
    ),
    "no claim": (
        None,
        [],
        {
            type_: (
                status,
                "ClaimNotFound",
                "PersistentVolumeClaim serving/models does not exist: create it or change spec.storage.existingClaim",
            )
            for type_, status in (("Ready", "False"), ("Stalled", "True"))
        },
        5,
    ),
    "a claim that waits": (
        claim("Pending", storageClassName="nfs"),
        [],
        {
            "Ready": (
                "False",
                "ClaimPending",
                "PersistentVolumeClaim serving/models is not bound: class nfs; see its events",
            )
        },
        3,
    ),
    "a claim that nobody has looked at yet": (
        claim(None),
        [],
        {
            "Ready": (
                "False",
                "ClaimPending",
                "PersistentVolumeClaim serving/models is not bound: class none; see its events",
            )
        },
        3,
    ),
    "a claim whose volume is gone": (
        claim("Lost"),
        [],
        {
            type_: (status, "ClaimNotFound", "PersistentVolumeClaim serving/models has lost its volume")
            for type_, status in (("Ready", "False"), ("Stalled", "True"))
        },
        5,
    ),
    "a volume that Jobs can't write to": (
        claim("Bound"),
        [unwritable("old words"), unwritable(WORDS, "2026-01-01T00:00:09Z")],
        {type_: (status, "CacheNotWritable", WORDS) for type_, status in (("Ready", "False"), ("Stalled", "True"))},
        60,
    ),
    "one that could be written since": (
        claim("Bound"),
        [ready_artifact(status={"lastFailure": unwritable("x").to_wire()["status"]["lastFailure"]})],
        {"Ready": ("True", "Bound", "PersistentVolumeClaim models is bound")},
        300,
    ),
    "a failure of another kind says nothing of the cache": (
        claim("Bound"),
        [make_artifact(conditions=not_ready("Unauthorized"))],
        {"Ready": ("True", "Bound", "PersistentVolumeClaim models is bound")},
        300,
    ),
}


@pytest.mark.parametrize("case", CACHES)
def test_plan_cache(case: str) -> None:
    seen_claim, artifacts, conditions, again = CACHES[case]
    cache = make_cache(conditions={})
    status, seconds = plan_cache(CacheObservation(cache=cache, claim=seen_claim, artifacts=artifacts), now=NOW)
    assert told(status.conditions) == conditions
    assert seconds == again
    assert (status.claim_name, status.observed_generation) == ("models", 1)
    stored = cache.model_copy(update={"status": through_the_api(status)})
    for now in (NOW, LATER):
        assert plan_cache(CacheObservation(stored, seen_claim, artifacts), now=now) == (status, seconds)


def test_what_is_in_it() -> None:
    artifacts = [
        ready_artifact("a"),
        ready_artifact("b"),
        make_artifact("c", status={"sizeBytes": 10**9}, conditions=not_ready("Downloading")),
    ]
    status, _ = plan_cache(CacheObservation(make_cache(), claim("Bound"), artifacts), now=NOW)
    assert (status.artifacts, status.size) == (2, "256Ki")
    assert (status.capacity, status.access_modes) == ("10Gi", ("ReadWriteMany",))


def test_nothing_is_claimed_of_a_claim_that_is_not_there() -> None:
    status, _ = plan_cache(CacheObservation(make_cache(), None, []), now=NOW)
    assert (status.capacity, status.access_modes, status.artifacts, status.size) == (None, None, 0, "0")
