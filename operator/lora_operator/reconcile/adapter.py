"""One LoRAAdapter: observe, plan, make sure that its artifact exists, publish the decision, write the status."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from lora_operator.api.adapter import LoRAAdapter
from lora_operator.api.cache import ModelCache
from lora_operator.api.deployment import VLLMDeployment
from lora_operator.conditions import Verdict, failing
from lora_operator.constants import Reason
from lora_operator.errors import ForbiddenError, InvalidObjectError, OperatorError, ReasonError
from lora_operator.kube.kinds import Kind
from lora_operator.plan.adapter import plan_adapter, plan_refused, unknown
from lora_operator.plan.adapter_content import AdapterObservation, name_taken
from lora_operator.plan.adapter_list import Decision, Module
from lora_operator.plan.admission import admit, public_name
from lora_operator.plan.deployment_status import service_url
from lora_operator.plan.wants import Credentials, find_cache
from lora_operator.reconcile.context import Context
from lora_operator.reconcile.fleet import observe_fleet
from lora_operator.reconcile.store import Key, ObjectKey

UNREADABLE_SECONDS: Final = 30.0


async def reconcile_adapter(context: Context, key: Key) -> float | None:
    """Bring one adapter to what its spec says. Returns after how many seconds to look again by itself."""
    place = (key.namespace, key.name)
    adapter = context.store.adapters.get(place)
    if adapter is None or adapter.metadata.deletion_timestamp is not None:
        for artifact in context.records.forget_adapter(place):
            context.enqueue(Key(Kind.MODEL_ARTIFACT, *artifact))
        return None
    if Key(Kind.VLLM_DEPLOYMENT, *adapter.deployment_key) in context.store.invalid:
        _publish(context, adapter, unknown(adapter))  # it exists, it only can't be read: nothing follows from that
        return UNREADABLE_SECONDS
    try:
        seen = await _observe(context, adapter)
        plan = plan_adapter(seen, now=context.clock.now())
        with context.records.making(_place(plan.artifact) if plan.artifact else None):
            if plan.artifact is not None:
                cause = await _ensure_artifact(context, plan.artifact)
                if cause is not None:
                    plan = plan_refused(seen, plan, cause, now=context.clock.now())
            _publish(context, adapter, plan.decision)
    except OperatorError:
        # The others' list must not wait for this one: until it can be looked at, its entry stays as it is.
        _publish(context, adapter, unknown(adapter))
        raise
    if plan.status is not None:
        await context.statuses.write(adapter, plan.status)
    return plan.requeue_after


def _publish(context: Context, adapter: LoRAAdapter, decision: Decision) -> None:
    """Record a decision, and wake whom it concerns: the deployment's list, and artifacts whose wanters changed."""
    changed = context.records.publish_decision(adapter.key, decision)
    if changed is None:
        return
    context.enqueue(Key(Kind.VLLM_DEPLOYMENT, *adapter.deployment_key))
    for artifact in changed:
        context.enqueue(Key(Kind.MODEL_ARTIFACT, *artifact))


def _place(manifest: dict[str, Any]) -> ObjectKey:
    return manifest["metadata"]["namespace"], manifest["metadata"]["name"]


async def _ensure_artifact(context: Context, manifest: dict[str, Any]) -> Verdict | None:
    """Create the wanted artifact where it is not there; what is there is never changed. Returns why there can't be one."""
    key = Key(Kind.MODEL_ARTIFACT, *_place(manifest))
    present = context.store.artifacts.get((key.namespace, key.name))
    if present is not None and present.spec.to_wire() != manifest["spec"]:
        return name_taken((key.namespace, key.name))
    if present is None:
        try:
            body = await context.kube.apply(manifest)
        except (ForbiddenError, InvalidObjectError) as error:
            return failing(Reason.QUEUED, f"its ModelArtifact can't be made: {error}; tried again every minute")
        context.answers.take(Kind.MODEL_ARTIFACT, body)
        context.enqueue(key)
    return None


async def _observe(context: Context, adapter: LoRAAdapter) -> AdapterObservation:
    store = context.store
    deployment = store.deployments.get(adapter.deployment_key)
    labels = namespace_labels(context, adapter.metadata.namespace)
    admitted = admit(adapter, deployment, namespace_labels=labels).is_true
    want = context.records.model_want(adapter.deployment_key)
    cache = _cache(context, deployment) if admitted else None
    rivals = _rivals(context, adapter, deployment) if admitted else ()
    unreadable = unreadable_adapters(context)
    # Who has the name matters only where somebody else wants it, or somebody can't be read.
    entry = _entry(context, adapter, deployment) if deployment and (rivals or unreadable) else None
    return AdapterObservation(
        adapter=adapter,
        deployment=deployment,
        namespace_labels=labels,
        rivals=rivals,
        cache=cache,
        base_artifact=want.artifact[1] if want and want.artifact else None,
        credentials=await _credentials(context, adapter, cache) if admitted else None,
        artifacts=store.artifacts,
        fleet=observe_fleet(context, deployment) if deployment else None,
        url=service_url(deployment) if deployment and admitted else None,
        left_out=context.records.deployments.peek(adapter.deployment_key).left_out.get(adapter.metadata.uid),
        name_held=entry is not None and entry.adapter in unreadable,
        name_holder=entry.uid if entry is not None else None,
    )


def namespace_labels(context: Context, namespace: str) -> Mapping[str, str] | None:
    """A namespace's labels; None where the namespace is not known."""
    known = context.store.namespaces.get(("", namespace))
    return None if known is None else known.labels


def _rivals(context: Context, adapter: LoRAAdapter, deployment: VLLMDeployment | None) -> tuple[LoRAAdapter, ...]:
    if deployment is None:
        return ()
    return tuple(
        other
        for other in context.store.adapters_named(adapter.deployment_key, adapter.served_name)
        if other.key != adapter.key
        and public_name(other, deployment) == public_name(adapter, deployment)
        and admit(other, deployment, namespace_labels=namespace_labels(context, other.metadata.namespace)).is_true
    )


def _entry(context: Context, adapter: LoRAAdapter, deployment: VLLMDeployment) -> Module | None:
    """What the list has under the adapter's name."""
    modules = context.records.deployments.peek(deployment.key).modules
    return modules.by_name().get(public_name(adapter, deployment)) if modules else None


def unreadable_adapters(context: Context) -> set[str]:
    """Adapters that exist and can't be read, as module lists name them."""
    return {f"{key.namespace}/{key.name}" for key in context.store.invalid if key.kind is Kind.LORA_ADAPTER}


def _cache(context: Context, deployment: VLLMDeployment | None) -> ModelCache | ReasonError | None:
    return None if deployment is None else cache_of(context, deployment)


def cache_of(context: Context, deployment: VLLMDeployment) -> ModelCache | ReasonError:
    """A deployment's cache, or why there is none."""
    metadata = deployment.metadata
    ref = deployment.spec.cache_ref
    try:
        return find_cache(
            context.store.caches,
            namespace=metadata.namespace,
            ref=ref.name if ref else None,
            used_by=f"VLLMDeployment {metadata.namespace}/{metadata.name}",
        )
    except ReasonError as error:
        return error


async def _credentials(
    context: Context, adapter: LoRAAdapter, cache: ModelCache | ReasonError | None
) -> Credentials | ReasonError | None:
    secret = adapter.spec.source.secret
    is_offline = isinstance(cache, ModelCache) and cache.spec.offline
    return (
        None if secret is None or is_offline else await context.secrets.credentials(adapter.metadata.namespace, *secret)
    )
