"""The small objects beside the engines: owned, named deterministically, and the gate's token where it belongs."""

from __future__ import annotations

import base64
import gzip
import json
from typing import Any

import pytest

from lora_operator.desired.children import (
    build_chat_config_map,
    build_guard_secret,
    build_modules_config_map,
    build_plugin_config_map,
    build_service,
    guard_token,
    plugin_hash,
)
from lora_operator.names import engine_labels, guard_secret, is_of_another_token
from lora_operator.plan.adapter_list import ModuleList, encode_for_config_map
from tests.unit.builders import make_deployment, make_module

KEY = b"k" * 32
FILES = {"plugin.py": "print()", "__init__.py": ""}
TOKEN = guard_token(KEY, make_deployment())
CHILDREN: dict[str, dict[str, Any]] = {
    "Service": build_service(make_deployment()),
    "kit": build_plugin_config_map(make_deployment(), FILES),
    "chat template": build_chat_config_map(make_deployment(model={"chatTemplate": "{{ x }}"})) or {},
    "modules": build_modules_config_map(make_deployment(), "data"),
    "gate": build_guard_secret(make_deployment(), TOKEN),
}


@pytest.mark.parametrize("child", CHILDREN)
def test_every_child_is_owned_and_labelled(child: str) -> None:
    metadata = CHILDREN[child]["metadata"]
    assert metadata["namespace"] == "serving"
    assert metadata["labels"] == engine_labels("llama")
    assert metadata["ownerReferences"] == [
        {
            "apiVersion": "lora-operator.dev/v1alpha1",
            "kind": "VLLMDeployment",
            "name": "llama",
            "uid": "uid-llama",
            "controller": True,
            "blockOwnerDeletion": False,
        }
    ]


@pytest.mark.parametrize("child", [name for name in CHILDREN if name != "gate"])
def test_the_gates_token_is_in_its_secret_only(child: str) -> None:
    text = json.dumps(CHILDREN[child])
    assert TOKEN not in text
    assert base64.b64encode(TOKEN.encode()).decode() not in text


def test_the_service() -> None:
    service = build_service(make_deployment(engine={"port": 9000}))
    assert service["metadata"]["name"] == "llama"
    assert service["spec"] == {
        "selector": engine_labels("llama"),
        "ports": [{"name": "http", "port": 9000, "targetPort": "http", "protocol": "TCP"}],
    }


def test_the_plugin_is_immutable_and_named_by_its_content() -> None:
    first = build_plugin_config_map(make_deployment(), FILES)
    assert first["immutable"] is True
    assert first["data"] == FILES
    assert first["metadata"]["name"] == f"llama-kit-{plugin_hash(FILES)}"
    other = build_plugin_config_map(make_deployment(), FILES | {"plugin.py": "print(1)"})
    assert other["metadata"]["name"] != first["metadata"]["name"]
    assert plugin_hash(dict(reversed(FILES.items()))) == plugin_hash(FILES)


def test_the_module_list() -> None:
    encoded = encode_for_config_map(ModuleList("serving/llama", 3, (make_module(),)))
    body = build_modules_config_map(make_deployment(), encoded)
    assert body["metadata"]["name"] == "llama-modules"
    packed = base64.b64decode(body["binaryData"]["modules.json.gz"])
    assert json.loads(gzip.decompress(packed))["generation"] == 3


def test_the_gates_secret() -> None:
    secret = build_guard_secret(make_deployment(), TOKEN)
    assert (secret["metadata"]["name"], secret["type"]) == (guard_secret("llama", "uid-llama", TOKEN), "Opaque")
    assert secret["immutable"]
    assert base64.b64decode(secret["data"]["token"]).decode() == TOKEN


def test_the_gates_secret_has_another_name_with_another_key() -> None:
    """What is made once and never read has to be told by its name; it does not say the token."""
    mine, lost = (guard_secret("llama", "uid-llama", guard_token(key, make_deployment())) for key in (KEY, b"x" * 32))
    assert is_of_another_token(lost, mine)
    assert not is_of_another_token(mine, mine)
    for other in (
        "llama-gate-0123456789",
        guard_secret("llama", "uid-2", TOKEN),
        guard_secret("mistral", "uid", TOKEN),
    ):
        assert not is_of_another_token(other, mine), "it is no other token of this deployment's"
    assert not any(TOKEN[at : at + 10] in mine for at in range(len(TOKEN) - 9))


OTHERS = {
    "another deployment": guard_token(KEY, make_deployment("mistral")),
    "one of the same name in another namespace": guard_token(KEY, make_deployment(namespace="other")),
    "one that was made anew": guard_token(KEY, make_deployment(uid="uid-2")),
    "another key": guard_token(b"x" * 32, make_deployment()),
}


def test_every_deployment_has_a_token_of_its_own() -> None:
    assert len({TOKEN, *OTHERS.values()}) == len(OTHERS) + 1
    assert len(TOKEN) == 64
    assert guard_token(KEY, make_deployment(generation=9, replicas=5)) == TOKEN, "and keeps it"
