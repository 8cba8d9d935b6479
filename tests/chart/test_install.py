"""The chart installed into a real API server: its rights as the server sees them, its pod before pod security, its examples."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import yaml

from e2e.cluster import ControlPlane, tools
from lora_operator.constants import GROUP
from tests.chart.conftest import CHART, ROOT, Helm, Rendered, render_chart

ACCOUNT = "system:serviceaccount:lora-operator:lora-operator"


@dataclass(frozen=True)
class Installed:
    """An API server in which the chart is installed as README.md says."""

    plane: ControlPlane

    def kubectl(self, *words: str, stdin: str = "", check: bool = True) -> str:
        """stdout of kubectl as the administrator; with `check`, failure fails the test with its stderr."""
        command = [str(tools.kubectl()), f"--kubeconfig={self.plane.kubeconfig}", *words]
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False, timeout=60)
        assert not check or done.returncode == 0, done.stderr
        return done.stdout


def review(verb: str, resource: str, where: dict[str, str]) -> dict[str, Any]:
    """The question whether the operator's service account may; `resource` is name.group/subresource."""
    full, _, subresource = resource.partition("/")
    plural, _, group = full.partition(".")
    attributes = {"verb": verb, "group": group, "resource": plural, "subresource": subresource, "namespace": "team-a"}
    return {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SubjectAccessReview",
        "spec": {"user": ACCOUNT, "groups": ["system:serviceaccounts"], "resourceAttributes": attributes | where},
    }


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory, helm: Helm) -> Iterator[Installed]:
    """etcd + kube-apiserver with the chart installed, and the examples applied."""
    with ControlPlane(dir=tmp_path_factory.mktemp("control-plane")) as plane:
        result = Installed(plane)
        done = helm.run(
            "install",
            "lora-operator",
            str(CHART),
            f"--kubeconfig={plane.kubeconfig}",
            "--namespace=lora-operator",
            "--create-namespace",
            "--set=image.repository=images.example/operator",
        )
        assert done.returncode == 0, done.stderr
        result.kubectl("wait", "--for=condition=Established", "crd", "--all", "--timeout=30s")
        for path in sorted((ROOT / "examples").glob("*.yaml")):
            result.kubectl("apply", "--server-side", "-f", str(path))
        yield result


def test_the_examples_are_stored_as_they_are_written(installed: Installed) -> None:
    def strip(spec: Any, written: Any) -> Any:
        """The stored spec without what the schema defaulted."""
        if isinstance(written, dict) and isinstance(spec, dict):
            return {key: strip(spec[key], value) for key, value in written.items() if key in spec}
        return spec

    for path in sorted((ROOT / "examples").glob("*.yaml")):
        for written in yaml.safe_load_all(path.read_text()):
            if written["apiVersion"].startswith(GROUP):
                name, namespace = written["metadata"]["name"], written["metadata"]["namespace"]
                stored = json.loads(installed.kubectl("-n", namespace, "get", written["kind"], name, "-o", "json"))
                assert strip(stored["spec"], written["spec"]) == written["spec"], f"{path.name}: {written['kind']}"


def test_the_operators_pod_is_admitted_at_the_restricted_level(installed: Installed, helm: Helm) -> None:
    installed.kubectl("label", "namespace", "lora-operator", "pod-security.kubernetes.io/enforce=restricted")
    rendered: Rendered = render_chart(helm)
    [deployment] = rendered.of("Deployment")
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "probe"},
        "spec": deployment["spec"]["template"]["spec"],
    }
    installed.kubectl("-n", "lora-operator", "create", "--dry-run=server", "-f", "-", stdin=json.dumps(pod))

    pod["spec"]["containers"][0]["securityContext"]["allowPrivilegeEscalation"] = True
    assert (
        installed.kubectl(
            "-n", "lora-operator", "create", "--dry-run=server", "-f", "-", stdin=json.dumps(pod), check=False
        )
        == ""
    )


RIGHTS: list[tuple[str, str, str, dict[str, str], bool]] = [
    ("reads adapters anywhere", "list", f"loraadapters.{GROUP}", {}, True),
    ("never writes an adapter's spec", "patch", f"loraadapters.{GROUP}", {}, False),
    ("writes an adapter's status", "patch", f"loraadapters.{GROUP}/status", {}, True),
    ("makes Jobs", "create", "jobs.batch", {}, True),
    ("reads a pod's log", "get", "pods/log", {}, True),
    ("never makes pods", "create", "pods", {}, False),
    ("never runs anything in pods", "create", "pods/exec", {}, False),
    ("reads a Secret that an example's Role gives", "get", "secrets", {"name": "hf"}, True),
    ("reads no other Secret beside it", "get", "secrets", {"name": "other"}, False),
    ("never lists Secrets", "list", "secrets", {}, False),
    ("reads its own key", "get", "secrets", {"namespace": "lora-operator", "name": "lora-operator-key"}, True),
    ("reads no other Secret at home", "get", "secrets", {"namespace": "lora-operator", "name": "other"}, False),
    ("reads no such key elsewhere", "get", "secrets", {"name": "lora-operator-key"}, False),
    ("never removes a Secret", "delete", "secrets", {}, False),
    ("never removes a Deployment", "delete", "deployments.apps", {}, False),
    ("makes a cache's claim", "create", "persistentvolumeclaims", {}, True),
    ("lists no claims", "list", "persistentvolumeclaims", {}, False),
    ("never removes a claim", "delete", "persistentvolumeclaims", {}, False),
    ("never makes roles", "create", "rolebindings.rbac.authorization.k8s.io", {}, False),
]


@pytest.fixture(scope="module")
def answers(installed: Installed) -> list[bool]:
    """The API server's word on each of RIGHTS, asked for at once."""
    questions = [review(verb, resource, where) for _, verb, resource, where, _ in RIGHTS]
    asked = {"apiVersion": "v1", "kind": "List", "items": questions}
    words = installed.kubectl("create", "-o", 'jsonpath={.status.allowed}{" "}', "-f", "-", stdin=json.dumps(asked))
    return [word == "true" for word in words.split()]


@pytest.mark.parametrize("number", range(len(RIGHTS)), ids=[sentence for sentence, *_ in RIGHTS])
def test_the_operator(answers: list[bool], number: int) -> None:
    sentence, *_, expected = RIGHTS[number]
    assert answers[number] is expected, f"the operator {sentence}"


def test_the_crds_stay_when_the_chart_goes(installed: Installed, helm: Helm) -> None:
    """Last, since it uninstalls; installing again must work on what stayed."""
    home = ("--namespace=lora-operator", f"--kubeconfig={installed.plane.kubeconfig}")
    done = helm.run("uninstall", "lora-operator", *home)
    assert done.returncode == 0, done.stderr
    assert "loraadapter" in installed.kubectl("get", "lora", "-A", "-o", "name")

    done = helm.run("install", "lora-operator", str(CHART), *home, "--set=image.repository=images.example/operator")
    assert done.returncode == 0, done.stderr
