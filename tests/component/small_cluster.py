"""What a cluster's controllers and its node do, as far as the order of applying and deleting depends on it: for ever, in small steps.

The garbage collector, the Deployment controller with a node that runs its pods as stand-in engines, and the namespace controller.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable
from typing import Any, TypeVar

from lora_operator.errors import KubeError
from lora_operator.kube.kinds import (
    CLAIMS,
    CONFIG_MAPS,
    DEPLOYMENTS,
    JOBS,
    LORA_ADAPTERS,
    MODEL_ARTIFACTS,
    MODEL_CACHES,
    NAMESPACES,
    PODS,
    REPLICA_SETS,
    SECRETS,
    SERVICES,
    VLLM_DEPLOYMENTS,
    ResourceType,
    type_of,
)
from tests.component.reconcile_support import World

T = TypeVar("T")
Json = dict[str, Any]
OURS = (LORA_ADAPTERS, VLLM_DEPLOYMENTS, MODEL_CACHES, MODEL_ARTIFACTS)
OTHERS = (DEPLOYMENTS, REPLICA_SETS, JOBS, PODS, CONFIG_MAPS, SECRETS, SERVICES, CLAIMS)


class SmallCluster:
    """The controllers over a world's three namespaces."""

    def __init__(self, world: World, seed: int) -> None:
        self._world = world
        self._kube = world.kube
        self._random = random.Random(seed)
        self._count = 0
        self.trouble: KubeError | None = None  # the last: a controller tries again, whatever it was
        self._templates: dict[str, Json] = {}  # by engine pod

    @property
    def namespaces(self) -> tuple[str, ...]:
        """Those that tests write into."""
        return (self._world.serving, self._world.team_a, self._world.team_b)

    async def run(self) -> None:
        """Play, for ever. Each controller goes on whatever holds up another one."""
        while True:
            objects = await self._tried(self.objects())
            if objects is not None:
                await self._tried(self._collect(objects))
                await self._tried(self._run_pods(objects))
            for namespace in self.namespaces:
                await self._tried(self._end_namespace(namespace))
            await asyncio.sleep(0.15)

    async def _tried(self, step: Awaitable[T]) -> T | None:
        """What a step answers; None where it failed: an object is another one by now, or its namespace is going."""
        try:
            return await step
        except KubeError as error:
            self.trouble = error
            return None

    async def objects(self) -> list[tuple[ResourceType, Json]]:
        """All that is in the namespaces, Events apart."""
        found = [(rt, item) for rt in (*OURS, *OTHERS) for item in (await self._kube.list(rt))[0]]
        return [(rt, item) for rt, item in found if item["metadata"]["namespace"] in self.namespaces]

    async def delete_namespace(self, name: str) -> None:
        """kubectl delete namespace, without waiting."""
        await self._kube.delete(NAMESPACES, "", name)

    async def make_namespace(self, name: str) -> bool:
        """kubectl create namespace; False while an earlier one is going."""
        live = await self._world.find(NAMESPACES, "", name)
        if live is None:
            await self._kube.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
        return live is None or not live["metadata"].get("deletionTimestamp")

    async def _collect(self, objects: list[tuple[ResourceType, Json]]) -> None:
        """As the garbage collector: what is owned by nobody that exists goes."""
        live = {item["metadata"]["uid"] for _, item in objects}
        for rt, item in objects:
            owners = item["metadata"].get("ownerReferences") or ()
            if owners and not any(owner["uid"] in live for owner in owners) and not await self._is_owned(item):
                await self._delete(rt, item)

    async def _is_owned(self, item: Json) -> bool:
        """Whether an owner exists after all: it may have come while the kinds were listed one after the other."""
        for owner in item["metadata"]["ownerReferences"]:
            rt = type_of(owner)
            found = await self._world.find(rt, item["metadata"]["namespace"], owner["name"])
            if found is not None and found["metadata"]["uid"] == owner["uid"]:
                return True
        return False

    async def _run_pods(self, objects: list[tuple[ResourceType, Json]]) -> None:
        """As the Deployment controller and a node: one pod of each Deployment's present template."""
        pods = {item["metadata"]["name"]: item for rt, item in objects if rt is PODS}
        for name in [name for name in self._world.engines if name not in pods]:
            await self._world.engines.pop(name).stop()
        for rt, workload in objects:
            if rt is not DEPLOYMENTS:
                continue
            template, name = workload["spec"]["template"], workload["metadata"]["name"]
            key = {"template": template, "uid": workload["metadata"]["uid"]}
            current = [pod for pod in self._world.engines if self._templates.get(pod) == key]
            for old in [pod for pod in self._world.engines if pod not in current]:
                await self._delete(PODS, pods[old])
            if not current and await self._can_start(workload):
                replica_set = await self._world.find(REPLICA_SETS, self._world.serving, f"{name}-rs")
                if replica_set is not None:
                    await self._delete(REPLICA_SETS, replica_set)
                self._count += 1
                pod = f"{name}-{self._count}"
                self._templates[pod] = key
                await self._world.start_pod(workload, pod)
            await self._world.report_rollout(workload)

    async def _can_start(self, workload: Json) -> bool:
        """Whether what the pods mount is there; until then they would wait."""
        namespace = workload["metadata"]["namespace"]
        for volume in workload["spec"]["template"]["spec"]["volumes"]:
            wanted = [(SECRETS, volume[kind]["secretName"]) for kind in ("secret",) if kind in volume]
            wanted += [(CONFIG_MAPS, volume[kind]["name"]) for kind in ("configMap",) if kind in volume]
            for rt, name in wanted:
                if await self._world.find(rt, namespace, name) is None:
                    return False
        return True

    async def _end_namespace(self, name: str) -> None:
        """As the namespace controller: in any order everything in it goes, then itself."""
        live = await self._world.find(NAMESPACES, "", name)
        if live is None or not live["metadata"].get("deletionTimestamp"):
            return
        inside = [(rt, item) for rt, item in await self.objects() if item["metadata"]["namespace"] == name]
        self._random.shuffle(inside)
        for rt, item in inside:
            await self._delete(rt, item)
        if not inside:
            live["spec"]["finalizers"] = []
            await self._kube._json("finalize", "PUT", NAMESPACES.path(None, name, "finalize"), body=live)

    async def _delete(self, rt: ResourceType, item: Json) -> None:
        metadata = item["metadata"]
        await self._kube.delete(rt, metadata["namespace"], metadata["name"], uid=metadata["uid"])
        if rt is CLAIMS and metadata.get(
            "finalizers"
        ):  # of the volume's protection, which no controller takes away here
            body = {"metadata": {"finalizers": None}}
            await self._kube.patch(rt, metadata["namespace"], metadata["name"], body)
