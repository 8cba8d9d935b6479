"""Objects of kinds that are not ours, as typed views: what the operator reads of them, parsed once, and nothing else kept. Pure.

Whatever such an object says is data from outside: its labels, its size and its form can be anybody's. A part of a form that
Kubernetes does not know is read as absent; no body makes a parser raise. Absence never means an end: what a Job or a pod does
not say clearly, it has not done.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final, NamedTuple, Self

from lora_operator.constants import ANNOTATIONS, LABELS

Body = Mapping[str, Any]

_LONGEST: Final = 1024  # characters of an annotation
_SELECTED_NODE: Final = "volume.kubernetes.io/selected-node"


class Owner(NamedTuple):
    """The controlling owner of an object."""

    kind: str
    name: str
    uid: str


@dataclass(frozen=True, slots=True, kw_only=True)
class KubeObject:
    """An object of any kind: its metadata, with those of our labels and annotations that are read."""

    name: str
    namespace: str = ""
    uid: str = ""
    generation: int = 0
    resource_version: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)
    owner: Owner | None = None
    created: datetime | None = None
    is_deleting: bool = False
    gone_by: datetime | None = None  # its deletionTimestamp: for a pod with its grace period in it

    @classmethod
    def parse(cls, body: Body) -> Self:
        """The view of a body, whatever its form."""
        return cls(**cls._fields(body))

    @classmethod
    def _fields(cls, body: Body) -> dict[str, Any]:
        metadata = mapping(body.get("metadata"))
        return {
            "name": text_of(metadata.get("name")),
            "namespace": text_of(metadata.get("namespace")),
            "uid": text_of(metadata.get("uid")),
            "generation": number_of(metadata.get("generation")) or 0,
            "resource_version": text_of(metadata.get("resourceVersion")),
            "labels": some_of(metadata.get("labels"), LABELS),
            "annotations": some_of(metadata.get("annotations"), ANNOTATIONS),
            "owner": _controller(metadata),
            "created": parse_time(metadata.get("creationTimestamp")),
            "is_deleting": bool(metadata.get("deletionTimestamp")),
            "gone_by": parse_time(metadata.get("deletionTimestamp")),
        }

    @property
    def key(self) -> tuple[str, str]:
        """(namespace, name), as the store keeps objects by."""
        return (self.namespace, self.name)

    @property
    def version(self) -> str:
        """What changes when somebody changes the object: its generation where it has one, else its resourceVersion."""
        return f"{self.uid}/{self.generation or self.resource_version}"

    def is_controlled_by(self, uid: str) -> bool:
        """Whether the controlling owner is the one with this UID."""
        return self.owner is not None and self.owner.uid == uid


class Namespace(KubeObject):
    """A namespace, with all its labels: selectors ask for any of them, and they are its administrator's."""

    __slots__ = ()

    @classmethod
    def _fields(cls, body: Body) -> dict[str, Any]:
        labels = mapping(mapping(body.get("metadata")).get("labels"))
        return super()._fields(body) | {"labels": some_of(labels, tuple(labels))}


class ObjectCondition(NamedTuple):
    """One condition of an object's status."""

    type: str
    status: str = ""
    reason: str = ""
    message: str = ""
    since: datetime | None = None  # of its last transition

    @property
    def is_true(self) -> bool:
        """Whether it says True: Unknown and an odd value don't."""
        return self.status == "True"

    @property
    def is_false(self) -> bool:
        """Whether it says False, which is more than not to say True."""
        return self.status == "False"


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim(KubeObject):
    """A PersistentVolumeClaim."""

    phase: str = ""
    capacity: str | None = None  # of the volume behind it
    access_modes: tuple[
        str, ...
    ] = ()  # asked for, which never changes; what a volume could do besides is in the status
    volume_mode: str = ""
    storage_class: str | None = None
    selected_node: str | None = None  # the scheduler's choice for the first pod

    @classmethod
    def _fields(cls, body: Body) -> dict[str, Any]:
        spec, status = mapping(body.get("spec")), mapping(body.get("status"))
        modes, name = spec.get("accessModes"), spec.get("storageClassName")
        annotations = mapping(mapping(body.get("metadata")).get("annotations"))
        return super(Claim, cls)._fields(body) | {
            "phase": text_of(status.get("phase")),
            "capacity": text_of(mapping(status.get("capacity")).get("storage")) or None,
            "access_modes": tuple(text_of(mode) for mode in modes) if isinstance(modes, list | tuple) else (),
            "volume_mode": text_of(spec.get("volumeMode")),
            "storage_class": name if isinstance(name, str) else None,
            "selected_node": text_of(annotations.get(_SELECTED_NODE)) or None,
        }

    @property
    def is_bound(self) -> bool:
        """Whether it has its volume."""
        return self.phase == "Bound"


def parse_time(text: Any) -> datetime | None:
    """A timestamp of the API server, None where there is none, or one that is of no known time zone."""
    try:
        found = datetime.fromisoformat(text)
    except (TypeError, ValueError):
        return None
    return found if found.tzinfo is not None else None


def some_of(values: Any, names: tuple[str, ...]) -> dict[str, str]:
    """Those of an object's labels or annotations, as far as they are texts, and not too long ones."""
    found = mapping(values)
    return {name: found[name][:_LONGEST] for name in names if isinstance(found.get(name), str)}


def mapping(value: Any) -> Mapping[str, Any]:
    """The value where it is an object, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def objects_in(value: Any) -> Iterator[Mapping[str, Any]]:
    """The objects of a list; none where it is no list."""
    return (one for one in value if isinstance(one, Mapping)) if isinstance(value, list | tuple) else iter(())


def text_of(value: Any) -> str:
    """The value where it is a text, else an empty one."""
    return value if isinstance(value, str) else ""


def number_of(value: Any) -> int | None:
    """The value where it is a whole number."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _controller(metadata: Mapping[str, Any]) -> Owner | None:
    for owner in objects_in(metadata.get("ownerReferences")):
        if owner.get("controller"):
            return Owner(text_of(owner.get("kind")), text_of(owner.get("name")), text_of(owner.get("uid")))
    return None


def conditions_of(status: Mapping[str, Any]) -> tuple[ObjectCondition, ...]:
    """The conditions of a status."""
    return tuple(
        ObjectCondition(
            text_of(one.get("type")),
            text_of(one.get("status")),
            text_of(one.get("reason")),
            text_of(one.get("message")),
            parse_time(one.get("lastTransitionTime")),
        )
        for one in objects_in(status.get("conditions"))
    )
