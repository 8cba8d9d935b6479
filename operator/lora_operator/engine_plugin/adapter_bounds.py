"""How much an adapter may hold: an engine reads all of it into memory, also what it finds no use for."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

# Of a linear module: (outputs, inputs); None for a side, or the whole, that the files don't tell.
Shape = tuple[int | None, int | None]

# What models call their embeddings and heads; in layers, the same words are something else.
_SURE: Final = ("embed_tokens", "lm_head")  # one of known shape is as wide as the vocabulary
_EMBEDDINGS: Final = "embed_tokens lm_head word_embeddings embed_in embed_out tok_embeddings output wte embeddings embedding output_layer"


@dataclass(frozen=True)
class AdapterBounds:
    """Bounds that no adapter trained on a base model comes near.

    An adapter of rank r has r times inputs plus outputs of a module in values, once for each module. `values` is twice the sum of
    all modules, for what a checkpoint has once and adapters change apart (a fused module's parts, tied embeddings), and modules
    whose sides its files don't tell count as the widest. In float32 that is 8 bytes times rank times inputs and outputs.
    """

    side: int  # of any tensor
    experts: int  # experts in a layer, whose ranks may be stacked in one tensor
    modules: int
    values: int | None  # per rank, of all tensors together
    vocabulary: int  # values of an embedding

    @classmethod
    def of(
        cls,
        modules: Mapping[str, Shape | None],
        stacks: Sequence[tuple[int, ...]] = (),
        flat: Collection[str] = (),
    ) -> AdapterBounds:
        """The bounds of a base model's adapters; `stacks` are shapes of tensors that hold a matrix for each expert, `flat` modules without a matrix."""
        count = len(modules) + 2 * sum(stack[0] for stack in stacks)
        numbers = [int(after) for name in modules if (after := _expert(name)).isdigit() and len(after) < 9]
        experts = max([number + 1 for number in numbers] + [stack[0] for stack in stacks], default=1)
        widest = max(
            [side or 0 for shape in modules.values() for side in shape or ()]
            + [side for stack in stacks for side in stack[1:]],
            default=0,
        )
        named = {name: shape for name, shape in modules.items() if _is_embedding(name)}
        embeddings = [shape for shape in named.values() if shape]
        sure = any(shape and name.endswith(_SURE) for name, shape in named.items()) or all(named.values())
        if not embeddings or not sure:
            # What is widest in most models is not known, or the model is of another build: then what is known bounds nothing.
            return replace(UNKNOWN, experts=max(experts, UNKNOWN.experts), modules=max(2 * count, UNKNOWN.modules))
        sides = sum(
            side or widest for name, shape in modules.items() if name not in flat for side in shape or (None, None)
        )
        sides += sum(stack[0] * sum(stack[1:]) for stack in stacks)
        largest = max((outputs or widest) * (inputs or widest) for outputs, inputs in embeddings)
        return cls(side=2 * widest, experts=experts, modules=2 * count, values=2 * sides, vocabulary=largest)


# Without a base model, or one whose files tell no shapes: more than any model has (vocabularies are below 300,000).
UNKNOWN: Final = AdapterBounds(side=1 << 20, experts=1 << 12, modules=1 << 16, values=None, vocabulary=0)
# Where a model's own sum is not known: rank 256 on all modules of a model of 400 billion parameters is 10 billion.
MOST_VALUES: Final = 1 << 34


def _expert(name: str) -> str:
    """The number of an expert in a module's name, or something else."""
    return name.partition(".experts.")[2].partition(".")[0]


def is_numbered(name: str) -> bool:
    """Whether a module is one of one expert."""
    return _expert(name).isdigit()


def _is_embedding(name: str) -> bool:
    parts = name.split(".")
    return parts[-1] in _EMBEDDINGS.split() and not any(part.isdigit() for part in parts)
