"""A payload is what the source declares, whoever hashed it and when."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from lora_operator.fetch.content import verify
from lora_operator.fetch.content.select import RemoteFile
from lora_operator.fetch.heartbeat import Meter
from lora_operator.wire.jobs import ManifestFile


def remote(content: bytes, *, lfs: bool) -> RemoteFile:
    git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return RemoteFile("x", len(content), git, hashlib.sha256(content).hexdigest() if lfs else None)


@pytest.mark.parametrize("lfs", [True, False])
def test_verify(lfs: bool, tmp_path: Path) -> None:
    content = os.urandom(3 << 20)
    good, short, flipped, gone = (tmp_path / name for name in ("good", "short", "flipped", "gone"))
    good.write_bytes(content)
    short.write_bytes(content[:-1])
    flipped.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    meter = Meter()
    found = verify.verify(
        {path: remote(content, lfs=lfs) for path in (good, short, flipped, gone, tmp_path)}, count=meter.add
    )
    assert found[good] == verify.FileVerdict(len(content), hashlib.sha256(content).hexdigest())
    assert "bytes, the source declares" in found[short].fault
    assert ("sha256" if lfs else "git blob id") in found[flipped].fault
    assert "can't be read" in found[gone].fault
    assert found[tmp_path].fault
    assert meter.read()[0] == 3 * len(content) - 1


def test_what_was_hashed_while_it_arrived_is_not_read_again(tmp_path: Path) -> None:
    right, other = b"right" * 1000, b"other" * 1000
    path = tmp_path / "payload"
    path.write_bytes(other)  # which nobody would know but by reading it
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in (("right", right), ("other", other))}

    def verdict(arrived: str, *, lfs: bool = True) -> verify.FileVerdict:
        return verify.verify({path: remote(right, lfs=lfs)}, count=meter.add, arrived={path: arrived})[path]

    meter = Meter()
    assert verdict(sums["right"]) == verify.FileVerdict(len(right), sums["right"])
    assert "its sha256 is" in verdict(sums["other"]).fault
    assert meter.read()[0] == 2 * len(right)
    assert "git blob id" in verdict(sums["right"], lfs=False).fault, "of that no sum was taken"
    path.write_bytes(right[:-1])
    assert "bytes, the source declares" in verdict(sums["right"]).fault


def test_the_digest_is_as_its_documentation_says_and_ignores_order() -> None:
    files = [ManifestFile(path="b", size=2, sha256="2" * 64), ManifestFile(path="a", size=1, sha256="1" * 64)]
    expected = hashlib.sha256(f"a\0001\000{'1' * 64}\nb\0002\000{'2' * 64}\n".encode()).hexdigest()
    assert verify.digest(files) == verify.digest(files[::-1]) == f"sha256:{expected}"
