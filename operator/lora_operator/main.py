"""The operator's process: wires store, sync, queue, kopf and probes together, and stops them in order.

One part that ends or fails ends the process with a non-zero status: Kubernetes starts it again, and it finds everything anew.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import signal
import sys
import threading
from typing import Any, Final

import kopf

from lora_operator.errors import OperatorError
from lora_operator.health import health_app, serve_health
from lora_operator.kube.client import Kube, load_configuration
from lora_operator.kube.kinds import OWN_KINDS, Kind
from lora_operator.logs import set_up_logging
from lora_operator.reconcile.clock import Clock
from lora_operator.reconcile.dispatch import Dispatcher
from lora_operator.reconcile.queue import WorkQueue
from lora_operator.reconcile.routing import keys_for
from lora_operator.reconcile.store import Change, Key, Store
from lora_operator.reconcile.sync import Sync
from lora_operator.settings import Settings, read_settings
from lora_operator.vllm import Engines
from lora_operator.watch import kopf_settings, register_handlers, register_login

log = logging.getLogger(__name__)

REFRESH_INTERVAL: Final = 600.0
REFRESH_SPREAD: Final = 120.0
WATCH_DEADLINE: Final = 120.0
STOP_STEP: Final = 1.0  # seconds for each of the steps of stopping; Kubernetes must not have to kill the operator
EXIT_GRACE: Final = 1.0


class Operator:
    """The parts of one running operator."""

    def __init__(self, kube: Kube, store: Store, queue: WorkQueue, stop: asyncio.Event) -> None:
        self._kube = kube
        self._store = store
        self._queue = queue
        self._stop = stop
        self._stop_kopf = asyncio.Event()
        self._fault: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._watched: set[Kind] = set()
        self._all_watched = asyncio.Event()
        self.sync = Sync(kube, store, self.take)

    def take(self, change: Change) -> None:
        """Puts on the queue what has to look at a change."""
        for key in keys_for(change, self._store):
            self._queue.add(key)

    def listed_by_kopf(self, kind: Kind) -> None:
        """kopf watches a kind from now on: what changed before, between our list and kopf's, is found by another of ours."""
        self._watched.add(kind)
        if len(self._watched) == len(Kind):
            self._all_watched.set()
        self.sync.request(kind)

    async def run(self) -> None:
        """Works until `stop` is set, then stops in order; raises what ended a part, for the process must not live without it."""
        sync = asyncio.create_task(self.sync.run(), name="sync")
        watch = asyncio.create_task(self._watch(), name="watch")
        work = asyncio.create_task(self._work(), name="work")
        refresh = asyncio.create_task(self._refresh(), name="refresh")
        guard = asyncio.create_task(self._guard_watch(), name="watch guard")
        stop = asyncio.create_task(self._stop.wait(), name="stop")
        parts: list[asyncio.Task[None]] = [work, refresh, guard, sync, watch]
        ends: list[asyncio.Future[Any]] = [*parts, stop, self._fault]
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if not self._stop.is_set():
                self._raise_fault(parts)
            log.info("stopping")
        finally:
            # kopf's watches can't all be closed in order once they are cancelled; nothing that follows now is worth an error.
            asyncio.get_running_loop().set_exception_handler(_quietly)
            stop.cancel()
            for part in (work, refresh, guard, sync):
                part.cancel()
            await asyncio.wait([work, refresh, guard, sync], timeout=STOP_STEP)
            self._stop_kopf.set()
            await asyncio.wait([watch], timeout=STOP_STEP)
            watch.cancel()
            await asyncio.wait([watch], timeout=STOP_STEP)

    def _raise_fault(self, parts: list[asyncio.Task[None]]) -> None:
        if self._fault.done():
            self._fault.result()
        for part in parts:
            if part.done():
                part.result()
                raise RuntimeError(f"{part.get_name()} ended without being told to")

    async def _work(self) -> None:
        await self._store.wait_synced()
        for key in self._own_keys():
            self._queue.add(key)
        log.info("every kind was listed: working on %d objects", len(self._own_keys()))
        await self._queue.run()

    async def _refresh(self) -> None:
        """Looks at everything again from time to time, spread out: what no event told is found."""
        while True:
            await asyncio.sleep(REFRESH_INTERVAL * random.uniform(0.9, 1.1))  # noqa: S311 - no secret
            for key in self._own_keys():
                self._queue.add(key, after=random.uniform(0, REFRESH_SPREAD))  # noqa: S311

    async def _watch(self) -> None:
        """kopf, once every kind could be listed: so the kinds exist when it looks for them."""
        await self._store.wait_synced()
        registry = kopf.OperatorRegistry()
        register_login(registry, open_session=self._kube.watch_session, listed=self.listed_by_kopf)
        register_handlers(registry, store=self._store, changed=self.take, failed=self._failed)
        others = asyncio.all_tasks()
        tasks = await kopf.spawn_tasks(
            registry=registry,
            settings=kopf_settings(),
            identity=kopf_identity(),
            standalone=True,
            clusterwide=True,
            stop_flag=self._stop_kopf,
        )
        set_on_signals(self._stop)  # kopf has just taken the signals
        running = asyncio.create_task(kopf.run_tasks(tasks, ignored=others), name="kopf")
        try:
            # kopf (1.45.2) does not end when one of its watches fails: its other watches keep it waiting. We do not wait.
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if self._stop_kopf.is_set():
                await running
                return
            for task in done:
                task.result()
            raise RuntimeError("kopf ended without being told to")
        finally:
            running.cancel()

    async def _guard_watch(self) -> None:
        """kopf only warns of a kind that it does not find when it starts, and never watches it: that must not last."""
        await self._store.wait_synced()
        try:
            async with asyncio.timeout(WATCH_DEADLINE):
                await self._all_watched.wait()
        except TimeoutError:
            missing = ", ".join(sorted(set(Kind) - self._watched))
            raise RuntimeError(f"not watched within {WATCH_DEADLINE:g} s: {missing}") from None
        log.info("every kind is watched")
        await asyncio.Event().wait()

    def _failed(self, error: BaseException) -> None:
        if not self._fault.done():
            self._fault.set_exception(error)

    def _own_keys(self) -> list[Key]:
        return [key for kind in OWN_KINDS for key in self._store.keys(kind)]


def kopf_identity() -> Any:
    """The name that kopf would else make of the user's, which an arbitrary user id in a container does not have."""
    return os.environ.get("HOSTNAME", "lora-operator")


def _quietly(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    log.debug("while ending: %s", context.get("message"))


def set_on_signals(event: asyncio.Event) -> None:
    """Has SIGTERM and SIGINT set the event; nothing outside the main thread."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, event.set)


async def operate(settings: Settings, *, stop: asyncio.Event | None = None) -> None:
    """Runs the operator until `stop` is set, or SIGTERM or SIGINT comes."""
    stop = stop or asyncio.Event()
    set_on_signals(stop)
    store = Store()
    async with Kube(await load_configuration()) as kube, Engines() as engines:
        clock = Clock()
        queue = WorkQueue(lambda key: dispatcher(key), workers=128, clock=clock)
        dispatcher = Dispatcher(kube, engines, store, settings, queue.add, clock=clock)
        operator = Operator(kube, store, queue, stop)
        async with serve_health(health_app(queue, operator.sync.missing), port=settings.health_port):
            await operator.run()


def run() -> int:
    """Entry point of `lora-operator run`; the exit status: 0 when told to stop, 1 on any failure."""
    try:
        settings = read_settings(os.environ)
    except OperatorError as error:
        print(f"lora-operator: {error}", file=sys.stderr)
        return 1
    set_up_logging(settings.log_level, settings.log_format)
    try:
        asyncio.run(_operate_then_exit(settings))
    except Exception:
        return 1
    return 0


async def _operate_then_exit(settings: Settings) -> None:
    """Tasks that refuse to end (kopf's after a failure) must not keep a process alive that does nothing any more."""
    try:
        await operate(settings)
    except Exception:
        log.critical("the operator ends", exc_info=True)
        _exit_within(EXIT_GRACE, 1)
        raise
    _exit_within(EXIT_GRACE, 0)


def _exit_within(seconds: float, status: int) -> None:
    timer = threading.Timer(seconds, os._exit, (status,))
    timer.daemon = True
    timer.start()
