"""A Job with credentials is made in three steps; whichever is refused or was never come to, no Job is left that waits for ever."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any, cast

import pytest

from lora_operator.errors import AlreadyExistsError, ConflictError, ForbiddenError, InvalidObjectError, KubeError
from lora_operator.kube.client import Kube
from lora_operator.kube.kinds import Kind
from lora_operator.reconcile.artifact import reconcile_artifact
from lora_operator.reconcile.context import build_context
from lora_operator.reconcile.download_queue import running_jobs
from lora_operator.reconcile.store import Key, Store
from lora_operator.settings import Settings
from lora_operator.vllm import Engines
from tests.unit.builders import make_artifact, make_cache

Json = dict[str, Any]
KEY = Key(Kind.MODEL_ARTIFACT, "serving", "private")
CACHE = ("serving", "default")


class Api:
    """The API server as far as a Job is made there; `refuse`: what it says to a Secret, and to a Job that is let go."""

    def __init__(self) -> None:
        self.jobs: dict[str, Json] = {}
        self.secrets: list[str] = []
        self.refuse: dict[str, KubeError] = {}
        self.version = 100
        self.gone: Callable[[str], object] = lambda _: None
        self.conflict = False
        self.everywhere = False  # a Secret of any name exists: somebody reads the Job's before ours is made

    def stamped(self, body: Json, **more: Any) -> Json:
        self.version += 1
        return {**body, "metadata": body["metadata"] | {"resourceVersion": str(self.version)} | more}

    async def get_metadata(self, *_: Any) -> Json:
        return {"metadata": {"uid": "uid-secret", "resourceVersion": "5"}}

    async def get(self, _: Any, __: str, name: str) -> Json:
        if name in self.jobs:
            return self.jobs[name]
        return {"metadata": {"uid": "uid-secret"}, "data": {"token": base64.b64encode(b"x").decode()}}

    async def create(self, body: Json) -> Json:
        name = body["metadata"]["name"]
        if body["kind"] == "Secret":
            return self.create_secret(name)
        if name in self.jobs:
            raise AlreadyExistsError(name)
        self.jobs[name] = self.stamped(body, uid=f"uid-{name}")
        return self.jobs[name]

    def create_secret(self, name: str) -> Json:
        if (error := self.refuse.get("secret")) is not None:
            raise error
        if self.everywhere or name in self.secrets:
            raise AlreadyExistsError(name)
        self.secrets.append(name)
        return {}

    async def patch(self, _: Any, __: str, name: str, change: Json) -> Json:
        if (error := self.refuse.get("job")) is not None:
            raise error
        self.jobs[name] = self.stamped(self.jobs[name] | {"spec": self.jobs[name]["spec"] | change["spec"]})
        return self.jobs[name]

    async def delete(self, _: Any, __: str, name: str, **___: Any) -> None:
        del self.jobs[name]
        self.gone(name)

    async def apply_status(self, _: Any, __: str, name: str, status: Json, **___: Any) -> Json:
        if self.conflict:
            raise ConflictError(name)
        artifact = make_artifact(name, by_hand=True, secret="hf", uid="uid-private", status=status)
        body = artifact.model_dump(mode="json", by_alias=True, exclude_none=True)
        return self.stamped(body | {"status": status})

    async def event(self, *_: Any, **__: Any) -> None:
        return


class World:
    """A private artifact in a cache that is Ready."""

    def __init__(self) -> None:
        self.api = Api()
        self.context = build_context(
            kube=cast(Kube, self.api),
            engines=cast(Engines, None),
            store=Store(),
            settings=Settings(operator_image="i", operator_namespace="n"),
            enqueue=lambda key, *, after=0.0: None,
        )
        self.api.gone = lambda name: self.context.store.remove(Kind.JOB, "serving", name)
        self.put(Kind.MODEL_CACHE, make_cache())
        self.put(Kind.MODEL_ARTIFACT, make_artifact(KEY.name, by_hand=True, secret="hf", uid="uid-private"))

    def put(self, kind: Kind, obj: Any) -> None:
        body = obj.model_dump(mode="json", by_alias=True, exclude_none=True)
        self.context.store.upsert(kind, self.api.stamped(body))

    async def look(self) -> tuple[str, str]:
        """Reason and message of Ready after a look."""
        await reconcile_artifact(self.context, KEY)
        found = self.context.store.artifacts[KEY.namespace, KEY.name].status.conditions
        return next((str(c.reason), c.message) for c in found if c.type == "Ready")

    @property
    def held(self) -> list[str]:
        return list(running_jobs(self.context, CACHE))


REFUSED: dict[str, tuple[str, KubeError]] = {
    "a quota for Secrets": ("secret", ForbiddenError("secrets is forbidden: exceeded quota")),
    "a Secret that is not taken": ("secret", InvalidObjectError("too long")),
    "a policy that keeps the Job from going": ("job", ForbiddenError("jobs is forbidden: by policy")),
}


@pytest.mark.parametrize("case", REFUSED)
async def test_a_job_whose_credentials_are_refused_goes_and_says_why(case: str) -> None:
    world = World()
    step, error = REFUSED[case]
    world.api.refuse[step] = error
    reason, message = await world.look()
    assert reason == "JobNotStarted"
    assert message.startswith(
        f"Job serving/private-1 can't be given its credentials: {error}; raise the namespace's quota"
    )
    assert "attempt 1 failed, tried again at" in message
    assert (world.api.jobs, world.held) == ({}, []), "its place is free"
    await world.look()
    assert world.api.jobs == {}, "it waits for its next attempt"


async def test_a_job_that_a_killed_operator_left_is_gone_on_with() -> None:
    world = World()
    world.api.refuse["secret"] = KubeError("the operator was killed here")
    with pytest.raises(KubeError):
        await world.look()
    assert [job["spec"]["suspend"] for job in world.api.jobs.values()] == [True]
    assert world.held == ["private"]
    world.api.refuse.clear()
    await world.look()
    assert [job["spec"]["suspend"] for job in world.api.jobs.values()] == [False]
    assert len(world.api.secrets) == 1


async def test_no_job_runs_with_a_secret_that_was_there_before_it() -> None:
    """It may be somebody else's, and can't be read; the next attempt's has another name."""
    world = World()
    world.api.everywhere = True
    reason, message = await world.look()
    assert reason == "JobNotStarted"
    assert "exists before Job serving/private-1 was given its credentials" in message
    assert "attempt 1 failed, tried again at" in message
    assert (world.api.jobs, world.held) == ({}, []), "it was never let go"


async def test_a_job_whose_letting_go_was_not_answered_is_made_again_with_another_secret() -> None:
    world = World()
    world.api.refuse["job"] = KubeError("no answer")
    with pytest.raises(KubeError):
        await world.look()
    world.api.refuse.clear()
    assert (await world.look())[0] == "JobNotStarted"
    artifact = world.context.store.artifacts[KEY.namespace, KEY.name]
    failure = artifact.status.last_failure
    assert failure is not None
    due = artifact.status.model_copy(update={"next_attempt_time": failure.time})
    world.put(Kind.MODEL_ARTIFACT, artifact.model_copy(update={"status": due}))
    await world.look()
    assert [job["spec"]["suspend"] for job in world.api.jobs.values()] == [False]
    assert len(set(world.api.secrets)) == 2


async def test_a_job_that_goes_already_is_given_nothing_again() -> None:
    """Its watch may be late: it looks as if it were still to be made."""
    world = World()
    await world.look()
    world.context.store.remove(Kind.JOB, "serving", "private-1")
    assert (await world.look())[0] != "JobNotStarted"
    assert len(world.api.secrets) == len(world.api.jobs) == 1


async def test_a_job_that_was_left_for_credentials_that_are_not_used_any_more_goes() -> None:
    world = World()
    world.api.refuse["secret"] = KubeError("the operator was killed here")
    with pytest.raises(KubeError):
        await world.look()
    world.put(Kind.MODEL_CACHE, make_cache(offline=True))
    reason, message = await world.look()
    assert reason == "JobFailed"
    assert "Job serving/private-1 was made for credentials that are not used now" in message
    assert world.api.jobs == {}


async def test_no_job_goes_before_what_it_led_to_is_written_down() -> None:
    world = World()
    world.api.refuse["secret"] = ForbiddenError("exceeded quota")
    world.api.conflict = True
    await reconcile_artifact(world.context, KEY)
    assert len(world.api.jobs) == 1
    world.api.conflict = False
    assert (await world.look())[0] == "JobNotStarted"
    assert world.api.jobs == {}
