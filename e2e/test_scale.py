"""Scaling a fleet that serves: nobody meets a pod that is not there yet, or one that is there no more."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from e2e.conftest import DEPLOYMENT, FLEET, SERVING, TEAM_A, TEAM_B, Fleet, start_watch
from e2e.engine_client import Json, Stream, request
from e2e.stack import Stack, eventually, lora_adapter

ADAPTERS = {"up-one": ("tiny/one", TEAM_A), "up-two": ("tiny/two", TEAM_A), "up-three": ("tiny/three", TEAM_B)}
MODELS = tuple(ADAPTERS)
COST = "controller.kubernetes.io/pod-deletion-cost"
STREAM_SECONDS = (
    30  # longer than a pod takes to leave the Service (5 s), far shorter than its --shutdown-timeout (120 s)
)
SAMPLE = 16  # tokens


def ask(url: str, model: str) -> tuple[int, Any]:
    """One short completion over a connection of its own."""
    body = {"model": model, "prompt": "SELECT", "max_tokens": 2, "temperature": 0}
    return request("POST", f"{url}/v1/completions", body, timeout=60)


class Client:
    """Asks for every adapter in turn, over and over, `pause` seconds apart; what was not answered well is kept."""

    def __init__(self, url: str, pause: float) -> None:
        self.answered = dict.fromkeys(MODELS, 0)
        self.bad: list[tuple[str, int, Any]] = []
        self._url, self._pause = url, pause
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            for model in MODELS:
                status, answer = ask(self._url, model)
                self.answered[model] += 1
                if status != 200:
                    self.bad.append((model, status, answer))
                self._stop.wait(self._pause)

    def stop(self) -> None:
        """End after the requests in hand."""
        self._stop.set()
        self._thread.join(120)


@contextmanager
def clients(url: str, number: int, *, pause: float = 0) -> Iterator[list[Client]]:
    """Some clients, as long as the block lasts."""
    running = [Client(url, pause) for _ in range(number)]
    try:
        yield running
    finally:
        for client in running:
            client.stop()


def tokens_for(url: str, seconds: float) -> int:
    """How many tokens two streams take so long for, on this machine, now."""
    started = time.monotonic()
    samples = [Stream(url, model, "SELECT", tokens=SAMPLE) for model in MODELS[:2]]
    for sample in samples:
        sample.join(120)
    return max(SAMPLE, int(seconds * SAMPLE / (time.monotonic() - started)))


def service_url(stack: Stack) -> str:
    """The Service, as pods without DNS reach it, and the node too."""
    service = stack.get("service", FLEET, SERVING) or {}
    return f"http://{service['spec']['clusterIP']}:{service['spec']['ports'][0]['port']}"


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


@pytest.mark.node  # clients use the ClusterIP
def test_scaling_down_and_up_under_load_loses_no_request(stack: Stack, served: None) -> None:
    service, urls = service_url(stack), stack.engine_urls(SERVING, FLEET)
    assert len(urls) == 2
    leaving, staying = sorted(urls)
    stack.cluster.kubectl("annotate", "pod", leaving, "-n", SERVING, f"{COST}=-100")
    stack.cluster.kubectl("annotate", "pod", staying, "-n", SERVING, f"{COST}=100")

    with clients(service, 2) as down:
        tokens = tokens_for(urls[leaving], STREAM_SECONDS)
        streams = [Stream(urls[leaving], model, "SELECT", tokens=tokens) for model in MODELS[:2]]
        eventually(lambda: all(s.token_ids for s in streams), what="the streams have begun", timeout=60)
        scale(stack, 1)
        scaled = time.monotonic()
        eventually(
            lambda: set(stack.engine_urls(SERVING, FLEET)) == {staying}, what="the pod is on its way out", timeout=30
        )
        for stream in streams:
            stream.join(200)
            assert (len(stream.token_ids), stream.finish_reason) == (tokens, "length")
        assert time.monotonic() - scaled > 6, "they ended before the engine was told to stop: make them longer"
        eventually(lambda: stack.get("pod", leaving, SERVING) is None, what="the pod is gone", timeout=60)
    assert not [bad for client in down for bad in client.bad]
    assert all(count > 0 for client in down for count in client.answered.values())
    object_ = stack.wait_condition("vllm", FLEET, SERVING, timeout=30)
    assert (object_["status"]["replicas"], object_["status"]["readyPods"]) == (1, "1/1")
    adapter = stack.wait_condition("lora", "up-one", TEAM_A, timeout=30)
    assert adapter["status"]["pods"] == {"wanted": 1, "loaded": 1}

    scale(stack, 2)
    with clients(service, 1, pause=0.5) as up:  # two busy cores start no engine
        name, url = wait_for_new(stack, {leaving, staying})
        answers = [(model, *ask(url, model)) for model in MODELS for _ in range(3)]
        until = time.monotonic() + 5
        while time.monotonic() < until:
            answers += [(model, *ask(url, model)) for model in MODELS]
    assert not [answer for answer in answers if answer[1] != 200], f"of pod {name}, from its first moment"
    assert not [bad for client in up for bad in client.bad]
    object_ = stack.wait_condition("vllm", FLEET, SERVING, timeout=60)
    assert (object_["status"]["replicas"], object_["status"]["readyPods"]) == (2, "2/2")
    for adapter_name, (_, team) in ADAPTERS.items():
        adapter = stack.wait_condition("lora", adapter_name, team, timeout=30)
        assert adapter["status"]["pods"] == {"wanted": 2, "loaded": 2}
