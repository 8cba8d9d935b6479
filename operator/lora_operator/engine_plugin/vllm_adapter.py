"""All that knows vLLM: its routes, its registry of adapters, its resolver hook, its metrics, and which version does what.

Everything that depends on vLLM is in this file: `vllm.lora.request`, `vllm.lora.resolver`, public routes, and one thing that is not
public, the dictionary of `find_registry`. It never decides what is served; reconciler.py does.

Rules that must hold whatever happens (docs/decisions.md 1 and 16): no second integer id for one content, no second content for one id,
and no two contents under one internal name at once. Hence vLLM's own loading is only ever asked for a scratch name, or where that is
impossible (no registry) for the name itself under vLLM's lock; and what is handed out a second time keeps its id.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
from collections import defaultdict
from collections.abc import Awaitable, Callable
from typing import Any, Final, Protocol
from weakref import WeakValueDictionary

from vllm.lora.request import LoRARequest  # type: ignore[import-not-found]
from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry  # type: ignore[import-not-found]

from .asgi import InProcessClient
from .clean_text import clean
from .versions import parse_version

log = logging.getLogger("vllm.lora_operator_plugin")

SCRATCH: Final = "@lora-operator-"  # prefix of names that only the plugin uses, for moments; no adapter may have an @
_CAUSE: Final = re.compile(r"Worker failed with error '(.*)', please check the stack trace", re.DOTALL)


def keys_have_paths(version: str) -> bool:
    """Whether prefix-cache keys hold the adapter's path, so that blocks of one internal name's contents are kept apart.

    Name only in 0.11.1 to 0.30, name and path from 0.31.0 on. Of an unknown version the worse is assumed.
    """
    parsed = parse_version(version)
    return parsed is not None and parsed >= (0, 31)


def loads_while_running(version: str) -> bool:
    """Whether an adapter may be loaded while requests run: before 0.26 that can change their answers.

    Of an unknown version (a build of one's own) the better is assumed, as by the operator.
    """
    parsed = parse_version(version)
    return parsed is None or parsed >= (0, 26)


class PinnedRequest(LoRARequest):  # type: ignore[misc]
    """A request for an adapter that is already known by its integer id, which vLLM's resolution would overwrite."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "lora_int_id" or not hasattr(self, name):
            super().__setattr__(name, value)


def make_request(
    *, internal: str, int_id: int | None, path: str, base_model_name: str | None, pinned: bool = False
) -> Any:
    """A LoRARequest; without an id it gets one from vLLM when that resolves it."""
    kind = PinnedRequest if pinned else LoRARequest
    return kind(lora_name=internal, lora_int_id=int_id or 1, lora_path=path, base_model_name=base_model_name)


class Resolver(LoRAResolver):  # type: ignore[misc]
    """vLLM asks it for every name that it has not loaded; it asks whoever is behind `answer`."""

    def __init__(self) -> None:
        self.answer: Callable[[str], Awaitable[Any | None]] | None = None

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any | None:
        """The request to load for a name, or None; never raises, for that would be a client's 500."""
        try:
            return None if self.answer is None else await self.answer(lora_name)
        except Exception:
            log.exception("lora-operator: resolving %s failed", clean(lora_name, limit=120))
            return None


RESOLVER: Final = Resolver()
LoRAResolverRegistry.register_resolver("lora-operator", RESOLVER)


def find_registry(app: Any) -> dict[str, Any] | None:
    """vLLM's dictionary of public name to LoRARequest; None where this version keeps it elsewhere.

    The one thing that is not public. It was a plain dictionary in all versions from 0.10 to 0.32.
    """
    found = getattr(getattr(getattr(app, "state", None), "openai_serving_models", None), "lora_requests", None)
    return found if type(found) is dict else None


class _Locks(WeakValueDictionary[str, asyncio.Lock]):
    """A lock per name for as long as somebody has it or waits for it."""

    def __getitem__(self, name: str) -> asyncio.Lock:
        lock = self.get(name)
        if lock is None:
            lock = self[name] = asyncio.Lock()
        return lock


def forget_unknown_names(app: Any) -> None:
    """Let vLLM keep no name that clients ask for: it has a lock for each, and never forgets one (vLLM 0.10 to 0.33).

    Where this version has no such dictionary nothing is changed. Before the first request, so no lock is held.
    """
    models: Any = getattr(getattr(app, "state", None), "openai_serving_models", None)
    if type(getattr(models, "lora_resolver_lock", None)) is defaultdict:
        models.lora_resolver_lock = _Locks()


def caches_media_by_name(app: Any) -> bool:
    """Whether the engine keeps what adapters made of images under the adapter's name alone: then no other content may have that name.

    So with --enable-tower-connector-lora (`InputProcessor._get_mm_identifier` of vLLM 0.26 to 0.33). Of an engine that does not tell its
    settings the worse is assumed.
    """
    state = getattr(app, "state", None)
    for settings in (getattr(getattr(state, "vllm_config", None), "lora_config", None), getattr(state, "args", None)):
        if settings is not None:
            return bool(getattr(settings, "enable_tower_connector_lora", False))
    return True


class EngineClient(InProcessClient):
    """The engine's own routes that the plugin asks, beside those that the registries below use."""

    async def is_alive(self) -> bool:
        """Whether the engine says of itself that it works."""
        try:
            return (await self.call("GET", "/health"))[0] == 200
        except Exception:
            return False

    async def diagnose(self, path: str) -> str | None:
        """Why the engine does not load an adapter, in its own words; None when it does load it this time."""
        name = f"{SCRATCH}diagnosis-{secrets.token_hex(8)}"
        body = {"lora_name": name, "lora_path": path}
        status, answer = await self.call("POST", "/v1/load_lora_adapter", body, seconds=None)
        if status == 200:
            await self.call("POST", "/v1/unload_lora_adapter", {"lora_name": name})
            return None
        error = answer.get("error") if isinstance(answer, dict) else None
        message = error.get("message") if isinstance(error, dict) else None
        if not isinstance(message, str) or not message.strip():
            return f"the engine answered {status} and gave no cause"
        cause = _CAUSE.search(message)
        text = cause.group(1) if cause else message
        return clean(text.replace(name, "it")) or "the engine gave an empty cause"


class EngineRegistry(Protocol):
    """How adapters get into the engine's registry and out of it."""

    atomic: bool

    async def entries(self) -> dict[str, Any]:
        """What is registered: public name to something with lora_name, lora_int_id, lora_path and base_model_name."""

    async def load(self, name: str, request: Any) -> bool:
        """Make the engine load what was never loaded; False when it did not. `place` or `remove` follows."""

    async def place(self, name: str, request: Any) -> None:
        """Put what is loaded under a public name, in the place of what is there."""

    async def remove(self, name: str) -> None:
        """Take a public name away; nothing happens when it is not there."""

    def offered(self, asked: str) -> Any | None:
        """The request that is being loaded under the name that the resolver is asked for."""


class DictRegistry:
    """By vLLM's own dictionary: loaded under a scratch name, then put in place in one step, so no request sees a gap."""

    atomic = True

    def __init__(self, client: EngineClient, registry: dict[str, Any]) -> None:
        self._client = client
        self._registry = registry
        self._offer: tuple[str, Any] | None = None

    async def entries(self) -> dict[str, Any]:
        """What the dictionary holds, without the plugin's own scratch names."""
        return {name: request for name, request in self._registry.items() if not name.startswith(SCRATCH)}

    async def load(self, name: str, request: Any) -> bool:
        """Prime by tokenising one letter for an unguessable name that the resolver answers with `request`."""
        key = f"{SCRATCH}prime-{secrets.token_hex(16)}"
        self._offer = (key, request)
        try:
            await self._client.call("POST", "/tokenize", {"model": key, "prompt": "x"}, seconds=None)
        finally:
            self._offer = None
            found = self._registry.pop(key, None)
        return found is request

    async def place(self, name: str, request: Any) -> None:
        """One assignment; nothing here may ever wait."""
        self._registry[name] = request

    async def remove(self, name: str) -> None:
        """One removal; requests that run keep what they have."""
        self._registry.pop(name, None)

    def offered(self, asked: str) -> Any | None:
        """The request of the load that is going on."""
        return self._offer[1] if self._offer is not None and self._offer[0] == asked else None


class RoutesRegistry:
    """Where there is no such dictionary: unload and load again by public routes; a few requests fall into the gap."""

    atomic = False

    def __init__(self, client: EngineClient) -> None:
        self._client = client
        self._offer: tuple[str, Any] | None = None
        self._known: dict[str, Any] = {}

    async def entries(self) -> dict[str, Any]:
        """What /v1/models lists, under the names by which the plugin loaded it."""
        status, answer = await self._client.call("GET", "/v1/models")
        listed: dict[str, Any] = {}
        data = answer.get("data") if status == 200 and isinstance(answer, dict) else []
        for card in data if isinstance(data, list) else []:
            if isinstance(card, dict) and card.get("parent") and card.get("root"):
                listed[str(card["id"])] = card
        found = {name: request for name, request in self._known.items() if listed.pop(request.lora_name, None)}
        for name, card in listed.items():
            if name not in found and not name.startswith(SCRATCH):
                found[name] = make_request(
                    internal=name, int_id=None, path=str(card["root"]), base_model_name=str(card["parent"])
                )
        return found

    async def load(self, name: str, request: Any) -> bool:
        """Unload the name and prime it anew; vLLM's lock per name keeps clients' own resolutions apart."""
        await self.remove(name)
        self._offer = (name, request)
        try:
            status, _ = await self._client.call("POST", "/tokenize", {"model": name, "prompt": "x"}, seconds=None)
        finally:
            self._offer = None
        if status == 200:
            self._known[name] = request
        return status == 200

    async def place(self, name: str, request: Any) -> None:
        """It is there since it was loaded; what was loaded earlier is primed once more under its own id."""
        there = self._known.get(name)
        if there is None or there.lora_int_id != request.lora_int_id:
            again = make_request(
                internal=request.lora_name,
                int_id=request.lora_int_id,
                path=request.lora_path,
                base_model_name=request.base_model_name,
                pinned=True,
            )
            await self.load(name, again)

    async def remove(self, name: str) -> None:
        """By vLLM's public route, which waits for its lock on the name."""
        self._known.pop(name, None)
        await self._client.call("POST", "/v1/unload_lora_adapter", {"lora_name": name})

    def offered(self, asked: str) -> Any | None:
        """The request of the load that is going on; whoever asks for it first makes the engine load it."""
        return self._offer[1] if self._offer is not None and self._offer[0] == asked else None


def adapters_in_use() -> frozenset[str] | None:
    """Internal names that have running or waiting requests; None when the metrics do not tell.

    Every combination of labels ever seen stays for ever in vllm:lora_requests_info, its value being when it was last true: only
    the newest one counts.
    """
    try:
        from prometheus_client import REGISTRY  # type: ignore[import-not-found]
    except ImportError:
        return None
    newest, names = -1.0, None
    for metric in REGISTRY.restricted_registry(["vllm:lora_requests_info"]).collect():
        for sample in metric.samples:
            if sample.value > newest:
                newest = sample.value
                listed = [sample.labels.get(f"{state}_lora_adapters", "") for state in ("running", "waiting")]
                names = frozenset(name for part in listed for name in part.split(",") if name)
    return names
