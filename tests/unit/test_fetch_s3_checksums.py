"""What S3 declares of an object, in all the forms that it has, against sums that were made another way."""

from __future__ import annotations

import base64
import hashlib
import zlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_operator.fetch.sources.checksums import Declared, Sums
from lora_operator.fetch.sources.s3.checksums import from_etag, from_head, from_parts, parts_of

DATA = b"123456789"
# The check values of the catalogues of checksums: over "123456789".
CHECKS = {
    "CRC32": "cbf43926",
    "CRC32C": "e3069283",
    "CRC64NVME": "ae8b14860a799888",
    "SHA1": hashlib.sha1(DATA).hexdigest(),
    "SHA256": hashlib.sha256(DATA).hexdigest(),
    "MD5": hashlib.md5(DATA).hexdigest(),
}


def b64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def sums_of(declared: Declared | None, *chunks: bytes) -> Sums:
    sums = Sums(declared)
    for chunk in chunks:
        sums.add(chunk)
    return sums


@pytest.mark.parametrize("algorithm", CHECKS)
def test_each_algorithm(algorithm: str) -> None:
    right = Declared(algorithm, bytes.fromhex(CHECKS[algorithm]))
    assert sums_of(right, DATA[:4], DATA[4:]).fault(9) == ""
    fault = sums_of(right, b"023456789").fault(9)
    assert algorithm in fault
    assert CHECKS[algorithm] in fault
    assert sums_of(right, DATA).sha256 == CHECKS["SHA256"]


@given(st.binary(max_size=60), st.integers(1, 20), st.lists(st.integers(1, 30), max_size=6))
def test_sums_of_parts_however_the_bytes_arrive(data: bytes, part: int, sizes: list[int]) -> None:
    parts = [data[start : start + part] for start in range(0, len(data), part)]
    value = hashlib.md5(b"".join(hashlib.md5(one).digest() for one in parts)).digest()
    chunks, rest = list[bytes](), data
    for size in sizes:
        chunks.append(rest[:size])
        rest = rest[size:]
    assert sums_of(Declared("MD5", value, part=part), *chunks, rest).fault(len(data)) == ""
    if data:
        flipped = bytes([data[0] ^ 1]) + data[1:]
        assert "of its parts" in sums_of(Declared("MD5", value, part=part), flipped).fault(len(data))


def test_an_etag_is_an_md5_only_in_one_piece_and_not_encrypted() -> None:
    md5 = CHECKS["MD5"]
    assert from_etag(f'"{md5}"', encrypted=False) == Declared("MD5", bytes.fromhex(md5))
    assert from_etag(f'"{md5.upper()}"', encrypted=False) is not None
    for etag, encrypted in ((f'"{md5}"', True), (f'"{md5}-2"', False), ('"opaque"', False), ("", False)):
        assert from_etag(etag, encrypted=encrypted) is None


def test_the_strongest_sum_of_the_whole_is_taken() -> None:
    crc = zlib.crc32(DATA).to_bytes(4, "big")
    head: dict[str, Any] = {"ChecksumType": "FULL_OBJECT", "ChecksumCRC32": b64(crc)}
    assert from_head(head) == Declared("CRC32", crc)
    assert from_head({**head, "ChecksumSHA256": b64(bytes(32))}) == Declared("SHA256", bytes(32))
    assert from_head({"ChecksumCRC32": "no base64!"}) is None
    assert from_head({**head, "ChecksumType": "COMPOSITE"}) is None
    assert from_head({}) is None


def test_sums_of_parts_need_parts_of_one_length() -> None:
    etag = f'"{CHECKS["MD5"]}-3"'
    md5 = Declared("MD5", bytes.fromhex(CHECKS["MD5"]), part=10)
    assert (parts_of(etag), parts_of('"x"'), parts_of(f'"{CHECKS["MD5"]}-0"')) == (3, 0, 0)
    sums: dict[str, Any] = {"etag": etag, "size": 25, "encrypted": False}
    assert from_parts({}, **sums, first=10, last=5) == md5
    assert from_parts({}, **sums, first=10, last=4) is None
    assert from_parts({}, **sums, first=0, last=0) is None
    assert from_parts({}, **{**sums, "size": 21}, first=3, last=15) is None
    assert from_parts({}, **{**sums, "encrypted": True}, first=10, last=5) is None
    composite = {"ChecksumType": "COMPOSITE", "ChecksumSHA256": f"{b64(bytes(32))}-3"}
    assert from_parts(composite, **{**sums, "encrypted": True}, first=10, last=5) == Declared(
        "SHA256", bytes(32), part=10
    )


def test_where_nothing_is_declared_the_size_alone_is_compared() -> None:
    assert sums_of(None, DATA).fault(9) == ""
    assert sums_of(None, DATA).fault(8) == "it has 9 bytes, the source declares 8"
