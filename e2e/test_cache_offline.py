"""A cache that is warmed by hand, and one that is offline: what is served of them by the shared fleet."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from e2e.conftest import DEPLOYMENT, FLEET, SERVING, TEAM_A, Fleet
from e2e.engine_client import token_ids
from e2e.fixtures.hub import HubServer
from e2e.stack import Json, Stack, lora_adapter


def require_answers(stack: Stack, name: str, case: Json) -> None:
    """Every engine of the fleet answers with the adapter's own words."""
    urls = stack.engine_urls(SERVING, FLEET)
    assert urls
    for url in urls.values():
        assert token_ids(url, name, case["prompt"]) == case["token_ids"]


def test_an_adapter_of_a_warm_cache_downloads_nothing_and_is_authorised_again(
    stack: Stack, fleet: Fleet, hub: HubServer, tiny: Path, reference: Any
) -> None:
    hub.create_repo("warm/one")
    hub.commit("warm/one", tiny / "adapters" / "one")
    by_hand: Json = {
        "apiVersion": "lora-operator.dev/v1alpha1",
        "kind": "ModelArtifact",
        "metadata": {"name": "warm-one", "namespace": SERVING},
        "spec": {
            "cacheRef": {"name": "default"},
            "type": "Adapter",
            "source": {"huggingFace": {"repo": "warm/one"}},
        },
    }
    stack.apply(by_hand)
    warm = stack.wait_condition("modelartifact", "warm-one", SERVING, timeout=90)
    sent, asked = hub.sent_bytes("warm/one"), len(hub.requests("warm/one"))
    assert sum(sent.values()) > 0
    stack.apply(lora_adapter("warm-one", TEAM_A, repo="warm/one", deployment=DEPLOYMENT))
    try:
        served = stack.wait_condition("lora", "warm-one", TEAM_A, timeout=90)
        assert hub.sent_bytes("warm/one") == sent
        assert any("auth-check" in path for _, path, _ in hub.requests("warm/one")[asked:])
        assert served["status"]["digest"] == warm["status"]["digest"]
        require_answers(stack, "warm-one", reference()["one"]["completions"][0])
    finally:
        stack.delete("lora", "warm-one", TEAM_A)
        stack.delete("modelartifact", "warm-one", SERVING)


@pytest.fixture
def offline(stack: Stack, fleet: Fleet) -> Iterator[None]:
    """The shared cache without network, for as long as the test takes."""

    def patch(value: str) -> None:
        change = f'{{"spec": {{"offline": {value}}}}}'
        stack.cluster.kubectl("patch", "mcache", "default", "-n", SERVING, "--type=merge", "-p", change)

    patch("true")
    yield
    patch("false")


@pytest.mark.node
def test_an_offline_cache_serves_what_was_put_on_its_volume(
    stack: Stack, hub: HubServer, tiny: Path, offline: None, reference: Any, tmp_path: Path
) -> None:
    hub.create_repo("offline/two")
    hub.commit("offline/two", tiny / "adapters" / "two")
    folder = stack.cache_folder(SERVING) / "hub"
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"}
    program = Path(sys.executable).with_name("hf")
    command = [str(program), "download", "offline/two", "--cache-dir", str(folder)]
    subprocess.run(command, env=env, check=True, capture_output=True, timeout=120)
    asked = len(hub.requests("offline/two"))
    stack.apply(
        lora_adapter("offline-two", TEAM_A, repo="offline/two", deployment=DEPLOYMENT),
        lora_adapter("offline-nope", TEAM_A, repo="offline/nope", deployment=DEPLOYMENT),
    )
    try:
        served = stack.wait_condition("lora", "offline-two", TEAM_A, timeout=90)
        assert served["status"]["resolvedRevision"] == hub.head("offline/two")
        require_answers(stack, "offline-two", reference()["two"]["completions"][0])
        missing = stack.wait_condition(
            "lora", "offline-nope", TEAM_A, status="False", reason="RepositoryNotFound", timeout=60
        )
        (message,) = [c["message"] for c in missing["status"]["conditions"] if c["type"] == "Ready"]
        assert "hub/models--offline--nope" in message
        assert len(hub.requests("offline/two")) == asked
        assert hub.requests("offline/nope") == []
    finally:
        stack.delete("lora", "offline-two", TEAM_A)
        stack.delete("lora", "offline-nope", TEAM_A)
