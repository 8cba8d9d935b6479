"""End a cluster, whole or half dead, and remove all it left on the machine: processes, mounts, addresses, nft tables.

Level-triggered like the operator: it looks at what is there and removes that, so the same function clears a clean stop,
a killed run and a half-started one. It must never touch what is not the cluster's: processes are found by pid files, by
containerd's own bundles below the cluster's folder and by its socket in a shim's arguments; mounts by that folder.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from e2e.cluster.controlplane import SERVICE_CIDR
from e2e.cluster.node import CNI_NETWORK, NODE_IP, Node
from e2e.cluster.processes import Daemon, kill_and_wait, start_time, wait_until
from e2e.cluster.steps import ToolingError

# In the order in which they must end: first what starts containers, last what stores.
COMPONENTS = (
    "kubelet",
    "kube-proxy",
    "kube-scheduler",
    "kube-controller-manager",
    "kube-apiserver",
    "etcd",
    "containerd",
)
_MNT_DETACH = 2


def clear(node: Node) -> None:
    """End everything of the cluster in `node.dir` and remove the folder; without that folder nothing is ours to end."""
    if not node.dir.exists():
        return
    for name in COMPONENTS:
        if name == "containerd":
            _end_containers(node)
        Daemon(name, node.run_dir, node.logs / f"{name}.log").stop(grace=0 if name == "kubelet" else 5)
    _end_containers(node)
    _unlink_shim_sockets(node)
    _unmount_below(node.dir)
    _remove_network(node)
    _remove_log_links(node)
    if mounts := list(_mounts_below(node.dir)):  # removing through a bind mount would remove what is behind it
        raise ToolingError(f"still mounted, not removing {node.dir}: {', '.join(mounts[:5])}")
    _discard(node.dir)


def _discard(folder: Path) -> None:
    """Move the folder aside at once and remove it in the background: a container's root has thousands of files."""
    trash = folder.parent / "trash"
    trash.mkdir(exist_ok=True)
    folder.rename(trash / f"{folder.name}-{time.time_ns()}")
    rm = subprocess.Popen(
        ["rm", "-rf", "--one-file-system", str(trash)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    rm.returncode = 0  # not waited for


def _end_containers(node: Node) -> None:
    shims = list(_shims(node))
    containers = [pid for shim in shims for pid in _children(shim)]
    for bundle in node.task_dir.glob("*"):
        try:
            pid = int((bundle / "init.pid").read_text())
            owner = Path(f"/proc/{pid}/cgroup").read_text()
        except (OSError, ValueError):
            continue
        if bundle.name in owner:
            containers.append(pid)
    groups = {group for pid in containers for group in _cgroups(pid)}
    for pid in [*dict.fromkeys(containers), *shims]:
        kill_and_wait(pid, start_time(pid), grace=0)
    for group in groups:
        wait_until(lambda group=group: _removed(group), timeout=2)  # type: ignore[misc]


def _shims(node: Node) -> Iterator[int]:
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if "containerd-shim" in words[0] and str(node.socket) in words:
            yield int(entry.name)


def _children(pid: int) -> list[int]:
    children: list[int] = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children += [int(word) for word in file.read_text().split()]
        except OSError:
            continue
    return children


def _cgroups(pid: int) -> Iterator[Path]:
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not path.startswith("/k8s.io/"):
            continue
        name = controllers.removeprefix("name=")
        for root in (Path("/sys/fs/cgroup") / name, Path("/sys/fs/cgroup/unified")):
            if (root / path.lstrip("/")).is_dir():
                yield root / path.lstrip("/")


def _removed(group: Path) -> bool:
    try:
        group.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def _unlink_shim_sockets(node: Node) -> None:
    for file in node.task_dir.glob("*/address"):
        try:
            Path(file.read_text().strip().removeprefix("unix://")).unlink(missing_ok=True)
        except OSError:
            continue


def _mounts_below(folder: Path) -> Iterator[str]:
    prefix = f"{folder}/"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        point = line.split(" ")[4].encode().decode("unicode_escape")
        if point.startswith(prefix):
            yield point


def _unmount_below(folder: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    for _ in range(5):  # one mount point may carry several mounts
        points = sorted(_mounts_below(folder), key=len, reverse=True)
        if not points:
            return
        for point in points:
            if libc.umount2(os.fsencode(point), 0) != 0:
                libc.umount2(os.fsencode(point), _MNT_DETACH)
        time.sleep(0.05)


def _remove_network(node: Node) -> None:
    for command in (
        ["nft", "delete", "table", "ip", "kube-proxy"],
        ["nft", "delete", "table", "ip6", "kube-proxy"],
        ["ip", "route", "delete", SERVICE_CIDR],
        ["ip", "address", "delete", f"{NODE_IP}/32", "dev", "lo"],
    ):
        try:
            subprocess.run(command, capture_output=True, check=False, timeout=30)  # absent is as good as removed
        except FileNotFoundError:
            continue
    results = Path("/var/lib/cni/results")
    sandboxes = [bundle.name for bundle in node.task_dir.glob("*")]
    for pattern in (f"{CNI_NETWORK}-*", *(f"*-{sandbox}-*" for sandbox in sandboxes)):
        for result in results.glob(pattern):
            result.unlink(missing_ok=True)


def _remove_log_links(node: Node) -> None:
    for link in Path("/var/log/containers").glob("*.log"):
        if link.is_symlink() and str(link.readlink()).startswith(f"{node.logs}/"):
            link.unlink(missing_ok=True)
