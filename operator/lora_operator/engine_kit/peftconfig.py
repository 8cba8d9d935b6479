"""The rules for adapter_config.json: what vLLM refuses, and what it would serve as if it were something else.

The rules are those of vLLM 0.32's `PEFTHelper` and stricter: the type must be LoRA, and numbers must be numbers. Pattern
keys stay what they are to the engine, regular expressions that only it interprets; here they are never run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from .text import clean, quoted

# These only choose the first weights; others change the base model's weights when PEFT loads the adapter.
_INITS: Final = frozenset({"gaussian", "eva", "orthogonal", "mica", "lora_ga"})
_UNSUPPORTED: Final = {
    "use_dora": "DoRA",
    "lora_bias": "LoRA bias",
    "use_bdlora": "block-diagonal LoRA",
    "use_qalora": "QALoRA",
    "alora_invocation_tokens": "activated LoRA",
    "layer_replication": "layer replication",
}
_HEADS: Final = ("classifier", "score")
_PLAIN_KEY: Final = re.compile(r"[A-Za-z0-9_.\-]+")
_QUANTIFIED_GROUP: Final = re.compile(r"\)\s*[*+?{]")
_MAX_KEY: Final = 256
_MAX_KEYS: Final = 10_000


class ConfigProblem(Exception):  # noqa: N818
    """What is wrong with a configuration."""


@dataclass(frozen=True)
class PeftConfig:
    """The parts of a configuration that tensors are checked against."""

    rank: int
    ranks: Mapping[str, int]  # rank_pattern
    heads: tuple[str, ...]  # modules_to_save
    transposed: bool  # fan_in_fan_out

    @property
    def max_rank(self) -> int:
        """The largest rank of any module."""
        return max([self.rank, *self.ranks.values()])

    def allowed_ranks(self, module: str) -> frozenset[int]:
        """The ranks that a module's tensors may have: one, unless only a regular expression decides."""
        for key, rank in self.ranks.items():
            if not _PLAIN_KEY.fullmatch(key):
                return frozenset([self.rank, *self.ranks.values()])
            if module == key or module.endswith("." + key):
                return frozenset([rank])
        return frozenset([self.rank])


def parse_config(config: Any) -> PeftConfig:
    """The configuration as checked; raises ConfigProblem with what is wrong and what to do."""
    if not isinstance(config, dict):
        raise ConfigProblem("is no JSON object")
    kind = config.get("peft_type", "LORA")
    if not isinstance(kind, str) or kind.upper() != "LORA":
        raise ConfigProblem(f"has peft_type {quoted(kind)}; only LORA adapters can be served")
    missing = [key for key in ("r", "lora_alpha", "target_modules") if key not in config]
    if missing:
        raise ConfigProblem(f"lacks {', '.join(missing)}; export the adapter with PEFT's save_pretrained")
    rank = _rank(config["r"], "r")
    _number(config["lora_alpha"], "lora_alpha")
    targets = config["target_modules"]
    if not (targets is None or isinstance(targets, str) or _are_strings(targets)):
        raise ConfigProblem("has target_modules that are neither a text nor a list of texts")
    ranks = {key: _rank(value, f"rank_pattern {quoted(key)}") for key, value in _pattern(config, "rank_pattern")}
    for key, value in _pattern(config, "alpha_pattern"):
        _number(value, f"alpha_pattern {quoted(key)}")
    _check_features(config)
    heads = config.get("modules_to_save") or []
    if not _are_strings(heads) or not set(heads) <= set(_HEADS):
        raise ConfigProblem(
            f"has modules_to_save {quoted(heads)}; whole modules can't be served with an adapter, but for {' and '.join(_HEADS)}"
        )
    return PeftConfig(rank, ranks, tuple(heads), bool(config.get("fan_in_fan_out")))


def _check_features(config: Mapping[str, Any]) -> None:
    for key, feature in _UNSUPPORTED.items():
        if config.get(key):
            raise ConfigProblem(f"sets {key}: {feature} is not supported by vLLM")
    if config.get("bias", "none") != "none":
        raise ConfigProblem(f"has bias {quoted(config['bias'])}; vLLM serves adapters with bias 'none' only")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower() not in _INITS:
        raise ConfigProblem(
            f"has init_lora_weights {quoted(init)}, which changes the base model's weights; convert it to a plain LoRA adapter"
            " with PEFT's path_initial_model_for_weight_conversion"
        )


def _rank(value: Any, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigProblem(f"has {what} {quoted(value)}, which is no whole number")
    if value <= 0:
        raise ConfigProblem(f"has {what} {clean(value, limit=30)}; it must be above 0")
    return value


def _number(value: Any, what: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigProblem(f"has {what} {quoted(value)}, which is no number")
    try:
        finite = math.isfinite(value)
    except OverflowError:
        finite = False
    if not finite:
        raise ConfigProblem(f"has {what} {clean(value, limit=30)}, which is too large")


def _are_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _pattern(config: Mapping[str, Any], what: str) -> list[tuple[str, Any]]:
    """The entries of a pattern, whose keys the engine runs as regular expressions on every module's name."""
    pattern = config.get(what) or {}
    if not isinstance(pattern, dict) or len(pattern) > _MAX_KEYS:
        raise ConfigProblem(f"has a {what} that is no object of at most {_MAX_KEYS} entries")
    for key in pattern:
        loops = sum(key.count(char) for char in "*+{")
        if len(key) > _MAX_KEY or loops > 4 or key.count("?") > 8 or _QUANTIFIED_GROUP.search(key):
            raise ConfigProblem(
                f"has the {what} key {quoted(key)}, a regular expression that may take the engine for ever; name the modules instead"
            )
    return list(pattern.items())
