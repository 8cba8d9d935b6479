"""What reconcilers have found and tell one another, in memory: decisions on adapters, wants of deployments, looks at engines.

All of it is found again after a restart; until then it is unknown, and nothing destructive follows from what is unknown.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lora_operator.plan.fleet import PodView
from lora_operator.plan.modules import Decision, ModuleList
from lora_operator.plan.wants import Credentials
from lora_operator.reconcile.store import Key, Kind, ObjectKey, Store


@dataclass(frozen=True)
class ModelWant:
    """The base model's artifact that a deployment wants; None while its cache or credentials don't allow one."""

    uid: str
    generation: int
    artifact: ObjectKey | None
    credentials: Credentials | None


class Registry:
    """The shared findings. Methods return what has to be looked at again where that follows from the change alone."""

    def __init__(self) -> None:
        self._decisions: dict[ObjectKey, Decision] = {}
        self._model_wants: dict[ObjectKey, ModelWant] = {}
        self._wanters: dict[ObjectKey, dict[Key, Credentials | None]] = {}
        self.lists: dict[ObjectKey, ModuleList] = {}
        self.held: dict[ObjectKey, int] = {}  # the highest list generation that any pod of a deployment reported
        self.views: dict[ObjectKey, PodView] = {}
        self.asked: set[ObjectKey] = set()  # pods about whose engine something is known since this operator started
        self.misses: dict[ObjectKey, int] = {}  # looks at a pod's engine in a row that failed
        self.silent: set[ObjectKey] = set()  # pods whose engine did not listen when it was last tried: it starts
        self.replica_set_owners: dict[str, str | None] = {}  # ReplicaSet UID → its Deployment's UID
        self.announced: dict[ObjectKey, object] = {}  # what an artifact's wanters were last told of
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
            decision = replace(decision, artifact=old.artifact, credentials=old.credentials)
        if old == decision:
            return None
        self._decisions[adapter] = decision
        key = Key(Kind.LORA_ADAPTER, *adapter)
        return self._rewire(key, old.artifact if old else None, decision.artifact, decision.credentials)

    def withdraw_decision(self, adapter: ObjectKey) -> set[ObjectKey]:
        """Forget an adapter that is gone. Returns the artifacts whose wanters changed."""
        old = self._decisions.pop(adapter, None)
        return self._rewire(Key(Kind.LORA_ADAPTER, *adapter), old.artifact if old else None, None, None)

    def publish_model_want(self, deployment: ObjectKey, want: ModelWant) -> set[ObjectKey] | None:
        """Record a deployment's want. Returns the artifacts whose wanters changed; None when it says nothing new."""
        old = self._model_wants.get(deployment)
        if old == want:
            return None
        self._model_wants[deployment] = want
        key = Key(Kind.VLLM_DEPLOYMENT, *deployment)
        return self._rewire(key, old.artifact if old else None, want.artifact, want.credentials)

    def withdraw_deployment(self, deployment: ObjectKey) -> set[ObjectKey]:
        """Forget a deployment that is gone. Returns the artifacts whose wanters changed."""
        self.lists.pop(deployment, None)
        self.held.pop(deployment, None)
        self.readiness.pop(deployment, None)
        old = self._model_wants.pop(deployment, None)
        return self._rewire(Key(Kind.VLLM_DEPLOYMENT, *deployment), old.artifact if old else None, None, None)

    def wanters(self, artifact: ObjectKey) -> dict[Key, Credentials | None]:
        """Who wants an artifact, with the credentials that each lends to it."""
        return self._wanters.get(artifact, {})

    def all_decided(self, store: Store, namespace: str) -> bool:
        """Whether everybody who could want an artifact of the namespace was looked at in the present form.

        Artifacts lie beside their deployment, so others can't; one that can't be read could.
        """
        if any(key.kind in (Kind.LORA_ADAPTER, Kind.VLLM_DEPLOYMENT) for key in store.invalid):
            return False
        for deployment in store.deployments.values():
            if deployment.metadata.namespace != namespace:
                continue
            want = self._model_wants.get(deployment.key)
            if want is None or (want.uid, want.generation) != (deployment.metadata.uid, deployment.metadata.generation):
                return False
            for adapter in store.adapters_of(deployment.key):
                decision = self._decisions.get(adapter.key)
                if decision is None or decision.keep_unknown:
                    return False
                if (decision.uid, decision.generation) != (adapter.metadata.uid, adapter.metadata.generation):
                    return False
        return True

    def _rewire(
        self, wanter: Key, old: ObjectKey | None, new: ObjectKey | None, credentials: Credentials | None
    ) -> set[ObjectKey]:
        if old is not None and old != new:
            present = self._wanters.get(old, {})
            present.pop(wanter, None)
            if not present:
                self._wanters.pop(old, None)
        if new is not None:
            self._wanters.setdefault(new, {})[wanter] = credentials
        return {key for key in (old, new) if key is not None}
