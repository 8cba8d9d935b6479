"""Reads one object by several requests at a time, and hands its bytes out in their order.

One connection to a big object store moves some 100 MB/s at most, whatever the network bears; several move several times that. What has
arrived ahead of its turn waits in memory: of all objects together at most REQUESTS parts, 128 MiB.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from queue import Empty, SimpleQueue
from typing import Final

PART: Final = 8 << 20  # bytes of one request
REQUESTS: Final = 16  # at a time, of all objects together
_MOST: Final = 4  # at a time for one object

Read = Callable[[int, int], AbstractContextManager[Iterator[bytes]]]
_Part = SimpleQueue[bytes | BaseException | None]  # None: it is whole


def at_once(objects: int) -> int:
    """How many requests each of so many objects may have at a time."""
    return max(1, min(_MOST, REQUESTS // objects))


@contextmanager
def in_order(
    read: Read, start: int, end: int, *, requests: int, patience: float | None = None
) -> Iterator[Iterator[bytes]]:
    """The bytes of an object from `start` to before `end`; `read` asks for a range by its first byte and the one behind its last.

    At most so many `requests` are under way. The iterator raises what `read` raises, OSError where a range's bytes are not as many as were asked for, and TimeoutError
    when the next ones take longer than `patience` seconds; what was handed out before is right and without a gap. Requests that nobody needs any more end with their next bytes.
    """
    stop = threading.Event()
    pool = ThreadPoolExecutor(requests, thread_name_prefix="ranges")
    try:
        yield _hand_out(pool, read, start, end, requests, stop, patience)
    finally:
        stop.set()
        pool.shutdown(wait=False, cancel_futures=True)


def _hand_out(
    pool: ThreadPoolExecutor,
    read: Read,
    start: int,
    end: int,
    requests: int,
    stop: threading.Event,
    patience: float | None,
) -> Iterator[bytes]:
    parts: deque[_Part] = deque()
    for first in range(start, end, PART):
        if len(parts) == requests:
            yield from _chunks(parts.popleft(), patience)
        parts.append(SimpleQueue())
        pool.submit(_fill, parts[-1], read, first, min(first + PART, end), stop)
    for part in parts:
        yield from _chunks(part, patience)


def _chunks(part: _Part, patience: float | None) -> Iterator[bytes]:
    while True:
        try:
            chunk = part.get(timeout=patience)
        except Empty:
            raise TimeoutError(f"nothing came for {patience:.0f} s") from None
        if chunk is None:
            return
        if isinstance(chunk, BaseException):
            raise chunk
        yield chunk


def _fill(part: _Part, read: Read, first: int, behind: int, stop: threading.Event) -> None:
    left = behind - first
    if stop.is_set():
        return
    try:
        with read(first, behind) as chunks:
            for chunk in chunks:
                if stop.is_set():
                    return
                left -= len(chunk)
                if left < 0:
                    break
                part.put(chunk)
        if left:
            raise OSError(f"bytes {first} to {behind - 1} of an object were asked for, and others came")
        part.put(None)
    except BaseException as error:  # for the one who waits
        part.put(error)
