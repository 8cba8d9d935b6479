"""Reading engine pods: ready or not, whose, and why not, in words that tell what to do."""

from __future__ import annotations

from typing import Any

import pytest

from lora_operator.plan.pods import controller, engine_status, is_ready, pod_ip, problem, running_container
from tests.unit.builders import engine_pod

BARE: dict[str, Any] = {"metadata": {"name": "llama-0"}}


def waiting(reason: str, message: str | None = None, **more: Any) -> dict[str, Any]:
    return {"state": {"waiting": {"reason": reason} | ({"message": message} if message else {})}, **more}


def crashed(**terminated: Any) -> dict[str, Any]:
    return {"lastState": {"terminated": {"exitCode": 1, **terminated}}, "restartCount": 3}


PROBLEMS: dict[str, tuple[dict[str, Any], tuple[str, str] | None]] = {
    "a pod that serves": (engine_pod(), None),
    "a pod of which nothing is known": (BARE, None),
    "a pod whose engine loads its model": (
        engine_pod(is_ready=False, container={"ready": False, "state": {"running": {}}}),
        None,
    ),
    "no node": (
        engine_pod(
            is_ready=False,
            container={},
            conditions=(
                {"type": "PodScheduled", "status": "False", "message": "0/3 nodes: Insufficient nvidia.com/gpu"},
            ),
        ),
        ("Unschedulable", "pod llama-0: 0/3 nodes: Insufficient nvidia.com/gpu"),
    ),
    "no node, and the scheduler gives no reason": (
        engine_pod(is_ready=False, container={}, conditions=({"type": "PodScheduled", "status": "False"},)),
        ("Unschedulable", "pod llama-0: no node fits"),
    ),
    "an image that is not there": (
        engine_pod(is_ready=False, container=waiting("ErrImagePull", "manifest unknown")),
        ("ImagePull", "pod llama-0: ErrImagePull: manifest unknown"),
    ),
    "a Secret of the API key that is not there": (
        engine_pod(is_ready=False, container=waiting("CreateContainerConfigError", 'secret "key" not found')),
        ("CrashLooping", 'pod llama-0: CreateContainerConfigError: secret "key" not found'),
    ),
    "killed for its memory": (
        engine_pod(is_ready=False, container=waiting("CrashLoopBackOff") | crashed(reason="OOMKilled", exitCode=137)),
        (
            "OutOfMemory",
            "pod llama-0: the engine was killed for its memory use; raise engine.resources.limits.memory",
        ),
    ),
    "a crash loop, with the last lines": (
        engine_pod(
            is_ready=False,
            container=waiting("CrashLoopBackOff") | crashed(message="a\nb\nc\n\nd\n  ValueError: bad dtype \n"),
        ),
        (
            "CrashLooping",
            "pod llama-0: the engine exited with code 1 and was restarted 3 times; last lines: b | c | d | ValueError: bad dtype",
        ),
    ),
    "a crash loop without a word": (
        engine_pod(is_ready=False, container=waiting("CrashLoopBackOff") | crashed()),
        (
            "CrashLooping",
            "pod llama-0: the engine exited with code 1 and was restarted 3 times; last lines: none",
        ),
    ),
    "an engine that crashed once and serves again is none": (
        engine_pod(container={"ready": True, "state": {"running": {}}} | crashed()),
        None,
    ),
}


@pytest.mark.parametrize("case", PROBLEMS)
def test_problem(case: str) -> None:
    pod, expected = PROBLEMS[case]
    assert problem(pod) == expected


def test_a_long_last_line_is_cut() -> None:
    found = problem(engine_pod(is_ready=False, container=waiting("CrashLoopBackOff") | crashed(message="x" * 9000)))
    assert found is not None
    assert len(found[1]) < 1000


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
    crashing = waiting("CrashLoopBackOff") | {"containerID": "containerd://1"}
    assert running_container(engine_pod(container=crashing)) is None
    assert running_container(BARE) is None
    assert engine_status(BARE) == {}
    assert pod_ip(BARE) is None
    assert pod_ip(engine_pod()) == "198.18.0.7"


def test_a_sidecar_is_not_the_engine() -> None:
    pod = engine_pod(container={"ready": True, "state": {"running": {}}})
    pod["status"]["containerStatuses"].insert(0, {"name": "proxy", "state": {"waiting": {"reason": "ErrImagePull"}}})
    assert problem(pod) is None


def test_only_a_controlling_owner_is_one() -> None:
    other = {"kind": "Node", "name": "n", "uid": "u"}
    assert controller({"metadata": {"ownerReferences": [other]}}) is None
    assert controller({"metadata": {}}) is None
    owner = other | {"kind": "ReplicaSet", "controller": True}
    assert controller({"metadata": {"ownerReferences": [other, owner]}}) == ("ReplicaSet", "n", "u")
