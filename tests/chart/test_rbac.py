"""The rights that the chart gives: to the operator exactly those written here, to people what their role should have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from lora_operator.api import RESOURCES
from lora_operator.constants import GROUP
from lora_operator.reconcile.services import MASTER_KEY_SECRET
from tests.chart.conftest import Rendered

Render = Callable[..., Rendered]
Rights = dict[str, set[str]]

READ = {"get", "list", "watch"}
MAKE = {"create", "patch"}
KINDS = {f"{info.plural}.{GROUP}" for info in RESOURCES}
EVERY_WRITE = {"create", "update", "patch", "delete", "deletecollection"}


def rights(role: dict[str, Any]) -> Rights:
    """resource.group → verbs, over all rules of a role that are not limited to names."""
    found: Rights = {}
    for rule in role["rules"]:
        if rule.get("resourceNames"):
            continue
        for group in rule["apiGroups"]:
            for resource in rule["resources"]:
                found.setdefault(f"{resource}.{group}".rstrip("."), set()).update(rule["verbs"])
    return found


def test_the_operator_has_these_cluster_wide_rights_and_no_other(render: Render) -> None:
    expected: Rights = {kind: set(READ) for kind in KINDS}
    expected |= {f"{info.plural}/status.{GROUP}": {"patch"} for info in RESOURCES}
    expected[f"vllmdeployments/scale.{GROUP}"] = {"patch"}
    expected[f"modelartifacts.{GROUP}"] |= MAKE | {"delete"}
    expected |= {
        "jobs.batch": READ | MAKE | {"delete"},
        "pods": {"list", "watch"},
        "pods/log": {"get"},
        "deployments.apps": READ | MAKE,
        "replicasets.apps": {"get", "list"},
        "services": READ | MAKE,
        "poddisruptionbudgets.policy": {"get", "list", "delete"} | MAKE,
        "configmaps": READ | MAKE | {"delete"},
        "secrets": {"create"},
        "persistentvolumeclaims": {"get"} | MAKE,
        "storageclasses.storage.k8s.io": {"get"},
        "namespaces": {"list", "watch"},
        "events": {"get", "list", "create", "patch"},
    }
    chart = render()

    assert rights(chart.one("ClusterRole", "lora-operator")) == expected
    bound = [item["roleRef"]["name"] for item in chart.of("ClusterRoleBinding")]
    assert bound == ["lora-operator"]


def test_no_role_has_a_wildcard(render: Render) -> None:
    chart = render()
    for role in chart.of("ClusterRole") + chart.of("Role"):
        for rule in role["rules"]:
            assert "*" not in rule["apiGroups"] + rule["resources"] + rule["verbs"], role["metadata"]["name"]


def test_in_its_own_namespace_the_operator_may_read_its_key_and_nothing_more(render: Render) -> None:
    chart = render()
    [role] = chart.of("Role")

    assert role["metadata"]["namespace"] == "ops"
    assert role["rules"] == [
        {"apiGroups": [""], "resources": ["secrets"], "resourceNames": [MASTER_KEY_SECRET], "verbs": ["get"]}
    ]


def test_tenants_secrets_are_readable_nowhere_by_default(render: Render) -> None:
    chart = render()
    assert rights(chart.one("ClusterRole", "lora-operator-secret-reader")) == {"secrets": {"get"}}
    bindings = chart.of("ClusterRoleBinding") + chart.of("RoleBinding")
    assert "lora-operator-secret-reader" not in {item["roleRef"]["name"] for item in bindings}


def test_tenants_secrets_are_readable_in_the_listed_namespaces_only(render: Render) -> None:
    chart = render({"secretNamespaces": ["team-a", "team-b"]})
    bindings = [item for item in chart.of("RoleBinding") if item["roleRef"]["name"] == "lora-operator-secret-reader"]

    assert [item["metadata"]["namespace"] for item in bindings] == ["team-a", "team-b"]
    assert "lora-operator-secret-reader" not in {item["roleRef"]["name"] for item in chart.of("ClusterRoleBinding")}


def test_every_binding_is_for_the_operators_service_account_alone(render: Render) -> None:
    chart = render({"secretNamespaces": ["team-a"], "serviceAccount.name": "custom"})
    assert chart.one("ServiceAccount", "custom")["automountServiceAccountToken"] is False
    [deployment] = chart.of("Deployment")
    assert deployment["spec"]["template"]["spec"]["serviceAccountName"] == "custom"
    for binding in chart.of("ClusterRoleBinding") + chart.of("RoleBinding"):
        assert binding["subjects"] == [{"kind": "ServiceAccount", "name": "custom", "namespace": "ops"}]


@pytest.mark.parametrize(
    ("role", "expected"),
    [
        ("view", dict.fromkeys(KINDS, READ)),
        ("edit", dict.fromkeys(KINDS, READ) | {f"loraadapters.{GROUP}": READ | EVERY_WRITE}),
        (
            "admin",
            dict.fromkeys(KINDS, READ | EVERY_WRITE) | {f"vllmdeployments/scale.{GROUP}": {"get", "update", "patch"}},
        ),
    ],
)
def test_people_with_a_built_in_role_may(render: Render, role: str, expected: Rights) -> None:
    label = f"rbac.authorization.k8s.io/aggregate-to-{role}"
    found: Rights = {}
    for item in render().of("ClusterRole"):
        if item["metadata"]["labels"].get(label) == "true":
            for resource, verbs in rights(item).items():
                found.setdefault(resource, set()).update(verbs)
    assert found == expected


def test_the_roles_for_people_can_be_left_out(render: Render) -> None:
    names = {item["metadata"]["name"] for item in render({"rbac.aggregateToUserRoles": False}).of("ClusterRole")}
    assert names == {"lora-operator", "lora-operator-secret-reader"}
