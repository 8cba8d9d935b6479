"""Names on a fleet of real engines: who has one, and how it passes from one tenant's adapter to another's."""

from __future__ import annotations

import threading
from typing import Any

from e2e.conftest import DEPLOYMENT, FLEET, SERVING, TEAM_A, TEAM_B, Fleet
from e2e.engine_client import models, request
from e2e.stack import SERVED_NAMES, Stack, eventually, lora_adapter

TAKEN = (
    "servedName shared is taken by an older adapter of serving/llama: "
    "choose another; it is taken over should the older one go"
)


def ask(url: str, case: dict[str, Any]) -> tuple[int, list[int] | None]:
    """Status and token ids of a short greedy answer under the contested name."""
    body = {
        "model": "shared",
        "prompt": case["prompt"],
        "temperature": 0,
        "max_tokens": 16,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    status, answer = request("POST", f"{url}/v1/completions", body)
    return status, answer["choices"][0]["token_ids"] if status == 200 else None


class Client(threading.Thread):
    """Asks one engine all the time; every answer that it got."""

    def __init__(self, url: str, case: dict[str, Any]) -> None:
        super().__init__(daemon=True)
        self.url, self.case = url, case
        self.answers: list[tuple[int, list[int] | None]] = []
        self._stop_asking = threading.Event()

    def run(self) -> None:
        while not self._stop_asking.is_set():
            self.answers.append(ask(self.url, self.case))

    def stop(self) -> None:
        """Ask no more."""
        self._stop_asking.set()
        self.join(60)


def test_a_name_passes_from_one_tenant_to_the_next_in_one_swap(stack: Stack, fleet: Fleet, reference: Any) -> None:
    first = lora_adapter("mine", TEAM_A, repo="tiny/one", servedName="shared", deployment=DEPLOYMENT)
    second = lora_adapter("ours", TEAM_B, repo="tiny/two", servedName="shared", deployment=DEPLOYMENT)
    stack.apply(first)
    stack.wait_condition("lora", "mine", TEAM_A, timeout=90)
    stack.apply(second)
    refused = stack.wait_condition("lora", "ours", TEAM_B, status="False", reason="NameConflict", timeout=60)
    conditions = {c["type"]: c for c in refused["status"]["conditions"]}
    assert conditions["Accepted"]["message"] == TAKEN
    assert conditions["Stalled"]["status"] == "True"
    assert TEAM_A not in str(refused["status"])
    stack.wait_condition("lora", "ours", TEAM_B, type_="Downloaded", timeout=60)
    shown = stack.cluster.kubectl("get", "lora", "ours", "-n", TEAM_B)
    assert "NameConflict" in shown

    cases = {name: reference()[name]["completions"][0] for name in ("one", "two")}
    prompt = {"prompt": cases["one"]["prompt"]}
    urls = sorted(stack.engine_urls(SERVING, FLEET).values())
    old = {url: ask(url, prompt) for url in urls}
    assert {answer[0] for answer in old.values()} == {200}
    clients = [Client(url, prompt) for url in urls]
    for client in clients:
        client.start()
    try:
        stack.delete("lora", "mine", TEAM_A)
        stack.wait_condition("lora", "ours", TEAM_B, timeout=60)
        new = {url: ask(url, prompt) for url in urls}
    finally:
        for client in clients:
            client.stop()
    for client in clients:
        before, after = old[client.url], new[client.url]
        assert before[1] != after[1], "the two adapters answer alike: take another prompt"
        turn = next(i for i, answer in enumerate([*client.answers, after]) if answer != before)
        assert client.answers[:turn] == [before] * turn
        assert client.answers[turn:] == [after] * (len(client.answers) - turn), "something else answered in between"
        assert ask(client.url, cases["two"]) == (200, cases["two"]["token_ids"][:16])


def test_a_younger_adapter_does_not_get_a_name_by_being_renamed(stack: Stack, fleet: Fleet) -> None:
    """After the test before: `ours` has the name."""
    late = lora_adapter("late", TEAM_A, repo="tiny/one", deployment=DEPLOYMENT)
    stack.apply(late)
    stack.wait_condition("lora", "late", TEAM_A, timeout=60)
    late["spec"]["servedName"] = "shared"
    stack.apply(late)
    stack.wait_condition("lora", "late", TEAM_A, status="False", reason="NameConflict", timeout=30)
    stack.wait_condition("lora", "ours", TEAM_B, timeout=30)

    def unloaded() -> bool:
        return all("late" not in models(url) for url in stack.engine_urls(SERVING, FLEET).values())

    eventually(unloaded, what="its old name answers nobody", timeout=20)
    stack.delete("lora", "ours", TEAM_B)
    taken = stack.wait_condition("lora", "late", TEAM_A, timeout=30)
    assert taken["status"]["servedName"] == "shared"
    stack.delete("lora", "late", TEAM_A)


def test_a_name_of_the_base_model_is_nobody_s(stack: Stack, fleet: Fleet) -> None:
    name = SERVED_NAMES[1]
    stack.apply(lora_adapter("greedy", TEAM_A, repo="tiny/one", servedName=name, deployment=DEPLOYMENT))
    refused = stack.wait_condition("lora", "greedy", TEAM_A, status="False", reason="NameIsBaseModel", timeout=30)
    ready = next(c for c in refused["status"]["conditions"] if c["type"] == "Ready")
    assert ready["message"] == f"servedName {name} is a name of the base model of serving/llama: choose another"
    assert "artifactRef" not in refused["status"]
    stack.delete("lora", "greedy", TEAM_A)
