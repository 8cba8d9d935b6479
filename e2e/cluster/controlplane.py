"""etcd and kube-apiserver: the part of Kubernetes that component tests need, and the first half of the whole cluster.

Several may run side by side on other ports. As a context manager the processes die with the program that made them, so
a killed test run leaves nothing behind; the cluster starts them as daemons instead.
"""

from __future__ import annotations

import json
import secrets
import shutil
import socket
import ssl
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from e2e.cluster import tools
from e2e.cluster.pki import Pki, make_pki
from e2e.cluster.processes import Daemon
from e2e.cluster.steps import ToolingError

SERVICE_CIDR = "198.19.0.0/16"
SERVICE_NAMES = ["localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc"]
USERS = {
    "admin": "system:masters",
    "system:kube-controller-manager": "",
    "system:kube-scheduler": "",
    "system:kube-proxy": "",
    "system:node:node": "system:nodes",
}

# Metadata of every request a person, the operator or a controller makes; the components' own polling would only drown it.
_AUDIT_POLICY = """\
apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules:
- level: None
  users: ["system:apiserver", "system:kube-controller-manager", "system:kube-scheduler", "system:kube-proxy", "system:node:node"]
  verbs: [get, list, watch]
- level: None
  resources:
  - {group: coordination.k8s.io, resources: [leases]}
- level: None
  nonResourceURLs: ["/readyz*", "/livez*", "/healthz*", "/version"]
- level: Metadata
"""


def free_port(address: str = "127.0.0.1") -> int:
    """A TCP port that nothing listens on at this moment."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


def require_free(address: str, port: int, owner: str) -> None:
    """Raise ToolingError when something else listens on the port that `owner` needs."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            raise ToolingError(f"{owner} needs {address}:{port}, which is taken: {error.strerror}") from error


@dataclass
class ControlPlane:
    """etcd + kube-apiserver with its state in `dir` (wiped at start); port 0 means any free one.

    `etcd_ports` are the client's and the peer's. Everything listens on `address` or on 127.0.0.1 only.
    """

    port: int = 0
    etcd_ports: tuple[int, int] = (0, 0)
    dir: Path = Path("control-plane")
    address: str = "127.0.0.1"
    extra_addresses: tuple[str, ...] = ()
    extra_args: tuple[str, ...] = ("--disable-admission-plugins=ServiceAccount",)
    daemonise: bool = False
    tokens: dict[str, str] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.dir = Path(self.dir).absolute()
        self.port = self.port or free_port(self.address)
        client, peer = self.etcd_ports
        self.etcd_ports = (client or free_port(), peer or free_port())
        self.etcd = Daemon("etcd", self.dir / "run", self.dir / "logs" / "etcd.log")
        self.apiserver = Daemon("kube-apiserver", self.dir / "run", self.dir / "logs" / "kube-apiserver.log")

    @property
    def url(self) -> str:
        """The API server's address."""
        return f"https://{self.address}:{self.port}"

    @property
    def kubeconfig(self) -> Path:
        """The administrator's kubeconfig."""
        return self.user_kubeconfig("admin")

    @property
    def pki(self) -> Pki:
        """Certificates and keys."""
        return Pki(self.dir / "pki")

    @property
    def audit_log(self) -> Path:
        """One JSON object per finished request (level Metadata)."""
        return self.dir / "logs" / "audit.log"

    def user_kubeconfig(self, user: str) -> Path:
        """The kubeconfig of one of USERS."""
        return self.dir / "kubeconfig" / f"{user.replace(':', '-')}.yaml"

    def __enter__(self) -> ControlPlane:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start both and wait until the API server is ready; raises ToolingError that names the component at fault."""
        self.stop()
        shutil.rmtree(self.dir, ignore_errors=True)
        self.dir.mkdir(parents=True)
        kube = tools.kube()
        self.start_etcd(kube)
        self.write_credentials()
        self.start_apiserver(kube)
        self.apiserver.wait_until(self.ready, what="ready", timeout=60)

    def stop(self) -> None:
        """End the API server, then etcd, and wait for both."""
        self.apiserver.stop(grace=2)
        self.etcd.stop(grace=5)

    def start_etcd(self, kube: Path) -> None:
        """Start etcd without fsync: its data need not survive the machine."""
        for port in self.etcd_ports:
            require_free("127.0.0.1", port, "etcd")
        client, peer = (f"http://127.0.0.1:{port}" for port in self.etcd_ports)
        self.etcd.start(
            [
                *(kube, "etcd", f"--data-dir={self.dir / 'etcd'}"),
                *(f"--listen-client-urls={client}", f"--advertise-client-urls={client}"),
                *(f"--listen-peer-urls={peer}", f"--initial-advertise-peer-urls={peer}"),
                *(f"--initial-cluster=default={peer}", "--unsafe-no-fsync", "--log-level=warn"),
            ],
            die_with_parent=not self.daemonise,
        )

    def write_credentials(self) -> None:
        """Make certificates, tokens and one kubeconfig per user."""
        addresses = [self.address, "127.0.0.1", "198.19.0.1", *self.extra_addresses]
        make_pki(self.dir / "pki", addresses=list(dict.fromkeys(addresses)), names=SERVICE_NAMES)
        self.tokens = {user: secrets.token_hex(16) for user in USERS}
        rows = [f'{token},{user},{user},"{USERS[user]}"' for user, token in self.tokens.items()]
        tokens = self.dir / "pki" / "tokens.csv"
        tokens.write_text("\n".join(rows) + "\n")
        (self.dir / "kubeconfig").mkdir(exist_ok=True)
        for user, token in self.tokens.items():
            path = self.user_kubeconfig(user)
            path.write_text(json.dumps(_kubeconfig(self.url, self.pki.ca, token), indent=2) + "\n")
            path.chmod(0o600)

    def start_apiserver(self, kube: Path) -> None:
        """Start the API server once etcd listens."""
        require_free(self.address, self.port, "kube-apiserver")
        self.etcd.wait_until(lambda: _listening(self.etcd_ports[0]), what="listening", timeout=30)
        policy = self.dir / "audit-policy.yaml"
        policy.write_text(_AUDIT_POLICY)
        pki = self.pki
        self.apiserver.start(
            [
                *(kube, "kube-apiserver", f"--etcd-servers=http://127.0.0.1:{self.etcd_ports[0]}"),
                *(
                    f"--bind-address={self.address}",
                    f"--secure-port={self.port}",
                    f"--advertise-address={self.address}",
                ),
                *(f"--cert-dir={self.dir / 'pki'}", f"--client-ca-file={pki.ca}"),
                *(f"--tls-cert-file={pki.serving_cert}", f"--tls-private-key-file={pki.serving_key}"),
                *(f"--token-auth-file={self.dir / 'pki' / 'tokens.csv'}", "--authorization-mode=Node,RBAC"),
                *(f"--service-cluster-ip-range={SERVICE_CIDR}", "--endpoint-reconciler-type=lease"),
                "--service-account-issuer=https://kubernetes.default.svc",
                f"--service-account-signing-key-file={pki.service_account_key}",
                f"--service-account-key-file={pki.service_account_key}",
                f"--kubelet-client-certificate={pki.kubelet_client_cert}",
                f"--kubelet-client-key={pki.kubelet_client_key}",
                "--kubelet-preferred-address-types=InternalIP",
                *(f"--audit-policy-file={policy}", f"--audit-log-path={self.audit_log}", "--audit-log-maxsize=2000"),
                *("--shutdown-delay-duration=0s", "--profiling=false", *self.extra_args),
            ],
            die_with_parent=not self.daemonise,
        )

    def ready(self) -> bool:
        """Whether /readyz answers 200."""
        return self.get("/readyz") is not None

    def get(self, path: str, *, timeout: float = 2.0) -> str | None:
        """GET a path as the administrator (seconds of `timeout`); None for anything but an answer below 400."""
        token = self.tokens.get("admin") or _token_of(self.kubeconfig)
        request = urllib.request.Request(f"{self.url}{path}", headers={"Authorization": f"Bearer {token}"})
        try:
            context = ssl.create_default_context(cafile=str(self.dir / "pki" / "ca.crt"))
            with urllib.request.urlopen(request, timeout=timeout, context=context) as answer:
                return str(answer.read().decode())
        except (OSError, urllib.error.URLError, ValueError):
            return None


def _token_of(kubeconfig: Path) -> str:
    return str(json.loads(kubeconfig.read_text())["users"][0]["user"]["token"])


def _listening(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _kubeconfig(url: str, ca: Path, token: str) -> dict[str, object]:
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "test", "cluster": {"server": url, "certificate-authority": str(ca)}}],
        "users": [{"name": "test", "user": {"token": token}}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        "current-context": "test",
    }
