"""Typed views of bodies of any form: none makes a parser raise, and what is not said clearly is not claimed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_operator.kube.kinds import KINDS, OWN_KINDS, Kind
from lora_operator.kube.objects import Claim
from lora_operator.kube.pods import Pod
from lora_operator.kube.workloads import Job, Workload
from lora_operator.plan.job_view import has_ended, job_container, silent_object, view_job
from lora_operator.plan.pod_trouble import find_trouble
from lora_operator.plan.rollout import is_rolling
from lora_operator.reconcile.routing import keys_for
from lora_operator.reconcile.store import Store
from tests.unit.builders import CREATED, NOW, engine_pod, job_pod, make_job, make_workload

Path = tuple[str | int, ...]
STRANGE: tuple[Any, ...] = (
    None,
    5,
    -1,
    1.5,
    True,
    "x",
    "",
    [],
    [None, 5, "x", []],
    {},
    {"x": 5},
    [{"type": 5}],
    [[{}]],
)
ENDED = {"terminated": {"exitCode": 0, "message": "{}", "reason": "Completed"}}


def full_pod() -> dict[str, Any]:
    pod = engine_pod()
    port = {"name": "http", "containerPort": 8000}
    mounts = [{"name": "kit", "configMap": {"name": "kit"}}, {"name": "gate", "secret": {"secretName": "token"}}]
    pod["spec"] = {"nodeName": "n", "containers": [{"name": "vllm", "ports": [port]}], "volumes": mounts}
    pod["status"] |= {"startTime": CREATED, "initContainerStatuses": [{"name": "i", "state": ENDED}]}
    return pod


def full_workload() -> dict[str, Any]:
    counts: dict[str, Any] = {"replicas": 2, "updatedReplicas": 2, "readyReplicas": 2, "observedGeneration": 1}
    workload = make_workload(**counts, conditions=[{"type": "ReplicaFailure", "status": "True", "message": "quota"}])
    labels = {"metadata": {"labels": {"a": "b"}}, "spec": full_pod()["spec"]}
    return workload | {"spec": {"replicas": 2, "template": labels}}


def full_job() -> dict[str, Any]:
    job = make_job(complete=True)
    return job | {"status": job["status"] | {"startTime": CREATED}}


BODIES: dict[Kind, Callable[[], dict[str, Any]]] = {
    Kind.POD: full_pod,
    Kind.JOB: full_job,
    Kind.DEPLOYMENT: full_workload,
    Kind.CONFIG_MAP: make_workload,
    Kind.NAMESPACE: lambda: {"metadata": {"name": "serving", "labels": {"a": "b"}}},
}


def paths(value: Any, at: Path = ()) -> Iterator[Path]:
    """Of every part of a body."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, part in parts:
        yield (*at, name)
        yield from paths(part, (*at, name))


def with_part(body: dict[str, Any], path: Path, part: Any) -> dict[str, Any]:
    """The body with something else at one place."""
    changed: Any = copy.deepcopy(body)
    above = changed
    for name in path[:-1]:
        above = above[name]
    above[path[-1]] = part
    return dict(changed)


@pytest.mark.parametrize("kind", BODIES)
def test_no_form_of_any_part_makes_the_store_or_a_plan_raise(kind: Kind) -> None:
    body = BODIES[kind]()
    for path in paths(body):
        for part in STRANGE:
            store = Store()
            change = store.upsert(kind, with_part(body, path, part))
            assert change is not None
            keys_for(change, store)
            pods, workloads, jobs = ([*found.values()] for found in (store.pods, store.workloads, store.jobs))
            for workload in [*workloads, None]:
                find_trouble(pods, workload, warnings={}, now=NOW)
                is_rolling(workload, None)
            for job in jobs or [Job.parse(make_job())]:
                view_job(job, pods, now=NOW)
                silent_object(job, pods, now=NOW)


@given(body=st.dictionaries(st.sampled_from(["metadata", "spec", "status", "x"]), st.sampled_from(STRANGE)))
def test_nor_does_a_body_of_any_form(body: dict[str, Any]) -> None:
    for kind, info in KINDS.items():
        if kind not in OWN_KINDS:
            assert info.view.parse(body).name == ""
    Claim.parse(body)


Claims = dict[str, tuple[type[Pod | Job | Workload], Callable[[], dict[str, Any]], Callable[[Any], object], set[Path]]]
CLAIMED: Claims = {
    "a Job has ended": (
        *(Job, full_job, lambda job: has_ended(job, (), now=NOW)),
        {("status", "conditions", 0, "type"), ("status", "conditions", 0, "status")},
    ),
    "a pod is ready": (
        *(Pod, engine_pod, lambda pod: pod.is_ready),
        {("status", "conditions", 0, "type"), ("status", "conditions", 0, "status")},
    ),
    "an engine runs": (
        *(Pod, engine_pod, lambda pod: pod.running_engine is not None),
        {("status", "containerStatuses", 0, name) for name in ("name", "containerID")}
        | {("status", "containerStatuses", 0, "state", "running")},
    ),
    "a Job's container has ended": (
        *(Pod, lambda: job_pod(ENDED), lambda pod: job_container(pod).ended is not None),
        {("status", "containerStatuses", 0, "name"), ("status", "containerStatuses", 0, "state", "terminated")},
    ),
    "a pod has ended": (
        *(Pod, lambda: engine_pod(phase="Failed"), lambda pod: pod.has_ended),
        {("status", "phase")},
    ),
    "pods are refused": (
        *(Workload, full_workload, lambda workload: find_trouble((), workload, warnings={}, now=NOW)),
        {("status", "conditions", 0, "type"), ("status", "conditions", 0, "status")},
    ),
    "it has an owner of ours": (
        *(Workload, make_workload, lambda workload: workload.is_controlled_by("uid-llama")),
        {("metadata", "ownerReferences", 0, "uid")},
    ),
}


@pytest.mark.parametrize("claim", CLAIMED)
def test_what_is_not_said_clearly_is_not_claimed(claim: str) -> None:
    view, build, claimed, needed = CLAIMED[claim]
    assert claimed(view.parse(build()))
    for path in {need[: length + 1] for need in needed for length in range(len(need))}:
        for part in STRANGE:
            if path[-1] == "containerID" and part == "x":
                continue  # as good a name as any
            if path[-1] in ("running", "terminated") and isinstance(part, dict):
                continue  # it says so, and no more
            assert not claimed(view.parse(with_part(build(), path, part))), (path, part)


def test_a_time_of_no_time_zone_is_none() -> None:
    pod = engine_pod()
    pod["metadata"] |= {"creationTimestamp": "2026-01-01T00:00:00", "deletionTimestamp": "2026-01-01"}
    found = Pod.parse(pod)
    assert (found.created, found.gone_by, found.is_deleting) == (None, None, True)
