"""Bodies of our own kinds, before a model parses them and where it can't: nothing is kept that others wrote on them. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from pydantic import ValidationError

from lora_operator.constants import ANNOTATIONS, LABELS
from lora_operator.kube.objects import mapping, objects_in, some_of

Body = dict[str, Any]

MAX_NESTING: Final = 100  # levels of an object; pods nest less than 20 deep, and what writes JSON gives up at some 250
MAX_INVALID_MESSAGE: Final = 1000
_DROPPED: Final = ("managedFields", "finalizers", "labels", "annotations", "ownerReferences")


def slim(body: Mapping[str, Any]) -> Body:
    """The body without what anybody may fill with any amount: of labels and annotations those that are read, of owners the
    controller. It shares its parts with `body`."""
    metadata = mapping(body.get("metadata"))
    kept = {name: value for name, value in metadata.items() if name not in _DROPPED}
    if labels := some_of(metadata.get("labels"), LABELS):
        kept["labels"] = labels
    if annotations := some_of(metadata.get("annotations"), ANNOTATIONS):
        kept["annotations"] = annotations
    if owners := [owner for owner in objects_in(metadata.get("ownerReferences")) if owner.get("controller")]:
        kept["ownerReferences"] = owners[:1]
    return {**body, "metadata": kept}


def is_too_deep(body: Mapping[str, Any]) -> bool:
    """Whether something of it nests deeper than what writes and compares it can follow."""
    level: list[Any] = [body]
    for _ in range(MAX_NESTING):
        below = (child for node in level for child in (node.values() if isinstance(node, dict) else node))
        level = [child for child in below if isinstance(child, dict | list)]
        if not level:
            return False
    return True


def describe_invalid(error: ValidationError) -> str:
    """The fields that don't fit and why, without the values: a status is read by others than a spec."""
    parts = [
        f"{'.'.join(str(part) for part in item['loc'])}: {item['msg']}" for item in error.errors(include_input=False)
    ]
    return "; ".join(parts)[:MAX_INVALID_MESSAGE]
