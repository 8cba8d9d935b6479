"""What of a download's progress is told, and how often: figures move every second, objects must not be written as often."""

from __future__ import annotations

import math
from datetime import datetime
from typing import Final

from lora_operator.api.progress import Progress
from lora_operator.names import format_size
from lora_operator.wire.jobs import FetchProgress

TOLD_SECONDS: Final = 2.0  # between writes of an artifact's figures
MIRRORED_SECONDS: Final = 10.0  # between writes of an adapter's
READS_PER_SECOND: Final = 10.0  # of Jobs' logs, whatever the number of Jobs
_DAY: Final = 24 * 3600


def look_every(jobs: int) -> float:
    """After how many seconds to read a Job's log again while so many Jobs run."""
    return max(TOLD_SECONDS, jobs / READS_PER_SECOND)


def told(old: Progress | None, read: FetchProgress | None, *, now: datetime) -> Progress | None:
    """What a running artifact's status says, having said `old`; the same where nothing moved, or it was told just now.

    A log that can't be read for a moment is no news.
    """
    if read is None:
        return old
    new = _figures(read, now)
    if old is None or old.phase != new.phase:
        return new
    if old.model_copy(update={"time": None}) == new.model_copy(update={"time": None}):
        return old
    return new if _age(old, now) >= TOLD_SECONDS else old


def mirrored(old: Progress | None, new: Progress | None) -> Progress | None:
    """What an adapter says of its artifact's figures, having said `old`."""
    if old is None or new is None or old.phase != new.phase or new.time is None:
        return new
    return new if _age(old, new.time) >= MIRRORED_SECONDS else old


def describe(progress: Progress) -> str:
    """Figures for a message: 45% of 2.1Gi at 12Mi/s, 1m30s left."""
    text = f"{progress.percent}% of {format_size(progress.bytes_total)}"
    if progress.bytes_per_second:
        text += f" at {progress.rate}"
    return f"{text}, {progress.eta} left" if progress.eta is not None else text


def format_seconds(seconds: float) -> str:
    """A time that is left, as people say it: 40s, 3m20s, 2h5m, 3d4h."""
    whole = math.ceil(seconds)
    for size, unit, smaller, name in ((_DAY, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            rest = whole % size // smaller
            return f"{whole // size}{unit}" + (f"{rest}{name}" if rest else "")
    return f"{whole}s"


def _figures(read: FetchProgress, now: datetime) -> Progress:
    percent = min(100, read.bytes_done * 100 // read.bytes_total) if read.bytes_total else 0
    if read.phase not in ("Downloading", "Verifying"):
        return Progress(
            phase=read.phase, bytes_done=read.bytes_done, bytes_total=read.bytes_total, percent=percent, time=now
        )
    rate = read.bytes_per_second
    left = (read.bytes_total - read.bytes_done) / rate if rate > 0 else None
    return Progress(
        phase=read.phase,
        bytes_done=read.bytes_done,
        bytes_total=read.bytes_total,
        percent=percent,
        bytes_per_second=rate,
        rate=f"{format_size(rate)}B/s",
        eta_seconds=None if left is None else math.ceil(left),
        eta=None if left is None else format_seconds(left),
        time=now,
    )


def _age(progress: Progress, now: datetime) -> float:
    return (now - progress.time).total_seconds() if progress.time is not None else math.inf
