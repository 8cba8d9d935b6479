"""The download program against Google Cloud Storage's API (fake-gcs-server) and Azure Blob Storage's (Azurite): one behaviour for both."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from e2e.fixtures.buckets import AZURE_ACCOUNT, AZURE_KEY, AzureServer, GcsServer, Seen
from lora_operator.wire.jobs import FetchResult
from tests.component.fetch_support import Fetcher, Job, until

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MIB = 1 << 20


@dataclass(frozen=True)
class Kind:
    """One of the two services with a bucket `models`."""

    scheme: str
    service: GcsServer | AzureServer
    keys: Mapping[str, str]

    def start(
        self, fetcher: Fetcher, prefix: str = "adapters/sql", *, keys: Mapping[str, str] | None, **options: Any
    ) -> Job:
        source: dict[str, Any] = {"bucket": "models", "endpoint": self.service.url}
        if isinstance(self.service, AzureServer):
            source = {"account": AZURE_ACCOUNT, "container": "models", "endpoint": self.service.endpoint}
        source |= options.pop("source", {})
        return fetcher.launch({self.scheme: {"prefix": prefix, **source}}, credentials=keys, **options)

    def run(self, fetcher: Fetcher, prefix: str = "adapters/sql", **options: Any) -> Job:
        return self.start(fetcher, prefix, **{"keys": self.keys, **options}).wait()


@pytest.fixture(scope="module")
def service_key(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The key of a service account, which also says what no key may say."""
    import subprocess

    pem = subprocess.run(
        ["openssl", "genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout
    key = {
        "type": "service_account",
        "client_email": "tests@tests.example",
        "private_key": pem,
        "private_key_id": "1",
        "token_uri": "http://127.0.0.1:1/token",
        "gcs_base_url": "http://127.0.0.1:1",
        "disable_oauth": True,
    }
    return json.dumps(key, indent=2)


@pytest.fixture(scope="module", params=["gcs", "azure"])
def running(request: pytest.FixtureRequest, content: Path, service_key: str) -> Iterator[Kind]:
    with GcsServer() if request.param == "gcs" else AzureServer() as service:
        service.create("models")
        service.upload("models", "models/base", content / "base")
        service.upload("models", "models/big", content / "big")
        key = {"key.json": service_key} if request.param == "gcs" else {"AZURE_STORAGE_ACCOUNT_KEY": AZURE_KEY}
        yield Kind(request.param, service, key)


@pytest.fixture
def kind(running: Kind, content: Path) -> Kind:
    running.service.reset()
    running.service.upload("models", "adapters/sql", content / "good")
    return running


@pytest.fixture(scope="module")
def seed(running: Kind, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A cache with the base model, and the path of its view."""
    folder = tmp_path_factory.mktemp("seed")
    (folder / "cache").mkdir()
    fetch = Fetcher("", folder / "cache", folder / "jobs")
    result = running.run(fetch, "models/base/", type="BaseModel", artifact="base").ok
    names = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert [file.path for file in fetch.manifest(result).files] == names
    return folder / "cache", result.path


@pytest.fixture
def fetcher(tmp_path: Path, seed: tuple[Path, str]) -> Fetcher:
    shutil.copytree(seed[0], tmp_path / "cache", symlinks=True)
    return Fetcher("", tmp_path / "cache", tmp_path / "jobs", base=seed[1])


def payload(fetcher: Fetcher, result: FetchResult) -> Path:
    return (fetcher.cache / result.path / WEIGHTS).resolve()


def test_an_adapter_is_published_and_not_downloaded_twice(kind: Kind, fetcher: Fetcher, content: Path) -> None:
    first = kind.run(fetcher, artifact="sql")
    result, manifest = first.ok, fetcher.manifest(first.ok)
    assert [file.path for file in manifest.files] == [CONFIG, WEIGHTS]
    title = "gs://models/adapters/sql" if kind.scheme == "gcs" else f"azure://{AZURE_ACCOUNT}/models/adapters/sql"
    assert manifest.repo == title
    assert re.fullmatch("[0-9a-f]{64}", result.resolved_revision)
    assert payload(fetcher, result).parent.parent.parent == fetcher.cache / kind.scheme
    assert payload(fetcher, result).read_bytes() == (content / "good" / WEIGHTS).read_bytes()
    assert kind.service.bodies() == {CONFIG: 1, WEIGHTS: 1}
    assert all(seen.authorization for seen in kind.service.seen)
    text = first.stdout + first.stderr
    assert not any(secret in text for secret in (AZURE_KEY, "PRIVATE KEY"))
    again = kind.run(fetcher, artifact="sql").ok
    assert (again.path, again.resolved_revision) == (result.path, result.resolved_revision)
    assert kind.service.bodies() == {CONFIG: 1, WEIGHTS: 1}
    assert fetcher.leaked() == []


def test_without_a_secret_nothing_is_signed_and_what_is_cached_stays_closed(kind: Kind, fetcher: Fetcher) -> None:
    assert kind.run(fetcher).ok
    kind.service.seen.clear()
    if kind.scheme == "gcs":  # the service judges no signatures
        kind.service.refuse = lambda seen: 401 if not seen.authorization else None
    ambient = {
        "GOOGLE_SERVICE_ACCOUNT_KEY": kind.keys.get("key.json", ""),
        "GOOGLE_BEARER_TOKEN": "ambient-token",
        "AZURE_STORAGE_ACCOUNT_KEY": AZURE_KEY,
        "AZURE_STORAGE_TOKEN": "ambient-token",
    }
    reason, message = kind.run(fetcher, keys=None, env=ambient).failed
    assert kind.service.seen
    assert not any(seen.authorization for seen in kind.service.seen)
    if kind.scheme == "gcs":
        assert (reason, "can't be read anonymously" in message) == ("Unauthorized", True), message
    else:  # Azure hides what a caller may not see
        assert reason in ("Unauthorized", "RepositoryNotFound"), message


def test_what_lists_but_can_not_be_read_is_told_before_anything_is_downloaded(kind: Kind, fetcher: Fetcher) -> None:
    assert kind.run(fetcher).ok
    kind.service.seen.clear()
    kind.service.refuse = lambda seen: 403 if seen.path.endswith(WEIGHTS) else None
    reason, message = kind.run(fetcher).failed
    assert (reason, "is denied to the credentials of the Secret" in message) == ("Unauthorized", True), message
    assert kind.service.bodies() == {}


def test_what_is_not_there_is_told(kind: Kind, fetcher: Fetcher) -> None:
    assert kind.run(fetcher, "adapters/none").failed[0] == "EntryNotFound"
    other = {"bucket": "no-such-bucket"} if kind.scheme == "gcs" else {"container": "no-such-container"}
    reason, message = kind.run(fetcher, source=other).failed
    assert (reason, "does not exist" in message) == ("RepositoryNotFound", True), message


def test_a_changed_object_is_another_revision(kind: Kind, fetcher: Fetcher, content: Path) -> None:
    first = kind.run(fetcher, artifact="sql").ok
    kind.service.upload("models", "adapters/sql", content / "other")
    second = kind.run(fetcher, artifact="sql").ok
    assert (second.resolved_revision, second.digest) != (first.resolved_revision, first.digest)
    assert payload(fetcher, first).read_bytes() == (content / "good" / WEIGHTS).read_bytes()
    assert payload(fetcher, second).read_bytes() == (content / "other" / WEIGHTS).read_bytes()


def test_a_change_in_mid_download_is_an_error_and_never_a_mixture(kind: Kind, fetcher: Fetcher, content: Path) -> None:
    def change(seen: Seen) -> None:
        if seen.is_body and seen.path.endswith(WEIGHTS):
            kind.service.before = None
            kind.service.upload("models", "adapters/sql", content / "other")

    kind.service.before = change
    reason, message = kind.run(fetcher).failed
    assert (reason, "nothing was published" in message) == ("SourceChanged", True), message
    assert kind.run(fetcher).ok


def test_a_killed_download_goes_on_where_it_stopped(kind: Kind, fetcher: Fetcher) -> None:
    kind.service.rate = 4 * MIB
    first = kind.start(fetcher, "models/big", keys=kind.keys, type="BaseModel")
    until(lambda: any(path.stat().st_size > MIB for path in fetcher.cache.glob(f"{kind.scheme}/*/blobs/*.incomplete")))
    first.kill()
    kind.service.rate = None
    kind.service.seen.clear()
    assert kind.run(fetcher, "models/big", type="BaseModel").ok
    (again,) = [seen.range for seen in kind.service.seen if seen.is_body and seen.path.endswith("model.safetensors")]
    assert int(again.removeprefix("bytes=").partition("-")[0]) > MIB
    assert fetcher.leaked() == []


def test_a_byte_that_flips_in_transit_is_seen(kind: Kind, fetcher: Fetcher) -> None:
    kind.service.spoil = lambda seen: seen.is_body and seen.path.endswith(WEIGHTS)
    reason, message = kind.run(fetcher).failed
    assert (reason, f"'{WEIGHTS}' arrived wrong: its MD5 is" in message) == ("ChecksumMismatch", True), message
    kind.service.spoil = None
    assert kind.run(fetcher).ok


def test_server_errors_are_tried_again_and_told(kind: Kind, fetcher: Fetcher) -> None:
    kind.service.refuse = lambda seen: 503
    reason, message = kind.run(fetcher).failed
    assert reason == "SourceUnreachable"
    assert kind.service.url in message


def test_a_key_that_is_none_is_told_and_never_shown(kind: Kind, fetcher: Fetcher) -> None:
    name = next(iter(kind.keys))
    reason, message = kind.run(fetcher, keys={name: "no-key-of-any-kind"}).failed
    assert reason == "Unauthorized", message
    assert "no-key-of-any-kind" not in message


def test_a_shared_access_signature_reads_and_is_never_shown(kind: Kind, fetcher: Fetcher) -> None:
    if not isinstance(kind.service, AzureServer):
        kind.service.create("other")  # Google has none: one bucket's objects are not another's
        assert kind.run(fetcher, source={"bucket": "other"}).failed[0] == "EntryNotFound"
        return
    token = kind.service.signature("models")
    job = kind.run(fetcher, keys={"AZURE_STORAGE_SAS_TOKEN": "?" + token})
    assert job.ok.files == 2
    kind.service.refuse = lambda seen: 403
    refused = kind.run(fetcher, keys={"AZURE_STORAGE_SAS_TOKEN": token})
    assert refused.failed[0] == "Unauthorized"
    signature = token.rpartition("sig=")[2]
    assert signature not in job.stdout + job.stderr + refused.stdout + refused.stderr + refused.failed[1]


def test_what_is_public_needs_no_credentials(kind: Kind, fetcher: Fetcher, content: Path) -> None:
    source: dict[str, str] = {}
    if isinstance(kind.service, AzureServer):
        kind.service.create("public", public=True)
        kind.service.upload("public", "adapters/sql", content / "good")
        source = {"container": "public"}
    kind.service.seen.clear()
    assert kind.run(fetcher, keys=None, source=source).ok.files == 2
    assert not any(seen.authorization for seen in kind.service.seen)
