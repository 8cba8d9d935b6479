"""The CRDs as their users meet them, on a real API server: what is refused and how it is said, defaults, explain, scale."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lora_operator.api import RESOURCES, LoRAAdapter, ModelArtifact, ModelCache, VLLMDeployment
from lora_operator.api.common import Resource
from lora_operator.constants import API_VERSION
from tests.component.conftest import Kubectl
from tests.component.manifests import DELETE, SPECS, manifest

MODELS: dict[str, type[Resource]] = {
    "LoRAAdapter": LoRAAdapter,
    "VLLMDeployment": VLLMDeployment,
    "ModelCache": ModelCache,
    "ModelArtifact": ModelArtifact,
}
REFUSED: list[tuple[str, str, dict[str, Any], str]] = [
    ("a typo in a field", "LoRAAdapter", {"spec.servedname": "sql"}, 'unknown field "spec.servedname"'),
    ("a typo deep inside", "LoRAAdapter", {"spec.source.huggingFace.rev": "x"}, '"spec.source.huggingFace.rev"'),
    ("an unknown source", "LoRAAdapter", {"spec.source": {"git": {"url": "x"}}}, 'unknown field "spec.source.git"'),
    ("a field of another kind", "LoRAAdapter", {"spec.servedNames": "x"}, 'unknown field "spec.servedNames"'),
    ("an unknown field beside spec", "LoRAAdapter", {"sepc": {}}, 'unknown field "sepc"'),
    ("no spec", "LoRAAdapter", {"spec": DELETE}, "spec: Required value"),
    ("no source", "LoRAAdapter", {"spec.source": DELETE}, "spec.source: Required value"),
    ("no repo", "LoRAAdapter", {"spec.source.huggingFace": {}}, "spec.source.huggingFace.repo: Required value"),
    ("no deployment", "LoRAAdapter", {"spec.vllmDeploymentRef": DELETE}, "spec.vllmDeploymentRef: Required value"),
    (
        "a deployment's name that no object can have",
        "LoRAAdapter",
        {"spec.vllmDeploymentRef.name": "Llama_3"},
        "spec.vllmDeploymentRef.name in body should match",
    ),
    (
        "a namespace that none can be",
        "LoRAAdapter",
        {"spec.vllmDeploymentRef.namespace": "team.a"},
        "spec.vllmDeploymentRef.namespace in body should match",
    ),
    ("a served name that is too long", "LoRAAdapter", {"spec.servedName": "a" * 129}, "spec.servedName: Too long"),
    ("an empty served name", "LoRAAdapter", {"spec.servedName": ""}, "spec.servedName in body should be at least 1"),
    ("a number for a name", "LoRAAdapter", {"spec.servedName": 7}, "spec.servedName in body must be of type string"),
    (
        "a key that no Secret can have",
        "LoRAAdapter",
        {"spec.source.huggingFace.tokenSecretRef": {"name": "hf", "key": "a/b"}},
        "spec.source.huggingFace.tokenSecretRef.key in body should match",
    ),
    (
        "an empty pattern",
        "LoRAAdapter",
        {"spec.source.huggingFace.allowPatterns": [""]},
        "spec.source.huggingFace.allowPatterns[0]",
    ),
    ("a rank that vLLM has not", "VLLMDeployment", {"spec.lora.maxLoraRank": 24}, "spec.lora.maxLoraRank: Unsupported"),
    (
        "a strategy that is none",
        "VLLMDeployment",
        {"spec.lora.updateStrategy": "Recreate"},
        'supported values: "HotLoad", "Rollout"',
    ),
    ("no batch slot", "VLLMDeployment", {"spec.lora.maxLoras": 0}, "spec.lora.maxLoras in body should be greater"),
    ("an unknown dtype", "VLLMDeployment", {"spec.model.dtype": "fp32"}, "spec.model.dtype: Unsupported value"),
    ("no length", "VLLMDeployment", {"spec.model.maxModelLen": 0}, "spec.model.maxModelLen in body should be greater"),
    ("fewer than no pods", "VLLMDeployment", {"spec.replicas": -1}, "spec.replicas in body should be greater"),
    ("half a pod", "VLLMDeployment", {"spec.replicas": 1.5}, "spec.replicas in body must be of type integer"),
    ("no served name", "VLLMDeployment", {"spec.model.servedNames": []}, "spec.model.servedNames in body should have"),
    ("a served name twice", "VLLMDeployment", {"spec.model.servedNames": ["a", "a"]}, "spec.model.servedNames[1]: Dup"),
    ("no image", "VLLMDeployment", {"spec.engine.image": DELETE}, "spec.engine.image: Required value"),
    ("a port that is none", "VLLMDeployment", {"spec.engine.port": 65536}, "spec.engine.port in body should be less"),
    (
        "a variable twice",
        "VLLMDeployment",
        {"spec.engine.env": [{"name": "A"}, {"name": "A"}]},
        'spec.engine.env[1]: Duplicate value: {"name":"A"}',
    ),
    (
        "an unknown policy",
        "VLLMDeployment",
        {"spec.adapterPolicy.namespaces.from": "Some"},
        "spec.adapterPolicy.namespaces.from: Unsupported value",
    ),
    (
        "no claim",
        "ModelCache",
        {"spec.storage": {}},
        "exactly one of: existingClaim, volumeClaimTemplate",
    ),
    (
        "a Hub without a scheme",
        "ModelCache",
        {"spec.huggingFace.endpoint": "hub.example"},
        "endpoint must be http:// or https:// and a host",
    ),
    (
        "a Hub with a password",
        "ModelCache",
        {"spec.huggingFace.endpoint": "https://a:b@hub.example"},
        "endpoint must be http:// or https:// and a host",
    ),
    ("root", "ModelCache", {"spec.securityContext.runAsUser": 0}, "spec.securityContext.runAsUser in body should be"),
    ("an unknown type", "ModelArtifact", {"spec.type": "Lora"}, "spec.type: Unsupported value"),
    ("no cache", "ModelArtifact", {"spec.cacheRef": DELETE}, "spec.cacheRef: Required value"),
]


@pytest.mark.parametrize(("what", "kind", "changes", "message"), REFUSED, ids=[case[0] for case in REFUSED])
def test_it_refuses(what: str, kind: str, changes: dict[str, Any], message: str, kubectl: Kubectl) -> None:
    answer = kubectl.apply(manifest(kind, changes), "--dry-run=server")
    assert not answer.ok, what
    assert message in answer.error


@pytest.mark.parametrize("kind", SPECS)
def test_no_part_of_a_spec_takes_unknown_fields_but_those_of_the_pod_api(kind: str, kubectl: Kubectl) -> None:
    answer = kubectl.apply(manifest(kind, {"spec.unknown": 1}), "--dry-run=server")
    assert 'unknown field "spec.unknown"' in answer.error


def test_parts_of_the_pod_api_are_kept_as_they_are(kubectl: Kubectl, namespace: str) -> None:
    resources = {"limits": {"nvidia.com/gpu": 1, "memory": "24Gi"}, "claims": [{"name": "a"}]}
    template = {
        "spec": {"volumes": [{"name": "x", "anything": {"deep": [1, "2"]}}]},
        "metadata": {"labels": {"a": "b"}},
    }
    variable = {"name": "A", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}
    changes = {"spec.engine.resources": resources, "spec.podTemplate": template, "spec.engine.env": [variable]}

    assert kubectl.apply(manifest("VLLMDeployment", changes, namespace=namespace)).ok

    spec = kubectl.read("vllm", "example", "-n", namespace)["spec"]
    assert spec["engine"]["resources"] == resources
    assert spec["engine"]["env"] == [variable]
    assert spec["podTemplate"] == template


DEFAULTS: dict[str, dict[str, Any]] = {
    "LoRAAdapter": {
        "source": {"huggingFace": {"repo": "org/sql-lora", "revision": "main"}},
        "loadPolicy": "Eager",
        "suspend": False,
        "vllmDeploymentRef": {"name": "llama"},
    },
    "VLLMDeployment": {
        "model": {
            "source": {"huggingFace": {"repo": "org/llama", "revision": "main"}},
            "servedNames": ["org/llama"],
            "loadFormat": "auto",
            "dtype": "auto",
            "trustRemoteCode": False,
        },
        "lora": {"updateStrategy": "HotLoad", "maxLoras": 8, "maxCpuLoras": 64, "maxLoraRank": 64},
        "adapterPolicy": {"namespaces": {"from": "Same"}, "servedNames": "Plain", "pickledWeights": "Refuse"},
        "disruptionBudget": "OneAtATime",
        "engine": {
            "image": "vllm.example/vllm:1",
            "command": ["vllm", "serve"],
            "port": 8000,
            "maxRequestSize": "64Mi",
        },
    },
    "ModelCache": {
        "storage": {"existingClaim": "models"},
        "huggingFace": {"endpoint": "https://huggingface.co"},
        "offline": False,
        "warnAtPercent": 90,
        "eviction": {"policy": "Never"},
        "download": {"maxConcurrent": 16, "maxWorkers": 4},
    },
    "ModelArtifact": {
        "cacheRef": {"name": "default"},
        "type": "Adapter",
        "source": {"huggingFace": {"repo": "org/sql-lora", "revision": "main"}},
    },
}


@pytest.mark.parametrize("kind", SPECS)
def test_defaults_stand_in_the_stored_object_and_mean_the_same_to_the_operator(
    kind: str, kubectl: Kubectl, namespace: str
) -> None:
    asked = manifest(kind, namespace=namespace)
    assert kubectl.apply(asked).ok
    stored = kubectl.read(f"{kind}/example", "-n", namespace)
    assert stored["spec"] == DEFAULTS[kind]
    model = MODELS[kind]
    assert model.model_validate(stored).model_dump()["spec"] == model.model_validate(asked).model_dump()["spec"]


@pytest.mark.parametrize(
    ("kind", "given", "expected"),
    [
        ("VLLMDeployment", {"spec.lora": {"maxLoras": 2}}, {"maxLoras": 2, "maxCpuLoras": 64}),
        ("VLLMDeployment", {"spec.adapterPolicy": {}}, {"namespaces": {"from": "Same"}, "servedNames": "Plain"}),
        (
            "VLLMDeployment",
            {"spec.adapterPolicy": {"namespaces": {}}},
            {"namespaces": {"from": "Same"}, "servedNames": "Plain"},
        ),
        ("VLLMDeployment", {"spec.engine.apiKeySecretRef": {"name": "a"}}, {"name": "a", "key": "token"}),
        ("LoRAAdapter", {"spec.source.huggingFace.tokenSecretRef": {"name": "a"}}, {"name": "a", "key": "token"}),
        ("ModelCache", {"spec.huggingFace": {}}, {"endpoint": "https://huggingface.co"}),
    ],
)
def test_defaults_inside_an_object_that_the_user_began(
    kind: str, given: dict[str, Any], expected: dict[str, Any], kubectl: Kubectl, namespace: str
) -> None:
    assert kubectl.apply(manifest(kind, given, namespace=namespace)).ok
    [path] = given
    node = kubectl.read(f"{kind}/example", "-n", namespace)
    for part in path.split("."):
        node = node[part]
    assert node.items() >= expected.items()


def test_explain_describes_a_source(kubectl: Kubectl) -> None:
    text = kubectl("explain", "lora.spec.source")
    assert "Where the adapter comes from." in text
    assert "A repository on the Hugging Face Hub." in text
    assert "checkpoint-500" in text


@pytest.mark.parametrize("info", RESOURCES, ids=lambda info: info.kind)
def test_explain_has_words_for_every_kind(info: Any, kubectl: Kubectl) -> None:
    assert info.description in " ".join(kubectl("explain", info.short_names[0]).split())
    assert "<empty>" not in kubectl("explain", f"{info.plural}.spec") + kubectl("explain", f"{info.plural}.status")


def test_the_category_lists_all_kinds(kubectl: Kubectl, namespace: str) -> None:
    for kind in SPECS:
        assert kubectl.apply(manifest(kind, namespace=namespace)).ok
    names = kubectl("get", "lora-operator", "-n", namespace, "-o", "name").split()
    assert sorted(names) == sorted(f"{info.singular}.lora-operator.dev/example" for info in RESOURCES)


def test_a_deployment_is_scaled(kubectl: Kubectl, namespace: str) -> None:
    assert kubectl.apply(manifest("VLLMDeployment", namespace=namespace)).ok
    status = {"replicas": 2, "selector": "a=b"}
    kubectl("patch", "vllm", "example", "-n", namespace, "--subresource=status", "--type=merge", "-p", f'{{"status":{json.dumps(status)}}}')  # fmt: skip

    kubectl("scale", "vllm/example", "-n", namespace, "--replicas=3")

    assert kubectl.read("vllm", "example", "-n", namespace)["spec"]["replicas"] == 3
    scale = json.loads(
        kubectl("get", "--raw", f"/apis/{API_VERSION}/namespaces/{namespace}/vllmdeployments/example/scale")
    )
    assert scale["spec"] == {"replicas": 3}
    assert scale["status"] == {"replicas": 2, "selector": "a=b"}


def test_apply_leaves_the_replicas_that_an_autoscaler_set(kubectl: Kubectl, namespace: str) -> None:
    asked = manifest("VLLMDeployment", namespace=namespace)
    assert kubectl.apply(asked).ok
    kubectl("scale", "vllm/example", "-n", namespace, "--replicas=5")
    assert kubectl.apply(asked).ok
    assert kubectl.read("vllm", "example", "-n", namespace)["spec"]["replicas"] == 5


@pytest.mark.parametrize("kind", SPECS)
def test_a_users_write_of_status_has_no_effect(kind: str, kubectl: Kubectl, namespace: str) -> None:
    assert kubectl.apply(manifest(kind, {"status.observedGeneration": 7}, namespace=namespace)).ok
    assert "status" not in kubectl.read(f"{kind}/example", "-n", namespace)
