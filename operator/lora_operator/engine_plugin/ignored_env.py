"""Variables that no engine gets, wherever they come from: the pod, a ConfigMap of its envFrom, or the image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

# vLLM reads them (vllm/envs.py, 0.26 to 0.33): more routes that change state; every name is taken for a served one, so that nothing is
# asked of the plugin and the base model answers for adapters; another server, without middleware; more resolvers, by which clients load
# folders that they name. VLLM_PLUGINS is not among them: it chooses plugins of the hardware too, and resolvers of vLLM's own are
# registered by their two variables alone.
IGNORED_ENV: Final = (
    "VLLM_SERVER_DEV_MODE",
    "VLLM_SKIP_MODEL_NAME_VALIDATION",
    "VLLM_USE_RUST_FRONTEND",
    "VLLM_RUST_FRONTEND_PATH",
    "VLLM_LORA_RESOLVER_CACHE_DIR",
    "VLLM_LORA_RESOLVER_HF_REPO_LIST",
)
# Middlewares of the package model_hosting_container_standards, which vLLM puts outside of the plugin.
IGNORED_ENV_PREFIXES: Final = ("CUSTOM_FASTAPI_MIDDLEWARE_",)


def is_ignored(name: str) -> bool:
    """Whether a variable is taken out of the engine's environment."""
    return name in IGNORED_ENV or name.startswith(IGNORED_ENV_PREFIXES)


def ignored(env: Mapping[str, str]) -> list[str]:
    """The names in an environment that are taken out of the engine's."""
    return sorted(filter(is_ignored, env))
