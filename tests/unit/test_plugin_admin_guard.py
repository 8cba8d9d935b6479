"""The plugin's gate: what is open to clients, and what only the operator may ask."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_operator.engine_plugin.admin_guard import OPEN_ROUTES, Access, judge, read_token, without_token
from tests.unit.plugin_pod import Json, Pod
from tests.unit.plugin_support import TOKEN


def scope(method: str, path: str, *, raw: bytes | None = None, tokens: tuple[bytes, ...] = (), root: str = "") -> Json:
    headers = [(b"x-lora-operator-token", token) for token in tokens]
    return {"method": method, "path": path, "raw_path": raw or path.encode(), "headers": headers, "root_path": root}


@pytest.mark.parametrize(
    ("request_scope", "access"),
    {
        "inference": (scope("POST", "/v1/completions"), Access.OPEN),
        "a browser's preflight": (scope("OPTIONS", "/v1/completions"), Access.OPEN),
        "health by HEAD": (scope("HEAD", "/health"), Access.OPEN),
        "behind a root path": (scope("POST", "/api/v1/completions", root="/api"), Access.OPEN),
        "load": (scope("POST", "/v1/load_lora_adapter"), Access.UNKNOWN),
        "load behind a root path": (scope("POST", "/api/v1/load_lora_adapter", root="/api"), Access.UNKNOWN),
        "a root path that only begins alike": (scope("POST", "/apix/v1/completions", root="/api"), Access.UNKNOWN),
        "a trailing slash": (scope("POST", "/v1/completions/"), Access.UNKNOWN),
        "a doubled slash": (scope("POST", "//v1/completions"), Access.UNKNOWN),
        "an encoded letter": (scope("POST", "/v1/completions", raw=b"/v1/%63ompletions"), Access.UNKNOWN),
        "a query in the raw path": (scope("POST", "/v1/completions", raw=b"/v1/completions?a=1"), Access.OPEN),
        "decisions, which 0.33 has": (scope("POST", "/v1/decisions"), Access.OPEN),
        "Cohere's chat": (scope("POST", "/cohere/v2/chat"), Access.OPEN),
        "tokens in, with media by a key that the client chooses": (
            scope("POST", "/inference/v1/generate"),
            Access.UNKNOWN,
        ),
        "a part of disaggregated serving": (scope("POST", "/v1/chat/completions/render"), Access.UNKNOWN),
        "another part": (scope("POST", "/v1/completions/derender"), Access.UNKNOWN),
        "another method": (scope("DELETE", "/v1/completions"), Access.UNKNOWN),
        "a method in small letters": (scope("post", "/v1/completions"), Access.UNKNOWN),
        "SageMaker's load": (scope("POST", "/adapters"), Access.UNKNOWN),
        "the plugin's API": (scope("GET", "/lora-operator/v1/state"), Access.UNKNOWN),
        "an empty path": (scope("GET", ""), Access.UNKNOWN),
        "the token": (scope("POST", "/v1/load_lora_adapter", tokens=(b"right",)), Access.TRUSTED),
        "a wrong token": (scope("POST", "/v1/completions", tokens=(b"wrong",)), Access.REFUSED),
        "an empty token": (scope("POST", "/v1/completions", tokens=(b"",)), Access.REFUSED),
        "two tokens": (scope("POST", "/v1/completions", tokens=(b"right", b"right")), Access.REFUSED),
        "a token that is no text": (scope("POST", "/v1/completions", tokens=(b"\xff",)), Access.REFUSED),
    }.values(),
    ids=lambda value: value.value if isinstance(value, Access) else f"{value['method']} {value['path']}",
)
def test_the_gate(request_scope: Json, access: Access) -> None:
    assert judge(request_scope, lambda: "right") is access


def test_without_a_token_on_disk_nobody_has_the_right_one(tmp_path: Path) -> None:
    for content in (None, b"", b" \n", b"\xff\xff"):
        if content is not None:
            (tmp_path / "token").write_bytes(content)
        assert read_token(tmp_path / "token") is None
    for given in (b"", b"None", b"\xff\xff"):
        assert judge(scope("POST", "/v1/load_lora_adapter", tokens=(given,)), lambda: None) is Access.REFUSED
    assert judge(scope("POST", "/v1/completions"), lambda: None) is Access.OPEN


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
    plugin = pod.module.Plugin(pod.engine)

    async def receive() -> Json:
        return {"type": "websocket.connect"}

    async def send(message: Json) -> None:
        sent.append(message)

    await plugin({"type": "websocket", "path": "/v1/realtime", "headers": []}, receive, send)
    assert [message["type"] for message in sent] == ["websocket.close"]
