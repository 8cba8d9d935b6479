"""The Job that removes content from a cache's volume: the operator's own image, the identity of download Jobs, no network needed."""

from __future__ import annotations

from typing import Any, Final

from lora_operator.api.cache import ModelCache
from lora_operator.constants import (
    ANNOTATION_ATTEMPT,
    ANNOTATION_EVICT,
    CACHE_MOUNT,
    COMPONENT_EVICT,
    EVICT_CONTAINER,
    LABEL_COMPONENT,
    LABEL_MANAGED_BY,
    MANAGED_BY,
)
from lora_operator.desired.common import CONTAINER_SECURITY, literal, owner_reference
from lora_operator.desired.job import pod_security
from lora_operator.desired.job_placement import Placement, keep_on_one_node
from lora_operator.desired.job_pod import with_job_template
from lora_operator.names import bounded
from lora_operator.wire.jobs import EVICT_REQUEST_ENV, EvictRequest

DEADLINE_SECONDS: Final = 600  # downloads wait for it, so it must not hang


def evict_job_name(cache: str, attempt: int) -> str:
    """Name of a cache's Job of that attempt, so that none is made twice."""
    return bounded(f"{cache}-evict-{attempt}", 63)


def build_evict_job(
    cache: ModelCache,
    request: EvictRequest,
    *,
    attempt: int,
    requested: str | None,
    image: str,
    image_pull_policy: str,
    resources: dict[str, Any],
    placement: Placement,
) -> dict[str, Any]:
    """The Job of one eviction; `requested`: the value of the annotation that asked for it, or for an earlier one."""
    labels = {LABEL_MANAGED_BY: MANAGED_BY, LABEL_COMPONENT: COMPONENT_EVICT}
    container = {
        "name": EVICT_CONTAINER,
        "image": image,
        "imagePullPolicy": image_pull_policy,
        "args": ["evict"],
        "env": [
            {"name": EVICT_REQUEST_ENV, "value": literal(request.model_dump_json(by_alias=True, exclude_none=True))},
            {"name": "HOME", "value": "/tmp"},  # noqa: S108  an emptyDir in the pod
        ],
        "resources": resources,
        "securityContext": CONTAINER_SECURITY | {"readOnlyRootFilesystem": True},
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [
            {"name": "cache", "mountPath": CACHE_MOUNT},
            {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108
        ],
    }
    template = {
        "metadata": {"labels": labels},
        "spec": {
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "terminationGracePeriodSeconds": 10,
            "securityContext": pod_security(cache),
            "containers": [container],
            "volumes": [
                {"name": "cache", "persistentVolumeClaim": {"claimName": cache.claim_name}},
                {"name": "tmp", "emptyDir": {}},
            ],
        }
        | placement.pod_spec,
    }
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": evict_job_name(cache.metadata.name, attempt),
            "namespace": cache.metadata.namespace,
            "labels": labels,
            "annotations": {ANNOTATION_ATTEMPT: str(attempt)}
            | ({ANNOTATION_EVICT: requested} if requested is not None else {}),
            "ownerReferences": [owner_reference(cache, "ModelCache")],
        },
        "spec": {
            "backoffLimit": 0,
            "completions": 1,
            "parallelism": 1,
            "activeDeadlineSeconds": DEADLINE_SECONDS,
            "template": keep_on_one_node(with_job_template(template, cache), cache),
        },
    }
