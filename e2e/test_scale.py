"""Engine pods come and go, by scaling and by draining their node: nobody meets one that is not there yet, or no more."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from e2e.conftest import DEPLOYMENT, FLEET, REPLICAS, SERVING, TEAM_A, TEAM_B, Fleet, start_watch
from e2e.engine_client import Json
from e2e.load import Streams, answers_beside, ask, clients, service_url
from e2e.stack import Stack, eventually, lora_adapter

ADAPTERS = {"up-one": ("tiny/one", TEAM_A), "up-two": ("tiny/two", TEAM_A), "up-three": ("tiny/three", TEAM_B)}
MODELS = tuple(ADAPTERS)
COST = "controller.kubernetes.io/pod-deletion-cost"
LEAVING_SECONDS = 5  # in which a pod that is told to go still takes requests: until it has left the Service everywhere
# Of one stream: half a second of an engine alone, and where two share two cores, less than the 120 s that it has to end
# (--shutdown-timeout). One stream follows the other, so some are in hand whenever an engine is told to stop.
TOKENS = 64


def scale(stack: Stack, replicas: int) -> None:
    stack.cluster.kubectl("scale", f"vllm/{FLEET}", "-n", SERVING, f"--replicas={replicas}")


def wait_for_new(stack: Stack, known: set[str]) -> tuple[str, str]:
    """(name, URL) of a pod that was not there, at the moment that its Ready is told."""
    watch = start_watch(stack, "pods", SERVING)

    def look() -> Json | None:
        for _, event in list(watch.seen):
            pod = event["object"]
            ready = any(
                c["type"] == "Ready" and c["status"] == "True" for c in pod.get("status", {}).get("conditions", [])
            )
            of = pod["metadata"].get("labels", {}).get("lora-operator.dev/vllmdeployment")
            if ready and of == FLEET and pod["metadata"]["name"] not in known:
                return dict(pod)
        return None

    try:
        pod = eventually(look, what="another pod is Ready", timeout=480, interval=0.01)
    finally:
        watch.stop()
    return pod["metadata"]["name"], f"http://{pod['status']['podIP']}:8000"


@pytest.fixture
def served(stack: Stack, fleet: Fleet) -> Iterator[None]:
    """The adapters, Ready."""
    stack.apply(
        *(lora_adapter(name, team, repo=repo, deployment=DEPLOYMENT) for name, (repo, team) in ADAPTERS.items())
    )
    for name, (_, team) in ADAPTERS.items():
        stack.wait_condition("lora", name, team, timeout=90)
    yield
    for name, (_, team) in ADAPTERS.items():
        stack.delete("lora", name, team)
    if len(stack.engine_urls(SERVING, FLEET)) != REPLICAS:  # a failure here is to be none of the tests that follow
        scale(stack, REPLICAS)
        stack.wait_condition("vllm", FLEET, SERVING, timeout=480)


def gone(stack: Stack, pod: str) -> bool:
    return stack.get("pod", pod, SERVING) is None


def is_leaving(stack: Stack, pod: str) -> bool:
    return pod not in [found["metadata"]["name"] for found in stack.pods(SERVING, FLEET)]


def check_ended_whole(streams: Streams) -> None:
    """All of them were answered to their ends, and then the engine took no more."""
    assert not streams.broken
    assert streams.whole
    assert streams.refused is not None


@pytest.mark.node  # clients use the ClusterIP
def test_scaling_down_and_up_under_load_loses_no_request(stack: Stack, served: None) -> None:
    service, urls = service_url(stack, SERVING, FLEET), stack.engine_urls(SERVING, FLEET)
    assert len(urls) == 2
    leaving, staying = sorted(urls)
    stack.cluster.kubectl("annotate", "pod", leaving, "-n", SERVING, f"{COST}=-100")
    stack.cluster.kubectl("annotate", "pod", staying, "-n", SERVING, f"{COST}=100")

    with ExitStack() as block:
        block.enter_context(clients(service, MODELS, 2))
        streams = [block.enter_context(Streams(urls[leaving], model, TOKENS)) for model in MODELS[:2]]
        eventually(lambda: all(s.begun.is_set() for s in streams), what="the streams have begun", timeout=60)
        scale(stack, 1)
        scaled = time.monotonic()
        eventually(
            lambda: set(stack.engine_urls(SERVING, FLEET)) == {staying}, what="the pod is on its way out", timeout=30
        )
        eventually(lambda: all(s.refused for s in streams), what="the engine takes nothing new", timeout=200)
        eventually(lambda: gone(stack, leaving), what="the pod is gone", timeout=60)
    for one in streams:
        check_ended_whole(one)
        assert one.refused is not None
        assert one.refused - scaled > LEAVING_SECONDS - 1, "some node may still have had it in its Service"
    object_ = stack.wait_condition("vllm", FLEET, SERVING, timeout=30)
    assert (object_["status"]["replicas"], object_["status"]["readyPods"]) == (1, "1/1")
    adapter = stack.wait_condition("lora", "up-one", TEAM_A, timeout=30)
    assert adapter["status"]["pods"] == {"wanted": 1, "loaded": 1}

    scale(stack, 2)
    with clients(service, MODELS, 1, pause=0.5):  # two busy cores start no engine
        name, url = wait_for_new(stack, {leaving, staying})
        answers = [(model, *ask(url, model)) for model in MODELS for _ in range(3)]
        until = time.monotonic() + 5
        while time.monotonic() < until:
            answers += [(model, *ask(url, model)) for model in MODELS]
    assert not [answer for answer in answers if answer[1] != 200], f"of pod {name}, from its first moment"
    object_ = stack.wait_condition("vllm", FLEET, SERVING, timeout=60)
    assert (object_["status"]["replicas"], object_["status"]["readyPods"]) == (2, "2/2")
    for adapter_name, (_, team) in ADAPTERS.items():
        adapter = stack.wait_condition("lora", adapter_name, team, timeout=30)
        assert adapter["status"]["pods"] == {"wanted": 2, "loaded": 2}


@contextmanager
def draining(stack: Stack, node: str) -> Iterator[subprocess.Popen[str]]:
    """`kubectl drain` of the fleet's engines of now; ended with the block."""
    words = ("--pod-selector", f"lora-operator.dev/vllmdeployment={FLEET}", "--delete-emptydir-data", "--timeout=0s")
    process = subprocess.Popen(
        ["kubectl", "drain", node, *words],
        env={**os.environ, **stack.cluster.env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait(30)


@pytest.mark.node  # it drains the only node
def test_draining_a_node_takes_one_engine_after_the_other_and_loses_no_request(stack: Stack, served: None) -> None:
    service, urls = service_url(stack, SERVING, FLEET), stack.engine_urls(SERVING, FLEET)
    assert len(urls) == 2
    kubectl = stack.cluster.kubectl
    node = kubectl("get", "nodes", "-l", "!lora-operator.test/owned", "-o", "jsonpath={.items[0].metadata.name}")
    with clients(service, MODELS, 1, pause=0.5), ExitStack() as block:
        streams = {
            pod: [block.enter_context(Streams(url, model, TOKENS)) for model in MODELS[:2]] for pod, url in urls.items()
        }
        eventually(
            lambda: all(s.begun.is_set() for two in streams.values() for s in two), what="the streams run", timeout=60
        )
        with draining(stack, node) as drain:
            try:
                first = eventually(
                    lambda: next((pod for pod in urls if is_leaving(stack, pod)), None),
                    what="the first engine is on its way out",
                    timeout=30,
                )
                second = next(pod for pod in urls if pod != first)
                eventually(lambda: all(s.refused for s in streams[first]), what="it takes nothing new", timeout=200)
                eventually(lambda: gone(stack, first), what="the first engine is gone", timeout=60)
                # Its successor has no node to go to, so the other engine stays: the budget allows one to be away.
                pod = stack.get("pod", second, SERVING)
                assert pod is not None
                assert "deletionTimestamp" not in pod["metadata"]
                budget = stack.get("pdb", FLEET, SERVING) or {}
                assert budget["status"]["disruptionsAllowed"] == 0
                assert drain.poll() is None
                block.close()  # those of the second: a busy engine leaves no core for one that starts
            finally:
                kubectl("uncordon", node)  # another node comes, as a cluster's autoscaler would have it
            drain.send_signal(signal.SIGSTOP)  # it would take the other engine as soon as the new one is Ready
            eventually(lambda: answers_beside(stack, SERVING, FLEET, urls), what="a new engine answers", timeout=480)
            with Streams(urls[second], MODELS[0], TOKENS) as more:
                assert more.begun.wait(60)
                drain.send_signal(signal.SIGCONT)
                eventually(lambda: is_leaving(stack, second), what="the second engine is on its way out", timeout=120)
                eventually(lambda: more.refused, what="it takes nothing new either", timeout=200)
            output, _ = drain.communicate(timeout=300)
        assert drain.returncode == 0, output
        assert gone(stack, second)
    for ended in (*streams[first], more):
        check_ended_whole(ended)
    for stayed in streams[second]:
        assert (stayed.broken, stayed.refused) == ([], None)
        assert stayed.whole
    object_ = stack.wait_condition("vllm", FLEET, SERVING, timeout=480)
    assert (object_["status"]["replicas"], object_["status"]["readyPods"]) == (2, "2/2")
    for adapter_name, (_, team) in ADAPTERS.items():
        adapter = stack.wait_condition("lora", adapter_name, team, timeout=30)
        assert adapter["status"]["pods"] == {"wanted": 2, "loaded": 2}
