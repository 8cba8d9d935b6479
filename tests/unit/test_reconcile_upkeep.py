"""Which plugins may go: those that nothing which exists could start a pod from."""

from __future__ import annotations

from typing import Any

import pytest

from lora_operator.kube.objects import KubeObject
from lora_operator.kube.pods import Pod, PodSpec
from lora_operator.kube.workloads import Workload
from lora_operator.reconcile.upkeep import mounted, owned_plugins, plugins_to_remove

OWNED, FOREIGN = "uid-llama", "uid-other"


def config_map(name: str, owner: str | None = OWNED) -> dict[str, Any]:
    owners = [{"kind": "VLLMDeployment", "name": "llama", "uid": owner, "controller": True}] if owner else []
    return {"metadata": {"name": name, "ownerReferences": owners}}


def pod(*plugins: str) -> dict[str, Any]:
    volumes = [
        {"name": "home", "emptyDir": {}},
        *({"name": plugin, "configMap": {"name": plugin}} for plugin in plugins),
    ]
    return {"metadata": {"name": "llama-0"}, "spec": {"volumes": volumes, "containers": []}}


def workload(*plugins: str) -> dict[str, Any]:
    return {"metadata": {"name": "llama"}, "spec": {"replicas": 0, "template": pod(*plugins)}}


def specs(body: dict[str, Any]) -> PodSpec:
    """Of a pod, or what is made into pods."""
    return Workload.parse(body).template if "template" in body["spec"] else Pod.parse(body).spec


OWN: dict[str, tuple[dict[str, Any], bool]] = {
    "a plugin of the deployment": (config_map("llama-kit-aaa"), True),
    "its module list": (config_map("llama-modules"), False),
    "a plugin of another deployment, whose name begins alike": (config_map("llama-kit-x-kit-aaa", FOREIGN), False),
    "somebody's ConfigMap of that name": (config_map("llama-kit-aaa", None), False),
}


@pytest.mark.parametrize("sentence", list(OWN))
def test_plugins_are_told_by_name_and_owner(sentence: str) -> None:
    body, own = OWN[sentence]
    assert bool(owned_plugins([KubeObject.parse(body)], deployment="llama", uid=OWNED)) is own


CASES: dict[str, tuple[list[dict[str, Any]], set[str]]] = {
    "the Deployment mounts it": ([workload("old")], {"older"}),
    "a ReplicaSet without pods could be rolled back to": ([workload("now"), workload("old")], {"older"}),
    "a pod of a ReplicaSet that is gone still runs from it": ([workload("now"), pod("older")], {"old"}),
    "nothing mounts either": ([workload("now")], {"old", "older"}),
    "a pod without volumes mounts nothing": ([{"metadata": {}, "spec": {"containers": []}}], {"old", "older"}),
}


@pytest.mark.parametrize("sentence", list(CASES))
def test_a_plugin_stays_as_long_as(sentence: str) -> None:
    users, removed = CASES[sentence]
    plugins = frozenset({"old", "older", "mine"})
    assert plugins_to_remove(plugins, current="mine", users=map(specs, users)) == removed


def test_optional_volumes_and_others_are_read_as_they_come() -> None:
    template = pod("kit")
    template["spec"]["volumes"] += [{"name": "s", "secret": {"secretName": "x"}}, {"name": "c", "configMap": None}]
    assert mounted([specs(template)]) == {"kit"}
