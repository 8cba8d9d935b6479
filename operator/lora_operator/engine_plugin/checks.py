"""Checks a LoRA adapter's files before any engine sees them: what vLLM refuses, and what it would serve wrongly.

One bad `--lora-modules` entry stops a whole engine, and some adapters are accepted with status 200 and answer nonsense, so
this is stricter than vLLM. It is used by the fetcher (before anything is published), by the launcher and by the plugin. It never
imports more than the standard library, never unpickles, and trusts nothing that it reads.
"""

from __future__ import annotations

import stat
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from .basefiles import read_base_model
from .basemodel import BaseModel
from .clean_text import clean
from .fits import check_fit, require_no_patterns
from .pairs import AdapterTensors, sort_tensors
from .peftconfig import ConfigProblem, PeftConfig, parse_config
from .problems import CONFIG, WEIGHTS, AdapterProblem, ProblemKind
from .tensors import (
    ADAPTER_HEADER_BYTES,
    FileProblem,
    kind_of,
    open_regular,
    parse_json,
    read_header,
    require_readable,
)
from .values import scan_values as read_values
from .versions import Version

__all__ = [
    "CONFIG",
    "WEIGHTS",
    "AdapterInfo",
    "AdapterProblem",
    "BaseModel",
    "ProblemKind",
    "check_adapter",
    "read_base_model",
]

_PICKLES: Final = ("adapter_model.bin", "adapter_model.pt")
_MANIFEST: Final = ".lora-operator.json"  # what the download Job writes beside what it publishes
_CONFIG_BYTES: Final = 4 << 20


@dataclass(frozen=True)
class AdapterInfo:
    """What a good adapter is like."""

    rank: int  # the largest of all modules
    target_modules: tuple[str, ...]  # kinds of modules that it has tensors for, sorted
    tensors: int
    size_bytes: int  # of the weights file


def check_adapter(
    path: Path | str,
    *,
    base: BaseModel | None = None,
    max_rank: int | None = None,
    root: Path | None = None,
    engine: Version | None = None,
    recast: bool = False,
    scan_values: bool = False,
    scanned: Collection[str] | None = None,
) -> AdapterInfo:
    """Check the adapter in the folder `path`; raises AdapterProblem.

    base         compare tensors with this base model
    max_rank     refuse a larger rank
    root         refuse files that resolve to outside of this folder
    engine       vLLM's version: refuse what older ones serve wrongly, and what the base model's class does not take
    recast       the engine may make another class of the base model, so that the latter is not known
    scan_values  read all weights, to find NaN, infinity, absurd values, and changes that are all zero
    scanned      pickled weights that hold nothing but tensors, of which only the configuration is checked; else the manifest's
    """
    folder = Path(path)
    config = _read_config(folder, root)
    _require_rank(config, max_rank)
    pickle = None if kind_of(folder / WEIGHTS) else _clean_pickle(folder, root, scanned)
    if pickle is not None:
        require_no_patterns(config, engine)
        return AdapterInfo(config.max_rank, (), 0, pickle.stat().st_size)
    try:
        with open_regular(folder / WEIGHTS, root=root) as file:
            tensors, body = read_header(file, limit=ADAPTER_HEADER_BYTES)
            require_readable(file)
            content = sort_tensors(tensors, config)
            check_fit(content, config, base=base, engine=engine, recast=recast)
            if scan_values:
                _require_effect(content, read_values(file, tensors, body))
    except FileProblem as problem:
        raise _weights_problem(folder, problem) from None
    size = body + max((tensor.end for tensor in tensors.values()), default=0)
    return AdapterInfo(config.max_rank, _kinds(content), len(tensors), size)


def _kinds(content: AdapterTensors) -> tuple[str, ...]:
    kinds = {module.rpartition(".")[2] for module in content.pairs}
    return tuple(sorted(clean(kind, limit=80) for kind in kinds))


def _require_rank(config: PeftConfig, max_rank: int | None) -> None:
    if max_rank is not None and config.max_rank > max_rank:
        raise AdapterProblem(
            ProblemKind.RANK,
            f"{CONFIG} has rank {clean(config.max_rank, limit=30)}, the deployment's lora.maxLoraRank is {max_rank}: raise it"
            " there, or train the adapter with a smaller rank",
        )


def _read_config(folder: Path, root: Path | None) -> PeftConfig:
    if not kind_of(folder, stat.S_ISDIR):
        raise AdapterProblem(ProblemKind.INVALID, f"{folder.name} is missing or is no folder")
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
        raise AdapterProblem(ProblemKind.INVALID, f"{CONFIG} {problem}{hint}") from None


def _clean_pickle(folder: Path, root: Path | None, scanned: Collection[str] | None) -> Path | None:
    """The pickled weights that the engine would read, where they were scanned."""
    found = next((name for name in _PICKLES if kind_of(folder / name)), None)
    if found is None or found not in (_scanned(folder, root) if scanned is None else scanned):
        return None
    try:
        open_regular(folder / found, root=root).close()
    except FileProblem as problem:
        raise AdapterProblem(ProblemKind.INVALID, f"{found} {problem}") from None
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
                    ProblemKind.UNSAFE,
                    f"the weights are only in {name}, a pickle file, which can run code when it is read: save the adapter again with"
                    " PEFT's save_pretrained(…, safe_serialization=True)",
                )
    return AdapterProblem(ProblemKind.INVALID, f"{WEIGHTS} {problem}")


def _require_effect(content: AdapterTensors, zeros: Collection[str]) -> None:
    """A half that is all zero makes a module's change zero; modules that got no gradient are normal, an adapter of nothing else is not."""
    if not content.heads and all(pair.a_name in zeros or pair.b_name in zeros for pair in content.pairs.values()):
        raise AdapterProblem(
            ProblemKind.INVALID,
            f"{WEIGHTS} holds lora_A or lora_B of zeros alone for every module: the adapter changes nothing; the training did not reach it, or"
            " it was saved without gathering the weights (DeepSpeed ZeRO-3): export it again",
        )
