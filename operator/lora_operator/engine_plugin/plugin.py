"""The engine's one middleware (`--middleware lora_operator_plugin.plugin.Plugin`): start-up, admin API guard, resolver and the operator's HTTP API.

Pure ASGI: nothing is buffered or rewritten, a request that may pass costs a look at its path. It is outermost, so nothing reaches
the engine past it. In the lifespan, before the server says that it is up, all listed adapters are loaded; from then on the
reconciler works by itself. A failure in here never keeps the engine from starting and never opens what the guard closes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from typing import Any, Final
from urllib.parse import parse_qs

from .admin_guard import API_PREFIX, ERROR_TYPE, READY_PATH, Access, judge, read_token, route_path, without_token
from .asgi import App, Message, Receive, Scope, Send
from .clean_text import clean
from .clients import declares_more, drop_rest, has_key, pass_bounded
from .list_file import LIST_BYTES, report_list
from .loads import DEAD_SECONDS, UNANSWERED, UNREADY_SECONDS, watch_static
from .plugin_settings import PluginSettings
from .reconciler import Reconciler
from .state_files import MARKER_FILE
from .versions import parse_version
from .vllm_adapter import (
    RESOLVER,
    DictRegistry,
    EngineClient,
    RoutesRegistry,
    caches_media_by_name,
    find_registry,
    forget_unknown_names,
    keys_have_paths,
    loads_while_running,
    log,
)

MAX_WAIT: Final = 30.0
BODY_SECONDS: Final = 30.0
_LOOK_SECONDS: Final = 1.0  # how often a start looks whether the engine still answers
_PROBES: Final = frozenset({READY_PATH, "/health", "/ping"})


# vLLM loads what it was given as arguments between the import of this module and the lifespan, and no probe sees whether it goes on.
_LISTENS: Final = watch_static(PluginSettings.read(os.environ).state_dir / MARKER_FILE)


class StuckError(Exception):
    """The engine does not answer a load while it starts: only another process helps."""


class Plugin:
    """The middleware; vLLM makes it, possibly more than once, and the one whose lifespan runs does the work."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._settings = PluginSettings.read(os.environ)
        self._version = ""
        self._reconciler: Reconciler | None = None
        self._task: asyncio.Task[None] | None = None
        self._requests: dict[int, float] = {}  # requests to the engine that are going on, by when they began
        self._count = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One connection of the server."""
        if scope["type"] == "lifespan":
            await self._lifespan(scope, receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008})
        elif scope["type"] == "http":
            await self._request(scope, receive, send)

    # Start-up

    async def _lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_after_start(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete":
                try:
                    await self._start(scope.get("app"))
                except StuckError as error:
                    message = {"type": "lifespan.startup.failed", "message": str(error)}
            await send(message)

        _LISTENS.set()
        try:
            await self._app(scope, receive, send_after_start)
        finally:
            RESOLVER.answer = None
            if self._task is not None:
                self._task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await self._task

    async def _start(self, app: Any) -> None:
        client = EngineClient(self._app, app=app, api_key=self._settings.api_key)
        try:
            found = find_registry(app)
            registry = RoutesRegistry(client) if found is None else DictRegistry(client, found)
            self._reconciler = reconciler = Reconciler(
                self._settings, registry, client, oldest_request=self._oldest_request
            )
            RESOLVER.answer = reconciler.resolve
            self._version = await _version(client)
            reconciler.served.keys_have_paths = keys_have_paths(self._version) and not caches_media_by_name(app)
            reconciler.loads_while_running = loads_while_running(self._version)
            reconciler.loader.engine = parse_version(self._version)
            forget_unknown_names(app)
            await _start_watched(reconciler)
        except StuckError:
            raise
        except Exception:
            log.exception("lora-operator: loading the listed adapters failed; it goes on in the background")
        finally:
            with contextlib.suppress(OSError):
                (self._settings.state_dir / MARKER_FILE).unlink(missing_ok=True)
        if self._reconciler is not None:
            self._task = asyncio.create_task(self._reconciler.run())

    def _oldest_request(self) -> float | None:
        return min(self._requests.values(), default=None)

    # Requests

    async def _request(self, scope: Scope, receive: Receive, send: Send) -> None:
        verdict = judge(scope, lambda: read_token(self._settings.token_file))
        path = route_path(scope)
        if verdict is Access.UNKNOWN:
            await _refuse(send, 401, "this path is not open to clients; it needs the deployment's gate token")
        elif verdict is Access.REFUSED:
            await _refuse(send, 403, "the gate token is wrong")
        elif path in _PROBES:
            await self._probe(path, scope, receive, send)
        elif verdict is Access.TRUSTED and path.startswith(API_PREFIX):
            await self._api(scope, receive, send)
        elif verdict is Access.TRUSTED:
            headers = without_token(scope["headers"], api_key=self._settings.api_key)
            await self._pass(dict(scope, headers=headers), receive, send)
        elif not has_key(scope, self._settings.api_key):
            await _refuse(send, 401, "the API key is missing or wrong: send it as `Authorization: Bearer <key>`")
        else:
            await self._pass(scope, receive, send)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        limit = self._settings.max_request_bytes
        self._count += 1
        number = self._count
        self._requests[number] = time.monotonic()
        try:
            if not declares_more(scope, limit) and await pass_bounded(self._app, scope, receive, send, limit=limit):
                return
        finally:
            del self._requests[number]
        message = f"a request may have {limit} bytes (the VLLMDeployment's spec.engine.maxRequestSize)"
        await _refuse(send, 413, message, last_of=receive)

    async def _probe(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        """The engine's own health, but for an engine that has not answered a load for long: vLLM says that it is well."""
        unanswered = 0.0 if self._reconciler is None else self._reconciler.loads.unanswered()
        if unanswered > (UNREADY_SECONDS if path == READY_PATH else DEAD_SECONDS):
            await _refuse(send, 503, f"the engine has not answered for {unanswered:.0f} s while loading an adapter")
        elif path == READY_PATH:
            await self._app(dict(scope, path="/health", raw_path=b"/health", root_path=""), receive, send)
        else:
            await self._app(scope, receive, send)

    # The operator's API

    async def _api(self, scope: Scope, receive: Receive, send: Send) -> None:
        call = (scope["method"], route_path(scope).removeprefix(API_PREFIX))
        if self._reconciler is None:
            await _refuse(send, 503, "the plugin did not start; see the engine's log")
        elif call == ("GET", "state"):
            await _answer(send, 200, self._state(self._reconciler))
        elif call == ("GET", "modules"):
            await _answer(send, 200, report_list(self._reconciler.list_source.held))
        elif call == ("PUT", "modules"):
            await self._put_list(self._reconciler, scope, receive, send)
        else:
            await _refuse(send, 404, "the plugin has GET state, GET modules and PUT modules")

    async def _put_list(self, reconciler: Reconciler, scope: Scope, receive: Receive, send: Send) -> None:
        body = await _read_body(receive, limit=LIST_BYTES)
        if body is None:
            await _refuse(
                send, 413, f"a module list has at most {LIST_BYTES} bytes, and comes within {BODY_SECONDS:.0f} s"
            )
            return
        status, problem = await reconciler.list_source.accept(body)
        if status == 200:
            await reconciler.wait_settled(_wait_of(scope))
            await _answer(send, 200, self._state(reconciler))
        elif status == 409:
            await _answer(send, 409, self._state(reconciler) | {"error": _error(409, problem)})
        else:
            await _refuse(send, status, problem)

    def _state(self, reconciler: Reconciler) -> dict[str, Any]:
        running = reconciler.served.running()
        held = reconciler.list_source.held
        bad = [(one.name, one.path, "checks", message) for one, message in (held.problems if held else ())]
        failed = [(name, path, one.stage, one.message) for (name, path), one in reconciler.history.failures.items()]
        stuck = reconciler.loads.entry if reconciler.loads.unanswered() > UNREADY_SECONDS else None
        if stuck is not None:
            failed.append((stuck.name, stuck.path, "engine", UNANSWERED))
        return {
            "kit": self._settings.plugin_hash,
            "vllmVersion": self._version,
            "listGeneration": held.generation if held is not None else None,
            "listDigest": held.digest if held is not None else None,
            "settled": reconciler.settled,
            "loaded": [
                {"name": one.name, "internalName": one.internal, "path": one.path, "baseModelName": one.base_model_name}
                for one in reconciler.history.current.values()
            ],
            "waiting": [{"name": one.name, "path": one.path} for one in reconciler.waiting()],
            "failures": [
                {"name": clean(name), "path": clean(path, limit=4096), "stage": stage, "message": message}
                for name, path, stage, message in bad + failed
            ],
            "retired": [
                {"internalName": name, "path": one.content.path, "running": name in running}
                for name, one in reconciler.history.retired.items()
            ],
            "atomicSwap": reconciler.registry.atomic,
            "updateStrategy": self._settings.update_strategy,
        }


async def _start_watched(reconciler: Reconciler) -> None:
    """Load what is listed; raises StuckError where the engine does not answer. No probe can see that before the server listens."""
    start = asyncio.create_task(reconciler.start())
    while not (await asyncio.wait({start}, timeout=_LOOK_SECONDS))[0]:
        if reconciler.loads.unanswered() > DEAD_SECONDS:
            start.cancel()
            await asyncio.wait({start})
            raise StuckError(f"lora-operator: {UNANSWERED}")
    await start


async def _version(client: EngineClient) -> str:
    try:
        _, answer = await client.call("GET", "/version")
    except Exception:
        log.exception("lora-operator: the engine does not tell its version")
        return ""
    return clean(answer.get("version", ""), limit=80) if isinstance(answer, dict) else ""


def _wait_of(scope: Scope) -> float:
    """The query's `wait` in seconds, between 0 and MAX_WAIT."""
    try:
        seconds = float(parse_qs(scope.get("query_string", b"").decode("ascii"))["wait"][0])
    except (ValueError, KeyError):
        return 0.0
    return min(seconds, MAX_WAIT) if seconds > 0 else 0.0


async def _read_body(receive: Receive, *, limit: int) -> bytes | None:
    """A request's body; None when it is too long or does not come."""
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                message = await receive()
                if message["type"] != "http.request":
                    return None
                body += message.get("body", b"")
                if len(body) > limit:
                    return None
                if not message.get("more_body"):
                    return bytes(body)
    except TimeoutError:
        return None


def _error(status: int, message: str) -> dict[str, Any]:
    return {"message": clean(message), "type": ERROR_TYPE, "code": status}


async def _refuse(send: Send, status: int, message: str, *, last_of: Receive | None = None) -> None:
    await _answer(send, status, {"error": _error(status, message)}, last_of=last_of)


async def _answer(send: Send, status: int, body: dict[str, Any], *, last_of: Receive | None = None) -> None:
    """Answer; with `last_of`, the rest of whose request nobody wants, the connection is closed once the client has its answer."""
    content = json.dumps(body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    if last_of is not None:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content, "more_body": last_of is not None})
    if last_of is not None:
        await drop_rest(last_of)
        await send({"type": "http.response.body", "body": b""})
