"""What answers under which name: the engine's registry and the history, kept in step.

Others write into the registry, too: clients' own resolutions, which arrive late, and loads and unloads by hand.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .history import History, LoadedContent
from .plugin_settings import PluginSettings
from .tensors import is_inside
from .vllm_adapter import EngineRegistry, PinnedRequest, adapters_in_use, log, make_request


class ServedAdapters:
    """The public names of one engine process, and what answers under each. All methods run on the engine's event loop."""

    def __init__(
        self, settings: PluginSettings, registry: EngineRegistry, oldest_request: Callable[[], float | None]
    ) -> None:
        self.history = History()
        self._registry = registry
        self.keys_have_paths = False  # whether the engine's prefix cache tells contents of one internal name apart
        self._handed: dict[str, float] = {}  # names whose client's resolution is about to write into the registry
        self._settings = settings
        self._oldest_request = oldest_request

    @property
    def has_pending_resolutions(self) -> bool:
        """Whether a client's resolution is about to write into the registry."""
        return bool(self._handed)

    @property
    def is_moving(self) -> bool:
        """Whether old content may be in use, or a plain name waits to come back."""
        longer = any(one.internal != name for name, one in self.history.current.items())
        return bool(self.history.retired) or (longer and self._may_rename())

    def running(self) -> frozenset[str]:
        """Internal names of retired content that requests may still use."""
        return self.history.running(adapters_in_use(), self._oldest_request(), time.monotonic())

    async def put(self, content: LoadedContent) -> None:
        """Make content answer under its public name; with a registry this does not wait, so no request sees a gap."""
        await self._registry.place(content.name, _request(content))
        before = self.history.serve(content, time.monotonic())
        if before is not None:
            await self._remove_aliases(before)
        log.info("lora-operator: %s is served from %s as %s", content.name, content.path, content.internal)

    async def unload(self, name: str) -> None:
        """Let nothing answer under a public name."""
        content = self.history.withdraw(name, time.monotonic())
        await self._registry.remove(name)
        if content is not None:
            await self._remove_aliases(content)
        log.info("lora-operator: %s is unloaded", name)

    def hand(self, asked: str, content: LoadedContent) -> Any:
        """Content that is loaded, for a client whose resolution vLLM will put into its registry in a moment."""
        self._handed[asked] = time.monotonic()
        self.history.touch(content.name, self._handed[asked])
        return _request(content, pinned=True)

    def forget_handed(self, seconds: float) -> None:
        """Wait no longer for resolutions that began so long ago."""
        now = time.monotonic()
        self._handed = {name: since for name, since in self._handed.items() if now - since < seconds}

    async def adopt(self) -> None:
        """Learn what is registered without us: static entries, what clients resolved, what was loaded or unloaded by hand."""
        registered = await self._registry.entries()
        for name in [name for name in self.history.current if name not in registered]:
            self.history.withdraw(name, time.monotonic())
        for name, request in registered.items():
            # Pinned: vLLM put it there for a client whom `hand` answered a while ago. It may be out of date by now.
            fresh = isinstance(request, PinnedRequest)
            if fresh:
                self._handed.pop(name, None)
            owner = self.history.by_internal(name)
            present = self.history.current.get(name)
            if owner is not None and owner.name != name:  # an internal name, by which a client asked
                if self.history.alias(name) is None:
                    await self._registry.remove(name)
                    self.history.touch(owner.name, time.monotonic())
            elif present is not None and fresh:
                await self._registry.place(name, _request(present))
                self.history.touch(name, time.monotonic())
            elif present is not None and present.internal == request.lora_name:
                continue
            elif await asyncio.to_thread(_is_ours, request.lora_path, self._settings.cache_root):
                await self._adopt_entry(name, request, fresh=fresh)
            # else loaded by hand from elsewhere: not ours to judge, the operator shows it

    async def _adopt_entry(self, name: str, request: Any, *, fresh: bool) -> None:
        content = self.history.by_internal(request.lora_name)
        if content is None or content.key != (name, request.lora_path):
            int_id = request.lora_int_id if self._registry.atomic else None
            content = LoadedContent(name, request.lora_path, request.lora_name, int_id, request.base_model_name)
        if fresh:
            await self._registry.place(name, _request(content))
        self.history.serve(content, time.monotonic())

    def _may_rename(self) -> bool:
        return self._registry.atomic and self.keys_have_paths

    async def give_back(self) -> None:
        """Let contents answer under their plain names again where no request of other content can be left.

        Without this every pod would name an adapter after its own past (`sql@1a2b3c4d.7`), in metrics, in /v1/models and in the
        `model` of answers. Two contents that run under one internal name at once would end the engine, hence the wait.
        """
        if not self._may_rename():
            return
        registered = await self._registry.entries()
        for content in self.history.ready_for_plain_name(adapters_in_use(), self._oldest_request(), time.monotonic()):
            if not isinstance(registered.get(content.name), PinnedRequest):  # else `adopt` sees to it first
                await self.put(content)

    async def _remove_aliases(self, content: LoadedContent) -> None:
        """Content that is served no more must not be reached by its internal names either; clients may have asked by them."""
        names = self.history.aliases(content.name) if self._registry.atomic else {content.internal} - {content.name}
        for alias in names:
            await self._registry.remove(alias)


def _request(content: LoadedContent, *, pinned: bool = False) -> Any:
    """A LoRARequest with the internal name, id and path that this content was loaded with: so the engine uses the weights that it has."""
    return make_request(
        internal=content.internal,
        int_id=content.int_id,
        path=content.path,
        base_model_name=content.base_model_name,
        pinned=pinned,
    )


def _is_ours(path: str, root: Path) -> bool:
    return is_inside(Path(os.path.realpath(path)), root)
