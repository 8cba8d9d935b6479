"""The engines' Deployment: every default of design.md ("Engine pods, defaults that others got wrong"), one by one."""

from __future__ import annotations

from typing import Any

import pytest

from lora_operator.api import ModelCache, VLLMDeployment
from lora_operator.api.deployment import VLLMDeploymentSpec
from lora_operator.constants import ANNOTATION_ARGUMENTS, ANNOTATION_PLUGIN, ANNOTATION_TEMPLATE_HASH
from lora_operator.desired.children import build_chat_config_map
from lora_operator.desired.command_line import Auxiliary, StaticModules
from lora_operator.desired.deployment import build_deployment, mounted_guard_secret, template_hash
from lora_operator.engine_plugin.admin_guard import READY_PATH
from lora_operator.kube.workloads import Workload
from lora_operator.names import engine_labels
from tests.unit.builders import make_cache, make_deployment

PATH = "/model-cache/artifacts/base-1-abc"
FILES = ("__init__.py", "__main__.py", "plugin.py")


def build(
    deployment: VLLMDeployment | None = None, cache: ModelCache | None = None, plugin: str = "k1"
) -> dict[str, Any]:
    return build_deployment(
        deployment or make_deployment(),
        cache or make_cache(),
        model_path=PATH,
        replicas=2,
        token_secret="llama-gate-1-2",
        plugin=plugin,
        plugin_files=FILES,
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


@pytest.mark.parametrize(
    ("probe", "path"),
    [("startupProbe", "/health"), ("livenessProbe", "/health"), ("readinessProbe", READY_PATH)],
)
def test_probes_ask_what_the_plugin_answers(probe: str, path: str) -> None:
    assert ENGINE[probe]["httpGet"] == {"path": path, "port": "http"}


def test_an_engine_that_answers_nothing_is_not_given_the_time_to_finish() -> None:
    grace = ENGINE["livenessProbe"]["terminationGracePeriodSeconds"]
    assert ENGINE["lifecycle"]["preStop"]["sleep"]["seconds"] < grace <= 30


def test_the_largest_request_is_what_the_spec_says() -> None:
    assert {"name": "LORA_OPERATOR_MAX_REQUEST_BYTES", "value": str(64 << 20)} in ENGINE["env"]


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


def test_the_plugin_is_mounted_as_a_package() -> None:
    assert VOLUMES["engine-kit"]["configMap"] == {
        "name": "llama-kit-k1",
        "items": [
            {"key": "__init__.py", "path": "lora_operator_plugin/__init__.py"},
            {"key": "__main__.py", "path": "__main__.py"},
            {"key": "plugin.py", "path": "lora_operator_plugin/plugin.py"},
        ],
    }
    assert MOUNTS["engine-kit"]["mountPath"] == "/opt/lora-operator"
    assert ENGINE["command"] == ["python3", "/opt/lora-operator"]


def test_a_chat_template_is_mounted_from_its_config_map() -> None:
    deployment = make_deployment(model={"chatTemplate": "{{ messages }}"})
    pod = pod_of(build(deployment))
    config_map = build_chat_config_map(deployment)
    assert config_map is not None
    assert (config_map["immutable"], config_map["data"]) == (True, {"template.jinja": "{{ messages }}"})
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes["chat-template"]["configMap"] == {"name": config_map["metadata"]["name"]}
    mounts = {mount["name"]: mount for mount in pod["containers"][0]["volumeMounts"]}
    assert mounts["chat-template"] == {
        "name": "chat-template",
        "mountPath": "/etc/lora-operator/chat",
        "readOnly": True,
    }
    other = build_chat_config_map(make_deployment(model={"chatTemplate": "{{ other }}"}))
    assert other is not None
    assert other["metadata"]["name"] != config_map["metadata"]["name"], "pods of the older spec keep theirs"
    assert "chat-template" not in VOLUMES
    assert build_chat_config_map(make_deployment()) is None


def test_a_pod_starts_without_a_list_but_not_without_the_gates_token() -> None:
    assert VOLUMES["modules"]["configMap"] == {"name": "llama-modules", "optional": True}
    assert VOLUMES["gate"]["secret"] == {"secretName": "llama-gate-1-2", "defaultMode": 0o444}
    assert mounted_guard_secret(Workload.parse(build())) == "llama-gate-1-2"
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
        ANNOTATION_PLUGIN: "k1",
    }


def test_the_number_of_replicas_is_always_told() -> None:
    """What was applied once and is left out the next time would fall back to 1."""
    assert build(make_deployment(replicas=None))["spec"]["replicas"] == 2


def test_resources_are_the_users() -> None:
    assert "resources" not in ENGINE
    resources = {"limits": {"memory": "8Gi"}}
    assert pod_of(build(make_deployment(engine={"resources": resources})))["containers"][0]["resources"] == resources


ONE_NODE = make_cache(access_modes=("ReadWriteOnce",))


def test_engines_of_a_cache_that_one_node_can_mount_go_to_one_node_whatever_the_podtemplate_says() -> None:
    theirs = {"podAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [{"topologyKey": "zone"}]}}
    pod_template = {"metadata": {"labels": {"lora-operator.dev/modelcache": "x"}}, "spec": {"affinity": theirs}}
    template = build(make_deployment(podTemplate=pod_template), ONE_NODE)["spec"]["template"]
    assert template["metadata"]["labels"]["lora-operator.dev/modelcache"] == "default"
    [their_term, our_term] = template["spec"]["affinity"]["podAffinity"][
        "requiredDuringSchedulingIgnoredDuringExecution"
    ]
    assert their_term == {"topologyKey": "zone"}
    assert our_term["topologyKey"] == "kubernetes.io/hostname"
    assert "lora-operator.dev/modelcache" not in build()["spec"]["template"]["metadata"]["labels"]


def test_engines_mount_a_claim_that_was_made_by_the_caches_name() -> None:
    template = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}}
    manifest = build(cache=make_cache("made", template=template))
    [volume] = [v for v in pod_of(manifest)["volumes"] if v["name"] == "model-cache"]
    assert volume["persistentVolumeClaim"] == {"claimName": "made", "readOnly": True}


PLAIN = template_hash(make_deployment(), make_cache(), model_path=PATH)


def test_the_hash_is_the_one_that_running_fleets_have() -> None:
    # Computed before claims could be made: a newer operator must come to the same, or it rolls every fleet.
    assert template_hash(make_deployment(), make_cache(), model_path="/model-cache/artifacts/x") == "b479bd9c3d"


SAME = {
    "an operator that knew less of models": "b540cd0a4f",
    "defaults of a model that are written out": template_hash(
        make_deployment(model={"loadFormat": "auto", "trustRemoteCode": False}), make_cache(), model_path=PATH
    ),
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
    "another format": template_hash(make_deployment(model={"loadFormat": "pt"}), make_cache(), model_path=PATH),
    "a chat template": template_hash(make_deployment(model={"chatTemplate": "{}"}), make_cache(), model_path=PATH),
    "another revision of the tokenizer": template_hash(
        make_deployment(), make_cache(), model_path=PATH, auxiliary=Auxiliary(tokenizer="/a")
    ),
    "another revision of the draft model": template_hash(
        make_deployment(), make_cache(), model_path=PATH, auxiliary=Auxiliary(draft_model="/b")
    ),
    "another image": template_hash(make_deployment(engine={"image": "vllm:2"}), make_cache(), model_path=PATH),
    "another model": template_hash(make_deployment(), make_cache(), model_path=PATH + "2"),
    "another served name": template_hash(make_deployment(served_names=("x",)), make_cache(), model_path=PATH),
    "other numbers": template_hash(make_deployment(lora={"maxLoras": 9}), make_cache(), model_path=PATH),
    "another claim": template_hash(make_deployment(), make_cache(claim="other"), model_path=PATH),
    "other groups": template_hash(make_deployment(), make_cache(security={"supplementalGroups": [7]}), model_path=PATH),
    "a claim that one node can mount": template_hash(make_deployment(), ONE_NODE, model_path=PATH),
    "another cache on such a claim": template_hash(
        make_deployment(), make_cache("other", access_modes=("ReadWriteOnce",)), model_path=PATH
    ),
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


def test_adapters_in_the_arguments_are_in_no_hash_but_in_an_annotation() -> None:
    deployment = make_deployment(lora={"updateStrategy": "Rollout"})
    static = StaticModules(7, ("{}",))
    manifest = build_deployment(
        deployment,
        make_cache(),
        model_path=PATH,
        replicas=1,
        token_secret="g",
        plugin="k1",
        plugin_files=FILES,
        static=static,
    )
    assert manifest["metadata"]["annotations"] == {
        ANNOTATION_TEMPLATE_HASH: template_hash(deployment, make_cache(), model_path=PATH),
        ANNOTATION_PLUGIN: "k1",
        ANNOTATION_ARGUMENTS: f"7-{static.digest}",
    }
    pod = pod_of(manifest)
    assert pod["containers"][0]["args"][-2:] == ["--lora-modules", "{}"]
    assert "modules" not in {volume["name"] for volume in pod["volumes"]}, "a list that nobody reads"
    assert "modules" not in {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    assert template_hash(deployment, make_cache(), model_path=PATH) != PLAIN, "switching rolls"
