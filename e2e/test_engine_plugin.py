"""The engine plugin on a real vLLM process: what a cluster test would need too long for, or could not see.

One engine at a time. The first one starts as a fresh pod does whose list holds an adapter that the checks accept and vLLM refuses.
"""

from __future__ import annotations

import ast
import gzip
import http.client
import json
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from e2e.engine_client import Json, Stream, models, request, token_ids, tokens_for
from e2e.engine_process import SERVED, TOKEN, EngineProcess, engine_python
from e2e.fixtures import adapters
from e2e.stack import tiny_fixtures
from lora_operator.engine_plugin.admin_guard import OPEN_ROUTES
from lora_operator.engine_plugin.checks import AdapterProblem, ProblemKind, check_adapter, read_base_model

PROMPT = "Once upon a time"
VERSION = (0, 32)  # of vLLM, whose answers e2e/fixtures/adapters.py has
HOT_LOADS = 8
LONG_SECONDS, LONG = (
    20,
    3000,
)  # of a stream that must outlive what happens meanwhile; clients were seen to stall for 7 s


@dataclass
class Pod:
    """An engine that is up, and its adapters' paths in the cache by name."""

    engine: EngineProcess
    tiny: Path
    paths: dict[str, str] = field(default_factory=dict)

    def path(self, adapter: str) -> str:
        """The cache's path of a good adapter."""
        if adapter not in self.paths:
            self.paths[adapter] = self.engine.publish(self.tiny / "adapters" / adapter, f"{adapter}-published")
        return self.paths[adapter]

    def build(self, fault: str) -> str:
        """The cache's path of a bad adapter."""
        out = self.engine.cache / "artifacts" / f"bad-{fault}"
        if not out.exists():
            adapters.build(fault, self.tiny / "adapters" / "one", out)
        return str(out)


@pytest.fixture(scope="module")
def pod(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pod]:
    """A fresh pod's engine, up, with what its mounted list says."""
    tiny = tiny_fixtures()
    engine = EngineProcess(tmp_path_factory.mktemp("engine"), tiny / "base")
    pod = Pod(engine, tiny)
    truncated = Path(pod.build("truncated-body"))
    modules = [
        {"name": name, "path": path, "baseModelName": SERVED[1], "revision": "aaaa"}
        for name, path in {
            "one": pod.path("one"),
            "refused": pod.build("engine-refuses"),
            "truncated": str(truncated),
            SERVED[0]: pod.path("two"),
            "two": pod.path("two"),
            "outside": str(tiny / "adapters" / "three"),
        }.items()
    ]
    engine.generation = 7
    body = {"version": 1, "deployment": "test/tiny", "generation": 7, "modules": modules}
    (engine.root / "modules.json.gz").write_bytes(gzip.compress(json.dumps(body).encode()))
    try:
        engine.start()
        engine.wait_up()
        yield pod
    finally:
        engine.kill()


@pytest.fixture(scope="module")
def reference(pod: Pod) -> dict[str, list[int]]:
    """Greedy token ids of each good adapter, served under names that no other test uses."""
    names = {name: f"reference-{name}" for name in ("one", "one-v2")}
    pod.engine.put({served: pod.path(name) for name, served in names.items()})
    long = tokens_for(pod.engine.url, names["one"], seconds=LONG_SECONDS, most=LONG)
    return {name: token_ids(pod.engine.url, served, PROMPT, tokens=long) for name, served in names.items()}


def stream_of(pod: Pod, model: str, *, tokens: int) -> Stream:
    """A stream that has begun and goes on."""
    stream = Stream(pod.engine.url, model, PROMPT, tokens=tokens)
    while len(stream.token_ids) < 4:
        assert stream.running, stream.error
        time.sleep(0.001)
    return stream


def failures(state: Json) -> dict[str, tuple[str, str]]:
    return {one["name"]: (one["stage"], one["message"]) for one in state["failures"]}


def test_a_fresh_pod_needs_at_most_one_restart_and_serves_the_rest_from_the_first_health_answer(pod: Pod) -> None:
    listed = models(pod.engine.url)
    assert pod.engine.starts == 2
    assert set(listed) == {*SERVED, "one", "two"}
    assert {(listed[name]["parent"], listed[name]["root"]) for name in ("one", "two")} == {
        (SERVED[1], pod.path("one")),
        (SERVED[1], pod.path("two")),
    }
    assert {(listed[name]["parent"], listed[name]["root"]) for name in SERVED} == {(None, str(pod.engine.base))}
    state = pod.engine.state()
    found = failures(state)
    assert set(found) == {"refused", "truncated", SERVED[0], "outside"}
    assert found["refused"][0] == "engine"
    assert "target modules in" in found["refused"][1]
    assert found["truncated"][0] == "checks"
    assert "cut off" in found["truncated"][1]
    assert "base model" in found[SERVED[0]][1]
    assert "out of the cache" in found["outside"][1]
    assert (state["listGeneration"], state["settled"], state["atomicSwap"]) == (7, True, True)
    assert state["vllmVersion"].startswith("0.")
    assert not (pod.engine.state_dir / "starting.json").exists()


def test_the_checks_agree_with_the_engine_about_every_bad_adapter(pod: Pod, tmp_path: Path) -> None:
    """Each of them loaded into one engine by hand, from outside of the cache; it must live on."""
    base = read_base_model(pod.engine.base)
    pod.engine.put({})
    for name, builder in adapters.BUILDERS.items():
        path = adapters.build(name, pod.tiny / "adapters" / "one", tmp_path / name)
        status, answer = pod.engine.ask_plugin(
            "POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(path)}
        )
        assert status == builder.status, f"{name}: {status} {answer}"
        assert builder.says in str(answer), name
        if status == 200:
            assert pod.engine.ask_plugin("POST", "/v1/unload_lora_adapter", {"lora_name": name})[0] == 200
        if name in adapters.FINE or name in adapters.ENGINE_REFUSES:
            check_adapter(path, base=base, max_rank=adapters.MAX_RANK, engine=VERSION, scan_values=True)
        else:
            with pytest.raises(AdapterProblem) as caught:
                check_adapter(path, base=base, max_rank=adapters.MAX_RANK, engine=VERSION, scan_values=True)
            assert (caught.value.kind is ProblemKind.UNSAFE) == (name == "pickle-only")
    assert request("GET", f"{pod.engine.url}/health")[0] == 200


def test_bad_adapters_fail_each_by_itself_and_keep_nothing_from_loading(pod: Pod) -> None:
    bad = {name: pod.build(name) for name in adapters.BAD} | {"refused": pod.build("engine-refuses")}
    pid = pod.engine.pid
    state = pod.engine.put(bad | {"zz-good": pod.path("one")})
    assert set(failures(state)) == set(bad)
    assert {name for name, (stage, _) in failures(state).items() if stage == "engine"} == {"refused"}
    assert [one["name"] for one in state["loaded"]] == ["zz-good"]
    assert request("POST", f"{pod.engine.url}/v1/completions", {"model": "refused", "prompt": "x"})[0] == 404
    token_ids(pod.engine.url, "zz-good", PROMPT, tokens=2)
    assert pod.engine.pid == pid


def test_lineage_follows_the_list_for_what_is_hot_loaded(pod: Pod) -> None:
    pod.engine.put({"sql": pod.path("one")}, lineage=SERVED[1])
    assert models(pod.engine.url)["sql"]["parent"] == SERVED[1]
    pod.engine.put({"sql": pod.path("one")}, lineage=SERVED[0])
    listed = models(pod.engine.url)["sql"]
    assert (listed["parent"], listed["root"]) == (SERVED[0], pod.path("one"))
    pod.engine.put({})
    assert set(models(pod.engine.url)) == set(SERVED)
    assert request("POST", f"{pod.engine.url}/v1/completions", {"model": "sql", "prompt": "x"})[0] == 404


def test_a_swap_loses_no_request_and_mixes_no_weights(pod: Pod, reference: dict[str, list[int]]) -> None:
    """Back and forth three times, under a stream and clients that never stop asking."""
    url, stop = pod.engine.url, threading.Event()
    pod.engine.put({"swapped": pod.path("one")})
    good = [reference["one"][:8], reference["one-v2"][:8]]

    def ask() -> int:
        count = 0
        while not stop.is_set():
            assert token_ids(url, "swapped", PROMPT, tokens=8) in good
            count += 1
        return count

    with ThreadPoolExecutor(3) as pool:
        clients = [pool.submit(ask) for _ in range(3)]
        try:
            for turn in range(3):
                began = time.monotonic()
                old, new = ("one", "one-v2") if turn % 2 == 0 else ("one-v2", "one")
                stream = stream_of(pod, "swapped", tokens=len(reference[old]))
                pod.engine.put({"swapped": pod.path(new)})
                assert token_ids(url, "swapped", PROMPT, tokens=8) == reference[new][:8]
                assert stream.running, (
                    f"{len(stream.token_ids)} tokens, {stream.finish_reason}, {stream.error}, turn {turn} after {time.monotonic() - began:.1f} s"
                )
                stream.join(300)
                assert stream.token_ids == reference[old]
        finally:
            stop.set()
        assert min(client.result() for client in clients) > 0
    shown = pod.engine.state()["loaded"][0]["internalName"]
    assert token_ids(url, shown, PROMPT, tokens=8) == reference["one-v2"][:8]  # by the internal name, too


def test_delete_and_reapply_under_a_stream_and_other_loads(pod: Pod, reference: dict[str, list[int]]) -> None:
    """What killed engines: other weights under a name whose old requests run, slots full, and other adapters arriving."""
    url, pid = pod.engine.url, pod.engine.pid
    names = [f"hot-{number}" for number in range(HOT_LOADS)]
    others = {name: pod.engine.publish(pod.tiny / "adapters" / "three", f"{name}-r") for name in names}
    pod.engine.put({"sql": pod.path("one")})
    stream = stream_of(pod, "sql", tokens=len(reference["one"]))
    pod.engine.put({}, wait=0)
    state = pod.engine.put({"sql": pod.path("one-v2")} | others, wait=0)
    with ThreadPoolExecutor(HOT_LOADS) as pool:  # clients ask before anything is loaded: they wait for it
        asked = list(pool.map(lambda name: token_ids(url, name, PROMPT, tokens=2), names))
    assert token_ids(url, "sql", PROMPT, tokens=8) == reference["one-v2"][:8]
    assert stream.running, stream.error
    state = pod.engine.state()
    retired = {one["internalName"]: one["running"] for one in state["retired"]}
    current = next(one["internalName"] for one in state["loaded"] if one["name"] == "sql")
    assert retired.get(stream.model or "") is True
    assert current != stream.model
    stream.join(300)
    assert stream.token_ids == reference["one"]
    assert len({tuple(one) for one in asked}) == 1
    pod.engine.await_state(lambda state: not state["retired"])
    assert pod.engine.pid == pid
    assert failures(pod.engine.state()) == {}


def test_what_is_unloaded_by_hand_comes_back_and_an_older_list_is_refused(pod: Pod) -> None:
    pod.engine.put({"sql": pod.path("one")})
    current = pod.engine.state()["loaded"][0]["internalName"]
    assert pod.engine.ask_plugin("POST", "/v1/unload_lora_adapter", {"lora_name": "sql"})[0] == 200
    assert token_ids(pod.engine.url, "sql", PROMPT, tokens=1)  # the list still holds it
    assert pod.engine.ask_plugin("POST", "/v1/unload_lora_adapter", {"lora_name": "sql"})[0] == 200
    pod.engine.await_state(lambda _: current in models(pod.engine.url))
    body = {"version": 1, "generation": 3, "modules": []}
    status, answer = pod.engine.ask_plugin("PUT", "/lora-operator/v1/modules", body)
    assert (status, answer["listGeneration"]) == (409, pod.engine.generation)
    assert pod.engine.ask_plugin("PUT", "/lora-operator/v1/modules", {"version": 1})[0] == 400


CLOSED = {
    ("POST", "/v1/load_lora_adapter"),
    ("POST", "/v1/unload_lora_adapter"),
    ("POST", "/adapters"),
    ("POST", "/invocations"),
    ("DELETE", "/adapters/one"),
    ("POST", "//v1/load_lora_adapter"),
    ("POST", "/v1/load_lora_adapter/"),
    ("POST", "/v1/load%5Flora_adapter"),
    ("POST", "/%61dapters"),
    ("POST", "/v1/load_lora_adapter?x=1"),
    ("POST", "/v1/%63ompletions"),
    ("DELETE", "/v1/completions"),
    ("POST", "/scale_elastic_ep"),
    ("POST", "/inference/v1/abort_requests"),
    ("POST", "/sleep"),
    ("POST", "/reset_prefix_cache"),
    ("GET", "/lora-operator/v1/state"),
    ("PUT", "/lora-operator/v1/modules"),
    ("GET", "/metrics/"),
    ("GET", "/"),
}


def raw(engine: EngineProcess, method: str, path: str, headers: dict[str, str] | None = None) -> tuple[int, Json]:
    """One request whose path nobody tidies up."""
    where = urlsplit(engine.url)
    connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=30)
    try:
        body = None if method == "GET" else b"{}"
        connection.request(method, path, body, {"Content-Type": "application/json", **(headers or {})})
        answer = connection.getresponse()
        content = answer.read()
    finally:
        connection.close()
    return answer.status, json.loads(content) if content.startswith(b"{") else {}


def test_clients_reach_inference_and_nothing_else(pod: Pod) -> None:
    engine = pod.engine
    pod.engine.put({"sql": pod.path("one")})
    for method, path in sorted(CLOSED):
        status, answer = raw(engine, method, path)
        assert (status, answer["error"]["type"], answer["error"]["code"]) == (401, "lora_operator_gate", 401), path
        status, answer = raw(engine, method, path, {"X-LoRA-Operator-Token": "wrong"})
        assert (status, answer["error"]["code"]) == (403, 403), path
    bodies: dict[str, Json] = {
        "/v1/completions": {"prompt": "x", "max_tokens": 1},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1},
        "/v1/responses": {"input": "x", "max_output_tokens": 1},
        "/v1/messages": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1},
        "/tokenize": {"prompt": "x"},
        "/detokenize": {"tokens": [1]},
    }
    for path, body in bodies.items():
        status, answer = request("POST", f"{engine.url}{path}", body | {"model": "sql"})
        assert status == 200, f"{path}: {answer}"
    for path in ("/health", "/metrics", "/v1/models", "/version", "/load", "/ping", "/docs", "/openapi.json"):
        assert request("GET", f"{engine.url}{path}")[0] == 200
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
    assert raw(engine, "GET", "/v1/realtime", upgrade | {"Sec-WebSocket-Key": "eCBlZnJlc2ggbWUgcGxzIQ=="})[0] in (
        401,
        403,
    )


# Routes of vLLM that are meant to be closed, as its sources and its description write them. What is open is in the plugin.
KNOWN_CLOSED = {
    *{("POST", path) for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/adapters")},
    ("DELETE", "/adapters/{adapter_name}"),
    # Answers with the base model, whatever adapter the body names.
    ("POST", "/invocations"),
    # Responses of others, by their ids alone.
    ("GET", "/v1/responses/{response_id}"),
    ("POST", "/v1/responses/{response_id}/cancel"),
    # Parts of disaggregated serving: clients choose what media are cached as.
    ("POST", "/inference/v1/generate"),
    *{("POST", f"/v1/{api}/render") for api in ("completions", "chat/completions", "messages", "responses")},
    *{("POST", f"/v1/{api}/derender") for api in ("completions", "chat/completions")},
    # Control of the engine.
    *{
        ("POST", f"/{path}")
        for path in (
            "abort_requests",
            "collective_rpc",
            "fault_tolerance/apply",
            "finish_weight_update",
            "inference/v1/abort_requests",
            "init_weight_transfer_engine",
            "is_scaling_elastic_ep",
            "pause",
            "release_kv_cache_memory",
            "reset_encoder_cache",
            "reset_mm_cache",
            "reset_prefix_cache",
            "resume",
            "scale_elastic_ep",
            "shutdown_weight_transfer_engine",
            "sleep",
            "start_draft_weight_update",
            "start_profile",
            "start_weight_update",
            "stop_profile",
            "update_weight_version",
            "update_weights",
            "wake_up",
            "weight_checker",
        )
    },
    *{
        ("GET", f"/{path}")
        for path in (
            "fault_tolerance/status",
            "get_world_size",
            "is_paused",
            "is_sleeping",
            "kv_event_sources",
            "ready",
            "readyz",
            "server_info",
            "weight_info",
        )
    },
}
_VERBS = ("get", "post", "put", "patch", "delete")


def routes_in_sources() -> set[tuple[str, str]]:
    """Every route that vLLM's sources give to a router, also those that this engine's flags and model leave out."""
    where = "import importlib.util as u; print(u.find_spec('vllm').submodule_search_locations[0])"
    found = subprocess.run([engine_python(), "-c", where], capture_output=True, text=True, check=True, timeout=60)
    calls = [
        node
        for file in (Path(found.stdout.strip()) / "entrypoints").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in _VERBS
        and node.args
    ]
    return {
        (call.func.attr.upper(), path)
        for call in calls
        if isinstance(call.func, ast.Attribute)
        and isinstance(call.args[0], ast.Constant)
        and isinstance(path := call.args[0].value, str)
        and path.startswith("/")
    }


def test_every_route_is_known_to_be_open_or_closed_and_is(pod: Pod) -> None:
    """A new version's route is in neither list: somebody has to decide. It is closed until then."""
    _, described = request("GET", f"{pod.engine.url}/openapi.json")
    here = {(method.upper(), path) for path, methods in described["paths"].items() for method in methods}
    sources = routes_in_sources()
    assert ("POST", "/v1/load_lora_adapter") in here & sources
    assert ("POST", "/v1/chat/completions/render") in sources, "what needs a flag"
    opened = {(method, path) for path, methods in OPEN_ROUTES.items() for method in methods}
    assert not opened & KNOWN_CLOSED
    assert not (here | sources) - opened - KNOWN_CLOSED, (
        "decide on it: engine_plugin/admin_guard.py opens it, or KNOWN_CLOSED has it"
    )
    for method, path in (here | sources) - opened:
        assert raw(pod.engine, method, path.replace("{", "").replace("}", ""))[0] == 401


def test_the_token_can_be_rotated_and_without_one_on_disk_nobody_is_trusted(pod: Pod) -> None:
    engine = pod.engine
    try:
        engine.token_file.write_text("another\n")
        assert engine.ask_plugin("GET", "/lora-operator/v1/state")[0] == 403
        assert engine.ask_plugin("GET", "/lora-operator/v1/state", token="another")[0] == 200
        engine.token_file.unlink()
        assert engine.ask_plugin("GET", "/lora-operator/v1/state", token="another")[0] == 403
        assert engine.ask_plugin("GET", "/lora-operator/v1/state", token="")[0] == 403
    finally:
        engine.token_file.write_text(TOKEN)
    assert engine.ask_plugin("GET", "/lora-operator/v1/nothing")[0] == 404


def test_a_killed_engine_comes_back_with_what_was_acknowledged_but_for_what_broke(
    pod: Pod, reference: dict[str, list[int]]
) -> None:
    """With nobody there to help: what the engine refused before costs no restart, nor do files that broke meanwhile."""
    engine = pod.engine
    broken = engine.publish(pod.tiny / "adapters" / "two", "breaks-later")
    many = {f"many-{number}": pod.path("three") for number in range(6)}  # more than the engine is started with
    wanted = {
        "sql": pod.path("one-v2"),
        "two": pod.path("two"),
        "broken": broken,
        "refused": pod.build("engine-refuses"),
    }
    state = engine.put(wanted | many)
    assert set(failures(state)) == {"refused"}
    weights = Path(broken) / adapters.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1000])
    before = engine.starts
    engine.kill()
    engine.start()
    engine.wait_up()
    listed = models(engine.url)
    assert set(listed) == {*SERVED, "sql", "two", *many}
    assert engine.starts == before + 1
    assert listed["sql"]["root"] == pod.path("one-v2")
    assert token_ids(engine.url, "sql", PROMPT, tokens=8) == reference["one-v2"][:8]
    again = engine.state()
    assert again["listGeneration"] == engine.generation
    assert {name: stage for name, (stage, _) in failures(again).items()} == {"broken": "checks", "refused": "engine"}
    report = json.loads((engine.state_dir / "launcher.json").read_text())
    assert [one["name"] for one in report["static"]] == ["sql", "two", "many-0", "many-1"]
    shutil.rmtree(broken)
    state = engine.put({"sql": pod.path("one"), "broken": pod.path("two")})  # static entries are swapped like others
    assert {one["name"]: one["path"] for one in state["loaded"]} == {"sql": pod.path("one"), "broken": pod.path("two")}
    assert token_ids(engine.url, "sql", PROMPT, tokens=8) == reference["one"][:8]


def test_without_the_registry_it_serves_all_the_same_and_says_so(
    pod: Pod, reference: dict[str, list[int]], tmp_path: Path
) -> None:
    pod.engine.kill()  # one engine at a time
    engine = EngineProcess(tmp_path / "engine", pod.tiny / "base", middleware="without_registry.Plugin")
    (engine.root / "plugin" / "without_registry.py").write_text(
        "from lora_operator_plugin import plugin\nplugin.find_registry = lambda app: None\nPlugin = plugin.Plugin\n"
    )
    one, two = (engine.publish(pod.tiny / "adapters" / name, name) for name in ("one", "one-v2"))
    engine.put_on_disk({"sql": one}, lineage=SERVED[1])
    try:
        engine.start()
        engine.wait_up()
        state = engine.state()
        assert state["atomicSwap"] is False
        assert token_ids(engine.url, "sql", PROMPT, tokens=8) == reference["one"][:8]
        for path, name in ((two, "one-v2"), (one, "one"), (two, "one-v2")):
            state = engine.put({"sql": path, "other": one}, lineage=SERVED[1])
            assert failures(state) == {}
            assert token_ids(engine.url, "sql", PROMPT, tokens=8) == reference[name][:8]
            internal = next(one["internalName"] for one in state["loaded"] if one["name"] == "sql")
            assert models(engine.url)[internal]["parent"] == SERVED[1]
        assert set(models(engine.url)) == {*SERVED, internal, "other"}
        engine.put({"bad": str(tmp_path)})
        assert set(models(engine.url)) == set(SERVED)
    finally:
        engine.kill()


def test_adapters_in_the_arguments_are_served_and_bad_ones_among_them_reported_with_one_start(
    pod: Pod, tmp_path: Path
) -> None:
    """updateStrategy Rollout: more than the engine takes as static entries, so the plugin loads the last ones itself."""
    pod.engine.kill()  # one engine at a time
    engine = EngineProcess(tmp_path / "engine", pod.tiny / "base")
    good = {
        name: engine.publish(pod.tiny / "adapters" / name, name) for name in ("one", "two", "three", "four", "five")
    }
    bad = {fault: str(engine.cache / "artifacts" / fault) for fault in ("truncated-body", "engine-refuses")}
    for fault, path in bad.items():
        adapters.build(fault, pod.tiny / "adapters" / "one", Path(path))
    entries = [
        {"name": name, "path": path, "base_model_name": SERVED[1]}
        for name, path in {
            "truncated-body": bad["truncated-body"],
            **good,
            "engine-refuses": bad["engine-refuses"],
        }.items()
    ]
    engine.arguments = ["--lora-modules", *map(json.dumps, entries)]
    engine.env = {"LORA_OPERATOR_UPDATE_STRATEGY": "Rollout", "LORA_OPERATOR_LIST_GENERATION": "7"}
    try:
        engine.start()
        engine.wait_up()
        listed = models(engine.url)
        assert engine.starts == 1
        assert {name: listed[name]["parent"] for name in set(listed) - set(SERVED)} == dict.fromkeys(good, SERVED[1])
        state = engine.state()
        assert (state["listGeneration"], state["settled"], state["updateStrategy"]) == (7, True, "Rollout")
        assert {name: stage for name, (stage, _) in failures(state).items()} == {
            "truncated-body": "checks",
            "engine-refuses": "engine",
        }
        report = json.loads((engine.state_dir / "launcher.json").read_text())
        assert ([one["name"] for one in report["static"]], report["later"]) == (["one", "two", "three", "four"], 2)
        for name in good:
            assert len(token_ids(engine.url, name, PROMPT, tokens=8)) == 8
        status, answer = engine.ask_plugin(
            "PUT", "/lora-operator/v1/modules", {"version": 1, "generation": 8, "modules": []}
        )
        assert (status, set(models(engine.url))) == (405, set(listed)), answer
    finally:
        engine.kill()
