"""updateStrategy Rollout against a real API server: how often the engines' Deployment changes, and what is in its arguments.

No controller runs, so a change of the pods is what a Deployment controller would go by: another pod template.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pytest

from e2e.cluster.controlplane import ControlPlane
from lora_operator.api.artifact import ModelArtifactStatus
from lora_operator.api.cache import ModelCacheStatus
from lora_operator.conditions import Verdict, failing, merge, ok
from lora_operator.constants import Condition, Reason
from lora_operator.desired.command_line import StaticModules
from lora_operator.desired.common import literal
from lora_operator.desired.deployment import build_deployment
from lora_operator.kube.client import Kube, load_configuration
from lora_operator.kube.kinds import DEPLOYMENTS, LORA_ADAPTERS, MODEL_ARTIFACTS, MODEL_CACHES, VLLM_DEPLOYMENTS, Kind
from lora_operator.plan.rollout import MAX_ARGUMENT_BYTES
from lora_operator.reconcile import services
from lora_operator.reconcile.adapter import reconcile_adapter
from lora_operator.reconcile.context import Context, build_context
from lora_operator.reconcile.deployment import reconcile_deployment
from lora_operator.reconcile.store import Key, Store
from lora_operator.settings import Settings
from lora_operator.vllm import Engines
from tests.component.conftest import Kubectl
from tests.unit.fake_clock import FakeClock

API = "lora-operator.dev/v1alpha1"
START = datetime(2026, 1, 1, tzinfo=UTC)
READY = ok(Reason.READY, "there")


@dataclass
class World:
    """One fleet and its adapters; the operator's reconciles run when the test says so."""

    namespace: str
    kube: Kube
    context: Context
    clock: FakeClock
    templates: list[str] = field(default_factory=list)  # each other pod template that was seen

    async def apply(self, kind: Kind, name: str, spec: dict[str, Any]) -> None:
        """Apply one of our objects, and tell the store."""
        body = {
            "apiVersion": API,
            "kind": kind.value,
            "metadata": {"name": name, "namespace": self.namespace},
            "spec": spec,
        }
        self.context.store.upsert(kind, await self.kube.apply(body))

    async def fleet(self, **lora: Any) -> None:
        """The VLLMDeployment."""
        spec = {
            "model": {"source": {"huggingFace": {"repo": "org/base"}}, "servedNames": ["base"]},
            "cacheRef": {"name": "default"},
            "lora": lora or {"updateStrategy": "Rollout"},
            "engine": {"image": "images.example/vllm"},
        }
        await self.apply(Kind.VLLM_DEPLOYMENT, "llama", spec)

    async def adapters(self, *names: str, **more: Any) -> None:
        """LoRAAdapters, each of a repository of its own."""
        for name in names:
            spec = {"source": {"huggingFace": {"repo": f"org/{name}"}}, "vllmDeploymentRef": {"name": "llama"}}
            await self.apply(Kind.LORA_ADAPTER, name, spec | more)
        await self.look()

    async def delete(self, name: str) -> None:
        """An adapter goes."""
        body = self.context.store.adapters[self.namespace, name]
        self.context.store.remove(Kind.LORA_ADAPTER, self.namespace, name, body.metadata.uid)
        await reconcile_adapter(self.context, Key(Kind.LORA_ADAPTER, self.namespace, name))
        await self.look()

    async def artifact(self, repo: str, verdict: Verdict) -> None:
        """What the download of a repository has come to."""
        for artifact in list(self.context.store.artifacts.values()):
            source = artifact.spec.source.hugging_face
            if source is not None and source.repo == repo:
                status = ModelArtifactStatus(
                    conditions=merge((), {Condition.READY: verdict}, generation=1, now=START),
                    path=f"artifacts/{artifact.metadata.name}" if verdict.is_true else None,
                    resolved_revision="0" * 40 if verdict.is_true else None,
                )
                name = artifact.metadata.name
                body = await self.kube.apply_status(MODEL_ARTIFACTS, self.namespace, name, status.to_wire())
                self.context.store.upsert(Kind.MODEL_ARTIFACT, body)
                await self.look()
                return
        raise AssertionError(f"no artifact wants {repo}")

    async def look(self) -> float | None:
        """Everything is reconciled until nothing new comes of it; after how many seconds the fleet is to be looked at again."""
        again = None
        for _ in range(3):
            for adapter in list(self.context.store.adapters.values()):
                await reconcile_adapter(self.context, Key(Kind.LORA_ADAPTER, *adapter.key))
            again = await reconcile_deployment(self.context, Key(Kind.VLLM_DEPLOYMENT, self.namespace, "llama"))
        if (self.namespace, "llama") in self.context.store.workloads:
            workload = await self.kube.get(DEPLOYMENTS, self.namespace, "llama")
            template = json.dumps(workload["spec"]["template"], sort_keys=True)
            if template not in self.templates[-1:]:
                self.templates.append(template)
        return again

    async def after(self, seconds: float) -> None:
        """Time passes, second by second."""
        for _ in range(int(seconds)):
            self.clock.seconds += 1
            await self.look()

    async def served(self) -> list[str]:
        """Names in the arguments, as the API server has them."""
        args = (await self.kube.get(DEPLOYMENTS, self.namespace, "llama"))["spec"]["template"]["spec"]["containers"][0][
            "args"
        ]
        if "--lora-modules" not in args:
            return []
        return [json.loads(text)["name"] for text in args[args.index("--lora-modules") + 1 :]]

    async def report(self, *, ready: int) -> None:
        """The Deployment's status as its controller would write it: one pod, of the present form, that is up or starting."""
        live = self.context.store.workloads[self.namespace, "llama"]
        counts = {"replicas": 1, "updatedReplicas": 1, "readyReplicas": ready, "availableReplicas": ready}
        status = counts | {"observedGeneration": live.generation}
        body = await self.kube.apply_status(DEPLOYMENTS, self.namespace, "llama", status)
        self.context.store.upsert(Kind.DEPLOYMENT, body)

    def condition(self, name: str = "AdaptersInSync") -> tuple[str, str]:
        """Reason and message of a condition of the fleet."""
        deployment = self.context.store.deployments[self.namespace, "llama"]
        return next((c.reason, c.message) for c in deployment.status.conditions if c.type == name)


@pytest.fixture
async def world(
    control_plane: ControlPlane, kubectl: Kubectl, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[World]:
    """A namespace with a cache, and a fleet whose base model is there. Statuses are written at once."""
    for wait in ("PASSING_SECONDS", "GATHER_SECONDS"):
        monkeypatch.setattr(services, wait, 0.0)
    async with Kube(await load_configuration(str(control_plane.kubeconfig))) as kube:
        clock = FakeClock(start=START)
        context = build_context(
            kube=kube,
            engines=Engines(),
            store=Store(),
            settings=Settings(operator_image="images.example/operator", operator_namespace=namespace),
            enqueue=lambda *_, **__: None,
            plugin_files={"plugin.py": "# one"},
            clock=clock,
        )
        world = World(namespace, kube, context, clock)
        body = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace, "resourceVersion": "1"}}
        context.store.upsert(Kind.NAMESPACE, body)
        await world.apply(Kind.MODEL_CACHE, "default", {"storage": {"existingClaim": "models"}})
        status = ModelCacheStatus(
            conditions=merge((), {Condition.READY: READY}, generation=1, now=START),
            claim_name="models",
            access_modes=("ReadWriteMany",),
        )
        body = await kube.apply_status(MODEL_CACHES, namespace, "default", status.to_wire())
        context.store.upsert(Kind.MODEL_CACHE, body)
        yield world
        for rt in (LORA_ADAPTERS, VLLM_DEPLOYMENTS, MODEL_CACHES, MODEL_ARTIFACTS):  # operators of later tests see them
            for item in (await kube.list(rt, namespace=namespace))[0]:
                await kube.delete(rt, namespace, item["metadata"]["name"])


@pytest.fixture
def restart(world: World) -> Callable[[str], None]:
    """Another operator takes over, with this plugin: what was only in memory is gone."""

    def take_over(plugin: str) -> None:
        old = world.context
        world.context = build_context(
            kube=old.kube,
            engines=old.engines,
            store=old.store,
            settings=old.settings,
            enqueue=old.enqueue,
            plugin_files={"plugin.py": plugin},
            clock=old.clock,
        )

    return take_over


async def up(world: World, **lora: Any) -> None:
    """The fleet is there, without adapters."""
    await world.fleet(**lora)
    await world.look()
    await world.artifact("org/base", READY)
    assert await world.served() == []
    assert len(world.templates) == 1


async def test_three_adapters_within_five_seconds_are_one_roll_out_and_bad_ones_are_none(
    world: World, restart: Callable[[str], None]
) -> None:
    await up(world)
    await world.adapters("a", "b", "bad", "stalled")
    await world.artifact("org/bad", failing(Reason.INVALID_ADAPTER, "no adapter"))
    await world.artifact("org/stalled", failing(Reason.DOWNLOADING, "1%"))
    await world.after(10)
    assert len(world.templates) == 1, "nothing is on the list"
    assert world.condition() == ("InSync", "list 1 with 0 adapters")
    await world.artifact("org/a", READY)
    await world.after(3)
    await world.artifact("org/b", READY)
    await world.adapters("c")
    await world.artifact("org/c", READY)
    assert world.condition() == (
        "SyncPending",
        f"list 4 is not rolled out yet: it waits until LoRAAdapter {world.namespace}/stalled is downloaded, at most 60 s",
    )
    await world.after(56)
    assert len(world.templates) == 1
    await world.after(1)
    assert len(world.templates) == 2
    assert await world.served() == ["a", "b", "c"]
    assert world.condition() == ("InSync", "list 4 with 3 adapters"), "no pod is there that lacks them"
    await world.after(30)
    restart("# two")
    await world.after(70)
    assert len(world.templates) == 2, "another plugin rolls nothing"
    await world.delete("b")
    await world.after(4)
    assert await world.served() == ["a", "b", "c"]
    await world.artifact("org/stalled", failing(Reason.SOURCE_UNREACHABLE, "timed out; tried again in 10 s"))
    await world.after(1)
    assert await world.served() == ["a", "c"]
    assert len(world.templates) == 3
    template = json.loads(world.templates[-1])
    assert {"name": "LORA_OPERATOR_LIST_GENERATION", "value": "5"} in template["spec"]["containers"][0]["env"]


async def test_an_adapter_that_is_made_again_unchanged_rolls_nothing(world: World) -> None:
    await up(world)
    await world.adapters("a")
    await world.artifact("org/a", READY)
    await world.after(5)
    assert await world.served() == ["a"]
    await world.delete("a")
    await world.kube.delete(LORA_ADAPTERS, world.namespace, "a")
    await world.adapters("a")
    await world.after(70)
    assert len(world.templates) == 2
    assert world.condition()[0] == "InSync"
    status = world.context.store.deployments[world.namespace, "llama"].status
    assert status.list_generation == 2, "the generation that pods hold it by"
    await world.kube.patch(DEPLOYMENTS, world.namespace, "llama", {"spec": {"minReadySeconds": 5}})
    world.context.store.upsert(Kind.DEPLOYMENT, await world.kube.get(DEPLOYMENTS, world.namespace, "llama"))
    await world.after(5)
    assert len(world.templates) == 2, "nor when somebody edits the Deployment afterwards"


async def test_the_first_pods_are_made_with_what_is_just_being_downloaded(world: World) -> None:
    await world.fleet()
    await world.look()
    await world.adapters("a")
    await world.artifact("org/base", READY)
    assert not world.templates
    assert world.condition("Available") == (
        "Progressing",
        f"the first pod is made with its adapters: it waits until LoRAAdapter {world.namespace}/a is downloaded, at most 60 s",
    )
    await world.artifact("org/a", READY)
    assert await world.served() == ["a"]
    assert len(world.templates) == 1


async def test_the_strategy_can_be_changed_both_ways_with_one_roll_out_each(world: World) -> None:
    await up(world, updateStrategy="HotLoad")
    await world.adapters("a")
    await world.artifact("org/a", READY)
    await world.after(70)
    assert len(world.templates) == 1, "pods are told of it"
    await world.fleet(updateStrategy="Rollout")
    await world.after(70)
    assert len(world.templates) == 2
    assert await world.served() == ["a"]
    await world.fleet(updateStrategy="HotLoad")
    await world.after(70)
    assert len(world.templates) == 3
    assert await world.served() == []
    workload = await world.kube.get(DEPLOYMENTS, world.namespace, "llama")
    assert "lora-operator.dev/lora-modules" not in workload["metadata"]["annotations"]


async def test_a_change_of_the_spec_does_not_wait_for_adapters(world: World) -> None:
    await up(world)
    await world.adapters("a", "slow")
    await world.artifact("org/slow", failing(Reason.DOWNLOADING, "1%"))
    await world.artifact("org/a", READY)
    await world.after(1)
    await world.fleet(updateStrategy="Rollout", maxLoras=3)
    await world.look()
    assert len(world.templates) == 2
    assert await world.served() == ["a"]
    await world.after(70)
    assert len(world.templates) == 2


async def test_the_api_server_takes_all_arguments_that_are_allowed(world: World) -> None:
    """The limit is ours, the reason for it is etcd's: 1.5 MiB for an object, of which the pods are made of three."""
    await world.fleet()
    entry = json.dumps({"name": "x" * 200, "path": "$" * 100, "base_model_name": "base"})
    entries = (entry,) * (MAX_ARGUMENT_BYTES // (len(literal(entry)) + 1))
    (deployment,) = world.context.store.deployments.values()
    (cache,) = world.context.store.caches.values()
    manifest = build_deployment(
        deployment,
        cache,
        model_path="/m",
        replicas=1,
        token_secret="g",
        plugin="k",
        plugin_files=("plugin.py",),
        static=StaticModules(1, entries),
    )
    taken = await world.kube.apply(manifest)
    assert len(taken["spec"]["template"]["spec"]["containers"][0]["args"]) > len(entries)


async def test_lazy_adapters_are_in_the_arguments_and_lazy_again_when_pods_are_told_of_them(world: World) -> None:
    await up(world)
    await world.adapters("lazy", loadPolicy="Lazy")
    await world.adapters("placed", placement={"preload": 1})
    await world.artifact("org/lazy", READY)
    await world.artifact("org/placed", READY)
    await world.after(10)
    assert await world.served() == ["lazy", "placed"]

    def entries() -> list[tuple[str, bool, int]]:
        updated = world.context.records.deployments[world.namespace, "llama"].modules
        assert updated is not None
        modules = updated.modules
        return [(module.name, module.lazy, module.preload) for module in modules]

    assert entries() == [("lazy", False, 0), ("placed", False, 0)]
    await world.fleet(updateStrategy="HotLoad")
    await world.look()
    assert entries() == [("lazy", True, 0), ("placed", False, 1)]
    await world.adapters("hung", suspend=True)
    await world.artifact("org/hung", READY)
    assert len(entries()) == 2


async def test_changes_that_come_faster_than_engines_start_wait_for_the_roll_out_that_goes_on(world: World) -> None:
    await up(world)
    await world.report(ready=1)
    await world.adapters("a")
    await world.artifact("org/a", READY)
    await world.after(5)
    assert await world.served() == ["a"]
    await world.report(ready=0)
    for name in ("b", "c"):
        await world.adapters(name)
        await world.artifact(f"org/{name}", READY)
        await world.after(65)
    assert len(world.templates) == 2, "the pod that starts is left to start"
    assert world.condition() == (
        "SyncPending",
        "list 4 is not rolled out yet: it waits until the roll-out of list 2 is done",
    )
    await world.report(ready=1)
    await world.look()
    assert await world.served() == ["a", "b", "c"]
    assert len(world.templates) == 3
    await world.report(ready=0)
    await world.fleet(updateStrategy="Rollout", maxLoras=3)
    await world.look()
    assert len(world.templates) == 4, "a change of the fleet's own spec waits for nothing"
