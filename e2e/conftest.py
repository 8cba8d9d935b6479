"""One cluster, one operator, one Hub and one fleet of two real engines, shared by all end-to-end tests."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from e2e.cluster import Cluster, ensure_cluster, paths, tools
from e2e.cluster.steps import step
from e2e.fixtures.hub import HubServer
from e2e.given import GivenCluster, given
from e2e.kept import pytest_runtest_makereport  # noqa: F401 - a hook
from e2e.stack import (
    Json,
    Stack,
    lora_adapter,
    namespace,
    service,
    tiny_fixtures,
    token_secret,
    vllm_deployment,
)

SERVING = "serving"
FLEET = "llama"
DEPLOYMENT = (SERVING, FLEET)
TEAM_A, TEAM_B, OUTSIDER = "team-a", "team-b", "outsider"
TOKEN_A, TOKEN_B, TOKEN_NO_GRANT = "hf_aaaaaaaaaaaaaaaa", "hf_bbbbbbbbbbbbbbbb", "hf_cccccccccccccccc"
REPLICAS = 2


@dataclass
class Watch:
    """Every state of the objects that a `kubectl get --watch` told of, with when it was told."""

    process: subprocess.Popen[str]
    seen: list[tuple[float, Json]] = field(default_factory=list)
    reader: threading.Thread | None = None

    def stop(self) -> None:
        """End the watch, and read what it said last."""
        self.process.terminate()
        self.process.wait(timeout=10)
        if self.reader is not None:
            self.reader.join(10)
        if self.process.stdout is not None:
            self.process.stdout.close()


def start_watch(stack: Stack, kind: str, namespace_: str) -> Watch:
    """Watch a kind in a namespace from now on."""
    process = subprocess.Popen(
        [tools.kubectl(), "get", kind, "-n", namespace_, "--watch", "--output-watch-events", "-o", "json"],
        env={**os.environ, **stack.cluster.env},
        stdout=subprocess.PIPE,
        text=True,
    )
    watch = Watch(process)

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:  # kubectl prints an event on a line
            watch.seen.append((time.monotonic(), json.loads(line)))

    watch.reader = threading.Thread(target=read, daemon=True)
    watch.reader.start()
    return watch


@pytest.fixture(scope="session")
def tiny() -> Path:
    """The tiny base model and its adapters."""
    return tiny_fixtures()


@pytest.fixture(scope="session")
def reference(tiny: Path) -> Iterator[Any]:
    """A function that waits for the answers that transformers + peft compute from the same files, as a dict by adapter name."""
    adapters = sorted((tiny / "adapters").iterdir())
    command: list[Any] = [
        tools.engine_venv() / "bin" / "python",
        "-m",
        "e2e.fixtures.tiny",
        "reference",
        "--base",
        tiny / "base",
    ]
    for adapter in adapters:
        command += ["--adapter", adapter]
    command += ["--prompts", tiny / "prompts.json"]

    def compute() -> Json:
        done = subprocess.run(command, cwd=paths.REPO, capture_output=True, text=True, timeout=600, check=True)
        answer = json.loads(done.stdout)
        return {"base": answer["base"], **{Path(path).name: value for path, value in answer["adapters"].items()}}

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(compute)
        yield future.result


@pytest.fixture(scope="session")
def hub(tiny: Path, cluster: Cluster) -> Iterator[HubServer]:
    """The Hub: the base model, public adapters, one private repository."""
    with HubServer(host=cluster.node_ip) as server:
        server.create_repo("tiny/base")
        server.commit("tiny/base", tiny / "base")
        for name in ("one", "two", "three", "four", "five", "six"):
            server.create_repo(f"tiny/{name}")
            server.commit(f"tiny/{name}", tiny / "adapters" / name)
        server.create_repo("acme/private", private=True)
        server.commit("acme/private", tiny / "adapters" / "three")
        server.add_token(TOKEN_A, repos=["acme/private"])
        server.add_token(TOKEN_B, repos=["acme/private"])
        server.add_token(TOKEN_NO_GRANT)
        yield server


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    """The machine's cluster, or the one that the environment gives."""
    spec = given()
    if spec is not None:
        return GivenCluster(tmp_path_factory.mktemp("given"), spec.host, kubeconfig_file=spec.kubeconfig)
    with step("a running cluster"):
        return ensure_cluster()


@pytest.fixture(scope="session")
def stack(cluster: Cluster, hub: HubServer) -> Iterator[Stack]:
    """The operator by its chart, the serving namespace and the teams' namespaces with their Secrets."""
    stack = Stack(cluster, hub.url)
    if given() is None:
        cluster.import_image(tools.base_image())
    stack.sweep()
    stack.install_operator()
    stack.make_serving_namespace(SERVING)
    stack.apply(
        namespace(TEAM_A, {"lora-operator.test/team": "a"}),
        namespace(TEAM_B, {"lora-operator.test/team": "b"}),
        namespace(OUTSIDER),
        *token_secret("hub", TEAM_A, TOKEN_A),
        *token_secret("hub", TEAM_B, TOKEN_B),
        *token_secret("wrong", TEAM_B, "hf_0000000000000000"),
        *token_secret("no-grant", TEAM_B, TOKEN_NO_GRANT),
        *token_secret("absent", TEAM_B, "")[1:],  # the right to read a Secret that does not exist
        *token_secret("hub", OUTSIDER, TOKEN_A),
    )
    yield stack
    stack.sweep()


@dataclass(frozen=True)
class Fleet:
    """The shared fleet, and what watches saw while it came up."""

    pods: list[tuple[float, Json]]
    artifacts: list[tuple[float, Json]]
    waiting: tuple[str, ...]  # what `kubectl get vllm` printed meanwhile
    asked: float
    ready: float
    early: Json  # an adapter that was applied together with the deployment, once it was Ready


@pytest.fixture(scope="session")
def fleet(stack: Stack, hub: HubServer, reference: Any) -> Fleet:
    """Two engines that serve the tiny base model, brought up from a throttled Hub under watches."""
    reference()  # before the engines want both cores
    pods, artifacts = start_watch(stack, "pods", SERVING), start_watch(stack, "modelartifacts", SERVING)
    size = sum(hub_file.stat().st_size for hub_file in (tiny_fixtures() / "base").iterdir())
    hub.throttle(size / 22)
    asked = time.monotonic()
    policy = {
        "from": "Selector",
        "selector": {"matchExpressions": [{"key": "lora-operator.test/team", "operator": "In", "values": ["a", "b"]}]},
    }
    stack.apply(service("vllm", SERVING))  # with service links it would set VLLM_PORT, and no engine would start
    stack.apply(
        vllm_deployment(FLEET, SERVING, repo="tiny/base", replicas=REPLICAS, policy=policy),
        lora_adapter("early", TEAM_A, repo="tiny/two", deployment=DEPLOYMENT),
    )
    waiting = []
    while stack.condition("vllm", FLEET, SERVING, "ModelReady").get("status") != "True":
        waiting.append(stack.cluster.kubectl("get", "vllm", FLEET, "-n", SERVING))
        assert time.monotonic() - asked < 180, f"the base model did not arrive:\n{waiting[-1]}"
        time.sleep(1)
    hub.throttle(None)
    with step("starting two engines"):
        stack.wait_condition("vllm", FLEET, SERVING, timeout=900)
    ready = time.monotonic()
    # An adapter that was applied before there was any pod: nobody touches it again, it has to become Ready by itself.
    early = stack.wait_condition("lora", "early", TEAM_A, timeout=30)
    stack.delete("lora", "early", TEAM_A)
    pods.stop()
    artifacts.stop()
    return Fleet(pods.seen, artifacts.seen, tuple(waiting), asked, ready, early)


def pytest_report_header() -> str | None:
    """Which cluster is tested, where it is not our own."""
    spec = given()
    return None if spec is None else f"{spec.describe()}; tests marked `node` are deselected"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """First the tests that don't use the shared fleet: some start engines of their own, and the machine bears two at once.

    On a given cluster, leave out what needs our own node; pytest counts it as deselected.
    """
    items.sort(key=lambda item: "fleet" in getattr(item, "fixturenames", ()))
    if given() is None:
        return
    left_out = [item for item in items if item.get_closest_marker("node")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
