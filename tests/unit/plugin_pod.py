"""One engine with the plugin before it, for the tests of the engine plugin: the real one is in e2e/test_engine_plugin.py."""

from __future__ import annotations

import asyncio
import importlib
import json
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from tests.unit.plugin_support import TOKEN, HonestEngine, good_adapter, settings_env

Json = dict[str, Any]


class Pod:
    """One engine with the plugin before it, spoken to as the server and its clients do."""

    def __init__(self, root: Path, resolvers: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
        self.module = importlib.import_module("lora_operator.engine_plugin.plugin")
        self.reconciler = importlib.import_module("lora_operator.engine_plugin.reconciler")
        self.loader = importlib.import_module("lora_operator.engine_plugin.loader")
        self.root = root
        self._resolvers = resolvers
        self.engine = HonestEngine(resolvers)
        self.generation = 0
        for name, value in settings_env(root).items():
            monkeypatch.setenv(name, value)
        self.plugin: Any = None

    def adapter(self, name: str) -> str:
        return good_adapter(self.root / "model-cache" / name)

    def restart(self) -> None:
        """Another process of the container; the pod's folders stay."""
        self.engine = HonestEngine(self._resolvers)

    @asynccontextmanager
    async def running(self, *, answer: str = "lifespan.startup.complete") -> AsyncIterator[None]:
        """Between the server's start-up and its shutdown."""
        self.plugin = self.module.Plugin(self.engine)
        received: asyncio.Queue[Json] = asyncio.Queue()
        sent: asyncio.Queue[Json] = asyncio.Queue()
        scope = {"type": "lifespan", "app": self.engine}
        task = asyncio.create_task(self.plugin(scope, received.get, sent.put))
        await received.put({"type": "lifespan.startup"})
        assert (await sent.get())["type"] == answer
        try:
            yield
        finally:
            await received.put({"type": "lifespan.shutdown"})
            await task

    async def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        token: str | None = None,
        headers: Mapping[str, str] = MappingProxyType({}),
        **scope: Any,
    ) -> Any:
        """Status and JSON of one request."""
        path, _, query = path.partition("?")
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        sent_headers = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        if token is not None:
            sent_headers.append((b"x-lora-operator-token", token.encode()))
        full: Json = {
            "type": "http",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "headers": sent_headers,
        }
        full |= {"query_string": query.encode(), "app": self.engine} | scope
        sent: list[Json] = []

        async def receive() -> Json:
            return {"type": "http.request", "body": raw, "more_body": False}

        async def send(message: Json) -> None:
            sent.append(message)

        await self.plugin(full, receive, send)
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
            while not await holds():  # noqa: ASYNC110 - what is awaited is the plugin's own background work
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
