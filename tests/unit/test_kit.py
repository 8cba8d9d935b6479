"""The kit's protocol and bookkeeping, against a small application that keeps adapters as vLLM does (the real one: e2e/test_engine_kit.py)."""

from __future__ import annotations

import asyncio
import gzip
import importlib
import json
import random
import shutil
import sys
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from lora_operator.engine_kit.gate import OPEN_ROUTES, Verdict, judge, read_token, without_token
from lora_operator.engine_kit.ledger import DRAIN_SECONDS, QUIET_SECONDS, Generation, Ledger
from lora_operator.engine_kit.modules import Module, parse_list
from tests.unit.kit_support import TOKEN, HonestEngine, good_adapter, install_vllm, settings_env

Json = dict[str, Any]


@pytest.fixture(scope="module")
def vllm() -> Iterator[dict[str, Any]]:
    """The kit's modules, imported beside a stand-in for vLLM's two extension points; what it registered."""
    resolvers: dict[str, Any] = {}
    installed = install_vllm(resolvers)
    yield resolvers
    for name in [*installed, *(f"lora_operator.engine_kit.{part}" for part in ("engine", "keeper", "kit"))]:
        sys.modules.pop(name, None)


class Pod:
    """One engine with the kit before it, spoken to as the server and its clients do."""

    def __init__(self, root: Path, resolvers: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
        self.module = importlib.import_module("lora_operator.engine_kit.kit")
        self.keeper = importlib.import_module("lora_operator.engine_kit.keeper")
        self.root = root
        self.engine = HonestEngine(resolvers)
        self.generation = 0
        for name, value in settings_env(root).items():
            monkeypatch.setenv(name, value)
        self.kit: Any = None

    def adapter(self, name: str) -> str:
        return good_adapter(self.root / "model-cache" / name)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Between the server's start-up and its shutdown."""
        self.kit = self.module.Kit(self.engine)
        received: asyncio.Queue[Json] = asyncio.Queue()
        sent: asyncio.Queue[Json] = asyncio.Queue()
        scope = {"type": "lifespan", "app": self.engine}
        task = asyncio.create_task(self.kit(scope, received.get, sent.put))
        await received.put({"type": "lifespan.startup"})
        assert (await sent.get())["type"] == "lifespan.startup.complete"
        try:
            yield
        finally:
            await received.put({"type": "lifespan.shutdown"})
            await task

    async def call(self, method: str, path: str, body: Any = None, *, token: str | None = None, **scope: Any) -> Any:
        """Status and JSON of one request."""
        path, _, query = path.partition("?")
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = [(b"X-LoRA-Operator-Token".lower(), token.encode())] if token is not None else []
        full: Json = {"type": "http", "method": method, "path": path, "raw_path": path.encode(), "headers": headers}
        full |= {"query_string": query.encode(), "app": self.engine} | scope
        sent: list[Json] = []

        async def receive() -> Json:
            return {"type": "http.request", "body": raw, "more_body": False}

        async def send(message: Json) -> None:
            sent.append(message)

        await self.kit(full, receive, send)
        return sent[0]["status"], json.loads(b"".join(message.get("body", b"") for message in sent[1:]) or b"null")

    def body(
        self,
        modules: dict[str, str],
        *,
        lineage: str | None = "tiny/base",
        generation: int = 0,
        lazy: Collection[str] = (),
    ) -> Json:
        self.generation = generation or self.generation + 1
        entries = [
            {"name": n, "path": p, "baseModelName": lineage, "revision": "abcdef0123"}
            | ({"loadPolicy": "Lazy"} if n in lazy else {})
            for n, p in modules.items()
        ]
        return {"version": 1, "deployment": "a/b", "generation": self.generation, "modules": entries}

    async def put(self, modules: dict[str, str], *, wait: float = 20, **options: Any) -> Json:
        status, answer = await self.call(
            "PUT", f"/lora-operator/v1/modules?wait={wait}", self.body(modules, **options), token=TOKEN
        )
        assert status == 200, answer
        return dict(answer)

    async def state(self) -> Json:
        status, answer = await self.call("GET", "/lora-operator/v1/state", token=TOKEN)
        assert status == 200
        return dict(answer)

    async def ask(self, model: str) -> int:
        """The status of a client's request."""
        status, _ = await self.call("POST", "/v1/completions", {"model": model})
        return int(status)

    async def eventually(self, holds: Callable[[], Awaitable[bool]]) -> None:
        async with asyncio.timeout(20):
            while not await holds():  # noqa: ASYNC110 - what is awaited is the kit's own background work
                await asyncio.sleep(0.01)

    def assert_names_are_unique(self) -> None:
        """No internal name ever had two ids or two contents, nor an id two names."""
        ids, names = defaultdict(set), defaultdict(set)
        for name, int_id, _ in self.engine.added:
            ids[name].add(int_id)
            names[int_id].add(name)
        for seen in (ids, names):
            assert all(len(values) == 1 for values in seen.values()), seen
        self.assert_ids_are_unique()

    def assert_ids_are_unique(self) -> None:
        """No id ever had two contents, nor the content of a public name two ids. Of names the engine itself takes care."""
        contents, ids = defaultdict(set), defaultdict(set)
        for name, int_id, path in {*self.engine.added, *self.engine.ran}:
            contents[int_id].add((name.partition("@")[0], path))
            ids[name.partition("@")[0], path].add(int_id)
        for seen in (contents, ids):
            assert all(len(values) == 1 for values in seen.values()), seen


@pytest.fixture
def pod(tmp_path: Path, vllm: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Pod:
    return Pod(tmp_path, vllm, monkeypatch)


@pytest.fixture
def without_registry(pod: Pod, monkeypatch: pytest.MonkeyPatch) -> Pod:
    monkeypatch.setattr(pod.module, "find_registry", lambda app: None)
    return pod


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


async def test_what_was_being_loaded_when_the_engine_died_is_left_alone_for_a_while(pod: Pod) -> None:
    one, two = pod.adapter("one"), pod.adapter("two")
    (pod.root / "state" / "modules.json").write_text(json.dumps(pod.body({"killer": one, "good": two})))
    (pod.root / "state" / "loading.json").write_text(json.dumps({"name": "killer", "path": one}))
    async with pod.running():
        assert set(pod.engine.registry) == {"good"}
        assert "ended while it loaded" in (await pod.state())["failures"][0]["message"]
        assert set((await pod.put({"killer": two}))["loaded"][0]["name"]) == set("killer")
    assert not (pod.root / "state" / "loading.json").exists()


async def test_a_broken_state_folder_does_not_keep_the_server_from_starting(
    pod: Pod, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_OPERATOR_STATE", "/proc/nonexistent")
    async with pod.running():
        status, answer = await pod.call("PUT", "/lora-operator/v1/modules", pod.body({}), token=TOKEN)
        assert (status, (await pod.state())["listGeneration"]) == (500, None)  # what is not kept is not acknowledged
        assert "can't be kept" in answer["error"]["message"]


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


@pytest.mark.parametrize(
    "raw",
    {
        "nothing": b"",
        "no JSON": b"{",
        "no object": b"[]",
        "no generation": b'{"version": 1, "modules": []}',
        "a generation that is true": b'{"version": 1, "generation": true, "modules": []}',
        "half a gzip": gzip.compress(b"{}")[:-6],
        "a bomb": gzip.compress(b" " * (33 << 20)),
    }.values(),
    ids=lambda raw: repr(raw[:20]),
)
async def test_what_is_no_list_changes_nothing(pod: Pod, raw: bytes) -> None:
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
    monkeypatch.setattr("lora_operator.engine_kit.inbox.REREAD_SECONDS", 0.0)
    async with pod.running():
        await pod.put({"sql": pod.adapter("one")})
        body = pod.body({"sql": pod.adapter("one"), "new": pod.adapter("two")})
        (pod.root / "modules.json.gz").write_bytes(gzip.compress(json.dumps(body).encode()))
        assert await pod.ask("new") == 200
        assert await pod.ask("unknown") == 404
        assert (await pod.state())["listGeneration"] == 2


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
    monkeypatch.setattr("lora_operator.engine_kit.ledger._BACKOFF", {"checks": (0.02, 0.1), "engine": (0.02, 0.1)})
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
    monkeypatch.setattr(pod.keeper, "VANISHED_SECONDS", 0.0)
    monkeypatch.setattr(pod.keeper, "PASS_SECONDS", 0.02)
    one, two = pod.adapter("one"), pod.adapter("two")
    async with pod.running():
        await pod.put({"one": one, "two": two})
        shutil.rmtree(one)

        async def gone() -> bool:
            return set(pod.engine.registry) == {"two"}

        await pod.eventually(gone)
        assert (await pod.state())["failures"][0]["name"] == "one"
        good_adapter(Path(one))

        async def back() -> bool:
            return set(pod.engine.registry) == {"one", "two"}

        await pod.eventually(back)


async def test_what_others_did_to_the_registry_is_repaired(pod: Pod, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pod.keeper, "PASS_SECONDS", 0.02)
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
    monkeypatch.setattr(pod.keeper, "PASS_SECONDS", 0.005)
    monkeypatch.setattr(pod.keeper, "HANDED_SECONDS", 0.05)
    monkeypatch.setattr("lora_operator.engine_kit.ledger.QUIET_SECONDS", 0.0)
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
    monkeypatch.setattr(pod.keeper, "DRAINING_SECONDS", 0.01)
    monkeypatch.setattr("lora_operator.engine_kit.ledger.QUIET_SECONDS", 0.02)
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
    ledger = Ledger()
    old, new = Generation("sql", "/p1", "sql", 1, None), Generation("sql", "/p2", "sql@b.2", 2, None)
    ledger.serve(old, 10.0)
    assert ledger.serve(new, 20.0) == old
    assert ledger.running(frozenset({"sql"}), None, 100.0) == {"sql"}
    assert ledger.running(frozenset(), None, 20.1) == frozenset()
    assert ledger.running(frozenset(), 19.0, 20.1) == {"sql"}  # may be on its way to the engine
    assert ledger.running(frozenset(), 20.1, 20.2) == frozenset()  # began after the change
    assert ledger.running(frozenset(), 19.0, 20.0 + DRAIN_SECONDS + 1) == frozenset()
    assert ledger.running(None, 19.0, 9999.0) == {"sql"}  # without metrics it lasts as long as the request
    ledger.forget_retired(frozenset())
    assert ledger.retired == {}
    assert ledger.recall(Module("sql", "/p1"), 3) == old


def test_the_plain_name_comes_back_once_nothing_of_other_content_can_be_left() -> None:
    ledger = Ledger()
    old, new = Generation("sql", "/p1", "sql", 1, None), Generation("sql", "/p2", "sql@b.2", 2, None)
    plain = Generation("sql", "/p2", "sql", 2, None)
    ledger.serve(old, 10.0)
    assert ledger.renamed(frozenset(), None, 15.0) == []
    ledger.serve(new, 20.0)
    later = 20.0 + DRAIN_SECONDS + 10
    assert ledger.renamed(frozenset(), 19.0, later) == [], "a request that began before is left, whatever it asks for"
    assert ledger.renamed(frozenset({"sql"}), later - 1, later) == [], "the metrics show the old one"
    assert ledger.renamed(frozenset({"sql@b.2"}), later - 1, later) == [], "not yet quiet for long"
    assert ledger.renamed(frozenset({"sql@b.2"}), later - 1, later + QUIET_SECONDS) == [plain]
    ledger.touch("sql", later + QUIET_SECONDS)  # a client's resolution may have brought the old one back for a moment
    assert ledger.renamed(frozenset(), later, later + QUIET_SECONDS) == []
    ledger.touch("sql", later)
    assert ledger.renamed(None, None, later + 9) == []
    assert ledger.renamed(None, None, later + 9 + QUIET_SECONDS) == [plain]
    ledger.serve(plain, later + 11)
    assert set(ledger.retired) == {"sql", "sql@b.2"} - {"sql"}
    assert ledger.renamed(None, None, later + 99) == []
    back = ledger.recall(Module("sql", "/p1", revision="aaaa"), 3)
    assert back == Generation("sql", "/p1", "sql@aaaa.3", 1, None), (
        "its id is its own, its old name is another's by now"
    )
    assert ledger.recall(Module("sql", "/p2"), 4) == plain


def test_internal_names_are_never_given_twice() -> None:
    ledger = Ledger()
    seen = set()
    for number in range(5):
        module = Module("sql", f"/p{number}", revision="0123456789abcdef" if number % 2 else "ä/\n")
        name = ledger.mint(module, 7)
        seen.add(name)
        ledger.remember(Generation("sql", module.path, name, number + 1, None))
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


# The gate


def scope(method: str, path: str, *, raw: bytes | None = None, tokens: tuple[bytes, ...] = (), root: str = "") -> Json:
    headers = [(b"x-lora-operator-token", token) for token in tokens]
    return {"method": method, "path": path, "raw_path": raw or path.encode(), "headers": headers, "root_path": root}


@pytest.mark.parametrize(
    ("request_scope", "verdict"),
    {
        "inference": (scope("POST", "/v1/completions"), Verdict.OPEN),
        "a browser's preflight": (scope("OPTIONS", "/v1/completions"), Verdict.OPEN),
        "health by HEAD": (scope("HEAD", "/health"), Verdict.OPEN),
        "behind a root path": (scope("POST", "/api/v1/completions", root="/api"), Verdict.OPEN),
        "load": (scope("POST", "/v1/load_lora_adapter"), Verdict.UNKNOWN),
        "load behind a root path": (scope("POST", "/api/v1/load_lora_adapter", root="/api"), Verdict.UNKNOWN),
        "a root path that only begins alike": (scope("POST", "/apix/v1/completions", root="/api"), Verdict.UNKNOWN),
        "a trailing slash": (scope("POST", "/v1/completions/"), Verdict.UNKNOWN),
        "a doubled slash": (scope("POST", "//v1/completions"), Verdict.UNKNOWN),
        "an encoded letter": (scope("POST", "/v1/completions", raw=b"/v1/%63ompletions"), Verdict.UNKNOWN),
        "a query in the raw path": (scope("POST", "/v1/completions", raw=b"/v1/completions?a=1"), Verdict.OPEN),
        "another method": (scope("DELETE", "/v1/completions"), Verdict.UNKNOWN),
        "a method in small letters": (scope("post", "/v1/completions"), Verdict.UNKNOWN),
        "SageMaker's load": (scope("POST", "/adapters"), Verdict.UNKNOWN),
        "the kit's API": (scope("GET", "/lora-operator/v1/state"), Verdict.UNKNOWN),
        "an empty path": (scope("GET", ""), Verdict.UNKNOWN),
        "the token": (scope("POST", "/v1/load_lora_adapter", tokens=(b"right",)), Verdict.TRUSTED),
        "a wrong token": (scope("POST", "/v1/completions", tokens=(b"wrong",)), Verdict.REFUSED),
        "an empty token": (scope("POST", "/v1/completions", tokens=(b"",)), Verdict.REFUSED),
        "two tokens": (scope("POST", "/v1/completions", tokens=(b"right", b"right")), Verdict.REFUSED),
        "a token that is no text": (scope("POST", "/v1/completions", tokens=(b"\xff",)), Verdict.REFUSED),
    }.values(),
    ids=lambda value: value.value if isinstance(value, Verdict) else f"{value['method']} {value['path']}",
)
def test_the_gate(request_scope: Json, verdict: Verdict) -> None:
    assert judge(request_scope, lambda: "right") is verdict


def test_without_a_token_on_disk_nobody_has_the_right_one(tmp_path: Path) -> None:
    for content in (None, b"", b" \n", b"\xff\xff"):
        if content is not None:
            (tmp_path / "token").write_bytes(content)
        assert read_token(tmp_path / "token") is None
    for given in (b"", b"None", b"\xff\xff"):
        assert judge(scope("POST", "/v1/load_lora_adapter", tokens=(given,)), lambda: None) is Verdict.REFUSED
    assert judge(scope("POST", "/v1/completions"), lambda: None) is Verdict.OPEN


def test_no_open_route_changes_state() -> None:
    words = (
        "load_",
        "adapters",
        "sleep",
        "wake",
        "reset",
        "abort",
        "cancel",
        "scale",
        "pause",
        "resume",
        "weight",
        "profile",
    )
    assert not [path for path in OPEN_ROUTES if any(word in path for word in words)]


def test_the_engine_sees_its_own_key_and_not_the_token() -> None:
    headers = [(b"X-LoRA-Operator-Token", b"t"), (b"authorization", b"Bearer mine"), (b"accept", b"*/*")]
    assert without_token(headers, api_key=None) == headers[1:]
    assert without_token(headers, api_key="key") == [(b"accept", b"*/*"), (b"authorization", b"Bearer key")]


async def test_refusals_say_who_refuses_and_reach_no_engine(pod: Pod) -> None:
    async with pod.running():
        calls = len(pod.engine.calls)
        status, answer = await pod.call("POST", "/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "/x"})
        assert (status, answer["error"]["type"], answer["error"]["code"]) == (401, "lora_operator_gate", 401)
        status, answer = await pod.call("POST", "/v1/load_lora_adapter", {}, token="wrong")
        assert (status, answer["error"]["code"]) == (403, 403)
        assert (await pod.call("GET", "/lora-operator/v1/other", token=TOKEN))[0] == 404
        assert len(pod.engine.calls) == calls


async def test_websockets_are_closed_before_they_open(pod: Pod) -> None:
    sent: list[Json] = []
    kit = pod.module.Kit(pod.engine)

    async def receive() -> Json:
        return {"type": "websocket.connect"}

    async def send(message: Json) -> None:
        sent.append(message)

    await kit({"type": "websocket", "path": "/v1/realtime", "headers": []}, receive, send)
    assert [message["type"] for message in sent] == ["websocket.close"]


def test_entries_that_cannot_be_used_are_named_and_the_others_stay() -> None:
    modules = [
        {"name": name, "path": "/cache/x"}
        for name in ("ok", "ok", "tiny/base", "a,b", "@lora-operator-x", "-x", "", "ü/ x")
    ]
    found, _ = parse_list(
        json.dumps({"version": 1, "generation": 1, "modules": modules}).encode(), served_names=frozenset({"tiny/base"})
    )
    assert [module.name for module in found.modules] == ["ok", "ü/ x"]
    assert len(found.problems) == 6


# updateStrategy: Rollout


@pytest.fixture
def rolling(pod: Pod, monkeypatch: pytest.MonkeyPatch) -> Pod:
    """A pod whose launcher put the list of its arguments where the kit finds it; a mounted one must not count."""
    monkeypatch.setenv("LORA_OPERATOR_UPDATE_STRATEGY", "Rollout")
    mounted = pod.body({"mounted": pod.adapter("mounted")}, generation=99)
    (pod.root / "modules.json.gz").write_bytes(gzip.compress(json.dumps(mounted).encode()))
    return pod


async def test_a_start_loads_the_list_of_the_arguments_and_nothing_is_loaded_later(
    rolling: Pod, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rolling.keeper, "VANISHED_SECONDS", 0)
    monkeypatch.setattr(rolling.keeper, "PASS_SECONDS", 0.05)
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
        passes = rolling.kit._keeper._changed
        for _ in range(3):
            await asyncio.wait_for(passes.wait(), 20)
            passes = rolling.kit._keeper._changed
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
    monkeypatch.setattr(rolling.keeper, "VANISHED_SECONDS", 0)
    monkeypatch.setattr(rolling.keeper, "PASS_SECONDS", 0.02)
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
    monkeypatch.setattr(pod.keeper, "PASS_SECONDS", 0.02)
    pod.engine.version = "0.25.1"
    one, two = pod.adapter("one"), pod.adapter("two")
    (pod.root / "state" / "modules.json").write_text(json.dumps(pod.body({"one": one}, generation=7)))
    async with pod.running():
        assert set(pod.engine.registry) == {"one"}
        await pod.put({"one": one, "two": two})
        [failure] = (await pod.state())["failures"]
        assert (failure["name"], "vLLM older than 0.26" in failure["message"]) == ("two", True)
        assert set(pod.engine.registry) == {"one"}


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
