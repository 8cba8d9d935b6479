"""Rust and what cargo builds: Hugging Face's own store of Xet for tests. Made when missing, in the cache, like all tools."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

from e2e.cluster import paths
from e2e.cluster.binaries import alone
from e2e.cluster.steps import ToolingError, run_logged, step

XET_VERSION = "1.8.0"  # of the crate xet-client; hf-xet of that number is in the operator's image
_RUST_MINIMUM = (1, 85)
_DEBIAN = ("cargo-web", "rustc-web")  # Debian 12's newer Rust, which its browsers are built with


@cache
def xet_store() -> Path:
    """The server that xet-client itself is tested with; 3 minutes to build once."""
    program = paths.cache_dir("tools") / f"xet-store-{XET_VERSION}" / "bin" / "local_cas_server"
    if program.exists():
        return program
    with alone():
        if program.exists():  # another program was first
            return program
        cargo, target = _cargo(), paths.cache_dir("build") / "xet-store"
        with step("building xet-store with cargo"):
            run_logged(
                [
                    *(str(cargo), "install", "xet-client", f"--version={XET_VERSION}", "--locked"),
                    *("--features=simulation", "--bin=local_cas_server"),
                    *(f"--root={program.parent.parent}", f"--target-dir={target}"),
                ],
                log=paths.cache_dir("logs") / "build-xet-store.log",
                env={"PATH": os.pathsep.join([str(cargo.parent), os.environ["PATH"]])},
                timeout=3600,
            )
        shutil.rmtree(target)
    return program


def _cargo() -> Path:
    """The machine's cargo when it is new enough, else Debian's."""
    for candidate in (shutil.which("cargo"), Path.home() / ".cargo" / "bin" / "cargo"):
        if candidate and Path(candidate).exists() and _version(Path(candidate)) >= _RUST_MINIMUM:
            return Path(candidate)
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise ToolingError(
            f"Rust {_RUST_MINIMUM[0]}.{_RUST_MINIMUM[1]} or later is missing, and only root can install it"
        )
    with step(f"installing {' '.join(_DEBIAN)}"):
        logs, env = paths.cache_dir("logs"), {"DEBIAN_FRONTEND": "noninteractive"}
        run_logged(["apt-get", "update"], log=logs / "apt-update.log", env=env)
        install = ["apt-get", "install", "-y", "--no-install-recommends", *_DEBIAN, "gcc", "libc6-dev"]
        run_logged(install, log=logs / "apt-install.log", env=env)
    return Path("/usr/bin/cargo")


def _version(cargo: Path) -> tuple[int, ...]:
    result = subprocess.run([str(cargo), "--version"], capture_output=True, text=True, check=False, timeout=60)
    match = re.search(r"cargo (\d+)\.(\d+)", result.stdout)
    return (int(match[1]), int(match[2])) if match else (0, 0)
