"""Which list a deployment's pods were told before this operator started: from its ConfigMap, else from the pods themselves."""

from __future__ import annotations

from collections.abc import Iterable

from lora_operator.api.deployment import VLLMDeployment
from lora_operator.constants import MODULES_KEY
from lora_operator.errors import EngineRefused, NotFoundError
from lora_operator.kube.kinds import CONFIG_MAPS
from lora_operator.kube.objects import KubeObject
from lora_operator.names import modules_config_map
from lora_operator.plan.adapter_list import Module, ModuleList, decode_from_config_map
from lora_operator.reconcile.context import Context
from lora_operator.reconcile.store import ObjectKey
from lora_operator.wire.plugin import HeldList


async def stored_list(context: Context, deployment: VLLMDeployment) -> ModuleList | None:
    """The list in the ConfigMap; None where that is lost, or is no list any more.

    The store has the ConfigMap's metadata alone. It is read where that is of another version than the one that was read last.
    """
    is_read, found = list_as_read(context, deployment)
    if is_read:
        return found
    record = context.records.deployments[deployment.key]
    try:
        body = await context.kube.get(CONFIG_MAPS, *_place(deployment))
    except NotFoundError:
        return None
    config_map = KubeObject.parse(body)
    if not config_map.is_controlled_by(deployment.metadata.uid):
        return None
    data = (body.get("binaryData") or {}).get(MODULES_KEY)
    found = decode_from_config_map(data) if isinstance(data, str) else None
    record.stored = (config_map.version, found)
    return found


async def read_lists(context: Context, namespace: str) -> None:
    """Read the lists of a namespace's deployments for `list_as_read`."""
    for deployment in list(context.store.deployments.values()):
        if deployment.metadata.namespace == namespace:
            await stored_list(context, deployment)


def list_as_read(context: Context, deployment: VLLMDeployment) -> tuple[bool, ModuleList | None]:
    """(whether what is in the ConfigMap now was read, that list). Awaits nothing."""
    config_map = context.store.config_maps.get(_place(deployment))
    if config_map is None or not config_map.is_controlled_by(deployment.metadata.uid):
        return True, None
    known = context.records.deployments.peek(deployment.key).stored
    return (True, known[1]) if known is not None and known[0] == config_map.version else (False, None)


def _place(deployment: VLLMDeployment) -> ObjectKey:
    return (deployment.metadata.namespace, modules_config_map(deployment.metadata.name))


async def learn_held(context: Context, deployment: VLLMDeployment, pod: ObjectKey, url: str, token: str) -> None:
    """Ask a pod which list it holds, where nothing else tells it. An older plugin does not tell."""
    record = context.records.pods[pod]
    known = context.records.deployments.peek(deployment.key).modules is not None
    if known or await stored_list(context, deployment) is not None:
        record.held_list = None
        return
    try:
        record.held_list = await context.engines.held_list(url, token)
    except EngineRefused as error:
        if error.status != 404:
            raise


def held_list(context: Context, deployment: VLLMDeployment, pods: Iterable[ObjectKey]) -> ModuleList | None:
    """The newest list that any of these pods of its holds, as far as it is of adapters that exist; None where no pod holds any.

    Pods are data from outside: an entry counts only by the UID of an adapter that names the deployment.
    """
    lists = [found for place in pods if (found := context.records.pods.peek(place).held_list) is not None]
    newest: HeldList | None = max(lists, key=lambda one: one.generation, default=None)
    if newest is None or not newest.generation:  # a fresh pod was never told one
        return None
    adapters = {adapter.metadata.uid: adapter for adapter in context.store.adapters_of(deployment.key)}
    modules = []
    for held in newest.modules:
        adapter = adapters.get(held.uid)
        if adapter is not None:
            modules.append(
                Module(
                    name=held.name,
                    path=held.path,
                    base_model_name=held.base_model_name or deployment.spec.model.served_names[0],
                    revision=held.revision,
                    adapter=f"{adapter.metadata.namespace}/{adapter.metadata.name}",
                    uid=held.uid,
                    lazy=adapter.spec.load_policy == "Lazy",
                    preload=adapter.spec.placement.preload or 0,
                )
            )
    return ModuleList("/".join(deployment.key), newest.generation, tuple(sorted(modules)))
