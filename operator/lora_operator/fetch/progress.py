"""Says where the Job is, at most one line a second, and notices when it gets nowhere.

Bytes are read from the cache (finished blobs and unfinished ones), not counted in the download: so they are true after a restart, and
while another Job downloads the very file that this one waits for. A Job whose figures don't move for `stall_after` seconds is ended by
`on_stall`: a source that sends one byte now and then passes every time-out of a request. What it reads of its own volume moves too (see
`heartbeat`). Not while it publishes: nothing is measured there, a check may read gigabytes, and no source is waited for.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal, TextIO

from lora_operator.fetch.content.select import RemoteFile
from lora_operator.fetch.heartbeat import HEARTBEAT
from lora_operator.wire.jobs import FetchProgress

Phase = Literal["Authorising", "Downloading", "Verifying", "Publishing"]

STALL_AFTER_S: Final = 120.0
STALL_ENV: Final = "LORA_OPERATOR_STALL_SECONDS"
_LINE_EVERY_S: Final = 1.0
_RATE_OVER_S: Final = 10.0
_INCOMPLETE: Final = ".incomplete"


def stall_after() -> float:
    """After how many seconds without a byte a Job is ended."""
    return float(os.environ.get(STALL_ENV) or STALL_AFTER_S)


@dataclass
class Reporter:
    """Prints progress from a thread of its own; use as a context manager. `measure` gives (bytes done, any number that moves)."""

    on_stall: Callable[[float], None]
    stall_after: float = STALL_AFTER_S
    out: TextIO = field(default_factory=lambda: sys.stdout)
    phase: Phase = "Authorising"
    bytes_total: int = 0
    measure: Callable[[], tuple[int, int]] = lambda: (0, 0)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
        self._moved = time.monotonic()
        self._printed: FetchProgress | None = None
        self._rate = Rate()

    def __enter__(self) -> Reporter:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def enter(self, phase: Phase, *, total: int = 0, measure: Callable[[], tuple[int, int]] | None = None) -> None:
        """The next phase begins; its first line appears with the next tick, within a second."""
        with self._lock:
            self.phase, self.bytes_total = phase, total
            self.measure = measure or (lambda: (0, 0))
            self._moved = time.monotonic()
            self._rate = Rate()

    def _run(self) -> None:
        last: tuple[Phase, int, int] | None = None
        while True:
            with self._lock:
                phase, total, measure, rate = self.phase, self.bytes_total, self.measure, self._rate
            done, moving = measure()
            now = time.monotonic()
            read, _ = HEARTBEAT.read()
            if (phase, moving, read) != last:
                last = (phase, moving, read)
                with self._lock:
                    self._moved = now
            figures = FetchProgress(phase=phase, bytes_done=min(done, total), bytes_total=total)
            self._print(figures.model_copy(update={"bytes_per_second": rate.add(now, figures.bytes_done)}))
            with self._lock:
                still = now - self._moved
            if still >= self.stall_after and phase != "Publishing":
                self.on_stall(still)
                return
            if self._stop.wait(_LINE_EVERY_S):
                return

    def _print(self, line: FetchProgress) -> None:
        if line == self._printed:
            return
        self._printed = line
        with contextlib.suppress(OSError, ValueError):  # a closed log is no reason to end a download
            print(line.model_dump_json(by_alias=True), file=self.out, flush=True)


class Rate:
    """Bytes a second over the last seconds; what was there at the first look was not moved."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()

    def add(self, now: float, done: int) -> int:
        """The rate at `now`, in seconds of any clock that never goes back."""
        self._seen.append((now, done))
        while len(self._seen) > 2 and now - self._seen[1][0] >= _RATE_OVER_S:
            self._seen.popleft()
        then, before = self._seen[0]
        return max(0, round((done - before) / (now - then))) if now > then else 0


def measure_blobs(blobs: Path, files: Iterable[RemoteFile]) -> Callable[[], tuple[int, int]]:
    """Measures how much of `files` is in `blobs`; the second figure moves with anything that is written there."""
    sizes = {file.blob: file.size for file in files}

    def measure() -> tuple[int, int]:
        have: dict[str, int] = {}
        written = 0
        try:
            with os.scandir(blobs) as entries:
                for entry in entries:
                    try:
                        size = entry.stat().st_size
                    except OSError:
                        continue
                    written += size
                    etag = entry.name.split(".")[0] if entry.name.endswith(_INCOMPLETE) else entry.name
                    if etag in sizes:
                        have[etag] = max(have.get(etag, 0), min(size, sizes[etag]))
        except OSError:
            return 0, 0
        return sum(have.values()), written

    return measure
