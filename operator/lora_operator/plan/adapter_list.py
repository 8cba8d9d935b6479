"""The module list of a deployment: which adapters its engines serve, from which path, with which lineage.

The list is what pods are told and boot from. It only ever grows in generation, and an adapter about which nothing is known
yet keeps the entry that it has: unknown is not empty.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Final, assert_never

from lora_operator.wire.plugin import MAX_GENERATION

LIST_VERSION: Final = 1
MAX_LIST_BYTES: Final = 32 * 2**20  # unpacked; 5,000 adapters take 2 MB


@dataclass(frozen=True, order=True)
class Module:
    """One adapter as engines are told of it."""

    name: str
    path: str
    base_model_name: str
    revision: str
    adapter: str  # <namespace>/<name> of the LoRAAdapter
    uid: str  # of the LoRAAdapter
    lazy: bool = False  # loaded on the first request
    preload: int = 0  # so many pods load it in advance, the others lazily; 0: `lazy` says it for all


@dataclass(frozen=True)
class ModuleList:
    """All adapters of a deployment, sorted by name, at a generation; or what of it one pod is told."""

    deployment: str  # <namespace>/<name>
    generation: int
    modules: tuple[Module, ...]
    # Served name → the list since which it stands for its present content without a break; of a name that is missing here, this list.
    since: Mapping[str, int] = field(default_factory=dict, compare=False)

    def by_name(self) -> dict[str, Module]:
        """The entries by the names that clients ask for: a name stands once in a list."""
        return dict(self._by_name)

    def brought(self, module: Module) -> int | None:
        """The generation with which the adapter's name came to stand for this content; None while it doesn't by this list."""
        entry = self._by_name.get(module.name)
        if entry is None or entry.uid != module.uid or not same_content(entry, module):
            return None
        return self.since.get(module.name, self.generation)

    @cached_property
    def _by_name(self) -> dict[str, Module]:
        return {module.name: module for module in self.modules}

    @cached_property
    def encoded(self) -> bytes:
        """The list as engines' plugins read it."""
        return encode(self)

    @cached_property
    def packed(self) -> bytes:
        """The list as its ConfigMap holds it: reproducible gzip of what plugins read."""
        return gzip.compress(self.encoded, mtime=0)

    @cached_property
    def digest(self) -> str:
        """sha256 of the list as engines' plugins read it, by which a pod tells which one it holds."""
        return hashlib.sha256(self.encoded).hexdigest()


@dataclass(frozen=True)
class Serve:
    """The adapter has this entry."""

    module: Module


@dataclass(frozen=True)
class Keep:
    """The adapter's present entry stays as it is, if it has one: its content is not there yet, or can't be had."""

    except_path: str | None = None  # an entry at this path goes: the spec pins other content


@dataclass(frozen=True)
class Drop:
    """The adapter has no entry."""


@dataclass(frozen=True)
class Unknown:
    """Nothing could be decided: the adapter keeps its entry and its references."""

    failed: bool = False  # nor will it be soon, for the operator fails on the adapter: nobody waits for it


Entry = Serve | Keep | Drop | Unknown


@dataclass(frozen=True)
class ArtifactReference:
    """The ModelArtifacts that an adapter refers to, and the Secret that it lends to them."""

    artifact: tuple[str, str] | None = None  # namespace and name
    credentials: tuple[str, str, str, str] | None = None  # namespace, name, key, uid of the Secret
    refreshing: tuple[str, str] | None = None  # the one that takes the artifact's place once it is Ready

    def lent(self) -> dict[tuple[str, str], tuple[str, str, str, str] | None]:
        """All artifacts, with the credentials that are lent to each."""
        return {key: self.credentials for key in (self.artifact, self.refreshing) if key is not None}


@dataclass(frozen=True)
class Decision:
    """What an adapter's reconcile found, of the form of the adapter that it looked at."""

    uid: str
    generation: int
    entry: Entry
    reference: ArtifactReference = ArtifactReference()

    def module_in(self, present: Mapping[str, Module]) -> Module | None:
        """The entry that it leads to where the list has `present`, by UID; whether that is at an excepted path is not looked at."""
        match self.entry:
            case Serve(module):
                return module
            case Keep() | Unknown():
                return present.get(self.uid)
            case Drop():
                return None
            case _:
                assert_never(self.entry)

    @property
    def except_path(self) -> str | None:
        """The path at which the adapter may not stay."""
        return self.entry.except_path if isinstance(self.entry, Keep) else None


def plan_list(
    previous: ModuleList | None,
    decisions: Iterable[Decision],
    *,
    deployment: str,
    above: int = 0,
    all_eager: bool = False,
) -> ModuleList:
    """The list that `decisions` lead to; the previous one itself when nothing changed.

    `above` is the highest generation that any pod holds: a new list's generation is always higher, also when the
    ConfigMap with the previous one was lost. A kept entry gives way where its name is another adapter's by now: its own
    adapter asks for another name since. `all_eager`: the engines load nothing while requests run (updateStrategy Rollout), so
    nothing is left for a first request.
    """
    present = {module.uid: module for module in previous.modules} if previous else {}
    wanted: dict[str, Module] = {}
    for decision in sorted(decisions, key=lambda decision: isinstance(decision.entry, Keep | Unknown)):
        module = decision.module_in(present)
        if module is not None and module.path != decision.except_path:
            wanted.setdefault(module.name, replace(module, lazy=False, preload=0) if all_eager else module)
    modules = tuple(sorted(wanted.values()))
    if previous is not None and previous.modules == modules and previous.generation >= above:
        return previous
    generation = max(previous.generation if previous else 0, above) + 1
    since = {module.name: generation for module in modules}
    if previous is not None and previous.generation >= above:  # else pods may hold a list that nobody here knows
        entries = previous.by_name()
        stayed = [one.name for one in modules if one.name in entries and same_content(entries[one.name], one)]
        since |= {name: previous.since.get(name, previous.generation) for name in stayed}
    return ModuleList(deployment=deployment, generation=generation, modules=modules, since=since)


def names_passed_on(previous: ModuleList | None, updated: ModuleList) -> list[tuple[str, str]]:
    """Adapters that came to a name whose content pods have all the while: no pod will tell any news of it."""
    entries = previous.by_name() if previous is not None else {}
    return [
        (namespace, name)
        for module in updated.modules
        if (old := entries.get(module.name)) is not None and old.uid != module.uid and same_content(old, module)
        for namespace, _, name in [module.adapter.partition("/")]
    ]


def same_content(one: Module, other: Module) -> bool:
    """Whether engines answer both entries alike: what else they say is for the operator."""
    return (one.name, one.path, one.base_model_name) == (other.name, other.path, other.base_model_name)


def encode(modules: ModuleList) -> bytes:
    """The list as engines' plugins read it: canonical JSON."""
    body: dict[str, Any] = {
        "version": LIST_VERSION,
        "deployment": modules.deployment,
        "generation": modules.generation,
        "modules": [_entry(module) for module in modules.modules],
    }
    return _dump(body)


def encode_module(module: Module) -> bytes:
    """One entry as it stands in the list."""
    return _dump(_entry(module))


def _entry(module: Module) -> dict[str, Any]:
    return {
        "name": module.name,
        "path": module.path,
        "baseModelName": module.base_model_name,
        "revision": module.revision,
        "adapter": module.adapter,
        "uid": module.uid,
        # Who is to preload is told pod by pod; a pod that nobody has told anything yet begins without.
        **({"loadPolicy": "Lazy"} if module.lazy or module.preload else {}),
        **({"preload": module.preload} if module.preload else {}),
    }


def _dump(body: dict[str, Any]) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()


def encode_for_config_map(modules: ModuleList) -> str:
    """The list as a ConfigMap's binaryData holds it, in base64."""
    return base64.b64encode(modules.packed).decode()


def decode_from_config_map(data: str) -> ModuleList | None:
    """The list in a ConfigMap's binaryData; None where it is not one (a user's edit, say)."""
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(base64.b64decode(data, validate=True))) as packed:
            text = packed.read(MAX_LIST_BYTES + 1)
        if len(text) > MAX_LIST_BYTES:
            return None
        body = json.loads(text)
        modules = tuple(
            Module(
                name=str(item["name"]),
                path=str(item["path"]),
                base_model_name=str(item["baseModelName"]),
                revision=str(item["revision"]),
                adapter=str(item["adapter"]),
                uid=str(item["uid"]),
                lazy=item.get("loadPolicy") == "Lazy" and not item.get("preload"),
                preload=int(item.get("preload", 0)),
            )
            for item in body["modules"]
        )
        generation = int(body["generation"])
        if not 0 <= generation < MAX_GENERATION:
            return None
        return ModuleList(deployment=str(body["deployment"]), generation=generation, modules=modules)
    except (ValueError, KeyError, TypeError, OSError, EOFError, OverflowError, RecursionError, zlib.error):
        return None
