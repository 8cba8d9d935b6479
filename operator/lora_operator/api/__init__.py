"""The custom resources as pydantic models: what users may write, and what the operator reports. The one source of crds/."""

from lora_operator.api import adapter, artifact, cache, deployment
from lora_operator.api.adapter import LoRAAdapter
from lora_operator.api.artifact import ModelArtifact
from lora_operator.api.cache import ModelCache
from lora_operator.api.common import ResourceInfo
from lora_operator.api.deployment import VLLMDeployment

RESOURCES: tuple[ResourceInfo, ...] = (adapter.RESOURCE, deployment.RESOURCE, cache.RESOURCE, artifact.RESOURCE)

__all__ = ["RESOURCES", "LoRAAdapter", "ModelArtifact", "ModelCache", "ResourceInfo", "VLLMDeployment"]
