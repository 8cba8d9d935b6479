"""An adapter's tensors by what they are for, as vLLM reads their names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from .clean_text import clean, quoted
from .peftconfig import PeftConfig
from .problems import WEIGHTS, AdapterProblem, ProblemKind
from .tensors import FLOATS, Tensor

PREFIX: Final = "base_model.model."
_NAME_BYTES: Final = 512
# Copies of the base model's own weights, which PEFT saves beside adapters of embeddings, and the engine reads and drops.
_COPIES: Final = (".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")
_MOST_COPIES: Final = 4


@dataclass
class Pair:
    """The two halves of one module's change."""

    name: str = ""  # of a tensor, for messages
    a_name: str = ""
    b_name: str = ""
    a: Tensor | None = None
    b: Tensor | None = None
    embedding: bool = False

    @property
    def halves(self) -> list[Tensor]:
        """lora_A and lora_B, or the one that the file has."""
        return [half for half in (self.a, self.b) if half is not None]


@dataclass
class AdapterTensors:
    """What an adapter's file holds."""

    pairs: dict[str, Pair] = field(default_factory=dict)  # by module
    heads: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # whole classification heads: their parameters
    copies: list[tuple[str, Tensor]] = field(default_factory=list)


def sort_tensors(tensors: Mapping[str, Tensor], config: PeftConfig) -> AdapterTensors:
    """The tensors of a weights file by module; raises AdapterProblem for what is no part of a LoRA adapter that vLLM takes."""
    content = AdapterTensors()
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise AdapterProblem(
                ProblemKind.INVALID,
                f"{WEIGHTS} has the tensor {quoted(name)} of type {tensor.dtype}, which is no floating-point type",
            )
        if len(name.encode()) > _NAME_BYTES:
            raise AdapterProblem(
                ProblemKind.INVALID,
                f"{WEIGHTS} has a tensor with a name of more than {_NAME_BYTES} bytes: {clean(name, limit=60)}",
            )
        if name.endswith(_COPIES):
            content.copies.append((name, tensor))
        else:
            _sort(content, name, tensor, config)
    if not content.pairs:
        raise AdapterProblem(ProblemKind.INVALID, f"{WEIGHTS} holds no LoRA tensors; export the adapter again")
    if len(content.copies) > _MOST_COPIES:
        raise AdapterProblem(
            ProblemKind.INVALID, f"{WEIGHTS} holds {len(content.copies)} copies of embeddings; export the adapter again"
        )
    _require_one_head(content)
    return content


def _sort(content: AdapterTensors, name: str, tensor: Tensor, config: PeftConfig) -> None:
    # Everywhere in the name, but only where it begins with it, as the engine does.
    parts = (name.replace(PREFIX, "") if name.startswith(PREFIX) else name).split(".")
    if len(parts) > 2 and parts[-2] in ("lora_A", "lora_B") and parts[-1] == "weight":
        module, half = parts[:-2], parts[-2]
    elif len(parts) > 1 and parts[-1] in ("lora_embedding_A", "lora_embedding_B"):
        module, half = parts[:-1], parts[-1]
    elif len(parts) > 1 and parts[-2] in config.heads and parts[-1] in ("weight", "bias"):
        head = content.heads.setdefault(parts[-2], {})
        if parts[-1] in head:
            raise _twice(name)
        head[parts[-1]] = tensor
        return
    else:
        raise AdapterProblem(
            ProblemKind.INVALID,
            f"{WEIGHTS} has the tensor {quoted(name)}, which is no plain LoRA weight (lora_A.weight or lora_B.weight)",
        )
    pair = content.pairs.setdefault(".".join(module), Pair(embedding=half.startswith("lora_embedding")))
    if (pair.a if half.endswith("A") else pair.b) is not None:
        raise _twice(name)
    pair.name = name
    if half.endswith("A"):
        pair.a, pair.a_name = tensor, name
    else:
        pair.b, pair.b_name = tensor, name


def _twice(name: str) -> AdapterProblem:
    return AdapterProblem(
        ProblemKind.INVALID, f"{WEIGHTS} has two tensors for the place of {quoted(name)}; export the adapter again"
    )


def _require_one_head(content: AdapterTensors) -> None:
    """vLLM keeps one whole head for an adapter, and needs its weight."""
    if len(content.heads) > 1:
        names = " and ".join(sorted(content.heads))
        raise AdapterProblem(
            ProblemKind.INVALID, f"{WEIGHTS} holds the classification heads {names}; an adapter can be served with one"
        )
    for name, parameters in content.heads.items():
        if "weight" not in parameters:
            raise AdapterProblem(
                ProblemKind.INVALID,
                f"{WEIGHTS} holds a bias of the head {name} and no weight; export the adapter again",
            )
