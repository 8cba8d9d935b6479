"""The download program of an offline cache: what `hf download` or somebody's hands put on the volume is found, verified and used.

No endpoint answers in these tests, so a request would be a failure.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from e2e.fixtures.hub import HubServer
from tests.component.fetch_support import Fetcher, Job, without_volume

NOWHERE = "http://127.0.0.1:1"
MODEL = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def hub(content: Path) -> Iterator[HubServer]:
    with HubServer() as server:
        for repo, folder in (("org/base", "base"), ("org/sql", "good")):
            server.create_repo(repo)
            server.commit(repo, content / folder)
        yield server


@pytest.fixture
def fetcher(tmp_path: Path) -> Fetcher:
    """One whose endpoint does not answer."""
    (tmp_path / "cache").mkdir()
    return Fetcher(NOWHERE, tmp_path / "cache", tmp_path / "jobs")


def hf_download(hub: HubServer, repo: str, *arguments: str, home: Path) -> None:
    """The library's own program, as a user runs it."""
    program = Path(sys.executable).with_name("hf")
    env = {"PATH": os.environ["PATH"], "HOME": str(home), "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run([program, "download", repo, *arguments], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def offline(fetcher: Fetcher, repo: str, **options: Any) -> Job:
    """Starts a program that may ask nobody."""
    return fetcher.start(repo, want={"offline": True, **options.pop("want", {})}, **options)


def test_what_hf_download_put_there_is_used_as_it_lies(hub: HubServer, fetcher: Fetcher, tmp_path: Path) -> None:
    home = tmp_path / "home"
    hf_download(hub, "org/base", "--cache-dir", str(fetcher.cache / "hub"), home=home)
    hf_download(hub, "org/sql", "--cache-dir", str(fetcher.cache), home=home)
    base = offline(fetcher, "org/base", type="BaseModel", artifact="base").ok
    assert base.resolved_revision == hub.head("org/base")
    assert [file.path for file in fetcher.manifest(base).files] == MODEL
    blobs = fetcher.cache / "hub/models--org--base/blobs"
    assert {(fetcher.cache / base.path / name).resolve().parent for name in MODEL} == {blobs}
    fetcher.base = base.path
    by_commit = offline(fetcher, "org/sql", revision=hub.head("org/sql"), artifact="sql")
    unknown = offline(fetcher, "org/sql", revision="v9", artifact="sql")
    other = offline(fetcher, "org/sql", revision="0" * 40, artifact="sql")
    assert (by_commit.ok.rank, by_commit.ok.resolved_revision) == (8, hub.head("org/sql"))
    # There is no ref of that name, but one snapshot only.
    assert unknown.ok.path == by_commit.ok.path
    reason, message = other.failed
    assert (reason, hub.head("org/sql") in message) == ("RevisionNotFound", True), message
    assert "models--org--sql" in message


def test_plain_folders_are_verified_by_the_sums_that_lie_beside_them(
    hub: HubServer, fetcher: Fetcher, content: Path, tmp_path: Path
) -> None:
    shutil.copytree(content / "base", fetcher.cache / "org/base")  # by hand: it declares nothing
    hf_download(hub, "org/sql", "--local-dir", str(fetcher.cache / "org/sql"), home=tmp_path / "home")
    base = offline(fetcher, "org/base", type="BaseModel", artifact="base").ok
    assert re.fullmatch(r"[0-9a-f]{64}", base.resolved_revision)
    assert (fetcher.cache / base.path / "model.safetensors").resolve() == fetcher.cache / "org/base/model.safetensors"
    fetcher.base = base.path
    good = offline(fetcher, "org/sql", artifact="sql").ok
    assert good.resolved_revision == hub.head("org/sql")
    assert [file.path for file in fetcher.manifest(good).files] == ["adapter_config.json", WEIGHTS]

    pinned = offline(fetcher, "org/base", type="BaseModel", revision="0" * 40)
    weights = fetcher.cache / "org/sql" / WEIGHTS
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    spoilt = offline(fetcher, "org/sql", artifact="spoilt")
    reason, message = spoilt.failed
    assert (reason, f"org/sql/{WEIGHTS} on the volume" in message) == ("ChecksumMismatch", True), message
    assert weights.read_bytes() == raw, "it is not ours to remove"
    reason, message = pinned.failed
    assert (reason, "org/base on its volume does not say" in message) == ("RevisionNotFound", True), message


def test_a_folder_for_s3_needs_no_credentials(fetcher: Fetcher, content: Path) -> None:
    shutil.copytree(content / "base", fetcher.cache / "models/llama/base")
    source = {"s3": {"bucket": "models", "prefix": "llama/base", "endpoint": NOWHERE}}
    result = fetcher.launch(source, type="BaseModel", want={"offline": True}).ok
    assert [file.path for file in fetcher.manifest(result).files] == MODEL


def test_folders_for_other_buckets_and_volumes_need_no_network_either(fetcher: Fetcher, content: Path) -> None:
    for place in ("models/google/base", "account/models/azure/base", "by-hand/base"):
        shutil.copytree(content / "base", fetcher.cache / place)
    sources: dict[str, dict[str, Any]] = {
        "gs://models/google/base": {"gcs": {"bucket": "models", "prefix": "google/base", "endpoint": NOWHERE}},
        "azure://account/models/azure/base": {
            "azure": {"account": "account", "container": "models", "prefix": "azure/base", "endpoint": NOWHERE}
        },
        "local://by-hand/base": {"local": {"path": "by-hand/base"}},
    }
    jobs = {title: fetcher.launch(one, type="BaseModel", want={"offline": True}) for title, one in sources.items()}
    for title, job in jobs.items():
        manifest = fetcher.manifest(job.ok)
        assert (manifest.repo, [file.path for file in manifest.files]) == (title, MODEL)
    http = {"http": {"files": [{"path": "config.json", "url": f"{NOWHERE}/config.json", "sha256": "0" * 64}]}}
    reason, message = fetcher.launch(http, type="BaseModel", want={"offline": True}).failed
    assert (reason, "offline cache" in message) == ("SourceNotAllowed", True), message


def test_what_is_not_there_is_told_with_where_it_was_looked_for(fetcher: Fetcher, content: Path) -> None:
    shutil.copytree(content / "base", fetcher.cache / "org/half")
    (fetcher.cache / "org/half/model.safetensors").unlink()
    (fetcher.cache / "org/out").symlink_to("/etc")
    missing = offline(fetcher, "org/nope", type="BaseModel")
    half = offline(fetcher, "org/half", type="BaseModel")
    out = offline(fetcher, "org/out", type="BaseModel")
    s3 = fetcher.launch({"s3": {"bucket": "models", "prefix": "x"}}, type="BaseModel", want={"offline": True})
    reason, message = missing.failed
    assert reason == "RepositoryNotFound"
    for place in ("hub/models--org--nope", "models--org--nope", "org/nope", "hf download org/nope --cache-dir"):
        assert place in message
    reason, message = half.failed
    assert (reason, "weights" in message) == ("IncompleteModel", True), message
    reason, message = out.failed
    assert (reason, "leads out of the cache" in message) == ("JobFailed", True), message
    reason, message = s3.failed
    assert (reason, "models/x" in message) == ("RepositoryNotFound", True), message


def test_what_this_operator_downloaded_is_used_when_the_network_goes(hub: HubServer, fetcher: Fetcher) -> None:
    fetcher.endpoint = hub.url
    first = fetcher.run("org/base", type="BaseModel", artifact="base").ok
    fetcher.endpoint = NOWHERE
    again = offline(fetcher, "org/base", type="BaseModel", artifact="base").ok
    assert without_volume(again) == without_volume(first)
