"""A download's progress as users see it: on the artifact, on the adapter, in Events; and what that costs the API server."""

from __future__ import annotations

import asyncio
import itertools
import time
from datetime import datetime
from typing import Any

import pytest

from e2e.cluster import ControlPlane
from lora_operator.constants import FETCH_CONTAINER, Reason
from lora_operator.kube.kinds import EVENTS, JOBS, LORA_ADAPTERS, MODEL_ARTIFACTS, MODEL_CACHES, PODS
from lora_operator.wire.jobs import FetchProgress
from tests.component.reconcile_support import (
    NEVER,
    Json,
    OperatorsKube,
    World,
    failure,
    owner,
    running_operator,
    until,
)

MIB = 1 << 20


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What every Job's pod has logged last, and how often that was asked for; and the statuses that the operator wrote."""
    state: dict[str, Any] = {"line": None, "reads": 0, "writes": []}
    apply_status = OperatorsKube.apply_status

    async def pod_log(_self: OperatorsKube, _namespace: str, _name: str, **_: Any) -> str:
        state["reads"] += 1
        return state["line"].model_dump_json(by_alias=True) if state["line"] is not None else ""

    async def counted(self: OperatorsKube, rt: Any, *arguments: Any, **options: Any) -> Json:
        state["writes"].append((rt.kind, time.monotonic()))
        return await apply_status(self, rt, *arguments, **options)

    monkeypatch.setattr(OperatorsKube, "pod_log", pod_log)
    monkeypatch.setattr(OperatorsKube, "apply_status", counted)
    return state


async def run_pod(world: World, job: Json) -> None:
    """The Job's pod runs."""
    labels = job["spec"]["template"]["metadata"]["labels"]
    name = f"{job['metadata']['name']}-pod"
    metadata = {
        "name": name,
        "namespace": world.serving,
        "labels": labels,
        "ownerReferences": [owner("batch/v1", "Job", job)],
    }
    spec = {"restartPolicy": "Never", "containers": [{"name": FETCH_CONTAINER, "image": "x"}]}
    await world.kube.apply({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec})
    state = {"running": {"startedAt": "2026-01-01T00:00:00Z"}}
    container = {"name": FETCH_CONTAINER, "image": "x", "imageID": "x", "ready": True, "restartCount": 0}
    await world.kube.apply_status(
        PODS, world.serving, name, {"phase": "Running", "containerStatuses": [container | {"state": state}]}
    )


async def job_of(world: World, repo: str) -> Json:
    async def look() -> Json | None:
        for job in (await world.kube.list(JOBS, namespace=world.serving))[0]:
            if repo in str(job["spec"]["template"]["spec"]["containers"][0]["env"]):
                return job
        return None

    return await until(look, f"a Job for {repo}")


def times(statuses: list[Json]) -> list[float]:
    return [datetime.fromisoformat(status["progress"]["time"]).timestamp() for status in statuses]


async def watch(world: World, rt: Any, namespace: str, name: str, seen: list[Json]) -> None:
    """Every status with figures that a reader could see."""
    while True:
        status = (await world.find(rt, namespace, name) or {}).get("status") or {}
        if "progress" in status and (not seen or seen[-1]["progress"] != status["progress"]):
            seen.append(status)
        await asyncio.sleep(0.05)


async def test_progress_is_told_rarely_truly_and_not_at_all_while_nothing_moves(
    control_plane: ControlPlane, world: World, log: dict[str, Any]
) -> None:
    world.outcomes["org/sql"] = NEVER
    async with running_operator(control_plane):
        await world.make_fleet()
        await world.wait_for(
            MODEL_CACHES, "default", world.serving, "Ready", "True"
        )  # else it is what is waited for first
        await world.adapter("sql", world.team_a)
        job = await job_of(world, "org/sql")
        name = job["metadata"]["ownerReferences"][0]["name"]
        await run_pod(world, job)
        on_artifact: list[Json] = []
        on_adapter: list[Json] = []
        watches = [
            asyncio.create_task(watch(world, MODEL_ARTIFACTS, world.serving, name, on_artifact)),
            asyncio.create_task(watch(world, LORA_ADAPTERS, world.team_a, "sql", on_adapter)),
        ]
        began = time.monotonic()
        while len(on_adapter) < 2:
            done = int((time.monotonic() - began) * 10 * MIB)
            log["line"] = FetchProgress(
                phase="Downloading", bytes_done=done, bytes_total=4000 * MIB, bytes_per_second=10 * MIB
            )
            await asyncio.sleep(0.2)
            assert time.monotonic() - began < 60
        assert all(later - earlier >= 2 for earlier, later in itertools.pairwise(times(on_artifact)))
        assert all(later - earlier >= 10 for earlier, later in itertools.pairwise(times(on_adapter)))
        assert len(on_artifact) > len(on_adapter)
        for status in (on_artifact[-1], on_adapter[-1]):
            figures = status["progress"]
            assert (figures["rate"], figures["bytesTotal"]) == ("10MiB/s", 4000 * MIB)
            assert 0 < figures["etaSeconds"] <= 400
        conditions = {c["type"]: c["message"] for c in on_adapter[-1]["conditions"]}
        assert f"at 10MiB/s, {on_adapter[-1]['progress']['eta']} left" in conditions["Downloaded"]
        assert conditions["Ready"] == conditions["Downloaded"]

        await asyncio.sleep(2.5)  # what was logged last may still be told
        before, reads = len(log["writes"]), log["reads"]
        await asyncio.sleep(4.5)
        # Once at most for the adapter, whose figures may have been held back.
        assert {kind for kind, _ in log["writes"][before:]} <= {"LoRAAdapter"}
        assert 1 <= log["reads"] - reads <= 4
        for task in watches:
            task.cancel()
        await asyncio.wait(watches)

    events = (await world.kube.list(EVENTS, namespace=world.serving))[0]
    events.sort(
        key=lambda event: int(event["metadata"]["resourceVersion"])
    )  # they are listed by name, which has a hash
    told = [event["reason"] for event in events if event["involvedObject"]["name"] == name]
    assert told == ["Queued", "Downloading"]


async def test_start_end_and_failure_are_events(control_plane: ControlPlane, world: World, log: dict[str, Any]) -> None:
    world.outcomes["org/bad"] = failure(Reason.REPOSITORY_NOT_FOUND, "no such thing")
    async with running_operator(control_plane):
        await world.make_fleet()
        await world.wait_for(
            MODEL_CACHES, "default", world.serving, "Ready", "True"
        )  # else it is what is waited for first
        await world.adapter("good", world.team_a)
        await world.adapter("bad", world.team_a)
        await world.refused("bad", world.team_a, "RepositoryNotFound")
        await world.wait_for(LORA_ADAPTERS, "good", world.team_a, "Downloaded", "True")

        async def told() -> bool:
            found: dict[str, list[tuple[str, str]]] = {}
            for event in (await world.kube.list(EVENTS, namespace=world.serving))[0]:
                if event["involvedObject"]["kind"] == "ModelArtifact":
                    of = found.setdefault(event["involvedObject"]["name"].rpartition("-")[0], [])
                    of.append((event["type"], event["reason"]))
            good, bad = found.get("good", []), found.get("bad", [])
            return (
                ("Normal", "Queued") in good
                and ("Normal", "Ready") in good
                and ("Normal", "Queued") in bad
                and ("Warning", "RepositoryNotFound") in bad
            )

        await until(told, "Events of both downloads")
