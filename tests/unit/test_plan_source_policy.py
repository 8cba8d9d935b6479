"""What sources may name, and to whom a ModelCache allows it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import pytest

from lora_operator.api.cache import ModelCache
from lora_operator.api.sources.source import Source
from lora_operator.plan.source_policy import source_refused
from tests.unit.builders import make_cache

SUM = "0" * 64
NOTHING: Mapping[str, Any] = MappingProxyType({})


def cache(spec: Mapping[str, Any]) -> ModelCache:
    body = make_cache(claim="models").model_dump(mode="json", by_alias=True)
    return ModelCache.model_validate({**body, "spec": {**body["spec"], **spec}})


def refused(source: dict[str, Any], spec: Mapping[str, Any] = NOTHING, namespace: str = "team-a") -> str | None:
    found = source_refused(Source.model_validate(source), cache(spec), namespace=namespace)
    assert found is None or found.reason == "SourceNotAllowed"
    return found.message if found else None


def files(*urls: str) -> dict[str, Any]:
    named = [{"path": f"f{number}", "url": url, "sha256": SUM} for number, url in enumerate(urls)]
    return {"http": {"files": named}}


HTTP = {"http": {"allowedEndpoints": ["https://a.test", "http://b.test:8080"]}}
URLS: dict[str, tuple[dict[str, Any], bool]] = {
    "an allowed server": (files("https://a.test/x"), True),
    "two allowed servers": (files("https://a.test/x", "http://b.test:8080/y/z?download=1"), True),
    "an archive": ({"http": {"url": "https://a.test/x.zip", "sha256": SUM}}, True),
    "one that is not allowed among others": (files("https://a.test/x", "https://c.test/y"), False),
    "another scheme": (files("http://a.test/x"), False),
    "another port": (files("https://a.test:8443/x"), False),
    "a longer name": (files("https://a.test.evil.test/x"), False),
    "an archive elsewhere": ({"http": {"url": "https://c.test/x.zip", "sha256": SUM}}, False),
    "a server of the cluster": (files("http://10.0.0.1/x"), False),
}


@pytest.mark.parametrize("case", URLS)
def test_servers(case: str) -> None:
    source, allowed = URLS[case]
    message = refused(source, HTTP)
    assert (message is None) == allowed
    assert message is None or message.startswith("ModelCache serving/default does not allow the HTTP endpoint http")
    assert message is None or message.endswith("ask its owner to add this one to spec.http.allowedEndpoints")
    assert refused(source) is not None, "nothing is allowed by default"


CLAIMS = {
    "persistentVolumeClaim": {
        "allowedClaims": [
            {"claimName": "own"},
            {"claimName": "shared", "namespaces": ["team-a"]},
            {"claimName": "open", "namespaces": ["*"]},
            {"claimName": "models", "namespaces": ["*"]},
        ]
    }
}


@pytest.mark.parametrize(
    ("claim", "admitted"),
    [
        ("own", {"serving"}),
        ("shared", {"serving", "team-a"}),
        ("open", {"serving", "team-a", "team-b"}),
        ("other", set()),
        ("models", set()),  # the cache's own, with what all tenants brought
    ],
)
def test_claims(claim: str, admitted: set[str]) -> None:
    source = {"persistentVolumeClaim": {"claimName": claim, "path": "sql"}}
    messages = {name: refused(source, CLAIMS, name) for name in ("serving", "team-a", "team-b")}
    assert {name for name, message in messages.items() if message is None} == admitted
    for message in filter(None, messages.values()):
        assert f"the claim {claim}" in message
        assert "spec." in message


PATHS = {
    "local": {
        "allowedPaths": [
            {"path": "models/team-a/", "namespaces": ["team-a"]},
            {"path": "models/public", "namespaces": ["*"]},
            {"path": "models/own"},
        ]
    }
}


@pytest.mark.parametrize(
    ("path", "admitted"),
    [
        ("models/team-a", {"serving", "team-a"}),
        ("models/team-a/sql/", {"serving", "team-a"}),
        ("models/team-abc", set()),
        ("models", set()),
        ("models/public/x", {"serving", "team-a", "team-b"}),
        ("models/own", {"serving"}),
    ],
)
def test_paths(path: str, admitted: set[str]) -> None:
    found = {
        name for name in ("serving", "team-a", "team-b") if refused({"local": {"path": path}}, PATHS, name) is None
    }
    assert found == admitted
    assert refused({"local": {"path": path}}) is not None, "nothing is allowed by default"


@pytest.mark.parametrize(
    ("reference", "allowed"),
    [
        ("r.test/sql:v1", True),
        ("r.test:5000/sql:v1", True),
        ("r.test:5001/sql:v1", False),
        ("r.test.evil.test/sql", False),
        ("docker.io/library/sql", False),
    ],
)
def test_registries(reference: str, allowed: bool) -> None:
    spec = {"oci": {"allowedEndpoints": ["https://r.test", "http://r.test:5000"]}}
    message = refused({"oci": {"reference": reference}}, spec)
    assert (message is None) == allowed
    assert message is None or message.endswith(
        f"add https://{reference.partition('/')[0]} to spec.oci.allowedEndpoints"
    )


@pytest.mark.parametrize("member", ["gcs", "azure"])
def test_clouds_need_no_permission_and_other_services_do(member: str) -> None:
    source = {"bucket": "models"} if member == "gcs" else {"account": "models", "container": "adapters"}
    elsewhere = {member: {**source, "endpoint": "https://other.test"}}
    assert refused({member: source}) is None
    assert refused(elsewhere) is not None
    assert refused(elsewhere, {member: {"allowedEndpoints": ["https://other.test"]}}) is None


def test_the_hub_needs_no_permission() -> None:
    assert refused({"huggingFace": {"repo": "org/sql"}}) is None


def test_an_offline_cache_refuses_what_it_has_no_place_for() -> None:
    spec = {"offline": True, **HTTP, **CLAIMS, "oci": {"allowedEndpoints": ["https://r.test"]}}
    for source in (files("https://a.test/x"), {"oci": {"reference": "r.test/sql"}}):
        message = refused(source, spec)
        assert message is not None
        assert message.startswith("ModelCache serving/default is offline, and has no place for content of ")
        assert "source.local" in message
    shared = {"persistentVolumeClaim": {"claimName": "open", "path": "sql"}}
    for source in ({"huggingFace": {"repo": "org/sql"}}, {"gcs": {"bucket": "models"}}, shared):
        assert refused(source, spec) is None
