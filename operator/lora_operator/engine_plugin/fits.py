"""Whether an adapter's tensors fit its configuration and its base model, as the engine would apply them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from .adapter_bounds import MOST_VALUES, UNKNOWN
from .basemodel import HEADS, VOCABULARY, BaseModel, Fit, Width, experts_block, is_generative
from .clean_text import clean, quoted
from .pairs import PREFIX, AdapterTensors, Pair
from .peftconfig import ConfigProblem, PeftConfig
from .problems import CONFIG, WEIGHTS, AdapterProblem, ProblemKind
from .tensors import Tensor
from .versions import HEADS as HEADS_SINCE
from .versions import KNOWN, PATTERNS, Version, shown

# Components that training frameworks put into names; no model has them of its own.
_FRAMEWORKS: Final = {
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FSDP",
    "_fpw_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "_forward_module": "Lightning",
    "module": "DDP, DataParallel or DeepSpeed",
}
_ONLY_AROUND: Final = frozenset({"module"})  # too plain a word to tell anything where nothing else of the name is known


def check_fit(
    content: AdapterTensors, config: PeftConfig, *, base: BaseModel | None, engine: Version | None, recast: bool = False
) -> None:
    """Raises AdapterProblem for the first tensor that does not fit.

    With `recast`, and without `engine`, the base model may be served by another class than config.json names.
    """
    try:
        config.require_quick(list(content.pairs))
    except ConfigProblem as problem:
        raise AdapterProblem(ProblemKind.INVALID, f"{CONFIG} {problem}") from None
    known = None if recast or engine is None else base
    _check_heads(content, base, engine)
    _refuse_heads([*content.heads, *(one for one in content.pairs if one.rpartition(".")[2] in HEADS)], known)
    _check_amount(content, config, base)
    for module, pair in content.pairs.items():
        _check_pair(module, pair, config, base)
        if engine is not None and engine < PATTERNS:
            _require_plain(module, config, engine)
        if engine is not None and engine <= KNOWN and known is not None:
            _refuse_embedding(module, known, engine)


def require_no_patterns(config: PeftConfig, engine: Version | None) -> None:
    """Raises AdapterProblem where the engine would not obey the patterns of pickled weights, whose modules are not known."""
    if engine is not None and engine < PATTERNS and config.has_patterns:
        raise AdapterProblem(
            ProblemKind.INVALID,
            f"{CONFIG} has rank_pattern or alpha_pattern, which need vLLM {shown(PATTERNS)} or newer; this engine is {shown(engine)}"
            " and would apply r and lora_alpha to all modules",
        )


def _require_plain(module: str, config: PeftConfig, engine: Version) -> None:
    found = config.rank_and_scale(module)
    if found != config.plain:
        rank, scale = config.plain
        raise AdapterProblem(
            ProblemKind.INVALID,
            f"{CONFIG} gives the module {quoted(module)} rank {found[0]} and scale {found[1]:g} by rank_pattern or alpha_pattern,"
            f" which needs vLLM {shown(PATTERNS)} or newer; this engine is {shown(engine)}: it would apply rank {rank} and scale"
            f" {scale:g} to all modules",
        )


def _refuse_embedding(module: str, base: BaseModel, engine: Version) -> None:
    if module.rpartition(".")[2] in VOCABULARY and not base.adapts_vocabulary:
        raise AdapterProblem(
            ProblemKind.INCOMPATIBLE,
            f"{WEIGHTS} changes {quoted(module)}, and vLLM {shown(engine)} takes no adapters of embeddings and heads for"
            f" {clean(base.architectures[0], limit=60)}: train without embed_tokens and lm_head, or merge the adapter into its base model",
        )


def _check_heads(content: AdapterTensors, base: BaseModel | None, engine: Version | None) -> None:
    for name, head in content.heads.items():
        if engine is not None and engine < HEADS_SINCE:
            raise AdapterProblem(
                ProblemKind.INVALID,
                f"{WEIGHTS} holds the classification head {name}, which needs vLLM {shown(HEADS_SINCE)} or newer; this engine is"
                f" {shown(engine)}",
            )
        weight, bias = head["weight"].shape, head["bias"].shape if "bias" in head else None
        if len(weight) != 2 or 0 in weight or bias not in (None, weight[:1]):
            raise AdapterProblem(
                ProblemKind.INVALID,
                f"{WEIGHTS} holds a classification head {name} whose weight is no matrix, or whose bias has not one value for each"
                " of its rows; export the adapter again",
            )
        if base is not None and base.hidden is not None and weight[1] != base.hidden:
            raise AdapterProblem(
                ProblemKind.INCOMPATIBLE,
                f"{WEIGHTS} holds a classification head {name} for a model {weight[1]} wide, the base model is {base.hidden}: the adapter"
                " was trained on another model",
            )


def _refuse_heads(names: Sequence[str], base: BaseModel | None) -> None:
    if names and base is not None and is_generative(base.architectures):
        raise AdapterProblem(
            ProblemKind.INCOMPATIBLE,
            f"{WEIGHTS} holds the classification head {quoted(names[0])}, and the base model ({clean(base.architectures[0], limit=60)}) is no"
            " model for classification",
        )


def _check_copies(content: AdapterTensors, base: BaseModel | None) -> None:
    """The engine reads and drops them."""
    wanted = base.vocabulary if base is not None else None
    for name, tensor in content.copies:
        if len(tensor.shape) != 2 or (wanted is not None and None not in wanted and tensor.shape != wanted):
            shape = (
                "no matrix" if wanted is None else f"not {wanted[0]} by {wanted[1]}, as the base model's embeddings are"
            )
            raise AdapterProblem(
                ProblemKind.INVALID if wanted is None else ProblemKind.INCOMPATIBLE,
                f"{WEIGHTS} has a copy of embeddings, {quoted(name)}, that is {shape}; train without resizing the embeddings, and export the"
                " adapter again",
            )


def _check_amount(content: AdapterTensors, config: PeftConfig, base: BaseModel | None) -> None:
    """An engine keeps all of it in memory, whether or not it finds the modules."""
    limits = base.limits if base is not None else UNKNOWN
    if len(content.pairs) > limits.modules:
        raise AdapterProblem(
            ProblemKind.INVALID if base is None else ProblemKind.INCOMPATIBLE,
            f"{WEIGHTS} has tensors for {len(content.pairs)} modules, more than"
            f" {'any model has' if base is None else f'twice what the base model has ({limits.modules // 2})'}",
        )
    others = [*content.copies, *((name, one) for name, head in content.heads.items() for one in head.values())]
    stacks = config.max_rank * limits.experts
    for name, tensor in others:
        _require_sides(name, tensor, most=limits.side)
    for module, pair in content.pairs.items():
        for half in pair.halves:
            if max(half.shape, default=0) > limits.side:
                stacked = experts_block(module) is not None
                _require_sides(module, half, most=max(limits.side, stacks) if stacked else limits.side)
    _check_copies(content, base)
    values = sum(math.prod(half.shape) for pair in content.pairs.values() for half in pair.halves)
    values += sum(math.prod(one.shape) for _, one in others)
    most = MOST_VALUES if limits.values is None else limits.values * config.max_rank + limits.vocabulary * len(others)
    if values > most:
        raise AdapterProblem(
            ProblemKind.INVALID if limits.values is None else ProblemKind.INCOMPATIBLE,
            f"{WEIGHTS} holds {values} values, more than twice what changes of rank {config.max_rank} to all modules of the base model need",
        )


def _require_sides(name: str, tensor: Tensor, *, most: int) -> None:
    if max(tensor.shape, default=0) > most:
        raise AdapterProblem(
            ProblemKind.INCOMPATIBLE,
            f"{WEIGHTS} has a tensor of {max(tensor.shape)} rows or columns for {quoted(name)}, more than twice what the base model's widest"
            " module has: the adapter was trained on another model",
        )


def _check_pair(module: str, pair: Pair, config: PeftConfig, base: BaseModel | None) -> None:
    if pair.a is None or pair.b is None:
        half = "lora_A" if pair.a is None else "lora_B"
        raise AdapterProblem(
            ProblemKind.INVALID, f"{WEIGHTS} has no {half} for the module {quoted(module)}; export the adapter again"
        )
    a, b = pair.a.shape, pair.b.shape
    fit, width = base.fit(module) if base is not None else (Fit.UNKNOWN, Width())
    if fit is not Fit.PRESENT:
        _refuse_wrapped(module, base)
    if fit is not Fit.PRESENT and experts_block(module) is not None:
        if base is not None and base.modules and not base.experts:
            raise AdapterProblem(
                ProblemKind.INCOMPATIBLE,
                f"{WEIGHTS} has tensors for the module {quoted(module)}, and the base model has no experts",
            )
        _refuse_misfit(module, fit, base)
        return  # stacked in several layouts, which only the engine knows
    if len(a) != 2 or len(b) != 2 or 0 in a or 0 in b:
        raise AdapterProblem(
            ProblemKind.INVALID, f"{WEIGHTS} has tensors for the module {quoted(module)} that are no matrices"
        )
    _require_rank(module, (a[0], b[1]), config)
    if not pair.name.startswith(PREFIX) and fit is not Fit.PRESENT:
        raise AdapterProblem(
            ProblemKind.INVALID,
            f"{WEIGHTS} has the tensor {quoted(pair.name)} without PEFT's prefix '{PREFIX}': the engine would ignore it; export the"
            " adapter with PEFT's save_pretrained",
        )
    _refuse_misfit(module, fit, base)
    if base is not None and pair.embedding:
        _require_embedding(module, base)
    found = (a[1], b[0])
    kind = module.rpartition(".")[2]
    # An embedding's halves are the other way round, and the engine takes those of a known one so, whatever they are called.
    if kind == "embed_tokens" or (pair.embedding and kind != "lm_head"):
        found = found[::-1]
    if kind in VOCABULARY or pair.embedding:
        _refuse_vocabulary(module, found[1], width.outputs)
    _refuse_width(module, found=found, width=width, transposed=config.transposed)


def _require_rank(module: str, found: tuple[int, int], config: PeftConfig) -> None:
    rank, _ = config.rank_and_scale(module)
    if found != (rank, rank):
        raise AdapterProblem(
            ProblemKind.INVALID,
            f"{WEIGHTS} has tensors of rank {found[0]} and {found[1]} for the module {quoted(module)}, but {CONFIG} says {rank}: the two files do"
            " not belong together",
        )


def _refuse_wrapped(module: str, base: BaseModel | None) -> None:
    """Names that the engine would load and apply to nothing, for what training put into them."""
    strangers = base.strangers(module) if base is not None else ()
    parts = module.split(".")
    for name in dict.fromkeys([*strangers, *(part for part in parts if part in _FRAMEWORKS)]):
        if name in _ONLY_AROUND and name not in strangers:
            continue
        cause = (
            f"{_FRAMEWORKS[name]} puts it into the names of what it wraps"
            if name in _FRAMEWORKS
            else "the base model has no such part"
        )
        raise AdapterProblem(
            ProblemKind.INVALID,
            f"{WEIGHTS} has tensors for the module {quoted(module)}, with {quoted(name)} in its name ({cause}): the engine would load and not"
            f" apply them; save the adapter from the unwrapped model, or take '{clean(name, limit=60)}.' out of the tensors' names",
        )


def _refuse_misfit(module: str, fit: Fit, base: BaseModel | None) -> None:
    if fit is Fit.NO_SUCH_KIND and base is not None and (wanted := base.spelling(module)):
        raise AdapterProblem(
            ProblemKind.INCOMPATIBLE,
            f"{WEIGHTS} has tensors for the module {quoted(module)}, and the base model has {' and '.join(wanted)} in its place, which alone"
            " the engine takes: train the adapter on the model as it is, or convert its tensors",
        )
    if fit is Fit.NO_SUCH_KIND:
        raise AdapterProblem(
            ProblemKind.INCOMPATIBLE,
            f"{WEIGHTS} has tensors for the module {quoted(module)}, and the base model has none of that kind",
        )
    if fit is Fit.NOT_HERE:
        raise AdapterProblem(
            ProblemKind.INCOMPATIBLE,
            f"{WEIGHTS} has tensors for the module {quoted(module)}, which the base model does not have: the engine would drop them;"
            " the adapter was trained on another model, or its tensors were renamed",
        )


def _require_embedding(module: str, base: BaseModel) -> None:
    shape, vocabulary = base.modules.get(module), base.vocabulary
    if shape is not None and vocabulary is not None and shape != vocabulary:
        raise AdapterProblem(
            ProblemKind.INVALID,
            f"{WEIGHTS} has an embedding's tensors (lora_embedding_A) for the module {quoted(module)}, which is none; export the adapter again",
        )


def _refuse_vocabulary(module: str, found: int, wanted: int | None) -> None:
    if wanted is not None and found != wanted:
        raise AdapterProblem(
            ProblemKind.INCOMPATIBLE,
            f"{WEIGHTS} changes the module {quoted(module)} for {found} tokens, trained with {abs(found - wanted)}"
            f" {'more' if found > wanted else 'fewer'} than the base model has ({wanted}): the engine can't change the number of tokens;"
            " train without resizing the embeddings, or merge the adapter into its base model",
        )


def _refuse_width(module: str, *, found: tuple[int, int], width: Width, transposed: bool) -> None:
    wanted = (width.inputs, width.outputs)
    orders = (wanted, wanted[::-1]) if transposed else (wanted,)
    if not any(all(w is None or f == w for f, w in zip(found, order, strict=True)) for order in orders):
        sides = ["?" if side is None else str(side) for side in wanted]
        raise AdapterProblem(
            ProblemKind.INCOMPATIBLE,
            f"{WEIGHTS} changes the module {quoted(module)} as {found[0]} to {found[1]} wide, the base model's is {sides[0]} to"
            f" {sides[1]}: the adapter was trained on another model",
        )
