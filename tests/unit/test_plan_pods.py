"""Reading engine pods: ready or not, and whose."""

from __future__ import annotations

from typing import Any

import pytest

from lora_operator.kube.objects import controller, engine_status, is_ready, pod_ip, running_container
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
    assert is_ready(pod) is expected


def test_a_container_that_does_not_run_has_no_id() -> None:
    assert running_container(engine_pod()) == "containerd://1"
    crashing = {"state": {"waiting": {"reason": "CrashLoopBackOff"}}, "containerID": "containerd://1"}
    assert running_container(engine_pod(container=crashing)) is None
    assert running_container(BARE) is None
    assert engine_status(BARE) == {}
    assert pod_ip(BARE) is None
    assert pod_ip(engine_pod()) == "198.18.0.7"


def test_only_a_controlling_owner_is_one() -> None:
    other = {"kind": "Node", "name": "n", "uid": "u"}
    assert controller({"metadata": {"ownerReferences": [other]}}) is None
    assert controller({"metadata": {}}) is None
    owner = other | {"kind": "ReplicaSet", "controller": True}
    assert controller({"metadata": {"ownerReferences": [other, owner]}}) == ("ReplicaSet", "n", "u")
