"""The adapter list as pods hold it: which adapters an engine serves, from which path, with which lineage.

It comes from the operator by HTTP and by ConfigMap, and the emptyDir keeps what was acknowledged, so that a restarted container
needs no operator. One damaged entry costs that entry, a damaged file counts as none: neither may stop an engine.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from .clean_text import clean, quoted
from .tensors import FileProblem, parse_json

LIST_BYTES: Final = 32 << 20
MAX_ENTRIES: Final = 100_000
_MAX_NAME: Final = 512
_MAX_PATH: Final = 4096


class ListProblem(Exception):  # noqa: N818 - it is a finding about what was sent
    """Why something is no adapter list."""


@dataclass(frozen=True)
class ListedAdapter:
    """One entry of the list."""

    name: str
    path: str
    base_model_name: str | None = None
    revision: str = ""
    uid: str = ""  # of the object that wants it: another one is somebody else's, whatever its name
    lazy: bool = False  # loaded when somebody asks for it


@dataclass(frozen=True)
class ReceivedList:
    """The adapters that an engine is to serve; `problems` names entries that can't be used, and why.

    `digest` is the sha256 of the list as it was sent: pods may be sent different lists of one generation.
    """

    generation: int
    entries: tuple[ListedAdapter, ...]
    problems: tuple[tuple[ListedAdapter, str], ...] = ()
    digest: str = ""

    @cached_property
    def by_name(self) -> dict[str, ListedAdapter]:
        """The entries by public name, which is unique among them."""
        return {entry.name: entry for entry in self.entries}


def parse_list(raw: bytes, *, served_names: frozenset[str] = frozenset()) -> tuple[ReceivedList, bytes]:
    """An adapter list of JSON bytes, which may be gzip, and its plain bytes; raises ListProblem.

    Entries that name a served model, repeat a name or are malformed become `problems`, the others stay.
    """
    plain = _inflate(raw)
    try:
        body = parse_json(plain)
    except FileProblem as problem:
        raise ListProblem(f"the module list {problem}") from None
    if not isinstance(body, dict) or body.get("version") != 1:
        raise ListProblem("the module list is no object of version 1")
    generation, items = body.get("generation"), body.get("modules")
    if isinstance(generation, bool) or not isinstance(generation, int) or not 0 <= generation < 1 << 63:
        raise ListProblem("the module list has no generation")
    if not isinstance(items, list) or len(items) > MAX_ENTRIES:
        raise ListProblem(f"the module list has no modules, or more than {MAX_ENTRIES}")
    entries: dict[str, ListedAdapter] = {}
    problems: list[tuple[ListedAdapter, str]] = []
    for item in items:
        entry = _entry(item)
        wrong = _name_problem(entry.name, served_names) or _path_problem(entry.path)
        if wrong is None and entry.name in entries:
            wrong = "the name is in the module list twice"
        if wrong is None:
            entries[entry.name] = entry
        else:
            problems.append((entry, wrong))
    digest = hashlib.sha256(plain).hexdigest()
    return ReceivedList(generation, tuple(entries.values()), tuple(problems), digest), plain


def report_list(received: ReceivedList | None) -> dict[str, Any]:
    """The list for an operator that has lost it, as JSON; without those entries that can't be used."""
    entries = received.entries if received is not None else ()
    return {
        "generation": received.generation if received is not None else 0,
        "modules": [
            {
                "name": entry.name,
                "path": entry.path,
                "baseModelName": entry.base_model_name,
                "revision": entry.revision,
                "uid": entry.uid,
            }
            for entry in entries
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


def _entry(item: Any) -> ListedAdapter:
    values = item if isinstance(item, Mapping) else {}
    text = {key: value for key, value in values.items() if isinstance(value, str)}
    return ListedAdapter(
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


def read_list(path: Path, *, served_names: frozenset[str] = frozenset()) -> ReceivedList | None:
    """The list in a file; None when there is none that can be used."""
    try:
        with path.open("rb") as file:
            return parse_list(file.read(LIST_BYTES), served_names=served_names)[0]
    except (OSError, ValueError, ListProblem):
        return None


def newest_list(*paths: Path, served_names: frozenset[str] = frozenset()) -> ReceivedList | None:
    """The list with the highest generation; of equals the one of the path that comes first."""
    found = [one for path in paths if (one := read_list(path, served_names=served_names)) is not None]
    return max(found, key=lambda one: one.generation, default=None)
