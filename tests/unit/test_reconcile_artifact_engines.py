"""Whose engines an artifact is for: who wants it, directly or by an adapter; for one made by hand who uses its cache."""

from __future__ import annotations

import pytest

from lora_operator.kube.kinds import Kind
from lora_operator.reconcile.artifact import fleets_of
from lora_operator.reconcile.context import Context
from lora_operator.reconcile.records import ModelWant
from tests.unit.builders import make_adapter, make_artifact, make_cache, make_decision, make_deployment
from tests.unit.small_world import SmallWorld

ARTIFACT = make_artifact("wanted")


@pytest.fixture
def context() -> Context:
    """Two fleets over the default cache, one over another, one elsewhere; nobody wants anything yet."""
    world = SmallWorld()
    for cache in (make_cache(is_default=True), make_cache("other")):
        world.put(Kind.MODEL_CACHE, cache)
    for deployment in (
        make_deployment("by-default"),
        make_deployment("by-name", cacheRef={"name": "default"}),
        make_deployment("beside", cacheRef={"name": "other"}),
        make_deployment("no-cache", cacheRef={"name": "none"}),
        make_deployment("far", "elsewhere"),
    ):
        world.put(Kind.VLLM_DEPLOYMENT, deployment)
    world.put(Kind.LORA_ADAPTER, make_adapter("sql", deployment="by-name"))
    return world.context


def names(context: Context) -> set[str]:
    return {deployment.metadata.name for deployment in fleets_of(context, ARTIFACT)}


def test_one_made_by_hand_is_for_all_that_use_its_cache(context: Context) -> None:
    assert names(context) == {"by-default", "by-name"}


def test_a_fleet_that_wants_it(context: Context) -> None:
    context.records.publish_model_want(("serving", "by-default"), ModelWant("u", 1, ARTIFACT.key, None))
    assert names(context) == {"by-default"}


def test_the_fleet_of_an_adapter_that_wants_it(context: Context) -> None:
    decision = make_decision(uid="u", artifact=ARTIFACT.key)
    context.records.publish_decision(("team-a", "sql"), decision)
    assert names(context) == {"by-name"}


def test_a_wanter_that_is_gone_says_nothing(context: Context) -> None:
    context.records.publish_model_want(("serving", "gone"), ModelWant("u", 1, ARTIFACT.key, None))
    assert names(context) == {"by-default", "by-name"}
