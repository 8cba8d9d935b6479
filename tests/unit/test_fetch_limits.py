"""Content that is too big or does not fit is told with figures, before its first byte."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lora_operator.constants import Reason
from lora_operator.errors import ReasonError
from lora_operator.fetch.volume.limits import NoRoomError, require_room, require_size, to_write, volume_state
from lora_operator.wire.jobs import VolumeLimits

MIB = 1 << 20


@pytest.fixture
def volume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """100 MiB free of 1 GiB; 30 MiB of content."""
    for place, size in (("hub/models--a--b", 20), ("s3/bucket-0", 10)):
        blobs = tmp_path / place / "blobs"
        blobs.mkdir(parents=True)
        with (blobs / "x").open("wb") as file:
            file.truncate(size * MIB)
    (tmp_path / "hub/models--a--b/snapshots").mkdir()
    (tmp_path / "hub/models--a--b/snapshots/link").symlink_to("../blobs/x")
    (tmp_path / "notes.txt").write_bytes(b"somebody's own")
    figures = SimpleNamespace(f_bavail=100, f_frsize=MIB, f_blocks=1024)
    monkeypatch.setattr(os, "statvfs", lambda _: figures)
    return SimpleNamespace(root=tmp_path, figures=figures)


def require(volume: Any, missing: int, size: int, reserved: int, limits: VolumeLimits) -> None:
    needed = to_write(size=(size or missing) * MIB, missing=missing * MIB, limits=limits)
    if needed:
        require_room(volume.root, needed=needed, limits=limits, reserved=reserved * MIB)


def refused(volume: Any, missing: int, *, size: int = 0, reserved: int = 0, **limits: int) -> str:
    with pytest.raises(ReasonError) as caught:
        require(volume, missing, size, reserved, VolumeLimits(**limits))
    assert caught.value.reason is Reason.INSUFFICIENT_SPACE
    return caught.value.message


def fits(volume: Any, missing: int, *, size: int = 0, reserved: int = 0, **limits: int) -> None:
    require(volume, missing, size, reserved, VolumeLimits(**limits))


def test_the_volume_has_room_or_not(volume: Any) -> None:
    fits(volume, 100)
    assert "101.0 MiB are to be downloaded, but the cache's volume has 100.0 MiB free; free space" in refused(
        volume, 101
    )


def test_what_is_to_stay_free_stays_free(volume: Any) -> None:
    fits(volume, 60, min_free_bytes=40 * MIB)
    assert "100.0 MiB free of which 40.0 MiB stay free (spec.minFree)" in refused(volume, 61, min_free_bytes=40 * MIB)


def test_what_other_jobs_will_write_counts_as_written(volume: Any) -> None:
    fits(volume, 60, reserved=40)
    assert "other Jobs will write 40.0 MiB" in refused(volume, 61, reserved=40)
    assert "other Jobs will write 10.0 MiB" in refused(volume, 11, capacity_bytes=50 * MIB, reserved=10)


def test_the_caches_capacity_is_of_content_alone(volume: Any) -> None:
    fits(volume, 20, capacity_bytes=50 * MIB)
    said = refused(volume, 21, capacity_bytes=50 * MIB)
    assert (
        "21.0 MiB are to be downloaded, but the cache holds 30.0 MiB of the 50.0 MiB that it may (spec.capacity)"
        in said
    )


def test_a_size_that_is_only_said_counts_until_the_content_is_there(volume: Any) -> None:
    assert "150.0 MiB are to be downloaded" in refused(volume, 1, hint_bytes=150 * MIB)
    fits(volume, 10, size=100, hint_bytes=150 * MIB)  # 90 are there: 60 at most are missing
    fits(volume, 0, hint_bytes=150 * MIB)


def test_what_would_have_to_go_can_be_told_however_much_it_is(volume: Any) -> None:
    most = 2**63 - 1
    with pytest.raises(NoRoomError) as caught:
        require_room(volume.root, needed=most, limits=VolumeLimits(min_free_bytes=most), reserved=most)
    assert caught.value.needed == most


def test_what_needs_nothing_fits_everywhere(volume: Any) -> None:
    volume.figures.f_bavail = 0
    fits(volume, 0, min_free_bytes=1, capacity_bytes=1)


def test_a_file_system_that_does_not_tell_its_size_has_room(volume: Any) -> None:
    volume.figures.f_blocks = 0
    fits(volume, 10_000)


def test_content_that_is_too_big_is_told_with_both_sizes() -> None:
    limits = VolumeLimits(max_artifact_bytes=10 * MIB)
    require_size(10 * MIB, 3, limits)
    with pytest.raises(
        ReasonError, match=r"has 11.0 MiB in 3 files, and the ModelCache takes 10.0 MiB at most"
    ) as caught:
        require_size(11 * MIB, 3, limits)
    assert caught.value.reason is Reason.TOO_LARGE
    with pytest.raises(ReasonError, match=r"has 12.0 MiB"):
        require_size(1, 1, limits.model_copy(update={"hint_bytes": 12 * MIB}))


def test_the_volume_as_a_job_tells_it(volume: Any) -> None:
    found = volume_state(volume.root)
    assert found is not None
    assert (found.total_bytes, found.free_bytes, found.used_bytes) == (1024 * MIB, 100 * MIB, 30 * MIB)
