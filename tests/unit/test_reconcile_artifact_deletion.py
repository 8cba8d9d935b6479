"""An artifact that nothing wants any more stays until no status says that it is in use: that is what a restart goes by."""

from __future__ import annotations

from typing import Any

import pytest

from lora_operator.constants import ANNOTATION_REFRESH
from lora_operator.kube.kinds import Kind
from lora_operator.plan.adapter import AdapterPlan
from lora_operator.reconcile import adapter as adapter_module
from lora_operator.reconcile.artifact import reconcile_artifact
from lora_operator.reconcile.records import ModelWant
from lora_operator.reconcile.store import Key
from tests.unit.builders import make_adapter, make_decision, make_deployment, ready_artifact
from tests.unit.small_world import SmallWorld

OLD, NEW = ("serving", "sql-1"), ("serving", "sql-2")


class Refreshed(SmallWorld):
    """An adapter, its deployment, and an artifact of a refresh that both have been found not to want."""

    def __init__(self) -> None:
        super().__init__()
        self.put(Kind.MODEL_ARTIFACT, ready_artifact(OLD[1], annotations={ANNOTATION_REFRESH: "due=1"}))
        adapter, deployment = make_adapter(), make_deployment()
        records, uid = self.context.records, adapter.metadata.uid
        records.publish_decision(adapter.key, make_decision(uid=uid, artifact=NEW))
        records.publish_model_want(deployment.key, ModelWant(deployment.metadata.uid, 1, None, None))

    async def deleted(self) -> list[str]:
        """What a look at the artifact deletes."""
        await reconcile_artifact(self.context, Key(Kind.MODEL_ARTIFACT, *OLD))
        return self.kube.deleted


async def test_one_that_is_being_made_is_not_deleted_before_it_is_said_for_whom(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The watch may tell of it before the API server has answered; a refresh leaves the adapter's generation as it was."""
    world, adapter = Refreshed(), make_adapter()
    world.put(Kind.LORA_ADAPTER, adapter)
    world.put(Kind.VLLM_DEPLOYMENT, make_deployment())
    body = world.context.store.artifacts[OLD].model_dump(mode="json", by_alias=True, exclude_none=True)
    world.context.store.remove(Kind.MODEL_ARTIFACT, *OLD)
    decision = make_decision(uid=adapter.metadata.uid, artifact=NEW, refreshing=OLD)

    async def apply(_: Any) -> Any:
        world.put(Kind.MODEL_ARTIFACT, ready_artifact(OLD[1], uid="another", annotations={ANNOTATION_REFRESH: "due=1"}))
        assert await world.deleted() == []
        return world.kube.objects["ModelArtifact", *OLD]

    async def observe(*_: Any) -> None:
        return None

    monkeypatch.setattr(world.kube, "apply", apply)
    monkeypatch.setattr(adapter_module, "_observe", observe)
    monkeypatch.setattr(adapter_module, "plan_adapter", lambda *_, **__: AdapterPlan(decision, body, None))
    await adapter_module.reconcile_adapter(world.context, Key(Kind.LORA_ADAPTER, *adapter.key))
    assert list(world.context.records.wanters(OLD)) == [Key(Kind.LORA_ADAPTER, *adapter.key)]
    assert not world.context.records.is_made_for(OLD)
    assert await world.deleted() == []


@pytest.mark.parametrize("told", ["modelArtifact", "tokenizerArtifact", "draftModelArtifact", "artifactRef"])
async def test_what_a_status_says_is_in_use_is_not_deleted_before_it_says_otherwise(told: str) -> None:
    world = Refreshed()

    def say(artifact: tuple[str, str]) -> None:
        of_adapter = {"artifactRef": {"namespace": artifact[0], "name": artifact[1]}} if told == "artifactRef" else {}
        world.put(Kind.LORA_ADAPTER, make_adapter(), **of_adapter)
        world.put(Kind.VLLM_DEPLOYMENT, make_deployment(), **({} if of_adapter else {told: artifact[1]}))

    say(OLD)
    assert await world.deleted() == []
    say(NEW)
    assert await world.deleted() == [OLD[1]]
