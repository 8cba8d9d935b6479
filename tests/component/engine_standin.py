"""An engine pod's process on an address of its own: the real plugin before a small application that keeps adapters as vLLM does.

What speaks to the operator is engine_plugin's own code, so the wire protocol can't differ from it. Three of its functions are
replaced, which look at the cache's volume: here no volume is mounted.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import itertools
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

from aiohttp import web

from lora_operator import engine_plugin
from tests.unit.plugin_support import HonestEngine, install_vllm

_NUMBER = itertools.count(1)
_PACKAGE = Path(engine_plugin.__file__).parent


def load_plugin(resolvers: dict[str, Any]) -> tuple[str, ModuleType]:
    """The plugin as a package of its own, as in a process of its own; the name under which its modules are imported."""
    name = f"standin_plugin_{next(_NUMBER)}"
    spec = importlib.util.spec_from_file_location(
        name, _PACKAGE / "__init__.py", submodule_search_locations=[str(_PACKAGE)]
    )
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules[name] = package
    spec.loader.exec_module(package)
    with mock.patch.dict(sys.modules):
        install_vllm(resolvers)
        plugin = importlib.import_module(f"{name}.plugin")
        ours = {key: module for key, module in sys.modules.items() if key.startswith(name)}
    sys.modules.update(ours)
    return name, plugin


class StandIn:
    """One engine. Everything between `start` and `stop` is one process; the folder is the pod's, and outlives it."""

    def __init__(self, folder: Path, *, address: str, port: int, token: bytes, environment: Mapping[str, str]) -> None:
        self.address, self.port = address, port
        self.silent = False  # accepts requests and never answers
        self.chatty = False  # answers 500, each time in other words
        self.requests: list[tuple[str, str]] = []
        self.missing: set[str] = set()  # paths that the checks don't find
        self._folder = folder
        (folder / "state").mkdir(parents=True, exist_ok=True)
        (folder / "token").write_bytes(token)
        self._environment = {
            **environment,
            "LORA_OPERATOR_MODULES": str(folder / "modules.json.gz"),
            "LORA_OPERATOR_STATE": str(folder / "state"),
            "LORA_OPERATOR_TOKEN_FILE": str(folder / "token"),
        }

    def mount_list(self, packed: bytes) -> None:
        """The ConfigMap as the kubelet would mount it."""
        (self._folder / "modules.json.gz").write_bytes(packed)

    def lose_state(self) -> None:
        """What a new pod has not, and a restarted container has: the emptyDir."""
        shutil.rmtree(self._folder / "state")
        (self._folder / "state").mkdir()

    async def start(self) -> None:
        """The engine starts, and answers from then on."""
        resolvers: dict[str, Any] = {}
        self._package, module = load_plugin(resolvers)
        reconciler = sys.modules[f"{self._package}.reconciler"]
        sys.modules[f"{self._package}.loader"].check_listed = self._check  # type: ignore[attr-defined]
        reconciler._vanished = lambda paths: []  # type: ignore[attr-defined]
        served = sys.modules[f"{self._package}.served_adapters"]
        served._is_ours = lambda path, root: path.startswith("/model-cache/")  # type: ignore[attr-defined]
        self.engine = HonestEngine(resolvers)
        with mock.patch.dict(os.environ, self._environment):
            self._plugin = module.Plugin(self.engine)
        self._life: asyncio.Queue[Any] = asyncio.Queue()
        up: asyncio.Queue[Any] = asyncio.Queue()
        self._task = asyncio.create_task(
            self._plugin({"type": "lifespan", "app": self.engine}, self._life.get, up.put), name="engine"
        )
        await self._life.put({"type": "lifespan.startup"})
        await up.get()
        app = web.Application(client_max_size=64 << 20)
        app.router.add_route("*", "/{path:.*}", self._answer)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, self.address, self.port).start()

    async def stop(self) -> None:
        """The process ends."""
        await self._runner.cleanup()
        await self._life.put({"type": "lifespan.shutdown"})
        await self._task
        for name in [name for name in sys.modules if name.startswith(self._package)]:
            del sys.modules[name]

    async def ask(self, model: str) -> tuple[int, str | None]:
        """What a client gets: the status, and the path of the content that answers."""
        status = await self.engine.resolve(model)
        request = self.engine.registry.get(model)
        return status, request.lora_path if status == 200 and request is not None else None

    @property
    def served(self) -> dict[str, str]:
        """Public name to path."""
        return {name: request.lora_path for name, request in self.engine.registry.items()}

    @property
    def internal_names(self) -> set[str]:
        """Names under which /v1/models shows adapters."""
        return {request.lora_name for request in self.engine.registry.values()}

    @property
    def retired(self) -> list[str]:
        """Internal names of earlier contents that the plugin still keeps, for a request may be running."""
        return list(self._plugin._reconciler.history.retired)

    def _check(self, entry: Any, **_: Any) -> str | None:
        return f"{entry.path} does not exist" if entry.path in self.missing else None

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.requests.append((request.method, request.path))
        if self.silent:
            await asyncio.Event().wait()
        if self.chatty:
            message = f"worker {len(self.requests)} has failed"
            return web.json_response({"error": {"type": "InternalServerError", "message": message}}, status=500)
        body = await request.read()
        scope = {
            "type": "http",
            "app": self.engine,
            "method": request.method,
            "path": request.path,
            "raw_path": request.raw_path.partition("?")[0].encode(),
            "query_string": request.query_string.encode(),
            "headers": [(name.lower(), value) for name, value in request.raw_headers],
        }
        sent: list[Any] = []

        async def receive() -> Any:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        await self._plugin(scope, receive, send)
        content = b"".join(message.get("body", b"") for message in sent[1:])
        return web.Response(status=sent[0]["status"], body=content, content_type="application/json")
