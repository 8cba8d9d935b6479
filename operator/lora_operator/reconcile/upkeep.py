"""What is kept in order beside a deployment's pods: a number of replicas that its spec leaves out, and old engine plugins.

A plugin is mounted by name, so a pod that is made from an older ReplicaSet (a roll-back, a pod replaced in mid-roll-out) needs the
plugin of its time. Unknown is not empty: with ReplicaSets that could not be listed, nothing may be removed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Final

from lora_operator.api.deployment import VLLMDeployment
from lora_operator.errors import ConflictError, KubeError, NotFoundError
from lora_operator.kube.kinds import CONFIG_MAPS, REPLICA_SETS, VLLM_DEPLOYMENTS
from lora_operator.kube.objects import KubeObject
from lora_operator.kube.pods import PodSpec
from lora_operator.kube.workloads import Workload
from lora_operator.names import engine_selector, plugin_config_map
from lora_operator.plan.deployment_pods import replicas_wanted
from lora_operator.reconcile.context import Context

LOOK_SECONDS: Final = 300.0  # between looks at the ReplicaSets, which alone may still need an old plugin
log = logging.getLogger(__name__)


async def keep_replicas(context: Context, deployment: VLLMDeployment) -> None:
    """Write spec.replicas where it is not there: what runs, where somebody has just removed it; else 1.

    An autoscaler takes a missing number for zero, and stays away. So the operator writes it, once, through the scale subresource, as
    `kubectl scale` and autoscalers do: whoever applies a manifest without it leaves it alone from then on.
    """
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


async def remove_old_plugins(context: Context, deployment: VLLMDeployment) -> None:
    """Delete what is certainly unused. Costs nothing while there is no plugin but the one in use."""
    namespace, name = deployment.key
    workload = context.store.workloads.get(deployment.key)
    if workload is None:
        return
    beside = [body for place, body in context.store.config_maps.items() if place[0] == namespace]
    plugins = owned_plugins(beside, deployment=name, uid=deployment.metadata.uid)
    pods = context.store.pods_of_deployment(deployment.key)
    current = plugin_config_map(name, context.plugin_hash)
    candidates = plugins_to_remove(plugins, current=current, users=[workload.template, *(pod.spec for pod in pods)])
    if not candidates:
        return
    record = context.records.deployments[deployment.key]
    looked_at, looked = record.plugins_looked_at
    if looked_at == candidates and context.clock.monotonic() - looked < LOOK_SECONDS:
        return
    # Listed after the Deployment was read: a ReplicaSet that came since is of its template, or of a newer one of ours.
    replica_sets, _ = await context.kube.list(REPLICA_SETS, namespace=namespace, label_selector=engine_selector(name))
    record.plugins_looked_at = (candidates, context.clock.monotonic())
    for plugin in sorted(candidates - mounted(Workload.parse(body).template for body in replica_sets)):
        await context.kube.delete(
            CONFIG_MAPS, namespace, plugin, uid=context.store.config_maps[(namespace, plugin)].uid
        )
        record.children.pop(("ConfigMap", plugin), None)


def owned_plugins(config_maps: Iterable[KubeObject], *, deployment: str, uid: str) -> frozenset[str]:
    """Names of the plugins' ConfigMaps that the VLLMDeployment of that name and UID owns."""
    prefix = plugin_config_map(deployment, "")
    return frozenset(
        found.name for found in config_maps if found.name.startswith(prefix) and found.is_controlled_by(uid)
    )


def mounted(specs: Iterable[PodSpec]) -> frozenset[str]:
    """Names of the ConfigMaps that Deployments, ReplicaSets and pods mount as volumes."""
    return frozenset[str]().union(*(spec.config_maps for spec in specs))


def plugins_to_remove(plugins: frozenset[str], *, current: str, users: Iterable[PodSpec]) -> frozenset[str]:
    """Plugins that none of `users` (the Deployment, all its ReplicaSets, all its pods) mounts; never the operator's own."""
    return plugins - mounted(users) - {current}
