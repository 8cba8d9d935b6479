"""Why engine pods don't run: for every shape that Kubernetes gives a pod, the reason and the words that an engineer reads."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Any

import pytest

from lora_operator.conditions import Verdict
from lora_operator.kube.pods import Pod
from lora_operator.kube.workloads import Workload
from lora_operator.plan import pod_trouble
from tests.unit.builders import NOW, engine_pod, make_workload

Words = tuple[str, str]
UNSCHEDULED = {"type": "PodScheduled", "status": "False", "message": "0/3 nodes: Insufficient nvidia.com/gpu"}
WHAT_TO_DO = "free or add what it asks for, or change spec.engine.resources or spec.podTemplate"
CHECK_IMAGE = "check the image's name, its registry and imagePullSecrets"
REFUSED = "raise the quota, or ask for less: see spec.engine and spec.podTemplate"
BY_POLICY = "change what is refused, or the policy that refuses it: see spec.engine and spec.podTemplate"


def at(seconds: float) -> str:
    """A time, by seconds before NOW."""
    return (NOW - timedelta(seconds=seconds)).isoformat()


def waiting(reason: str, message: str | None = None, **more: Any) -> dict[str, Any]:
    return {"state": {"waiting": {"reason": reason} | ({"message": message} if message else {})}, **more}


def crashed(**terminated: Any) -> dict[str, Any]:
    return {"lastState": {"terminated": {"exitCode": 1, **terminated}}, "restartCount": 3}


def find_trouble(
    pods: Iterable[dict[str, Any]], workload: dict[str, Any] | None, *, warnings: dict[str, str], now: datetime
) -> Verdict | None:
    """Of pods and a Deployment as the API server sends them."""
    parsed = Workload.parse(workload) if workload is not None else None
    return pod_trouble.find_trouble(map(Pod.parse, pods), parsed, warnings=warnings, now=now)


def is_setting_up(pod: dict[str, Any], **more: Any) -> bool:
    return pod_trouble.is_setting_up(Pod.parse(pod), **more)


def down(container: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A pod whose engine's container is like this."""
    return engine_pod(is_ready=False, container={"ready": False, **container}, **more)


def beside(name: str, container: dict[str, Any], *, init: bool = False) -> dict[str, Any]:
    """A pod with a further container like this; an engine behind an init container has not begun, else it runs."""
    pod = down(waiting("PodInitializing") if init else {"ready": True, "state": {"running": {}}})
    kind = "initContainerStatuses" if init else "containerStatuses"
    pod["status"].setdefault(kind, []).append({"name": name, "ready": False, **container})
    return pod


def set_up(*, since: float, sandbox: bool | None = None) -> dict[str, Any]:
    """A pod that its node has had for so long, with no container made."""
    conditions = () if sandbox is None else ({"type": "PodReadyToStartContainers", "status": str(sandbox)},)
    pod = down(waiting("ContainerCreating"), phase="Pending", conditions=conditions)
    pod["status"]["startTime"] = at(since)
    return pod


def lost_node() -> dict[str, Any]:
    pod = down({"ready": True, "state": {"running": {}}})
    pod["spec"] = {"nodeName": "gpu-7"}
    return pod


PODS: dict[str, tuple[dict[str, Any], Words | None]] = {
    "a pod that serves": (engine_pod(), None),
    "a pod of which nothing is known": ({"metadata": {"name": "llama-0"}}, None),
    "an engine that loads its model": (down({"state": {"running": {}}}), None),
    "a pod that is being deleted": (down(waiting("ErrImagePull"), deleted=True), None),
    "no node": (
        engine_pod(is_ready=False, container={}, conditions=(UNSCHEDULED,)),
        ("Unschedulable", f"pod llama-0: 0/3 nodes: Insufficient nvidia.com/gpu; {WHAT_TO_DO}"),
    ),
    "no node, and the scheduler gives no reason": (
        engine_pod(is_ready=False, container={}, conditions=({"type": "PodScheduled", "status": "False"},)),
        ("Unschedulable", f"pod llama-0: no node fits; {WHAT_TO_DO}"),
    ),
    "an image that is not there": (
        down(waiting("ErrImagePull", "manifest\n  unknown")),
        ("ImagePull", f"pod llama-0: the engine: ErrImagePull: manifest unknown; {CHECK_IMAGE}"),
    ),
    "an image that went while the engine crashed": (
        down(waiting("ImagePullBackOff", "back-off") | crashed(message="boom")),
        ("ImagePull", f"pod llama-0: the engine: ImagePullBackOff: back-off; {CHECK_IMAGE}"),
    ),
    "a sidecar's image": (
        beside("proxy", waiting("InvalidImageName", "bad")),
        ("ImagePull", f"pod llama-0: container proxy: InvalidImageName: bad; {CHECK_IMAGE}"),
    ),
    "a Secret of the API key that is not there": (
        down(waiting("CreateContainerConfigError", 'secret "key" not found')),
        (
            "PodNotStarted",
            'pod llama-0: the engine: CreateContainerConfigError: secret "key" not found; it is tried again until that is there',
        ),
    ),
    "a problem of a kubelet to come": (
        down(waiting("SomethingNew")),
        ("PodNotStarted", "pod llama-0: the engine: SomethingNew: no message; it is tried again until that is there"),
    ),
    "a program that is not in the image": (
        down(
            waiting("CrashLoopBackOff") | crashed(reason="StartError", exitCode=128, message='exec: "vllm": not found')
        ),
        ("PodNotStarted", 'pod llama-0: the engine can\'t be started: exec: "vllm": not found'),
    ),
    "the same between two tries": (
        down(waiting("RunContainerError", "x") | crashed(reason="StartError", exitCode=128, message="not found")),
        ("PodNotStarted", "pod llama-0: the engine can't be started: not found"),
    ),
    "killed for its memory": (
        down(waiting("CrashLoopBackOff") | crashed(reason="OOMKilled", exitCode=137)),
        (
            "OutOfMemory",
            "pod llama-0: the engine was killed for its memory use; raise spec.engine.resources.limits.memory",
        ),
    ),
    "killed for its memory before it was made": (
        down(
            crashed(reason="StartError", exitCode=128, message="container init was OOM-killed (memory limit too low?)")
        ),
        (
            "OutOfMemory",
            "pod llama-0: the engine was killed for its memory use; raise spec.engine.resources.limits.memory",
        ),
    ),
    "a sidecar killed for its memory": (
        beside("proxy", crashed(reason="OOMKilled")),
        (
            "OutOfMemory",
            "pod llama-0: container proxy was killed for its memory use; raise its memory limit in podTemplate",
        ),
    ),
    "the first exit, before Kubernetes starts it again": (
        down(
            {
                "state": {"terminated": {"exitCode": 2, "message": "error: unrecognized arguments: --nonsense"}},
                "restartCount": 0,
            }
        ),
        (
            "CrashLooping",
            "pod llama-0: the engine exited with code 2; last lines: error: unrecognized arguments: --nonsense",
        ),
    ),
    "a crash loop, with the last lines": (
        down(waiting("CrashLoopBackOff") | crashed(message="a\nb\nc\n\nd\n  ValueError: bad dtype \n")),
        (
            "CrashLooping",
            "pod llama-0: the engine exited with code 1 and was restarted 3 times; last lines: b | c | d | ValueError: bad dtype",
        ),
    ),
    "the same while it tries again": (
        down({"state": {"running": {"startedAt": "T"}}} | crashed(message="ValueError: bad dtype")),
        (
            "CrashLooping",
            "pod llama-0: the engine exited with code 1 and was restarted 3 times, last at T; last lines: ValueError: bad dtype",
        ),
    ),
    "a crash loop without a word": (
        down(waiting("CrashLoopBackOff") | crashed()),
        (
            "CrashLooping",
            "pod llama-0: the engine exited with code 1 and was restarted 3 times; last lines: none "
            "(see kubectl logs llama-0 --previous)",
        ),
    ),
    "an engine that just ends": (
        down(crashed(exitCode=0, message="bye")),
        ("CrashLooping", "pod llama-0: the engine exited with code 0 and was restarted 3 times; last lines: bye"),
    ),
    "a kill without a cause": (
        down(crashed(exitCode=137, reason="Error", message="x")),
        (
            "CrashLooping",
            "pod llama-0: the engine exited with code 137 (SIGKILL: by its liveness probe, or for the node's memory) "
            "and was restarted 3 times; last lines: x",
        ),
    ),
    "an init container that fails": (
        beside("prepare", waiting("CrashLoopBackOff") | crashed(), init=True),
        (
            "CrashLooping",
            "pod llama-0: container prepare exited with code 1 and was restarted 3 times; last lines: none "
            "(see kubectl logs llama-0 -c prepare --previous)",
        ),
    ),
    "an init container that has done its work": (
        beside("prepare", {"ready": True, "state": {"terminated": {"exitCode": 0}}}, init=True),
        None,
    ),
    "an engine that crashed once and serves again": (
        engine_pod(container={"ready": True, "state": {"running": {}}} | crashed()),
        None,
    ),
    "volumes that are being mounted": (set_up(since=3), None),
    "volumes that are still being mounted, and Events say why": (
        set_up(since=6),
        ("PodNotStarted", 'pod llama-0: FailedMount: configmap "x" not found; it is tried again until that is there'),
    ),
    "an image that is being pulled for long": (set_up(since=600, sandbox=True), None),
    "a node that is lost": (
        lost_node(),
        (
            "Progressing",
            "pod llama-0: its containers are ready and the pod is not: node gpu-7 is lost, or a readiness gate is not met",
        ),
    ),
}


@pytest.mark.parametrize("case", PODS)
def test_find_trouble(case: str) -> None:
    pod, expected = PODS[case]
    found = find_trouble([pod], None, warnings={"uid-pod": 'FailedMount: configmap "x" not found'}, now=NOW)
    assert (found and (found.reason, found.message)) == expected


def test_what_will_not_pass_is_told_before_what_may() -> None:
    slow, stuck = set_up(since=60), down(waiting("ErrImagePull", "no"), name="llama-1")
    for pods in ([slow, stuck], [stuck, slow]):
        found = find_trouble(pods, None, warnings={}, now=NOW)
        assert found is not None
        assert found.reason == "ImagePull"


def test_a_slow_set_up_is_told_without_an_event_too() -> None:
    found = find_trouble([set_up(since=31)], None, warnings={}, now=NOW)
    assert found is not None
    assert found.reason == "Progressing"
    assert found.message == (f"pod llama-0: its volumes and network are being set up since {at(31)}; see its Events")


def test_a_pod_that_no_node_has_is_not_being_set_up() -> None:
    assert not is_setting_up(engine_pod(is_ready=False, container={}), now=NOW, seconds=0)
    assert not is_setting_up(engine_pod(), now=NOW, seconds=0)
    assert is_setting_up(set_up(since=1, sandbox=False), now=NOW, seconds=0)


def test_long_last_lines_are_cut() -> None:
    found = find_trouble([down(waiting("CrashLoopBackOff") | crashed(message="x" * 9000))], None, warnings={}, now=NOW)
    assert found is not None
    assert len(found.message) < 1000


def refusing(message: str | None) -> dict[str, Any]:
    return make_workload(conditions=[{"type": "ReplicaFailure", "status": "True", "message": message}])


def test_quota_and_admission_speak_for_themselves() -> None:
    found = find_trouble([], refusing('pods "llama-x" is forbidden: exceeded quota'), warnings={}, now=NOW)
    assert found is not None
    assert (found.reason, found.message) == (
        "PodsRefused",
        f'pods "llama-x" is forbidden: exceeded quota; {REFUSED}',
    )
    silent = find_trouble([], refusing(None), warnings={}, now=NOW)
    assert silent is not None
    assert silent.message == f"the API server refuses the pods; {BY_POLICY}"
    over = make_workload(conditions=[{"type": "ReplicaFailure", "status": "False", "message": "old"}])
    assert find_trouble([], over, warnings={}, now=NOW) is None


def evicted(*, before: float) -> dict[str, Any]:
    pod = engine_pod(
        "llama-old",
        uid="uid-old",
        is_ready=False,
        phase="Failed",
        container={},
        conditions=(
            {
                "type": "DisruptionTarget",
                "status": "True",
                "reason": "TerminationByKubelet",
                "lastTransitionTime": at(before),
            },
        ),
    )
    pod["status"] |= {"reason": "Evicted", "message": "The node was low on resource: memory."}
    return pod


def made(*, before: float, **more: Any) -> dict[str, Any]:
    pod = engine_pod(is_ready=False, **more)
    pod["metadata"]["creationTimestamp"] = at(before)
    return pod


BEFORE = "pod llama-old before it: Evicted: The node was low on resource: memory."


def test_what_ended_a_pod_is_told_while_its_replacement_starts() -> None:
    found = find_trouble([evicted(before=40), made(before=39)], None, warnings={}, now=NOW)
    assert found is not None
    assert (found.reason, found.message) == ("Progressing", BEFORE)


def test_and_beside_what_keeps_the_replacement_from_a_node() -> None:
    new = made(before=39, container={}, conditions=(UNSCHEDULED,))
    found = find_trouble([evicted(before=40), new], None, warnings={}, now=NOW)
    assert found is not None
    assert found.reason == "Unschedulable"
    assert found.message.endswith(f"; {BEFORE}")


def test_a_preempted_pod_is_told_while_it_ends() -> None:
    victim = engine_pod(
        "llama-old",
        deleted=True,
        conditions=(
            {
                "type": "DisruptionTarget",
                "status": "True",
                "reason": "PreemptionByScheduler",
                "message": "preempting to accommodate a higher priority pod",
                "lastTransitionTime": at(2),
            },
        ),
    )
    found = find_trouble([victim, made(before=1)], None, warnings={}, now=NOW)
    assert found is not None
    assert found.message == (
        "pod llama-old before it: PreemptionByScheduler: preempting to accommodate a higher priority pod"
    )


def test_an_end_of_long_ago_explains_nothing() -> None:
    assert find_trouble([evicted(before=4000), made(before=39)], None, warnings={}, now=NOW) is None
    assert find_trouble([evicted(before=40), engine_pod()], None, warnings={}, now=NOW) is None, "all serve"
