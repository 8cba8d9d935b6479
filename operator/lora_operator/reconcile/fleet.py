"""Which pods are a deployment's own, by their owners and not by labels that anybody can set, and what they showed last."""

from __future__ import annotations

from lora_operator.api.deployment import VLLMDeployment, VLLMDeploymentStatus
from lora_operator.conditions import find
from lora_operator.constants import Condition
from lora_operator.errors import NotFoundError
from lora_operator.kube.kinds import REPLICA_SETS, Kind
from lora_operator.kube.objects import KubeObject
from lora_operator.kube.pods import Pod
from lora_operator.plan.deployment_status import replicas_wanted
from lora_operator.plan.fleet import Fleet, FleetPod
from lora_operator.reconcile.context import Context
from lora_operator.reconcile.store import Key, ObjectKey


async def learn_owners(context: Context, deployment: VLLMDeployment, only: Pod | None = None) -> None:
    """Ask for the owner of every ReplicaSet of its pods, or of one's, that is not known yet; it never changes."""
    pods = context.store.pods_of_deployment(deployment.key)
    owners = context.records.deployments[deployment.key].replica_sets
    for gone in owners.keys() - {pod.owner.uid for pod in pods if pod.owner is not None}:
        del owners[gone]
    for pod in pods if only is None else (only,):
        owner = pod.owner
        if owner is None or owner[0] != "ReplicaSet" or owner[2] in owners:
            continue
        try:
            replica_set = KubeObject.parse(await context.kube.get(REPLICA_SETS, pod.namespace, owner.name))
        except NotFoundError:
            owners[owner[2]] = None
            continue
        above = replica_set.owner
        known = replica_set.uid == owner[2] and above is not None and above[0] == "Deployment"
        owners[owner[2]] = above[2] if known and above is not None else None


def own_pods(context: Context, deployment: VLLMDeployment) -> list[Pod]:
    """Live pods of the deployment's Deployment."""
    return [pod for pod in all_own_pods(context, deployment) if not pod.has_ended]


def all_own_pods(context: Context, deployment: VLLMDeployment) -> list[Pod]:
    """Its pods, with those that have ended, by owner chain: pod → ReplicaSet → Deployment → VLLMDeployment."""
    workload = context.store.workloads.get(deployment.key)
    if workload is None:
        return []
    if not workload.is_controlled_by(deployment.metadata.uid):
        return []
    owners = context.records.deployments.peek(deployment.key).replica_sets
    found = []
    for pod in context.store.pods_of_deployment(deployment.key):
        owner = pod.owner
        if owner is not None and owners.get(owner.uid) == workload.uid:
            found.append(pod)
    return found


def live_pods(context: Context, deployment: VLLMDeployment) -> list[Pod]:
    """Those of the deployment's own pods that are not being deleted."""
    return [pod for pod in own_pods(context, deployment) if not pod.is_deleting]


def observe_fleet(context: Context, deployment: VLLMDeployment) -> Fleet | None:
    """The pods as last seen; None while a pod's owner is not known, or a ready pod was not asked since this operator started."""
    workload, record = context.store.workloads.get(deployment.key), context.records.deployments.peek(deployment.key)
    for pod in context.store.pods_of_deployment(deployment.key):
        owner = pod.owner
        if owner is not None and owner[0] == "ReplicaSet" and owner[2] not in record.replica_sets:
            return None
    pods = []
    for pod in live_pods(context, deployment):
        place: ObjectKey = pod.key
        known = context.records.pods.peek(place)
        view = known.view
        if view is not None and (view.uid != pod.uid or view.container_id != pod.running_engine):
            view = None
        ready = pod.is_ready
        if ready and not known.asked:
            return None
        pods.append(FleetPod(name=pod.name, ready=ready, view=view))
    return Fleet(replicas=replicas_wanted(deployment, workload), pods=tuple(pods), modules=record.modules)


def tell_adapters(context: Context, deployment: VLLMDeployment, fleet: Fleet, status: VLLMDeploymentStatus) -> None:
    """Wake the adapters when pods came, went, or changed their readiness, or are away for another reason.

    Not for other words of the same reason, which may come with every restart of an engine; and of what engines serve,
    pods' own looks tell. The status is written already: adapters read the reason there.
    """
    available = find(status.conditions, Condition.AVAILABLE)
    readiness = (
        fleet.replicas,
        tuple((pod.name, pod.ready, pod.view is None) for pod in fleet.pods),
        available and available.reason,
    )
    record = context.records.deployments[deployment.key]
    if record.readiness != readiness:
        record.readiness = readiness
        for adapter in context.store.adapters_of(deployment.key):
            context.enqueue(Key(Kind.LORA_ADAPTER, *adapter.key))
        modules = record.modules
        if modules is not None and any(module.preload for module in modules.modules):  # others may have to preload now
            for pod in fleet.pods:
                context.enqueue(Key(Kind.POD, deployment.key[0], pod.name))
