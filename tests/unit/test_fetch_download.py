"""A volume that fills while files arrive, on a real small one; and the order in which a Job looks at bounds, locks and content."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]  # exported lazily
from huggingface_hub.utils._xet import XetFileData

from lora_operator.constants import Reason
from lora_operator.errors import ReasonError
from lora_operator.fetch import download
from lora_operator.fetch.content.select import RemoteFile
from lora_operator.fetch.sources.base import PlainSource
from lora_operator.fetch.sources.huggingface import resume, xet
from lora_operator.fetch.sources.huggingface.xet import Xet
from lora_operator.fetch.sources.object_place import ObjectPlace
from lora_operator.fetch.volume import file_locks, store_locks
from lora_operator.fetch.volume.limits import NoRoomError
from lora_operator.wire.jobs import FetchRequest, LocalRequest, VolumeLimits

MIB = 1 << 20
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: mounts")
FILES = [RemoteFile(f"part-{oid}.safetensors", 3 * MIB, oid * 40) for oid in "abc"]


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A volume of 4 MiB, gone afterwards whatever happens."""
    folder = tmp_path / "cache"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def slow_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Hub whose files arrive in pieces."""

    def metadata(url: str, **_: Any) -> SimpleNamespace:
        file = next(file for file in FILES if file.path in url)
        return SimpleNamespace(etag=file.blob, size=file.size, location=url, xet_file_data=None)

    def http_get(_: str, target: Any, *, expected_size: int, resume_size: int, **__: Any) -> None:
        for _piece in range((expected_size - resume_size) // (64 << 10)):
            target.write(b"x" * (64 << 10))
            time.sleep(0.002)

    monkeypatch.setattr(resume, "get_hf_file_metadata", metadata)
    monkeypatch.setattr(resume, "http_get", http_get)


@as_root
def test_a_volume_that_fills_ends_all_downloads_of_the_job_and_their_files_go(small: Path, slow_hub: None) -> None:
    place = resume.HubPlace(hub=small / "hub", repo="org/parts")
    with pytest.raises(OSError, match="No space left") as caught:
        resume.download_big(place, FILES, commit="c" * 40, xet=Xet("http://hub.test", False), workers=3)
    assert caught.value.errno == errno.ENOSPC
    left = {path.name for path in place.blobs.iterdir()}
    assert left, "what had arrived by then"
    other = FILES[0]
    lock = place.lock(other.blob)
    with WeakFileLock(lock):  # another Job works on it
        resume.discard_partial(place, FILES)
        assert {path.name for path in place.blobs.iterdir()} <= {f"{other.blob}.incomplete"}
    resume.discard_partial(place, FILES)
    assert list(place.blobs.iterdir()) == []


@as_root
def test_what_is_left_of_a_buckets_objects_goes_too_but_not_what_another_job_works_on(small: Path) -> None:
    place = ObjectPlace.of(small, "s3", name="models", identity=("aws", "models"))
    place.prepare()
    mine, theirs = (RemoteFile(name, MIB, version="v", stored_as=f"{name}-v") for name in ("mine", "theirs"))
    for file in (mine, theirs):
        place.partial(file).write_bytes(b"x" * 1000)
    with file_locks.claimed(place.partial(theirs)):
        place.discard_partial([mine, theirs])
    assert [path.name for path in place.blobs.iterdir()] == ["theirs-v.incomplete"]


class FakeStore:
    """A store that fills the volume at its first file, or finds everything there."""

    def __init__(self, root: Path, error: ReasonError | None) -> None:
        self.blobs = root / "hub" / "models--org--a" / "blobs"
        self.error = error
        self.held: list[bool] = []

    def has(self, _: RemoteFile) -> bool:
        return False

    def missing_bytes(self, files: Sequence[RemoteFile]) -> int:
        return sum(file.size for file in files)

    def download(self, _: Sequence[RemoteFile], *, moving: Callable[[], int]) -> dict[str, Path]:
        with store_locks.exclusive(self.blobs.parents[2], self.blobs.parent) as free:
            self.held.append(not free)
        assert self.error is not None
        raise self.error


class FakeSource(PlainSource):
    """A source of one tokenizer."""

    title, folder, allow_patterns, ignore_patterns = "org/a", "hub", (), ()

    def __init__(self, error: ReasonError | None = None) -> None:
        self.error, self.store = error, None

    def authorise(self) -> str:
        return "c" * 40

    def listing(self) -> Sequence[RemoteFile]:
        return [RemoteFile("tokenizer.json", 2 * MIB, "a" * 40)]

    def prove_readable(self, _: Sequence[RemoteFile]) -> None:
        """It is."""

    def open_store(self, root: Path) -> FakeStore:
        self.store = FakeStore(root, self.error)  # type: ignore[assignment]
        return self.store  # type: ignore[return-value]


def run(monkeypatch: pytest.MonkeyPatch, root: Path, source: FakeSource, **limits: int) -> ReasonError:
    request = FetchRequest(
        artifact="a-1",
        type="Tokenizer",
        source=LocalRequest(path="stands/for/any"),
        cache_root=str(root),
        owner="uid-claim",
        limits=VolumeLimits(**limits),
    )
    monkeypatch.setattr(download, "open_source", lambda _: source)
    with pytest.raises(ReasonError) as caught:
        download._run(request)
    return caught.value


def test_what_is_too_big_is_refused_before_the_volume_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = FakeSource()
    error = run(monkeypatch, tmp_path, source, max_artifact_bytes=MIB)
    assert error.reason is Reason.TOO_LARGE
    assert (source.store, list(tmp_path.iterdir())) == (None, [])


def test_what_does_not_fit_says_how_much_would_have_to_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = run(monkeypatch, tmp_path, FakeSource(), capacity_bytes=MIB)
    assert isinstance(error, NoRoomError)
    assert error.needed == MIB
    assert (tmp_path / store_locks.STATE / "owners" / "uid-claim").exists()


def test_a_volume_that_fills_says_how_much_too_and_downloads_hold_their_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = FakeSource(ReasonError(Reason.INSUFFICIENT_SPACE, "the volume is full"))
    free = os.statvfs(tmp_path)
    error = run(monkeypatch, tmp_path, source)
    assert isinstance(error, NoRoomError)
    assert error.needed == max(1, 2 * MIB - free.f_bavail * free.f_frsize)
    assert source.store is not None
    assert source.store.held == [True]
    assert store_locks.own_stores(tmp_path) == [tmp_path / "hub" / "models--org--a"]
    with store_locks.exclusive(tmp_path, tmp_path / "hub" / "models--org--a") as is_free:
        assert is_free, "it is let go with the Job"


@pytest.mark.parametrize("case", ["whole", "begun by another", "begun anew"])
def test_what_one_process_writes_whole_is_hashed_meanwhile(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = FILES[0]
    place = resume.HubPlace(hub=tmp_path / "hub", repo="org/parts")

    def http_get(_: str, target: Any, *, expected_size: int, resume_size: int, **__: Any) -> None:
        if case == "begun anew":
            target.write(b"y" * 100)
            target.truncate(0)
        target.write(b"x" * (expected_size - resume_size))

    monkeypatch.setattr(
        resume,
        "get_hf_file_metadata",
        lambda *_, **__: SimpleNamespace(etag=file.blob, size=file.size, location="", xet_file_data=None),
    )
    monkeypatch.setattr(resume, "http_get", http_get)
    if case == "begun by another":
        place.blobs.mkdir(parents=True)
        (place.blobs / f"{file.blob}.incomplete").write_bytes(b"x" * 1000)
    resume.download_big(place, [file], commit="c" * 40, xet=Xet("http://hub.test", False), workers=1)
    assert (place.blobs / file.blob).read_bytes() == b"x" * file.size
    whole = {file.blob: hashlib.sha256(b"x" * file.size).hexdigest()}
    assert place.arrived == ({} if case == "begun by another" else whole)


@pytest.mark.parametrize("offered", [False, True])
def test_a_file_that_is_too_big_for_plain_http_comes_by_xet_or_not_at_all(
    offered: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Panic(BaseException):
        """As hf_xet's."""

    def session() -> None:
        raise Panic("nobody there")

    monkeypatch.setattr(constants, "MAX_HTTP_DOWNLOAD_SIZE", 2 * MIB)
    monkeypatch.setattr(xet, "get_session", session)
    monkeypatch.setattr(resume, "http_get", lambda *_, **__: pytest.fail("by plain HTTP"))
    (file,) = FILES[:1]
    offer = XetFileData("0" * 64, "http://hub.test/token") if offered else None
    found = SimpleNamespace(etag=file.blob, size=file.size, location="", xet_file_data=offer)
    monkeypatch.setattr(resume, "get_hf_file_metadata", lambda *_, **__: found)
    place, way = resume.HubPlace(hub=tmp_path / "hub", repo="org/parts"), Xet("http://hub.test", False)
    for _ in range(2):  # the next attempt tries it again
        with pytest.raises(ReasonError) as caught:
            resume.download_big(place, [file], commit="c" * 40, xet=way, workers=1)
        assert caught.value.reason is (Reason.SOURCE_UNREACHABLE if offered else Reason.JOB_FAILED)
        assert "3.0 MiB" in str(caught.value)
        assert ("nobody there" if offered else "use smaller shards") in str(caught.value)
