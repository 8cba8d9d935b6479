"""The download program on folders of volumes: another claim's, which is copied, and one of the cache's own, which is used in place."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from e2e.fixtures import adapters
from lora_operator.fetch.evict import evict
from lora_operator.wire.jobs import EvictRequest, FetchResult
from tests.component.fetch_support import Fetcher, Job, make_adapter, make_base

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def seed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A cache in whose folder `models` a base model and an adapter were put by hand; the path of the base model's view."""
    folder = tmp_path_factory.mktemp("seed")
    make_base(folder / "cache" / "models" / "base")
    make_adapter(folder / "cache" / "models" / "sql")
    fetch = Fetcher("", folder / "cache", folder / "jobs")
    return folder / "cache", local(fetch, "models/base", type="BaseModel", artifact="base").ok.path


@pytest.fixture
def fetcher(tmp_path: Path, seed: tuple[Path, str]) -> Fetcher:
    shutil.copytree(seed[0], tmp_path / "cache", symlinks=True)
    return Fetcher("", tmp_path / "cache", tmp_path / "jobs", base=seed[1])


@pytest.fixture
def mount(tmp_path: Path) -> Path:
    """A volume with an adapter in a folder, and things in it that are no business of the source's."""
    make_adapter(tmp_path / "mount" / "team-a" / "sql")
    (tmp_path / "mount" / "private").mkdir()
    (tmp_path / "mount" / "private" / "secret.json").write_text('{"secret": 1}')
    return tmp_path / "mount"


def local(fetcher: Fetcher, folder: str, **options: Any) -> Job:
    return fetcher.launch({"local": {"path": folder}}, **options).wait()


def claim(fetcher: Fetcher, mount: Path, folder: str = "team-a/sql", **options: Any) -> Job:
    wanted = {"persistentVolumeClaim": {"claimName": "trained", "path": folder, "mount": str(mount)}}
    return fetcher.launch(wanted, **options).wait()


def payload(fetcher: Fetcher, result: FetchResult, name: str) -> Path:
    return (fetcher.cache / result.path / name).resolve()


def state(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Everything below a folder, by what a change of it would change."""
    found = {path: path.lstat() for path in sorted(folder.rglob("*"))}
    return {str(path): (status.st_ino, status.st_size, status.st_mtime_ns) for path, status in found.items()}


# A claim


def test_a_folder_of_a_claim_is_copied_once(fetcher: Fetcher, mount: Path) -> None:
    before = state(mount)
    result = claim(fetcher, mount).ok
    manifest = fetcher.manifest(result)
    assert [file.path for file in manifest.files] == [CONFIG, WEIGHTS]
    assert manifest.repo == "pvc://trained/team-a/sql"
    (place,) = (fetcher.cache / "persistentVolumeClaim").iterdir()
    copy = payload(fetcher, result, WEIGHTS)
    assert copy.parent == place / "blobs"
    assert copy.read_bytes() == (mount / "team-a" / "sql" / WEIGHTS).read_bytes()
    assert state(mount) == before
    first = copy.stat()
    again = claim(fetcher, mount).ok
    assert (again.path, again.resolved_revision) == (result.path, result.resolved_revision)
    assert payload(fetcher, again, WEIGHTS).stat() == first, "it was copied again"
    assert fetcher.leaked() == []


def test_a_changed_file_is_another_revision_and_the_old_view_stays(fetcher: Fetcher, mount: Path) -> None:
    first = claim(fetcher, mount, artifact="sql").ok
    old = payload(fetcher, first, WEIGHTS).read_bytes()
    shutil.rmtree(mount / "team-a" / "sql")
    make_adapter(mount / "team-a" / "sql", seed=9)
    second = claim(fetcher, mount, artifact="sql").ok
    assert (second.digest, second.resolved_revision) != (first.digest, first.resolved_revision)
    assert payload(fetcher, first, WEIGHTS).read_bytes() == old
    assert payload(fetcher, second, WEIGHTS).read_bytes() == (mount / "team-a" / "sql" / WEIGHTS).read_bytes()


def test_a_spoilt_copy_is_found_and_replaced(fetcher: Fetcher, mount: Path) -> None:
    result = claim(fetcher, mount).ok
    copy = payload(fetcher, result, WEIGHTS)
    copy.write_bytes(copy.read_bytes()[:-1] + b"?")
    assert claim(fetcher, mount).ok.digest == result.digest
    assert payload(fetcher, result, WEIGHTS).read_bytes() == (mount / "team-a" / "sql" / WEIGHTS).read_bytes()


def test_no_link_leads_out_of_the_folder(fetcher: Fetcher, mount: Path) -> None:
    folder = mount / "team-a" / "sql"
    (folder / "extra.json").symlink_to("../../private/secret.json")
    (folder / "more").symlink_to("../../private")
    (folder / "hub.json").symlink_to(fetcher.cache / "models" / "base" / "config.json")
    os.mkfifo(folder / "pipe.json")
    assert [file.path for file in fetcher.manifest(claim(fetcher, mount).ok).files] == [CONFIG, WEIGHTS]
    (mount / "link").symlink_to("private")
    for path in ("link", "team-a/sql/more"):
        reason, message = claim(fetcher, mount, path).failed
        assert (reason, "is behind a link" in message) == ("EntryNotFound", True)
    reason, _ = claim(fetcher, mount, "team-a/../private").failed
    assert reason == "EntryNotFound"
    (folder / CONFIG).unlink()
    (folder / CONFIG).symlink_to("../../private/secret.json")
    reason, message = claim(fetcher, mount).failed
    assert (reason, f"there is no {CONFIG}" in message) == ("InvalidAdapter", True)


def test_what_is_not_there_is_told(fetcher: Fetcher, mount: Path) -> None:
    (mount / "empty").mkdir()
    expected = {"nowhere": "does not exist", "empty": "has no files", f"team-a/sql/{CONFIG}": "is no folder"}
    for path, words in expected.items():
        reason, message = claim(fetcher, mount, path).failed
        assert (reason, words in message) == ("EntryNotFound", True), message
        assert "correct source.persistentVolumeClaim.path" in message


# A path of the cache's own volume


def test_a_local_folder_is_used_in_place_and_never_written(fetcher: Fetcher) -> None:
    before = state(fetcher.cache / "models")
    result = local(fetcher, "models/sql").ok
    manifest = fetcher.manifest(result)
    assert [file.path for file in manifest.files] == [CONFIG, WEIGHTS]
    assert (manifest.repo, manifest.rank) == ("local://models/sql", 8)
    assert payload(fetcher, result, WEIGHTS) == fetcher.cache / "models" / "sql" / WEIGHTS
    assert state(fetcher.cache / "models") == before
    assert local(fetcher, "models", path="sql").ok.digest == result.digest
    (fetcher.cache / "models" / "sql" / WEIGHTS).write_bytes(b"spoilt")
    reason, _ = local(fetcher, "models/sql").failed
    assert reason == "InvalidAdapter"
    assert (fetcher.cache / "models" / "sql" / WEIGHTS).read_bytes() == b"spoilt"


def test_a_pickle_that_lies_there_is_not_taken_though_scanned_ones_are_allowed(
    fetcher: Fetcher, mount: Path, tmp_path: Path
) -> None:
    folder = adapters.build("pickle-only", mount / "team-a" / "sql", tmp_path / "pickled")
    shutil.copytree(folder, fetcher.cache / "models" / "pickled")
    shutil.copytree(folder, mount / "pickled")
    allowed = {"pickledWeights": True}
    reason, message = local(fetcher, "models/pickled", want=allowed).failed
    assert (reason, "may change after it" in message) == ("UnsafeFormat", True), message
    assert claim(fetcher, mount, "pickled", want=allowed).ok, "what is copied stays what was scanned"


def test_no_path_leads_to_what_other_tenants_brought(fetcher: Fetcher, mount: Path) -> None:
    theirs = claim(fetcher, mount).ok
    hub = fetcher.cache / "hub" / "models--org--private" / "snapshots" / "0"
    make_adapter(hub)
    (fetcher.cache / "models" / "link").symlink_to("../hub/models--org--private/snapshots/0")
    (fetcher.cache / "alias").symlink_to("hub")
    (fetcher.cache / "models" / "linked").mkdir()
    for name in (CONFIG, WEIGHTS):
        (fetcher.cache / "models" / "linked" / name).symlink_to(hub / name)
    expected = {
        "hub/models--org--private/snapshots/0": "SourceNotAllowed",
        "HUB/models--org--private/snapshots/0": "SourceNotAllowed",
        theirs.path: "SourceNotAllowed",
        "persistentVolumeClaim": "SourceNotAllowed",
        "alias/models--org--private/snapshots/0": "SourceNotAllowed",
        "models/link": "EntryNotFound",
        "models/linked": "EntryNotFound",
        "models/../hub/models--org--private/snapshots/0": "EntryNotFound",
    }
    assert {path: local(fetcher, path).failed[0] for path in expected} == expected


def test_an_eviction_takes_copies_and_leaves_what_somebody_put_there(fetcher: Fetcher, mount: Path) -> None:
    before = state(fetcher.cache / "models")
    assert local(fetcher, "models/sql").ok
    assert claim(fetcher, mount).ok
    done = evict(EvictRequest(cache_root=str(fetcher.cache), unfinished_seconds=0))
    assert (done.ok, done.views, done.busy) == (True, 3, 0), done
    assert list(fetcher.cache.glob("persistentVolumeClaim/*")) == []
    assert state(fetcher.cache / "models") == before
