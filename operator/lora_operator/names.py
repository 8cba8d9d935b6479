"""Deterministic names, labels and hashes of what the operator makes. Pure: the same want always has the same name.

Names are cut to what Kubernetes allows with a hash at the end, so two long names that begin alike stay different.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from decimal import Decimal
from typing import Any, Final

from lora_operator.constants import (
    COMPONENT_ENGINE,
    COMPONENT_FETCH,
    LABEL_ARTIFACT,
    LABEL_COMPONENT,
    LABEL_DEPLOYMENT,
    LABEL_MANAGED_BY,
    MANAGED_BY,
)

FULL_COMMIT: Final = re.compile(r"^[0-9a-f]{40}$")
_NOT_DNS: Final = re.compile(r"[^a-z0-9]+")
SHORT_REVISION: Final = 8
_SECONDS: Final = {"h": 3600.0, "m": 60.0, "s": 1.0}
_QUANTITY: Final = re.compile(r"^([0-9]+(?:\.[0-9]+)?)(?:([KMGTPE]i|[kMGTPE])|([eE][0-9]+))?$")
MAX_SIZE: Final = 2**63 - 1  # bytes; what a quantity, and an integer in a status, can be
_UNITS: Final = {"": 1} | {
    unit: base**power
    for base, units in ((1000, ("k", "M", "G", "T", "P", "E")), (1024, ("Ki", "Mi", "Gi", "Ti", "Pi", "Ei")))
    for power, unit in enumerate(units, start=1)
}


def short_hash(value: Any, length: int = 10) -> str:
    """Hex digits of the sha256 of the value's canonical JSON form."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def bounded(name: str, limit: int) -> str:
    """`name`, or its beginning and a hash of the whole where it is longer than `limit` characters."""
    if len(name) <= limit:
        return name
    return f"{name[: limit - 9].rstrip('-.')}-{short_hash(name, 8)}"


def dns_slug(text: str, limit: int) -> str:
    """`text` in the characters of a DNS label, for the readable part of a name; may be 'x' when nothing is left."""
    return _NOT_DNS.sub("-", text.lower()).strip("-")[:limit].strip("-") or "x"


def artifact_name(*, source: str, want: dict[str, Any]) -> str:
    """Name of the ModelArtifact for a want: readable by the last part of the repository or prefix, unique by the want's hash.

    At most 51 characters, so that `<artifact>-<attempt>` fits a Job's name and a label value (63). The hash is long enough that
    nobody finds another want with the same name.
    """
    return f"{dns_slug(source.rsplit('/', 1)[-1], 30)}-{short_hash(want, 20)}"


def session_name(namespace: str, artifact: str) -> str:
    """Name of an assumed role's session, which AWS writes into its logs: at most 64 of the characters that it takes."""
    name = f"{namespace}@{artifact}"
    return name if len(name) <= 64 else f"{bounded(namespace, 24)}@{bounded(artifact, 39)}"


def job_name(artifact: str, attempt: int) -> str:
    """Name of the Job of one attempt, and of the Secret that it owns."""
    return bounded(f"{artifact}-{attempt}", 63)


def label_value(name: str) -> str:
    """An object's name as a label value: at most 63 characters."""
    return bounded(name, 63)


def short_revision(revision: str) -> str:
    """A revision as `kubectl get` shows it."""
    return revision[:SHORT_REVISION]


def is_pinned(revision: str) -> bool:
    """Whether a requested revision is a full commit, which can't move."""
    return FULL_COMMIT.match(revision) is not None


def engine_labels(deployment: str) -> dict[str, str]:
    """Labels of a VLLMDeployment's Deployment and pods."""
    return {
        LABEL_MANAGED_BY: MANAGED_BY,
        LABEL_COMPONENT: COMPONENT_ENGINE,
        LABEL_DEPLOYMENT: label_value(deployment),
    }


def engine_selector(deployment: str) -> str:
    """The pods' labels as a selector string, for the scale subresource."""
    return ",".join(f"{key}={value}" for key, value in sorted(engine_labels(deployment).items()))


def fetch_labels(artifact: str) -> dict[str, str]:
    """Labels of an artifact's Jobs and of their pods."""
    return {
        LABEL_MANAGED_BY: MANAGED_BY,
        LABEL_COMPONENT: COMPONENT_FETCH,
        LABEL_ARTIFACT: label_value(artifact),
    }


def modules_config_map(deployment: str) -> str:
    """Name of the ConfigMap with the module list."""
    return bounded(f"{deployment}-modules", 253)


def guard_secret(deployment: str, uid: str, token: str) -> str:
    """Name of the immutable Secret with the gate's token, with hashes of the deployment's UID and of the token.

    So the name stands for the content, and nobody can make such a Secret before us: who has no token can't know its hash.
    """
    return f"{bounded(deployment, 219)}-gate-{short_hash(uid)}-{short_hash(token)}"


def is_of_another_token(mounted: str, token_secret: str) -> bool:
    """Whether a gate's Secret is the same deployment's as `token_secret` with another token: another key has made it."""
    return mounted != token_secret and mounted.rpartition("-")[0] == token_secret.rpartition("-")[0]


def token_secret(job: str, nonce: str) -> str:
    """Name of the Secret with a Job's credentials; `nonce` is random, so that no Secret has the name before the Job names it."""
    return f"{bounded(job, 230)}-{nonce}"


def plugin_config_map(deployment: str, plugin: str) -> str:
    """Name of the immutable ConfigMap with the engine plugin of that hash."""
    return f"{bounded(deployment, 230)}-kit-{plugin}"


def chat_config_map(deployment: str, template: str) -> str:
    """Name of the immutable ConfigMap with a chat template."""
    return f"{bounded(deployment, 230)}-chat-{short_hash(template)}"


def parse_size(quantity: int | str | None) -> int | None:
    """Bytes of a quantity like 10Gi or 1.5e9, rounded up, and MAX_SIZE at most; None for None.

    Negative ones, and exponents of three digits, are refused today; objects that were stored before may have them.
    """
    if quantity is None:
        return None
    if isinstance(quantity, int):
        return min(max(quantity, 0), MAX_SIZE)
    match = _QUANTITY.match(quantity)
    if match is None:
        raise ValueError(f"{quantity!r} is no size like 10Gi")
    number, unit, exponent = match.groups()
    power = min(int((exponent or "e0")[1:]), 99)
    size: Decimal = Decimal(number) * _UNITS[unit or ""] * Decimal(10) ** power
    return min(math.ceil(size), MAX_SIZE)


def parse_duration(text: str | None) -> float | None:
    """Seconds of a duration like 1h30m; None where there is none."""
    parts = re.findall(r"([0-9]+(?:\.[0-9]+)?)([hms])", text or "")
    return sum(float(number) * _SECONDS[unit] for number, unit in parts) or None


def format_size(size: int) -> str:
    """Bytes as Kubernetes quantities show them: 512, 12Ki, 128Mi, 3.2Gi."""
    value = float(size)
    for unit in ("", "Ki", "Mi", "Gi", "Ti"):
        if value < 1023.5 or unit == "Ti":  # what would be shown as 1024 of a unit is 1 of the next
            break
        value /= 1024
    return f"{value:.0f}{unit}" if value >= 10 or not unit else f"{value:.1f}{unit}".replace(".0", "")
