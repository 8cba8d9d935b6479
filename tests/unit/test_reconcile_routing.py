"""What is looked at after a change: everything that the change may mean something to, and not the whole world each time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from lora_operator.kube.kinds import Kind
from lora_operator.reconcile.store import Key
from tests.unit.builders import engine_pod, make_conditions, make_job, make_workload, not_ready, ready
from tests.unit.small_world import SmallWorld

SQL, CHAT = Key(Kind.LORA_ADAPTER, "team-a", "sql"), Key(Kind.LORA_ADAPTER, "team-b", "chat")
LLAMA, OTHER = Key(Kind.VLLM_DEPLOYMENT, "serving", "llama"), Key(Kind.VLLM_DEPLOYMENT, "serving", "other")
FAR = Key(Kind.VLLM_DEPLOYMENT, "elsewhere", "far")
CACHE = Key(Kind.MODEL_CACHE, "serving", "default")
BASE, ARTIFACT = Key(Kind.MODEL_ARTIFACT, "serving", "base-1"), Key(Kind.MODEL_ARTIFACT, "serving", "sql-0a1b2c3d4e")

Body = dict[str, Any]


def meta(key: Key, *, generation: int = 1, **more: Any) -> Body:
    return {"name": key.name, "namespace": key.namespace, "uid": f"uid-{key.name}", "generation": generation, **more}


def adapter(key: Key = SQL, *, deployment: str = "llama", served: str | None = None, **more: Any) -> Body:
    spec: Body = {
        "source": {"huggingFace": {"repo": "org/x"}},
        "vllmDeploymentRef": {"name": deployment, "namespace": "serving"},
    }
    if served:
        spec["servedName"] = served
    status = more.pop("status", {})
    return {"metadata": meta(key, **more), "spec": spec, "status": status}


def deployment(key: Key = LLAMA, *, status: Mapping[str, Any] | None = None, **more: Any) -> Body:
    return {
        "metadata": meta(key, **more),
        "spec": {
            "model": {"source": {"huggingFace": {"repo": "m/b"}}, "servedNames": ["m"]},
            "engine": {"image": "v"},
        },
        "status": dict(status or {}),
    }


def cache(*, conditions: Any = None, status: Mapping[str, Any] | None = None, **more: Any) -> Body:
    return {
        "metadata": meta(CACHE, **more),
        "spec": {"storage": {"existingClaim": "models"}},
        "status": {**(status or {}), "conditions": make_conditions(ready() if conditions is None else conditions)},
    }


def artifact(
    key: Key = ARTIFACT, *, base: str | None = "base-1", conditions: Any = None, status: Mapping[str, Any] | None = None
) -> Body:
    spec: Body = {
        "cacheRef": {"name": "default"},
        "type": "Adapter" if base else "BaseModel",
        "source": {"huggingFace": {"repo": "org/x"}},
    }
    if base:
        spec["baseModelRef"] = {"name": base}
    return {
        "metadata": meta(key),
        "spec": spec,
        "status": {**(status or {}), "conditions": make_conditions(conditions)},
    }


@pytest.fixture
def world() -> SmallWorld:
    """Two adapters of one deployment, another deployment beside it and one elsewhere, a cache with two artifacts."""
    world = SmallWorld()
    world.put(Kind.LORA_ADAPTER, adapter(SQL))
    world.put(Kind.LORA_ADAPTER, adapter(CHAT))
    for key in (LLAMA, OTHER, FAR):
        world.put(Kind.VLLM_DEPLOYMENT, deployment(key))
    world.put(Kind.MODEL_CACHE, cache())
    world.put(Kind.MODEL_ARTIFACT, artifact(BASE, base=None))
    world.put(Kind.MODEL_ARTIFACT, artifact(ARTIFACT))
    return world


def test_a_new_adapter(world: SmallWorld) -> None:
    third = Key(Kind.LORA_ADAPTER, "team-c", "third")
    assert world.put(Kind.LORA_ADAPTER, adapter(third)) == {third, LLAMA}


def test_an_adapter_whose_status_changed_is_looked_at_alone(world: SmallWorld) -> None:
    assert world.put(Kind.LORA_ADAPTER, adapter(SQL, status={"readyPods": "1/1"})) == {SQL}


def test_an_artifact_that_a_status_speaks_of_no_longer_may_go(world: SmallWorld) -> None:
    place = {"namespace": ARTIFACT.namespace, "name": ARTIFACT.name}
    assert world.put(Kind.LORA_ADAPTER, adapter(SQL, status={"artifactRef": place})) == {SQL}
    assert world.put(Kind.LORA_ADAPTER, adapter(SQL, status={"artifactRef": place | {"name": "x"}})) == {SQL, ARTIFACT}
    told = {"modelArtifact": "base-1", "tokenizerArtifact": "tok-1"}
    assert world.put(Kind.VLLM_DEPLOYMENT, deployment(status=told)) == {LLAMA}
    assert world.put(Kind.VLLM_DEPLOYMENT, deployment(status=told | {"modelArtifact": "base-2"})) == {LLAMA, BASE}


def test_an_adapter_that_takes_a_name_is_news_to_its_rivals(world: SmallWorld) -> None:
    assert world.put(Kind.LORA_ADAPTER, adapter(SQL, served="chat", generation=2)) == {SQL, CHAT, LLAMA}


def test_an_adapter_that_gives_a_name_up_too(world: SmallWorld) -> None:
    world.put(Kind.LORA_ADAPTER, adapter(SQL, served="chat", generation=2))
    assert world.put(Kind.LORA_ADAPTER, adapter(SQL, served="sql", generation=3)) == {SQL, CHAT, LLAMA}


def test_an_adapter_that_goes_leaves_its_name_to_its_rivals(world: SmallWorld) -> None:
    world.put(Kind.LORA_ADAPTER, adapter(SQL, served="chat", generation=2))
    assert world.drop(SQL) == {SQL, CHAT, LLAMA}


def test_an_adapter_that_moves_is_news_to_both_deployments(world: SmallWorld) -> None:
    assert world.put(Kind.LORA_ADAPTER, adapter(SQL, deployment="other", generation=2)) == {SQL, LLAMA, OTHER}


def test_an_adapter_that_was_made_anew_is_news_though_its_generation_is_the_same(world: SmallWorld) -> None:
    assert world.put(Kind.LORA_ADAPTER, adapter(SQL, uid="uid-2")) >= {SQL, LLAMA}


def test_an_adapter_that_can_no_longer_be_read_is_still_looked_at(world: SmallWorld) -> None:
    broken = adapter(SQL, generation=2)
    broken["spec"]["servedName"] = 5
    assert world.put(Kind.LORA_ADAPTER, broken) >= {SQL, LLAMA}


def test_one_that_could_not_be_read_is_news_to_every_list_when_it_goes_or_can_be_read(world: SmallWorld) -> None:
    """Its entry may be in any list, by what it asked for before."""
    broken = adapter(SQL, generation=2)
    broken["spec"]["servedName"] = 5
    world.put(Kind.LORA_ADAPTER, broken)
    assert world.put(Kind.LORA_ADAPTER, adapter(SQL, generation=3, deployment="other")) >= {SQL, LLAMA, OTHER, FAR}
    world.put(Kind.LORA_ADAPTER, broken | {"metadata": meta(SQL, generation=4)})
    assert world.drop(SQL) == {SQL, LLAMA, OTHER, FAR}


def test_a_deployment_whose_spec_changed_is_news_to_its_adapters(world: SmallWorld) -> None:
    assert world.put(Kind.VLLM_DEPLOYMENT, deployment(generation=2)) == {LLAMA, SQL, CHAT}
    assert world.drop(LLAMA) == {LLAMA, SQL, CHAT}


def test_a_deployments_status_is_not(world: SmallWorld) -> None:
    assert world.put(Kind.VLLM_DEPLOYMENT, deployment(status={"readyPods": "1/2"})) == {LLAMA}


EVERYTHING_OF_THE_CACHE = {CACHE, BASE, ARTIFACT, LLAMA, OTHER, SQL, CHAT}
CACHE_NEWS: dict[str, Body] = {
    "its spec": cache(generation=2),
    "it was made anew": cache(uid="uid-2"),
    "it is the default now": cache(annotations={"lora-operator.dev/is-default-cache": "true"}),
    "its claim was looked at": cache(status={"claimName": "models", "accessModes": ["ReadWriteOnce"]}),
    "it is not Ready any more": cache(conditions=not_ready("ClaimNotFound")),
}


@pytest.mark.parametrize("case", CACHE_NEWS)
def test_what_is_news_to_all_that_use_a_cache(world: SmallWorld, case: str) -> None:
    assert world.put(Kind.MODEL_CACHE, CACHE_NEWS[case]) == EVERYTHING_OF_THE_CACHE


def pod_of_the_cache(node: str | None = None, phase: str = "Pending", label: str = "default") -> Body:
    return {
        "metadata": {
            "name": "job-pod",
            "namespace": CACHE.namespace,
            "uid": "uid-pod",
            "labels": {"lora-operator.dev/modelcache": label},
        },
        "spec": {"nodeName": node} if node else {},
        "status": {"phase": phase},
    }


def test_where_pods_of_a_one_node_cache_are_is_news_to_it(world: SmallWorld) -> None:
    key = Key(Kind.POD, CACHE.namespace, "job-pod")
    assert world.put(Kind.POD, pod_of_the_cache()) == {CACHE}
    assert world.put(Kind.POD, pod_of_the_cache("n1")) == {CACHE}
    assert world.put(Kind.POD, pod_of_the_cache("n1", "Running")) == set()
    assert world.put(Kind.POD, pod_of_the_cache("n1", "Succeeded")) == {CACHE}
    assert world.drop(key) == {CACHE}
    assert world.put(Kind.POD, pod_of_the_cache(label="no-such-cache") | {}) == set()


def test_a_cache_that_comes_and_goes(world: SmallWorld) -> None:
    assert world.drop(CACHE) == EVERYTHING_OF_THE_CACHE
    assert world.put(Kind.MODEL_CACHE, cache()) == EVERYTHING_OF_THE_CACHE


def test_another_reason_why_it_is_not_ready(world: SmallWorld) -> None:
    world.put(Kind.MODEL_CACHE, cache(conditions=not_ready("ClaimNotFound")))
    assert world.put(Kind.MODEL_CACHE, cache(conditions=not_ready("ClaimPending"))) == EVERYTHING_OF_THE_CACHE


def test_what_a_cache_holds_is_news_to_nobody_else(world: SmallWorld) -> None:
    """Every download counts there: thousands of them must not wake thousands of adapters each."""
    assert world.put(Kind.MODEL_CACHE, cache(status={"artifacts": 5, "size": "1Gi"})) == {CACHE}


def test_an_artifact_that_gets_ready_counts_in_its_cache(world: SmallWorld) -> None:
    assert world.put(Kind.MODEL_ARTIFACT, artifact(conditions=ready())) == {ARTIFACT, CACHE}


def test_a_base_model_that_gets_ready_lets_adapters_artifacts_go(world: SmallWorld) -> None:
    assert world.put(Kind.MODEL_ARTIFACT, artifact(BASE, base=None, conditions=ready())) == {BASE, CACHE, ARTIFACT}


def test_a_ready_base_model_that_goes(world: SmallWorld) -> None:
    world.put(Kind.MODEL_ARTIFACT, artifact(BASE, base=None, conditions=ready()))
    assert world.drop(BASE) == {BASE, CACHE, ARTIFACT}


def test_progress_is_news_to_nobody_else(world: SmallWorld) -> None:
    assert world.put(Kind.MODEL_ARTIFACT, artifact(conditions=not_ready("Downloading", "1%"))) == {ARTIFACT}
    assert world.put(Kind.MODEL_ARTIFACT, artifact(conditions=not_ready("Downloading", "2%"))) == {ARTIFACT}


def test_a_failure_may_tell_of_the_volume(world: SmallWorld) -> None:
    failure = {"attempt": 1, "reason": "CacheNotWritable", "message": "m", "time": "2026-01-01T00:00:00Z"}
    status = {"lastFailure": failure}
    assert world.put(Kind.MODEL_ARTIFACT, artifact(status=status)) == {ARTIFACT, CACHE}


def test_a_failed_artifact_that_goes_may_free_its_cache_of_the_blame(world: SmallWorld) -> None:
    failure = {"attempt": 1, "reason": "CacheNotWritable", "message": "m", "time": "2026-01-01T00:00:00Z"}
    world.put(Kind.MODEL_ARTIFACT, artifact(status={"lastFailure": failure}))
    assert world.drop(ARTIFACT) == {ARTIFACT, CACHE}


def test_a_job_is_its_artifacts(world: SmallWorld) -> None:
    assert world.put(Kind.JOB, make_job()) == {ARTIFACT}
    assert world.drop(Key(Kind.JOB, "serving", "sql-0a1b2c3d4e-1")) == {ARTIFACT}


def test_a_job_without_an_owner_is_nobodys(world: SmallWorld) -> None:
    job = make_job()
    del job["metadata"]["ownerReferences"]
    assert world.put(Kind.JOB, job) == set()


def fetch_pod() -> Body:
    return {
        "metadata": {
            "name": "x",
            "namespace": "serving",
            "uid": "uid-x",
            "labels": {"app.kubernetes.io/component": "fetch"},
            "ownerReferences": [{"kind": "Job", "name": "sql-0a1b2c3d4e-1", "uid": "uid-job-1", "controller": True}],
        }
    }


def test_a_jobs_pod_is_the_artifacts(world: SmallWorld) -> None:
    assert world.put(Kind.POD, fetch_pod()) == set(), "whose it is will be known by the Job, which tells of itself"
    world.put(Kind.JOB, make_job())
    assert world.put(Kind.POD, fetch_pod()) == {ARTIFACT}
    assert world.drop(Key(Kind.POD, "serving", "x")) == {ARTIFACT}


POD = Key(Kind.POD, "serving", "llama-0")


def test_an_engine_pod_is_news_to_the_deployments_beside_it(world: SmallWorld) -> None:
    assert world.put(Kind.POD, engine_pod()) == {POD, LLAMA, OTHER}
    assert world.drop(POD) == {POD, LLAMA, OTHER}


def test_so_is_one_that_loses_its_labels(world: SmallWorld) -> None:
    world.put(Kind.POD, engine_pod())
    bare = engine_pod()
    bare["metadata"]["labels"] = {}
    assert world.put(Kind.POD, bare) == {POD, LLAMA, OTHER}


@pytest.mark.parametrize("kind", [Kind.DEPLOYMENT, Kind.CONFIG_MAP, Kind.SERVICE])
def test_a_child_is_its_owners(world: SmallWorld, kind: Kind) -> None:
    assert world.put(kind, make_workload()) == {LLAMA}
    assert world.drop(Key(kind, "serving", "llama")) == {LLAMA}


def test_a_child_that_is_taken_away_from_its_owner_is_news_to_it(world: SmallWorld) -> None:
    world.put(Kind.SERVICE, make_workload())
    orphan = make_workload()
    orphan["metadata"]["ownerReferences"] = []
    assert world.put(Kind.SERVICE, orphan) == {LLAMA}


def namespace(**labels: str) -> Body:
    return {"metadata": {"name": "team-a", "uid": "uid-ns", "labels": labels}}


def test_a_namespaces_labels_are_news_to_its_adapters_and_to_who_lists_them(world: SmallWorld) -> None:
    assert world.put(Kind.NAMESPACE, namespace(team="a")) == {SQL, LLAMA}
    assert world.put(Kind.NAMESPACE, namespace(team="a")) == set()
    assert world.put(Kind.NAMESPACE, namespace(team="b")) == {SQL, LLAMA}
    assert world.drop(Key(Kind.NAMESPACE, "", "team-a")) == {SQL, LLAMA}
