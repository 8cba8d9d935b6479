"""Room on the volume: what was promised to one Job is nobody else's until it is filled, given back, or the Job is dead."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from lora_operator.constants import Reason
from lora_operator.errors import ReasonError
from lora_operator.fetch.volume import reservations
from lora_operator.fetch.volume.limits import NoRoomError
from lora_operator.fetch.volume.store_locks import STATE
from lora_operator.wire.jobs import VolumeLimits

MIB = 1 << 20


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A volume with 100 MiB free."""
    (tmp_path / "artifacts").mkdir()
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=100, f_frsize=MIB, f_blocks=1024))
    monkeypatch.setattr(time, "sleep", lambda _: None)
    return tmp_path


@contextlib.contextmanager
def room(root: Path, holder: str, size: int, **limits: int) -> Iterator[list[int]]:
    """Yields how much is there, in MiB, to be changed."""
    there = [0]
    with reservations.reserved(
        root,
        size=size * MIB,
        missing=lambda: (size - there[0]) * MIB,
        done=lambda: there[0] * MIB,
        limits=VolumeLimits(holder=holder, **limits),
    ):
        yield there


def refused(root: Path, size: int, **limits: int) -> NoRoomError:
    with pytest.raises(NoRoomError) as caught, room(root, "late", size, **limits):
        pass
    return caught.value


def files(root: Path) -> list[Path]:
    return list((root / STATE / "reserved").iterdir())


def test_what_was_promised_to_one_is_nobody_elses(root: Path) -> None:
    with room(root, "a", 60):
        error = refused(root, 41)
        assert "100.0 MiB free, other Jobs will write 60.0 MiB" in error.message
        assert error.needed == MIB
        with room(root, "b", 40):
            assert "other Jobs will write 100.0 MiB" in refused(root, 1).message
        with room(root, "c", 40):
            pass
    with room(root, "d", 100):
        assert [path.name for path in files(root)] == ["d"]
    assert files(root) == []


def test_capacity_is_shared_too(root: Path) -> None:
    with room(root, "a", 30, capacity_bytes=50 * MIB):
        assert "of the 50.0 MiB that it may (spec.capacity), other Jobs will write 30.0 MiB" in (
            refused(root, 21, capacity_bytes=50 * MIB).message
        )


def test_what_is_written_by_now_is_not_kept_any_more(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reservations, "_REPORT_EVERY_S", 0.01)
    with room(root, "a", 60) as there:
        there[0] = 50
        for _ in range(1000):
            if files(root)[0].read_text("ascii").startswith(f"{10 * MIB:020d} "):
                break
            threading.Event().wait(0.01)
        with room(root, "b", 90):
            pass


def test_a_dead_ones_room_is_free_and_an_earlier_jobs_of_the_same_artifact(root: Path) -> None:
    with room(root, "a", 60):
        (dead,) = files(root)
        left = dead.read_bytes()
    dead.write_bytes(left)
    assert "other Jobs will write 60.0 MiB" in refused(root, 60).message
    with room(root, "a", 100):
        pass
    dead.write_bytes(left)
    old = dead.stat().st_mtime - reservations.DEAD_AFTER_S - 1
    os.utime(dead, (old, old))
    with room(root, "b", 100):
        assert not dead.exists()


def test_of_those_that_ask_at_once_none_overlooks_another(root: Path) -> None:
    asked, went_on, refusals = threading.Barrier(8), list[str](), list[str]()
    done = threading.Event()

    def job(name: str) -> None:
        asked.wait()
        try:
            with room(root, name, 60):
                went_on.append(name)
                done.wait(30)
        except NoRoomError as error:
            refusals.append(error.message)

    threads = [threading.Thread(target=job, args=(f"job-{n}",)) for n in range(8)]
    for thread in threads:
        thread.start()
    while len(went_on) + len(refusals) < 8:
        threading.Event().wait(0.01)
    assert len(went_on) <= 1, "100 MiB are free, and each needs 60"
    done.set()
    for thread in threads:
        thread.join()
    assert files(root) == []


def test_one_that_was_only_asked_for_by_another_is_asked_for_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = root / STATE / "reserved"
    folder.mkdir(parents=True)
    other = folder / "other"
    other.write_text(f"{60 * MIB:020d} asked   ")
    monkeypatch.setattr(time, "sleep", lambda _: other.unlink())
    with room(root, "a", 60):
        assert [path.name for path in files(root)] == ["a"]


def test_what_needs_nothing_keeps_nothing(root: Path) -> None:
    with room(root, "a", 0):
        assert not (root / STATE).exists()


def test_a_volume_that_fills_says_what_it_would_take_with_what_others_will_write(root: Path) -> None:
    def fill() -> None:
        with room(root, "b", 30):
            raise ReasonError(Reason.INSUFFICIENT_SPACE, "the volume is full")

    with room(root, "a", 70), pytest.raises(NoRoomError) as caught:
        fill()
    assert caught.value.needed == max(1, (30 + 70 - 100) * MIB)


def test_a_volume_that_is_full_to_the_last_byte_is_told_as_such(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(reservations, "_write", full)
    with pytest.raises(NoRoomError), room(root, "a", 1):
        pass
    monkeypatch.undo()


def test_a_process_that_ends_at_once_gives_back_what_it_has(root: Path) -> None:
    with room(root, "a", 60):
        reservations.drop()
        assert files(root) == []
