"""Decides, from a listing alone, which files of a source are wanted and under which names they are published. Pure.

Names in a listing are hostile data; those that are wanted are judged by `file_names`, others not at all.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from lora_operator.constants import Reason
from lora_operator.errors import ReasonError
from lora_operator.fetch import text
from lora_operator.fetch.content import file_names
from lora_operator.wire.jobs import MANIFEST_FILE, ContentType

MAX_LISTED: Final = 50_000  # files of a source or entries of an archive: their names are held in memory
_SHOWN: Final = 5

ADAPTER_CONFIG: Final = "adapter_config.json"
ADAPTER_WEIGHTS: Final = "adapter_model.safetensors"
ADAPTER_PICKLES: Final = ("adapter_model.bin", "adapter_model.pt")  # in the order in which vLLM looks for them
MODEL_CONFIG: Final = "config.json"

# fnmatch's `*` crosses folders, as in huggingface_hub; adapters are flat, so theirs are matched against names without a folder.
_SMALL: Final = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")
_ADAPTER_ALLOW: Final = (*_SMALL, "*.safetensors")
# A full model that lies beside its adapter, and the trainer's own state.
_ADAPTER_IGNORE: Final = ("model.safetensors*", "model-*-of-*.safetensors", "consolidated*", "trainer_state.json")
_MODEL_IGNORE: Final = (
    "original/*",
    "onnx/*",
    "gguf/*",
    "*/checkpoint-*/*",
    "checkpoint-*/*",
    "runs/*",
    "trainer_state.json",
)
_NO_TOKENIZER: Final = "tokenizer.json, tokenizer.model or another tokenizer's file"
_PICKLE: Final = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_NOT_WEIGHTS: Final = (
    "training_args.bin",
    "optimizer.bin",
    "optimizer.pt",
    "scheduler.pt",
    "scaler.pt",
    "rng_state*.pth",
)
_TOKENIZERS: Final = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece*.model",
    "tekken.json",
    "*.tiktoken",
)

# What is run when it is imported: taken only where the platform team trusts it, whatever the patterns ask for.
_CODE: Final = (".py", ".pyc", ".so")
# vLLM's formats that read safetensors alone.
_SAFE_FORMATS: Final = ("safetensors", "fastsafetensors", "instanttensor", "runai_streamer")
_INDEX: Final = ".index.json"
_SHARD: Final = re.compile(r"(.+-)(\d{5})(-of-(\d{5})\.[a-z]+)")

Kind = ContentType


@dataclass(frozen=True)
class RemoteFile:
    """One file of the listing: `path` in the source, and what the source declares about its content."""

    path: str
    size: int
    git_oid: str = ""  # of the Hub
    sha256: str | None = None  # of the Hub, for files in LFS only
    version: str = ""  # of S3: the ETag as listed
    stored_as: str = ""

    @property
    def blob(self) -> str:
        """The name of the blob on the volume: a declared hash of the content, where the source has one."""
        return self.stored_as or self.sha256 or self.git_oid


@dataclass(frozen=True)
class WantedFile:
    """A file that is to be published as `name`, relative to the snapshot."""

    name: str
    remote: RemoteFile


@dataclass(frozen=True)
class Options:
    """What a want says beside the source's patterns."""

    load_format: str = "auto"
    code: bool = False
    own_tokenizer: bool = True
    pickled_weights: bool = False  # of an adapter
    in_place: bool = False  # whether files lie where somebody may change them, also after a scan


_DEFAULTS: Final = Options()


def choose(
    listing: Sequence[RemoteFile],
    *,
    kind: Kind,
    folder: str = "",
    allow: Sequence[str] = (),
    ignore: Sequence[str] = (),
    options: Options = _DEFAULTS,
) -> tuple[WantedFile, ...]:
    """The wanted files, sorted by name.

    `allow` replaces the defaults of the kind, `ignore` adds to them; both are matched against names inside `folder`. Raises ReasonError:
    EntryNotFound, UnsafeFormat, InvalidAdapter, IncompleteModel, each with what is missing or wrong.
    """
    prefix = _prefix(folder)
    files = {file.path[len(prefix) :]: file for file in listing if file.path.startswith(prefix)}
    if not files:
        raise ReasonError(Reason.ENTRY_NOT_FOUND, _no_folder(listing, folder) if prefix else "the source has no files")
    names = _matching(files, allow) if allow else _defaults(files, kind, options)
    # Whatever the patterns ask for: reading a pickle can run code in the engine, and so can a module that lies beside a model.
    if kind == "Adapter":
        pickled = _pickled_weights(files, names) if options.pickled_weights and not options.in_place else []
        names = [name for name in names if not _is_pickle(name)] + pickled
    if kind == "Adapter" or not options.code:
        names = [name for name in names if not name.lower().endswith(_CODE)]
    ignored = set(_matching(files, ignore))
    names = sorted(name for name in names if name not in ignored and name != MANIFEST_FILE)
    if kind == "Adapter":
        _require_adapter(files, names, options)
    if not names:
        raise ReasonError(
            Reason.ENTRY_NOT_FOUND,
            f"none of the {len(files)} files matches; correct allowPatterns and ignorePatterns of the source",
        )
    if kind == "BaseModel":
        _require_model(files, names, options)
    if kind == "Tokenizer" and not _matching(names, _TOKENIZERS):
        raise ReasonError(Reason.INCOMPLETE_MODEL, f"there is no tokenizer: {_NO_TOKENIZER} is not there")
    file_names.require(names, Reason.INVALID_ADAPTER if kind == "Adapter" else Reason.INCOMPLETE_MODEL)
    return tuple(WantedFile(name=name, remote=files[name]) for name in names)


def _prefix(folder: str) -> str:
    parts = [part for part in folder.split("/") if part]
    if folder.startswith("/") or any(part in (".", "..") for part in parts):
        raise ReasonError(
            Reason.ENTRY_NOT_FOUND, f"source.path {text.clean(folder, limit=200)!r} is not a folder inside the source"
        )
    return "/".join(parts) + "/" if parts else ""


def _matching(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    wide = [pattern + "*" if pattern.endswith("/") else pattern for pattern in patterns]
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in wide)]


def _defaults(files: Iterable[str], kind: Kind, options: Options) -> list[str]:
    if kind == "Adapter":
        flat = [name for name in files if "/" not in name]
        left_out = set(_matching(flat, _ADAPTER_IGNORE))
        return [name for name in _matching(flat, _ADAPTER_ALLOW) if name not in left_out]
    left_out = set(_matching(files, _MODEL_IGNORE))
    names = [name for name in files if name not in left_out]
    flat = [name for name in names if "/" not in name]
    small = _matching(names if kind == "BaseModel" else flat, (*_SMALL, "*.py") if options.code else _SMALL)
    # Further copies of the weights lie in folders (original/, fp16/, mlx/, …); vLLM reads those beside config.json.
    weights = _weights(flat, options.load_format) if kind == "BaseModel" else []
    return [name for name in small if not _is_stray_index(name, weights)] + weights


def _weights(names: list[str], load_format: str) -> list[str]:
    """The one copy of the weights that vLLM reads with this format; none where there is none."""
    safe = _matching(names, ["*.safetensors"])
    mistral = [name for name in safe if name.startswith("consolidated")]
    standard = [name for name in safe if name not in mistral]
    pickled = [name for name in names if _is_pickle(name) and not _matching([name], _NOT_WEIGHTS)]
    bins, pts = ([name for name in pickled if name.endswith(suffix)] for suffix in (".bin", ".pt"))
    if load_format in _SAFE_FORMATS:
        return standard
    if load_format == "mistral":
        return mistral
    if load_format == "pt":
        return pts
    return standard or (mistral if load_format == "auto" else []) or bins or pts


def _is_stray_index(name: str, weights: Sequence[str]) -> bool:
    """Whether it is the index of weights that are not taken."""
    if not name.endswith(_INDEX) or "/" in name:
        return False
    stem, _, suffix = name.removesuffix(_INDEX).rpartition(".")
    return not any(file.startswith(stem) and file.endswith(suffix) for file in weights)


def _pickled_weights(files: Iterable[str], names: Sequence[str]) -> list[str]:
    """The one pickle of an adapter that vLLM reads, where it has no other weights."""
    if ADAPTER_WEIGHTS in names:
        return []
    return [name for name in ADAPTER_PICKLES if name in files][:1]


def _is_pickle(name: str) -> bool:
    return name.lower().endswith(_PICKLE)


def _require_adapter(files: dict[str, RemoteFile], names: Sequence[str], options: Options) -> None:
    if ADAPTER_CONFIG not in names:
        folders = sorted({name.rpartition("/")[0] for name in files if name.endswith("/" + ADAPTER_CONFIG)})
        hint = f"; it has one in: {_few(folders)}; set source.path to that folder" if folders else ""
        chosen = "the chosen files have" if ADAPTER_CONFIG in files else "there is"
        raise ReasonError(Reason.INVALID_ADAPTER, f"not a LoRA adapter: {chosen} no {ADAPTER_CONFIG}{hint}")
    if not any(name.endswith(".safetensors") or _is_pickle(name) for name in names):
        pickles = sorted(
            name for name in files if "/" not in name and _is_pickle(name) and not _matching([name], _NOT_WEIGHTS)
        )
        if pickles:
            raise ReasonError(
                Reason.UNSAFE_FORMAT,
                f"the weights exist only as pickle ({_few(pickles)}), which can run code when read; "
                f"convert them to adapter_model.safetensors{_no_scan(options)}",
            )
        raise ReasonError(Reason.INVALID_ADAPTER, "the adapter has no weights: there is no adapter_model.safetensors")


def _no_scan(options: Options) -> str:
    if options.in_place:
        return "; those that lie on the cache's volume already are not taken after a scan either, for they may change after it"
    return "" if options.pickled_weights else ", or have spec.adapterPolicy.pickledWeights: AllowScanned set"


def _require_model(files: Iterable[str], names: Sequence[str], options: Options) -> None:
    missing = []
    # Mistral's own format has its configuration under another name.
    if MODEL_CONFIG not in names and not (options.load_format == "mistral" and "params.json" in names):
        missing.append(MODEL_CONFIG)
    weights = _weights([name for name in names if "/" not in name], options.load_format)
    if not weights:
        missing.append(_no_weights(files, options.load_format))
    missing += _missing_shards(weights)
    if options.own_tokenizer and not _matching(names, _TOKENIZERS):
        missing.append(f"a tokenizer ({_NO_TOKENIZER}; or set model.tokenizer)")
    if missing:
        raise ReasonError(Reason.INCOMPLETE_MODEL, f"the model lacks {_few(missing)}")


def _no_weights(files: Iterable[str], load_format: str) -> str:
    kinds = {"mistral": "consolidated*.safetensors", "pt": "*.pt"}
    wanted = f"weights ({kinds.get(load_format, '*.safetensors')})"
    if load_format == "auto":
        return wanted
    other = _weights([name for name in files if "/" not in name], "auto")
    hint = f"; it has {_few(other)}: loadFormat auto takes those" if other else ""
    return f"{wanted}, which loadFormat {load_format} reads{hint}"


def _missing_shards(weights: Sequence[str]) -> list[str]:
    """Names of the parts that the other parts' names count (model-00001-of-00002.safetensors) and that are not there."""
    have = set(weights)
    missing: list[str] = []
    for start, end, total in sorted({(m[1], m[3], int(m[4])) for name in weights if (m := _SHARD.fullmatch(name))}):
        numbers = range(1, min(total, file_names.MAX_FILES) + 1)
        missing += [part for number in numbers if (part := f"{start}{number:05}{end}") not in have]
    return missing


def _no_folder(listing: Sequence[RemoteFile], folder: str) -> str:
    wanted = text.clean(folder, limit=200)
    if any(file.path == folder.strip("/") for file in listing):
        return f"source.path {wanted!r} is a file; name its folder"
    folders = sorted({file.path.split("/")[0] for file in listing if "/" in file.path})
    return f"the source has no folder {wanted!r}" + (f"; it has: {_few(folders)}" if folders else " (it has none)")


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(text.clean(name, limit=100) for name in names[:_SHOWN])
    return shown + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
