"""What is kept and told of a failing test: enough to find the cause from the output of a run on a machine that is gone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from e2e.cluster import Cluster, paths
from e2e.cluster.steps import tail
from e2e.cluster.teardown import COMPONENTS
from e2e.given import GivenCluster
from e2e.stack import OPERATOR_NAMESPACE, RELEASE, Stack

WARNINGS = 8  # as many of the newest events are shown, and lines of a log
_ALWAYS = (
    "MissingClusterDNS",
    "Unhealthy",
    "oom score",
    "no relationship found",
    "not found",
    "NotFound",
)  # seen on good days too
_GOOD = {"Ready": "True", "MemoryPressure": "False", "DiskPressure": "False", "PIDPressure": "False"}


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Keep what an engineer would look at first, say what is wrong with the cluster, and stop when it has broken."""
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    stack = getattr(item, "funcargs", {}).get("stack")
    if not report.failed or not isinstance(stack, Stack):
        return
    folder = paths.cache_dir("e2e-failures") / item.name.replace("/", "_")[:80]
    folder.mkdir(parents=True, exist_ok=True)
    _keep(stack, folder)
    dead = dead_components(stack.cluster)
    report.sections.append(("the cluster", "\n".join([*dead, *health(stack.cluster)])))
    report.sections.append(("what was kept", f"logs and objects of the cluster: {folder}"))
    if dead:
        item.session.shouldstop = "the cluster broke: " + "\n".join(dead)


def _keep(stack: Stack, folder: Path) -> None:
    kubectl = stack.cluster.kubectl
    from_operator = ("logs", f"deployment/{RELEASE}", "-n", OPERATOR_NAMESPACE, "--tail=2000")
    (folder / "operator.log").write_text(kubectl(*from_operator, check=False))
    kinds = "lora,vllm,mart,mcache,jobs,pods,nodes,events"
    (folder / "objects.yaml").write_text(kubectl("get", kinds, "-A", "-o", "yaml", check=False))
    for pod in json.loads(kubectl("get", "pods", "-A", "-o", "json", check=False) or '{"items": []}')["items"]:
        name, namespace = pod["metadata"]["name"], pod["metadata"]["namespace"]
        (folder / f"{name}.log").write_text(kubectl("logs", name, "-n", namespace, "--tail=1000", check=False))
    if not isinstance(stack.cluster, GivenCluster):
        for log in stack.cluster.logs.glob("*.log"):
            if log != stack.cluster.audit_log:
                (folder / log.name).write_text(tail(log, 2000))


def dead_components(cluster: Cluster) -> list[str]:
    """Each component of our own cluster that has ended, with the end of its log."""
    if isinstance(cluster, GivenCluster):
        return []
    daemons = [cluster.daemon(name) for name in COMPONENTS]
    return [f"{one.name} has ended\n{tail(one.log, WARNINGS)}" for one in daemons if one.pid is None]


def health(cluster: Cluster) -> list[str]:
    """What is not as it should be: conditions and taints of nodes, room, pods that don't run, the newest warnings."""
    listed = json.loads(cluster.kubectl("get", "nodes,pods,events", "-A", "-o", "json", check=False) or "{}")
    if not listed:
        return ["the API server does not answer"]
    found = [line for item in listed["items"] for line in _wrong(item)]
    events = [item for item in listed["items"] if item["kind"] == "Event" and item["type"] == "Warning"]
    events = [item for item in events if item["reason"] not in _ALWAYS]
    events.sort(key=lambda event: str(event.get("lastTimestamp") or event.get("eventTime") or ""))
    found += [f"{_named(one['involvedObject'])}: {one['reason']}: {one['message'][:300]}" for one in events[-WARNINGS:]]
    usage = shutil.disk_usage(paths.cache_root())
    memory = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    found.append(f"free on the disk: {usage.free >> 20} MiB; {' '.join(memory.split())}")
    if not isinstance(cluster, GivenCluster):
        kubelet = cluster.daemon("kubelet").log.read_text(errors="replace").splitlines()
        errors = [line for line in kubelet if line.startswith("E") and not any(word in line for word in _ALWAYS)]
        found += [f"kubelet: {line[:300]}" for line in errors[-WARNINGS:]]
    return found


def _wrong(item: dict[str, Any]) -> list[str]:
    """Lines on what is wrong with a node or pod."""
    status, name = item.get("status", {}), _named({"kind": item["kind"], **item["metadata"]})
    if item["kind"] == "Node":
        bad = [one for one in status.get("conditions", []) if _GOOD.get(one["type"], one["status"]) != one["status"]]
        lines = [f"{name}: {one['type']}={one['status']}: {one.get('message')}" for one in bad]
        return lines + [f"{name}: taint {taint['key']}" for taint in item["spec"].get("taints", [])]
    if item["kind"] != "Pod" or status.get("phase") == "Succeeded":
        return []
    bad = [one for one in status.get("conditions", []) if one["type"] in ("Ready", "PodScheduled")]
    lines = [f"{one['type']}={one['status']}: {one.get('message')}" for one in bad if one["status"] != "True"]
    for one in [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]:
        for state, detail in one["state"].items():
            if state != "running" and detail.get("reason") != "Completed":
                lines.append(f"{one['name']} {state}: {detail.get('reason')}: {str(detail.get('message'))[-300:]}")
    if "deletionTimestamp" in item["metadata"]:
        lines.append(f"to be gone since {item['metadata']['deletionTimestamp']}")
    return [f"{name} {status.get('phase')}: {line}" for line in lines]


def _named(reference: dict[str, Any]) -> str:
    return f"{reference['kind']} {reference.get('namespace', '')}/{reference['name']}"
