"""What one reconciler sees: the operator's memory, and the API server that it writes to. Nothing is brought by watches.

For everything together, with watches, engines and Jobs that end, there is model_world.
"""

from __future__ import annotations

from typing import Any, cast

from lora_operator.api.common import ApiModel
from lora_operator.kube.client import Kube
from lora_operator.kube.kinds import Kind
from lora_operator.reconcile.clock import Clock
from lora_operator.reconcile.context import build_context
from lora_operator.reconcile.routing import keys_for
from lora_operator.reconcile.store import Key, Store
from lora_operator.settings import Settings
from lora_operator.vllm import Engines
from tests.unit.fake_kube import FakeKube, Json


class SmallWorld:
    """An operator that has just started, with a test's own clock and engines where it gives some."""

    def __init__(
        self, *, kube: FakeKube | None = None, engines: Any = None, clock: Clock | None = None, **more: Any
    ) -> None:
        self.clock, self.store = clock or Clock(), Store()
        self.kube = kube or FakeKube(self.clock.now)
        self.enqueued: list[tuple[Key, float]] = []  # keys, each with the seconds that it waits
        self.context = build_context(
            kube=cast(Kube, self.kube),
            engines=cast(Engines, engines),
            store=self.store,
            settings=Settings(operator_image="i", operator_namespace="n"),
            enqueue=lambda key, *, after=0.0: self.enqueued.append((key, after)),
            clock=self.clock,
            **more,
        )

    @property
    def woken(self) -> list[Key]:
        """The keys that are to be looked at."""
        return [key for key, _ in self.enqueued]

    def put(self, kind: Kind, obj: ApiModel | Json, **status: Any) -> set[Key]:
        """An object is there, and the operator has heard of it: the keys that are looked at. `status` is laid over its own."""
        body = obj.to_wire() if isinstance(obj, ApiModel) else obj
        if status:
            body = {**body, "status": (body.get("status") or {}) | status}
        change = self.store.upsert(kind, self.kube.put(body, kind.value))
        assert change is not None, "each version is news"
        return keys_for(change, self.store)

    def drop(self, key: Key) -> set[Key]:
        """The operator has heard that an object is gone: the keys that are looked at."""
        change = self.store.remove(key.kind, key.namespace, key.name)
        assert change is not None
        return keys_for(change, self.store)
