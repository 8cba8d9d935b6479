"""Adapters and a base model from a real S3 service, by the operator on the cluster: who may, what is fetched, and what is told."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from e2e.conftest import DEPLOYMENT, FLEET, SERVING, TEAM_A, TEAM_B, Fleet
from e2e.engine_client import models, token_ids
from e2e.fixtures.s3 import S3Server
from e2e.stack import Json, Stack, eventually, token_secret, vllm_deployment

KEYS = {"AWS_ACCESS_KEY_ID": "AKTEAMSOFTHEFLEET", "AWS_SECRET_ACCESS_KEY": "secret-of-the-teams-0123456789"}
WRONG = KEYS | {"AWS_SECRET_ACCESS_KEY": "wrong-secret-of-a-team-0123456789"}
FILES = ("adapter_config.json", "adapter_model.safetensors")


def keys_secret(name: str, namespace: str, values: dict[str, str]) -> list[Json]:
    """A Secret with S3 keys beside whatever else, and the tenant's own permission for the operator to read just this Secret."""
    secret, *rights = token_secret(name, namespace, "not for S3")
    secret["stringData"] |= values
    return [secret, *rights]


def adapter(name: str, namespace: str, *, secret: str | None, **s3: Any) -> Json:
    """A LoRAAdapter of the shared fleet from S3."""
    if secret is not None:
        s3["credentialsSecretRef"] = {"name": secret}
    return {
        "apiVersion": "lora-operator.dev/v1alpha1",
        "kind": "LoRAAdapter",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "source": {"s3": {"bucket": "models", "prefix": "adapters/one", **s3}},
            "vllmDeploymentRef": {"namespace": DEPLOYMENT[0], "name": DEPLOYMENT[1]},
        },
    }


def allow(stack: Stack, *endpoints: str) -> None:
    """Says on the shared cache which endpoints sources may name."""
    patch = json.dumps({"spec": {"s3": {"allowedEndpoints": list(endpoints)}}})
    stack.cluster.kubectl("patch", "mcache", "default", "-n", SERVING, "--type=merge", "-p", patch)


@pytest.fixture(scope="module")
def s3(stack: Stack, fleet: Fleet, tiny: Path) -> Iterator[S3Server]:
    """The service, allowed by the cache, with one private bucket; the teams' Secrets."""
    with S3Server(host=stack.cluster.node_ip) as server:
        server.add_account(*KEYS.values())
        server.create_bucket("models", KEYS["AWS_ACCESS_KEY_ID"])
        server.upload("models", "adapters/one", tiny / "adapters" / "one")
        server.upload("models", "base", tiny / "base")
        stack.apply(
            *keys_secret("s3", TEAM_A, KEYS),
            *keys_secret("s3", TEAM_B, KEYS),
            *keys_secret("s3-wrong", TEAM_B, WRONG),
            *keys_secret("s3-half", TEAM_B, {"AWS_ACCESS_KEY_ID": KEYS["AWS_ACCESS_KEY_ID"]}),
            *keys_secret("s3", SERVING, KEYS),
        )
        allow(stack, server.url)
        yield server
        allow(stack)


@pytest.fixture(scope="module")
def one(stack: Stack, s3: S3Server) -> Iterator[Json]:
    """A tenant's adapter, once it is Ready."""
    stack.apply(adapter("s3-one", TEAM_A, secret="s3", endpoint=s3.url))
    yield stack.wait_condition("lora", "s3-one", TEAM_A, timeout=120)
    stack.delete("lora", "s3-one", TEAM_A)


def test_an_adapter_with_a_tenants_keys_answers(stack: Stack, s3: S3Server, one: Json, reference: Any) -> None:
    assert s3.bodies("models") == {f"adapters/one/{name}": 1 for name in FILES}
    case = reference()["one"]["completions"][0]
    urls = stack.engine_urls(SERVING, FLEET)
    assert urls
    for url in urls.values():
        assert token_ids(url, "s3-one", case["prompt"]) == case["token_ids"]
    status = one["status"]
    assert len(status["resolvedRevision"]) == 64
    artifact = stack.get("modelartifact", status["artifactRef"]["name"], status["artifactRef"]["namespace"])
    assert artifact is not None
    assert artifact["status"]["source"] == "s3://models/adapters/one"
    assert artifact["spec"]["credentials"]["namespace"] == TEAM_A
    assert "s3://models/adapters/one" in stack.cluster.kubectl("get", "mart", "-n", SERVING)


def test_a_second_adapter_of_the_same_listing_downloads_nothing(stack: Stack, s3: S3Server, one: Json) -> None:
    before = s3.bodies("models")
    stack.apply(adapter("s3-two", TEAM_B, secret="s3", endpoint=s3.url))
    two = stack.wait_condition("lora", "s3-two", TEAM_B, timeout=90)
    assert s3.bodies("models") == before
    assert two["status"]["digest"] == one["status"]["digest"]
    assert two["status"]["artifactRef"] != one["status"]["artifactRef"]  # it was authorised with its own keys
    stack.delete("lora", "s3-two", TEAM_B)


REFUSED = {
    "s3-wrong": ("Unauthorized", "SignatureDoesNotMatch"),
    "s3-half": ("CredentialsKeyMissing", f"Secret {TEAM_B}/s3-half has no key AWS_SECRET_ACCESS_KEY"),
    None: ("Unauthorized", "can't be read anonymously; set source.s3.credentialsSecretRef"),
}


def test_what_is_cached_stays_closed_to_others(stack: Stack, s3: S3Server, one: Json) -> None:
    names = {secret: f"thief-{secret or 'anonymous'}" for secret in REFUSED}
    stack.apply(*(adapter(name, TEAM_B, secret=secret, endpoint=s3.url) for secret, name in names.items()))
    try:
        for secret, (reason, says) in REFUSED.items():
            found = stack.wait_condition("lora", names[secret], TEAM_B, status="False", reason=reason, timeout=60)
            conditions = {c["type"]: c for c in found["status"]["conditions"]}
            assert conditions["Stalled"]["status"] == "True"
            assert says in conditions["Ready"]["message"]
            assert "resolvedRevision" not in found["status"]
        for url in stack.engine_urls(SERVING, FLEET).values():
            assert not set(names.values()) & set(models(url))
        stack.apply(*keys_secret("s3-half", TEAM_B, KEYS))
        stack.wait_condition("lora", names["s3-half"], TEAM_B, timeout=60)  # at once when the Secret changed
    finally:
        for name in names.values():
            stack.delete("lora", name, TEAM_B)


def test_an_endpoint_that_the_cache_does_not_allow_is_never_asked(stack: Stack, s3: S3Server, one: Json) -> None:
    with S3Server(host=stack.cluster.node_ip) as other:
        elsewhere = adapter("elsewhere", TEAM_B, secret="s3", endpoint=other.url)
        by_hand: Json = {
            "apiVersion": "lora-operator.dev/v1alpha1",
            "kind": "ModelArtifact",
            "metadata": {"name": "elsewhere", "namespace": SERVING},
            "spec": {"cacheRef": {"name": "default"}, "type": "BaseModel", "source": elsewhere["spec"]["source"]},
        }
        deployment = vllm_deployment("elsewhere", SERVING, repo="", served_names=("elsewhere",))
        deployment["spec"]["model"]["source"] = elsewhere["spec"]["source"]
        stack.apply(elsewhere, by_hand, deployment)
        looked = (("lora", TEAM_B, "Accepted"), ("modelartifact", SERVING, "Ready"), ("vllm", SERVING, "ModelReady"))
        for kind, namespace, type_ in looked:
            found = stack.wait_condition(
                kind, "elsewhere", namespace, type_=type_, status="False", reason="SourceNotAllowed", timeout=30
            )
            conditions = {c["type"]: c for c in found["status"]["conditions"]}
            assert conditions["Stalled"]["reason"] == "SourceNotAllowed"
            assert (
                f"ModelCache {SERVING}/default does not allow the S3 endpoint {other.url}"
                in conditions["Ready"]["message"]
            )
        assert other.requests == []
        allow(stack, s3.url, other.url)  # it goes on by itself once it is allowed, and then finds no bucket
        for kind, namespace, _ in looked:
            stack.wait_condition(kind, "elsewhere", namespace, status="False", reason="Unauthorized", timeout=60)
        assert {request.bucket for request in other.requests} == {"models"}
        for kind, namespace, _ in looked:
            stack.delete(kind, "elsewhere", namespace)
        allow(stack, s3.url)


def test_a_base_model_is_brought_into_the_cache_by_hand(stack: Stack, s3: S3Server) -> None:
    manifest: Json = {
        "apiVersion": "lora-operator.dev/v1alpha1",
        "kind": "ModelArtifact",
        "metadata": {"name": "warm", "namespace": SERVING},
        "spec": {
            "cacheRef": {"name": "default"},
            "type": "BaseModel",
            "source": {
                "s3": {
                    "bucket": "models",
                    "prefix": "base",
                    "endpoint": s3.url,
                    "credentialsSecretRef": {"name": "s3"},
                }
            },
        },
    }
    stack.apply(manifest)
    found = stack.wait_condition("modelartifact", "warm", SERVING, timeout=90)
    from_hub = (stack.get("vllm", FLEET, SERVING) or {})["status"]["modelArtifact"]
    assert found["status"]["digest"] == (stack.get("modelartifact", from_hub, SERVING) or {})["status"]["digest"]
    eventually(lambda: not _jobs_of(stack, "warm"), what="its Jobs and their Secrets are gone", timeout=30)
    stack.delete("modelartifact", "warm", SERVING)


def _jobs_of(stack: Stack, artifact: str) -> list[Json]:
    return stack.items("jobs,secrets", SERVING, f"lora-operator.dev/modelartifact={artifact}")


def test_the_keys_are_nowhere_but_in_the_secrets(stack: Stack, s3: S3Server, one: Json) -> None:
    kinds = "lora,vllm,mart,mcache,jobs,pods,events,cm,deploy"
    text = stack.cluster.kubectl("get", kinds, "-A", "-o", "yaml")
    text += stack.cluster.kubectl("logs", "deployment/lora-operator", "-n", "lora-system")
    for value in (*KEYS.values(), *WRONG.values()):
        assert value not in text
