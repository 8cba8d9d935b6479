"""What reconcilers tell one another: who wants what, and that nothing counts as unwanted before all have been asked."""

from __future__ import annotations

from typing import Any

import pytest

from lora_operator.kube.kinds import Kind
from lora_operator.plan.adapter_list import Decision, Drop, Entry, Unknown
from lora_operator.reconcile.records import ModelWant, Records
from lora_operator.reconcile.store import Key, Store
from tests.unit.builders import make_decision

SQL, CHAT = ("team-a", "sql"), ("team-b", "chat")
LLAMA = ("serving", "llama")
ONE, TWO = ("serving", "artifact-1"), ("serving", "artifact-2")
SECRET, SECRET_2 = ("team-a", "hf", "token", "uid-1"), ("team-a", "hf", "token", "uid-2")


def decision(artifact: tuple[str, str] | None = ONE, entry: Entry = Drop(), **more: Any) -> Decision:  # noqa: B008  frozen
    return make_decision(entry, artifact=artifact, **more)


def want(artifact: tuple[str, str] | None = ONE, **more: Any) -> ModelWant:
    values: dict[str, Any] = {"uid": "uid-llama", "generation": 1, "credentials": None}
    return ModelWant(artifact=artifact, **(values | more))


def test_a_decision_makes_a_wanter() -> None:
    records = Records()
    assert records.wanters(ONE) == {}
    assert records.publish_decision(SQL, decision(credentials=SECRET)) == {ONE}
    assert records.wanters(ONE) == {Key(Kind.LORA_ADAPTER, *SQL): SECRET}
    assert records.decision(SQL) == decision(credentials=SECRET)


def test_the_same_decision_again_is_no_news() -> None:
    records = Records()
    records.publish_decision(SQL, decision())
    assert records.publish_decision(SQL, decision()) is None


def test_another_artifact_is_news_to_both() -> None:
    records = Records()
    records.publish_decision(SQL, decision(ONE))
    assert records.publish_decision(SQL, decision(TWO)) == {ONE, TWO}
    assert records.wanters(ONE) == {}
    assert set(records.wanters(TWO)) == {Key(Kind.LORA_ADAPTER, *SQL)}


def test_one_of_which_too_little_is_known_goes_on_wanting_what_it_wanted() -> None:
    records = Records()
    records.publish_decision(SQL, decision(ONE, credentials=SECRET))
    records.publish_decision(SQL, decision(None, Unknown(), generation=2))
    assert records.wanters(ONE) == {Key(Kind.LORA_ADAPTER, *SQL): SECRET}
    assert records.publish_decision(SQL, decision(TWO, generation=2)) == {ONE, TWO}, "the old one has to be told too"


def test_one_of_which_too_little_is_known_goes_on_wanting_what_a_refresh_is_about() -> None:
    records = Records()
    records.publish_decision(SQL, decision(ONE, credentials=SECRET, refreshing=TWO))
    records.publish_decision(SQL, decision(None, Unknown(), generation=2))
    assert records.wanters(TWO) == {Key(Kind.LORA_ADAPTER, *SQL): SECRET}


def test_a_namesake_of_which_too_little_is_known_wants_nothing_of_the_one_before() -> None:
    records = Records()
    records.publish_decision(SQL, decision(ONE, credentials=SECRET))
    records.publish_decision(SQL, decision(None, Unknown(), uid="another"))
    assert records.wanters(ONE) == {}


def test_another_secret_is_lent_at_once_and_the_old_one_no_longer() -> None:
    records = Records()
    records.publish_decision(SQL, decision(credentials=SECRET))
    assert records.publish_decision(SQL, decision(credentials=SECRET_2)) == {ONE}
    assert list(records.wanters(ONE).values()) == [SECRET_2]


def test_what_is_served_stays_wanted_beside_what_a_refresh_is_about() -> None:
    records = Records()
    records.publish_decision(SQL, decision(ONE, credentials=SECRET))
    assert records.publish_decision(SQL, decision(ONE, credentials=SECRET, refreshing=TWO)) == {ONE, TWO}
    for artifact in (ONE, TWO):
        assert list(records.wanters(artifact).values()) == [SECRET]
    assert records.publish_decision(SQL, decision(TWO, credentials=SECRET)) == {ONE, TWO}
    assert records.wanters(ONE) == {}
    assert records.publish_model_want(LLAMA, want(ONE, refreshing=((TWO, SECRET),))) == {ONE, TWO}
    assert records.forget_deployment(LLAMA) == {ONE, TWO}
    assert set(records.wanters(TWO)) == {Key(Kind.LORA_ADAPTER, *SQL)}


def test_a_decision_without_an_artifact_lends_nothing() -> None:
    records = Records()
    records.publish_decision(SQL, decision(credentials=SECRET))
    assert records.publish_decision(SQL, decision(None)) == {ONE}
    assert records.wanters(ONE) == {}
    assert records.publish_decision(SQL, decision(None, generation=2)) == set()


def test_who_is_gone_wants_nothing_and_others_still_do() -> None:
    records = Records()
    records.publish_decision(SQL, decision(credentials=SECRET))
    records.publish_decision(CHAT, decision())
    assert records.forget_adapter(SQL) == {ONE}
    assert records.wanters(ONE) == {Key(Kind.LORA_ADAPTER, *CHAT): None}
    assert records.decision(SQL) is None
    assert records.forget_adapter(SQL) == set()


def test_a_deployment_wants_its_base_model() -> None:
    records = Records()
    assert records.publish_model_want(LLAMA, want()) == {ONE}
    assert records.publish_model_want(LLAMA, want()) is None
    assert records.model_want(LLAMA) == want()
    assert records.publish_model_want(LLAMA, want(TWO)) == {ONE, TWO}
    assert records.publish_model_want(LLAMA, want(None)) == {TWO}
    assert records.wanters(TWO) == {}


def test_a_deployment_wants_what_goes_with_its_base_model_and_lends_each_its_own_secret() -> None:
    records = Records()
    three = ("serving", "artifact-3")
    key = Key(Kind.VLLM_DEPLOYMENT, *LLAMA)
    both = want(credentials=SECRET, auxiliary=((TWO, SECRET_2), (three, None)))
    assert records.publish_model_want(LLAMA, both) == {ONE, TWO, three}
    assert [records.wanters(artifact) for artifact in (ONE, TWO, three)] == [
        {key: SECRET},
        {key: SECRET_2},
        {key: None},
    ]
    assert records.publish_model_want(LLAMA, want(credentials=SECRET, auxiliary=((TWO, None),))) == {ONE, TWO, three}
    assert [records.wanters(artifact) for artifact in (ONE, TWO, three)] == [{key: SECRET}, {key: None}, {}]
    assert records.forget_deployment(LLAMA) == {ONE, TWO}
    assert [records.wanters(artifact) for artifact in (ONE, TWO)] == [{}, {}]


def test_an_adapter_and_a_deployment_of_one_name_are_two() -> None:
    records = Records()
    records.publish_decision(LLAMA, decision())
    records.publish_model_want(LLAMA, want())
    assert len(records.wanters(ONE)) == 2
    assert records.forget_deployment(LLAMA) == {ONE}
    assert set(records.wanters(ONE)) == {Key(Kind.LORA_ADAPTER, *LLAMA)}


def test_a_deployment_that_is_gone_takes_its_list_along() -> None:
    records = Records()
    records.deployments[LLAMA].held = 7
    records.forget_deployment(LLAMA)
    assert (records.deployments, records.deployments.peek(LLAMA).held) == ({}, 0)


def adapter(*, uid: str = "uid-team-a-sql", generation: int = 1, version: str = "1", **spec: Any) -> dict[str, Any]:
    return {
        "metadata": {
            "name": "sql",
            "namespace": "team-a",
            "uid": uid,
            "generation": generation,
            "resourceVersion": version,
        },
        "spec": {
            "source": {"huggingFace": {"repo": "org/sql"}},
            "vllmDeploymentRef": {"name": "llama", "namespace": "serving"},
            **spec,
        },
    }


def deployment(*, uid: str = "uid-llama", generation: int = 1, image: Any = "vllm:1") -> dict[str, Any]:
    return {
        "metadata": {
            "name": "llama",
            "namespace": "serving",
            "uid": uid,
            "generation": generation,
            "resourceVersion": "1",
        },
        "spec": {
            "model": {"source": {"huggingFace": {"repo": "meta/base"}}, "servedNames": ["m"]},
            "engine": {"image": image},
        },
    }


def decided(adapters: list[dict[str, Any]], deployments: list[dict[str, Any]], *findings: Any) -> bool:
    store, records = Store(), Records()
    for body in adapters:
        store.upsert(Kind.LORA_ADAPTER, body)
    for body in deployments:
        store.upsert(Kind.VLLM_DEPLOYMENT, body)
    for finding in findings:
        if isinstance(finding, Decision):
            records.publish_decision(SQL, finding)
        else:
            records.publish_model_want(LLAMA, finding)
    return records.all_decided(store, "serving")


DECIDED: dict[str, tuple[bool, bool]] = {
    "there is nothing to decide": (decided([], []), True),
    "all are decided": (decided([adapter()], [deployment()], decision(), want()), True),
    "one that is refused is decided too": (decided([adapter()], [], decision(None)), True),
    "a deployment that can't want a model is decided too": (decided([], [deployment()], want(None)), True),
    "an adapter that was not looked at": (decided([adapter()], [deployment()], want()), False),
    "a deployment that was not looked at": (decided([adapter()], [deployment()], decision()), False),
    "an adapter that was made anew": (decided([adapter(uid="uid-2")], [deployment()], decision(), want()), False),
    "an adapter whose spec changed": (decided([adapter(generation=2)], [deployment()], decision(), want()), False),
    "a deployment that was made anew": (decided([], [deployment(uid="uid-2")], want()), False),
    "a deployment whose spec changed": (decided([], [deployment(generation=2)], want()), False),
    "an adapter about which nothing could be known": (
        decided([adapter()], [deployment()], decision(None, Unknown()), want()),
        False,
    ),
    "an adapter of a deployment that does not exist can't want anything": (decided([adapter()], []), True),
    "an adapter that can't be read, and may want anything": (decided([adapter(servedName=5)], []), False),
    "a deployment that can't be read": (decided([], [deployment(image=5)]), False),
}


@pytest.mark.parametrize("case", DECIDED)
def test_nothing_is_unwanted_before_all_have_been_asked(case: str) -> None:
    found, expected = DECIDED[case]
    assert found is expected
