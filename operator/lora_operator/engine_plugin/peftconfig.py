"""The rules for adapter_config.json: what vLLM refuses, and what it would serve as if it were something else.

The rules are those of vLLM 0.32's `PEFTHelper` and stricter: the type must be LoRA, numbers must be numbers of a sane size, and
pattern keys are expressions of a grammar (patterns.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from .clean_text import clean, quoted
from .patterns import MAX_KEYS, NotAllowed, PatternKey, PatternValue, first_match, take_too_long

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
# By how much a module's change may be multiplied: PEFT's own examples have 1 to 64, and answers are noise long before this.
_MAX_SCALE: Final = 1e4
_MAX_RANK: Final = 1 << 20  # no module of any model has as many inputs


class ConfigProblem(Exception):  # noqa: N818
    """What is wrong with a configuration."""


@dataclass(frozen=True)
class PeftConfig:
    """The parts of a configuration that tensors are checked against."""

    rank: int
    alpha: float
    ranks: Sequence[PatternValue[int]]  # rank_pattern
    alphas: Sequence[PatternValue[float]]  # alpha_pattern
    rslora: bool
    heads: tuple[str, ...]  # modules_to_save
    transposed: bool  # fan_in_fan_out

    @property
    def max_rank(self) -> int:
        """The largest rank of any module."""
        return max([self.rank, *(entry.value for entry in self.ranks)])

    @property
    def has_patterns(self) -> bool:
        """Whether a pattern has a value that is not every module's anyway."""
        return any(entry.value != self.rank for entry in self.ranks) or any(
            entry.value != self.alpha for entry in self.alphas
        )

    @property
    def plain(self) -> tuple[int, float]:
        """Rank and scale of modules that no pattern names."""
        return self.rank, self._scale(self.rank, self.alpha)

    def rank_and_scale(self, module: str) -> tuple[int, float]:
        """What vLLM 0.32 gives a module; `require_quick` before."""
        # PEFT names the fused experts' parameters in patterns, and their modules in the file.
        if module.endswith(".experts.base_layer"):
            module = module.removesuffix(".base_layer") + ".gate_up_proj"
        elif module.endswith(".experts"):
            module += ".down_proj"
        rank, alpha = first_match(self.ranks, module), first_match(self.alphas, module)
        rank = self.rank if rank is None else rank
        return rank, self._scale(rank, self.alpha if alpha is None else alpha)

    def require_quick(self, modules: Sequence[str]) -> None:
        """Raises ConfigProblem when the engine would have to match too much."""
        if take_too_long([*(one.key for one in self.ranks), *(one.key for one in self.alphas)], modules):
            raise ConfigProblem(
                f"has rank_pattern and alpha_pattern with so many or so general keys that to match them with the names of {len(modules)}"
                " modules might hold up the engine for seconds; write fewer keys ('a|b' is one), and modules' names in full"
            )

    def _scale(self, rank: int, alpha: float) -> float:
        return alpha / (math.sqrt(rank) if self.rslora else rank)


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
    targets = config["target_modules"]
    if not (targets is None or isinstance(targets, str) or _are_strings(targets)):
        raise ConfigProblem("has target_modules that are neither a text nor a list of texts")
    ranks = _pattern(config, "rank_pattern")
    alphas = _pattern(config, "alpha_pattern")
    if len(ranks) + len(alphas) > MAX_KEYS:
        raise ConfigProblem(
            f"has {len(ranks) + len(alphas)} keys in rank_pattern and alpha_pattern; at most {MAX_KEYS} are served, for the engine"
            " matches each with each module's name"
        )
    rank, alpha = _rank(config["r"], "r"), _number(config["lora_alpha"], "lora_alpha")
    found = PeftConfig(
        rank=rank,
        alpha=alpha,
        ranks=[PatternValue(key, _rank(value, f"rank_pattern {quoted(text)}")) for text, key, value in ranks],
        alphas=[PatternValue(key, _number(value, f"alpha_pattern {quoted(text)}")) for text, key, value in alphas],
        rslora=bool(config.get("use_rslora")),
        heads=_heads(config),
        transposed=bool(config.get("fan_in_fan_out")),
    )
    _check_features(config)
    _check_scales(found)
    return found


def _heads(config: Mapping[str, Any]) -> tuple[str, ...]:
    heads = config.get("modules_to_save") or []
    if not _are_strings(heads) or not set(heads) <= set(_HEADS):
        raise ConfigProblem(
            f"has modules_to_save {quoted(heads)}; whole modules can't be served with an adapter, but for {' and '.join(_HEADS)}"
        )
    return tuple(dict.fromkeys(heads))


def _check_scales(config: PeftConfig) -> None:
    """The largest alpha with the smallest rank, whether or not one module has both."""
    rank = min([config.rank, *(entry.value for entry in config.ranks)])
    alphas = [config.alpha, *(entry.value for entry in config.alphas)]
    alpha = max(alphas, key=abs)
    by = math.sqrt(rank) if config.rslora else rank
    if abs(alpha) / by > _MAX_SCALE:
        raise ConfigProblem(
            f"multiplies changes by alpha/{'sqrt(r)' if config.rslora else 'r'} = {clean(alpha, limit=30)}/{clean(by, limit=30)}, more than"
            f" {_MAX_SCALE:.0f}: answers would be noise or NaN; correct lora_alpha, alpha_pattern or r"
        )
    if not any(alphas):
        raise ConfigProblem(
            "has lora_alpha 0, which multiplies all changes by 0: the adapter would answer as the base model"
        )


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
    if value > _MAX_RANK:
        raise ConfigProblem(f"has {what} {clean(value, limit=30)}, which is too large")
    return value


def _number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigProblem(f"has {what} {quoted(value)}, which is no number")
    try:
        finite = math.isfinite(value)
    except OverflowError:
        finite = False
    if not finite:
        raise ConfigProblem(f"has {what} {clean(value, limit=30)}, which is too large")
    return value


def _are_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _pattern(config: Mapping[str, Any], what: str) -> list[tuple[str, PatternKey, Any]]:
    """The entries of a pattern, whose keys the engine runs as regular expressions on every module's name."""
    pattern = config.get(what) or {}
    if not isinstance(pattern, dict) or len(pattern) > MAX_KEYS:
        raise ConfigProblem(f"has a {what} that is no object of at most {MAX_KEYS} entries")
    found = []
    for text, value in pattern.items():
        try:
            found.append((text, PatternKey.of(text), value))
        except NotAllowed:
            raise ConfigProblem(
                f"has the {what} key {quoted(text)}, a regular expression that is invalid or may take the engine for ever; name the modules"
                " instead (as in 'q_proj' or 'model.layers.0.self_attn.q_proj'; at most two of '.*', and two groups like '(0|1)', may stand in a key)"
            ) from None
    return found
