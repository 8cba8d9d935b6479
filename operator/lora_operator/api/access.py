"""How a cache's Jobs get at sources: as whom, through which network, and how their pods are made. A part of ModelCache's spec."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from lora_operator.api.common import ApiModel, FreeForm, LocalRef, ObjectName, asked_of_new, cel, matches
from lora_operator.api.sources.base import HOST
from lora_operator.api.sources.s3 import RoleArn
from lora_operator.api.sources.volumes import Namespaces, admits
from lora_operator.api.storage import AnnotationText, LabelText

_PROXY = r"^https?://[A-Za-z0-9.\[\]:-]+/?$"
_OWN_LABELS = "!self.exists(k, k.startsWith('lora-operator.dev/') || k.startsWith('app.kubernetes.io/'))"
_PATTERN = r"^(s3|https?)://.+"

Proxy = Annotated[
    str,
    Field(
        max_length=512,
        pattern=_PROXY,
        json_schema_extra=asked_of_new(
            f"^https?://{HOST}/?$", "a proxy is http://host:port or https://host:port, without user name and password"
        ),
    ),
]


class AllowedRole(ApiModel):
    """One role that is assumed by the service account's identity."""

    arn: RoleArn = Field(description="The role, character by character as sources name it.")
    namespaces: Namespaces = ()

    def admits(self, arn: str, namespace: str | None) -> bool:
        """Whether an object of this namespace may have this role assumed; None: the cache's own."""
        return self.arn == arn and (namespace is None or admits(self.namespaces, namespace))


class WorkloadIdentity(ApiModel):
    """The one identity that is not a Secret's: that of a service account, which the cloud's machinery turns into one of its own."""

    service_account_name: ObjectName = Field(
        description="ServiceAccount in the cache's namespace. Jobs whose source is allowed below, and names no Secret, run as it."
    )
    allowed_sources: tuple[
        Annotated[
            str,
            Field(
                min_length=6,
                max_length=512,
                pattern=_PATTERN,
                json_schema_extra=cel(
                    (
                        matches(_PATTERN),
                        "an allowed source is like s3://bucket/folder/*, or like https://s3.example/bucket/folder/* for a source with "
                        "an endpoint",
                    )
                ),
            ),
        ],
        ...,
    ] = Field(
        description="Sources that are read so, by whoever may use the cache: s3://bucket/folder/ as fnmatch matches it (* crosses folders), "
        "or <endpoint>/bucket/folder/ for one that names an endpoint.",
        min_length=1,
        max_length=64,
    )
    allowed_roles: tuple[AllowedRole, ...] = Field(
        default=(),
        description="Roles that sources allowed above may name by s3.assumeRole, and for whom. Who may name a role reads all that it may "
        "read below those sources. A source with a Secret of its own needs no entry.",
        max_length=64,
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["arn"]},
    )
    aws_role_arn: str | None = Field(
        default=None,
        description="Role for AWS, where the cluster does not tell it to pods by itself (as EKS does from the ServiceAccount's "
        "annotation): the Job gets a token of the service account for sts.amazonaws.com, and takes on this role with it.",
        max_length=2048,
        pattern=r"^arn:[a-z-]+:iam::[0-9]{12}:role/[A-Za-z0-9+=,.@_/-]+$",
    )


class ConfigMapKeyRef(ApiModel):
    """One key of a ConfigMap in the same namespace."""

    name: ObjectName = Field(description="Name of the ConfigMap, in the same namespace as this object.")
    key: str = Field(
        default="ca.crt",
        min_length=1,
        max_length=253,
        pattern=r"^[-._a-zA-Z0-9]+$",
        description="Key inside the ConfigMap.",
    )


class Network(ApiModel):
    """The way from Jobs to sources."""

    http_proxy: Proxy | None = Field(default=None, description="Proxy for http:// addresses.")
    https_proxy: Proxy | None = Field(default=None, description="Proxy for https:// addresses.")
    no_proxy: tuple[Annotated[str, Field(min_length=1, max_length=253, pattern=r"^[A-Za-z0-9.:/*_-]+$")], ...] = Field(
        default=(), description="Hosts and domains that are asked without a proxy.", max_length=64
    )
    ca_bundle: ConfigMapKeyRef | None = Field(
        default=None,
        description="Certificates in PEM of further authorities that sources' certificates may be signed by, beside the public ones.",
    )


class JobTemplate(ApiModel):
    """What is added to the pods of Jobs."""

    image_pull_secrets: tuple[LocalRef, ...] = Field(
        default=(), description="Secrets to pull the Jobs' image with, in the cache's namespace.", max_length=16
    )
    labels: dict[str, LabelText] = Field(
        default={},
        description="Labels of the pods. Istio's and Linkerd's sidecars are kept out by labels and annotations unless these say otherwise.",
        max_length=32,
        json_schema_extra=cel((_OWN_LABELS, "labels of lora-operator.dev/ and app.kubernetes.io/ are the operator's")),
    )
    annotations: dict[str, AnnotationText] = Field(default={}, description="Annotations of the pods.", max_length=32)
    node_selector: dict[str, LabelText] = Field(
        default={}, description="Labels of the nodes that Jobs may run on.", max_length=32
    )
    tolerations: tuple[FreeForm, ...] = Field(
        default=(),
        description="Tolerations, as in a pod; those of the engines' podTemplate are there anyway.",
        max_length=32,
    )
    resources: FreeForm | None = Field(
        default=None,
        description="Resources of the container, as in a pod; default: those that the chart sets. Downloads and checks are streams: 1Gi of memory "
        "is enough for content of any size.",
    )
