"""Counts what is read, from several threads; and what tells a Job that gets on from one that gets nowhere, where nothing is written.

To hash what a dead Job left, or to pass over files of an archive, takes minutes for many gigabytes, in which no byte arrives.
"""

from __future__ import annotations

import threading
from typing import Final


class Meter:
    """A sum of bytes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0

    def add(self, count: int) -> None:
        """Adds `count` bytes."""
        with self._lock:
            self._count += count

    def read(self) -> tuple[int, int]:
        """In the form that progress wants."""
        with self._lock:
            return self._count, self._count


GETTING_ON: Final = Meter()  # of this process: bytes read from the volume, and every look at a lock that it waits for
