"""The small objects beside the engines' Deployment: Service, plugin and module-list ConfigMaps, and the gate's Secret."""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Mapping
from typing import Any

from lora_operator.api.deployment import VLLMDeployment
from lora_operator.constants import CHAT_TEMPLATE_KEY, GUARD_KEY, MODULES_KEY
from lora_operator.desired.common import owner_reference
from lora_operator.names import (
    chat_config_map,
    engine_labels,
    guard_secret,
    modules_config_map,
    plugin_config_map,
    short_hash,
)


def guard_token(master_key: bytes, deployment: VLLMDeployment) -> str:
    """The deployment's own token: derived, so that no right to read Secrets is needed to know it again."""
    metadata = deployment.metadata
    text = f"gate/{metadata.namespace}/{metadata.name}/{metadata.uid}"
    return hmac.new(master_key, text.encode(), hashlib.sha256).hexdigest()


def plugin_hash(files: Mapping[str, str]) -> str:
    """Hash that names a plugin."""
    return short_hash(dict(files))


def build_service(deployment: VLLMDeployment) -> dict[str, Any]:
    """A ClusterIP Service over the engine pods."""
    port = deployment.spec.engine.port
    return _object(
        deployment,
        "Service",
        deployment.metadata.name,
        {
            "spec": {
                "selector": engine_labels(deployment.metadata.name),
                "ports": [{"name": "http", "port": port, "targetPort": "http", "protocol": "TCP"}],
            }
        },
    )


def build_disruption_budget(deployment: VLLMDeployment) -> dict[str, Any]:
    """Has evictions take one engine pod at a time, and none while another one is missing. Pods that are not Ready may always be
    evicted: they serve nobody."""
    spec = {
        "selector": {"matchLabels": engine_labels(deployment.metadata.name)},
        "maxUnavailable": 1,
        "unhealthyPodEvictionPolicy": "AlwaysAllow",
    }
    budget = _object(deployment, "PodDisruptionBudget", deployment.metadata.name, {"spec": spec})
    return budget | {"apiVersion": "policy/v1"}


def build_plugin_config_map(deployment: VLLMDeployment, files: Mapping[str, str]) -> dict[str, Any]:
    """The engine plugin, immutable and named by its hash."""
    return _object(
        deployment,
        "ConfigMap",
        plugin_config_map(deployment.metadata.name, plugin_hash(files)),
        {"immutable": True, "data": dict(files)},
    )


def build_chat_config_map(deployment: VLLMDeployment) -> dict[str, Any] | None:
    """The chat template, immutable and named by its hash, so that pods of an older spec keep theirs; None where there is none."""
    template = deployment.spec.model.chat_template
    if template is None:
        return None
    name = chat_config_map(deployment.metadata.name, template)
    return _object(deployment, "ConfigMap", name, {"immutable": True, "data": {CHAT_TEMPLATE_KEY: template}})


def build_modules_config_map(deployment: VLLMDeployment, encoded: str) -> dict[str, Any]:
    """The module list (base64 of gzip of JSON) that starting pods boot from."""
    return _object(
        deployment,
        "ConfigMap",
        modules_config_map(deployment.metadata.name),
        {"binaryData": {MODULES_KEY: encoded}},
    )


def build_guard_secret(deployment: VLLMDeployment, token: str) -> dict[str, Any]:
    """The token that opens the gate of this deployment's pods to the operator."""
    return _object(
        deployment,
        "Secret",
        guard_secret(deployment.metadata.name, deployment.metadata.uid, token),
        {"type": "Opaque", "immutable": True, "data": {GUARD_KEY: base64.b64encode(token.encode()).decode()}},
    )


def _object(deployment: VLLMDeployment, kind: str, name: str, body: dict[str, Any]) -> dict[str, Any]:
    metadata = {
        "name": name,
        "namespace": deployment.metadata.namespace,
        "labels": engine_labels(deployment.metadata.name),
        "ownerReferences": [owner_reference(deployment, "VLLMDeployment")],
    }
    return {"apiVersion": "v1", "kind": kind, "metadata": metadata} | body
