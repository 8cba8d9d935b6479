"""The download Job of one attempt, and the Secret with its token. Nothing secret stands in the Job itself."""

from __future__ import annotations

import base64
from typing import Any

from lora_operator.api.artifact import ModelArtifact
from lora_operator.api.cache import ModelCache
from lora_operator.constants import (
    ANNOTATION_ATTEMPT,
    CACHE_MOUNT,
    CREDENTIALS_KEY,
    CREDENTIALS_MOUNT,
    FETCH_CONTAINER,
)
from lora_operator.desired.common import CONTAINER_SECURITY, literal, owner_reference
from lora_operator.manifest import FETCH_REQUEST_ENV, FetchRequest, HuggingFaceRequest
from lora_operator.names import bounded, fetch_labels, job_name, token_secret

MAX_VIEW_NAME = 180  # of 255 bytes that a file name may have, so that the revision fits behind it


def build_request(
    artifact: ModelArtifact, cache: ModelCache, *, base_model_path: str | None, with_token: bool
) -> FetchRequest:
    """What the Job is told."""
    source = artifact.spec.source.hugging_face
    assert source is not None  # noqa: S101  the schema's rule; a narrowing for the type checker
    return FetchRequest(
        artifact=bounded(artifact.metadata.name, MAX_VIEW_NAME),
        type=artifact.spec.type,
        hugging_face=HuggingFaceRequest(
            repo=source.repo,
            revision=source.revision,
            allow_patterns=source.allow_patterns,
            ignore_patterns=source.ignore_patterns,
            endpoint=cache.spec.hugging_face.endpoint,
        ),
        path=artifact.spec.source.path,
        cache_root=CACHE_MOUNT,
        token_file=f"{CREDENTIALS_MOUNT}/{CREDENTIALS_KEY}" if with_token else None,
        load_format=artifact.spec.load_format or "auto",
        trust_remote_code=artifact.spec.trust_remote_code or False,
        without_tokenizer=artifact.spec.without_tokenizer or False,
        base_model_path=base_model_path,
    )


def build_job(
    artifact: ModelArtifact,
    cache: ModelCache,
    request: FetchRequest,
    *,
    attempt: int,
    image: str,
    image_pull_policy: str,
    deadline_seconds: int,
    resources: dict[str, Any],
) -> dict[str, Any]:
    """The Job. One that has a token is made suspended, and goes on once the Secret that it owns exists."""
    name = job_name(artifact.metadata.name, attempt)
    labels = fetch_labels(artifact.metadata.name)
    with_token = request.token_file is not None
    volumes: list[dict[str, Any]] = [
        {"name": "cache", "persistentVolumeClaim": {"claimName": cache.spec.storage.existing_claim}},
        {"name": "tmp", "emptyDir": {}},
    ]
    mounts: list[dict[str, Any]] = [
        {"name": "cache", "mountPath": CACHE_MOUNT},
        {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108  an emptyDir in the pod
    ]
    if with_token:
        volumes.append(
            {
                "name": "credentials",
                "secret": {"secretName": token_secret(name, artifact.metadata.uid), "defaultMode": 0o444},
            }
        )
        mounts.append({"name": "credentials", "mountPath": CREDENTIALS_MOUNT, "readOnly": True})
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": name,
            "namespace": artifact.metadata.namespace,
            "labels": labels,
            "annotations": {ANNOTATION_ATTEMPT: str(attempt)},
            "ownerReferences": [owner_reference(artifact, "ModelArtifact")],
        },
        "spec": {
            "backoffLimit": 0,
            "completions": 1,
            "parallelism": 1,
            "activeDeadlineSeconds": deadline_seconds,
            "suspend": with_token,
            "template": {
                "metadata": {"labels": labels},
                "spec": {
                    "restartPolicy": "Never",
                    "automountServiceAccountToken": False,
                    "enableServiceLinks": False,
                    "terminationGracePeriodSeconds": 10,
                    "securityContext": _pod_security(cache),
                    "containers": [
                        {
                            "name": FETCH_CONTAINER,
                            "image": image,
                            "imagePullPolicy": image_pull_policy,
                            "args": ["fetch"],
                            "env": [
                                {
                                    "name": FETCH_REQUEST_ENV,
                                    "value": literal(request.model_dump_json(by_alias=True, exclude_none=True)),
                                },
                                {"name": "HOME", "value": "/tmp"},  # noqa: S108
                            ],
                            "resources": resources,
                            "securityContext": CONTAINER_SECURITY | {"readOnlyRootFilesystem": True},
                            "terminationMessagePolicy": "FallbackToLogsOnError",
                            "volumeMounts": mounts,
                        }
                    ],
                    "volumes": volumes,
                },
            },
        },
    }


def _pod_security(cache: ModelCache) -> dict[str, Any]:
    wanted = cache.spec.security_context
    context: dict[str, Any] = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    if wanted.run_as_user is not None:
        context["runAsUser"] = wanted.run_as_user
    if wanted.fs_group is not None:
        context["fsGroup"] = wanted.fs_group
    if wanted.fs_group_change_policy is not None:
        context["fsGroupChangePolicy"] = wanted.fs_group_change_policy
    if wanted.supplemental_groups:
        context["supplementalGroups"] = list(wanted.supplemental_groups)
    return context


def build_token_secret(artifact: ModelArtifact, *, job: dict[str, Any], token: bytes) -> dict[str, Any]:
    """The copy of the wanter's token for one Job's pod; it goes with the Job that owns it."""
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "type": "Opaque",
        "metadata": {
            "name": token_secret(job["metadata"]["name"], artifact.metadata.uid),
            "namespace": artifact.metadata.namespace,
            "labels": fetch_labels(artifact.metadata.name),
            "ownerReferences": [
                {
                    "apiVersion": "batch/v1",
                    "kind": "Job",
                    "name": job["metadata"]["name"],
                    "uid": job["metadata"]["uid"],
                    "controller": True,
                    "blockOwnerDeletion": False,
                }
            ],
        },
        "data": {CREDENTIALS_KEY: base64.b64encode(token).decode()},
    }
