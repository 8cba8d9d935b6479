"""One real Kubernetes node on this machine: start it, find a live one, clear a stale one, stop it.

At most one runs per machine, because the node's address and its ports are fixed. A lock file keeps two programs from
starting it at once.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from e2e.cluster import paths, tools
from e2e.cluster.controlplane import SERVICE_CIDR, ControlPlane
from e2e.cluster.node import NODE_IP, NODE_NAME, Node
from e2e.cluster.processes import Daemon, boot_id, wait_until
from e2e.cluster.steps import ToolingError, say, step
from e2e.cluster.teardown import COMPONENTS, clear

_PORT = 6443
_ROOM_GIB = 4
_ETCD_PORTS = (23790, 23800)


@dataclass(frozen=True)
class Cluster:
    """A running cluster whose state lies in `dir`."""

    dir: Path
    node_ip: str = NODE_IP

    @property
    def kubeconfig(self) -> Path:
        """The administrator's kubeconfig."""
        return self._plane.kubeconfig

    @property
    def apiserver_url(self) -> str:
        """https://198.18.254.1:6443."""
        return self._plane.url

    @property
    def serving_cert(self) -> Path:
        """The API server's certificate, valid for a proxy on the node's address, 127.0.0.1 and the service's address too."""
        return self._plane.pki.serving_cert

    @property
    def serving_key(self) -> Path:
        """Its key."""
        return self._plane.pki.serving_key

    @property
    def ca(self) -> Path:
        """The cluster's certificate authority, which pods find in their service-account volume."""
        return self._plane.pki.ca

    @property
    def logs(self) -> Path:
        """One log per component; containers' logs below `pods/`; the API server's audit log."""
        return self.dir / "logs"

    @property
    def audit_log(self) -> Path:
        """The API server's audit log: one JSON object per request, level Metadata."""
        return self._plane.audit_log

    @property
    def env(self) -> dict[str, str]:
        """KUBECONFIG, and a PATH that has kubectl and helm."""
        folders = [str(tools.kubectl().parent), str(tools.helm().parent)]
        return {"KUBECONFIG": str(self.kubeconfig), "PATH": os.pathsep.join([*folders, os.environ.get("PATH", "")])}

    def kubectl(self, *words: str | Path, input: str | None = None, check: bool = True, timeout: float = 300) -> str:  # noqa: A002
        """Run kubectl as the administrator and return its stdout; with `check`, failure raises ToolingError with its stderr."""
        return self._run(tools.kubectl(), words, stdin=input, check=check, timeout=timeout)

    def helm(self, *words: str | Path, input: str | None = None, check: bool = True, timeout: float = 300) -> str:  # noqa: A002
        """Run helm as the administrator and return its stdout; with `check`, failure raises ToolingError with its stderr."""
        return self._run(tools.helm(), words, stdin=input, check=check, timeout=timeout)

    def import_image(self, archive: Path) -> None:
        """Make the image of a docker archive available to pods; an archive that is already in is left alone."""
        stat = archive.stat()
        marker = self.dir / "run" / "images" / f"{archive.name}-{stat.st_size}-{stat.st_mtime_ns}"
        if not marker.exists():
            with step(f"importing {archive.name} into the node", announce=False):
                self._node.import_image(archive)
            marker.parent.mkdir(parents=True, exist_ok=True)
            marker.touch()

    def ctr(self, *words: str | Path) -> str:
        """Run `ctr` in the node's k8s.io namespace (for instance to kill a container's process)."""
        return self._node.ctr(*words)

    def daemon(self, component: str) -> Daemon:
        """The background process of one component (see teardown.COMPONENTS)."""
        return self._node.daemon(component)

    def stop(self) -> None:
        """End the cluster and remove its state."""
        with _lock(), step("stopping the cluster", announce=False):
            clear(self._node)

    def fault(self) -> str | None:
        """Why this cluster is not usable, or None when it is."""
        try:
            record = json.loads(_record(self.dir).read_text())
        except (OSError, ValueError):
            return "it never came up"
        if record.get("boot") != boot_id():
            return "the machine was restarted"
        if record.get("kube") != str(tools.kube()):
            return "it runs another build of Kubernetes"
        dead = [name for name in COMPONENTS if self.daemon(name).pid is None]
        if dead:
            return f"{', '.join(dead)} not running"
        if not wait_until(lambda: _node_ready(self._plane), timeout=15, interval=0.5):
            return "the node is not Ready"
        return None

    @property
    def _plane(self) -> ControlPlane:
        return _control_plane(self.dir)

    @property
    def _node(self) -> Node:
        return Node(self.dir)

    def _run(
        self, program: Path, words: tuple[str | Path, ...], *, stdin: str | None, check: bool, timeout: float
    ) -> str:
        command = [str(program), *(str(word) for word in words)]
        result = subprocess.run(
            command,
            input=stdin or "",
            capture_output=True,
            text=True,
            env={**os.environ, **self.env},
            timeout=timeout,
            check=False,
        )
        if check and result.returncode:
            shown = " ".join([program.name, *command[1:]])
            raise ToolingError(f"`{shown}` failed with {result.returncode}: {(result.stderr or result.stdout).strip()}")
        return result.stdout


def find_cluster() -> Cluster:
    """The machine's cluster, running or not."""
    return Cluster(paths.cache_root() / "cluster")


def ensure_cluster() -> Cluster:
    """Return the running cluster; start one when there is none, after clearing what a dead one left."""
    if os.geteuid() != 0:
        raise ToolingError("the cluster needs root: it runs containers, network namespaces and mounts")
    tools.apt_packages()
    kube, pause = tools.kube(), tools.pause_image()
    cluster = find_cluster()
    room = shutil.disk_usage(paths.cache_root()).free >> 30
    if room < _ROOM_GIB:  # on a full disk no new pod starts, and what fails says anything but that
        raise ToolingError(f"{paths.cache_root()} has {room} GiB free; the cluster and its tests need {_ROOM_GIB}")
    with _lock():
        if cluster.dir.exists():
            fault = cluster.fault()
            if fault is None:
                say(f"cluster: running already, KUBECONFIG={cluster.kubeconfig}")
                return cluster
            with step(f"clearing a stale cluster ({fault})", announce=False):
                clear(Node(cluster.dir))
        else:
            _require_no_other_cluster()
        with step("starting the cluster"):
            try:
                _start(cluster.dir, kube=kube, pause_image=pause)
            except ToolingError as error:
                kept = _keep_logs(cluster)
                clear(Node(cluster.dir))
                raise ToolingError(f"the cluster did not start: {error}\n  all logs are kept in {kept}") from error
    say(f"cluster: node Ready, KUBECONFIG={cluster.kubeconfig}")
    return cluster


def _require_no_other_cluster() -> None:
    """Raise ToolingError when a cluster of another cache folder holds the node's address: it would be torn apart."""
    command = ["ip", "-o", "address", "show", "to", f"{NODE_IP}/32"]
    if not subprocess.run(command, capture_output=True, check=True, timeout=30).stdout:
        return
    with socket.socket() as probe:
        probe.settimeout(2)
        if probe.connect_ex((NODE_IP, _PORT)) == 0:
            raise ToolingError(
                f"another cluster answers on {NODE_IP}:{_PORT}; stop it with its own LORA_OPERATOR_CACHE"
            )


def _start(folder: Path, *, kube: Path, pause_image: Path) -> None:
    folder.mkdir(parents=True, mode=0o755)
    node, plane = Node(folder), _control_plane(folder)
    for command in (
        ["ip", "address", "replace", f"{NODE_IP}/32", "dev", "lo"],
        # so that the host reaches ClusterIPs without a default route too
        ["ip", "route", "replace", SERVICE_CIDR, "dev", "lo", "src", NODE_IP],
    ):
        subprocess.run(command, check=True, timeout=30)
    containerd = _in_background(lambda: node.start_containerd(pause_image))
    plane.start_etcd(kube)
    plane.write_credentials()
    plane.start_apiserver(kube)
    containerd()
    node.start_kubelet(kube, plane)
    plane.apiserver.wait_until(lambda: plane.get("/livez") is not None, what="answering", timeout=60)
    _start_controllers(node, plane, kube)
    node.start_proxy(kube, plane)
    plane.apiserver.wait_until(plane.ready, what="ready", timeout=60)
    node.daemon("kubelet").wait_until(lambda: _node_ready(plane), what="reporting a Ready node", timeout=90)
    account = "/api/v1/namespaces/default/serviceaccounts/default"
    node.daemon("kube-controller-manager").wait_until(
        lambda: plane.get(account) is not None, what="making service accounts", timeout=60
    )
    node.daemon("kube-proxy").wait_until(_service_rules_exist, what="programming ClusterIPs", timeout=60)
    record = {"boot": boot_id(), "kube": str(kube)}
    _record(folder).write_text(json.dumps(record))


def _start_controllers(node: Node, plane: ControlPlane, kube: Path) -> None:
    manager = "system:kube-controller-manager"
    node.daemon("kube-controller-manager").start(
        [
            *(kube, "kube-controller-manager", f"--kubeconfig={plane.user_kubeconfig(manager)}"),
            *(f"--root-ca-file={plane.pki.ca}", "--bind-address=127.0.0.1", f"--cert-dir={plane.dir / 'kcm-pki'}"),
            f"--service-account-private-key-file={plane.pki.service_account_key}",
            *("--use-service-account-credentials", "--leader-elect=false"),
            *("--kube-api-qps=500", "--kube-api-burst=500"),  # the default makes its start 3 s longer
            "--pvclaimbinder-sync-period=1s",  # the default of 15 s delays every binding of a claim
        ]
    )
    node.daemon("kube-scheduler").start(
        [
            *(kube, "kube-scheduler", f"--kubeconfig={plane.user_kubeconfig('system:kube-scheduler')}"),
            *("--bind-address=127.0.0.1", f"--cert-dir={plane.dir / 'scheduler-pki'}", "--leader-elect=false"),
        ]
    )


def _control_plane(folder: Path) -> ControlPlane:
    return ControlPlane(
        port=_PORT,
        etcd_ports=_ETCD_PORTS,
        dir=folder,
        address=NODE_IP,
        extra_args=("--allow-privileged=true",),
        daemonise=True,
    )


def _record(folder: Path) -> Path:
    return folder / "run" / "cluster.json"


def _node_ready(plane: ControlPlane) -> bool:
    node = plane.get(f"/api/v1/nodes/{NODE_NAME}")
    if node is None:
        return False
    body = json.loads(node)
    ready = any(c["type"] == "Ready" and c["status"] == "True" for c in body["status"].get("conditions", []))
    return ready and not body["spec"].get("taints")


def _service_rules_exist() -> bool:
    rules = subprocess.run(["nft", "list", "table", "ip", "kube-proxy"], capture_output=True, text=True, check=False)
    return "default/kubernetes" in rules.stdout


def _in_background(work: Callable[[], None]) -> Callable[[], None]:
    """Run `work` in a thread; the function returned waits for it and raises what it raised."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()

    def wait() -> None:
        thread.join()
        if errors:
            raise errors[0]

    return wait


def _keep_logs(cluster: Cluster) -> Path:
    kept = paths.cache_dir("failed-start")
    for log in cluster.logs.glob("*.log"):
        (kept / log.name).write_bytes(log.read_bytes())
    return kept


@contextmanager
def _lock() -> Iterator[None]:
    with (paths.cache_root() / "cluster.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
