"""The parts of a Job's pod that follow from how the cache's Jobs get at sources: identity, network, and the cache's jobTemplate."""

from __future__ import annotations

from typing import Any, Final

from lora_operator.api.cache import ModelCache
from lora_operator.constants import CA_MOUNT, IDENTITY_MOUNT

AWS_AUDIENCE: Final = "sts.amazonaws.com"
TOKEN_SECONDS: Final = 3600  # the kubelet renews it
# A sidecar would never end, and a Job with it; and where it must start first, its Job would find no network.
_NO_SIDECAR_LABELS: Final = {"sidecar.istio.io/inject": "false", "istio.io/dataplane-mode": "none"}
_NO_SIDECAR_ANNOTATIONS: Final = {"sidecar.istio.io/inject": "false", "linkerd.io/inject": "disabled"}


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
