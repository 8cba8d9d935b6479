"""Wants: equal ones have one name and so one download; whatever makes them differ makes two."""

from __future__ import annotations

import re
from typing import Any

import pytest

from lora_operator.api import ModelArtifact, ModelCache
from lora_operator.api.sources.source import Source
from lora_operator.errors import ReasonError
from lora_operator.plan.source_policy import source_refused
from lora_operator.plan.wants import Credentials, build_artifact, find_cache, model_wants
from tests.unit.builders import make_cache, make_deployment, not_ready

TEMPLATE: dict[str, Any] = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "10Gi"}}}

KEYS: Credentials = ("team-a", "keys", "AWS_*", "uid-keys")
SECRET: Credentials = ("team-a", "hf", "token", "uid-secret")


def source(**hugging_face: Any) -> Source:
    path = hugging_face.pop("path", "")
    return Source.model_validate({"huggingFace": {"repo": "org/Sql-LoRA", **hugging_face}, "path": path})


def want(
    src: Source | None = None,
    *,
    cache: ModelCache | None = None,
    base: str | None = "base-1",
    credentials: Credentials | None = None,
    refresh: str | None = None,
) -> dict[str, Any]:
    return build_artifact(
        cache=cache or make_cache(),
        source=src or source(),
        base_artifact=base,
        credentials=credentials,
        refresh=refresh,
    )


def test_a_refresh_is_another_want_for_the_same_thing() -> None:
    first, again = want(), want(refresh="requested=1")
    assert first["spec"] == again["spec"]
    assert first["metadata"]["name"] != again["metadata"]["name"]
    assert again["metadata"]["annotations"] == {"lora-operator.dev/refresh": "requested=1"}
    assert again["metadata"]["name"] != want(refresh="requested=2")["metadata"]["name"]


def test_the_artifact_of_an_adapter() -> None:
    manifest = want(source(path="/checkpoint-500/", tokenSecretRef={"name": "hf"}), credentials=SECRET)
    assert manifest["metadata"]["name"].startswith("sql-lora-")
    assert manifest == {
        "apiVersion": "lora-operator.dev/v1alpha1",
        "kind": "ModelArtifact",
        "metadata": {
            "name": manifest["metadata"]["name"],
            "namespace": "serving",
            "labels": {"app.kubernetes.io/managed-by": "lora-operator"},
        },
        "spec": {
            "cacheRef": {"name": "default"},
            "type": "Adapter",
            "source": {
                "huggingFace": {
                    "repo": "org/Sql-LoRA",
                    "revision": "main",
                    "allowPatterns": [],
                    "ignorePatterns": [],
                },
                "path": "checkpoint-500",
            },
            "baseModelRef": {"name": "base-1"},
            "credentials": {"namespace": "team-a", "name": "hf", "key": "token", "uid": "uid-secret"},
        },
    }
    ModelArtifact.model_validate(manifest)


def test_the_artifact_of_a_base_model() -> None:
    spec = want(base=None)["spec"]
    assert spec["type"] == "BaseModel"
    assert "baseModelRef" not in spec
    assert "credentials" not in spec


SAME = {
    "said twice": (want(), want()),
    "with and without a slash at the path's end": (
        want(source(path="checkpoint-500")),
        want(source(path="checkpoint-500/")),
    ),
    "main is the default revision": (want(), want(source(revision="main"))),
    "the tenant's name for its Secret is no part, its identity is": (
        want(source(), credentials=SECRET),
        want(source(tokenSecretRef={"name": "hf"}), credentials=SECRET),
    ),
    "a cache that was made anew over the claim that an earlier one made": (
        want(cache=make_cache(template=TEMPLATE, uid="uid-1")),
        want(cache=make_cache(template=TEMPLATE, uid="uid-2")),
    ),
    "the cache's status and generation are no part": (
        want(cache=make_cache()),
        want(cache=make_cache(generation=7, conditions={})),
    ),
}


@pytest.mark.parametrize("case", SAME)
def test_equal_wants_share_one_download(case: str) -> None:
    first, second = SAME[case]
    assert first == second


def role_names(**model: Any) -> dict[str, str]:
    """Names of the artifacts that a deployment of this model wants, by role."""
    wants = model_wants(make_deployment(model=model).spec.model)
    return {
        w.role: build_artifact(
            cache=make_cache(), source=w.source, base_artifact=None, credentials=None, details=w.details
        )["metadata"]["name"]
        for w in wants
    }


OTHER = {"source": {"huggingFace": {"repo": "org/other"}}}
DRAFT = {**OTHER, "numSpeculativeTokens": 3}


def test_a_base_model_of_defaults_is_the_artifact_that_it_was_before_there_were_any() -> None:
    expected = {"model": "base-356e35ea5951f8c70089"}
    assert role_names() == role_names(loadFormat="auto", trustRemoteCode=False) == expected


def test_what_changes_the_wanted_files_makes_another_artifact() -> None:
    models: list[dict[str, Any]] = [{}, {"loadFormat": "pt"}, {"trustRemoteCode": True}, {"tokenizer": OTHER}]
    names = [role_names(**model)["model"] for model in models]
    assert len(set(names)) == len(names)
    same: list[dict[str, Any]] = [{"quantization": "awq"}, {"chatTemplate": "x"}, {"draftModel": DRAFT}]
    for model in same:
        assert role_names(**model)["model"] == names[0]


def test_what_goes_with_a_base_model() -> None:
    model = {"tokenizer": OTHER, "draftModel": DRAFT, "loadFormat": "pt", "trustRemoteCode": True}
    wants = model_wants(make_deployment(model=model).spec.model)
    assert [(w.role, w.source.hugging_face and w.source.hugging_face.repo, w.details) for w in wants] == [
        ("model", "meta/base", {"loadFormat": "pt", "trustRemoteCode": True, "withoutTokenizer": True}),
        ("tokenizer", "org/other", {"type": "Tokenizer", "trustRemoteCode": True}),
        ("draftModel", "org/other", {"loadFormat": "pt", "trustRemoteCode": True, "withoutTokenizer": True}),
    ]
    assert len(set(role_names(**model).values())) == 3


DIFFERENT = {
    "another repository": want(source(repo="org/other")),
    "a repository of the same last name in another organisation": want(source(repo="other/Sql-LoRA")),
    "another revision": want(source(revision="v2")),
    "a folder": want(source(path="checkpoint-500")),
    "patterns": want(source(allowPatterns=["*.json"])),
    "other patterns": want(source(ignorePatterns=["*.json"])),
    "another base model, which it is checked against": want(base="base-2"),
    "a base model of the same repository": want(base=None),
    "a Secret, so that nobody reads what another was let into": want(credentials=SECRET),
    "a Secret that was made anew": want(credentials=(*SECRET[:3], "uid-2")),
    "the same Secret name in another namespace": want(credentials=("team-b", *SECRET[1:])),
    "another key": want(credentials=("team-a", "hf", "other", "uid-secret")),
    "a claim that was made anew": want(
        cache=make_cache(template=TEMPLATE, status={"claimName": "default", "claimUid": "uid-claim-2"})
    ),
    "a cache that was made anew": want(cache=make_cache(uid="uid-2")),
    "another endpoint of the cache": want(cache=make_cache(endpoint="https://mirror.test")),
}


def test_different_wants_have_different_names() -> None:
    found = {"the plain one": want()} | DIFFERENT
    assert len({manifest["metadata"]["name"] for manifest in found.values()}) == len(found)


def s3(bucket: str = "models", **members: Any) -> Source:
    path = members.pop("path", "")
    return Source.model_validate({"s3": {"bucket": bucket, "prefix": "team-a/sql", **members}, "path": path})


def test_the_artifact_of_an_adapter_from_s3() -> None:
    manifest = want(s3(prefix="team-a/sql/", credentialsSecretRef={"name": "keys"}), credentials=KEYS)
    assert re.fullmatch("sql-[0-9a-f]{20}", manifest["metadata"]["name"])
    assert manifest["spec"]["source"] == {
        "s3": {"bucket": "models", "prefix": "team-a/sql", "allowPatterns": [], "ignorePatterns": []},
        "path": "",
    }
    assert manifest["spec"]["credentials"] == {"namespace": "team-a", "name": "keys", "key": "AWS_*", "uid": "uid-keys"}
    ModelArtifact.model_validate(manifest)


S3_DIFFERENT = {
    "the plain one": want(s3()),
    "another bucket": want(s3("other")),
    "another prefix": want(s3(prefix="team-b/sql")),
    "a folder below the prefix": want(s3(path="checkpoint-5")),
    "an endpoint": want(s3(endpoint="https://s3.test")),
    "a region": want(s3(region="eu-central-1")),
    "patterns": want(s3(allowPatterns=["*.json"])),
    "a Secret": want(s3(), credentials=KEYS),
    "a base model": want(s3(), base=None),
}


def test_different_wants_of_s3_have_different_names() -> None:
    assert len({manifest["metadata"]["name"] for manifest in S3_DIFFERENT.values()}) == len(S3_DIFFERENT)


def test_the_caches_hub_is_no_part_of_what_comes_from_s3() -> None:
    assert want(s3()) == want(s3(), cache=make_cache(endpoint="https://mirror.test"))


def test_what_was_wanted_before_there_was_s3_has_the_name_that_it_had() -> None:
    """The name is the path that engines load: another one would roll every fleet."""
    assert want()["metadata"]["name"] == "sql-lora-a13094b24a151df20eb7"


ALLOWED = "https://s3.test:9000"
ENDPOINTS: dict[str, tuple[Source, bool]] = {
    "the Hub": (source(), True),
    "AWS": (s3(), True),
    "AWS in a region": (s3(region="eu-central-1"), True),
    "the allowed one": (s3(endpoint=ALLOWED), True),
    "another one": (s3(endpoint="https://other.test"), False),
    "the allowed host by another scheme": (s3(endpoint="http://s3.test:9000"), False),
    "the allowed host at another port": (s3(endpoint="https://s3.test"), False),
    "a longer name": (s3(endpoint="https://s3.test:9000.evil.test"), False),
    "another spelling": (s3(endpoint="https://S3.test:9000"), False),
}


@pytest.mark.parametrize("case", ENDPOINTS)
def test_source_refused(case: str) -> None:
    asked, allowed = ENDPOINTS[case]
    refused = source_refused(asked, make_cache(s3_endpoints=(ALLOWED,)), namespace="team-a")
    assert (refused is None) == allowed
    if refused is not None:
        assert asked.s3 is not None
        assert (refused.reason, refused.message) == (
            "SourceNotAllowed",
            f"ModelCache serving/default does not allow the S3 endpoint {asked.s3.endpoint}: use one that it allows, or ask "
            "its owner to add this one to spec.s3.allowedEndpoints",
        )


Caches = list[ModelCache]
FOUND: dict[str, tuple[Caches, str | None, str]] = {
    "the named one": ([make_cache("a"), make_cache("b")], "b", "b"),
    "the named one, whatever the default": ([make_cache("a", is_default=True), make_cache("b")], "b", "b"),
    "the namespace's default": ([make_cache("a", is_default=True), make_cache("b")], None, "a"),
    "a default of another namespace does not count": (
        [make_cache("a", is_default=True), make_cache("b", "team-b", is_default=True)],
        None,
        "a",
    ),
}


@pytest.mark.parametrize("case", FOUND)
def test_find_cache(case: str) -> None:
    caches, ref, expected = FOUND[case]
    found = find_cache({c.key: c for c in caches}, namespace="serving", ref=ref, used_by="x")
    assert found.metadata.name == expected


NOT_FOUND: dict[str, tuple[Caches, str | None, str]] = {
    "the named one does not exist": (
        [make_cache("a", is_default=True)],
        "b",
        "ModelCache serving/b, named by VLLMDeployment serving/llama, does not exist: create it or change cacheRef",
    ),
    "none is the default": (
        [make_cache("a")],
        None,
        "VLLMDeployment serving/llama names no ModelCache and namespace serving has 0 annotated "
        'lora-operator.dev/is-default-cache="true": set cacheRef, or annotate exactly one',
    ),
    "two are": (
        [make_cache("a", is_default=True), make_cache("b", is_default=True)],
        None,
        "VLLMDeployment serving/llama names no ModelCache and namespace serving has 2 annotated "
        'lora-operator.dev/is-default-cache="true": set cacheRef, or annotate exactly one',
    ),
}


NOT_FOUND |= {
    "its claim is not made yet": (
        [make_cache("b", template=TEMPLATE, status={}, conditions=not_ready("ClaimRefused", "exceeded quota"))],
        "b",
        "ModelCache serving/b has no claim yet: exceeded quota",
    ),
}


@pytest.mark.parametrize("case", NOT_FOUND)
def test_no_cache(case: str) -> None:
    caches, ref, message = NOT_FOUND[case]
    with pytest.raises(ReasonError) as raised:
        find_cache({c.key: c for c in caches}, namespace="serving", ref=ref, used_by="VLLMDeployment serving/llama")
    assert (raised.value.reason, raised.value.message) == ("CacheNotReady", message)
