"""Reading engine pods: ready or not, and whose."""

from __future__ import annotations

from typing import Any

import pytest

from lora_operator.constants import ENGINE_CONTAINER
from lora_operator.kube.objects import KubeObject
from lora_operator.kube.pods import ContainerStatus, Pod
from tests.unit.builders import engine_pod

BARE: dict[str, Any] = {"metadata": {"name": "llama-0"}}

READY = {
    "ready": (engine_pod(), True),
    "not ready": (engine_pod(is_ready=False), False),
    "being deleted, whatever its condition": (engine_pod(deleted=True), False),
    "without a status": (BARE, False),
}


@pytest.mark.parametrize("case", READY)
def test_is_ready(case: str) -> None:
    pod, expected = READY[case]
    assert Pod.parse(pod).is_ready is expected


def test_a_container_that_does_not_run_has_no_id() -> None:
    bare = Pod.parse(BARE)
    assert Pod.parse(engine_pod()).running_engine == "containerd://1"
    crashing = {"state": {"waiting": {"reason": "CrashLoopBackOff"}}, "containerID": "containerd://1"}
    assert Pod.parse(engine_pod(container=crashing)).running_engine is None
    assert bare.running_engine is None
    assert bare.container(ENGINE_CONTAINER) == ContainerStatus(ENGINE_CONTAINER)
    assert bare.address is None
    assert Pod.parse(engine_pod()).address == "198.18.0.7"


def test_only_a_controlling_owner_is_one() -> None:
    other = {"kind": "Node", "name": "n", "uid": "u"}
    assert KubeObject.parse({"metadata": {"ownerReferences": [other]}}).owner is None
    assert KubeObject.parse({"metadata": {}}).owner is None
    owner = other | {"kind": "ReplicaSet", "controller": True}
    assert KubeObject.parse({"metadata": {"ownerReferences": [other, owner]}}).owner == ("ReplicaSet", "n", "u")
