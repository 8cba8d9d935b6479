"""The work queue: which keys are due, one run at a time per key, back-off per key, everybody in turn.

Adding a key is all that an event may do. A run that fails is tried again with a growing delay, and never delays another key.
The queue must never lose a key: one that is added while it runs, runs again. What breaks here, beside a run, ends the process.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
import random
from collections.abc import Awaitable, Callable
from typing import Final

from lora_operator.errors import OperatorError
from lora_operator.reconcile.clock import Clock
from lora_operator.reconcile.store import Key

log = logging.getLogger(__name__)

FIRST_BACKOFF: Final = 0.2
LONGEST_BACKOFF: Final = 60.0
# A run's own calls all have time-outs of seconds; one that takes this long hangs.
RUN_TIME_LIMIT: Final = 600.0

Handler = Callable[[Key], Awaitable[float | None]]


def backoff(failures: int) -> float:
    """Seconds to wait after the n-th failure in a row: 0.2, 0.4 … 60, each less up to a quarter: many must not come back together."""
    exponent = min(failures - 1, 16)
    return min(FIRST_BACKOFF * 2.0**exponent, LONGEST_BACKOFF) * random.uniform(0.75, 1.0)  # noqa: S311 - no secret


class WorkQueue:
    """Runs `handler` for added keys, `workers` at a time; what it returns is the number of seconds until its next run, or None."""

    def __init__(
        self,
        handler: Handler,
        *,
        workers: int = 16,
        time_limit: float = RUN_TIME_LIMIT,
        clock: Clock | None = None,
    ) -> None:
        self._handler = handler
        self._workers = workers
        self._time_limit = time_limit
        self._clock = clock or Clock()
        self._due: dict[Key, float] = {}  # waiting keys
        self._heap: list[tuple[float, int, Key]] = []  # may hold entries that _due no longer confirms
        self._order = itertools.count()
        self._running: dict[Key, float] = {}  # since when
        self._again: dict[Key, float] = {}  # added while running: when due
        self._failures: dict[Key, tuple[int, str]] = {}  # in a row, and the last one's message
        self._changed = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    def add(self, key: Key, *, after: float = 0) -> None:
        """Has the key run in `after` seconds, or sooner where it is already due sooner; again, if it is running now."""
        due = self._clock.monotonic() + after
        if key in self._running:
            self._again[key] = min(due, self._again.get(key, due))
        else:
            self._schedule(key, due)

    def idle(self) -> bool:
        """Whether nothing runs and nothing is due now; keys that wait for a later time don't count."""
        due = self._next_due()
        return not self._running and (due is None or due > self._clock.monotonic())

    async def wait_idle(self) -> None:
        """Returns when no key is due or being worked on, so once `idle()` holds."""
        while not self.idle():
            self._idle.clear()
            await self._idle.wait()

    def due_in(self, key: Key) -> float | None:
        """Seconds until a waiting key runs (0 when it is due); None when it does not wait."""
        due = self._due.get(key)
        return None if due is None else max(0.0, due - self._clock.monotonic())

    def failures(self, key: Key) -> int:
        """Failed runs of the key in a row."""
        return self._failures.get(key, (0, ""))[0]

    def longest_run(self) -> tuple[Key, float] | None:
        """The key that has been running for longest, and for how many seconds."""
        if not self._running:
            return None
        key = min(self._running, key=self._running.__getitem__)
        return key, self._clock.monotonic() - self._running[key]

    def __len__(self) -> int:
        """Keys that wait or run."""
        return len(self._due) + len(self._running)

    async def run(self) -> None:
        """Works until cancelled; runs in progress are cancelled with it."""
        async with asyncio.TaskGroup() as group:
            while True:
                self._changed.clear()
                while len(self._running) < self._workers and (key := self._next()) is not None:
                    self._running[key] = self._clock.monotonic()
                    group.create_task(self._work(key), name=f"reconcile {key}")
                if self.idle():
                    self._idle.set()
                await self._wait()

    async def _wait(self) -> None:
        """Until a key was added or finished, or the next one is due."""
        due = None if len(self._running) >= self._workers else self._next_due()
        pause = None if due is None else max(0.0, due - self._clock.monotonic())
        try:
            async with asyncio.timeout(pause):
                await self._changed.wait()
        except TimeoutError:
            pass

    def _schedule(self, key: Key, due: float) -> None:
        known = self._due.get(key)
        if known is not None and known <= due:
            return
        self._due[key] = due
        heapq.heappush(self._heap, (due, next(self._order), key))
        self._changed.set()

    def _next_due(self) -> float | None:
        """When the next key is due; None when none waits."""
        while self._heap and self._due.get(self._heap[0][2]) != self._heap[0][0]:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def _next(self) -> Key | None:
        """Takes the key that has been due for longest, if one is due."""
        due = self._next_due()
        if due is None or due > self._clock.monotonic():
            return None
        key = heapq.heappop(self._heap)[2]
        del self._due[key]
        return key

    async def _work(self, key: Key) -> None:
        try:
            async with asyncio.timeout(self._time_limit):
                again = await self._handler(key)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            self._finish(key, self._failed(key, RuntimeError("the run was cancelled from within")))
        except Exception as error:
            self._finish(key, self._failed(key, error))
        else:
            self._failures.pop(key, None)
            self._finish(key, again)

    def _failed(self, key: Key, error: Exception) -> float:
        """Notes and logs the failure; seconds to wait. The same message in a row is logged once."""
        count, last = self._failures.get(key, (0, ""))
        message = f"{type(error).__name__}: {error}"
        self._failures[key] = (count + 1, message)
        delay = backoff(count + 1)
        if message == last:
            log.debug("%s: still failing, attempt %d: %s", key, count + 1, message)
        elif isinstance(error, OperatorError):
            log.warning("%s: %s; next attempt in %.1f s", key, message, delay)
        else:
            log.error("%s: unexpected failure; next attempt in %.1f s", key, delay, exc_info=error)
        return delay

    def _finish(self, key: Key, after: float | None) -> None:
        now = self._clock.monotonic()
        del self._running[key]
        again = self._again.pop(key, None)
        if again is not None and key in self._failures:
            again = max(again, now + FIRST_BACKOFF)  # news may cut the back-off short, but not to nothing
        if again is not None:
            self._schedule(key, again)
        if after is not None:
            self._schedule(key, now + after)
        self._changed.set()
