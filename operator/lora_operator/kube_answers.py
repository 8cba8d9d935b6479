"""What the API server's answers mean in our own errors, and the bodies that kube.py sends: pure, so that kube.py is only I/O."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final

from lora_operator.constants import FIELD_MANAGER
from lora_operator.errors import (
    AlreadyExistsError,
    ConflictError,
    ForbiddenError,
    InvalidObjectError,
    KubeError,
    NotFoundError,
    UnavailableError,
)
from lora_operator.names import short_hash

Body = dict[str, Any]

MAX_EVENT_MESSAGE: Final = 1024

_REFUSALS: Final[Mapping[int, type[KubeError]]] = {
    400: InvalidObjectError,
    401: UnavailableError,
    403: ForbiddenError,
    404: NotFoundError,
    409: ConflictError,
    410: UnavailableError,
    413: InvalidObjectError,
    422: InvalidObjectError,
    429: UnavailableError,
}


def refusal(what: str, status: int, answer: bytes) -> KubeError:
    """The error for an answer of the API server, with its own words."""
    reason = None
    try:
        said = json.loads(answer)
        message, reason = said["message"], said.get("reason")
    except (ValueError, KeyError, TypeError):
        message = answer[:500].decode(errors="replace").strip()
    kind = _REFUSALS.get(status, UnavailableError if status >= 500 else KubeError)
    if kind is ConflictError and reason == "AlreadyExists":  # else e.g. two at once of a quota: to be tried again
        kind = AlreadyExistsError
    return kind(f"{what}: {message or 'no message'} ({status})")


def parsed(what: str, answer: bytes) -> Body:
    """The object in an answer."""
    try:
        found = json.loads(answer)
    except ValueError as error:
        raise UnavailableError(f"{what}: the API server's answer is not JSON") from error
    if not isinstance(found, dict):
        raise UnavailableError(f"{what}: the API server's answer is not an object")
    return found


def build_event(regarding: Mapping[str, Any], *, event_type: str, reason: str, message: str) -> Body:
    """A core/v1 Event about an object or a reference to one; equal events have equal names."""
    metadata = regarding.get("metadata") or regarding
    namespace, message = metadata.get("namespace") or "default", message[:MAX_EVENT_MESSAGE]
    digest = short_hash([regarding.get("kind"), metadata.get("uid"), event_type, reason, message], 16)
    name, now = (
        f"{str(metadata.get('name'))[:230].rstrip('-.')}.{digest}",
        datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    )
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": name, "namespace": namespace},
        "involvedObject": {
            "apiVersion": regarding.get("apiVersion"),
            "kind": regarding.get("kind"),
            "namespace": namespace,
            "name": metadata.get("name"),
            "uid": metadata.get("uid"),
        },
        "type": event_type,
        "reason": reason,
        "message": message,
        "count": 1,
        "firstTimestamp": now,
        "lastTimestamp": now,
        "source": {"component": FIELD_MANAGER},
        "reportingComponent": FIELD_MANAGER,
    }
