"""Every change of a served adapter's spec on the running fleet, under clients of its Service: no request fails, no engine restarts."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from e2e.conftest import DEPLOYMENT, FLEET, SERVING, TEAM_A, Fleet
from e2e.engine_client import Json, models, request, token_ids
from e2e.fixtures.hub import HubServer
from e2e.stack import Stack, eventually, lora_adapter
from e2e.test_isolation import engine_containers

CLIENTS = 4
REFRESH = "lora-operator.dev/refresh"
# Told where engines take longer than a second to change over; the old content answers meanwhile.
SWAPPING = ("Loading", "PartiallyLoaded")


def adapter(name: str, *, repo: str, annotations: Json | None = None, **more: Any) -> Json:
    """A LoRAAdapter of team A on the shared fleet."""
    found = lora_adapter(name, TEAM_A, repo=repo, deployment=DEPLOYMENT, **more)
    found["metadata"]["annotations"] = annotations or {}
    return found


def listed(stack: Stack) -> dict[str, set[str]]:
    """Names in /v1/models by pod."""
    return {pod: set(models(url)) for pod, url in stack.engine_urls(SERVING, FLEET).items()}


@contextmanager
def asking(stack: Stack, model: str, prompt: str) -> Iterator[list[tuple[int, Any]]]:
    """Clients that ask the fleet's Service without a pause; (status, token ids or what was said instead) of each answer."""
    service = stack.get("service", FLEET, SERVING)
    assert service is not None
    url = f"http://{service['spec']['clusterIP']}:8000/v1/completions"
    body = {"model": model, "prompt": prompt, "temperature": 0, "max_tokens": 8, "ignore_eos": True}
    answers: list[tuple[int, Any]] = []
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            status, answer = request("POST", url, body | {"return_token_ids": True})
            answers.append((status, tuple(answer["choices"][0]["token_ids"]) if status == 200 else answer))

    with ThreadPoolExecutor(CLIENTS) as pool:
        clients = [pool.submit(ask) for _ in range(CLIENTS)]
        try:
            yield answers
        finally:
            stop.set()
        for client in clients:
            client.result()


@pytest.mark.node  # clients use the ClusterIP
def test_revisions_there_and_back_lose_no_request_and_going_back_downloads_nothing(
    stack: Stack, fleet: Fleet, hub: HubServer, tiny: Path, reference: Any
) -> None:
    hub.create_repo("tiny/upgraded")
    first = hub.commit("tiny/upgraded", tiny / "adapters" / "one")
    second = hub.commit("tiny/upgraded", tiny / "adapters" / "one-v2")
    case, new = reference()["one"]["completions"][0], reference()["one-v2"]["completions"][0]
    good = {tuple(one["token_ids"][:8]) for one in (case, new)}
    stack.apply(adapter("upgraded", repo="tiny/upgraded", revision=first))
    stack.wait_condition("lora", "upgraded", TEAM_A, timeout=90)
    before = engine_containers(stack)
    with asking(stack, "upgraded", case["prompt"]) as answers:
        for revision, expected in ((second, new), (first, case)):
            hub.reset_counters()
            stack.apply(adapter("upgraded", repo="tiny/upgraded", revision=revision))
            told = stack.wait_condition("lora", "upgraded", TEAM_A, timeout=90)
            assert told["status"]["resolvedRevision"] == revision
            for url in stack.engine_urls(SERVING, FLEET).values():
                assert token_ids(url, "upgraded", case["prompt"], tokens=8) == expected["token_ids"][:8]
        assert hub.requests("tiny/upgraded") == [], "what is in the cache and pinned needs no source"
        seen = len(answers)
        eventually(lambda: len(answers) > seen + CLIENTS, what="clients were answered after it", timeout=60)
    assert [answer for answer in answers if answer[0] != 200] == []
    assert {tokens for _, tokens in answers} == good
    eventually(
        lambda: all("upgraded" in names for names in listed(stack).values()), what="the plain name is back", timeout=60
    )

    stack.apply(adapter("upgraded", repo="tiny/upgraded", revision=first, servedName="renamed"))
    stack.wait_condition("lora", "upgraded", TEAM_A, timeout=60)
    for names in listed(stack).values():
        assert "renamed" in names
    eventually(
        lambda: not any(name.startswith("upgraded") for names in listed(stack).values() for name in names),
        what="nothing answers by the old name",
        timeout=30,
    )
    stack.apply(adapter("upgraded", repo="tiny/upgraded", revision=first, servedName="renamed", suspend=True))
    stack.wait_condition("lora", "upgraded", TEAM_A, type_="Loaded", status="False", reason="Suspended", timeout=30)
    eventually(
        lambda: not any("renamed" in names for names in listed(stack).values()), what="it is not served", timeout=30
    )
    stack.apply(adapter("upgraded", repo="tiny/upgraded", revision=first, servedName="renamed"))
    stack.wait_condition("lora", "upgraded", TEAM_A, timeout=60)
    assert engine_containers(stack) == before
    stack.delete("lora", "upgraded", TEAM_A)


def test_a_refresh_brings_what_a_branch_has_now_and_a_failing_one_costs_nothing(
    stack: Stack, fleet: Fleet, hub: HubServer, tiny: Path, reference: Any
) -> None:
    hub.create_repo("tiny/moving")
    hub.commit("tiny/moving", tiny / "adapters" / "one")
    case, new = reference()["one"]["completions"][0], reference()["one-v2"]["completions"][0]
    stack.apply(adapter("moving", repo="tiny/moving"))
    stack.wait_condition("lora", "moving", TEAM_A, timeout=90)

    def said(*words: str) -> bool:
        ready = stack.condition("lora", "moving", TEAM_A)
        assert ready["status"] == "True", f"a refresh must not cost readiness: {ready}"
        return all(word in ready["message"] for word in words)

    hub.fail("tiny/moving", "*", status=503)
    stack.apply(adapter("moving", repo="tiny/moving", annotations={REFRESH: "1"}))
    eventually(
        lambda: said("the last refresh failed, this content stays: SourceUnreachable", "tried again at"),
        what="the message tells that the refresh failed, and when it is tried again",
        timeout=120,
        describe=lambda: str(stack.condition("lora", "moving", TEAM_A)),
    )
    hub.clear_faults()
    commit = hub.commit("tiny/moving", tiny / "adapters" / "one-v2")
    with asking(stack, "moving", case["prompt"]) as answers:
        stack.apply(adapter("moving", repo="tiny/moving", annotations={REFRESH: "2"}))

        def refreshed() -> bool:
            ready = stack.condition("lora", "moving", TEAM_A)
            assert ready["status"] == "True" or ready["reason"] in SWAPPING, f"a refresh must not cost more: {ready}"
            found = stack.get("lora", "moving", TEAM_A) or {}
            return bool(found["status"]["resolvedRevision"] == commit)

        eventually(refreshed, what="the branch's new commit is served", timeout=90)
        seen = len(answers)
        eventually(lambda: len(answers) > seen + CLIENTS, what="clients were answered after it", timeout=60)
    assert [answer for answer in answers if answer[0] != 200] == []
    for url in stack.engine_urls(SERVING, FLEET).values():
        assert token_ids(url, "moving", case["prompt"], tokens=8) == new["token_ids"][:8]
    stack.delete("lora", "moving", TEAM_A)


def test_lazy_adapters_are_loaded_by_the_first_request_and_preloaded_where_told(stack: Stack, fleet: Fleet) -> None:
    stack.apply(
        adapter("on-demand", repo="tiny/four", loadPolicy="Lazy"),
        adapter("by-one", repo="tiny/three", placement={"preload": 1}),
    )
    for name in ("on-demand", "by-one"):
        told = stack.wait_condition("lora", name, TEAM_A, timeout=90)
        assert told["status"]["pods"] == {"wanted": 2, "loaded": 2}
    names = listed(stack)
    assert not any("on-demand" in one for one in names.values())
    assert sum("by-one" in one for one in names.values()) == 1
    urls = stack.engine_urls(SERVING, FLEET)
    answers = {
        name: [token_ids(url, name, "Once", tokens=8) for url in urls.values()] for name in ("on-demand", "by-one")
    }
    assert all(one[0] == one[1] for one in answers.values())
    assert all({"on-demand", "by-one"} <= one for one in listed(stack).values())
    for name in ("on-demand", "by-one"):
        stack.wait_condition("lora", name, TEAM_A, timeout=30)
        stack.delete("lora", name, TEAM_A)
