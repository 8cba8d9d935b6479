"""Adapters and settings for the tests of the engine plugin, and a small application that keeps adapters as vLLM does."""

from __future__ import annotations

import asyncio
import json
import struct
import sys
import types
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

TOKEN = "gate-token"
SERVED_NAMES = ["tiny/base", "tiny/alias"]


def settings_env(root: Path) -> dict[str, str]:
    """A pod's folders below `root`, and the plugin's environment for them."""
    for folder in ("model-cache", "state"):
        (root / folder).mkdir()
    (root / "token").write_text(TOKEN)
    return {
        "LORA_OPERATOR_MODULES": str(root / "modules.json.gz"),
        "LORA_OPERATOR_STATE": str(root / "state"),
        "LORA_OPERATOR_TOKEN_FILE": str(root / "token"),
        "LORA_OPERATOR_CACHE_ROOT": str(root / "model-cache"),
        "LORA_OPERATOR_SERVED_NAMES": json.dumps(SERVED_NAMES),
        "LORA_OPERATOR_MAX_LORA_RANK": "16",
        "LORA_OPERATOR_MAX_CPU_LORAS": "64",
        "LORA_OPERATOR_KIT": "test",
    }


def good_adapter(folder: Path) -> str:
    """An adapter that the checks accept; its path."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    entry = {"dtype": "F32", "shape": [1, 1]}
    names = [f"base_model.model.model.layers.0.self_attn.q_proj.lora_{half}.weight" for half in "AB"]
    header = json.dumps({n: entry | {"data_offsets": [4 * i, 4 * i + 4]} for i, n in enumerate(names)}).encode()
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 8)
    return str(folder)


@dataclass
class LoRARequest:
    """vLLM's structure, as far as the plugin knows it."""

    lora_name: str
    lora_int_id: int
    lora_path: str
    base_model_name: str | None = None


def install_vllm(resolvers: dict[str, Any]) -> dict[str, types.ModuleType]:
    """Modules with the two public extension points; `resolvers` gets what is registered."""
    request: Any = types.ModuleType("vllm.lora.request")
    request.LoRARequest = LoRARequest
    resolver: Any = types.ModuleType("vllm.lora.resolver")
    resolver.LoRAResolver = object
    resolver.LoRAResolverRegistry = SimpleNamespace(register_resolver=resolvers.__setitem__)
    found = {"vllm": types.ModuleType("vllm"), "vllm.lora": types.ModuleType("vllm.lora")}
    found |= {"vllm.lora.request": request, "vllm.lora.resolver": resolver}
    sys.modules.update(found)
    return found


class HonestEngine:
    """An ASGI application that resolves, loads, lists and unloads adapters by vLLM 0.32's rules, lock per name included.

    It has no weights: what is asserted is which requests reach `add_lora`, and what the registry holds.
    """

    def __init__(self, resolvers: dict[str, Any]) -> None:
        locks: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        models = SimpleNamespace(lora_requests={}, lora_resolver_lock=locks)
        self.state = SimpleNamespace(openai_serving_models=models, args=SimpleNamespace())
        self.refuses: set[str] = set()  # paths
        self.added: list[tuple[str, int, str]] = []  # internal name, id, path of what was loaded with success
        self.hangs: set[str] = set()  # paths whose load never ends
        self.kills: set[str] = set()  # paths whose load ends the engine
        self.health = 200
        self.slow = 0.0
        self.takes: Callable[[], float] = lambda: 0.0  # seconds that a completion runs
        self.running: Counter[tuple[str, int, str]] = Counter()  # internal name, id and path of completions
        self.ran: set[tuple[str, int, str]] = set()
        self.version = "0.32.0"
        self.calls: list[tuple[str, str]] = []
        self._resolvers = resolvers
        self._ids = 0

    @property
    def registry(self) -> dict[str, Any]:
        """Public name to LoRARequest."""
        found: dict[str, Any] = self.state.openai_serving_models.lora_requests
        return found

    def paths_of(self, internal: str) -> set[str]:
        """Contents that ran under an internal name."""
        return {path for name, _, path in self.ran if name == internal}

    def next_id(self) -> int:
        self._ids += 1
        return self._ids

    async def add_lora(self, request: Any) -> None:
        await asyncio.sleep(self.slow)
        if self.health != 200:
            raise RuntimeError("EngineCore encountered an issue.")
        if request.lora_path in self.hangs:
            await asyncio.Event().wait()
        if request.lora_path in self.kills:
            self.health = 503
            raise RuntimeError("EngineCore encountered an issue.")
        if request.lora_path in self.refuses:
            raise RuntimeError(f"Worker failed with error 'no {request.lora_path}', please check the stack trace")
        self.added.append((request.lora_name, request.lora_int_id, request.lora_path))

    async def resolve(self, name: str) -> int:
        """The status of a client's request for a model."""
        if name in SERVED_NAMES or name in self.registry:
            return 200
        async with self.state.openai_serving_models.lora_resolver_lock[name]:
            if name in self.registry:
                return 200
            int_id = self.next_id()
            for resolver in self._resolvers.values():
                request = await resolver.resolve_lora("/model", name)
                if request is not None:
                    request.lora_int_id = int_id
                    try:
                        await self.add_lora(request)
                    except RuntimeError:
                        return 400
                    self.registry[name] = request
                    return 200
        return 404

    async def _complete(self, name: str) -> tuple[int, Any]:
        """A completion: the model is checked, the prompt rendered, the adapter looked up once more, and it runs."""
        status = await self.resolve(name)
        if status != 200 or name in SERVED_NAMES:
            return status, {}
        await asyncio.sleep(0)
        request = self.registry.get(name)
        if request is None:
            return 404, {}
        one = (request.lora_name, request.lora_int_id, request.lora_path)
        self.ran.add(one)
        self.running[one] += 1
        beside = {path for internal, _, path in +self.running if internal == request.lora_name}
        assert beside == {request.lora_path}, f"{request.lora_name} runs with {beside} at once"
        await asyncio.sleep(self.takes())
        self.running[one] -= 1
        return 200, {"model": request.lora_name, "path": request.lora_path}

    async def _load(self, name: str, path: str) -> tuple[int, Any]:
        async with self.state.openai_serving_models.lora_resolver_lock[name]:
            request = LoRARequest(name, self.next_id(), path)
            try:
                await self.add_lora(request)
            except RuntimeError as error:
                return 500, {"error": {"message": str(error)}}
            self.registry[name] = request
        return 200, "ok"

    async def _unload(self, name: str) -> tuple[int, Any]:
        async with self.state.openai_serving_models.lora_resolver_lock[name]:
            return (200, "ok") if self.registry.pop(name, None) else (404, {"error": {"message": "not found"}})

    def _models(self) -> Any:
        cards = [{"id": name, "root": "/model", "parent": None} for name in SERVED_NAMES]
        for one in self.registry.values():
            cards.append({"id": one.lora_name, "root": one.lora_path, "parent": one.base_model_name or SERVED_NAMES[0]})
        return {"data": cards}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            while True:
                kind = (await receive())["type"]
                await send({"type": f"{kind}.complete"})
                if kind == "lifespan.shutdown":
                    return
        raw = b""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ConnectionError("the client has gone")
            raw += message.get("body", b"")
            if not message.get("more_body"):
                break
        body = json.loads(raw or b"{}")
        self.calls.append((scope["method"], scope["path"]))
        status, answer = await self._answer(scope["path"], body)
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": json.dumps(answer).encode()})

    async def _answer(self, path: str, body: Any) -> tuple[int, Any]:
        match path:
            case "/tokenize":
                return await self.resolve(body["model"]), {}
            case "/v1/completions":
                return await self._complete(body["model"])
            case "/v1/load_lora_adapter":
                return await self._load(body["lora_name"], body["lora_path"])
            case "/v1/unload_lora_adapter":
                return await self._unload(body["lora_name"])
            case "/v1/models":
                return 200, self._models()
            case "/version":
                return 200, {"version": self.version}
            case "/health":
                return self.health, {}
            case _:
                return 200, {}
