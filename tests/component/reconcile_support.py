"""The whole operator in process on a real API server, in a cluster without nodes and controllers: the test plays these.

The operator is the real one: watches, store, queue and reconcilers. Downloads end as the test says, by the statuses of Jobs and
their pods; engine pods are objects with an address of this machine, where a stand-in engine with the real plugin listens.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from e2e.cluster import ControlPlane
from lora_operator.constants import FETCH_CONTAINER, Reason
from lora_operator.errors import KubeError, NotFoundError, UnavailableError
from lora_operator.kube.client import Kube, load_configuration
from lora_operator.kube.kinds import (
    CLAIMS,
    CONFIG_MAPS,
    DEPLOYMENTS,
    JOBS,
    LORA_ADAPTERS,
    MODEL_ARTIFACTS,
    MODEL_CACHES,
    PODS,
    SECRETS,
    VLLM_DEPLOYMENTS,
    Kind,
    ResourceType,
)
from lora_operator.main import Operator
from lora_operator.plan.adapter_list import ModuleList, decode_from_config_map
from lora_operator.reconcile.dispatch import Dispatcher
from lora_operator.reconcile.queue import WorkQueue
from lora_operator.reconcile.store import Store
from lora_operator.settings import Settings
from lora_operator.vllm import Engines
from lora_operator.wire.jobs import EvictRequest, EvictResult, FetchRequest, FetchResult
from tests.component.engine_standin import StandIn
from tests.component.manifests import manifest

DEADLINE = 120.0
COMMIT = "0123456789abcdef0123456789abcdef01234567"
NEVER = FetchResult(ok=False, message="never ends")  # an outcome: the Job's pod runs for ever
PORT = 8000
T = TypeVar("T")
Json = dict[str, Any]

_ADDRESS = itertools.count(1)


def next_address() -> str:
    """An address of this machine that nobody else uses."""
    number, process = next(_ADDRESS), os.getpid()
    return f"127.{100 + number // 250}.{process % 250}.{1 + number % 250}"


async def until(look: Callable[[], Awaitable[T | None]], what: str, *, seconds: float = DEADLINE) -> T:
    """What `look` finds, once it is true; AssertionError with `what` otherwise."""
    deadline = asyncio.get_running_loop().time() + seconds
    while not (found := await look()):
        assert asyncio.get_running_loop().time() < deadline, f"not within {seconds:g} s: {what}"
        await asyncio.sleep(0.03)
    return found


class OperatorsKube(Kube):
    """The operator's client, which can be kept from listing a kind."""

    unlistable: ResourceType | None = None
    _watching: Any = None

    async def watch_session(self, listed: Callable[[str], None], **options: Any) -> tuple[str, Any]:
        """As Kube's."""
        server, self._watching = await super().watch_session(listed, **options)
        return server, self._watching

    async def close(self) -> None:
        """As Kube's, and what kopf leaves open when it is stopped; a process that ends needs no such care."""
        if self._watching is not None:
            await self._watching.close()
        await super().close()
        await asyncio.sleep(0.1)  # transports close in their own time, before the loop does

    async def pages(self, rt: ResourceType, **options: Any) -> AsyncIterator[tuple[list[Json], str]]:
        """As Kube's."""
        if rt is self.unlistable:
            raise UnavailableError(f"list {rt.plural}: not now")
        async for page in super().pages(rt, **options):
            yield page


class RunningOperator:
    """One life of the operator's process: a thread with an event loop of its own, as kopf ends what else runs in its loop."""

    def __init__(self, kubeconfig: Path, unlistable: ResourceType | None, engine_timeout: float) -> None:
        self._kubeconfig = kubeconfig
        self._engine_timeout = engine_timeout
        self._unlistable = unlistable
        self._loop: asyncio.AbstractEventLoop | None = None

    def run(self) -> None:
        """Live until `end`; raises what the operator ended with."""
        asyncio.run(self._live())

    async def _live(self) -> None:
        configuration = await load_configuration(str(self._kubeconfig))
        async with OperatorsKube(configuration) as self.kube, Engines(timeout=self._engine_timeout) as engines:
            self.kube.unlistable = self._unlistable
            self.store = Store()
            self._stop = asyncio.Event()
            settings = Settings(operator_image="images.example/operator", operator_namespace="default")
            queue = WorkQueue(lambda key: dispatcher(key), workers=128)
            dispatcher = Dispatcher(self.kube, engines, self.store, settings, queue.add)
            self._operator = Operator(self.kube, self.store, queue, self._stop)
            self._loop = asyncio.get_running_loop()
            await self._operator.run()

    def watches(self) -> bool:
        """Whether every kind is watched."""
        return self._loop is not None and self._operator._watched == set(Kind)

    def missing(self) -> set[Kind]:
        """Kinds that were not listed yet."""
        return set(self._operator.sync.missing()) if self._loop is not None else set(Kind)

    def end(self) -> None:
        """Stop as at a SIGTERM."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._stop.set)


@asynccontextmanager
async def running_operator(
    plane: ControlPlane,
    *,
    kubeconfig: Path | None = None,
    unlistable: ResourceType | None = None,
    engine_timeout: float = 2.0,
) -> AsyncIterator[RunningOperator]:
    """The operator at work inside the block, as the administrator or by a `kubeconfig` of less; with `unlistable` it lacks one kind
    until that is set to None; engines have `engine_timeout` seconds for an answer."""
    found = RunningOperator(kubeconfig or plane.kubeconfig, unlistable, engine_timeout)
    life = asyncio.create_task(asyncio.to_thread(found.run), name="operator")

    async def watching() -> bool:
        if life.done():
            life.result()
        return found.watches()

    try:
        if unlistable is None:
            await until(watching, "every kind is watched")
        yield found
        found.kube.unlistable = None
        await until(watching, "every kind is watched")  # kopf logs errors when it is stopped while it starts
    finally:
        found.end()
        await asyncio.wait_for(life, DEADLINE)


class World:
    """A serving namespace with a bound claim, a cache and a fleet, tenants' namespaces, and who plays the cluster."""

    def __init__(self, kube: Kube, folder: Path, *, serving: str, team_a: str, team_b: str) -> None:
        self.kube = kube
        self.serving, self.team_a, self.team_b = serving, team_a, team_b
        self.outcomes: dict[str, FetchResult] = {}  # by repository; success unless something else is said
        self.attempts: list[tuple[str, str]] = []  # (repository, Job) of every Job whose end was played
        self.evictions: list[EvictRequest] = []  # what each eviction's Job was told
        self.eviction: Callable[[EvictRequest], EvictResult] = lambda _: EvictResult(ok=True, views=1)
        self.engines: dict[str, StandIn] = {}  # by pod
        self._folder = folder

    # Objects

    async def make_fleet(self, name: str = "llama", **changes: Any) -> None:
        """A cache on a bound claim and a deployment that admits everybody; `changes` by dotted path, with __ for the dot."""
        await self.make_claim()
        await self.make_cache()
        await self.make_deployment(name, **changes)

    async def make_claim(self) -> None:
        """The cache's claim, bound."""
        claim = {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": "models", "namespace": self.serving},
            "spec": {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}},
        }
        await self.kube.apply(claim)
        await self.kube.apply_status(CLAIMS, self.serving, "models", {"phase": "Bound"})

    async def make_cache(self) -> None:
        """The ModelCache on it."""
        await self.kube.apply(manifest("ModelCache", name="default", namespace=self.serving))

    async def make_deployment(self, name: str = "llama", **changes: Any) -> None:
        """A deployment alone."""
        wanted = {
            "model.servedNames": ["tiny/base", "tiny/alias"],
            "cacheRef": {"name": "default"},
            "adapterPolicy": {"namespaces": {"from": "All"}},
            "replicas": 1,
        } | {path.replace("__", "."): value for path, value in changes.items()}
        await self.kube.apply(
            manifest(
                "VLLMDeployment",
                {f"spec.{path}": value for path, value in wanted.items()},
                name=name,
                namespace=self.serving,
            )
        )

    async def adapter(
        self, name: str, namespace: str, *, repo: str = "", deployment: str = "llama", **spec: Any
    ) -> Json:
        """Apply a LoRAAdapter; by default of the repository `org/<name>`."""
        source = spec.pop("source", {"huggingFace": {"repo": repo or f"org/{name}"}})
        ref = {"name": deployment, "namespace": self.serving}
        changes = {"spec.source": source, "spec.vllmDeploymentRef": ref} | {f"spec.{k}": v for k, v in spec.items()}
        return await self.kube.apply(manifest("LoRAAdapter", changes, name=name, namespace=namespace))

    async def delete_adapter(self, name: str, namespace: str) -> None:
        """kubectl delete lora."""
        await self.kube.delete(LORA_ADAPTERS, namespace, name)

    async def clear(self) -> None:
        """Delete all that could keep an operator of a later test busy."""
        for rt in (
            LORA_ADAPTERS,
            VLLM_DEPLOYMENTS,
            MODEL_ARTIFACTS,
            MODEL_CACHES,
            DEPLOYMENTS,
            JOBS,
            PODS,
            CONFIG_MAPS,
        ):
            for namespace in (self.serving, self.team_a, self.team_b):
                for item in (await self.kube.list(rt, namespace=namespace))[0]:
                    await self.kube.delete(rt, namespace, item["metadata"]["name"])
        for engine in self.engines.values():
            await engine.stop()

    # Looking

    async def find(self, rt: ResourceType, namespace: str, name: str) -> Json | None:
        """The object, None where there is none."""
        try:
            return await self.kube.get(rt, namespace, name)
        except NotFoundError:
            return None

    async def wait_for(
        self, rt: ResourceType, name: str, namespace: str, type_: str, status: str, reason: str | None = None
    ) -> Json:
        """The object's status once a condition of its present generation is so."""
        seen: Json = {}

        async def look() -> Json | None:
            obj = await self.find(rt, namespace, name) or {}
            seen.clear()
            seen.update(obj.get("status") or {})
            for found in seen.get("conditions", []):
                right = (found["type"], found["status"]) == (type_, status) and reason in (None, found["reason"])
                if right and found["observedGeneration"] == obj["metadata"]["generation"]:
                    return dict(seen)
            return None

        try:
            return await until(look, f"{rt.kind} {namespace}/{name} {type_}={status} {reason or ''}")
        except AssertionError as error:
            raise AssertionError(f"{error}; it says {seen}") from None

    async def ready(self, name: str, namespace: str) -> Json:
        """The adapter's status once it is Ready."""
        return await self.wait_for(LORA_ADAPTERS, name, namespace, "Ready", "True")

    async def refused(self, name: str, namespace: str, reason: str) -> Json:
        """The adapter's status once it is not Ready for that reason."""
        return await self.wait_for(LORA_ADAPTERS, name, namespace, "Ready", "False", reason)

    async def modules(self, name: str = "llama") -> ModuleList:
        """The list in the ConfigMap."""
        body = await self.kube.get(CONFIG_MAPS, self.serving, f"{name}-modules")
        found = decode_from_config_map(body["binaryData"]["modules.json.gz"])
        assert found is not None
        return found

    async def listed(self, name: str = "llama") -> dict[str, str]:
        """Public name to the adapter that has it, by the ConfigMap."""
        return {module.name: module.adapter for module in (await self.modules(name)).modules}

    async def wait_listed(self, expected: dict[str, str]) -> None:
        """Until the list names exactly these adapters."""
        seen: dict[str, str] = {}

        async def look() -> bool:
            seen.clear()
            seen.update(await self.listed())
            return seen == expected

        try:
            await until(look, f"the list is {expected}")
        except AssertionError as error:
            raise AssertionError(f"{error}; it is {seen}") from None

    # Playing the cluster

    async def play_jobs(self) -> None:
        """Have Jobs end, as they come, in the way that `outcomes` says; for ever."""
        done: set[str] = set()
        while True:
            for job in (await self.kube.list(JOBS, namespace=self.serving))[0]:
                uid = job["metadata"]["uid"]
                if uid not in done and not job["spec"].get("suspend"):
                    try:
                        await self._end_job(job)
                    except KubeError:  # deleted meanwhile, or with its namespace; else it is ended with the next look
                        continue
                    done.add(uid)
            await asyncio.sleep(0.05)

    async def _end_job(self, job: Json) -> None:
        template, metadata = job["spec"]["template"], job["metadata"]
        environment = {entry["name"]: entry.get("value", "") for entry in template["spec"]["containers"][0]["env"]}
        result: FetchResult | EvictResult
        if "LORA_OPERATOR_EVICT" in environment:
            request = EvictRequest.model_validate_json(environment["LORA_OPERATOR_EVICT"])
            self.evictions.append(request)
            name, result = "eviction", self.eviction(request)
        else:
            fetch = FetchRequest.model_validate_json(environment["LORA_OPERATOR_FETCH"])
            name = fetch.source.repo if fetch.source.kind == "huggingFace" else fetch.artifact
            result = self.outcomes.get(name) or success(fetch)
        if result is NEVER:
            return
        pod: Json = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": f"{metadata['name']}-{metadata['uid'][:5]}",
                "namespace": self.serving,
                "labels": template["metadata"]["labels"] | {"batch.kubernetes.io/job-name": metadata["name"]},
                "ownerReferences": [owner("batch/v1", "Job", job)],
            },
            "spec": {"restartPolicy": "Never", "containers": [{"name": FETCH_CONTAINER, "image": "x"}]},
        }
        message = result.model_dump_json(by_alias=True)
        ended = {"exitCode": 0 if result.ok else 1, "message": message}
        await self.kube.apply(pod)
        await self.kube.apply_status(
            PODS,
            self.serving,
            pod["metadata"]["name"],
            {
                "phase": "Succeeded" if result.ok else "Failed",
                "containerStatuses": [
                    {
                        "name": FETCH_CONTAINER,
                        "image": "x",
                        "imageID": "x",
                        "ready": False,
                        "restartCount": 0,
                        "state": {"terminated": ended},
                    }
                ],
            },
        )
        await self.kube.apply_status(JOBS, self.serving, metadata["name"], job_status(ok=result.ok))
        self.attempts.append((name, metadata["name"]))

    async def run_pods(self, count: int = 1, *, deployment: str = "llama") -> list[StandIn]:
        """Have that many more engine pods come up, Ready, from the Deployment's present template."""

        async def made() -> Json | None:
            return await self.find(DEPLOYMENTS, self.serving, deployment)

        workload = await until(made, f"Deployment {self.serving}/{deployment} is made")
        found = []
        for _ in range(count):
            name = f"{deployment}-{len(self.engines)}"
            await self.start_pod(workload, name)
            found.append(self.engines[name])
        await self.report_rollout(workload)
        return found

    async def report_rollout(self, workload: Json) -> None:
        """The Deployment's status as its controller would write it: all pods are of the present template."""
        name = workload["metadata"]["name"]
        pods = sum(pod.rpartition("-")[0] == name for pod in self.engines)
        counts = dict.fromkeys(("replicas", "updatedReplicas", "readyReplicas", "availableReplicas"), pods)
        status = counts | {"observedGeneration": workload["metadata"]["generation"]}
        await self.kube.apply_status(DEPLOYMENTS, self.serving, name, status)

    async def start_pod(self, workload: Json, name: str) -> None:
        """One engine pod of a Deployment's present template comes up, Ready."""
        template, selector = workload["spec"]["template"], workload["spec"]["selector"]
        replica_set = await self.kube.apply(
            {
                "apiVersion": "apps/v1",
                "kind": "ReplicaSet",
                "metadata": {
                    "name": f"{workload['metadata']['name']}-rs",
                    "namespace": self.serving,
                    "ownerReferences": [owner("apps/v1", "Deployment", workload)],
                },
                "spec": {"selector": selector, "template": template},
            }
        )
        container = template["spec"]["containers"][0]
        engine = await self._engine(name, template, container)
        self.engines[name] = engine
        await engine.start()
        await self.kube.apply(
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {
                    "name": name,
                    "namespace": self.serving,
                    "labels": template["metadata"]["labels"],
                    "ownerReferences": [owner("apps/v1", "ReplicaSet", replica_set)],
                },
                "spec": {"containers": [{"name": "vllm", "image": "x", "ports": container["ports"]}]},
            }
        )
        await self.set_ready(name, True)

    async def _engine(self, name: str, template: Json, container: Json) -> StandIn:
        gate = next(volume for volume in template["spec"]["volumes"] if volume["name"] == "gate")

        async def token() -> Json | None:
            return await self.find(SECRETS, self.serving, gate["secret"]["secretName"])

        secret = await until(token, "the gate's Secret is there for the pod to mount")
        names = next(e["value"] for e in container["env"] if e["name"] == "LORA_OPERATOR_SERVED_NAMES")
        engine = StandIn(
            self._folder / name,
            address=next_address(),
            port=PORT,
            token=base64.b64decode(secret["data"]["token"]),
            environment={"LORA_OPERATOR_SERVED_NAMES": names},
        )
        body = await self.kube.get(
            CONFIG_MAPS, self.serving, f"{template['metadata']['labels'][DEPLOYMENT_LABEL]}-modules"
        )
        engine.mount_list(base64.b64decode(body["binaryData"]["modules.json.gz"]))
        return engine

    async def set_ready(self, pod: str, ready: bool, *, container: str = "") -> None:
        """The kubelet's word on an engine pod."""
        address = self.engines[pod].address
        await self.kube.apply_status(
            PODS,
            self.serving,
            pod,
            {
                "phase": "Running",
                "podIP": address,
                "podIPs": [{"ip": address}],
                "conditions": [{"type": "Ready", "status": str(ready)}],
                "containerStatuses": [
                    {
                        "name": "vllm",
                        "image": "x",
                        "imageID": "x",
                        "ready": ready,
                        "restartCount": 0,
                        "containerID": container or f"containerd://{pod}",
                        "state": {"running": {"startedAt": "2026-01-01T00:00:00Z"}},
                    }
                ],
            },
        )


@asynccontextmanager
async def asking(engine: StandIn, model: str, *, every: float = 0.001) -> AsyncIterator[list[tuple[int, str | None]]]:
    """A client that asks for a model all the time, `every` so many seconds: each answer that differs from the one before."""
    answers: list[tuple[int, str | None]] = []

    async def ask() -> None:
        while True:
            answer = await engine.ask(model)
            if not answers or answers[-1] != answer:
                answers.append(answer)
            await asyncio.sleep(every)

    task = asyncio.create_task(ask())
    try:
        yield answers
    finally:
        task.cancel()
        await asyncio.wait([task])


DEPLOYMENT_LABEL = "lora-operator.dev/vllmdeployment"


def owner(api_version: str, kind: str, body: Json) -> Json:
    """A controlling owner reference."""
    metadata = body["metadata"]
    return {
        "apiVersion": api_version,
        "kind": kind,
        "name": metadata["name"],
        "uid": metadata["uid"],
        "controller": True,
    }


def success(request: FetchRequest, *, rank: int = 8) -> FetchResult:
    """How a Job ends that has published what it was asked for."""
    return FetchResult(
        ok=True,
        resolved_revision=COMMIT,
        digest="sha256:aa",
        size_bytes=131072,
        files=2,
        path=f"artifacts/{request.artifact}-{COMMIT}",
        rank=rank if request.type == "Adapter" else None,
    )


def failure(reason: Reason, message: str = "why not") -> FetchResult:
    """How a Job ends that could not."""
    return FetchResult(ok=False, reason=reason, message=message)


def job_status(*, ok: bool) -> Json:
    """A Job's status at its end, as the API server accepts it."""
    at = "2026-01-01T00:00:00Z"
    types = ("SuccessCriteriaMet", "Complete") if ok else ("FailureTarget", "Failed")
    reason = "CompletionsReached" if ok else "BackoffLimitExceeded"
    status: Json = {
        "startTime": at,
        "conditions": [{"type": t, "status": "True", "reason": reason, "lastTransitionTime": at} for t in types],
        "succeeded" if ok else "failed": 1,
    }
    return status | ({"completionTime": at} if ok else {})
