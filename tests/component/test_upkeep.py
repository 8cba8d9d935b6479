"""What the operator tidies up and writes again by itself, against a real API server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from e2e.cluster import ControlPlane
from lora_operator.api import VLLMDeployment
from lora_operator.desired.children import build_guard_secret, build_plugin_config_map, plugin_hash
from lora_operator.kube.client import Kube, load_configuration
from lora_operator.kube.kinds import CONFIG_MAPS, REPLICA_SETS, SECRETS, Kind
from lora_operator.names import engine_labels, plugin_config_map
from lora_operator.reconcile import services
from lora_operator.reconcile.context import Context, build_context
from lora_operator.reconcile.store import Store
from lora_operator.reconcile.upkeep import remove_old_plugins
from lora_operator.settings import Settings
from lora_operator.vllm import Engines
from tests.unit.builders import make_deployment, take_list
from tests.unit.fake_clock import FakeClock

NOW, OLD, OLDER, OLDEST = ({"plugin.py": f"# {age}"} for age in ("now", "old", "older", "oldest"))


@pytest.fixture
def clock() -> FakeClock:
    """The context's clock."""
    return FakeClock()


@pytest.fixture
async def context(control_plane: ControlPlane, clock: FakeClock) -> AsyncIterator[Context]:
    """A context of an operator whose plugin is NOW; its store is filled by the test."""
    async with Kube(await load_configuration(str(control_plane.kubeconfig))) as kube, Engines() as engines:
        yield build_context(
            kube=kube,
            engines=engines,
            store=Store(),
            settings=Settings(operator_image="i", operator_namespace="n"),
            enqueue=lambda *_: None,
            plugin_files=NOW,
            clock=clock,
        )


def deployment_in(namespace: str) -> VLLMDeployment:
    found = make_deployment()
    return found.model_copy(update={"metadata": found.metadata.model_copy(update={"namespace": namespace})})


def template(deployment: VLLMDeployment, plugin: dict[str, str]) -> dict[str, Any]:
    volume = {"name": "kit", "configMap": {"name": plugin_config_map(deployment.metadata.name, plugin_hash(plugin))}}
    return {
        "metadata": {"labels": engine_labels(deployment.metadata.name)},
        "spec": {"containers": [{"name": "vllm", "image": "x"}], "volumes": [volume]},
    }


def workload(deployment: VLLMDeployment, kind: str, name: str, plugin: dict[str, str]) -> dict[str, Any]:
    labels = engine_labels(deployment.metadata.name)
    metadata = {"name": name, "namespace": deployment.metadata.namespace, "labels": labels}
    spec = {"selector": {"matchLabels": labels}, "template": template(deployment, plugin), "replicas": 0}
    return {"apiVersion": "apps/v1", "kind": kind, "metadata": metadata, "spec": spec}


async def test_plugins_that_no_replica_set_and_no_pod_has_are_removed(context: Context, namespace: str) -> None:
    deployment = deployment_in(namespace)
    name = deployment.metadata.name

    async def present() -> set[str]:
        items, _ = await context.kube.list(CONFIG_MAPS, namespace=namespace)
        take_list(context.store, Kind.CONFIG_MAP, items, "1")
        return {item["metadata"]["name"] for item in items if "-kit-" in item["metadata"]["name"]}

    def named(*plugins: dict[str, str]) -> set[str]:
        return {plugin_config_map(name, plugin_hash(plugin)) for plugin in plugins}

    for plugin in (NOW, OLD, OLDER, OLDEST):
        await context.kube.apply(build_plugin_config_map(deployment, plugin))
    context.store.upsert(Kind.DEPLOYMENT, await context.kube.apply(workload(deployment, "Deployment", name, OLD)))
    await context.kube.apply(workload(deployment, "ReplicaSet", f"{name}-1", OLDER))
    assert await present() == named(NOW, OLD, OLDER, OLDEST)

    await remove_old_plugins(context, deployment)
    assert await present() == named(NOW, OLD, OLDER)

    await context.kube.delete(REPLICA_SETS, namespace, f"{name}-1")
    pod = {**template(deployment, OLDER), "apiVersion": "v1", "kind": "Pod"}
    pod["metadata"] = {"name": "llama-0", "namespace": namespace, "labels": engine_labels(name)}
    context.store.upsert(Kind.POD, pod)
    await remove_old_plugins(context, deployment)
    assert await present() == named(NOW, OLD, OLDER), "a pod runs from it"

    context.store.remove(Kind.POD, namespace, "llama-0", uid=None, resource_version="9")
    await remove_old_plugins(context, deployment)
    assert await present() == named(NOW, OLD)


async def test_without_a_deployment_in_the_store_every_plugin_stays(context: Context, namespace: str) -> None:
    deployment = deployment_in(namespace)
    plugin = await context.kube.apply(build_plugin_config_map(deployment, OLDEST))
    context.store.upsert(Kind.CONFIG_MAP, plugin)
    await remove_old_plugins(context, deployment)
    assert await context.kube.get(CONFIG_MAPS, namespace, plugin["metadata"]["name"])


async def test_a_gate_secret_is_written_once_an_hour_and_soon_where_it_may_be_missing(
    context: Context, clock: FakeClock, namespace: str
) -> None:
    secret = build_guard_secret(deployment_in(namespace), "token")
    place = (SECRETS, namespace, secret["metadata"]["name"])

    async def there(*, doubtful: bool = False) -> bool:
        """Whether a Secret that somebody deleted is there after a look."""
        await context.kube.delete(*place)
        await context.children.ensure_secret(secret, doubtful=doubtful)
        items, _ = await context.kube.list(SECRETS, namespace=namespace)
        return bool(items)

    assert await there()
    clock.seconds += services.SECRET_SECONDS * 0.7
    assert not await there()
    assert await there(doubtful=True)
    clock.seconds += services.DOUBTED_SECRET_SECONDS / 2
    assert not await there(doubtful=True)
    clock.seconds += services.DOUBTED_SECRET_SECONDS
    assert await there(doubtful=True)
    clock.seconds += services.SECRET_SECONDS * 1.3
    assert await there()
