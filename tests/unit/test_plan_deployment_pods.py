"""What an adapter may conclude from looks at engines: a pod that can't be asked never counts as serving, nor as not wanted."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lora_operator.plan import deployment_pods
from lora_operator.plan.adapter_list import Module, ModuleList
from lora_operator.plan.deployment_pods import (
    AdapterLoad,
    DeploymentPod,
    DeploymentPods,
    PodView,
    Served,
    is_lazy_on,
    preloading_pods,
    serves,
)
from tests.unit.builders import make_module, make_pod, make_pods, make_view

SQL = make_module()
OLD = make_module(path="/model-cache/artifacts/older")
FAILED = make_view(failures={"sql": "rank 64 is greater than max_lora_rank 16"})

LOADS: dict[str, tuple[DeploymentPods, AdapterLoad]] = {
    "no pod": (make_pods(), AdapterLoad(0, 0, 0, False, ())),
    "every ready pod serves it": (
        make_pods(make_pod("a", make_view(SQL)), make_pod("b", make_view(SQL))),
        AdapterLoad(2, 2, 0, False, ()),
    ),
    "a pod that is not ready does not count, serving or not": (
        make_pods(make_pod("a", make_view(SQL)), make_pod("b", make_view(SQL), is_ready=False)),
        AdapterLoad(1, 1, 0, False, ()),
    ),
    "a pod that does not serve it yet": (
        make_pods(make_pod("a", make_view(SQL)), make_pod("b", make_view())),
        AdapterLoad(2, 1, 0, False, ()),
    ),
    "a pod that serves another revision under the name": (
        make_pods(make_pod("a", make_view(OLD))),
        AdapterLoad(1, 0, 0, False, ()),
    ),
    "an engine that refused it, in its words": (
        make_pods(make_pod("a", FAILED)),
        AdapterLoad(1, 0, 0, True, (("a", "rank 64 is greater than max_lora_rank 16"),)),
    ),
    "an old failure of the name does not count once it is served": (
        make_pods(make_pod("a", make_view(SQL, failures={"sql": "once"}))),
        AdapterLoad(1, 1, 0, False, ()),
    ),
    "a pod that does not answer, though it served before": (
        make_pods(make_pod("a", make_view(SQL, error="no answer in 10 s"))),
        AdapterLoad(1, 0, 1, False, (("a", "no answer in 10 s"),)),
    ),
    "a pod that will load it on the first request, as it was told to": (
        make_pods(make_pod("a", make_view(SQL)), make_pod("b", make_view(waiting={"sql": SQL.path}))),
        AdapterLoad(2, 2, 0, False, (), 1),
    ),
    "one that would load other content": (
        make_pods(make_pod("a", make_view(waiting={"sql": OLD.path}))),
        AdapterLoad(1, 0, 0, False, ()),
    ),
    "one where the first request failed": (
        make_pods(make_pod("a", make_view(waiting={"sql": SQL.path}, failures={"sql": "bad"}))),
        AdapterLoad(1, 0, 0, True, (("a", "bad"),)),
    ),
    "a pod that was not asked": (
        make_pods(make_pod("a", None)),
        AdapterLoad(1, 0, 1, False, (("a", "not asked yet"),)),
    ),
    "a pod whose gate is open serves nothing that counts": (
        make_pods(make_pod("a", make_view(SQL, guarded=False))),
        AdapterLoad(1, 0, 1, False, (("a", "its gate is missing"),)),
    ),
}


@pytest.mark.parametrize("case", LOADS)
def test_load_of(case: str) -> None:
    fleet, expected = LOADS[case]
    module = make_module(lazy=True) if any(pod.view and pod.view.waiting for pod in fleet.pods) else SQL
    assert fleet.load_of(module) == expected


def test_a_pod_that_is_to_load_it_in_advance_and_only_waits_does_not_count() -> None:
    waiting = make_pod("a", make_view(waiting={"sql": SQL.path}))
    assert make_pods(waiting).load_of(SQL).loaded == 0


def test_of_those_that_preload_each_must_have_it_and_the_others_must_know_of_it() -> None:
    module = make_module(preload=1)
    names = [f"llama-{each}" for each in range(3)]
    (chosen,) = preloading_pods(module.uid, 1, names)
    waits = make_view(waiting={"sql": module.path})
    views = {name: make_view(module) if name == chosen else waits for name in names}
    assert make_pods(*(make_pod(name, views[name]) for name in names)).load_of(module) == AdapterLoad(
        3, 3, 0, False, (), 2
    )
    assert make_pods(*(make_pod(name, waits) for name in names)).load_of(module).loaded == 2


def by_list(*modules: Module, generation: int, since: int | None = None) -> ModuleList:
    given = {} if since is None else {module.name: since for module in modules}
    return ModuleList("serving/llama", generation, modules, since=given)


OTHERS = make_module(uid="uid-team-b-sql", adapter="team-b/sql")
SEEN_AT_3 = make_view(SQL, generation=3)
FAILED_AT_3 = make_view(generation=3, failures={"sql": "the base model is another"})
WAITS_AT_3 = make_view(generation=3, waiting={"sql": SQL.path})

# (the list of this moment, the look at the pod, how many pods count as serving it)
OUTDATED: dict[str, tuple[ModuleList | None, PodView, int]] = {
    "no list is known, so no pod was told of one": (None, SEEN_AT_3, 1),
    "the list that named it": (by_list(SQL, generation=3), SEEN_AT_3, 1),
    "a later list that left it as it was": (by_list(SQL, generation=9, since=3), SEEN_AT_3, 1),
    "a look from before it had the name": (by_list(SQL, generation=4), SEEN_AT_3, 0),
    "a look from before it had the name again": (by_list(SQL, generation=9, since=4), SEEN_AT_3, 0),
    "the list has its name for another one by now": (by_list(OTHERS, generation=3, since=3), SEEN_AT_3, 0),
    "the list has other content for it by now": (by_list(OLD, generation=3, since=3), SEEN_AT_3, 0),
    "it is on no list": (by_list(generation=3), SEEN_AT_3, 0),
    "a pod that holds no list": (by_list(SQL, generation=1), make_view(SQL, generation=None), 0),
    "what waits for a request by an earlier list": (by_list(SQL, generation=4), WAITS_AT_3, 0),
    "a pod that has its list in its arguments": (
        by_list(SQL, generation=4),
        make_view(SQL, generation=3, update_strategy="Rollout"),
        1,
    ),
}


@pytest.mark.parametrize("case", OUTDATED)
def test_a_look_from_before_the_list_that_named_it_tells_nothing(case: str) -> None:
    modules, view, expected = OUTDATED[case]
    fleet = replace(make_pods(make_pod("a", view)), modules=modules)
    module = make_module(lazy=True) if view.waiting else SQL
    assert fleet.load_of(module) == AdapterLoad(1, expected, 0, False, ())


def test_an_earlier_failure_of_the_name_is_not_told_of_what_has_it_now() -> None:
    pod = make_pod("a", FAILED_AT_3)
    assert replace(make_pods(pod), modules=by_list(SQL, generation=3)).load_of(SQL).refused
    assert not replace(make_pods(pod), modules=by_list(SQL, generation=4)).load_of(SQL).refused


SERVES: dict[str, tuple[Served | None, bool]] = {
    "the same path and lineage": (Served(SQL.path, "meta/Llama", "sql"), True),
    "under an internal name": (Served(SQL.path, "meta/Llama", "sql@fedcba98.7"), True),
    "another path": (Served("/model-cache/artifacts/older", "meta/Llama", "sql"), False),
    "another lineage": (Served(SQL.path, "llama", "sql"), False),
    "no lineage": (Served(SQL.path, None, "sql"), False),
    "not at all": (None, False),
}


@pytest.mark.parametrize("case", SERVES)
def test_serves(case: str) -> None:
    served, expected = SERVES[case]
    view = PodView(uid="u", container_id="c", guarded=True, served={} if served is None else {"sql": served})
    assert serves(view, SQL) is expected


# Placement


def test_a_pod_that_comes_or_goes_moves_as_few_adapters_as_can_be() -> None:
    pods = [f"llama-{each}" for each in range(10)]
    before = {uid: preloading_pods(uid, 3, pods) for uid in map(str, range(200))}
    assert all(len(chosen) == 3 for chosen in before.values())
    counts = [sum(pod in chosen for chosen in before.values()) for pod in pods]
    assert min(counts) > 30, "every pod has its share (60 each in the mean)"
    for uid, chosen in before.items():
        assert preloading_pods(uid, 3, pods[::-1]) == chosen, "no order matters"
        without = preloading_pods(uid, 3, pods[1:])
        assert chosen - {pods[0]} <= without, "the others keep it when a pod goes"
        more = preloading_pods(uid, 3, [*pods, "llama-new"])
        assert more - chosen <= {"llama-new"}, "only the new one takes it when a pod comes"


def test_fewer_pods_than_are_to_preload_all_do() -> None:
    module = make_module(preload=5)
    assert not any(is_lazy_on(module, pod, {"a", "b"}) for pod in ("a", "b"))
    assert is_lazy_on(make_module(lazy=True), "a", {"a"})
    assert not is_lazy_on(make_module(), "a", {"a"})


def test_a_fleets_pod_is_a_value() -> None:
    assert DeploymentPod("a", True, None) == make_pod("a")


def test_who_preloads_is_found_once_for_all_pods(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of 500 adapters is asked about for each of 20 pods in every status: 200,000 hashes if each were found anew."""
    weighed: list[str] = []

    def weight(uid: str, pod: str) -> bytes:
        weighed.append(pod)
        return pod.encode()

    monkeypatch.setattr(deployment_pods, "_weight", weight)
    module, pods = make_module(uid="asked about often", preload=2), [f"llama-{number}" for number in range(20)]
    assert sum(not is_lazy_on(module, pod, set(pods)) for pod in pods) == 2
    assert len(weighed) == len(pods)
