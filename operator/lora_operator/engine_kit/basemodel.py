"""What a base model's files say about its modules: their names and shapes, from safetensors headers alone.

Adapters are checked against it. A checkpoint's names are not always the engine's (fused projections, renamed prefixes,
some quantised weights): so this answers "fits", "does not fit", or "can't be told", and only the second refuses an adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final

from .problems import AdapterProblem, Kind
from .tensors import FLOATS, MODEL_HEADER_BYTES, FileProblem, Tensor, kind_of, open_regular, parse_json, read_header
from .text import quoted

INDEX: Final = "model.safetensors.index.json"
SINGLE: Final = "model.safetensors"
PICKLED_INDEX: Final = "pytorch_model.bin.index.json"
_INDEX_BYTES: Final = 100_000_000
_MISTRAL: Final = (
    "consolidated"  # files of Mistral's own format, in which modules have other names than in engines and adapters
)

# A checkpoint's fused module and what adapters may call its parts; engines fuse and split both ways.
_PARTS: Final = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "query_key_value": ("q_proj", "k_proj", "v_proj"),
    "W_pack": ("q_proj", "k_proj", "v_proj"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
    "in_proj_ba": ("in_proj_b", "in_proj_a"),
}
# Engines know these whether or not the checkpoint has them (tied embeddings, classification heads, fused experts).
_ALWAYS: Final = frozenset({"embed_tokens", "lm_head", "score", "classifier", "experts"})


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


# Of a linear module: (outputs, inputs); None for a side, or the whole, that the files don't tell.
Shape = tuple[int | None, int | None]


@dataclass(frozen=True)
class BaseModel:
    """The modules of a base model."""

    modules: Mapping[str, Shape | None]
    kinds: frozenset[str]  # last components of module names, with what engines may call them instead
    templates: frozenset[str]  # module names with # for every number

    @classmethod
    def of(cls, modules: Mapping[str, Shape | None]) -> BaseModel:
        """A model of these modules."""
        kinds = {name.rpartition(".")[2] for name in modules}
        for fused, parts in _PARTS.items():
            if fused in kinds:
                kinds.update(parts)
            elif kinds.issuperset(parts):
                kinds.add(fused)
        return cls(modules, frozenset(kinds | _ALWAYS), frozenset(map(_template, modules)))

    def fit(self, module: str) -> tuple[Fit, Width]:
        """Whether the model has `module` (a name without adapter prefixes), and how wide it is."""
        if not self.modules or ".experts" in f".{module}":
            return Fit.UNKNOWN, Width()  # experts are stored fused, split and stacked: only the engine knows
        parent, _, kind = module.rpartition(".")
        if module in self.modules:
            shape = self.modules[module]
            known = shape is not None and kind not in _ALWAYS
            return Fit.PRESENT, Width(shape[1], shape[0]) if shape and known else Width()
        if kind not in self.kinds:
            return Fit.NO_SUCH_KIND, Width()
        for fused, parts in _PARTS.items():
            if kind in parts and f"{parent}.{fused}" in self.modules:
                shape = self.modules[f"{parent}.{fused}"]
                return Fit.PRESENT, Width(inputs=shape[1] if shape else None)
        # A name of the same scheme without a module, or one trained without the head's wrapper, is dropped silently.
        misplaced = _template(module) in self.templates or f"model.{module}" in self.modules
        return (Fit.NOT_HERE if misplaced else Fit.UNKNOWN), Width()


def _template(name: str) -> str:
    return ".".join("#" if part.isdigit() else part for part in name.split("."))


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
            raise AdapterProblem(Kind.INVALID, f"{quoted(name)} {problem}") from None
        if name.startswith(_MISTRAL):
            continue
        for key, tensor in tensors.items():
            module, _, parameter = key.rpartition(".")
            if module:
                found.setdefault(module, {})[parameter] = tensor
    return BaseModel.of({module: _shape(parameters) for module, parameters in found.items()})


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
                raise AdapterProblem(Kind.INVALID, f"{quoted(name)} is missing, and {PICKLED_INDEX} names it")
    return files


def _listed(folder: Path, index: str, root: Path | None) -> list[str]:
    """The files that an index names."""
    try:
        with open_regular(folder / index, root=root) as file:
            content = parse_json(file.read(_INDEX_BYTES))
    except FileProblem as problem:
        raise AdapterProblem(Kind.INVALID, f"{index} {problem}") from None
    weights = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights.values()):
        raise AdapterProblem(Kind.INVALID, f"{index} has no weight_map of file names")
    names = sorted(set(weights.values()))
    for name in names:
        if name != Path(name).name or name in ("", ".", ".."):
            raise AdapterProblem(Kind.INVALID, f"{index} names {quoted(name)}, which is no plain file name")
    return names
