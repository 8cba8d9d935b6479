"""Whatever is applied and deleted in whatever order, namespaces too: it converges, nothing is stuck, and nothing of ours is left over."""

from __future__ import annotations

import asyncio
import base64
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import pytest

from e2e.cluster import ControlPlane
from lora_operator.errors import ForbiddenError, NotFoundError
from lora_operator.kube.kinds import (
    CLAIMS,
    LORA_ADAPTERS,
    MODEL_ARTIFACTS,
    MODEL_CACHES,
    NAMESPACES,
    SECRETS,
    VLLM_DEPLOYMENTS,
    ResourceType,
)
from tests.component.reconcile_support import World, running_operator, until
from tests.component.small_cluster import SmallCluster

CHURN = 6  # deletions in the middle, each followed by another apply sooner or later
Json = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """One thing that users apply and delete."""

    name: str
    namespace: str
    apply: Callable[[], Awaitable[Any]]
    delete: Callable[[], Awaitable[Any]]


class Users:
    """Who write the objects, and all that they write."""

    def __init__(self, world: World, cluster: SmallCluster, seed: int) -> None:
        self._world, self._cluster = world, cluster
        self._random = random.Random(seed)
        self.done: list[str] = []  # in this order
        token = {"data": {"token": base64.b64encode(b"t").decode()}, "apiVersion": "v1", "kind": "Secret"}
        secret = token | {"metadata": {"name": "hf", "namespace": world.team_a}}
        private = {"huggingFace": {"repo": "org/private", "tokenSecretRef": {"name": "hf", "key": "token"}}}
        self.parts = [
            self._object("claim", CLAIMS, world.serving, "models", world.make_claim),
            self._object("cache", MODEL_CACHES, world.serving, "default", world.make_cache),
            self._object("fleet", VLLM_DEPLOYMENTS, world.serving, "llama", world.make_deployment),
            self._object("secret", SECRETS, world.team_a, "hf", lambda: world.kube.apply(secret)),
            self._object("sql", LORA_ADAPTERS, world.team_a, "sql", lambda: world.adapter("sql", world.team_a)),
            self._object("chat", LORA_ADAPTERS, world.team_b, "chat", lambda: world.adapter("chat", world.team_b)),
            self._object(
                "private",
                LORA_ADAPTERS,
                world.team_a,
                "private",
                lambda: world.adapter("private", world.team_a, source=private),
            ),
            *(self._namespace(name) for name in cluster.namespaces),
        ]

    def _object(
        self, name: str, rt: ResourceType, namespace: str, object_: str, apply: Callable[[], Awaitable[Any]]
    ) -> Part:
        async def delete() -> None:
            await self._world.kube.delete(rt, namespace, object_)
            if rt is CLAIMS and await self._world.find(rt, namespace, object_) is not None:
                await self._world.kube.patch(rt, namespace, object_, {"metadata": {"finalizers": None}})

        return Part(name, namespace, apply, delete)

    def _namespace(self, name: str) -> Part:
        async def nothing() -> None:
            pass  # what is applied in it makes it

        return Part(f"namespace {name}", name, nothing, lambda: self._cluster.delete_namespace(name))

    async def apply(self, part: Part) -> None:
        """As kubectl apply, again while its namespace is going."""

        async def applied() -> bool:
            try:
                if not await self._cluster.make_namespace(part.namespace):
                    return False
                await part.apply()
            except (ForbiddenError, NotFoundError):
                return False
            return True

        self.done.append(f"+{part.name}")
        await until(applied, f"{part.name} can be applied")
        await self._wait()

    async def delete(self, part: Part) -> None:
        """As kubectl delete --wait=false."""
        self.done.append(f"-{part.name}")
        await part.delete()
        await self._wait()

    async def apply_all(self) -> None:
        """Everything, in any order; what is there already is no news."""
        for part in self._random.sample(self.parts, len(self.parts)):
            await self.apply(part)

    async def delete_all(self, *, namespaces: bool) -> None:
        """Everything, in any order; or everything in the namespaces, which stay."""
        for part in self._random.sample(self.parts, len(self.parts)):
            if namespaces or not part.name.startswith("namespace "):
                await self.delete(part)

    async def churn(self) -> None:
        """Something is deleted, and something applied, again and again."""
        for _ in range(CHURN):
            await self.delete(self._random.choice(self.parts))
            if self._random.random() < 0.5:
                await self.apply(self._random.choice(self.parts))

    async def _wait(self) -> None:
        """For no time, or for as long as some of what follows takes."""
        await asyncio.sleep(self._random.choice((0.0, 0.0, 0.05, 0.3)))


@pytest.mark.parametrize("seed", range(4))
async def test_any_order(world: World, control_plane: ControlPlane, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setattr("lora_operator.plan.adapter.SECRET_POLL_SECONDS", 0.5)
    cluster = SmallCluster(world, seed)
    users = Users(world, cluster, seed)
    playing = asyncio.create_task(cluster.run(), name="cluster")
    try:
        async with running_operator(control_plane):
            try:
                await users.apply_all()
                await users.churn()
                await users.apply_all()
                await converged(world, cluster)
                await users.delete_all(namespaces=seed % 2 == 1)
                await nothing_is_left(world, cluster)
            except AssertionError as error:
                ended = playing.exception() if playing.done() else None
                trouble = (
                    f"the cluster ended with {ended!r}" if ended else f"the cluster's last trouble: {cluster.trouble}"
                )
                raise AssertionError(f"{error}\nafter {' '.join(users.done)}\n{trouble}") from ended
            assert not playing.done(), playing.exception()
    finally:
        playing.cancel()
        await asyncio.wait([playing])


async def converged(world: World, cluster: SmallCluster) -> None:
    """Everything wanted is Ready, and nothing else is listed or loaded."""
    wanted = {"sql": world.team_a, "private": world.team_a, "chat": world.team_b}
    paths = {}
    for name, namespace in wanted.items():
        ref = (await world.ready(name, namespace))["artifactRef"]
        artifact = await world.kube.get(MODEL_ARTIFACTS, ref["namespace"], ref["name"])
        paths[name] = f"/model-cache/{artifact['status']['path']}"
    await world.wait_for(VLLM_DEPLOYMENTS, "llama", world.serving, "Ready", "True")
    await world.wait_listed({name: f"{namespace}/{name}" for name, namespace in wanted.items()})

    async def one_engine() -> bool:
        return [engine.served for engine in world.engines.values()] == [paths]

    await until(one_engine, "the one engine serves these alone")
    assert not [item for _, item in await cluster.objects() if item["metadata"].get("deletionTimestamp")]


async def nothing_is_left(world: World, cluster: SmallCluster) -> None:
    """No object but the artifacts that are complete, which are kept until room is wanted; no namespace; no engine."""
    left: list[str] = []

    async def look() -> bool:
        left.clear()
        for rt, item in await cluster.objects():
            conditions = (item.get("status") or {}).get("conditions") or ()
            complete = rt is MODEL_ARTIFACTS and any((c["type"], c["status"]) == ("Ready", "True") for c in conditions)
            if not complete or item["metadata"].get("deletionTimestamp"):
                left.append(f"{rt.kind} {item['metadata']['namespace']}/{item['metadata']['name']}")
        for name in cluster.namespaces:
            live = await world.find(NAMESPACES, "", name)
            if live is not None and live["metadata"].get("deletionTimestamp"):
                left.append(f"Namespace {name}, which is being deleted")
        return not left and not world.engines

    try:
        await until(look, "nothing is left")
    except AssertionError as error:
        raise AssertionError(f"{error}; there is {left}") from None
