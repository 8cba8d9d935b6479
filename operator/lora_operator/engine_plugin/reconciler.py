"""Keeps what an engine serves equal to the module list: level-triggered, one load at a time, by itself.

A pass compares the list with the engine's registry and repairs the difference; lists, clients' requests and the clock only wake it.
One failing adapter never holds up another: it is recorded, and tried again with back-off. What clients ask for is never loaded on
their behalf: they wait until the keeper has loaded it, so there is one loader and no race.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from .basemodel import BaseModel
from .checks import CONFIG, WEIGHTS
from .history import Generation
from .launcher import check_module, read_base
from .list_file import REFUSED_FILE, Module, ModuleList, Settings, read_refused, write_refused
from .list_source import Inbox
from .loads import BLAME, UNANSWERED, UNREADY_SECONDS, Loads
from .served import Names
from .text import clean
from .versions import Version
from .vllm_adapter import Caller, Served, log, make_request

PASS_SECONDS: Final = 3.0  # between looks at the registry and the mounted list when nothing happens
DRAINING_SECONDS: Final = 0.5  # and while old content may be in use, or a plain name waits to come back
HANDED_SECONDS: Final = 2.0  # how long a client's resolution of what is loaded may take before nobody waits for it
RESOLVE_SECONDS: Final = 60.0  # how long a client's request waits for a listed adapter to be loaded
VANISHED_SECONDS: Final = 15.0


class Keeper:
    """The work of one engine process. All methods run on the engine's event loop."""

    def __init__(
        self, settings: Settings, served: Served, caller: Caller, *, oldest_request: Callable[[], float | None]
    ) -> None:
        self.inbox = Inbox(settings, self._list_changed)
        self.names = Names(settings, served, oldest_request)
        self.ledger = self.names.ledger
        self.loads = Loads(settings.state_dir)
        self.served = served
        self._settings = settings
        self._caller = caller
        self._owners: dict[str, str] = {}  # by public name: the uid of whose content was put there
        self._asked: set[str] = set()  # Lazy names that somebody asked for
        self._settled: ModuleList | None = None
        self.loads_while_running = True
        self.engine: Version | None = None  # not known, so far
        self._closed = (
            False  # all was tried once, and nothing may be loaded while requests run (updateStrategy Rollout)
        )
        self._changed = asyncio.Event()
        self._wake = asyncio.Event()
        self._vanished_at = time.monotonic()
        self._refused = read_refused(settings.state_dir / REFUSED_FILE)
        self._base: BaseModel | None = None
        self._base_read = False

    # What the outside asks

    @property
    def settled(self) -> bool:
        """Whether everything of the list was tried, and nothing is on its way into the registry."""
        return self._settled is self.inbox.modules and not self.names.are_handed

    def waiting(self) -> list[Module]:
        """Lazy entries of the list that are not loaded: the first request for each loads it."""
        modules = self.inbox.modules.modules if self.inbox.modules is not None else ()
        return [module for module in modules if module.lazy and module.name not in self.ledger.current]

    async def wait_settled(self, seconds: float) -> None:
        """Wait until everything of the present list was tried, but at most so long."""
        await self._wait(lambda: self.settled, seconds)

    async def resolve(self, asked: str) -> Any | None:
        """vLLM's question for a name that is not in its registry, for a load of ours or on a client's behalf."""
        offered = self.served.offered(asked)
        if offered is not None or not self.served.atomic:
            return offered
        alias = self.ledger.alias(asked)
        if alias is not None:
            return self._hand(asked, alias)
        if self.inbox.wanted(asked) is None:
            await self.inbox.reread()
        if self._may_come(asked):
            self._wake.set()
            await self._wait(lambda: not self._may_come(asked), RESOLVE_SECONDS)
        present = self.ledger.current.get(asked)
        return None if present is None or self.inbox.wanted(asked) is None else self._hand(asked, present)

    # The loop

    async def start(self) -> None:
        """Before the engine takes requests: find the newest list and load all of it."""
        self.loads.recover()
        await self.inbox.start()
        await self.names.adopt()
        await self._pass()

    async def run(self) -> None:
        """Look again whenever something happens, and every few seconds."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._pause()):
                    await self._wake.wait()
            self._wake.clear()
            try:
                await self.inbox.reread()
                await self._pass()
            except Exception:
                log.exception("lora-operator: a pass failed, the next one comes in %s s", PASS_SECONDS)
                await asyncio.sleep(PASS_SECONDS)

    def _pause(self) -> float:
        if self.names.are_handed:
            return 0.1
        longest = min(PASS_SECONDS, DRAINING_SECONDS) if self.names.are_moving else PASS_SECONDS
        retry = None if self._closed else self.ledger.next_retry()
        return longest if retry is None else max(0.05, min(longest, retry - time.monotonic()))

    async def _pass(self) -> None:
        """Make the registry what the list says: first what must go, then what is missing."""
        await self.names.adopt()
        modules = self.inbox.modules
        if modules is None:
            return
        for name in [name for name in self.ledger.current if name not in modules.by_name]:
            await self.names.unload(name)
        keys = {(module.name, module.path) for module in modules.modules}
        self._asked &= modules.by_name.keys()
        self.ledger.keep_failures(keys)
        if not self.loads.suspects <= (paths := {path for _, path in keys}):
            await asyncio.to_thread(self.loads.keep_suspects, paths)
        await self._write_refused({key: cause for key, cause in self._refused.items() if key in keys})
        await self._drop_vanished()
        for module in modules.modules:
            present = self.ledger.current.get(module.name)
            if present is not None and present.path == module.path:
                if present.base_model_name != module.base_model_name and self.served.atomic:
                    await self.names.put(replace(present, base_model_name=module.base_model_name))
            elif self._is_due(module) and not self._must_wait(module):
                await self._load(module)
                if self.inbox.modules is not modules:
                    return  # a newer list came meanwhile; it has woken the loop
        await self._drop_foreign(modules.modules)
        self.names.forget_handed(HANDED_SECONDS)
        self.ledger.forget_retired(self.names.running())
        await self.names.give_back()
        if self.inbox.modules is modules:
            self._settled = modules
        self._closed = self._settings.rolls or not self.loads_while_running
        self._tell()

    def _is_due(self, module: Module) -> bool:
        """Whether an entry is to be loaded now: a Lazy one when it was asked for, or serves other content already.

        Without the registry a client holds vLLM's lock on the name while it asks, so nothing could be loaded for it: then all are.
        """
        lazy = module.lazy and self.served.atomic
        return not lazy or module.name in self._asked or module.name in self.ledger.current

    async def _load(self, module: Module) -> None:
        problem = await asyncio.to_thread(self._check, module)
        key = (module.name, module.path)
        number = self.inbox.modules.generation if self.inbox.modules is not None else 0
        known = self.ledger.recall(module, number)
        if known is None and module.path in self.loads.suspects:
            self.ledger.quarantine(module, BLAME)
            log.error("lora-operator: %s is not served: %s", module.name, BLAME)
            return
        if problem is None and known is None and self._closed:
            why = "updateStrategy: Rollout" if self._settings.rolls else "vLLM older than 0.26"
            problem = f"it was not loaded when the engine started, and is not while it runs ({why})"
        if problem is not None:
            self._fail(module, "checks", problem)
            return
        if known is None:
            internal = self.ledger.mint(module, number)
            request = make_request(
                internal=internal, int_id=None, path=module.path, base_model_name=module.base_model_name
            )
            cause = await self._load_new(module, request)
            if not self.served.atomic:
                self.ledger.withdraw(module.name, time.monotonic())
            await self._write_refused(
                {k: v for k, v in self._refused.items() if k != key} | ({key: cause} if cause else {})
            )
            if cause is not None:
                self._fail(module, "engine", cause)
                return
            known = Generation(module.name, module.path, internal, request.lora_int_id, module.base_model_name)
            self.ledger.remember(known)
        if self.inbox.wanted(module.name) == module:
            self._owners[module.name] = module.uid
            await self.names.put(replace(known, base_model_name=module.base_model_name))
            self._tell()
        elif not self.served.atomic:
            await self.served.remove(module.name)

    async def _load_new(self, module: Module, request: Any) -> str | None:
        """Make the engine load content for the first time; why it did not, or None. Waits for its answer, however long that takes."""
        if not await self._caller.is_alive():
            return "the engine has ended"  # by something else than this adapter
        self.loads.begin(module, note=not self.ledger.has_loaded_path(module.path))
        late = asyncio.get_running_loop().call_later(
            UNREADY_SECONDS, log.error, "lora-operator: %s: %s", module.name, UNANSWERED
        )
        blameless = False
        try:
            cause = await self._ask_engine(module, request)
            blameless = cause is None or await self._caller.is_alive()
            return cause
        except asyncio.CancelledError:
            blameless = (
                self.loads.unanswered() < UNREADY_SECONDS
            )  # the server is shut down in a load that goes as it should
            raise
        finally:
            late.cancel()
            self.loads.end(blameless=blameless)

    async def _ask_engine(self, module: Module, request: Any) -> str | None:
        try:
            if await self.served.load(module.name, request):
                return None
            self.loads.ask_again()
            return await self._caller.diagnose(module.path) or "the engine did not load it, but did when asked again"
        except Exception as error:
            return clean(f"{type(error).__name__}: {error}")

    async def _drop_foreign(self, modules: tuple[Module, ...]) -> None:
        """Where a name went to another object whose content can't be loaded, what the last one left must not answer for it."""
        for module in modules:
            present = self.ledger.current.get(module.name)
            if present is None or present.path == module.path:
                self._owners[module.name] = module.uid
            elif self._owners.get(module.name, module.uid) != module.uid:
                await self.names.unload(module.name)

    async def _drop_vanished(self) -> None:
        """Stop serving what has no files any more: one request for it after an eviction would end the engine."""
        now = time.monotonic()
        if now - self._vanished_at < VANISHED_SECONDS:
            return
        self._vanished_at = now
        paths = {name: generation.path for name, generation in self.ledger.current.items()}
        for name in await asyncio.to_thread(_vanished, paths):
            log.error("lora-operator: the files of %s are gone from %s", name, paths[name])
            await self.names.unload(name)

    # Pieces

    def _list_changed(self) -> None:
        self._settled = None
        self._wake.set()
        self._tell()

    def _may_come(self, name: str) -> bool:
        """Whether a listed adapter is not there yet and is not known to have failed; a Lazy one comes because of the question."""
        module = self.inbox.wanted(name)
        if module is None or name in self.ledger.current or (name, module.path) in self.ledger.failures:
            return False
        if module.lazy and name not in self._asked:  # also when it left the list and came back while a client waits
            self._asked.add(name)
            self._wake.set()
        return True

    def _must_wait(self, module: Module) -> bool:
        """Whether an adapter failed so lately that it is not tried now; with updateStrategy Rollout a start tries it once."""
        failed = (module.name, module.path) in self.ledger.failures
        if self._closed and failed and not self.ledger.has_loaded(module):
            return True
        return self.ledger.must_wait(module, time.monotonic())

    def _fail(self, module: Module, stage: str, message: str) -> None:
        now = time.monotonic()
        failure = self.ledger.fail(module, stage, message, now)
        again = (
            "at the next start"
            if self._closed and not self.ledger.has_loaded(module)
            else f"in {failure.retry_at - now:.0f} s"
        )
        log.warning("lora-operator: %s is not served: %s (next try %s)", module.name, failure.message, again)
        self._tell()

    def _check(self, module: Module) -> str | None:
        if not self._base_read:
            self._base, self._base_read = read_base(self._settings), True
        return check_module(module, settings=self._settings, base=self._base, engine=self.engine)

    def _hand(self, asked: str, generation: Generation) -> Any:
        self._wake.set()
        return self.names.hand(asked, generation)

    async def _write_refused(self, refused: dict[tuple[str, str], str]) -> None:
        """Keep on disk what the engine refused, so that the launcher does not pass it."""
        if refused != self._refused:
            self._refused = refused
            await asyncio.to_thread(write_refused, self._settings.state_dir / REFUSED_FILE, refused)

    def _tell(self) -> None:
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
