"""What the API server last said: one in-memory copy of every object that the operator works with, indexed for 5,000 adapters.

Both kopf's watches and our own lists write here, in any order; resource versions decide which word is the newer. Objects of our
own kinds are parsed once, here. An object that does not fit its model is in `invalid`, not gone: it may still be wanted.
The store must never do I/O, and must never let an old word bring back what is gone.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, Generic, NamedTuple, TypeVar

from pydantic import ValidationError

from lora_operator.api import LoRAAdapter, ModelArtifact, ModelCache, VLLMDeployment
from lora_operator.conditions import find
from lora_operator.constants import LABEL_ARTIFACT, LABEL_DEPLOYMENT, Condition
from lora_operator.kube.kinds import Kind
from lora_operator.kube.objects import KubeObject, Namespace, mapping, text_of
from lora_operator.kube.pods import Pod
from lora_operator.kube.workloads import Job, Workload
from lora_operator.names import label_value
from lora_operator.reconcile.bodies import MAX_NESTING, describe_invalid, is_too_deep, slim

MAX_TOMBSTONES: Final = 20_000

ObjectKey = tuple[str, str]  # (namespace, name); the namespace is "" for what has none
Body = dict[str, Any]
GroupT = TypeVar("GroupT", bound=Hashable)


class Key(NamedTuple):
    """Names one object, in the store and on the work queue."""

    kind: Kind
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind.value} {self.namespace}/{self.name}" if self.namespace else f"{self.kind.value} {self.name}"


@dataclass(frozen=True)
class Change:
    """What a write changed: `old` and `new` are a model for our own kinds, else a view; None when absent or invalid.

    `was_invalid`: the object was there before and could not be read, so nobody knows what it asked for.
    """

    kind: Kind
    key: Key
    old: Any | None
    new: Any | None
    was_invalid: bool = False


class _Version(NamedTuple):
    uid: str
    number: int


def _version_number(text: Any) -> int:
    """A resourceVersion as a number: the API server's are decimal and grow (KEP-5504 makes that official); 0 when absent."""
    return int(text) if isinstance(text, str) and text.isdecimal() else 0


class Index(Generic[GroupT]):
    """Maps a group to the keys in it, so that a relation costs what it yields and not the size of the store; a key is in at most one."""

    def __init__(self) -> None:
        self._keys: dict[GroupT, set[tuple[str, str]]] = {}
        self._group: dict[tuple[str, str], GroupT] = {}

    def assign(self, key: tuple[str, str], group: GroupT | None) -> None:
        """Puts the key into the group, and out of the one it was in; None: into none."""
        old = self._group.get(key)
        if old == group:
            return
        if old is not None:
            members = self._keys[old]
            members.discard(key)
            if not members:
                del self._keys[old]
            del self._group[key]
        if group is not None:
            self._keys.setdefault(group, set()).add(key)
            self._group[key] = group

    def keys_of(self, group: GroupT) -> list[tuple[str, str]]:
        """Keys in the group, sorted."""
        return sorted(self._keys.get(group, ()))


class Store:
    """Latest known objects. All methods are for one event loop; none of them awaits, but `wait_synced`."""

    def __init__(self) -> None:
        self._objects: dict[Kind, dict[ObjectKey, Any]] = {kind: {} for kind in Kind}
        self._versions: dict[Key, _Version] = {}
        self._gone: OrderedDict[str, int] = OrderedDict()  # uid → resourceVersion at which it went
        self._invalid: dict[Key, str] = {}
        self._concerned: dict[Key, frozenset[str] | None] = {}  # by what can't be read: namespaces; None: any
        self._synced: set[Kind] = set()
        self._all_synced = asyncio.Event()
        self._adapters_by_deployment: Index[ObjectKey] = Index()
        self._adapters_by_name: Index[tuple[ObjectKey, str]] = Index()
        self._adapters_by_artifact: Index[ObjectKey] = Index()
        self._artifacts_by_cache: Index[ObjectKey] = Index()
        self._pods_by_deployment: Index[ObjectKey] = Index()
        self._pods_by_artifact: Index[ObjectKey] = Index()
        self._jobs_by_artifact: Index[ObjectKey] = Index()
        self.adapters: Mapping[ObjectKey, LoRAAdapter] = MappingProxyType(self._objects[Kind.LORA_ADAPTER])
        self.deployments: Mapping[ObjectKey, VLLMDeployment] = MappingProxyType(self._objects[Kind.VLLM_DEPLOYMENT])
        self.caches: Mapping[ObjectKey, ModelCache] = MappingProxyType(self._objects[Kind.MODEL_CACHE])
        self.artifacts: Mapping[ObjectKey, ModelArtifact] = MappingProxyType(self._objects[Kind.MODEL_ARTIFACT])
        self.jobs: Mapping[ObjectKey, Job] = MappingProxyType(self._objects[Kind.JOB])
        self.pods: Mapping[ObjectKey, Pod] = MappingProxyType(self._objects[Kind.POD])
        self.workloads: Mapping[ObjectKey, Workload] = MappingProxyType(self._objects[Kind.DEPLOYMENT])
        self.namespaces: Mapping[ObjectKey, Namespace] = MappingProxyType(self._objects[Kind.NAMESPACE])
        self.config_maps: Mapping[ObjectKey, KubeObject] = MappingProxyType(self._objects[Kind.CONFIG_MAP])
        self.services: Mapping[ObjectKey, KubeObject] = MappingProxyType(self._objects[Kind.SERVICE])
        self.invalid: Mapping[Key, str] = MappingProxyType(self._invalid)

    # Reading by relation

    def adapters_of(self, deployment: ObjectKey) -> list[LoRAAdapter]:
        """Adapters that name the VLLMDeployment, whether it admits them or not; by (namespace, name).

        One that is being deleted is none of them, though somebody's finalizer may keep the object for a while.
        """
        return [self.adapters[key] for key in self._adapters_by_deployment.keys_of(deployment)]

    def is_told(self, artifact: ObjectKey) -> bool:
        """Whether a status still says of the artifact that it is in use, whatever is wanted by now."""
        beside = (one for one in self.deployments.values() if one.metadata.namespace == artifact[0])
        return bool(self._adapters_by_artifact.keys_of(artifact)) or any(
            artifact in reported_artifacts(x) for x in beside
        )

    def adapters_named(self, deployment: ObjectKey, served_name: str) -> list[LoRAAdapter]:
        """Adapters that ask the VLLMDeployment for the same served name; by (namespace, name)."""
        return [self.adapters[key] for key in self._adapters_by_name.keys_of((deployment, served_name))]

    def artifacts_of(self, cache: ObjectKey) -> list[ModelArtifact]:
        """Artifacts in the ModelCache; by name."""
        return [self.artifacts[key] for key in self._artifacts_by_cache.keys_of(cache)]

    def pods_of_deployment(self, deployment: ObjectKey) -> list[Pod]:
        """Pods labelled as the VLLMDeployment's; by name. Labels can be set by anybody: check the owners too."""
        group = (deployment[0], label_value(deployment[1]))
        return [self.pods[key] for key in self._pods_by_deployment.keys_of(group)]

    def pods_of_artifact(self, artifact: ObjectKey) -> list[Pod]:
        """Pods labelled as the ModelArtifact's download Jobs'; by name."""
        group = (artifact[0], label_value(artifact[1]))
        return [self.pods[key] for key in self._pods_by_artifact.keys_of(group)]

    def jobs_of_artifact(self, artifact: ObjectKey) -> list[Job]:
        """Jobs labelled as the ModelArtifact's; by name."""
        group = (artifact[0], label_value(artifact[1]))
        return [self.jobs[key] for key in self._jobs_by_artifact.keys_of(group)]

    def keys(self, kind: Kind) -> list[Key]:
        """Keys of all objects of the kind, those that don't fit their model too."""
        valid = [Key(kind, *key) for key in self._objects[kind]]
        return valid + [key for key in self._invalid if key.kind is kind]

    def invalid_in(self, namespace: str) -> Iterator[Key]:
        """Objects that can't be read and could have a say in what a namespace's content is for."""
        for key in self._invalid:
            concerned = self._concerned.get(key)
            if concerned is None or namespace in concerned:
                yield key

    def has_condition(self, key: Key, type_: Condition) -> bool:
        """Whether the status of an object of our own kinds has a condition of that type."""
        known = self._objects[key.kind].get((key.namespace, key.name))
        return known is not None and find(known.status.conditions, type_) is not None

    # Writing

    def upsert(self, kind: Kind, body: Mapping[str, Any]) -> Change | None:
        """Takes a word on an object; None when it is no news: the same or older than what is known, or of what is gone.

        Of the body only what is read is kept, as a model or a view (kube.objects); models share its parts.
        """
        metadata = mapping(body.get("metadata"))
        key = Key(kind, *_place(metadata))
        version = _Version(text_of(metadata.get("uid")), _version_number(metadata.get("resourceVersion")))
        known = self._versions.get(key)
        newer_than = max(known.number if known is not None else 0, self._gone.get(version.uid, 0))
        if version.number and version.number <= newer_than:
            return None
        self._versions[key] = version
        was_invalid = key in self._invalid
        return self._put(key, self._parse(key, body), was_invalid)

    def remove(
        self, kind: Kind, namespace: str | None, name: str, uid: str | None = None, resource_version: str = ""
    ) -> Change | None:
        """Takes the word that an object is gone; None when it is no news, or when another one of that name is known by now.

        `resource_version` is the one of the deletion; the word is older than a stored object with a newer one.
        """
        key = Key(kind, namespace or "", name)
        known = self._versions.get(key)
        number = _version_number(resource_version)
        if uid:
            self._bury(uid, max(number, known.number if known is not None and known.uid == uid else 0))
        if known is None or (uid and known.uid != uid) or (number and number < known.number):
            return None
        self._bury(known.uid, max(number, known.number))
        return self._drop(key)

    def take_listed(self, kind: Kind, item: Mapping[str, Any], present: set[ObjectKey]) -> Change | None:
        """Takes one object of a list that comes page by page, and notes in `present` that the list has it."""
        present.add(_place(mapping(item.get("metadata"))))
        return self.upsert(kind, item)

    def retain(self, kind: Kind, present: Collection[ObjectKey], list_resource_version: str) -> list[Change]:
        """The end of a complete list: known objects that it lacks are gone, unless they are newer than the list."""
        changes: list[Change] = []
        number = _version_number(list_resource_version)
        for key in self.keys(kind):
            known = self._versions[key]
            if (key.namespace, key.name) not in present and known.number <= number:
                self._bury(known.uid, number)
                changes.append(self._drop(key))
        return changes

    # The barrier: nothing destructive before every kind was listed

    def mark_synced(self, kind: Kind) -> None:
        """Notes that the kind was listed completely at least once."""
        self._synced.add(kind)
        if self.all_synced:
            self._all_synced.set()

    def is_synced(self, kind: Kind) -> bool:
        """Whether the kind was listed completely at least once."""
        return kind in self._synced

    @property
    def all_synced(self) -> bool:
        """Whether every kind was listed completely at least once."""
        return len(self._synced) == len(Kind)

    async def wait_synced(self) -> None:
        """Returns once every kind was listed completely."""
        await self._all_synced.wait()

    # Inside

    def _parse(self, key: Key, body: Mapping[str, Any]) -> Any | None:
        self._invalid.pop(key, None)
        self._concerned.pop(key, None)
        model = key.kind.info.model
        if model is None:
            return key.kind.info.view.parse(body)
        kept = slim(body)
        try:
            if not is_too_deep(kept):
                return model.model_validate(kept)
            problem = f"something in it nests deeper than {MAX_NESTING} levels: make it flatter"
        except ValidationError as error:
            problem = describe_invalid(error)
        self._invalid[key] = problem
        self._concerned[key] = _concerned(key, kept)
        return None

    def _put(self, key: Key, new: Any | None, was_invalid: bool) -> Change:
        objects, place = self._objects[key.kind], (key.namespace, key.name)
        old = objects.pop(place, None) if new is None else objects.get(place)
        if new is not None:
            objects[place] = new
        self._index(key.kind, place, new)
        return Change(key.kind, key, old, new, was_invalid)

    def _drop(self, key: Key) -> Change:
        self._versions.pop(key, None)
        self._concerned.pop(key, None)
        return self._put(key, None, self._invalid.pop(key, None) is not None)

    def _bury(self, uid: str, number: int) -> None:
        if not uid:
            return
        self._gone[uid] = max(number, self._gone.pop(uid, 0))
        while len(self._gone) > MAX_TOMBSTONES:
            self._gone.popitem(last=False)

    def _index(self, kind: Kind, place: ObjectKey, new: Any | None) -> None:
        if kind is Kind.LORA_ADAPTER:
            live = new if new is not None and new.metadata.deletion_timestamp is None else None
            self._adapters_by_deployment.assign(place, live.deployment_key if live else None)
            self._adapters_by_name.assign(place, (live.deployment_key, live.served_name) if live else None)
            self._adapters_by_artifact.assign(place, next(iter(reported_artifacts(live)), None))
        elif kind is Kind.MODEL_ARTIFACT:
            cache = None if new is None else (place[0], new.spec.cache_ref.name)
            self._artifacts_by_cache.assign(place, cache)
        elif kind is Kind.POD:
            self._pods_by_deployment.assign(place, _labelled(place, new, LABEL_DEPLOYMENT))
            self._pods_by_artifact.assign(place, _labelled(place, new, LABEL_ARTIFACT))
        elif kind is Kind.JOB:
            self._jobs_by_artifact.assign(place, _labelled(place, new, LABEL_ARTIFACT))


def reported_artifacts(obj: LoRAAdapter | VLLMDeployment | None) -> set[ObjectKey]:
    """The artifacts that are in use by what an object's status says."""
    if isinstance(obj, LoRAAdapter):
        ref = obj.status.artifact_ref
        return set() if ref is None else {(ref.namespace, ref.name)}
    if obj is None:
        return set()
    status = obj.status
    names = (status.model_artifact, status.tokenizer_artifact, status.draft_model_artifact)
    return {(obj.metadata.namespace, name) for name in names if name is not None}


def _concerned(key: Key, body: Body) -> frozenset[str] | None:
    """The namespaces in which an object that can't be read could want content: its own, or for an adapter where its deployment
    and its artifact are; None where even that can't be read."""
    if key.kind is not Kind.LORA_ADAPTER:
        return frozenset((key.namespace,))
    spec, status = body.get("spec"), body.get("status") or {}
    wanted = spec.get("vllmDeploymentRef") if isinstance(spec, dict) else None
    had = status.get("artifactRef") or {} if isinstance(status, dict) else None
    if not isinstance(wanted, dict) or not isinstance(wanted.get("name"), str) or not isinstance(had, dict):
        return None
    found = [ref.get("namespace") or key.namespace for ref in (wanted, had)]
    if not all(isinstance(namespace, str) for namespace in found):
        return None
    return frozenset(found)


def _place(metadata: Mapping[str, Any]) -> ObjectKey:
    return (text_of(metadata.get("namespace")), text_of(metadata.get("name")))


def _labelled(place: ObjectKey, view: KubeObject | None, label: str) -> ObjectKey | None:
    value = view.labels.get(label) if view is not None else None
    return None if value is None else (place[0], value)
