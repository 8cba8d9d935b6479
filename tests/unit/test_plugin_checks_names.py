"""Names of modules against a base model's: what the engine would refuse, or load and apply to nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lora_operator.engine_plugin.basemodel import BaseModel
from lora_operator.engine_plugin.checks import AdapterProblem, ProblemKind, check_adapter, read_base_model
from tests.unit.adapter_files import BASE, HIDDEN, PREFIX, Q, Shapes, adapter, pair, problem, safetensors

INNER = Q.removeprefix("model.")
EXPERT = "model.layers.0.mlp.experts.0.w1"


def base_of(
    root: str, *kinds: str, architecture: str | None = None, more: dict[str, tuple[int, int]] | None = None
) -> BaseModel:
    """A base model with these kinds of modules in two layers below `root`."""
    modules: dict[str, Any] = {f"{root}layers.{layer}.{kind}": (HIDDEN, HIDDEN) for layer in (0, 1) for kind in kinds}
    modules |= {f"{root}embed_tokens": (32, HIDDEN), **(more or {})}
    return BaseModel.of(modules, architectures=(architecture,) if architecture else ())


LLAMA = base_of(
    "model.",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    architecture="LlamaForCausalLM",
)
PHI3 = base_of("model.", "self_attn.qkv_proj", "mlp.gate_up_proj", architecture="Phi3ForCausalLM")
GLM4 = base_of("model.", "self_attn.q_proj", "mlp.gate_up_proj", architecture="Glm4ForCausalLM")
CLASSIFIER = base_of(
    "model.", "self_attn.q_proj", architecture="LlamaForSequenceClassification", more={"score": (2, HIDDEN)}
)


def weights(*modules: str, **options: Any) -> bytes:
    return safetensors({name: shape for module in modules for name, shape in pair(module, **options).items()})


@pytest.mark.parametrize(
    ("module", "stranger", "cause"),
    [
        (f"_orig_mod.{Q}", "_orig_mod", "torch.compile"),
        (f"model._orig_mod.{INNER}", "_orig_mod", "torch.compile"),
        ("model.layers.0._orig_mod.self_attn.q_proj", "_orig_mod", "torch.compile"),
        ("model.layers.0._fsdp_wrapped_module.self_attn.q_proj", "_fsdp_wrapped_module", "FSDP"),
        ("model.layers.0._checkpoint_wrapped_module.self_attn.q_proj", "_checkpoint_wrapped_module", "checkpointing"),
        (f"_forward_module.{Q}", "_forward_module", "Lightning"),
        (f"module.{Q}", "module", "DDP"),
        (f"foo.{Q}", "foo", "no such part"),
        (f"model.foo.{INNER}", "foo", "no such part"),
        (f"module.{EXPERT}", "module", "DDP"),
        ("_orig_mod.model.layers.7.self_attn.q_proj", "_orig_mod", "torch.compile"),  # of another base besides
    ],
)  # fmt: skip
def test_names_that_training_or_nobody_knows_what_put_something_into_are_refused_with_the_cause(
    tmp_path: Path, module: str, stranger: str, cause: str
) -> None:
    found = problem(adapter(tmp_path / "a", weights=weights(module)), base=BASE)
    assert found.kind is ProblemKind.INVALID
    assert f"'{stranger}' in its name" in found.message
    assert cause in found.message
    assert f"take '{stranger}.' out" in found.message


def test_a_wrapper_around_the_whole_adapter_is_refused_with_the_cause(tmp_path: Path) -> None:
    shapes = {f"_orig_mod.{name}": shape for name, shape in pair(Q).items()}
    found = problem(adapter(tmp_path / "a", weights=safetensors(shapes)), base=BASE)
    assert "torch.compile" in found.message


def test_the_prefix_counts_only_where_the_engine_takes_it_off(tmp_path: Path) -> None:
    shapes = {f"model.{name}": shape for name, shape in pair(Q).items()}  # vLLM leaves such a name as it is
    assert "without PEFT's prefix" in problem(adapter(tmp_path / "a", weights=safetensors(shapes)), base=BASE).message
    twice = {f"{PREFIX}{name}": shape for name, shape in pair(Q).items()}
    check_adapter(adapter(tmp_path / "b", weights=safetensors(twice)), base=BASE)
    both = problem(adapter(tmp_path / "c", weights=safetensors(pair(Q) | twice)), base=BASE)
    assert "two tensors for the place" in both.message


# Wrappers of language models: what their checkpoints have, and what adapters of theirs are named by Transformers of several ages.
@pytest.mark.parametrize(
    ("root", "module"),
    [
        ("model.", "model.language_model.layers.0.self_attn.q_proj"),  # Qwen2-VL, Qwen2.5-VL
        ("language_model.model.", "model.language_model.layers.0.self_attn.q_proj"),  # Gemma3, Mistral3
        ("language_model.model.", "language_model.model.layers.0.self_attn.q_proj"),
        ("model.language_model.", Q),
        ("model.language_model.", "language_model.model.layers.0.self_attn.q_proj"),
        ("thinker.model.", "model.layers.0.self_attn.q_proj"),
        ("thinker.model.", "thinker.model.layers.0.self_attn.q_proj"),
        ("llm.model.", "llm.model.layers.0.self_attn.q_proj"),
        ("model.text_model.", "model.text_model.layers.0.self_attn.q_proj"),
        ("", "transformer.layers.0.self_attn.q_proj"),
        ("", "bert.layers.0.self_attn.q_proj"),
    ],
)
def test_names_that_mappers_of_wrapper_models_know_stay_accepted(tmp_path: Path, root: str, module: str) -> None:
    base = base_of(root, "self_attn.q_proj", more={"visual.blocks.0.attn.qkv": (24, HIDDEN)})
    check_adapter(adapter(tmp_path / "a", weights=weights(module)), base=base)


MIXTURE = base_of(
    "model.",
    "self_attn.q_proj",
    *(f"mlp.experts.{number}.{kind}_proj" for number in range(4) for kind in ("gate", "up", "down")),
    architecture="Qwen3MoeForCausalLM",
)
BARE = base_of("", "self_attn.q_proj", "mlp.up_proj", architecture="Qwen3ForCausalLM")
AROUND = [
    "model",
    "language_model",
    "model.language_model",
    "transformer",
    "llm",
    "decoder",
    "visual",
    "language",
    "thinker",
    "backbone",
    "0",
    "text_model",
    "layers.0",
]


@pytest.mark.parametrize(
    "module",
    [
        *(f"{name}.{Q}" for name in AROUND),
        *(f"model.{name}.{INNER}" for name in ("language_model", "text_model", "decoder", "layers", "0")),
        "language_model.layers.0.self_attn.q_proj",
        "transformer.layers.0.self_attn.q_proj",
        "model.layers.model.0.self_attn.q_proj",
        "model.layers.0.0.self_attn.q_proj",
        "model.layers.0.self_attn.0.q_proj",
        "model.layers.0.q_proj",
        "model.layers.0.mlp.q_proj",
        "model.layers.0.self_attn.self_attn.q_proj",
        "Model.layers.0.self_attn.q_proj",
        "model.Layers.0.self_attn.q_proj",
        "q_proj",
    ],
)
def test_other_names_of_a_text_models_modules_are_refused(tmp_path: Path, module: str) -> None:
    """vLLM 0.32 accepts all of them and applies none: its class has no mapping of names."""
    path = adapter(tmp_path / "a", weights=weights(Q, module))
    for base in (LLAMA, MIXTURE):
        assert "the engine would" in problem(path, base=base).message
    if module not in (f"model.{Q}", f"0.{Q}"):
        assert "the engine would" in problem(path, base=BARE).message


@pytest.mark.parametrize(
    "module",
    [
        *(f"{name}.model.layers.0.mlp.experts.0.up_proj" for name in AROUND),
        "model.language_model.layers.0.mlp.experts.0.up_proj",
        "Model.layers.0.mlp.experts.0.up_proj",
        "model.layers.0.0.mlp.experts.0.up_proj",
        "model.layers.77.mlp.experts.0.up_proj",
        "model.layers.0.mlp.experts.9.up_proj",
        "model.layers.7.mlp.experts.base_layer",
        "language_model.model.layers.0.mlp.experts",
    ],
)
def test_experts_that_a_text_model_does_not_have_are_refused(tmp_path: Path, module: str) -> None:
    path = adapter(tmp_path / "a", weights=weights(Q, module))
    assert "the engine would" in problem(path, base=MIXTURE).message


@pytest.mark.parametrize(
    ("shapes", "says"),
    {
        "another width": (pair("model.layers.0.mlp.experts.3.up_proj", inputs=16), "16 to 8 wide"),
        "another rank": (pair("model.layers.0.mlp.experts.3.up_proj", rank=4), "rank 4 and 4"),
        "no matrix": (
            {name: (*shape, 1) for name, shape in pair("model.layers.0.mlp.experts.3.up_proj").items()},
            "no matrices",
        ),
    }.values(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_experts_that_a_checkpoint_has_one_by_one_are_modules_like_any(
    tmp_path: Path, shapes: Shapes, says: str
) -> None:
    assert says in problem(adapter(tmp_path / "a", weights=safetensors(shapes)), base=MIXTURE).message
    stacked = pair("model.layers.0.mlp.experts", rank=8) | pair("model.layers.0.mlp.experts.base_layer", rank=8)
    check_adapter(adapter(tmp_path / "b", weights=safetensors(stacked)), base=MIXTURE)


@pytest.mark.parametrize("module", [Q, INNER, "model.layers.1.mlp.up_proj"])
def test_a_text_model_that_was_saved_without_its_head_is_found_behind_the_heads_name(
    tmp_path: Path, module: str
) -> None:
    """Qwen3-Embedding's checkpoint has layers.*, the engine's class and adapters model.layers.*."""
    check_adapter(adapter(tmp_path / "a", weights=weights(module)), base=BARE)
    wrong = adapter(tmp_path / "b", weights=weights(module, inputs=16))
    assert "16 to 8 wide" in problem(wrong, base=BARE).message


@pytest.mark.parametrize(
    ("base", "module", "wanted"),
    [
        (LLAMA, "model.layers.0.self_attn.qkv_proj", "q_proj and k_proj and v_proj"),
        (LLAMA, "model.layers.0.mlp.gate_up_proj", "gate_proj and up_proj"),
        (LLAMA, "model.language_model.layers.0.self_attn.qkv_proj", "q_proj and k_proj and v_proj"),
        (PHI3, "model.layers.0.self_attn.q_proj", "qkv_proj"),
        (PHI3, "model.layers.1.mlp.up_proj", "gate_up_proj"),
    ],
)
def test_fused_modules_and_parts_go_in_the_checkpoints_spelling_alone(
    tmp_path: Path, base: BaseModel, module: str, wanted: str
) -> None:
    found = problem(adapter(tmp_path / "a", weights=weights(module)), base=base)
    assert found.kind is ProblemKind.INCOMPATIBLE
    assert f"the base model has {wanted} in its place" in found.message


@pytest.mark.parametrize(
    ("base", "module"),
    [
        (LLAMA, Q),
        (LLAMA, "model.layers.1.mlp.up_proj"),
        (PHI3, "model.layers.0.self_attn.qkv_proj"),
        (PHI3, "model.layers.1.mlp.gate_up_proj"),
        (GLM4, "model.layers.1.mlp.up_proj"),  # vLLM's class takes parts though the checkpoint is fused
    ],
)
def test_the_checkpoints_spelling_is_accepted(tmp_path: Path, base: BaseModel, module: str) -> None:
    check_adapter(adapter(tmp_path / "a", weights=weights(module)), base=base)


def test_a_fused_module_of_a_tower_says_nothing_about_the_language_model(tmp_path: Path) -> None:
    base = base_of("model.", "self_attn.q_proj", more={"visual.blocks.0.attn.qkv_proj": (24, HIDDEN)})
    check_adapter(adapter(tmp_path / "a", weights=weights("model.language_model.layers.0.self_attn.q_proj")), base=base)


def test_experts_need_a_base_model_with_experts(tmp_path: Path) -> None:
    path = adapter(tmp_path / "a", weights=safetensors(pair(Q) | pair(EXPERT, outputs=16)))
    check_adapter(path, base=BASE)
    found = problem(path, base=LLAMA)
    assert found.kind is ProblemKind.INCOMPATIBLE
    assert "has no experts" in found.message


def vocabulary(tokens: int, width: int = HIDDEN, *, module: str = "model.embed_tokens") -> Shapes:
    return {
        f"{PREFIX}{module}.lora_embedding_A": (2, tokens),
        f"{PREFIX}{module}.lora_embedding_B": (width, 2),
    }


@pytest.mark.parametrize(
    ("shapes", "says"),
    {
        "embeddings with more tokens": (vocabulary(40), "40 tokens, trained with 8 more than the base model has (32)"),
        "embeddings with fewer": (vocabulary(30), "trained with 2 fewer"),
        "embeddings of another width": (vocabulary(32, 16), "16 to 32 wide"),
        "a head with more tokens": (pair("lm_head", outputs=40), "trained with 8 more"),
        "a head of another width": (pair("lm_head", inputs=16, outputs=32), "16 to 32 wide"),
        "a wrapper's head": (pair("language_model.lm_head", outputs=40), "trained with 8 more"),
        "a head as if it were an embedding": (vocabulary(32, module="lm_head"), "lm_head"),
        "a linear module as if it were an embedding": (vocabulary(HIDDEN, module=Q), "which is none"),
    }.values(),
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("base", [BASE, LLAMA], ids=["BASE", "LLAMA"])
def test_embeddings_and_heads_have_the_base_models_vocabulary(
    tmp_path: Path, base: BaseModel, shapes: Shapes, says: str
) -> None:
    found = problem(adapter(tmp_path / "a", weights=safetensors(shapes)), base=base)
    assert says in found.message


@pytest.mark.parametrize("shapes", [vocabulary(32), pair("lm_head", outputs=32)])
def test_embeddings_and_heads_of_the_base_models_vocabulary_are_accepted(tmp_path: Path, shapes: Shapes) -> None:
    check_adapter(adapter(tmp_path / "a", weights=safetensors(shapes)), base=LLAMA)


@pytest.mark.parametrize("shapes", [vocabulary(32), pair("lm_head", outputs=32)])
def test_embeddings_of_classes_that_take_none_are_refused_in_engines_that_are_known(
    tmp_path: Path, shapes: Shapes
) -> None:
    base = base_of("model.", "self_attn.q_proj", architecture="Qwen2ForCausalLM")
    path = adapter(tmp_path / "a", weights=safetensors(shapes))
    found = problem(path, base=base, engine=(0, 32))
    assert "vLLM 0.32 takes no adapters of embeddings and heads for Qwen2ForCausalLM" in found.message
    check_adapter(path, base=LLAMA, engine=(0, 32))
    for unknown in (None, (0, 33)):
        check_adapter(path, base=base, engine=unknown)


def test_only_the_copies_that_the_engine_knows_are_passed_over(tmp_path: Path) -> None:
    copy = {f"{PREFIX}model.embed_tokens.base_layer.weight": (32, HIDDEN)}
    check_adapter(adapter(tmp_path / "a", weights=safetensors(pair(Q) | copy)), base=BASE)
    bare = {"embed_tokens.base_layer.weight": (32, HIDDEN)}
    assert "no plain LoRA" in problem(adapter(tmp_path / "b", weights=safetensors(pair(Q) | bare)), base=BASE).message


HEAD = {f"{PREFIX}score.weight": (2, HIDDEN)}
BIAS = {f"{PREFIX}score.bias": (2,)}
OTHER_HEAD = {f"{PREFIX}classifier.weight": (2, HIDDEN)}


@pytest.mark.parametrize(
    ("base", "shapes", "says"),
    {
        "of a generative model": (LLAMA, HEAD, "no model for classification"),
        "as a pair, of a generative model": (LLAMA, pair("score", outputs=2), "no model for classification"),
        "two": (CLASSIFIER, HEAD | OTHER_HEAD, "one"),
        "a bias alone": (CLASSIFIER, BIAS, "no weight"),
    }.values(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_classification_heads_that_the_engine_refuses_are_refused(
    tmp_path: Path, base: BaseModel, shapes: Shapes, says: str
) -> None:
    path = adapter(tmp_path / "a", weights=safetensors({**pair(Q), **shapes}), modules_to_save=["classifier", "score"])
    assert says in problem(path, base=base, engine=(0, 32)).message


@pytest.mark.parametrize("shapes", [HEAD, pair("score", outputs=2)], ids=["whole", "pair"])
def test_heads_of_generative_models_go_where_the_engine_may_make_another_model_of_it(
    tmp_path: Path, shapes: Shapes
) -> None:
    """Qwen3-Reranker's config.json says Qwen3ForCausalLM; the download Job does not know the engine's arguments."""
    path = adapter(tmp_path / "a", weights=safetensors({**pair(Q), **shapes}), modules_to_save=["score"])
    check_adapter(path, base=LLAMA)
    check_adapter(path, base=LLAMA, engine=(0, 32), recast=True)
    assert "no model for classification" in problem(path, base=LLAMA, engine=(0, 32)).message


def test_embeddings_go_where_the_engine_may_take_another_class(tmp_path: Path) -> None:
    base = base_of("model.", "self_attn.q_proj", architecture="Qwen2ForCausalLM")
    path = adapter(tmp_path / "a", weights=safetensors(vocabulary(32)))
    check_adapter(path, base=base, engine=(0, 32), recast=True)
    assert "takes no adapters of embeddings" in problem(path, base=base, engine=(0, 32)).message


@pytest.mark.parametrize(
    ("shapes", "says"),
    {
        "a vector": ({f"{PREFIX}score.weight": (HIDDEN,)}, "no matrix"),
        "three sides": ({f"{PREFIX}score.weight": (2, HIDDEN, 4)}, "no matrix"),
        "nothing": ({f"{PREFIX}score.weight": (0, HIDDEN)}, "no matrix"),
        "a bias of another model": (HEAD | {f"{PREFIX}score.bias": (3,)}, "one value for each"),
        "a bias that is a matrix": (HEAD | {f"{PREFIX}score.bias": (2, 1)}, "one value for each"),
        "another width": ({f"{PREFIX}score.weight": (2, 16)}, "16 wide, the base model is 8"),
    }.values(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_whole_heads_are_matrices_of_the_base_models_width(tmp_path: Path, shapes: Shapes, says: str) -> None:
    path = adapter(tmp_path / "a", weights=safetensors({**pair(Q), **shapes}), modules_to_save=["score"])
    assert says in problem(path, base=CLASSIFIER).message


@pytest.mark.parametrize(
    ("config", "good"),
    [
        ({"hidden_size": HIDDEN}, True),
        ({"hidden_size": 16}, False),
        ({"hidden_size": "8"}, True),
        ({"hidden_size": 16, "word_embed_proj_dim": 8}, True),
        ({"hidden_size": 16, "text_config": {"hidden_size": HIDDEN}}, True),
    ],
    ids=str,
)
def test_the_width_of_heads_is_read_from_the_base_models_configuration(
    tmp_path: Path, config: dict[str, Any], good: bool
) -> None:
    (tmp_path / "model.safetensors").write_bytes(safetensors({f"{Q}.weight": (HIDDEN, HIDDEN)}))
    (tmp_path / "config.json").write_text(json.dumps(config))
    path = adapter(tmp_path / "a", weights=safetensors(pair(Q) | HEAD), modules_to_save=["score"])
    base = read_base_model(tmp_path)
    if good:
        check_adapter(path, base=base)
    else:
        assert "8 wide, the base model is 16" in problem(path, base=base).message


@pytest.mark.parametrize("shape", [(32,), (32, HIDDEN, 1), (40, HIDDEN), (HIDDEN, 32)], ids=str)
@pytest.mark.parametrize("module", ["model.embed_tokens", "lm_head"])
def test_copies_of_embeddings_have_the_base_models_shape(tmp_path: Path, module: str, shape: tuple[int, ...]) -> None:
    path = adapter(tmp_path / "a", weights=safetensors(pair(Q) | {f"{PREFIX}{module}.base_layer.weight": shape}))
    assert "a copy of embeddings" in problem(path, base=BASE).message
    if len(shape) == 2:
        check_adapter(path)


@pytest.mark.parametrize("base", [CLASSIFIER, BASE, None], ids=["CLASSIFIER", "BASE", "unknown"])
def test_one_whole_head_of_a_model_that_may_have_one_is_accepted(tmp_path: Path, base: BaseModel | None) -> None:
    path = adapter(tmp_path / "a", weights=safetensors(pair(Q) | HEAD | BIAS), modules_to_save=["classifier", "score"])
    check_adapter(path, base=base, engine=(0, 31))
    found = problem(path, base=base, engine=(0, 30))
    assert "needs vLLM 0.31 or newer; this engine is 0.30" in found.message


def test_a_base_models_architecture_is_read_from_its_configuration(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(
        safetensors({f"{Q}.weight": (HIDDEN, HIDDEN), "model.embed_tokens.weight": (32, HIDDEN)})
    )
    path = adapter(tmp_path / "a", weights=safetensors(pair(Q) | HEAD), modules_to_save=["score"])
    check_adapter(path, base=read_base_model(tmp_path))
    for content in ("{", "[]", '{"architectures": "LlamaForCausalLM"}', '{"architectures": [1]}'):
        (tmp_path / "config.json").write_text(content)
        assert read_base_model(tmp_path).architectures == ()
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(AdapterProblem, match="LlamaForCausalLM"):
        check_adapter(path, base=read_base_model(tmp_path), engine=(0, 32))


def test_made_up_names_do_not_fill_the_engines_memory() -> None:
    """The plugin keeps the base model for as long as the engine runs, and what it found about names with it."""
    base = base_of("model.", "self_attn.q_proj", architecture="LlamaForCausalLM")
    for number in range(5000):
        assert base.strangers(f"a{number}x.model.layers.0.self_attn.q_proj") == (f"a{number}x",)
    assert len(base._strange) < 2000
