"""The engine pods' Deployment, with the defaults that others got wrong (design.md)."""

from __future__ import annotations

from typing import Any, Final

from lora_operator.api.cache import ModelCache
from lora_operator.api.deployment import VLLMDeployment
from lora_operator.constants import (
    ANNOTATION_ARGUMENTS,
    ANNOTATION_PLUGIN,
    ANNOTATION_TEMPLATE_HASH,
    CACHE_MOUNT,
    CHAT_MOUNT,
    ENGINE_CONTAINER,
    GUARD_MOUNT,
    MODULES_MOUNT,
    PLUGIN_MOUNT,
    PLUGIN_PACKAGE,
    PLUGIN_STATE_MOUNT,
)
from lora_operator.desired.command_line import (
    DEAD_GRACE_SECONDS,
    GRACE_SECONDS,
    HOME_MOUNT,
    NO_AUXILIARY,
    PRE_STOP_SECONDS,
    Auxiliary,
    StaticModules,
    build_argv,
    build_env,
    build_launcher_command,
)
from lora_operator.desired.common import CONTAINER_SECURITY, owner_reference
from lora_operator.desired.job_placement import keep_on_one_node
from lora_operator.desired.pod_template import merge_pod_template
from lora_operator.engine_plugin.admin_guard import READY_PATH
from lora_operator.kube.workloads import Workload
from lora_operator.names import chat_config_map, engine_labels, modules_config_map, plugin_config_map, short_hash

GUARD_VOLUME: Final = "gate"


def template_hash(
    deployment: VLLMDeployment, cache: ModelCache, *, model_path: str, auxiliary: Auxiliary = NO_AUXILIARY
) -> str:
    """Hash of all that the pods follow from beside adapters in their arguments: when it changes, pods roll at once.

    Defaults are no part of it: a later operator, whose spec has more fields, must not roll fleets.
    """
    spec = deployment.spec.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    for not_in_pods in ("replicas", "adapterPolicy", "disruptionBudget"):
        spec.pop(not_in_pods, None)
    groups = list(cache.spec.security_context.supplemental_groups)
    together = [cache.metadata.name] if cache.single_node else []
    paths = [path for path in (auxiliary.tokenizer, auxiliary.draft_model) if path is not None]
    return short_hash([spec, cache.claim_name, groups, model_path, *together, *paths])


def build_deployment(
    deployment: VLLMDeployment,
    cache: ModelCache,
    *,
    model_path: str,
    replicas: int,
    token_secret: str,
    plugin: str,
    plugin_files: tuple[str, ...],
    static: StaticModules | None = None,
    auxiliary: Auxiliary = NO_AUXILIARY,
) -> dict[str, Any]:
    """The apps/v1 Deployment; `static` are the adapters in its arguments with updateStrategy Rollout, else None, and `token_secret` is the
    name of the gate's Secret.

    `replicas` is always in it: a field that was applied and is left out next time falls back to 1.
    Raises ReasonError(PodTemplateInvalid) for a podTemplate that can't be merged.
    """
    metadata = deployment.metadata
    where = f"VLLMDeployment {metadata.namespace}/{metadata.name}"
    argv = build_argv(deployment, model_path=model_path, auxiliary=auxiliary, static=static)
    template = _template(
        deployment,
        cache,
        argv,
        model_path=model_path,
        token_secret=token_secret,
        plugin=plugin,
        plugin_files=plugin_files,
        static=static,
    )
    _mount_chat_template(deployment, template["spec"])
    if deployment.spec.pod_template:
        template = merge_pod_template(template, deployment.spec.pod_template, where=where)
    template = keep_on_one_node(template, cache)
    spec: dict[str, Any] = {
        "replicas": replicas,
        "selector": {"matchLabels": engine_labels(metadata.name)},
        "strategy": {"type": "RollingUpdate", "rollingUpdate": _rolling(template)},
        "progressDeadlineSeconds": 7200,
        "revisionHistoryLimit": 3,
        "template": template,
    }
    annotations = {
        ANNOTATION_TEMPLATE_HASH: template_hash(deployment, cache, model_path=model_path, auxiliary=auxiliary),
        ANNOTATION_PLUGIN: plugin,
    }
    if static is not None:
        annotations[ANNOTATION_ARGUMENTS] = f"{static.generation}-{static.digest}"
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {
            "name": metadata.name,
            "namespace": metadata.namespace,
            "labels": engine_labels(metadata.name),
            "annotations": annotations,
            "ownerReferences": [owner_reference(deployment, "VLLMDeployment")],
        },
        "spec": spec,
    }


def mounted_guard_secret(workload: Workload) -> str | None:
    """Name of the Secret from which the pods of a live Deployment have their gate's token."""
    return workload.template.secret_of(GUARD_VOLUME)


def _rolling(template: dict[str, Any]) -> dict[str, Any]:
    """Without a spare GPU a surge pod would wait for ever; without GPUs a surge pod keeps capacity."""
    containers = template["spec"].get("containers")
    on_devices = any(_wants_devices(container) for container in (containers if isinstance(containers, list) else ()))
    return {"maxSurge": 0, "maxUnavailable": 1} if on_devices else {"maxSurge": 1, "maxUnavailable": 0}


def _wants_devices(container: dict[str, Any]) -> bool:
    """Whether a container asks for what only device plugins or claims give: GPUs, slices of them, other accelerators.

    Their names have a domain (nvidia.com/gpu, nvidia.com/mig-1g.5gb, gpu.intel.com/i915), those of CPU and memory have none.
    The parts are a user's, and may have any shape; the API server judges that.
    """
    resources = container.get("resources")
    if not isinstance(resources, dict):
        return False
    amounts = [part for name in ("requests", "limits") if isinstance(part := resources.get(name), dict)]
    return bool(resources.get("claims")) or any("/" in name for part in amounts for name in part)


def _template(
    deployment: VLLMDeployment,
    cache: ModelCache,
    argv: list[str],
    *,
    model_path: str,
    token_secret: str,
    plugin: str,
    plugin_files: tuple[str, ...],
    static: StaticModules | None,
) -> dict[str, Any]:
    engine = deployment.spec.engine
    security: dict[str, Any] = {"seccompProfile": {"type": "RuntimeDefault"}}
    if cache.spec.security_context.supplemental_groups:
        security["supplementalGroups"] = list(cache.spec.security_context.supplemental_groups)
    container: dict[str, Any] = {
        "name": ENGINE_CONTAINER,
        "image": engine.image,
        "command": build_launcher_command(engine.command),
        "args": argv,
        "env": build_env(deployment, model_path=model_path, plugin=plugin, static=static),
        "ports": [{"name": "http", "containerPort": engine.port, "protocol": "TCP"}],
        "securityContext": CONTAINER_SECURITY,
        "terminationMessagePolicy": "FallbackToLogsOnError",
        # The engine may load a large model for an hour; then a dead one may not exit by itself, and a busy one must not be killed.
        # One that is killed for its silence has nothing to finish: its grace period is short.
        "startupProbe": _probe("/health", period=2, timeout=5, failures=1800),
        "livenessProbe": _probe("/health", period=10, timeout=10, failures=6)
        | {"terminationGracePeriodSeconds": DEAD_GRACE_SECONDS},
        "readinessProbe": _probe(READY_PATH, period=2, timeout=5, failures=3),
        "lifecycle": {"preStop": {"sleep": {"seconds": PRE_STOP_SECONDS}}},
        "volumeMounts": [
            {"name": "model-cache", "mountPath": CACHE_MOUNT, "readOnly": True},
            {"name": "engine-kit", "mountPath": PLUGIN_MOUNT, "readOnly": True},
            *([{"name": "modules", "mountPath": MODULES_MOUNT, "readOnly": True}] if static is None else []),
            {"name": GUARD_VOLUME, "mountPath": GUARD_MOUNT, "readOnly": True},
            {"name": "kit-state", "mountPath": PLUGIN_STATE_MOUNT},
            {"name": "home", "mountPath": HOME_MOUNT},
            {"name": "shm", "mountPath": "/dev/shm"},  # noqa: S108  memory for vLLM's processes
        ],
    }
    if engine.resources:
        container["resources"] = engine.resources
    name = deployment.metadata.name
    return {
        "metadata": {
            "labels": engine_labels(name),
            "annotations": {"kubectl.kubernetes.io/default-container": ENGINE_CONTAINER},
        },
        "spec": {
            "enableServiceLinks": False,
            "automountServiceAccountToken": False,
            "terminationGracePeriodSeconds": GRACE_SECONDS,
            "securityContext": security,
            "containers": [container],
            "volumes": [
                {
                    "name": "model-cache",
                    "persistentVolumeClaim": {"claimName": cache.claim_name, "readOnly": True},
                },
                {
                    "name": "engine-kit",
                    "configMap": {
                        "name": plugin_config_map(name, plugin),
                        "items": [{"key": file, "path": _plugin_path(file)} for file in plugin_files],
                    },
                },
                *([_modules_volume(name)] if static is None else []),
                {"name": GUARD_VOLUME, "secret": {"secretName": token_secret, "defaultMode": 0o444}},
                {"name": "kit-state", "emptyDir": {}},
                {"name": "home", "emptyDir": {}},
                {"name": "shm", "emptyDir": {"medium": "Memory"}},
            ],
        },
    }


def _plugin_path(file: str) -> str:
    """Where a file of the plugin lies in its mount: all of them in the package, but for the one that Python runs by the mount's path."""
    return file if file == "__main__.py" else f"{PLUGIN_PACKAGE}/{file}"


def _modules_volume(name: str) -> dict[str, Any]:
    return {"name": "modules", "configMap": {"name": modules_config_map(name), "optional": True}}


def _mount_chat_template(deployment: VLLMDeployment, pod: dict[str, Any]) -> None:
    template = deployment.spec.model.chat_template
    if template is not None:
        name = chat_config_map(deployment.metadata.name, template)
        pod["volumes"].append({"name": "chat-template", "configMap": {"name": name}})
        mount = {"name": "chat-template", "mountPath": CHAT_MOUNT, "readOnly": True}
        pod["containers"][0]["volumeMounts"].append(mount)


def _probe(path: str, *, period: int, timeout: int, failures: int) -> dict[str, Any]:
    return {
        "httpGet": {"path": path, "port": "http"},
        "periodSeconds": period,
        "timeoutSeconds": timeout,
        "failureThreshold": failures,
    }
