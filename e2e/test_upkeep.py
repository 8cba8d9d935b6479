"""The operator comes and goes, engines and bytes stay; and what a VLLMDeployment leaves behind when it is deleted."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from e2e.conftest import DEPLOYMENT, FLEET, SERVING, TEAM_A, TEAM_B, Fleet
from e2e.engine_client import models, token_ids
from e2e.fixtures.hub import HubServer
from e2e.stack import OPERATOR_NAMESPACE, SERVED_NAMES, Json, Stack, eventually, lora_adapter, vllm_deployment

REPOS = ("tiny/base", "tiny/one", "tiny/two", "acme/private")
OTHER_RELEASE, OTHER_NAMESPACE = "another", "lora-elsewhere"


def engines(stack: Stack) -> list[Any]:
    """What changes when a pod is replaced, or a container restarts."""
    return sorted(
        (pod["metadata"]["uid"], status["containerID"], status["restartCount"], status["ready"])
        for pod in stack.pods(SERVING, FLEET)
        for status in pod["status"]["containerStatuses"]
    )


def cached_files(stack: Stack) -> list[str]:
    """Every file on the cache's volume: path, size, inode and time of change, as an engine sees them."""
    pod = sorted(stack.engine_urls(SERVING, FLEET))[0]
    words = ("find", "/model-cache", "-type", "f", "-printf", r"%P %s %i %T@\n")
    lines = stack.cluster.kubectl("exec", pod, "-n", SERVING, "--", *words).splitlines()
    return sorted(line for line in lines if not line.split(" ")[0].endswith((".lock", ".incomplete")))


def uids(stack: Stack, *words: str) -> dict[str, str]:
    """kind/namespace/name → UID."""
    items = json.loads(stack.cluster.kubectl("get", *words, "-o", "json"))["items"]
    return {
        f"{o['kind']}/{o['metadata'].get('namespace', '')}/{o['metadata']['name']}": o["metadata"]["uid"] for o in items
    }


def status(stack: Stack, kind: str, name: str, namespace: str) -> Json:
    found: Json = (stack.get(kind, name, namespace) or {})["status"]
    return found


def crds(stack: Stack) -> dict[str, str]:
    return {name: uid for name, uid in uids(stack, "crd").items() if name.endswith("lora-operator.dev")}


def answers(stack: Stack, expected: Json, names: dict[str, str]) -> None:
    """Every engine answers every name with the token ids of its adapter."""
    for url in stack.engine_urls(SERVING, FLEET).values():
        for name, adapter in names.items():
            case = expected[adapter]["completions"][0]
            assert token_ids(url, name, case["prompt"]) == case["token_ids"], f"{name} at {url}"


def names_of(fetched: dict[str, dict[str, int]]) -> str:
    return json.dumps(fetched, sort_keys=True)


@pytest.fixture
def served(stack: Stack, fleet: Fleet) -> Iterator[dict[str, Json]]:
    """Three adapters, one of them of a private repository; whatever a test does, the operator is installed afterwards."""
    stack.apply(
        lora_adapter("stays", TEAM_A, repo="tiny/one", deployment=DEPLOYMENT),
        lora_adapter("private", TEAM_B, repo="acme/private", token_secret="hub", deployment=DEPLOYMENT),
        lora_adapter("leaves", TEAM_A, repo="tiny/two", deployment=DEPLOYMENT),
    )
    places = {"stays": TEAM_A, "private": TEAM_B, "leaves": TEAM_A}
    yield {name: stack.wait_condition("lora", name, team, timeout=90) for name, team in places.items()}
    stack.install_operator("--take-ownership")
    stack.cluster.kubectl("delete", "lora", "stays", "leaves", "comes", "-n", TEAM_A, "--ignore-not-found")
    stack.delete("lora", "private", TEAM_B)


def test_uninstalling_and_installing_again_disturbs_no_engine_and_downloads_nothing(
    stack: Stack, served: dict[str, Json], hub: HubServer, reference: Any
) -> None:
    stack.wait_condition("vllm", FLEET, SERVING, timeout=60)
    kinds = ("lora,vllm,mcache,mart,pvc", "-A")
    before = (engines(stack), crds(stack), uids(stack, *kinds), cached_files(stack))
    downloads = names_of({repo: hub.downloads(repo) for repo in REPOS})
    statuses = {name: adapter["status"] for name, adapter in served.items()}
    fleet_status, token = status(stack, "vllm", FLEET, SERVING), stack.guard_token(SERVING, FLEET)

    started = time.monotonic()
    stack.uninstall_operator()
    assert time.monotonic() - started < 60, "helm uninstall waits for something"
    assert (engines(stack), crds(stack), uids(stack, *kinds), cached_files(stack)) == before
    adapters = {"stays": "one", "private": "three", "leaves": "two"}
    answers(stack, reference(), adapters)
    answers(stack, reference(), {SERVED_NAMES[0]: "base"})
    # What tenants do meanwhile ends at once, and waits.
    stack.delete("lora", "leaves", TEAM_A, timeout=10)
    stack.apply(lora_adapter("comes", TEAM_A, repo="tiny/two", deployment=DEPLOYMENT))
    assert "status" not in (stack.get("lora", "comes", TEAM_A) or {})

    stack.install_operator()
    stack.wait_condition("lora", "comes", TEAM_A, timeout=60)
    for url in stack.engine_urls(SERVING, FLEET).values():
        assert "leaves" not in models(url)
    answers(stack, reference(), {"stays": "one", "private": "three", "comes": "two"})
    after = stack.wait_condition("vllm", FLEET, SERVING, timeout=30)["status"]
    assert engines(stack) == before[0]
    assert cached_files(stack) == before[3]
    assert names_of({repo: hub.downloads(repo) for repo in REPOS}) == downloads
    assert stack.guard_token(SERVING, FLEET) == token
    for name, team in (("stays", TEAM_A), ("private", TEAM_B)):
        assert status(stack, "lora", name, team) == statuses[name]
    changed = {key for key in fleet_status | after if fleet_status.get(key) != after.get(key)}
    assert changed <= {"listGeneration", "pods", "conditions"}, changed
    assert after["adapters"] == fleet_status["adapters"]


def test_another_release_in_another_namespace_takes_all_over(
    stack: Stack, served: dict[str, Json], hub: HubServer, reference: Any
) -> None:
    before, downloads = engines(stack), names_of({repo: hub.downloads(repo) for repo in REPOS})
    # The key that gate tokens come from is not Helm's, and moves with the operator; RoleBindings for Secrets name its account.
    key = stack.get("secret", "lora-operator-key", OPERATOR_NAMESPACE)
    assert key is not None
    token = stack.guard_token(SERVING, FLEET)
    stack.uninstall_operator()
    try:
        with pytest.raises(Exception, match="release-name"):
            stack.install_operator(release=OTHER_RELEASE, namespace_=OTHER_NAMESPACE)
        moved = {"name": "lora-operator-key", "namespace": OTHER_NAMESPACE}
        stack.apply({**key, "metadata": moved})
        stack.install_operator("--take-ownership", release=OTHER_RELEASE, namespace_=OTHER_NAMESPACE)
        stack.apply(lora_adapter("comes", TEAM_A, repo="tiny/three", deployment=DEPLOYMENT))
        stack.wait_condition("lora", "comes", TEAM_A, timeout=60)
        stack.wait_condition("vllm", FLEET, SERVING, timeout=30)
        answers(stack, reference(), {"stays": "one", "comes": "three"})
        assert stack.guard_token(SERVING, FLEET) == token
        # Its new account was given no right to the team's Secret: what was authorised and is served stays served.
        assert status(stack, "lora", "private", TEAM_B) == served["private"]["status"]
        answers(stack, reference(), {"private": "three"})
    finally:
        stack.uninstall_operator(release=OTHER_RELEASE, namespace_=OTHER_NAMESPACE)
        stack.cluster.kubectl("delete", "namespace", OTHER_NAMESPACE, "--wait=true", timeout=60)
    stack.install_operator("--take-ownership")
    for name, team in (("stays", TEAM_A), ("private", TEAM_B), ("comes", TEAM_A)):
        stack.wait_condition("lora", name, team, timeout=60)
    assert engines(stack) == before
    assert names_of({repo: hub.downloads(repo) for repo in REPOS}) == downloads


def test_a_plugin_that_nothing_starts_from_is_removed(stack: Stack, fleet: Fleet) -> None:
    owner = stack.get("vllm", FLEET, SERVING)
    assert owner is not None
    kept = [name for name in uids(stack, "cm", "-n", SERVING) if f"/{FLEET}-kit-" in name]
    assert len(kept) == 1
    reference = {
        "apiVersion": owner["apiVersion"],
        "kind": owner["kind"],
        "name": FLEET,
        "uid": owner["metadata"]["uid"],
    }
    live = stack.get("cm", kept[0].rpartition("/")[2], SERVING)
    assert live is not None
    metadata = {
        "name": f"{FLEET}-kit-0123456789",
        "namespace": SERVING,
        "labels": live["metadata"]["labels"],
        "ownerReferences": [{**reference, "controller": True}],
    }
    stack.apply(
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {"plugin.py": "# an older one"}}
    )
    eventually(lambda: not stack.get("cm", metadata["name"], SERVING), what="the old plugin is gone", timeout=15)
    assert stack.get("cm", live["metadata"]["name"], SERVING)


def test_deleting_a_deployment_removes_what_it_owned_and_nothing_of_the_cache(stack: Stack, fleet: Fleet) -> None:
    name = "short"
    manifest = vllm_deployment(name, SERVING, repo="tiny/base")
    manifest["spec"]["engine"]["command"] = ["/bin/false"]  # a pod is enough here; two engines run already
    stack.apply(manifest, lora_adapter("short", TEAM_A, repo="tiny/one", deployment=(SERVING, name)))
    eventually(lambda: stack.pods(SERVING, name), what="a pod of the deployment", timeout=60)
    owned = ("deployments,replicasets,services,configmaps,secrets,pods", "-n", SERVING)

    def leftovers() -> dict[str, str]:
        return {key: uid for key, uid in uids(stack, *owned).items() if f"/{name}" in key}

    made = {key.partition("/")[0] for key in leftovers()}
    assert made == {"Deployment", "ReplicaSet", "Service", "ConfigMap", "Secret", "Pod"}
    stack.wait_condition("lora", "short", TEAM_A, type_="Downloaded", timeout=60)
    cache = ("mcache,mart,pvc", "-n", SERVING)
    before, files = uids(stack, *cache), cached_files(stack)
    started = time.monotonic()
    stack.delete("vllm", name, SERVING, timeout=10)
    assert time.monotonic() - started < 5
    eventually(lambda: not leftovers(), what="all is collected", timeout=90, describe=lambda: str(leftovers()))
    gone = stack.wait_condition("lora", "short", TEAM_A, status="False", reason="DeploymentNotFound", timeout=30)
    assert f"{SERVING}/{name}" in next(c for c in gone["status"]["conditions"] if c["type"] == "Ready")["message"]
    stack.delete("lora", "short", TEAM_A)
    assert before.items() <= uids(stack, *cache).items()
    assert set(files) <= set(cached_files(stack))
    assert stack.wait_condition("mcache", "default", SERVING, timeout=10)
