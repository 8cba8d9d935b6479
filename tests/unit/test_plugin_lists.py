"""What the plugin makes of module lists: those that come by HTTP or are mounted, Lazy entries, and those in the arguments (updateStrategy Rollout)."""

from __future__ import annotations

import asyncio
import gzip
import json
import shutil
from pathlib import Path

import pytest

from lora_operator.engine_plugin.list_file import parse_list
from tests.unit.plugin_pod import Pod
from tests.unit.plugin_support import TOKEN, good_adapter

# Lists


async def test_a_list_is_on_disk_before_it_is_acknowledged_and_an_older_one_is_refused(pod: Pod) -> None:
    one = pod.adapter("one")
    async with pod.running():
        raw = gzip.compress(json.dumps(pod.body({"sql": one}, generation=8)).encode())
        assert (await pod.call("PUT", "/lora-operator/v1/modules", raw, token=TOKEN))[0] == 200
        assert json.loads((pod.root / "state" / "modules.json").read_text())["generation"] == 8
        status, state = await pod.call("PUT", "/lora-operator/v1/modules", pod.body({}, generation=7), token=TOKEN)
        assert (status, state["listGeneration"]) == (409, 8)
        await pod.put({}, generation=8)
        assert pod.engine.registry == {}


NO_LISTS: dict[str, bytes] = {
    "nothing": b"",
    "no JSON": b"{",
    "no object": b"[]",
    "no generation": b'{"version": 1, "modules": []}',
    "a generation that is true": b'{"version": 1, "generation": true, "modules": []}',
    "half a gzip": gzip.compress(b"{}")[:-6],
    "a bomb": gzip.compress(b" " * (33 << 20)),
}


@pytest.mark.parametrize("case", NO_LISTS)
async def test_what_is_no_list_changes_nothing(pod: Pod, case: str) -> None:
    raw = NO_LISTS[case]
    async with pod.running():
        await pod.put({"sql": pod.adapter("one")})
        assert (await pod.call("PUT", "/lora-operator/v1/modules", raw, token=TOKEN))[0] == 400
        assert set(pod.engine.registry) == {"sql"}


async def test_a_list_that_is_too_long_is_not_read_to_its_end(pod: Pod, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pod.module, "LIST_BYTES", 100)
    async with pod.running():
        assert (await pod.call("PUT", "/lora-operator/v1/modules", b" " * 101, token=TOKEN))[0] == 413


async def test_a_newer_mounted_list_is_seen_when_a_client_asks_for_its_name(
    pod: Pod, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_operator.engine_plugin.list_source.REREAD_SECONDS", 0.0)
    async with pod.running():
        await pod.put({"sql": pod.adapter("one")})
        body = pod.body({"sql": pod.adapter("one"), "new": pod.adapter("two")})
        (pod.root / "modules.json.gz").write_bytes(gzip.compress(json.dumps(body).encode()))
        assert await pod.ask("new") == 200
        assert await pod.ask("unknown") == 404
        assert (await pod.state())["listGeneration"] == 2


async def test_the_list_that_is_held_is_told_to_an_operator_that_has_lost_it(pod: Pod) -> None:
    one = pod.adapter("one")
    body = pod.body({"sql": one, "lazy": pod.adapter("two"), "tiny/base": one}, lazy={"lazy"}, generation=7)
    body["modules"][0]["uid"] = "uid-sql"
    async with pod.running():
        nothing = await pod.call("GET", "/lora-operator/v1/modules", token=TOKEN)
        assert nothing == (200, {"generation": 0, "modules": []})
        await pod.call("PUT", "/lora-operator/v1/modules", body, token=TOKEN)
        status, told = await pod.call("GET", "/lora-operator/v1/modules", token=TOKEN)
        assert (status, told["generation"]) == (200, 7)
        assert [entry["name"] for entry in told["modules"]] == ["sql", "lazy"], "without what can't be used"
        assert told["modules"][0] == {
            "name": "sql",
            "path": one,
            "baseModelName": "tiny/base",
            "revision": "abcdef0123",
            "uid": "uid-sql",
        }
        assert (await pod.call("GET", "/lora-operator/v1/modules"))[0] == 401


def test_entries_that_cannot_be_used_are_named_and_the_others_stay() -> None:
    modules = [
        {"name": name, "path": "/cache/x"}
        for name in ("ok", "ok", "tiny/base", "a,b", "@lora-operator-x", "-x", "", "ü/ x")
    ]
    found, _ = parse_list(
        json.dumps({"version": 1, "generation": 1, "modules": modules}).encode(), served_names=frozenset({"tiny/base"})
    )
    assert [module.name for module in found.entries] == ["ok", "ü/ x"]
    assert len(found.problems) == 6


# Lazy


async def test_a_lazy_adapter_is_listed_and_loaded_by_the_first_request_alone(pod: Pod) -> None:
    one, two = pod.adapter("one"), pod.adapter("two")
    async with pod.running():
        state = await pod.put({"sql": one, "eager": one}, lazy={"sql"})
        assert state["settled"]
        assert [item["name"] for item in state["loaded"]] == ["eager"]
        assert state["waiting"] == [{"name": "sql", "path": one}]
        assert "sql" not in pod.engine.registry
        pod.engine.slow = 0.05
        assert await asyncio.gather(*(pod.ask("sql") for _ in range(10))) == [200] * 10
        state = await pod.state()
        assert {item["name"] for item in state["loaded"]} == {"eager", "sql"}
        assert state["waiting"] == []
        pod.engine.slow = 0.0
        state = await pod.put({"sql": two}, lazy={"sql"})
        assert [(item["name"], item["path"]) for item in state["loaded"]] == [("sql", two)], "it is swapped like others"
        await pod.put({"sql": two})
        state = await pod.put({"sql": two}, lazy={"sql"})
        assert [item["name"] for item in state["loaded"]] == ["sql"], "nothing is unloaded for being Lazy"
        await pod.put({})
        assert [item["name"] for item in (await pod.put({"sql": two}, lazy={"sql"}))["loaded"]] == []
        pod.assert_names_are_unique()


async def test_a_lazy_adapter_that_fails_is_reported_after_the_first_request(pod: Pod) -> None:
    bad = pod.adapter("bad")
    pod.engine.refuses.add(bad)
    async with pod.running():
        assert (await pod.put({"sql": bad}, lazy={"sql"}))["failures"] == []
        assert await pod.ask("sql") == 404
        assert [one["name"] for one in (await pod.state())["failures"]] == ["sql"]


async def test_one_generation_may_say_another_thing_to_this_pod(pod: Pod) -> None:
    one = pod.adapter("one")
    async with pod.running():
        first = await pod.put({"sql": one}, lazy={"sql"}, generation=5)
        second = await pod.put({"sql": one}, generation=5)
        assert first["listGeneration"] == second["listGeneration"] == 5
        assert first["listDigest"] != second["listDigest"]
        assert [item["name"] for item in second["loaded"]] == ["sql"]
        held = json.loads((pod.root / "state" / "modules.json").read_bytes())
        assert "loadPolicy" not in held["modules"][0], "a restarted container holds what this pod was told last"


# updateStrategy: Rollout


@pytest.fixture
def rolling(pod: Pod, monkeypatch: pytest.MonkeyPatch) -> Pod:
    """A pod whose launcher put the list of its arguments where the plugin finds it; a mounted one must not count."""
    monkeypatch.setenv("LORA_OPERATOR_UPDATE_STRATEGY", "Rollout")
    mounted = pod.body({"mounted": pod.adapter("mounted")}, generation=99)
    (pod.root / "modules.json.gz").write_bytes(gzip.compress(json.dumps(mounted).encode()))
    return pod


async def test_a_start_loads_the_list_of_the_arguments_and_nothing_is_loaded_later(
    rolling: Pod, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rolling.reconciler, "VANISHED_SECONDS", 0)
    monkeypatch.setattr(rolling.reconciler, "PASS_SECONDS", 0.05)
    paths = {name: rolling.adapter(name) for name in ("a", "b", "vanishing")}
    late = rolling.root / "model-cache" / "late"
    body = rolling.body(paths | {"late": str(late)}, generation=7)
    (rolling.root / "state" / "modules.json").write_text(json.dumps(body))
    rolling.engine.refuses.add(paths["b"])
    async with rolling.running():
        state = await rolling.state()
        assert (state["listGeneration"], state["settled"], state["updateStrategy"]) == (7, True, "Rollout")
        assert set(rolling.engine.registry) == {"a", "vanishing"}
        assert {one["name"]: one["stage"] for one in state["failures"]} == {"b": "engine", "late": "checks"}
        good_adapter(late)
        rolling.engine.refuses.clear()
        shutil.rmtree(paths["vanishing"])

        async def told() -> bool:
            return len((await rolling.state())["failures"]) == 3

        await rolling.eventually(told)
        passes = rolling.plugin._reconciler._changed
        for _ in range(3):
            await asyncio.wait_for(passes.wait(), 20)
            passes = rolling.plugin._reconciler._changed
        assert [await rolling.ask(name) for name in ("a", "b", "late", "vanishing", "mounted")] == [
            200,
            404,
            404,
            404,
            404,
        ]
        assert set(rolling.engine.registry) == {"a"}
        assert (await rolling.state())["settled"]


async def test_what_a_start_loaded_comes_back_with_its_files(rolling: Pod, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rolling.reconciler, "VANISHED_SECONDS", 0)
    monkeypatch.setattr(rolling.reconciler, "PASS_SECONDS", 0.02)
    path = rolling.adapter("a")
    (rolling.root / "state" / "modules.json").write_text(json.dumps(rolling.body({"a": path}, generation=7)))
    async with rolling.running():
        shutil.rmtree(path)

        async def gone() -> bool:
            return not rolling.engine.registry

        async def back() -> bool:
            return set(rolling.engine.registry) == {"a"}

        await rolling.eventually(gone)
        good_adapter(Path(path))
        await rolling.eventually(back)


async def test_an_engine_that_answers_wrongly_while_it_loads_loads_at_its_start_only(
    pod: Pod, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The operator tells it no list; the mounted one reaches it all the same."""
    monkeypatch.setattr(pod.reconciler, "PASS_SECONDS", 0.02)
    pod.engine.version = "0.25.1"
    one, two = pod.adapter("one"), pod.adapter("two")
    (pod.root / "state" / "modules.json").write_text(json.dumps(pod.body({"one": one}, generation=7)))
    async with pod.running():
        assert set(pod.engine.registry) == {"one"}
        await pod.put({"one": one, "two": two})
        [failure] = (await pod.state())["failures"]
        assert (failure["name"], "vLLM older than 0.26" in failure["message"]) == ("two", True)
        assert set(pod.engine.registry) == {"one"}


@pytest.mark.parametrize(
    ("version", "served"), [("0.31.0", False), ("0.32.0", True), ("0.1.dev12+gabcdef", True), ("", True)]
)
async def test_an_engine_that_ignores_patterns_is_given_no_adapter_that_needs_them(
    pod: Pod, version: str, served: bool
) -> None:
    pod.engine.version = version
    path = pod.adapter("a")
    config = Path(path) / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"alpha_pattern": {"q_proj": 8}}))
    async with pod.running():
        state = await pod.put({"scaled": path, "plain": pod.adapter("b")})
        assert ("scaled" in pod.engine.registry, "plain" in pod.engine.registry) == (served, True)
        failures = {one["name"]: (one["stage"], one["message"]) for one in state["failures"]}
        assert set(failures) == (set() if served else {"scaled"})
        for stage, message in failures.values():
            assert stage == "checks"
            assert "needs vLLM 0.32 or newer; this engine is 0.31: it would apply rank 1 and scale 1" in message


async def test_a_build_without_a_release_number_is_no_old_engine(pod: Pod) -> None:
    """A clone without tags calls itself so, however new it is."""
    pod.engine.version = "0.1.dev17+g1a2b3c4"
    one, two = pod.adapter("one"), pod.adapter("two")
    (pod.root / "state" / "modules.json").write_text(json.dumps(pod.body({"one": one}, generation=7)))
    async with pod.running():
        await pod.put({"one": one, "two": two})
        assert set(pod.engine.registry) == {"one", "two"}
        assert not (await pod.state())["failures"]


async def test_no_list_is_taken_where_it_is_in_the_arguments(rolling: Pod) -> None:
    (rolling.root / "state" / "modules.json").write_text(json.dumps(rolling.body({}, generation=7)))
    async with rolling.running():
        body = rolling.body({"sql": rolling.adapter("a")}, generation=100)
        status, answer = await rolling.call("PUT", "/lora-operator/v1/modules", body, token=TOKEN)
        assert status == 405
        assert "updateStrategy: Rollout" in answer["error"]["message"]
        assert (await rolling.state())["listGeneration"] == 7
        assert json.loads((rolling.root / "state" / "modules.json").read_text())["generation"] == 7
        assert (await rolling.call("PUT", "/lora-operator/v1/modules", body))[0] == 401, "the gate is closed"


async def test_a_pod_that_is_told_lists_says_so(pod: Pod) -> None:
    async with pod.running():
        assert (await pod.state())["updateStrategy"] == "HotLoad"
