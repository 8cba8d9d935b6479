"""The chart installed into a real API server: its rights as the server sees them, its pod before pod security, its examples."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from e2e.cluster import ControlPlane, tools
from lora_operator.constants import GROUP
from tests.chart.conftest import CHART, ROOT, Helm, Rendered, render_chart

IMAGE = ("--set=image.repository=images.example/operator",)
COLUMN = "Base"
PAGES = sorted(page for page in (ROOT / "docs" / "sources").glob("*.md") if page.stem != "README")
ACCOUNT = "system:serviceaccount:lora-operator:lora-operator"


@dataclass(frozen=True)
class Installed:
    """An API server in which the chart is installed as README.md says."""

    plane: ControlPlane

    @property
    def home(self) -> tuple[str, str]:
        """Helm's arguments: where the release lives."""
        return "--namespace=lora-operator", f"--kubeconfig={self.plane.kubeconfig}"

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
            *result.home,
            "--create-namespace",
            *IMAGE,
        )
        assert done.returncode == 0, done.stderr
        result.kubectl("wait", "--for=condition=Established", "crd", "--all", "--timeout=30s")
        for path in sorted((ROOT / "examples").glob("*.yaml")):
            result.kubectl("apply", "--server-side", "-f", str(path))
        yield result


def strip(spec: Any, written: Any) -> Any:
    """The stored spec without what the schema defaulted."""
    if isinstance(written, dict) and isinstance(spec, dict):
        return {key: strip(spec[key], value) for key, value in written.items() if key in spec}
    return spec


@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_the_manifests_of_a_sources_page_are_stored_as_they_are_written(page: Path, installed: Installed) -> None:
    blocks = re.findall(r"^```yaml\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    documents = [item for block in blocks for item in yaml.safe_load_all(block)]
    assert any(item["kind"] == "LoRAAdapter" for item in documents)
    text = installed.kubectl("apply", "--dry-run=server", "-o", "json", "-f", "-", stdin="---\n".join(blocks))
    found = json.loads(text)
    stored = {(item["kind"], item["metadata"]["name"]): item for item in found.get("items", [found])}
    for written in documents:
        if "spec" in written:
            spec = stored[(written["kind"], written["metadata"]["name"])]["spec"]
            assert strip(spec, written["spec"]) == written["spec"]


def test_the_examples_are_stored_as_they_are_written(installed: Installed) -> None:
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
    ("makes Secrets", "create", "secrets", {}, True),
    ("makes its own key", "create", "secrets", {"namespace": "lora-operator"}, True),
    ("never writes over a Secret", "patch", "secrets", {}, False),
    ("never writes over its own key", "patch", "secrets", {"namespace": "lora-operator"}, False),
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


def older_chart(folder: Path) -> Path:
    """A copy of the chart as an earlier version could have been: adapters without baseModelName, and without its column."""
    chart = folder / "lora-operator"
    shutil.copytree(CHART, chart)
    path = chart / "templates" / "crds" / "loraadapters.yaml"
    crd = yaml.safe_load(path.read_text())
    version = crd["spec"]["versions"][0]
    spec = version["schema"]["openAPIV3Schema"]["properties"]["spec"]
    del spec["properties"]["baseModelName"]
    version["additionalPrinterColumns"] = [c for c in version["additionalPrinterColumns"] if c["name"] != COLUMN]
    path.write_text(yaml.safe_dump(crd).replace("{{", '{{ "{{" }}'))
    return chart


def test_an_upgrade_of_the_chart_upgrades_the_crds(installed: Installed, helm: Helm, tmp_path: Path) -> None:
    def adapter_crd() -> dict[str, Any]:
        found: dict[str, Any] = json.loads(installed.kubectl("get", "crd", f"loraadapters.{GROUP}", "-o", "json"))
        return found

    def columns() -> set[str]:
        return {column["name"] for column in adapter_crd()["spec"]["versions"][0]["additionalPrinterColumns"]}

    def fields() -> set[str]:
        schema = adapter_crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
        return set(schema["properties"]["spec"]["properties"])

    def upgrade(chart: Path) -> None:
        done = helm.run("upgrade", "lora-operator", str(chart), *installed.home, *IMAGE)
        assert done.returncode == 0, done.stderr

    objects = installed.kubectl("get", "lora,vllm,mcache", "-A", "-o", "name")
    uid = adapter_crd()["metadata"]["uid"]
    upgrade(older_chart(tmp_path))
    assert COLUMN not in columns()
    assert "baseModelName" not in fields()

    upgrade(CHART)
    assert COLUMN in columns()
    assert "baseModelName" in fields()
    assert adapter_crd()["metadata"]["uid"] == uid, "the CRD was made anew, and every object with it lost"
    assert installed.kubectl("get", "lora,vllm,mcache", "-A", "-o", "name") == objects


def test_the_crds_stay_when_the_chart_goes(installed: Installed, helm: Helm) -> None:
    """Last, since it uninstalls; installing again must work on what stayed, also under another name in another namespace."""
    objects = installed.kubectl("get", "lora,vllm,mcache", "-A", "-o", "name")
    assert "loraadapter" in objects
    done = helm.run("uninstall", "lora-operator", *installed.home)
    assert done.returncode == 0, done.stderr
    assert installed.kubectl("get", "lora,vllm,mcache", "-A", "-o", "name") == objects

    done = helm.run("install", "lora-operator", str(CHART), *installed.home, *IMAGE)
    assert done.returncode == 0, done.stderr
    done = helm.run("uninstall", "lora-operator", *installed.home)
    assert done.returncode == 0, done.stderr

    elsewhere = ("--namespace=platform", "--create-namespace", installed.home[1], *IMAGE)
    done = helm.run("install", "adapters", str(CHART), *elsewhere)
    assert done.returncode != 0
    assert "invalid ownership metadata" in done.stderr
    done = helm.run("install", "adapters", str(CHART), *elsewhere, "--take-ownership")
    assert done.returncode == 0, done.stderr
    assert installed.kubectl("get", "lora,vllm,mcache", "-A", "-o", "name") == objects
    annotations = json.loads(installed.kubectl("get", "crd", f"loraadapters.{GROUP}", "-o", "json"))["metadata"]
    assert annotations["annotations"]["meta.helm.sh/release-name"] == "adapters"
    done = helm.run("uninstall", "adapters", *elsewhere[:1], installed.home[1])
    assert done.returncode == 0, done.stderr
    assert installed.kubectl("get", "lora,vllm,mcache", "-A", "-o", "name") == objects
