"""Failures stay where they are: seven bad adapters and a hung download side by side, and a good one beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from e2e.conftest import DEPLOYMENT, FLEET, SERVING, TEAM_A, TEAM_B, Fleet
from e2e.engine_client import models
from e2e.fixtures.adapters import build
from e2e.fixtures.hub import HubServer
from e2e.stack import Stack, eventually, lora_adapter

# name → reason, and a word of what the message tells to do or to look at
BAD = {
    "unknown-repo": ("RepositoryNotFound", "acme/nothing-here"),
    "unknown-revision": ("RevisionNotFound", "no-such-branch"),
    "missing-secret": ("CredentialsNotFound", "create it"),
    "pickle-only": ("UnsafeFormat", "safetensors"),
    "rank-64": ("RankTooLarge", "maxLoraRank"),
    "truncated-body": ("InvalidAdapter", "adapter_model.safetensors"),
    "wrong-base-shape": ("IncompatibleBaseModel", "base model"),
}
BUILT = ("pickle-only", "rank-64", "truncated-body", "wrong-base-shape")


def engine_containers(stack: Stack) -> dict[str, tuple[str, int]]:
    """Container id and restart count of every engine."""
    return {
        pod["metadata"]["name"]: (status["containerID"], status["restartCount"])
        for pod in stack.pods(SERVING, FLEET)
        for status in pod["status"]["containerStatuses"]
    }


@pytest.fixture(scope="module")
def bad(stack: Stack, fleet: Fleet, hub: HubServer, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Seven bad adapters, and one whose download hangs."""
    before = engine_containers(stack)
    work = tmp_path_factory.mktemp("bad")
    for name in BUILT:
        hub.create_repo(f"bad/{name}")
        hub.commit(f"bad/{name}", build(name, tiny / "adapters" / "one", work / name))
    hub.create_repo("bad/hung")
    hub.commit("bad/hung", tiny / "adapters" / "two")
    hub.stall("bad/hung", "*.safetensors")
    sources: dict[str, dict[str, Any]] = {name: {"repo": f"bad/{name}"} for name in BUILT}
    sources["unknown-repo"] = {"repo": "acme/nothing-here", "token_secret": "no-grant"}
    sources["unknown-revision"] = {"repo": "tiny/one", "revision": "no-such-branch"}
    sources["missing-secret"] = {"repo": "acme/private", "token_secret": "absent"}
    sources["hung"] = {"repo": "bad/hung"}
    stack.apply(*(lora_adapter(name, TEAM_B, deployment=DEPLOYMENT, **source) for name, source in sources.items()))
    yield before
    hub.release()
    hub.clear_faults()
    for name in sources:
        stack.delete("lora", name, TEAM_B)


@pytest.mark.parametrize("name", list(BAD))
def test_a_bad_adapter_says_why_and_what_to_do(stack: Stack, bad: Any, name: str) -> None:
    reason, word = BAD[name]
    adapter = stack.wait_condition("lora", name, TEAM_B, status="False", reason=reason, timeout=120)
    conditions = {c["type"]: c for c in adapter["status"]["conditions"]}
    assert conditions["Stalled"]["status"] == "True"
    assert conditions["Stalled"]["reason"] == reason
    assert word in conditions["Ready"]["message"]
    events = stack.items("events", TEAM_B)
    assert any(e["involvedObject"]["name"] == name and e["reason"] == reason and e["type"] == "Warning" for e in events)


def test_a_good_adapter_passes_all_of_them(stack: Stack, bad: Any, hub: HubServer) -> None:
    eventually(lambda: hub.stalled > 0, what="the hung download has begun", timeout=60)
    for name, (reason, _) in BAD.items():
        stack.wait_condition("lora", name, TEAM_B, status="False", reason=reason, timeout=120)
    stack.apply(lora_adapter("good", TEAM_A, repo="tiny/four", deployment=DEPLOYMENT))
    stack.wait_condition("lora", "good", TEAM_A, timeout=60)
    for url in stack.engine_urls(SERVING, FLEET).values():
        listed = models(url)
        assert "good" in listed
        assert not set(BAD) & set(listed)
    assert hub.stalled > 0, "the hung download ended before the good adapter was Ready"
    assert stack.condition("lora", "hung", TEAM_B)["reason"] == "Downloading"
    assert engine_containers(stack) == bad
    stack.delete("lora", "good", TEAM_A)


def test_retries_are_dated_in_the_status(stack: Stack, bad: Any) -> None:
    adapter = stack.get("lora", "unknown-repo", TEAM_B)
    assert adapter is not None
    ref = adapter["status"]["artifactRef"]
    status = (stack.get("mart", ref["name"], ref["namespace"]) or {})["status"]
    assert status["failedAttempts"] >= 1
    assert status["nextAttemptTime"]
    assert status["lastFailure"]["reason"] == "RepositoryNotFound"
    assert "tried again at" in stack.condition("lora", "unknown-repo", TEAM_B)["message"]
