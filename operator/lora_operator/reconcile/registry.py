"""What reconcilers have found and tell one another, in memory: decisions on adapters, wants of deployments, looks at engines.

All of it is found again after a restart; until then it is unknown, and nothing destructive follows from what is unknown.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

from lora_operator.api.cache import VolumeFigures
from lora_operator.constants import Reason
from lora_operator.kube.kinds import Kind
from lora_operator.plan.adapter_list import Decision, Module, ModuleList
from lora_operator.plan.fleet import PodView
from lora_operator.plan.rollout import Unrolled
from lora_operator.plan.wants import Credentials
from lora_operator.reconcile.store import Key, ObjectKey, Store
from lora_operator.reconcile.turns import Turns
from lora_operator.vllm import HeldList


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


class Registry:
    """The shared findings. Methods return what has to be looked at again where that follows from the change alone."""

    def __init__(self) -> None:
        self._decisions: dict[ObjectKey, Decision] = {}
        self._model_wants: dict[ObjectKey, ModelWant] = {}
        self._wanters: dict[ObjectKey, dict[Key, Credentials | None]] = {}
        self.lists: dict[ObjectKey, ModuleList] = {}
        self.stored: dict[
            ObjectKey, tuple[str, ModuleList | None]
        ] = {}  # of ConfigMaps: version, and list, as last read
        self.held: dict[ObjectKey, int] = {}  # the highest list generation that any pod of a deployment reported
        self.held_lists: dict[ObjectKey, HeldList] = {}  # of pods that were asked because nothing else told their list
        self.views: dict[ObjectKey, PodView] = {}
        self.listed: dict[ObjectKey, object] = {}  # what a pod's engine listed when all of it was last looked at
        self.asked: set[ObjectKey] = set()  # pods about whose engine something is known since this operator started
        self.misses: dict[ObjectKey, int] = {}  # looks at a pod's engine in a row that failed
        self.silent: set[ObjectKey] = set()  # pods whose engine did not listen when it was last tried: it starts
        self.replica_set_owners: dict[str, str | None] = {}  # ReplicaSet UID → its Deployment's UID
        self.turns = Turns()
        self.evicting: set[ObjectKey] = set()  # claims for which an eviction's Job is being made
        self.contents: dict[ObjectKey, dict[ObjectKey, str]] = {}  # of caches: artifacts' views at the last look
        self.volumes: dict[
            ObjectKey, VolumeFigures
        ] = {}  # of caches, as Jobs told that ended since this operator started
        self.announced: dict[ObjectKey, Announced] = {}  # by artifact
        self.kits_looked_at: dict[
            ObjectKey, tuple[frozenset[str], float]
        ] = {}  # old kits, and when they were looked at
        self.unrolled: dict[ObjectKey, Unrolled] = {}  # lists of deployments whose pods' arguments don't hold them yet
        self.left_out: dict[ObjectKey, Mapping[str, Reason]] = {}  # adapters that there is no room for, by UID
        self.crowds: dict[
            ObjectKey, tuple[tuple[Module, ...], frozenset[str]]
        ] = {}  # of lists without room for all: all, and the UIDs of those that gave way
        self.warnings: dict[
            str, tuple[float, str | None]
        ] = {}  # an object's UID → when its Events were asked, and what they said
        self._making: Counter[ObjectKey] = Counter()
        self.readiness: dict[ObjectKey, object] = {}  # of a deployment's pods, as its adapters were last told of it

    def decision(self, adapter: ObjectKey) -> Decision | None:
        """What was last decided on an adapter."""
        return self._decisions.get(adapter)

    def model_want(self, deployment: ObjectKey) -> ModelWant | None:
        """What a deployment was last found to want."""
        return self._model_wants.get(deployment)

    def publish_decision(self, adapter: ObjectKey, decision: Decision) -> set[ObjectKey] | None:
        """Record a decision. Returns the artifacts whose wanters changed; None when it says nothing new.

        An adapter of which too little is known goes on wanting what it wanted.
        """
        old = self._decisions.get(adapter)
        if decision.keep_unknown and old is not None and old.uid == decision.uid:
            artifact = old.artifact or decision.artifact
            decision = replace(decision, artifact=artifact, credentials=old.credentials, refreshing=old.refreshing)
        if old == decision:
            return None
        self._decisions[adapter] = decision
        return self._rewire(Key(Kind.LORA_ADAPTER, *adapter), old, decision)

    def withdraw_decision(self, adapter: ObjectKey) -> set[ObjectKey]:
        """Forget an adapter that is gone. Returns the artifacts whose wanters changed."""
        old = self._decisions.pop(adapter, None)
        return self._rewire(Key(Kind.LORA_ADAPTER, *adapter), old, None)

    def publish_model_want(self, deployment: ObjectKey, want: ModelWant) -> set[ObjectKey] | None:
        """Record a deployment's want. Returns the artifacts whose wanters changed; None when it says nothing new."""
        old = self._model_wants.get(deployment)
        if old == want:
            return None
        self._model_wants[deployment] = want
        return self._rewire(Key(Kind.VLLM_DEPLOYMENT, *deployment), old, want)

    def withdraw_deployment(self, deployment: ObjectKey) -> set[ObjectKey]:
        """Forget a deployment that is gone. Returns the artifacts whose wanters changed."""
        self.lists.pop(deployment, None)
        self.stored.pop(deployment, None)
        self.held.pop(deployment, None)
        self.kits_looked_at.pop(deployment, None)
        self.readiness.pop(deployment, None)
        self.unrolled.pop(deployment, None)
        self.left_out.pop(deployment, None)
        self.crowds.pop(deployment, None)
        old = self._model_wants.pop(deployment, None)
        return self._rewire(Key(Kind.VLLM_DEPLOYMENT, *deployment), old, None)

    def forget_pod(self, pod: ObjectKey) -> None:
        """Forget a pod that is gone, or is not a deployment's own."""
        self.asked.discard(pod)
        self.silent.discard(pod)
        for known in (self.views, self.listed, self.misses, self.held_lists):
            known.pop(pod, None)

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
            want = self._model_wants.get(deployment.key)
            if want is None or (want.uid, want.generation) != (deployment.metadata.uid, deployment.metadata.generation):
                return Key(Kind.VLLM_DEPLOYMENT, *deployment.key)
            for adapter in store.adapters_of(deployment.key):
                decision = self._decisions.get(adapter.key)
                form = (adapter.metadata.uid, adapter.metadata.generation)
                if decision is None or (decision.keep_unknown and not decision.failed):
                    return Key(Kind.LORA_ADAPTER, *adapter.key)
                if (decision.uid, decision.generation) != form:
                    return Key(Kind.LORA_ADAPTER, *adapter.key)
        return None

    def all_decided(self, store: Store, namespace: str) -> bool:
        """Whether everybody who could want an artifact of the namespace was looked at in the present form."""
        return self.undecided(store, namespace) is None

    def _rewire(
        self, wanter: Key, old: Decision | ModelWant | None, new: Decision | ModelWant | None
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
