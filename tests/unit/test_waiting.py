"""Turns by what the operator's store holds: who waits for what, whose content the cache has, and which Jobs run."""

from __future__ import annotations

from typing import Any, cast

from lora_operator.api import ModelArtifact
from lora_operator.kube.client import Kube
from lora_operator.kube.kinds import Kind
from lora_operator.plan.adapter_list import Decision
from lora_operator.plan.artifact import ArtifactObservation, plan_artifact
from lora_operator.reconcile.context import build_context
from lora_operator.reconcile.download_queue import take_turn
from lora_operator.reconcile.store import Store
from lora_operator.settings import Settings
from lora_operator.vllm import Engines
from tests.unit.builders import make_adapter, make_artifact, make_cache, make_job, ready_artifact

CACHE = ("serving", "default")


class World:
    """A cache that runs so many Jobs at once, and three of team-a that run."""

    def __init__(self, limit: int) -> None:
        self.cache, self.version = make_cache(download={"maxConcurrent": limit}), 0
        self.context = build_context(
            kube=cast(Kube, None),
            engines=cast(Engines, None),
            store=Store(),
            settings=Settings(operator_image="i", operator_namespace="n"),
            enqueue=lambda key, *, after=0.0: None,
        )
        for n in range(3):
            self.artifact(f"busy{n}", "team-a")
            self.put(Kind.JOB, make_job(artifact=f"busy{n}", owner_uid=f"uid-busy{n}"))

    def put(self, kind: Kind, body: dict[str, Any]) -> None:
        self.version += 1
        metadata = body["metadata"] | {"resourceVersion": str(self.version)}
        self.context.store.upsert(kind, {**body, "metadata": metadata})

    def artifact(self, name: str, namespace: str, *, made: ModelArtifact | None = None, **more: Any) -> ModelArtifact:
        """One that an adapter of the namespace wants."""
        found = made or make_artifact(name, uid=f"uid-{name}", **more)
        self.put(Kind.MODEL_ARTIFACT, found.model_dump(mode="json", by_alias=True, exclude_none=True))
        adapter = make_adapter(name, namespace)
        decision = Decision(uid=adapter.metadata.uid, generation=1, accepted=True, artifact=found.key)
        self.context.records.publish_decision(adapter.key, decision)
        return found

    def starts(self, artifact: ModelArtifact) -> bool:
        """Whether a look at it takes a place."""
        seen = ArtifactObservation(artifact, self.cache, None, True, None, (), None)
        now = self.context.clock.now()
        return plan_artifact(take_turn(self.context, seen, now=now), now=now).start is not None

    @property
    def head(self) -> str:
        """Whose turn it is."""
        return self.context.records.turns.next(CACHE, 1)[0]


def test_what_a_fleet_waits_for_is_at_the_head() -> None:
    world = World(limit=3)
    assert not world.starts(world.artifact("adapter", "team-b"))
    assert world.head == "adapter"
    for kind in ("Tokenizer", "BaseModel"):
        last = world.artifact(kind.lower(), "team-b", type=kind)
        assert not world.starts(last)
        assert world.head == kind.lower()
        world.context.records.turns.leave(last.key)
    assert world.head == "adapter"
    assert world.context.records.turns.waits(CACHE)


def test_the_last_place_is_kept_for_whoever_has_content_in_the_cache() -> None:
    world = World(limit=4)
    crowd = world.artifact("more", "team-a")
    there = world.artifact("there", "team-b", made=ready_artifact("there", uid="uid-there"))
    assert not world.starts(there), "it is there"
    assert not world.starts(crowd)
    world.context.records.forget_adapter(("team-b", "there"))
    seen = ArtifactObservation(there, world.cache, None, False, None, (), None)
    take_turn(world.context, seen, now=world.context.clock.now())
    assert world.starts(crowd), "nobody wants what is there"
    assert world.context.records.turns.starting(CACHE) == 1
