"""Reservations: space on the volume that Jobs will still fill, for all other Jobs to see, whatever cache, pod or cluster they are of.

    artifacts/.lora-operator/reserved/<artifact>-<claim>     how many bytes its Job has still to write, and whether they are promised

A Job first asks, and then looks who else asked or was promised space: of two that come at once the later one to ask sees the other, so
no locks are needed, which hold for one node alone on some volumes. Both may be refused then, and ask again after a moment. A Job reports
every few seconds what it has still to write; one that has not for two minutes is dead.
"""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

from lora_operator.errors import ReasonError
from lora_operator.fetch.volume.layout import PROCESS, SHARED_FILE, from_system, make_shared
from lora_operator.fetch.volume.limits import require_room, to_write, with_need
from lora_operator.fetch.volume.store_locks import STATE
from lora_operator.wire.jobs import VolumeLimits

DEAD_AFTER_S: Final = 120.0
_REPORT_EVERY_S: Final = 5.0
_TRIES: Final = 6  # with a pause of up to 1, 2, 4, 8, 16 s between them
_PROMISED: Final = "promised"
_ASKED: Final = "asked   "
_held: set[Path] = set()


class Others(NamedTuple):
    """What other Jobs have still to write, in bytes; `asked`: of that, what they were not promised yet."""

    bytes: int
    asked: int


@contextlib.contextmanager
def reserved(
    root: Path, *, size: int, missing: Callable[[], int], done: Callable[[], int], limits: VolumeLimits
) -> Iterator[None]:
    """Reserves space for the block to write what is missing of content of `size`; `done` is how much of that is there.

    Raises ReasonError where there is not enough; a volume that fills in the block tells what it would take to go on.
    """
    needed = to_write(size=size, missing=missing(), limits=limits)
    path = root / STATE / "reserved" / (limits.holder or f"{PROCESS}-{os.getpid()}")
    with _kept(path, needed, done) if needed else contextlib.nullcontext():
        try:
            if needed:
                _ask(root, path, needed, limits)
            yield
        except ReasonError as error:
            others = others_of(path).bytes if needed else 0
            raise with_need(error, root, missing=missing(), limits=limits, reserved=others) from error


def drop() -> None:
    """The process ends without leaving its blocks."""
    for path in tuple(_held):
        _drop(path)


def others_of(path: Path) -> Others:
    """What others than this one have in its folder; by its own age, dead ones are removed."""
    total = asked = 0
    try:
        now = path.stat().st_mtime  # by the volume's own clock
        others = [other for other in path.parent.iterdir() if other != path]
    except FileNotFoundError:
        return Others(0, 0)
    for other in others:
        with contextlib.suppress(OSError, ValueError):  # it has ended, or has not asked yet: then it will see this one
            if now - other.stat().st_mtime > DEAD_AFTER_S:
                other.unlink()
                continue
            size, _, state = other.read_text("ascii").partition(" ")
            total += int(size)
            asked += 0 if state == _PROMISED else int(size)
    return Others(total, asked)


@contextlib.contextmanager
def _kept(path: Path, needed: int, done: Callable[[], int]) -> Iterator[None]:
    """Reports every few seconds what is still to be written, until the block is left: a silent reservation counts as dead."""
    before, stop = done(), threading.Event()

    def report() -> None:
        while not stop.wait(_REPORT_EVERY_S):
            with contextlib.suppress(OSError):
                if path in _held:
                    _write(path, max(0, needed - (done() - before)), _PROMISED)

    thread = threading.Thread(target=report, name="reservation", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        _drop(path)


def _ask(root: Path, path: Path, needed: int, limits: VolumeLimits) -> None:
    """Raises ReasonError where there is not enough space."""
    try:
        for folder in (path.parents[1], path.parent):
            if not folder.is_dir():
                make_shared(folder, like=root)
        for attempt in range(_TRIES):
            path.unlink(missing_ok=True)  # an earlier Job's, maybe another user's
            _write(path, needed, _ASKED)
            others = others_of(path)
            try:
                require_room(root, needed=needed, limits=limits, reserved=others.bytes)
            except ReasonError:
                if not others.asked or attempt == _TRIES - 1:
                    raise
                path.unlink(missing_ok=True)
                time.sleep(random.uniform(0, 2**attempt))  # noqa: S311  not a secret
                continue
            _write(path, needed, _PROMISED)
            _held.add(path)
            return
    except OSError as error:
        raise from_system(error) or error from error


def _drop(path: Path) -> None:
    _held.discard(path)
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def _write(path: Path, size: int, state: str) -> None:
    """In one piece of always the same length, so that nobody reads half of it."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, SHARED_FILE)
    try:
        os.pwrite(descriptor, f"{size:020d} {state}".encode("ascii"), 0)
    finally:
        os.close(descriptor)
