"""The operator's pod as the chart makes it, and whether the operator understands it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from lora_operator.constants import LABEL_MANAGED_BY, MANAGED_BY
from lora_operator.settings import Settings, read_settings
from tests.chart.conftest import Rendered

Render = Callable[..., Rendered]


def pod_of(chart: Rendered) -> dict[str, Any]:
    """The pod's spec in the chart's only Deployment."""
    [deployment] = chart.of("Deployment")
    spec: dict[str, Any] = deployment["spec"]["template"]["spec"]
    return spec


def env_of(chart: Rendered) -> dict[str, Any]:
    """The operator's environment: name → value or its source."""
    [container] = pod_of(chart)["containers"]
    return {item["name"]: item.get("value", item.get("valueFrom")) for item in container["env"]}


def test_there_is_one_operator_and_never_two_at_a_time(render: Render) -> None:
    [deployment] = render().of("Deployment")
    assert deployment["spec"]["replicas"] == 1
    assert deployment["spec"]["strategy"] == {"type": "Recreate"}
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"].items() <= labels.items()


def test_the_pod_fits_the_restricted_level(render: Render) -> None:
    pod = pod_of(render())
    [container] = pod["containers"]

    assert pod["securityContext"] == {
        "runAsNonRoot": True,
        "runAsUser": 65532,
        "runAsGroup": 65532,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert [set(volume) - {"name"} for volume in pod["volumes"]] == [{"emptyDir"}]
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
    assert pod["enableServiceLinks"] is False


def test_the_operator_reads_what_the_chart_tells_it(render: Render) -> None:
    values = {
        "image.tag": "1.2.3",
        "image.pullPolicy": "Always",
        "job": {"deadlineSeconds": 2592000, "resources": {"requests": None, "limits": {"memory": "1Gi"}}},
        "log": {"level": "debug", "format": "plain"},
    }
    chart = render(values)
    [container] = pod_of(chart)["containers"]
    env = env_of(chart)

    assert container["args"] == ["run"]
    assert container["image"] == "images.example/operator:1.2.3"
    assert env.pop("OPERATOR_NAMESPACE") == {"fieldRef": {"fieldPath": "metadata.namespace"}}
    assert read_settings(env | {"OPERATOR_NAMESPACE": "ops"}) == Settings(
        operator_image="images.example/operator:1.2.3",
        operator_namespace="ops",
        operator_image_pull_policy="Always",
        job_deadline_seconds=2592000,
        job_resources={"limits": {"memory": "1Gi"}},
        log_level="DEBUG",
        log_format="plain",
    )


def test_the_charts_defaults_are_the_operators(render: Render) -> None:
    env = env_of(render()) | {"OPERATOR_NAMESPACE": "ops"}
    image = env["OPERATOR_IMAGE"]
    assert read_settings(env) == Settings(operator_image=image, operator_namespace="ops")
    assert read_settings({"OPERATOR_IMAGE": image, "OPERATOR_NAMESPACE": "ops"}) == read_settings(env)


def test_probes_ask_the_operator_itself(render: Render) -> None:
    [container] = pod_of(render())["containers"]
    assert container["ports"] == [{"name": "health", "containerPort": Settings("image", "ops").health_port}]
    assert container["livenessProbe"]["httpGet"] == {"path": "/healthz", "port": "health"}
    assert container["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": "health"}


def test_a_digest_wins_over_the_tag(render: Render) -> None:
    digest = "sha256:" + "ab" * 32
    chart = render({"image.digest": digest, "image.tag": "1.2.3"})
    [container] = pod_of(chart)["containers"]
    assert container["image"] == f"images.example/operator@{digest}" == env_of(chart)["OPERATOR_IMAGE"]


@pytest.mark.parametrize(
    ("value", "given"),
    [
        ("nodeSelector", {"pool": "system"}),
        ("tolerations", [{"key": "system", "operator": "Exists"}]),
        ("affinity", {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": []}}),
        ("priorityClassName", "system-cluster-critical"),
        ("imagePullSecrets", [{"name": "registry"}]),
    ],
)
def test_scheduling_values_reach_the_pod(render: Render, value: str, given: object) -> None:
    assert value not in pod_of(render())
    assert pod_of(render({value: given}))[value] == given


def test_resources_annotations_and_environment_reach_the_pod(render: Render) -> None:
    chart = render(
        {
            "resources": {"limits": {"memory": "1Gi"}},
            "podAnnotations": {"example.com/a": "b"},
            "extraEnv": [{"name": "HTTPS_PROXY", "value": "http://proxy.example:3128"}],
        }
    )
    [deployment] = chart.of("Deployment")
    [container] = pod_of(chart)["containers"]
    assert container["resources"]["limits"] == {"memory": "1Gi"}
    assert deployment["spec"]["template"]["metadata"]["annotations"]["example.com/a"] == "b"
    assert env_of(chart)["HTTPS_PROXY"] == "http://proxy.example:3128"


def test_nothing_of_the_chart_looks_like_the_operators_own_children(render: Render) -> None:
    for item in render({"secretNamespaces": ["team-a"]}).objects:
        assert (item["metadata"].get("labels") or {}).get(LABEL_MANAGED_BY) != MANAGED_BY, item["metadata"]["name"]


def test_two_releases_share_no_name(render: Render) -> None:
    first, second = render(release="one"), render(release="two")

    def names(chart: Rendered) -> set[tuple[str, str]]:
        items = [item for item in chart.objects if item["kind"] != "CustomResourceDefinition"]
        return {(item["kind"], item["metadata"]["name"]) for item in items}

    assert names(first)
    assert not names(first) & names(second)
