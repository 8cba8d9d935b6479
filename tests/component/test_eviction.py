"""Content that nothing uses is removed, and nothing else: the operator on a real API server, with engines that tell what they serve."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Any

from e2e.cluster import ControlPlane
from lora_operator.constants import ANNOTATION_EVICT, Reason
from lora_operator.kube.kinds import JOBS, LORA_ADAPTERS, MODEL_ARTIFACTS, MODEL_CACHES
from lora_operator.wire.jobs import KEEP_BYTES, EvictRequest, EvictResult, FetchResult, keep_mark
from tests.component.manifests import manifest
from tests.component.reconcile_support import COMMIT, Json, World, running_operator, until


def content(name: str, *, size: int = 1 << 30) -> FetchResult:
    return FetchResult(
        ok=True,
        resolved_revision=COMMIT,
        digest=f"sha256:{name}",
        size_bytes=size,
        files=2,
        path=f"artifacts/{name}-view",
        rank=8,
    )


def keeps(request: EvictRequest, view: str) -> bool:
    data = base64.b64decode(request.keep)
    return keep_mark(view) in {data[start : start + KEEP_BYTES] for start in range(0, len(data), KEEP_BYTES)}


async def set_cache(world: World, **spec: Any) -> None:
    changes = {"spec.storage": {"existingClaim": "models"}} | {f"spec.{name}": value for name, value in spec.items()}
    await world.kube.apply(manifest("ModelCache", changes, name="default", namespace=world.serving))


async def ask(world: World, value: str) -> None:
    metadata = {"annotations": {ANNOTATION_EVICT: value}}
    await world.kube.patch(MODEL_CACHES, world.serving, "default", {"metadata": metadata})


async def eviction(world: World, **expected: Any) -> Json:
    """The cache's word on evictions, once it says so."""

    async def look() -> Json | None:
        status = ((await world.find(MODEL_CACHES, world.serving, "default")) or {}).get("status") or {}
        found: Json = status.get("eviction") or {}
        return (
            status
            if all(value in (found.get(name), str(found.get(name))) for name, value in expected.items())
            else None
        )

    return await until(look, f"the cache says {expected}")


async def artifacts(world: World) -> set[str]:
    """The views that artifacts have."""
    found = (await world.kube.list(MODEL_ARTIFACTS, namespace=world.serving))[0]
    return {(item.get("status") or {}).get("path", "-").rpartition("/")[2] for item in found}


async def unused(world: World, view: str) -> None:
    async def look() -> bool:
        found = (await world.kube.list(MODEL_ARTIFACTS, namespace=world.serving))[0]
        return any(
            item["status"].get("path", "").endswith(view) and item["status"].get("unreferencedSince")
            for item in found
            if "status" in item
        )

    await until(look, f"nothing wants {view}")


async def test_what_no_object_wants_and_no_pod_serves_goes_when_it_is_asked_for(
    control_plane: ControlPlane, world: World
) -> None:
    world.outcomes |= {"org/kept": content("kept"), "org/gone": content("gone")}
    await world.make_fleet()
    async with running_operator(control_plane):
        (engine,) = await world.run_pods()
        for name in ("kept", "gone"):
            await world.adapter(name, world.team_a)
        for name in ("kept", "gone"):
            await world.ready(name, world.team_a)
        await world.delete_adapter("gone", world.team_a)
        await unused(world, "gone-view")
        status = await until(lambda: reclaimable(world), "what nothing wants can be reclaimed")
        assert status["reclaimable"] == "1Gi"
        assert world.evictions == [], "by itself nothing goes"

        # An engine that can't be asked may be serving it.
        await engine.stop()
        await world.set_ready("llama-0", True, container="containerd://again")
        await until(lambda: engine_is_missed(world), "the engine is missed")
        await ask(world, "1")
        said = await eviction(world, running="False")
        message = said["eviction"]["message"]
        assert "waits, for nothing may go now: pod" in message
        assert "can't be asked" in message
        assert world.evictions == []
        assert "gone-view" in await artifacts(world)

        await engine.start()
        await world.set_ready("llama-0", True, container="containerd://once-more")
        status = await eviction(world, attempt=1, running="False", requested="1")
        assert status["eviction"]["views"] == 1
        (told,) = world.evictions
        assert keeps(told, "kept-view")
        assert not keeps(told, "gone-view")
        assert "gone-view" not in await artifacts(world)
        assert await artifacts(world) >= {"kept-view"}
        base = next(view for view in await artifacts(world) if view not in ("kept-view", "-"))
        assert keeps(told, base), "the engines' model"

        async def gone() -> bool:
            jobs = (await world.kube.list(JOBS, namespace=world.serving))[0]
            return all("evict" not in job["metadata"]["name"] for job in jobs)

        await until(gone, "the Job is removed")
        await world.adapter("gone", world.team_a)  # and it is fetched anew when it is wanted again
        await world.ready("gone", world.team_a)
        assert [repo for repo, _ in world.attempts].count("org/gone") == 2


async def reclaimable(world: World) -> Json | None:
    status = (await world.kube.get(MODEL_CACHES, world.serving, "default")).get("status") or {}
    return status if status.get("reclaimableBytes") else None


async def engine_is_missed(world: World) -> bool:
    for item in (await world.kube.list(LORA_ADAPTERS, namespace=world.team_a))[0]:
        if "EngineUnreachable" in json.dumps(item.get("status") or {}):
            return True
    return False


async def test_a_download_that_does_not_fit_gets_room_and_goes_on_by_itself(
    control_plane: ControlPlane, world: World
) -> None:
    world.outcomes |= {"org/old": content("old"), "org/younger": content("younger"), "org/new": content("new")}
    await world.make_fleet()
    await set_cache(world, eviction={"policy": "LeastRecentlyUsed"})
    async with running_operator(control_plane):
        await world.run_pods()
        for name in ("old", "younger"):
            await world.adapter(name, world.team_a)
            await world.ready(name, world.team_a)
            await world.delete_adapter(name, world.team_a)
            await unused(world, f"{name}-view")
            await asyncio.sleep(1.1)  # times are whole seconds
        full = FetchResult(ok=False, reason=Reason.INSUFFICIENT_SPACE, message="no room", needed_bytes=5)
        world.outcomes["org/new"] = full

        def evict(_: EvictRequest) -> EvictResult:
            world.outcomes["org/new"] = content("new")
            return EvictResult(ok=True, views=1, freed_bytes=1 << 30)

        world.eviction = evict
        await world.adapter("new", world.team_a)
        await world.ready("new", world.team_a)
        status = await eviction(world, attempt=1, running="False")
        assert status["eviction"]["freed"] == "1Gi"
        (told,) = world.evictions
        assert not keeps(told, "old-view"), "it was used longest ago"
        assert keeps(told, "younger-view"), "no more than is needed goes"


async def test_nothing_is_downloaded_while_content_is_removed(control_plane: ControlPlane, world: World) -> None:
    world.outcomes["org/sql"] = content("sql")
    await world.make_fleet()
    async with running_operator(control_plane):
        await world.run_pods()
        never = EvictResult(ok=False, message="never ends")
        world.eviction = lambda _: never
        original = world._end_job
        release = asyncio.Event()

        async def held(job: Json) -> None:
            if "evict" in job["metadata"]["name"]:
                asyncio.get_running_loop().create_task(later(job))
            else:
                await original(job)

        async def later(job: Json) -> None:
            await release.wait()
            await original(job)

        world._end_job = held  # type: ignore[method-assign]
        await ask(world, "1")
        await eviction(world, running="True")
        await world.adapter("sql", world.team_a)
        status = await world.refused("sql", world.team_a, "Queued")
        (ready,) = [c for c in status["conditions"] if c["type"] == "Ready"]
        assert "content that nothing uses is being removed" in ready["message"] or "has not started" in ready["message"]
        assert "org/sql" not in [repo for repo, _ in world.attempts]
        release.set()
        await world.ready("sql", world.team_a)
        await eviction(world, running="False", message="never ends")
