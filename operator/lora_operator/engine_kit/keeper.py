"""Keeps what an engine serves equal to the module list: level-triggered, one load at a time, by itself.

Content is (public name, path). The first content that a process serves under a name gets the plain name as its internal one,
other content gets `<name>@<revision>.<list generation>`; what was served before is put back as it was, id and all. One failing
adapter never holds up another: it is recorded, and tried again with back-off. Content that is no longer served stays `retired` for
as long as requests may still use its files.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from .basemodel import BaseModel
from .checks import CONFIG, WEIGHTS
from .engine import Caller, PinnedRequest, Served, adapters_in_use, make_request
from .launcher import check_module, read_base
from .modules import (
    LOADING_FILE,
    REFUSED_FILE,
    ListProblem,
    Module,
    ModuleList,
    Settings,
    newest_list,
    parse_list,
    read_list,
    read_loading,
    read_refused,
    write_file,
    write_loading,
    write_refused,
)
from .tensors import is_inside
from .text import clean

log = logging.getLogger("vllm.lora_operator_kit")

PASS_SECONDS: Final = 3.0  # between looks at the registry and the mounted list when nothing happens
HANDED_SECONDS: Final = 10.0
RESOLVE_SECONDS: Final = 60.0  # how long a client's request waits for a listed adapter to be loaded
REREAD_SECONDS: Final = 1.0
VANISHED_SECONDS: Final = 15.0
DRAIN_SECONDS: Final = 30.0  # after that, a request that the metrics do not show is no user of retired content
_BACKOFF: Final = {"checks": (1.0, 60.0), "engine": (5.0, 600.0)}


@dataclass(frozen=True)
class Generation:
    """Content that this process has served, or loaded, under a public name."""

    name: str
    path: str
    internal: str
    int_id: int | None  # None: loaded before the kit, in an engine without a registry
    base_model_name: str | None

    def request(self, *, pinned: bool = False) -> Any:
        """The same LoRARequest as ever: same internal name, same id, same path."""
        return make_request(
            internal=self.internal,
            int_id=self.int_id,
            path=self.path,
            base_model_name=self.base_model_name,
            pinned=pinned,
        )


@dataclass(frozen=True)
class Failure:
    """Why an adapter of the list is not served."""

    stage: str  # checks or engine
    message: str
    tries: int
    retry_at: float  # monotonic


@dataclass
class Retired:
    """Content that is no longer served, since when (monotonic)."""

    generation: Generation
    since: float


class Keeper:
    """The state of one engine process. All methods run on the engine's event loop."""

    def __init__(
        self, settings: Settings, served: Served, caller: Caller, *, oldest_request: Callable[[], float | None]
    ) -> None:
        self.settings = settings
        self.modules: ModuleList | None = None
        self.current: dict[str, Generation] = {}
        self.failures: dict[tuple[str, str], Failure] = {}
        self.retired: dict[str, Retired] = {}
        self.served = served
        self._caller = caller
        self._oldest_request = oldest_request
        self._known: dict[tuple[str, str], Generation] = {}
        self._used: dict[str, Generation] = {}  # by internal name
        self._handed: dict[str, float] = {}
        self._settled: int | None = None
        self._changed = asyncio.Event()
        self._wake = asyncio.Event()
        self._accepting = asyncio.Lock()
        self._reread_at = 0.0
        self._mounted: tuple[int, ...] | None = None
        self._vanished_at = time.monotonic()
        self._refused = read_refused(settings.state_dir / REFUSED_FILE)
        self._base: BaseModel | None = None
        self._base_read = False

    # What the outside asks

    @property
    def settled(self) -> bool:
        """Whether everything of the list was tried, and nothing is on its way into the registry."""
        generation = self.modules.generation if self.modules is not None else None
        return self._settled == generation and not self._handed

    async def accept(self, raw: bytes) -> tuple[int, str]:
        """Take a list and keep it on disk; status 200, 400, 409 or 500, and what is wrong."""
        try:
            modules, plain = await asyncio.to_thread(parse_list, raw, served_names=self.settings.served_names)
        except ListProblem as problem:
            return 400, str(problem)
        async with self._accepting:
            held = self.modules.generation if self.modules is not None else -1
            if modules.generation < held:
                return 409, f"list generation {held} is held, {modules.generation} is older"
            try:
                await asyncio.to_thread(write_file, self.settings.list_file, plain)
            except OSError as error:
                return 500, f"the list can't be kept in {self.settings.state_dir}: {error.strerror}"
            self._take(modules)
        return 200, ""

    async def wait_settled(self, seconds: float) -> None:
        """Wait until everything of the present list was tried, but at most so long."""
        await self._wait(lambda: self.settled, seconds)

    async def resolve(self, asked: str) -> Any | None:
        """vLLM's question for a name that is not in its registry, on its own behalf (a load of ours) or a client's."""
        offered = self.served.offered(asked)
        if offered is not None or not self.served.atomic:
            return offered
        alias = next((g for g in self.current.values() if asked == g.internal != g.name), None)
        if alias is not None:
            return self._hand(asked, alias)
        if self._wanted(asked) is None:
            await self._reread()
        module = self._wanted(asked)
        if module is None or (self._must_wait(module) and asked not in self.current):
            return None
        self._wake.set()
        await self._wait(
            lambda: asked in self.current or self._wanted(asked) is None or self._failed(asked), RESOLVE_SECONDS
        )
        generation = self.current.get(asked)
        return None if generation is None else self._hand(asked, generation)

    def running(self) -> frozenset[str]:
        """Internal names of retired content that requests may still use."""
        in_use, oldest, now = adapters_in_use(), self._oldest_request(), time.monotonic()
        return frozenset(
            name
            for name, one in self.retired.items()
            if name in (in_use or ())
            # A request older than the change may still be on its way to the engine, which alone tells the metrics.
            or (oldest is not None and oldest <= one.since and (in_use is None or now - one.since < DRAIN_SECONDS))
        )

    # The loop

    async def start(self) -> None:
        """Before the engine takes requests: find the newest list and load all of it."""
        modules = await asyncio.to_thread(
            newest_list, self.settings.list_file, self.settings.modules_file, served_names=self.settings.served_names
        )
        if modules is not None:
            self._take(modules)
        await self._adopt()
        self._quarantine()
        await self._pass()

    def _quarantine(self) -> None:
        """Leave alone for a while what was being loaded when the last process ended: it may have been the cause."""
        note = self.settings.state_dir / LOADING_FILE
        key, wait = read_loading(note), _BACKOFF["engine"][1]
        write_loading(note, None)
        module = self._wanted(key[0]) if key is not None else None
        if module is None or module.name in self.current or (module.name, module.path) != key:
            return
        message = f"the engine's process ended while it loaded this adapter; it is tried again in {wait:.0f} s"
        self.failures[key] = Failure("engine", message, 1, time.monotonic() + wait)

    async def run(self) -> None:
        """Look again whenever something happens, and every few seconds."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._pause()):
                    await self._wake.wait()
            self._wake.clear()
            try:
                await self._reread()
                await self._pass()
            except Exception:
                log.exception("lora-operator: a pass failed, the next one comes in %s s", PASS_SECONDS)
                await asyncio.sleep(PASS_SECONDS)

    def _pause(self) -> float:
        if self._handed:
            return 0.1
        now = time.monotonic()
        waits = [f.retry_at - now for f in self.failures.values()]
        return max(0.05, min([PASS_SECONDS, *waits]))

    async def _pass(self) -> None:
        """Make the registry what the list says."""
        await self._adopt()
        modules = self.modules
        if modules is None:
            return
        wanted = {module.name: module for module in modules.modules}
        for name in [name for name in self.current if name not in wanted]:
            await self._unload(name)
        keys = {(module.name, module.path) for module in modules.modules}
        self.failures = {key: failure for key, failure in self.failures.items() if key in keys}
        await self._forget_refusals(keys)
        await self._drop_vanished()
        for module in modules.modules:
            present = self.current.get(module.name)
            if present is not None and present.path == module.path:
                await self._set_lineage(present, module)
            elif not self._must_wait(module):
                await self._load(module)
                if self.modules is not modules:
                    self._wake.set()  # a newer list came meanwhile
                    return
        now = time.monotonic()
        self._handed = {name: since for name, since in self._handed.items() if now - since < HANDED_SECONDS}
        running = self.running()
        self.retired = {name: one for name, one in self.retired.items() if name in running}
        self._settled = modules.generation
        self._tell()

    async def _adopt(self) -> None:
        """Learn what is registered without us: static entries, what clients resolved, what was loaded or unloaded by hand."""
        entries = await self.served.entries()
        for name in [name for name in self.current if name not in entries]:
            self._retire(self.current.pop(name))
        for name, request in entries.items():
            fresh = isinstance(
                request, PinnedRequest
            )  # a client's resolution; what it put there may be out of date by now
            if fresh:
                self._handed.pop(name, None)
            owner = self._used.get(name)
            if owner is not None and owner.name != name:  # an internal name, by which a client asked
                if self.current.get(owner.name) != owner:
                    await self.served.remove(name)
                continue
            present = self.current.get(name)
            if present is not None and (fresh or present.internal == request.lora_name):
                if fresh:
                    await self.served.place(name, present.request())
            elif is_inside(Path(os.path.realpath(request.lora_path)), self.settings.cache_root):
                await self._adopt_entry(name, request, fresh=fresh)
            # else loaded by hand from elsewhere: not ours to judge, the operator shows it

    async def _adopt_entry(self, name: str, request: Any, *, fresh: bool) -> None:
        generation = self._used.get(request.lora_name)
        if generation is None or (generation.name, generation.path) != (name, request.lora_path):
            int_id = request.lora_int_id if self.served.atomic else None
            generation = Generation(name, request.lora_path, request.lora_name, int_id, request.base_model_name)
            self._remember(generation)
        if fresh:
            await self.served.place(name, generation.request())
        self._make_current(generation)

    async def _load(self, module: Module) -> None:
        problem = await asyncio.to_thread(self._check, module)
        if problem is not None:
            self._fail(module, "checks", problem)
            return
        key = (module.name, module.path)
        known = self._known.get(key)
        if known is not None and known.int_id is not None:
            if self._wanted(module.name) == module:
                await self._put(replace(known, base_model_name=module.base_model_name))
            return
        request = make_request(
            internal=self._mint(module), int_id=None, path=module.path, base_model_name=module.base_model_name
        )
        before = self.current.get(module.name)
        cause = await self._load_new(module, request)
        if not self.served.atomic and before is not None:
            self._retire(self.current.pop(module.name, before))
        await self._note_refusal(key, cause)
        if cause is not None:
            self._fail(module, "engine", cause)
            return
        generation = Generation(
            module.name, module.path, request.lora_name, request.lora_int_id, module.base_model_name
        )
        self._remember(generation)
        if self._wanted(module.name) == module:
            await self._put(generation)
        elif not self.served.atomic:
            await self.served.remove(module.name)

    async def _load_new(self, module: Module, request: Any) -> str | None:
        """Make the engine load content for the first time; why it did not, or None."""
        note = self.settings.state_dir / LOADING_FILE
        write_loading(note, (module.name, module.path))
        try:
            if await self.served.load(module.name, request):
                return None
            return await self._caller.diagnose(module.path) or "the engine did not load it, but did when asked again"
        except Exception as error:  # an engine that dies, or hangs
            return clean(f"{type(error).__name__}: {error}")
        finally:
            write_loading(note, None)

    async def _put(self, generation: Generation) -> None:
        """Make content answer under its public name; with a registry this does not wait, so no request sees a gap."""
        before = self.current.get(generation.name)
        self._remember(generation)
        await self.served.place(generation.name, generation.request())
        self._make_current(generation)
        if before is not None and generation.internal != before.internal != before.name:
            await self.served.remove(before.internal)
        log.info("lora-operator: %s serves %s as %s", generation.name, generation.path, generation.internal)

    async def _set_lineage(self, present: Generation, module: Module) -> None:
        if present.base_model_name != module.base_model_name and self.served.atomic:
            await self._put(replace(present, base_model_name=module.base_model_name))

    async def _unload(self, name: str) -> None:
        generation = self.current.pop(name)
        if generation.internal != name:
            await self.served.remove(generation.internal)
        await self.served.remove(name)
        self._retire(generation)
        log.info("lora-operator: %s is unloaded", name)

    async def _drop_vanished(self) -> None:
        """Stop serving what has no files any more: one request for it after an eviction would end the engine."""
        now = time.monotonic()
        if now - self._vanished_at < VANISHED_SECONDS:
            return
        self._vanished_at = now
        paths = {name: generation.path for name, generation in self.current.items()}
        for name in await asyncio.to_thread(_vanished, paths):
            if self.current.get(name) is not None and self.current[name].path == paths[name]:
                log.error("lora-operator: the files of %s are gone from %s", name, paths[name])
                await self._unload(name)

    # Pieces

    def _take(self, modules: ModuleList) -> None:
        self.modules = modules
        self._wake.set()
        self._tell()

    async def _reread(self) -> None:
        """Look whether the mounted list is newer than the one that is held."""
        now = time.monotonic()
        if now < self._reread_at:
            return
        self._reread_at = now + REREAD_SECONDS
        signature = await asyncio.to_thread(_signature, self.settings.modules_file)
        if signature == self._mounted:
            return
        self._mounted = signature
        found = await asyncio.to_thread(read_list, self.settings.modules_file, served_names=self.settings.served_names)
        async with self._accepting:
            if found is not None and (self.modules is None or found.generation > self.modules.generation):
                self._take(found)

    def _wanted(self, name: str) -> Module | None:
        if self.modules is None:
            return None
        return self.modules.by_name.get(name)

    def _failed(self, name: str) -> bool:
        module = self._wanted(name)
        return module is not None and (module.name, module.path) in self.failures

    def _must_wait(self, module: Module) -> bool:
        failure = self.failures.get((module.name, module.path))
        return failure is not None and failure.retry_at > time.monotonic()

    def _fail(self, module: Module, stage: str, message: str) -> None:
        key = (module.name, module.path)
        tries = self.failures[key].tries + 1 if key in self.failures else 1
        first, longest = _BACKOFF[stage]
        wait = min(first * 2.0 ** min(tries - 1, 20), longest)
        self.failures[key] = Failure(stage, clean(message), tries, time.monotonic() + wait)
        log.warning("lora-operator: %s is not served: %s (next try in %.0f s)", module.name, clean(message), wait)
        self._tell()

    def _check(self, module: Module) -> str | None:
        if not self._base_read:
            self._base, self._base_read = read_base(self.settings), True
        return check_module(module, settings=self.settings, base=self._base)

    def _mint(self, module: Module) -> str:
        """An internal name that this process never served."""
        if module.name not in self._used:
            return module.name
        revision = "".join(char for char in module.revision if char.isascii() and char.isalnum())[:8] or "r"
        stem = name = f"{module.name}@{revision}.{self.modules.generation if self.modules else 0}"
        number = 1
        while name in self._used:
            number += 1
            name = f"{stem}.{number}"
        return name

    def _remember(self, generation: Generation) -> None:
        self._known[generation.name, generation.path] = generation
        self._used[generation.internal] = generation

    def _make_current(self, generation: Generation) -> None:
        before = self.current.get(generation.name)
        self.current[generation.name] = generation
        self.retired.pop(generation.internal, None)
        if before is not None and before.internal != generation.internal:
            self._retire(before)
        self.failures.pop((generation.name, generation.path), None)
        self._tell()

    def _retire(self, generation: Generation) -> None:
        self.retired[generation.internal] = Retired(generation, time.monotonic())

    def _hand(self, asked: str, generation: Generation) -> Any:
        """Content that is loaded, for a client whose resolution vLLM will put into its registry in a moment."""
        self._handed[asked] = time.monotonic()
        self._wake.set()
        return generation.request(pinned=True)

    async def _note_refusal(self, key: tuple[str, str], cause: str | None) -> None:
        """Keep on disk what the engine refused, so that the launcher does not pass it."""
        if self._refused.get(key) == cause:
            return
        self._refused = {k: v for k, v in self._refused.items() if k != key} | ({key: cause} if cause else {})
        await asyncio.to_thread(write_refused, self.settings.state_dir / REFUSED_FILE, dict(self._refused))

    async def _forget_refusals(self, keys: set[tuple[str, str]]) -> None:
        if self._refused.keys() - keys:
            self._refused = {key: cause for key, cause in self._refused.items() if key in keys}
            await asyncio.to_thread(write_refused, self.settings.state_dir / REFUSED_FILE, dict(self._refused))

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _wait(self, done: Callable[[], bool], seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not done():
                    await self._changed.wait()


def _signature(path: Path) -> tuple[int, ...] | None:
    """What changes with a file's content; None when there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


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
