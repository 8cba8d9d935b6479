"""Figures of a download are told truly, rarely, and not at all while nothing moves."""

from __future__ import annotations

from datetime import timedelta

import pytest

from lora_operator.api.progress import Progress
from lora_operator.fetch.progress import Rate
from lora_operator.plan.progress import describe, format_seconds, look_every, mirrored, told
from lora_operator.wire.jobs import FetchProgress
from tests.unit.builders import NOW, through_the_api

MIB = 1 << 20


def line(done: int, rate: int = 10 * MIB, phase: str = "Downloading") -> FetchProgress:
    return FetchProgress.model_validate(
        {"phase": phase, "bytesDone": done * MIB, "bytesTotal": 1000 * MIB, "bytesPerSecond": rate}
    )


def at(seconds: float, old: Progress | None, read: FetchProgress | None) -> Progress | None:
    found = told(old, read, now=NOW + timedelta(seconds=seconds))
    return None if found is None else through_the_api(found)


def test_figures_of_a_line() -> None:
    found = at(0, None, line(250))
    assert found is not None
    assert (found.percent, found.rate, found.eta_seconds, found.eta) == (25, "10MiB/s", 75, "1m15s")
    assert describe(found) == "25% of 1000Mi at 10MiB/s, 1m15s left"


def test_what_stands_still_has_no_time_that_is_left() -> None:
    found = at(0, None, line(250, rate=0))
    assert found is not None
    assert (found.rate, found.eta, found.eta_seconds) == ("0B/s", None, None)
    assert describe(found) == "25% of 1000Mi"


def test_a_phase_without_figures_has_no_rate() -> None:
    found = at(0, None, FetchProgress(phase="Publishing", bytes_done=5, bytes_total=5))
    assert found is not None
    assert (found.percent, found.rate, found.eta) == (100, None, None)


def test_figures_are_written_every_two_seconds_at_most_and_a_new_phase_at_once() -> None:
    first = at(0, None, line(10))
    assert at(1, first, line(20)) == first
    second = at(2, first, line(30))
    assert second is not None
    assert second.bytes_done == 30 * MIB
    verifying = at(2.1, second, line(1, phase="Verifying"))
    assert verifying is not None
    assert verifying.phase == "Verifying"


def test_nothing_is_written_while_nothing_moves() -> None:
    first = at(0, None, line(10))
    assert at(100, first, line(10)) == first
    assert at(100, first, None) == first, "a log that can't be read is no news"


def test_an_adapter_says_it_every_ten_seconds_at_most() -> None:
    figures = [at(2 * n, None, line(10 + n)) for n in range(31)]
    said: list[Progress | None] = []
    old = None
    for new in figures:
        old = mirrored(old, new)
        if not said or said[-1] != old:
            said.append(old)
    assert said == figures[::5]
    assert mirrored(old, None) is None
    verifying = at(60, None, line(1, phase="Verifying"))
    assert mirrored(old, verifying) == verifying


@pytest.mark.parametrize(("jobs", "seconds"), [(1, 2), (20, 2), (100, 10), (1000, 100)])
def test_many_jobs_share_the_requests_for_their_logs(jobs: int, seconds: float) -> None:
    assert look_every(jobs) == seconds


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (0.2, "1s"), (59, "59s"), (60, "1m"), (200, "3m20s"), (7500, "2h5m"), (273600, "3d4h")],
)
def test_times_as_people_say_them(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_the_rate_is_that_of_the_last_ten_seconds_and_what_was_there_does_not_count() -> None:
    rate = Rate()
    assert rate.add(100, 5000) == 0
    assert rate.add(101, 5100) == 100
    for second in range(2, 12):
        assert rate.add(100 + second, 5100 + (second - 1) * 200) in range(100, 201)
    for second in range(12, 22):
        last = rate.add(100 + second, 7100)
    assert last == 0, "it stands still"
