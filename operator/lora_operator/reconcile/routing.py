"""Which keys have to be looked at after a change of the store: pure, and wider rather than narrower than needed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lora_operator.api import LoRAAdapter, ModelArtifact, ModelCache, VLLMDeployment
from lora_operator.conditions import find, is_true
from lora_operator.constants import ANNOTATION_DEFAULT_CACHE, COMPONENT_ENGINE, LABEL_CACHE, LABEL_COMPONENT, Condition
from lora_operator.kube.kinds import Kind
from lora_operator.kube.objects import KubeObject
from lora_operator.kube.pods import Pod
from lora_operator.names import label_value
from lora_operator.reconcile.store import Change, Key, Store, reported_artifacts


def keys_for(change: Change, store: Store) -> set[Key]:
    """Keys whose reconcile may find something new."""
    match change.kind:
        case Kind.LORA_ADAPTER:
            lists = _all_lists(store) if change.was_invalid else ()
            return {change.key, *_for_adapter(change.old, change.new, store), *_no_longer_reported(change), *lists}
        case Kind.VLLM_DEPLOYMENT:
            return {change.key, *_for_deployment(change, store), *_no_longer_reported(change)}
        case Kind.MODEL_CACHE:
            return {change.key, *_for_cache(change, store)}
        case Kind.MODEL_ARTIFACT:
            return {change.key, *_for_artifact(change, store)}
        case Kind.JOB | Kind.DEPLOYMENT | Kind.CONFIG_MAP | Kind.SERVICE:
            return set(_owners(change))
        case Kind.POD:
            return set(_for_pod(change, store))
        case Kind.NAMESPACE:
            return set(_for_namespace(change, store))


def _form(obj: LoRAAdapter | VLLMDeployment | None) -> tuple[str, int] | None:
    return None if obj is None else (obj.metadata.uid, obj.metadata.generation)


def _for_adapter(old: LoRAAdapter | None, new: LoRAAdapter | None, store: Store) -> Iterator[Key]:
    if _form(old) == _form(new):
        return
    for adapter in (old, new):
        if adapter is None:
            continue
        yield Key(Kind.VLLM_DEPLOYMENT, *adapter.deployment_key)
        for rival in store.adapters_named(adapter.deployment_key, adapter.served_name):
            yield Key(Kind.LORA_ADAPTER, *rival.key)


def _all_lists(store: Store) -> Iterator[Key]:
    """An adapter that could not be read kept its entry and its name in whichever list had it, and wants no artifact by name."""
    for deployment in store.deployments:
        yield Key(Kind.VLLM_DEPLOYMENT, *deployment)


def _for_deployment(change: Change, store: Store) -> Iterator[Key]:
    if _form(change.old) != _form(change.new):
        for adapter in store.adapters_of((change.key.namespace, change.key.name)):
            yield Key(Kind.LORA_ADAPTER, *adapter.key)


def _no_longer_reported(change: Change) -> Iterator[Key]:
    """Artifacts that were kept because a status said that they are in use."""
    for artifact in reported_artifacts(change.old) - reported_artifacts(change.new):
        yield Key(Kind.MODEL_ARTIFACT, *artifact)


def _cache_form(cache: ModelCache | None) -> tuple[Any, ...] | None:
    """What others go by; not what a cache says of its content, which changes with every download."""
    if cache is None:
        return None
    ready = find(cache.status.conditions, Condition.READY)
    metadata = cache.metadata
    default = metadata.annotations.get(ANNOTATION_DEFAULT_CACHE)
    claim = (cache.access_modes, cache.content_identity)
    return (metadata.uid, metadata.generation, default, ready and (ready.status, ready.reason), claim)


def _for_cache(change: Change, store: Store) -> Iterator[Key]:
    if _cache_form(change.old) == _cache_form(change.new):
        return
    key = change.key
    for artifact in store.artifacts_of((key.namespace, key.name)):
        yield Key(Kind.MODEL_ARTIFACT, *artifact.key)
    for deployment in store.deployments.values():
        if deployment.metadata.namespace == key.namespace:
            yield Key(Kind.VLLM_DEPLOYMENT, *deployment.key)
            for adapter in store.adapters_of(deployment.key):
                yield Key(Kind.LORA_ADAPTER, *adapter.key)


def _for_artifact(change: Change, store: Store) -> Iterator[Key]:
    old: ModelArtifact | None = change.old
    new: ModelArtifact | None = change.new
    was, now = (
        artifact is not None and is_true(artifact.status.conditions, Condition.READY) for artifact in (old, new)
    )
    failed_before, failed_now = (artifact.status.last_failure if artifact else None for artifact in (old, new))
    unused_before, unused_now = (artifact.status.unreferenced_since if artifact else None for artifact in (old, new))
    if was != now or failed_before != failed_now or unused_before != unused_now:
        cache = (new or old).spec.cache_ref.name if new or old else ""  # type: ignore[union-attr]
        yield Key(Kind.MODEL_CACHE, change.key.namespace, cache)
    if was != now and (artifact := new or old) is not None and artifact.spec.type == "BaseModel":
        for other in store.artifacts_of((change.key.namespace, artifact.spec.cache_ref.name)):
            if other.spec.base_model_ref is not None and other.spec.base_model_ref.name == change.key.name:
                yield Key(Kind.MODEL_ARTIFACT, *other.key)


def _owners(change: Change) -> Iterator[Key]:
    views: tuple[KubeObject | None, ...] = (change.old, change.new)
    for view in views:
        owner = view.owner if view is not None else None
        if owner is not None and owner.kind in change.kind.info.owners:
            yield Key(Kind(owner.kind), change.key.namespace, owner.name)


def _for_pod(change: Change, store: Store) -> Iterator[Key]:
    pods: list[Pod] = [pod for pod in (change.new, change.old) if pod is not None]
    yield from _cache_of_pod(change, store)
    if any(pod.labels.get(LABEL_COMPONENT) == COMPONENT_ENGINE for pod in pods):
        yield change.key
        for deployment in store.deployments.values():
            if deployment.metadata.namespace == change.key.namespace:
                yield Key(Kind.VLLM_DEPLOYMENT, *deployment.key)
        return
    owner = pods[0].owner if pods else None
    job = store.jobs.get((change.key.namespace, owner.name)) if owner else None
    if job is not None and job.owner is not None:
        kind = Kind.MODEL_CACHE if job.owner.kind == Kind.MODEL_CACHE else Kind.MODEL_ARTIFACT
        yield Key(kind, change.key.namespace, job.owner.name)


def _cache_of_pod(change: Change, store: Store) -> Iterator[Key]:
    """The cache whose pods are kept on one node, when one of them comes, goes, gets its node, or ends."""
    was, now = (_seat(pod) for pod in (change.old, change.new))
    if was == now:
        return
    labels = {seat[0] for seat in (was, now) if seat is not None}
    for namespace, name in store.caches:
        if namespace == change.key.namespace and label_value(name) in labels:
            yield Key(Kind.MODEL_CACHE, namespace, name)


def _seat(pod: Pod | None) -> tuple[str, str, bool] | None:
    label = pod.labels.get(LABEL_CACHE) if pod is not None else None
    return (label, pod.spec.node, pod.has_ended) if pod is not None and label is not None else None


def _for_namespace(change: Change, store: Store) -> Iterator[Key]:
    old, new = (namespace.labels if namespace is not None else None for namespace in (change.old, change.new))
    if old == new:
        return
    for adapter in store.adapters.values():
        if adapter.metadata.namespace == change.key.name:
            yield Key(Kind.VLLM_DEPLOYMENT, *adapter.deployment_key)
            for rival in store.adapters_named(adapter.deployment_key, adapter.served_name):  # itself among them
                yield Key(Kind.LORA_ADAPTER, *rival.key)
