"""What goes wrong at night, on the real cluster: each mends itself, is told truthfully, and holds up nobody else."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from e2e.cluster import Cluster
from e2e.conftest import DEPLOYMENT, FLEET, SERVING, TEAM_A, Fleet
from e2e.engine_client import models, token_ids
from e2e.fixtures.apiproxy import ApiProxy
from e2e.fixtures.hub import HubServer
from e2e.load import clients, service_url
from e2e.stack import OPERATOR_NAMESPACE, RELEASE, Json, Stack, eventually, lora_adapter
from e2e.test_isolation import engine_containers

pytestmark = (
    pytest.mark.node
)  # engines are frozen by containerd, the operator is cut off by a proxy, clients use the ClusterIP

SEED = 20261121
UPGRADES = 5
AWAY_SECONDS = 60
FROZEN_SECONDS = 50  # the kubelet ends a silent engine after a minute


def container(stack: Stack, pod: str) -> str:
    """Id of the engine's container, as containerd knows it."""
    return engine_containers(stack)[pod][0].rpartition("/")[2]


@contextmanager
def behind(proxy: ApiProxy, stack: Stack) -> Iterator[None]:
    """The operator talks to the API server through the proxy, inside the block."""
    names = ("KUBERNETES_SERVICE_HOST", "KUBERNETES_SERVICE_PORT")
    where = ("set", "env", f"deployment/{RELEASE}", "-n", OPERATOR_NAMESPACE)
    with proxy:
        stack.scale_operator(0)
        stack.cluster.kubectl(*where, f"{names[0]}={proxy.host}", f"{names[1]}={proxy.port}")
        try:
            stack.scale_operator(1)
            yield
        finally:
            stack.scale_operator(0)
            stack.cluster.kubectl(*where, *(f"{name}-" for name in names))
    stack.scale_operator(1)


@pytest.fixture
def proxy(cluster: Cluster) -> ApiProxy:
    return ApiProxy(
        host=cluster.node_ip,
        upstream=cluster.apiserver_url,
        cert=cluster.serving_cert,
        key=cluster.serving_key,
        ca=cluster.ca,
    )


@pytest.fixture(autouse=True)
def adapters_go(stack: Stack, fleet: Fleet) -> Iterator[None]:
    """What a test has applied is gone after it, however it ended."""
    yield
    names = [one["metadata"]["name"] for one in stack.items("lora", TEAM_A)]
    if names:
        stack.cluster.kubectl("delete", "lora", *names, "-n", TEAM_A)


def told(stack: Stack, adapter: str) -> Json:
    """The status of an adapter."""
    status: Json = (stack.get("lora", adapter, TEAM_A) or {}).get("status", {})
    return status


def test_an_engine_that_accepts_and_never_answers_is_told_and_delays_no_other(stack: Stack, fleet: Fleet) -> None:
    stack.apply(lora_adapter("before", TEAM_A, repo="tiny/one", deployment=DEPLOYMENT))
    stack.wait_condition("lora", "before", TEAM_A, timeout=90)
    was = engine_containers(stack)
    (silent, _), (other, url) = sorted(stack.engine_urls(SERVING, FLEET).items())
    stack.cluster.ctr("tasks", "pause", container(stack, silent))
    try:
        until = time.monotonic() + FROZEN_SECONDS
        stack.apply(lora_adapter("meanwhile", TEAM_A, repo="tiny/two", deployment=DEPLOYMENT))
        eventually(lambda: "meanwhile" in models(url), what=f"{other} has it", timeout=until - time.monotonic())

        # First it is a ready pod that does not answer, later one that is not ready and counts no more: both are the truth.
        def is_told() -> bool:
            status = told(stack, "meanwhile")
            known = silent in str(status.get("failures")) or status.get("pods") == {"wanted": 1, "loaded": 1}
            return known and stack.condition("vllm", FLEET, SERVING)["status"] == "False"

        eventually(is_told, what=f"{silent} is named, or not counted", timeout=until - time.monotonic())
    finally:
        stack.cluster.ctr("tasks", "resume", container(stack, silent))
    for name in ("before", "meanwhile"):
        eventually(
            lambda name=name: told(stack, name).get("pods") == {"wanted": 2, "loaded": 2},  # type: ignore[misc]
            what=f"{name} is on both again",
            timeout=60,
        )
        stack.wait_condition("lora", name, TEAM_A, timeout=30)
    stack.wait_condition("vllm", FLEET, SERVING, timeout=60)
    assert engine_containers(stack) == was


def test_the_api_server_away_for_a_minute_costs_nobody_an_answer_and_all_is_made_up_for(
    stack: Stack, fleet: Fleet, proxy: ApiProxy
) -> None:
    for name, repo in (("kept", "tiny/one"), ("leaves", "tiny/two")):
        stack.apply(lora_adapter(name, TEAM_A, repo=repo, deployment=DEPLOYMENT))
        stack.wait_condition("lora", name, TEAM_A, timeout=90)
    was = engine_containers(stack)
    with behind(proxy, stack):
        stack.wait_condition("lora", "kept", TEAM_A, timeout=30)
        with clients(service_url(stack, SERVING, FLEET), ("kept",), 1, pause=0.2):
            proxy.cut()
            stack.apply(lora_adapter("comes", TEAM_A, repo="tiny/three", deployment=DEPLOYMENT))
            stack.delete("lora", "leaves", TEAM_A)
            until = time.monotonic() + AWAY_SECONDS
            eventually(lambda: time.monotonic() > until, what="a minute is over", timeout=AWAY_SECONDS + 5)
            assert proxy.refused > 0, "the operator did not try"
            assert "comes" not in str(models(sorted(stack.engine_urls(SERVING, FLEET).values())[0]))
            (pod,) = stack.operator_pods()
            assert pod["status"]["containerStatuses"][0]["restartCount"] == 0
            proxy.heal()
            stack.wait_condition("lora", "comes", TEAM_A, timeout=60)
            for url in stack.engine_urls(SERVING, FLEET).values():
                eventually(lambda url=url: "leaves" not in models(url), what="it is unloaded", timeout=30)  # type: ignore[misc]
    assert engine_containers(stack) == was


def test_an_operator_that_is_killed_in_upgrades_ends_where_the_spec_says(
    stack: Stack, fleet: Fleet, hub: HubServer, tiny: Path, reference: Any
) -> None:
    hub.create_repo("tiny/killed")
    revisions = {name: hub.commit("tiny/killed", tiny / "adapters" / name) for name in ("one", "one-v2")}

    def want(content: str) -> None:
        adapter = lora_adapter("killed", TEAM_A, repo="tiny/killed", revision=revisions[content], deployment=DEPLOYMENT)
        stack.apply(adapter)

    want("one")
    stack.wait_condition("lora", "killed", TEAM_A, timeout=90)
    was, chance = engine_containers(stack), random.Random(SEED)
    kubectl = stack.cluster.kubectl
    with clients(service_url(stack, SERVING, FLEET), ("killed",), 2, pause=0.05):
        for number in range(UPGRADES):
            content = ("one-v2", "one")[number % 2]
            (pod,) = stack.operator_pods()
            want(content)
            until = time.monotonic() + chance.uniform(0, 1.5)
            eventually(lambda until=until: time.monotonic() > until, what="the moment", timeout=5, interval=0.01)  # type: ignore[misc]
            kubectl("delete", "pod", pod["metadata"]["name"], "-n", OPERATOR_NAMESPACE, "--force", "--grace-period=0")
            adapter = stack.wait_condition("lora", "killed", TEAM_A, timeout=90)
            assert adapter["status"]["resolvedRevision"] == revisions[content]
            case = reference()[content]["completions"][0]
            for url in stack.engine_urls(SERVING, FLEET).values():
                assert token_ids(url, "killed", case["prompt"]) == case["token_ids"], f"upgrade {number} to {content}"
            eventually(
                lambda: len([p for p in stack.operator_pods() if "deletionTimestamp" not in p["metadata"]]) == 1,
                what="one operator",
                timeout=60,
            )
    assert engine_containers(stack) == was
