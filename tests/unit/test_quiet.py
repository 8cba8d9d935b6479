"""What is not done: a state that passes in a moment is not told, and an engine that is as before is asked one thing only."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lora_operator.conditions import is_passing
from lora_operator.constants import Reason
from lora_operator.kube.kinds import Kind
from lora_operator.plan.adapter_list import ModuleList
from lora_operator.reconcile.engine_pod import POLL_IDLE, reconcile_pod
from lora_operator.reconcile.services import GATHER_SECONDS, PASSING_SECONDS
from lora_operator.reconcile.store import Key
from lora_operator.vllm import KitState, LoadedModule, ModuleFailure, RetiredModule, ServedModel, WaitingModule
from tests.unit.builders import Conditions, engine_pod, make_deployment, make_module, make_workload, not_ready, ready
from tests.unit.fake_clock import FakeClock
from tests.unit.fake_kube import FakeKube, Json
from tests.unit.small_world import SmallWorld

FLEET = Key(Kind.VLLM_DEPLOYMENT, "serving", "llama")
POD = Key(Kind.POD, "serving", "llama-0")


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


class Engine:
    """One engine with its kit, as the client sees it; counts what it is asked."""

    def __init__(self) -> None:
        module = make_module()
        loaded = LoadedModule(name="sql", internal_name="sql", path=module.path, base_model_name=module.base_model_name)
        self.state_now = KitState(
            kit="k", vllm_version="0.32.0", instance="i", list_generation=3, settled=True, loaded=(loaded,)
        )
        self.listed = [ServedModel(id="sql", root=module.path, parent=module.base_model_name)]
        self.asked: list[str] = []

    async def gate_is_closed(self, _: str) -> bool:
        """It is."""
        self.asked.append("gate")
        return True

    async def state(self, *_: Any) -> KitState:
        """The kit's."""
        self.asked.append("state")
        return self.state_now

    async def put_modules(self, *_: Any, **__: Any) -> KitState:
        """The kit's state after it took a list."""
        self.asked.append("modules")
        return self.state_now

    async def models(self, *_: Any) -> tuple[ServedModel, ...]:
        """What is listed."""
        self.asked.append("models")
        return tuple(self.listed)


class Looks(SmallWorld):
    """Looks at one pod whose list has generation 3."""

    def __init__(self) -> None:
        self.engine = Engine()
        super().__init__(engines=self.engine, master_key=b"key")
        self.put(Kind.VLLM_DEPLOYMENT, make_deployment())
        self.put(Kind.DEPLOYMENT, make_workload())
        self.put(Kind.POD, engine_pod() | {"spec": {"containers": []}})
        record = self.context.records.deployments["serving", "llama"]
        record.replica_sets["uid-rs"] = "uid-deploy"
        record.modules = ModuleList(deployment="serving/llama", generation=3, modules=(make_module(),))

    async def look(self) -> tuple[list[str], float | None]:
        """What one look asked, and when the next one is due."""
        self.engine.asked.clear()
        again = await reconcile_pod(self.context, POD)
        return list(self.engine.asked), again


async def test_an_engine_that_is_as_before_is_asked_one_thing() -> None:
    looks = Looks()
    asked, _ = await looks.look()
    assert asked == ["gate", "state", "models"]
    asked, again = await looks.look()
    assert asked == ["models"]
    assert again is not None
    assert again >= POLL_IDLE * 0.8


async def test_an_engine_that_lists_something_else_is_looked_at_as_a_whole() -> None:
    looks = Looks()
    await looks.look()
    looks.engine.listed.append(ServedModel(id="by-hand", root="/elsewhere", parent="meta/Llama"))
    asked, _ = await looks.look()
    assert asked == ["models", "state", "models"]
    view = looks.context.records.pods["serving", "llama-0"].view
    assert view is not None
    assert view.orphans == ("by-hand",)


async def test_a_newer_list_is_pushed_without_another_question_before() -> None:
    looks = Looks()
    await looks.look()
    record = looks.context.records.deployments["serving", "llama"]
    assert record.modules is not None
    record.modules = replace(record.modules, generation=4)
    asked, _ = await looks.look()
    assert asked[0] == "modules"


async def test_a_pod_with_a_failure_is_asked_for_it_at_every_look() -> None:
    looks = Looks()
    failure = ModuleFailure(name="sql", path="/x", stage="engine", message="no")
    looks.engine.state_now = replace(looks.engine.state_now, failures=(failure,))
    await looks.look()
    asked, _ = await looks.look()
    assert asked == ["state", "models"]


async def test_a_pod_that_may_fail_to_load_one_at_its_first_request_is_asked_at_every_look() -> None:
    looks = Looks()
    looks.engine.state_now = replace(looks.engine.state_now, waiting=(WaitingModule(name="lazy", path="/x"),))
    await looks.look()
    asked, _ = await looks.look()
    assert asked == ["state", "models"]


async def test_a_pod_is_asked_soon_again_for_content_that_requests_may_still_use() -> None:
    looks = Looks()
    retired = RetiredModule(internal_name="gone", path="/model-cache/artifacts/gone-view", running=True)
    looks.engine.state_now = replace(looks.engine.state_now, retired=(retired,))
    _, again = await looks.look()
    assert again is not None
    assert again <= 5, "who waits for the room waits for this look"
    looks.engine.state_now = replace(looks.engine.state_now, retired=())
    asked, again = await looks.look()
    assert asked == ["state", "models"], "the engine's own list told nothing of it before either"
    view = looks.context.records.pods["serving", "llama-0"].view
    assert view is not None
    assert view.retired == ()
    assert again is not None
    assert again >= POLL_IDLE * 0.8


async def test_a_list_of_the_same_generation_that_tells_this_pod_something_else_is_pushed() -> None:
    looks = Looks()
    record = looks.context.records.deployments["serving", "llama"]
    assert record.modules is not None
    looks.engine.state_now = replace(looks.engine.state_now, list_digest=record.modules.digest)
    await looks.look()
    record.modules = replace(record.modules, modules=(make_module(lazy=True),))
    asked, _ = await looks.look()
    assert asked[0] == "modules"


async def test_a_pod_with_a_list_of_its_own_takes_none_whatever_its_digest() -> None:
    looks = Looks()
    looks.engine.state_now = replace(looks.engine.state_now, list_digest="other", update_strategy="Rollout")
    for _ in range(2):
        asked, again = await looks.look()
        assert "modules" not in asked
        assert again is not None
        assert again >= POLL_IDLE * 0.8
