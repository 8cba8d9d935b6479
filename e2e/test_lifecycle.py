"""Replacing and deleting adapters: no stream is mixed, nothing blocks a delete, nothing stays loaded."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

from e2e.conftest import DEPLOYMENT, FLEET, SERVING, TEAM_A, Fleet
from e2e.engine_client import Stream, models, request, token_ids, tokens_for
from e2e.fixtures.hub import HubServer
from e2e.stack import Stack, eventually, lora_adapter, namespace
from e2e.test_isolation import engine_containers

LONG_SECONDS, LONG = 30, 1500  # of a stream that outlives its adapter


def _answers(url: str, prompt: str, tokens: list[int]) -> bool:
    body = {
        "model": "swap",
        "prompt": prompt,
        "temperature": 0,
        "max_tokens": 32,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    status, answer = request("POST", f"{url}/v1/completions", body)
    return status == 200 and answer["choices"][0]["token_ids"] == tokens


def test_replacing_an_adapter_within_a_second_leaves_its_stream_pure(
    stack: Stack, fleet: Fleet, hub: HubServer, tiny: Path, reference: Any
) -> None:
    hub.create_repo("tiny/swap")
    first = hub.commit("tiny/swap", tiny / "adapters" / "one")
    second = hub.commit("tiny/swap", tiny / "adapters" / "one-v2")
    old = lora_adapter("swap", TEAM_A, repo="tiny/swap", revision=first, deployment=DEPLOYMENT)
    new = lora_adapter("swap", TEAM_A, repo="tiny/swap", revision=second, deployment=DEPLOYMENT)
    beside = lora_adapter("swap-two", TEAM_A, repo="tiny/swap", revision=second, deployment=DEPLOYMENT)
    stack.apply(old, beside)
    for name in ("swap", "swap-two"):
        stack.wait_condition("lora", name, TEAM_A, timeout=90)
    before = engine_containers(stack)
    urls = stack.engine_urls(SERVING, FLEET)
    name, url = sorted(urls.items())[0]
    case = reference()["one"]["completions"][0]
    case_new = reference()["one-v2"]["completions"][0]
    long = tokens_for(url, "swap", seconds=LONG_SECONDS, most=LONG)
    undisturbed = token_ids(url, "swap", case["prompt"], tokens=long)
    assert undisturbed[:32] == case["token_ids"]

    stream = Stream(url, "swap", case["prompt"], tokens=long)
    eventually(lambda: len(stream.token_ids) > 5, what="the stream has begun", timeout=30)
    started = time.monotonic()
    stack.replace(new)  # by one kubectl: on a busy machine each start of it takes most of a second
    assert time.monotonic() - started < 1

    prompt, expected = case["prompt"], case_new["token_ids"]
    eventually(partial(_answers, url, prompt, expected), what="the new revision answers", timeout=20)
    assert stream.running, "the old stream ended before the new revision answered: make it longer"
    for other in urls.values():
        eventually(
            partial(_answers, other, prompt, expected), what=f"{other} answers with the new revision", timeout=20
        )
    stream.join(300)
    assert stream.token_ids == undisturbed
    stack.wait_condition("lora", "swap", TEAM_A, timeout=30)
    assert engine_containers(stack) == before
    for name in ("swap", "swap-two"):
        stack.delete("lora", name, TEAM_A)


def unloaded(stack: Stack, *names: str) -> bool:
    return all(not set(names) & set(models(url)) for url in stack.engine_urls(SERVING, FLEET).values())


def test_deleting_ends_within_seconds_and_unloads(stack: Stack, fleet: Fleet) -> None:
    stack.apply(lora_adapter("gone", TEAM_A, repo="tiny/one", deployment=DEPLOYMENT))
    stack.wait_condition("lora", "gone", TEAM_A, timeout=90)
    started = time.monotonic()
    stack.delete("lora", "gone", TEAM_A, timeout=10)
    assert time.monotonic() - started < 5
    eventually(lambda: unloaded(stack, "gone"), what="the adapter is unloaded from every pod", timeout=10)


def test_deleting_with_the_operator_down_and_with_the_namespace(stack: Stack, fleet: Fleet) -> None:
    stack.apply(namespace("team-gone", {"lora-operator.test/team": "a"}))
    stack.apply(
        lora_adapter("down", TEAM_A, repo="tiny/one", deployment=DEPLOYMENT),
        lora_adapter("whole", "team-gone", repo="tiny/two", deployment=DEPLOYMENT),
    )
    stack.wait_condition("lora", "down", TEAM_A, timeout=90)
    stack.wait_condition("lora", "whole", "team-gone", timeout=90)
    stack.scale_operator(0)
    try:
        started = time.monotonic()
        stack.delete("lora", "down", TEAM_A, timeout=10)
        stack.cluster.kubectl("delete", "namespace", "team-gone", "--wait=true", timeout=30)
        assert time.monotonic() - started < 20
        for url in stack.engine_urls(SERVING, FLEET).values():
            assert {"down", "whole"} <= set(models(url)), "nobody is there to unload them"
    finally:
        stack.scale_operator(1)
    eventually(lambda: unloaded(stack, "down", "whole"), what="what was deleted meanwhile is unloaded", timeout=30)
    stack.wait_condition("vllm", FLEET, SERVING, timeout=60)
