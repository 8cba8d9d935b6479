"""The process's heartbeat: what shows that a Job makes progress while no byte arrives from its source.

Hashing what a dead Job left, or skipping files of an archive, takes minutes for many gigabytes. Without a heartbeat such a Job would
count as stalled and be ended.
"""

from __future__ import annotations

import threading
from typing import Final


class Meter:
    """A sum of bytes that several threads add to."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0

    def add(self, count: int) -> None:
        """Adds `count` to the sum; from any thread."""
        with self._lock:
            self._count += count

    def read(self) -> tuple[int, int]:
        """The sum twice, as progress wants it: what is done, and what moves."""
        with self._lock:
            return self._count, self._count


HEARTBEAT: Final = Meter()  # of this process: bytes read from the volume, and every try for a lock that it waits for
