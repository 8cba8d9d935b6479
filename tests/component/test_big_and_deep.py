"""Objects that anybody may write, and that are big or nest deep: the operator starts beside them, and goes on with the others."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from e2e.cluster import ControlPlane
from lora_operator.constants import LABEL_MANAGED_BY, MANAGED_BY
from lora_operator.kube.kinds import MODEL_CACHES, VLLM_DEPLOYMENTS
from tests.component.conftest import Kubectl
from tests.component.manifests import manifest
from tests.component.reconcile_support import World, running_operator

ROOT = Path(__file__).parents[2]
DEPTH = 5_000
BIG, MEGABYTE = 40, 10**6


def nested(levels: int) -> Any:
    """Lists, which the API server keeps whole; they are written as text, since Python's json gives up on them."""
    return "[" * levels + "]" * levels


async def create_as_text(kubectl: Kubectl, folder: Path, body: dict[str, Any]) -> None:
    """Store a manifest in which "DEEP" stands for what nests deep."""
    file = folder / f"{body['metadata']['name']}.json"
    file.write_text(json.dumps(body).replace('"DEEP"', nested(DEPTH)))
    place = f"/apis/lora-operator.dev/v1alpha1/namespaces/{body['metadata']['namespace']}"
    plural = {"VLLMDeployment": "vllmdeployments", "ModelCache": "modelcaches"}[body["kind"]]
    await asyncio.to_thread(kubectl, "create", "--raw", f"{place}/{plural}", "-f", str(file))


async def test_what_nests_deep_ends_nothing_and_is_told(
    world: World, control_plane: ControlPlane, kubectl: Kubectl, tmp_path: Path
) -> None:
    deep = manifest(
        "VLLMDeployment", {"spec.podTemplate": {"spec": {"x": "DEEP"}}}, name="deep", namespace=world.team_a
    )
    await create_as_text(kubectl, tmp_path, deep)
    cache = manifest("ModelCache", {"spec.jobTemplate.resources": {"x": "DEEP"}}, name="deep", namespace=world.team_a)
    await create_as_text(kubectl, tmp_path, cache)
    await world.make_fleet()
    await world.adapter("sql", world.team_b)
    async with running_operator(control_plane) as operator:
        for rt in (VLLM_DEPLOYMENTS, MODEL_CACHES):
            told = await world.wait_for(rt, "deep", world.team_a, "Ready", "False", "InvalidSpec")
            assert "nests deeper than 100 levels" in told["conditions"][0]["message"]
        await world.run_pods()
        await world.ready("sql", world.team_b)
        # Another comes while it runs, and one that is known changes: kopf's watches bring both.
        deep["metadata"]["name"] = "later"
        await create_as_text(kubectl, tmp_path, deep)
        await world.wait_for(VLLM_DEPLOYMENTS, "later", world.team_a, "Ready", "False", "InvalidSpec")
        await world.adapter("more", world.team_b)
        await world.ready("more", world.team_b)
        assert next(operator.store.invalid_in(world.serving), None) is None, "it has no say in another namespace"
    for rt, name in ((VLLM_DEPLOYMENTS, "deep"), (VLLM_DEPLOYMENTS, "later"), (MODEL_CACHES, "deep")):
        await world.kube.delete(rt, world.team_a, name)


LISTING = """
import asyncio, sys
from lora_operator.kube.client import Kube, load_configuration
from lora_operator.main import Operator
from lora_operator.reconcile.queue import WorkQueue
from lora_operator.kube.kinds import Kind
from lora_operator.reconcile.store import Store

async def nothing(key):
    return None

async def main():
    async with Kube(await load_configuration(sys.argv[1])) as kube:
        store, stop = Store(), asyncio.Event()
        operator = Operator(kube, store, WorkQueue(nothing), stop)
        running = asyncio.create_task(operator.run())
        while operator._watched != set(Kind):
            await asyncio.sleep(0.05)
            if running.done():
                running.result()
        await asyncio.sleep(2)  # what a watch begins with
        words = [line.split() for line in open("/proc/self/status")]
        print(next(int(line[1]) for line in words if line[0] == "VmHWM:"), len(store.config_maps), flush=True)
        stop.set()
        await running

asyncio.run(main())
"""


async def peak(control_plane: ControlPlane) -> tuple[int, int]:
    """The highest memory of a process that lists and watches, in KiB, and how many ConfigMaps it knows."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        LISTING,
        str(control_plane.kubeconfig),
        stdout=asyncio.subprocess.PIPE,
        cwd=ROOT / "operator",
    )
    output, _ = await asyncio.wait_for(process.communicate(), 90)
    kib, count = output.split()
    return int(kib), int(count)


async def test_other_peoples_big_objects_take_none_of_its_memory(control_plane: ControlPlane, world: World) -> None:
    before, known = await peak(control_plane)

    async def make(number: int) -> None:
        body = {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {
                "name": f"big-{number}",
                "namespace": world.team_a,
                "labels": {LABEL_MANAGED_BY: MANAGED_BY},
            },
            "data": {"x": chr(97 + number % 26) * (MEGABYTE - 100)},
        }
        await world.kube.create(body)

    await asyncio.gather(*(make(number) for number in range(BIG)))
    after, found = await peak(control_plane)
    assert found == known + BIG
    assert after - before < BIG * MEGABYTE / 1024 / 4, "their contents were read"
