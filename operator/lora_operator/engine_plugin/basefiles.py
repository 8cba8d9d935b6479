"""Reads a base model's modules from its files: from the headers of its safetensors files and config.json, and no tensor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from .adapter_bounds import Shape
from .basemodel import BaseModel, experts_block
from .clean_text import quoted
from .problems import AdapterProblem, ProblemKind
from .tensors import FLOATS, MODEL_HEADER_BYTES, FileProblem, Tensor, kind_of, open_regular, parse_json, read_header

CONFIG: Final = "config.json"
PICKLED_INDEX: Final = "pytorch_model.bin.index.json"
INDEX: Final = "model.safetensors.index.json"
SINGLE: Final = "model.safetensors"
_CONFIG_BYTES: Final = 4 << 20
_INDEX_BYTES: Final = 100_000_000
# A checkpoint may have adapters of its own, in PEFT's names (Phi-4-multimodal).
_HALF: Final = frozenset({"lora_A", "lora_B"})
_INNER_TEXT: Final = ("text_config", "llm_config", "language_config", "thinker_config")
_INNER: Final = (*_INNER_TEXT, "vision_config", "audio_config")
_MISTRAL: Final = (
    "consolidated"  # files of Mistral's own format, in which modules have other names than in engines and adapters
)


def read_base_model(path: Path | str, *, root: Path | None = None) -> BaseModel:
    """The modules of the model in the folder `path`, from headers and the index; no tensor is read.

    A model without safetensors files has no modules, and everything fits it: what pickles hold is known only by running
    them. Raises AdapterProblem when a file is missing, damaged, cut off, or leads out of `root`.
    """
    folder = Path(path)
    found: dict[str, dict[str, Tensor]] = {}
    for name in _files(folder, root):
        try:
            with open_regular(folder / name, root=root) as file:
                tensors, _ = read_header(file, limit=MODEL_HEADER_BYTES, known_types_only=False)
        except FileProblem as problem:
            raise AdapterProblem(ProblemKind.INVALID, f"{quoted(name)} {problem}") from None
        if name.startswith(_MISTRAL):
            continue
        for key, tensor in tensors.items():
            module, _, parameter = key.replace(".base_layer.", ".").rpartition(".")
            if module and not _HALF.intersection(key.split(".")):
                found.setdefault(module, {})[parameter] = tensor
    config = _config(folder, root)
    names = config.get("architectures")
    return BaseModel.of(
        {module: _shape(parameters) for module, parameters in found.items()},
        architectures=tuple(name for name in names if isinstance(name, str)) if isinstance(names, list) else (),
        stacks=[
            one.shape
            for module, parameters in found.items()
            for one in parameters.values()
            if len(one.shape) > 2 and experts_block(module) is not None
        ],
        flat={module for module, parameters in found.items() if all(len(one.shape) < 2 for one in parameters.values())},
        hidden=_hidden(config),
        wraps=any(isinstance(config.get(name), dict) for name in _INNER),
    )


def _config(folder: Path, root: Path | None) -> Mapping[str, Any]:
    """config.json; empty where that can't be read, which is the engine's to judge."""
    try:
        with open_regular(folder / CONFIG, root=root) as file:
            config = parse_json(file.read(_CONFIG_BYTES))
    except FileProblem:
        return {}
    return config if isinstance(config, dict) else {}


def _hidden(config: Mapping[str, Any]) -> int | None:
    """The width of a model's last layer, where its embeddings are as wide."""
    inner = next((config[name] for name in _INNER_TEXT if isinstance(config.get(name), dict)), config)
    width = inner.get("hidden_size")
    is_width = isinstance(width, int) and not isinstance(width, bool) and "word_embed_proj_dim" not in inner
    return width if is_width else None


def _shape(parameters: Mapping[str, Tensor]) -> Shape | None:
    weight, packed, scales = (parameters.get(name) for name in ("weight", "qweight", "scales"))
    if weight is not None:
        plain = len(weight.shape) == 2 and weight.dtype in FLOATS
        return (weight.shape[0], weight.shape[1]) if plain else None
    if packed is not None and scales is not None and len(packed.shape) == len(scales.shape) == 2:
        outputs = scales.shape[1]  # one scale per group of inputs and output
        if packed.shape[1] < outputs:
            return outputs, packed.shape[0]  # AWQ: several outputs to a word
        groups = parameters.get("g_idx")  # GPTQ: several inputs to a word, and each input's group
        return outputs, groups.shape[0] if groups is not None and len(groups.shape) == 1 else None
    packed = parameters.get("weight_packed")  # compressed-tensors: several inputs to a word
    return (packed.shape[0], None) if packed is not None and len(packed.shape) == 2 else None


def _files(folder: Path, root: Path | None) -> list[str]:
    """Names of the model's safetensors files. Of a model in pickles only their index is looked at, whether all are there."""
    if kind_of(folder / INDEX):
        return _listed(folder, INDEX, root)
    if kind_of(folder / SINGLE):
        return [SINGLE]
    try:
        files = sorted(file.name for file in folder.glob("*.safetensors"))
    except OSError:
        return []
    if not files and kind_of(folder / PICKLED_INDEX):
        for name in _listed(folder, PICKLED_INDEX, root):
            if not kind_of(folder / name):
                raise AdapterProblem(ProblemKind.INVALID, f"{quoted(name)} is missing, and {PICKLED_INDEX} names it")
    return files


def _listed(folder: Path, index: str, root: Path | None) -> list[str]:
    """The files that an index names."""
    try:
        with open_regular(folder / index, root=root) as file:
            content = parse_json(file.read(_INDEX_BYTES))
    except FileProblem as problem:
        raise AdapterProblem(ProblemKind.INVALID, f"{index} {problem}") from None
    weights = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights.values()):
        raise AdapterProblem(ProblemKind.INVALID, f"{index} has no weight_map of file names")
    names = sorted(set(weights.values()))
    for name in names:
        if name != Path(name).name or name in ("", ".", ".."):
            raise AdapterProblem(ProblemKind.INVALID, f"{index} names {quoted(name)}, which is no plain file name")
    return names
