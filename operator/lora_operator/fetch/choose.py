"""Decides, from a listing alone, which files of a source are wanted and under which names they are published. Pure.

Names in a listing are hostile data: one that is wanted and could leave the view, hide, or collide with another one is refused. Names
that nobody wants are not judged.
"""

from __future__ import annotations

import fnmatch
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from lora_operator.constants import Reason
from lora_operator.errors import ReasonError
from lora_operator.fetch import text
from lora_operator.manifest import MANIFEST_FILE

MAX_FILES: Final = 2000
_MAX_PART_BYTES: Final = 255
_MAX_PATH_BYTES: Final = 1024
_SHOWN: Final = 5

ADAPTER_CONFIG: Final = "adapter_config.json"
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

Kind = Literal["Adapter", "BaseModel"]


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
        """The name of the payload on the volume: a declared hash of the content, where the source has one."""
        return self.stored_as or self.sha256 or self.git_oid


@dataclass(frozen=True)
class WantedFile:
    """A file that is to be published as `name`, relative to the view."""

    name: str
    remote: RemoteFile


def choose(
    listing: Sequence[RemoteFile],
    *,
    kind: Kind,
    folder: str = "",
    allow: Sequence[str] = (),
    ignore: Sequence[str] = (),
) -> tuple[WantedFile, ...]:
    """The wanted files, sorted by name.

    `allow` replaces the defaults of the kind, `ignore` adds to them; both are matched against names inside `folder`. Raises ReasonError:
    EntryNotFound, UnsafeFormat, InvalidAdapter, IncompleteModel, each with what is missing or wrong.
    """
    prefix = _prefix(folder)
    files = {file.path[len(prefix) :]: file for file in listing if file.path.startswith(prefix)}
    if not files:
        raise ReasonError(Reason.ENTRY_NOT_FOUND, _no_folder(listing, folder) if prefix else "the source has no files")
    if kind == "Adapter":
        names = _matching(files, allow) if allow else _default_adapter(files)
        # Whatever the patterns ask for: reading a pickle can run code in the engine.
        names = [name for name in names if not _is_pickle(name)]
    else:
        names = _matching(files, allow) if allow else _default_model(files)
    ignored = set(_matching(files, ignore))
    names = sorted(name for name in names if name not in ignored and name != MANIFEST_FILE)
    if kind == "Adapter":
        _require_adapter(files, names)
    if not names:
        raise ReasonError(
            Reason.ENTRY_NOT_FOUND,
            f"none of the {len(files)} files matches; correct allowPatterns and ignorePatterns of the source",
        )
    if kind == "BaseModel":
        _require_model(names)
    _require_decent(names, Reason.INVALID_ADAPTER if kind == "Adapter" else Reason.INCOMPLETE_MODEL)
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


def _default_adapter(files: Iterable[str]) -> list[str]:
    flat = [name for name in files if "/" not in name]
    left_out = set(_matching(flat, _ADAPTER_IGNORE))
    return [name for name in _matching(flat, _ADAPTER_ALLOW) if name not in left_out]


def _default_model(files: Iterable[str]) -> list[str]:
    names = list(files)
    left_out = set(_matching(names, _MODEL_IGNORE))
    names = [name for name in names if name not in left_out]
    # Further copies of the weights lie in folders (original/, fp16/, mlx/, …); vLLM reads those beside config.json.
    return _matching(names, _SMALL) + _weights([name for name in names if "/" not in name])


def _weights(names: list[str]) -> list[str]:
    safe = _matching(names, ["*.safetensors"])
    standard = [name for name in safe if not name.startswith("consolidated")]
    if safe:
        return standard or safe
    for suffix in (".bin", ".pt"):
        pickled = [name for name in names if name.endswith(suffix) and not _matching([name], _NOT_WEIGHTS)]
        if pickled:
            return pickled
    return []


def _is_pickle(name: str) -> bool:
    return name.lower().endswith(_PICKLE)


def _require_adapter(files: dict[str, RemoteFile], names: Sequence[str]) -> None:
    if ADAPTER_CONFIG not in names:
        folders = sorted({name.rpartition("/")[0] for name in files if name.endswith("/" + ADAPTER_CONFIG)})
        hint = f"; it has one in: {_few(folders)}; set source.path to that folder" if folders else ""
        chosen = "the chosen files have" if ADAPTER_CONFIG in files else "there is"
        raise ReasonError(Reason.INVALID_ADAPTER, f"not a LoRA adapter: {chosen} no {ADAPTER_CONFIG}{hint}")
    if not any(name.endswith(".safetensors") for name in names):
        pickles = sorted(
            name for name in files if "/" not in name and _is_pickle(name) and not _matching([name], _NOT_WEIGHTS)
        )
        if pickles:
            raise ReasonError(
                Reason.UNSAFE_FORMAT,
                f"the weights exist only as pickle ({_few(pickles)}), which can run code when read; "
                "convert them to adapter_model.safetensors",
            )
        raise ReasonError(Reason.INVALID_ADAPTER, "the adapter has no weights: there is no adapter_model.safetensors")


def _require_model(names: Sequence[str]) -> None:
    missing = []
    if MODEL_CONFIG not in names:
        missing.append(MODEL_CONFIG)
    if not any(name.endswith((".safetensors", ".bin", ".pt")) and "/" not in name for name in names):
        missing.append("weights (*.safetensors)")
    if not _matching(names, _TOKENIZERS):
        missing.append("a tokenizer (tokenizer.json, tokenizer.model, …)")
    if missing:
        raise ReasonError(Reason.INCOMPLETE_MODEL, f"the base model lacks {', '.join(missing)}")


def _require_decent(names: Sequence[str], reason: Reason) -> None:
    if len(names) > MAX_FILES:
        raise ReasonError(
            reason, f"{len(names)} files are wanted, more than {MAX_FILES}; narrow allowPatterns or set source.path"
        )
    taken: dict[str, str] = {}
    folders = {
        "/".join(parts[:depth]) for parts in (name.split("/") for name in names) for depth in range(1, len(parts))
    }
    for name in names:
        fault = _fault(name)
        if fault:
            raise ReasonError(
                reason, f"the file name {ascii(name)[:200]} {fault}; rename it or leave it out by ignorePatterns"
            )
        # Folders count too: `a` and `A/b` collide on a volume that ignores case.
        parts = name.split("/")
        for depth in range(1, len(parts) + 1):
            path = "/".join(parts[:depth])
            other = taken.setdefault(unicodedata.normalize("NFKC", path).casefold(), path)
            if other != path or (depth == len(parts) and path in folders):
                raise ReasonError(
                    reason,
                    f"the file names {ascii(other)[:200]} and {ascii(path)[:200]} collide; rename one or leave it out",
                )


def _fault(name: str) -> str:
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts) or "\\" in name:
        return "leads out of its folder"
    if any(unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") for c in name):
        return "has control characters"
    if len(name.encode()) > _MAX_PATH_BYTES or any(len(part.encode()) > _MAX_PART_BYTES for part in parts):
        return "is too long"
    if MANIFEST_FILE in parts:
        return "is reserved"
    return ""


def _no_folder(listing: Sequence[RemoteFile], folder: str) -> str:
    wanted = text.clean(folder, limit=200)
    if any(file.path == folder.strip("/") for file in listing):
        return f"source.path {wanted!r} is a file; name its folder"
    folders = sorted({file.path.split("/")[0] for file in listing if "/" in file.path})
    return f"the source has no folder {wanted!r}" + (f"; it has: {_few(folders)}" if folders else " (it has none)")


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(text.clean(name, limit=100) for name in names[:_SHOWN])
    return shown + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
