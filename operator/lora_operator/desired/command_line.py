"""The engine's command line and environment: what a VLLMDeployment's spec means to vLLM."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final

from lora_operator.api.deployment import VLLMDeployment
from lora_operator.api.model import ModelSpec
from lora_operator.constants import (
    CACHE_MOUNT,
    CHAT_MOUNT,
    CHAT_TEMPLATE_KEY,
    GUARD_KEY,
    GUARD_MOUNT,
    HOT_LOAD,
    MODULES_KEY,
    MODULES_MOUNT,
    PLUGIN_MOUNT,
    PLUGIN_PACKAGE,
    PLUGIN_STATE_MOUNT,
    ROLLOUT,
)
from lora_operator.desired.common import literal
from lora_operator.names import parse_size, short_hash

HOME_MOUNT: Final = "/var/lib/vllm"
# A pod is taken out of the Service's endpoints while preStop sleeps; then vLLM gets SIGTERM and finishes what runs.
PRE_STOP_SECONDS: Final = 5
SHUTDOWN_SECONDS: Final = 120
DEAD_GRACE_SECONDS: Final = PRE_STOP_SECONDS + 10
GRACE_SECONDS: Final = PRE_STOP_SECONDS + SHUTDOWN_SECONDS + 25

_ENGINE_SETTINGS: Final = {  # the same for every deployment: writable homes, no network for models
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_CACHE": f"{CACHE_MOUNT}/hub",
    "HF_HOME": f"{HOME_MOUNT}/huggingface",
    "HOME": HOME_MOUNT,
    "VLLM_CACHE_ROOT": f"{HOME_MOUNT}/vllm",
    "XDG_CACHE_HOME": f"{HOME_MOUNT}/cache",
    "TORCHINDUCTOR_CACHE_DIR": f"{HOME_MOUNT}/inductor",
    "TRITON_CACHE_DIR": f"{HOME_MOUNT}/triton",
    "VLLM_NO_USAGE_STATS": "1",
    "USER": "vllm",  # an arbitrary user id has no name, and torch asks for one
    "LOGNAME": "vllm",
}


@dataclass(frozen=True)
class StaticModules:
    """The adapters in the pods' own arguments (updateStrategy Rollout); `entries` are JSON objects as vLLM takes them."""

    generation: int
    entries: tuple[str, ...]

    @property
    def digest(self) -> str:
        """Hash of what engines are told; not of the generation, which may rise without a change of that."""
        return short_hash(list(self.entries))


@dataclass(frozen=True)
class Auxiliary:
    """Where in the pods the contents lie that go with the base model."""

    tokenizer: str | None = None
    draft_model: str | None = None


NO_AUXILIARY: Final = Auxiliary()


def model_argument(command: tuple[str, ...], model_path: str) -> list[str]:
    """The base model: positional for `vllm serve`, --model for the module."""
    return [model_path] if command[-1] == "serve" else ["--model", model_path]


def build_argv(
    deployment: VLLMDeployment,
    *,
    model_path: str,
    auxiliary: Auxiliary = NO_AUXILIARY,
    static: StaticModules | None = None,
) -> list[str]:
    """The engine's whole command line. It ends with --lora-modules for `static`; else the launcher adds that at every start."""
    spec = deployment.spec
    argv = [*spec.engine.command, *model_argument(spec.engine.command, model_path)]
    argv += ["--served-model-name", *spec.model.served_names]
    argv += ["--port", str(spec.engine.port), "--dtype", spec.model.dtype]
    if spec.model.max_model_len is not None:
        argv += ["--max-model-len", str(spec.model.max_model_len)]
    argv += _model_flags(spec.model, auxiliary)
    argv += [
        "--enable-lora",
        *("--max-loras", str(spec.lora.max_loras)),
        *("--max-cpu-loras", str(spec.lora.max_cpu_loras)),
        *("--max-lora-rank", str(spec.lora.max_lora_rank)),
        *("--middleware", f"{PLUGIN_PACKAGE}.plugin.Plugin"),
        *("--api-server-count", "1"),
        *("--shutdown-timeout", str(SHUTDOWN_SECONDS)),
    ]
    adapters = ["--lora-modules", *static.entries] if static is not None and static.entries else []
    return [*map(literal, argv), *spec.engine.args, *map(literal, adapters)]


def _model_flags(model: ModelSpec, auxiliary: Auxiliary) -> list[str]:
    """Flags of what is not left to its default: an engine older than one of them can still be run without it."""
    argv: list[str] = []
    if model.load_format != "auto":
        argv += ["--load-format", model.load_format]
    if model.quantization is not None:
        argv += ["--quantization", model.quantization]
    if model.trust_remote_code:
        argv += ["--trust-remote-code"]
    if model.chat_template is not None:
        argv += ["--chat-template", f"{CHAT_MOUNT}/{CHAT_TEMPLATE_KEY}"]
    if auxiliary.tokenizer is not None:
        argv += ["--tokenizer", auxiliary.tokenizer]
    if model.draft_model is not None and auxiliary.draft_model is not None:
        speculative: dict[str, Any] = {
            "model": auxiliary.draft_model,
            "num_speculative_tokens": model.draft_model.num_speculative_tokens,
        }
        if model.draft_model.method is not None:
            speculative["method"] = model.draft_model.method
        argv += ["--speculative-config", json.dumps(speculative)]
    return argv


def build_launcher_command(command: tuple[str, ...]) -> list[str]:
    """The container's command: the launcher, by the engine's own Python where the command names one.

    By the path of the plugin's folder, not by PYTHONPATH, which may be the image's: it would be replaced (ROCm's and Gaudi's need theirs).
    """
    first = command[0].rsplit("/", 1)[-1]
    return [command[0] if first.startswith("python") else "python3", PLUGIN_MOUNT]


def build_env(
    deployment: VLLMDeployment, *, model_path: str, plugin: str, static: StaticModules | None = None
) -> list[dict[str, Any]]:
    """The engine's environment: the plugin's settings, writable homes, no network for models, then the user's own.

    All settings of the plugin are set, also those that don't matter: what an envFrom brings must not take their place.
    """
    spec = deployment.spec
    values = {**_plugin_settings(deployment, model_path=model_path, plugin=plugin, static=static), **_ENGINE_SETTINGS}
    env: dict[str, dict[str, Any]] = {
        name: {"name": name, "value": literal(value)} for name, value in sorted(values.items())
    }
    if spec.engine.api_key_secret_ref is not None:
        ref = spec.engine.api_key_secret_ref
        env["VLLM_API_KEY"] = {
            "name": "VLLM_API_KEY",
            "valueFrom": {"secretKeyRef": {"name": ref.name, "key": ref.key}},
        }
    env |= {variable.name: variable.to_wire() for variable in spec.engine.env}
    return list(env.values())


def _plugin_settings(
    deployment: VLLMDeployment, *, model_path: str, plugin: str, static: StaticModules | None
) -> dict[str, str]:
    """What the plugin reads at the engine's start."""
    spec = deployment.spec
    return {
        "LORA_OPERATOR_CACHE_ROOT": CACHE_MOUNT,
        "LORA_OPERATOR_KIT": plugin,
        "LORA_OPERATOR_MAX_CPU_LORAS": str(spec.lora.max_cpu_loras),
        "LORA_OPERATOR_MAX_LORA_RANK": str(spec.lora.max_lora_rank),
        "LORA_OPERATOR_MAX_REQUEST_BYTES": str(parse_size(spec.engine.max_request_size)),
        "LORA_OPERATOR_MODEL_PATH": model_path,
        "LORA_OPERATOR_SERVED_NAMES": json.dumps(list(spec.model.served_names)),
        "LORA_OPERATOR_STATE": PLUGIN_STATE_MOUNT,
        "LORA_OPERATOR_TOKEN_FILE": f"{GUARD_MOUNT}/{GUARD_KEY}",
        "LORA_OPERATOR_MODULES": f"{MODULES_MOUNT}/{MODULES_KEY}" if static is None else "",
        "LORA_OPERATOR_UPDATE_STRATEGY": HOT_LOAD if static is None else ROLLOUT,
        "LORA_OPERATOR_LIST_GENERATION": "" if static is None else str(static.generation),
    }
