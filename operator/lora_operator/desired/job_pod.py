"""The pod of a Job: the operator's own program, restricted, with what the cache says of identity, network and its jobTemplate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from lora_operator.api.cache import ModelCache
from lora_operator.constants import CA_MOUNT, CACHE_MOUNT, IDENTITY_MOUNT
from lora_operator.desired.common import CONTAINER_SECURITY, literal

AWS_AUDIENCE: Final = "sts.amazonaws.com"
TOKEN_SECONDS: Final = 3600  # the kubelet renews it
# A sidecar would never end, and a Job with it; and where it must start first, its Job would find no network.
_NO_SIDECAR_LABELS: Final = {"sidecar.istio.io/inject": "false", "istio.io/dataplane-mode": "none"}
_NO_SIDECAR_ANNOTATIONS: Final = {"sidecar.istio.io/inject": "false", "linkerd.io/inject": "disabled"}


@dataclass(frozen=True)
class Program:
    """The operator's own program in a Job's one container."""

    container: str
    command: str  # of the operator's command line
    request: tuple[str, str]  # the environment variable and its value, which the kubelet must not expand
    image: str
    image_pull_policy: str
    resources: dict[str, Any]


def build_template(
    cache: ModelCache,
    program: Program,
    *,
    labels: dict[str, str],
    volumes: Sequence[dict[str, Any]] = (),
    mounts: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """A Job's pod template: restricted, without the API server's token, with the cache, and with what else it mounts."""
    name, value = program.request
    container = {
        "name": program.container,
        "image": program.image,
        "imagePullPolicy": program.image_pull_policy,
        "args": [program.command],
        "env": [
            {"name": name, "value": literal(value)},
            {"name": "HOME", "value": "/tmp"},  # noqa: S108  an emptyDir in the pod
        ],
        "resources": program.resources,
        "securityContext": CONTAINER_SECURITY | {"readOnlyRootFilesystem": True},
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [
            {"name": "cache", "mountPath": CACHE_MOUNT},
            {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108
            *mounts,
        ],
    }
    spec = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": 10,
        "securityContext": _pod_security(cache),
        "containers": [container],
        "volumes": [
            {"name": "cache", "persistentVolumeClaim": {"claimName": cache.claim_name}},
            {"name": "tmp", "emptyDir": {}},
            *volumes,
        ],
    }
    return {"metadata": {"labels": labels}, "spec": spec}


def with_access(template: dict[str, Any], cache: ModelCache, *, service_account: str | None) -> dict[str, Any]:
    """A download Job's pod template with what the cache's workloadIdentity, network and jobTemplate ask for."""
    template = with_job_template(template, cache)
    spec = dict(template["spec"])
    (container,) = spec["containers"]
    network, identity = cache.spec.network, cache.spec.workload_identity
    env, volumes, mounts = _network_env(cache), list[dict[str, Any]](), list[dict[str, Any]]()
    if network.ca_bundle is not None:
        ref = {"name": network.ca_bundle.name, "items": [{"key": network.ca_bundle.key, "path": "ca.crt"}]}
        volumes.append({"name": "ca", "configMap": ref})
        mounts.append({"name": "ca", "mountPath": CA_MOUNT, "readOnly": True})
    if service_account is not None:
        spec["serviceAccountName"] = service_account
        if identity is not None and identity.aws_role_arn is not None:
            token = {"audience": AWS_AUDIENCE, "expirationSeconds": TOKEN_SECONDS, "path": "token"}
            volumes.append(
                {"name": "identity", "projected": {"sources": [{"serviceAccountToken": token}], "defaultMode": 0o444}}
            )
            mounts.append({"name": "identity", "mountPath": IDENTITY_MOUNT, "readOnly": True})
            env += [
                {"name": "AWS_ROLE_ARN", "value": identity.aws_role_arn},
                {"name": "AWS_WEB_IDENTITY_TOKEN_FILE", "value": f"{IDENTITY_MOUNT}/token"},
            ]
    mounts = [*container["volumeMounts"], *mounts]
    spec["containers"] = [{**container, "env": [*container["env"], *env], "volumeMounts": mounts}]
    spec["volumes"] = [*spec["volumes"], *volumes]
    return {**template, "spec": spec}


def with_job_template(template: dict[str, Any], cache: ModelCache) -> dict[str, Any]:
    """A Job's pod template with what the cache's jobTemplate asks for; for evictions, too."""
    spec, job = dict(template["spec"]), cache.spec.job_template
    (container,) = spec["containers"]
    if job.image_pull_secrets:
        spec["imagePullSecrets"] = [{"name": ref.name} for ref in job.image_pull_secrets]
    if job.node_selector:
        spec["nodeSelector"] = {**spec.get("nodeSelector", {}), **job.node_selector}
    if job.tolerations:
        spec["tolerations"] = [*spec.get("tolerations", ()), *job.tolerations]
    spec["containers"] = [
        {**container, "resources": container["resources"] if job.resources is None else job.resources}
    ]
    labels = {**_NO_SIDECAR_LABELS, **job.labels, **template["metadata"]["labels"]}
    return {"metadata": {"labels": labels, "annotations": {**_NO_SIDECAR_ANNOTATIONS, **job.annotations}}, "spec": spec}


def _network_env(cache: ModelCache) -> list[dict[str, Any]]:
    network = cache.spec.network
    values = {
        "HTTP_PROXY": network.http_proxy,
        "HTTPS_PROXY": network.https_proxy,
        "NO_PROXY": ",".join(network.no_proxy) or None,
    }
    # Both ways of writing them: programs and libraries look for one or the other.
    return [
        {"name": form, "value": value}
        for name, value in values.items()
        if value is not None
        for form in (name, name.lower())
    ]


def _pod_security(cache: ModelCache) -> dict[str, Any]:
    """Under which identity the pods of Jobs run."""
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
