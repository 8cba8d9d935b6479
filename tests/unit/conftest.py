"""The engine plugin before a small application that keeps adapters as vLLM does."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.plugin_pod import Pod
from tests.unit.plugin_support import install_vllm

# All that import vLLM, directly or not.
PARTS = ("vllm_adapter", "served_adapters", "loader", "reconciler", "plugin")


@pytest.fixture(scope="module")
def vllm() -> Iterator[dict[str, Any]]:
    """The plugin's modules, imported beside a stand-in for vLLM's two extension points; what it registered."""
    resolvers: dict[str, Any] = {}
    installed = install_vllm(resolvers)
    yield resolvers
    for name in [
        *installed,
        *(f"lora_operator.engine_plugin.{part}" for part in PARTS),
    ]:
        sys.modules.pop(name, None)


@pytest.fixture
def pod(tmp_path: Path, vllm: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Pod:
    return Pod(tmp_path, vllm, monkeypatch)


@pytest.fixture
def without_registry(pod: Pod, monkeypatch: pytest.MonkeyPatch) -> Pod:
    monkeypatch.setattr(pod.module, "find_registry", lambda app: None)
    return pod
