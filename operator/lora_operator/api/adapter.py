"""LoRAAdapter: an adapter from a source, served under a name by one VLLMDeployment. Written by tenants."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import ConfigDict, Field

from lora_operator.api.common import (
    AGE,
    ApiModel,
    Conditions,
    NamespacedRef,
    PrinterColumn,
    Resource,
    ResourceInfo,
    ServedName,
    cel,
    reason_column,
)
from lora_operator.api.progress import Progress
from lora_operator.api.sources.source import SOURCE_RULES, Source

_INTERVAL = r"^([0-9]+(\.[0-9]+)?(h|m|s))+$"


class Placement(ApiModel):
    """Which pods hold the adapter before anybody asks for it."""

    preload: int | None = Field(
        default=None,
        ge=1,
        le=10000,
        description="So many pods load the adapter in advance, the others on their first request for it; default: all load it.",
    )


class LoRAAdapterSpec(ApiModel):
    """What a tenant wants served."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            (
                "!has(self.placement) || !has(self.placement.preload) || !has(self.loadPolicy) || self.loadPolicy == 'Eager'",
                "placement.preload is for loadPolicy: Eager; with Lazy no pod loads the adapter in advance",
            )
        )
    )

    source: Source = Field(description="Where the adapter comes from.", json_schema_extra=SOURCE_RULES)
    vllm_deployment_ref: NamespacedRef = Field(description="The VLLMDeployment that serves it.")
    served_name: ServedName | None = Field(
        default=None, description='What clients write into "model"; default: metadata.name.'
    )
    base_model_name: ServedName | None = Field(
        default=None,
        description="Lineage, shown as parent in /v1/models: one of the deployment's servedNames; default: the first.",
    )
    load_policy: Literal["Eager", "Lazy"] = Field(
        default="Eager",
        description="Eager: every pod loads the adapter in advance. Lazy: a pod loads it on the first request for it. "
        "With updateStrategy: Rollout every pod loads it at its start.",
    )
    placement: Placement = Field(
        default=Placement(), description="Which pods hold the adapter before anybody asks for it."
    )
    suspend: bool = Field(default=False, description="true: the adapter is downloaded and kept, and not served.")
    refresh_interval: str | None = Field(
        default=None,
        max_length=32,
        description="A branch or tag is resolved anew whenever its content is so old: a duration like 30m or 12h, at least 1m. "
        "Default: only when the spec or the annotation lora-operator.dev/refresh changes. A full commit never is.",
        json_schema_extra=cel(
            (
                f"self.matches(r'{_INTERVAL}') && duration(self) >= duration('1m')",
                "refreshInterval must be a duration like 30m or 1h30m, of at least 1m",
            )
        ),
    )


class PodCounts(ApiModel):
    """How many engine pods should serve the adapter, and do."""

    wanted: int = Field(description="Ready pods of the deployment.")
    loaded: int = Field(
        description="Those of them that serve the wanted revision; a pod that is to load it on the first request counts, too."
    )


class PodFailure(ApiModel):
    """One pod that does not serve the adapter."""

    pod: str = Field(description="Name of the pod.")
    message: str = Field(description="Why, in the engine's or the checks' words.", max_length=1024)


class ArtifactRef(ApiModel):
    """The ModelArtifact that holds the content."""

    name: str = Field(description="Name of the ModelArtifact.")
    namespace: str = Field(description="Namespace of the ModelArtifact: that of the cache.")


class RefreshState(ApiModel):
    """Which refresh the content is from."""

    requested: str | None = Field(
        default=None, max_length=64, description="Value of the annotation lora-operator.dev/refresh that it is from."
    )
    due: datetime | None = Field(default=None, description="When refreshInterval had passed that it is from.")
    pending: datetime | None = Field(
        default=None, description="When refreshInterval passed for the refresh that is not done yet."
    )


class LoRAAdapterStatus(ApiModel):
    """What is true of the adapter now."""

    conditions: Conditions = ()
    observed_generation: int | None = Field(default=None, description="The generation that this status speaks of.")
    served_name: str | None = Field(default=None, description='What clients write into "model".')
    base_model_name: str | None = Field(default=None, description="The parent shown in /v1/models.")
    url: str | None = Field(default=None, description="Where the adapter is served, inside the cluster.")
    resolved_revision: str | None = Field(
        default=None,
        description="The commit that the revision resolved to; for a source without revisions a hash of its listing.",
    )
    revision: str | None = Field(default=None, description="resolvedRevision, shortened for kubectl get.")
    digest: str | None = Field(default=None, description="Digest over the content's sorted (path, size, sha256).")
    size_bytes: int | None = Field(default=None, description="Size of the content in bytes.")
    size: str | None = Field(default=None, description="Size for kubectl get.")
    rank: int | None = Field(default=None, description="Largest rank of the adapter.")
    target_modules: tuple[str, ...] | None = Field(default=None, description="Modules that the adapter changes.")
    progress: Progress | None = Field(
        default=None, description="Where the running download is; written every 10 s at most."
    )
    artifact_ref: ArtifactRef | None = Field(default=None, description="The ModelArtifact that holds the content.")
    refresh: RefreshState | None = Field(
        default=None, description="Which refresh the content is from; absent where it was never refreshed."
    )
    ready_pods: str | None = Field(default=None, description="loaded/wanted for kubectl get.")
    pods: PodCounts | None = Field(default=None, description="Engine pods that should serve the adapter, and do.")
    failures: tuple[PodFailure, ...] | None = Field(
        default=None, description="Pods that do not serve it, and why; at most 5.", max_length=5
    )


class LoRAAdapter(Resource):
    """An adapter as read from the API server."""

    kind: Literal["LoRAAdapter"] = "LoRAAdapter"
    spec: LoRAAdapterSpec
    status: LoRAAdapterStatus = LoRAAdapterStatus()

    @property
    def served_name(self) -> str:
        """The name it is to be served under."""
        return self.spec.served_name or self.metadata.name

    @property
    def deployment_key(self) -> tuple[str, str]:
        """(namespace, name) of the VLLMDeployment that it names."""
        ref = self.spec.vllm_deployment_ref
        return (ref.namespace or self.metadata.namespace, ref.name)


RESOURCE = ResourceInfo(
    kind="LoRAAdapter",
    plural="loraadapters",
    singular="loraadapter",
    short_names=("lora",),
    spec=LoRAAdapterSpec,
    status=LoRAAdapterStatus,
    description="A LoRA adapter from a source, served under a name by one VLLMDeployment.",
    rules=(
        (
            "has(self.spec.servedName) || size(self.metadata.name) <= 128",
            "metadata.name is longer than the 128 characters of a served name: set spec.servedName",
        ),
    ),
    columns=(
        PrinterColumn("Base", ".status.baseModelName"),
        PrinterColumn("Ready", ".status.readyPods", description="Ready engine pods that serve it / that should."),
        PrinterColumn("Revision", ".status.revision"),
        PrinterColumn("Size", ".status.size"),
        reason_column(),
        AGE,
        PrinterColumn("Percent", ".status.progress.percent", "integer", priority=1),
        PrinterColumn("ETA", ".status.progress.eta", priority=1),
        PrinterColumn("Served Name", ".status.servedName", priority=1),
        PrinterColumn("Message", '.status.conditions[?(@.type=="Ready")].message', priority=1),
    ),
)
