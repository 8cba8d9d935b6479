"""Evictions on a volume: what goes, what stays whatever happens, and how downloads are kept apart from them."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import pytest

from lora_operator.fetch.evict import evict
from lora_operator.fetch.sources.huggingface import client, resume
from lora_operator.fetch.sources.huggingface.source import HubStore
from lora_operator.fetch.volume import limits, snapshots, store_locks
from lora_operator.plan.eviction import encode_keep
from lora_operator.wire.jobs import EvictRequest, EvictResult, Manifest

DAY = 24 * 3600
REPO, BUCKET = "hub/models--org--a", "s3/bucket-0123"


def make_view(root: Path, name: str, store: str, *blobs: str, size: int = 100, age: float = 0.0) -> Path:
    """A view of payloads of one store, made as a Job makes it."""
    folder = root / store
    with store_locks.shared(root, folder / "blobs"):
        (folder / "blobs").mkdir(parents=True, exist_ok=True)
        view = root / "artifacts" / name
        (view / "sub").mkdir(parents=True)
        for blob in blobs:
            payload = folder / "blobs" / blob
            if not payload.exists():
                payload.write_bytes(b"x" * size)
            link = view / "sub" / blob
            link.symlink_to(os.path.relpath(payload, link.parent))
    manifest = Manifest(type="Adapter", repo="org/a", digest="sha256:aa")
    (view / ".lora-operator.json").write_text(manifest.model_dump_json(by_alias=True))
    if age:
        os.utime(view, (time.time() - age,) * 2)
    return view


def run(root: Path, keep: Iterable[str] = (), **request: object) -> EvictResult:
    return evict(EvictRequest.model_validate({"cacheRoot": str(root), "keep": encode_keep(keep), **request}))


def here(root: Path) -> set[str]:
    files = (path for path in root.rglob("*") if path.is_symlink() or path.is_file())
    return {str(path.relative_to(root)) for path in files if ".lora-operator" not in path.parts}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "artifacts").mkdir()
    return tmp_path


def test_what_is_kept_stays_and_a_payload_that_it_shares_with_what_goes(root: Path) -> None:
    kept = make_view(root, "sql-1", REPO, "shared", "own")
    gone = make_view(root, "sql-2", REPO, "shared", "other")
    other = make_view(root, "chat-1", BUCKET, "object")
    (root / BUCKET / "sums").mkdir()
    (root / BUCKET / "sums" / "object").write_text("aa")
    result = run(root, keep=["sql-1"])
    assert (result.ok, result.views, result.freed_bytes, result.busy) == (True, 2, 200, 0)
    assert kept.is_dir()
    assert not gone.exists()
    assert not other.exists()
    assert {path.name for path in (root / REPO / "blobs").iterdir()} == {"shared", "own"}
    assert all(path.exists() for path in kept.rglob("*"))
    assert not (root / BUCKET).exists(), "nothing is left of it, its sums neither"
    assert result.volume is not None
    assert result.volume.used_bytes == 200 == limits.used_bytes(root)
    assert run(root, keep=["sql-1"]).freed_bytes == 0


def test_the_hubs_own_pointers_go_with_their_payloads(root: Path) -> None:
    make_view(root, "sql-1", REPO, "one")
    make_view(root, "sql-2", REPO, "two")
    for commit, blob in (("c1", "one"), ("c2", "two")):
        snapshot = root / REPO / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (snapshot / "model.safetensors").symlink_to(f"../../blobs/{blob}")
        store_locks.note_commit(root, root / REPO, commit)
    (root / REPO / "refs").mkdir()
    (root / REPO / "refs" / "main").write_text("c2")
    (root / REPO / "refs" / "v1").write_text("c1")
    assert run(root, keep=["sql-1"]).ok
    assert here(root) == {
        "artifacts/sql-1/sub/one",
        "artifacts/sql-1/.lora-operator.json",
        f"{REPO}/blobs/one",
        f"{REPO}/snapshots/c1/model.safetensors",
        f"{REPO}/refs/v1",
    }


def test_what_somebody_put_into_a_store_of_jobs_stays(root: Path) -> None:
    """As `hf download --cache-dir` does, to warm what Jobs have used before."""
    make_view(root, "sql-1", REPO, "shared", "own")
    store_locks.note_commit(root, root / REPO, "c1")
    (root / REPO / "blobs" / "theirs").write_bytes(b"x" * 100)
    for commit, names in {"c1": ("shared", "own"), "c2": ("shared", "theirs")}.items():
        for name in names:
            link = root / REPO / "snapshots" / commit / "sub" / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(f"../../../blobs/{name}")
    for path in (root / REPO / "blobs").iterdir():
        os.utime(path, (time.time() - 9 * DAY,) * 2)
    result = run(root)
    assert (result.views, result.freed_bytes) == (1, 100)
    pointers = ("c1/sub/shared", "c2/sub/shared", "c2/sub/theirs")
    kept = ("blobs/shared", "blobs/theirs", *(f"snapshots/{pointer}" for pointer in pointers))
    assert here(root) == {f"{REPO}/{path}" for path in kept}
    store_locks.note_commit(root, root / REPO, "c2")  # a Job has come for it
    assert run(root).freed_bytes == 200
    assert here(root) == set()
    assert store_locks.noted_commits(root, root / REPO) == frozenset()


def test_jobs_note_what_they_bring_before_its_first_byte(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = resume.HubPlace(hub=root / "hub", repo="org/a")
    noted: list[frozenset[str]] = []

    def download(*_: object, **__: object) -> dict[str, Path]:
        noted.append(store_locks.noted_commits(root, place.storage))
        return {}

    monkeypatch.setattr(client, "download", download)
    HubStore(cast(Any, None), place, "c1").download([], moving=lambda: 0)
    assert noted == [frozenset({"c1"})]


def test_what_jobs_did_not_make_is_never_touched(root: Path) -> None:
    by_hand = root / "hub" / "models--org--by-hand" / "blobs"
    by_hand.mkdir(parents=True)
    (by_hand / "aaaa").write_bytes(b"a person's")
    plain = root / "my-model"
    plain.mkdir()
    (plain / "config.json").write_text("{}")
    folder = root / "artifacts" / "somebodys"
    folder.mkdir()
    (folder / "notes").write_text("x")
    make_view(root, "local-1", "hub/models--org--by-hand", "aaaa")
    for path in (by_hand / "aaaa", folder, plain):
        os.utime(path, (time.time() - 9 * DAY,) * 2)
    assert run(root).views == 1
    assert here(root) == {"hub/models--org--by-hand/blobs/aaaa", "my-model/config.json", "artifacts/somebodys/notes"}


LINKING = {
    "a view whose manifest is of a later version": "sql-1/.lora-operator.json",
    "a view whose manifest is gone": "sql-1",
    "a folder that a person made": "somebodys",
    "what a Job prepares": ".tmp-0123",
}


@pytest.mark.parametrize("case", LINKING)
def test_every_folder_keeps_what_it_links_to(root: Path, case: str) -> None:
    view = make_view(root, "sql-1", REPO, "one")
    os.utime(root / REPO / "blobs" / "one", (time.time() - 9 * DAY,) * 2)
    target = root / "artifacts" / LINKING[case]
    if target.name == ".lora-operator.json":
        target.write_text(target.read_text().replace('"version":1', '"version":2'))
    else:
        (view / ".lora-operator.json").unlink()
        view.rename(target)
    result = run(root, keep=["sql-1"])
    assert (result.ok, result.views, result.freed_bytes) == (True, 0, 0)
    assert (root / REPO / "blobs" / "one").exists()
    assert run(root).views == 0, "what can't be understood is not removed either"


def test_a_folder_that_links_through_the_hubs_pointers_keeps_the_payload(root: Path) -> None:
    make_view(root, "sql-1", REPO, "one")
    snapshot = root / REPO / "snapshots" / "c1"
    snapshot.mkdir(parents=True)
    (snapshot / "w").symlink_to("../../blobs/one")
    (root / "artifacts" / "mine").symlink_to(f"../{REPO}/snapshots/c1/w")
    assert run(root).views == 1
    assert (root / "artifacts" / "mine").read_bytes() == b"x" * 100


def test_a_link_to_a_view_is_no_view(root: Path) -> None:
    view = make_view(root, "sql-1", REPO, "one")
    (root / "artifacts" / "latest").symlink_to("sql-1")
    result = run(root, keep=["sql-1"])
    assert (result.views, result.freed_bytes) == (0, 0)
    assert (root / "artifacts" / "latest").resolve() == view


@pytest.mark.parametrize("call", ["scandir", "readlink", "manifest"])
def test_what_can_not_be_read_ends_the_eviction_before_it_removes_anything(
    root: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_view(root, "going-1", REPO, "gone")
    kept = make_view(root, "sql-1", REPO, "one")
    os.utime(root / REPO / "blobs" / "one", (time.time() - 9 * DAY,) * 2)
    before = here(root)

    def fails(real: Callable[..., Any], *, within: Path) -> Callable[..., Any]:
        def called(path: Any = ".", *rest: Any) -> Any:
            if Path(path).is_relative_to(within):
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
            return real(path, *rest)

        return called

    if call == "manifest":
        other = make_view(root, "going-2", REPO, "other")
        before = here(root)
        monkeypatch.setattr(snapshots, "manifest_of", fails(snapshots.manifest_of, within=other))
    else:
        monkeypatch.setattr(os, call, fails(getattr(os, call), within=kept))
    with pytest.raises(OSError, match="Input/output error"):
        run(root, keep=["sql-1"])
    monkeypatch.undo()
    assert here(root) == before


def test_what_is_published_while_it_is_looked_at_is_looked_at_again(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    staging = make_view(root, ".tmp-0123", REPO, "one")
    os.utime(root / REPO / "blobs" / "one", (time.time() - 9 * DAY,) * 2)
    real = os.readlink

    def published(path: Any) -> str:
        if staging.exists():
            staging.rename(root / "artifacts" / "sql-1")
        return str(real(path))

    monkeypatch.setattr(os, "readlink", published)
    assert run(root, keep=["sql-1"]).ok
    assert (root / "artifacts" / "sql-1" / "sub" / "one").exists()


def test_what_is_left_of_a_view_that_was_being_removed_goes(root: Path) -> None:
    make_view(root, ".tmp-0123", REPO, "one", age=2000)
    os.utime(root / REPO / "blobs" / "one", (time.time() - 9 * DAY,) * 2)
    assert run(root).freed_bytes == 100
    assert here(root) == set()


def test_what_no_view_links_to_stays_until_a_download_will_not_go_on_from_it(root: Path) -> None:
    make_view(root, "sql-1", REPO, "own")
    blobs = root / REPO / "blobs"
    for name, age in (("young", 1), ("old", 2), ("young.incomplete", 1), ("old.incomplete", 2)):
        (blobs / name).write_bytes(b"12345")
        os.utime(blobs / name, (time.time() - age * DAY,) * 2)
    assert run(root, keep=["sql-1"], unfinishedSeconds=1.5 * DAY).freed_bytes == 10
    assert {path.name for path in blobs.iterdir()} == {"own", "young", "young.incomplete"}


def test_a_store_that_a_download_has_is_left_alone_with_its_views(root: Path) -> None:
    make_view(root, "sql-1", REPO, "one")
    make_view(root, "chat-1", BUCKET, "two")
    with store_locks.shared(root, root / REPO / "blobs"):
        result = run(root)
    assert (result.views, result.busy, result.freed_bytes) == (1, 1, 100)
    assert "artifacts/sql-1/sub/one" in here(root)
    assert run(root).freed_bytes == 100


def test_a_download_waits_for_an_eviction_and_looks_at_what_is_left(root: Path) -> None:
    make_view(root, "sql-1", REPO, "one")
    seen: list[bool] = []

    def download() -> None:
        with store_locks.shared(root, root / REPO / "blobs"):
            seen.append((root / REPO / "blobs" / "one").exists())

    with store_locks.exclusive(root, root / REPO) as free:
        assert free
        thread = threading.Thread(target=download)
        thread.start()
        (root / REPO / "blobs" / "one").unlink()
        thread.join(0.5)
        assert seen == []
    thread.join(10)
    assert seen == [False]


def test_what_was_published_while_the_job_came_up_stays(root: Path) -> None:
    make_view(root, "old-1", REPO, "one", age=1000)
    make_view(root, "new-1", REPO, "two", age=500)
    result = run(root, built=time.time() - 600)
    assert (result.views, result.freed_bytes, result.left_bytes) == (1, 0, 100)
    assert (root / "artifacts" / "new-1" / "sub" / "two").exists()


def test_while_downloads_are_under_way_views_go_and_the_next_eviction_takes_their_payloads(root: Path) -> None:
    """A Job on another node, whose locks this one may not see, has looked at what is cached."""
    make_view(root, "old-1", REPO, "one", "again", age=1000)
    make_view(root, "old-2", BUCKET, "two", age=1000)
    (root / REPO / "blobs" / "left").write_bytes(b"x" * 50)
    os.utime(root / REPO / "blobs" / "left", (time.time() - 9 * DAY,) * 2)
    result = run(root, built=time.time())
    assert (result.views, result.freed_bytes, result.left_bytes) == (2, 0, 350)
    payloads = {f"{REPO}/blobs/one", f"{REPO}/blobs/again", f"{REPO}/blobs/left", f"{BUCKET}/blobs/two"}
    assert here(root) == payloads
    assert run(root, built=time.time()).left_bytes == 350, "it is not forgotten"
    make_view(root, "new-1", REPO, "again")
    with store_locks.shared(root, root / BUCKET / "blobs"):
        result = run(root, keep=["new-1"])
    assert (result.freed_bytes, result.busy, result.left_bytes) == (150, 1, 0)
    assert (root / "artifacts" / "new-1" / "sub" / "again").exists()
    assert run(root, keep=["new-1"]).freed_bytes == 100, "nor what a download had just then"
    assert not (root / store_locks.STATE / "released.json").exists()


@pytest.mark.parametrize("note", ["", "[]", '{"../..": ["etc"]}', '{"s3/x": 5}', '{"hub/models--org--a": ["own"]}'])
def test_a_note_of_what_was_released_removes_nothing_that_is_linked_to(root: Path, note: str) -> None:
    make_view(root, "sql-1", REPO, "own")
    (root / store_locks.STATE / "released.json").write_text(note)
    assert run(root, keep=["sql-1"]).ok
    assert (root / "artifacts" / "sql-1" / "sub" / "own").exists()


def test_a_volume_that_another_cluster_uses_loses_nothing(root: Path) -> None:
    make_view(root, "sql-1", REPO, "one")
    store_locks.claim_volume(root, "mine")
    assert store_locks.other_owners(root, "mine") == []
    store_locks.claim_volume(root, "theirs")
    result = run(root, owner="mine")
    assert not result.ok
    assert "Jobs of other claims use this volume, too (theirs)" in result.message
    assert "remove artifacts/.lora-operator/owners/theirs" in result.message
    assert "artifacts/sql-1/sub/one" in here(root)
    (root / store_locks.STATE / "owners" / "theirs").unlink()
    assert run(root, owner="mine").views == 1


def test_a_volume_without_locks_loses_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(37, os.strerror(37))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    make_view(root, "sql-1", REPO, "one")  # downloads work all the same
    result = run(root)
    assert (result.ok, "no file locks" in result.message) == (False, True)
    assert "artifacts/sql-1/sub/one" in here(root)


def test_whose_a_store_is_was_decided_by_who_filled_it_first(root: Path) -> None:
    make_view(root, "sql-1", REPO, "one")
    assert store_locks.own_stores(root) == [root / REPO]
    assert run(root).freed_bytes == 100
    assert store_locks.own_stores(root) == []
    (root / REPO / "blobs").mkdir(parents=True)
    (root / REPO / "blobs" / "theirs").write_bytes(b"a person's")
    make_view(root, "sql-1", REPO, "one")
    assert store_locks.own_stores(root) == []
    run(root)
    assert (root / REPO / "blobs" / "theirs").exists()


def test_a_record_that_names_another_folder_is_not_believed(root: Path, tmp_path: Path) -> None:
    make_view(root, "sql-1", REPO, "one")
    (record,) = (root / store_locks.STATE / "stores").iterdir()
    for folder in ("../..", "my-model", "artifacts"):
        record.write_text(json.dumps({"folder": folder, "ours": True}))
        assert store_locks.own_stores(root) == []


def test_a_store_of_another_layout_is_not_swept(root: Path) -> None:
    folder = root / "http" / "site-0123"
    with store_locks.shared(root, folder / "files"):
        (folder / "files").mkdir(parents=True)
        (folder / "files" / "one").write_bytes(b"x")
    os.utime(folder / "files" / "one", (time.time() - 9 * DAY,) * 2)
    assert run(root).ok
    assert (folder / "files" / "one").exists()
