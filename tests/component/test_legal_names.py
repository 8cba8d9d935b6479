"""Names that Kubernetes allows and that are a trap: what is built from them is accepted by a real API server.

A name may have 253 characters and dots, a label value and the name of a Service or of a Job's pods 63.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest

from lora_operator.desired.children import (
    build_chat_config_map,
    build_guard_secret,
    build_modules_config_map,
    build_plugin_config_map,
    build_service,
)
from lora_operator.desired.deployment import build_deployment
from lora_operator.desired.job import build_credentials_secret, build_job, build_request, credentials_secret
from lora_operator.kube.answers import build_event
from lora_operator.plan.wants import build_artifact
from tests.component.conftest import Kubectl
from tests.component.manifests import manifest
from tests.unit.builders import make_adapter, make_artifact, make_cache, make_deployment

NAMES = {
    "dots": "a.b.c",
    "digits and dots": "0.0",
    "as long as can be": "a" * 253,
    "as long as can be, with dots": "a." * 126 + "b",
    "a dot where a Job's name is cut": "a" * 53 + "." + "b" * 199,
    "dashes where a Job's name is cut": "a" * 50 + "----" + "b" * 199,
}
DEPLOYMENTS = {"the one that sets VLLM_PORT": "vllm", "as long as can be": "a" * 63, "dashes": "a" + "-" * 61 + "b"}


def accepted(kubectl: Kubectl, *objects: dict[str, Any]) -> None:
    """Fail unless the API server takes each of them."""
    for obj in objects:
        placed = copy.deepcopy(obj)
        placed["metadata"]["namespace"] = "default"
        if obj["kind"] == "Event":
            placed["involvedObject"]["namespace"] = "default"
        placed["metadata"].pop("uid", None)
        answer = kubectl.apply(placed, "--server-side", "--dry-run=server")
        assert answer.ok, f"{obj['kind']} {obj['metadata']['name']}: {answer.error}"


def pod_of(workload: dict[str, Any], name: str) -> dict[str, Any]:
    """A pod of a workload, as its controller would make it."""
    template = copy.deepcopy(workload["spec"]["template"])
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {**template["metadata"], "name": name},
        "spec": template["spec"],
    }


@pytest.mark.parametrize("case", NAMES)
def test_what_is_made_for_adapters_caches_artifacts_and_secrets(case: str, kubectl: Kubectl) -> None:
    name = NAMES[case]
    cache = make_cache(name, claim=name)
    by_hand = make_artifact(name, cache=name, by_hand=True, secret=name)
    wanted = build_artifact(
        cache=cache,
        source=make_adapter(name).spec.source,
        base_artifact=name,
        credentials=("team-a", name, "token", "uid"),
    )
    request = build_request(by_hand, cache, base_model_path=None, with_credentials=True)
    job = build_job(
        by_hand,
        cache,
        request,
        attempt=12,
        image="i",
        image_pull_policy="Always",
        deadline_seconds=60,
        resources={},
        nonce="0123456789abcdef",
    )
    job["metadata"]["uid"] = "uid-job"
    mounted = credentials_secret(job)
    assert mounted is not None
    secret = build_credentials_secret(by_hand, job=job, name=mounted, values={"token": b"t"})
    accepted(
        kubectl,
        manifest("LoRAAdapter", {"spec.servedName": "x", "spec.vllmDeploymentRef.name": "llama"}, name=name),
        manifest("ModelCache", {"spec.storage.existingClaim": name}, name=name),
        manifest("ModelArtifact", {"spec.cacheRef.name": name}, name=name),
        wanted,
        job,
        pod_of(job, f"{job['metadata']['name'][:57]}-x2x4x"),
        secret,
        build_event(by_hand.to_wire() | {"kind": "ModelArtifact"}, event_type="Normal", reason="Ready", message="x"),
    )
    assert len(f"{request.artifact}-{'0' * 64}") <= 255, "the view's folder"


@pytest.mark.parametrize("case", DEPLOYMENTS)
def test_what_is_made_for_deployments(case: str, kubectl: Kubectl) -> None:
    name = DEPLOYMENTS[case]
    deployment = make_deployment(name, model={"chatTemplate": "{{ x }}"})
    files = {"plugin.py": "x"}
    gate = build_guard_secret(deployment, "t")
    workload = build_deployment(
        deployment,
        make_cache(claim="a" * 253),
        model_path="/m",
        replicas=1,
        token_secret=gate["metadata"]["name"],
        plugin="0123456789",
        plugin_files=("plugin.py",),
    )
    chat = build_chat_config_map(deployment)
    assert chat is not None
    accepted(
        kubectl,
        manifest("VLLMDeployment", name=name),
        workload,
        pod_of(workload, f"{name}-0123456789-x2x4x"),
        build_service(deployment),
        build_plugin_config_map(deployment, files),
        build_modules_config_map(deployment, "eA=="),
        gate,
        chat,
    )


def templates() -> Iterator[tuple[str, dict[str, Any]]]:
    """The pods of both kinds."""
    artifact, cache = make_artifact(), make_cache()
    request = build_request(artifact, cache, base_model_path=None, with_credentials=False)
    job = build_job(
        artifact,
        cache,
        request,
        attempt=1,
        image="i",
        image_pull_policy="Always",
        deadline_seconds=60,
        resources={},
        nonce="",
    )
    yield "Job", job["spec"]["template"]["spec"]
    for name in ("vllm", "llama"):
        workload = build_deployment(
            make_deployment(name), cache, model_path="/m", replicas=1, token_secret="g", plugin="0", plugin_files=()
        )
        yield name, workload["spec"]["template"]["spec"]


def test_no_pod_is_told_of_a_service_named_vllm() -> None:
    """It would set VLLM_PORT, which vLLM takes for the port of its own processes."""
    assert {name: pod["enableServiceLinks"] for name, pod in templates()} == {
        "Job": False,
        "vllm": False,
        "llama": False,
    }
