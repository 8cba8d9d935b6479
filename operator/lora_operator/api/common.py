"""What all kinds share: the base model class, metadata, conditions, references, and the envelope that gen.crds reads.

Models are the one source of crds/. They accept camelCase, ignore unknown fields (the API server prunes and refuses them by the
schema), and are frozen: a plan never changes what was observed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, WithJsonSchema
from pydantic.alias_generators import to_camel

from lora_operator.constants import API_VERSION, MAX_SERVED_NAME


class ApiModel(BaseModel):
    """Base of every model that appears in a CRD."""

    model_config = ConfigDict(frozen=True, alias_generator=to_camel, populate_by_name=True, extra="ignore")

    def to_wire(self) -> dict[str, Any]:
        """The camelCase JSON form, without absent (None) fields."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


def cel(*rules: tuple[str, str]) -> dict[str, JsonValue]:
    """(rule, message) pairs as the schema's x-kubernetes-validations, for `json_schema_extra`."""
    return {"x-kubernetes-validations": [{"rule": rule, "message": message} for rule, message in rules]}


def matches(pattern: str) -> str:
    """The CEL rule for a field's `pattern`: gen.crds then leaves `pattern` out, so the rule's message alone is read."""
    quoted = pattern.replace("'", r"\x27")
    return f"self.matches(r'{quoted}')"


def asked_of_new(pattern: str, message: str) -> dict[str, JsonValue]:
    """The CRD's rule where it is stricter than the field's own pattern: objects that were stored before stay readable."""
    return {"pattern": pattern} | cel((matches(pattern), message))


# A part of the pod API that is passed on as it is: the API server checks it when the pod template is applied.
FreeForm = Annotated[dict[str, Any], WithJsonSchema({"type": "object", "x-kubernetes-preserve-unknown-fields": True})]

ObjectName = Annotated[str, Field(min_length=1, max_length=253, pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")]
NamespaceName = Annotated[str, Field(min_length=1, max_length=63, pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")]
# A name that clients write into "model": no comma (it breaks vLLM's metric labels and flags), no @ (the plugin's own internal names), no leading dash.
_SERVED_NAME = r"^[A-Za-z0-9_][A-Za-z0-9._:/-]*$"
ServedName = Annotated[
    str,
    Field(
        min_length=1,
        max_length=MAX_SERVED_NAME,
        pattern=_SERVED_NAME,
        json_schema_extra=cel(
            (
                matches(_SERVED_NAME),
                "a served name begins with a letter, digit or '_' and holds only letters, digits and '.', '_', '-', ':', '/'",
            )
        ),
    ),
]


class Metadata(ApiModel):
    """The part of metav1.ObjectMeta that the operator reads."""

    name: str
    namespace: str = ""
    uid: str = ""
    generation: int = 0
    resource_version: str = ""
    labels: dict[str, str] = Field(default_factory=dict)
    annotations: dict[str, str] = Field(default_factory=dict)
    creation_timestamp: datetime | None = None
    deletion_timestamp: datetime | None = None


class StatusCondition(ApiModel):
    """metav1.Condition."""

    type: str = Field(description="Type of the condition.", max_length=316)
    status: Literal["True", "False", "Unknown"] = Field(description="True, False or Unknown.")
    reason: str = Field(description="One word for the cause; docs/reasons.md lists them all.", max_length=1024)
    message: str = Field(
        default="", description="What happened, to which object, and what happens next.", max_length=32768
    )
    last_transition_time: datetime = Field(description="When status last changed.")
    observed_generation: int | None = Field(
        default=None, description="The metadata.generation that the condition speaks of."
    )


Conditions = Annotated[
    tuple[StatusCondition, ...],
    Field(
        default=(),
        description="What is true of the object now, and why not.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
    ),
]


class LocalRef(ApiModel):
    """A reference to an object of a known kind in the same namespace."""

    name: ObjectName = Field(description="Name of the object.")


class NamespacedRef(ApiModel):
    """A reference to an object of a known kind, by default in the same namespace."""

    name: ObjectName = Field(description="Name of the object.")
    namespace: NamespaceName | None = Field(
        default=None, description="Namespace of the object; default: the referrer's own."
    )


class SecretKeyRef(ApiModel):
    """One key of a Secret in the same namespace."""

    name: ObjectName = Field(description="Name of the Secret, in the same namespace as this object.")
    key: str = Field(
        default="token",
        min_length=1,
        max_length=253,
        pattern=r"^[-._a-zA-Z0-9]+$",
        description="Key inside the Secret.",
    )


class LabelSelectorRequirement(ApiModel):
    """metav1.LabelSelectorRequirement."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            (
                "(self.operator in ['In', 'NotIn']) == (has(self.values) && size(self.values) > 0)",
                "values are required with operator In or NotIn, and not allowed with Exists or DoesNotExist",
            )
        )
    )

    key: str = Field(description="Label key.", max_length=316)
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist"] = Field(description="How the values are compared.")
    values: tuple[Annotated[str, Field(max_length=63)], ...] = Field(
        default=(), description="Label values.", max_length=64
    )


class LabelSelector(ApiModel):
    """metav1.LabelSelector."""

    match_labels: dict[str, Annotated[str, Field(max_length=63)]] = Field(
        default={}, description="Labels that must be equal.", max_length=32
    )
    match_expressions: tuple[LabelSelectorRequirement, ...] = Field(
        default=(), description="Label requirements, all of which must hold.", max_length=32
    )


@dataclass(frozen=True)
class PrinterColumn:
    """One column of `kubectl get`."""

    name: str
    json_path: str
    type: Literal["string", "integer", "date", "boolean"] = "string"
    description: str = ""
    priority: int = 0


@dataclass(frozen=True)
class ResourceInfo:
    """The envelope of a kind: what a CRD needs beside the schema of spec and status."""

    kind: str
    plural: str
    singular: str
    short_names: tuple[str, ...]
    spec: type[ApiModel]
    status: type[ApiModel]
    description: str
    columns: tuple[PrinterColumn, ...]
    scale: bool = False
    rules: tuple[tuple[str, str], ...] = ()  # CEL (rule, message) over the whole object, for what its name must be
    categories: tuple[str, ...] = field(default=("lora-operator",))


class Resource(ApiModel):
    """An object of one of our kinds as read from the API server."""

    api_version: str = API_VERSION
    metadata: Metadata

    @property
    def key(self) -> tuple[str, str]:
        """(namespace, name), by which other objects refer to it."""
        return (self.metadata.namespace, self.metadata.name)


AGE = PrinterColumn("Age", ".metadata.creationTimestamp", "date")


def reason_column(condition: str = "Ready") -> PrinterColumn:
    """The column that shows why `condition` is as it is."""
    return PrinterColumn("Reason", f'.status.conditions[?(@.type=="{condition}")].reason')
