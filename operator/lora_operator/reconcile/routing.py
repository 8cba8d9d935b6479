"""Which keys have to be looked at after a change of the store: pure, and wider rather than narrower than needed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lora_operator.api import LoRAAdapter, ModelArtifact, ModelCache, VLLMDeployment
from lora_operator.conditions import find, is_true
from lora_operator.constants import ANNOTATION_DEFAULT_CACHE, COMPONENT_ENGINE, LABEL_CACHE, LABEL_COMPONENT, Condition
from lora_operator.kube.kinds import Kind
from lora_operator.kube.objects import controller
from lora_operator.names import label_value
from lora_operator.reconcile.store import Change, Key, Store, artifacts_told


def keys_for(change: Change, store: Store) -> set[Key]:
    """Keys whose reconcile may find something new."""
    match change.kind:
        case Kind.LORA_ADAPTER:
            lists = _all_lists(store) if change.was_invalid else ()
            return {change.key, *_for_adapter(change.old, change.new, store), *_no_longer_told(change), *lists}
        case Kind.VLLM_DEPLOYMENT:
            return {change.key, *_for_deployment(change, store), *_no_longer_told(change)}
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


def _no_longer_told(change: Change) -> Iterator[Key]:
    """Artifacts that were kept because a status said that they are in use."""
    for artifact in artifacts_told(change.old) - artifacts_told(change.new):
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
    for body in (change.old, change.new):
        owner = controller(body) if body is not None else None
        if owner is not None and owner[0] in change.kind.info.owners:
            yield Key(Kind(owner[0]), change.key.namespace, owner[1])


def _for_pod(change: Change, store: Store) -> Iterator[Key]:
    bodies: list[dict[str, Any]] = [body for body in (change.new, change.old) if body]
    yield from _cache_of_pod(change, store)
    if any((body["metadata"].get("labels") or {}).get(LABEL_COMPONENT) == COMPONENT_ENGINE for body in bodies):
        yield change.key
        for deployment in store.deployments.values():
            if deployment.metadata.namespace == change.key.namespace:
                yield Key(Kind.VLLM_DEPLOYMENT, *deployment.key)
        return
    owner = controller(bodies[0]) if bodies else None
    job = store.jobs.get((change.key.namespace, owner[1])) if owner else None
    above = controller(job) if job else None
    if above is not None:
        kind = Kind.MODEL_CACHE if above[0] == "ModelCache" else Kind.MODEL_ARTIFACT
        yield Key(kind, change.key.namespace, above[1])


def _cache_of_pod(change: Change, store: Store) -> Iterator[Key]:
    """The cache whose pods are kept on one node, when one of them comes, goes, gets its node, or ends."""
    was, now = (_seat(body) for body in (change.old, change.new))
    if was == now:
        return
    labels = {seat[0] for seat in (was, now) if seat is not None}
    for namespace, name in store.caches:
        if namespace == change.key.namespace and label_value(name) in labels:
            yield Key(Kind.MODEL_CACHE, namespace, name)


def _seat(body: dict[str, Any] | None) -> tuple[Any, ...] | None:
    label = ((body or {}).get("metadata") or {}).get("labels", {}).get(LABEL_CACHE)
    if body is None or label is None:
        return None
    status = body.get("status") or {}
    return (label, (body.get("spec") or {}).get("nodeName"), status.get("phase") in ("Succeeded", "Failed"))


def _for_namespace(change: Change, store: Store) -> Iterator[Key]:
    old, new = ((body or {"metadata": {}})["metadata"].get("labels") for body in (change.old, change.new))
    if old == new:
        return
    for adapter in store.adapters.values():
        if adapter.metadata.namespace == change.key.name:
            yield Key(Kind.VLLM_DEPLOYMENT, *adapter.deployment_key)
            for rival in store.adapters_named(adapter.deployment_key, adapter.served_name):  # itself among them
                yield Key(Kind.LORA_ADAPTER, *rival.key)
