"""A ModelCache says whether its claim can be used, and how soon it looks again."""

from __future__ import annotations

from typing import Any

import pytest

from lora_operator.api import ModelArtifact
from lora_operator.api.cache import VolumeFigures
from lora_operator.constants import Reason
from lora_operator.errors import ReasonError
from lora_operator.kube.objects import Claim
from lora_operator.kube.pods import Pod
from lora_operator.plan.cache import CacheObservation, plan_cache, why_not_ours
from tests.unit.builders import (
    LATER,
    NOW,
    make_artifact,
    make_cache,
    not_ready,
    ready_artifact,
    through_the_api,
    told,
)


def claim(phase: str | None, *, annotations: dict[str, str] | None = None, **spec: Any) -> Claim:
    return Claim.parse(body(phase, annotations=annotations, **spec))


def body(phase: str | None, *, annotations: dict[str, str] | None = None, **spec: Any) -> dict[str, Any]:
    status = {"phase": phase} if phase else {}
    return {
        "metadata": {"name": "models", "uid": "uid-claim", "annotations": annotations or {}},
        "spec": {"accessModes": ["ReadWriteMany"]} | spec,
        "status": status | {"capacity": {"storage": "10Gi"}, "accessModes": ["ReadWriteMany", "ReadOnlyMany"]},
    }


def unwritable(
    message: str, time: str = "2026-01-01T00:00:00Z", *, unreferenced: str | None = None, **more: Any
) -> ModelArtifact:
    failure = {"attempt": 1, "reason": "CacheNotWritable", "message": message, "time": time}
    status = {"lastFailure": failure, "unreferencedSince": unreferenced}
    return make_artifact(status=status, conditions=not_ready("CacheNotWritable", message), **more)


WORDS = "user 10001 may not write to /model-cache"
Case = tuple[Claim | None, list[ModelArtifact], dict[str, tuple[str, str, str]], float]
CACHES: dict[str, Case] = {
    "a bound claim": (
        claim("Bound"),
        [],
        {"Ready": ("True", "Bound", "PersistentVolumeClaim models is bound")},
        300,
    ),
    "no claim": (
        None,
        [],
        {
            type_: (
                status,
                "ClaimNotFound",
                "PersistentVolumeClaim serving/models does not exist: create it or change spec.storage.existingClaim",
            )
            for type_, status in (("Ready", "False"), ("Stalled", "True"))
        },
        5,
    ),
    "a claim that waits": (
        claim("Pending", storageClassName="nfs"),
        [],
        {
            "Ready": (
                "False",
                "ClaimPending",
                "PersistentVolumeClaim serving/models is not bound: StorageClass nfs does not exist: create it, or make "
                "the claim with another one",
            )
        },
        3,
    ),
    "a claim that nobody has looked at yet": (
        claim(None),
        [],
        {
            "Ready": (
                "False",
                "ClaimPending",
                "PersistentVolumeClaim serving/models is not bound: it names no StorageClass, and the cluster has no default "
                "one; see kubectl describe pvc -n serving models",
            )
        },
        3,
    ),
    "a claim whose volume is gone": (
        claim("Lost"),
        [],
        {
            type_: (status, "ClaimUnusable", "PersistentVolumeClaim serving/models has lost its volume")
            for type_, status in (("Ready", "False"), ("Stalled", "True"))
        },
        5,
    ),
    "a volume that Jobs can't write to": (
        claim("Bound"),
        [unwritable("old words"), unwritable(WORDS, "2026-01-01T00:00:09Z")],
        {type_: (status, "CacheNotWritable", WORDS) for type_, status in (("Ready", "False"), ("Stalled", "True"))},
        60,
    ),
    "one that could be written since": (
        claim("Bound"),
        [ready_artifact(status={"lastFailure": unwritable("x").to_wire()["status"]["lastFailure"]})],
        {"Ready": ("True", "Bound", "PersistentVolumeClaim models is bound")},
        300,
    ),
    "one whose content nothing wants any more": (
        claim("Bound"),
        [unwritable(WORDS, unreferenced="2026-01-01T00:00:09Z")],
        {"Ready": ("True", "Bound", "PersistentVolumeClaim models is bound")},
        300,
    ),
    "a failure of another kind says nothing of the cache": (
        claim("Bound"),
        [make_artifact(conditions=not_ready("Unauthorized"))],
        {"Ready": ("True", "Bound", "PersistentVolumeClaim models is bound")},
        300,
    ),
}


@pytest.mark.parametrize("case", CACHES)
def test_plan_cache(case: str) -> None:
    seen_claim, artifacts, conditions, again = CACHES[case]
    cache = make_cache(conditions={})
    status, seconds = plan_cache(CacheObservation(cache=cache, claim=seen_claim, artifacts=artifacts), now=NOW)
    found = told(status.conditions)
    found.pop("SingleNode")
    assert found == conditions
    assert seconds == again
    assert (status.claim_name, status.observed_generation) == ("models", 1)
    stored = cache.model_copy(update={"status": through_the_api(status)})
    for now in (NOW, LATER):
        assert plan_cache(CacheObservation(stored, seen_claim, artifacts), now=now) == (status, seconds)


def test_what_is_in_it() -> None:
    artifacts = [
        ready_artifact("a"),
        ready_artifact("b"),
        make_artifact("c", status={"sizeBytes": 10**9}, conditions=not_ready("Downloading")),
    ]
    status, _ = plan_cache(CacheObservation(make_cache(), claim("Bound"), artifacts), now=NOW)
    assert (status.artifacts, status.size) == (2, "256Ki")
    assert (status.capacity, status.access_modes) == ("10Gi", ("ReadWriteMany",))


def test_nothing_is_claimed_of_a_claim_that_is_not_there() -> None:
    status, _ = plan_cache(CacheObservation(make_cache(), None, []), now=NOW)
    assert (status.capacity, status.access_modes, status.artifacts, status.size) == (None, None, 0, "0")
    assert status.claim_uid is None
    found = told(status.conditions)
    assert found["SingleNode"] == ("Unknown", *found["Ready"][1:])


DESCRIBE = "see kubectl describe pvc -n serving models"
PENDING: dict[str, tuple[Claim, dict[str, str] | None, str]] = {
    "its class waits for the first consumer": (
        claim("Pending", storageClassName="local"),
        {"volumeBindingMode": "WaitForFirstConsumer"},
        "StorageClass local waits for the first consumer, which will be a download Job's pod; nothing is wrong",
    ),
    "the first consumer has a node, and no volume is there yet": (
        claim("Pending", storageClassName="local", annotations={"volume.kubernetes.io/selected-node": "n1"}),
        {"volumeBindingMode": "WaitForFirstConsumer"},
        f"its first consumer goes to node n1, and StorageClass local makes the volume; where that lasts, {DESCRIBE}",
    ),
    "its class binds at once": (
        claim("Pending", storageClassName="nfs"),
        {"volumeBindingMode": "Immediate"},
        f"StorageClass nfs has not given it a volume; where that lasts, {DESCRIBE}",
    ),
    "a class without a mode binds at once": (
        claim("Pending", storageClassName="nfs"),
        {},
        f"StorageClass nfs has not given it a volume; where that lasts, {DESCRIBE}",
    ),
    "it waits for a volume made by hand": (
        claim("Pending", storageClassName=""),
        None,
        f"it has an empty storageClassName, so it waits for a PersistentVolume that fits; {DESCRIBE}",
    ),
}


@pytest.mark.parametrize("case", PENDING)
def test_a_pending_claim_says_what_it_waits_for(case: str) -> None:
    seen, storage_class, why = PENDING[case]
    mode = storage_class.get("volumeBindingMode", "") if storage_class is not None else None
    status, again = plan_cache(CacheObservation(make_cache(), seen, [], binding_mode=mode), now=NOW)
    found = told(status.conditions)
    assert found["Ready"] == ("False", "ClaimPending", f"PersistentVolumeClaim serving/models is not bound: {why}")
    assert "Stalled" not in found
    assert again == 3


DELETED = Claim.parse(
    body("Bound") | {"metadata": {"name": "models", "uid": "u", "deletionTimestamp": "2026-01-01T00:00:00Z"}}
)
UNUSABLE: dict[str, tuple[Claim, str]] = {
    "only one pod may mount it": (claim("Bound", accessModes=["ReadWriteOncePod"]), "asks for ReadWriteOncePod: a Job"),
    "nobody may write": (claim("Bound", accessModes=["ReadOnlyMany"]), "asks for ReadOnlyMany: a Job writes"),
    "a block device": (claim("Pending", volumeMode="Block"), "has volumeMode Block: a cache needs a file system"),
    "it is being deleted": (DELETED, "is being deleted, which waits for the pods that mount it"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_a_claim_that_can_not_be_a_cache_says_why(case: str) -> None:
    seen, why = UNUSABLE[case]
    status, _ = plan_cache(CacheObservation(make_cache(), seen, []), now=NOW)
    found = told(status.conditions)
    assert found["Ready"][:2] == ("False", "ClaimUnusable")
    assert found["Ready"][2].startswith(f"PersistentVolumeClaim serving/models {why}")
    assert found["Stalled"] == ("True", *found["Ready"][1:])


def test_a_claim_that_was_refused() -> None:
    refused = ReasonError(Reason.CLAIM_REFUSED, "exceeded quota")
    status, again = plan_cache(CacheObservation(make_cache(), None, [], refused=refused), now=NOW)
    assert told(status.conditions)["Ready"] == ("False", "ClaimRefused", "exceeded quota")
    assert (status.claim_name, status.claim_uid, status.access_modes, again) == ("models", None, None, 10)


def pod(name: str, node: str | None, phase: str = "Running") -> Pod:
    spec = {"nodeName": node} if node else {}
    return Pod.parse({"metadata": {"name": name}, "spec": spec, "status": {"phase": phase}})


def test_a_claim_of_one_node_names_the_node_and_who_waits() -> None:
    seen = claim("Bound", accessModes=["ReadWriteOnce"])
    pods = [pod("a", "n1"), pod("b", "n1", "Pending"), pod("done", "n2", "Succeeded"), pod("c", None, "Pending")]
    status, _ = plan_cache(CacheObservation(make_cache(), seen, [], pods=pods), now=NOW)
    assert told(status.conditions)["SingleNode"] == (
        "True",
        "ReadWriteOnce",
        "PersistentVolumeClaim models is not ReadWriteMany, so engines and Jobs are kept on one node: node n1 (2 pods); "
        "1 pod waiting for a place there",
    )
    assert told(status.conditions)["Ready"][0] == "True"
    status, _ = plan_cache(CacheObservation(make_cache(), seen, []), now=NOW)
    assert "on one node: no node yet; 0 pods waiting" in told(status.conditions)["SingleNode"][2]


def test_a_claim_of_many_nodes_is_no_single_node() -> None:
    status, _ = plan_cache(CacheObservation(make_cache(), claim("Bound"), []), now=NOW)
    assert told(status.conditions)["SingleNode"] == ("False", "ReadWriteMany", "pods on any node can mount the claim")


def owned_by(kind: str, uid: str) -> list[dict[str, Any]]:
    return [{"kind": kind, "name": "default", "uid": uid, "controller": True}]


OURS = {"app.kubernetes.io/managed-by": "lora-operator", "lora-operator.dev/modelcache": "default"}
TEMPLATE = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "10Gi"}}}


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        pytest.param({"labels": OURS}, None, id="it was kept"),
        pytest.param(
            {"labels": OURS | {"a": "b"}, "ownerReferences": owned_by("ModelCache", "uid-cache")}, None, id="own"
        ),
        pytest.param({}, "NameTaken", id="it has no labels"),
        pytest.param({"labels": OURS | {"lora-operator.dev/modelcache": "x"}}, "NameTaken", id="of another cache"),
        pytest.param({"labels": {"lora-operator.dev/modelcache": "default"}}, "NameTaken", id="managed by others"),
        pytest.param(
            {"labels": OURS, "ownerReferences": owned_by("ModelCache", "uid-old")}, "ClaimUnusable", id="it goes soon"
        ),
    ],
)
def test_whose_claim_of_that_name_it_is(metadata: dict[str, Any], reason: str | None) -> None:
    error = why_not_ours(make_cache(template=TEMPLATE), Claim.parse({"metadata": {"name": "default", **metadata}}))
    assert (error.reason if error else None) == reason
    if error:
        assert error.message.startswith("PersistentVolumeClaim serving/default ")


VOLUME = VolumeFigures(total_bytes=100 * 2**30, free_bytes=20 * 2**30, used_bytes=50 * 2**30, time=NOW)

NOTED = VOLUME.model_copy(update={"claim_capacity": "10Gi"})


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({}, ("False", "EnoughSpace", "80Gi of the volume's 100Gi are taken, 80%")),
        (
            {"warnAtPercent": 80},
            ("True", "NearlyFull", "80Gi of the volume's 100Gi are taken, 80% (spec.warnAtPercent: 80)"),
        ),
        ({"capacity": "52Gi"}, ("True", "NearlyFull", "50Gi of the 52Gi that the cache may hold are taken, 96%")),
    ],
)
def test_a_nearly_full_volume_is_told(spec: dict[str, Any], expected: tuple[str, str, str]) -> None:
    cache = make_cache(**spec)
    status, _ = plan_cache(CacheObservation(cache, claim("Bound"), (), volume=VOLUME), now=NOW)
    said = told(status.conditions)["SpaceLow"]
    assert said[:2] == expected[:2]
    assert said[2].startswith(expected[2])
    assert ", as of 2026-01-02 03:04:05Z; the next Job looks again" in said[2]
    assert (status.used, status.free, status.volume) == ("50Gi", "20Gi", NOTED)
    later = cache.model_copy(update={"status": through_the_api(status)})
    again, _ = plan_cache(CacheObservation(later, claim("Bound"), ()), now=LATER)
    assert again.volume == NOTED, "what a Job told stays until another one tells more"


def test_a_volume_that_was_enlarged_is_not_called_full_by_what_it_was() -> None:
    cache = make_cache(warnAtPercent=80)
    status, _ = plan_cache(CacheObservation(cache, claim("Bound"), (), volume=VOLUME), now=NOW)
    assert told(status.conditions)["SpaceLow"][:2] == ("True", "NearlyFull")
    cache = cache.model_copy(update={"status": through_the_api(status)})
    grown = Claim.parse(body("Bound") | {"status": {"phase": "Bound", "capacity": {"storage": "20Gi"}}})
    status, _ = plan_cache(CacheObservation(cache, grown, (), volume=VOLUME), now=LATER)
    assert told(status.conditions)["SpaceLow"] == (
        "Unknown",
        "VolumeResized",
        "PersistentVolumeClaim models has 20Gi, and had 10Gi when a Job last looked, as of 2026-01-02 03:04:05Z; the next Job "
        "looks again",
    )
    bounded = cache.model_copy(update={"spec": cache.spec.model_copy(update={"capacity": "52Gi"})})
    status, _ = plan_cache(CacheObservation(bounded, grown, ()), now=LATER)
    assert told(status.conditions)["SpaceLow"][:2] == ("True", "NearlyFull"), "the cache's own bound is as it was"
    cache = cache.model_copy(update={"status": through_the_api(status)})
    looked = VOLUME.model_copy(update={"total_bytes": 200 * 2**30, "free_bytes": 120 * 2**30, "time": LATER})
    status, _ = plan_cache(CacheObservation(cache, grown, (), volume=looked), now=LATER)
    assert told(status.conditions)["SpaceLow"][:2] == ("False", "EnoughSpace")


def test_nothing_is_said_of_room_before_a_job_has_looked() -> None:
    status, _ = plan_cache(CacheObservation(make_cache(), claim("Bound"), ()), now=NOW)
    assert "SpaceLow" not in told(status.conditions)
    assert (status.used, status.free) == (None, None)


def test_a_volume_that_does_not_tell_its_size() -> None:
    figures = VOLUME.model_copy(update={"total_bytes": 0, "free_bytes": 0})
    status, _ = plan_cache(CacheObservation(make_cache(), claim("Bound"), (), volume=figures), now=NOW)
    assert told(status.conditions)["SpaceLow"] == ("False", "EnoughSpace", "the volume does not tell its size")
    assert (status.used, status.free) == ("50Gi", None)
