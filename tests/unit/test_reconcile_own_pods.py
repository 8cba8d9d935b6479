"""Which pods are a deployment's own, and when nothing may be said of them: by owners, never by labels that anybody can set."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest

from lora_operator.constants import API_VERSION
from lora_operator.kube.client import Kube
from lora_operator.kube.kinds import Kind
from lora_operator.plan.deployment_pods import DeploymentPod, DeploymentPods, PodView
from lora_operator.reconcile.context import Context, build_context
from lora_operator.reconcile.own_pods import observe_pods, own_pods, report_readiness
from lora_operator.reconcile.store import Store
from lora_operator.settings import Settings
from lora_operator.vllm import Engines
from tests.unit.builders import engine_pod, make_adapter, make_deployment, make_view, make_workload

PLACE = ("serving", "llama-0")
OWNERS: dict[str, str | None] = {"uid-rs": "uid-deploy", "uid-foreign-rs": "uid-foreign-deploy", "uid-gone-rs": None}


def context(
    *pods: dict[str, Any],
    workload: dict[str, Any] | None,
    owners: dict[str, str | None] | None = None,
    asked: bool = True,
    view: PodView | None = None,
) -> Context:
    """A context over a store with these pods; it has no client, and none is needed."""
    store = Store()
    if workload is not None:
        store.upsert(Kind.DEPLOYMENT, workload)
    for pod in pods:
        store.upsert(Kind.POD, pod)
    found = build_context(
        kube=cast(Kube, None),
        engines=cast(Engines, None),
        store=store,
        settings=Settings(operator_image="i", operator_namespace="n"),
        enqueue=lambda *_: None,
    )
    found.records.deployments["serving", "llama"].replica_sets.update(OWNERS if owners is None else owners)
    if asked:
        found.records.pods[PLACE].asked = True
    if view is not None:
        found.records.pods[PLACE].view = view
    return found


def owned_elsewhere(uid: str) -> dict[str, Any]:
    return engine_pod(owner=uid)


OWN: dict[str, tuple[Context, int]] = {
    "a pod of its Deployment": (context(engine_pod(), workload=make_workload()), 1),
    "before its Deployment is known, none is": (context(engine_pod(), workload=None), 0),
    "a Deployment of that name that is somebody else's": (
        context(engine_pod(), workload=make_workload(owner="uid-other")),
        0,
    ),
    "a pod of another Deployment with our labels": (
        context(owned_elsewhere("uid-foreign-rs"), workload=make_workload()),
        0,
    ),
    "a pod whose ReplicaSet is gone": (context(owned_elsewhere("uid-gone-rs"), workload=make_workload()), 0),
    "a pod whose ReplicaSet was not asked for yet": (
        context(engine_pod(), workload=make_workload(), owners={}),
        0,
    ),
    "a pod that has failed": (context(engine_pod(phase="Failed"), workload=make_workload()), 0),
    "a pod that is being deleted may still serve": (context(engine_pod(deleted=True), workload=make_workload()), 1),
}


@pytest.mark.parametrize("case", OWN)
def test_own_pods(case: str) -> None:
    found, count = OWN[case]
    assert len(own_pods(found, make_deployment())) == count


VIEW = make_view()
FLEETS: dict[str, tuple[Context, DeploymentPods | None]] = {
    "no pod": (context(workload=make_workload()), DeploymentPods(2, ())),
    "a pod and what it showed": (
        context(engine_pod(), workload=make_workload(), view=VIEW),
        DeploymentPods(2, (DeploymentPod("llama-0", True, VIEW),)),
    ),
    "a ready pod that was not asked since this operator started: nothing is known": (
        context(engine_pod(), workload=make_workload(), asked=False),
        None,
    ),
    "a pod that is not ready need not have been asked": (
        context(engine_pod(is_ready=False), workload=make_workload(), asked=False),
        DeploymentPods(2, (DeploymentPod("llama-0", False, None),)),
    ),
    "a pod whose owner is not known: nothing is known": (
        context(engine_pod(), workload=make_workload(), owners={}),
        None,
    ),
    "what another pod of that name showed does not count": (
        context(engine_pod(uid="uid-new"), workload=make_workload(), view=VIEW),
        DeploymentPods(2, (DeploymentPod("llama-0", True, None),)),
    ),
    "what the container before this one showed does not count": (
        context(
            engine_pod(container={"ready": True, "state": {"running": {}}, "containerID": "containerd://2"}),
            workload=make_workload(),
            view=VIEW,
        ),
        DeploymentPods(2, (DeploymentPod("llama-0", True, None),)),
    ),
    "a pod that is being deleted is not counted on": (
        context(engine_pod(deleted=True), workload=make_workload()),
        DeploymentPods(2, ()),
    ),
    "somebody else's pod with our labels": (
        context(owned_elsewhere("uid-foreign-rs"), workload=make_workload()),
        DeploymentPods(2, ()),
    ),
}


@pytest.mark.parametrize("case", FLEETS)
def test_observe_fleet(case: str) -> None:
    found, expected = FLEETS[case]
    assert observe_pods(found, make_deployment()) == expected


def told_of(found: Context, reason: str, message: str, fleet: DeploymentPods) -> int:
    """How many adapters are woken by this state of their deployment."""
    woken: list[object] = []
    found = replace(found, enqueue=woken.append)
    deployment = make_deployment(conditions={"Available": ("False", reason, message)})
    report_readiness(found, deployment, fleet, deployment.status)
    return len(woken)


def test_adapters_are_woken_by_another_reason_and_not_by_other_words() -> None:
    """An engine that crashes again and again would else cost a write on each of thousands of adapters every time."""
    found = context(workload=make_workload())
    for number in range(3):
        body = make_adapter(f"a{number}").to_wire() | {"apiVersion": API_VERSION, "kind": "LoRAAdapter"}
        found.store.upsert(Kind.LORA_ADAPTER, body)
    down = DeploymentPods(1, (DeploymentPod("llama-0", False, None),))

    assert told_of(found, "Progressing", "engines are starting", down) == 3
    assert told_of(found, "CrashLooping", "restarted 1 time", down) == 3
    assert told_of(found, "CrashLooping", "restarted 2 times", down) == 0
    assert told_of(found, "CrashLooping", "restarted 3 times", DeploymentPods(2, down.pods)) == 3
