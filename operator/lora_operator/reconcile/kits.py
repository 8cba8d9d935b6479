"""Removes the kits of earlier operators that no ReplicaSet or pod of a deployment can start from any more."""

from __future__ import annotations

from typing import Final

from lora_operator.api.deployment import VLLMDeployment
from lora_operator.kube.kinds import CONFIG_MAPS, REPLICA_SETS
from lora_operator.kube.workloads import Workload
from lora_operator.names import engine_selector, kit_config_map
from lora_operator.plan.kits import kits_to_remove, mounted, owned_kits
from lora_operator.reconcile.context import Context

LOOK_SECONDS: Final = 300.0  # between looks at the ReplicaSets, which alone may still need an old kit


async def remove_old_kits(context: Context, deployment: VLLMDeployment) -> None:
    """Delete what is certainly unused. Costs nothing while there is no kit but the one in use."""
    namespace, name = deployment.key
    workload = context.store.workloads.get(deployment.key)
    if workload is None:
        return
    beside = [body for place, body in context.store.config_maps.items() if place[0] == namespace]
    kits = owned_kits(beside, deployment=name, uid=deployment.metadata.uid)
    pods = context.store.pods_of_deployment(deployment.key)
    current = kit_config_map(name, context.kit)
    candidates = kits_to_remove(kits, current=current, users=[workload.template, *(pod.spec for pod in pods)])
    if not candidates:
        return
    record = context.records.deployments[deployment.key]
    looked_at, looked = record.kits_looked_at
    if looked_at == candidates and context.clock.monotonic() - looked < LOOK_SECONDS:
        return
    # Listed after the Deployment was read: a ReplicaSet that came since is of its template, or of a newer one of ours.
    replica_sets, _ = await context.kube.list(REPLICA_SETS, namespace=namespace, label_selector=engine_selector(name))
    record.kits_looked_at = (candidates, context.clock.monotonic())
    for kit in sorted(candidates - mounted(Workload.parse(body).template for body in replica_sets)):
        await context.kube.delete(CONFIG_MAPS, namespace, kit, uid=context.store.config_maps[(namespace, kit)].uid)
        record.children.pop(("ConfigMap", kit), None)
