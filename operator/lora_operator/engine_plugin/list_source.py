"""The adapter list that a process holds: from its disk, from the operator by HTTP, and from the mounted ConfigMap.

The highest generation wins, an older one is refused, and nothing is acknowledged that is not on disk. With updateStrategy Rollout it
comes from the disk only, where the launcher put what it found in the arguments.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from .list_file import ListedAdapter, ListProblem, ReceivedList, newest_list, parse_list, read_list
from .plugin_settings import PluginSettings
from .state_files import write_file

REREAD_SECONDS: Final = 1.0  # at most so often is the mounted list looked at


class ListSource:
    """The list that is held now; `changed` is called each time another one takes its place."""

    def __init__(self, settings: PluginSettings, changed: Callable[[], None]) -> None:
        self.held: ReceivedList | None = None  # None: no list was ever received
        self._settings = settings
        self._changed = changed
        self._accepting = asyncio.Lock()  # so that of two lists the newer one ends up on disk and in memory
        self._reread_at = 0.0
        self._mounted: tuple[int, ...] | None = None

    def entry(self, name: str) -> ListedAdapter | None:
        """The entry of a public name; None where the list has none."""
        return self.held.by_name.get(name) if self.held is not None else None

    async def start(self) -> None:
        """Take the newest list that is there already."""
        one = self._settings
        found = await asyncio.to_thread(newest_list, *one.list_files, served_names=one.served_names)
        if found is not None:
            self._take(found)

    async def accept(self, raw: bytes) -> tuple[int, str]:
        """Take a list and keep it on disk; status 200, 400, 405, 409 or 500, and what is wrong."""
        if self._settings.rolls:
            return (
                405,
                "the adapters are in the pod's arguments (updateStrategy: Rollout): another list needs another pod",
            )
        try:
            received, plain = await asyncio.to_thread(parse_list, raw, served_names=self._settings.served_names)
        except ListProblem as problem:
            return 400, str(problem)
        async with self._accepting:
            held = self.held.generation if self.held is not None else -1
            if received.generation < held:
                return 409, f"list generation {held} is held, {received.generation} is older"
            try:
                await asyncio.to_thread(write_file, self._settings.list_file, plain)
            except OSError as error:
                return 500, f"the list can't be kept in {self._settings.state_dir}: {error.strerror}"
            self._take(received)
        return 200, ""

    async def reread(self) -> None:
        """Look whether the mounted list is newer than the one that is held."""
        now = time.monotonic()
        if now < self._reread_at or self._settings.rolls:
            return
        self._reread_at = now + REREAD_SECONDS
        signature = await asyncio.to_thread(_signature, self._settings.mounted_list)
        if signature == self._mounted:
            return
        self._mounted = signature
        names = self._settings.served_names
        found = await asyncio.to_thread(read_list, self._settings.mounted_list, served_names=names)
        async with self._accepting:
            if found is not None and (self.held is None or found.generation > self.held.generation):
                self._take(found)

    def _take(self, received: ReceivedList) -> None:
        if received != self.held:  # a pod may be sent other content of one generation: what it is to preload
            self.held = received
            self._changed()


def _signature(path: Path) -> tuple[int, ...] | None:
    """What changes with a file's content; None when there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size
