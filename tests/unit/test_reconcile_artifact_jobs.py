"""A Job with credentials is made in three steps; whichever is refused or was never come to, no Job is left that waits for ever."""

from __future__ import annotations

import base64

import pytest

from lora_operator.errors import AlreadyExistsError, ConflictError, ForbiddenError, InvalidObjectError, KubeError
from lora_operator.kube.kinds import Kind
from lora_operator.reconcile.artifact import reconcile_artifact
from lora_operator.reconcile.download_queue import running_jobs
from lora_operator.reconcile.store import Key
from tests.unit.builders import make_artifact, make_cache
from tests.unit.fake_kube import Json
from tests.unit.small_world import SmallWorld

TOKEN: Json = {"data": {"token": base64.b64encode(b"x").decode()}}
KEY = Key(Kind.MODEL_ARTIFACT, "serving", "private")
CACHE = ("serving", "default")


class PrivateArtifact(SmallWorld):
    """A private artifact in a cache that is Ready, and the Secret that it names; `refuse`: what a step of making its Job is told."""

    def __init__(self) -> None:
        super().__init__()
        self.refuse: dict[str, KubeError] = {}  # "secret", "job" or "apply_status"
        self.everywhere = False  # a Secret of any name exists: somebody reads the Job's before ours is made
        self.kube.refused = self.refusal
        self.kube.on_change = self.hear
        self.kube.put({"metadata": {"name": "hf", "namespace": "serving", "uid": "uid-secret"}, **TOKEN}, "Secret")
        self.put(Kind.MODEL_CACHE, make_cache())
        self.put(Kind.MODEL_ARTIFACT, make_artifact(KEY.name, by_hand=True, secret="hf", uid="uid-private"))

    def refusal(self, verb: str, obj: Json) -> KubeError | None:
        """A Secret is made, a Job is let go by a patch, and a status is written."""
        if verb == "create" and obj["kind"] == "Secret" and self.everywhere:
            return AlreadyExistsError(obj["metadata"]["name"])
        step = {("create", "Secret"): "secret", ("patch", "Job"): "job"}.get((verb, obj["kind"]), verb)
        return self.refuse.get(step)

    def hear(self, event: str, body: Json, _: bool) -> None:
        """Of Jobs that go the operator hears at once."""
        if event == "DELETED" and body["kind"] == "Job":
            self.store.remove(Kind.JOB, "serving", body["metadata"]["name"])

    async def look(self) -> tuple[str, str]:
        """Reason and message of Ready after a look."""
        await reconcile_artifact(self.context, KEY)
        found = self.context.store.artifacts[KEY.namespace, KEY.name].status.conditions
        return next((str(c.reason), c.message) for c in found if c.type == "Ready")

    @property
    def jobs(self) -> dict[str, Json]:
        """The Jobs that are there, by name."""
        return {name: body for (kind, _, name), body in self.kube.objects.items() if kind == "Job"}

    @property
    def secrets(self) -> list[str]:
        """The names of the Secrets that the operator has made."""
        return [body["metadata"]["name"] for body in self.kube.created if body["kind"] == "Secret"]

    @property
    def held(self) -> list[str]:
        """Artifacts whose Jobs take a place of the cache's."""
        return list(running_jobs(self.context, CACHE))


REFUSED: dict[str, tuple[str, KubeError]] = {
    "a quota for Secrets": ("secret", ForbiddenError("secrets is forbidden: exceeded quota")),
    "a Secret that is not taken": ("secret", InvalidObjectError("too long")),
    "a policy that keeps the Job from going": ("job", ForbiddenError("jobs is forbidden: by policy")),
}


@pytest.mark.parametrize("case", REFUSED)
async def test_a_job_whose_credentials_are_refused_goes_and_says_why(case: str) -> None:
    world = PrivateArtifact()
    step, error = REFUSED[case]
    world.refuse[step] = error
    reason, message = await world.look()
    assert reason == "JobNotStarted"
    assert message.startswith(
        f"Job serving/private-1 can't be given its credentials: {error}; raise the namespace's quota"
    )
    assert "attempt 1 failed, tried again at" in message
    assert (world.jobs, world.held) == ({}, []), "its place is free"
    await world.look()
    assert world.jobs == {}, "it waits for its next attempt"


async def test_a_job_that_a_killed_operator_left_is_gone_on_with() -> None:
    world = PrivateArtifact()
    world.refuse["secret"] = KubeError("the operator was killed here")
    with pytest.raises(KubeError):
        await world.look()
    assert [job["spec"]["suspend"] for job in world.jobs.values()] == [True]
    assert world.held == ["private"]
    world.refuse.clear()
    await world.look()
    assert [job["spec"]["suspend"] for job in world.jobs.values()] == [False]
    assert len(world.secrets) == 1


async def test_no_job_runs_with_a_secret_that_was_there_before_it() -> None:
    """It may be somebody else's, and can't be read; the next attempt's has another name."""
    world = PrivateArtifact()
    world.everywhere = True
    reason, message = await world.look()
    assert reason == "JobNotStarted"
    assert "exists before Job serving/private-1 was given its credentials" in message
    assert "attempt 1 failed, tried again at" in message
    assert (world.jobs, world.held) == ({}, []), "it was never let go"


async def test_a_job_whose_letting_go_was_not_answered_is_made_again_with_another_secret() -> None:
    world = PrivateArtifact()
    world.refuse["job"] = KubeError("no answer")
    with pytest.raises(KubeError):
        await world.look()
    world.refuse.clear()
    assert (await world.look())[0] == "JobNotStarted"
    artifact = world.context.store.artifacts[KEY.namespace, KEY.name]
    failure = artifact.status.last_failure
    assert failure is not None
    due = artifact.status.model_copy(update={"next_attempt_time": failure.time})
    world.put(Kind.MODEL_ARTIFACT, artifact.model_copy(update={"status": due}))
    await world.look()
    assert [job["spec"]["suspend"] for job in world.jobs.values()] == [False]
    assert len(set(world.secrets)) == 2


async def test_a_job_that_goes_already_is_given_nothing_again() -> None:
    """Its watch may be late: it looks as if it were still to be made."""
    world = PrivateArtifact()
    await world.look()
    world.context.store.remove(Kind.JOB, "serving", "private-1")
    assert (await world.look())[0] != "JobNotStarted"
    assert len(world.secrets) == len(world.jobs) == 1


async def test_a_job_that_was_left_for_credentials_that_are_not_used_any_more_goes() -> None:
    world = PrivateArtifact()
    world.refuse["secret"] = KubeError("the operator was killed here")
    with pytest.raises(KubeError):
        await world.look()
    world.put(Kind.MODEL_CACHE, make_cache(offline=True))
    reason, message = await world.look()
    assert reason == "JobFailed"
    assert "Job serving/private-1 was made for credentials that are not used now" in message
    assert world.jobs == {}


async def test_no_job_goes_before_what_it_led_to_is_written_down() -> None:
    world = PrivateArtifact()
    world.refuse["secret"] = ForbiddenError("exceeded quota")
    world.refuse["apply_status"] = ConflictError(KEY.name)
    await reconcile_artifact(world.context, KEY)
    assert len(world.jobs) == 1
    del world.refuse["apply_status"]
    assert (await world.look())[0] == "JobNotStarted"
    assert world.jobs == {}
