"""Who is told a module list: a pod that takes lists, of a deployment that gives them (updateStrategy of both)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest

from lora_operator.constants import API_VERSION
from lora_operator.kube.client import Kube
from lora_operator.kube.kinds import Kind
from lora_operator.plan.adapter_list import ModuleList
from lora_operator.plan.deployment_pods import PodView
from lora_operator.reconcile.context import Context, build_context
from lora_operator.reconcile.engine_pod import POLL_IDLE, reconcile_pod
from lora_operator.reconcile.store import Key, Store
from lora_operator.settings import Settings
from lora_operator.vllm import Engines
from lora_operator.wire.plugin import PluginState, ServedModel
from tests.unit.builders import engine_pod, make_adapter, make_deployment, make_module, make_view, make_workload

POD = Key(Kind.POD, "serving", "llama-0")


class Engine:
    """An engine whose plugin remembers what it was told."""

    def __init__(self, strategy: str, version: str) -> None:
        self.told: list[bytes] = []
        self.state_ = PluginState("k", version, 3, settled=True, update_strategy=strategy)

    async def admin_api_is_guarded(self, url: str) -> bool:
        return True

    async def state(self, url: str, token: str) -> PluginState:
        return self.state_

    async def models(self, url: str, token: str) -> tuple[ServedModel, ...]:
        return ()

    async def put_list(self, url: str, token: str, body: bytes, *, wait: float) -> PluginState:
        self.told.append(body)
        return self.state_


def one_pod(engine: Engine, strategy: str = "HotLoad") -> Context:
    """A deployment with one pod, whose engine this is."""
    store = Store()
    body: dict[str, Any] = make_deployment(lora={"updateStrategy": strategy}).to_wire()
    store.upsert(Kind.VLLM_DEPLOYMENT, body)
    store.upsert(Kind.DEPLOYMENT, make_workload())
    pod = engine_pod()
    pod["spec"] = {"containers": []}
    store.upsert(Kind.POD, pod)
    context = build_context(
        kube=cast(Kube, None),
        engines=cast(Engines, engine),
        store=store,
        settings=Settings(operator_image="i", operator_namespace="n"),
        enqueue=lambda *_, **__: None,
        master_key=b"key",
    )
    context.records.deployments["serving", "llama"].replica_sets["uid-rs"] = "uid-deploy"
    return context


# (of the deployment, of the pod, the engine's version, what is known of the pod, whether it is told)
CASES: dict[str, tuple[str, str, str, PodView | None, bool]] = {
    "hot-loading, at the first look": ("HotLoad", "HotLoad", "0.32.0", None, True),
    "hot-loading": ("HotLoad", "HotLoad", "0.32.0", make_view(generation=3), True),
    "hot-loading, too old": ("HotLoad", "HotLoad", "0.25.0", None, False),
    "rolling": ("Rollout", "Rollout", "0.10.0", None, False),
    "rolling, at a later look": ("Rollout", "Rollout", "0.32.0", make_view(generation=3), False),
    "an old pod after a change to Rollout": ("Rollout", "HotLoad", "0.32.0", make_view(generation=3), False),
    "an old pod after a change to HotLoad, at the first look": ("HotLoad", "Rollout", "0.32.0", None, False),
    "an old pod after a change to HotLoad": (
        "HotLoad",
        "Rollout",
        "0.32.0",
        make_view(generation=3, update_strategy="Rollout"),
        False,
    ),
}


@pytest.mark.parametrize("case", CASES)
async def test_who_is_told_a_list(case: str) -> None:
    strategy, of_pod, version, known, told = CASES[case]
    engine = Engine(of_pod, version)
    context = one_pod(engine, strategy)
    context.records.deployments["serving", "llama"].modules = ModuleList("serving/llama", 4, ())
    if known is not None:
        context.records.pods["serving", "llama-0"].view = known
    again = await reconcile_pod(context, POD)
    assert bool(engine.told) is told
    view = context.records.pods["serving", "llama-0"].view
    assert view is not None
    assert (view.error, view.update_strategy, view.list_generation) == (None, of_pod, 3)
    assert again is not None
    if "Rollout" in (strategy, of_pod):
        assert again >= POLL_IDLE * 0.8, "there is nothing that it could be waiting for"


async def test_an_adapter_is_looked_at_when_a_pod_acknowledges_the_list_that_named_it_though_it_serves_the_same() -> (
    None
):
    engine = Engine("HotLoad", "0.32.0")
    context = one_pod(engine)
    woken: list[Key] = []
    context = replace(context, enqueue=lambda key, **_: woken.append(key))
    for name in ("sql", "chat"):
        body = make_adapter(name).to_wire() | {"apiVersion": API_VERSION, "kind": "LoRAAdapter"}
        context.store.upsert(Kind.LORA_ADAPTER, body)
    named = (make_module("chat", uid="uid-team-a-chat", adapter="team-a/chat"), make_module())
    context.records.deployments["serving", "llama"].modules = ModuleList("serving/llama", 4, named, since={"chat": 2})
    await reconcile_pod(context, POD)
    woken.clear()
    engine.state_ = replace(engine.state_, list_generation=4)
    await reconcile_pod(context, POD)
    assert [key for key in woken if key.kind is Kind.LORA_ADAPTER] == [Key(Kind.LORA_ADAPTER, "team-a", "sql")]
