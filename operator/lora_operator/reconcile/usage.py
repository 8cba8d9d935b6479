"""Which content of a volume is in use, or may be: by what pods are told, serve, finish requests with, and were started with."""

from __future__ import annotations

from lora_operator.api.deployment import VLLMDeployment
from lora_operator.constants import COMPONENT_ENGINE, LABEL_COMPONENT
from lora_operator.kube.pods import Pod
from lora_operator.plan.adapter_list import Serve
from lora_operator.reconcile.context import Context
from lora_operator.reconcile.stored_lists import list_as_read
from lora_operator.wire.jobs import views_in


def used_views(context: Context, namespace: str) -> tuple[frozenset[str], str | None]:
    """The names of the views that something of the namespace uses; and why they can't all be known, where that is so.

    A claim can be mounted in its own namespace only, so nothing elsewhere uses it. `read_lists` comes first; this awaits nothing.
    """
    found: set[str] = set()
    unsure = _undecided(context, namespace)
    for deployment in context.store.deployments.values():
        if deployment.metadata.namespace == namespace:
            listed, is_read = _listed(context, deployment)
            found |= listed or set()
            if not is_read:
                unsure = (
                    unsure
                    or f"the module list of VLLMDeployment {namespace}/{deployment.metadata.name} has just changed"
                )
            if listed is None and deployment.key in context.store.workloads:
                unsure = (
                    unsure
                    or f"the module list of VLLMDeployment {namespace}/{deployment.metadata.name} is not known yet"
                )
    for workload in context.store.workloads.values():
        if workload.namespace == namespace:
            found |= workload.template.views
    for pod in context.store.pods.values():
        if pod.namespace != namespace:
            continue
        found |= pod.spec.views
        if pod.labels.get(LABEL_COMPONENT) == COMPONENT_ENGINE:
            served, why = _served(context, pod)
            found |= served
            unsure = unsure or why
    return frozenset(found), unsure


def _undecided(context: Context, namespace: str) -> str | None:
    for key in context.store.invalid_in(namespace):
        return f"{key} can't be read by this operator: {context.store.invalid[key][:200]}"
    waits_for = context.records.undecided(context.store, namespace)
    return (
        f"{waits_for} has not been looked at yet: where that lasts, see its status" if waits_for is not None else None
    )


def _listed(context: Context, deployment: VLLMDeployment) -> tuple[set[str] | None, bool]:
    """What the pods are told and what they will be told, None where it is not known; and whether the ConfigMap's present list is read."""
    found: set[str] = set()
    modules = context.records.deployments.peek(deployment.key).modules
    is_read, stored = list_as_read(context, deployment)
    for known in (modules, stored):
        for module in known.modules if known is not None else ():
            found |= views_in(module.path)
    for adapter in context.store.adapters_of(deployment.key):
        decision = context.records.decision(adapter.key)
        if decision is not None and isinstance(decision.entry, Serve):
            found |= views_in(decision.entry.module.path)
    return (None if modules is None else found), is_read


def _served(context: Context, pod: Pod) -> tuple[set[str], str | None]:
    key, container = pod.key, pod.running_engine
    if pod.has_ended:
        return set(), None
    if container is None:
        return set(), None  # it begins with the list that is known here, and leaves out what is not there
    view = context.records.pods.peek(key).view
    if view is None or view.container_id != container or view.error is not None or not view.guarded:
        why = view.error if view is not None and view.error else "it has not answered yet"
        return set(), f"pod {key[0]}/{key[1]} may be serving, and can't be asked: {why}"
    paths = [served.path for served in view.served.values()] + [*view.waiting.values(), *view.retired]
    models = context.records.pods.peek(key).listed
    roots = [model.root for model in models if model.root] if isinstance(models, tuple) else []
    if view.orphans and not roots:
        return set(), f"pod {key[0]}/{key[1]} serves {view.orphans[0]}, and it is not known from where"
    return views_in("\n".join([*paths, *roots])), None
