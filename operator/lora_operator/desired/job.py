"""The download Job of one attempt, and the Secret with its credentials. Nothing secret stands in the Job itself."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from typing import Any, Final

from lora_operator.api.artifact import ModelArtifact
from lora_operator.api.cache import ModelCache
from lora_operator.constants import (
    ANNOTATION_ATTEMPT,
    CA_MOUNT,
    CACHE_MOUNT,
    CREDENTIALS_MOUNT,
    FETCH_CONTAINER,
    SOURCE_MOUNT,
)
from lora_operator.desired.common import mounted_secret, owner_reference
from lora_operator.desired.job_placement import JobPlacement, keep_on_one_node
from lora_operator.desired.job_pod import Program, build_template, with_access
from lora_operator.names import (
    bounded,
    fetch_labels,
    job_name,
    parse_duration,
    parse_size,
    session_name,
    short_hash,
    token_secret,
)
from lora_operator.source_kinds import Scheme
from lora_operator.wire.jobs import FETCH_REQUEST_ENV, ClaimRequest, FetchRequest, VolumeLimits

MAX_VIEW_NAME: Final = 180  # of 255 bytes that a file name may have, so that the revision fits behind it
ANYWHERE: Final = JobPlacement()
CREDENTIALS_VOLUME: Final = "credentials"


def build_request(
    artifact: ModelArtifact,
    cache: ModelCache,
    *,
    base_model_path: str | None,
    with_credentials: bool,
    workload_identity: str | None = None,
    claim_uid: str = "",
) -> FetchRequest:
    """What the Job is told. `workload_identity`: the service account as which it may read the source; `claim_uid`: the source's."""
    source = artifact.spec.source
    scheme = source.scheme
    return FetchRequest.model_validate(
        {
            "artifact": bounded(artifact.metadata.name, MAX_VIEW_NAME),
            "type": artifact.spec.type,
            "source": {"kind": scheme.member}
            | source.member.to_request()
            | _of_cache(scheme, cache, claim_uid)
            | _role(artifact, cache),
            "path": source.path,
            "cacheRoot": CACHE_MOUNT,
            "credentials": CREDENTIALS_MOUNT if with_credentials else None,
            "loadFormat": artifact.spec.load_format or "auto",
            "trustRemoteCode": artifact.spec.trust_remote_code or False,
            "offline": cache.spec.offline,
            "workloadIdentity": workload_identity,
            "caBundle": f"{CA_MOUNT}/ca.crt" if cache.spec.network.ca_bundle is not None else None,
            "pickledWeights": artifact.spec.pickled_weights is not None,
            "withoutTokenizer": artifact.spec.without_tokenizer or False,
            "baseModelPath": base_model_path,
            "limits": _limits(artifact, cache),
            "owner": cache.status.claim_uid,
            "maxWorkers": cache.spec.download.max_workers,
        }
    )


def _limits(artifact: ModelArtifact, cache: ModelCache) -> VolumeLimits:
    return VolumeLimits(
        max_artifact_bytes=parse_size(cache.spec.max_artifact_size),
        capacity_bytes=parse_size(cache.spec.capacity),
        min_free_bytes=parse_size(cache.spec.min_free) or 0,
        holder=f"{bounded(artifact.metadata.name, MAX_VIEW_NAME)}-{short_hash(cache.status.claim_uid)}",
        hint_bytes=parse_size(artifact.spec.source.size_hint) or 0,
    )


def _of_cache(scheme: Scheme, cache: ModelCache, claim_uid: str) -> dict[str, Any]:
    """What the cache adds to a request: never a tenant's to choose."""
    if scheme.member == "huggingFace":
        return {"endpoint": cache.spec.hugging_face.endpoint}
    if scheme.member in ("http", "oci"):  # their servers may send a Job to others
        return {"allowedEndpoints": list(getattr(cache.spec, scheme.field).allowed_endpoints)}
    if scheme.member == "persistentVolumeClaim":
        return {"mount": SOURCE_MOUNT, "claimNamespace": cache.metadata.namespace, "claimUid": claim_uid}
    return {}


def _role(artifact: ModelArtifact, cache: ModelCache) -> dict[str, Any]:
    """The role in which the source is read, and where it is assumed; nothing where there is none."""
    role, s3 = artifact.spec.role, artifact.spec.source.s3
    if role is None or s3 is None or cache.spec.offline:
        return {}
    lent = artifact.spec.credentials
    own = {entry.s3_endpoint: entry.address for entry in cache.spec.s3.sts_endpoints}
    session = session_name(lent.namespace if lent else artifact.metadata.namespace, artifact.metadata.name)
    more = {"sessionName": session, "stsEndpoint": own.get(s3.endpoint, s3.endpoint) if s3.endpoint else None}
    return {"role": role.to_wire() | more}


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
    nonce: str,
    placement: JobPlacement = ANYWHERE,
) -> dict[str, Any]:
    """The Job; deadline and resources are the cache's where it says any. One that has credentials is made suspended, and goes on once
    the Secret that it owns exists, whose name has the random `nonce`."""
    timeout = parse_duration(cache.spec.download.timeout)
    name = job_name(artifact.metadata.name, attempt)
    labels = fetch_labels(artifact.metadata.name)
    asked = (FETCH_REQUEST_ENV, request.model_dump_json(by_alias=True, exclude_none=True))
    program = Program(FETCH_CONTAINER, "fetch", asked, image, image_pull_policy, resources)
    volumes, mounts = _source_volumes(request, name, nonce)
    template = build_template(cache, program, labels=labels, volumes=volumes, mounts=mounts)
    template["spec"] |= placement.pod_spec
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
            "activeDeadlineSeconds": deadline_seconds if timeout is None else math.ceil(timeout),
            "suspend": request.credentials is not None,
            "template": keep_on_one_node(
                with_access(template, cache, service_account=request.workload_identity), cache
            ),
        },
    }


def _source_volumes(request: FetchRequest, job: str, nonce: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Volumes with the source's own content and its credentials, and where they are mounted."""
    volumes: list[dict[str, Any]] = []
    mounts: list[dict[str, Any]] = []
    if isinstance(request.source, ClaimRequest):
        read_only = {"claimName": request.source.claim_name, "readOnly": True}
        volumes.append({"name": "source", "persistentVolumeClaim": read_only})
        mounts.append({"name": "source", "mountPath": SOURCE_MOUNT, "readOnly": True})
    if request.credentials is not None:
        secret = {"secretName": token_secret(job, nonce), "defaultMode": 0o444}
        volumes.append({"name": CREDENTIALS_VOLUME, "secret": secret})
        mounts.append({"name": CREDENTIALS_VOLUME, "mountPath": CREDENTIALS_MOUNT, "readOnly": True})
    return volumes, mounts


def credentials_secret(job: dict[str, Any]) -> str | None:
    """Name of the Secret from which the Job's pod will have its credentials; None where it asks for none."""
    return mounted_secret(job["spec"]["template"]["spec"], CREDENTIALS_VOLUME)


def build_credentials_secret(
    artifact: ModelArtifact, *, job: dict[str, Any], name: str, values: Mapping[str, bytes]
) -> dict[str, Any]:
    """The copy of the wanter's credentials for one Job's pod, a file per key, under the name that the Job mounts; it goes with the Job."""
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "type": "Opaque",
        "immutable": True,
        "metadata": {
            "name": name,
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
        "data": {name: base64.b64encode(value).decode() for name, value in values.items()},
    }
