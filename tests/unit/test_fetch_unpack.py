"""Archives from anywhere: what counts as a file in them, and that nothing in one can cost more than was declared."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import stat
import struct
import tarfile
import zipfile
from collections.abc import Callable

import pytest

from lora_operator.fetch.sources import unpack
from lora_operator.fetch.sources.unpack import UnfitError

FILES = {"adapter_config.json": b"{}", "folder/weights.bin": b"w" * 1000, "empty": b""}
LIMIT = 10_000


def tar(files: dict[str, bytes] = FILES, *, more: Callable[[tarfile.TarFile], None] | None = None) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
        if more is not None:
            more(archive)
    return out.getvalue()


def zipped(files: dict[str, bytes] = FILES, *, mode: int = 0, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in files.items():
            entry = zipfile.ZipInfo(name)
            entry.compress_type = method
            entry.external_attr = mode << 16
            archive.writestr(entry, data)
    return out.getvalue()


ARCHIVES = {
    "tar": tar(),
    "tar with ./": tar({f"./{name}": data for name, data in FILES.items()}),
    "tar.gz": gzip.compress(tar()),
    "zip": zipped(),
    "zip without compression": zipped(method=zipfile.ZIP_STORED),
}


def listed(data: bytes, limit: int = LIMIT) -> dict[str, int]:
    return unpack.entries(io.BytesIO(data), limit=limit)


def read(data: bytes, *names: str, limit: int = LIMIT) -> dict[str, bytes]:
    found = unpack.contents(io.BytesIO(data), frozenset(names), limit=limit)
    return {name: b"".join(chunks) for name, chunks in found}


@pytest.mark.parametrize("case", ARCHIVES)
def test_what_is_in_an_archive(case: str) -> None:
    assert listed(ARCHIVES[case]) == {name: len(data) for name, data in FILES.items()}
    assert read(ARCHIVES[case], *FILES) == FILES
    assert read(ARCHIVES[case], "folder/weights.bin") == {"folder/weights.bin": b"w" * 1000}


def links(archive: tarfile.TarFile) -> None:
    for name, kind in (
        ("soft", tarfile.SYMTYPE),
        ("hard", tarfile.LNKTYPE),
        ("device", tarfile.CHRTYPE),
        ("dir", tarfile.DIRTYPE),
    ):
        entry = tarfile.TarInfo(name)
        entry.type, entry.linkname = kind, "/etc/passwd"
        archive.addfile(entry)


def test_links_devices_and_folders_are_no_files() -> None:
    assert set(listed(tar(more=links))) == set(FILES)
    assert listed(zipped({"soft": b"/etc/passwd"}, mode=stat.S_IFLNK | 0o777)) == {}
    assert listed(zipped({"folder/": b""})) == {}


def test_names_are_data_and_left_to_the_chooser() -> None:
    assert set(listed(tar({"../../evil": b"x", "/abs": b"y"}))) == {"../../evil", "/abs"}


def huge_header() -> bytes:
    """A tar archive whose extended header says that it has 4 GiB."""
    entry = tarfile.TarInfo("x")
    entry.type, entry.size = tarfile.XHDTYPE, 4 << 30
    return entry.tobuf() + bytes(1024)


def cut_short(data: bytes) -> bytes:
    return data[: len(data) // 2]


def directory_of(size: int) -> bytes:
    """A zip archive with a directory of so many zeros."""
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 1, 1, size, 4, 0)
    return b"PK\x03\x04" + bytes(size) + end


UNFIT = {
    "a bomb in a zip": (zipped({"zeros": bytes(LIMIT + 1)}), "expands to more than"),
    "a bomb in a tar.gz": (gzip.compress(tar({"zeros": bytes(LIMIT + 1)})), "expands to more than"),
    "many files that are too much together": (
        zipped({str(n): bytes(LIMIT // 4) for n in range(5)}),
        "expands to more than",
    ),
    "the same name twice": (tar({"a": b"1", "./a": b"2"}), "has 'a' twice"),
    "a header that would fill the memory": (huge_header(), "a header of 4294967296 bytes"),
    "half a tar.gz": (cut_short(gzip.compress(tar())), "is no tar, tar.gz or zip archive"),
    "half a zip": (cut_short(zipped()), "is no tar, tar.gz or zip archive"),
    "headers of headers without end": (
        tarfile.TarInfo.create_pax_global_header({"comment": "x"}) * 2000,
        "is no tar, tar.gz or zip archive that can be read: RecursionError",
    ),
    "a name that is no name": (tar({"n" * 1025: b""}), "has a name of 1025 bytes, 'nnnn"),
    "names that would fill the memory": (
        gzip.compress(tar({f"{k:05}{'n' * 1000}": b"" for k in range(17_000)}), 1),
        "has names of more than 16.0 MiB together",
    ),
    "a zip's directory that would fill the memory": (directory_of(20 << 20), "has a directory of more than 16.0 MiB"),
    "a name that is no name, in a zip": (zipped({"n" * 1025: b""}), "has a name of 1025 bytes"),
    "a zip by bzip2": (zipped({"a": b"1"}, method=zipfile.ZIP_BZIP2), r"'a' in a compression \(method 12\)"),
    "a zip by lzma": (zipped({"a": b"1"}, method=zipfile.ZIP_LZMA), r"'a' in a compression \(method 14\)"),
    "a tar by bzip2": (bz2.compress(tar()), "is no tar, tar.gz or zip archive"),
    "a tar by xz": (lzma.compress(tar()), "is no tar, tar.gz or zip archive"),
    "a web page": (b"<html>please log in</html>" * 40, "is no tar, tar.gz or zip archive"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_what_is_refused(case: str) -> None:
    data, words = UNFIT[case]
    with pytest.raises(UnfitError, match=words):
        listed(data)


def test_zeros_behind_an_archive_cost_no_more_than_was_declared() -> None:
    """Headers, padding and what is no file count too: a stream of directories would never end else."""
    entry = tarfile.TarInfo("d")
    entry.type = tarfile.DIRTYPE
    with pytest.raises(UnfitError, match="more than 50000 entries"):
        listed(gzip.compress(entry.tobuf() * 50_002))


def test_a_damaged_file_is_told() -> None:
    data = zipped({"a": b"a" * 500})
    spoilt = data.replace(data[30 + 1 : 30 + 5], b"\xff\xff\xff\xff")
    with pytest.raises(UnfitError, match="can be read"):
        read(spoilt, "a")


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(UnfitError, match="has no 'b' any more"):
        read(tar({"a": b"1"}), "b")


def test_an_encrypted_file_is_told() -> None:
    data = bytearray(zipped({"a": b"1"}))
    at = data.index(b"PK\x01\x02")
    data[at + 8] |= 1
    with pytest.raises(UnfitError, match="has an encrypted file, 'a'"):
        listed(bytes(data))
