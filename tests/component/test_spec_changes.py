"""The whole operator against a real API server, with Jobs played by the test: every change of a spec reaches the module list.

There is no engine here: what pods would be told is read from the deployment's ConfigMap.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from e2e.cluster import ControlPlane
from lora_operator.errors import NotFoundError
from lora_operator.kube.client import Kube, load_configuration
from lora_operator.kube.kinds import CONFIG_MAPS, JOBS, LORA_ADAPTERS, MODEL_ARTIFACTS, Kind
from lora_operator.main import Operator
from lora_operator.plan.adapter_list import Module, decode_from_config_map
from lora_operator.reconcile.dispatch import Dispatcher
from lora_operator.reconcile.queue import WorkQueue
from lora_operator.reconcile.store import Store
from lora_operator.settings import Settings
from lora_operator.vllm import Engines
from lora_operator.wire.jobs import FETCH_REQUEST_ENV
from tests.component.conftest import Kubectl

# kopf (1.45.2) leaves the connections of the watches that it is stopped in to the garbage collector.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore:unclosed:ResourceWarning"
)
DEADLINE = 180.0
GROUP = "lora-operator.dev/v1alpha1"
COMMITS = {"main": "a" * 40, "v2": "b" * 40}
TIME = "2026-01-02T03:04:05Z"


@dataclass
class World:
    """A namespace with a cache and two deployments, the operator at work, and Jobs that end as the test says."""

    kubectl: Kubectl
    kube: Kube
    namespace: str
    content: dict[str, str] = field(default_factory=lambda: dict(COMMITS))  # requested revision → what it resolves to
    held: bool = False  # Jobs don't end
    failure: str | None = None  # the reason that Jobs fail with
    ended: list[str] = field(default_factory=list)  # names of Jobs that ended

    def apply(self, *objects: dict[str, Any]) -> None:
        for one in objects:
            one["metadata"].setdefault("namespace", self.namespace)
            answer = self.kubectl.apply(one)
            assert answer.ok, answer.error

    def adapter(self, name: str = "sql", *, revision: str = "main", annotations: Any = None, **spec: Any) -> None:
        source = {"huggingFace": {"repo": "org/sql", "revision": revision}}
        spec = {"source": source, "vllmDeploymentRef": {"name": "llama"}} | spec
        metadata = {"name": name, "annotations": annotations or {}}
        self.apply({"apiVersion": GROUP, "kind": "LoRAAdapter", "metadata": metadata, "spec": spec})

    async def entries(self, deployment: str = "llama") -> dict[str, Module]:
        """What pods of the deployment are told, by served name."""
        try:
            found = await self.kube.get(CONFIG_MAPS, self.namespace, f"{deployment}-modules")
        except NotFoundError:
            return {}
        modules = decode_from_config_map(found["binaryData"]["modules.json.gz"])
        return modules.by_name() if modules else {}

    async def conditions(self, name: str = "sql") -> dict[str, tuple[str, str, str]]:
        body = await self.kube.get(LORA_ADAPTERS, self.namespace, name)
        if (body.get("status") or {}).get("observedGeneration") != body["metadata"]["generation"]:
            return {}
        return {c["type"]: (c["status"], c["reason"], c["message"]) for c in body["status"]["conditions"]}

    async def artifacts(self) -> list[dict[str, Any]]:
        found, _ = await self.kube.list(MODEL_ARTIFACTS, namespace=self.namespace)
        return [one for one in found if one["spec"]["type"] == "Adapter"]

    async def until(self, what: Callable[[], Any], *, says: str) -> None:
        try:
            async with asyncio.timeout(DEADLINE):
                while not await what():  # noqa: ASYNC110
                    await asyncio.sleep(0.1)
        except TimeoutError:
            state = self.kubectl("get", "lora,mart,jobs", "-n", self.namespace, "-o", "wide")
            raise AssertionError(f"not within {DEADLINE:.0f} s: {says}\n{await self.entries()}\n{state}") from None

    async def play_jobs(self) -> None:
        """As the Job controller and a node: each Job's pod ends with a result."""
        while True:
            await asyncio.sleep(0.1)
            jobs, _ = await self.kube.list(JOBS, namespace=self.namespace)
            for job in jobs:
                if not self.held and not (job.get("status") or {}).get("conditions"):
                    await asyncio.to_thread(
                        self._end, job
                    )  # kubectl must not hold up the operator, which shares the loop

    def _end(self, job: dict[str, Any]) -> None:
        name, env = job["metadata"]["name"], job["spec"]["template"]["spec"]["containers"][0]["env"]
        asked = json.loads(next(one["value"] for one in env if one["name"] == FETCH_REQUEST_ENV))
        commit = self.content[asked["source"]["revision"]]
        result: dict[str, Any] = {"ok": True, "resolvedRevision": commit, "digest": "sha256:aa", "sizeBytes": 1}
        result |= {"files": 2, "path": f"artifacts/sql-{commit[:20]}", "rank": 8}
        if self.failure is not None:
            result = {"ok": False, "reason": self.failure, "message": "as the test says"}
        owner = {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "name": name,
            "uid": job["metadata"]["uid"],
            "controller": True,
        }
        pod: dict[str, Any] = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": f"{name}-pod"[-60:].lstrip("-"), "ownerReferences": [owner]}
            | {"labels": job["spec"]["template"]["metadata"]["labels"] | {"batch.kubernetes.io/job-name": name}},
            "spec": {"containers": [{"name": "fetch", "image": "x"}]},
        }
        self.apply(pod)
        ended = {"exitCode": 0, "message": json.dumps(result)}
        container = {"name": "fetch", "image": "x", "imageID": "", "ready": False, "restartCount": 0}
        self._status(
            "pod", pod["metadata"]["name"], {"containerStatuses": [container | {"state": {"terminated": ended}}]}
        )
        conditions = [
            {"type": type_, "status": "True", "lastTransitionTime": TIME, "reason": "x", "message": "x"}
            for type_ in ("SuccessCriteriaMet", "Complete")
        ]
        status = {"startTime": TIME, "completionTime": TIME, "succeeded": 1, "conditions": conditions}
        self._status("job", name, status)
        self.ended.append(name)

    def _status(self, kind: str, name: str, status: dict[str, Any]) -> None:
        patch = json.dumps({"status": status})
        self.kubectl("patch", kind, name, "-n", self.namespace, "--subresource=status", "--type=merge", "-p", patch)


@asynccontextmanager
async def running(control_plane: ControlPlane, kubectl: Kubectl, namespace: str) -> AsyncIterator[World]:
    """The operator at work inside the block; a fixture would end it in another task than it began in."""
    configuration = await load_configuration(str(control_plane.kubeconfig))
    kubectl("create", "namespace", f"{namespace}-operator")
    async with Kube(configuration) as kube, Engines() as engines:
        world = World(kubectl, kube, namespace)
        claim = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}}
        world.apply(
            {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "models"}, "spec": claim}
        )
        world._status("pvc", "models", {"phase": "Bound"})
        spec: dict[str, Any] = {"storage": {"existingClaim": "models"}}
        world.apply({"apiVersion": GROUP, "kind": "ModelCache", "metadata": {"name": "default"}, "spec": spec})
        model = {"source": {"huggingFace": {"repo": "org/base"}}, "servedNames": ["org/base"]}
        for name in ("llama", "other"):
            spec = {"model": model, "engine": {"image": "vllm:1"}, "cacheRef": {"name": "default"}}
            world.apply({"apiVersion": GROUP, "kind": "VLLMDeployment", "metadata": {"name": name}, "spec": spec})
        store, stop = Store(), asyncio.Event()
        queue = WorkQueue(lambda key: dispatcher(key))
        settings = Settings(operator_image="fetch:1", operator_namespace=f"{namespace}-operator")
        dispatcher = Dispatcher(kube, engines, store, settings, queue.add)
        operator = Operator(kube, store, queue, stop)
        working = asyncio.create_task(operator.run())
        playing = asyncio.create_task(world.play_jobs())
        try:
            yield world
            assert not playing.done(), playing.exception()
            async with asyncio.timeout(DEADLINE):
                # kopf logs errors when it is stopped in the middle of starting
                while operator._watched != set(Kind):  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
        finally:
            playing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await playing
            stop.set()
            await asyncio.wait_for(working, DEADLINE)


def path_of(revision: str) -> str:
    return f"/model-cache/artifacts/sql-{COMMITS[revision][:20]}"


async def test_every_change_of_a_spec_takes_effect_and_leaves_nothing_behind(
    control_plane: ControlPlane, kubectl: Kubectl, namespace: str
) -> None:
    async with running(control_plane, kubectl, namespace) as world:
        await every_change_of_a_spec_takes_effect_and_leaves_nothing_behind(world)


async def every_change_of_a_spec_takes_effect_and_leaves_nothing_behind(world: World) -> None:
    world.adapter()

    async def listed(**names: str) -> bool:
        return {name: one.path for name, one in (await world.entries()).items()} == {
            name: path_of(revision) for name, revision in names.items()
        }

    await world.until(lambda: listed(sql="main"), says="it is listed")

    world.held = True
    world.adapter(revision="v2", servedName="text2sql")

    async def downloads() -> bool:
        return (await world.conditions()).get("Downloaded", ("",))[0] == "False" and len(await world.artifacts()) == 2

    await world.until(downloads, says="the new revision is being downloaded")
    assert await listed(sql="main"), "what is served stays until the new revision is there"
    world.held = False
    await world.until(lambda: listed(text2sql="v2"), says="new name and content come, the old ones go, in one step")

    ended = len(world.ended)
    world.adapter()
    await world.until(lambda: listed(sql="main"), says="going back")
    # The branch is resolved anew, as it was unwanted meanwhile.
    assert len(world.ended) <= ended + 1

    world.adapter(loadPolicy="Lazy")

    async def policy(lazy: bool, preload: int) -> bool:
        one = (await world.entries()).get("sql")
        return one is not None and (one.lazy, one.preload) == (lazy, preload)

    await world.until(lambda: policy(True, 0), says="Lazy")
    world.adapter(placement={"preload": 2})
    await world.until(lambda: policy(False, 2), says="preload")

    world.adapter(suspend=True)
    await world.until(lambda: listed(), says="it is suspended")
    assert (await world.conditions())["Ready"][:2] == ("False", "Suspended")
    assert "Stalled" not in await world.conditions()
    world.adapter()
    await world.until(lambda: listed(sql="main"), says="it is served again")

    world.adapter(vllmDeploymentRef={"name": "other"})
    await world.until(lambda: listed(), says="it left the first deployment")

    async def moved() -> bool:
        return set(await world.entries("other")) == {"sql"}

    await world.until(moved, says="it came to the other deployment")


async def test_a_refresh_leaves_an_adapter_as_it_is_until_the_new_content_is_there(
    control_plane: ControlPlane, kubectl: Kubectl, namespace: str
) -> None:
    async with running(control_plane, kubectl, namespace) as world:
        await a_refresh_leaves_an_adapter_as_it_is_until_the_new_content_is_there(world)


async def a_refresh_leaves_an_adapter_as_it_is_until_the_new_content_is_there(world: World) -> None:
    refresh = "lora-operator.dev/refresh"
    world.adapter()

    async def listed(commit: str) -> bool:
        one = (await world.entries()).get("sql")
        return one is not None and (one.path, one.revision) == (f"/model-cache/artifacts/sql-{commit[:20]}", commit)

    await world.until(lambda: listed("a" * 40), says="it is listed")

    world.failure = "SourceUnreachable"
    world.adapter(annotations={refresh: "1"})

    async def says(text: str) -> bool:
        downloaded = (await world.conditions()).get("Downloaded", ("", "", ""))
        return downloaded[0] == "True" and text in downloaded[2]

    await world.until(
        lambda: says("the last refresh failed, this content stays: SourceUnreachable: as the test says"),
        says="the refresh failed, and the adapter is still downloaded",
    )
    assert await listed("a" * 40)
    assert len(await world.artifacts()) == 2

    world.failure, world.content = None, {"main": "c" * 40}
    world.adapter(annotations={refresh: "2"})
    await world.until(lambda: listed("c" * 40), says="the branch's new commit is listed")

    async def status() -> dict[str, Any]:
        found: dict[str, Any] = (await world.kube.get(LORA_ADAPTERS, world.namespace, "sql"))["status"]
        return found

    async def done(value: str, commit: str) -> bool:
        now = await status()
        return (now.get("refresh"), now.get("resolvedRevision")) == ({"requested": value}, commit)

    await world.until(lambda: done("2", "c" * 40), says="the status speaks of the new content")

    async def kept(*annotations: str | None) -> bool:
        found = [one["metadata"].get("annotations", {}).get(refresh) for one in await world.artifacts()]
        return sorted(map(str, found)) == sorted(map(str, annotations))

    await world.until(lambda: kept(None, "requested=2"), says="the refresh that failed left nothing behind")
    world.adapter(annotations={refresh: "3"})
    await world.until(lambda: done("3", "c" * 40), says="a refresh that finds the same")
    assert await listed("c" * 40)
    await world.until(lambda: kept(None, "requested=3"), says="an earlier refresh's artifact goes")
