"""Engines and operator come back: with what was acknowledged last, without the bad, and never on half the truth."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from e2e.cluster import Cluster
from e2e.conftest import DEPLOYMENT, FLEET, SERVING, TEAM_A, Fleet
from e2e.engine_client import models, request
from e2e.fixtures.adapters import build
from e2e.fixtures.apiproxy import ApiProxy
from e2e.fixtures.hub import HubServer
from e2e.stack import OPERATOR_NAMESPACE, RELEASE, Json, Stack, eventually, lora_adapter

# Engines are killed as the kernel does, files are broken on the volume, and the operator is sent through a proxy with the API
# server's own certificate.
pytestmark = pytest.mark.node


def acknowledged(stack: Stack, generation: int) -> bool:
    status = (stack.get("vllm", FLEET, SERVING) or {})["status"]
    return status["listGeneration"] >= generation and all(
        pod.get("listGeneration") == status["listGeneration"] for pod in status["pods"]
    )


def list_generation(stack: Stack) -> int:
    generation: int = (stack.get("vllm", FLEET, SERVING) or {})["status"]["listGeneration"]
    return generation


def kill_engine(stack: Stack, pod: str) -> tuple[str, int]:
    """End one engine's container as a crash would; its old id and restart count."""
    status = next(p for p in stack.pods(SERVING, FLEET) if p["metadata"]["name"] == pod)["status"]["containerStatuses"][
        0
    ]
    stack.cluster.ctr("tasks", "kill", "--signal", "SIGKILL", "--all", status["containerID"].rpartition("/")[2])
    return status["containerID"], status["restartCount"]


def first_answer_after_restart(stack: Stack, pod: str, url: str, old: str, *, timeout: float) -> dict[str, Json]:
    """/v1/models right after the first /health 200 of another container."""

    def other_container() -> bool:
        for found in stack.pods(SERVING, FLEET):
            if found["metadata"]["name"] == pod:
                status = found["status"]["containerStatuses"][0]
                return "running" in status["state"] and status["containerID"] != old
        return False

    eventually(other_container, what=f"another container runs in {pod}", timeout=60)
    eventually(
        lambda: request("GET", f"{url}/health", timeout=2)[0] == 200,
        what="the engine answers",
        timeout=timeout,
        interval=0.05,
    )
    return models(url)


def restart_count(stack: Stack, pod: str) -> int:
    found = next(p for p in stack.pods(SERVING, FLEET) if p["metadata"]["name"] == pod)
    count: int = found["status"]["containerStatuses"][0]["restartCount"]
    return count


@pytest.fixture
def operator_comes_back(stack: Stack) -> Any:
    """Whatever a test does to the operator, it runs afterwards."""
    yield
    stack.scale_operator(1)


def test_a_restarted_engine_serves_what_was_acknowledged_last(
    stack: Stack, fleet: Fleet, operator_comes_back: Any
) -> None:
    leaving = lora_adapter("leaving", TEAM_A, repo="tiny/two", deployment=DEPLOYMENT)
    staying = lora_adapter("staying", TEAM_A, repo="tiny/three", deployment=DEPLOYMENT)
    stack.apply(leaving, staying)
    for name in ("leaving", "staying"):
        stack.wait_condition("lora", name, TEAM_A, timeout=90)
    pod, url = sorted(stack.engine_urls(SERVING, FLEET).items())[0]
    before = list_generation(stack)
    stack.apply(lora_adapter("coming", TEAM_A, repo="tiny/one", deployment=DEPLOYMENT))
    stack.wait_condition("lora", "coming", TEAM_A, timeout=90)
    stack.delete("lora", "leaving", TEAM_A)
    eventually(lambda: acknowledged(stack, before + 2), what="both changes are acknowledged", timeout=30, interval=0.05)
    at = time.monotonic()
    stack.cluster.kubectl("scale", "deployment", RELEASE, "-n", OPERATOR_NAMESPACE, "--replicas=0")
    old, _ = kill_engine(stack, pod)
    assert time.monotonic() - at < 2
    listed = first_answer_after_restart(stack, pod, url, old, timeout=180)
    assert {"coming", "staying"} <= set(listed)
    assert "leaving" not in listed
    for name in ("coming", "staying"):
        stack.delete("lora", name, TEAM_A)


def test_a_truncated_file_and_a_refused_adapter_cost_at_most_one_more_restart(
    stack: Stack, fleet: Fleet, hub: HubServer, tiny: Path, tmp_path: Path, operator_comes_back: Any
) -> None:
    refused = build("engine-refuses", tiny / "adapters" / "one", tmp_path / "refused")
    for repo, folder in (("bad/refused", refused), ("bad/later-truncated", tiny / "adapters" / "six")):
        hub.create_repo(repo)
        hub.commit(repo, folder)
    names = {"fine": "tiny/one", "truncated": "bad/later-truncated", "refused": "bad/refused"}
    stack.apply(*(lora_adapter(name, TEAM_A, repo=repo, deployment=DEPLOYMENT) for name, repo in names.items()))
    for name in ("fine", "truncated"):
        stack.wait_condition("lora", name, TEAM_A, timeout=90)
    # The checks accept it, vLLM does not: both halves.
    adapter = stack.wait_condition("lora", "refused", TEAM_A, status="False", reason="EngineRefused", timeout=90)
    conditions = {c["type"]: c for c in adapter["status"]["conditions"]}
    assert conditions["Downloaded"]["status"] == "True"
    assert adapter["status"]["failures"]
    for url in stack.engine_urls(SERVING, FLEET).values():
        assert "refused" not in models(url)
    name = (stack.get("lora", "truncated", TEAM_A) or {})["status"]["artifactRef"]["name"]
    view = stack.cache_folder(SERVING) / (stack.get("mart", name, SERVING) or {})["status"]["path"]
    weights = (view / "adapter_model.safetensors").resolve()
    pod, url = sorted(stack.engine_urls(SERVING, FLEET).items())[0]
    stack.scale_operator(0)
    weights.write_bytes(weights.read_bytes()[:-1000])
    old, restarts = kill_engine(stack, pod)
    listed = first_answer_after_restart(stack, pod, url, old, timeout=240)
    assert "fine" in listed
    assert not {"truncated", "refused"} & set(listed)
    eventually(lambda: pod in stack.engine_urls(SERVING, FLEET), what="the pod is Ready", timeout=120)
    assert restart_count(stack, pod) <= restarts + 2
    stack.scale_operator(1)
    stack.wait_condition("lora", "fine", TEAM_A, timeout=60)
    seen = stack.wait_condition("lora", "truncated", TEAM_A, status="False", timeout=60)
    assert pod in [failure["pod"] for failure in seen["status"]["failures"]]
    assert "adapter_model.safetensors" in seen["status"]["failures"][0]["message"]
    for name in names:
        stack.delete("lora", name, TEAM_A)


def test_the_operator_does_nothing_before_it_has_seen_every_adapter(
    stack: Stack, fleet: Fleet, cluster: Cluster, operator_comes_back: Any
) -> None:
    stack.apply(lora_adapter("unseen", TEAM_A, repo="tiny/one", deployment=DEPLOYMENT))
    stack.wait_condition("lora", "unseen", TEAM_A, timeout=90)
    stack.wait_condition("vllm", FLEET, SERVING, timeout=60)
    headers = {"X-LoRA-Operator-Token": stack.guard_token(SERVING, FLEET)}

    def world() -> str:
        objects = [
            (stack.get("vllm", FLEET, SERVING) or {})["status"],
            (stack.get("lora", "unseen", TEAM_A) or {})["status"],
            (stack.get("cm", f"{FLEET}-modules", SERVING) or {})["metadata"]["resourceVersion"],
        ]
        engines = []
        for url in stack.engine_urls(SERVING, FLEET).values():
            state = request("GET", f"{url}/lora-operator/v1/state", headers=headers)[1]
            engines.append([state["listGeneration"], state["loaded"], sorted(models(url))])
        return json.dumps([objects, engines], sort_keys=True)

    before = world()
    assert '"unseen"' in before
    proxy = ApiProxy(
        host=cluster.node_ip,
        upstream=cluster.apiserver_url,
        cert=cluster.serving_cert,
        key=cluster.serving_key,
        ca=cluster.ca,
    )
    with proxy:
        proxy.hold("loraadapters")
        env = [f"KUBERNETES_SERVICE_HOST={proxy.host}", f"KUBERNETES_SERVICE_PORT={proxy.port}"]
        stack.scale_operator(0)
        stack.cluster.kubectl("set", "env", f"deployment/{RELEASE}", "-n", OPERATOR_NAMESPACE, *env)
        stack.cluster.kubectl("scale", "deployment", RELEASE, "-n", OPERATOR_NAMESPACE, "--replicas=1")
        try:
            eventually(lambda: proxy.held, what="the operator asks for the adapters", timeout=60)
            until = proxy.held[0][0] + 20
            while time.monotonic() < until:
                assert world() == before
                (pod,) = stack.operator_pods()
                assert pod["status"]["containerStatuses"][0]["restartCount"] == 0
                assert not pod["status"]["containerStatuses"][0]["ready"], (
                    "it says that it is ready before it has seen all"
                )
            proxy.release()
            stack.cluster.kubectl(
                "rollout", "status", f"deployment/{RELEASE}", "-n", OPERATOR_NAMESPACE, "--timeout=60s"
            )
            # It works now, through the proxy: a new adapter becomes Ready, and the old one was never touched.
            stack.apply(lora_adapter("later", TEAM_A, repo="tiny/two", deployment=DEPLOYMENT))
            stack.wait_condition("lora", "later", TEAM_A, timeout=90)
            after = (stack.get("lora", "unseen", TEAM_A) or {})["status"]
            assert after == json.loads(before)[0][1]
        finally:
            stack.scale_operator(0)
            stack.cluster.kubectl(
                "set",
                "env",
                f"deployment/{RELEASE}",
                "-n",
                OPERATOR_NAMESPACE,
                "KUBERNETES_SERVICE_HOST-",
                "KUBERNETES_SERVICE_PORT-",
            )
    stack.scale_operator(1)
    for name in ("unseen", "later"):
        stack.delete("lora", name, TEAM_A)
