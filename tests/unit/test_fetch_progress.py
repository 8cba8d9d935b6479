"""Progress lines are rare and true; a Job that gets nowhere is noticed."""

from __future__ import annotations

import io
import itertools
import json
import threading
import time
from pathlib import Path

from lora_operator.fetch.content.select import RemoteFile
from lora_operator.fetch.progress import Reporter, measure_blobs


def test_bytes_are_finished_and_unfinished_blobs_of_the_wanted_files(tmp_path: Path) -> None:
    files = [
        RemoteFile(name, 100, oid * 40, None) for name, oid in (("x", "a"), ("same as x", "a"), ("y", "b"), ("z", "c"))
    ]
    measure = measure_blobs(tmp_path, files)
    assert measure() == (0, 0)
    (tmp_path / ("a" * 40)).write_bytes(b"1" * 100)
    (tmp_path / f"{'b' * 40}.incomplete").write_bytes(b"1" * 30)
    (tmp_path / f"{'b' * 40}.0123abcd.incomplete").write_bytes(b"1" * 20)
    (tmp_path / "of-another-revision").write_bytes(b"1" * 7)
    assert measure() == (130, 157)
    (tmp_path / ("c" * 40)).write_bytes(b"1" * 500)  # longer than declared: never more than the whole
    assert measure()[0] == 230


def test_a_directory_that_is_not_there_yet_has_nothing(tmp_path: Path) -> None:
    assert measure_blobs(tmp_path / "nope", [])() == (0, 0)


def test_lines_are_a_second_apart_and_follow_the_figures() -> None:
    out, done = io.StringIO(), 0
    stamps: list[float] = []

    class Stamped(io.StringIO):
        def write(self, line: str) -> int:
            if line.strip():
                stamps.append(time.monotonic())
            return out.write(line)

    enough = threading.Event()

    def measure() -> tuple[int, int]:
        nonlocal done
        done += 10
        if done >= 30:
            enough.set()
        return done, done

    with Reporter(on_stall=lambda _: None, out=Stamped()) as reporter:
        reporter.enter("Downloading", total=25, measure=measure)
        assert enough.wait(10)
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    assert ("Downloading", 25, 25) in [(line["phase"], line["bytesDone"], line["bytesTotal"]) for line in lines]
    assert lines[-1]["bytesPerSecond"] > 0
    assert all(line["bytesDone"] <= 25 for line in lines)
    assert all(later - earlier >= 0.9 for earlier, later in itertools.pairwise(stamps))


def test_a_job_that_gets_nowhere_is_noticed() -> None:
    told = threading.Event()
    with Reporter(on_stall=lambda _: told.set(), stall_after=0.5, out=io.StringIO()) as reporter:
        reporter.enter("Downloading", total=5, measure=lambda: (1, 1))
        assert told.wait(10)


def test_a_job_that_publishes_has_no_figures_that_could_stand_still() -> None:
    told, ticks = threading.Event(), 0
    enough = threading.Event()

    def measure() -> tuple[int, int]:
        nonlocal ticks
        ticks += 1
        if ticks >= 4:
            enough.set()
        return 5, 0

    with Reporter(on_stall=lambda _: told.set(), stall_after=0.5, out=io.StringIO()) as reporter:
        reporter.enter("Publishing", total=5, measure=measure)
        enough.wait(10)
    assert not told.is_set()


def test_a_job_that_gets_on_slowly_is_left_alone() -> None:
    told, ticks = threading.Event(), 0
    enough = threading.Event()

    def measure() -> tuple[int, int]:
        nonlocal ticks
        ticks += 1
        if ticks >= 4:
            enough.set()
        return 0, ticks  # nothing of what is wanted, but something moves

    with Reporter(on_stall=lambda _: told.set(), stall_after=1.5, out=io.StringIO()) as reporter:
        reporter.enter("Downloading", total=5, measure=measure)
        assert enough.wait(10)
        assert not told.is_set()
