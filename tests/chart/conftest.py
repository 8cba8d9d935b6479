"""Renders the chart with the real helm, so that tests assert on the objects a cluster would get."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from e2e.cluster import tools

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "charts" / "lora-operator"
KUBE_VERSION = "1.34.4"

Object = dict[str, Any]


@dataclass(frozen=True)
class Rendered:
    """The objects of one rendering."""

    objects: tuple[Object, ...]

    def of(self, kind: str) -> list[Object]:
        """All objects of a kind, in the order of the rendering."""
        return [item for item in self.objects if item["kind"] == kind]

    def one(self, kind: str, name: str) -> Object:
        """The object of that kind and name; fails when there is not exactly one."""
        found = [item for item in self.of(kind) if item["metadata"]["name"] == name]
        assert len(found) == 1, f"{kind} {name}: {len(found)} of them"
        return found[0]


@dataclass(frozen=True)
class Helm:
    """The helm binary, and the chart."""

    binary: Path

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run helm; the caller looks at the exit code."""
        return subprocess.run([str(self.binary), *arguments], capture_output=True, text=True, check=False, timeout=60)

    def template(
        self, values: Object | None = None, *, release: str = "lora-operator", chart: Path = CHART
    ) -> subprocess.CompletedProcess[str]:
        """`helm template` of the chart in namespace `ops`."""
        sets = [f"--set-json={key}={json.dumps(value)}" for key, value in (values or {}).items()]
        return self.run("template", release, str(chart), "--namespace=ops", f"--kube-version={KUBE_VERSION}", *sets)


def render_chart(
    helm: Helm, values: Object | None = None, *, release: str = "lora-operator", chart: Path = CHART
) -> Rendered:
    """The chart's objects with these values; the image's repository is given."""
    given = {"image.repository": "images.example/operator", **(values or {})}
    done = helm.template(given, release=release, chart=chart)
    assert done.returncode == 0, done.stderr
    return Rendered(tuple(item for item in yaml.safe_load_all(done.stdout) if item))


@pytest.fixture(scope="session")
def helm() -> Helm:
    """The project's own helm."""
    return Helm(tools.helm())


@pytest.fixture(scope="session")
def render(helm: Helm) -> Callable[..., Rendered]:
    """render(values, release=…): see render_chart."""
    return partial(render_chart, helm)
