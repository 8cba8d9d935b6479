"""The engines' Deployment: every default of design.md ("Engine pods, defaults that others got wrong"), one by one."""

from __future__ import annotations

from typing import Any

import pytest

from lora_operator.api import ModelCache, VLLMDeployment
from lora_operator.api.deployment import VLLMDeploymentSpec
from lora_operator.constants import ANNOTATION_KIT, ANNOTATION_TEMPLATE_HASH
from lora_operator.desired.deployment import build_deployment, template_hash
from lora_operator.names import engine_labels, gate_secret
from tests.unit.builders import make_cache, make_deployment

PATH = "/model-cache/artifacts/base-1-abc"
FILES = ("__init__.py", "kit.py")


def build(deployment: VLLMDeployment | None = None, cache: ModelCache | None = None, kit: str = "k1") -> dict[str, Any]:
    return build_deployment(
        deployment or make_deployment(), cache or make_cache(), model_path=PATH, kit=kit, kit_files=FILES
    )


def pod_of(manifest: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = manifest["spec"]["template"]["spec"]
    return found


POD = pod_of(build())
(ENGINE,) = POD["containers"]
VOLUMES = {volume["name"]: volume for volume in POD["volumes"]}
MOUNTS = {mount["name"]: mount for mount in ENGINE["volumeMounts"]}
HOUR = 3600


def test_no_service_links_because_one_named_vllm_sets_vllm_port() -> None:
    assert POD["enableServiceLinks"] is False


def test_no_token_of_a_service_account() -> None:
    assert POD["automountServiceAccountToken"] is False


def test_shared_memory_is_memory() -> None:
    assert VOLUMES["shm"] == {"name": "shm", "emptyDir": {"medium": "Memory"}}
    assert MOUNTS["shm"] == {"name": "shm", "mountPath": "/dev/shm"}


@pytest.mark.parametrize("probe", ["startupProbe", "livenessProbe", "readinessProbe"])
def test_every_probe_asks_health(probe: str) -> None:
    assert ENGINE[probe]["httpGet"] == {"path": "/health", "port": "http"}


def test_the_start_may_take_long() -> None:
    probe = ENGINE["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] >= HOUR
    assert probe["periodSeconds"] <= 5, "and is noticed soon"
    assert build()["spec"]["progressDeadlineSeconds"] > HOUR


def test_a_busy_engine_is_not_killed_and_a_dead_one_is() -> None:
    probe = ENGINE["livenessProbe"]
    assert probe["timeoutSeconds"] >= 10
    assert probe["failureThreshold"] >= 6


def test_requests_end_before_the_pod_does() -> None:
    sleep = ENGINE["lifecycle"]["preStop"]["sleep"]["seconds"]
    timeout = int(ENGINE["args"][ENGINE["args"].index("--shutdown-timeout") + 1])
    assert sleep >= 5
    assert POD["terminationGracePeriodSeconds"] > sleep + timeout


def test_the_cache_is_read_only() -> None:
    assert MOUNTS["model-cache"] == {"name": "model-cache", "mountPath": "/model-cache", "readOnly": True}
    assert VOLUMES["model-cache"]["persistentVolumeClaim"] == {"claimName": "models", "readOnly": True}


def test_what_the_engine_writes_is_in_empty_directories() -> None:
    writable = {name for name, mount in MOUNTS.items() if not mount.get("readOnly")}
    assert writable == {"home", "kit-state", "shm"}
    assert all("emptyDir" in VOLUMES[name] for name in writable)
    homes = [e["value"] for e in ENGINE["env"] if e["name"] in ("HOME", "HF_HOME", "VLLM_CACHE_ROOT", "XDG_CACHE_HOME")]
    assert len(homes) == 4
    assert all(home.startswith(MOUNTS["home"]["mountPath"]) for home in homes)


def test_no_privileges() -> None:
    assert POD["securityContext"] == {"seccompProfile": {"type": "RuntimeDefault"}}
    assert ENGINE["securityContext"]["allowPrivilegeEscalation"] is False
    assert ENGINE["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_the_last_words_of_an_engine_are_kept() -> None:
    assert ENGINE["terminationMessagePolicy"] == "FallbackToLogsOnError"


def test_the_kit_is_mounted_as_a_package() -> None:
    assert VOLUMES["engine-kit"]["configMap"] == {
        "name": "llama-kit-k1",
        "items": [{"key": file, "path": f"lora_operator_kit/{file}"} for file in FILES],
    }
    assert MOUNTS["engine-kit"]["mountPath"] == "/opt/lora-operator"
    assert ENGINE["command"] == ["python3", "-m", "lora_operator_kit.launcher"]
    assert {"name": "PYTHONPATH", "value": "/opt/lora-operator"} in ENGINE["env"]


def test_a_pod_starts_without_a_list_but_not_without_the_gates_token() -> None:
    assert VOLUMES["modules"]["configMap"] == {"name": "llama-modules", "optional": True}
    assert VOLUMES["gate"]["secret"] == {"secretName": gate_secret("llama", "uid-llama"), "defaultMode": 0o444}
    assert MOUNTS["gate"]["readOnly"]


def test_the_groups_of_the_caches_owner() -> None:
    pod = pod_of(build(cache=make_cache(security={"supplementalGroups": [7], "runAsUser": 1000, "fsGroup": 8})))
    assert pod["securityContext"]["supplementalGroups"] == [7]
    assert "runAsUser" not in pod["securityContext"], "that is for Jobs"


ROLLING: dict[str, tuple[VLLMDeployment, dict[str, int]]] = {
    "without GPUs a further pod keeps the capacity": (make_deployment(), {"maxSurge": 1, "maxUnavailable": 0}),
    "CPU, memory and huge pages are no devices": (
        make_deployment(
            engine={
                "resources": {
                    "limits": {"cpu": "1", "memory": "1Gi", "ephemeral-storage": "1Gi", "hugepages-2Mi": "1Gi"}
                }
            }
        ),
        {"maxSurge": 1, "maxUnavailable": 0},
    ),
    "with GPUs there may be no spare one": (
        make_deployment(engine={"resources": {"limits": {"nvidia.com/gpu": 1}}}),
        {"maxSurge": 0, "maxUnavailable": 1},
    ),
    "by requests": (
        make_deployment(engine={"resources": {"requests": {"amd.com/gpu": 1}}}),
        {"maxSurge": 0, "maxUnavailable": 1},
    ),
    "a slice of one": (
        make_deployment(engine={"resources": {"limits": {"nvidia.com/mig-1g.5gb": 1}}}),
        {"maxSurge": 0, "maxUnavailable": 1},
    ),
    "another maker's": (
        make_deployment(engine={"resources": {"limits": {"gpu.intel.com/i915": 1}}}),
        {"maxSurge": 0, "maxUnavailable": 1},
    ),
    "a claim on a device": (
        make_deployment(engine={"resources": {"claims": [{"name": "gpu"}]}}),
        {"maxSurge": 0, "maxUnavailable": 1},
    ),
    "by the pod template": (
        make_deployment(
            podTemplate={"spec": {"containers": [{"name": "vllm", "resources": {"limits": {"nvidia.com/gpu": 1}}}]}}
        ),
        {"maxSurge": 0, "maxUnavailable": 1},
    ),
}


@pytest.mark.parametrize("case", ROLLING)
def test_how_pods_are_replaced(case: str) -> None:
    deployment, expected = ROLLING[case]
    assert build(deployment)["spec"]["strategy"] == {"type": "RollingUpdate", "rollingUpdate": expected}


def test_the_frame() -> None:
    manifest = build()
    labels = engine_labels("llama")
    assert (manifest["apiVersion"], manifest["kind"]) == ("apps/v1", "Deployment")
    assert (manifest["metadata"]["name"], manifest["metadata"]["namespace"]) == ("llama", "serving")
    assert manifest["metadata"]["labels"] == labels
    assert manifest["spec"]["selector"] == {"matchLabels": labels}
    assert labels.items() <= manifest["spec"]["template"]["metadata"]["labels"].items()
    assert manifest["metadata"]["ownerReferences"] == [
        {
            "apiVersion": "lora-operator.dev/v1alpha1",
            "kind": "VLLMDeployment",
            "name": "llama",
            "uid": "uid-llama",
            "controller": True,
            "blockOwnerDeletion": False,
        }
    ]
    assert manifest["metadata"]["annotations"] == {
        ANNOTATION_TEMPLATE_HASH: template_hash(make_deployment(), make_cache(), model_path=PATH),
        ANNOTATION_KIT: "k1",
    }


def test_replicas_are_left_to_an_autoscaler() -> None:
    assert build()["spec"]["replicas"] == 2
    assert build(make_deployment(replicas=0))["spec"]["replicas"] == 0
    assert "replicas" not in build(make_deployment(replicas=None))["spec"]


def test_resources_are_the_users() -> None:
    assert "resources" not in ENGINE
    resources = {"limits": {"memory": "8Gi"}}
    assert pod_of(build(make_deployment(engine={"resources": resources})))["containers"][0]["resources"] == resources


PLAIN = template_hash(make_deployment(), make_cache(), model_path=PATH)
SAME = {
    "scaled": template_hash(make_deployment(replicas=9), make_cache(), model_path=PATH),
    "scaled by an autoscaler": template_hash(make_deployment(replicas=None), make_cache(), model_path=PATH),
    "other namespaces are admitted": template_hash(
        make_deployment(policy={"from": "Same"}), make_cache(), model_path=PATH
    ),
    "adapters have other names": template_hash(
        make_deployment(names="NamespaceQualified"), make_cache(), model_path=PATH
    ),
    "status, labels and generation": template_hash(
        make_deployment(generation=7, status={"replicas": 1}), make_cache(generation=3), model_path=PATH
    ),
    "what Jobs run as": template_hash(make_deployment(), make_cache(security={"runAsUser": 7}), model_path=PATH),
    "the Hub's endpoint": template_hash(make_deployment(), make_cache(endpoint="https://x.test"), model_path=PATH),
    "a default that is written out, as the API server does when a CRD gets it": template_hash(
        make_deployment(lora={"maxLoras": 8}, engine={"port": 8000, "args": []}), make_cache(), model_path=PATH
    ),
}


@pytest.mark.parametrize("case", SAME)
def test_pods_do_not_roll(case: str) -> None:
    assert SAME[case] == PLAIN


DIFFERENT = {
    "another image": template_hash(make_deployment(engine={"image": "vllm:2"}), make_cache(), model_path=PATH),
    "another model": template_hash(make_deployment(), make_cache(), model_path=PATH + "2"),
    "another served name": template_hash(make_deployment(served_names=("x",)), make_cache(), model_path=PATH),
    "other numbers": template_hash(make_deployment(lora={"maxLoras": 9}), make_cache(), model_path=PATH),
    "another claim": template_hash(make_deployment(), make_cache(claim="other"), model_path=PATH),
    "other groups": template_hash(make_deployment(), make_cache(security={"supplementalGroups": [7]}), model_path=PATH),
    "another template": template_hash(make_deployment(podTemplate={"spec": {}}), make_cache(), model_path=PATH),
    "yet another template": template_hash(
        make_deployment(podTemplate={"spec": {"nodeSelector": {"a": "b"}}}), make_cache(), model_path=PATH
    ),
}


def test_pods_roll_for_what_is_in_them() -> None:
    assert len({PLAIN, *DIFFERENT.values()}) == len(DIFFERENT) + 1


class LaterSpec(VLLMDeploymentSpec):
    """The spec of a later operator."""

    later: int = 5


def test_pods_do_not_roll_because_the_operator_is_newer() -> None:
    deployment = make_deployment()
    later = deployment.model_copy(update={"spec": LaterSpec.model_validate(deployment.spec.to_wire())})
    assert template_hash(later, make_cache(), model_path=PATH) == PLAIN
