"""The plugin's protocol and bookkeeping, against a small application that keeps adapters as vLLM does (the real one: e2e/test_engine_plugin.py)."""

from __future__ import annotations

import asyncio
import gzip
import json
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from lora_operator.engine_plugin.history import DRAIN_SECONDS, QUIET_SECONDS, History, LoadedContent
from lora_operator.engine_plugin.list_file import ListedAdapter
from tests.unit.plugin_pod import Json, Pod
from tests.unit.plugin_support import TOKEN, good_adapter

# Start-up


async def test_everything_listed_is_loaded_before_the_server_says_that_it_is_up(pod: Pod) -> None:
    paths = {name: pod.adapter(name) for name in ("a", "b")} | {"gone": str(pod.root / "model-cache" / "gone")}
    (pod.root / "modules.json.gz").write_bytes(gzip.compress(json.dumps(pod.body(paths)).encode()))
    (pod.root / "state" / "starting.json").write_text("{}")
    pod.engine.refuses.add(paths["b"])
    async with pod.running():
        assert set(pod.engine.registry) == {"a"}
        state = await pod.state()
        assert {one["name"]: one["stage"] for one in state["failures"]} == {"b": "engine", "gone": "checks"}
        assert (state["settled"], state["listGeneration"], state["vllmVersion"]) == (True, 1, "0.32.0")
        assert not (pod.root / "state" / "starting.json").exists()
        refused = json.loads((pod.root / "state" / "refused.json").read_text())["refused"]
        assert [(one["name"], one["path"]) for one in refused] == [("b", paths["b"])]
        assert refused[0]["message"] == f"no {paths['b']}"


async def test_static_entries_are_taken_over_with_their_ids(pod: Pod) -> None:
    one, two = pod.adapter("one"), pod.adapter("two")
    (pod.root / "state" / "modules.json").write_text(json.dumps(pod.body({"sql": one})))
    await pod.engine._load("sql", one)
    async with pod.running():
        assert len(pod.engine.added) == 1
        assert (await pod.put({"sql": two}))["loaded"][0]["internalName"] == "sql@abcdef01.2"
        assert (await pod.put({"sql": one}))["loaded"][0]["internalName"] == "sql"
        assert len(pod.engine.added) == 2
        pod.assert_names_are_unique()


async def test_a_broken_state_folder_does_not_keep_the_server_from_starting(
    pod: Pod, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_OPERATOR_STATE", "/proc/nonexistent")
    async with pod.running():
        status, answer = await pod.call("PUT", "/lora-operator/v1/modules", pod.body({}), token=TOKEN)
        assert (status, (await pod.state())["listGeneration"]) == (500, None)  # what is not kept is not acknowledged
        assert "can't be kept" in answer["error"]["message"]


# What is served


async def test_other_content_gets_another_internal_name_and_known_content_its_own_again(pod: Pod) -> None:
    one, two = pod.adapter("one"), pod.adapter("two")
    async with pod.running():
        seen = []
        for path in (one, two, one, two):
            state = await pod.put({"sql": path}, lineage="tiny/alias")
            seen.append(state["loaded"][0]["internalName"])
            request = pod.engine.registry["sql"]
            assert (request.lora_path, request.base_model_name) == (path, "tiny/alias")
        assert seen == ["sql", "sql@abcdef01.2", "sql", "sql@abcdef01.2"]
        assert len(pod.engine.added) == 2
        await pod.put({"sql": two}, lineage="tiny/base")
        assert pod.engine.registry["sql"].base_model_name == "tiny/base"
        assert pod.engine.registry["sql"].lora_int_id == pod.engine.added[1][1]
        await pod.put({})
        assert pod.engine.registry == {}
        assert await pod.ask("sql") == 404


async def test_clients_who_ask_at_once_wait_for_the_one_load(pod: Pod) -> None:
    pod.engine.slow = 0.05
    async with pod.running():
        await pod.put({"sql": pod.adapter("one")}, wait=0)
        assert await asyncio.gather(*(pod.ask("sql") for _ in range(20))) == [200] * 20
        assert {name for name, _, _ in pod.engine.added} == {"sql"}
        pod.assert_names_are_unique()


async def test_an_internal_name_is_answered_while_it_is_served_and_not_after(pod: Pod) -> None:
    async with pod.running():
        await pod.put({"sql": pod.adapter("one")})
        await pod.put({"sql": pod.adapter("two")})
        assert await pod.ask("sql@abcdef01.2") == 200
        await pod.put({"sql": pod.adapter("three")})
        assert await pod.ask("sql@abcdef01.2") == 404
        assert set(pod.engine.registry) == {"sql"}
        pod.assert_names_are_unique()


async def test_a_failed_upgrade_leaves_what_was_served(pod: Pod) -> None:
    one, two = pod.adapter("one"), pod.adapter("two")
    pod.engine.refuses.add(two)
    async with pod.running():
        await pod.put({"sql": one})
        state = await pod.put({"sql": two})
        assert [(one["path"], one["stage"]) for one in state["failures"]] == [(two, "engine")]
        assert state["loaded"][0]["path"] == one
        assert pod.engine.registry["sql"].lora_path == one


def owned(pod: Pod, path: str, uid: str) -> Json:
    body = pod.body({"sql": path})
    body["modules"][0]["uid"] = uid
    return body


@pytest.mark.parametrize("stage", ["engine", "checks"])
async def test_what_another_object_left_under_the_name_never_answers_for_one_that_can_t_be_loaded(
    pod: Pod, stage: str
) -> None:
    theirs, shared, broken = pod.adapter("theirs"), pod.adapter("shared"), pod.adapter("broken")
    if stage == "engine":
        pod.engine.refuses.add(broken)
    else:
        shutil.rmtree(broken)

    async def put(path: str, uid: str) -> Json:
        status, answer = await pod.call("PUT", "/lora-operator/v1/modules?wait=20", owned(pod, path, uid), token=TOKEN)
        assert status == 200
        return dict(answer)

    async with pod.running():
        await put(theirs, "a")
        assert (await put(broken, "b"))["failures"][0]["stage"] == stage
        assert (pod.engine.registry, await pod.ask("sql")) == ({}, 404)
        await put(theirs, "a")
        await put(shared, "b")
        assert pod.engine.registry["sql"].lora_path == shared
        await put(shared, "c")  # equal content: nothing is loaded, it only has another owner
        await put(broken, "c")
        assert pod.engine.registry["sql"].lora_path == shared, "its own earlier revision stays"


async def test_a_name_goes_to_another_object_in_one_step(pod: Pod) -> None:
    one, two = pod.adapter("one"), pod.adapter("two")
    async with pod.running():
        await pod.call("PUT", "/lora-operator/v1/modules?wait=20", owned(pod, one, "a"), token=TOKEN)
        pod.engine.slow = 0.2
        await pod.call("PUT", "/lora-operator/v1/modules", owned(pod, two, "b"), token=TOKEN)
        answers = []
        while pod.engine.registry.get("sql") is None or pod.engine.registry["sql"].lora_path != two:
            answers.append(await pod.ask("sql"))
            await asyncio.sleep(0.005)
        assert set(answers) == {200}


async def test_failures_are_tried_again_with_growing_waits_and_forgotten_with_the_adapter(
    pod: Pod, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_operator.engine_plugin.history._BACKOFF", {"checks": (0.02, 0.1), "engine": (0.02, 0.1)})
    path = pod.adapter("one")
    pod.engine.refuses.add(path)
    async with pod.running():
        await pod.put({"sql": path, "missing": str(pod.root / "model-cache" / "late")})
        assert await pod.ask("sql") == 404
        pod.engine.refuses.clear()
        good_adapter(pod.root / "model-cache" / "late")

        async def served() -> bool:
            return set(pod.engine.registry) == {"sql", "missing"}

        await pod.eventually(served)
        assert (await pod.state())["failures"] == []
        assert json.loads((pod.root / "state" / "refused.json").read_text())["refused"] == []
        assert pod.engine.registry["sql"].lora_name == "sql"  # nothing was ever served under it before
        pod.assert_names_are_unique()


async def test_an_adapter_whose_files_vanish_is_served_no_more(pod: Pod, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pod.reconciler, "VANISHED_SECONDS", 0.0)
    monkeypatch.setattr(pod.reconciler, "PASS_SECONDS", 0.02)
    one, two = pod.adapter("one"), pod.adapter("two")
    async with pod.running():
        await pod.put({"one": one, "two": two})
        shutil.rmtree(one)

        async def gone() -> bool:
            return set(pod.engine.registry) == {"two"} and bool((await pod.state())["failures"])

        await pod.eventually(gone)
        assert (await pod.state())["failures"][0]["name"] == "one"
        good_adapter(Path(one))

        async def back() -> bool:
            return set(pod.engine.registry) == {"one", "two"}

        await pod.eventually(back)


async def test_what_others_did_to_the_registry_is_repaired(pod: Pod, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pod.reconciler, "PASS_SECONDS", 0.02)
    one, two = pod.adapter("one"), pod.adapter("two")
    foreign = good_adapter(pod.root / "elsewhere")
    async with pod.running():
        await pod.put({"sql": one})
        await pod.call("POST", "/v1/unload_lora_adapter", {"lora_name": "sql"}, token=TOKEN)
        await pod.call("POST", "/v1/load_lora_adapter", {"lora_name": "orphan", "lora_path": two}, token=TOKEN)
        await pod.call("POST", "/v1/load_lora_adapter", {"lora_name": "mine", "lora_path": foreign}, token=TOKEN)

        async def repaired() -> bool:
            return set(pod.engine.registry) == {"sql", "mine"}

        await pod.eventually(repaired)
        pod.assert_names_are_unique()


@pytest.mark.parametrize("version", ["0.30.0", "0.32.0"])
@pytest.mark.parametrize("seed", range(4))
async def test_no_order_of_lists_and_requests_breaks_the_rules_of_names(
    pod: Pod, seed: int, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lists come in bursts, clients ask for public and internal names all the time, and somebody unloads by hand."""
    monkeypatch.setattr(pod.reconciler, "PASS_SECONDS", 0.005)
    monkeypatch.setattr(pod.reconciler, "HANDED_SECONDS", 0.05)
    monkeypatch.setattr("lora_operator.engine_plugin.history.QUIET_SECONDS", 0.0)
    chance = random.Random(seed)
    pod.engine.version = version
    pod.engine.takes = lambda: chance.choice([0.0, 0.001, 0.01])
    names, paths = ("a", "b", "c"), [pod.adapter(f"r{number}") for number in range(4)]
    stop = asyncio.Event()

    async def client() -> None:
        while not stop.is_set():
            known = [name for name, _, _ in pod.engine.added]
            await pod.ask(chance.choice([*names, *known[-4:]]))
            await asyncio.sleep(chance.random() / 500)

    async def meddler() -> None:
        while not stop.is_set():
            await pod.call("POST", "/v1/unload_lora_adapter", {"lora_name": chance.choice(names)}, token=TOKEN)
            await asyncio.sleep(0.02)

    async with pod.running():
        tasks = [asyncio.create_task(client()) for _ in range(6)] + [asyncio.create_task(meddler())]
        wanted: dict[str, str] = {}
        for _ in range(40):
            pod.engine.slow = chance.choice([0.0, 0.001, 0.005])
            wanted = {name: chance.choice(paths) for name in names if chance.random() < 0.8}
            lazy = {name for name in wanted if chance.random() < 0.3}
            await pod.put(wanted, wait=chance.choice([0, 0, 0.01, 0.1]), lazy=lazy)
        await pod.put(wanted, wait=0.1)
        stop.set()
        await asyncio.gather(*tasks)

        async def right() -> bool:
            state = await pod.state()
            found = {name: one.lora_path for name, one in pod.engine.registry.items() if "@" not in name}
            return found == wanted and state["settled"] and {x["name"]: x["path"] for x in state["loaded"]} == wanted

        await pod.eventually(right)
        renamed = {name for name, _, path in pod.engine.ran if "@" not in name and len(pod.engine.paths_of(name)) > 1}
        if version == "0.30.0":
            pod.assert_names_are_unique()
            assert not renamed
        else:
            pod.assert_ids_are_unique()

            async def plain() -> bool:
                return {x["internalName"] for x in (await pod.state())["loaded"]} == set(wanted)

            await pod.eventually(plain)
            assert renamed, "no plain name went over to other content: this says nothing"
        internal = {one["internalName"] for one in (await pod.state())["loaded"]}
        assert {one.lora_name for one in pod.engine.registry.values()} <= internal


async def test_the_plain_name_returns_when_the_last_request_of_old_content_has_ended(
    pod: Pod, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pod.reconciler, "DRAINING_SECONDS", 0.01)
    monkeypatch.setattr("lora_operator.engine_plugin.history.QUIET_SECONDS", 0.02)
    one, two = pod.adapter("one"), pod.adapter("two")

    async def internal() -> str:
        return str((await pod.state())["loaded"][0]["internalName"])

    async with pod.running():
        await pod.put({"sql": one})
        pod.engine.takes = lambda: 0.3
        running = asyncio.create_task(pod.call("POST", "/v1/completions", {"model": "sql"}))
        await asyncio.sleep(0.01)
        await pod.put({"sql": two})
        pod.engine.takes = lambda: 0.0
        assert await internal() == "sql@abcdef01.2"
        await asyncio.sleep(0.1)
        assert not running.done()
        assert await internal() == "sql@abcdef01.2"
        assert (await running)[1] == {"model": "sql", "path": one}
        for number, path in enumerate((two, one, two)):  # and back again, to what had the plain name before
            if number:
                await pod.put({"sql": path})

            async def plain() -> bool:
                return await internal() == "sql" and not (await pod.state())["retired"]

            await pod.eventually(plain)
            assert (await pod.call("POST", "/v1/completions", {"model": "sql"}))[1] == {"model": "sql", "path": path}
        assert await pod.ask("sql@abcdef01.2") == 200, "a name that clients were shown is answered while its content is"
        pod.assert_ids_are_unique()


@pytest.mark.parametrize("told", ["vllm_config", "args", "nothing"])
async def test_where_media_are_cached_by_name_no_name_goes_over_to_other_content(
    pod: Pod, monkeypatch: pytest.MonkeyPatch, told: str
) -> None:
    """With tower or connector LoRA vLLM keeps what one content made of an image under the name alone."""
    monkeypatch.setattr(pod.reconciler, "PASS_SECONDS", 0.01)
    monkeypatch.setattr("lora_operator.engine_plugin.history.QUIET_SECONDS", 0.0)
    flag = SimpleNamespace(enable_tower_connector_lora=True)
    pod.engine.state.vllm_config = SimpleNamespace(lora_config=flag if told == "vllm_config" else None)
    pod.engine.state.args = {"args": flag, "nothing": None, "vllm_config": SimpleNamespace()}[told]
    one, two = pod.adapter("one"), pod.adapter("two")
    async with pod.running():
        await pod.put({"sql": one})
        await pod.put({"sql": two})

        async def settled() -> bool:
            state = await pod.state()
            return state["settled"] and not state["retired"] and not pod.plugin._reconciler.served.is_moving

        await pod.eventually(settled)
        assert (await pod.state())["loaded"][0]["internalName"] == "sql@abcdef01.2"
        await pod.put({"sql": one})
        assert (await pod.state())["loaded"][0]["internalName"] == "sql", "what had the name first keeps it"


async def test_without_the_registry_public_routes_do_the_work(without_registry: Pod) -> None:
    pod = without_registry
    one, two = pod.adapter("one"), pod.adapter("two")
    await pod.engine._load("static", one)
    (pod.root / "state" / "modules.json").write_text(json.dumps(pod.body({"static": one, "sql": one})))
    async with pod.running():
        state = await pod.state()
        assert state["atomicSwap"] is False
        assert {item["name"] for item in state["loaded"]} == {"static", "sql"}
        for path in (two, one, two):
            await pod.put({"static": path, "sql": path})
            assert {name: one.lora_path for name, one in pod.engine.registry.items()} == {"static": path, "sql": path}
            assert await pod.ask("sql") == 200
        await pod.put({"sql": two, "lazy": one}, lazy={"lazy"})
        assert await pod.ask("lazy") == 200
        await pod.put({"sql": two})
        assert set(pod.engine.registry) == {"sql"}
        pod.engine.refuses.add(pod.adapter("bad"))
        assert (await pod.put({"sql": pod.adapter("bad")}))["failures"][0]["stage"] == "engine"
        ids = {(name, int_id) for name, int_id, _ in pod.engine.added}
        assert len(ids) == len({name for name, _ in ids})


# Drain


def test_retired_content_is_running_while_the_metrics_or_an_older_request_say_so() -> None:
    history = History()
    old, new = LoadedContent("sql", "/p1", "sql", 1, None), LoadedContent("sql", "/p2", "sql@b.2", 2, None)
    history.serve(old, 10.0)
    assert history.serve(new, 20.0) == old
    assert history.running(frozenset({"sql"}), None, 100.0) == {"sql"}
    assert history.running(frozenset(), None, 20.1) == frozenset()
    assert history.running(frozenset(), 19.0, 20.1) == {"sql"}  # may be on its way to the engine
    assert history.running(frozenset(), 20.1, 20.2) == frozenset()  # began after the change
    assert history.running(frozenset(), 19.0, 20.0 + DRAIN_SECONDS + 1) == frozenset()
    assert history.running(None, 19.0, 9999.0) == {"sql"}  # without metrics it lasts as long as the request
    history.forget_retired(frozenset())
    assert history.retired == {}
    assert history.recall(ListedAdapter("sql", "/p1"), 3) == old


def test_the_plain_name_comes_back_once_nothing_of_other_content_can_be_left() -> None:
    history = History()
    old, new = LoadedContent("sql", "/p1", "sql", 1, None), LoadedContent("sql", "/p2", "sql@b.2", 2, None)
    plain = LoadedContent("sql", "/p2", "sql", 2, None)
    history.serve(old, 10.0)
    assert history.ready_for_plain_name(frozenset(), None, 15.0) == []
    history.serve(new, 20.0)
    later = 20.0 + DRAIN_SECONDS + 10
    assert history.ready_for_plain_name(frozenset(), 19.0, later) == [], (
        "a request that began before is left, whatever it asks for"
    )
    assert history.ready_for_plain_name(frozenset({"sql"}), later - 1, later) == [], "the metrics show the old one"
    assert history.ready_for_plain_name(frozenset({"sql@b.2"}), later - 1, later) == [], "not yet quiet for long"
    assert history.ready_for_plain_name(frozenset({"sql@b.2"}), later - 1, later + QUIET_SECONDS) == [plain]
    history.touch("sql", later + QUIET_SECONDS)  # a client's resolution may have brought the old one back for a moment
    assert history.ready_for_plain_name(frozenset(), later, later + QUIET_SECONDS) == []
    history.touch("sql", later)
    assert history.ready_for_plain_name(None, None, later + 9) == []
    assert history.ready_for_plain_name(None, None, later + 9 + QUIET_SECONDS) == [plain]
    history.serve(plain, later + 11)
    assert set(history.retired) == {"sql", "sql@b.2"} - {"sql"}
    assert history.ready_for_plain_name(None, None, later + 99) == []
    back = history.recall(ListedAdapter("sql", "/p1", revision="aaaa"), 3)
    assert back == LoadedContent("sql", "/p1", "sql@aaaa.3", 1, None), (
        "its id is its own, its old name is another's by now"
    )
    assert history.recall(ListedAdapter("sql", "/p2"), 4) == plain


def test_internal_names_are_never_given_twice() -> None:
    history = History()
    seen = set()
    for number in range(5):
        module = ListedAdapter("sql", f"/p{number}", revision="0123456789abcdef" if number % 2 else "ä/\n")
        name = history.mint(module, 7)
        seen.add(name)
        history.remember(LoadedContent("sql", module.path, name, number + 1, None))
    assert seen == {"sql", "sql@01234567.7", "sql@r.7", "sql@01234567.7.2", "sql@r.7.2"}


async def test_a_request_that_runs_over_a_change_keeps_the_old_content_retired(pod: Pod) -> None:
    one, two = pod.adapter("one"), pod.adapter("two")
    async with pod.running():
        await pod.put({"sql": one})
        pod.engine.slow = 0.5
        running = asyncio.create_task(
            pod.call("POST", "/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "/x"}, token=TOKEN)
        )
        await asyncio.sleep(0)
        pod.engine.slow = 0.0
        state = await pod.put({"sql": two})
        assert state["retired"] == [{"internalName": "sql", "path": one, "running": True}]
        await running
        assert [item["running"] for item in (await pod.state())["retired"]] in ([False], [])
