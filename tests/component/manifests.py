"""The smallest valid manifest of each kind, and ways to change one: shared by the tests of the CRDs."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, Final

from lora_operator.constants import API_VERSION

DELETE: Final = object()

SPECS: Final[dict[str, dict[str, Any]]] = {
    "LoRAAdapter": {
        "source": {"huggingFace": {"repo": "org/sql-lora"}},
        "vllmDeploymentRef": {"name": "llama"},
    },
    "VLLMDeployment": {
        "model": {"source": {"huggingFace": {"repo": "org/llama"}}, "servedNames": ["org/llama"]},
        "engine": {"image": "vllm.example/vllm:1"},
    },
    "ModelCache": {"storage": {"existingClaim": "models"}},
    "ModelArtifact": {
        "cacheRef": {"name": "default"},
        "type": "Adapter",
        "source": {"huggingFace": {"repo": "org/sql-lora"}},
    },
}


def manifest(
    kind: str, changes: Mapping[str, Any] | None = None, *, name: str = "example", namespace: str = "default"
) -> dict[str, Any]:
    """The smallest valid manifest of a kind with these changes: dotted path → value, or DELETE."""
    result: dict[str, Any] = {
        "apiVersion": API_VERSION,
        "kind": kind,
        "metadata": {"name": name, "namespace": namespace},
        "spec": copy.deepcopy(SPECS[kind]),
    }
    for path, value in (changes or {}).items():
        *parents, last = path.split(".")
        node = result
        for part in parents:
            node = node.setdefault(part, {})
        if value is DELETE:
            del node[last]
        else:
            node[last] = value
    return result


def rules_of(schema: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    """(path, message) of every CEL rule below a schema; a list's items are `[]`, a map's values `.*`."""
    for rule in schema.get("x-kubernetes-validations", ()):
        yield (path, rule["message"])
    for name, value in schema.get("properties", {}).items():
        yield from rules_of(value, f"{path}.{name}".lstrip("."))
    if "items" in schema:
        yield from rules_of(schema["items"], f"{path}[]")
    if "additionalProperties" in schema:
        yield from rules_of(schema["additionalProperties"], f"{path}.*")
