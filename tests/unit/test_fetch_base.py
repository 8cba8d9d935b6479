"""One request of every kind of source, from the manifest to the store: the names of what lies on volumes and in clusters never change."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from huggingface_hub import set_client_factory

from lora_operator.api import ModelArtifact
from lora_operator.api.sources.source import Source
from lora_operator.desired.job import build_request
from lora_operator.fetch.progress import Reporter
from lora_operator.fetch.sources.base import open_source
from lora_operator.plan.wants import build_artifact
from lora_operator.source_kinds import BY_MEMBER
from tests.unit.builders import make_cache

SHA = "0" * 64
SOURCES: dict[str, dict[str, Any]] = {
    "huggingFace": {"repo": "org/sql", "revision": "v1"},
    "s3": {"bucket": "models", "prefix": "team-a/sql", "endpoint": "https://s3.test"},
    "http": {"files": [{"path": "a.json", "url": "https://models.test/sql/a.json", "sha256": SHA}]},
    "persistentVolumeClaim": {"claimName": "trained", "path": "sql"},
    "local": {"path": "by-hand/sql"},
    "gcs": {"bucket": "models", "prefix": "team-a/sql"},
    "azure": {"account": "team", "container": "models", "prefix": "sql"},
    "oci": {"reference": "registry.test/team/sql:v1"},
}
# The artifact's name, the source's title, the folder of the cache, and where payloads lie in that.
NAMES = {
    "huggingFace": ("sql-abbd7938475711a3c81d", "org/sql", "hub", "hub/models--org--sql/blobs"),
    "s3": ("sql-873c4f08f8022313b5f8", "s3://models/team-a/sql", "s3", "s3/models-934ddbdc0ced58a3/blobs"),
    "http": (
        "sql-28bd4cc02cae5f917c0d",
        "https://models.test/sql",
        "http",
        "http/models-test-443-b8754d86f1b88c89/blobs",
    ),
    "persistentVolumeClaim": (
        "sql-21b6fa5e094adcfe6210",
        "pvc://trained/sql",
        "persistentVolumeClaim",
        "persistentVolumeClaim/trained-a309f773422a1219/blobs",
    ),
    "local": ("sql-20e7c2261ea36d8b347e", "local://by-hand/sql", "artifacts", "by-hand/sql"),
    "gcs": ("sql-608ea3113109bec85587", "gs://models/team-a/sql", "gcs", "gcs/models-b8c9ba8958e7a716/blobs"),
    "azure": (
        "sql-b2c3eab75287f0d66f60",
        "azure://team/models/sql",
        "azure",
        "azure/team-models-a32f4f357b5f1d5e/blobs",
    ),
    "oci": ("sql-3e7a2c6672bece689b38", "oci://registry.test/team/sql", "oci", "oci/sql-0d9fe34a2a57ede8/blobs"),
}


@pytest.fixture(autouse=True)
def the_librarys_own_client() -> Iterator[None]:
    yield
    set_client_factory(httpx2.Client)


def names_of(member: str, root: Path) -> tuple[str, str, str, str]:
    """What is named after such a source."""
    cache = make_cache()
    source = Source.model_validate({member: SOURCES[member]})
    manifest = build_artifact(cache=cache, source=source, base_artifact=None, credentials=None)
    artifact = ModelArtifact.model_validate(manifest)
    request = build_request(artifact, cache, base_model_path=None, with_credentials=False, claim_uid="uid")
    opened = open_source(request.model_copy(update={"cache_root": str(root)}))
    with opened.collected(root, Reporter(on_stall=lambda _: None)):
        blobs = opened.open_store(root).blobs
    return artifact.metadata.name, opened.title, opened.folder, str(blobs.relative_to(root))


@pytest.mark.parametrize("member", BY_MEMBER)
def test_what_is_named_after_a_source_keeps_its_name(member: str, tmp_path: Path) -> None:
    assert names_of(member, tmp_path) == NAMES[member]
