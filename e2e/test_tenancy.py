"""Who may have what: private repositories, namespaces, and the engines' own routes."""

from __future__ import annotations

from typing import Any

import pytest

from e2e.conftest import DEPLOYMENT, FLEET, OUTSIDER, SERVING, TEAM_A, TEAM_B, Fleet
from e2e.engine_client import models, request
from e2e.fixtures.hub import HubServer
from e2e.stack import SERVED_NAMES, Stack, lora_adapter

GOOD = {
    "five": (TEAM_A, "tiny/five", None),
    "six": (TEAM_B, "tiny/six", None),
    "private-a": (TEAM_A, "acme/private", "hub"),
    "private-b": (TEAM_B, "acme/private", "hub"),
}


@pytest.fixture(scope="module")
def shared(stack: Stack, fleet: Fleet, hub: HubServer) -> Any:
    """Four adapters of two namespaces, two of them of one private repository."""
    hub.reset_counters()
    stack.apply(
        *(
            lora_adapter(name, team, repo=repo, deployment=DEPLOYMENT, token_secret=secret)
            for name, (team, repo, secret) in GOOD.items()
        )
    )
    yield {name: stack.wait_condition("lora", name, team, timeout=120) for name, (team, _, _) in GOOD.items()}
    for name, (team, _, _) in GOOD.items():
        stack.delete("lora", name, team)


def test_every_file_is_fetched_exactly_once(stack: Stack, shared: Any, hub: HubServer) -> None:
    assert len(stack.engine_urls(SERVING, FLEET)) == 2
    for url in stack.engine_urls(SERVING, FLEET).values():
        assert set(GOOD) <= set(models(url))
    for repo in ("tiny/five", "tiny/six", "acme/private"):
        downloads = hub.downloads(repo)
        assert "adapter_model.safetensors" in downloads
        assert set(downloads.values()) == {1}, (repo, downloads)


@pytest.mark.parametrize("by", ["branch", "commit"])
@pytest.mark.parametrize(
    ("secret", "reason", "says"),
    [
        pytest.param(None, "Unauthorized", "does not exist, or is private and needs a token", id="no token"),
        pytest.param("wrong", "Unauthorized", "token", id="a wrong token"),
        pytest.param("no-grant", "RepositoryNotFound", "acme/private", id="a valid token without a grant"),
    ],
)
def test_what_is_cached_stays_closed_to_others(
    stack: Stack, shared: Any, hub: HubServer, by: str, secret: str | None, reason: str, says: str
) -> None:
    revision = hub.head("acme/private") if by == "commit" else "main"
    name = f"thief-{secret or 'anonymous'}-{by}"
    stack.apply(
        lora_adapter(name, TEAM_B, repo="acme/private", revision=revision, token_secret=secret, deployment=DEPLOYMENT)
    )
    try:
        adapter = stack.wait_condition("lora", name, TEAM_B, status="False", reason=reason, timeout=60)
        conditions = {c["type"]: c for c in adapter["status"]["conditions"]}
        assert conditions["Stalled"]["status"] == "True"
        assert says in conditions["Ready"]["message"]
        assert "resolvedRevision" not in adapter["status"]
        for url in stack.engine_urls(SERVING, FLEET).values():
            assert name not in models(url)
        assert name not in stack.cluster.kubectl("get", "cm", f"{FLEET}-modules", "-n", SERVING, "-o", "yaml")
    finally:
        stack.delete("lora", name, TEAM_B)


def test_a_namespace_outside_the_policy_gets_nothing(stack: Stack, shared: Any, hub: HubServer) -> None:
    hub.create_repo("acme/untouched")
    stack.apply(lora_adapter("outside", OUTSIDER, repo="acme/untouched", token_secret="hub", deployment=DEPLOYMENT))
    adapter = stack.wait_condition(
        "lora", "outside", OUTSIDER, type_="Accepted", status="False", reason="NamespaceNotAllowed", timeout=30
    )
    ready = next(c for c in adapter["status"]["conditions"] if c["type"] == "Ready")
    assert (ready["status"], ready["reason"]) == ("False", "NamespaceNotAllowed")
    assert OUTSIDER in ready["message"]
    assert hub.requests("acme/untouched") == []
    assert "artifactRef" not in adapter["status"]
    stack.delete("lora", "outside", OUTSIDER)


CLOSED = [
    ("POST", "/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "/model-cache"}),
    ("POST", "/v1/unload_lora_adapter", {"lora_name": "five"}),
    ("POST", "/v1/unload_lora_adapter/", {"lora_name": "five"}),
    ("POST", "//v1/unload_lora_adapter", {"lora_name": "five"}),
    ("POST", "/v1/unload%5Flora_adapter", {"lora_name": "five"}),
    ("POST", "/adapters", {"name": "x", "src": "/model-cache"}),
    ("DELETE", "/adapters/five", None),
    ("POST", "/scale_elastic_ep", {}),
    ("PUT", "/lora-operator/v1/modules", {"version": 1, "deployment": "x", "generation": 10**9, "modules": []}),
    ("GET", "/lora-operator/v1/state", None),
]


@pytest.mark.parametrize(("method", "path", "body"), CLOSED, ids=[f"{method} {path}" for method, path, _ in CLOSED])
def test_routes_that_change_an_engine_need_the_token(
    stack: Stack, shared: Any, method: str, path: str, body: Any
) -> None:
    for url in stack.engine_urls(SERVING, FLEET).values():
        assert request(method, url + path, body)[0] == 401
        assert request(method, url + path, body, headers={"X-LoRA-Operator-Token": "wrong"})[0] == 403
        assert "five" in models(url)


def test_inference_is_open(stack: Stack, shared: Any) -> None:
    chat = [{"role": "user", "content": "hello"}]
    for url in stack.engine_urls(SERVING, FLEET).values():
        for model in (SERVED_NAMES[0], "five", "private-b"):
            completion = {"model": model, "prompt": "hello", "max_tokens": 1}
            assert request("POST", f"{url}/v1/completions", completion)[0] == 200
            assert (
                request("POST", f"{url}/v1/chat/completions", {"model": model, "messages": chat, "max_tokens": 1})[0]
                == 200
            )
        for path in ("/health", "/v1/models", "/version", "/metrics"):
            assert request("GET", url + path)[0] == 200


def test_the_token_is_nowhere_but_in_the_secrets(stack: Stack, shared: Any) -> None:
    """The tenants' tokens: not in any object but Secrets, not in the operator's log."""
    from e2e.conftest import TOKEN_A, TOKEN_B

    kinds = "lora,vllm,mart,mcache,jobs,pods,events,cm,deploy"
    text = stack.cluster.kubectl("get", kinds, "-A", "-o", "yaml")
    text += stack.cluster.kubectl("logs", "deployment/lora-operator", "-n", "lora-system")
    for token in (TOKEN_A, TOKEN_B):
        assert token not in text
