"""The end-to-end tests on a cluster that somebody else runs (kind, a managed one), told by environment variables.

With IMAGE and KUBECONFIG set, nothing of e2e/cluster is started, built or imported: everything goes through kubectl and Helm.
KUBECONFIG alone changes nothing, so that nobody's current context is ever tested by accident. docs/development.md has the variables.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import shlex
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Final

from e2e.cluster import Cluster, ToolingError, tools
from e2e.cluster.controlplane import ControlPlane
from e2e.cluster.node import Node
from e2e.cluster.processes import wait_until

VARIABLES: Final = {
    "IMAGE": "the operator's image, which the nodes can pull or have; it is not built",
    "KUBECONFIG": "the cluster, by an administrator's kubeconfig",
    "E2E_HOST": "address of this machine on which the tests' sources listen, and under which pods reach them",
    "E2E_ENGINE_IMAGE": "an image with vLLM for CPU",
    "E2E_ENGINE_COMMAND": "how that image starts vLLM's API server (default: vllm serve)",
    "E2E_ENGINE_VENV": "a folder of the node with a vLLM venv, to be mounted at the same path (default: none)",
    "E2E_STORAGE_CLASS": "a StorageClass for the caches' claims",
    "E2E_ACCESS_MODE": "the claims' access mode (default: ReadWriteMany; ReadWriteOnce does on one node)",
    "E2E_NODE_FOLDER": "instead of E2E_STORAGE_CLASS, on one node: a folder there, made by a pod, for hostPath volumes",
    "E2E_PODS": "how the tests reach pods: forward (kubectl port-forward, the default) or direct (by their addresses)",
}
_NEEDED: Final = ("KUBECONFIG", "E2E_HOST", "E2E_ENGINE_IMAGE")
_FORWARDING: Final = re.compile(r"Forwarding from 127\.0\.0\.1:(\d+) ->")
_FORWARD_SECONDS: Final = 20.0


class NodeAccessError(ToolingError):
    """A test wants something of the node that a given cluster does not open."""


@dataclass(frozen=True)
class Given:
    """What the environment says."""

    image: str
    kubeconfig: Path
    host: str
    engine_image: str
    engine_command: tuple[str, ...] = ("vllm", "serve")
    engine_venv: Path | None = None
    storage_class: str | None = None
    access_mode: str = "ReadWriteMany"
    node_folder: Path | None = None
    direct: bool = False

    def describe(self) -> str:
        """One line for the head of the tests' output."""
        storage = f"folder {self.node_folder} of the node" if self.node_folder else f"class {self.storage_class}"
        return (
            f"given cluster: {self.kubeconfig}, operator {self.image}, engine {self.engine_image}, volumes: {storage}"
        )


def read_given(environ: Mapping[str, str]) -> Given | None:
    """What the variables ask for; None without IMAGE. Raises ToolingError with what is missing or wrong."""
    found = {name: environ.get(name, "").strip() for name in VARIABLES}
    if not found["IMAGE"]:
        return None
    missing = [name for name in _NEEDED if not found[name]]
    if bool(found["E2E_STORAGE_CLASS"]) == bool(found["E2E_NODE_FOLDER"]):
        missing.append("either E2E_STORAGE_CLASS or E2E_NODE_FOLDER")
    if missing:
        raise ToolingError(f"IMAGE is set, so these are needed too: {', '.join(missing)}; see docs/development.md")
    if not _tag_of(found["IMAGE"]):
        raise ToolingError(f"IMAGE needs a tag: {found['IMAGE']}")
    if found["E2E_PODS"] not in ("", "forward", "direct"):
        raise ToolingError(f"E2E_PODS is forward or direct, not {found['E2E_PODS']}")
    return Given(
        image=found["IMAGE"],
        kubeconfig=Path(found["KUBECONFIG"]),
        host=found["E2E_HOST"],
        engine_image=found["E2E_ENGINE_IMAGE"],
        engine_command=tuple(shlex.split(found["E2E_ENGINE_COMMAND"] or "vllm serve")),
        engine_venv=Path(found["E2E_ENGINE_VENV"]) if found["E2E_ENGINE_VENV"] else None,
        storage_class=found["E2E_STORAGE_CLASS"] or None,
        access_mode=found["E2E_ACCESS_MODE"] or "ReadWriteMany",
        node_folder=Path(found["E2E_NODE_FOLDER"]) if found["E2E_NODE_FOLDER"] else None,
        direct=found["E2E_PODS"] == "direct",
    )


@cache
def given() -> Given | None:
    """What this process's environment asks for."""
    return read_given(os.environ)


def _tag_of(image: str) -> str:
    return image.rpartition("/")[2].partition(":")[2]


@dataclass(frozen=True)
class GivenCluster(Cluster):
    """A cluster known by its kubeconfig only. What needs its node raises NodeAccessError."""

    kubeconfig_file: Path = field(kw_only=True)

    @property
    def kubeconfig(self) -> Path:
        """The administrator's kubeconfig."""
        return self.kubeconfig_file

    def import_image(self, archive: Path) -> None:
        """Nothing: nodes pull, or have, what they are told to run."""

    @property
    def _plane(self) -> ControlPlane:
        raise NodeAccessError("this test needs our own control plane: mark it with @pytest.mark.node")

    @property
    def _node(self) -> Node:
        raise NodeAccessError("this test needs our own node: mark it with @pytest.mark.node")


class Forwards:
    """`kubectl port-forward` processes, one per pod; one that ended is started again under the same local port."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._running: dict[tuple[str, str], tuple[subprocess.Popen[bytes], str]] = {}
        atexit.register(self.stop)

    def url(self, namespace: str, pod: str, port: int) -> str:
        """Where the pod's port is reached on this machine."""
        process, local = self._running.get((namespace, pod), (None, ""))
        if process is None or process.poll() is not None:
            process, local = self._start(namespace, pod, f"{local}:{port}")
            self._running[(namespace, pod)] = process, local
        return f"http://127.0.0.1:{local}"

    def stop(self) -> None:
        """End them all."""
        for process, _ in self._running.values():
            process.terminate()
            process.wait(timeout=10)
        self._running.clear()

    def _start(self, namespace: str, pod: str, ports: str) -> tuple[subprocess.Popen[bytes], str]:
        # It writes a line for every connection: to a file, since nobody would empty a pipe.
        with tempfile.NamedTemporaryFile("r", prefix="port-forward-") as log:
            with Path(log.name).open("wb") as out:
                process = subprocess.Popen(
                    [tools.kubectl(), "port-forward", "-n", namespace, f"pod/{pod}", ports, "--address=127.0.0.1"],
                    env={**os.environ, **self._cluster.env},
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                )
            wait_until(
                lambda: process.poll() is not None or _FORWARDING.search(Path(log.name).read_text()) is not None,
                timeout=_FORWARD_SECONDS,
                interval=0.05,
            )
            said = Path(log.name).read_text()
        found = _FORWARDING.search(said)
        if found is None:
            process.kill()
            process.wait(timeout=10)
            raise ToolingError(f"kubectl port-forward to {namespace}/{pod}: {said.strip() or 'it said nothing'}")
        return process, found[1]


def claim(name: str, namespace: str, spec: Given) -> dict[str, Any]:
    """The claim of a cache from a StorageClass."""
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "accessModes": [spec.access_mode],
            "storageClassName": spec.storage_class,
            "resources": {"requests": {"storage": "10Gi"}},
        },
    }


def make_node_folder(cluster: Cluster, spec: Given, name: str, *, group: int) -> Path:
    """An empty folder of the node for a cache, made by a pod: the only way that every cluster has."""
    assert spec.node_folder is not None
    folder, pod = spec.node_folder / name, f"e2e-folder-{name}"
    code = (
        "import os, shutil; p = '/node/' + os.environ['NAME']; shutil.rmtree(p, ignore_errors=True); os.mkdir(p); "
        f"os.chown(p, 0, {group}); os.chmod(p, 0o2775)"
    )
    container = {
        "name": "make",
        "image": spec.image,
        "command": ["python3", "-c", code],
        "env": [{"name": "NAME", "value": name}],
        "securityContext": {"runAsUser": 0},
        "volumeMounts": [{"name": "node", "mountPath": "/node"}],
    }
    volume = {"name": "node", "hostPath": {"path": str(spec.node_folder), "type": "DirectoryOrCreate"}}
    manifest = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": pod, "namespace": "default"},
        "spec": {"restartPolicy": "Never", "containers": [container], "volumes": [volume]},
    }
    where = ("pod", pod, "-n", "default")
    cluster.kubectl("delete", *where, "--ignore-not-found")
    cluster.kubectl("apply", "-f", "-", input=json.dumps(manifest))
    cluster.kubectl("wait", *where, "--for=jsonpath={.status.phase}=Succeeded", "--timeout=120s")
    cluster.kubectl("delete", *where, "--wait=false")
    return folder
