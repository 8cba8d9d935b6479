"""What answers under which name: the engine's registry and the ledger, kept in step.

Others write into the registry, too: clients' own resolutions, which arrive late, and loads and unloads by hand.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .history import Generation, Ledger
from .list_file import Settings
from .tensors import is_inside
from .vllm_adapter import PinnedRequest, Served, adapters_in_use, log, make_request


class Names:
    """The names of one engine process. All methods run on the engine's event loop."""

    def __init__(self, settings: Settings, served: Served, oldest_request: Callable[[], float | None]) -> None:
        self.ledger = Ledger()
        self.served = served
        self.keys_have_paths = False  # whether the engine's prefix cache tells contents of one internal name apart
        self._handed: dict[str, float] = {}  # names whose client's resolution is about to write into the registry
        self._settings = settings
        self._oldest_request = oldest_request

    @property
    def are_handed(self) -> bool:
        """Whether a client's resolution is about to write into the registry."""
        return bool(self._handed)

    @property
    def are_moving(self) -> bool:
        """Whether old content may be in use, or a plain name waits to come back."""
        longer = any(one.internal != name for name, one in self.ledger.current.items())
        return bool(self.ledger.retired) or (longer and self._may_rename())

    def running(self) -> frozenset[str]:
        """Internal names of retired content that requests may still use."""
        return self.ledger.running(adapters_in_use(), self._oldest_request(), time.monotonic())

    async def put(self, generation: Generation) -> None:
        """Make content answer under its public name; with a registry this does not wait, so no request sees a gap."""
        await self.served.place(generation.name, _request(generation))
        before = self.ledger.serve(generation, time.monotonic())
        if before is not None:
            await self._remove_aliases(before)
        log.info("lora-operator: %s is served from %s as %s", generation.name, generation.path, generation.internal)

    async def unload(self, name: str) -> None:
        """Let nothing answer under a public name."""
        generation = self.ledger.withdraw(name, time.monotonic())
        await self.served.remove(name)
        if generation is not None:
            await self._remove_aliases(generation)
        log.info("lora-operator: %s is unloaded", name)

    def hand(self, asked: str, generation: Generation) -> Any:
        """Content that is loaded, for a client whose resolution vLLM will put into its registry in a moment."""
        self._handed[asked] = time.monotonic()
        self.ledger.touch(generation.name, self._handed[asked])
        return _request(generation, pinned=True)

    def forget_handed(self, seconds: float) -> None:
        """Wait no longer for resolutions that began so long ago."""
        now = time.monotonic()
        self._handed = {name: since for name, since in self._handed.items() if now - since < seconds}

    async def adopt(self) -> None:
        """Learn what is registered without us: static entries, what clients resolved, what was loaded or unloaded by hand."""
        entries = await self.served.entries()
        for name in [name for name in self.ledger.current if name not in entries]:
            self.ledger.withdraw(name, time.monotonic())
        for name, request in entries.items():
            fresh = isinstance(
                request, PinnedRequest
            )  # a client's resolution; what it put there may be out of date by now
            if fresh:
                self._handed.pop(name, None)
            owner = self.ledger.by_internal(name)
            present = self.ledger.current.get(name)
            if owner is not None and owner.name != name:  # an internal name, by which a client asked
                if self.ledger.alias(name) is None:
                    await self.served.remove(name)
                    self.ledger.touch(owner.name, time.monotonic())
            elif present is not None and fresh:
                await self.served.place(name, _request(present))
                self.ledger.touch(name, time.monotonic())
            elif present is not None and present.internal == request.lora_name:
                continue
            elif await asyncio.to_thread(_is_ours, request.lora_path, self._settings.cache_root):
                await self._adopt_entry(name, request, fresh=fresh)
            # else loaded by hand from elsewhere: not ours to judge, the operator shows it

    async def _adopt_entry(self, name: str, request: Any, *, fresh: bool) -> None:
        generation = self.ledger.by_internal(request.lora_name)
        if generation is None or generation.key != (name, request.lora_path):
            int_id = request.lora_int_id if self.served.atomic else None
            generation = Generation(name, request.lora_path, request.lora_name, int_id, request.base_model_name)
        if fresh:
            await self.served.place(name, _request(generation))
        self.ledger.serve(generation, time.monotonic())

    def _may_rename(self) -> bool:
        return self.served.atomic and self.keys_have_paths

    async def give_back(self) -> None:
        """Let contents answer under their plain names again where no request of other content can be left."""
        if not self._may_rename():
            return
        entries = await self.served.entries()
        for generation in self.ledger.renamed(adapters_in_use(), self._oldest_request(), time.monotonic()):
            if not isinstance(
                entries.get(generation.name), PinnedRequest
            ):  # else a client's resolution came in between
                await self.put(generation)

    async def _remove_aliases(self, generation: Generation) -> None:
        """Content that is served no more must not be reached by its internal names either; clients may have asked by them."""
        names = (
            self.ledger.aliases(generation.name) if self.served.atomic else {generation.internal} - {generation.name}
        )
        for alias in names:
            await self.served.remove(alias)


def _request(generation: Generation, *, pinned: bool = False) -> Any:
    """The same LoRARequest as ever: same internal name, same id, same path."""
    return make_request(
        internal=generation.internal,
        int_id=generation.int_id,
        path=generation.path,
        base_model_name=generation.base_model_name,
        pinned=pinned,
    )


def _is_ours(path: str, root: Path) -> bool:
    return is_inside(Path(os.path.realpath(path)), root)
