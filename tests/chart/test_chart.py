"""The chart as a whole: linted, honest about its values, keeping the CRDs, versioned with the project."""

from __future__ import annotations

import shutil
import textwrap
import tomllib
from collections.abc import Callable
from pathlib import Path

import yaml

from lora_operator.api import RESOURCES
from lora_operator.constants import GROUP
from tests.chart.conftest import CHART, ROOT, Helm, Rendered, render_chart

Render = Callable[..., Rendered]


def test_lint_finds_nothing(helm: Helm) -> None:
    done = helm.run("lint", "--strict", str(CHART))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[WARNING]" not in done.stdout
    assert "[ERROR]" not in done.stdout


def test_without_an_image_it_says_what_is_missing(helm: Helm) -> None:
    done = helm.template()
    assert done.returncode != 0
    assert "image.repository is required" in done.stderr


def test_the_crds_of_all_kinds_are_in_it_and_outlive_it(render: Render) -> None:
    crds = render().of("CustomResourceDefinition")
    assert {item["metadata"]["name"] for item in crds} == {f"{info.plural}.{GROUP}" for info in RESOURCES}
    for item in crds:
        assert item["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"


def test_its_versions_are_the_projects(render: Render) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == project["version"]
    [deployment] = render().of("Deployment")
    [container] = deployment["spec"]["template"]["spec"]["containers"]
    assert container["image"] == f"images.example/operator:{project['version']}"


def test_the_notes_name_the_next_commands(helm: Helm, tmp_path: Path) -> None:
    # Helm shows notes only where it installs, so a copy of the chart has them as the text of a ConfigMap.
    copy = tmp_path / "lora-operator"
    shutil.copytree(CHART, copy)
    text = (copy / "templates" / "NOTES.txt").read_text()
    head = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: notes}\ndata:\n  notes: |\n"
    (copy / "templates" / "notes.yaml").write_text(head + textwrap.indent(text, "    "))
    notes = render_chart(helm, {}, chart=copy).one("ConfigMap", "notes")["data"]["notes"]
    for command in (
        "kubectl -n ops rollout status deployment/lora-operator",
        "examples/quickstart.yaml",
        "kubectl get lora,vllm,mart,mcache -A",
        "kubectl label namespace ops pod-security.kubernetes.io/enforce=restricted",
        "--clusterrole=lora-operator-secret-reader --serviceaccount=ops:lora-operator",
    ):
        assert command in notes
    assert "{{" not in notes
