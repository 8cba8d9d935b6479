"""The engines' client, against a small server that speaks the plugin's and vLLM's HTTP API over loopback."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from lora_operator.errors import EngineError, EngineRefused, EngineUnreachable, StaleList
from lora_operator.vllm import TOKEN_HEADER, Engines
from lora_operator.wire.plugin import HeldEntry, HeldList, LoadedAdapter

TOKEN = "s3cret-token"
STATE = {
    "kit": "abc123",
    "vllmVersion": "0.32.0",
    "instance": "f00",  # of a plugin of before
    "listGeneration": 12,
    "settled": True,
    "loaded": [
        {"name": "sql", "internalName": "sql@0a1b2c3d.12", "path": "/model-cache/artifacts/x", "baseModelName": "m/B"}
    ],
    "failures": [{"name": "bad", "path": "/model-cache/artifacts/y", "stage": "engine", "message": "m" * 9000}],
    "retired": [{"internalName": "sql", "path": "/model-cache/artifacts/z", "running": True}],
    "atomicSwap": True,
    "aFieldOfALaterPlugin": {},
}
MODELS = {
    "object": "list",
    "data": [
        {"id": "m/B", "object": "model", "root": "/model-cache/artifacts/b", "parent": None, "permission": []},
        {"id": "sql", "object": "model", "root": "/model-cache/artifacts/x", "parent": "m/B", "permission": []},
    ],
}
Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


class FakeEngine:
    """Answers whatever a test puts into `answers`, by method and path; remembers what came."""

    def __init__(self) -> None:
        self.answers: dict[tuple[str, str], Answer] = {}
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        self.url = ""

    def answer(self, method: str, path: str, status: int, body: Any, **headers: str) -> None:
        """Answers JSON, or bytes as they are."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()

        async def respond(_: web.Request) -> web.Response:
            return web.Response(status=status, body=data, content_type="application/json", headers=headers)

        self.answers[method, path] = respond

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Any request."""
        self.requests.append((request.path_qs, dict(request.headers), await request.read()))
        respond = self.answers.get((request.method, request.path))
        return web.Response(status=404) if respond is None else await respond(request)


@pytest.fixture
async def engine() -> AsyncIterator[FakeEngine]:
    """A running fake engine."""
    fake = FakeEngine()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", fake.handle)
    async with TestServer(app, host="127.0.0.1") as server:
        fake.url = f"http://127.0.0.1:{server.port}"
        yield fake


@pytest.fixture
async def engines() -> AsyncIterator[Engines]:
    """The client under test."""
    async with Engines(timeout=5, max_answer=100_000) as client:
        yield client


async def test_a_state_is_read_with_the_token(engine: FakeEngine, engines: Engines) -> None:
    engine.answer("GET", "/lora-operator/v1/state", 200, STATE)
    state = await engines.state(engine.url, TOKEN)
    assert (state.plugin, state.vllm_version, state.list_generation) == ("abc123", "0.32.0", 12)
    assert state.settled
    assert state.atomic_swap
    assert state.loaded == (
        LoadedAdapter(
            name="sql", internal_name="sql@0a1b2c3d.12", path="/model-cache/artifacts/x", base_model_name="m/B"
        ),
    )
    assert (state.failures[0].stage, len(state.failures[0].message)) == ("engine", 500)
    assert (state.retired[0].internal_name, state.retired[0].running) == ("sql", True)
    assert engine.requests[0][1][TOKEN_HEADER] == TOKEN


async def test_a_plugin_without_a_list_has_no_generation(engine: FakeEngine, engines: Engines) -> None:
    engine.answer("GET", "/lora-operator/v1/state", 200, {**STATE, "listGeneration": None, "loaded": []})
    assert (await engines.state(engine.url, TOKEN)).list_generation is None


async def test_a_list_that_a_pod_holds_is_read_with_the_token(engine: FakeEngine, engines: Engines) -> None:
    entry = {"name": "sql", "path": "/model-cache/x", "baseModelName": "base", "revision": "r", "uid": "u", "new": 1}
    engine.answer("GET", "/lora-operator/v1/modules", 200, {"generation": 7, "modules": [entry]})
    held = await engines.held_list(engine.url, TOKEN)
    assert held == HeldList(7, (HeldEntry("sql", "/model-cache/x", "base", "r", "u"),))
    engine.answer("GET", "/lora-operator/v1/modules", 200, {"generation": 2**60, "modules": []})
    with pytest.raises(EngineUnreachable, match="not understood"):
        await engines.held_list(engine.url, TOKEN)


@pytest.mark.parametrize("compressed", [False, True])
async def test_a_module_list_is_put(engine: FakeEngine, engines: Engines, compressed: bool) -> None:
    engine.answer("PUT", "/lora-operator/v1/modules", 200, STATE)
    body = b'{"version": 1}'
    state = await engines.put_list(engine.url, TOKEN, gzip.compress(body) if compressed else body, wait=2.5)
    assert state.list_generation == 12
    path, headers, received = engine.requests[0]
    assert path == "/lora-operator/v1/modules?wait=2.5"
    assert headers[TOKEN_HEADER] == TOKEN
    assert headers.get("Content-Encoding") == ("gzip" if compressed else None)
    assert received == body


async def test_a_stale_list_is_told_with_what_the_pod_holds(engine: FakeEngine, engines: Engines) -> None:
    engine.answer("PUT", "/lora-operator/v1/modules", 409, {**STATE, "listGeneration": 99})
    with pytest.raises(StaleList) as caught:
        await engines.put_list(engine.url, TOKEN, b"{}", wait=0)
    assert caught.value.state.list_generation == 99


async def test_served_models_are_read(engine: FakeEngine, engines: Engines) -> None:
    engine.answer("GET", "/v1/models", 200, MODELS)
    base, sql = await engines.models(engine.url, TOKEN)
    assert (base.id, base.root, base.parent) == ("m/B", "/model-cache/artifacts/b", None)
    assert (sql.id, sql.root, sql.parent) == ("sql", "/model-cache/artifacts/x", "m/B")


@pytest.mark.parametrize(
    ("status", "body", "closed"),
    [
        (401, {"error": {"message": "no", "type": "lora_operator_gate", "code": 401}}, True),
        (401, {"error": "Unauthorized"}, False),  # vLLM's own --api-key
        (401, {"error": {"message": "no", "type": "invalid_request_error"}}, False),
        (401, b"no", False),
        (200, b"Success", False),
        (403, {"error": {"message": "no", "type": "lora_operator_gate"}}, False),
        (404, {"error": {"message": "no adapter", "type": "NotFoundError"}}, False),
        (500, b"", False),
        (302, b"", False),
    ],
)
async def test_a_gate_is_closed_only_by_its_own_word(
    engine: FakeEngine, engines: Engines, status: int, body: Any, closed: bool
) -> None:
    engine.answer("POST", "/v1/load_lora_adapter", status, body, Location="/v1/models")
    assert await engines.admin_api_is_guarded(engine.url) is closed
    assert TOKEN_HEADER not in engine.requests[0][1]
    assert len(engine.requests) == 1, "redirects are not followed"


async def test_a_gate_that_does_not_answer_is_not_open_but_unknown(engines: Engines) -> None:
    with pytest.raises(EngineUnreachable):
        await engines.admin_api_is_guarded("http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (403, {"error": {"message": "wrong token", "type": "lora_operator_gate"}}, "wrong token"),
        (404, b"Not Found", "Not Found"),
        (500, {"error": {"message": f"boom {TOKEN}"}}, "boom …"),
        (503, b"x" * 50_000, "x" * 500),
        (307, b"", "answered 307"),
    ],
)
async def test_a_refusal_has_its_status_and_bounded_words_without_the_token(
    engine: FakeEngine, engines: Engines, status: int, body: Any, words: str
) -> None:
    engine.answer("GET", "/lora-operator/v1/state", status, body, Location="/elsewhere")
    with pytest.raises(EngineRefused) as caught:
        await engines.state(engine.url, TOKEN)
    assert caught.value.status == status
    assert words in caught.value.message
    assert TOKEN not in str(caught.value)
    assert len(caught.value.message) < 600
    assert len(engine.requests) == 1


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"<html>", "not understood"),
        ([], "not understood"),
        ({**STATE, "listGeneration": "many"}, "listGeneration"),
        ({**STATE, "loaded": [{"name": "sql"}]}, "loaded.0"),
        ({**STATE, "failures": [{"name": "b", "path": "/", "stage": 1, "message": ""}]}, "failures.0.stage"),
        ({**STATE, "kit": "k" * 2000}, "kit"),
        ({**STATE, "loaded": STATE["loaded"] * 2000}, "larger than 100000 bytes"),  # type: ignore[operator]
    ],
)
async def test_an_answer_that_is_not_as_agreed_means_unknown(
    engine: FakeEngine, engines: Engines, body: Any, words: str
) -> None:
    engine.answer("GET", "/lora-operator/v1/state", 200, body)
    with pytest.raises(EngineUnreachable, match=words):
        await engines.state(engine.url, TOKEN)


async def test_an_engine_that_hangs_is_given_up(engine: FakeEngine) -> None:
    ended = asyncio.Event()

    async def hang(_: web.Request) -> web.StreamResponse:
        await ended.wait()
        return web.Response()

    engine.answers["GET", "/v1/models"] = hang
    async with Engines(timeout=0.05) as engines:
        with pytest.raises(EngineUnreachable, match=r"no answer within 0\.05 s"):
            await engines.models(engine.url, TOKEN)
    ended.set()


async def test_no_proxy_of_the_environment_is_used(
    engine: FakeEngine, engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    engine.answer("GET", "/v1/models", 200, MODELS)
    assert len(await engines.models(engine.url, TOKEN)) == 2


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "http://[::1", "nonsense", "http://127.0.0.1:99999"])
async def test_nothing_at_the_address_is_told_without_the_token(engines: Engines, url: str) -> None:
    with pytest.raises(EngineUnreachable) as caught:
        await engines.put_list(url, TOKEN, b"{}", wait=0)
    assert TOKEN not in str(caught.value)
    assert isinstance(caught.value, EngineError)
