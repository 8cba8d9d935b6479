"""What reconcilers have found and report to one another, in memory: one record per object, which is forgotten with the object.

All of it is found again after a restart; until then it is unknown, and nothing destructive follows from what is unknown.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TypeVar

from lora_operator.api.cache import VolumeFigures
from lora_operator.constants import Reason
from lora_operator.kube.kinds import Kind
from lora_operator.plan.adapter_list import ArtifactReference, Decision, Module, ModuleList, Unknown
from lora_operator.plan.deployment_pods import PodView
from lora_operator.plan.rollout import Unrolled
from lora_operator.plan.wants import Credentials
from lora_operator.reconcile.store import Key, ObjectKey, Store
from lora_operator.reconcile.turns import Turns
from lora_operator.wire.plugin import HeldList


@dataclass(frozen=True)
class ModelWant:
    """The artifacts that a deployment wants; None for the base model's while its cache or credentials don't allow one."""

    uid: str
    generation: int
    artifact: ObjectKey | None
    credentials: Credentials | None
    auxiliary: tuple[tuple[ObjectKey, Credentials | None], ...] = ()  # of the tokenizer and draft model
    refreshing: tuple[
        tuple[ObjectKey, Credentials | None], ...
    ] = ()  # those that take their places once they are Ready

    def lent(self) -> dict[ObjectKey, Credentials | None]:
        """All wanted artifacts, with the credentials that are lent to each."""
        base = {} if self.artifact is None else {self.artifact: self.credentials}
        return base | dict(self.auxiliary) | dict(self.refreshing)


@dataclass(frozen=True)
class Announced:
    """What an artifact's wanters were last told of, and when adapters were, by the monotonic clock."""

    news: object
    adapters: str | None  # the message that adapters were woken for
    others: str | None
    time: float


RecordT = TypeVar("RecordT")
Warnings = dict[str, tuple[float, str | None]]
"""UID of a silent pod or Job → when its Events were asked for (monotonic), and the newest warning."""


@dataclass
class OwnRecord:
    """What is kept of an object of any of our own kinds."""

    held_back_since: float | None = None
    """Since when (monotonic) a new status waits to be written, as it may be over in a moment; None: none waits."""
    warnings: Warnings = field(default_factory=dict)  # about its pods and Jobs


@dataclass
class AdapterRecord(OwnRecord):
    """Of a LoRAAdapter."""

    decision: Decision | None = None  # the last one


@dataclass
class DeploymentRecord(OwnRecord):
    """Of a VLLMDeployment, with the objects that it owns but pods."""

    want: ModelWant | None = None  # the artifacts of its model, as last found
    modules: ModuleList | None = None  # the list that its pods are given; None: not known yet
    stored: tuple[str, ModuleList | None] | None = None  # its list's ConfigMap as last read: version, and the list
    held: int = 0  # the highest list generation that any of its pods reported
    plugins_looked_at: tuple[frozenset[str], float] = (frozenset(), 0.0)  # old plugins, and when that was (monotonic)
    readiness: object = None  # of its pods, as its adapters were last woken for
    unrolled: Unrolled | None = None  # a list that its pods' arguments don't hold yet
    left_out: Mapping[str, Reason] = field(default_factory=dict)  # UIDs of adapters that the list has no room for
    crowd: tuple[tuple[Module, ...], frozenset[str]] | None = None
    """Of a list without room for all: all, and the UIDs of those that gave way."""
    replica_sets: dict[str, str | None] = field(default_factory=dict)
    """UID of a ReplicaSet of pods that exist → UID of its Deployment; None where it has none."""
    children: dict[tuple[str, str], tuple[str, str]] = field(default_factory=dict)
    """(kind, name) of an applied object → digest of what was applied ("" where it was only seen), and its version since."""
    secrets: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Name of a Secret → when it was made or found last, and when it is to be looked for again (monotonic)."""
    budget: tuple[str, float] | None = None  # the form of its disruption budget, and until when that holds (monotonic)


@dataclass
class CacheRecord(OwnRecord):
    """Of a ModelCache."""

    volume: VolumeFigures | None = None  # as a Job reported that ended since this operator started
    contents: dict[ObjectKey, str] = field(default_factory=dict)  # its artifacts' views at the last look


@dataclass
class ArtifactRecord(OwnRecord):
    """Of a ModelArtifact; who wants it is kept with them, as it may be wanted before it is there and after it is gone."""

    announced: Announced | None = None


@dataclass
class PodRecord:
    """Of a pod that is a deployment's own."""

    view: PodView | None = None  # its engine, as last seen
    listed: object = None  # what the engine listed when all of it was last looked at
    asked: bool = False  # whether anything is known of its engine since this operator started
    silent: bool = False  # whether its engine did not listen when it was last tried: it starts
    misses: int = 0  # looks at its engine in a row that failed
    held_list: HeldList | None = None  # where it was asked for its list, as nothing else has it


class Table(defaultdict[ObjectKey, RecordT]):
    """The records of one kind. `table[key]` makes a record; what must not make one of an object that may be gone uses `peek`.

    A record that is changed after an await is taken from the table before it: where it was forgotten meanwhile, it stays so.
    """

    def __init__(self, record: Callable[[], RecordT]) -> None:
        super().__init__(record)
        self._empty = record

    def peek(self, key: ObjectKey) -> RecordT:
        """The record, only to be read: one that says nothing where there is none."""
        found = self.get(key)
        return self._empty() if found is None else found


class Records:
    """All records. Methods return what has to be looked at again where that follows from the change alone."""

    def __init__(self) -> None:
        self.adapters = Table(AdapterRecord)
        self.deployments = Table(DeploymentRecord)
        self.caches = Table(CacheRecord)
        self.artifacts = Table(ArtifactRecord)
        self.pods = Table(PodRecord)
        self.turns = Turns()
        self.evicting: set[ObjectKey] = set()  # claims for which an eviction's Job is being made
        self._wanters: dict[ObjectKey, dict[Key, Credentials | None]] = {}  # by artifact; follows decisions and wants
        self._making: Counter[ObjectKey] = Counter()

    def own(self, key: Key) -> OwnRecord:
        """The record of an object of our own kinds."""
        tables: dict[Kind, Table[AdapterRecord] | Table[DeploymentRecord] | Table[CacheRecord] | Table[ArtifactRecord]]
        tables = {
            Kind.LORA_ADAPTER: self.adapters,
            Kind.VLLM_DEPLOYMENT: self.deployments,
            Kind.MODEL_CACHE: self.caches,
            Kind.MODEL_ARTIFACT: self.artifacts,
        }
        return tables[key.kind][key.namespace, key.name]

    def decision(self, adapter: ObjectKey) -> Decision | None:
        """What was last decided on an adapter."""
        return self.adapters.peek(adapter).decision

    def model_want(self, deployment: ObjectKey) -> ModelWant | None:
        """What a deployment was last found to want."""
        return self.deployments.peek(deployment).want

    def publish_decision(self, adapter: ObjectKey, decision: Decision) -> set[ObjectKey] | None:
        """Record a decision. Returns the artifacts whose wanters changed; None when it says nothing new.

        An adapter of which too little is known goes on wanting what it wanted.
        """
        old = self.adapters.peek(adapter).decision
        if isinstance(decision.entry, Unknown) and old is not None and old.uid == decision.uid:
            reference = replace(old.reference, artifact=old.reference.artifact or decision.reference.artifact)
            decision = replace(decision, reference=reference)
        if old == decision:
            return None
        self.adapters[adapter].decision = decision
        return self._rewire(Key(Kind.LORA_ADAPTER, *adapter), old.reference if old else None, decision.reference)

    def forget_adapter(self, adapter: ObjectKey) -> set[ObjectKey]:
        """Forget an adapter that is gone. Returns the artifacts whose wanters changed."""
        old = self.adapters.peek(adapter).decision
        self.adapters.pop(adapter, None)
        return self._rewire(Key(Kind.LORA_ADAPTER, *adapter), old.reference if old else None, None)

    def publish_model_want(self, deployment: ObjectKey, want: ModelWant) -> set[ObjectKey] | None:
        """Record a deployment's want. Returns the artifacts whose wanters changed; None when it says nothing new."""
        old = self.deployments.peek(deployment).want
        if old == want:
            return None
        self.deployments[deployment].want = want
        return self._rewire(Key(Kind.VLLM_DEPLOYMENT, *deployment), old, want)

    def forget_deployment(self, deployment: ObjectKey) -> set[ObjectKey]:
        """Forget a deployment that is gone. Returns the artifacts whose wanters changed."""
        old = self.deployments.peek(deployment).want
        self.deployments.pop(deployment, None)
        return self._rewire(Key(Kind.VLLM_DEPLOYMENT, *deployment), old, None)

    @contextmanager
    def making(self, artifact: ObjectKey | None) -> Iterator[None]:
        """Around the making of an artifact for a decision that is published once it is there: it is not unwanted meanwhile."""
        if artifact is not None:
            self._making[artifact] += 1
        try:
            yield
        finally:
            if artifact is not None:
                self._making[artifact] -= 1
                self._making += Counter()  # forgets those with none

    def is_made_for(self, artifact: ObjectKey) -> bool:
        """Whether somebody is about to say that it is wanted."""
        return artifact in self._making

    def wanters(self, artifact: ObjectKey) -> dict[Key, Credentials | None]:
        """Who wants an artifact, with the credentials that each lends to it."""
        return self._wanters.get(artifact, {})

    def undecided(self, store: Store, namespace: str) -> Key | None:
        """Somebody who could want an artifact of the namespace and was not looked at in the present form; None: there is nobody.

        Artifacts lie beside their deployment, so others can't; one that can't be read could. One on which the operator fails
        wants what its status says is in use: else one object would hold up all others for ever.
        """
        wanters = (Kind.LORA_ADAPTER, Kind.VLLM_DEPLOYMENT)
        unreadable = (key for key in store.invalid_in(namespace) if key.kind in wanters)
        if (first := next(unreadable, None)) is not None:
            return first
        for deployment in store.deployments.values():
            if deployment.metadata.namespace != namespace:
                continue
            want = self.model_want(deployment.key)
            if want is None or (want.uid, want.generation) != (deployment.metadata.uid, deployment.metadata.generation):
                return Key(Kind.VLLM_DEPLOYMENT, *deployment.key)
            for adapter in store.adapters_of(deployment.key):
                decision = self.decision(adapter.key)
                form = (adapter.metadata.uid, adapter.metadata.generation)
                if decision is None or (isinstance(decision.entry, Unknown) and not decision.entry.failed):
                    return Key(Kind.LORA_ADAPTER, *adapter.key)
                if (decision.uid, decision.generation) != form:
                    return Key(Kind.LORA_ADAPTER, *adapter.key)
        return None

    def all_decided(self, store: Store, namespace: str) -> bool:
        """Whether everybody who could want an artifact of the namespace was looked at in the present form."""
        return self.undecided(store, namespace) is None

    def _rewire(
        self, wanter: Key, old: ArtifactReference | ModelWant | None, new: ArtifactReference | ModelWant | None
    ) -> set[ObjectKey]:
        before, after = (want.lent() if want else {} for want in (old, new))
        for artifact in before.keys() - after.keys():
            present = self._wanters.get(artifact, {})
            present.pop(wanter, None)
            if not present:
                self._wanters.pop(artifact, None)
        for artifact, credentials in after.items():
            self._wanters.setdefault(artifact, {})[wanter] = credentials
        return {*before, *after}
