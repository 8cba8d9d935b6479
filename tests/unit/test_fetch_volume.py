"""What a Job does to its environment and to the volume: ambient identities, directories, links, views, hashes."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import time
from pathlib import Path

import pytest

from lora_operator.constants import Reason
from lora_operator.errors import ReasonError
from lora_operator.fetch import environment, text
from lora_operator.fetch.content import verify
from lora_operator.fetch.content.select import RemoteFile
from lora_operator.fetch.heartbeat import Meter
from lora_operator.fetch.sources.s3.source import S3Keys
from lora_operator.fetch.volume import layout, views
from lora_operator.manifest import MANIFEST_FILE, FetchRequest, HuggingFaceRequest, Manifest, ManifestFile, S3Request


def request_for(root: Path, credentials: Path | None = None) -> FetchRequest:
    return FetchRequest(
        artifact="art",
        type="Adapter",
        hugging_face=HuggingFaceRequest(repo="org/name", endpoint="http://127.0.0.1:1/"),
        cache_root=str(root),
        credentials=None if credentials is None else str(credentials),
    )


def test_ambient_identities_and_modes_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    os.environ.update(
        HF_TOKEN="x", HUGGING_FACE_HUB_TOKEN="x", HF_HUB_OFFLINE="1", NETRC="/n", XDG_CACHE_HOME="/c", HTTP_PROXY="p"
    )
    before = os.umask(0o077)
    try:
        environment.prepare(request_for(tmp_path), home=tmp_path)
        assert os.umask(0o077) == 0o002
    finally:
        os.umask(before)
    left = {name for name in os.environ if "TOKEN" in name}
    assert left == {"HF_HUB_DISABLE_IMPLICIT_TOKEN"}
    assert "HF_HUB_OFFLINE" not in os.environ
    assert "XDG_CACHE_HOME" not in os.environ
    assert os.environ["HF_ENDPOINT"] == "http://127.0.0.1:1"
    assert os.environ["HOME"] == str(tmp_path)
    assert os.environ["HTTP_PROXY"] == "p"


def test_no_token_file_is_anonymous(tmp_path: Path) -> None:
    assert environment.read_token(request_for(tmp_path)) is False


def test_ambient_s3_identities_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    os.environ.update(AWS_ACCESS_KEY_ID="x", AWS_PROFILE="x", AWS_ENDPOINT_URL="x", BOTO_CONFIG="x", AWS_ROLE_ARN="x")
    before = os.umask(0o022)
    try:
        environment.prepare(request_for(tmp_path), home=tmp_path)
    finally:
        os.umask(before)
    left = {name: value for name, value in os.environ.items() if name.startswith(("AWS_", "BOTO"))}
    assert left == {
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }


def s3_request(root: Path, credentials: Path | None = None) -> FetchRequest:
    source = {"hugging_face": None, "s3": S3Request(bucket="models")}
    return request_for(root, credentials).model_copy(update=source)


S3_FILES = {"AWS_ACCESS_KEY_ID": "AK", "AWS_SECRET_ACCESS_KEY": "secret-key", "AWS_SESSION_TOKEN": "session-token"}


@pytest.mark.parametrize("missing", [None, *S3_FILES])
def test_s3_keys(missing: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "_secrets", set())
    assert S3Keys.read(s3_request(tmp_path)) is None
    for name, value in S3_FILES.items():
        if name != missing:
            (tmp_path / name).write_text(value + "\n")
    if missing in (None, "AWS_SESSION_TOKEN"):
        keys = S3Keys.read(s3_request(tmp_path, tmp_path))
        assert keys == S3Keys("AK", "secret-key", None if missing else "session-token")
        assert "secret-key" not in repr(keys)
        assert text.clean("secret-key") == "***"
        return
    with pytest.raises(ReasonError, match=f"{missing} could not be read") as caught:
        S3Keys.read(s3_request(tmp_path, tmp_path))
    assert caught.value.reason is Reason.CREDENTIALS_KEY_MISSING


TOKENS: dict[str, tuple[bytes | None, Reason]] = {
    "a missing file": (None, Reason.CREDENTIALS_KEY_MISSING),
    "an empty file": (b"", Reason.CREDENTIALS_KEY_MISSING),
    "only space": (b" \n", Reason.CREDENTIALS_KEY_MISSING),
    "a line break inside": (b"hf_a\r\nX-Evil: 1", Reason.UNAUTHORIZED),
    "no ASCII": ("hf_ü".encode(), Reason.UNAUTHORIZED),
    "far too long": (b"a" * 5000, Reason.UNAUTHORIZED),
}


@pytest.mark.parametrize("sentence", TOKENS)
def test_a_token_file_that_is_no_token(sentence: str, tmp_path: Path) -> None:
    content, reason = TOKENS[sentence]
    file = tmp_path / "token"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ReasonError) as caught:
        environment.read_token(request_for(tmp_path, tmp_path))
    assert caught.value.reason is reason
    assert "hf_" not in caught.value.message


def test_a_token_is_read_without_its_line_end_and_protected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "_secrets", set())
    (tmp_path / "token").write_text("hf_abcdef\n")
    assert environment.read_token(request_for(tmp_path, tmp_path)) == "hf_abcdef"
    assert text.clean("it was hf_abcdef") == "it was ***"


def test_prepare_makes_directories_that_the_volumes_group_shares(tmp_path: Path) -> None:
    layout.prepare(tmp_path, "hub")
    layout.prepare(tmp_path, "hub")
    for name in ("hub", "artifacts"):
        found = (tmp_path / name).stat()
        assert found.st_mode & 0o7777 == 0o2775
        assert found.st_gid == tmp_path.stat().st_gid
        assert list((tmp_path / name).iterdir()) == []


def test_a_cache_that_is_not_mounted(tmp_path: Path) -> None:
    with pytest.raises(ReasonError) as caught:
        layout.prepare(tmp_path / "nope", "hub")
    assert caught.value.reason is Reason.CACHE_NOT_READY


@pytest.mark.parametrize("path", ["../x", "/etc", "link", ".", "a/../../b"])
def test_a_path_can_not_leave_the_cache(path: str, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to("/etc")
    with pytest.raises(ReasonError, match="leads out"):
        layout.inside(root, path)


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
    assert found[good] == verify.Verdict(len(content), hashlib.sha256(content).hexdigest())
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

    def verdict(arrived: str, *, lfs: bool = True) -> verify.Verdict:
        return verify.verify({path: remote(right, lfs=lfs)}, count=meter.add, arrived={path: arrived})[path]

    meter = Meter()
    assert verdict(sums["right"]) == verify.Verdict(len(right), sums["right"])
    assert "its sha256 is" in verdict(sums["other"]).fault
    assert meter.read()[0] == 2 * len(right)
    assert "git blob id" in verdict(sums["right"], lfs=False).fault, "of that no sum was taken"
    path.write_bytes(right[:-1])
    assert "bytes, the source declares" in verdict(sums["right"]).fault


def test_the_digest_is_as_its_documentation_says_and_ignores_order() -> None:
    files = [ManifestFile(path="b", size=2, sha256="2" * 64), ManifestFile(path="a", size=1, sha256="1" * 64)]
    expected = hashlib.sha256(f"a\0001\000{'1' * 64}\nb\0002\000{'2' * 64}\n".encode()).hexdigest()
    assert verify.digest(files) == verify.digest(files[::-1]) == f"sha256:{expected}"


def manifest(*names: str, digest: str = "sha256:x") -> Manifest:
    files = tuple(ManifestFile(path=name, size=1, sha256="0" * 64) for name in names)
    return Manifest(type="Adapter", repo="o/n", digest=digest, files=files)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    blobs = tmp_path / "hub" / "models--o--n" / "blobs"
    blobs.mkdir(parents=True)
    (tmp_path / "artifacts").mkdir()
    for name in "abc":
        (blobs / name).write_text(name)
    return tmp_path


def blob(root: Path, name: str) -> Path:
    return root / "hub" / "models--o--n" / "blobs" / name


def put(root: Path, links: dict[str, str], said: Manifest, *, title: str = "art") -> Path:
    with views.staged(root, {name: blob(root, target) for name, target in links.items()}) as staging:
        return root / views.publish(root, staging, said, title=title)


def names(view: Path) -> set[str]:
    return {str(path.relative_to(view)) for path in view.rglob("*") if not path.is_dir()}


def test_a_view_has_relative_links_to_exactly_the_files_and_a_manifest(root: Path) -> None:
    view = put(root, {"x.json": "a", "deep/er/y": "b"}, manifest("x.json", "deep/er/y"))
    assert re.fullmatch(r"art-[0-9a-f]{20}", view.name)
    assert names(view) == {"x.json", "deep/er/y", MANIFEST_FILE}
    assert (view / "x.json").readlink() == Path("../../hub/models--o--n/blobs/a")
    assert (view / "deep/er/y").read_text() == "b"
    assert views.read_manifest(view) == manifest("x.json", "deep/er/y")
    assert (view / MANIFEST_FILE).stat().st_mode & 0o777 == 0o644
    assert [path.name for path in (root / "artifacts").iterdir()] == [view.name]


def test_a_view_that_is_right_stays_as_it_is_and_only_counts_as_new_for_evictions(root: Path) -> None:
    view = put(root, {"x": "a"}, manifest("x"))
    os.utime(view, (1_000_000_000, 1_000_000_000))
    before = {path: (path.lstat().st_ino, path.lstat().st_mtime_ns) for path in view.iterdir()}
    inode = view.stat().st_ino
    assert put(root, {"x": "a"}, manifest("x")) == view
    assert {path: (path.lstat().st_ino, path.lstat().st_mtime_ns) for path in view.iterdir()} == before
    assert view.stat().st_ino == inode
    assert view.stat().st_mtime > 1_000_000_000


def test_a_manifest_that_says_something_else_about_the_same_files_is_renewed_in_place(root: Path) -> None:
    before = put(root, {"x": "a"}, manifest("x")).stat().st_ino
    view = put(root, {"x": "a"}, manifest("x").model_copy(update={"rank": 8}))
    assert view.stat().st_ino == before
    assert views.read_manifest(view) == manifest("x").model_copy(update={"rank": 8})


def test_a_view_is_named_by_its_content(root: Path) -> None:
    view = put(root, {"x": "a"}, manifest("x"))
    others = {
        "another file": put(root, {"x": "b"}, manifest("x")),
        "another name": put(root, {"y": "a"}, manifest("y")),
        "other bytes, by the digest": put(root, {"x": "a"}, manifest("x", digest="sha256:y")),
        "another title": put(root, {"x": "a"}, manifest("x"), title="other"),
    }
    assert len({view, *others.values()}) == 5
    assert put(root, {"x": "a"}, manifest("x")) == view


WRONG = {
    "a link to something else": lambda view: (view / "x").unlink() or (view / "x").symlink_to("/etc/passwd"),
    "a missing link": lambda view: (view / "x").unlink(),
    "a file in place of a link": lambda view: (view / "x").unlink() or (view / "x").write_text("a"),
    "a further file": lambda view: (view / "evil.bin").write_text("a"),
    "a further file in a folder": lambda view: (view / "d").mkdir() or (view / "d" / "evil").symlink_to("/etc/passwd"),
}


@pytest.mark.parametrize("sentence", WRONG)
def test_a_view_that_is_wrong_is_replaced(sentence: str, root: Path) -> None:
    view = put(root, {"x": "a"}, manifest("x"))
    WRONG[sentence](view)
    assert put(root, {"x": "a"}, manifest("x")) == view
    assert names(view) == {"x", MANIFEST_FILE}
    assert (view / "x").readlink() == Path("../../hub/models--o--n/blobs/a")
    assert [path.name for path in (root / "artifacts").iterdir()] == [view.name]


def test_a_view_is_replaced_on_volumes_that_can_not_exchange(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: object())
    test_a_view_that_is_wrong_is_replaced("a missing link", root)


def test_a_view_that_could_not_be_finished_leaves_nothing(root: Path) -> None:
    with pytest.raises(RuntimeError), views.staged(root, {"x": blob(root, "a")}):
        raise RuntimeError
    assert list((root / "artifacts").iterdir()) == []


def test_left_overs_of_dead_jobs_go_and_those_of_live_ones_stay(root: Path) -> None:
    old, new, other = (root / "artifacts" / name for name in (".tmp-old", ".tmp-new", "other"))
    for path in (old, new, other):
        path.mkdir()
        (path / "x").symlink_to(blob(root, "a"))
    for path in (old, other):
        os.utime(path, (time.time() - 10_000,) * 2)
    put(root, {"x": "a"}, manifest("x"))
    assert not old.exists()
    assert new.exists()
    assert other.exists()
    assert blob(root, "a").exists()


def test_a_broken_manifest_is_none(root: Path) -> None:
    view = root / "artifacts" / "v"
    view.mkdir()
    assert views.read_manifest(view) is None
    (view / MANIFEST_FILE).write_text("{")
    assert views.read_manifest(view) is None
    (view / MANIFEST_FILE).write_text(json.dumps({"version": 2}))
    assert views.read_manifest(view) is None
