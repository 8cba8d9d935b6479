"""A real vLLM process whose core stops answering in a load, and what holds of a keyed engine's routes: no cluster is needed.

What hangs is the engine's own core, stopped (SIGSTOP) in the moment in which it is asked to load a certain adapter: vLLM goes on
saying that it is well, as it does when an adapter takes it for ever. The plugin's patience is a thirtieth of what it is in pods.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from e2e.engine_client import Json, request
from e2e.engine_process import EngineProcess
from e2e.stack import tiny_fixtures
from lora_operator.engine_plugin.admin_guard import KEYLESS

KEY = "sk-e2e"
BEARER = {"Authorization": f"Bearer {KEY}"}
IMPATIENT = """
import os, signal
from pathlib import Path
from lora_operator_plugin import loads
loads.DEAD_SECONDS, loads.STATIC_SECONDS = 20.0, 0.0  # before the plugin is imported: it watches from then on
from lora_operator_plugin import loader, plugin, vllm_adapter
from vllm.v1.engine.async_llm import AsyncLLM

loader.UNREADY_SECONDS = plugin.UNREADY_SECONDS = 2.0
plugin.DEAD_SECONDS = 8.0
add_lora = AsyncLLM.add_lora

def core():
    for stat in Path("/proc").glob("[0-9]*/stat"):
        name, _, fields = stat.read_text().rpartition(")")
        if int(fields.split()[1]) == os.getpid() and "EngineCor" in name:
            return int(stat.parent.name)
    raise AssertionError("the engine has no core")

async def add_or_hang(self, lora_request):
    if lora_request.lora_path.endswith("hangs"):
        os.kill(core(), signal.SIGSTOP)
    return await add_lora(self, lora_request)

def find_registry(app, find=plugin.find_registry):
    Path("media-by-name").write_text(str(vllm_adapter.caches_media_by_name(app)))
    return find(app)

AsyncLLM.add_lora = add_or_hang
plugin.find_registry = find_registry
Plugin = plugin.Plugin
"""


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    """An engine with a key, and with a list on its disk of which one entry hangs it when the plugin loads it."""
    tiny = tiny_fixtures()
    engine = EngineProcess(
        tmp_path_factory.mktemp("stuck"),
        tiny / "base",
        middleware="impatient.Plugin",
        args=["--enable-tower-connector-lora"],
    )
    (engine.root / "plugin" / "impatient.py").write_text(IMPATIENT)
    engine.env = {"VLLM_API_KEY": KEY, "LORA_OPERATOR_MAX_REQUEST_BYTES": str(1 << 20)}
    for name in ("one", "two"):
        engine.publish(tiny / "adapters" / name, name)
    engine.publish(tiny / "adapters" / "three", "hangs")
    engine.put_on_disk({name: path_of(engine, name) for name in ("hangs", "one")}, lineage="tiny/base")
    try:
        engine.start()
        engine.wait_up()
        yield engine
    finally:
        engine.kill()


def path_of(engine: EngineProcess, name: str) -> str:
    return str(engine.cache / "artifacts" / name)


def becomes(engine: EngineProcess, path: str, status: int) -> Json:
    """Wait until a route answers so; what it says."""
    deadline = time.monotonic() + 60
    while (answer := request("GET", f"{engine.url}{path}"))[0] != status:
        assert time.monotonic() < deadline, answer
        time.sleep(0.05)
    return dict(answer[1])


def left_out(engine: EngineProcess) -> dict[str, str]:
    return {one["name"]: one["message"] for one in engine.state()["failures"]}


def test_an_engine_that_hangs_while_it_starts_ends_and_starts_again_without_what_it_loaded(
    engine: EngineProcess,
) -> None:
    """First in vLLM's own load of its arguments, then in the plugin's before the server listens: no probe can see either."""
    assert engine.starts == 3
    assert "the adapters of the arguments are not loaded" in engine.log.read_text()
    assert "while it loaded this adapter" in left_out(engine)["hangs"]
    assert [one["name"] for one in engine.state()["loaded"]] == ["one"]
    assert "startup failed" in engine.log.read_text()


def test_with_a_key_inference_asks_for_it_and_monitoring_does_not(engine: EngineProcess) -> None:
    bodies: dict[str, Json] = {
        "/v1/completions": {"prompt": "x", "max_tokens": 1},
        "/tokenize": {"prompt": "x"},
        "/detokenize": {"tokens": [1]},
        "/generative_scoring": {"query": "x", "items": ["y"], "label_token_ids": [1, 2]},
    }
    for path, body in bodies.items():
        body = body | {"model": "one"}
        assert request("POST", f"{engine.url}{path}", body)[0] == 401, path
        assert request("POST", f"{engine.url}{path}", body, headers={"Authorization": "Bearer wrong"})[0] == 401, path
        status, answer = request("POST", f"{engine.url}{path}", body, headers=BEARER)
        assert status == 200, f"{path}: {answer}"
    assert request("POST", f"{engine.url}/invocations", {"model": "one", "prompt": "x"}, headers=BEARER)[0] == 401
    assert request("GET", f"{engine.url}/v1/models")[0] == 401
    for path in sorted(KEYLESS):
        assert request("GET", f"{engine.url}{path}")[0] == 200, path


def test_names_and_bodies_of_clients_leave_nothing_in_memory(engine: EngineProcess) -> None:
    def resident() -> int:
        status = Path(f"/proc/{engine.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) >> 10

    def ask(number: int) -> tuple[int, object]:
        body = {"model": f"{number}-{'x' * 900_000}", "prompt": "x"}
        return request("POST", f"{engine.url}/tokenize", body, headers=BEARER)

    for number in range(20):  # what the first requests of a process take is not theirs
        assert ask(number)[0] == 404
    before = resident()
    for number in range(20, 170):
        assert ask(number)[0] == 404
    assert resident() - before < 50, "150 names of 0.9 MB"
    status, answer = request("POST", f"{engine.url}/tokenize", {"model": "x" * (1 << 20)}, headers=BEARER)
    assert (status, answer["error"]["type"]) == (413, "lora_operator_gate")


def test_what_vision_towers_made_is_kept_under_a_name_so_no_name_is_given_to_other_content(
    engine: EngineProcess,
) -> None:
    """vLLM's own settings tell it, in a place that only the real one shows; what follows from it is in tests/unit/test_plugin.py."""
    assert (engine.root / "media-by-name").read_text() == "True"


def test_an_engine_that_hangs_is_not_ready_and_then_dead_and_says_for_which_adapter(engine: EngineProcess) -> None:
    engine.put({"one": path_of(engine, "one")})  # what hung the last process is forgotten with its entry
    assert request("GET", f"{engine.url}/lora-operator/ready")[0] == 200
    engine.put({name: path_of(engine, name) for name in ("hangs", "one", "two")}, wait=0)
    becomes(engine, "/lora-operator/ready", 503)
    assert request("GET", f"{engine.url}/health")[0] == 200, "a load may yet be answered"
    assert "has not answered" in left_out(engine)["hangs"]
    assert "loading an adapter" in becomes(engine, "/health", 503)["error"]["message"]
    engine.kill()
    engine.start()
    engine.wait_up()
    assert set(models_of(engine)) == {"tiny/base", "tiny/alias", "one", "two"}
    report = json.loads((engine.state_dir / "launcher.json").read_text())
    assert [one["name"] for one in report["dropped"]] == ["hangs"]
    assert list(left_out(engine)) == ["hangs"]


def models_of(engine: EngineProcess) -> dict[str, Json]:
    status, answer = request("GET", f"{engine.url}/v1/models", headers=BEARER)
    assert status == 200
    return {model["id"]: model for model in answer["data"]}
