"""A bug of ours in one object's pass is told on that object, and keeps nobody else from anything."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from lora_operator.constants import API_VERSION
from lora_operator.errors import UnavailableError
from lora_operator.kube.kinds import Kind
from lora_operator.plan.fair_share import Ticket
from lora_operator.reconcile import dispatch
from lora_operator.reconcile.dispatch import Reconcile
from lora_operator.reconcile.faults import describe_fault, settle_fault
from lora_operator.reconcile.own_pods import observe_pods
from lora_operator.reconcile.store import Key
from lora_operator.reconcile.usage import used_views
from tests.unit.fake_kube import Json
from tests.unit.model_world import LLAMA, MODULES, SERVING, World
from tests.unit.test_world_converging import (
    ADAPTERS,
    adapter,
    apply,
    cache,
    claim,
    deployment,
    listed,
    namespace,
    start,
)

ODD = Key(Kind.LORA_ADAPTER, *ADAPTERS[1])
FLEET = Key(Kind.VLLM_DEPLOYMENT, *LLAMA[1:])
Break = Callable[[World, Key], None]


@pytest.fixture
def break_on(monkeypatch: pytest.MonkeyPatch) -> Break:
    """Have each pass of one key fail, until it is taken out of the world's `faulty`."""

    def broken(world: World, key: Key) -> None:
        world.faulty.add(key)
        real: Reconcile = dispatch._RECONCILERS[key.kind]

        async def reconcile(context: Any, one: Key) -> float | None:
            if one in world.faulty and one == key:
                raise ValueError("a host that no parser takes")
            return await real(context, one)

        monkeypatch.setitem(dispatch._RECONCILERS, key.kind, reconcile)

    return broken


def conditions(world: World, key: Key) -> dict[str, Json]:
    """By type."""
    status = world.objects[key.kind.value, key.namespace, key.name].get("status") or {}
    return {one["type"]: one for one in status.get("conditions", ())}


def version(world: World, key: Key) -> str:
    found: str = world.objects[key.kind.value, key.namespace, key.name]["metadata"]["resourceVersion"]
    return found


def is_told(world: World, key: Key) -> bool:
    fault = conditions(world, key).get("OperatorFault")
    if fault is None:
        return False
    assert (fault["status"], fault["reason"]) == ("True", "OperatorError")
    assert "ValueError" in fault["message"]
    assert "a host that no parser takes" in fault["message"]
    return True


def test_an_adapter_on_which_it_fails_holds_up_nobody_and_says_so(break_on: Break) -> None:
    world = start(1)
    break_on(world, ODD)
    apply(adapter((ODD.namespace, ODD.name), "odd", "org/one", False))(world)
    world.skip(60)
    assert is_told(world, ODD)
    assert conditions(world, ODD)["Ready"]["status"] == "Unknown"
    assert world.kube.events.count("OperatorError") == 1
    assert world.context.records.undecided(world.store, SERVING) is None
    assert used_views(world.context, SERVING)[1] is None, "content that nothing uses may go"
    before = version(world, ODD)
    world.skip(600)
    assert version(world, ODD) == before, "one cause is told once"
    world.faulty.clear()
    world.skip(120)
    assert conditions(world, ODD)["Ready"]["status"] == "True"
    assert "OperatorFault" not in conditions(world, ODD)


def test_what_is_served_stays_served_while_it_fails(break_on: Break) -> None:
    world = start(2)
    key = Key(Kind.LORA_ADAPTER, *ADAPTERS[0])
    world.skip(30)
    before = [engine.served for engine in world.engines.values()]
    artifacts = {place for place in world.objects if place[0] == "ModelArtifact"}
    break_on(world, key)
    apply(adapter(ADAPTERS[0], "a", "org/two", False))(world)
    world.skip(60)
    world.restart()
    world.skip(700)
    assert [engine.served for engine in world.engines.values()] == before
    assert artifacts <= world.objects.keys()
    assert is_told(world, key)
    assert conditions(world, key)["Ready"]["status"] == "Unknown", "nothing is known of the present spec"


def test_a_failure_that_is_over_at_once_is_only_logged(break_on: Break) -> None:
    world = start(3)
    world.skip(30)
    key = Key(Kind.LORA_ADAPTER, *ADAPTERS[0])
    before = version(world, key)
    break_on(world, key)
    world.enqueue(key)
    world.passes(1)
    world.faulty.clear()
    world.skip(60)
    assert version(world, key) == before


@pytest.mark.parametrize("kind", [Kind.VLLM_DEPLOYMENT, Kind.MODEL_CACHE, Kind.MODEL_ARTIFACT])
def test_every_kind_says_it_and_takes_it_back(break_on: Break, kind: Kind) -> None:
    world = start(4)
    world.skip(30)
    [key, *_] = world.store.keys(kind)
    break_on(world, key)
    world.enqueue(key)
    world.skip(30)
    assert is_told(world, key)
    assert conditions(world, key)["Ready"]["status"] == "True", "what is in use is in use as before"
    assert world.context.records.undecided(world.store, SERVING) is None
    world.faulty.clear()
    world.skip(120)
    assert "OperatorFault" not in conditions(world, key)
    assert conditions(world, key)["Ready"]["status"] == "True"


def test_adapters_of_a_fleet_on_which_it_fails_from_the_start_are_decided(break_on: Break) -> None:
    world = start(5)
    world.skip(30)
    break_on(world, FLEET)
    world.restart()
    world.skip(60)
    assert world.context.records.undecided(world.store, SERVING) is None
    assert not [place for place in world.objects if place[0] == "ModelArtifact" and is_unused(world.objects[place])]


def is_unused(artifact: Json) -> bool:
    return artifact["status"].get("unreferencedSince") is not None


def test_a_pod_on_which_it_fails_does_not_hold_up_its_fleet(break_on: Break) -> None:
    world = start(6)
    world.skip(30)
    pod = Key(Kind.POD, SERVING, next(world.pods()))
    world.remove(MODULES)
    break_on(world, pod)
    world.restart()
    world.skip(60)
    assert observe_pods(world.context, world.store.deployments[LLAMA[1:]]) is not None
    assert len(listed(world)) >= 2, "the other pod told the list"
    unsure = used_views(world.context, SERVING)[1]
    assert unsure is not None
    assert pod.name in unsure


@pytest.mark.parametrize("error", [ValueError("odd"), UnavailableError("away")], ids=["a bug", "an error"])
def test_a_new_fleet_gets_its_pods_though_an_adapter_can_t_be_decided_on(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    world = World(7)
    world.faulty.add(ODD)
    real: Reconcile = dispatch._RECONCILERS[Kind.LORA_ADAPTER]
    from lora_operator.reconcile import adapter as module

    observe = module._observe

    async def fail(context: Any, one: Any) -> Any:
        if one.key == (ODD.namespace, ODD.name):
            raise error
        return await observe(context, one)

    monkeypatch.setattr(module, "_observe", fail)
    monkeypatch.setitem(dispatch._RECONCILERS, Kind.LORA_ADAPTER, real)
    for body in (
        claim(),
        cache(),
        namespace("team-a", True),
        namespace("team-b", True),
        namespace(SERVING, True),
        adapter(ADAPTERS[1], "odd", "org/one", False),
        adapter(ADAPTERS[2], "b", "org/two", False),
        deployment(),
    ):
        apply(body)(world)
    world.skip(60)
    assert len(world.engines) == 2
    assert sorted(listed(world).values()) == ["b"]
    assert conditions(world, FLEET)["Ready"]["status"] == "True"
    if isinstance(error, UnavailableError):
        assert f"LoRAAdapter {ODD.namespace}/{ODD.name}" in str(used_views(world.context, SERVING)[1])


def test_an_artifact_on_which_it_fails_leaves_its_place_in_the_queue() -> None:
    world = World(8)
    turns, place = world.context.records.turns, (SERVING, "default")
    first, second = (Ticket(datetime(2026, 1, day, tzinfo=UTC), f"a-{day}", (SERVING,), adapter=True) for day in (1, 2))
    assert turns.ahead(place, first, {}, limit=1) == 0
    assert turns.ahead(place, second, {}, limit=1) == 1
    settle_fault(world.context, Key(Kind.MODEL_ARTIFACT, SERVING, first.artifact), "odd")
    assert turns.ahead(place, second, {}, limit=1) == 0
    assert Key(Kind.MODEL_ARTIFACT, SERVING, second.artifact) in world._due


class Odd(BaseModel):
    """Something that does not fit."""

    number: int


def raised(error: Exception) -> str:
    try:
        raise error
    except Exception as caught:
        return describe_fault(caught)


def test_a_cause_has_no_secret_and_no_odd_characters() -> None:
    told = raised(KeyError("hf_abcdefghijklmnopqrstuvwxyz0123456789\nnext\x1b[31m"))
    assert "abcdefgh" not in told
    assert told.isprintable()
    assert told.startswith("KeyError")
    assert len(raised(RuntimeError("word " * 1000))) < 400
    with pytest.raises(ValidationError) as refused:
        Odd.model_validate({"number": "s3cret"})
    assert "s3cret" not in describe_fault(refused.value)
    assert API_VERSION
