"""What a deployment's engines read is wanted, part by part, with each part's own Secret: against a real API server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, cast

import pytest

from e2e.cluster import ControlPlane
from lora_operator.api import VLLMDeployment
from lora_operator.constants import ANNOTATION_REFRESH
from lora_operator.kube.client import Kube, load_configuration
from lora_operator.kube.kinds import Kind
from lora_operator.reconcile.base_model import want_model
from lora_operator.reconcile.context import Context, build_context
from lora_operator.reconcile.store import Key, Store
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
        yield build_context(
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
    lent = [context.records.wanters((namespace, content.artifact_name or ""))[key] for content in wanted.contents]
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
    kept = await want_model(context, known)
    assert (kept.is_ready, kept.is_blocked) == (True, False)
    assert kept.auxiliary.tokenizer == "/model-cache/artifacts/tokenizer"
    assert kept.auxiliary.draft_model == "/model-cache/artifacts/draftModel"
    kubectl("scale", "vllm/example", "-n", namespace, "--replicas=3")
    body = kubectl.read("vllm/example", "-n", namespace)
    assert body["metadata"]["generation"] > 1
    scaled = VLLMDeployment.model_validate(body | {"status": {"observedGeneration": 1, **status}})
    assert await want_model(context, scaled) == kept, "how many pods there are is nothing to it"
    kubectl(
        "patch",
        "vllm/example",
        "-n",
        namespace,
        "--type=merge",
        '-p={"spec": {"model": {"tokenizer": {"source": {"path": "other"}}}}}',
    )
    body = kubectl.read("vllm/example", "-n", namespace)
    changed = VLLMDeployment.model_validate(body | {"status": status})
    assert (await want_model(context, changed)).is_blocked, "that is other content"


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


async def refreshable(context: Context, kubectl: Kubectl, namespace: str) -> dict[str, Any]:
    """Three contents that are there; returns a status that names them."""
    kubectl("create", "secret", "generic", "for-tok", "-n", namespace, "--from-literal=token=y")
    wanted = await want_model(context, deployment(kubectl, namespace))
    for content in wanted.contents:
        arrive(context, kubectl, namespace, content.artifact_name, content.role)
    names = [content.artifact_name for content in wanted.contents]
    return dict(zip(("modelArtifact", "tokenizerArtifact", "draftModelArtifact"), names, strict=True))


def arrive(context: Context, kubectl: Kubectl, namespace: str, name: str | None, path: str) -> None:
    """An artifact is Ready from now on."""
    body = kubectl.read(f"mart/{name}", "-n", namespace)
    body["metadata"]["resourceVersion"] += "0"
    body["status"] = {"conditions": make_conditions(ready()), "path": f"artifacts/{path}"}
    context.store.upsert(Kind.MODEL_ARTIFACT, body)


def annotated(found: VLLMDeployment, **status: Any) -> VLLMDeployment:
    metadata = found.metadata.model_copy(update={"annotations": {ANNOTATION_REFRESH: "1"}})
    return found.model_copy(update={"metadata": metadata, "status": found.status.model_copy(update=status)})


def coming(context: Context, namespace: str) -> dict[str, str]:
    """What is being refreshed, by role."""
    want = context.records.model_want((namespace, "example"))
    assert want is not None
    return dict(zip(("model", "tokenizer", "draftModel"), (key[1] for key, _ in want.refreshing), strict=False))


async def test_a_refresh_is_of_all_contents_at_once(context: Context, kubectl: Kubectl, namespace: str) -> None:
    status = await refreshable(context, kubectl, namespace)
    before = await want_model(context, deployment(kubectl, namespace, **status))
    asked = annotated(deployment(kubectl, namespace, observedGeneration=1, **status))
    held = await want_model(context, asked)
    assert (held.contents, held.refresh, held.is_ready) == (before.contents, None, True)
    assert held.note == "; a refresh is running (Queued)"
    new = coming(context, namespace)
    assert set(new) == {"model", "tokenizer", "draftModel"}
    assert not set(new.values()) & set(status.values())
    lent = context.records.wanters((namespace, new["tokenizer"]))[Key(Kind.VLLM_DEPLOYMENT, namespace, "example")]
    assert lent is not None
    assert lent[1] == "for-tok"

    arrive(context, kubectl, namespace, new["model"], "model")
    arrive(context, kubectl, namespace, new["tokenizer"], "tokenizer-2")
    assert (await want_model(context, asked)).contents == before.contents, "the draft model is not there"
    arrive(context, kubectl, namespace, new["draftModel"], "draftModel")
    done = await want_model(context, asked)
    assert {content.role: content.artifact_name for content in done.contents} == new
    assert (done.refresh, done.note, done.auxiliary.tokenizer) == ("1", "", "/model-cache/artifacts/tokenizer-2")
    assert coming(context, namespace) == {}
    assert not context.records.wanters((namespace, status["modelArtifact"]))
    settled = annotated(deployment(kubectl, namespace, **status), refresh="1")
    assert await want_model(context, settled) == done


async def test_a_refresh_that_finds_the_same_changes_nothing(
    context: Context, kubectl: Kubectl, namespace: str
) -> None:
    status = await refreshable(context, kubectl, namespace)
    asked = annotated(deployment(kubectl, namespace, **status))
    held = await want_model(context, asked)
    for role, name in coming(context, namespace).items():
        arrive(context, kubectl, namespace, name, role)
    same = await want_model(context, asked)
    assert (same.contents, same.note) == (held.contents, "")


async def test_a_refresh_that_can_not_be_done_leaves_what_is_there_and_says_why(
    context: Context, kubectl: Kubectl, namespace: str
) -> None:
    status = await refreshable(context, kubectl, namespace)
    kubectl("delete", "secret", "for-tok", "-n", namespace)
    held = await want_model(context, annotated(deployment(kubectl, namespace, observedGeneration=1, **status)))
    assert (held.is_ready, held.is_blocked, held.refresh) == (True, False, None)
    assert held.note.startswith(
        f"; the last refresh failed, this content stays: CredentialsNotFound: Secret {namespace}/for-tok"
    )
