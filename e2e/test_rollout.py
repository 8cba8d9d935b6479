"""updateStrategy Rollout on the real cluster: adapters come by replacing pods, once for all that come together, and never else.

One engine in a namespace of its own, two while its pods are replaced; gone before the shared fleet is up.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from e2e.cluster import tools
from e2e.engine_client import models, request, token_ids, tokens_for
from e2e.fixtures import adapters
from e2e.fixtures.hub import HubServer
from e2e.load import Streams, answers_beside, clients, service_url
from e2e.stack import SERVED_NAMES, Json, Stack, eventually, lora_adapter, vllm_deployment

SERVING = "serving-rollout"
FLEET = "frozen"
STREAM_SECONDS = 8  # of an engine alone; two on two cores take many times as long, and have 120 s to end
GOOD = {"one": SERVED_NAMES[0], "two": SERVED_NAMES[1], "three": SERVED_NAMES[1]}  # adapter → lineage


def frozen(**lora: Any) -> Json:
    """The VLLMDeployment."""
    return vllm_deployment(FLEET, SERVING, repo="tiny/base", lora={"updateStrategy": "Rollout"} | lora)


def adapter(name: str, repo: str, **spec: Any) -> Json:
    """An adapter beside it."""
    return lora_adapter(name, SERVING, repo=repo, deployment=(SERVING, FLEET), **spec)


def revisions(stack: Stack) -> list[str]:
    """The ReplicaSets of the fleet: one for each pod template that it ever had."""
    return sorted(one["metadata"]["name"] for one in stack.items("replicasets", SERVING))


def in_arguments(stack: Stack) -> dict[str, Json]:
    """The adapters in the arguments of the fleet's pods by name."""
    workload = stack.get("deployment", FLEET, SERVING) or {}
    arguments = workload["spec"]["template"]["spec"]["containers"][0]["args"]
    if "--lora-modules" not in arguments:
        return {}
    entries = [json.loads(text) for text in arguments[arguments.index("--lora-modules") + 1 :]]
    return {entry["name"]: entry for entry in entries}


def running(stack: Stack) -> list[tuple[str, str, int]]:
    """Pods with what would be another one after a restart."""
    return sorted(
        (pod["metadata"]["name"], pod["metadata"]["uid"], pod["status"]["containerStatuses"][0]["restartCount"])
        for pod in stack.pods(SERVING, FLEET)
    )


def only_url(stack: Stack) -> str:
    """The address of the one pod."""
    (url,) = stack.engine_urls(SERVING, FLEET).values()
    return url


@pytest.fixture(scope="module")
def fleet_of_one(stack: Stack, hub: HubServer, reference: Any, tiny: Path, tmp_path_factory: Any) -> Iterator[Any]:
    """One engine without adapters; what transformers + peft answer."""
    bad = adapters.build("truncated-body", tiny / "adapters" / "one", tmp_path_factory.mktemp("bad") / "bad")
    for repo, folder in (("frozen/bad", bad), ("frozen/stalled", tiny / "adapters" / "four")):
        hub.create_repo(repo)
        hub.commit(repo, folder)
    expected = reference()
    stack.make_serving_namespace(SERVING)
    stack.apply(frozen())
    stack.wait_condition("vllm", FLEET, SERVING, timeout=180)
    yield expected
    hub.release()
    stack.install_operator()
    stack.delete("vllm", FLEET, SERVING)
    for name in (one["metadata"]["name"] for one in stack.items("lora", SERVING)):
        stack.delete("lora", name, SERVING)
    stack.cluster.kubectl("delete", "pod", "--all", "-n", SERVING, "--wait=true", timeout=200)


def test_three_adapters_are_one_roll_out_and_neither_a_bad_nor_a_late_one_is_any(
    stack: Stack, fleet_of_one: Any, hub: HubServer
) -> None:
    (first,) = revisions(stack)
    assert in_arguments(stack) == {}
    hub.stall("frozen/stalled", "*.safetensors")
    stack.apply(adapter("stalled", "frozen/stalled"), adapter("bad", "frozen/bad"))
    stack.wait_condition("lora", "bad", SERVING, status="False", reason="InvalidAdapter", timeout=60)
    applied = time.monotonic()
    stack.apply(*(adapter(name, f"tiny/{name}", baseModelName=lineage) for name, lineage in GOOD.items()))
    assert time.monotonic() - applied < 5
    for name in GOOD:
        stack.wait_condition("lora", name, SERVING, type_="Downloaded", timeout=60)
    words = f"it waits until LoRAAdapter {SERVING}/stalled is downloaded, at most 60 s"
    eventually(
        lambda: words in stack.condition("vllm", FLEET, SERVING, "AdaptersInSync").get("message", ""),
        what=words,
        timeout=30,
    )
    loading = stack.condition("lora", "one", SERVING, "Loaded")
    assert (loading["status"], loading["reason"]) == ("False", "Loading")
    assert "updateStrategy: Rollout" in loading["message"]
    assert revisions(stack) == [first], "it did not wait"
    for name in GOOD:
        stack.wait_condition("lora", name, SERVING, timeout=180)
    stack.wait_condition("vllm", FLEET, SERVING, timeout=60)
    assert len(revisions(stack)) == 2
    assert {name: entry["base_model_name"] for name, entry in in_arguments(stack).items()} == GOOD
    url = only_url(stack)
    listed = models(url)
    assert set(listed) == {*SERVED_NAMES, *GOOD}
    for name, lineage in GOOD.items():
        assert listed[name]["parent"] == lineage
        case = fleet_of_one[name]["completions"][0]
        assert token_ids(url, name, case["prompt"]) == case["token_ids"]
    assert stack.condition("lora", "stalled", SERVING, "Downloaded")["status"] == "False"


def test_no_pod_is_told_a_list(stack: Stack, fleet_of_one: Any) -> None:
    url = only_url(stack)
    body = {"version": 1, "deployment": f"{SERVING}/{FLEET}", "generation": 99, "modules": []}
    assert request("PUT", f"{url}/lora-operator/v1/modules", body)[0] == 401
    headers = {"X-LoRA-Operator-Token": stack.guard_token(SERVING, FLEET)}
    status, answer = request("PUT", f"{url}/lora-operator/v1/modules", body, headers=headers)
    assert status == 405
    assert "updateStrategy: Rollout" in answer["error"]["message"]
    assert set(models(url)) == {*SERVED_NAMES, *GOOD}


def upgrade(stack: Stack, image: tools.Image) -> None:
    """Another operator takes over, and has looked at the fleet: it tells an adapter what only it can have found out."""
    stack.install_operator(image=image)
    name = f"not-admitted-{image.name.rpartition(':')[2][:8]}"
    stack.apply(adapter(name, "tiny/one", servedName=SERVED_NAMES[0]))
    stack.wait_condition("lora", name, SERVING, status="False", reason="NameIsBaseModel", timeout=60)
    for good in GOOD:
        stack.wait_condition("lora", good, SERVING, timeout=60)
    stack.wait_condition("vllm", FLEET, SERVING, timeout=60)


def plugin_of(stack: Stack) -> str:
    """The plugin that the fleet's pods have, by its hash."""
    annotations: Json = (stack.get("deployment", FLEET, SERVING) or {})["metadata"]["annotations"]
    plugin: str = annotations["lora-operator.dev/engine-kit"]
    return plugin


def roll_under_load(stack: Stack) -> None:
    """Change the strategy, by a roll-out in which nobody who uses the Service misses an answer."""
    ((old, url),) = stack.engine_urls(SERVING, FLEET).items()
    service, tokens = service_url(stack, SERVING, FLEET), tokens_for(url, "one", seconds=STREAM_SECONDS)
    with clients(service, tuple(GOOD), 1, pause=0.5):
        stack.apply(frozen(updateStrategy="HotLoad"))
        eventually(lambda: answers_beside(stack, SERVING, FLEET, {old}), what="the new engine answers", timeout=400)
        with Streams(url, "one", tokens) as streams:  # not sooner: a busy engine leaves no core for one that starts
            eventually(
                lambda: old not in [pod["metadata"]["name"] for pod in stack.pods(SERVING, FLEET)],
                what="the old pod is on its way out",
                timeout=60,
            )
        eventually(lambda: stack.get("pod", old, SERVING) is None, what="the old pod is gone", timeout=200)
    stack.wait_condition("vllm", FLEET, SERVING, timeout=60)
    assert streams.whole
    assert not streams.broken


@pytest.mark.node  # it builds another operator image, and imports it; clients use the ClusterIP
def test_an_operator_with_another_plugin_restarts_no_engine_with_either_strategy(
    stack: Stack, fleet_of_one: Any
) -> None:
    later = tools.operator_image(plugin_comment="of a later operator")
    before, plugin, made = running(stack), plugin_of(stack), revisions(stack)
    upgrade(stack, later)
    assert (running(stack), plugin_of(stack), revisions(stack)) == (before, plugin, made)

    roll_under_load(stack)
    assert len(revisions(stack)) == len(made) + 1, "the strategy was changed by one roll-out"
    assert in_arguments(stack) == {}
    other = plugin_of(stack)
    assert other != plugin
    eventually(
        lambda: set(models(only_url(stack))) == {*SERVED_NAMES, *GOOD}, what="the adapters are hot-loaded", timeout=30
    )

    before, made = running(stack), revisions(stack)
    upgrade(stack, tools.operator_image())
    assert (running(stack), plugin_of(stack), revisions(stack)) == (before, other, made)
