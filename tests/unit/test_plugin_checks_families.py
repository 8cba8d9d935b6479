"""Honest adapters of families of models, by the names that their checkpoints have and PEFT writes, stay accepted.

Checkpoints are written as their publishers', with small sides: config.json, and safetensors headers with the names of two layers.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest

from lora_operator.engine_plugin.basemodel import BaseModel
from lora_operator.engine_plugin.checks import check_adapter, read_base_model
from lora_operator.engine_plugin.fits import check_fit
from lora_operator.engine_plugin.pairs import AdapterTensors, Pair
from lora_operator.engine_plugin.peftconfig import parse_config
from lora_operator.engine_plugin.tensors import Tensor
from tests.unit.adapter_files import HIDDEN, PREFIX, Shapes, adapter, pair, safetensors

VOCABULARY: Final = 32
LLAMA: Final = (
    "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj"
)
ATTENTION: Final = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj"
VISION: Final[dict[str, Any]] = {"vision_config": {"depth": 2}, "text_config": {"hidden_size": HIDDEN}}


def experts(block: str, kinds: str = "gate_proj up_proj down_proj", count: int = 3) -> str:
    """Modules of experts that a checkpoint has one by one."""
    return " ".join(f"{block}.experts.{number}.{kind}" for number in range(count) for kind in kinds.split())


@dataclass(frozen=True)
class Family:
    """A checkpoint, and modules of adapters for it; # is the number of a layer."""

    architecture: str
    modules: str  # of a layer, with the layers' name in `root`
    root: str = "model.layers.#."
    embeddings: str = "model.embed_tokens"
    others: str = ""  # in full
    adapted: str = ""  # modules in adapters that have other names than in the checkpoint, in full
    config: dict[str, Any] = field(default_factory=dict)
    raw: dict[str, tuple[int, ...]] = field(default_factory=dict)  # tensors by their names, in full
    pieces: dict[str, tuple[int, ...]] = field(default_factory=lambda: {"weight": (HIDDEN, HIDDEN)})

    @property
    def inner(self) -> list[str]:
        """The checkpoint's modules but for embeddings."""
        layers = [self.root.replace("#", str(n)) + one for n in range(2) for one in self.modules.split()]
        return [*layers, *self.others.split()]


FAMILIES: Final = {
    "Llama": Family("LlamaForCausalLM", LLAMA, adapted="lm_head"),
    "Llama, tied": Family("LlamaForCausalLM", LLAMA, config={"tie_word_embeddings": True}, adapted="lm_head model.embed_tokens"),
    "Llama, saved without its head": Family(
        "LlamaForCausalLM", LLAMA, root="layers.#.", embeddings="embed_tokens", adapted="model.layers.0.mlp.up_proj model.embed_tokens"
    ),
    "Mistral": Family("MistralForCausalLM", LLAMA),
    "Qwen2": Family("Qwen2ForCausalLM", LLAMA),
    "Qwen3": Family("Qwen3ForCausalLM", LLAMA),
    "Qwen3-Embedding": Family(
        "Qwen3ForCausalLM", LLAMA, root="layers.#.", embeddings="embed_tokens", adapted="model.layers.1.self_attn.q_proj"
    ),
    "Qwen3-MoE": Family("Qwen3MoeForCausalLM", f"{ATTENTION} mlp.gate {experts('mlp')}"),
    "Qwen3-MoE, fused by Transformers": Family(
        "Qwen3MoeForCausalLM",
        f"{ATTENTION} {experts('mlp')}",
        adapted="model.layers.0.mlp.experts model.layers.0.mlp.experts.base_layer",
    ),
    "Qwen3-Next": Family(
        "Qwen3NextForCausalLM",
        f"linear_attn.in_proj_qkvz linear_attn.in_proj_ba linear_attn.out_proj mlp.shared_expert.up_proj {experts('mlp')}",
    ),
    "Mixtral": Family("MixtralForCausalLM", f"{ATTENTION} block_sparse_moe.gate {experts('block_sparse_moe', 'w1 w2 w3')}"),
    "Mixtral, by newer Transformers": Family(
        "MixtralForCausalLM",
        f"{ATTENTION} block_sparse_moe.gate {experts('block_sparse_moe', 'w1 w2 w3')}",
        adapted="model.layers.0.mlp.experts model.layers.0.mlp.experts.base_layer model.layers.1.mlp.gate"
        " model.layers.0.block_sparse_moe.experts.0.gate_proj",
    ),
    "gpt-oss": Family(
        "GptOssForCausalLM",
        f"{ATTENTION} mlp.router",
        raw={
            f"model.layers.{n}.mlp.experts.{kind}_{what}": shape
            for n in range(2)
            for kind in ("gate_up_proj", "down_proj")
            for what, shape in {"blocks": (4, 32, 4, 4), "scales": (4, 32, 4), "bias": (4, 32)}.items()
        },
        adapted="model.layers.0.mlp.experts model.layers.0.mlp.experts.base_layer",
    ),
    "DeepSeek-V2": Family(
        "DeepseekV2ForCausalLM",
        "self_attn.q_proj self_attn.kv_a_proj_with_mqa self_attn.kv_b_proj self_attn.o_proj mlp.gate mlp.shared_experts.up_proj"
        f" {experts('mlp')}",
        others="model.layers.2.mlp.gate_proj",
    ),
    "DeepSeek-V3": Family(
        "DeepseekV3ForCausalLM",
        f"self_attn.q_a_proj self_attn.q_b_proj self_attn.kv_a_proj_with_mqa self_attn.kv_b_proj self_attn.o_proj {experts('mlp')}",
        others="model.layers.61.eh_proj model.layers.61.shared_head.head model.layers.61.embed_tokens",
    ),
    "Gemma 2": Family("Gemma2ForCausalLM", LLAMA),
    "Gemma 3, text": Family("Gemma3ForCausalLM", LLAMA),
    "Gemma 3": Family(
        "Gemma3ForConditionalGeneration",
        LLAMA,
        root="language_model.model.layers.#.",
        embeddings="language_model.model.embed_tokens",
        others="vision_tower.vision_model.encoder.layers.0.self_attn.q_proj multi_modal_projector.linear",
        config=VISION,
        adapted="model.language_model.layers.0.self_attn.q_proj model.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj",
    ),
    "Gemma 4, text": Family(
        "Gemma4ForCausalLM", LLAMA, adapted="model.language_model.layers.0.self_attn.q_proj"
    ),
    "Phi 3": Family("Phi3ForCausalLM", "self_attn.qkv_proj self_attn.o_proj mlp.gate_up_proj mlp.down_proj"),
    "Phi 4, multimodal": Family(
        "Phi4MMForCausalLM",
        "self_attn.o_proj",
        raw={
            f"model.layers.{n}.self_attn.qkv_proj.{one}.weight": shape
            for n in range(2)
            for one, shape in {
                "base_layer": (HIDDEN, HIDDEN),
                "lora_A.vision": (4, HIDDEN),
                "lora_B.vision": (HIDDEN, 4),
                "lora_A.speech": (2, HIDDEN),
            }.items()
        },
        adapted="model.layers.0.self_attn.qkv_proj",
    ),
    "Phi 2": Family("PhiForCausalLM", "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.dense mlp.fc1 mlp.fc2"),
    "GLM 4": Family("Glm4ForCausalLM", f"{ATTENTION} mlp.gate_up_proj mlp.down_proj"),
    "GLM 4, parts": Family(
        "Glm4ForCausalLM", f"{ATTENTION} mlp.gate_up_proj", adapted="model.layers.0.mlp.gate_proj model.layers.0.mlp.up_proj"
    ),
    "InternLM 2": Family(
        "InternLM2ForCausalLM",
        "attention.wqkv attention.wo feed_forward.w1 feed_forward.w2 feed_forward.w3",
        embeddings="model.tok_embeddings",
        others="output",
    ),
    "Falcon": Family(
        "FalconForCausalLM",
        "self_attention.query_key_value self_attention.dense mlp.dense_h_to_4h mlp.dense_4h_to_h",
        root="transformer.h.#.",
        embeddings="transformer.word_embeddings",
    ),
    "Falcon, saved without its head": Family(
        "FalconForCausalLM",
        "self_attention.query_key_value",
        root="h.#.",
        embeddings="word_embeddings",
        adapted="transformer.h.0.self_attention.query_key_value",
    ),
    "GPT-NeoX": Family(
        "GPTNeoXForCausalLM",
        "attention.query_key_value attention.dense mlp.dense_h_to_4h",
        root="gpt_neox.layers.#.",
        embeddings="gpt_neox.embed_in",
        others="embed_out",
    ),
    "OPT": Family(
        "OPTForCausalLM",
        "self_attn.q_proj self_attn.out_proj fc1 fc2",
        root="model.decoder.layers.#.",
        embeddings="model.decoder.embed_tokens",
    ),
    "OPT, old": Family(
        "OPTForCausalLM",
        "self_attn.q_proj fc1",
        root="decoder.layers.#.",
        embeddings="decoder.embed_tokens",
        adapted="model.decoder.layers.0.self_attn.q_proj",
    ),
    "Nemotron-H": Family(
        "NemotronHForCausalLM",
        "mixer.in_proj mixer.q_proj",
        root="backbone.layers.#.",
        embeddings="backbone.embeddings",
        adapted="model.layers.0.mixer.q_proj",
    ),
    "Mistral 3": Family(
        "Mistral3ForConditionalGeneration",
        LLAMA,
        root="language_model.model.layers.#.",
        embeddings="language_model.model.embed_tokens",
        others="vision_tower.transformer.layers.0.attention.q_proj multi_modal_projector.linear_1",
        config=VISION,
        adapted="model.language_model.layers.0.self_attn.q_proj",
    ),
    "Qwen2-VL": Family(
        "Qwen2VLForConditionalGeneration",
        LLAMA,
        others="visual.blocks.0.attn.qkv visual.merger.mlp.0",
        config={"vision_config": {"depth": 2}, "hidden_size": HIDDEN},
        adapted="model.language_model.layers.0.self_attn.q_proj model.visual.blocks.0.attn.qkv",
    ),
    "Qwen2.5-VL": Family(
        "Qwen2_5_VLForConditionalGeneration",
        LLAMA,
        others="visual.blocks.0.attn.qkv visual.blocks.0.mlp.gate_proj",
        config={"vision_config": {"depth": 2}},
        adapted="model.language_model.layers.0.self_attn.q_proj model.visual.blocks.0.mlp.gate_proj",
    ),
    "Qwen3-VL": Family(
        "Qwen3VLForConditionalGeneration",
        LLAMA,
        root="model.language_model.layers.#.",
        embeddings="model.language_model.embed_tokens",
        others="model.visual.blocks.0.attn.qkv",
        config=VISION,
        adapted="model.layers.0.self_attn.q_proj language_model.model.layers.0.self_attn.q_proj",
    ),
    "Qwen3-VL-MoE": Family(
        "Qwen3VLMoeForConditionalGeneration",
        ATTENTION,
        root="model.language_model.layers.#.",
        embeddings="model.language_model.embed_tokens",
        config=VISION,
        raw={
            "model.language_model.layers.0.mlp.experts.gate_up_proj": (4, 32, HIDDEN),
            "model.language_model.layers.0.mlp.experts.down_proj": (4, HIDDEN, 16),
        },
        adapted="model.language_model.layers.0.mlp.experts model.language_model.layers.0.mlp.experts.base_layer"
        " model.layers.0.mlp.experts",
    ),
    "Llama, AWQ": Family(
        "LlamaForCausalLM", LLAMA, pieces={"qweight": (HIDDEN, 2), "qzeros": (1, 2), "scales": (1, HIDDEN)}
    ),
    "Llama, GPTQ": Family(
        "LlamaForCausalLM",
        LLAMA,
        pieces={"qweight": (1, HIDDEN), "qzeros": (1, 1), "scales": (1, HIDDEN), "g_idx": (HIDDEN,)},
    ),
    "Llama, FP8": Family(
        "LlamaForCausalLM", LLAMA, pieces={"weight": (HIDDEN, HIDDEN), "weight_scale": (1,), "input_scale": (1,)}
    ),
    "Llama, bitsandbytes": Family(
        "LlamaForCausalLM",
        LLAMA,
        pieces={"weight": (32, 1, 1), "weight.absmax": (1,), "weight.quant_state.bitsandbytes__nf4": (80,)},
    ),
    "Qwen3-MoE, compressed": Family(
        "Qwen3MoeForCausalLM",
        f"{ATTENTION} {experts('mlp')}",
        pieces={"weight_packed": (HIDDEN, 1), "weight_scale": (HIDDEN, 1), "weight_shape": (2,)},
    ),
    "Mixtral, GPTQ": Family(
        "MixtralForCausalLM",
        f"{ATTENTION} {experts('block_sparse_moe', 'w1 w2 w3')}",
        pieces={"qweight": (1, HIDDEN), "qzeros": (1, 1), "scales": (1, HIDDEN)},
    ),
}  # fmt: skip


def checkpoint(folder: Path, family: Family, *, shards: int) -> None:
    """The family's files."""
    folder.mkdir()
    config = {"architectures": [family.architecture], "hidden_size": HIDDEN} | family.config
    (folder / "config.json").write_text(json.dumps(config))
    tensors: dict[str, tuple[int, ...]] = {
        f"{one}.{piece}": shape for one in family.inner for piece, shape in family.pieces.items()
    }
    tensors |= {f"{family.embeddings}.weight": (VOCABULARY, HIDDEN), **family.raw}
    names = list(tensors)
    files = [f"model-{number}.safetensors" if shards > 1 else "model.safetensors" for number in range(shards)]
    for number, file in enumerate(files):
        (folder / file).write_bytes(safetensors({name: tensors[name] for name in names[number::shards]}))
    if shards > 1:
        where = {name: files[at % shards] for at, name in enumerate(names)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def change(family: Family, module: str) -> Shapes:
    """An adapter's tensors for a module of a family, with the sides that it has there."""
    kind = module.rpartition(".")[2]
    if kind == "embed_tokens":
        return {
            f"{PREFIX}{module}.lora_embedding_A": (2, VOCABULARY),
            f"{PREFIX}{module}.lora_embedding_B": (HIDDEN, 2),
        }
    if kind == "lm_head":
        return pair(module, outputs=VOCABULARY)
    return pair(module, rank=8 if module.endswith((".experts", ".base_layer")) and family.raw else 2)


@pytest.mark.parametrize("shards", [1, 3], ids=["one file", "three files"])
@pytest.mark.parametrize("name", FAMILIES)
def test_honest_adapters_of_these_families_stay_accepted(tmp_path: Path, name: str, shards: int) -> None:
    family = FAMILIES[name]
    checkpoint(tmp_path / "base", family, shards=shards)
    base = read_base_model(tmp_path / "base")
    whole: dict[str, tuple[int, ...]] = {}
    for module in family.inner:
        if not module.endswith("embed_tokens"):
            whole |= change(family, module)
    check_adapter(adapter(tmp_path / "whole", weights=safetensors(whole)), base=base)
    for number, module in enumerate(family.adapted.split()):
        path = adapter(tmp_path / str(number), weights=safetensors(change(family, module)))
        check_adapter(path, base=base)


def test_a_large_mixture_is_checked_quickly(tmp_path: Path) -> None:
    """18,624 modules of Qwen3-MoE, within the engine's process; a busy machine gets several times the time."""
    layer = f"{ATTENTION} {experts('mlp', count=128)}".split()
    modules = [f"model.layers.{number}.{one}" for number in range(48) for one in layer]
    base = BaseModel.of(
        {"model.embed_tokens": (VOCABULARY, HIDDEN), **dict.fromkeys(modules, (HIDDEN, HIDDEN))},
        architectures=("Qwen3MoeForCausalLM",),
    )
    a, b = Tensor("F32", (2, HIDDEN), 0, 64), Tensor("F32", (HIDDEN, 2), 0, 64)
    content = AdapterTensors({one: Pair(name=f"{PREFIX}{one}", a=a, b=b) for one in modules})
    config = parse_config({"r": 2, "lora_alpha": 4, "target_modules": []})
    began = time.process_time()
    check_fit(content, config, base=base, engine=(0, 32))
    assert time.process_time() - began < 2
    assert len(modules) == 18_624
