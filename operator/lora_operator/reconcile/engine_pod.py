"""One engine pod: push the module list to its kit, look at what its engine serves, and publish the view.

A pod that does not answer keeps only its own worker busy. The gate's token is sent to a container only after that container
was seen to refuse an unauthenticated load.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Final

from lora_operator.api.deployment import VLLMDeployment
from lora_operator.constants import LABEL_DEPLOYMENT, ROLLOUT
from lora_operator.desired.children import gate_token
from lora_operator.errors import EngineError, EngineUnreachable, StaleList
from lora_operator.kube.kinds import Kind
from lora_operator.kube.pods import Pod
from lora_operator.names import label_value
from lora_operator.plan.adapter_list import ModuleList
from lora_operator.plan.admission import public_name
from lora_operator.plan.fleet import PodView, Served
from lora_operator.plan.placement import is_lazy_on
from lora_operator.reconcile.context import Context
from lora_operator.reconcile.fleet import learn_owners, live_pods, own_pods
from lora_operator.reconcile.lists import learn_held
from lora_operator.reconcile.store import Key, ObjectKey
from lora_operator.vllm import MINIMUM_VERSIONS, KitState, ServedModel, parse_version

SETTLE_SECONDS: Final = 2.0  # how long a kit may hold the answer to a new list back while it loads
POLL_STARTING: Final = 1.0
POLL_UNSETTLED: Final = 0.5
POLL_RETIRED: Final = 3.0  # until no request uses what a pod has given up: its room may be waited for
POLL_FAILING: Final = 3.0
POLL_IDLE: Final = 40.0  # one request per look, so three pods cost less than 0.1 requests a second
POLL_FAILING_LONGEST: Final = 30.0


@dataclass(frozen=True)
class _Engine:
    """Where and how one container's engine is asked."""

    pod: ObjectKey
    url: str
    token: str
    container: str
    uid: str
    ready: bool


async def reconcile_pod(context: Context, key: Key) -> float | None:
    """Look at one pod's engine once. Returns after how many seconds to look again by itself."""
    place = (key.namespace, key.name)
    pod = context.store.pods.get(place)
    deployment = _deployment(context, pod) if pod else None
    if pod is None or deployment is None:
        context.records.pods.pop(place, None)
        return None
    await learn_owners(context, deployment, pod)
    if pod not in own_pods(context, deployment):
        context.records.pods.pop(place, None)
        context.enqueue(Key(Kind.VLLM_DEPLOYMENT, *deployment.key))
        return None
    container, address = pod.running_engine, pod.address
    if container is None or address is None:
        _publish(context, deployment, place, None)
        return None
    host = f"[{address}]" if ":" in address else address
    engine = _Engine(
        pod=place,
        url=f"http://{host}:{pod.spec.engine_port or deployment.spec.engine.port}",
        token=gate_token(await context.secrets.master_key(), deployment),
        container=container,
        uid=pod.uid,
        ready=pod.is_ready,
    )
    return await _look(context, deployment, engine)


def _deployment(context: Context, pod: Pod) -> VLLMDeployment | None:
    label, namespace = pod.labels.get(LABEL_DEPLOYMENT), pod.namespace
    found = context.store.deployments.get((namespace, label or ""))
    if found is not None or label is None:
        return found
    return next(
        (d for d in context.store.deployments.values() if d.key[0] == namespace and label_value(d.key[1]) == label),
        None,
    )


async def _look(context: Context, deployment: VLLMDeployment, engine: _Engine) -> float:
    record = context.records.pods[engine.pod]
    rolls = deployment.spec.lora.update_strategy == ROLLOUT  # then no pod is told a list
    modules = None if rolls else list_for(context, deployment, engine.pod)
    known = record.view
    if known is not None and known.container_id != engine.container:
        known = None
    try:
        if not (known is not None and known.gate_closed) and not await context.engines.gate_is_closed(engine.url):
            _publish(context, deployment, engine.pod, PodView(uid=engine.uid, container_id=engine.container))
            return POLL_FAILING
        if await _is_as_before(context, engine, known, modules):
            return _idle()
        if not rolls:
            await learn_held(context, deployment, engine.pod, engine.url, engine.token)
        state = await _exchange(context, engine, known, modules)
        _note_held(context, deployment, state)
        models = await context.engines.models(engine.url, engine.token)
    except StaleList as error:
        _note_held(context, deployment, error.state)
        context.enqueue(Key(Kind.VLLM_DEPLOYMENT, *deployment.key))
        return POLL_UNSETTLED
    except EngineError as error:
        if not engine.ready and isinstance(error, EngineUnreachable):
            if not record.silent:
                record.silent = True
                context.enqueue(Key(Kind.VLLM_DEPLOYMENT, *deployment.key))
            return POLL_STARTING  # an engine that loads its model does not listen yet
        failing = known is not None and known.error is not None
        failed = PodView(
            uid=engine.uid,
            container_id=engine.container,
            error=known.error
            if failing and known
            else str(error),  # the first words: a pod must not cause writes by new ones
            gate_closed=known is not None and known.gate_closed,
        )
        _publish(context, deployment, engine.pod, failed)
        record.misses += 1
        return min(POLL_FAILING * 2.0 ** min(record.misses - 1, 8), POLL_FAILING_LONGEST)
    record.misses = 0
    record.listed = models
    view = build_view(engine.uid, engine.container, state, models, served_names=deployment.spec.model.served_names)
    _publish(context, deployment, engine.pod, view)
    told = modules is not None and _holds(state, modules)
    if state.settled and (told or rolls or state.update_strategy == ROLLOUT):
        return POLL_RETIRED if state.retired else _idle()
    return POLL_UNSETTLED if modules is not None or rolls else POLL_STARTING


def _idle() -> float:
    return POLL_IDLE * random.uniform(0.8, 1.2)  # noqa: S311  spreads load


async def _is_as_before(context: Context, engine: _Engine, known: PodView | None, modules: ModuleList | None) -> bool:
    """Whether a pod that had nothing left to do lists the same as then: so its kit need not be asked. One request.

    What is loaded on the first request may fail then, and requests may use content that is listed no more: no list of the engine
    tells of either.
    """
    if known is None or modules is None or not _holds(known, modules):
        return False
    if not known.settled or known.error is not None or known.failures or known.waiting or known.retired:
        return False
    before = context.records.pods.peek(engine.pod).listed
    return before is not None and await context.engines.models(engine.url, engine.token) == before


def list_for(context: Context, deployment: VLLMDeployment, pod: ObjectKey) -> ModuleList | None:
    """What a pod is to be told: the deployment's list, with what this pod loads in advance and what on the first request."""
    modules = context.records.deployments.peek(deployment.key).modules
    if modules is None or not any(module.preload for module in modules.modules):
        return modules
    names = {pod.name for pod in live_pods(context, deployment)}
    return replace(
        modules,
        modules=tuple(
            replace(module, lazy=is_lazy_on(module, pod[1], names), preload=0) if module.preload else module
            for module in modules.modules
        ),
    )


def _holds(held: KitState | PodView, modules: ModuleList) -> bool:
    """Whether this list is what the pod holds; a kit that does not tell a digest knows one list per generation."""
    return held.list_generation == modules.generation and held.list_digest in (None, modules.digest)


def _note_held(context: Context, deployment: VLLMDeployment, state: KitState) -> None:
    """Remember the highest generation that any pod holds: a list is never numbered like another one before it."""
    if deployment.key in context.store.deployments:  # else it was deleted while its pod was asked
        record = context.records.deployments[deployment.key]
        record.held = max(record.held, state.list_generation or 0)


async def _exchange(context: Context, engine: _Engine, known: PodView | None, modules: ModuleList | None) -> KitState:
    """Push the list where the pod is not known to hold it, else only ask. A pod with a list of its own takes none."""
    if modules is None or known is None or known.error is not None or _holds(known, modules):
        state = await context.engines.state(engine.url, engine.token)
        told = modules is None or _holds(state, modules)
        if modules is None or told or is_too_old(state) or state.update_strategy == ROLLOUT:
            return state
    elif known.too_old or known.update_strategy == ROLLOUT:
        return await context.engines.state(engine.url, engine.token)
    return await context.engines.put_modules(engine.url, engine.token, modules.encoded, wait=SETTLE_SECONDS)


def is_too_old(state: KitState) -> bool:
    """Whether the engine's version can't be given adapters safely in the pod's way: then it is told of none."""
    version = parse_version(state.vllm_version)
    minimum = MINIMUM_VERSIONS.get(state.update_strategy)
    return version is not None and minimum is not None and version < minimum


def build_view(
    uid: str,
    container: str,
    state: KitState,
    models: tuple[ServedModel, ...],
    *,
    served_names: tuple[str, ...],
) -> PodView:
    """What an engine serves, from /v1/models, with the public names that its kit tells."""
    listed = {model.id: model for model in models if model.id not in served_names and model.parent is not None}
    served = {}
    for module in state.loaded:
        model = listed.pop(module.internal_name, None)
        if model is None and (renamed := listed.get(module.name)) is not None and renamed.root == module.path:
            model = listed.pop(module.name)  # it got its plain name back since the kit told its state
        if model is not None:
            served[module.name] = Served(path=model.root or "", parent=model.parent, internal_name=module.internal_name)
    waiting = {module.name: module.path for module in state.waiting}
    for model in list(listed.values()):  # a first request has loaded it since the kit told its state
        public = model.id.partition("@")[0]
        if model.root is not None and waiting.get(public) == model.root:
            served[public] = Served(path=model.root, parent=model.parent, internal_name=model.id)
            del waiting[public], listed[model.id]
    return PodView(
        uid=uid,
        container_id=container,
        gate_closed=True,
        version=state.vllm_version,
        too_old=is_too_old(state),
        list_generation=state.list_generation,
        list_digest=state.list_digest,
        settled=state.settled,
        served=served,
        waiting=waiting,
        failures={failure.name: failure.message for failure in state.failures},
        retired=tuple(sorted(module.path for module in state.retired)),
        orphans=tuple(sorted(listed)),
        atomic_swap=state.atomic_swap,
        update_strategy=state.update_strategy,
    )


def _publish(context: Context, deployment: VLLMDeployment, pod: ObjectKey, view: PodView | None) -> None:
    record = context.records.pods[pod]
    old, first = record.view, not record.asked
    record.view, record.asked, record.silent = view, True, False
    if old == view and not first:
        return
    context.enqueue(Key(Kind.VLLM_DEPLOYMENT, *deployment.key))
    names = None if first else _changed_names(old, view, context.records.deployments.peek(deployment.key).modules)
    for adapter in context.store.adapters_of(deployment.key):
        if names is None or public_name(adapter, deployment) in names:
            context.enqueue(Key(Kind.LORA_ADAPTER, *adapter.key))


def _changed_names(old: PodView | None, new: PodView | None, modules: ModuleList | None) -> set[str] | None:
    """Served names about which the two views differ, or of which only the new one tells anything; None: about all."""
    if old is None or new is None or old.error != new.error or old.gate_closed != new.gate_closed:
        return None
    names = {*old.served, *new.served, *old.failures, *new.failures, *old.waiting, *new.waiting}
    before, after = old.list_generation or 0, new.list_generation or 0
    brought = ((module.name, modules.brought(module) or 0) for module in modules.modules) if modules else ()
    return {name for name, since in brought if before < since <= after} | {
        name
        for name in names
        if old.served.get(name) != new.served.get(name)
        or old.failures.get(name) != new.failures.get(name)
        or old.waiting.get(name) != new.waiting.get(name)
    }
