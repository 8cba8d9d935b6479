"""spec.replicas against a real API server: it is always there, it is the scaler's, and no apply takes it back."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lora_operator.kube.kinds import VLLM_DEPLOYMENTS, Kind
from lora_operator.kube.objects import KubeObject
from lora_operator.reconcile.context import Context
from lora_operator.reconcile.pod_events import last_warning
from lora_operator.reconcile.records import Warnings
from lora_operator.reconcile.replicas import keep_replicas
from tests.component.conftest import Kubectl
from tests.component.manifests import manifest
from tests.unit.builders import make_workload

APPLY: dict[str, tuple[str, ...]] = {"client-side": (), "server-side": ("--server-side",)}


async def reconcile(context: Context, namespace: str) -> dict[str, Any]:
    """Read the object into the store, keep its replicas, and return it as it is then."""
    context.store.upsert(Kind.VLLM_DEPLOYMENT, await context.kube.get(VLLM_DEPLOYMENTS, namespace, "example"))
    await keep_replicas(context, context.store.deployments[namespace, "example"])
    return await context.kube.get(VLLM_DEPLOYMENTS, namespace, "example")


def apply(kubectl: Kubectl, namespace: str, how: str, **changes: Any) -> None:
    answer = kubectl.apply(manifest("VLLMDeployment", changes, namespace=namespace), *APPLY[how])
    assert answer.ok, answer.error


def scale_of(kubectl: Kubectl, namespace: str) -> dict[str, Any]:
    path = f"/apis/lora-operator.dev/v1alpha1/namespaces/{namespace}/vllmdeployments/example/scale"
    found: dict[str, Any] = json.loads(kubectl("get", "--raw", path))
    return found


@pytest.mark.parametrize("how", APPLY)
async def test_what_a_scaler_sets_survives_an_apply(
    context: Context, kubectl: Kubectl, namespace: str, how: str
) -> None:
    apply(kubectl, namespace, how)
    written = await reconcile(context, namespace)
    assert written["spec"]["replicas"] == 1
    assert scale_of(kubectl, namespace)["spec"]["replicas"] == 1, "an autoscaler takes 0 for: stay away"
    managers = {entry["manager"] for entry in written["metadata"]["managedFields"]}
    assert "lora-operator" not in managers, "who sets the number by server-side apply must not meet a conflict with us"

    kubectl("scale", "vllm/example", "-n", namespace, "--replicas=2")
    apply(kubectl, namespace, how, **{"spec.engine": {"image": "vllm.example/vllm:2"}})
    scaled = await reconcile(context, namespace)
    assert (scaled["spec"]["replicas"], scaled["spec"]["engine"]["image"]) == (2, "vllm.example/vllm:2")
    assert (await reconcile(context, namespace))["metadata"]["resourceVersion"] == scaled["metadata"]["resourceVersion"]


@pytest.mark.parametrize("how", APPLY)
async def test_removing_the_number_from_a_manifest_keeps_what_runs(
    context: Context, kubectl: Kubectl, namespace: str, how: str
) -> None:
    apply(kubectl, namespace, how, **{"spec.replicas": 3})
    written = await reconcile(context, namespace)
    assert written["spec"]["replicas"] == 3
    workload = make_workload(owner=written["metadata"]["uid"])
    workload["metadata"] |= {"name": "example", "namespace": namespace, "resourceVersion": "1"}
    workload["spec"]["replicas"] = 3
    context.store.upsert(Kind.DEPLOYMENT, workload)

    apply(kubectl, namespace, how)
    assert "replicas" not in kubectl.read("vllm", "example", "-n", namespace)["spec"]
    assert (await reconcile(context, namespace))["spec"]["replicas"] == 3
    apply(kubectl, namespace, how)
    assert (await reconcile(context, namespace))["spec"]["replicas"] == 3


async def test_a_number_that_was_set_meanwhile_is_not_overwritten(
    context: Context, kubectl: Kubectl, namespace: str
) -> None:
    apply(kubectl, namespace, "client-side")
    context.store.upsert(Kind.VLLM_DEPLOYMENT, await context.kube.get(VLLM_DEPLOYMENTS, namespace, "example"))
    kubectl("patch", "vllm", "example", "-n", namespace, "--type=merge", "-p", '{"spec": {"replicas": 5}}')
    await keep_replicas(context, context.store.deployments[namespace, "example"])
    assert kubectl.read("vllm", "example", "-n", namespace)["spec"]["replicas"] == 5


async def test_one_that_is_gone_is_left_alone(context: Context, kubectl: Kubectl, namespace: str) -> None:
    apply(kubectl, namespace, "client-side")
    context.store.upsert(Kind.VLLM_DEPLOYMENT, await context.kube.get(VLLM_DEPLOYMENTS, namespace, "example"))
    kubectl("delete", "vllm", "example", "-n", namespace)
    await keep_replicas(context, context.store.deployments[namespace, "example"])
    assert not kubectl("get", "vllm", "-n", namespace, "-o", "name")


def event(namespace: str, name: str, uid: str, **fields: Any) -> dict[str, Any]:
    """An Event about a Job, as the Job controller writes them."""
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": name, "namespace": namespace},
        "involvedObject": {"kind": "Job", "namespace": namespace, "name": "j", "uid": uid},
        "type": "Warning",
        "reason": "FailedCreate",
        **fields,
    }


async def test_the_newest_warning_about_an_object_is_found(context: Context, namespace: str) -> None:
    job, known = KubeObject(name="j", namespace=namespace, uid="uid-j"), Warnings()
    for body in (
        event(namespace, "a", "uid-j", message="old", lastTimestamp="2026-01-01T00:00:00Z"),
        event(namespace, "b", "uid-j", message="exceeded quota", lastTimestamp="2026-01-01T00:00:09Z"),
        event(namespace, "c", "uid-j", message="made", type="Normal", lastTimestamp="2026-01-01T00:00:10Z"),
        event(namespace, "d", "uid-other", message="another's", lastTimestamp="2026-01-01T00:00:11Z"),
    ):
        await context.kube.create(body)
    assert await last_warning(context, job, known=known) == "FailedCreate: exceeded quota"
    silent = KubeObject(name="k", namespace=namespace, uid="uid-k")
    assert await last_warning(context, silent, known=known) is None

    await context.kube.create(event(namespace, "e", "uid-j", message="new", lastTimestamp="2026-01-01T00:00:12Z"))
    assert await last_warning(context, job, known=known) == "FailedCreate: exceeded quota", "not asked again at once"
