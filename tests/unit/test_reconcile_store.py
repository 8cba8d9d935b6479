"""The store: the newest word wins, whatever the order in which words come, and relations are found at once."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from lora_operator.constants import LABEL_ARTIFACT, LABEL_DEPLOYMENT
from lora_operator.kube.kinds import Kind
from lora_operator.names import label_value
from lora_operator.reconcile.store import Key, Store
from tests.unit.builders import take_list


def adapter(
    name: str, version: int, *, namespace: str = "team-a", uid: str = "", deployment: str = "serving/llama", **spec: Any
) -> dict[str, Any]:
    """A LoRAAdapter as the API server sends it."""
    ref_namespace, ref_name = deployment.split("/")
    return {
        "apiVersion": "lora-operator.dev/v1alpha1",
        "kind": "LoRAAdapter",
        "metadata": {
            "name": name,
            "namespace": namespace,
            "uid": uid or f"uid-{namespace}-{name}",
            "resourceVersion": str(version),
            "generation": 1,
            "managedFields": [{"manager": "kubectl"}],
        },
        "spec": {
            "source": {"huggingFace": {"repo": f"org/{name}"}},
            "vllmDeploymentRef": {"name": ref_name, "namespace": ref_namespace},
            **spec,
        },
    }


def pod(name: str, version: int, *, namespace: str = "serving", uid: str = "", **labels: str) -> dict[str, Any]:
    """A Pod with labels, given as deployment= or artifact=."""
    full = {"deployment": LABEL_DEPLOYMENT, "artifact": LABEL_ARTIFACT}
    return {
        "metadata": {
            "name": name,
            "namespace": namespace,
            "uid": uid or f"uid-{name}",
            "resourceVersion": str(version),
            "labels": {full[key]: label_value(value) for key, value in labels.items()},
        }
    }


SQL = ("team-a", "sql")


def test_an_upsert_says_what_was_and_what_is() -> None:
    store = Store()
    first = store.upsert(Kind.LORA_ADAPTER, adapter("sql", 5))
    assert first is not None
    assert (first.kind, first.key, first.old) == (Kind.LORA_ADAPTER, Key(Kind.LORA_ADAPTER, *SQL), None)
    assert first.new == store.adapters[SQL]
    second = store.upsert(Kind.LORA_ADAPTER, adapter("sql", 6, servedName="other"))
    assert second is not None
    assert second.new is not None
    assert second.old == first.new
    assert second.new.served_name == "other"


@pytest.mark.parametrize(("version", "served"), [(9, "first"), (10, "first"), (11, "second"), (100, "second")])
def test_only_a_newer_word_counts(version: int, served: str) -> None:
    store = Store()
    store.upsert(Kind.LORA_ADAPTER, adapter("sql", 10, servedName="first"))
    change = store.upsert(Kind.LORA_ADAPTER, adapter("sql", version, servedName="second"))
    assert (change is not None) == (served == "second")
    assert store.adapters[SQL].served_name == served


def test_resource_versions_are_compared_as_numbers() -> None:
    store = Store()
    store.upsert(Kind.POD, pod("p", 9))
    assert store.upsert(Kind.POD, pod("p", 10)) is not None


def test_an_old_word_never_brings_back_what_is_gone() -> None:
    store = Store()
    store.upsert(Kind.POD, pod("p", 10))
    gone = store.remove(Kind.POD, "serving", "p", uid="uid-p", resource_version="12")
    assert gone is not None
    assert gone.new is None
    assert store.upsert(Kind.POD, pod("p", 11)) is None
    assert store.pods == {}


def test_a_deletion_that_comes_before_the_object_holds_back_the_object() -> None:
    store = Store()
    assert store.remove(Kind.POD, "serving", "p", uid="uid-p", resource_version="12") is None
    assert store.upsert(Kind.POD, pod("p", 11)) is None


def test_an_object_that_left_the_selector_may_come_back_newer() -> None:
    store = Store()
    store.upsert(Kind.POD, pod("p", 10))
    store.remove(Kind.POD, "serving", "p", uid="uid-p", resource_version="12")
    assert store.upsert(Kind.POD, pod("p", 13)) is not None


def test_the_deletion_of_a_former_object_leaves_the_one_that_has_its_name_now() -> None:
    store = Store()
    store.upsert(Kind.POD, pod("p", 10, uid="first"))
    store.upsert(Kind.POD, pod("p", 20, uid="second"))
    assert store.remove(Kind.POD, "serving", "p", uid="first", resource_version="15") is None
    assert store.pods["serving", "p"].uid == "second"


def test_a_late_word_on_a_former_object_does_not_replace_the_one_that_has_its_name_now() -> None:
    store = Store()
    store.upsert(Kind.POD, pod("p", 20, uid="second"))
    assert store.upsert(Kind.POD, pod("p", 10, uid="first")) is None
    assert store.pods["serving", "p"].uid == "second"


def test_a_list_drops_what_is_absent_and_older_and_keeps_what_is_newer() -> None:
    store = Store()
    for name, version in (("kept", 5), ("gone", 6), ("newer", 30)):
        store.upsert(Kind.LORA_ADAPTER, adapter(name, version))
    changes = take_list(store, Kind.LORA_ADAPTER, [adapter("kept", 5), adapter("listed", 19)], "20")
    assert set(store.adapters) == {("team-a", "kept"), ("team-a", "newer"), ("team-a", "listed")}
    assert {(change.key.name, change.new is None) for change in changes} == {("gone", True), ("listed", False)}
    assert store.upsert(Kind.LORA_ADAPTER, adapter("gone", 7)) is None


def test_a_list_that_was_overtaken_by_a_watch_does_not_bring_back_a_deleted_object() -> None:
    store = Store()
    store.upsert(Kind.LORA_ADAPTER, adapter("sql", 5))
    store.remove(Kind.LORA_ADAPTER, "team-a", "sql", uid="uid-team-a-sql", resource_version="21")
    assert take_list(store, Kind.LORA_ADAPTER, [adapter("sql", 5)], "20") == []
    assert store.adapters == {}


def test_a_list_of_one_kind_leaves_the_others() -> None:
    store = Store()
    store.upsert(Kind.POD, pod("p", 1))
    take_list(store, Kind.JOB, [], "20")
    assert list(store.pods) == [("serving", "p")]


def test_an_object_that_does_not_fit_its_model_is_invalid_and_not_gone() -> None:
    store = Store()
    store.upsert(Kind.LORA_ADAPTER, adapter("sql", 5))
    broken = adapter("sql", 6)
    del broken["spec"]["vllmDeploymentRef"]
    change = store.upsert(Kind.LORA_ADAPTER, broken)
    key = Key(Kind.LORA_ADAPTER, *SQL)
    assert change is not None
    assert (change.old is not None, change.new) == (True, None)
    assert "vllmDeploymentRef" in store.invalid[key]
    assert store.keys(Kind.LORA_ADAPTER) == [key]
    assert store.adapters == {}
    store.upsert(Kind.LORA_ADAPTER, adapter("sql", 7))
    assert store.invalid == {}
    assert SQL in store.adapters


def test_an_invalid_object_goes_like_any_other() -> None:
    store = Store()
    broken = adapter("sql", 6, servedName="a,b")
    store.upsert(Kind.LORA_ADAPTER, broken)
    assert "a,b" not in store.invalid[Key(Kind.LORA_ADAPTER, *SQL)], "values don't belong into messages"
    assert store.remove(Kind.LORA_ADAPTER, "team-a", "sql") is not None
    assert store.invalid == {}


def test_relations_follow_what_changes() -> None:
    store = Store()
    long_name = "x" * 100
    store.upsert(Kind.LORA_ADAPTER, adapter("sql", 1))
    store.upsert(Kind.LORA_ADAPTER, adapter("sql", 2, namespace="team-b", servedName="sql"))
    store.upsert(Kind.LORA_ADAPTER, adapter("chat", 3))
    store.upsert(Kind.POD, pod("engine", 4, deployment=long_name))
    store.upsert(Kind.POD, pod("fetch", 5, artifact="sql-abc"))
    store.upsert(Kind.JOB, pod("job", 6, artifact="sql-abc"))
    assert [a.key for a in store.adapters_of(("serving", "llama"))] == [("team-a", "chat"), SQL, ("team-b", "sql")]
    assert [a.key for a in store.adapters_named(("serving", "llama"), "sql")] == [SQL, ("team-b", "sql")]
    assert [p.name for p in store.pods_of_deployment(("serving", long_name))] == ["engine"]
    assert [p.name for p in store.pods_of_artifact(("serving", "sql-abc"))] == ["fetch"]
    assert [p.name for p in store.jobs_of_artifact(("serving", "sql-abc"))] == ["job"]
    assert store.jobs_of_artifact(("other", "sql-abc")) == []
    store.upsert(Kind.LORA_ADAPTER, adapter("sql", 7, deployment="serving/other"))
    assert [a.key for a in store.adapters_of(("serving", "llama"))] == [("team-a", "chat"), ("team-b", "sql")]
    store.remove(Kind.LORA_ADAPTER, "team-b", "sql")
    assert store.adapters_named(("serving", "llama"), "sql") == []


def test_bodies_are_kept_without_managed_fields() -> None:
    store = Store()
    body = pod("p", 1)
    body["metadata"]["managedFields"] = [{"manager": "kubelet"}]
    store.upsert(Kind.POD, body)
    assert "kubelet" not in repr(store.pods["serving", "p"])


async def test_nothing_is_synced_before_every_kind_was_listed() -> None:
    store = Store()
    waiting = asyncio.create_task(store.wait_synced())
    for kind in list(Kind)[:-1]:
        store.mark_synced(kind)
    await asyncio.sleep(0)
    assert not store.all_synced
    assert not waiting.done()
    store.mark_synced(list(Kind)[-1])
    await asyncio.wait_for(waiting, 1)
    assert store.all_synced


def test_five_thousand_adapters_are_taken_relisted_and_found_quickly() -> None:
    store = Store()
    bodies = [adapter(f"a{n}", n + 1, deployment=f"serving/d{n % 10}") for n in range(5000)]
    started = time.process_time()
    for body in bodies:
        store.upsert(Kind.LORA_ADAPTER, body)
    assert take_list(store, Kind.LORA_ADAPTER, bodies, "5001") == []
    for n in range(500):
        assert len(store.adapters_of(("serving", f"d{n % 10}"))) == 500
    assert time.process_time() - started < 30, (
        "seconds of CPU; about 0.5 on an idle machine, hours if it were quadratic"
    )
