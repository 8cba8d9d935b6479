"""The download program against a Hub that the unmodified huggingface_hub accepts: what users, tenants and other Jobs see of it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from e2e.fixtures import adapters
from e2e.fixtures.hub import HubServer
from lora_operator.wire.jobs import FetchResult
from tests.component.fetch_support import Fetcher, until, without_volume

TOKEN = "hf_right-token-of-the-tests"
OTHER = "hf_valid-without-any-grant"
WRONG = "hf_nobody-knows-this-one"
MIB = 1 << 20

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: other users and mounts")


@pytest.fixture
def hub(content: Path) -> Iterator[HubServer]:
    with HubServer() as server:
        server.add_token(TOKEN, repos=["org/private", "org/gated"])
        server.add_token(OTHER)
        for repo in ("org/base", "org/big", "org/adapter", "org/private", "org/gated"):
            server.create_repo(repo, private=repo == "org/private", gated=repo == "org/gated")
        server.commit("org/base", content / "base")
        server.commit("org/big", content / "big")
        for repo in ("org/adapter", "org/private", "org/gated"):
            server.commit(repo, content / "good")
        yield server


@pytest.fixture
def fetcher(hub: HubServer, tmp_path: Path) -> Fetcher:
    """One with an empty cache and no base model in it."""
    (tmp_path / "cache").mkdir()
    return Fetcher(hub.url, tmp_path / "cache", tmp_path / "jobs")


@pytest.fixture(scope="session")
def seed(content: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A cache with nothing but the base model, and the path of its view."""
    folder = tmp_path_factory.mktemp("seed")
    (folder / "cache").mkdir()
    with HubServer() as server:
        server.create_repo("org/base")
        server.commit("org/base", content / "base")
        result = (
            Fetcher(server.url, folder / "cache", folder / "jobs").run("org/base", type="BaseModel", artifact="base").ok
        )
    return folder / "cache", result.path


@pytest.fixture
def ready(fetcher: Fetcher, seed: tuple[Path, str]) -> Fetcher:
    """One whose cache has the base model, against which adapters are checked."""
    shutil.copytree(seed[0], fetcher.cache, symlinks=True, dirs_exist_ok=True)
    fetcher.base = seed[1]
    return fetcher


def bodies(hub: HubServer, repo: str) -> dict[str, int]:
    return {path: count for path, count in hub.downloads(repo).items() if count}


# What is published


def test_a_base_model_is_published_as_links_to_exactly_the_wanted_files(hub: HubServer, fetcher: Fetcher) -> None:
    job = fetcher.run("org/base", type="BaseModel", artifact="llama")
    result = job.ok
    assert result.resolved_revision == hub.head("org/base")
    assert re.fullmatch(r"artifacts/llama-[0-9a-f]{20}", result.path)
    manifest = fetcher.manifest(result)
    names = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert [file.path for file in manifest.files] == names
    assert (result.digest, result.files) == (manifest.digest, 5)
    assert result.size_bytes == sum(file.size for file in manifest.files)
    assert bodies(hub, "org/base") == dict.fromkeys(names, 1)
    assert fetcher.leaked() == []
    link = (fetcher.cache / result.path / "model.safetensors").readlink()
    assert link.parent == Path("../../hub/models--org--base/blobs")


def test_an_adapter_is_checked_and_its_rank_and_modules_are_told(hub: HubServer, ready: Fetcher) -> None:
    job = ready.run("org/adapter", artifact="sql")
    assert job.ok.rank == 8
    assert set(job.ok.target_modules) == {"q_proj", "up_proj", "v_proj"}
    manifest = ready.manifest(job.ok)
    assert (manifest.rank, manifest.type, manifest.repo) == (8, "Adapter", "org/adapter")
    assert [file.path for file in manifest.files] == ["adapter_config.json", "adapter_model.safetensors"]


def test_a_folder_of_the_repository_becomes_the_root_of_the_view(hub: HubServer, ready: Fetcher, content: Path) -> None:
    files = {f"checkpoint-5/{path.name}": path.read_bytes() for path in (content / "good").iterdir()}
    hub.commit("org/adapter", files | {"README.md": b"x"})
    result = ready.run("org/adapter", path="checkpoint-5").ok
    assert [file.path for file in ready.manifest(result).files] == ["adapter_config.json", "adapter_model.safetensors"]
    assert bodies(hub, "org/adapter") == {
        "checkpoint-5/adapter_config.json": 1,
        "checkpoint-5/adapter_model.safetensors": 1,
    }


def test_patterns_choose_and_names_with_pattern_characters_are_taken_literally(
    hub: HubServer, ready: Fetcher, content: Path
) -> None:
    files = {path.name: path.read_bytes() for path in (content / "good").iterdir()}
    hub.commit("org/adapter", files | {"a[1]*.json": b"{}", "a1x.json": b"{}", "notes.txt": b"x"})
    result = ready.run("org/adapter", allowPatterns=["adapter_*", "a[[]1]*.json"], ignorePatterns=["*.md"]).ok
    names = [file.path for file in ready.manifest(result).files]
    assert names == ["a[1]*.json", "adapter_config.json", "adapter_model.safetensors"]
    assert "a1x.json" not in bodies(hub, "org/adapter")


@pytest.mark.parametrize("revision", ["branch", "tag", "commit"])
def test_a_revision_is_pinned_to_the_commit_that_it_named(
    revision: str, hub: HubServer, ready: Fetcher, content: Path
) -> None:
    first = hub.head("org/adapter")
    hub.tag("org/adapter", "v1", first)
    second = hub.commit("org/adapter", content / "other")
    asked, expected = {"branch": ("main", second), "tag": ("v1", first), "commit": (first, first)}[revision]
    result = ready.run("org/adapter", revision=asked, artifact="x").ok
    assert result.resolved_revision == expected
    assert re.fullmatch(r"artifacts/x-[0-9a-f]{20}", result.path)


def test_the_same_content_of_another_commit_or_artifact_has_the_same_view(
    hub: HubServer, ready: Fetcher, content: Path
) -> None:
    first = ready.run("org/adapter", artifact="sql-0a1b2c3d4e").ok
    view = ready.cache / first.path
    before = view.stat(), (view / ".lora-operator.json").stat()
    files = {path.name: path.read_bytes() for path in (content / "good").iterdir()}
    commit = hub.commit("org/adapter", files | {"README.md": b"news that no engine reads"})
    second = ready.run("org/adapter", artifact="sql-fedcba9876").ok
    assert second.resolved_revision == commit != first.resolved_revision
    assert (second.path, second.digest) == (first.path, first.digest)
    after = view.stat(), (view / ".lora-operator.json").stat()
    assert [one.st_ino for one in after] == [one.st_ino for one in before]
    assert after[1].st_mtime_ns == before[1].st_mtime_ns
    assert after[0].st_mtime_ns >= before[0].st_mtime_ns  # evictions go by when it was last published


def test_equal_files_of_two_revisions_are_downloaded_once(hub: HubServer, ready: Fetcher, content: Path) -> None:
    first = ready.run("org/adapter", artifact="x").ok
    files = {path.name: path.read_bytes() for path in (content / "good").iterdir()}
    hub.commit("org/adapter", files | {"adapter_config.json": files["adapter_config.json"] + b"\n"})
    second = ready.run("org/adapter", artifact="x").ok
    assert first.digest != second.digest
    assert bodies(hub, "org/adapter") == {"adapter_config.json": 2, "adapter_model.safetensors": 1}
    assert ready.manifest(first)
    assert ready.manifest(second)


def test_two_artifacts_of_one_revision_share_their_download(hub: HubServer, ready: Fetcher) -> None:
    one, two = (ready.run("org/adapter", artifact=name).ok for name in ("x", "y"))
    assert one.digest == two.digest
    assert one.path != two.path
    assert set(bodies(hub, "org/adapter").values()) == {1}


def test_another_attempt_reuses_what_is_published(hub: HubServer, ready: Fetcher) -> None:
    first = ready.run("org/adapter", artifact="x").ok
    before = (ready.cache / first.path).stat()
    assert without_volume(ready.run("org/adapter", artifact="x").ok) == without_volume(first)
    after = (ready.cache / first.path).stat()
    assert before.st_ino == after.st_ino
    assert set(bodies(hub, "org/adapter").values()) == {1}


# Who may have it


def test_nothing_ambient_is_ever_used_as_credentials(hub: HubServer, ready: Fetcher, tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / ".cache" / "huggingface").mkdir(parents=True)
    (home / ".cache" / "huggingface" / "token").write_text(TOKEN)
    (home / ".netrc").write_text(f"machine 127.0.0.1 login x password {TOKEN}\n")
    (home / ".netrc").chmod(0o600)
    ambient = {
        "HOME": str(home),
        "HF_HOME": str(home / ".cache" / "huggingface"),
        "HF_TOKEN": TOKEN,
        "HUGGING_FACE_HUB_TOKEN": TOKEN,
        "HF_TOKEN_PATH": str(home / ".cache" / "huggingface" / "token"),
        "NETRC": str(home / ".netrc"),
    }
    reason, message = ready.run("org/private", env=ambient).failed
    assert reason == "Unauthorized"
    assert "does not exist, or is private and needs a token" in message
    assert bodies(hub, "org/private") == {}
    assert ready.run("org/private", token=TOKEN, env=ambient | {"HF_TOKEN": WRONG}).ok


def unauthorized_anonymous(message: str) -> bool:
    return "does not exist, or is private and needs a token" in message


CALLERS: dict[str, tuple[str | None, str, Callable[[str], bool]]] = {
    "nobody": (None, "Unauthorized", unauthorized_anonymous),
    "a wrong token": (WRONG, "Unauthorized", lambda message: "refused the token" in message),
    "a token of somebody else": (OTHER, "RepositoryNotFound", lambda message: "this token may not see it" in message),
}


@pytest.mark.parametrize("cached", [False, True], ids=["not cached", "cached"])
def test_a_private_repository_is_for_those_whose_own_token_opens_it(
    cached: bool, hub: HubServer, ready: Fetcher
) -> None:
    if cached:
        assert ready.run("org/private", token=TOKEN, artifact="theirs").ok
        hub.reset_counters()
    before = sorted(ready.cache.rglob("*"))
    jobs = {
        (caller, revision): ready.start("org/private", token=token, revision=revision, artifact="mine")
        for caller, (token, _, _) in CALLERS.items()
        for revision in ("main", hub.head("org/private"))
    }
    for (caller, _), job in jobs.items():
        _, expected, says = CALLERS[caller]
        reason, message = job.failed
        assert (reason, says(message), "org/private" in message) == (expected, True, True), message
        for text in (job.stderr, job.stdout, message):
            assert WRONG not in text
            assert OTHER not in text
    assert sorted(ready.cache.rglob("*")) == before
    assert bodies(hub, "org/private") == {}


@pytest.mark.parametrize("cached", [False, True], ids=["not cached", "cached"])
def test_a_gated_repository_says_where_to_ask(cached: bool, hub: HubServer, ready: Fetcher) -> None:
    if cached:
        assert ready.run("org/gated", token=TOKEN).ok
        hub.reset_counters()
    reason, message = ready.run("org/gated", token=OTHER).failed
    assert reason == "Unauthorized"
    assert f"request it at {hub.url}/org/gated" in message
    reason, message = ready.run("org/gated").failed
    assert reason == "Unauthorized"
    assert "request access at" in message
    assert bodies(hub, "org/gated") == {}


def test_a_source_that_knows_no_auth_check_is_asked_for_a_file_instead(hub: HubServer, ready: Fetcher) -> None:
    hub.fail("org/adapter", "api/auth-check", status=404)
    assert ready.run("org/adapter").ok
    hub.fail("org/gated", "api/auth-check", status=404)
    assert ready.run("org/gated", token=OTHER).failed[0] == "Unauthorized"
    assert ready.run("org/gated", token=TOKEN).ok


def test_the_token_is_nowhere_but_in_requests_to_the_hub(hub: HubServer, ready: Fetcher) -> None:
    job = ready.run("org/private", token=TOKEN)  # the fixture's storage, another origin, answers 400 to a token
    assert job.ok
    hub.fail("org/private", "api/tree", status=403)
    failed = ready.run("org/private", token=TOKEN)
    assert failed.failed[0] == "Unauthorized"
    for text in (job.stderr, job.stdout, failed.stderr, str(failed.result)):
        assert TOKEN not in text
    found = subprocess.run(["grep", "-rlF", TOKEN, str(ready.cache)], capture_output=True, check=False)
    assert found.stdout == b""


# What can't be had


def test_what_does_not_exist(hub: HubServer, ready: Fetcher) -> None:
    assert ready.run("org/nope", token=OTHER).failed[0] == "RepositoryNotFound"
    assert ready.run("org/nope").failed[0] == "Unauthorized"
    reason, message = ready.run("org/adapter", revision="v9").failed
    assert (reason, "'v9'" in message) == ("RevisionNotFound", True)
    assert ready.run("org/adapter", revision="0" * 40).failed[0] == "RevisionNotFound"
    reason, message = ready.run("org/adapter", path="nope").failed
    assert (reason, "'nope'" in message) == ("EntryNotFound", True)
    assert ready.run("org/base", type="BaseModel", allowPatterns=["nope*"]).failed[0] == "EntryNotFound"
    assert bodies(hub, "org/adapter") == {}


BAD = {
    "pickle-only": ("UnsafeFormat", "pickle"),
    "no-config": ("InvalidAdapter", "adapter_config.json"),
    "truncated-body": ("InvalidAdapter", "adapter_model.safetensors"),
    "truncated-header": ("InvalidAdapter", "adapter_model.safetensors"),
    "config-broken-json": ("InvalidAdapter", "adapter_config.json"),
    "rank-4-tensors-only": ("InvalidAdapter", "rank"),
    "dora": ("InvalidAdapter", "DoRA"),
    "nan": ("InvalidAdapter", "NaN"),
    "wrong-base-shape": ("IncompatibleBaseModel", "base model"),
    "absent-module": ("IncompatibleBaseModel", "base model"),
}


def test_bad_adapters_are_refused_and_nothing_is_published(
    hub: HubServer, ready: Fetcher, content: Path, tmp_path: Path
) -> None:
    jobs = {}
    for fault in BAD:
        hub.create_repo(f"bad/{fault}")
        hub.commit(f"bad/{fault}", adapters.build(fault, content / "good", tmp_path / fault))
        jobs[fault] = ready.start(f"bad/{fault}", artifact=f"bad-{fault}")
    for fault, job in jobs.items():
        reason, message = job.failed
        expected, words = BAD[fault]
        assert (reason, words in message) == (expected, True), f"{fault}: {message}"
    assert not list((ready.cache / "artifacts").glob("bad*"))
    assert ready.leaked() == []


def test_a_pickled_adapter_is_taken_where_that_is_allowed_and_only_scanned_clean(
    hub: HubServer, ready: Fetcher, content: Path, tmp_path: Path
) -> None:
    folder = adapters.build("pickle-only", content / "good", tmp_path / "pickled")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    harmful = b"cos\nsystem\n(S'touch /tmp/was-run'\ntR."
    for name, more in (("clean", {}), ("harmful", {"adapter_model.bin": harmful})):
        hub.create_repo(f"bad/{name}")
        hub.commit(f"bad/{name}", files | more)
    allowed = {"pickledWeights": True}
    jobs = {name: ready.start(f"bad/{name}", artifact=name, want=allowed) for name in ("clean", "harmful")}
    forbidden = ready.start("bad/clean", artifact="forbidden")
    manifest = ready.manifest(jobs["clean"].ok)
    assert [file.path for file in manifest.files] == ["adapter_config.json", "adapter_model.bin"]
    assert (manifest.pickles, manifest.rank) == (("adapter_model.bin",), 8)
    reason, message = jobs["harmful"].failed
    assert (reason, "os.system" in message) == ("UnsafeFormat", True), message
    reason, message = forbidden.failed
    assert (reason, "adapterPolicy.pickledWeights" in message) == ("UnsafeFormat", True), message
    assert not list((ready.cache / "artifacts").glob("harmful*"))


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer"])
def test_an_incomplete_base_model_is_named(missing: str, hub: HubServer, fetcher: Fetcher, content: Path) -> None:
    files = {path.name: path.read_bytes() for path in (content / "base").iterdir() if not path.name.startswith(missing)}
    hub.commit("org/base", files)
    reason, message = fetcher.run("org/base", type="BaseModel").failed
    assert reason == "IncompleteModel"
    assert missing.removeprefix("model") in message
    assert bodies(hub, "org/base") == {}


def test_a_base_model_that_lacks_a_shard_of_its_index(hub: HubServer, fetcher: Fetcher, content: Path) -> None:
    files = {path.name: path.read_bytes() for path in (content / "base").iterdir()}
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    hub.commit("org/base", files | {"model.safetensors.index.json": json.dumps(index).encode()})
    reason, message = fetcher.run("org/base", type="BaseModel").failed
    assert (reason, "model-00002-of-00002.safetensors" in message) == ("IncompleteModel", True)


def test_truncated_base_weights(hub: HubServer, fetcher: Fetcher, content: Path) -> None:
    files = {path.name: path.read_bytes() for path in (content / "base").iterdir()}
    hub.commit("org/base", files | {"model.safetensors": files["model.safetensors"][:-8]})
    reason, message = fetcher.run("org/base", type="BaseModel").failed
    assert (reason, "model.safetensors" in message) == ("IncompleteModel", True)


def test_an_adapter_whose_base_model_is_not_in_the_cache_or_lies_outside(ready: Fetcher) -> None:
    for path in ("artifacts/nope", "../..", "/etc"):
        ready.base = path
        reason, _ = ready.run("org/adapter", artifact="x").failed
        assert reason == "JobFailed"


# Broken bytes


def blob_of(fetcher: Fetcher, result: FetchResult, name: str) -> Path:
    return (fetcher.cache / result.path / name).resolve()


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
@pytest.mark.parametrize("damage", ["flipped", "truncated", "removed"])
def test_a_damaged_blob_in_the_cache_is_downloaded_again_in_place(
    name: str, damage: str, hub: HubServer, ready: Fetcher
) -> None:
    first = ready.run("org/adapter", artifact="x").ok
    blob = blob_of(ready, first, name)
    data = bytearray(blob.read_bytes())
    held = blob.open("rb")  # as an engine that has it open
    before = held.read()
    blob.unlink()
    if damage != "removed":
        data[-3] ^= 1
        blob.write_bytes(data if damage == "flipped" else data[:-5])
    assert without_volume(ready.run("org/adapter", artifact="x").ok) == without_volume(first)
    assert bodies(hub, "org/adapter")[name] == 2
    assert blob.read_bytes() == before
    assert held.seek(0) == 0
    assert held.read() == before
    held.close()


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_bytes_that_differ_from_the_declaration_are_not_kept(name: str, hub: HubServer, ready: Fetcher) -> None:
    commit = hub._hub.repos["org/adapter"].resolve("main")  # the fixture has no fault that changes bytes
    assert commit is not None
    true = commit.files[name]
    flipped = replace(true, content=bytes([true.content[0] ^ 1]) + true.content[1:])
    commit.files[name] = flipped  # type: ignore[index]
    reason, message = ready.run("org/adapter", artifact="x").failed
    assert reason == "ChecksumMismatch"
    assert name in message
    assert "the source declares" in message
    assert not (ready.cache / "hub/models--org--adapter/blobs" / true.etag).exists()
    assert not list((ready.cache / "artifacts").glob("x-*"))
    commit.files[name] = true  # type: ignore[index]
    assert ready.run("org/adapter", artifact="x").ok


# Interruptions


BIG = "model.safetensors"


def test_a_cut_connection_goes_on_where_it_stopped(hub: HubServer, fetcher: Fetcher, content: Path) -> None:
    size = (content / "big" / BIG).stat().st_size
    hub.cut("org/big", BIG, after_bytes=2 * MIB, times=2)
    assert fetcher.run("org/big", type="BaseModel").ok
    assert hub.downloads("org/big")[BIG] == 3
    assert hub.sent_bytes("org/big")[BIG] < size + MIB
    assert fetcher.leaked() == []


def test_a_killed_download_goes_on_in_the_next_attempt(hub: HubServer, fetcher: Fetcher, content: Path) -> None:
    size = (content / "big" / BIG).stat().st_size
    hub.throttle(2 * MIB, "org/big")
    job = fetcher.start("org/big", type="BaseModel", artifact="x")
    until(lambda: hub.sent_bytes("org/big").get(BIG, 0) > 3 * MIB)
    job.kill()
    assert not list((fetcher.cache / "artifacts").glob("x-*"))
    hub.throttle(None, "org/big")
    result = fetcher.run("org/big", type="BaseModel", artifact="x").ok
    assert fetcher.manifest(result)
    assert hub.sent_bytes("org/big")[BIG] < size + 2 * MIB
    assert fetcher.leaked() == []


def test_what_a_killed_library_download_left_is_used_and_removed(
    hub: HubServer, fetcher: Fetcher, content: Path
) -> None:
    blobs = fetcher.cache / "hub/models--org--big/blobs"
    blobs.mkdir(parents=True)
    data = (content / "big" / BIG).read_bytes()
    commit = hub._hub.repos["org/big"].resolve("main")
    assert commit is not None
    for name, count in ((BIG, 5 * MIB), (BIG, MIB), ("config.json", 3)):
        (blobs / f"{commit.files[name].etag}.{count:08x}.incomplete").write_bytes(data[:count])
    assert fetcher.run("org/big", type="BaseModel").ok
    assert hub.sent_bytes("org/big")[BIG] == len(data) - 5 * MIB
    assert fetcher.leaked() == []


def test_a_wrong_beginning_that_was_resumed_is_found_and_cured_by_the_next_attempt(
    hub: HubServer, fetcher: Fetcher, content: Path
) -> None:
    blobs = fetcher.cache / "hub/models--org--big/blobs"
    blobs.mkdir(parents=True)
    commit = hub._hub.repos["org/big"].resolve("main")
    assert commit is not None
    (blobs / f"{commit.files[BIG].etag}.incomplete").write_bytes(b"\0" * MIB)
    assert fetcher.run("org/big", type="BaseModel").failed[0] == "ChecksumMismatch"
    assert fetcher.run("org/big", type="BaseModel").ok


def test_sigterm_leaves_a_result_and_what_was_downloaded(hub: HubServer, fetcher: Fetcher) -> None:
    hub.throttle(MIB, "org/big")
    job = fetcher.start("org/big", type="BaseModel")
    until(lambda: hub.sent_bytes("org/big").get(BIG, 0) > 2 * MIB)
    job.process.send_signal(signal.SIGTERM)
    reason, message = job.failed
    assert reason == "JobFailed"
    assert "ended from outside" in message
    hub.throttle(None, "org/big")
    assert fetcher.run("org/big", type="BaseModel").ok
    assert sum(hub.sent_bytes("org/big").values()) < 8 * MIB


def test_a_server_error_in_passing_is_survived(hub: HubServer, fetcher: Fetcher) -> None:
    hub.fail("org/big", BIG, status=503, times=2)
    assert fetcher.run("org/big", type="BaseModel").ok


@pytest.mark.parametrize(
    ("status", "expected"), [(500, "SourceUnreachable"), (503, "SourceUnreachable"), (429, "RateLimited")]
)
def test_a_source_in_trouble(status: int, expected: str, hub: HubServer, ready: Fetcher) -> None:
    hub.fail("org/adapter", "api/info", status=status)
    reason, message = ready.run("org/adapter").failed
    assert (reason, str(status) in message) == (expected, True)


def test_a_source_that_is_not_there(ready: Fetcher) -> None:
    ready.endpoint = "http://127.0.0.1:9"
    reason, message = ready.run("org/adapter").failed
    assert (reason, "http://127.0.0.1:9" in message) == ("SourceUnreachable", True)


def test_a_stalled_source_ends_the_job_in_bounded_time(hub: HubServer, ready: Fetcher) -> None:
    hub.stall("org/adapter", "adapter_model.safetensors")
    reason, message = ready.run("org/adapter", env={"LORA_OPERATOR_STALL_SECONDS": "2"}).failed
    assert reason == "SourceUnreachable"
    assert "nothing arrived" in message
    hub.release()
    assert ready.run("org/adapter").ok


def test_a_source_that_asks_to_wait_for_too_long(hub: HubServer, ready: Fetcher) -> None:
    hub.fail("org/adapter", "api/tree", status=429)
    assert ready.run("org/adapter", env={"LORA_OPERATOR_STALL_SECONDS": "2"}).failed[0] == "RateLimited"


def test_a_slow_source_is_no_stalled_one_and_the_percentage_moves_in_one_file(hub: HubServer, fetcher: Fetcher) -> None:
    hub.throttle(1.5 * MIB, "org/big")
    job = fetcher.run("org/big", type="BaseModel", env={"LORA_OPERATOR_STALL_SECONDS": "2"})
    assert job.ok
    moving = [line for line in job.lines if line["phase"] == "Downloading"]
    figures = [line["bytesDone"] for line in moving]
    assert figures == sorted(figures)
    assert len({figure for figure in figures if 0 < figure < job.ok.size_bytes}) >= 2
    assert {line["bytesTotal"] for line in moving} == {job.ok.size_bytes}


# Many at once


def test_two_jobs_at_once_download_each_file_once(hub: HubServer, fetcher: Fetcher) -> None:
    hub.throttle(4 * MIB, "org/big")
    jobs = [fetcher.start("org/big", type="BaseModel", artifact=name) for name in ("x", "x", "y")]
    results = [job.ok for job in jobs]
    assert without_volume(results[0]) == without_volume(results[1])
    assert results[0].digest == results[2].digest
    assert set(bodies(hub, "org/big").values()) == {1}
    assert fetcher.leaked() == []


# The volume


@as_root
def test_a_full_volume(hub: HubServer, fetcher: Fetcher) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(fetcher.cache)], check=True)
    try:
        reason, message = fetcher.run("org/big", type="BaseModel").failed
        assert reason == "InsufficientSpace"
        assert "6.1 MiB are to be downloaded" in message
        assert bodies(hub, "org/big") == {}
        # Room for the files, but not for long.
        subprocess.run(["mount", "-o", "remount,size=7m", str(fetcher.cache)], check=True)
        hub.throttle(4 * MIB, "org/big")
        job = fetcher.start("org/big", type="BaseModel")
        until(lambda: hub.sent_bytes("org/big").get(BIG, 0) > MIB)
        (fetcher.cache / "ballast").write_bytes(b"\0" * (2 * MIB))
        reason, message = job.failed
        assert (reason, "is full" in message) == ("InsufficientSpace", True)
        assert fetcher.leaked() == []  # a full volume hurts everybody
        (fetcher.cache / "ballast").unlink()
        assert fetcher.run("org/big", type="BaseModel").ok
    finally:
        subprocess.run(["umount", str(fetcher.cache)], check=True)


@pytest.fixture
def elsewhere(hub: HubServer) -> Iterator[Fetcher]:
    """A fetcher in a place that other users can reach."""
    folder = Path(
        subprocess.run(["mktemp", "-d", "/tmp/fetch-XXXXXX"], capture_output=True, check=True, text=True).stdout.strip()
    )
    folder.chmod(0o755)
    (folder / "cache").mkdir(mode=0o755)
    (folder / "jobs").mkdir(mode=0o755)
    yield Fetcher(hub.url, folder / "cache", folder / "jobs")
    shutil.rmtree(folder)


@as_root
def test_a_volume_that_the_user_may_not_write(hub: HubServer, elsewhere: Fetcher) -> None:
    elsewhere.user = 10001
    reason, message = elsewhere.run("org/base", type="BaseModel").failed
    assert reason == "CacheNotWritable"
    assert "user 10001" in message
    assert "belongs to 0:0 with mode 0755" in message
    assert bodies(hub, "org/base") == {}


@as_root
def test_users_of_the_volumes_group_share_it_and_others_can_read(hub: HubServer, elsewhere: Fetcher) -> None:
    os.chown(elsewhere.cache, 0, 4242)
    elsewhere.cache.chmod(0o775)
    results = []
    for user, group in ((10001, 4242), (10002, 4242)):
        elsewhere.user = user
        results.append(elsewhere.run("org/base", type="BaseModel", artifact="x", groups=[group]).ok)
        blob_of(elsewhere, results[0], "config.json").write_bytes(b"spoilt")
    view = elsewhere.cache / results[0].path
    for path in (view, *view.iterdir()):
        mode = path.stat().st_mode & 0o777
        assert mode & 0o444 == 0o444, path
    reader = subprocess.run(
        ["cat", str(view / "model.safetensors")], user=10003, group=10003, extra_groups=[], capture_output=True
    )
    assert reader.returncode == 0


# The contract


def test_a_request_that_is_none(fetcher: Fetcher) -> None:
    job = fetcher.run("org/base", type="Dataset")
    reason, message = job.failed
    assert (reason, "is no fetch request" in message) == ("JobFailed", True)


def test_an_unforeseen_error_has_a_result_and_a_traceback(fetcher: Fetcher, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import lora_operator.fetch.content.select as c\ndef boom(*a, **k):\n    raise RuntimeError('boom')\nc.choose = boom\n"
    )
    from tests.component.fetch_support import ROOT

    job = fetcher.run("org/base", type="BaseModel", env={"PYTHONPATH": f"{tmp_path}:{ROOT / 'operator'}"})
    assert job.failed == ("JobFailed", "RuntimeError: boom")
    assert "Traceback" in job.stderr


def test_progress_lines_are_json_and_few(hub: HubServer, ready: Fetcher) -> None:
    job = ready.run("org/adapter")
    assert job.ok
    assert 1 <= len(job.lines) <= 6
    assert all(set(line) == {"phase", "bytesDone", "bytesTotal", "bytesPerSecond"} for line in job.lines)


def test_the_operator_is_not_loaded_by_the_fetcher(fetcher: Fetcher, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "end = os._exit\n"
        "def tell(status):\n"
        "    print(sorted(m for m in sys.modules if m.split('.')[0] in ('kopf', 'kubernetes', 'aiohttp')), file=sys.stderr, flush=True)\n"
        "    end(status)\n"
        "os._exit = tell\n"
    )
    from tests.component.fetch_support import ROOT

    job = fetcher.run("org/base", type="BaseModel", env={"PYTHONPATH": f"{tmp_path}:{ROOT / 'operator'}"})
    assert job.ok
    assert job.stderr.rstrip().endswith("[]")
