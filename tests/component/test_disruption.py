"""The PodDisruptionBudget of a fleet against a real API server: made, repaired, given up, and never taken from others."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from e2e.cluster import ControlPlane
from lora_operator.api import VLLMDeployment
from lora_operator.errors import NotFoundError
from lora_operator.kube.client import Kube, load_configuration
from lora_operator.kube.kinds import DISRUPTION_BUDGETS, EVENTS, VLLM_DEPLOYMENTS
from lora_operator.reconcile import disruption_budget as disruption
from lora_operator.reconcile.context import Context
from tests.component.manifests import manifest


@pytest.fixture(autouse=True)
async def the_fleet_goes(context: Context, namespace: str) -> AsyncIterator[None]:
    """No operator of a later test finds a fleet here."""
    yield
    await context.kube.delete(VLLM_DEPLOYMENTS, namespace, "example")


async def warnings(context: Context, namespace: str) -> list[str]:
    """What Events tell of the fleet."""
    events = (await context.kube.list(EVENTS, namespace=namespace))[0]
    return [event["message"] for event in events if event["involvedObject"]["name"] == "example"]


async def fleet(context: Context, namespace: str, **spec: Any) -> VLLMDeployment:
    changes = {f"spec.{name}": value for name, value in spec.items()}
    body = await context.kube.apply(manifest("VLLMDeployment", changes, namespace=namespace))
    return VLLMDeployment.model_validate(body)


async def budget(context: Context, namespace: str) -> dict[str, Any] | None:
    try:
        return await context.kube.get(DISRUPTION_BUDGETS, namespace, "example")
    except NotFoundError:
        return None


async def test_a_fleet_has_a_budget_of_one_pod_which_is_repaired_and_given_up(
    context: Context, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disruption, "LOOK_SECONDS", -1)
    deployment = await fleet(context, namespace)
    await disruption.keep_budget(context, deployment)
    made = await budget(context, namespace)
    assert made is not None
    assert made["spec"]["maxUnavailable"] == 1
    assert made["spec"]["unhealthyPodEvictionPolicy"] == "AlwaysAllow"
    assert made["spec"]["selector"]["matchLabels"]["lora-operator.dev/vllmdeployment"] == "example"
    assert made["metadata"]["ownerReferences"][0]["uid"] == deployment.metadata.uid

    await disruption.keep_budget(context, deployment)
    assert (await budget(context, namespace) or {})["metadata"]["resourceVersion"] == made["metadata"][
        "resourceVersion"
    ]

    await context.kube.patch(DISRUPTION_BUDGETS, namespace, "example", {"spec": {"maxUnavailable": 0}})
    await disruption.keep_budget(context, deployment)
    assert (await budget(context, namespace) or {})["spec"]["maxUnavailable"] == 1

    await context.kube.delete(DISRUPTION_BUDGETS, namespace, "example")
    await disruption.keep_budget(context, deployment)
    assert await budget(context, namespace) is not None

    await disruption.keep_budget(context, await fleet(context, namespace, disruptionBudget="None"))
    assert await budget(context, namespace) is None


async def test_it_is_looked_at_when_the_spec_changes_and_else_every_few_minutes(
    context: Context, namespace: str
) -> None:
    deployment = await fleet(context, namespace)
    await disruption.keep_budget(context, deployment)
    await context.kube.delete(DISRUPTION_BUDGETS, namespace, "example")
    await disruption.keep_budget(context, deployment)
    assert await budget(context, namespace) is None
    await context.kube.delete(VLLM_DEPLOYMENTS, namespace, "example")
    await disruption.keep_budget(context, await fleet(context, namespace))  # another one of the same name
    assert await budget(context, namespace) is not None


def foreign(namespace: str, name: str, labels: dict[str, str]) -> dict[str, Any]:
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"maxUnavailable": 3, "selector": {"matchLabels": labels}},
    }


async def test_anothers_budget_of_that_name_stays_and_is_told(context: Context, namespace: str) -> None:
    await context.kube.apply(foreign(namespace, "example", {"app": "theirs"}))
    await disruption.keep_budget(context, await fleet(context, namespace))
    (told,) = await warnings(context, namespace)
    assert f"PodDisruptionBudget {namespace}/example exists" in told
    await disruption.keep_budget(context, await fleet(context, namespace, disruptionBudget="None"))
    assert (await budget(context, namespace) or {})["spec"]["maxUnavailable"] == 3


async def test_pods_that_have_a_budget_get_no_second_one_and_ours_goes(
    context: Context, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disruption, "LOOK_SECONDS", -1)
    monkeypatch.setattr(disruption, "FAILED_LOOK_SECONDS", -1)
    deployment = await fleet(context, namespace)
    await disruption.keep_budget(context, deployment)
    assert await budget(context, namespace) is not None
    labels = {"lora-operator.dev/vllmdeployment": "example"}
    await context.kube.apply(foreign(namespace, "by-hand", labels))
    await disruption.keep_budget(context, deployment)
    assert await budget(context, namespace) is None
    (told,) = await warnings(context, namespace)
    assert f"PodDisruptionBudget {namespace}/by-hand has the engine pods already" in told
    await context.kube.delete(DISRUPTION_BUDGETS, namespace, "by-hand")
    await disruption.keep_budget(context, deployment)
    assert await budget(context, namespace) is not None


async def test_one_that_was_edited_to_exclude_ours_is_made_anew(
    context: Context, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disruption, "LOOK_SECONDS", -1)
    deployment = await fleet(context, namespace)
    await disruption.keep_budget(context, deployment)
    edited = {"spec": {"maxUnavailable": None, "minAvailable": 2}}
    await context.kube.patch(DISRUPTION_BUDGETS, namespace, "example", edited)
    await disruption.keep_budget(context, deployment)
    spec = (await budget(context, namespace) or {})["spec"]
    assert (spec["maxUnavailable"], spec.get("minAvailable")) == (1, None)


async def test_an_operator_without_the_right_leaves_the_fleet_alone(
    context: Context, control_plane: ControlPlane, namespace: str, caplog: pytest.LogCaptureFixture
) -> None:
    deployment = await fleet(context, namespace)
    configuration = await load_configuration(str(control_plane.user_kubeconfig("system:kube-proxy")))
    async with Kube(configuration) as kube:
        await disruption.keep_budget(replace(context, kube=kube), deployment)
    assert f"PodDisruptionBudget of VLLMDeployment {namespace}/example" in caplog.text
    assert "forbidden" in caplog.text
