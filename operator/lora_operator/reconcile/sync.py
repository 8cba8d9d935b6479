"""The sync barrier: complete lists of every kind, by ourselves and page by page, into the store. Unknown is not empty, and gone is gone.

kopf's watches keep the store fresh, but say neither when a kind is known completely nor what vanished while they were cut off.
So every kind is listed at the start, whenever kopf lists it (start, reconnect after a 410), and every five minutes. Each kind has
a loop of its own: one that can't be listed holds back all reconciling, but never another kind's list. Nothing is decided here.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from typing import Final

from lora_operator.errors import KubeError
from lora_operator.kube.client import Kube
from lora_operator.kube.kinds import Kind
from lora_operator.reconcile.store import Change, ObjectKey, Store

log = logging.getLogger(__name__)

INTERVAL: Final = 300.0
PAUSE: Final = 1.0  # between two lists of a kind, however often kopf reconnects
FIRST_RETRY: Final = 0.5
LONGEST_RETRY: Final = 30.0


class Sync:
    """Lists every kind into the store; `changed` hears of each difference."""

    def __init__(
        self, kube: Kube, store: Store, changed: Callable[[Change], None], *, interval: float = INTERVAL
    ) -> None:
        self._kube = kube
        self._store = store
        self._changed = changed
        self._interval = interval
        self._wanted = {kind: asyncio.Event() for kind in Kind}
        self._errors: dict[Kind, str] = {}

    def request(self, kind: Kind) -> None:
        """Has the kind listed again soon."""
        self._wanted[kind].set()

    def missing(self) -> dict[Kind, str]:
        """Kinds that were never listed completely, with what the last attempt met."""
        return {kind: self._errors.get(kind, "being listed") for kind in Kind if not self._store.is_synced(kind)}

    async def run(self) -> None:
        """Lists until cancelled; API failures are retried, anything else is raised."""
        async with asyncio.TaskGroup() as group:
            for kind in Kind:
                group.create_task(self._keep(kind), name=f"sync {kind}")

    async def _keep(self, kind: Kind) -> None:
        failures = 0
        while True:
            self._wanted[kind].clear()
            if await self._list(kind):
                failures = 0
                await self._wait(kind)
            else:
                failures += 1
                delay = min(FIRST_RETRY * 2.0 ** min(failures - 1, 10), LONGEST_RETRY)
                await asyncio.sleep(delay * random.uniform(0.75, 1.0))  # noqa: S311 - no secret

    async def _list(self, kind: Kind) -> bool:
        info = kind.info
        present: set[ObjectKey] = set()
        resource_version = ""
        pages = self._kube.pages(info.rt, label_selector=info.label_selector, metadata_only=info.metadata_only)
        try:
            async for page, resource_version in pages:  # noqa: B007  the last one's
                for item in page:
                    if (change := self._store.take_listed(kind, item, present)) is not None:
                        self._changed(change)
        except KubeError as error:
            known = self._errors.get(kind)
            self._errors[kind] = str(error)
            log.log(
                logging.DEBUG if known == str(error) else logging.WARNING,
                "%s could not be listed%s: %s",
                kind.value,
                "" if self._store.is_synced(kind) else "; nothing is done before it was",
                error,
            )
            return False
        for change in self._store.retain(kind, present, resource_version):
            self._changed(change)
        if self._errors.pop(kind, None) is not None or not self._store.is_synced(kind):
            log.info("%s: %d listed", kind.value, len(present))
        self._store.mark_synced(kind)
        return True

    async def _wait(self, kind: Kind) -> None:
        """Until the next list is due: asked for, or the interval is over (give or take, so that kinds take turns)."""
        await asyncio.sleep(PAUSE)
        try:
            async with asyncio.timeout(self._interval * random.uniform(0.9, 1.1)):  # noqa: S311 - no secret
                await self._wanted[kind].wait()
        except TimeoutError:
            pass
