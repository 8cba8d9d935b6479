"""What nests deep, or is big and not ours: it is cut before anything gives up on it, and what is left is known for what it is."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from lora_operator.constants import ANNOTATION_EVICT, LABEL_CACHE
from lora_operator.kube.answers import MAX_TEXT_NESTING, flattened, parsed, refusal
from lora_operator.kube.kinds import METADATA_ONLY, Kind
from lora_operator.kube.pods import Pod, PodSpec
from lora_operator.kube.watch_lines import Lines
from lora_operator.kube.workloads import Job, Workload
from lora_operator.reconcile.bodies import MAX_NESTING, is_too_deep, slim
from lora_operator.reconcile.store import Key, Store
from tests.unit.builders import engine_pod, make_adapter, make_deployment, make_workload

DEEP = 5_000
GROUP = "lora-operator.dev"


def text(levels: int, shape: str = "[]") -> bytes:
    opening = "[" if shape == "[]" else '{"a]}\\"":'
    return f'{{"metadata":{{"name":"x"}},"s":"[{{\\"","deep":{opening * levels}1{shape[1] * levels},"z":[2]}}'.encode()


@pytest.mark.parametrize("shape", ["[]", "{}"])
def test_what_is_too_deep_is_cut_and_all_else_stays(shape: str) -> None:
    found = parsed("get", text(DEEP, shape))
    assert (found["metadata"], found["s"], found["z"]) == ({"name": "x"}, '[{"', [2])
    assert is_too_deep(found)
    assert refusal("get", 500, text(DEEP, shape))


@pytest.mark.parametrize("levels", [1, MAX_TEXT_NESTING - 1])
def test_what_is_not_stays_as_it_is(levels: int) -> None:
    assert json.loads(flattened(text(levels))) == json.loads(text(levels))


def test_depth_is_counted_in_levels() -> None:
    def nested(levels: int) -> Any:
        return {"a": nested(levels - 1)} if levels > 1 else {}

    assert not is_too_deep(nested(MAX_NESTING))
    assert is_too_deep(nested(MAX_NESTING + 1))


async def test_a_watch_s_lines_can_all_be_parsed() -> None:
    class Stream:
        async def iter_chunked(self, size: int) -> AsyncIterator[bytes]:
            whole = b"\n".join([b'{"type":"ADDED"}', text(DEEP), b"", b"[" * 1000 + b"{", b'{"type":"LAST"}'])
            for start in range(0, len(whole), 1000):
                yield whole[start : start + 1000]

    lines = [line async for line in Lines(Stream()).iter_chunked(1)]
    read = [json.loads(line) for line in lines if line.strip()]
    assert [one.get("type") for one in read] == ["ADDED", None, "LAST"], "what is no JSON is left out"
    assert is_too_deep(read[1])


def stored(kind: Kind, body: dict[str, Any]) -> Store:
    store = Store()
    store.upsert(kind, body)
    return store


def test_an_object_that_nests_deep_is_invalid_and_has_a_say_in_its_own_namespace() -> None:
    body = make_deployment().model_dump(mode="json", by_alias=True)
    deep = parsed("get", text(DEEP))["deep"]
    body["spec"]["podTemplate"] = {"spec": {"x": deep}}
    store = stored(Kind.VLLM_DEPLOYMENT, body)
    key = Key(Kind.VLLM_DEPLOYMENT, "serving", "llama")
    assert "nests deeper than" in store.invalid[key]
    assert list(store.invalid_in("serving")) == [key]
    assert list(store.invalid_in("elsewhere")) == []
    body["spec"]["podTemplate"], body["metadata"]["resourceVersion"] = None, "9"
    store.upsert(Kind.VLLM_DEPLOYMENT, body)
    assert not store.invalid


@pytest.mark.parametrize(
    ("change", "concerned"),
    [
        ({}, {"serving", "team-a"}),
        ({"vllmDeploymentRef": {"name": "llama", "namespace": "other"}}, {"other", "team-a"}),
        ({"vllmDeploymentRef": {"namespace": "other"}}, {"other", "team-a", "serving", "any"}),
        ({"vllmDeploymentRef": 5}, {"other", "team-a", "serving", "any"}),
    ],
    ids=["its default", "another namespace", "no name", "no reference"],
)
def test_an_adapter_that_can_t_be_read_has_a_say_where_its_deployment_is(
    change: dict[str, Any], concerned: set[str]
) -> None:
    body = make_adapter().model_dump(mode="json", by_alias=True, exclude_none=True)
    body["spec"] |= {"source": 5, **change}
    store = stored(Kind.LORA_ADAPTER, body)
    everywhere = ("serving", "team-a", "other", "any")
    assert {place for place in everywhere if any(True for _ in store.invalid_in(place))} == concerned


NOTES = {"someone.example/x": "y" * 1000, f"{GROUP}/refresh": "1"}


@pytest.mark.parametrize("kind", [Kind.CONFIG_MAP, Kind.SERVICE, Kind.NAMESPACE])
def test_of_some_kinds_the_metadata_alone_is_kept(kind: Kind) -> None:
    body = {"metadata": {"name": "x", "labels": {"a": "b"}, "managedFields": [1]}, "data": {"a": "b"}, "spec": {}}
    body["metadata"]["annotations"] = NOTES  # type: ignore[index]
    kept = kind.info.view.parse(body)
    labels = {"a": "b"} if kind is Kind.NAMESPACE else {}
    assert kept == kind.info.view(name="x", labels=labels, annotations={f"{GROUP}/refresh": "1"})
    assert any(kind.value.lower() in path for path in METADATA_ONLY), "nor is more asked for"


@pytest.mark.parametrize("kind", [Kind.CONFIG_MAP, Kind.POD, Kind.JOB, Kind.DEPLOYMENT, Kind.LORA_ADAPTER])
def test_what_anybody_may_fill_with_any_amount_takes_no_memory(kind: Kind) -> None:
    many = {f"lora-operator.dev/{number}": "x" * 63 for number in range(9000)}
    owners = [{"kind": "A", "name": "a" * 200, "uid": str(number), "controller": number == 7} for number in range(999)]
    container = {"name": "c", "ports": [{"containerPort": n, "name": "http"} for n in range(9999)]}
    pod = {"containers": [container] * 200}
    metadata: dict[str, Any] = {
        "name": "x",
        "labels": many | {LABEL_CACHE: "c"},
        "annotations": many | {ANNOTATION_EVICT: "x" * 9999},
    }
    metadata |= {"finalizers": list(many), "ownerReferences": owners}
    template = {"metadata": {"labels": many}, "spec": pod}
    body = {"metadata": metadata, "spec": pod if kind is Kind.POD else {"template": template}}
    if kind is Kind.LORA_ADAPTER:
        kept = slim(body)["metadata"]
        assert (kept["labels"], kept["annotations"]) == ({LABEL_CACHE: "c"}, {ANNOTATION_EVICT: "x" * 1024})
        assert kept["ownerReferences"] == owners[7:8]
        assert "finalizers" not in kept
        return
    view = kind.info.view.parse(body)
    assert (view.labels, view.annotations) == ({LABEL_CACHE: "c"}, {ANNOTATION_EVICT: "x" * 1024})
    assert view.owner == ("A", "a" * 200, "7")
    assert len(repr(view)) < 20_000, "9,999 ports of 200 containers each"


def test_of_our_own_kinds_others_annotations_are_not_kept() -> None:
    body = make_adapter().model_dump(mode="json", by_alias=True)
    body["metadata"]["annotations"] = NOTES
    [adapter] = stored(Kind.LORA_ADAPTER, body).adapters.values()
    assert adapter.metadata.annotations == {f"{GROUP}/refresh": "1"}


def test_of_pods_jobs_and_deployments_what_is_read_is_kept() -> None:
    big = {"name": "x", "value": "artifacts/sql-abc " + "y" * 10**6}
    pod = engine_pod()
    pod["spec"] = {
        "nodeName": "n",
        "containers": [{"name": "vllm", "ports": [{"name": "http", "containerPort": 1}], "env": [big]}],
    }
    workload = make_workload()
    workload["spec"] = {"replicas": 2, "template": {"metadata": {"labels": {"a": "b"}}, "spec": pod["spec"]}}
    job = {"metadata": {"name": "j"}, "spec": {"suspend": True, "template": {"spec": pod["spec"]}}, "status": {"a": 1}}
    for kind, body in ((Kind.POD, pod), (Kind.DEPLOYMENT, workload), (Kind.JOB, job)):
        assert len(repr(kind.info.view.parse(body))) < 2000
    kept = Pod.parse(pod).spec
    assert kept == PodSpec(node="n", engine_port=1, views=frozenset({"sql-abc"}))
    assert Workload.parse(workload).template == kept
    assert Job.parse(job) == Job(name="j", is_suspended=True)
