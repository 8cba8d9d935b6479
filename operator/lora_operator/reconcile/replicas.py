"""spec.replicas of a VLLMDeployment that leaves it out: an autoscaler takes a missing number for zero, and stays away.

So the operator writes it, once, through the scale subresource, as `kubectl scale` and autoscalers do: whoever applies a manifest
without it leaves it alone from then on.
"""

from __future__ import annotations

import logging

from lora_operator.api.deployment import VLLMDeployment
from lora_operator.errors import ConflictError, KubeError, NotFoundError
from lora_operator.kube.kinds import VLLM_DEPLOYMENTS
from lora_operator.plan.deployment_status import replicas_wanted
from lora_operator.reconcile.context import Context

log = logging.getLogger(__name__)


async def keep_replicas(context: Context, deployment: VLLMDeployment) -> None:
    """Write spec.replicas where it is not there: what runs, where somebody has just removed it; else 1."""
    if deployment.spec.replicas is not None:
        return
    metadata = deployment.metadata
    replicas = replicas_wanted(deployment, context.store.workloads.get(deployment.key))
    # Only into the object as it was seen: who set the number since then is not overwritten, and this object's next word wakes us.
    scale = {"metadata": {"resourceVersion": metadata.resource_version}, "spec": {"replicas": replicas}}
    try:
        await context.kube.patch(VLLM_DEPLOYMENTS, *deployment.key, scale, subresource="scale")
    except (ConflictError, NotFoundError):
        return
    except KubeError as error:  # a role or webhook that refuses it; engines and adapters must not wait for that
        log.warning("spec.replicas of VLLMDeployment %s/%s is not written: %s", *deployment.key, error)
