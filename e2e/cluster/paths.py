"""Where the tooling keeps what it makes: everything outside the work tree, below one cache folder.

The cache holds what a second run reuses (binaries, venvs, images); `cluster/` below it holds one running cluster and is
wiped when that ends. Nothing here may point into a home folder that only its owner may enter: pods run as other users
and read the engine's venv through a hostPath volume.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Iterable
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]


def cache_root() -> Path:
    """The cache folder: $LORA_OPERATOR_CACHE, else /var/cache/lora-operator for root and ~/.cache/lora-operator for others."""
    configured = os.environ.get("LORA_OPERATOR_CACHE")
    if configured:
        root = Path(configured).absolute()
    elif os.geteuid() == 0:
        root = Path("/var/cache/lora-operator")
    else:
        root = Path.home() / ".cache" / "lora-operator"
    root.mkdir(parents=True, exist_ok=True)
    return root


def cache_dir(name: str) -> Path:
    """A folder of the cache, made when missing and readable for every user."""
    path = cache_root() / name
    path.mkdir(parents=True, exist_ok=True)
    path.chmod(0o755)
    return path


def overlay_works() -> bool:
    """Whether overlay mounts can lie on the cache's file system; on another overlay (inside a container) they can't."""
    kind = subprocess.run(
        ["stat", "-fc", "%T", str(cache_root())], capture_output=True, text=True, check=True, timeout=30
    )
    return kind.stdout.strip() not in {"overlayfs", "UNKNOWN (0x794c7630)"}


def content_key(*parts: str | Path, relative_to: Path = REPO) -> str:
    """A short hash over strings and over files' names below `relative_to` and bytes (a folder counts with all files below it)."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            digest.update(b"s" + part.encode() + b"\0")
            continue
        for file in _files(part):
            digest.update(b"f" + str(file.relative_to(relative_to)).encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _files(path: Path) -> Iterable[Path]:
    if path.is_file():
        return [path]
    return sorted(
        file for file in path.rglob("*") if file.is_file() and "__pycache__" not in file.parts and file.suffix != ".pyc"
    )
