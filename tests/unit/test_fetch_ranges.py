"""One object by several requests at a time: whole, in order, bounded, and over at the first fault."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from lora_operator.fetch.sources import ranges

SIZE = 6 * ranges.PART + 5
DATA = bytes(range(256)) * (SIZE // 256 + 1)


class Store:
    """An object that can be read in ranges; the first request is answered only once `late` others were made."""

    def __init__(self, late: int = 0) -> None:
        self.asked: list[tuple[int, int]] = []
        self.open = self.most = 0
        self.enough = threading.Event()
        self.late = late
        self.lock = threading.Lock()

    @contextmanager
    def read(self, first: int, behind: int) -> Iterator[Iterator[bytes]]:
        with self.lock:
            self.asked.append((first, behind))
            self.open += 1
            self.most = max(self.most, self.open)
            if len(self.asked) > self.late:
                self.enough.set()
        if first == 0:
            assert self.enough.wait(30)
        yield (DATA[at : min(at + 100_003, behind)] for at in range(first, behind, 100_003))
        with self.lock:
            self.open -= 1


def take(chunks: Iterator[bytes], into: bytearray) -> None:
    """Adds what comes, as long as something comes."""
    for chunk in chunks:
        into += chunk


@pytest.mark.parametrize("start", [0, 1, ranges.PART, SIZE - 1])
def test_bytes_come_in_order_from_wherever_they_begin(start: int) -> None:
    store = Store(late=3 if start == 0 else 0)
    with ranges.in_order(store.read, start, SIZE, requests=4) as chunks:
        assert b"".join(chunks) == DATA[start:SIZE]
    assert store.most <= 4
    assert sorted(store.asked) == [(at, min(at + ranges.PART, SIZE)) for at in range(start, SIZE, ranges.PART)]


@pytest.mark.parametrize("change", [-1, 1], ids=["short", "long"])
def test_a_range_of_another_length_ends_it_before_the_gap(change: int) -> None:
    store = Store()

    @contextmanager
    def read(first: int, behind: int) -> Iterator[Iterator[bytes]]:
        with store.read(first, behind + (change if first else 0)) as chunks:
            yield chunks

    got = bytearray()
    with (
        ranges.in_order(read, 0, SIZE, requests=2) as chunks,
        pytest.raises(OSError, match="bytes 8388608 to 16777215"),
    ):
        take(chunks, got)
    assert DATA.startswith(bytes(got))
    assert len(got) >= ranges.PART


def test_a_fault_is_told_in_its_place_and_nothing_more_is_asked_for() -> None:
    store = Store()

    @contextmanager
    def read(first: int, behind: int) -> Iterator[Iterator[bytes]]:
        with store.read(first, behind) as chunks:
            if first == ranges.PART:
                raise ConnectionResetError("gone")
            yield chunks

    got = bytearray()
    with ranges.in_order(read, 0, SIZE, requests=2) as chunks, pytest.raises(ConnectionResetError):
        take(chunks, got)
    assert bytes(got) == DATA[: ranges.PART]
    assert len(store.asked) <= 3


def test_who_stops_early_leaves_nothing_running() -> None:
    store = Store()
    with ranges.in_order(store.read, 0, SIZE, requests=4) as chunks:
        next(chunks)
    mine = [thread for thread in threading.enumerate() if thread.name.startswith("ranges")]
    for thread in mine:
        thread.join(30)
    assert not any(thread.is_alive() for thread in mine)
    assert len(store.asked) <= 4


def test_all_objects_together_have_a_bounded_number_of_requests() -> None:
    assert [ranges.at_once(objects) for objects in (1, 4, 5, 8, 16, 32)] == [4, 4, 3, 2, 1, 1]
