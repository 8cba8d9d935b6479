"""The operator dies at any step of an upgrade under load, and the next one ends it: no request is lost, nothing wanted is unloaded."""

from __future__ import annotations

import asyncio
import random
from contextlib import AsyncExitStack

import pytest

from e2e.cluster import ControlPlane
from lora_operator.kube.kinds import MODEL_ARTIFACTS
from tests.component.engine_standin import StandIn
from tests.component.lives import Steps, list_often, living
from tests.component.reconcile_support import World, asking, until

DEATHS = 8  # of the steps that one upgrade takes; each costs about as long as an upgrade


async def apply_revision(world: World, revision: str) -> None:
    """Another revision of the adapter's content: another artifact, and so another path."""
    await world.adapter("sql", world.team_a, source={"huggingFace": {"repo": "org/sql", "revision": revision}})


async def path_of(world: World) -> str:
    """Where the adapter's content is, once it is Ready."""
    ref = (await world.ready("sql", world.team_a))["artifactRef"]
    artifact = await world.kube.get(MODEL_ARTIFACTS, ref["namespace"], ref["name"])
    return f"/model-cache/{artifact['status']['path']}"


async def on_both(world: World, name: str, namespace: str) -> bool:
    """Whether the adapter is Ready on two pods, not only on the first that was seen."""
    return bool((await world.ready(name, namespace))["readyPods"] == "2/2")


async def upgraded(world: World, engines: list[StandIn], revision: str, plane: ControlPlane, steps: Steps) -> None:
    """Apply a revision, which one life begins to serve and, where it dies, another one ends."""
    async with AsyncExitStack() as clients:
        answers = [await clients.enter_async_context(asking(engine, "sql", every=0.004)) for engine in engines]
        others = [await clients.enter_async_context(asking(engine, "other", every=0.02)) for engine in engines]
        before = engines[0].served["sql"]
        await apply_revision(world, revision)
        async with living(plane, steps):
            done = asyncio.create_task(path_of(world))
            died = asyncio.create_task(steps.died.wait())
            await asyncio.wait([done, died], return_when=asyncio.FIRST_COMPLETED)
            died.cancel()
            if done.done():
                done.result()
            done.cancel()
            await asyncio.wait([done, died])
        async with living(plane):
            after = await path_of(world)
            assert after != before
            assert [engine.served["sql"] for engine in engines] == [after, after], "Ready is true of every pod"
            for engine in engines:  # a client's next question sees it, too
                assert await engine.ask("sql") == (200, after)
            await asyncio.sleep(0.01)
    died_at = f"died at step {len(steps.taken)}: {steps.taken[-1]}" if steps.died.is_set() else "did not die"
    assert answers == [[(200, before), (200, after)]] * 2, died_at
    assert others == [[(200, engine.served["other"])] for engine in engines], died_at


async def test_an_operator_that_dies_at_any_step_of_an_upgrade_is_followed_by_one_that_ends_it(
    world: World, control_plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    list_often(monkeypatch)
    await world.make_fleet(replicas=2)
    async with living(control_plane):
        await apply_revision(world, "v0")
        await world.adapter("other", world.team_b)
        engines = await world.run_pods(2)
        await until(lambda: on_both(world, "sql", world.team_a), "sql is on both")
        await until(lambda: on_both(world, "other", world.team_b), "other is on both")
    whole = Steps()
    await upgraded(world, engines, "v1", control_plane, whole)
    chance = random.Random(5)
    deaths = sorted(chance.sample(range(1, len(whole.taken) + 1), min(DEATHS, len(whole.taken))))
    died = 0
    for number, step in enumerate(deaths, start=2):
        steps = Steps(step, unsent=chance.random() < 0.3)
        await upgraded(world, engines, f"v{number}", control_plane, steps)
        died += steps.died.is_set()
    assert died > DEATHS // 2, "the others came to their end in fewer steps"

    async def only_what_is_wanted() -> bool:
        return all(engine.internal_names == {"sql", "other"} and not engine.retired for engine in engines)

    await until(only_what_is_wanted, "earlier contents are unloaded, and the plain name is back")
    content = {"sql": await path_of(world), "other": engines[0].served["other"]}
    assert [engine.served for engine in engines] == [content, content]
