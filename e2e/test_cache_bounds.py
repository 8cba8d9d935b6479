"""A cache's bounds on the cluster: progress as a watch sees it, content that is too big, and room made beside engines that answer."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from e2e.conftest import DEPLOYMENT, FLEET, SERVING, TEAM_A, Fleet, start_watch
from e2e.engine_client import models, request, token_ids
from e2e.fixtures.hub import HubServer
from e2e.stack import CACHE_GROUP, Json, Stack, eventually, lora_adapter

SLOW, GONE, SERVED = "bounds/slow", "bounds/gone", "bounds/served"
CACHE = "bounds"
KIB = 1024


def artifact(name: str, repo: str) -> Json:
    """A ModelArtifact made by hand in the cache of these tests."""
    return {
        "apiVersion": "lora-operator.dev/v1alpha1",
        "kind": "ModelArtifact",
        "metadata": {"name": name, "namespace": SERVING},
        "spec": {"cacheRef": {"name": CACHE}, "type": "Adapter", "source": {"huggingFace": {"repo": repo}}},
    }


def cache(hub: HubServer, **spec: Any) -> Json:
    """A second cache over the claim of the first: the volume, and what lies on it, is the same."""
    return {
        "apiVersion": "lora-operator.dev/v1alpha1",
        "kind": "ModelCache",
        "metadata": {"name": CACHE, "namespace": SERVING},
        "spec": {
            "storage": {"existingClaim": "cache"},
            "huggingFace": {"endpoint": hub.url},
            "securityContext": {"supplementalGroups": [CACHE_GROUP]},
            **spec,
        },
    }


@pytest.fixture(scope="module", autouse=True)
def contents(stack: Stack, fleet: Fleet, hub: HubServer, tiny: Path) -> Iterator[None]:
    """Repositories of their own, so that nobody else has their bytes in the cache, and a cache with bounds.

    The tests that need the fleet run last: with it these stay together.
    """
    for repo, name in ((SLOW, "one"), (GONE, "four"), (SERVED, "two")):
        hub.create_repo(repo)
        hub.commit(repo, tiny / "adapters" / name)
    stack.apply(cache(hub, maxArtifactSize="100Mi", download={"maxConcurrent": 1, "timeout": "10m"}))
    yield
    stack.cluster.kubectl("delete", "mart", "bounds-slow", "bounds-big", "-n", SERVING, "--ignore-not-found")
    stack.delete("mcache", CACHE, SERVING)


def test_a_watch_sees_bytes_rate_and_time_left(stack: Stack, hub: HubServer) -> None:
    watch = start_watch(stack, "modelartifacts", SERVING)
    hub.throttle(30 * KIB, SLOW)  # of some 260
    try:
        stack.apply(artifact("bounds-slow", SLOW))
        stack.wait_condition("modelartifact", "bounds-slow", SERVING, timeout=120)
    finally:
        hub.throttle(None, SLOW)
        watch.stop()
    states = [event["object"] for _, event in watch.seen if event["object"]["metadata"]["name"] == "bounds-slow"]
    figures = [state["status"]["progress"] for state in states if "progress" in state.get("status", {})]
    moving = [one for one in figures if one["phase"] == "Downloading" and one.get("bytesPerSecond")]
    assert len(moving) >= 2
    assert all(earlier["bytesDone"] <= later["bytesDone"] for earlier, later in itertools.pairwise(moving))
    assert any("etaSeconds" in one and one["rate"].endswith("KiB/s") for one in moving)
    times = sorted({datetime.fromisoformat(one["time"]) for one in moving})
    assert all((later - earlier).total_seconds() >= 2 for earlier, later in itertools.pairwise(times))
    assert "progress" not in states[-1]["status"]
    told = stack.cluster.kubectl("get", "events", "-n", SERVING, "--field-selector=involvedObject.name=bounds-slow")
    assert "Downloading" in told
    assert "Ready" in told
    room = eventually(
        lambda: (stack.get("mcache", CACHE, SERVING) or {})["status"].get("volume"), what="room is told", timeout=20
    )
    assert room["usedBytes"] > 0
    assert "FREE" in stack.cluster.kubectl("get", "mcache", "-n", SERVING)


def test_what_is_too_big_is_refused_before_its_first_byte(stack: Stack, hub: HubServer) -> None:
    stack.apply(cache(hub, maxArtifactSize="100Ki"))
    hub.reset_counters()
    stack.apply(artifact("bounds-big", GONE))
    found = stack.wait_condition("modelartifact", "bounds-big", SERVING, status="False", reason="TooLarge", timeout=60)
    conditions = {c["type"]: c for c in found["status"]["conditions"]}
    assert "takes 100.0 KiB at most (spec.maxArtifactSize)" in conditions["Ready"]["message"]
    assert conditions["Stalled"]["reason"] == "TooLarge"
    assert sum(hub.downloads(GONE).values()) == 0
    stack.delete("modelartifact", "bounds-big", SERVING)


@contextmanager
def asking(urls: list[str], model: str) -> Iterator[list[int]]:
    """A client that asks engines for a model all the time: the statuses that it got."""
    statuses: list[int] = []
    end = threading.Event()

    def ask() -> None:
        body = {"model": model, "prompt": "Once", "max_tokens": 4}
        for url in itertools.cycle(urls):
            if end.is_set():
                return
            statuses.append(request("POST", f"{url}/v1/completions", body)[0])

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield statuses
    finally:
        end.set()
        thread.join(90)


def test_room_is_made_while_what_is_served_goes_on_answering(stack: Stack, hub: HubServer, fleet: Fleet) -> None:
    for name, repo in (("bounds-gone", GONE), ("bounds-served", SERVED)):
        stack.apply(lora_adapter(name, TEAM_A, repo=repo, deployment=DEPLOYMENT))
    found = {name: stack.wait_condition("lora", name, TEAM_A) for name in ("bounds-gone", "bounds-served")}
    gone = found["bounds-gone"]["status"]["artifactRef"]["name"]
    stack.delete("lora", "bounds-gone", TEAM_A)

    def unused() -> bool:
        return "unreferencedSince" in (stack.get("modelartifact", gone, SERVING) or {}).get("status", {})

    eventually(unused, what="nothing wants it", timeout=60)
    before = (stack.get("mcache", "default", SERVING) or {})["status"].get("eviction", {}).get("attempt", 0)
    urls = list(stack.engine_urls(SERVING, FLEET).values())
    with asking(urls, "bounds-served") as statuses:
        stack.cluster.kubectl(
            "annotate", "mcache", "default", "-n", SERVING, "lora-operator.dev/evict=bounds", "--overwrite"
        )

        def evicted() -> Json | None:
            status: Json = (stack.get("mcache", "default", SERVING) or {})["status"]
            eviction = status.get("eviction", {})
            return status if eviction.get("attempt", 0) > before and not eviction["running"] else None

        status = eventually(evicted, what="content is removed", timeout=180)
    assert status["eviction"]["views"] >= 1, status
    assert status["eviction"]["freed"] != "0", status
    assert stack.get("modelartifact", gone, SERVING) is None
    assert set(statuses) == {200}
    for url in urls:
        assert {"bounds-served"} <= set(models(url))
        assert token_ids(url, "bounds-served", "Once")
    stack.wait_condition("vllm", FLEET, SERVING, timeout=30)
    # Its files are gone, so it is downloaded anew when somebody wants it again.
    hub.reset_counters()
    stack.apply(lora_adapter("bounds-gone", TEAM_A, repo=GONE, deployment=DEPLOYMENT))
    stack.wait_condition("lora", "bounds-gone", TEAM_A)
    assert hub.downloads(GONE)["adapter_model.safetensors"] == 1
    for name in ("bounds-gone", "bounds-served"):
        stack.delete("lora", name, TEAM_A)
