"""Wants: equal ones have one name and so one download; whatever makes them differ makes two."""

from __future__ import annotations

from typing import Any

import pytest

from lora_operator.api import ModelArtifact, ModelCache
from lora_operator.api.source import Source
from lora_operator.errors import ReasonError
from lora_operator.plan.wants import Credentials, build_artifact, find_cache
from tests.unit.builders import make_cache

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
    "the cache's status and generation are no part": (
        want(cache=make_cache()),
        want(cache=make_cache(generation=7, conditions={})),
    ),
}


@pytest.mark.parametrize("case", SAME)
def test_equal_wants_share_one_download(case: str) -> None:
    first, second = SAME[case]
    assert first == second


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
    "a cache that was made anew": want(cache=make_cache(uid="uid-2")),
    "another endpoint of the cache": want(cache=make_cache(endpoint="https://mirror.test")),
}


def test_different_wants_have_different_names() -> None:
    found = {"the plain one": want()} | DIFFERENT
    assert len({manifest["metadata"]["name"] for manifest in found.values()}) == len(found)


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


@pytest.mark.parametrize("case", NOT_FOUND)
def test_no_cache(case: str) -> None:
    caches, ref, message = NOT_FOUND[case]
    with pytest.raises(ReasonError) as raised:
        find_cache({c.key: c for c in caches}, namespace="serving", ref=ref, used_by="VLLMDeployment serving/llama")
    assert (raised.value.reason, raised.value.message) == ("CacheNotReady", message)
