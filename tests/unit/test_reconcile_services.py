"""Statuses and when they are written: a state that passes in a moment is not reported, and others are at once."""

from __future__ import annotations

from typing import Any

import pytest

from lora_operator.conditions import is_passing
from lora_operator.constants import Reason
from lora_operator.kube.kinds import Kind
from lora_operator.reconcile.services import GATHER_SECONDS, PASSING_SECONDS
from lora_operator.reconcile.store import Key
from tests.unit.builders import Conditions, make_deployment, not_ready, ready
from tests.unit.fake_clock import FakeClock
from tests.unit.fake_kube import FakeKube, Json
from tests.unit.small_world import SmallWorld

FLEET = Key(Kind.VLLM_DEPLOYMENT, "serving", "llama")


class Meanwhile(FakeKube):
    """Its answers to statuses have what somebody changed of the metadata since the pass began."""

    def __init__(self) -> None:
        super().__init__()
        self.meanwhile: Json = {}

    async def apply_status(self, *args: Any, **more: Any) -> Json:
        body = await super().apply_status(*args, **more)
        return body | {"metadata": body["metadata"] | self.meanwhile}


class Writer(SmallWorld):
    """The writer of statuses, with a clock of the test's own."""

    clock: FakeClock
    kube: Meanwhile

    def __init__(self) -> None:
        super().__init__(kube=Meanwhile(), clock=FakeClock())
        self.kube.put(make_deployment().to_wire(), FLEET.kind.value)

    @property
    def reasons(self) -> list[str]:
        """The reasons of Ready that were written, in order."""
        return [status["conditions"][0]["reason"] for status in self.kube.statuses]

    async def write(self, conditions: Conditions, *, over: Conditions | None = None) -> bool:
        """Has a status written over what the object has."""
        old, new = make_deployment(conditions=ready() if over is None else over), make_deployment(conditions=conditions)
        return await self.context.statuses.write(old, new.status)


@pytest.mark.parametrize(
    ("sentence", "conditions", "passing"),
    [
        ("pods that were told a moment ago", not_ready(Reason.SYNC_PENDING), True),
        ("an adapter that is being loaded", not_ready(Reason.LOADING), True),
        ("one that some pods have", not_ready(Reason.PARTIALLY_LOADED), True),
        ("Ready", ready(), False),
        ("nothing said yet", {}, False),
        ("an engine's refusal", not_ready(Reason.ENGINE_REFUSED), False),
        ("an engine that does not answer", not_ready(Reason.ENGINE_UNREACHABLE), False),
        ("no pod at all", not_ready(Reason.NO_READY_PODS), False),
        ("a download", not_ready(Reason.DOWNLOADING), False),
    ],
)
def test_passing_is(sentence: str, conditions: Conditions, passing: bool) -> None:
    assert is_passing(make_deployment(conditions=conditions).status.conditions) is passing, sentence


async def test_what_passes_at_once_is_never_written() -> None:
    writer = Writer()
    assert not await writer.write(not_ready(Reason.SYNC_PENDING))
    [(key, after)] = writer.enqueued
    assert key == FLEET
    assert 0 < after <= PASSING_SECONDS + 0.001
    writer.clock.seconds += 0.05
    assert not await writer.write(ready("3 adapters"), over=ready("2 adapters"))
    writer.clock.seconds += PASSING_SECONDS
    assert await writer.write(ready("3 adapters"), over=ready("2 adapters"))
    assert writer.reasons == ["Ready"]


async def test_what_lasts_is_written_and_from_then_on_each_change_of_it() -> None:
    writer = Writer()
    assert not await writer.write(not_ready(Reason.LOADING))
    writer.clock.seconds += PASSING_SECONDS + 0.01
    assert await writer.write(not_ready(Reason.LOADING))
    assert await writer.write(not_ready(Reason.PARTIALLY_LOADED, "1 of 2"), over=not_ready(Reason.LOADING))
    assert writer.reasons == ["Loading", "PartiallyLoaded"]


async def test_after_it_passed_the_next_one_is_waited_for_again() -> None:
    writer = Writer()
    assert not await writer.write(not_ready(Reason.SYNC_PENDING))
    assert not await writer.write(ready()), "it is what stands there"
    writer.clock.seconds += PASSING_SECONDS * 2
    assert not await writer.write(not_ready(Reason.SYNC_PENDING))
    assert writer.reasons == []


async def test_changes_that_leave_ready_alone_are_gathered() -> None:
    writer = Writer()
    assert not await writer.write(ready("3 adapters"), over=ready("2 adapters"))
    writer.clock.seconds += GATHER_SECONDS / 2
    assert not await writer.write(ready("4 adapters"), over=ready("2 adapters"))
    writer.clock.seconds += GATHER_SECONDS / 2 + 0.01
    assert await writer.write(ready("5 adapters"), over=ready("2 adapters"))
    assert not await writer.write(ready("6 adapters"), over=ready("5 adapters")), "the next ones are gathered again"


async def test_becoming_ready_is_written_at_once() -> None:
    writer = Writer()
    assert not await writer.write(not_ready(Reason.LOADING), over={})
    assert await writer.write(ready(), over={})


async def test_a_refusal_is_written_at_once() -> None:
    writer = Writer()
    assert await writer.write(not_ready(Reason.ENGINE_REFUSED))
    assert writer.reasons == ["EngineRefused"]


@pytest.mark.parametrize(
    "meanwhile",
    [
        {"generation": 2},
        {"annotations": {"lora-operator.dev/refresh": "now"}},
        {"labels": {"app.kubernetes.io/managed-by": "somebody-else"}},
        {"deletionTimestamp": "2026-01-01T00:00:00Z"},
        {"uid": "another"},
    ],
    ids=lambda change: next(iter(change)),
)
async def test_a_change_that_comes_just_before_a_status_write_is_looked_at_at_once(meanwhile: dict[str, Any]) -> None:
    writer = Writer()
    assert await writer.write(not_ready(Reason.ENGINE_REFUSED))
    assert FLEET not in [key for key, _ in writer.enqueued], "it is what was just written"
    writer = Writer()
    writer.kube.meanwhile = meanwhile
    assert await writer.write(not_ready(Reason.ENGINE_REFUSED))
    assert (FLEET, 0.0) in writer.enqueued, "the watch will bring it as no news"
