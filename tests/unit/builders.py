"""Small builders of what the pure code is given: an object as the API server sends it, parsed as the store parses it.

Every builder has a default for all that a test does not speak of, so a test names only what it is about.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, TypeVar

from lora_operator.api import LoRAAdapter, ModelArtifact, ModelCache, VLLMDeployment
from lora_operator.api.common import ApiModel, StatusCondition
from lora_operator.constants import (
    ANNOTATION_ATTEMPT,
    COMPONENT_ENGINE,
    ENGINE_CONTAINER,
    FETCH_CONTAINER,
    LABEL_COMPONENT,
    LABEL_DEPLOYMENT,
    LABEL_MANAGED_BY,
    MANAGED_BY,
    Condition,
)
from lora_operator.kube.kinds import Kind
from lora_operator.kube.pods import Pod
from lora_operator.kube.workloads import Job
from lora_operator.plan.adapter_list import ArtifactReference, Decision, Drop, Entry, Module, Serve
from lora_operator.plan.deployment_pods import DeploymentPod, DeploymentPods, PodView, Served
from lora_operator.plan.job_view import JobView, view_job
from lora_operator.reconcile.store import Change, ObjectKey, Store

NO_ENTRY = Drop()
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
LATER = datetime(2026, 1, 2, 9, 0, 0, tzinfo=UTC)
COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER_COMMIT = "fedcba9876543210fedcba9876543210fedcba98"
CREATED = "2026-01-01T00:00:00Z"

ModelT = TypeVar("ModelT", bound=ApiModel)
Conditions = Mapping[str, tuple[str, str, str]]  # type -> (status, reason, message)


def through_the_api(model: ModelT) -> ModelT:
    """The model as it comes back from the API server: to JSON and parsed again."""
    return type(model).model_validate(json.loads(json.dumps(model.to_wire())))


def make_conditions(conditions: Conditions | None, *, at: str = CREATED) -> list[dict[str, Any]]:
    """Conditions in their wire form."""
    return [
        {"type": type_, "status": status, "reason": reason, "message": message, "lastTransitionTime": at}
        for type_, (status, reason, message) in (conditions or {}).items()
    ]


def ready(message: str = "ready") -> Conditions:
    """An object that is Ready."""
    return {"Ready": ("True", "Ready", message)}


def not_ready(reason: str, message: str = "why not") -> Conditions:
    """An object that is not Ready."""
    return {"Ready": ("False", reason, message)}


def told(conditions: tuple[StatusCondition, ...]) -> dict[str, tuple[str, str, str]]:
    """Conditions as what a reader sees: type -> (status, reason, message)."""
    return {str(c.type): (c.status, str(c.reason), c.message) for c in conditions}


def _source(repo: str, revision: str, secret: str | None, s3: Mapping[str, Any] | None) -> dict[str, Any]:
    if s3 is not None:
        return {"s3": dict(s3) | ({"credentialsSecretRef": {"name": secret}} if secret is not None else {})}
    token = {"tokenSecretRef": {"name": secret}} if secret is not None else {}
    return {"huggingFace": {"repo": repo, "revision": revision, **token}}


def make_adapter(
    name: str = "sql",
    namespace: str = "team-a",
    *,
    repo: str = "org/sql",
    revision: str = "main",
    path: str = "",
    secret: str | None = None,
    s3: Mapping[str, Any] | None = None,
    deployment: str = "llama",
    deployment_namespace: str | None = "serving",
    uid: str = "",
    generation: int = 1,
    created: str | None = CREATED,
    annotations: Mapping[str, str] | None = None,
    status: Mapping[str, Any] | None = None,
    conditions: Conditions | None = None,
    **spec: Any,
) -> LoRAAdapter:
    """A LoRAAdapter; further fields of its spec by their camelCase names."""
    ref = {"name": deployment} | ({"namespace": deployment_namespace} if deployment_namespace else {})
    return LoRAAdapter.model_validate(
        {
            "metadata": {
                "name": name,
                "namespace": namespace,
                "uid": uid or f"uid-{namespace}-{name}",
                "generation": generation,
                "creationTimestamp": created,
                "annotations": dict(annotations or {}),
            },
            "spec": {"source": {**_source(repo, revision, secret, s3), "path": path}, "vllmDeploymentRef": ref, **spec},
            "status": {**(status or {}), "conditions": make_conditions(conditions)},
        }
    )


def make_deployment(
    name: str = "llama",
    namespace: str = "serving",
    *,
    served_names: tuple[str, ...] = ("meta/Llama", "llama"),
    replicas: int | None = 2,
    policy: Mapping[str, Any] | None = None,
    names: str = "Plain",
    lora: Mapping[str, Any] | None = None,
    model: Mapping[str, Any] | None = None,
    engine: Mapping[str, Any] | None = None,
    generation: int = 1,
    uid: str = "uid-llama",
    status: Mapping[str, Any] | None = None,
    conditions: Conditions | None = None,
    **spec: Any,
) -> VLLMDeployment:
    """A VLLMDeployment that admits every namespace; further fields of its spec by their camelCase names."""
    body: dict[str, Any] = {
        "model": {"source": {"huggingFace": {"repo": "meta/base"}}, "servedNames": list(served_names), **(model or {})},
        "adapterPolicy": {"namespaces": policy or {"from": "All"}, "servedNames": names},
        "lora": dict(lora or {}),
        "engine": {"image": "vllm:1", **(engine or {})},
        **spec,
    }
    if replicas is not None:
        body["replicas"] = replicas
    return VLLMDeployment.model_validate(
        {
            "metadata": {"name": name, "namespace": namespace, "uid": uid, "generation": generation},
            "spec": body,
            "status": {**(status or {}), "conditions": make_conditions(conditions)},
        }
    )


def make_cache(
    name: str = "default",
    namespace: str = "serving",
    *,
    claim: str = "models",
    template: Mapping[str, Any] | None = None,
    reclaim: str | None = None,
    access_modes: tuple[str, ...] = ("ReadWriteMany",),
    endpoint: str = "https://hub.test",
    s3_endpoints: tuple[str, ...] = (),
    security: Mapping[str, Any] | None = None,
    uid: str = "uid-cache",
    generation: int = 1,
    is_default: bool = False,
    conditions: Conditions | None = None,
    status: Mapping[str, Any] | None = None,
    **spec: Any,
) -> ModelCache:
    """A ModelCache whose claim was looked at, Ready unless `conditions` say otherwise; with `template`, the spec of a claim to make;
    further fields of its spec by their camelCase names."""
    storage: dict[str, Any] = {"existingClaim": claim}
    if template is not None:
        storage = {"volumeClaimTemplate": {"spec": dict(template)}}
    if reclaim is not None:
        storage["reclaimPolicy"] = reclaim
    seen = {
        "claimName": claim if template is None else name,
        "claimUid": "uid-claim",
        "accessModes": list(access_modes),
    }
    return ModelCache.model_validate(
        {
            "metadata": {
                "name": name,
                "namespace": namespace,
                "uid": uid,
                "generation": generation,
                "annotations": {"lora-operator.dev/is-default-cache": "true"} if is_default else {},
            },
            "spec": {
                "storage": storage,
                "huggingFace": {"endpoint": endpoint},
                "s3": {"allowedEndpoints": list(s3_endpoints)},
                "securityContext": dict(security or {}),
                **spec,
            },
            "status": {
                **(seen if status is None else status),
                "conditions": make_conditions(ready() if conditions is None else conditions),
            },
        }
    )


def make_artifact(
    name: str = "sql-0a1b2c3d4e",
    namespace: str = "serving",
    *,
    type: str = "Adapter",  # noqa: A002  the field's name
    repo: str = "org/sql",
    revision: str = "main",
    base: str | None = None,
    credentials: tuple[str, str, str, str] | None = None,
    secret: str | None = None,
    s3: Mapping[str, Any] | None = None,
    by_hand: bool = False,
    uid: str = "uid-artifact",
    generation: int = 1,
    annotations: Mapping[str, str] | None = None,
    status: Mapping[str, Any] | None = None,
    conditions: Conditions | None = None,
    cache: str = "default",
) -> ModelArtifact:
    """A ModelArtifact that has no status unless one is given."""
    spec: dict[str, Any] = {"cacheRef": {"name": cache}, "type": type, "source": _source(repo, revision, secret, s3)}
    if base is not None:
        spec["baseModelRef"] = {"name": base}
    if credentials is not None:
        spec["credentials"] = dict(zip(("namespace", "name", "key", "uid"), credentials, strict=True))
    return ModelArtifact.model_validate(
        {
            "metadata": {
                "name": name,
                "namespace": namespace,
                "uid": uid,
                "generation": generation,
                "labels": {} if by_hand else {LABEL_MANAGED_BY: MANAGED_BY},
                "annotations": dict(annotations or {}),
            },
            "spec": spec,
            "status": {**(status or {}), "conditions": make_conditions(conditions)},
        }
    )


def ready_artifact(
    name: str = "sql-0a1b2c3d4e", *, rank: int | None = 8, commit: str = COMMIT, **more: Any
) -> ModelArtifact:
    """A ModelArtifact whose content is in the cache."""
    status = {
        "source": more.get("repo", "org/sql"),
        "attempt": 1,
        "finishedAttempt": 1,
        "failedAttempts": 0,
        "observedGeneration": 1,
        "resolvedRevision": commit,
        "revision": commit[:8],
        "digest": "sha256:aa",
        "sizeBytes": 131072,
        "size": "128Ki",
        "files": 2,
        "path": f"artifacts/{name}-{commit}",
        "targetModules": ["q_proj"],
    }
    if rank is not None:
        status["rank"] = rank
    status |= more.pop("status", {})
    return make_artifact(name, conditions=ready(f"org/sql@{commit[:8]}, 128Ki"), status=status, **more)


def make_module(
    name: str = "sql",
    *,
    path: str = f"/model-cache/artifacts/sql-0a1b2c3d4e-{COMMIT}",
    base: str = "meta/Llama",
    revision: str = COMMIT,
    adapter: str = "team-a/sql",
    uid: str = "uid-team-a-sql",
    lazy: bool = False,
    preload: int = 0,
) -> Module:
    """One entry of a module list; by default what make_adapter() with ready_artifact() leads to."""
    return Module(
        name=name,
        path=path,
        base_model_name=base,
        revision=revision,
        adapter=adapter,
        uid=uid,
        lazy=lazy,
        preload=preload,
    )


def make_decision(
    entry: Entry = NO_ENTRY, *, uid: str = "uid-team-a-sql", generation: int = 1, **reference: Any
) -> Decision:
    """What was decided on an adapter; `reference` has fields of ArtifactReference by their names."""
    return Decision(uid, generation, entry, ArtifactReference(**reference))


def served_by(decision: Decision) -> Module | None:
    """The entry that a decision gives to its adapter; None where it keeps what it has, or has none."""
    return decision.entry.module if isinstance(decision.entry, Serve) else None


def make_view(*modules: Module, generation: int | None = 1, **more: Any) -> PodView:
    """A look at a pod's engine that serves `modules`; a field of PodView by its name."""
    values: dict[str, Any] = {
        "uid": "uid-pod",
        "container_id": "containerd://1",
        "guarded": True,
        "version": "0.32.0",
        "list_generation": generation,
        "settled": True,
        "served": {m.name: Served(path=m.path, parent=m.base_model_name, internal_name=m.name) for m in modules},
    }
    return PodView(**(values | more))


def make_pods(*pods: DeploymentPod, replicas: int | None = None) -> DeploymentPods:
    """A fleet of these pods; `replicas` as many unless given."""
    return DeploymentPods(replicas=len(pods) if replicas is None else replicas, pods=pods)


def make_pod(name: str = "llama-0", view: PodView | None = None, *, is_ready: bool = True) -> DeploymentPod:
    """One pod of a fleet."""
    return DeploymentPod(name=name, ready=is_ready, view=view)


def make_job(
    attempt: int = 1,
    *,
    artifact: str = "sql-0a1b2c3d4e",
    owner_uid: str = "uid-artifact",
    suspend: bool = False,
    failed: str | None = None,
    complete: bool = False,
) -> dict[str, Any]:
    """A download Job as the API server sends it; `failed` is the reason of its Failed condition."""
    conditions = []
    if failed is not None:
        conditions.append({"type": "Failed", "status": "True", "reason": failed})
    if complete:
        conditions.append({"type": "Complete", "status": "True"})
    return {
        "metadata": {
            "name": f"{artifact}-{attempt}",
            "namespace": "serving",
            "uid": f"uid-job-{attempt}",
            "annotations": {ANNOTATION_ATTEMPT: str(attempt)},
            "ownerReferences": [
                {"kind": "ModelArtifact", "name": artifact, "uid": owner_uid, "controller": True},
            ],
        },
        "spec": {"suspend": suspend},
        "status": {"conditions": conditions},
    }


def job_pod(
    state: Mapping[str, Any] | None = None, *, attempt: int = 1, unscheduled: str | None = None
) -> dict[str, Any]:
    """A pod of that Job with its container in `state`."""
    status: dict[str, Any] = {}
    if state is not None:
        status["containerStatuses"] = [{"name": FETCH_CONTAINER, "state": dict(state)}]
    if unscheduled is not None:
        status["conditions"] = [{"type": "PodScheduled", "status": "False", "message": unscheduled}]
    return {
        "metadata": {
            "name": f"fetch-{attempt}-x",
            "namespace": "serving",
            "ownerReferences": [{"kind": "Job", "name": "j", "uid": f"uid-job-{attempt}", "controller": True}],
        },
        "status": status,
    }


def engine_pod(
    name: str = "llama-0",
    *,
    uid: str = "uid-pod",
    is_ready: bool = True,
    container: Mapping[str, Any] | None = None,
    owner: str = "uid-rs",
    deleted: bool = False,
    phase: str = "Running",
    conditions: tuple[Mapping[str, Any], ...] = (),
    labels: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """An engine pod as the API server sends it; `container` is the engine's container status."""
    running = {"containerID": "containerd://1", "ready": is_ready, "state": {"running": {}}}
    metadata: dict[str, Any] = {
        "name": name,
        "namespace": "serving",
        "uid": uid,
        "labels": {
            LABEL_MANAGED_BY: MANAGED_BY,
            LABEL_COMPONENT: COMPONENT_ENGINE,
            LABEL_DEPLOYMENT: "llama",
            **(labels or {}),
        },
        "ownerReferences": [{"kind": "ReplicaSet", "name": "llama-rs", "uid": owner, "controller": True}],
    }
    if deleted:
        metadata["deletionTimestamp"] = CREATED
    return {
        "metadata": metadata,
        "status": {
            "phase": phase,
            "podIP": "198.18.0.7",
            "conditions": [{"type": "Ready", "status": "True" if is_ready else "False"}, *conditions],
            "containerStatuses": [{"name": ENGINE_CONTAINER, **(running if container is None else container)}],
        },
    }


def make_workload(*, uid: str = "uid-deploy", owner: str = "uid-llama", **status: Any) -> dict[str, Any]:
    """The apps/v1 Deployment of make_deployment()."""
    return {
        "metadata": {
            "name": "llama",
            "namespace": "serving",
            "uid": uid,
            "ownerReferences": [{"kind": "VLLMDeployment", "name": "llama", "uid": owner, "controller": True}],
        },
        "spec": {"replicas": 2},
        "status": status,
    }


def jobs_view(job: dict[str, Any], pods: Iterable[dict[str, Any]], **more: Any) -> JobView:
    """What is seen of a Job and its pods, as the API server sends them."""
    return view_job(Job.parse(job), [Pod.parse(pod) for pod in pods], **more)


def ready_reason(conditions: tuple[StatusCondition, ...]) -> str:
    """Reason of Ready."""
    return told(conditions)[Condition.READY][1]


def take_list(store: Store, kind: Kind, items: Iterable[Mapping[str, Any]], version: str) -> list[Change]:
    """A complete list of a kind, as Sync puts it into the store page by page; what that changed."""
    present: set[ObjectKey] = set()
    changes = [change for item in items if (change := store.take_listed(kind, item, present)) is not None]
    return changes + store.retain(kind, present, version)
