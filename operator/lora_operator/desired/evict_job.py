"""The Job that removes content from a cache's volume: the operator's own image, the identity of download Jobs, no network needed."""

from __future__ import annotations

from typing import Any, Final

from lora_operator.api.cache import ModelCache
from lora_operator.constants import (
    ANNOTATION_ATTEMPT,
    ANNOTATION_EVICT,
    COMPONENT_EVICT,
    EVICT_CONTAINER,
    LABEL_COMPONENT,
    LABEL_MANAGED_BY,
    MANAGED_BY,
)
from lora_operator.desired.common import owner_reference
from lora_operator.desired.job_placement import JobPlacement, keep_on_one_node
from lora_operator.desired.job_pod import Program, build_template, with_job_template
from lora_operator.names import bounded
from lora_operator.wire.jobs import EVICT_REQUEST_ENV, EvictRequest

DEADLINE_SECONDS: Final = 600  # downloads wait for it, so it must not hang


def evict_job_name(cache: str, attempt: int) -> str:
    """Name of the Job of a cache's n-th eviction, at most 63 characters."""
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
    placement: JobPlacement,
) -> dict[str, Any]:
    """The Job of one eviction; `requested`: the value of the annotation that asked for it, or for an earlier one."""
    labels = {LABEL_MANAGED_BY: MANAGED_BY, LABEL_COMPONENT: COMPONENT_EVICT}
    asked = (EVICT_REQUEST_ENV, request.model_dump_json(by_alias=True, exclude_none=True))
    template = build_template(
        cache, Program(EVICT_CONTAINER, "evict", asked, image, image_pull_policy, resources), labels=labels
    )
    template["spec"] |= placement.pod_spec
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
