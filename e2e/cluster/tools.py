"""Every tool by name: each is a function that returns a path and makes the thing when it is missing."""

from __future__ import annotations

from e2e.cluster.binaries import apt_packages, fake_gcs_server, go, helm, kube, kubectl, kwok, registry, uv, versitygw
from e2e.cluster.cargo import xet_store
from e2e.cluster.images import BASE_IMAGE, PAUSE_IMAGE, Image, base_image, operator_image, pause_image
from e2e.cluster.npm import azurite
from e2e.cluster.venvs import bench_venv, dev_venv, engine_venv

__all__ = [
    "BASE_IMAGE",
    "PAUSE_IMAGE",
    "Image",
    "apt_packages",
    "azurite",
    "base_image",
    "bench_venv",
    "dev_venv",
    "engine_venv",
    "fake_gcs_server",
    "go",
    "helm",
    "kube",
    "kubectl",
    "kwok",
    "operator_image",
    "pause_image",
    "registry",
    "uv",
    "versitygw",
    "xet_store",
]
