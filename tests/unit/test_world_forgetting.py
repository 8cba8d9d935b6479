"""An operator that runs for months remembers nothing of what is gone: every map is as empty as when it started."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping
from typing import Any

from lora_operator.errors import KubeError
from lora_operator.kube.kinds import Kind
from lora_operator.reconcile.queue import WorkQueue
from lora_operator.reconcile.store import Key
from tests.unit.model_world import SERVING, World
from tests.unit.test_world_converging import adapter, apply, cache, claim, deployment, happen, namespace, secret

ROUNDS = 30
TENANTS = ("team-a", "team-b")
STAYS = {"Namespace", "PersistentVolumeClaim"}
BOUNDED = {"_gone"}  # the store's: the last few thousand deletions, so that late news of them is known for what it is


def remembered(world: World) -> dict[str, int]:
    """How many things each container of the operator holds, at any depth, by where it is: found by vars(), so that none is missed."""
    found: dict[str, int] = {}
    seen: set[int] = set()

    def walk(where: str, value: Any) -> None:
        if isinstance(value, Mapping | set | frozenset | list | tuple):
            found[where] = found.get(where, 0) + len(value)
            for inner in value.values() if isinstance(value, Mapping) else value:
                walk(where, inner)
        elif (
            type(value).__module__.startswith("lora_operator.") and hasattr(value, "__dict__") and id(value) not in seen
        ):
            seen.add(id(value))
            for name, inner in vars(value).items():
                if name not in BOUNDED:
                    walk(f"{where}.{name}", inner)

    walk("dispatcher", world.dispatcher)
    return found


def live_and_go(world: World, number: int) -> None:
    """A deployment with its pods, adapters of two tenants, a cache, artifacts with their Jobs, and Secrets: all come, and all go."""
    for body in (cache(), deployment(replicas=1 + number % 3), *(secret(tenant) for tenant in TENANTS)):
        happen(world, apply(body))
    for count in range(4):
        place = (TENANTS[count % 2], f"x-{number}-{count}")
        repo = f"org/{number}-{count}"
        world.bad_repos.update({repo} if count == 3 else ())
        happen(world, apply(adapter(place, f"a-{number}-{count}", repo, count % 2 == 0)))
    world.skip(20.0)
    kinds = {kind for kind, _, _ in world.objects}
    assert kinds >= {"Pod", "ReplicaSet", "ModelArtifact", "ConfigMap", "Service", "Secret", "Deployment"}
    assert len(world.published) >= 4 * (number + 1), "Jobs came, and went with what they told"
    changed = deployment(replicas=1) | {
        "spec": deployment(replicas=1)["spec"] | {"engine": {"image": f"vllm:{number}"}}
    }
    happen(world, apply(changed))
    world.skip(20.0)
    gone = sorted(there for there in world.objects if there[0] not in STAYS)
    random.Random(number).shuffle(gone)
    for there in gone:
        happen(world, lambda world, there=there: world.remove(there), work=number % 4)  # type: ignore[misc]
    world.skip(5.0)
    for there in [there for there in world.objects if there[0] not in STAYS]:  # made while the others went
        world.remove(there)
    world.skip(120.0)


def test_of_hundreds_of_objects_that_are_gone_nothing_is_remembered() -> None:
    world = World(1)
    for body in (claim(), *(namespace(name, True) for name in (*TENANTS, SERVING))):
        apply(body)(world)
    world.skip(5.0)
    before = remembered(world)
    for number in range(ROUNDS):
        live_and_go(world, number)
    assert len(world.store._gone) > 500, "that many objects the operator has seen"
    after = remembered(world)
    assert {where: count for where, count in after.items() if count > before.get(where, 0)} == {}


async def test_a_work_queue_forgets_keys_whose_objects_are_gone() -> None:
    failed: set[Key] = set()

    async def fails_once(key: Key) -> None:
        if key.name.endswith("7") and key not in failed:
            failed.add(key)
            raise KubeError("once")

    queue = WorkQueue(fails_once)
    for number in range(300):
        queue.add(Key(Kind.POD, SERVING, f"llama-{number}"))
    running = asyncio.create_task(queue.run())
    for _ in range(600):
        await asyncio.sleep(0.05)
        if not len(queue):
            break
    running.cancel()
    assert len(failed) == 30
    assert {name: value for name, value in vars(queue).items() if isinstance(value, dict | list | set) and value} == {}
