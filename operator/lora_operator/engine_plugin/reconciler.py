"""Keeps what an engine serves equal to the adapter list: level-triggered, one load at a time, by itself.

A pass compares the list with the engine's registry and repairs the difference; lists, clients' requests and the clock only wake it.
One failing adapter never holds up another: it is recorded, and tried again with back-off. What clients ask for is never loaded on
their behalf: they wait until the reconciler has loaded it, so there is one loader and no race.

How content B takes the place of content A under the name `sql`, with vLLM's registry at hand (DictRegistry):

    operator         list source       reconciler            engine's registry      engine
       |  PUT list       |                 |                        |                 |
       |---------------->| on disk, held   |                        |                 |
       |                 |---- wake ------>| check the files of B   |                 |
       |                 |                 |  prime: POST /tokenize for a scratch name  |
       |                 |                 |----------------------------------------->| asks the resolver:
       |                 |                 |  sql@1a2b3c4d.7 -> B, with a new id       | it gets B's request,
       |                 |                 |<-----------------------------------------| and loads B
       |                 |                 |  swap: sql -> B        |                 |
       |                 |                 |----------------------->| new requests    |
       |                 |                 |                        | run with B,     |
       |                 |                 |  retire A              | old ones with A |
       |<------------- state: loaded B, retired A (running) --------|                 |
       |                 |                 |  no request can use A any more           |
       |                 |                 |  forget A's retirement; its id stays A's |
       |                 |                 |  1 s without a sign of A under any name  |
       |                 |                 |  give back: sql -> B as plain `sql`      |
       |                 |                 |----------------------->|                 |
       |<------------- state: loaded B as sql, nothing retired -----|                 |

prime       The engine loads B before any client can reach it, so nobody waits for the load and a failing one hurts nobody.
swap        One assignment to vLLM's dictionary, without waiting: every request finds either A or B.
retire      Requests that began before go on with A's id and files, so the operator keeps A's files meanwhile.
give back   B's internal name becomes the plain one again, in engines whose prefix cache tells paths apart (history.py says why).

When A comes back, its old request is put in place again (History.recall): the engine has its weights by A's id. Without the dictionary
(RoutesRegistry) A is unloaded first, and requests in between are refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from .checks import CONFIG, WEIGHTS
from .history import LoadedContent
from .list_file import ListedAdapter, ReceivedList
from .list_source import ListSource
from .loader import Loader
from .loads import BLAME
from .plugin_settings import PluginSettings
from .served_adapters import ServedAdapters
from .vllm_adapter import EngineClient, EngineRegistry, log

PASS_SECONDS: Final = 3.0  # between looks at the registry and the mounted list when nothing happens
DRAINING_SECONDS: Final = 0.5  # and while old content may be in use, or a plain name waits to come back
HANDED_SECONDS: Final = 2.0  # how long a client's resolution of what is loaded may take before nobody waits for it
RESOLVE_SECONDS: Final = 60.0  # how long a client's request waits for a listed adapter to be loaded
VANISHED_SECONDS: Final = 15.0  # between looks whether the files of what is served are still there


class Reconciler:
    """The work of one engine process. All methods run on the engine's event loop."""

    def __init__(
        self,
        settings: PluginSettings,
        registry: EngineRegistry,
        client: EngineClient,
        *,
        oldest_request: Callable[[], float | None],
    ) -> None:
        self.list_source = ListSource(settings, self._list_changed)
        self.served = ServedAdapters(settings, registry, oldest_request)
        self.history = self.served.history
        self.loader = Loader(settings, registry, client, self.history)
        self.loads = self.loader.loads
        self.registry = registry
        self.loads_while_running = True
        self._settings = settings
        self._owners: dict[str, str] = {}  # by public name: the uid of whose content was put there
        self._asked: set[str] = set()  # Lazy names that somebody asked for
        self._settled: ReceivedList | None = None
        # All was tried once, and nothing may be loaded while requests run (updateStrategy Rollout, or too old a vLLM).
        self._closed = False
        self._changed = asyncio.Event()
        self._wake = asyncio.Event()
        self._vanished_at = time.monotonic()

    # What the outside asks

    @property
    def settled(self) -> bool:
        """Whether everything of the list was tried, and nothing is on its way into the registry."""
        return self._settled is self.list_source.held and not self.served.has_pending_resolutions

    def waiting(self) -> list[ListedAdapter]:
        """Lazy entries of the list that are not loaded: the first request for each loads it."""
        entries = self.list_source.held.entries if self.list_source.held is not None else ()
        return [entry for entry in entries if entry.lazy and entry.name not in self.history.current]

    async def wait_settled(self, seconds: float) -> None:
        """Wait until everything of the present list was tried, but at most so long."""
        await self._wait(lambda: self.settled, seconds)

    async def resolve(self, asked: str) -> Any | None:
        """vLLM's question for a name that is not in its registry, for a load of ours or on a client's behalf."""
        offered = self.registry.offered(asked)
        if offered is not None or not self.registry.atomic:
            return offered
        alias = self.history.alias(asked)
        if alias is not None:
            return self._hand(asked, alias)
        if self.list_source.entry(asked) is None:
            await self.list_source.reread()
        if self._may_come(asked):
            self._wake.set()
            await self._wait(lambda: not self._may_come(asked), RESOLVE_SECONDS)
        present = self.history.current.get(asked)
        return None if present is None or self.list_source.entry(asked) is None else self._hand(asked, present)

    # The loop

    async def start(self) -> None:
        """Before the engine takes requests: find the newest list and load all of it."""
        self.loads.recover()
        await self.list_source.start()
        await self.served.adopt()
        await self._pass()

    async def run(self) -> None:
        """Look again whenever something happens, and every few seconds."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._pause()):
                    await self._wake.wait()
            self._wake.clear()
            try:
                await self.list_source.reread()
                await self._pass()
            except Exception:
                log.exception("lora-operator: a pass failed, the next one comes in %s s", PASS_SECONDS)
                await asyncio.sleep(PASS_SECONDS)

    def _pause(self) -> float:
        if self.served.has_pending_resolutions:
            return 0.1
        longest = min(PASS_SECONDS, DRAINING_SECONDS) if self.served.is_moving else PASS_SECONDS
        retry = None if self._closed else self.history.next_retry()
        return longest if retry is None else max(0.05, min(longest, retry - time.monotonic()))

    async def _pass(self) -> None:
        """Make the registry what the list says: first what must go, then what is missing."""
        await self.served.adopt()
        received = self.list_source.held
        if received is None:
            return
        await self._drop_unlisted(received)
        await self._drop_vanished()
        for entry in received.entries:
            present = self.history.current.get(entry.name)
            if present is not None and present.path == entry.path:
                if present.base_model_name != entry.base_model_name and self.registry.atomic:
                    await self.served.put(replace(present, base_model_name=entry.base_model_name))
            elif self._is_due(entry) and not self._must_wait(entry):
                await self._load(entry)
                if self.list_source.held is not received:
                    return  # a newer list came meanwhile; it has woken the loop
        await self._drop_foreign(received.entries)
        self.served.forget_handed(HANDED_SECONDS)
        self.history.forget_retired(self.served.running())
        await self.served.give_back()
        if self.list_source.held is received:
            self._settled = received
        self._closed = self._settings.rolls or not self.loads_while_running
        self._notify()

    # What must go

    async def _drop_unlisted(self, received: ReceivedList) -> None:
        """Unload what the list does not have, and forget what was only known of it."""
        for name in [name for name in self.history.current if name not in received.by_name]:
            await self.served.unload(name)
        keys = {(entry.name, entry.path) for entry in received.entries}
        self._asked &= received.by_name.keys()
        self.history.keep_failures(keys)
        await self.loader.forget_others(keys)

    async def _drop_vanished(self) -> None:
        """Stop serving what has no files any more: one request for it after an eviction would end the engine."""
        now = time.monotonic()
        if now - self._vanished_at < VANISHED_SECONDS:
            return
        self._vanished_at = now
        paths = {name: content.path for name, content in self.history.current.items()}
        for name in await asyncio.to_thread(_vanished, paths):
            log.error("lora-operator: the files of %s are gone from %s", name, paths[name])
            await self.served.unload(name)

    async def _drop_foreign(self, entries: tuple[ListedAdapter, ...]) -> None:
        """Where a name went to another object whose content can't be loaded, what the last one left must not answer for it."""
        for entry in entries:
            present = self.history.current.get(entry.name)
            if present is None or present.path == entry.path:
                self._owners[entry.name] = entry.uid
            elif self._owners.get(entry.name, entry.uid) != entry.uid:
                await self.served.unload(entry.name)

    # What is missing

    def _is_due(self, entry: ListedAdapter) -> bool:
        """Whether an entry is to be loaded now: a Lazy one when it was asked for, or serves other content already.

        Without the registry a client holds vLLM's lock on the name while it asks, so nothing could be loaded for it: then all are.
        """
        lazy = entry.lazy and self.registry.atomic
        return not lazy or entry.name in self._asked or entry.name in self.history.current

    async def _load(self, entry: ListedAdapter) -> None:
        """Put an entry's content in place: as it was loaded before, or else loaded now.

        Only what this process has never loaded is asked of the engine, which a load may end; so that comes last, behind all reasons
        not to. What it has loaded once is put back by its old id at any time, even where nothing may be loaded while requests run.
        """
        problem = await asyncio.to_thread(self.loader.check, entry)
        number = self.list_source.held.generation if self.list_source.held is not None else 0
        known = self.history.recall(entry, number)
        if known is None and entry.path in self.loads.suspects:
            self.history.quarantine(entry, BLAME)
            log.error("lora-operator: %s is not served: %s", entry.name, BLAME)
            return
        if problem is None and known is None and self._closed:
            why = "updateStrategy: Rollout" if self._settings.rolls else "vLLM older than 0.26"
            problem = f"it was not loaded when the engine started, and is not while it runs ({why})"
        if problem is not None:
            self._fail(entry, "checks", problem)
            return
        content = known or await self.loader.load(entry, number)
        if isinstance(content, str):
            self._fail(entry, "engine", content)
            return
        if self.list_source.entry(entry.name) == entry:  # the load may have taken minutes: a newer list decides
            self._owners[entry.name] = entry.uid
            await self.served.put(replace(content, base_model_name=entry.base_model_name))
            self._notify()
        elif not self.registry.atomic:
            await self.registry.remove(entry.name)

    # Pieces

    def _list_changed(self) -> None:
        self._settled = None
        self._wake.set()
        self._notify()

    def _may_come(self, name: str) -> bool:
        """Whether a listed adapter is not there yet and is not known to have failed; a Lazy one comes because of the question."""
        entry = self.list_source.entry(name)
        if entry is None or name in self.history.current or (name, entry.path) in self.history.failures:
            return False
        if entry.lazy and name not in self._asked:  # also when it left the list and came back while a client waits
            self._asked.add(name)
            self._wake.set()
        return True

    def _must_wait(self, entry: ListedAdapter) -> bool:
        """Whether an adapter failed so lately that it is not tried now; with updateStrategy Rollout a start tries it once."""
        failed = (entry.name, entry.path) in self.history.failures
        if self._closed and failed and not self.history.has_loaded(entry):
            return True
        return self.history.must_wait(entry, time.monotonic())

    def _fail(self, entry: ListedAdapter, stage: str, message: str) -> None:
        now = time.monotonic()
        failure = self.history.fail(entry, stage, message, now)
        only_at_start = self._closed and not self.history.has_loaded(entry)
        again = "at the next start" if only_at_start else f"in {failure.retry_at - now:.0f} s"
        log.warning("lora-operator: %s is not served: %s (next try %s)", entry.name, failure.message, again)
        self._notify()

    def _hand(self, asked: str, content: LoadedContent) -> Any:
        self._wake.set()
        return self.served.hand(asked, content)

    def _notify(self) -> None:
        """Wake everything that waits by `_wait`; each looks for itself whether it is what it waits for."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def _wait(self, done: Callable[[], bool], seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not done():
                    await self._changed.wait()


def _vanished(paths: dict[str, str]) -> list[str]:
    """Names whose files are certainly gone; a file system that does not answer is no proof."""
    gone = []
    for name, path in paths.items():
        for file in (CONFIG, WEIGHTS):
            try:
                (Path(path) / file).stat()
            except (FileNotFoundError, NotADirectoryError):
                gone.append(name)
                break
            except OSError:
                continue
    return gone
