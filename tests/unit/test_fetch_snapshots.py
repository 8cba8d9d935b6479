"""Views: relative links to exactly the manifest's files, which appear in one step and are never touched while they are right."""

from __future__ import annotations

import ctypes
import json
import os
import re
import time
from pathlib import Path

import pytest

from lora_operator.fetch.volume import snapshots
from lora_operator.wire.jobs import MANIFEST_FILE, Manifest, ManifestFile


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
    with snapshots.staged(root, {name: blob(root, target) for name, target in links.items()}) as staging:
        return root / snapshots.publish(root, staging, said, title=title)


def names(view: Path) -> set[str]:
    return {str(path.relative_to(view)) for path in view.rglob("*") if not path.is_dir()}


def test_a_view_has_relative_links_to_exactly_the_files_and_a_manifest(root: Path) -> None:
    view = put(root, {"x.json": "a", "deep/er/y": "b"}, manifest("x.json", "deep/er/y"))
    assert re.fullmatch(r"art-[0-9a-f]{20}", view.name)
    assert names(view) == {"x.json", "deep/er/y", MANIFEST_FILE}
    assert (view / "x.json").readlink() == Path("../../hub/models--o--n/blobs/a")
    assert (view / "deep/er/y").read_text() == "b"
    assert snapshots.read_manifest(view) == manifest("x.json", "deep/er/y")
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
    assert snapshots.read_manifest(view) == manifest("x").model_copy(update={"rank": 8})


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
    with pytest.raises(RuntimeError), snapshots.staged(root, {"x": blob(root, "a")}):
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
    assert snapshots.read_manifest(view) is None
    (view / MANIFEST_FILE).write_text("{")
    assert snapshots.read_manifest(view) is None
    (view / MANIFEST_FILE).write_text(json.dumps({"version": 2}))
    assert snapshots.read_manifest(view) is None
