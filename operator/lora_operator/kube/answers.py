"""What the API server's answers mean in our own errors, and the bodies that kube.py sends: pure, so that kube.py is only I/O."""

from __future__ import annotations

import json
import re
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
MAX_TEXT_NESTING: Final = 250
_STRINGS_AND_BRACKETS: Final = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}]', re.DOTALL)

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
        said = _read(answer)
        message, reason = said["message"], said.get("reason")
    except (ValueError, KeyError, TypeError):
        message = answer[:500].decode(errors="replace").strip()
    kind = _REFUSALS.get(status, UnavailableError if status >= 500 else KubeError)
    if kind is ConflictError and reason == "AlreadyExists":  # else e.g. two at once of a quota: to be tried again
        kind = AlreadyExistsError
    return kind(f"{what}: {message or 'no message'} ({status})")


def flattened(text: bytes) -> bytes:
    """JSON with null in the place of what nests deeper than MAX_TEXT_NESTING: no parser and nothing behind it gives up on it.

    The API server takes 10,000 levels where a field is free in its form. What is left of such an object is still too deep for
    the store, which says so.
    """
    if text.count(b"{") + text.count(b"[") <= MAX_TEXT_NESTING:
        return text
    kept, depth, start = [], 0, 0
    for token in _STRINGS_AND_BRACKETS.finditer(text):
        mark = text[token.start()]
        if mark in b"[{":
            depth += 1
            if depth == MAX_TEXT_NESTING + 1:
                kept += [text[start : token.start()], b"null"]
        elif mark in b"]}":
            if depth == MAX_TEXT_NESTING + 1:
                start = token.end()
            depth -= 1
    return b"".join([*kept, text[start:]])


def parsed(what: str, answer: bytes) -> Body:
    """The object in an answer."""
    try:
        found = _read(answer)
    except ValueError as error:
        raise UnavailableError(f"{what}: the API server's answer is not JSON") from error
    if not isinstance(found, dict):
        raise UnavailableError(f"{what}: the API server's answer is not an object")
    return found


def _read(text: bytes) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        return json.loads(flattened(text))


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
