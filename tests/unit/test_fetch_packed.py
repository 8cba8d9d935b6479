"""Archives and big unfinished files on a volume: what is read again, what is kept, and what they take."""

from __future__ import annotations

import hashlib
import io
import tarfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lora_operator.constants import Reason
from lora_operator.errors import ReasonError
from lora_operator.fetch import leases, locks, meter, unpack
from lora_operator.fetch.choose import RemoteFile
from lora_operator.fetch.objects import ObjectStore
from lora_operator.fetch.packed import Packed
from lora_operator.fetch.place import Place, blob_name
from lora_operator.fetch.progress import Reporter, measure_blobs
from lora_operator.fetch.sums import Declared
from lora_operator.manifest import Limits

MIB = 1 << 20


def tar(**files: bytes) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return out.getvalue()


class Source:
    """Objects in memory."""

    def __init__(self, **objects: bytes) -> None:
        self.objects, self.sent = objects, 0

    @contextmanager
    def chunks(self, file: RemoteFile, start: int) -> Iterator[Iterator[bytes]]:
        data = self.objects[file.path][start:]
        self.sent += len(data)
        yield iter([data])

    def declared_of(self, _: RemoteFile) -> Declared | None:
        return None

    def translate(self, error: Exception) -> ReasonError:
        if isinstance(error, ReasonError):
            return error
        reason = Reason.INVALID_ADAPTER if isinstance(error, unpack.UnfitError) else Reason.JOB_FAILED
        return ReasonError(reason, str(error))

    def confirm(self) -> None:
        """It can't change."""

    def remote(self, path: str) -> RemoteFile:
        data = self.objects[path]
        sha256 = hashlib.sha256(data).hexdigest()
        return RemoteFile(path, len(data), sha256=sha256, stored_as=blob_name(path, sha256, len(data)))


@pytest.fixture
def place(tmp_path: Path) -> Place:
    (tmp_path / "artifacts").mkdir()
    made = Place.of(tmp_path, "http", name="b", identity=("b",))
    made.prepare()
    return made


def packed(source: Source, place: Place, path: str) -> Packed:
    root = place.folder.parents[1]
    return Packed(source, place, source.remote(path), key=path, limit=64 * MIB, root=root, limits=Limits())


@contextmanager
def watched(stalled: list[float], after: float) -> Iterator[Reporter]:
    with Reporter(on_stall=stalled.append, stall_after=after, out=io.StringIO()) as reporter:
        yield reporter


def test_hashing_what_a_dead_job_left_is_getting_on(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source(w=bytes(8 * MIB))
    file = source.remote("w")
    place.partial(file).write_bytes(bytes(7 * MIB))
    read, stalled = locks.Guarded.read, list[float]()

    def slow(self: locks.Guarded, size: int = -1) -> bytes:
        time.sleep(0.12)  # 28 pieces take more than three seconds
        return read(self, size)

    monkeypatch.setattr(locks.Guarded, "read", slow)
    with watched(stalled, 0.9) as reporter:
        measure = measure_blobs(place.blobs, [file])
        reporter.enter("Downloading", total=file.size, measure=measure)
        ObjectStore(source, place).download([file], moving=lambda: measure()[1])
    assert stalled == []
    assert source.sent == MIB


def test_an_archive_that_was_verified_is_not_hashed_again(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source(archive=tar(a=b"1" * MIB, b=b"2"))
    archive = packed(source, place, "archive")
    hashed: list[int] = []
    complete = ObjectStore.complete

    def counted(self: ObjectStore, file: RemoteFile, *args: object) -> str:
        hashed.append(file.size)
        return complete(self, file, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(ObjectStore, "complete", counted)
    with watched([], 60.0) as reporter:
        names = archive.names(reporter)
    file = archive.member("a", names["a"])
    archive.extract({"a": file}, moving=lambda: 0)
    assert place.blob(file).read_bytes() == b"1" * MIB
    assert len(hashed) == 1
    place.partial(archive.archive).write_bytes(b"somebody wrote to it")
    archive.extract({"b": archive.member("b", 1)}, moving=lambda: 0)
    assert len(hashed) == 2


def test_files_that_are_passed_over_are_getting_on() -> None:
    before = meter.GETTING_ON.read()
    found = unpack.contents(io.BytesIO(tar(big=bytes(4 * MIB), a=b"1")), frozenset({"a"}), limit=64 * MIB)
    assert [b"".join(chunks) for _, chunks in found] == [b"1"]
    assert meter.GETTING_ON.read()[0] - before[0] >= 4 * MIB


def test_a_job_that_waits_for_a_lock_says_so_and_is_not_taken_for_stalled(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(leases, "_WAIT_S", 3.0)
    root, stalled, errors = place.folder.parents[1], list[float](), list[ReasonError]()

    def wait() -> None:
        try:
            with leases.held(root, place.blobs, owner="me"):
                raise AssertionError
        except ReasonError as error:
            errors.append(error)

    with leases.exclusive(root, place.folder) as free, watched(stalled, 1.5), caplog.at_level("INFO"):
        assert free
        thread = threading.Thread(target=wait)
        thread.start()
        thread.join(20)
    assert stalled == []
    assert f"waiting for the lock of {place.folder.name}" in caplog.text
    assert "has held the lock of" in errors[0].message
