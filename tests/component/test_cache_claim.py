"""The claim of a ModelCache on a real API server: made once, kept or owned, found again, never somebody else's."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, cast

import pytest

from e2e.cluster import ControlPlane
from lora_operator.kube.client import Kube, load_configuration
from lora_operator.kube.kinds import CLAIMS, MODEL_CACHES, Kind
from lora_operator.reconcile.cache import reconcile_cache
from lora_operator.reconcile.context import build_context
from lora_operator.reconcile.store import Key, Store
from lora_operator.settings import Settings
from lora_operator.vllm import Engines
from tests.component.conftest import Kubectl
from tests.component.manifests import manifest

TEMPLATE: dict[str, Any] = {
    "metadata": {"labels": {"team": "ml"}, "annotations": {"backup": "no"}},
    "spec": {
        "accessModes": ["ReadWriteOnce"],
        "resources": {"requests": {"storage": "1Gi"}},
        "storageClassName": "fast",
    },
}


@pytest.fixture
async def kube(control_plane: ControlPlane) -> AsyncIterator[Kube]:
    """The operator's client, as administrator."""
    async with Kube(await load_configuration(str(control_plane.kubeconfig))) as client:
        yield client


class World:
    """One ModelCache and its reconcile."""

    def __init__(self, kube: Kube, kubectl: Kubectl, namespace: str) -> None:
        self.kube, self.kubectl, self.namespace = kube, kubectl, namespace
        self.store = Store()
        self.context = build_context(
            kube=kube,
            engines=cast(Engines, None),
            store=self.store,
            settings=Settings(operator_image="i", operator_namespace="n"),
            enqueue=lambda *_: None,
        )

    async def reconcile(self) -> dict[str, Any]:
        """Reconcile the cache as it is now; its status after that."""
        self.store.upsert(Kind.MODEL_CACHE, await self.kube.get(MODEL_CACHES, self.namespace, "example"))
        await reconcile_cache(self.context, Key(Kind.MODEL_CACHE, self.namespace, "example"))
        status: dict[str, Any] = (await self.kube.get(MODEL_CACHES, self.namespace, "example"))["status"]
        return status

    async def claim(self) -> dict[str, Any]:
        return await self.kube.get(CLAIMS, self.namespace, "example")

    def apply(self, **storage: Any) -> None:
        changes = {"spec.storage": {"volumeClaimTemplate": TEMPLATE, **storage}}
        answer = self.kubectl.apply(manifest("ModelCache", changes, namespace=self.namespace))
        assert answer.ok, answer.error


@pytest.fixture
def world(kube: Kube, kubectl: Kubectl, namespace: str) -> World:
    """A namespace with nothing in it."""
    return World(kube, kubectl, namespace)


def ready(status: dict[str, Any]) -> tuple[str, str]:
    found = next(c for c in status["conditions"] if c["type"] == "Ready")
    return found["reason"], found["message"]


async def test_a_claim_is_made_once_and_taken_over_by_a_cache_made_anew(world: World) -> None:
    world.apply()
    status = await world.reconcile()
    made = await world.claim()
    assert ready(status)[0] == "ClaimPending"
    assert "StorageClass fast does not exist" in ready(status)[1]
    assert (status["claimName"], status["claimUid"]) == ("example", made["metadata"]["uid"])
    assert status["accessModes"] == ["ReadWriteOnce"]
    assert made["metadata"]["labels"] == {
        "team": "ml",
        "app.kubernetes.io/managed-by": "lora-operator",
        "lora-operator.dev/modelcache": "example",
    }
    assert made["metadata"]["annotations"] == {"backup": "no"}
    assert "ownerReferences" not in made["metadata"]
    assert made["spec"]["storageClassName"] == "fast"
    await world.reconcile()
    world.kubectl("delete", "mcache", "example", "-n", world.namespace)
    world.apply()
    assert (await world.reconcile())["claimUid"] == made["metadata"]["uid"]
    assert (await world.claim())["metadata"]["resourceVersion"] == made["metadata"]["resourceVersion"]


async def test_the_policy_moves_the_owner_and_nothing_else(world: World) -> None:
    world.apply(reclaimPolicy="Delete")
    await world.reconcile()
    cache = await world.kube.get(MODEL_CACHES, world.namespace, "example")
    [owner] = (await world.claim())["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["uid"], owner["controller"]) == ("ModelCache", cache["metadata"]["uid"], True)
    world.apply(reclaimPolicy="Retain")
    await world.reconcile()
    assert "ownerReferences" not in (await world.claim())["metadata"]
    world.apply(reclaimPolicy="Delete")
    await world.reconcile()
    assert (await world.claim())["metadata"]["ownerReferences"] == [owner]

    # Made anew before the old one's claim was collected: it waits, or it would take what is about to go.
    world.kubectl("delete", "mcache", "example", "-n", world.namespace)
    world.apply(reclaimPolicy="Delete")
    reason, message = ready(await world.reconcile())
    assert reason == "ClaimUnusable"
    assert "of before" in message
    assert (await world.claim())["metadata"]["ownerReferences"] == [owner]


async def test_a_claim_of_somebody_else_is_left_alone(world: World) -> None:
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "example", "namespace": world.namespace},
        "spec": TEMPLATE["spec"],
    }
    before = await world.kube.create(claim)
    world.apply(reclaimPolicy="Delete")
    status = await world.reconcile()
    assert ready(status)[0] == "NameTaken"
    assert "claimUid" not in status
    assert (await world.claim())["metadata"]["resourceVersion"] == before["metadata"]["resourceVersion"]


async def test_a_claim_that_is_refused_says_the_api_servers_words(world: World) -> None:
    template = {"spec": TEMPLATE["spec"] | {"resources": {"requests": {"storage": "0"}}}}
    world.apply(volumeClaimTemplate=template)
    reason, message = ready(await world.reconcile())
    assert reason == "ClaimRefused"
    assert "must be greater than zero" in message
    world.kubectl("delete", "mcache", "example", "-n", world.namespace)
