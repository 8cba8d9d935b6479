"""The download program against a real HTTP server: files and archives, who may read them, and where a Job goes for them."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import shutil
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from e2e.fixtures.http_files import FileServer
from lora_operator.fetch.evict import evict
from lora_operator.wire.jobs import EvictRequest, FetchResult, keep_mark
from tests.component.fetch_support import ROOT, Fetcher, Job, until

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MIB = 1 << 20
NOTHING: Mapping[str, bytes] = MappingProxyType({})


@pytest.fixture(scope="module")
def service() -> Iterator[FileServer]:
    with FileServer() as server:
        yield server


@pytest.fixture
def http(service: FileServer) -> FileServer:
    service.reset()
    return service


@pytest.fixture(scope="module")
def seed(service: FileServer, content: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A cache with nothing but the base model, from files with their sums, and the path of its view."""
    folder = tmp_path_factory.mktemp("seed")
    (folder / "cache").mkdir()
    names = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    files = service.put("base", content / "base", *names)
    fetch = Fetcher("", folder / "cache", folder / "jobs")
    result = run(fetch, service, type="BaseModel", artifact="base", files=files).ok
    assert [file.path for file in fetch.manifest(result).files] == sorted(names)
    return folder / "cache", result.path


@pytest.fixture
def fetcher(tmp_path: Path, seed: tuple[Path, str]) -> Fetcher:
    shutil.copytree(seed[0], tmp_path / "cache", symlinks=True)
    return Fetcher("", tmp_path / "cache", tmp_path / "jobs", base=seed[1])


def start(fetcher: Fetcher, server: FileServer, *, keys: dict[str, str] | None = None, **options: Any) -> Job:
    """A program; members of the source among the options, with `server` allowed unless told otherwise."""
    source: dict[str, Any] = {
        name: options.pop(name) for name in ("url", "sha256", "files", "maxBytes") if name in options
    }
    allowed = options.pop("allowed", [server.url])
    wanted = {"http": {"maxBytes": 64 * MIB, "allowedEndpoints": allowed, **source}}
    return fetcher.launch(wanted, credentials=keys, **options)


def run(fetcher: Fetcher, server: FileServer, **options: Any) -> Job:
    return start(fetcher, server, **options).wait()


def adapter(server: FileServer, content: Path, folder: str = "sql", name: str = "good") -> list[dict[str, str]]:
    return server.put(folder, content / name, CONFIG, WEIGHTS)


def archive(
    server: FileServer, content: Path, kind: str, folder: str = "", more: Mapping[str, bytes] = NOTHING
) -> dict[str, Any]:
    """The adapter as an archive that the server has; as a source's members."""
    files = {f"{folder}{path.name}": path.read_bytes() for path in sorted((content / "good").iterdir())}
    files |= more
    out = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as packed:
            for name, data in files.items():
                packed.writestr(name, data)
    else:
        with tarfile.open(fileobj=out, mode="w") as tar:
            for name, data in files.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    data = out.getvalue() if kind != "tar.gz" else gzip.compress(out.getvalue(), 1)
    found = server.put_one(f"packed/sql.{kind}", data, "")
    return {"url": found["url"], "sha256": found["sha256"]}


def place(fetcher: Fetcher) -> Path:
    (found,) = fetcher.cache.glob("http/*")
    return found


def test_what_an_archive_may_bring_is_looked_at_before_its_first_byte(
    http: FileServer, fetcher: Fetcher, content: Path
) -> None:
    packed = archive(http, content, "zip")
    files = adapter(http, content)
    http.seen.clear()
    bounded: dict[str, Any] = {
        "TooLarge": {"maxArtifactBytes": 100},
        "InsufficientSpace": {"capacityBytes": 100},
    }
    for expected, limits in bounded.items():
        for source in (packed, {"files": files}):
            job = run(fetcher, http, want={"limits": limits}, **source)
            assert job.failed[0] == expected, job.failed
            assert (job.result.needed_bytes is not None) == (expected == "InsufficientSpace")
    assert http.bodies() == {}
    assert not list(fetcher.cache.glob("http/*/blobs/*.incomplete"))


@pytest.mark.parametrize("kind", ["an archive", "files"])
def test_two_jobs_on_a_volume_without_locks_share_no_unfinished_file(
    kind: str, http: FileServer, fetcher: Fetcher, content: Path, tmp_path: Path
) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        "import errno, fcntl\ndef flock(*_):\n    raise OSError(errno.ENOSYS, 'no locks here')\nfcntl.flock = flock\n"
    )
    env = {"PYTHONPATH": f"{tmp_path / 'site'}:{ROOT / 'operator'}"}
    source = archive(http, content, "tar.gz") if kind == "an archive" else {"files": adapter(http, content)}
    http.rate = 16 << 10
    jobs = [start(fetcher, http, env=env, artifact="sql", **source) for _ in range(2)]
    assert len({job.ok.digest for job in jobs}) == 1
    view = fetcher.cache / jobs[0].ok.path
    assert (view / WEIGHTS).read_bytes() == (content / "good" / WEIGHTS).read_bytes()
    assert fetcher.leaked() == []
    assert not list(place(fetcher).glob("blobs/*.incomplete"))


def test_an_eviction_leaves_nothing_of_a_server_and_keeps_what_is_wanted(
    http: FileServer, fetcher: Fetcher, content: Path
) -> None:
    result = run(fetcher, http, **archive(http, content, "zip")).ok
    assert fetcher.base is not None
    for kept, left in (([result.path, fetcher.base], 2), ([fetcher.base], 1), ([], 0)):
        marks = b"".join(keep_mark(Path(path).name) for path in kept)
        keep = base64.b64encode(marks).decode()
        done = evict(EvictRequest(cache_root=str(fetcher.cache), keep=keep, unfinished_seconds=0))
        assert (done.ok, done.busy) == (True, 0), done
        assert len([path for path in fetcher.cache.glob("artifacts/*") if not path.name.startswith(".")]) == left
        names = {path.name for path in (fetcher.cache / "artifacts").glob("*/*") if path.exists()}
        assert (WEIGHTS in names, "model.safetensors" in names) == (left == 2, left >= 1)
    assert list(fetcher.cache.glob("http/*")) == []


# Files


def test_files_are_published_as_links_to_payloads_with_their_sums(
    http: FileServer, fetcher: Fetcher, content: Path
) -> None:
    files = adapter(http, content)
    result = run(fetcher, http, files=files, artifact="sql").ok
    manifest = fetcher.manifest(result)
    assert {file.path: file.sha256 for file in manifest.files} == {file["path"]: file["sha256"] for file in files}
    assert manifest.repo == f"{http.url}/sql"
    total = "".join(f"{file['path']}\0{file['sha256']}\0\n" for file in files)
    assert result.resolved_revision == hashlib.sha256(total.encode()).hexdigest()
    assert (fetcher.cache / result.path / WEIGHTS).resolve().parent == place(fetcher) / "blobs"
    assert not any(seen.authorization for seen in http.seen)
    before = http.bodies()
    again = run(fetcher, http, files=files, artifact="sql").ok
    assert (again.path, http.bodies()) == (result.path, before), "the second one downloaded"
    assert fetcher.leaked() == []


def test_other_bytes_than_declared_are_never_published(http: FileServer, fetcher: Fetcher, content: Path) -> None:
    files = adapter(http, content)
    http.files[f"sql/{WEIGHTS}"] = http.files[f"sql/{WEIGHTS}"][:-1] + b"?"  # of the same length
    reason, message = run(fetcher, http, files=files).failed
    assert reason == "ChecksumMismatch"
    assert f"'{WEIGHTS}' arrived wrong: its SHA256 is" in message
    assert len(list(fetcher.cache.glob("artifacts/[!.]*"))) == 1  # the base model's


def test_credentials_go_to_the_named_servers_alone(http: FileServer, fetcher: Fetcher, content: Path) -> None:
    files = adapter(http, content)
    http.authorization = "Bearer token-of-the-tests"
    with FileServer(host="127.0.0.2") as other:  # where the weights are really kept
        other.files["kept"] = http.files[f"sql/{WEIGHTS}"]
        http.redirects[f"sql/{WEIGHTS}"] = f"{other.url}/kept"
        allowed = [http.url, other.url]
        keys = {"token": "token-of-the-tests"}
        job = run(fetcher, http, files=files, keys=keys, allowed=allowed)
        assert job.ok.files == 2
        assert "token-of-the-tests" not in job.stdout + job.stderr
        assert {seen.authorization for seen in other.seen} == {""}
        other.seen.clear()
        reason, message = run(fetcher, http, files=files, keys=keys).failed
        assert reason == "SourceNotAllowed"
        assert "which the ModelCache does not allow" in message
        assert other.seen == []


def test_what_is_in_the_cache_is_handed_to_nobody_who_may_not_read_it(
    http: FileServer, fetcher: Fetcher, content: Path
) -> None:
    files = adapter(http, content)
    http.basic("team", "password-of-a-team")
    keys = {"username": "team", "password": "password-of-a-team"}
    assert run(fetcher, http, files=files, keys=keys).ok
    reason, message = run(fetcher, http, files=files).failed
    assert (reason, "set source.http.credentialsSecretRef" in message) == ("Unauthorized", True)
    reason, message = run(fetcher, http, files=files, keys=keys | {"password": "wrong-password-of-a-team"}).failed
    assert reason == "Unauthorized"
    assert "password" not in message
    with FileServer(host="127.0.0.2") as mine:  # who knows the sums and has a server of his own gets what that one has
        theirs = [{**file, "url": f"{mine.url}/{file['path']}"} for file in files]
        for file in files:
            mine.files[file["path"]] = b"x" * len(http.files[f"sql/{file['path']}"])
        reason, _ = run(fetcher, mine, files=theirs).failed
        assert reason == "ChecksumMismatch"


ANSWERS = {401: "Unauthorized", 403: "Unauthorized", 404: "EntryNotFound", 429: "RateLimited", 503: "SourceUnreachable"}


def test_every_answer_has_its_reason(http: FileServer, fetcher: Fetcher, content: Path) -> None:
    files = adapter(http, content)
    jobs = {}
    for status in ANSWERS:
        http.statuses[f"odd-{status}"] = status
        jobs[status] = start(fetcher, http, files=[files[0], {**files[1], "url": f"{http.url}/odd-{status}"}])
    assert {status: job.failed[0] for status, job in jobs.items()} == ANSWERS


def big(http: FileServer, content: Path) -> list[dict[str, str]]:
    names = ("config.json", "model.safetensors", "tokenizer.json")
    return http.put("big", content / "big", *names)


def test_a_killed_download_goes_on_where_it_stopped(http: FileServer, fetcher: Fetcher, content: Path) -> None:
    files = big(http, content)
    http.rate = 4 * MIB
    first = start(fetcher, http, files=files, type="BaseModel")
    until(lambda: any(path.stat().st_size > MIB for path in fetcher.cache.glob("http/*/blobs/*.incomplete")))
    first.kill()
    http.rate = None
    http.seen.clear()
    assert run(fetcher, http, files=files, type="BaseModel").ok
    ranges = [seen.range for seen in http.seen if seen.path == "big/model.safetensors" and seen.is_body]
    assert len(ranges) == 1
    assert int(ranges[0].removeprefix("bytes=").rstrip("-")) > MIB
    assert fetcher.leaked() == []


@pytest.mark.parametrize("ranges", [True, False])
def test_connections_that_break_are_taken_up_again(
    ranges: bool, http: FileServer, fetcher: Fetcher, content: Path
) -> None:
    files = big(http, content)
    http.ranges, http.cut = ranges, 4 * MIB
    job = start(fetcher, http, files=files, type="BaseModel")
    if not ranges:  # each try begins anew, and gets no further
        until(lambda: http.bodies().get("big/model.safetensors", 0) > 1)
        http.cut = None
    assert job.ok


# Archives


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
def test_an_archive_is_extracted_and_not_kept(kind: str, http: FileServer, fetcher: Fetcher, content: Path) -> None:
    source = archive(http, content, kind)
    result = run(fetcher, http, **source).ok
    assert [file.path for file in fetcher.manifest(result).files] == [CONFIG, WEIGHTS]
    assert (result.resolved_revision, fetcher.manifest(result).repo) == (source["sha256"], source["url"])
    sizes = {path.stat().st_size for path in (place(fetcher) / "blobs").iterdir()}
    assert len(http.files[f"packed/sql.{kind}"]) not in sizes
    assert fetcher.leaked() == []
    again = run(fetcher, http, **source).ok
    assert again.path == result.path
    assert http.bodies() == {f"packed/sql.{kind}": 1}, "the second one downloaded"


def test_a_folder_of_an_archive_and_nothing_outside_of_it(http: FileServer, fetcher: Fetcher, content: Path) -> None:
    source = archive(http, content, "tar", "sql-1.0/", {"../../evil.json": b"{}", "sql-1.0/sub/x.json": b"{}"})
    result: FetchResult = run(fetcher, http, path="sql-1.0", **source).ok
    assert [file.path for file in fetcher.manifest(result).files] == [CONFIG, WEIGHTS]
    assert not list(fetcher.cache.parent.rglob("evil.json"))
    bad = archive(http, content, "tar", more={"../evil.json": b"{}"})
    reason, message = run(fetcher, http, want={"type": "BaseModel"}, **bad).failed
    assert reason == "IncompleteModel", message


def test_archives_that_can_not_be_used_leave_nothing_behind(http: FileServer, fetcher: Fetcher, content: Path) -> None:
    bomb = archive(http, content, "zip", more={"zeros.json": bytes(8 * MIB)})
    page = http.put_one("packed/page", b"<html>please log in</html>" * 100, "")
    jobs = {
        "expands to more than the 1.0 MiB of maxSize": start(fetcher, http, maxBytes=MIB, **bomb),
        "is no tar, tar.gz or zip archive": start(fetcher, http, url=page["url"], sha256=page["sha256"]),
        "more than the 100 B of maxSize": start(fetcher, http, maxBytes=100, url=page["url"], sha256=page["sha256"]),
    }
    for words, job in jobs.items():
        reason, message = job.failed
        assert (reason, words in message) == ("InvalidAdapter", True), message
    wrong = start(fetcher, http, **(bomb | {"sha256": "0" * 64})).failed
    assert wrong[0] == "ChecksumMismatch"
    assert fetcher.leaked() == []


def test_a_broken_download_of_an_archive_goes_on(http: FileServer, fetcher: Fetcher, content: Path) -> None:
    noise = {"extra.json": hashlib.shake_256(b"seed").digest(4 * MIB)}
    source = archive(http, content, "tar", more=noise)
    http.rate = 4 * MIB
    first = start(fetcher, http, **source)
    until(lambda: any(path.stat().st_size > MIB for path in fetcher.cache.glob("http/*/blobs/*.incomplete")))
    first.kill()
    http.rate = None
    http.seen.clear()
    assert run(fetcher, http, **source).ok
    (again,) = [seen.range for seen in http.seen if seen.is_body]
    assert int(again.removeprefix("bytes=").rstrip("-")) > MIB
    assert fetcher.leaked() == []
