"""Which content of a volume is in use, or may be: by what pods are told, serve, finish requests with, and were started with."""

from __future__ import annotations

import json

from lora_operator.api.deployment import VLLMDeployment
from lora_operator.constants import COMPONENT_ENGINE, LABEL_COMPONENT, MODULES_KEY
from lora_operator.names import modules_config_map
from lora_operator.plan.modules import decode_from_config_map
from lora_operator.plan.pods import running_container
from lora_operator.plan.unused import views_in
from lora_operator.reconcile.context import Context
from lora_operator.reconcile.store import OWN_KINDS, Body


def used_views(context: Context, namespace: str) -> tuple[frozenset[str], str | None]:
    """The names of the views that something of the namespace uses; and why they can't all be known, where that is so.

    A claim can be mounted in its own namespace only, so nothing elsewhere uses it.
    """
    found: set[str] = set()
    unsure = _undecided(context, namespace)
    for deployment in context.store.deployments.values():
        if deployment.metadata.namespace == namespace:
            listed = _listed(context, deployment)
            found |= listed or set()
            if listed is None and deployment.key in context.store.workloads:
                unsure = (
                    unsure
                    or f"the module list of VLLMDeployment {namespace}/{deployment.metadata.name} is not known yet"
                )
    for bodies in (context.store.workloads, context.store.pods):
        for key, body in bodies.items():
            if key[0] == namespace:
                found |= views_in(json.dumps(body.get("spec") or {}))
    for key, pod in context.store.pods.items():
        if key[0] == namespace and _is_engine(pod):
            served, why = _served(context, pod)
            found |= served
            unsure = unsure or why
    return frozenset(found), unsure


def _undecided(context: Context, namespace: str) -> str | None:
    for key in context.store.invalid:
        if key.kind in OWN_KINDS:
            return f"{key} can't be read by this operator"
    if not context.registry.all_decided(context.store, namespace):
        return "not every adapter and deployment has been looked at yet"
    return None


def _listed(context: Context, deployment: VLLMDeployment) -> set[str] | None:
    """What the pods are told and what they will be told; None where it is not known."""
    found: set[str] = set()
    modules = context.registry.lists.get(deployment.key)
    body = context.store.config_maps.get((deployment.key[0], modules_config_map(deployment.key[1])))
    data = ((body or {}).get("binaryData") or {}).get(MODULES_KEY)
    stored = decode_from_config_map(data) if isinstance(data, str) else None
    for known in (modules, stored):
        for module in known.modules if known is not None else ():
            found |= views_in(module.path)
    for adapter in context.store.adapters_of(deployment.key):
        decision = context.registry.decision(adapter.key)
        if decision is not None and decision.module is not None:
            found |= views_in(decision.module.path)
    return None if modules is None else found


def _served(context: Context, pod: Body) -> tuple[set[str], str | None]:
    key = (pod["metadata"]["namespace"], pod["metadata"]["name"])
    if (pod.get("status") or {}).get("phase") in ("Succeeded", "Failed"):
        return set(), None
    container = running_container(pod)
    if container is None:
        return set(), None  # it begins with the list that is known here, and leaves out what is not there
    view = context.registry.views.get(key)
    if view is None or view.container_id != container or view.error is not None or not view.gate_closed:
        why = view.error if view is not None and view.error else "it has not answered yet"
        return set(), f"pod {key[0]}/{key[1]} may be serving, and can't be asked: {why}"
    paths = [served.path for served in view.served.values()] + [*view.waiting.values(), *view.retired]
    models = context.registry.listed.get(key)
    roots = [model.root for model in models if model.root] if isinstance(models, tuple) else []
    if view.orphans and not roots:
        return set(), f"pod {key[0]}/{key[1]} serves {view.orphans[0]}, and it is not known from where"
    return views_in("\n".join([*paths, *roots])), None


def _is_engine(pod: Body) -> bool:
    return (pod["metadata"].get("labels") or {}).get(LABEL_COMPONENT) == COMPONENT_ENGINE
