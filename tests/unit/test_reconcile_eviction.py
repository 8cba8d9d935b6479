"""An eviction in the operator's own memory: what counts as used, and that nothing can be wanted again between decision and Job."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from lora_operator.api import ModelCache
from lora_operator.api.cache import ModelCacheStatus
from lora_operator.constants import ANNOTATION_EVICT, ANNOTATION_REFRESH, Reason
from lora_operator.errors import ForbiddenError, UnavailableError
from lora_operator.kube.kinds import Kind
from lora_operator.plan.adapter_list import Drop, Entry, ModuleList, Serve
from lora_operator.reconcile.cache import reconcile_cache
from lora_operator.reconcile.download_queue import is_evicting
from lora_operator.reconcile.eviction import reconcile_eviction
from lora_operator.reconcile.records import ModelWant
from lora_operator.reconcile.store import Key
from lora_operator.reconcile.usage import used_views
from lora_operator.wire.jobs import (
    EVICT_REQUEST_ENV,
    KEEP_BYTES,
    EvictRequest,
    EvictResult,
    FetchResult,
    VolumeState,
    keep_mark,
)
from lora_operator.wire.plugin import ServedModel
from tests.unit.builders import (
    CREATED,
    engine_pod,
    job_pod,
    make_adapter,
    make_artifact,
    make_cache,
    make_decision,
    make_deployment,
    make_job,
    make_module,
    make_view,
    make_workload,
    ready_artifact,
)
from tests.unit.fake_kube import Json
from tests.unit.small_world import SmallWorld

POD = ("serving", "llama-0")


class Evictions(SmallWorld):
    """A fleet with one pod that serves an adapter, and an artifact `old` that nothing wants. Watches bring nothing of deletions."""

    def __init__(self, *, asked: str | None = "now", pod: Json | None = None, **cache: Any) -> None:
        super().__init__()
        claim = {"metadata": {"name": "models", "namespace": "serving", "uid": "uid-claim"}}
        bound = {"spec": {"accessModes": ["ReadWriteMany"]}, "status": {"phase": "Bound"}}
        self.kube.put(claim | bound, "PersistentVolumeClaim")
        made = make_cache(**cache)
        annotations = {ANNOTATION_EVICT: asked} if asked is not None else {}
        self.cache: ModelCache = made.model_copy(
            update={"metadata": made.metadata.model_copy(update={"annotations": annotations})}
        )
        self.put(Kind.MODEL_CACHE, self.cache)
        self.deployment, self.adapter = make_deployment(), make_adapter()
        self.put(Kind.VLLM_DEPLOYMENT, self.deployment)
        self.put(Kind.LORA_ADAPTER, self.adapter)
        self.put(Kind.MODEL_ARTIFACT, ready_artifact("sql", status={"path": "artifacts/sql-view"}))
        unused = {"path": "artifacts/old-view", "unreferencedSince": CREATED}
        self.put(Kind.MODEL_ARTIFACT, ready_artifact("old", status=unused))
        workload = make_workload()
        arguments = {"spec": {"containers": [{"args": ["--model", "/model-cache/artifacts/base-view"]}]}}
        self.put(Kind.DEPLOYMENT, workload | {"spec": workload["spec"] | {"template": arguments}})
        self.put(Kind.POD, engine_pod() if pod is None else pod)
        records, module = self.context.records, make_module(path="/model-cache/artifacts/sql-view")
        records.publish_model_want(self.deployment.key, ModelWant(self.deployment.metadata.uid, 1, None, None))
        self.decide("sql", Serve(module))
        records.deployments[self.deployment.key].modules = ModuleList("serving/llama", 1, (module,))
        records.pods[POD].view = make_view(module, retired=("/model-cache/artifacts/retired-view",))
        records.pods[POD].listed = (ServedModel(id="x", root="/model-cache/artifacts/orphan-view", parent="base"),)

    def decide(self, artifact: str, entry: Entry = Drop()) -> None:  # noqa: B008  frozen
        """The adapter wants it."""
        decision = make_decision(entry, uid=self.adapter.metadata.uid, artifact=("serving", artifact))
        self.context.records.publish_decision(self.adapter.key, decision)

    def delete_of(self, then: Callable[[str], None]) -> None:
        """What happens at each deletion by the operator, of which the name is told; what it raises is the answer."""
        self.kube.refused = lambda verb, obj: then(obj["metadata"]["name"]) if verb == "delete" else None

    def put_pod(self, state: Json) -> None:
        """The Job's pod, of which no watch has told yet."""
        (job,) = self.kube.created
        labels = {"batch.kubernetes.io/job-name": job["metadata"]["name"]}
        containers = {"containerStatuses": [{"name": "evict", "state": state}]}
        self.kube.put(
            {"metadata": {"name": "p", "namespace": "serving", "labels": labels}, "status": containers}, "Pod"
        )

    async def until_the_job(self) -> None:
        while not self.kube.created:
            await reconcile_cache(self.context, Key(Kind.MODEL_CACHE, *self.cache.key))

    def end_job(self) -> None:
        (job,) = self.kube.created
        ended = {"conditions": [{"type": "Complete", "status": "True"}]}
        self.put(Kind.JOB, job | {"status": ended})

    def make_pod(self, status: Json | None, *, made: datetime, **spec: Any) -> None:
        """The eviction's Job as it was made then, with its pod."""
        (job,) = self.kube.created
        metadata = job["metadata"] | {"creationTimestamp": made.isoformat()}
        self.put(Kind.JOB, {**job, "metadata": metadata, "spec": job["spec"] | spec})
        owner = {"kind": "Job", "name": metadata["name"], "uid": metadata["uid"], "controller": True}
        if status is not None:
            pod = {"name": "p", "namespace": "serving", "uid": "uid-p", "ownerReferences": [owner]}
            self.put(Kind.POD, {"metadata": pod, "spec": {}, "status": status})

    async def reconcile(self) -> Json:
        """What the cache's status says of evictions afterwards."""
        await reconcile_cache(self.context, Key(Kind.MODEL_CACHE, *self.cache.key))
        found: Json = self.kube.statuses[-1]["eviction"]
        return found

    async def look(self) -> Any:
        """Reconcile, and once more where that is to be at once: with what is written down before anything goes."""
        found = await reconcile_eviction(self.context, self.cache)
        if found.requeue_after == 0:
            status = self.cache.status.model_copy(update={"eviction": found.status})
            self.cache = self.cache.model_copy(update={"status": status})
            found = await reconcile_eviction(self.context, self.cache)
        return found

    def request(self) -> EvictRequest:
        (job,) = self.kube.created
        (container,) = job["spec"]["template"]["spec"]["containers"]
        values = {entry["name"]: entry["value"] for entry in container["env"]}
        return EvictRequest.model_validate(json.loads(values[EVICT_REQUEST_ENV]))

    def kept(self, *views: str) -> list[str]:
        data = base64.b64decode(self.request().keep)
        marks = {data[start : start + KEEP_BYTES] for start in range(0, len(data), KEEP_BYTES)}
        return [view for view in views if keep_mark(view) in marks]


ALL = ("sql-view", "base-view", "retired-view", "orphan-view", "old-view")


async def test_the_artifact_goes_first_and_the_job_keeps_all_that_is_used() -> None:
    world = Evictions()
    found = await world.look()
    assert world.kube.deleted == ["old"]
    assert ("serving", "old") not in world.context.store.artifacts, "nobody can find it Ready any more"
    assert world.kept(*ALL) == ["sql-view", "base-view", "retired-view", "orphan-view"]
    assert (world.request().owner, world.request().built) == ("uid-claim", None)
    assert (found.status.running, found.status.requested) == (True, "now")
    (job,) = world.kube.created
    assert job["metadata"]["name"] == "default-evict-1"
    assert job["metadata"]["ownerReferences"][0]["kind"] == "ModelCache"
    pod = job["spec"]["template"]["spec"]
    assert pod["containers"][0]["args"] == ["evict"]
    assert pod["automountServiceAccountToken"] is False
    assert is_evicting(world.context, world.cache.key), "so no download begins"


async def test_what_is_wanted_again_while_others_are_deleted_stays() -> None:
    world = Evictions()
    unused = {"path": "artifacts/older-view", "unreferencedSince": "2025-01-01T00:00:00Z"}
    world.put(Kind.MODEL_ARTIFACT, ready_artifact("older", uid="uid-older", status=unused))

    def somebody_comes(name: str) -> None:
        if name == "older":
            world.decide("old", Serve(make_module(path="/model-cache/artifacts/old-view")))

    world.delete_of(somebody_comes)
    await world.look()
    assert world.kube.deleted == ["older"]
    assert world.kept("old-view", "older-view") == ["old-view"]


async def test_content_that_is_wanted_while_its_artifact_s_deletion_is_on_its_way_stays() -> None:
    world = Evictions()

    def somebody_comes(name: str) -> None:
        want = ModelWant(world.deployment.metadata.uid, 1, ("serving", name), None)
        world.context.records.publish_model_want(world.deployment.key, want)

    world.delete_of(somebody_comes)
    await world.look()
    assert world.kube.deleted == ["old"]
    assert world.kept("old-view") == ["old-view"], "it was seen Ready, and pods may be told of it by now"


async def test_two_caches_over_one_claim_are_not_evicted_from_at_once() -> None:
    world = Evictions()
    asked = {ANNOTATION_EVICT: "now"}
    second = make_cache("second", uid="uid-second")
    second = second.model_copy(update={"metadata": second.metadata.model_copy(update={"annotations": asked})})
    world.put(Kind.MODEL_CACHE, second)
    others: list[Any] = []

    def meanwhile(_: str) -> None:
        with pytest.raises(StopIteration) as ended:  # it does not wait for anything
            reconcile_eviction(world.context, second).send(None)
        others.append(ended.value.value)

    world.delete_of(meanwhile)
    await world.look()
    assert len(world.kube.created) == 1
    assert (others[0].status, others[0].requeue_after) == (None, 5.0)


async def test_one_that_is_told_to_be_in_use_stays() -> None:
    world = Evictions()
    status = {"artifactRef": {"namespace": "serving", "name": "old"}}
    world.put(Kind.LORA_ADAPTER, make_adapter("other", uid="uid-other", status=status))
    world.context.records.publish_decision(
        ("team-a", "other"), make_decision(uid="uid-other", artifact=("serving", "sql"))
    )
    await world.look()
    assert world.kube.deleted == []
    assert world.kept("old-view") == ["old-view"]


async def refusal(world: Evictions) -> str:
    found = await world.look()
    assert (world.kube.deleted, world.kube.created) == ([], [])
    return found.status.message or ""


async def test_a_pod_that_cant_be_asked_holds_everything_up() -> None:
    for view in (None, make_view(error="no answer"), make_view(guarded=False), make_view(container_id="another")):
        world = Evictions()
        if view is None:
            world.context.records.pods[POD].view = None
        else:
            world.context.records.pods[POD].view = view
        assert "pod serving/llama-0 may be serving, and can't be asked" in await refusal(world)


async def test_an_adapter_that_was_not_looked_at_holds_everything_up() -> None:
    world = Evictions()
    world.put(Kind.LORA_ADAPTER, make_adapter("new", uid="uid-new"))
    assert "has not been looked at yet: where that lasts, see its status" in await refusal(world)


async def test_an_object_that_cant_be_read_holds_everything_up() -> None:
    world = Evictions()
    world.put(
        Kind.LORA_ADAPTER, {"metadata": {"name": "odd", "namespace": "team-a", "uid": "u"}, "spec": {"source": 5}}
    )
    assert "LoRAAdapter team-a/odd can't be read by this operator" in await refusal(world)


async def test_a_list_that_is_not_known_holds_everything_up() -> None:
    world = Evictions()
    world.context.records.deployments[world.deployment.key].modules = None
    assert "the module list of VLLMDeployment serving/llama is not known yet" in await refusal(world)


async def test_a_download_whose_result_was_not_read_holds_everything_up() -> None:
    world = Evictions()
    world.put(Kind.MODEL_ARTIFACT, ready_artifact("new", uid="uid-new", status={"finishedAttempt": 0}))
    world.put(Kind.JOB, make_job(artifact="new", owner_uid="uid-new", complete=True))
    assert "a download has just ended" in await refusal(world)


async def test_what_downloads_may_publish_meanwhile_is_reckoned_with() -> None:
    world = Evictions()
    world.put(Kind.MODEL_ARTIFACT, ready_artifact("new", uid="uid-new", status={"finishedAttempt": 0}))
    job = make_job(artifact="new", owner_uid="uid-new")
    world.put(Kind.JOB, {**job, "metadata": job["metadata"] | {"creationTimestamp": CREATED}})
    await world.look()
    began = datetime.fromisoformat(CREATED).timestamp()
    assert world.request().built == began, "it may have ended long ago, and nobody has told yet"


async def test_artifacts_of_another_cache_over_the_same_claim_are_kept() -> None:
    world = Evictions()
    world.put(Kind.MODEL_CACHE, make_cache("second", uid="uid-second"))
    unused = {"path": "artifacts/second-view", "unreferencedSince": CREATED}
    world.put(Kind.MODEL_ARTIFACT, ready_artifact("second", uid="uid-2", cache="second", status=unused))
    await world.look()
    assert world.kube.deleted == ["old"]
    assert world.kept("second-view") == ["second-view"]
    assert is_evicting(world.context, ("serving", "second"))


async def test_what_other_caches_have_on_the_same_volume_can_t_be_reclaimed() -> None:
    volume = {"totalBytes": 1 << 40, "freeBytes": 1 << 39, "usedBytes": 1 << 39, "time": CREATED}
    world = Evictions(asked=None, status={"claimName": "models", "volume": volume})
    before = (await world.look()).reclaimable
    world.put(Kind.MODEL_CACHE, make_cache("second", uid="uid-second"))
    status = {"path": "artifacts/second-view", "sizeBytes": 1 << 38}
    world.put(Kind.MODEL_ARTIFACT, ready_artifact("second", uid="uid-2", cache="second", status=status))
    assert (await world.look()).reclaimable == before - (1 << 38)


async def test_artifacts_whose_cache_is_away_are_kept_for_it_may_be_over_the_same_claim() -> None:
    world = Evictions()
    content = {"path": "artifacts/away-view", "unreferencedSince": CREATED}
    world.put(Kind.MODEL_ARTIFACT, ready_artifact("away", uid="uid-2", cache="second", status=content))
    world.put(Kind.JOB, make_job(artifact="away", owner_uid="uid-2"))
    await world.look()
    assert world.kube.deleted == ["old"]
    assert world.kept("away-view") == ["away-view"]
    assert world.request().built is not None, "its downloads are reckoned with, too"


async def test_pods_that_have_ended_use_nothing_and_those_that_have_not_begun_what_they_are_told() -> None:
    world = Evictions(pod=engine_pod(phase="Failed"))
    world.context.records.pods[POD].view = None
    assert "retired-view" not in used_views(world.context, "serving")[0]
    world = Evictions(pod=engine_pod(container={"state": {"waiting": {"reason": "PodInitializing"}}}))
    world.context.records.pods[POD].view = None
    used, unsure = used_views(world.context, "serving")
    assert (unsure, {"sql-view", "base-view"} <= used) == (None, True)


async def test_the_end_is_recorded_downloads_go_on_and_the_job_goes() -> None:
    world = Evictions()
    key = Key(Kind.MODEL_CACHE, *world.cache.key)
    await world.until_the_job()
    world.end_job()
    volume = VolumeState(total_bytes=10, free_bytes=5, used_bytes=4)
    message = EvictResult(ok=True, views=1, freed_bytes=1024, volume=volume).model_dump_json(by_alias=True)
    state = {"terminated": {"exitCode": 0, "message": message}}
    world.put_pod(state)
    world.kube.deleted.clear()
    world.enqueued.clear()
    await reconcile_cache(world.context, key)
    told = world.kube.statuses[-1]
    assert (told["eviction"]["attempt"], told["eviction"]["freed"], told["eviction"]["running"]) == (1, "1Ki", False)
    assert (told["used"], told["free"]) == ("4", "5")
    assert world.kube.deleted == ["default-evict-1"]
    assert Key(Kind.MODEL_ARTIFACT, "serving", "sql") in world.woken
    assert not is_evicting(world.context, world.cache.key)


async def test_an_artifact_that_can_t_be_deleted_is_told_and_keeps_nothing_else_from_being_told() -> None:
    world = Evictions()

    def refuses(_: str) -> None:
        raise ForbiddenError("delete ModelArtifact serving/old: denied by a policy (403)")

    world.delete_of(refuses)
    await world.reconcile()
    world.put(
        Kind.MODEL_CACHE,
        world.cache.model_copy(update={"status": ModelCacheStatus.model_validate(world.kube.statuses[-1])}),
    )
    told = await world.reconcile()
    assert (told["running"], told["failures"], told["leftOver"]) == (False, 1, True)
    assert told["message"] == "its object can't be deleted: delete ModelArtifact serving/old: denied by a policy (403)"


@pytest.mark.parametrize("what", ["delete", "create", "list"])
async def test_a_removal_that_fails_keeps_the_cache_s_own_status_from_nothing(what: str, monkeypatch: Any) -> None:
    world = Evictions(status={"claimName": "models", "eviction": {"leftOver": True}})
    if what == "list":
        await world.until_the_job()
        world.end_job()
        world.put(Kind.MODEL_CACHE, world.cache)
        world.kube.statuses.clear()

    async def away(*_: Any, **__: Any) -> None:
        raise UnavailableError(f"{what}: no answer (500)")

    monkeypatch.setattr(world.kube, what, away)
    with pytest.raises(UnavailableError):
        await reconcile_cache(world.context, Key(Kind.MODEL_CACHE, *world.cache.key))
    (status,) = world.kube.statuses
    assert {c["type"]: c["status"] for c in status["conditions"]}["Ready"] == "True"


UNSCHEDULABLE: Json = {
    "phase": "Pending",
    "conditions": [{"type": "PodScheduled", "status": "False", "message": "0/3 nodes are available"}],
}
RUNNING: Json = {
    "phase": "Running",
    "containerStatuses": [{"name": "evict", "state": {"running": {"startedAt": CREATED}}}],
}


async def test_a_job_that_can_t_start_goes_and_downloads_go_on() -> None:
    world = Evictions()
    short = {"attempt": 1, "reason": "InsufficientSpace", "message": "full", "time": CREATED}
    status = {"lastFailure": short, "unreferencedSince": CREATED}
    world.put(Kind.MODEL_ARTIFACT, make_artifact("new", uid="uid-new", by_hand=True, status=status))
    await world.until_the_job()
    world.make_pod(UNSCHEDULABLE, made=datetime.now(UTC))
    world.enqueued.clear()
    assert (await world.reconcile())["message"] == "pod p: 0/3 nodes are available"
    assert Key(Kind.MODEL_ARTIFACT, "serving", "new") in world.woken, "which says so, too"
    world.make_pod(UNSCHEDULABLE, made=datetime.now(UTC) - timedelta(minutes=2))
    world.kube.deleted.clear()
    told = await world.reconcile()
    assert (told["running"], told["failures"], told["attempt"]) == (False, 1, 1)
    assert world.kube.deleted == ["default-evict-1 Foreground"], "downloads wait until its pod is gone"


async def test_a_job_that_somebody_suspends_is_given_up_too() -> None:
    world = Evictions()
    await world.until_the_job()
    world.make_pod(None, made=datetime.now(UTC) - timedelta(minutes=2), suspend=True)
    assert "Job default-evict-1 is suspended, and not by this operator" in (await world.reconcile())["message"]


async def test_a_job_that_runs_is_left_to_its_deadline() -> None:
    world = Evictions()
    await world.until_the_job()
    world.make_pod(RUNNING, made=datetime.now(UTC) - timedelta(minutes=9))
    assert (await world.reconcile())["running"]


async def test_a_removal_whose_node_is_lost_ends_and_the_next_one_takes_nothing_that_came_after_it() -> None:
    world = Evictions()
    await world.until_the_job()
    made = datetime.now(UTC).replace(microsecond=0) - timedelta(minutes=9)
    world.make_pod(RUNNING, made=made)
    job, pod = world.kube.objects["Job", "serving", "default-evict-1"], world.kube.objects["Pod", "serving", "p"]
    target = {"conditions": [{"type": "FailureTarget", "status": "True", "reason": "DeadlineExceeded"}]}
    world.put(Kind.JOB, job | {"status": target})
    for seconds in (50, 61):
        deleted = {"deletionTimestamp": (datetime.now(UTC) - timedelta(seconds=seconds)).isoformat()}
        world.put(Kind.POD, pod | {"metadata": pod["metadata"] | deleted})
        world.kube.deleted.clear()
        world.enqueued.clear()
        told = await world.reconcile()
        assert told["running"] is (seconds == 50), "a slow node is none that is lost"
        assert is_evicting(world.context, world.cache.key) is (seconds == 50)
    assert (told["failures"], told["attempt"], told["leftOver"]) == (1, 1, True)
    assert told["message"].startswith("the node of Job default-evict-1 was lost: its pod was to be gone at ")
    assert datetime.fromisoformat(told["lostSince"]) == made
    assert world.kube.deleted == ["default-evict-1"]
    assert Key(Kind.MODEL_ARTIFACT, "serving", "sql") in world.woken, "downloads go on"

    again = Evictions(asked="again", status={"claimName": "models", "eviction": told})
    fresh = {"path": "artifacts/fresh-view", "unreferencedSince": CREATED}
    body = ready_artifact("fresh", uid="uid-f", status=fresh).model_dump(mode="json", by_alias=True, exclude_none=True)
    body["status"]["conditions"][0]["lastTransitionTime"] = datetime.now(UTC).isoformat()
    again.put(Kind.MODEL_ARTIFACT, body)
    await again.look()
    assert again.kube.deleted == ["old"], "who comes after the lost one keeps what is his"
    assert again.request().built == made.timestamp()
    (job,) = again.kube.created
    assert job["metadata"]["name"] == "default-evict-2"


async def test_a_download_whose_node_is_lost_holds_up_no_removal() -> None:
    world = Evictions()
    world.put(Kind.MODEL_ARTIFACT, ready_artifact("new", uid="uid-new", status={"finishedAttempt": 1}))
    job = make_job(artifact="new", owner_uid="uid-new")
    target = {"conditions": [{"type": "FailureTarget", "status": "True"}]}
    world.put(Kind.JOB, job | {"metadata": job["metadata"] | {"creationTimestamp": CREATED}, "status": target})
    pod = job_pod({"running": {}})
    world.put(Kind.POD, pod | {"metadata": pod["metadata"] | {"uid": "uid-p", "deletionTimestamp": CREATED}})
    await world.look()
    assert world.request().built is None, "payloads go, too"


async def test_files_whose_artifacts_are_gone_are_not_forgotten_when_the_job_is_refused_or_the_operator_dies() -> None:
    world = Evictions()

    async def refuse(_: Json) -> Json:
        raise ForbiddenError("exceeded quota")

    world.kube.create = refuse  # type: ignore[method-assign,assignment]
    while not world.kube.deleted:
        await reconcile_cache(world.context, Key(Kind.MODEL_CACHE, *world.cache.key))
    told = world.kube.statuses[-1]["eviction"]
    assert (told["failures"], told["requested"], told["leftOver"]) == (1, "now", True)
    assert told["message"] == "the Job was refused: exceeded quota"
    again = Evictions(status={"claimName": "models", "eviction": told | {"time": CREATED}})
    again.context.store.remove(Kind.MODEL_ARTIFACT, "serving", "old")
    await again.look()
    assert again.kept(*ALL) == ["sql-view", "base-view", "retired-view", "orphan-view"]


@pytest.mark.parametrize(("policy", "expected"), [("Never", None), ("LeastRecentlyUsed", True)])
async def test_content_whose_artifact_somebody_deletes_is_noted_where_it_is_to_go(
    policy: str, expected: object
) -> None:
    world = Evictions(asked=None, eviction={"policy": policy})
    await world.look()
    world.context.store.remove(Kind.MODEL_ARTIFACT, "serving", "old")
    for _ in range(2):
        status = (await reconcile_eviction(world.context, world.cache)).status
        assert (status and status.left_over) == expected
        world.cache = world.cache.model_copy(
            update={"status": world.cache.status.model_copy(update={"eviction": status})}
        )


async def test_content_whose_artifact_somebody_deletes_goes_when_pods_let_go_of_it() -> None:
    world = Evictions(asked=None, eviction={"policy": "LeastRecentlyUsed"})
    world.put(Kind.MODEL_ARTIFACT, ready_artifact("retired", uid="uid-r", status={"path": "artifacts/retired-view"}))
    await world.look()
    world.context.store.remove(Kind.MODEL_ARTIFACT, "serving", "retired")
    for view in (world.context.records.pods[POD].view, make_view(error="no answer")):
        world.context.records.pods[POD].view = view
        assert (await world.look()).status is None
    world.context.records.pods[POD].view = make_view(make_module(path="/model-cache/artifacts/sql-view"))
    await world.look()
    assert world.kept(*ALL) == ["sql-view", "base-view", "orphan-view", "old-view"]


async def test_content_that_a_newer_one_took_the_place_of_is_no_reason_for_an_eviction() -> None:
    world = Evictions(asked=None, eviction={"policy": "LeastRecentlyUsed"})
    refreshed = ready_artifact("refreshed", uid="uid-r", status={"path": "artifacts/refreshed-view"})
    annotations = {"annotations": {ANNOTATION_REFRESH: "1"}}
    metadata = refreshed.metadata.model_copy(update=annotations)
    world.put(Kind.MODEL_ARTIFACT, refreshed.model_copy(update={"metadata": metadata}))
    await world.look()
    world.context.store.remove(Kind.MODEL_ARTIFACT, "serving", "refreshed")  # superseded
    world.put(
        Kind.MODEL_ARTIFACT, ready_artifact("sql", status={"path": "artifacts/newer-view"})
    )  # its branch has moved
    assert (await world.look()).status is None


async def test_a_job_whose_end_was_recorded_before_the_operator_died_goes() -> None:
    world = Evictions()
    await world.until_the_job()
    world.end_job()
    recorded = make_cache(status={"claimName": "models", "eviction": {"attempt": 1, "requested": "now"}})
    world.put(Kind.MODEL_CACHE, recorded)
    world.kube.deleted.clear()
    await reconcile_cache(world.context, Key(Kind.MODEL_CACHE, *world.cache.key))
    assert world.kube.deleted == ["default-evict-1"]


async def test_what_was_asked_for_is_done_once_though_the_status_could_not_be_written() -> None:
    world = Evictions()
    await world.until_the_job()
    world.cache = world.context.store.caches[world.cache.key]
    forgotten = world.cache.status.model_copy(update={"eviction": None})
    world.put(Kind.MODEL_CACHE, world.cache.model_copy(update={"status": forgotten}))
    world.end_job()
    for _ in range(3):
        await reconcile_cache(world.context, Key(Kind.MODEL_CACHE, *world.cache.key))
    assert len(world.kube.created) == 1
    assert world.kube.statuses[-1]["eviction"]["requested"] == "now"


async def test_without_a_reason_nothing_is_even_looked_at() -> None:
    world = Evictions(asked=None, eviction={"policy": "LeastRecentlyUsed"})
    world.context.records.pods[POD].view = None  # it would hold everything up
    found = await world.look()
    assert (found.status, world.kube.created) == (None, [])
    assert found.reclaimable == 131072


def test_a_failure_for_the_lack_of_room_tells_how_much() -> None:
    result = FetchResult(ok=False, reason=Reason.INSUFFICIENT_SPACE, message="x", needed_bytes=5)
    assert FetchResult.model_validate_json(result.model_dump_json(by_alias=True)).needed_bytes == 5
