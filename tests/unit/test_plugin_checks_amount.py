"""How much an adapter may hold, and what its values may be: engines read all of it into memory."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from lora_operator.engine_plugin.basemodel import BaseModel
from lora_operator.engine_plugin.checks import AdapterProblem, ProblemKind, check_adapter, read_base_model
from tests.unit.adapter_files import BASE, HIDDEN, PREFIX, Q, adapter, pair, problem, safetensors, with_header

HUGE = 1 << 24


def sparse(path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    """An adapter whose tensors' bytes are a hole in the file."""
    header: dict[str, Any] = {}
    offset = 0
    for name, shape in shapes.items():
        size = 2
        for side in shape:
            size *= side
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    raw = with_header(json.dumps(header).encode())
    folder = adapter(path, weights=raw)
    with (folder / "adapter_model.safetensors").open("r+b") as file:
        file.truncate(len(raw) + offset)
    return folder


@pytest.mark.parametrize(
    "shapes",
    {
        "an unknown module": pair("foo.q_proj", inputs=HUGE),
        "an unknown module's outputs": pair("foo.q_proj", outputs=HUGE),
        "experts": pair("model.layers.0.mlp.experts.0.w1", inputs=HUGE),
        "stacked experts": {
            f"{PREFIX}model.layers.0.mlp.experts.lora_A.weight": (HUGE, 4, HIDDEN),
            f"{PREFIX}model.layers.0.mlp.experts.lora_B.weight": (4, HIDDEN, 4),
        },
        "a quantised module": pair("model.layers.0.mlp.packed_proj", inputs=HUGE),
        "a copy of embeddings": pair(Q) | {f"{PREFIX}model.embed_tokens.base_layer.weight": (HUGE, 1)},
        "a head": pair(Q) | {f"{PREFIX}score.weight": (HUGE, 1)},
    }.values(),
    ids=lambda shapes: list(shapes)[-1].removeprefix(PREFIX),
)
@pytest.mark.parametrize("base", [BASE, None], ids=["base", "no base"])
def test_no_side_is_beyond_what_any_module_has(
    tmp_path: Path, base: BaseModel | None, shapes: dict[str, tuple[int, ...]]
) -> None:
    path = sparse(tmp_path / "a", shapes)
    config = json.loads((path / "adapter_config.json").read_text()) | {"modules_to_save": ["score"]}
    (path / "adapter_config.json").write_text(json.dumps(config))
    found = problem(path, base=base)
    assert f"a tensor of {HUGE} rows or columns" in found.message


def test_there_are_no_more_modules_than_twice_the_base_models(tmp_path: Path) -> None:
    shapes = {name: shape for number in range(31) for name, shape in pair(f"foo.{number}.q_proj").items()}
    path = adapter(tmp_path / "a", weights=safetensors(shapes))
    found = problem(path, base=BASE)
    assert (found.kind, "31 modules, more than twice" in found.message) == (ProblemKind.INCOMPATIBLE, True)
    check_adapter(path)


def test_all_tensors_together_hold_no_more_than_twice_what_the_base_models_modules_need(tmp_path: Path) -> None:
    shapes = {name: shape for number in range(30) for name, shape in pair(f"foo.{number}.q_proj", inputs=60).items()}
    found = problem(adapter(tmp_path / "a", weights=safetensors(shapes)), base=BASE)
    assert "more than twice what changes of rank 2" in found.message


def test_an_adapter_of_every_module_in_the_widest_type_is_accepted(tmp_path: Path) -> None:
    """With the embeddings and a head that the checkpoint ties to them, and copies of both."""
    tensors = {f"model.layers.{layer}.{kind}": shape for layer in (0, 1) for kind, shape in {
        "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (4, HIDDEN), "mlp.down_proj": (HIDDEN, 16),
    }.items()}  # fmt: skip
    base = tmp_path / "base"
    base.mkdir()
    files: dict[str, tuple[int, ...]] = {f"{name}.weight": shape for name, shape in tensors.items()}
    files |= {"model.embed_tokens.weight": (32, HIDDEN), "model.norm.weight": (HIDDEN,)}
    (base / "model.safetensors").write_bytes(safetensors(files))
    shapes: dict[str, tuple[int, ...]] = {}
    for module, (outputs, inputs) in (tensors | {"lm_head": (32, HIDDEN)}).items():
        shapes |= pair(module, inputs=inputs, outputs=outputs)
    shapes |= {
        f"{PREFIX}model.embed_tokens.lora_embedding_A": (2, 32),
        f"{PREFIX}model.embed_tokens.lora_embedding_B": (HIDDEN, 2),
        f"{PREFIX}model.embed_tokens.base_layer.weight": (32, HIDDEN),
        f"{PREFIX}lm_head.base_layer.weight": (32, HIDDEN),
    }
    check_adapter(
        adapter(tmp_path / "a", weights=safetensors(shapes, dtype="F64", width=8)), base=read_base_model(base)
    )


def test_experts_that_a_checkpoint_stacks_count_each(tmp_path: Path) -> None:
    """Four experts in one tensor; adapters have them apart, or their ranks stacked."""
    block = "model.layers.0.mlp.experts"
    stacked = {f"{block}.gate_up_proj": (4, 32, HIDDEN), f"{block}.down_proj": (4, HIDDEN, 16)}
    (tmp_path / "model.safetensors").write_bytes(safetensors(stacked | {"model.embed_tokens.weight": (32, HIDDEN)}))
    base = read_base_model(tmp_path)
    apart: dict[str, tuple[int, ...]] = {}
    for number in range(4):
        apart |= pair(f"{block}.{number}.gate_proj", outputs=16) | pair(f"{block}.{number}.up_proj", outputs=16)
        apart |= pair(f"{block}.{number}.down_proj", inputs=16)
    check_adapter(adapter(tmp_path / "apart", weights=safetensors(apart)), base=base)
    together = pair(f"{block}.base_layer", rank=8, outputs=32) | pair(block, rank=8, inputs=16)
    check_adapter(adapter(tmp_path / "together", weights=safetensors(together)), base=base)


def values(*numbers: float) -> bytes:
    """A good adapter's file with these values, over and over."""
    empty = safetensors(pair(Q))
    body = 2 * 2 * HIDDEN * 4
    return empty[:-body] + struct.pack(f"<{len(numbers)}f", *numbers) * (body // 4 // len(numbers))


@pytest.mark.parametrize("value", [65536.0, -65536.0, 65505.0, 3e38, -1e5])
def test_values_beyond_half_precision_are_refused(tmp_path: Path, value: float) -> None:
    path = adapter(tmp_path / "a", weights=values(0.5, value))
    check_adapter(path)
    found = problem(path, scan_values=True)
    assert "beyond 65504" in found.message
    assert "'base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight'" in found.message


@pytest.mark.parametrize("value", [65504.0, -65504.0, 1000.0, 40000.0])
def test_values_that_half_precision_holds_are_accepted(tmp_path: Path, value: float) -> None:
    check_adapter(adapter(tmp_path / "a", weights=values(0.5, value)), scan_values=True)


def filled(zero: tuple[str, ...]) -> bytes:
    """Two modules' tensors, those whose names end so all zero: 0.0 and -0.0 in turn."""
    shapes = pair(Q) | pair("model.layers.1.self_attn.q_proj")
    raw = safetensors(shapes)
    size = 2 * HIDDEN * 4
    bodies = [struct.pack("<2f", 0.0, -0.0) * (size // 8) if name.endswith(zero) else b"\1" * size for name in shapes]
    return raw[: -size * len(bodies)] + b"".join(bodies)


@pytest.mark.parametrize(
    ("zero", "good"),
    [
        (("lora_B.weight",), False),
        (("lora_A.weight",), False),
        (("0.self_attn.q_proj.lora_A.weight", "1.self_attn.q_proj.lora_B.weight"), False),
        (("0.self_attn.q_proj.lora_B.weight",), True),
        ((), True),
    ],
    ids=str,
)
def test_an_adapter_that_changes_nothing_is_refused_where_values_are_read(
    tmp_path: Path, zero: tuple[str, ...], good: bool
) -> None:
    path = adapter(tmp_path / "a", weights=filled(zero))
    check_adapter(path, base=BASE)
    if good:
        check_adapter(path, base=BASE, scan_values=True)
        return
    found = problem(path, base=BASE, scan_values=True)
    assert "the adapter changes nothing" in found.message


def test_a_whole_head_is_an_effect(tmp_path: Path) -> None:
    shapes = pair(Q) | {f"{PREFIX}score.weight": (2, HIDDEN)}
    path = adapter(tmp_path / "a", weights=safetensors(shapes, fill=b"\0"), modules_to_save=["score"])
    check_adapter(path, scan_values=True)
    with pytest.raises(AdapterProblem, match="changes nothing"):
        check_adapter(adapter(tmp_path / "b", weights=safetensors(pair(Q), fill=b"\0")), scan_values=True)


WIDE = 4096
# What models call their embeddings and heads, in two-layer models of theirs.
VOCABULARIES = {
    "Falcon": ("transformer.word_embeddings", "transformer.h.0.self_attention.query_key_value"),
    "GPT-NeoX": ("gpt_neox.embed_in", "gpt_neox.layers.0.attention.query_key_value"),
    "GPT-NeoX, head": ("embed_out", "gpt_neox.layers.0.attention.query_key_value"),
    "InternLM2": ("model.tok_embeddings", "model.layers.0.attention.wqkv"),
    "InternLM2, head": ("output", "model.layers.0.attention.wqkv"),
    "GPT-2": ("wte", "h.0.attn.c_attn"),
    "ChatGLM": ("transformer.embedding.word_embeddings", "transformer.encoder.layers.0.self_attention.query_key_value"),
    "ChatGLM, head": ("transformer.output_layer", "transformer.encoder.layers.0.self_attention.query_key_value"),
    "Mamba": ("backbone.embeddings", "backbone.layers.0.mixer.in_proj"),
}


@pytest.mark.parametrize("family", VOCABULARIES)
def test_the_amount_is_bounded_whatever_a_model_calls_its_embeddings(tmp_path: Path, family: str) -> None:
    embedding, module = VOCABULARIES[family]
    base = BaseModel.of({embedding: (65024, WIDE), module: (WIDE, WIDE)} | {f"norm.{n}": (WIDE, 1) for n in range(900)})
    made_up = {name: shape for n in range(900) for name, shape in pair(f"any.{n}.{module}", inputs=1 << 20).items()}
    assert "rows or columns" in problem(sparse(tmp_path / "a", made_up), base=base).message
    check_adapter(sparse(tmp_path / "b", pair(module, inputs=WIDE, outputs=WIDE)), base=base)


def test_layers_outputs_are_no_vocabulary(tmp_path: Path) -> None:
    """BERT's attention.output: of a model whose embeddings are not known little is known."""
    base = BaseModel.of({"encoder.layer.0.attention.output": (HIDDEN, HIDDEN)})
    check_adapter(adapter(tmp_path / "a", weights=safetensors(pair("any.output", inputs=1000))), base=base)


def test_a_small_embedding_beside_one_of_unknown_shape_bounds_nothing(tmp_path: Path) -> None:
    """The packed one is the vocabulary's, and wider than anything that is known."""
    base = BaseModel.of({"speaker.embedding": (4, HIDDEN), "model.tok_embeddings": None, Q: (HIDDEN, HIDDEN)})
    check_adapter(adapter(tmp_path / "a", weights=safetensors(pair("model.tok_embeddings", outputs=1000))), base=base)


def test_heads_and_copies_count(tmp_path: Path) -> None:
    """Each may be as large as the embeddings, and no more."""
    head = {f"{PREFIX}score.weight": (32, HIDDEN)}
    copies = {f"{PREFIX}{name}.base_layer.weight": (32, HIDDEN) for name in ("model.embed_tokens", "lm_head")}
    config = {"modules_to_save": ["score"]}
    check_adapter(adapter(tmp_path / "a", weights=safetensors(pair(Q) | head | copies), **config), base=BASE)
    shapes = {f"model.layers.{n}.self_attn.q_proj": (HIDDEN, HIDDEN) for n in range(2)}
    base = BaseModel.of({"model.embed_tokens": (64, HIDDEN), **shapes})
    filled = {name: shape for module in shapes for name, shape in pair(module, rank=2).items()}
    large = {f"{PREFIX}score.weight": (128, 128)}
    found = problem(adapter(tmp_path / "b", weights=safetensors(filled | large), **config), base=base)
    assert "more than twice what changes of rank 2" in found.message
