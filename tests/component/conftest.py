"""A real etcd and kube-apiserver with the generated CRDs, once per test session, and a kubectl that speaks to it."""

from __future__ import annotations

import asyncio
import itertools
import json
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest

from e2e.cluster import tools
from e2e.cluster.controlplane import ControlPlane
from lora_operator.api import RESOURCES
from lora_operator.kube.client import Kube, load_configuration
from lora_operator.reconcile.context import Context, build_context
from lora_operator.reconcile.store import Store
from lora_operator.settings import Settings
from lora_operator.vllm import Engines
from tests.component.fetch_support import make_adapter, make_base
from tests.component.reconcile_support import World

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Answer:
    """How kubectl ended."""

    ok: bool
    output: str
    error: str


@dataclass(frozen=True)
class Kubectl:
    """kubectl with the administrator's kubeconfig of one API server."""

    binary: Path
    kubeconfig: Path

    def try_(self, *arguments: str, manifest: Any = None) -> Answer:
        """Run it, with a manifest as JSON on its standard input where one is given; a refusal is an answer."""
        done = subprocess.run(
            [str(self.binary), f"--kubeconfig={self.kubeconfig}", *arguments],
            input="" if manifest is None else json.dumps(manifest),
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        return Answer(done.returncode == 0, done.stdout, done.stderr)

    def __call__(self, *arguments: str, manifest: Any = None) -> str:
        """Its standard output; fails the test when kubectl does."""
        answer = self.try_(*arguments, manifest=manifest)
        assert answer.ok, f"kubectl {' '.join(arguments)}: {answer.error}"
        return answer.output

    def apply(self, manifest: Any, *arguments: str) -> Answer:
        """`kubectl apply` of one manifest; the caller looks at the answer."""
        return self.try_("apply", "-f", "-", *arguments, manifest=manifest)

    def read(self, *arguments: str) -> dict[str, Any]:
        """`kubectl get … -o json` as an object."""
        found: dict[str, Any] = json.loads(self("get", *arguments, "-o", "json"))
        return found


@pytest.fixture(scope="session")
def control_plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """etcd and kube-apiserver, without the CRDs."""
    with ControlPlane(dir=tmp_path_factory.mktemp("control-plane")) as plane:
        yield plane


@pytest.fixture(scope="session")
def kubectl(control_plane: ControlPlane) -> Kubectl:
    """kubectl against an API server that serves the four kinds."""
    tool = Kubectl(tools.kubectl(), control_plane.kubeconfig)
    tool("apply", "--server-side", "-f", str(ROOT / "crds"))
    tool("wait", "--for=condition=Established", "crd", "--all", "--timeout=30s")
    # Established says nothing of the discovery documents and the OpenAPI that kubectl reads; they follow in a moment.
    deadline = time.monotonic() + 30
    for info in RESOURCES:
        while not tool.try_("explain", f"{info.short_names[0]}.spec").ok:
            assert time.monotonic() < deadline, f"the API server does not serve {info.plural}"
            time.sleep(0.1)
    return tool


_NUMBER = itertools.count(1)


@pytest.fixture
def namespace(kubectl: Kubectl) -> str:
    """A namespace of the test's own; nothing deletes it, since no controller runs that could finish that."""
    name = f"test-{next(_NUMBER)}"
    kubectl("create", "namespace", name)
    return name


@pytest.fixture
async def context(control_plane: ControlPlane) -> AsyncIterator[Context]:
    """What a reconciler is given: a real API server, an empty store."""
    async with Kube(await load_configuration(str(control_plane.kubeconfig))) as kube:
        yield build_context(
            kube=kube,
            engines=cast(Engines, None),
            store=Store(),
            settings=Settings(operator_image="operator:1", operator_namespace="ops"),
            enqueue=lambda *_, **__: None,
        )


@pytest.fixture
async def world(control_plane: ControlPlane, kubectl: Kubectl, tmp_path: Path) -> AsyncIterator[World]:
    """Three namespaces of the test's own, in which downloads end by themselves."""
    number = next(_NUMBER)
    names = {role: f"{role.replace('_', '-')}-{number}" for role in ("serving", "team_a", "team_b")}
    for name in names.values():
        kubectl("create", "namespace", name)
    async with Kube(await load_configuration(str(control_plane.kubeconfig))) as kube:
        found = World(kube, tmp_path, **names)
        jobs = asyncio.create_task(found.play_jobs(), name="jobs")
        yield found
        assert not jobs.done(), f"the test's Jobs stood still: {jobs.exception()!r}"
        jobs.cancel()
        await asyncio.wait([jobs])
        await found.clear()


@pytest.fixture(scope="session")
def content(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base models and adapters for sources to hand out."""
    folder = tmp_path_factory.mktemp("content")
    make_base(folder / "base")
    make_base(folder / "big", vocab=24_576)  # 6 MiB
    make_adapter(folder / "good")
    make_adapter(folder / "other", seed=7)
    return folder
