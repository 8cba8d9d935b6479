"""The download program against a real OCI registry: artifacts and images, tags and digests, and who may pull."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from e2e.fixtures.registry import RegistryServer, docker_config
from tests.component.fetch_support import Fetcher, Job

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MIB = 1 << 20


@pytest.fixture(scope="module")
def registry() -> Iterator[RegistryServer]:
    with RegistryServer() as server:
        yield server


@pytest.fixture(scope="module")
def closed() -> Iterator[RegistryServer]:
    with RegistryServer(closed=True) as server:
        yield server


@pytest.fixture(scope="module")
def seed(registry: RegistryServer, content: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A cache with the base model, from an image, and the path of its view."""
    folder = tmp_path_factory.mktemp("seed")
    (folder / "cache").mkdir()
    files = {f"models/{path.name}": path.read_bytes() for path in sorted((content / "base").iterdir())}
    weights = {name: data for name, data in files.items() if name.endswith(".safetensors")}
    others = {name: data for name, data in files.items() if name not in weights}
    layers = [registry.archive("base", {"bin/sh": b"#!", **others}), registry.archive("base", weights, packed=False)]
    registry.push("base", "v1", layers)
    fetch = Fetcher("", folder / "cache", folder / "jobs")
    result = run(fetch, registry, "base:v1", path="models", type="BaseModel", artifact="base").ok
    names = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert [file.path for file in fetch.manifest(result).files] == names
    assert fetch.leaked() == []
    return folder / "cache", result.path


@pytest.fixture
def fetcher(tmp_path: Path, seed: tuple[Path, str]) -> Fetcher:
    shutil.copytree(seed[0], tmp_path / "cache", symlinks=True)
    return Fetcher("", tmp_path / "cache", tmp_path / "jobs", base=seed[1])


def run(fetcher: Fetcher, server: RegistryServer, name: str, *, config: str | None = None, **options: Any) -> Job:
    allowed = options.pop("allowed", [server.url])
    size = options.pop("maxBytes", 64 * MIB)
    source = {"reference": f"{server.address}/{name}", "maxBytes": size, "allowedEndpoints": allowed}
    credentials = {".dockerconfigjson": config} if config is not None else None
    return fetcher.launch({"oci": source}, credentials=credentials, **options).wait()


def artifact(
    server: RegistryServer, repository: str, content: Path, adapter: str = "good", tag: str = "v1"
) -> tuple[str, list[Any]]:
    """An adapter as ORAS pushes it: a layer for each file. Its digest, and the layers."""
    files = {path.name: path.read_bytes() for path in sorted((content / adapter).iterdir())}
    layers = [server.file(repository, name, data) for name, data in files.items()]
    return server.push(repository, tag, layers), layers


def test_an_artifact_by_tag_and_by_digest(registry: RegistryServer, fetcher: Fetcher, content: Path) -> None:
    digest, _ = artifact(registry, "team-a/sql", content)
    result = run(fetcher, registry, "team-a/sql:v1", artifact="sql").ok
    manifest = fetcher.manifest(result)
    assert [file.path for file in manifest.files] == [CONFIG, WEIGHTS]
    assert (result.resolved_revision, manifest.repo) == (digest, f"oci://{registry.address}/team-a/sql")
    blob = (fetcher.cache / result.path / WEIGHTS).resolve()
    assert blob.read_bytes() == (content / "good" / WEIGHTS).read_bytes()
    stamp = blob.stat()
    other, _ = artifact(registry, "team-a/sql", content, "other")  # the tag moves
    assert run(fetcher, registry, f"team-a/sql:v1@{digest}", artifact="sql").ok.path == result.path
    assert blob.stat() == stamp, "it was downloaded again"
    moved = run(fetcher, registry, "team-a/sql:v1", artifact="sql").ok
    assert (moved.resolved_revision, moved.path == result.path) == (other, False)
    assert fetcher.leaked() == []


def test_an_image_is_its_layers_one_over_the_other(registry: RegistryServer, fetcher: Fetcher, content: Path) -> None:
    good = {path.name: path.read_bytes() for path in sorted((content / "good").iterdir())}
    layers = [
        registry.archive(
            "image", {"m/old/junk.json": b"{}", "m/gone.json": b"{}", f"m/{CONFIG}": b"wrong", f"m/{WEIGHTS}": b"wrong"}
        ),
        registry.archive("image", {"m/.wh.gone.json": b"", "m/old/.wh..wh..opq": b"", f"m/{CONFIG}": good[CONFIG]}),
        registry.file("image", f"m/{WEIGHTS}", good[WEIGHTS]),
    ]
    image = registry.push("image", "linux", layers)
    attestation = registry.push("image", "attestation", [registry.file("image", "sbom.json", b"{}")])
    registry.push_index("image", "latest", (attestation, "unknown"), (image, "linux"))
    result = run(fetcher, registry, "image", path="m").ok
    assert [file.path for file in fetcher.manifest(result).files] == [CONFIG, WEIGHTS]
    assert result.resolved_revision == image
    assert run(fetcher, registry, "image", path="m").ok.path == result.path
    assert fetcher.leaked() == []


def test_a_spoilt_blob_is_never_published(registry: RegistryServer, fetcher: Fetcher, content: Path) -> None:
    _, layers = artifact(registry, "spoilt", content, "other")
    name = next(layer for layer in layers if WEIGHTS in layer["annotations"].values())
    registry.spoil(name["digest"])
    reason, message = run(fetcher, registry, "spoilt:v1").failed
    assert (reason, f"'{WEIGHTS}' arrived wrong: its SHA256 is" in message) == ("ChecksumMismatch", True), message


def test_only_who_may_pull_gets_what_is_cached(closed: RegistryServer, fetcher: Fetcher, content: Path) -> None:
    artifact(closed, "team-a/sql", content)
    config = docker_config(closed.address)
    job = run(fetcher, closed, "team-a/sql:v1", config=config)
    assert job.ok.files == 2
    assert "password-of-the-registry" not in job.stdout + job.stderr
    refused = {
        "set source.oci.credentialsSecretRef": None,
        "put valid ones into it": docker_config(closed.address, password="wrong-password-of-the-registry"),
        f"has no login for {closed.address}": docker_config("other.test"),
        "can't be used": json.dumps({"auths": {closed.address: {}}}),
    }
    for words, other in refused.items():
        reason, message = run(fetcher, closed, "team-a/sql:v1", config=other).failed
        assert (reason, words in message) == ("Unauthorized", True), message
        assert "wrong-password" not in message


def test_what_is_not_there_or_not_fit_is_told(registry: RegistryServer, fetcher: Fetcher, content: Path) -> None:
    registry.push("odd", "v1", [{**registry.file("odd", "", b"data"), "annotations": {}}])
    registry.push("big", "v1", [registry.archive("big", {"zeros.json": bytes(2 * MIB)})])
    expected = {
        "odd:v1": ("InvalidAdapter", "is of type application/octet-stream and has no title"),
        "big:v1": ("InvalidAdapter", "expands to more than the 1.0 MiB of maxSize"),
        "no/such:v1": ("EntryNotFound", "does not exist (404)"),
    }
    for name, (reason, words) in expected.items():
        found, message = run(fetcher, registry, name, maxBytes=MIB).failed
        assert (found, words in message) == (reason, True), message
    found, message = run(fetcher, registry, "odd:v1", allowed=["http://other.test"]).failed
    assert (found, "spec.oci.allowedEndpoints" in message) == ("SourceNotAllowed", True), message
    assert fetcher.leaked() == []
