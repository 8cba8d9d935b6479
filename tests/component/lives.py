"""Lives of the operator's process that end in the middle of anything: no answer reaches it any more, and nothing is tidied up.

Its reconcilers, queue and store are the real ones. It has no kopf, which can't be killed within a process: lists every moment tell it
what its watches would.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import pytest

from e2e.cluster import ControlPlane
from lora_operator.kube.client import Kube, load_configuration
from lora_operator.kube.kinds import OWN_KINDS
from lora_operator.reconcile.dispatch import Dispatcher
from lora_operator.reconcile.queue import WorkQueue
from lora_operator.reconcile.routing import keys_for
from lora_operator.reconcile.store import Change, Store
from lora_operator.reconcile.sync import Sync
from lora_operator.settings import Settings
from lora_operator.vllm import Engines

LIST_SECONDS = 0.2
T = TypeVar("T")


class Steps:
    """Counts what a life does to the world: writes to the API server, and requests to engines.

    It dies at the step `last`, `unsent` before the request leaves it, else before the answer reaches it.
    """

    def __init__(self, last: int | None = None, *, unsent: bool = False) -> None:
        self.taken: list[str] = []
        self.died = asyncio.Event()
        self._last = last
        self._unsent = unsent

    async def take(self, what: str, send: Callable[[], Awaitable[T]]) -> T:
        """One step."""
        if self.died.is_set():
            await asyncio.Event().wait()
        self.taken.append(what)
        dies = len(self.taken) == self._last
        if dies and self._unsent:
            await self._die()
        answer = await send()
        if dies or self.died.is_set():
            await self._die()
        return answer

    async def _die(self) -> None:
        self.died.set()
        await asyncio.Event().wait()


class _Kube(Kube):
    steps: Steps

    async def _request(self, what: str, method: str, path: str, **options: Any) -> bytes:
        if method == "GET":
            return await super()._request(what, method, path, **options)
        return await self.steps.take(what, lambda: Kube._request(self, what, method, path, **options))


class _Engines(Engines):
    steps: Steps

    async def _request(self, method: str, url: str, **options: Any) -> tuple[int, bytes]:
        return await self.steps.take(f"{method} {url}", lambda: Engines._request(self, method, url, **options))


def list_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without watches, lists must come quickly."""
    monkeypatch.setattr("lora_operator.reconcile.sync.PAUSE", LIST_SECONDS)


@asynccontextmanager
async def living(plane: ControlPlane, steps: Steps | None = None) -> AsyncIterator[Steps]:
    """An operator at work inside the block, which kills it at its end, wherever it is."""
    steps = steps or Steps()
    configuration = await load_configuration(str(plane.kubeconfig))
    async with _Kube(configuration) as kube, _Engines(timeout=2.0) as engines:
        kube.steps = engines.steps = steps
        store = Store()
        queue = WorkQueue(lambda key: dispatcher(key), workers=128)
        settings = Settings(operator_image="images.example/operator", operator_namespace="default")
        dispatcher = Dispatcher(kube, engines, store, settings, queue.add)

        def changed(change: Change) -> None:
            for key in keys_for(change, store):
                queue.add(key)

        async def work() -> None:
            await store.wait_synced()
            for kind in OWN_KINDS:
                for key in store.keys(kind):
                    queue.add(key)
            await queue.run()

        sync = Sync(kube, store, changed, interval=LIST_SECONDS)
        parts = [asyncio.create_task(sync.run(), name="sync"), asyncio.create_task(work(), name="work")]
        try:
            yield steps
            for part in parts:
                if part.done():
                    part.result()
        finally:
            for part in parts:
                part.cancel()
            await asyncio.wait(parts)
