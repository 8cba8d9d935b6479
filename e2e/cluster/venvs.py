"""Venvs beside the one that this program runs in: the engine's, and that of the tools which benchmarks compare with.

The engine's has torch, transformers, peft and vLLM for CPU, on Debian's Python. It is mounted into pods at the path it has here, through a hostPath volume, so its interpreter must be one that the base
image has too (/usr/bin/python3), and every folder above it must be open to other users.
"""

from __future__ import annotations

import stat
import sys
from functools import cache
from pathlib import Path

from e2e.cluster import binaries, paths
from e2e.cluster.steps import ToolingError, run_logged, step

_PYTHON = Path("/usr/bin/python3")


@cache
def engine_venv() -> Path:
    """The engine's venv, installed from the hashed requirements (6 GB; half a minute when uv has the wheels)."""
    requirements = paths.REPO / "requirements" / "engine.txt"
    venv = paths.cache_dir("venvs") / f"engine-{paths.content_key(requirements, str(_PYTHON.resolve()))}"
    if not _is_complete(venv):
        binaries.apt_packages()
        with step(f"installing vLLM, torch and peft into {venv}"):
            # Pods mount it read-only and could not keep compiled modules: without them each start takes 4 s longer.
            _make(venv, requirements, python=_PYTHON, options=("--compile-bytecode",))
    _require_searchable(venv)
    return venv


@cache
def bench_venv() -> Path:
    """A venv with the tools that benchmarks compare with, which need versions of libraries of their own."""
    requirements = paths.REPO / "requirements" / "bench.txt"
    venv = paths.cache_dir("venvs") / f"bench-{paths.content_key(requirements)}"
    if not _is_complete(venv):
        with step(f"installing what benchmarks compare with into {venv}"):
            _make(venv, requirements, python=Path(sys.executable))
    return venv


def dev_venv() -> Path:
    """The venv this program runs in."""
    return Path(sys.prefix)


def _is_complete(venv: Path) -> bool:
    return (venv / ".complete").exists()


def _make(venv: Path, requirements: Path, *, python: Path, options: tuple[str, ...] = ()) -> None:
    """A venv with exactly the hashed requirements; what an interrupted run left is made anew."""
    name, logs = requirements.stem, paths.cache_dir("logs")
    run_logged([binaries.uv(), "venv", "--clear", "--python", python, venv], log=logs / f"{name}-venv.log")
    install = [str(binaries.uv()), "pip", "install", "--python", f"{venv}/bin/python", "--no-deps", *options]
    run_logged([*install, "--require-hashes", "-r", str(requirements)], log=logs / f"{name}-install.log")
    (venv / ".complete").touch()


def _require_searchable(folder: Path) -> None:
    for path in (folder, *folder.parents):
        if not path.stat().st_mode & stat.S_IXOTH:
            raise ToolingError(f"pods run as other users and cannot enter {path}: set LORA_OPERATOR_CACHE elsewhere")
