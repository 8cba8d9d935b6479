"""The module list as pods hold it, and the kit's small files in its emptyDir.

The list says which adapters an engine serves. It comes from the operator by HTTP and by ConfigMap; the emptyDir keeps what was
acknowledged, so that a restarted container needs no operator. A file that can't be read is as if it were not there: no damage to
these files may stop an engine.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, TypeVar

from .tensors import FileProblem, parse_json
from .text import clean, quoted

LIST_BYTES: Final = 32 << 20
REQUEST_BYTES: Final = 64 << 20
MAX_MODULES: Final = 100_000
LIST_FILE: Final = "modules.json"  # what was acknowledged last
ROLLOUT: Final = "Rollout"  # the updateStrategy with which the list is in the container's arguments, and never changes
MARKER_FILE: Final = "starting.json"  # there while an engine that got static entries is not up
REFUSED_FILE: Final = "refused.json"  # what the engine refused, by name and path
REPORT_FILE: Final = "launcher.json"  # what the launcher passed and dropped
_MAX_NAME: Final = 512
_MAX_PATH: Final = 4096


Found = TypeVar("Found")


class ListProblem(Exception):  # noqa: N818 - it is a finding about what was sent
    """Why something is no module list."""


@dataclass(frozen=True)
class Module:
    """One adapter of the list."""

    name: str
    path: str
    base_model_name: str | None = None
    revision: str = ""
    uid: str = ""  # of the object that wants it: another one is somebody else's, whatever its name
    lazy: bool = False  # loaded when somebody asks for it


@dataclass(frozen=True)
class ModuleList:
    """The adapters that an engine is to serve; `problems` names entries that can't be used, and why.

    `digest` is the sha256 of the list as it was sent: pods of one generation may be told different things.
    """

    generation: int
    modules: tuple[Module, ...]
    problems: tuple[tuple[Module, str], ...] = ()
    digest: str = ""

    @cached_property
    def by_name(self) -> dict[str, Module]:
        """Adapters by public name."""
        return {module.name: module for module in self.modules}


def parse_list(raw: bytes, *, served_names: frozenset[str] = frozenset()) -> tuple[ModuleList, bytes]:
    """A module list of JSON bytes, which may be gzip, and its plain bytes; raises ListProblem.

    Entries that name a served model, repeat a name or are malformed become `problems`, the others stay.
    """
    plain = _inflate(raw)
    try:
        body = parse_json(plain)
    except FileProblem as problem:
        raise ListProblem(f"the module list {problem}") from None
    if not isinstance(body, dict) or body.get("version") != 1:
        raise ListProblem("the module list is no object of version 1")
    generation, entries = body.get("generation"), body.get("modules")
    if isinstance(generation, bool) or not isinstance(generation, int) or not 0 <= generation < 1 << 63:
        raise ListProblem("the module list has no generation")
    if not isinstance(entries, list) or len(entries) > MAX_MODULES:
        raise ListProblem(f"the module list has no modules, or more than {MAX_MODULES}")
    modules: dict[str, Module] = {}
    problems: list[tuple[Module, str]] = []
    for entry in entries:
        module = _module(entry)
        wrong = _name_problem(module.name, served_names) or _path_problem(module.path)
        if wrong is None and module.name in modules:
            wrong = "the name is in the module list twice"
        if wrong is None:
            modules[module.name] = module
        else:
            problems.append((module, wrong))
    digest = hashlib.sha256(plain).hexdigest()
    return ModuleList(generation, tuple(modules.values()), tuple(problems), digest), plain


def tell_list(modules: ModuleList | None) -> dict[str, Any]:
    """The list for an operator that has lost it; without those entries that can't be used."""
    entries = modules.modules if modules is not None else ()
    return {
        "generation": modules.generation if modules is not None else 0,
        "modules": [
            {
                "name": one.name,
                "path": one.path,
                "baseModelName": one.base_model_name,
                "revision": one.revision,
                "uid": one.uid,
            }
            for one in entries
        ],
    }


def _inflate(raw: bytes) -> bytes:
    if not raw.startswith(b"\x1f\x8b"):
        return raw
    inflater = zlib.decompressobj(wbits=31)
    try:
        plain = inflater.decompress(raw, LIST_BYTES)
    except zlib.error:
        raise ListProblem("the module list is damaged gzip") from None
    if inflater.unconsumed_tail or not inflater.eof:
        raise ListProblem(f"the module list is cut off, or larger than {LIST_BYTES} bytes")
    return plain


def _module(entry: Any) -> Module:
    values = entry if isinstance(entry, Mapping) else {}
    text = {key: value for key, value in values.items() if isinstance(value, str)}
    return Module(
        name=text.get("name", "")[:_MAX_NAME],
        path=text.get("path", "")[:_MAX_PATH],
        base_model_name=text.get("baseModelName"),
        revision=text.get("revision", ""),
        uid=text.get("uid", ""),
        lazy=text.get("loadPolicy") == "Lazy",
    )


def _name_problem(name: str, served_names: frozenset[str]) -> str | None:
    if not name or name != clean(name, limit=_MAX_NAME) or name.startswith("-") or set(name) & set(",@"):
        return "the name is empty, too long, starts with a dash, or holds a comma, an @ or unprintable characters"
    if name in served_names:
        return f"the name {quoted(name)} is that of the base model"
    return None


def _path_problem(path: str) -> str | None:
    if not path.startswith("/") or "\0" in path or ".." in path.split("/"):
        return "the path is not absolute, or has .. in it"
    return None


def read_list(path: Path, *, served_names: frozenset[str] = frozenset()) -> ModuleList | None:
    """The list in a file; None when there is none that can be used."""
    try:
        with path.open("rb") as file:
            return parse_list(file.read(LIST_BYTES), served_names=served_names)[0]
    except (OSError, ValueError, ListProblem):
        return None


def newest_list(*paths: Path, served_names: frozenset[str] = frozenset()) -> ModuleList | None:
    """The list with the highest generation; of equals the one of the path that comes first."""
    found = [one for path in paths if (one := read_list(path, served_names=served_names)) is not None]
    return max(found, key=lambda one: one.generation, default=None)


@dataclass(frozen=True)
class Settings:
    """What the operator tells the kit through the container's environment."""

    modules_file: Path
    state_dir: Path
    token_file: Path
    cache_root: Path
    model_path: Path | None
    served_names: frozenset[str]
    max_lora_rank: int | None
    max_cpu_loras: int
    kit: str
    api_key: str | None
    update_strategy: str
    list_generation: int  # of the list in the arguments
    max_request_bytes: int  # of a client's body

    @classmethod
    def read(cls, env: Mapping[str, str]) -> Settings:
        """The settings; whatever is missing or malformed gets the value that promises least."""
        names: Any = None
        try:
            names = json.loads(env.get("LORA_OPERATOR_SERVED_NAMES", "[]"))
        except ValueError:
            names = None
        most = _number(env.get("LORA_OPERATOR_MAX_REQUEST_BYTES"), digits=19)
        return cls(
            modules_file=Path(env.get("LORA_OPERATOR_MODULES") or "/etc/lora-operator/modules/modules.json.gz"),
            state_dir=Path(env.get("LORA_OPERATOR_STATE") or "/var/lib/lora-operator"),
            token_file=Path(env.get("LORA_OPERATOR_TOKEN_FILE") or "/etc/lora-operator/gate/token"),
            cache_root=Path(env.get("LORA_OPERATOR_CACHE_ROOT") or "/model-cache"),
            model_path=Path(env["LORA_OPERATOR_MODEL_PATH"]) if env.get("LORA_OPERATOR_MODEL_PATH") else None,
            served_names=frozenset(str(name) for name in names) if isinstance(names, list) else frozenset(),
            max_lora_rank=_number(env.get("LORA_OPERATOR_MAX_LORA_RANK")),
            max_cpu_loras=_number(env.get("LORA_OPERATOR_MAX_CPU_LORAS")) or 0,
            kit=env.get("LORA_OPERATOR_KIT", ""),
            api_key=env.get("VLLM_API_KEY") or None,
            update_strategy=env.get("LORA_OPERATOR_UPDATE_STRATEGY") or "HotLoad",
            list_generation=_number(env.get("LORA_OPERATOR_LIST_GENERATION"), digits=16) or 0,
            max_request_bytes=REQUEST_BYTES if most is None else most,
        )

    @property
    def list_file(self) -> Path:
        """The acknowledged list; that of the arguments where it is there."""
        return self.state_dir / LIST_FILE

    @property
    def list_files(self) -> tuple[Path, ...]:
        """Where a start finds lists."""
        return (self.list_file,) if self.rolls else (self.list_file, self.modules_file)

    @property
    def rolls(self) -> bool:
        """Whether the list is in the arguments: other adapters come with another pod."""
        return self.update_strategy == ROLLOUT


def _number(text: str | None, *, digits: int = 9) -> int | None:
    return int(text) if text and text.isascii() and text.isdigit() and len(text) <= digits else None


def write_file(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Put `content` at `path` in one step, which survives a crash of the machine if `durable`; raises OSError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    if not durable:
        return
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_report(path: Path, content: Any) -> None:
    """Write a report as JSON where that is possible; a report is never worth a failure."""
    try:
        write_file(path, json.dumps(content, sort_keys=True).encode())
    except (OSError, ValueError):
        return


def read_report(path: Path, take: Callable[[Any], Found], otherwise: Found) -> Found:
    """What `take` finds in a file of write_report's kind; `otherwise` where that is missing, damaged or of another form."""
    try:
        return take(json.loads(path.read_bytes()))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return otherwise


def read_refused(path: Path) -> dict[tuple[str, str], str]:
    """The engine's refusals by (name, path)."""
    return read_report(
        path,
        lambda kept: {(str(one["name"]), str(one["path"])): str(one["message"]) for one in kept["refused"]},
        {},
    )


def write_refused(path: Path, refused: Mapping[tuple[str, str], str]) -> None:
    """Keep the engine's refusals for the launcher."""
    entries = [{"name": name, "path": where, "message": message} for (name, where), message in refused.items()]
    write_report(path, {"version": 1, "refused": entries})
