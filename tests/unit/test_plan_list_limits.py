"""A list above what a ConfigMap takes: who gives way, what they are told, and that everything else goes on."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable
from datetime import timedelta

import pytest

from lora_operator.constants import Reason
from lora_operator.plan import list_limits as list_room
from lora_operator.plan.adapter_list import Module, ModuleList, encode_for_config_map
from lora_operator.plan.list_limits import MAX_PACKED_BYTES, give_way
from tests.unit.builders import NOW
from tests.unit.fake_kube import Json
from tests.unit.model_world import LLAMA, SERVING, World
from tests.unit.test_world_converging import (
    adapter,
    apply,
    check_converged,
    check_idempotent,
    delete,
    listed,
    start,
    told,
)

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
LIMIT = 1 << 20  # of a ConfigMap's data


def crowd(count: int, namespace: str = "crowd", *, longest: bool = True, seed: int = 0) -> list[Module]:
    """So many adapters of one source, with names that can't be packed and are as long as they may be, or of usual ones."""
    letters = random.Random(seed)

    def name(length: int, number: int) -> str:
        return "".join(letters.choices(LETTERS, k=length)) if longest else f"customer-{number}"

    return [
        Module(
            name=name(128, number),
            path=f"/model-cache/artifacts/{namespace}-0a1b2c3d4e-0123456789abcdef0123456789abcdef01234567",
            base_model_name="meta/Llama",
            revision="0123456789abcdef0123456789abcdef01234567",
            adapter=f"{namespace}/{name(253, number)}",
            uid=f"{namespace}-{number:08x}-{letters.getrandbits(96):024x}",
        )
        for number in range(count)
    ]


def as_list(*modules: Module) -> ModuleList:
    return ModuleList("serving/llama", 7, tuple(sorted(modules)))


def without(everybody: Iterable[Module], gone: frozenset[str]) -> ModuleList:
    return as_list(*(module for module in everybody if module.uid not in gone))


def test_a_list_of_usual_names_has_room_for_everybody() -> None:
    everybody = as_list(*crowd(5000, longest=False))
    assert give_way(everybody, {}) == frozenset()


def test_what_is_left_fits_and_uses_the_room() -> None:
    modules = crowd(4000)
    everybody = as_list(*modules)
    assert len(everybody.packed) > LIMIT, "else nothing is shown"
    began = time.perf_counter()
    gone = give_way(everybody, {})
    assert time.perf_counter() - began < 5.0, "the operator stands still meanwhile"
    fitting = without(modules, gone)
    assert len(fitting.packed) > 0.93 * MAX_PACKED_BYTES
    assert len(encode_for_config_map(fitting)) < LIMIT - 4096, (
        "with the object around it, the client sends it without a warning"
    )


def test_names_that_pack_well_in_the_order_of_age_alone_get_no_more_room() -> None:
    """Adapters made next to each other have names alike, and stand far apart in the list, which goes by served names."""
    letters = random.Random(5)
    modules, ages = [], {}
    for number in range(8000):
        if number % 32 == 0:
            alike = "".join(letters.choices(LETTERS, k=230))
        name = "".join(letters.choices(LETTERS, k=20))
        uid = f"{number:032x}"
        ages[uid] = NOW + timedelta(seconds=number)
        modules.append(Module(name, f"/model-cache/artifacts/a-{number % 7}", "b", "c", f"crowd/{alike}-{number}", uid))
    everybody = as_list(*modules)
    assert len(everybody.packed) > LIMIT
    fitting = without(modules, give_way(everybody, ages))
    assert 0.8 * MAX_PACKED_BYTES < len(fitting.packed) <= MAX_PACKED_BYTES


def test_the_youngest_of_the_namespaces_that_have_most_give_way_whatever_the_order() -> None:
    modules = {name: crowd(count, name, seed=count) for name, count in (("a", 2000), ("b", 1500), ("c", 300))}
    everybody = [module for some in modules.values() for module in some]
    ages = {m.uid: NOW + timedelta(seconds=n) for some in modules.values() for n, m in enumerate(reversed(some))}
    gone = give_way(as_list(*everybody), ages)
    kept = {name: [m for m in some if m.uid not in gone] for name, some in modules.items()}
    assert len(kept["c"]) == 300, "a namespace with few is in nobody's way"
    assert abs(len(kept["a"]) - len(kept["b"])) <= 1
    for name in ("a", "b"):
        assert kept[name] == modules[name][-len(kept[name]) :], "the oldest stay"
    random.Random(1).shuffle(everybody)
    assert give_way(as_list(*everybody), dict(reversed(ages.items()))) == gone
    more = crowd(1, "d", seed=9)[0]
    again = give_way(as_list(*everybody, more), ages | {more.uid: NOW + timedelta(days=9)})
    assert more.uid not in again
    assert gone <= again
    assert len(again - gone) <= 1, "one more takes one's place"


# In the operator


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> World:
    """A fleet whose list has room for a few adapters only; team-b has one, team-a four."""
    world = start(1)
    monkeypatch.setattr(list_room, "AT_ONCE", 1)
    for number in range(3):
        world.skip(2)
        apply(adapter(("team-a", f"more-{number}"), f"more-{number}", "org/one", secret=False))(world)
    world.skip(60)
    modules = world.modules()
    assert modules is not None
    assert len(modules.modules) == 5
    monkeypatch.setattr(list_room, "MAX_PACKED_BYTES", len(modules.packed))
    return world


def condition(world: World, name: str, type_: str = "Ready") -> Json:
    return told(world.objects["LoRAAdapter", "team-a", name])[type_]


def test_who_has_no_room_is_told_and_everything_else_goes_on(narrow: World) -> None:
    for number in range(20):
        apply(adapter(("team-a", f"late-{number}"), f"late-{number}", "org/one", secret=False))(narrow)
    body = narrow.objects[LLAMA]
    apply(body | {"spec": body["spec"] | {"replicas": 4, "engine": {"image": "another"}}})(narrow)
    narrow.skip(120)
    workload = narrow.objects["Deployment", SERVING, "llama"]["spec"]
    assert (workload["replicas"], workload["template"]["spec"]["containers"][0]["image"]) == (4, "another")
    modules = narrow.modules()
    assert modules is not None
    assert 3 <= len(modules.modules) < 15
    assert {"a", "b"} <= {module.name for module in modules.modules}
    for engine in narrow.engines.values():
        assert set(engine.served) == {module.name for module in modules.modules}
    last = condition(narrow, "late-19", "Loaded")
    assert (last["reason"], condition(narrow, "late-19", "Stalled")["status"]) == (Reason.LIST_TOO_LONG, "True")
    assert "the list of VLLMDeployment serving/llama has no room for it" in last["message"]
    assert condition(narrow, "x")["status"] == "True"
    fleet = told(narrow.objects[LLAMA])["AdaptersInSync"]
    assert (fleet["status"], fleet["reason"]) == ("False", Reason.LIST_TOO_LONG)
    assert fleet["message"].startswith(f"{25 - len(modules.modules)} adapters don't fit into the list")
    check_idempotent(narrow)
    narrow.restart()
    narrow.skip(60)
    assert narrow.modules() == modules, "the next operator finds the same"

    apply(adapter(("team-b", "z2"), "z2", "org/one", secret=False))(narrow)
    narrow.skip(60)
    assert "z2" in listed(narrow).values(), "team-b has fewer, so one of team-a's gives way"
    for number in range(20):
        delete("LoRAAdapter", ("team-a", f"late-{number}"))(narrow)
    for number in range(3):
        delete("LoRAAdapter", ("team-a", f"more-{number}"))(narrow)
    narrow.skip(120)
    check_converged(narrow)


def test_that_nobody_came_or_went_is_no_reason_to_pack_again(narrow: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(20):
        apply(adapter(("team-a", f"late-{number}"), f"late-{number}", "org/one", secret=False))(narrow)
    narrow.skip(120)
    packed: list[object] = []
    monkeypatch.setattr("lora_operator.plan.adapter_list.gzip.compress", lambda *_, **__: packed.append(0))
    monkeypatch.setattr("lora_operator.plan.list_limits.zlib.compressobj", lambda *_, **__: packed.append(0))
    narrow.refresh()
    narrow.passes(500)
    assert packed == []


def test_with_update_strategy_rollout_the_list_is_bounded_too(narrow: World) -> None:
    body = narrow.objects[LLAMA]
    apply(body | {"spec": body["spec"] | {"lora": {"updateStrategy": "Rollout"}}})(narrow)
    for number in range(20):
        apply(adapter(("team-a", f"late-{number}"), f"late-{number}", "org/one", secret=False))(narrow)
    narrow.skip(120)
    modules = narrow.modules()
    assert modules is not None
    assert len(modules.modules) < 15
    assert condition(narrow, "late-19", "Loaded")["reason"] == Reason.LIST_TOO_LONG
