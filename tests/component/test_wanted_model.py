"""What a deployment's engines read is wanted, part by part, with each part's own Secret: against a real API server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, cast

import pytest

from e2e.cluster import ControlPlane
from lora_operator.api import VLLMDeployment
from lora_operator.kube import Kube, load_configuration
from lora_operator.reconcile.context import Context
from lora_operator.reconcile.model import want_model
from lora_operator.reconcile.store import Key, Kind, Store
from lora_operator.settings import Settings
from lora_operator.vllm import Engines
from tests.component.conftest import Kubectl
from tests.component.manifests import manifest
from tests.unit.builders import make_conditions, ready

MODEL: dict[str, Any] = {
    "spec.model.source.huggingFace.tokenSecretRef": {"name": "for-model", "key": "token"},
    "spec.model.tokenizer.source.huggingFace": {"repo": "org/tok", "tokenSecretRef": {"name": "for-tok"}},
    "spec.model.draftModel": {"source": {"huggingFace": {"repo": "org/draft"}}, "numSpeculativeTokens": 3},
    "spec.cacheRef": {"name": "example"},
}


@pytest.fixture
async def context(control_plane: ControlPlane, kubectl: Kubectl, namespace: str) -> AsyncIterator[Context]:
    """Over a store with a cache, and a Secret for the base model alone."""
    kubectl("create", "secret", "generic", "for-model", "-n", namespace, "--from-literal=token=x")
    kubectl("apply", "-f", "-", manifest=manifest("ModelCache", namespace=namespace))
    store = Store()
    store.upsert(Kind.MODEL_CACHE, kubectl.read("mcache/example", "-n", namespace))
    async with Kube(await load_configuration(str(control_plane.kubeconfig))) as kube:
        yield Context(
            kube=kube,
            engines=cast(Engines, None),
            store=store,
            settings=Settings(operator_image="i", operator_namespace="n"),
            enqueue=lambda *_: None,
        )


def deployment(kubectl: Kubectl, namespace: str, **status: Any) -> VLLMDeployment:
    """As the API server has it, with this status."""
    kubectl("apply", "-f", "-", manifest=manifest("VLLMDeployment", MODEL, namespace=namespace))
    body = kubectl.read("vllm/example", "-n", namespace)
    return VLLMDeployment.model_validate(body | {"status": status})


async def test_each_part_is_wanted_with_its_own_secret(context: Context, kubectl: Kubectl, namespace: str) -> None:
    wanted = await want_model(context, deployment(kubectl, namespace))
    base, tokenizer, draft = wanted.contents
    assert [content.role for content in wanted.contents] == ["model", "tokenizer", "draftModel"]
    assert tokenizer.blocked is not None
    assert (tokenizer.artifact_name, tokenizer.blocked.reason) == (None, "CredentialsNotFound")
    assert f"{namespace}/for-tok" in tokenizer.blocked.message
    assert (wanted.is_ready, wanted.is_blocked) == (False, True)
    made = {item["metadata"]["name"] for item in kubectl.read("mart", "-n", namespace)["items"]}
    assert made == {base.artifact_name, draft.artifact_name}, "one that is held up holds up no other"

    kubectl("create", "secret", "generic", "for-tok", "-n", namespace, "--from-literal=token=y")
    wanted = await want_model(context, deployment(kubectl, namespace))
    assert not wanted.is_blocked
    key = Key(Kind.VLLM_DEPLOYMENT, namespace, "example")
    lent = [context.registry.wanters((namespace, content.artifact_name or ""))[key] for content in wanted.contents]
    assert [credentials and credentials[:3] for credentials in lent] == [
        (namespace, "for-model", "token"),
        (namespace, "for-tok", "token"),
        None,
    ]
    assert await want_model(context, deployment(kubectl, namespace)) == wanted, "and the same again"


async def test_what_is_in_the_cache_is_used_on_when_its_secret_goes(
    context: Context, kubectl: Kubectl, namespace: str
) -> None:
    kubectl("create", "secret", "generic", "for-tok", "-n", namespace, "--from-literal=token=y")
    wanted = await want_model(context, deployment(kubectl, namespace))
    for content in wanted.contents:
        body = kubectl.read(f"mart/{content.artifact_name}", "-n", namespace)
        body["metadata"]["resourceVersion"] += "0"
        body["status"] = {"conditions": make_conditions(ready()), "path": f"artifacts/{content.role}"}
        context.store.upsert(Kind.MODEL_ARTIFACT, body)
    kubectl("delete", "secret", "for-tok", "-n", namespace)
    names = [content.artifact_name for content in wanted.contents]
    status = dict(zip(("modelArtifact", "tokenizerArtifact", "draftModelArtifact"), names, strict=True))
    known = deployment(kubectl, namespace, observedGeneration=1, **status)
    assert known.metadata.generation == 1
    kept = await want_model(context, known)
    assert (kept.is_ready, kept.is_blocked) == (True, False)
    assert kept.auxiliary.tokenizer == "/model-cache/artifacts/tokenizer"
    assert kept.auxiliary.draft_model == "/model-cache/artifacts/draftModel"
    changed = deployment(kubectl, namespace, observedGeneration=0, **status)
    assert (await want_model(context, changed)).is_blocked, "a status of an older spec says nothing of this one"


async def test_an_artifact_of_that_name_with_another_spec_is_not_taken(
    context: Context, kubectl: Kubectl, namespace: str
) -> None:
    wanted = await want_model(context, deployment(kubectl, namespace))
    name = wanted.contents[2].artifact_name
    body = kubectl.read(f"mart/{name}", "-n", namespace)
    body["metadata"]["resourceVersion"] += "0"
    body["spec"]["source"]["huggingFace"]["repo"] = "org/other"
    context.store.upsert(Kind.MODEL_ARTIFACT, body)
    draft = (await want_model(context, deployment(kubectl, namespace))).contents[2]
    assert draft.blocked is not None
    assert (draft.artifact, draft.blocked.reason) == (None, "NameTaken")
