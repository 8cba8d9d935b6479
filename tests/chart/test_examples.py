"""Every manifest that a reader may copy, in examples/ and README.md, says only what the kinds have."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from lora_operator.api import LoRAAdapter, ModelArtifact, ModelCache, VLLMDeployment
from lora_operator.api.common import Resource
from lora_operator.constants import API_VERSION

ROOT = Path(__file__).resolve().parents[2]
MODELS: dict[str, type[Resource]] = {
    "LoRAAdapter": LoRAAdapter,
    "ModelArtifact": ModelArtifact,
    "ModelCache": ModelCache,
    "VLLMDeployment": VLLMDeployment,
}


def documents() -> list[tuple[str, dict[str, Any]]]:
    """(where, object) for each YAML document of the examples and of README's fenced blocks."""
    texts = {str(path.relative_to(ROOT)): [path.read_text()] for path in sorted((ROOT / "examples").glob("*.yaml"))}
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        texts[str(path.relative_to(ROOT))] = re.findall(
            r"^```yaml\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL
        )
    found = [(where, item) for where, blocks in texts.items() for block in blocks for item in yaml.safe_load_all(block)]
    return [(where, item) for where, item in found if isinstance(item, dict) and "kind" in item]


OURS = [(where, item) for where, item in documents() if item["kind"] in MODELS]


def test_examples_and_readme_have_manifests() -> None:
    assert {"examples/quickstart.yaml", "examples/private-adapter.yaml", "examples/s3.yaml", "README.md"} <= {
        where for where, _ in OURS
    }


@pytest.mark.parametrize(
    ("where", "manifest"), OURS, ids=[f"{where}:{item['kind']}/{item['metadata']['name']}" for where, item in OURS]
)
def test_no_field_of_the_manifest_is_unknown(where: str, manifest: dict[str, Any]) -> None:
    assert manifest["apiVersion"] == API_VERSION, where
    parsed = MODELS[manifest["kind"]].model_validate(manifest)
    kept = parsed.model_dump(mode="json", by_alias=True, exclude_unset=True)
    assert kept["spec"] == manifest["spec"]


def test_an_adapter_of_another_namespace_is_admitted_by_its_deployment() -> None:
    from lora_operator.plan.admission import admit

    objects = [MODELS[item["kind"]].model_validate(item) for where, item in OURS if where.startswith("examples/")]
    fleets = {item.key: item for item in objects if isinstance(item, VLLMDeployment)}
    adapters = [item for item in objects if isinstance(item, LoRAAdapter)]
    assert adapters
    for adapter in adapters:
        labels = {"kubernetes.io/metadata.name": adapter.metadata.namespace}
        verdict = admit(adapter, fleets.get(adapter.deployment_key), namespace_labels=labels)
        assert verdict.is_true, verdict.message


def test_every_secret_of_a_source_may_be_read_by_a_role_for_that_secret_alone() -> None:
    objects = [item for where, item in documents() if where.startswith("examples/")]
    readable = {
        (item["metadata"]["namespace"], name)
        for item in objects
        if item["kind"] == "Role"
        for rule in item["rules"]
        for name in rule["resourceNames"]
    }
    bound = {item["metadata"]["namespace"] for item in objects if item["kind"] == "RoleBinding"}
    wanted = {
        (item["metadata"]["namespace"], member[ref]["name"])
        for item in objects
        if item["kind"] in ("LoRAAdapter", "VLLMDeployment")
        for source in (item["spec"].get("source") or item["spec"]["model"]["source"],)
        for member in (source.get("huggingFace") or source["s3"],)
        for ref in ("tokenSecretRef", "credentialsSecretRef")
        if ref in member
    }
    assert wanted == readable
    assert bound == {namespace for namespace, _ in wanted}
