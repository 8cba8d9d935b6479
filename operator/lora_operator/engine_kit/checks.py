"""Checks a LoRA adapter's files before any engine sees them: what vLLM refuses, and what it would serve wrongly.

One bad `--lora-modules` entry stops a whole engine, and some adapters are accepted with status 200 and answer nonsense, so
this is stricter than vLLM. It is used by the fetcher (before anything is published), by the launcher and by the kit. It never
imports more than the standard library, never unpickles, and trusts nothing that it reads.
"""

from __future__ import annotations

import stat
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from .basemodel import BaseModel, Fit, Width, read_base_model
from .peftconfig import ConfigProblem, PeftConfig, parse_config
from .problems import AdapterProblem, Kind
from .tensors import (
    ADAPTER_HEADER_BYTES,
    FLOATS,
    FileProblem,
    Tensor,
    first_not_finite,
    kind_of,
    open_regular,
    parse_json,
    read_header,
)
from .text import clean, quoted

__all__ = ["AdapterInfo", "AdapterProblem", "BaseModel", "Kind", "check_adapter", "read_base_model"]

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = "adapter_model.safetensors"
_PICKLES: Final = ("adapter_model.bin", "adapter_model.pt")
_MANIFEST: Final = ".lora-operator.json"  # what the download Job writes beside what it publishes
_CONFIG_BYTES: Final = 4 << 20
_PREFIX: Final = "base_model.model."


@dataclass(frozen=True)
class AdapterInfo:
    """What a good adapter is like."""

    rank: int  # the largest of all modules
    target_modules: tuple[str, ...]  # kinds of modules that it has tensors for, sorted
    tensors: int
    size_bytes: int  # of the weights file


@dataclass
class _Pair:
    """The two halves of one module's change."""

    name: str = ""  # of a tensor, for messages
    a: Tensor | None = None
    b: Tensor | None = None
    embedding: bool = False


def check_adapter(
    path: Path | str,
    *,
    base: BaseModel | None = None,
    max_rank: int | None = None,
    root: Path | None = None,
    scan_values: bool = False,
    scanned: Collection[str] | None = None,
) -> AdapterInfo:
    """Check the adapter in the folder `path`; raises AdapterProblem.

    `scanned` names pickled weights that were found to hold nothing but tensors; where it is not given, the folder's manifest says
    it. Of those only the configuration is checked: what shapes they hold is known only by reading them.

    Without `base` tensors are not compared with a base model; without `max_rank` any rank goes; with `root`, files that
    resolve to outside of it are refused; with `scan_values`, all weights are read to find NaN and infinity.
    """
    folder = Path(path)
    if not kind_of(folder, stat.S_ISDIR):
        raise AdapterProblem(Kind.INVALID, f"{folder.name} is missing or is no folder")
    config = _read_config(folder, root)
    if max_rank is not None and config.max_rank > max_rank:
        raise AdapterProblem(
            Kind.RANK,
            f"{CONFIG} has rank {clean(config.max_rank, limit=30)}, the deployment's lora.maxLoraRank is {max_rank}: raise it"
            " there, or train the adapter with a smaller rank",
        )
    pickle = None if kind_of(folder / WEIGHTS) else _clean_pickle(folder, root, scanned)
    if pickle is not None:
        return AdapterInfo(config.max_rank, (), 0, pickle.stat().st_size)
    try:
        with open_regular(folder / WEIGHTS, root=root) as file:
            tensors, body = read_header(file, limit=ADAPTER_HEADER_BYTES)
            pairs = _pairs(tensors, config)
            for module, pair in pairs.items():
                _check_pair(module, pair, config, base)
            if scan_values and (name := first_not_finite(file, tensors, body)):
                raise AdapterProblem(
                    Kind.INVALID,
                    f"{WEIGHTS} holds NaN or infinity in the tensor {quoted(name)}: the training diverged, export an earlier checkpoint",
                )
    except FileProblem as problem:
        raise _weights_problem(folder, problem) from None
    kinds = {module.rpartition(".")[2] for module in pairs}
    size = body + max((tensor.end for tensor in tensors.values()), default=0)
    return AdapterInfo(config.max_rank, tuple(sorted(clean(kind, limit=80) for kind in kinds)), len(tensors), size)


def _read_config(folder: Path, root: Path | None) -> PeftConfig:
    try:
        with open_regular(folder / CONFIG, root=root) as file:
            raw = file.read(_CONFIG_BYTES + 1)
        if len(raw) > _CONFIG_BYTES:
            raise FileProblem(f"is larger than {_CONFIG_BYTES >> 20} MiB")
        return parse_config(parse_json(raw))
    except (FileProblem, ConfigProblem) as problem:
        hint = (
            "; the source must be a PEFT adapter, use source.path when it is in a subfolder"
            if str(problem) == "is missing"
            else ""
        )
        raise AdapterProblem(Kind.INVALID, f"{CONFIG} {problem}{hint}") from None


def _clean_pickle(folder: Path, root: Path | None, scanned: Collection[str] | None) -> Path | None:
    """The pickled weights that the engine would read, where they were scanned."""
    found = next((name for name in _PICKLES if kind_of(folder / name)), None)
    if found is None or found not in (_scanned(folder, root) if scanned is None else scanned):
        return None
    try:
        open_regular(folder / found, root=root).close()
    except FileProblem as problem:
        raise AdapterProblem(Kind.INVALID, f"{found} {problem}") from None
    return folder / found


def _scanned(folder: Path, root: Path | None) -> Collection[str]:
    try:
        with open_regular(folder / _MANIFEST, root=root) as file:
            manifest = parse_json(file.read(_CONFIG_BYTES))
    except FileProblem:
        return ()
    names = manifest.get("pickles") if isinstance(manifest, dict) else None
    return names if isinstance(names, list) else ()


def _weights_problem(folder: Path, problem: FileProblem) -> AdapterProblem:
    if not kind_of(folder / WEIGHTS):
        for name in _PICKLES:
            if kind_of(folder / name):
                return AdapterProblem(
                    Kind.UNSAFE,
                    f"the weights are only in {name}, a pickle file, which can run code when it is read: save the adapter again with"
                    " PEFT's save_pretrained(…, safe_serialization=True)",
                )
    return AdapterProblem(Kind.INVALID, f"{WEIGHTS} {problem}")


def _pairs(tensors: Mapping[str, Tensor], config: PeftConfig) -> dict[str, _Pair]:
    """Tensors by module; a whole classification head counts as no pair."""
    pairs: dict[str, _Pair] = {}
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise AdapterProblem(
                Kind.INVALID,
                f"{WEIGHTS} has the tensor {quoted(name)} of type {tensor.dtype}, which is no floating-point type",
            )
        plain = name.replace(_PREFIX, "")  # everywhere, as the engine does
        if plain.endswith(("embed_tokens.base_layer.weight", "lm_head.base_layer.weight")):
            continue  # the engine skips these copies of the base model's own weights
        parts = plain.split(".")
        if len(parts) > 2 and parts[-2] in ("lora_A", "lora_B") and parts[-1] == "weight":
            pair, is_a = pairs.setdefault(".".join(parts[:-2]), _Pair()), parts[-2] == "lora_A"
        elif len(parts) > 1 and parts[-1] in ("lora_embedding_A", "lora_embedding_B"):
            pair, is_a = pairs.setdefault(".".join(parts[:-1]), _Pair(embedding=True)), parts[-1].endswith("A")
        elif len(parts) > 1 and parts[-2] in config.heads and parts[-1] in ("weight", "bias"):
            continue
        else:
            raise AdapterProblem(
                Kind.INVALID,
                f"{WEIGHTS} has the tensor {quoted(name)}, which is no plain LoRA weight (lora_A.weight or lora_B.weight)",
            )
        pair.name = name
        if is_a:
            pair.a = tensor
        else:
            pair.b = tensor
    if not pairs:
        raise AdapterProblem(Kind.INVALID, f"{WEIGHTS} holds no LoRA tensors; export the adapter again")
    return pairs


def _check_pair(module: str, pair: _Pair, config: PeftConfig, base: BaseModel | None) -> None:
    if pair.a is None or pair.b is None:
        half = "lora_A" if pair.a is None else "lora_B"
        raise AdapterProblem(
            Kind.INVALID, f"{WEIGHTS} has no {half} for the module {quoted(module)}; export the adapter again"
        )
    a, b = pair.a.shape, pair.b.shape
    if ".experts" in f".{module}":
        return  # stacked in several layouts, which only the engine knows
    if len(a) != 2 or len(b) != 2 or 0 in a or 0 in b:
        raise AdapterProblem(
            Kind.INVALID, f"{WEIGHTS} has tensors for the module {quoted(module)} that are no matrices"
        )
    allowed = config.allowed_ranks(module)
    if a[0] != b[1] or a[0] not in allowed:
        ranks = " or ".join(str(rank) for rank in sorted(allowed)[:5])
        raise AdapterProblem(
            Kind.INVALID,
            f"{WEIGHTS} has tensors of rank {a[0]} and {b[1]} for the module {quoted(module)}, but {CONFIG} says {clean(ranks, limit=60)}:"
            " the two files do not belong together",
        )
    fit, width = base.fit(module) if base is not None else (Fit.UNKNOWN, Width())
    if not pair.name.startswith(_PREFIX) and fit is not Fit.PRESENT:
        raise AdapterProblem(
            Kind.INVALID,
            f"{WEIGHTS} has the tensor {quoted(pair.name)} without PEFT's prefix '{_PREFIX}': the engine would ignore it; export the"
            " adapter with PEFT's save_pretrained",
        )
    _refuse_misfit(module, fit)
    if not pair.embedding:
        _refuse_width(module, found=(a[1], b[0]), width=width, transposed=config.transposed)


def _refuse_misfit(module: str, fit: Fit) -> None:
    if fit is Fit.NO_SUCH_KIND:
        raise AdapterProblem(
            Kind.INCOMPATIBLE,
            f"{WEIGHTS} has tensors for the module {quoted(module)}, and the base model has none of that kind",
        )
    if fit is Fit.NOT_HERE:
        raise AdapterProblem(
            Kind.INCOMPATIBLE,
            f"{WEIGHTS} has tensors for the module {quoted(module)}, which the base model does not have: the engine would drop them;"
            " the adapter was trained on another model",
        )


def _refuse_width(module: str, *, found: tuple[int, int], width: Width, transposed: bool) -> None:
    wanted = (width.inputs, width.outputs)
    orders = (wanted, wanted[::-1]) if transposed else (wanted,)
    if not any(all(w is None or f == w for f, w in zip(found, order, strict=True)) for order in orders):
        sides = ["?" if side is None else str(side) for side in wanted]
        raise AdapterProblem(
            Kind.INCOMPATIBLE,
            f"{WEIGHTS} changes the module {quoted(module)} as {found[0]} to {found[1]} wide, the base model's is {sides[0]} to"
            f" {sides[1]}: the adapter was trained on another model",
        )
