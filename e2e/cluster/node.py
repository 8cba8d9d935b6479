"""The node: containerd, CNI, kubelet and kube-proxy, with every path of theirs below the cluster's own folder.

Pods get addresses of 198.18.0.0/17, services of 198.19.0.0/16, and the node is 198.18.254.1 on `lo`: the benchmark range,
so that nothing private or public is ever addressed. Pods have no way out of the machine: nothing masquerades them.
"""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

from e2e.cluster import paths
from e2e.cluster.controlplane import ControlPlane, require_free
from e2e.cluster.images import PAUSE_IMAGE
from e2e.cluster.processes import Daemon
from e2e.cluster.steps import ToolingError

NODE_NAME = "node"
NODE_IP = "198.18.254.1"
POD_CIDR = "198.18.0.0/17"
CNI_NETWORK = "lora-operator"

_CONTAINERD = """\
version = 2
root = "{root}"
state = "{state}"
disabled_plugins = [
  "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs",
]

[grpc]
  address = "{socket}"

[plugins."io.containerd.internal.v1.opt"]
  path = "{opt}"

[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause}"
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{cni}"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "{snapshotter}"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      SystemdCgroup = false
      Root = "{runc}"
"""


@dataclass(frozen=True)
class Node:
    """The processes of one node; `dir` is the cluster's folder."""

    dir: Path

    @property
    def run_dir(self) -> Path:
        """Pid files and sockets."""
        return self.dir / "run"

    @property
    def logs(self) -> Path:
        """One log per component, and `pods/` with those of the containers."""
        return self.dir / "logs"

    @property
    def socket(self) -> Path:
        """containerd's socket."""
        return self.run_dir / "containerd.sock"

    @property
    def task_dir(self) -> Path:
        """Where containerd keeps one bundle per container."""
        return self.dir / "containerd" / "state" / "io.containerd.runtime.v2.task" / "k8s.io"

    def daemon(self, name: str) -> Daemon:
        """The daemon of one component."""
        return Daemon(name, self.run_dir, self.logs / f"{name}.log")

    def start_containerd(self, pause_image: Path) -> None:
        """Write its and CNI's configuration, start containerd and import the pause image."""
        if len(str(self.socket)) > 90:
            raise ToolingError(f"{self.socket}: too long for a socket's path; set LORA_OPERATOR_CACHE to a shorter one")
        cni = self.dir / "cni" / "conf"
        for folder in (cni, self.run_dir, self.logs / "pods"):
            folder.mkdir(parents=True, exist_ok=True)
        (cni / "10-test.conflist").write_text(json.dumps(self._cni_config(), indent=2))
        config = self.dir / "containerd" / "config.toml"
        config.parent.mkdir(parents=True, exist_ok=True)
        config.write_text(
            _CONTAINERD.format(
                root=self.dir / "containerd" / "root",
                state=self.dir / "containerd" / "state",
                opt=self.dir / "containerd" / "opt",
                runc=self.dir / "containerd" / "runc",
                socket=self.socket,
                pause=PAUSE_IMAGE,
                cni=cni,
                snapshotter=self._snapshotter,
            )
        )
        containerd = self.daemon("containerd")
        containerd.start(["containerd", "--config", config, "--log-level", "warn"])
        containerd.wait_until(lambda: self._answers(), what="answering", timeout=30)
        self.import_image(pause_image)

    def start_kubelet(self, kube: Path, plane: ControlPlane) -> None:
        """Start the kubelet; the node registers itself once the API server answers."""
        require_free(NODE_IP, 10250, "kubelet")
        config = self.dir / "kubelet.json"
        config.write_text(json.dumps(self._kubelet_config(plane), indent=2))
        self.daemon("kubelet").start(
            [
                *(kube, "kubelet", f"--config={config}", f"--kubeconfig={plane.user_kubeconfig('system:node:node')}"),
                *(f"--root-dir={self.dir / 'kubelet'}", f"--cert-dir={self.dir / 'kubelet-pki'}"),
                *(f"--hostname-override={NODE_NAME}", f"--node-ip={NODE_IP}"),
            ]
        )

    def start_proxy(self, kube: Path, plane: ControlPlane) -> None:
        """Start kube-proxy with nftables."""
        config = self.dir / "kube-proxy.json"
        settings = {
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "mode": "nftables",
            "clusterCIDR": POD_CIDR,
            "hostnameOverride": NODE_NAME,
            "bindAddress": NODE_IP,
            "nodePortAddresses": [f"{NODE_IP}/32"],
            "healthzBindAddress": "127.0.0.1:10256",
            "metricsBindAddress": "127.0.0.1:10249",
            "nftables": {"minSyncPeriod": "100ms", "syncPeriod": "30s"},
            "conntrack": {"maxPerCore": 0, "min": 0},  # 0: leave the machine's limits alone
            "clientConnection": {"kubeconfig": str(plane.user_kubeconfig("system:kube-proxy"))},
        }
        config.write_text(json.dumps(settings, indent=2))
        self.daemon("kube-proxy").start([kube, "kube-proxy", f"--config={config}"])

    def ctr(self, *words: str | Path) -> str:
        """Run `ctr` against this node's containerd; raises ToolingError with its message."""
        command = ["ctr", "--address", str(self.socket), "--namespace", "k8s.io", *(str(word) for word in words)]
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        if result.returncode:
            raise ToolingError(f"`ctr {' '.join(command[5:])}` failed: {result.stderr.strip()}")
        return result.stdout

    def import_image(self, archive: Path) -> None:
        """Import a docker or OCI archive, so that pods with `imagePullPolicy: IfNotPresent` find it."""
        self.ctr("images", "import", "--snapshotter", self._snapshotter, archive)

    @property
    def _snapshotter(self) -> str:
        return "overlayfs" if paths.overlay_works() else "native"

    def _answers(self) -> bool:
        try:
            self.ctr("version")
        except ToolingError:
            return False
        return True

    def _cni_config(self) -> dict[str, object]:
        # ptp, not bridge: every packet passes the host's routing, so ClusterIPs need no br_netfilter, and an interface
        # goes with its pod's namespace: there is no bridge to clear away.
        ipam = {
            "type": "host-local",
            "dataDir": str(self.dir / "cni" / "addresses"),
            "ranges": [[{"subnet": POD_CIDR}]],
            "routes": [{"dst": "0.0.0.0/0"}],
        }
        return {"cniVersion": "0.4.0", "name": CNI_NETWORK, "plugins": [{"type": "ptp", "ipMasq": False, "ipam": ipam}]}

    def _kubelet_config(self, plane: ControlPlane) -> dict[str, object]:
        return {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "containerRuntimeEndpoint": f"unix://{self.socket}",
            "address": NODE_IP,
            "authentication": {
                "anonymous": {"enabled": False},
                "webhook": {"enabled": False},
                "x509": {"clientCAFile": str(plane.pki.ca)},
            },
            "authorization": {"mode": "AlwaysAllow"},
            "podLogsDir": str(self.logs / "pods"),
            "volumePluginDir": str(self.dir / "volume-plugins"),
            "resolvConf": "/dev/null",
            # The machine may have no systemd, cgroup v1 and swap: the node takes what it finds.
            "cgroupDriver": "cgroupfs",
            "cgroupsPerQOS": False,
            "enforceNodeAllocatable": [],
            "failSwapOn": False,
            "failCgroupV1": False,
            "makeIPTablesUtilChains": False,
            "maxPods": 200,
            "eventRecordQPS": 0,
            "syncFrequency": "10s",  # how soon a changed ConfigMap is seen in a volume (1 min by default)
            # Never evict or collect images for want of disk: they were imported and cannot be pulled again.
            "imageGCHighThresholdPercent": 100,
            "imageGCLowThresholdPercent": 99,
            "evictionHard": {
                "memory.available": "50Mi",
                "nodefs.available": "1Mi",
                "nodefs.inodesFree": "1",
                "imagefs.available": "1Mi",
                "imagefs.inodesFree": "1",
            },
        }
