"""The plugin's settings: what the operator writes into the environment of the engine's container.

Nothing here may keep an engine from starting: what is missing or malformed gets the value that promises least.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from .state_files import LIST_FILE

REQUEST_BYTES: Final = 64 << 20
ROLLOUT: Final = "Rollout"  # the updateStrategy with which the list is in the container's arguments, and never changes


@dataclass(frozen=True)
class PluginSettings:
    """What the operator sets for the plugin through the container's environment."""

    mounted_list: Path
    state_dir: Path
    token_file: Path
    cache_root: Path
    model_path: Path | None
    served_names: frozenset[str]
    max_lora_rank: int | None
    max_cpu_loras: int
    plugin_hash: str
    api_key: str | None
    update_strategy: str
    list_generation: int  # of the list in the arguments
    max_request_bytes: int  # of a client's body

    @classmethod
    def read(cls, env: Mapping[str, str]) -> PluginSettings:
        """The settings; whatever is missing or malformed gets the value that promises least."""
        names: Any
        try:
            names = json.loads(env.get("LORA_OPERATOR_SERVED_NAMES", "[]"))
        except ValueError:
            names = None
        most = _number(env.get("LORA_OPERATOR_MAX_REQUEST_BYTES"), digits=19)
        return cls(
            mounted_list=Path(env.get("LORA_OPERATOR_MODULES") or "/etc/lora-operator/modules/modules.json.gz"),
            state_dir=Path(env.get("LORA_OPERATOR_STATE") or "/var/lib/lora-operator"),
            token_file=Path(env.get("LORA_OPERATOR_TOKEN_FILE") or "/etc/lora-operator/gate/token"),
            cache_root=Path(env.get("LORA_OPERATOR_CACHE_ROOT") or "/model-cache"),
            model_path=Path(env["LORA_OPERATOR_MODEL_PATH"]) if env.get("LORA_OPERATOR_MODEL_PATH") else None,
            served_names=frozenset(str(name) for name in names) if isinstance(names, list) else frozenset(),
            max_lora_rank=_number(env.get("LORA_OPERATOR_MAX_LORA_RANK")),
            max_cpu_loras=_number(env.get("LORA_OPERATOR_MAX_CPU_LORAS")) or 0,
            plugin_hash=env.get("LORA_OPERATOR_KIT", ""),
            api_key=env.get("VLLM_API_KEY") or None,
            update_strategy=env.get("LORA_OPERATOR_UPDATE_STRATEGY") or "HotLoad",
            list_generation=_number(env.get("LORA_OPERATOR_LIST_GENERATION"), digits=16) or 0,
            max_request_bytes=REQUEST_BYTES if most is None else most,
        )

    @property
    def list_file(self) -> Path:
        """The acknowledged list; that of the arguments where it is there."""
        return self.state_dir / LIST_FILE

    @property
    def list_files(self) -> tuple[Path, ...]:
        """Where a start finds lists."""
        return (self.list_file,) if self.rolls else (self.list_file, self.mounted_list)

    @property
    def rolls(self) -> bool:
        """Whether the list is in the arguments: other adapters come with another pod."""
        return self.update_strategy == ROLLOUT


def _number(text: str | None, *, digits: int = 9) -> int | None:
    return int(text) if text and text.isascii() and text.isdigit() and len(text) <= digits else None
