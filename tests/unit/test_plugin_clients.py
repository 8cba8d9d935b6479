"""What holds for every client's request: the API key where there is one, the bound on bodies, and no memory of names."""

from __future__ import annotations

import asyncio
import gc
import json
from typing import Any

import pytest

from lora_operator.engine_plugin.admin_guard import KEYLESS, OPEN_ROUTES
from tests.unit.plugin_pod import Json, Pod
from tests.unit.plugin_support import TOKEN

KEY = "sk-right"
LIMIT = 1000
BEARER = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture
def keyed(pod: Pod, monkeypatch: pytest.MonkeyPatch) -> Pod:
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    return pod


@pytest.fixture
def bounded(pod: Pod, monkeypatch: pytest.MonkeyPatch) -> Pod:
    monkeypatch.setenv("LORA_OPERATOR_MAX_REQUEST_BYTES", str(LIMIT))
    return pod


async def test_every_open_route_that_infers_asks_for_the_key(keyed: Pod) -> None:
    body = {"model": "tiny/base"}
    async with keyed.running():
        asking = {(method, path) for path, methods in OPEN_ROUTES.items() for method in methods if path not in KEYLESS}
        assert {("POST", "/tokenize"), ("POST", "/score"), ("GET", "/v1/models")} <= asking
        for method, path in sorted(asking - {(method, path) for method, path in asking if method == "OPTIONS"}):
            calls = len(keyed.engine.calls)
            status, answer = await keyed.call(method, path, body)
            assert (status, answer["error"]["type"]) == (401, "lora_operator_gate"), path
            assert "Bearer" in answer["error"]["message"]
            assert len(keyed.engine.calls) == calls, f"{path} reached the engine"
            assert (await keyed.call(method, path, body, headers=BEARER))[0] == 200, path
        for path in KEYLESS:
            assert (await keyed.call("GET", path))[0] == 200, path
        assert (await keyed.call("OPTIONS", "/v1/completions", body))[0] == 200, "a browser's preflight has no key"


@pytest.mark.parametrize(
    "given",
    [
        "",
        "Bearer",
        "Bearer ",
        "Bearer sk-wrong",
        f"Basic {KEY}",
        KEY,
        f"Bearer  {KEY}",
        f"Bearer {KEY} ",
        "Bearer sk-ü",
    ],
)
async def test_other_keys_are_none(keyed: Pod, given: str) -> None:
    async with keyed.running():
        assert (await keyed.call("POST", "/tokenize", {"model": "tiny/base"}, headers={"Authorization": given}))[
            0
        ] == 401


async def test_the_operator_needs_no_key_of_clients(keyed: Pod) -> None:
    async with keyed.running():
        await keyed.put({"sql": keyed.adapter("one")})
        assert (await keyed.call("GET", "/v1/models", token=TOKEN))[0] == 200


async def test_the_route_that_takes_no_adapters_by_its_body_is_closed(pod: Pod) -> None:
    async with pod.running():
        assert (await pod.call("POST", "/invocations", {"model": "sql"}))[0] == 401


def pieces(*sizes: int) -> Any:
    """A request's body as it comes over the network, without a length."""
    left = list(sizes)

    async def receive() -> Json:
        if not left:
            return {"type": "http.disconnect"}
        size = left.pop(0)
        return {"type": "http.request", "body": b" " * size, "more_body": bool(left)}

    return receive


async def raw(pod: Pod, receive: Any, headers: list[tuple[bytes, bytes]]) -> tuple[int, Json, dict[bytes, bytes]]:
    """A request that is refused: answered at once, and ended when its client has nothing more to send."""
    sent: list[Json] = []
    unread = [name for name, _ in headers] == [b"content-length"]

    async def send(message: Json) -> None:
        sent.append(message)

    async def receive_last() -> Json:
        assert len(sent) == 2 or not unread, "the body was read before the answer"
        message: Json = await receive()
        return message

    scope = {"type": "http", "method": "POST", "path": "/v1/embeddings", "raw_path": b"/v1/embeddings"}
    await pod.plugin(scope | {"headers": headers, "query_string": b"", "app": pod.engine}, receive_last, send)
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body", "http.response.body"]
    assert [message.get("more_body", False) for message in sent[1:]] == [True, False]
    assert sent[2]["body"] == b""
    return sent[0]["status"], json.loads(sent[1]["body"]), dict(sent[0]["headers"])


async def test_a_body_that_is_announced_too_large_is_refused_unread(bounded: Pod) -> None:
    async with bounded.running():
        for length in (b"1001", b"99999999999999999999", b"-1", b"1e3", b""):
            status, answer, headers = await raw(bounded, pieces(600, 600), [(b"content-length", length)])
            assert (status, headers[b"connection"]) == (413, b"close")
            assert "1000 bytes (the VLLMDeployment's spec.engine.maxRequestSize)" in answer["error"]["message"]
        assert ("POST", "/v1/embeddings") not in bounded.engine.calls


async def test_a_client_that_goes_on_sending_is_left_after_a_while(
    bounded: Pod, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_operator.engine_plugin.clients.LINGER_SECONDS", 0.05)
    asked = asyncio.Event()

    async def receive() -> Json:
        if asked.is_set():
            await asyncio.Event().wait()
        asked.set()
        return {"type": "http.request", "body": b" " * 600, "more_body": True}

    async with bounded.running():
        assert (await raw(bounded, receive, [(b"content-length", b"1001")]))[0] == 413
        assert asked.is_set()
        assert bounded.plugin._requests == {}


async def test_a_body_that_grows_too_large_is_refused(bounded: Pod) -> None:
    async with bounded.running():
        assert (await raw(bounded, pieces(600, 600, 600), []))[0] == 413
        assert ("POST", "/v1/embeddings") not in bounded.engine.calls
        status, _ = await bounded.call("POST", "/v1/embeddings", b"{}" + b" " * (LIMIT - 2))
        assert status == 200, "exactly the limit is allowed"
        assert bounded.plugin._requests == {}


async def test_names_that_clients_make_up_are_not_kept(pod: Pod) -> None:
    async with pod.running():
        for number in range(200):
            assert await pod.ask(f"no-such-adapter-{number}") == 404
        gc.collect()
        assert len(pod.engine.state.openai_serving_models.lora_resolver_lock) == 0
        await pod.put({"sql": pod.adapter("one")})
        assert await pod.ask("sql") == 200
