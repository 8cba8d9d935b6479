"""One engine pod: push the adapter list to its plugin, look at what its engine serves, and publish the view.

A pod that does not answer keeps only its own worker busy. The gate's token is sent to a container only after that container
was seen to refuse an unauthenticated load.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Final

from lora_operator.api.deployment import VLLMDeployment
from lora_operator.constants import LABEL_DEPLOYMENT, ROLLOUT
from lora_operator.desired.children import guard_token
from lora_operator.errors import EngineError, EngineUnreachable, StaleList
from lora_operator.kube.kinds import Kind
from lora_operator.kube.pods import Pod
from lora_operator.names import label_value
from lora_operator.plan.adapter_list import ModuleList
from lora_operator.plan.admission import public_name
from lora_operator.plan.deployment_pods import PodView
from lora_operator.plan.engine_view import build_view, changed_names, holds, is_at_rest, is_too_old, list_for
from lora_operator.reconcile.context import Context
from lora_operator.reconcile.own_pods import learn_owners, live_pods, own_pods
from lora_operator.reconcile.records import PodRecord
from lora_operator.reconcile.store import Key, ObjectKey
from lora_operator.reconcile.stored_lists import learn_held
from lora_operator.wire.plugin import PluginState

SETTLE_SECONDS: Final = 2.0  # how long a plugin may hold the answer to a new list back while it loads
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
        token=guard_token(await context.secrets.master_key(), deployment),
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
    """Ask the engine, and give it the list where it has another one; a failure becomes a view, too."""
    record = context.records.pods[engine.pod]
    known = record.view
    if known is not None and known.container_id != engine.container:
        known = None  # of an earlier container: nothing of it holds, and the guard must be proven anew
    try:
        return await _ask(context, deployment, engine, record, known)
    except StaleList as error:
        _note_held(context, deployment, error.state)
        context.enqueue(Key(Kind.VLLM_DEPLOYMENT, *deployment.key))
        return POLL_UNSETTLED
    except EngineError as error:
        return _note_failure(context, deployment, engine, record, known, error)


async def _ask(
    context: Context, deployment: VLLMDeployment, engine: _Engine, record: PodRecord, known: PodView | None
) -> float:
    rolls = deployment.spec.lora.update_strategy == ROLLOUT  # then no pod is sent a list
    names = {pod.name for pod in live_pods(context, deployment)}
    modules = None if rolls else list_for(_list(context, deployment), engine.pod[1], names)
    if not (known is not None and known.guarded) and not await context.engines.admin_api_is_guarded(engine.url):
        _publish(context, deployment, engine.pod, PodView(uid=engine.uid, container_id=engine.container))
        return POLL_FAILING
    if await _is_as_before(context, engine, known, modules):
        return _idle()
    if not rolls:
        await learn_held(context, deployment, engine.pod, engine.url, engine.token)
    state = await _exchange(context, engine, known, modules)
    _note_held(context, deployment, state)
    models = await context.engines.models(engine.url, engine.token)
    record.misses = 0
    record.listed = models
    view = build_view(engine.uid, engine.container, state, models, served_names=deployment.spec.model.served_names)
    _publish(context, deployment, engine.pod, view)
    told = modules is not None and holds(state, modules)
    if state.settled and (told or rolls or state.update_strategy == ROLLOUT):
        return POLL_RETIRED if state.retired else _idle()
    return POLL_UNSETTLED if modules is not None or rolls else POLL_STARTING


def _note_failure(
    context: Context,
    deployment: VLLMDeployment,
    engine: _Engine,
    record: PodRecord,
    known: PodView | None,
    error: EngineError,
) -> float:
    """Publish that a pod can't be asked; returns after how many seconds to ask again."""
    if not engine.ready and isinstance(error, EngineUnreachable):
        if not record.silent:
            record.silent = True
            context.enqueue(Key(Kind.VLLM_DEPLOYMENT, *deployment.key))
        return POLL_STARTING  # an engine that loads its model does not listen yet
    before = known.error if known is not None else None
    failed = PodView(
        uid=engine.uid,
        container_id=engine.container,
        error=str(error) if before is None else before,  # the first words: a pod must not cause writes by new ones
        guarded=known is not None and known.guarded,
    )
    _publish(context, deployment, engine.pod, failed)
    record.misses += 1
    return min(POLL_FAILING * 2.0 ** min(record.misses - 1, 8), POLL_FAILING_LONGEST)


def _idle() -> float:
    return POLL_IDLE * random.uniform(0.8, 1.2)  # noqa: S311  spreads load


async def _is_as_before(context: Context, engine: _Engine, known: PodView | None, modules: ModuleList | None) -> bool:
    """Whether a pod that was at rest lists the same as then: so its plugin need not be asked. One request."""
    if known is None or modules is None or not holds(known, modules) or not is_at_rest(known):
        return False
    before = context.records.pods.peek(engine.pod).listed
    return before is not None and await context.engines.models(engine.url, engine.token) == before


def _list(context: Context, deployment: VLLMDeployment) -> ModuleList | None:
    return context.records.deployments.peek(deployment.key).modules


def _note_held(context: Context, deployment: VLLMDeployment, state: PluginState) -> None:
    """Remember the highest generation that any pod holds: a list is never numbered like another one before it."""
    if deployment.key in context.store.deployments:  # else it was deleted while its pod was asked
        record = context.records.deployments[deployment.key]
        record.held = max(record.held, state.list_generation or 0)


async def _exchange(
    context: Context, engine: _Engine, known: PodView | None, modules: ModuleList | None
) -> PluginState:
    """Push the list where the pod is not known to hold it, else only ask. A pod with a list of its own takes none."""
    if modules is None or known is None or known.error is not None or holds(known, modules):
        state = await context.engines.state(engine.url, engine.token)
        told = modules is None or holds(state, modules)
        if modules is None or told or is_too_old(state) or state.update_strategy == ROLLOUT:
            return state
    elif known.too_old or known.update_strategy == ROLLOUT:
        return await context.engines.state(engine.url, engine.token)
    return await context.engines.put_list(engine.url, engine.token, modules.encoded, wait=SETTLE_SECONDS)


def _publish(context: Context, deployment: VLLMDeployment, pod: ObjectKey, view: PodView | None) -> None:
    record = context.records.pods[pod]
    old, first = record.view, not record.asked
    record.view, record.asked, record.silent = view, True, False
    if old == view and not first:
        return
    context.enqueue(Key(Kind.VLLM_DEPLOYMENT, *deployment.key))
    names = None if first else changed_names(old, view, _list(context, deployment))
    for adapter in context.store.adapters_of(deployment.key):
        if names is None or public_name(adapter, deployment) in names:
            context.enqueue(Key(Kind.LORA_ADAPTER, *adapter.key))
