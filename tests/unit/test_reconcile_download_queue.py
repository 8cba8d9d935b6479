"""Turns by what the operator's store holds: who waits for what, whose content the cache has, and which Jobs run."""

from __future__ import annotations

from typing import Any

from lora_operator.api import ModelArtifact
from lora_operator.kube.kinds import Kind
from lora_operator.plan.artifact import ArtifactObservation, plan_artifact
from lora_operator.reconcile.download_queue import take_turn
from tests.unit.builders import make_adapter, make_artifact, make_cache, make_decision, make_job, ready_artifact
from tests.unit.small_world import SmallWorld

CACHE = ("serving", "default")


class Downloads(SmallWorld):
    """A cache that runs so many Jobs at once, and three of team-a that run."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.cache = make_cache(download={"maxConcurrent": limit})
        for n in range(3):
            self.artifact(f"busy{n}", "team-a")
            self.put(Kind.JOB, make_job(artifact=f"busy{n}", owner_uid=f"uid-busy{n}"))

    def artifact(self, name: str, namespace: str, *, made: ModelArtifact | None = None, **more: Any) -> ModelArtifact:
        """One that an adapter of the namespace wants."""
        found = made or make_artifact(name, uid=f"uid-{name}", **more)
        self.put(Kind.MODEL_ARTIFACT, found)
        adapter = make_adapter(name, namespace)
        decision = make_decision(uid=adapter.metadata.uid, artifact=found.key)
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
    world = Downloads(limit=3)
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
    world = Downloads(limit=4)
    crowd = world.artifact("more", "team-a")
    there = world.artifact("there", "team-b", made=ready_artifact("there", uid="uid-there"))
    assert not world.starts(there), "it is there"
    assert not world.starts(crowd)
    world.context.records.forget_adapter(("team-b", "there"))
    seen = ArtifactObservation(there, world.cache, None, False, None, (), None)
    take_turn(world.context, seen, now=world.context.clock.now())
    assert world.starts(crowd), "nobody wants what is there"
    assert world.context.records.turns.starting(CACHE) == 1
