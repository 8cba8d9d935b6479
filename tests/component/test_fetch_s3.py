"""The download program against a real S3 service: what users, tenants and other Jobs see of it."""

from __future__ import annotations

import hashlib
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from e2e.fixtures import adapters
from e2e.fixtures.s3 import Request, S3Server
from lora_operator.fetch.sources.object_place import ObjectPlace, blob_name
from lora_operator.fetch.sources.ranges import PART
from lora_operator.wire.jobs import FetchResult
from tests.component.fetch_support import Fetcher, Job, make_base, until

KEYS = {"AWS_ACCESS_KEY_ID": "AKTEAMAKEYOFTESTS", "AWS_SECRET_ACCESS_KEY": "right-secret-of-the-tests"}
OTHER = {"AWS_ACCESS_KEY_ID": "AKWITHOUTANYGRANT", "AWS_SECRET_ACCESS_KEY": "other-secret-of-the-tests"}
WEIGHTS = "adapter_model.safetensors"
MIB = 1 << 20


@pytest.fixture(scope="module")
def service() -> Iterator[S3Server]:
    with S3Server() as server:
        server.add_account(*KEYS.values())
        server.add_account(*OTHER.values())
        yield server


@pytest.fixture
def s3(service: S3Server, content: Path) -> S3Server:
    """The service with `private`, which KEYS may read, and `public`, which everybody may; both with a base model and an adapter."""
    service.reset()
    for bucket, reader in (("private", KEYS["AWS_ACCESS_KEY_ID"]), ("public", "*")):
        service.create_bucket(bucket, reader)
        service.upload(bucket, "models/base", content / "base")
        service.upload(bucket, "adapters/sql", content / "good")
    return service


@pytest.fixture(scope="session")
def seed(content: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A cache with nothing but the base model, and the path of its view."""
    folder = tmp_path_factory.mktemp("seed")
    (folder / "cache").mkdir()
    with S3Server() as server:
        server.create_bucket("models", "*")
        server.upload("models", "base", content / "base")
        fetch = Fetcher(server.url, folder / "cache", folder / "jobs")
        job = fetch.launch(source(server, "models", "base"), type="BaseModel", artifact="base")
        return folder / "cache", job.ok.path


@pytest.fixture
def fetcher(tmp_path: Path, seed: tuple[Path, str]) -> Fetcher:
    """One whose cache has the base model of another service, against which adapters are checked."""
    shutil.copytree(seed[0], tmp_path / "cache", symlinks=True)
    return Fetcher("", tmp_path / "cache", tmp_path / "jobs", base=seed[1])


def source(server: S3Server, bucket: str, prefix: str, **more: Any) -> dict[str, Any]:
    return {"s3": {"bucket": bucket, "prefix": prefix, "endpoint": server.url, **more}}


def run(
    fetcher: Fetcher,
    server: S3Server,
    bucket: str = "private",
    prefix: str = "adapters/sql",
    *,
    keys: Mapping[str, str] | None = KEYS,
    allow: tuple[str, ...] = (),
    **options: Any,
) -> Job:
    """Runs a program to its end; with KEYS unless told otherwise."""
    more = {"allowPatterns": allow} if allow else {}
    return fetcher.launch(source(server, bucket, prefix, **more), credentials=keys, **options).wait()


def store(fetcher: Fetcher, bucket: str = "private") -> Path:
    (found,) = fetcher.cache.glob(f"s3/{bucket}-*")
    return found


def payload(fetcher: Fetcher, result: FetchResult, name: str) -> Path:
    return (fetcher.cache / result.path / name).resolve()


# What is published


def test_an_adapter_is_published_as_links_to_exactly_the_wanted_objects(s3: S3Server, fetcher: Fetcher) -> None:
    result = run(fetcher, s3, artifact="sql").ok
    manifest = fetcher.manifest(result)
    assert [file.path for file in manifest.files] == ["adapter_config.json", WEIGHTS]
    assert (manifest.repo, manifest.rank) == ("s3://private/adapters/sql", 8)
    assert re.fullmatch(r"artifacts/sql-[0-9a-f]{20}", result.path)
    assert s3.bodies("private") == {"adapters/sql/adapter_config.json": 1, f"adapters/sql/{WEIGHTS}": 1}
    assert payload(fetcher, result, WEIGHTS).parent == store(fetcher) / "blobs"
    assert fetcher.leaked() == []


def test_the_revision_is_the_hash_of_the_whole_listing(s3: S3Server, fetcher: Fetcher, content: Path) -> None:
    total = hashlib.sha256()
    for path in sorted((content / "good").iterdir()):
        etag = hashlib.md5(path.read_bytes()).hexdigest()
        total.update(f'{path.name}\0"{etag}"\0{path.stat().st_size}\0\n'.encode())
    first = run(fetcher, s3, artifact="sql").ok
    assert first.resolved_revision == total.hexdigest()
    s3.upload("private", "adapters/sql", {"README.md": b"# changed, and not wanted\n"})
    second = run(fetcher, s3, artifact="sql").ok
    assert second.resolved_revision != first.resolved_revision
    assert (second.digest, second.path) == (first.digest, first.path), "the same content is no news to engines"
    assert s3.bodies("private")[f"adapters/sql/{WEIGHTS}"] == 1


def test_a_base_model_from_a_public_bucket_needs_no_credentials(s3: S3Server, fetcher: Fetcher) -> None:
    result = run(fetcher, s3, "public", "models/base/", keys=None, type="BaseModel").ok
    names = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert [file.path for file in fetcher.manifest(result).files] == names
    assert s3.requests
    assert not any(request.signed for request in s3.requests)


def test_a_folder_below_the_prefix_becomes_the_root_of_the_view(s3: S3Server, fetcher: Fetcher) -> None:
    result = run(fetcher, s3, prefix="adapters", path="sql").ok
    assert [file.path for file in fetcher.manifest(result).files] == ["adapter_config.json", WEIGHTS]
    result = run(fetcher, s3, prefix="", path="adapters/sql").ok
    assert result.files == 2


def test_a_prefix_is_a_folder_and_not_the_beginning_of_a_name(s3: S3Server, fetcher: Fetcher, content: Path) -> None:
    s3.upload("private", "adapters/sql-two", content / "other")
    assert run(fetcher, s3).ok.files == 2
    assert all("sql-two" not in request.key for request in s3.requests)


def test_markers_of_folders_and_names_that_nobody_wants_do_no_harm(s3: S3Server, fetcher: Fetcher) -> None:
    s3.upload("private", "adapters/sql", {"": b"", "notes\u202e.txt.exe": b"x", "a b+c%2F.bin": b"x"})
    assert run(fetcher, s3).ok.files == 2


def test_a_wanted_name_with_control_characters_is_refused(s3: S3Server, fetcher: Fetcher) -> None:
    s3.upload("private", "adapters/sql", {"x\u202e.json": b"{}"})
    reason, message = run(fetcher, s3).failed
    assert reason == "InvalidAdapter"
    assert "has control characters" in message


# Who may read


def test_without_credentials_a_private_bucket_stays_closed(s3: S3Server, fetcher: Fetcher) -> None:
    reason, message = run(fetcher, s3, keys=None).failed
    assert reason == "Unauthorized"
    assert "can't be read anonymously; set source.s3.credentialsSecretRef" in message


def test_no_ambient_identity_is_ever_used(s3: S3Server, fetcher: Fetcher, tmp_path: Path) -> None:
    """Everything that boto3 would look at holds keys that open the bucket."""
    home = tmp_path / "home" / ".aws"
    home.mkdir(parents=True)
    lines = "\n".join(f"{name.lower()} = {value}" for name, value in KEYS.items())
    (home / "credentials").write_text(f"[default]\n{lines}\n")
    (home / "config").write_text(f"[default]\n{lines}\n")
    asked: list[str] = []
    with _listener(asked) as address:
        ambient = {
            **KEYS,
            "HOME": str(home.parent),
            "AWS_SHARED_CREDENTIALS_FILE": str(home / "credentials"),
            "AWS_CONFIG_FILE": str(home / "config"),
            "AWS_PROFILE": "default",
            "AWS_CONTAINER_CREDENTIALS_FULL_URI": f"{address}/container",
            "AWS_EC2_METADATA_SERVICE_ENDPOINT": address,
            "AWS_ENDPOINT_URL_S3": address,
            "AWS_ENDPOINT_URL": address,
        }
        reason, _ = run(fetcher, s3, keys=None, env=ambient).failed
        assert reason == "Unauthorized"
        reason, _ = run(fetcher, s3, keys=OTHER, env=ambient).failed
        assert reason == "Unauthorized"
    assert asked == []
    assert s3.bodies("private") == {}
    assert {request.signed for request in s3.requests} == {False, True}


def test_what_is_in_the_cache_is_handed_to_nobody_who_may_not_read_it(s3: S3Server, fetcher: Fetcher) -> None:
    assert run(fetcher, s3, artifact="theirs").ok
    for keys in (None, OTHER):
        assert run(fetcher, s3, keys=keys, artifact="mine").failed[0] == "Unauthorized"
    assert not list(fetcher.cache.glob("artifacts/mine-*"))


def test_the_right_to_list_is_not_the_right_to_read(s3: S3Server, fetcher: Fetcher) -> None:
    assert run(fetcher, s3, artifact="theirs").ok
    s3.allow("private", KEYS["AWS_ACCESS_KEY_ID"], objects="*.json")
    reason, message = run(fetcher, s3, artifact="mine").failed
    assert reason == "Unauthorized"
    assert "is denied to the keys of the Secret; allow them s3:ListBucket on the bucket and s3:GetObject" in message


WRONG: dict[str, tuple[dict[str, str], str, str]] = {
    "an unknown key": ({"AWS_ACCESS_KEY_ID": "AKNOBODYKNOWSTHIS"}, "Unauthorized", "InvalidAccessKeyId"),
    "a wrong secret": ({"AWS_SECRET_ACCESS_KEY": "wrong-secret-of-tests"}, "Unauthorized", "SignatureDoesNotMatch"),
    "an empty secret": ({"AWS_SECRET_ACCESS_KEY": ""}, "CredentialsKeyMissing", "AWS_SECRET_ACCESS_KEY"),
    "a secret with a line break": ({"AWS_SECRET_ACCESS_KEY": "a\nb"}, "Unauthorized", "AWS_SECRET_ACCESS_KEY"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_credentials_are_named_and_never_shown(case: str, s3: S3Server, fetcher: Fetcher) -> None:
    changes, expected, words = WRONG[case]
    keys = KEYS | changes
    job = run(fetcher, s3, keys=keys)
    reason, message = job.failed
    assert (reason, words in message) == (expected, True), message
    for value in keys.values():
        assert len(value) < 4 or value not in message + job.stdout + job.stderr


def test_a_session_token_is_sent(s3: S3Server, fetcher: Fetcher) -> None:
    """The service knows no temporary keys, and says so; without the token these keys are right."""
    seen: list[str] = []
    s3.before(lambda request: seen.append(request.token))
    job = run(fetcher, s3, keys={**KEYS, "AWS_SESSION_TOKEN": "session-token-of-tests"})
    assert set(seen) == {"session-token-of-tests"}
    assert "session-token-of-tests" not in job.stdout + job.stderr + job.result.message


# What is downloaded, and what is not


def test_an_unchanged_listing_downloads_nothing(s3: S3Server, fetcher: Fetcher) -> None:
    first = run(fetcher, s3, artifact="one").ok
    before = s3.bodies("private")
    second = run(fetcher, s3, artifact="two").ok
    assert s3.bodies("private") == before
    assert (second.digest, second.resolved_revision) == (first.digest, first.resolved_revision)
    assert payload(fetcher, first, WEIGHTS) == payload(fetcher, second, WEIGHTS)


def test_a_changed_object_alone_is_downloaded_and_the_old_view_stays(
    s3: S3Server, fetcher: Fetcher, content: Path
) -> None:
    first = run(fetcher, s3, artifact="sql").ok
    s3.upload("private", "adapters/sql", {WEIGHTS: (content / "other" / WEIGHTS).read_bytes()})
    second = run(fetcher, s3, artifact="sql").ok
    assert s3.bodies("private") == {"adapters/sql/adapter_config.json": 1, f"adapters/sql/{WEIGHTS}": 2}
    assert (fetcher.cache / first.path / WEIGHTS).read_bytes() == (content / "good" / WEIGHTS).read_bytes()
    assert (fetcher.cache / second.path / WEIGHTS).read_bytes() == (content / "other" / WEIGHTS).read_bytes()


CHANGES: dict[str, Callable[[S3Server, bytes], None]] = {
    "the object that is downloaded": lambda s3, data: s3.upload("private", "adapters/sql", {WEIGHTS: data}),
    "an object that was downloaded": lambda s3, data: s3.upload(
        "private", "adapters/sql", {"adapter_config.json": data}
    ),
    "an object that nobody wants": lambda s3, data: s3.upload("private", "adapters/sql", {"new.md": data}),
    "a removed object": lambda s3, data: s3.delete("private", f"adapters/sql/{WEIGHTS}"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_change_in_mid_download_is_an_error_and_never_a_mixture(
    case: str, s3: S3Server, fetcher: Fetcher, content: Path
) -> None:
    data = (content / "other" / WEIGHTS).read_bytes()
    changed = threading.Lock()

    def change(request: Request) -> None:
        if request.is_body and request.key.endswith(WEIGHTS) and changed.acquire(blocking=False):
            CHANGES[case](s3, data)

    s3.before(change)
    reason, message = run(fetcher, s3, artifact="sql").failed
    assert reason == "SourceChanged"
    assert "s3://private/adapters/sql changed during the download" in message
    assert not list(fetcher.cache.glob("artifacts/sql-*"))


def test_a_killed_download_goes_on_where_it_stopped(s3: S3Server, fetcher: Fetcher, content: Path) -> None:
    s3.upload("private", "models/big", content / "big")
    size = (content / "big" / "model.safetensors").stat().st_size
    s3.throttle(2 * MIB)
    wanted = source(s3, "private", "models/big")
    job = fetcher.launch(wanted, credentials=KEYS, type="BaseModel", artifact="big")
    until(lambda: any(path.stat().st_size > 2 * MIB for path in fetcher.cache.glob("s3/private-*/blobs/*.incomplete")))
    job.kill()
    assert not list(fetcher.cache.glob("artifacts/big-*"))
    s3.throttle(None)
    s3.requests.clear()
    job = fetcher.launch(wanted, credentials=KEYS, type="BaseModel", artifact="big")
    manifest = fetcher.manifest(job.ok)
    (resumed,) = [r for r in s3.requests if r.is_body and r.key.endswith("/model.safetensors")]
    began = int(resumed.range.removeprefix("bytes=").removesuffix("-"))
    assert 2 * MIB < began < size
    sums = {file.path: file.sha256 for file in manifest.files}
    assert sums["model.safetensors"] == hashlib.sha256((content / "big" / "model.safetensors").read_bytes()).hexdigest()
    assert fetcher.leaked() == []


def test_connections_that_break_are_taken_up_again(s3: S3Server, fetcher: Fetcher, content: Path) -> None:
    s3.upload("private", "models/big", content / "big")
    s3.cut_after(4 * MIB)
    job = run(fetcher, s3, prefix="models/big", type="BaseModel")
    assert job.ok
    assert s3.bodies("private")["models/big/model.safetensors"] == 2


@pytest.mark.parametrize("cut", [None, 5 * MIB], ids=["whole", "broken"])
def test_a_big_object_comes_by_several_requests_at_a_time(
    cut: int | None, s3: S3Server, fetcher: Fetcher, tmp_path: Path
) -> None:
    huge = make_base(tmp_path / "huge", vocab=110_000)
    right = (huge / BIG).read_bytes()
    assert len(right) > 3 * PART
    s3.upload("private", "models/huge", huge)
    s3.cut_after(cut)  # of each answer
    result = run(fetcher, s3, prefix="models/huge", type="BaseModel").ok
    assert payload(fetcher, result, BIG).read_bytes() == right
    ranges = [request.range for request in s3.requests if request.is_body and request.key.endswith(BIG)]
    parts = [f"bytes={at}-{min(at + PART, len(right)) - 1}" for at in range(0, len(right), PART)]
    assert sorted(ranges[: len(parts)]) == sorted(parts)
    assert (ranges[len(parts) :] != []) == (cut is not None)


def test_what_was_left_unfinished_and_is_wrong_is_not_used(s3: S3Server, fetcher: Fetcher, content: Path) -> None:
    assert run(fetcher, s3, artifact="sql").ok
    (blob,) = [
        path
        for path in (store(fetcher) / "blobs").iterdir()
        if path.stat().st_size == (content / "good" / WEIGHTS).stat().st_size
    ]
    shutil.rmtree(store(fetcher) / "sums")
    blob.rename(blob.with_name(f"{blob.name}.incomplete")).write_bytes(b"\0" * 100)
    result = run(fetcher, s3, artifact="sql").ok
    assert (fetcher.cache / result.path / WEIGHTS).read_bytes() == (content / "good" / WEIGHTS).read_bytes()


def test_unfinished_downloads_of_older_versions_go(s3: S3Server, fetcher: Fetcher, content: Path) -> None:
    assert run(fetcher, s3, artifact="sql").ok
    (blob,) = [p for p in (store(fetcher) / "blobs").iterdir() if p.stat().st_size > 5000]
    key, _, version = blob.name.partition("-")
    older = blob.with_name(f"{key}-{version[::-1]}.incomplete")
    older.write_bytes(b"\0" * 100)
    s3.upload("private", "adapters/sql", {WEIGHTS: (content / "other" / WEIGHTS).read_bytes()})
    assert run(fetcher, s3, artifact="sql").ok
    assert not older.exists()


def test_a_corrupted_payload_is_replaced_and_never_removed(s3: S3Server, fetcher: Fetcher, content: Path) -> None:
    first = run(fetcher, s3, artifact="sql").ok
    blob = payload(fetcher, first, WEIGHTS)
    right = blob.read_bytes()
    blob.chmod(0o644)
    with blob.open("r+b") as file:
        file.seek(len(right) // 2)
        file.write(b"\xff\xff\xff\xff")
    with blob.open("rb") as reader:  # as an engine has it
        wrong = reader.read()
        assert run(fetcher, s3, artifact="sql").ok.digest == first.digest
        reader.seek(0)
        assert reader.read() == wrong
    assert blob.read_bytes() == right
    assert s3.bodies("private") == {"adapters/sql/adapter_config.json": 1, f"adapters/sql/{WEIGHTS}": 2}


def test_an_object_in_parts_is_resumed_and_checked_on_reuse(s3: S3Server, fetcher: Fetcher, content: Path) -> None:
    """Its ETag is no MD5: what it hashed to when it arrived is all that there is to compare with."""
    s3.upload("private", "models/big", content / "big")
    s3.upload_in_parts("private", "models/big/model.safetensors", (content / "big/model.safetensors").read_bytes())
    first = run(fetcher, s3, prefix="models/big", type="BaseModel", artifact="big").ok
    blob = payload(fetcher, first, "model.safetensors")
    blob.chmod(0o644)
    with blob.open("r+b") as file:
        file.write(b"\0\0\0\0")
    assert run(fetcher, s3, prefix="models/big", type="BaseModel", artifact="big").ok.digest == first.digest
    assert blob.read_bytes() == (content / "big/model.safetensors").read_bytes()


SUMS: dict[str, dict[str, Any] | None] = {
    "an MD5 as its ETag": None,
    "a CRC64NVME of the whole": {},
    "a CRC32 of the whole": {"algorithm": "CRC32"},
    "a CRC32C of the whole": {"algorithm": "CRC32C"},
    "an SHA256 of its parts": {"algorithm": "SHA256", "of_parts": True},
    "a CRC32 of its parts": {"algorithm": "CRC32", "of_parts": True},
    "an MD5 of its parts as its ETag": {},
}
BIG = "model.safetensors"


@pytest.fixture
def kinds(s3: S3Server, content: Path) -> dict[str, str]:
    """A model for each kind of sum that a service may declare of its weights: sentence to prefix."""
    files = {path.name: path.read_bytes() for path in (content / "big").iterdir()}
    prefixes = {sentence: f"models/{number}" for number, sentence in enumerate(SUMS)}
    for sentence, prefix in prefixes.items():
        s3.upload("private", prefix, {name: data for name, data in files.items() if name != BIG})
        how = SUMS[sentence]
        if how is None:
            s3.upload("private", prefix, {BIG: files[BIG]})
        else:
            s3.upload_in_parts("private", f"{prefix}/{BIG}", files[BIG], **how)
    # A service that keeps no checksums but the ETag.
    s3.hide_sums(lambda request: request.key.startswith(prefixes["an MD5 of its parts as its ETag"]))
    return prefixes


def begin_with(fetcher: Fetcher, s3: S3Server, prefix: str, data: bytes) -> None:
    """Leaves an unfinished download of the weights, as a node that died in mid-write may."""
    key = f"{prefix}/{BIG}"
    head = s3.admin.head_object(Bucket="private", Key=key)
    place = ObjectPlace.of(fetcher.cache, "s3", name="private", identity=(s3.url, "private"))
    place.prepare()
    (place.blobs / f"{blob_name(key, head['ETag'], head['ContentLength'])}.incomplete").write_bytes(data)


def test_a_byte_that_flips_in_transit_is_seen_whatever_sum_is_declared(
    s3: S3Server, fetcher: Fetcher, content: Path, kinds: dict[str, str]
) -> None:
    """Of the rest of an object too, where no library compares."""
    right = (content / "big" / BIG).read_bytes()
    s3.spoil(lambda request: request.is_body and request.key.endswith(BIG))
    s3.cut_after(4 * MIB)
    jobs = {
        sentence: fetcher.launch(source(s3, "private", prefix), credentials=KEYS, type="BaseModel", artifact=f"v{n}")
        for n, (sentence, prefix) in enumerate(kinds.items())
    }
    for sentence, job in jobs.items():
        reason, message = job.failed
        assert (reason, BIG in message) == ("ChecksumMismatch", True), f"{sentence}: {message}"
    assert not list(fetcher.cache.glob("artifacts/v*"))
    sizes = [path.stat().st_size for path in store(fetcher).glob("blobs/*")]
    assert len(right) not in sizes


def test_what_a_dead_node_left_is_gone_on_with_where_the_sum_proves_it(
    s3: S3Server, fetcher: Fetcher, content: Path, kinds: dict[str, str]
) -> None:
    right = (content / "big" / BIG).read_bytes()
    for wrong in (False, True):
        s3.requests.clear()
        jobs = {}
        for number, (sentence, prefix) in enumerate(kinds.items()):
            begin_with(fetcher, s3, prefix, (b"\0" * MIB if wrong else right[:MIB]) + right[MIB : 2 * MIB])
            jobs[sentence] = fetcher.launch(
                source(s3, "private", prefix), credentials=KEYS, type="BaseModel", artifact=f"{wrong}-{number}".lower()
            )
        for sentence, job in jobs.items():
            assert payload(fetcher, job.ok, BIG).read_bytes() == right, sentence
        ranges = [request.range for request in s3.requests if request.is_body and request.key.endswith(BIG)]
        whole = ranges.count("")
        assert (whole, len(ranges) - whole) == ((len(kinds) if wrong else 0), len(kinds))
        shutil.rmtree(store(fetcher))


def test_what_a_dead_node_left_goes_where_nothing_could_prove_it(
    s3: S3Server, fetcher: Fetcher, content: Path, kinds: dict[str, str]
) -> None:
    """A service that neither keeps checksums nor tells of parts."""
    prefix = kinds["a CRC64NVME of the whole"]
    right = (content / "big" / BIG).read_bytes()
    s3.fail(501, "NotImplemented", when=lambda request: request.method == "HEAD")
    begin_with(fetcher, s3, prefix, b"\0" * MIB)
    s3.cut_after(4 * MIB)  # its own beginning it goes on with
    result = run(fetcher, s3, prefix=prefix, type="BaseModel").ok
    assert payload(fetcher, result, BIG).read_bytes() == right
    ranges = [request.range for request in s3.requests if request.is_body and request.key.endswith(BIG)]
    assert ranges == ["", f"bytes={4 * MIB}-"]


def test_two_jobs_that_want_the_same_download_it_once(s3: S3Server, fetcher: Fetcher, content: Path) -> None:
    s3.upload("private", "models/big", content / "big")
    s3.throttle(3 * MIB)
    wanted = source(s3, "private", "models/big")
    jobs = [fetcher.launch(wanted, credentials=KEYS, type="BaseModel", artifact=name) for name in ("one", "two")]
    assert len({job.ok.digest for job in jobs}) == 1
    assert set(s3.bodies("private").values()) == {1}


def test_bytes_that_are_not_what_the_etag_says_are_not_published(s3: S3Server, fetcher: Fetcher, content: Path) -> None:
    s3.spoil(lambda request: request.is_body and request.key.endswith(WEIGHTS))
    reason, message = run(fetcher, s3).failed
    assert reason in ("ChecksumMismatch",), message
    assert WEIGHTS in message or "checksum" in message.lower()
    size = (content / "good" / WEIGHTS).stat().st_size
    assert size not in [path.stat().st_size for path in store(fetcher).glob("blobs/*.incomplete")]
    s3.spoil(None)
    assert run(fetcher, s3).ok


# What goes wrong

BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "no such bucket": ({"bucket": "no-such-bucket"}, "RepositoryNotFound", "bucket no-such-bucket does not exist at"),
    "no bucket's name": ({"bucket": "a..b/c"}, "RepositoryNotFound", "correct source.s3"),
    "an empty prefix": ({"prefix": "nothing/here"}, "EntryNotFound", "has no objects; correct source.s3.prefix"),
    "no such folder": ({"path": "checkpoint-9"}, "EntryNotFound", "the source has no folder 'checkpoint-9'"),
    "patterns that match nothing": (
        {"prefix": "models/base", "type": "BaseModel", "allow": ("*.gguf",)},
        "EntryNotFound",
        "correct allowPatterns and ignorePatterns of the source",
    ),
    "no adapter": ({"prefix": "models/base"}, "InvalidAdapter", "there is no adapter_config.json"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_not_there_is_told(case: str, s3: S3Server, fetcher: Fetcher) -> None:
    options, expected, words = BAD[case]
    reason, message = run(fetcher, s3, **options).failed
    assert (reason, words in message) == (expected, True), message


ANSWERS: dict[str, tuple[int, str, str]] = {
    "slow down": (503, "SlowDown", "RateLimited"),
    "too many requests": (429, "TooManyRequests", "RateLimited"),
    "a server error": (500, "InternalError", "SourceUnreachable"),
    "an expired token": (400, "ExpiredToken", "Unauthorized"),
    "access denied": (403, "AccessDenied", "Unauthorized"),
    "another region": (400, "AuthorizationHeaderMalformed", "RepositoryNotFound"),
    "an answer of another kind": (418, "Teapot", "SourceUnreachable"),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_every_answer_has_its_reason(case: str, s3: S3Server, fetcher: Fetcher) -> None:
    status, code, expected = ANSWERS[case]
    s3.fail(status, code)
    reason, message = run(fetcher, s3).failed
    assert (reason, s3.url in message or "s3://private" in message) == (expected, True), message


def test_nobody_listens(fetcher: Fetcher) -> None:
    with S3Server() as gone:
        pass
    reason, message = fetcher.launch(
        {"s3": {"bucket": "private", "prefix": "x", "endpoint": "http://127.0.0.1:1"}}, credentials=KEYS
    ).failed
    assert gone.requests == []
    assert (reason, "http://127.0.0.1:1" in message) == ("SourceUnreachable", True), message


def test_something_that_is_no_s3_answers(fetcher: Fetcher) -> None:
    asked: list[str] = []
    with _listener(asked) as address:
        reason, message = fetcher.launch(
            {"s3": {"bucket": "private", "prefix": "x", "endpoint": address}}, credentials=KEYS
        ).failed
    assert asked
    assert reason == "SourceUnreachable", message


def test_a_source_that_stops_sending_ends_the_job(s3: S3Server, fetcher: Fetcher, content: Path) -> None:
    s3.upload("private", "models/big", content / "big")
    s3.throttle(1)
    job = run(fetcher, s3, prefix="models/big", type="BaseModel", env={"LORA_OPERATOR_STALL_SECONDS": "2"})
    reason, message = job.failed
    assert reason == "SourceUnreachable"
    assert "nothing arrived for" in message


def test_bad_adapters_are_refused_as_ever(s3: S3Server, fetcher: Fetcher, content: Path, tmp_path: Path) -> None:
    for name, expected in (("pickle-only", "UnsafeFormat"), ("truncated-body", "InvalidAdapter")):
        s3.upload("private", f"bad/{name}", adapters.build(name, content / "good", tmp_path / name))
        assert run(fetcher, s3, prefix=f"bad/{name}").failed[0] == expected


def test_progress_and_phases(s3: S3Server, fetcher: Fetcher, content: Path) -> None:
    s3.upload("private", "models/big", content / "big")
    s3.throttle(2 * MIB)
    job = run(fetcher, s3, prefix="models/big", type="BaseModel")
    assert job.ok
    downloading = [line for line in job.lines if line["phase"] == "Downloading"]
    done = [line["bytesDone"] for line in downloading]
    assert done == sorted(done)
    assert any(0 < count < downloading[0]["bytesTotal"] for count in done)


def _listener(asked: list[str]) -> Any:
    """Something that answers every request with a web page, and remembers its path."""
    from contextlib import contextmanager
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            page = b"<html>please log in</html>"
            self.send_response(200)
            self.send_header("Content-Length", str(len(page)))
            self.end_headers()
            self.wfile.write(page)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  the library's name
            pass

    @contextmanager
    def listening() -> Iterator[str]:
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        server.server_close()

    return listening()
