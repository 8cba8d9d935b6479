"""Whose an unfinished file is: of one at a time where there are locks, of its own process where there are none."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_operator.fetch.heartbeat import HEARTBEAT
from lora_operator.fetch.volume import file_locks


def without_locks(monkeypatch: pytest.MonkeyPatch, number: int = errno.ENOSYS) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)


def unlocked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Locks that hold nobody back, as of a network volume that keeps them to each node."""
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)


def test_the_next_waits_and_finds_what_the_first_left(tmp_path: Path) -> None:
    partial, order = tmp_path / "x.incomplete", list[str]()
    claimed = threading.Event()

    def second() -> None:
        claimed.wait()
        with file_locks.claimed(partial) as (path, file):
            order.append("second")
            file.seek(0)
            assert (path, file.read()) == (partial, b"begun")

    thread = threading.Thread(target=second)
    thread.start()
    with file_locks.claimed(partial) as (_, file):
        claimed.set()
        file.write(b"begun")
        thread.join(0.1)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


@pytest.mark.parametrize(("patience", "counts"), [(60.0, True), (0.0, False)])
def test_who_waits_for_another_job_gets_on_for_a_time(
    tmp_path: Path, patience: float, counts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That Job may be hashing gigabytes, of which nothing can be seen; one that never ends is not waited for for ever."""
    monkeypatch.setattr(file_locks, "_PATIENCE_S", patience)
    partial, waited = tmp_path / "x.incomplete", threading.Event()
    monkeypatch.setattr(time, "sleep", lambda _: waited.set())
    before = HEARTBEAT.read()

    def second() -> None:
        with file_locks.claimed(partial):
            """It is its turn."""

    thread = threading.Thread(target=second)
    with file_locks.claimed(partial):
        thread.start()
        assert waited.wait(10)
        assert (HEARTBEAT.read() != before) == counts
    thread.join(10)
    assert not thread.is_alive()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP])
def test_without_locks_nobody_goes_on_with_anothers_file(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = tmp_path / "x.incomplete"
    partial.write_bytes(b"another one's")
    assert file_locks.supported(tmp_path)
    without_locks(monkeypatch, number)
    assert not file_locks.supported(tmp_path)
    for _ in range(2):  # its own it goes on with
        with file_locks.claimed(partial) as (path, file):
            assert path == file_locks.own(partial)
            assert path.name.startswith("x.")
            assert path.name.endswith(".incomplete")
            file.write(b"mine")
    assert path.read_bytes() == b"minemine"
    assert partial.read_bytes() == b"another one's"
    with file_locks.held(tmp_path / "y.lock") as alone:
        assert not alone


def test_who_is_overtaken_writes_nothing_into_what_was_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlocked(monkeypatch)
    partial, published = tmp_path / "x.incomplete", tmp_path / "x"
    with file_locks.claimed(partial) as (_, slow), file_locks.claimed(partial) as (path, fast):
        slow.write(b"begun ")
        fast.write(b"and done")
        path.rename(published)
        with pytest.raises(file_locks.Overtaken):
            slow.write(b"!")
        with pytest.raises(file_locks.Overtaken):
            slow.truncate(0)
    assert published.read_bytes() == b"begun and done"


LEFT: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], float, bool]] = {
    "a new one, where it can be locked": (lambda _: None, 0.0, False),
    "a new one, where nothing can be locked": (without_locks, 60.0, True),
    "an old one, where nothing can be locked": (without_locks, 4000.0, False),
}


@pytest.mark.parametrize("sentence", LEFT)
def test_what_is_left_goes_once_nobody_can_be_working_on_it(
    sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare, age, stays = LEFT[sentence]
    path = tmp_path / "x.incomplete"
    path.write_bytes(b"left")
    os.utime(path, (time.time() - age,) * 2)
    prepare(monkeypatch)
    file_locks.discard_left(path)
    assert path.exists() is stays


def test_a_file_that_nobody_locks_goes_by_its_age(tmp_path: Path) -> None:
    for name, age in (("old", 4000.0), ("new", 60.0)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
        file_locks.discard_old(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_one_that_is_being_worked_on_stays(tmp_path: Path) -> None:
    path = tmp_path / "x.incomplete"
    with file_locks.claimed(path):
        file_locks.discard_left(path)
        assert path.exists()
        with file_locks.held(tmp_path / "y.lock") as alone, file_locks.held(tmp_path / "y.lock", wait=False) as too:
            assert (alone, too) == (True, False)
