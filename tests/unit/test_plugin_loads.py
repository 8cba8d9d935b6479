"""A load that the engine does not answer, or does not outlive: what probes are told, and what the next process leaves out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_operator.engine_plugin.launcher import plan_start
from lora_operator.engine_plugin.plugin_settings import PluginSettings
from tests.unit.plugin_pod import Pod
from tests.unit.plugin_support import TOKEN

READY, HEALTH = "/lora-operator/ready", "/health"


@pytest.fixture
def impatient(pod: Pod, monkeypatch: pytest.MonkeyPatch) -> Pod:
    """A pod that waits for 0.1 s where others wait for 60, and for 0.4 s where others wait for 300."""
    for module in (pod.module, pod.loader):
        monkeypatch.setattr(module, "UNREADY_SECONDS", 0.1)
    monkeypatch.setattr(pod.module, "DEAD_SECONDS", 0.4)
    monkeypatch.setattr(pod.module, "_LOOK_SECONDS", 0.02)
    return pod


async def probe(pod: Pod, path: str) -> int:
    status, _ = await pod.call("GET", path)
    return int(status)


async def becomes(pod: Pod, path: str, status: int) -> None:
    async def holds() -> bool:
        return await probe(pod, path) == status

    await pod.eventually(holds)


async def left_out(pod: Pod) -> set[str]:
    return {one["name"] for one in (await pod.state())["failures"] if "while it loaded" in one["message"]}


def static(pod: Pod) -> list[str]:
    """What the launcher would pass to the engine."""
    return [entry.name for entry in plan_start(PluginSettings.read(os.environ)).static]


async def test_an_engine_that_does_not_answer_a_load_is_not_ready_then_dead_and_comes_back_without_it(
    impatient: Pod,
) -> None:
    pod = impatient
    one, two = pod.adapter("one"), pod.adapter("two")
    pod.engine.hangs.add(two)
    async with pod.running():
        assert (await probe(pod, READY), await probe(pod, HEALTH)) == (200, 200)
        await pod.put({"good": one, "hangs": two}, wait=0)
        await becomes(pod, READY, 503)
        assert await probe(pod, HEALTH) == 200, "requests that run may still end"
        (failure,) = (await pod.state())["failures"]
        assert (failure["name"], failure["stage"]) == ("hangs", "engine")
        assert "has not answered" in failure["message"]
        await becomes(pod, HEALTH, 503)
        assert await probe(pod, "/ping") == 503
    assert static(pod) == ["good"]
    for start in range(3):  # the record does not lapse with the first start
        pod.restart()
        pod.engine.hangs.add(two)
        async with pod.running():
            assert set(pod.engine.registry) == {"good"}, start
            assert await left_out(pod) == {"hangs"}
            assert await probe(pod, READY) == 200
        assert static(pod) == ["good"]


async def test_content_is_left_out_under_whatever_name_until_it_leaves_the_list(impatient: Pod) -> None:
    pod = impatient
    one, two = pod.adapter("one"), pod.adapter("two")
    pod.engine.hangs.add(two)
    async with pod.running():
        await pod.put({"hangs": two}, wait=0)
        await becomes(pod, HEALTH, 503)
    pod.restart()
    async with pod.running():
        state = await pod.put({"hangs": two, "again": two, "good": one})
        assert {module["name"] for module in state["loaded"]} == {"good"}
        assert await left_out(pod) == {"hangs", "again"}
        await pod.put({"again": two})
        assert await left_out(pod) == {"again"}
        await pod.put({"again": one})
        state = await pod.put({"again": two})
        assert (state["failures"], state["loaded"][0]["path"]) == ([], two)


async def test_an_engine_that_hangs_while_it_starts_ends_for_no_probe_could_see_it(impatient: Pod) -> None:
    pod = impatient
    one, two = pod.adapter("one"), pod.adapter("two")
    (pod.root / "state" / "modules.json").write_text(json.dumps(pod.body({"hangs": two, "good": one})))
    pod.engine.hangs.add(two)
    async with pod.running(answer="lifespan.startup.failed"):
        pass
    pod.restart()
    async with pod.running():
        assert set(pod.engine.registry) == {"good"}
        assert await left_out(pod) == {"hangs"}


async def test_a_load_that_ends_the_engine_is_not_tried_by_the_next_process(pod: Pod) -> None:
    one, two = pod.adapter("one"), pod.adapter("two")
    pod.engine.kills.add(two)
    async with pod.running():
        await pod.put({"killer": two, "good": one})
    pod.restart()
    pod.engine.kills.add(two)
    async with pod.running():
        assert await left_out(pod) == {"killer"}
        assert (set(pod.engine.registry), pod.engine.health) == ({"good"}, 200)


async def test_what_was_being_loaded_when_the_process_was_killed_is_left_out(pod: Pod) -> None:
    one, two = pod.adapter("one"), pod.adapter("two")
    (pod.root / "state" / "modules.json").write_text(json.dumps(pod.body({"killer": one, "good": two})))
    (pod.root / "state" / "loading.json").write_text(json.dumps({"name": "killer", "path": one}))
    assert static(pod) == ["good"]
    async with pod.running():
        assert set(pod.engine.registry) == {"good"}
        assert await left_out(pod) == {"killer"}
        assert [one["name"] for one in (await pod.put({"killer": two}))["loaded"]] == ["killer"]
    assert not (pod.root / "state" / "loading.json").exists()


async def test_a_server_that_is_shut_down_in_a_load_blames_nothing(pod: Pod) -> None:
    path = pod.adapter("one")
    pod.engine.slow = 3600
    async with pod.running():
        await pod.put({"sql": path}, wait=0)

        async def loading() -> bool:
            return (pod.root / "state" / "loading.json").exists()

        await pod.eventually(loading)
    pod.restart()
    async with pod.running():
        assert set(pod.engine.registry) == {"sql"}


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"suspects": [1]}', b"[" * 100_000])
async def test_damaged_records_are_none(pod: Pod, content: bytes) -> None:
    for name in ("loading.json", "suspects.json"):
        (pod.root / "state" / name).write_bytes(content)
    async with pod.running():
        await pod.put({"sql": pod.adapter("one")})
        assert set(pod.engine.registry) == {"sql"}


async def test_a_slow_load_is_no_hanging_one(impatient: Pod) -> None:
    pod = impatient
    path = pod.adapter("one")
    async with pod.running():
        pod.engine.slow = 0.3
        await pod.put({"sql": path}, wait=0)
        await becomes(pod, READY, 503)
        await becomes(pod, READY, 200)
        assert (await pod.state())["failures"] == []
    pod.restart()
    async with pod.running():
        assert set(pod.engine.registry) == {"sql"}


async def test_a_dead_engine_is_dead_to_both_probes(pod: Pod) -> None:
    async with pod.running():
        pod.engine.health = 503
        assert (await probe(pod, READY), await probe(pod, HEALTH)) == (503, 503)
        calls = len(pod.engine.calls)
        assert (await pod.call("POST", READY))[0] == 401, "only to be read"
        assert (await pod.call("GET", READY, token="wrong"))[0] == 403
        assert (await pod.call("GET", "/lora-operator/v1/state", token=TOKEN))[0] == 200
        assert len(pod.engine.calls) == calls


PROGRAM = """
import sys, time
from pathlib import Path
from lora_operator.engine_plugin import loads

loads.DEAD_SECONDS = loads.STATIC_SECONDS = 0.1
listens = loads.watch_static(Path(sys.argv[1]))
if sys.argv[2] == "listens":
    listens.set()
time.sleep(float(sys.argv[3]))
"""


@pytest.mark.parametrize(
    ("marker", "does", "seconds", "status"),
    [('{"static": 2}', "hangs", "60", 1), ('{"static": 2}', "listens", "3", 0), ("", "hangs", "3", 0)],
)
def test_a_start_that_hangs_in_the_adapters_of_its_arguments_ends(
    tmp_path: Path, marker: str, does: str, seconds: str, status: int
) -> None:
    (tmp_path / "starting.json").write_text(marker)
    argv = [sys.executable, "-c", PROGRAM, str(tmp_path / "starting.json"), does, seconds]
    done = subprocess.run(
        argv, capture_output=True, text=True, timeout=50, check=False, cwd=Path(__file__).parents[2] / "operator"
    )
    assert done.returncode == status
    assert ("not loaded after 0 s: the next start passes none" in done.stderr) == bool(status)
