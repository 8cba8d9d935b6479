"""What an engine is asked: one that is as before one thing only, and more where something may have changed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lora_operator.kube.kinds import Kind
from lora_operator.plan.adapter_list import ModuleList
from lora_operator.reconcile.engine_pod import POLL_IDLE, reconcile_pod
from lora_operator.reconcile.store import Key
from lora_operator.wire.plugin import (
    FailedAdapter,
    LoadedAdapter,
    PluginState,
    RetiredContent,
    ServedModel,
    WaitingAdapter,
)
from tests.unit.builders import engine_pod, make_deployment, make_module, make_workload
from tests.unit.small_world import SmallWorld

POD = Key(Kind.POD, "serving", "llama-0")


class Engine:
    """One engine with its plugin, as the client sees it; counts what it is asked."""

    def __init__(self) -> None:
        module = make_module()
        loaded = LoadedAdapter(
            name="sql", internal_name="sql", path=module.path, base_model_name=module.base_model_name
        )
        self.state_now = PluginState(
            plugin="k", vllm_version="0.32.0", list_generation=3, settled=True, loaded=(loaded,)
        )
        self.listed = [ServedModel(id="sql", root=module.path, parent=module.base_model_name)]
        self.asked: list[str] = []

    async def admin_api_is_guarded(self, _: str) -> bool:
        """It is."""
        self.asked.append("gate")
        return True

    async def state(self, *_: Any) -> PluginState:
        """The plugin's."""
        self.asked.append("state")
        return self.state_now

    async def put_list(self, *_: Any, **__: Any) -> PluginState:
        """The plugin's state after it took a list."""
        self.asked.append("modules")
        return self.state_now

    async def models(self, *_: Any) -> tuple[ServedModel, ...]:
        """What is listed."""
        self.asked.append("models")
        return tuple(self.listed)


class Looks(SmallWorld):
    """Looks at one pod whose list has generation 3."""

    def __init__(self) -> None:
        self.engine = Engine()
        super().__init__(engines=self.engine, master_key=b"key")
        self.put(Kind.VLLM_DEPLOYMENT, make_deployment())
        self.put(Kind.DEPLOYMENT, make_workload())
        self.put(Kind.POD, engine_pod() | {"spec": {"containers": []}})
        record = self.context.records.deployments["serving", "llama"]
        record.replica_sets["uid-rs"] = "uid-deploy"
        record.modules = ModuleList(deployment="serving/llama", generation=3, modules=(make_module(),))

    async def look(self) -> tuple[list[str], float | None]:
        """What one look asked, and when the next one is due."""
        self.engine.asked.clear()
        again = await reconcile_pod(self.context, POD)
        return list(self.engine.asked), again


async def test_an_engine_that_is_as_before_is_asked_one_thing() -> None:
    looks = Looks()
    asked, _ = await looks.look()
    assert asked == ["gate", "state", "models"]
    asked, again = await looks.look()
    assert asked == ["models"]
    assert again is not None
    assert again >= POLL_IDLE * 0.8


async def test_an_engine_that_lists_something_else_is_looked_at_as_a_whole() -> None:
    looks = Looks()
    await looks.look()
    looks.engine.listed.append(ServedModel(id="by-hand", root="/elsewhere", parent="meta/Llama"))
    asked, _ = await looks.look()
    assert asked == ["models", "state", "models"]
    view = looks.context.records.pods["serving", "llama-0"].view
    assert view is not None
    assert view.orphans == ("by-hand",)


async def test_a_newer_list_is_pushed_without_another_question_before() -> None:
    looks = Looks()
    await looks.look()
    record = looks.context.records.deployments["serving", "llama"]
    assert record.modules is not None
    record.modules = replace(record.modules, generation=4)
    asked, _ = await looks.look()
    assert asked[0] == "modules"


async def test_a_pod_with_a_failure_is_asked_for_it_at_every_look() -> None:
    looks = Looks()
    failure = FailedAdapter(name="sql", path="/x", stage="engine", message="no")
    looks.engine.state_now = replace(looks.engine.state_now, failures=(failure,))
    await looks.look()
    asked, _ = await looks.look()
    assert asked == ["state", "models"]


async def test_a_pod_that_may_fail_to_load_one_at_its_first_request_is_asked_at_every_look() -> None:
    looks = Looks()
    looks.engine.state_now = replace(looks.engine.state_now, waiting=(WaitingAdapter(name="lazy", path="/x"),))
    await looks.look()
    asked, _ = await looks.look()
    assert asked == ["state", "models"]


async def test_a_pod_is_asked_soon_again_for_content_that_requests_may_still_use() -> None:
    looks = Looks()
    retired = RetiredContent(internal_name="gone", path="/model-cache/artifacts/gone-view", running=True)
    looks.engine.state_now = replace(looks.engine.state_now, retired=(retired,))
    _, again = await looks.look()
    assert again is not None
    assert again <= 5, "who waits for the room waits for this look"
    looks.engine.state_now = replace(looks.engine.state_now, retired=())
    asked, again = await looks.look()
    assert asked == ["state", "models"], "the engine's own list told nothing of it before either"
    view = looks.context.records.pods["serving", "llama-0"].view
    assert view is not None
    assert view.retired == ()
    assert again is not None
    assert again >= POLL_IDLE * 0.8


async def test_a_list_of_the_same_generation_that_tells_this_pod_something_else_is_pushed() -> None:
    looks = Looks()
    record = looks.context.records.deployments["serving", "llama"]
    assert record.modules is not None
    looks.engine.state_now = replace(looks.engine.state_now, list_digest=record.modules.digest)
    await looks.look()
    record.modules = replace(record.modules, modules=(make_module(lazy=True),))
    asked, _ = await looks.look()
    assert asked[0] == "modules"


async def test_a_pod_with_a_list_of_its_own_takes_none_whatever_its_digest() -> None:
    looks = Looks()
    looks.engine.state_now = replace(looks.engine.state_now, list_digest="other", update_strategy="Rollout")
    for _ in range(2):
        asked, again = await looks.look()
        assert "modules" not in asked
        assert again is not None
        assert again >= POLL_IDLE * 0.8
