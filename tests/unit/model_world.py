"""A small world for the property test: an API server, a cluster and engines in memory, with the real reconcilers at work in it.

The reconcilers, the store, the records and every plan are the operator's own. What is played is what they talk to: objects by
key with their versions, watches that lag, Jobs that end as their repository says, pods that come and go, and a plugin that does at
once what a list says. Time is a number. Nothing awaits, so a pass is a plain call.
"""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Coroutine, Iterator
from datetime import UTC, datetime
from typing import Any, TypeVar

from lora_operator.constants import FETCH_CONTAINER, Reason
from lora_operator.errors import (
    EngineUnreachable,
    OperatorError,
    StaleList,
)
from lora_operator.kube.kinds import OWN_KINDS, Kind
from lora_operator.plan.adapter_list import ModuleList, decode_from_config_map
from lora_operator.reconcile.context import build_context
from lora_operator.reconcile.dispatch import Dispatcher
from lora_operator.reconcile.routing import keys_for
from lora_operator.reconcile.store import Key, Store
from lora_operator.settings import Settings
from lora_operator.wire.jobs import FetchRequest, FetchResult
from lora_operator.wire.plugin import HeldEntry, HeldList, LoadedAdapter, PluginState, ServedModel
from tests.unit.builders import take_list
from tests.unit.fake_clock import FakeClock
from tests.unit.fake_kube import FakeKube, Json, Place, place_of

T = TypeVar("T")

START = datetime(2026, 1, 1, tzinfo=UTC)
SERVING = "serving"
LLAMA = ("VLLMDeployment", SERVING, "llama")
MODULES = ("ConfigMap", SERVING, "llama-modules")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
_WATCHED = {kind.value: kind for kind in Kind}
_OWN = {kind.value for kind in OWN_KINDS}


def drive(work: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that never really waits."""
    try:
        work.send(None)
    except StopIteration as end:
        result: T = end.value
        return result
    raise AssertionError("it waits for something")


class Died(BaseException):
    """The operator's process ends where it is: nothing catches that, and nothing is tidied up."""


class Engine:
    """One engine pod's idealised plugin."""

    def __init__(self, held: Json | None) -> None:
        self.held = held  # a list as it came
        self.reachable = True

    @property
    def served(self) -> dict[str, str]:
        """Public name to path."""
        return {module["name"]: module["path"] for module in (self.held or {"modules": ()})["modules"]}

    def state(self) -> PluginState:
        """As the plugin tells it."""
        modules = (self.held or {"modules": ()})["modules"]
        return PluginState(
            plugin="kit",
            vllm_version="0.32.0",
            list_generation=self.held["generation"] if self.held else None,
            settled=True,
            loaded=tuple(LoadedAdapter(m["name"], m["name"], m["path"], m["baseModelName"]) for m in modules),
            atomic_swap=True,
        )


class Engines:
    """vllm.Engines for the world's pods."""

    def __init__(self, world: World) -> None:
        self._world = world

    def _engine(self, url: str) -> Engine:
        pod = self._world.addresses.get(url.removeprefix("http://").rpartition(":")[0])
        engine = self._world.engines.get(pod or "")
        if engine is None or not engine.reachable:
            raise EngineUnreachable(f"{url}: no answer")
        self._world.step()
        return engine

    async def admin_api_is_guarded(self, url: str) -> bool:
        """As Engines'."""
        return self._engine(url) is not None

    async def state(self, url: str, token: str) -> PluginState:
        """As Engines'."""
        return self._engine(url).state()

    async def held_list(self, url: str, token: str) -> HeldList:
        """As Engines'."""
        held = self._engine(url).held or {"generation": 0, "modules": ()}
        entries = [
            HeldEntry(m["name"], m["path"], m["baseModelName"], m["revision"], m["uid"]) for m in held["modules"]
        ]
        return HeldList(held["generation"], tuple(entries))

    async def models(self, url: str, token: str) -> tuple[ServedModel, ...]:
        """As Engines'."""
        modules = (self._engine(url).held or {"modules": ()})["modules"]
        return (
            ServedModel("base", "/model", None),
            *(ServedModel(m["name"], m["path"], m["baseModelName"]) for m in modules),
        )

    async def put_list(self, url: str, token: str, body: bytes, *, wait: float) -> PluginState:
        """As Engines'."""
        engine, sent = self._engine(url), json.loads(body)
        if engine.held is not None and sent["generation"] < engine.held["generation"]:
            raise StaleList(engine.state())
        engine.held = sent
        self._world.step()
        return engine.state()


class World:
    """Everything. Methods named like what happens; `passes` lets the operator work."""

    def __init__(self, seed: int) -> None:
        self.engines: dict[str, Engine] = {}  # by pod
        self.addresses: dict[str, str] = {}  # address to pod
        self.bad_repos: set[str] = set()
        self.lost_nodes: set[str] = set()  # repositories: the nodes of their Jobs are lost
        self.faulty: set[Key] = set()  # keys on which the operator may fail by a bug
        self.unlisted = False  # the operator has started, and can't list a kind
        self.steps_left: int | None = None  # until the operator dies: its writes, and its questions to engines
        self.clock = FakeClock(start=START)
        self.published: set[str] = set()  # paths of all content that ever was in the cache
        self.lists: list[ModuleList] = []  # as the operator wrote them, since the last one was lost
        self.held: dict[str, Json] = {}  # public name to the adapter that must stay in the list under it
        self.kube = FakeKube(self.clock.now)
        self.kube.on_change, self.kube.on_written = self._change, self.step
        self._random = random.Random(seed)
        self._pending: list[tuple[Kind, str, Json]] = []
        self.restart()

    # The API server

    @property
    def objects(self) -> dict[Place, Json]:
        """All that is there."""
        return self.kube.objects

    def write(self, obj: Json) -> Json:
        """Somebody creates or replaces an object; a write that changes nothing is none."""
        return self.kube.write(obj)

    def remove(self, place: Place) -> None:
        """Somebody deletes an object, and what it controls goes too."""
        self.kube.remove(place)

    def _change(self, event: str, body: Json, by_operator: bool) -> None:
        """What follows from a change; watches bring it some time later."""
        place, gone = place_of(body), event == "DELETED"
        if by_operator and not gone:
            self._look_at(place, body)
        elif place == MODULES:
            self._lose_list()
        if by_operator and gone and place[0] == "ModelArtifact":
            self._must_be_unwanted(body)
        if not by_operator and not gone and place[0] in _OWN:
            self._unseen[Key(_WATCHED[place[0]], *place[1:])] = self.kube.version
        if body["kind"] in _WATCHED:
            self._pending.append((_WATCHED[body["kind"]], event, body))
        if gone and place[0] == "Pod":
            self.engines.pop(place[2], None)

    def step(self) -> None:
        """The operator has done something that others see, and may die before it hears of it."""
        if self.steps_left is not None:
            self.steps_left -= 1
            if self.steps_left == 0:
                self.steps_left = None
                raise Died

    def _lose_list(self) -> None:
        """Generations may begin anew; and where the operator has not read it yet, only pods know what was listed.

        It is listed again as far as its content is there; what was kept for its name is not.
        """
        self.lists.clear()
        if self.context.records.deployments.peek(LLAMA[1:]).modules is None:
            self.held = {}

    # What must hold at each of the operator's writes

    def _look_at(self, place: Place, body: Json) -> None:
        if place != MODULES:
            return
        found = decode_from_config_map(body["binaryData"]["modules.json.gz"])
        assert found is not None
        names = [module.name for module in found.modules]
        assert len(names) == len(set(names)), f"two adapters have one name: {names}"
        wanted = {(name, adapter["metadata"]["uid"]) for name, adapter in self.held.items()}
        assert wanted <= {(module.name, module.uid) for module in found.modules}, "a wanted adapter left the list"
        for module in found.modules:
            assert any(f"/model-cache/{path}" == module.path for path in self.published), "content that never was"
        last = self.lists[-1] if self.lists else found
        assert found == last or found.generation > last.generation, "another list under a number that was given"
        self.lists.append(found)

    def _must_be_unwanted(self, artifact: Json) -> None:
        listed = self.modules()
        path = artifact["status"].get("path")
        assert path is None or listed is None or all(path not in m.path for m in listed.modules), "files in use"

    def modules(self) -> ModuleList | None:
        """The list in the ConfigMap."""
        body = self.objects.get(MODULES)
        return decode_from_config_map(body["binaryData"]["modules.json.gz"]) if body else None

    # The operator

    def restart(self) -> None:
        """The operator starts, with nothing in its memory, and lists every kind."""
        self.store = Store()
        self._due: dict[Key, float] = {}
        self._unseen: dict[Key, int] = {}  # what users wrote, until the operator has looked at it
        self._failures: dict[Key, int] = {}
        self._pending.clear()
        self.context = build_context(
            kube=self.kube,  # type: ignore[arg-type]
            engines=Engines(self),  # type: ignore[arg-type]
            store=self.store,
            settings=Settings(operator_image="x", operator_namespace="system"),
            enqueue=self.enqueue,
            plugin_files={"plugin.py": ""},
            clock=self.clock,
            master_key=b"key",
        )
        self.dispatcher = Dispatcher(
            self.context.kube, self.context.engines, self.store, self.context.settings, self.enqueue
        )
        self.dispatcher._context = self.context
        for kind in Kind:
            bodies = [body for body in self.objects.values() if body["kind"] == kind.value]
            take_list(self.store, kind, bodies, str(self.kube.version))
            self.store.mark_synced(kind)
        if self.modules() is None:
            self._lose_list()
        self.refresh()

    def refresh(self) -> None:
        """Look at everything of ours once more, as the operator does every ten minutes."""
        for kind in OWN_KINDS:
            for key in self.store.keys(kind):
                self.enqueue(key)

    def enqueue(self, key: Key, *, after: float = 0) -> None:
        """Put a key on the work queue."""
        due = self.clock.seconds + after
        self._due[key] = min(due, self._due.get(key, due))

    def _hear(self, *, all_of_it: bool) -> None:
        """Watches bring their news in order, some of it late."""
        while self._pending and (all_of_it or self._random.random() < 0.8):
            kind, event, body = self._pending.pop(0)
            metadata = body["metadata"]
            if event == "DELETED":
                change = self.store.remove(
                    kind, metadata.get("namespace"), metadata["name"], metadata["uid"], metadata["resourceVersion"]
                )
            else:
                change = self.store.upsert(kind, body)
            if change is not None:
                for key in keys_for(change, self.store):
                    self.enqueue(key)

    def passes(self, most: int) -> int:
        """Let the operator work on what is due now, in any order; how many reconciles it took, at most so many."""
        done = 0
        while done < most and not self.unlisted:
            self._hear(all_of_it=False)
            due = sorted(key for key, at in self._due.items() if at <= self.clock.seconds)
            if not due:
                self._hear(all_of_it=True)
                if not any(at <= self.clock.seconds for at in self._due.values()):
                    assert not self._unseen, "a user's change waits for the clock"
                    break
                continue
            key = self._random.choice(due)
            del self._due[key]
            self._look_at_news(key)
            done += 1
            try:
                again = drive(self.dispatcher(key))
                self._failures.pop(key, None)
            except OperatorError:
                self._failures[key] = self._failures.get(key, 0) + 1
                again = min(0.2 * 2.0 ** self._failures[key], 60.0)
            except Died:
                self.restart()
                continue
            except Exception:
                if key not in self.faulty:
                    raise
                self._failures[key] = self._failures.get(key, 0) + 1
                again = min(0.2 * 2.0 ** self._failures[key], 60.0)
            if again is not None:
                self.enqueue(key, after=max(again, 0.05))
            self.play()
        return done

    def _look_at_news(self, key: Key) -> None:
        """A pass begins: what the store has of its object it goes by."""
        known = self.store._versions.get(key)
        if known is None or known.number >= self._unseen.get(key, 0):
            self._unseen.pop(key, None)

    def skip(self, seconds: float) -> None:
        """Time passes; the operator does what falls due."""
        end = self.clock.seconds + seconds
        for _ in range(2000):
            self.passes(200)
            due = min((at for at in self._due.values() if at > self.clock.seconds), default=end)
            if due > end or self.unlisted:
                break
            self.clock.seconds = due
        self.clock.seconds = end
        self.passes(200)

    # The cluster

    def play(self) -> None:
        """Jobs end, and the Deployment has as many pods as it wants."""
        for job in [body for place, body in self.objects.items() if place[0] == "Job"]:
            self._end(job)
        workload = self.objects.get(("Deployment", SERVING, "llama"))
        if workload is not None:
            self._roll_out(workload)

    def _end(self, job: Json) -> None:
        if job["spec"].get("suspend") or job["status"].get("conditions"):
            return
        container = job["spec"]["template"]["spec"]["containers"][0]
        text = next(entry["value"] for entry in container["env"] if entry["name"] == "LORA_OPERATOR_FETCH")
        request = FetchRequest.model_validate_json(text)
        assert request.source.kind == "huggingFace"
        if request.source.repo in self.lost_nodes:
            self._lose(job)
            return
        ok = request.source.repo not in self.bad_repos
        path = f"artifacts/{request.artifact}-{COMMIT}"
        result = (
            FetchResult(ok=True, resolved_revision=COMMIT, path=path, digest="sha256:a", size_bytes=1, files=1, rank=8)
            if ok
            else FetchResult(ok=False, reason=Reason.SOURCE_UNREACHABLE, message="503")
        )
        if ok:
            self.published.add(path)
        ended = {"terminated": {"exitCode": 0 if ok else 1, "message": result.model_dump_json(by_alias=True)}}
        self._write_job_pod(job, ended)
        self.write(job | {"status": {"conditions": [{"type": "Complete" if ok else "Failed", "status": "True"}]}})

    def _lose(self, job: Json) -> None:
        """Its node is lost a moment after it has begun: the pod is deleted, and nobody confirms that it has ended."""
        self._write_job_pod(job, {"running": {}}, deletionTimestamp=self.kube.stamp())
        target = {"type": "FailureTarget", "status": "True", "reason": "BackoffLimitExceeded"}
        self.write(job | {"status": {"startTime": self.kube.stamp(), "conditions": [target]}})

    def _write_job_pod(self, job: Json, state: Json, **metadata: Any) -> None:
        self.write(
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {
                    "name": f"{job['metadata']['name']}-pod",
                    "namespace": SERVING,
                    "labels": job["spec"]["template"]["metadata"]["labels"]
                    | {"batch.kubernetes.io/job-name": job["metadata"]["name"]},
                    "ownerReferences": [_owner("Job", job)],
                    **metadata,
                },
                "status": {"containerStatuses": [{"name": FETCH_CONTAINER, "state": state}]},
            }
        )

    def _roll_out(self, workload: Json) -> None:
        wanted = workload["spec"].get("replicas", 1)
        pods = [name for (kind, _, name) in self.objects if kind == "Pod" and name in self.engines]
        for name in pods[wanted:]:
            self.remove(("Pod", SERVING, name))
        for _ in range(wanted - len(pods)):
            self.start_pod(workload)
        counts = dict.fromkeys(("replicas", "updatedReplicas", "readyReplicas"), wanted)
        status = counts | {"observedGeneration": workload["metadata"]["generation"]}
        if self.objects.get(place_of(workload), {}).get("status") != status:
            self.write(workload | {"status": status})

    def start_pod(self, workload: Json) -> None:
        """A pod starts, with the list that the ConfigMap has now."""
        replica_set = self.write(
            {
                "apiVersion": "apps/v1",
                "kind": "ReplicaSet",
                "metadata": {
                    "name": f"rs-{workload['metadata']['uid']}",
                    "namespace": SERVING,
                    "ownerReferences": [_owner("Deployment", workload)],
                },
            }
        )
        number = self.kube.version
        name, address = f"llama-{number}", f"10.0.{number // 250}.{number % 250}"
        mounted = self.modules()
        self.engines[name] = Engine(_as_sent(mounted) if mounted else None)
        self.addresses[address] = name
        self.write(
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {
                    "name": name,
                    "namespace": SERVING,
                    "labels": workload["spec"]["template"]["metadata"]["labels"],
                    "ownerReferences": [_owner("ReplicaSet", replica_set)],
                },
                "spec": {"containers": workload["spec"]["template"]["spec"]["containers"]},
                "status": {
                    "phase": "Running",
                    "podIP": address,
                    "conditions": [{"type": "Ready", "status": "True"}],
                    "containerStatuses": [
                        {"name": "vllm", "ready": True, "containerID": f"c-{number}", "state": {"running": {}}}
                    ],
                },
            }
        )

    def pods(self) -> Iterator[str]:
        """Names of the engine pods."""
        return iter(sorted(self.engines))


def _owner(kind: str, body: Json) -> Json:
    return {"kind": kind, "name": body["metadata"]["name"], "uid": body["metadata"]["uid"], "controller": True}


def _as_sent(modules: ModuleList) -> Json:
    from lora_operator.plan.adapter_list import encode

    sent: Json = json.loads(encode(modules))
    return sent


def packed(text: bytes) -> str:
    """What somebody wrote into a ConfigMap by hand."""
    return base64.b64encode(text).decode()
