"""Archives and big unfinished files on a volume: what is read again, what is kept, and what they take."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import tarfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest

from lora_operator.constants import Reason
from lora_operator.errors import ReasonError
from lora_operator.fetch import heartbeat
from lora_operator.fetch.content.select import RemoteFile
from lora_operator.fetch.progress import Reporter, measure_blobs
from lora_operator.fetch.sources import unpack
from lora_operator.fetch.sources.archives import Packed, PackedStore, tidied
from lora_operator.fetch.sources.checksums import Declared
from lora_operator.fetch.sources.object_place import ObjectPlace, blob_name
from lora_operator.fetch.sources.object_store import ObjectStore
from lora_operator.fetch.sources.oci import OciSource
from lora_operator.fetch.volume import file_locks, store_locks
from lora_operator.wire.jobs import FetchRequest, OciRequest, VolumeLimits

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
def place(tmp_path: Path) -> ObjectPlace:
    (tmp_path / "artifacts").mkdir()
    made = ObjectPlace.of(tmp_path, "http", name="b", identity=("b",))
    made.prepare()
    return made


def packed(source: Source, place: ObjectPlace, path: str) -> Packed:
    root = place.folder.parents[1]
    return Packed(source, place, source.remote(path), key=path, limit=64 * MIB, root=root, limits=VolumeLimits())


@contextmanager
def watched(stalled: list[float], after: float) -> Iterator[Reporter]:
    with Reporter(on_stall=stalled.append, stall_after=after, out=io.StringIO()) as reporter:
        yield reporter


def test_hashing_what_a_dead_job_left_is_getting_on(place: ObjectPlace, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source(w=bytes(8 * MIB))
    file = source.remote("w")
    place.partial(file).write_bytes(bytes(7 * MIB))
    read, stalled = file_locks.Guarded.read, list[float]()

    def slow(self: file_locks.Guarded, size: int = -1) -> bytes:
        time.sleep(0.12)  # 28 pieces take more than three seconds
        return read(self, size)

    monkeypatch.setattr(file_locks.Guarded, "read", slow)
    with watched(stalled, 0.9) as reporter:
        measure = measure_blobs(place.blobs, [file])
        reporter.enter("Downloading", total=file.size, measure=measure)
        ObjectStore(source, place).download([file], moving=lambda: measure()[1])
    assert stalled == []
    assert source.sent == MIB


def test_an_archive_that_was_verified_is_not_hashed_again(place: ObjectPlace, monkeypatch: pytest.MonkeyPatch) -> None:
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
    archive.extract({"b": archive.member("b", 1)}, moving=lambda: 0)
    assert len(hashed) == 2, "another one is"


def image(source: Source, place: ObjectPlace) -> tuple[PackedStore, list[RemoteFile]]:
    """An image of two layers, whose archives were brought to see what is in them, and its files."""
    by_path: dict[str, tuple[Packed, str]] = {}
    files = []
    for path in ("one", "two"):
        archive = packed(source, place, path)
        for name, size in archive.names(Reporter(on_stall=lambda _: None)).items():
            by_path[name] = (archive, name)
            files.append(archive.member(name, size))
    return PackedStore(ObjectStore(source, place), by_path), files


def unfinished(place: ObjectPlace) -> int:
    return sum(path.stat().st_size for path in place.blobs.glob("*.incomplete"))


def test_what_an_image_needs_is_what_it_takes_at_its_peak(place: ObjectPlace) -> None:
    source = Source(one=tar(a=bytes(MIB)), two=tar(b=bytes(2 * MIB)))
    one, two = (len(source.objects[name]) for name in ("one", "two"))
    store, files = image(source, place)
    assert unfinished(place) == one + two, "both were brought"
    assert store.missing_bytes(files) == max(MIB, MIB - one + 2 * MIB)
    store.download(files, moving=lambda: 0)
    assert (store.missing_bytes(files), unfinished(place), source.sent) == (0, 0, one + two)
    for file in files:
        place.forget(file)
    again, files = image(source, place)  # what is in them is known, so they are not there
    assert unfinished(place) == 0
    assert again.missing_bytes(files) == max(one + MIB, MIB + two + 2 * MIB)
    again.download(files, moving=lambda: 0)
    assert source.sent == 2 * (one + two)


def test_an_archive_whose_files_another_job_has_extracted_is_not_brought_for_nothing(place: ObjectPlace) -> None:
    source = Source(one=tar(a=bytes(MIB)), two=tar(b=b"2"))
    _, files = image(source, place)
    other = packed(source, place, "one")
    waiting, done = threading.Event(), threading.Event()

    def wait() -> None:
        waiting.set()
        other.extract({"a": files[0]}, moving=lambda: 0)
        done.set()

    with file_locks.claimed(place.partial(other.archive)):
        thread = threading.Thread(target=wait)
        thread.start()
        assert waiting.wait(10)
        partial = place.partial(files[0])
        partial.write_bytes(bytes(MIB))
        place.finish(files[0], partial, hashlib.sha256(bytes(MIB)).hexdigest())
        place.partial(other.archive).unlink()
    assert done.wait(10)
    assert (source.sent, unfinished(place)) == (sum(map(len, source.objects.values())), len(source.objects["two"]))


def test_an_image_of_several_archives_is_downloaded_once(tmp_path: Path) -> None:
    (tmp_path / "artifacts").mkdir()
    layers = [tar(**{name: name.encode() * MIB}) for name in "abc"]
    digests = {f"sha256:{hashlib.sha256(data).hexdigest()}": data for data in layers}
    kind = "application/vnd.oci.image.layer.v1.tar"
    manifest = {"layers": [{"mediaType": kind, "digest": name, "size": len(data)} for name, data in digests.items()]}
    sent: list[str] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        digest = request.url.path.rpartition("/")[2]
        sent.append(digest)
        data = json.dumps(manifest).encode() if digest == "v1" else digests[digest]
        return httpx2.Response(200, stream=httpx2.ByteStream(data))

    home = "https://registry.test"
    oci = OciRequest(reference="registry.test/x/y:v1", max_bytes=64 * MIB, allowed_endpoints=(home,))
    told = {"artifact": "a-1", "type": "BaseModel", "cacheRoot": str(tmp_path), "source": oci}
    source = OciSource.open(oci, FetchRequest.model_validate(told))
    source.registry.transport = httpx2.Client(transport=httpx2.MockTransport(answer))
    source.authorise()
    with source.collected(tmp_path, Reporter(on_stall=lambda _: None)):
        found = source.open_store(tmp_path).download(source.listing(), moving=lambda: 0)
        assert {path.read_bytes() for path in found.values()} == {name.encode() * MIB for name in "abc"}
        assert sent == ["v1", *digests]
    assert not list(tmp_path.rglob("*.incomplete"))


ENDS = {
    Reason.SOURCE_UNREACHABLE: True,
    Reason.RATE_LIMITED: True,
    Reason.UNAUTHORIZED: True,
    Reason.SOURCE_NOT_ALLOWED: True,
    Reason.CACHE_NOT_WRITABLE: True,
    Reason.JOB_FAILED: True,
    Reason.INVALID_ADAPTER: False,
    Reason.CHECKSUM_MISMATCH: False,
    Reason.INSUFFICIENT_SPACE: False,
    Reason.TOO_LARGE: False,
    None: False,
}


@pytest.mark.parametrize("reason", ENDS)
def test_what_of_an_archive_arrived_goes_only_where_it_is_at_fault_or_done(
    place: ObjectPlace, reason: Reason | None
) -> None:
    archive = packed(Source(one=tar(a=bytes(MIB))), place, "one")
    place.partial(archive.archive).write_bytes(b"what arrived")
    archive.used.add(place.partial(archive.archive))
    with contextlib.suppress(ReasonError), tidied([archive]):
        if reason is not None:
            raise ReasonError(reason, "so it ended")
    assert place.partial(archive.archive).exists() == ENDS[reason]


def test_files_that_are_passed_over_are_getting_on() -> None:
    before = heartbeat.HEARTBEAT.read()
    found = unpack.contents(io.BytesIO(tar(big=bytes(4 * MIB), a=b"1")), frozenset({"a"}), limit=64 * MIB)
    assert [b"".join(chunks) for _, chunks in found] == [b"1"]
    assert heartbeat.HEARTBEAT.read()[0] - before[0] >= 4 * MIB


def test_a_job_that_waits_for_a_lock_says_so_and_is_not_taken_for_stalled(
    place: ObjectPlace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(store_locks, "_WAIT_S", 3.0)
    root, stalled, errors = place.folder.parents[1], list[float](), list[ReasonError]()

    def wait() -> None:
        try:
            with store_locks.held(root, place.blobs, owner="me"):
                raise AssertionError
        except ReasonError as error:
            errors.append(error)

    with store_locks.exclusive(root, place.folder) as free, watched(stalled, 1.5), caplog.at_level("INFO"):
        assert free
        thread = threading.Thread(target=wait)
        thread.start()
        thread.join(20)
    assert stalled == []
    assert f"waiting for the lock of {place.folder.name}" in caplog.text
    assert "has held the lock of" in errors[0].message
