"""What holds for every client's request beside its route: it has the API key where there is one, and its body has a bound.

vLLM asks for the key below /v1, /v2, /inference and /cohere only, so not at /tokenize, /pooling, /score and others; and it reads
bodies of any size into the one process that all clients share. Nothing is buffered here.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import re
from collections.abc import Mapping
from typing import Any, Final

from .admin_guard import KEYLESS, route_path
from .asgi import App, Message, Receive, Scope, Send

LINGER_SECONDS: Final = 2.0
_LENGTH: Final = re.compile(rb"[0-9]{1,18}")


def has_key(scope: Mapping[str, Any], api_key: str | None) -> bool:
    """Whether a request may pass without, or has, the key that clients must send, in one `Authorization: Bearer` header."""
    if api_key is None or route_path(scope) in KEYLESS or scope.get("method") == "OPTIONS":
        return True
    given = [value for name, value in scope.get("headers", ()) if name.lower() == b"authorization"]
    scheme, _, key = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
    return scheme.lower() == b"bearer" and hmac.compare_digest(key, api_key.encode())


def declares_more(scope: Mapping[str, Any], limit: int) -> bool:
    """Whether a request announces a body of more than `limit` bytes, or of no understandable length."""
    lengths = [value for name, value in scope.get("headers", ()) if name.lower() == b"content-length"]
    return any(not _LENGTH.fullmatch(length) or int(length) > limit for length in lengths)


async def pass_bounded(app: App, scope: Scope, receive: Receive, send: Send, *, limit: int) -> bool:
    """Let the engine answer a request whose body may have `limit` bytes.

    False: more came, in pieces without an announcement. The engine was told that the client has gone, nothing of its answer was
    sent if it had not begun, and the caller answers.
    """
    taken, began = 0, False

    async def receive_counted() -> Message:
        nonlocal taken
        message = await receive()
        if message["type"] == "http.request":
            taken += len(message.get("body", b""))
        return message if taken <= limit else {"type": "http.disconnect"}

    async def send_unless_refused(message: Message) -> None:
        nonlocal began
        if taken <= limit or began:
            began = True
            await send(message)

    try:
        await app(scope, receive_counted, send_unless_refused)
    except Exception:
        if taken <= limit:
            raise
    return taken <= limit or began


async def drop_rest(receive: Receive) -> None:
    """Read what a client that was refused still sends, for at most 2 s, and keep nothing of it.

    A connection that is closed while bytes arrive is reset, and the client that is sending may never see its answer.
    """
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER_SECONDS):
            message: Message = {"type": "http.request", "more_body": True}
            while message["type"] == "http.request" and message.get("more_body", False):
                message = await receive()
