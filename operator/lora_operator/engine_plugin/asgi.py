"""ASGI, as far as the plugin speaks it: the types of an application, and requests to one in this process, without a socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_ANSWER_BYTES: Final = 8 << 20


class InProcessClient:
    """Asks `inner`; `app` is what the server would put into the scope, `api_key` goes along where there is one."""

    def __init__(self, inner: App, *, app: Any, api_key: str | None) -> None:
        self._inner = inner
        self._app = app
        self._api_key = api_key

    async def call(
        self, method: str, path: str, body: object = None, *, seconds: float | None = 30.0
    ) -> tuple[int, Any]:
        """Status and parsed JSON of an answer (None where it is no JSON); raises TimeoutError after `seconds` (None: never)."""
        content = b"" if body is None else json.dumps(body).encode()
        requests: list[Message] = [{"type": "http.request", "body": content, "more_body": False}]
        status, answer = 0, bytearray()

        async def receive() -> Message:
            if requests:
                return requests.pop()
            await asyncio.Event().wait()  # this client never goes away by itself
            raise AssertionError

        async def send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = int(message["status"])
            elif message["type"] == "http.response.body" and len(answer) < _ANSWER_BYTES:
                answer.extend(message.get("body", b""))

        async with asyncio.timeout(seconds):
            await self._inner(self._scope(method, path, len(content)), receive, send)
        try:
            return status, json.loads(answer)
        except ValueError:
            return status, None

    def _scope(self, method: str, path: str, length: int) -> Scope:
        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        headers.append((b"content-length", str(length).encode()))
        if self._api_key:
            headers.append((b"authorization", f"Bearer {self._api_key}".encode()))
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": headers,
            "client": ("127.0.0.1", 0),
            "server": ("127.0.0.1", 0),
            "app": self._app,
            "state": {},
        }
