"""What a base model's files say about its modules: their names and shapes, from safetensors headers alone.

Adapters are checked against it. A checkpoint's names are not always the engine's (fused projections, renamed prefixes,
some quantised weights): so this answers "fits", "does not fit", or "can't be told", and only the second refuses an adapter.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from .adapter_bounds import AdapterBounds, Shape, is_numbered

# A checkpoint's fused module and what other checkpoints have in its place. Engines fuse many of them, but take adapters in the
# checkpoint's spelling alone (packed_modules_mapping of vLLM 0.32's classes) ...
_PARTS: Final = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "query_key_value": ("q_proj", "k_proj", "v_proj"),
    "W_pack": ("q_proj", "k_proj", "v_proj"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
    "in_proj_ba": ("in_proj_b", "in_proj_a"),
}
# ... but for these, which take parts where the checkpoint is fused.
_SPLITTING: Final = frozenset({"GlmForCausalLM", "Glm4ForCausalLM"})
VOCABULARY: Final = frozenset({"embed_tokens", "lm_head"})
# Engines know these whether or not the checkpoint has them (tied embeddings, fused experts).
_ALWAYS: Final = VOCABULARY | {"experts"}
# Classes of vLLM 0.32 with LoRA but without embedding_modules, so that they take none of VOCABULARY.
_PLAIN_VOCABULARY: Final = (
    "Qwen2 Qwen2Moe Qwen3Next Gemma Gemma2 Gemma3 Gemma4 Mistral Glm4 Glm4Moe GptOss OPT Deepseek DeepseekV2 DeepseekV3 InternLM2"
    " MiniMaxM2 Olmoe MiMo"
)
HEADS: Final = frozenset({"score", "classifier"})
_GENERATIVE: Final = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")
# What vLLM's mappers put before, into or out of names where one model wraps another, and what Transformers calls the model inside of
# one with a head: names with these may be the engine's though the checkpoint's are without.
_WRAPPERS: Final = (
    "model language_model language text_model transformer llm thinker talker vlm backbone decoder encoder text_decoder text_encoder"
    " base_model bert roberta xlm_roberta distilbert electra deberta gpt_neox rwkv visual vision_model vision_tower vision_encoder vpm"
    " audio_tower audio_encoder multi_modal_projector mm_projector connector merger aligner layers h blocks"
)
# Classes that serve text alone, and to which vLLM 0.32 applies adapters by the checkpoint's names and no others: no mapping of theirs
# renames what these have of LoRA's modules. Of classes that are not here, newer ones among them, nothing is assumed.
_TEXT_ONLY: Final = (
    "Apertus Arcee Baichuan BaiChuan BailingMoe BailingMoeV2 Cohere Cohere2 Deepseek DeepseekV2 DeepseekV3 DeepseekV32 Dots1 Ernie4_5"
    " Ernie4_5_Moe Exaone Exaone4 Falcon Gemma Gemma2 Gemma3 Glm Glm4 Glm4Moe GptOss Granite HunYuanDenseV1 HunYuanMoEV1"
    " InternLM2 InternLM3 Llama MiMo MiniCPM MiniCPM3 MiniMaxM2 Mistral Mixtral Nemotron OPT Olmo Olmo2 Olmo3 Olmoe Orion Phi Phi3 PhiMoE"
    " Qwen2 Qwen2Moe Qwen3 Qwen3Moe Qwen3Next SeedOss SmolLM3 Solar StableLm Starcoder2"
)
# What tells that a checkpoint has more than text, whatever its class is called.
_TOWERS: Final = (
    "language_model text_model thinker talker visual vision vision_model vision_tower vision_encoder vision_embed_tokens vpm audio_tower"
    " audio_encoder multi_modal_projector mm_projector image_newline"
)
_ROOTS: Final = frozenset({"model", "transformer"})  # of models with a head, around the model without
_MOST_TEMPLATES: Final = 1000  # to be kept at a time; a model has some dozens, and tenants may make up more
# Transformers' versions put routers at different places beside the experts.
_MOVED: Final = frozenset({"gate", "router"})


class Fit(Enum):
    """Whether a base model has a module."""

    PRESENT = "present"
    UNKNOWN = "unknown"  # may be there under another name
    NO_SUCH_KIND = "no such kind"  # nothing in the model is called so: the engine refuses it
    NOT_HERE = "not here"  # the same module of other layers exists: the engine drops it silently


@dataclass(frozen=True)
class Width:
    """A linear module's number of inputs and outputs; None where it can't be told."""

    inputs: int | None = None
    outputs: int | None = None


@dataclass(frozen=True)
class BaseModel:
    """The modules of a base model."""

    modules: Mapping[str, Shape | None]
    kinds: frozenset[str]  # last components of module names, with what engines may call them instead
    templates: frozenset[str]  # module names with # for every number
    components: frozenset[str]  # of all module names
    experts: frozenset[str]  # what stands before `.experts` in module names
    mixed: frozenset[str]  # the layers that those are in
    architectures: tuple[str, ...]  # of config.json; empty where that does not tell
    vocabulary: Shape | None  # the shape that all embeddings and heads have, for ties are not stored twice
    hidden: int | None  # the width of what goes into a classification head
    text_only: bool  # of a class that knows adapters' modules by the names in the checkpoint alone
    limits: AdapterBounds
    _strange: dict[str, tuple[str, ...]] = field(default_factory=dict, compare=False, repr=False)  # by template

    @classmethod
    def of(
        cls,
        modules: Mapping[str, Shape | None],
        *,
        architectures: tuple[str, ...] = (),
        stacks: Sequence[tuple[int, ...]] = (),
        flat: Collection[str] = (),
        hidden: int | None = None,
        wraps: bool = False,
    ) -> BaseModel:
        """A model of these modules; `stacks` are shapes of tensors that hold experts' matrices, `flat` modules without a matrix.

        `hidden` is the width that config.json has, `wraps` whether that describes a model inside of the model.
        """
        kinds = {name.rpartition(".")[2] for name in modules} | _ALWAYS | HEADS
        if _SPLITTING.intersection(architectures):
            kinds.update(part for fused, parts in _PARTS.items() if fused in kinds for part in parts)
        parts = frozenset(part for name in modules for part in name.split("."))
        blocks = frozenset(block for name in modules if (block := experts_block(name)) is not None)
        heads = {shape[1] for name, shape in modules.items() if shape and name in HEADS}
        plain = {f"{name}ForCausalLM" for name in _TEXT_ONLY.split()}
        return cls(
            modules,
            frozenset(kinds),
            frozenset(map(_template, modules)),
            parts,
            blocks,
            frozenset(block.rpartition(".")[0] for block in blocks),
            architectures,
            _shared({shape for name, shape in modules.items() if shape and name.rpartition(".")[2] in VOCABULARY}),
            heads.pop() if len(heads) == 1 else hidden,
            bool(architectures) and plain.issuperset(architectures) and not wraps and parts.isdisjoint(_TOWERS.split()),
            AdapterBounds.of(modules, stacks, flat),
        )

    def fit(self, module: str) -> tuple[Fit, Width]:
        """Whether the model has `module` (a name without adapter prefixes), and how wide it is."""
        if not self.modules:
            return Fit.UNKNOWN, Width()
        module = self._own(module)
        if experts_block(module) is not None:
            return self._fit_experts(module)
        parent, _, kind = module.rpartition(".")
        if kind in VOCABULARY:
            shape = self.modules.get(module) or self.vocabulary
            return (Fit.PRESENT if module in self.modules else self._elsewhere(module)), _width(shape)
        if module in self.modules:
            return Fit.PRESENT, _width(self.modules[module])
        if kind in HEADS:
            return Fit.UNKNOWN, Width()
        if kind not in self.kinds or self.spelling(module):
            return Fit.NO_SUCH_KIND, Width()
        for fused, parts in _PARTS.items():
            if kind in parts and f"{parent}.{fused}" in self.modules:
                return Fit.PRESENT, Width(inputs=_width(self.modules[f"{parent}.{fused}"]).inputs)
        return self._elsewhere(module), Width()

    def _own(self, module: str) -> str:
        """The checkpoint's name of a module, where that was saved without the head's wrapper, as embedding models are."""
        root, _, rest = module.partition(".")
        if not self.text_only or root not in _ROOTS or root in self.components:
            return module
        fits = rest.partition(".")[0] in self.components - _ROOTS and (root == "transformer") is (
            "h" in self.components
        )
        return rest if fits else module

    def _elsewhere(self, module: str) -> Fit:
        # A name of the same scheme without a module, or one trained without the head's wrapper, is dropped silently.
        if _template(module) in self.templates or f"model.{module}" in self.modules:
            return Fit.NOT_HERE
        kind = module.rpartition(".")[2]
        return Fit.NOT_HERE if self.text_only and kind not in VOCABULARY | _MOVED else Fit.UNKNOWN

    def _fit_experts(self, module: str) -> tuple[Fit, Width]:
        """Those that the checkpoint has one by one are modules like any; fused and stacked ones only the engine knows."""
        if module in self.modules and is_numbered(module):
            return Fit.PRESENT, _width(self.modules[module])
        layer = (experts_block(module) or "").rpartition(".")[0]
        misplaced = self.text_only and self.mixed and layer not in self.mixed
        if misplaced or (is_numbered(module) and _template(module) in self.templates):
            return Fit.NOT_HERE, Width()
        return Fit.UNKNOWN, Width()

    @property
    def adapts_vocabulary(self) -> bool:
        """Whether vLLM 0.32 takes adapters of embeddings and the head; newer versions may take more."""
        plain = {f"{name}ForCausalLM" for name in _PLAIN_VOCABULARY.split()}
        return not plain.intersection(self.architectures)

    def spelling(self, module: str) -> tuple[str, ...]:
        """The kinds that adapters must have in this module's place, where the checkpoint has it fused, or in parts."""
        parent, _, kind = module.rpartition(".")
        if module in self.modules or _SPLITTING.intersection(self.architectures):
            return ()
        for fused, parts in _PARTS.items():
            wanted = parts if kind == fused else (fused,) if kind in parts else ()
            here = all(f"{parent}.{one}" in self.modules for one in wanted)
            if wanted and (here or (kind not in self.kinds and self.kinds.issuperset(wanted))):
                return wanted
        return ()

    def strangers(self, module: str) -> tuple[str, ...]:
        """Components of a name that neither the model nor any wrapper of models has, without which it is one of the model's."""
        if not self.modules:
            return ()
        block = experts_block(module)  # what experts are called inside of it is the engine's affair
        name = module if block is None else block
        template = _template(name)
        if template not in self._strange:
            if len(self._strange) >= _MOST_TEMPLATES:
                self._strange.clear()
            known = self.components if self.text_only else self.components.union(_WRAPPERS.split())
            self._strange[template] = tuple(part for part in template.split(".") if part != "#" and part not in known)
        strange = self._strange[template]
        if not strange:
            return ()
        plain = ".".join(part for part in name.split(".") if part not in strange)
        there = plain in self.experts if block is not None else self.fit(plain)[0] in (Fit.PRESENT, Fit.NOT_HERE)
        return strange if there else ()


def experts_block(module: str) -> str | None:
    """What stands before `.experts` in a module's name; None where that does not stand in it."""
    block, found, _ = f".{module}".partition(".experts")
    return block[1:] if found else None


def is_generative(architectures: tuple[str, ...]) -> bool:
    """Whether a model is known to have no classification head; of an unknown one the better is assumed."""
    return bool(architectures) and all(name.endswith(_GENERATIVE) for name in architectures)


def _width(shape: Shape | None) -> Width:
    return Width(shape[1], shape[0]) if shape else Width()


def _shared(shapes: set[Shape]) -> Shape | None:
    return shapes.pop() if len(shapes) == 1 else None


def _template(name: str) -> str:
    return ".".join("#" if part.isdigit() else part for part in name.split("."))
