"""Who has which name in one list: the oldest that is admitted; and a name passes on within one list."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lora_operator.api import LoRAAdapter, VLLMDeployment
from lora_operator.plan.adapter_list import Decision, Drop, Entry, Keep, Module, ModuleList, Serve, plan_list
from lora_operator.plan.admission import Candidate, settle_claims
from tests.unit.builders import make_adapter, make_deployment, make_module

OLD, NEW = "2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"
SELECTOR = {"from": "Selector", "selector": {"matchLabels": {"team": "x"}}}
QUALIFIED = make_deployment(names="NamespaceQualified")

A = make_adapter("sql", "team-a", created=OLD, uid="a")
B = make_adapter("sql", "team-b", created=NEW, uid="b")
RENAMED_A = make_adapter("sql", "team-a", created=OLD, uid="a", servedName="other", generation=2)
RENAMED_B = make_adapter("sql", "team-b", created=NEW, uid="b", servedName="other", generation=2)


def module(adapter: LoRAAdapter, name: str = "sql", path: str = "") -> Module:
    """The adapter's entry under a name."""
    place = f"{adapter.metadata.namespace}/{adapter.metadata.name}"
    return make_module(
        name, path=f"/model-cache/{path or adapter.metadata.uid}", uid=adapter.metadata.uid, adapter=place
    )


def has(adapter: LoRAAdapter, labels: dict[str, str] | None = None, *, path: str = "") -> Candidate:
    """One whose content is there; its decision was made under its plain name."""
    return decided(adapter, labels, Serve(module(adapter, adapter.served_name, path)))


def waits(adapter: LoRAAdapter, labels: dict[str, str] | None = None) -> Candidate:
    """One whose content is not there, now or ever: it keeps what it has."""
    return decided(adapter, labels, Keep())


def decided(adapter: LoRAAdapter, labels: dict[str, str] | None, entry: Entry) -> Candidate:
    decision = Decision(adapter.metadata.uid, adapter.metadata.generation, entry)
    return Candidate(adapter, labels if labels is not None else {}, decision)


def undecided(adapter: LoRAAdapter) -> Candidate:
    """One that was edited, or is new, and was not looked at since."""
    return Candidate(adapter, {}, None)


def unlabelled(candidate: Candidate) -> Candidate:
    """Nothing is known of its namespace's labels."""
    return replace(candidate, namespace_labels=None)


# (before, candidates, deployment, after)
Case = tuple[tuple[Module, ...], list[Candidate], VLLMDeployment, tuple[Module, ...]]
PLAIN = make_deployment()
CASES: dict[str, Case] = {
    "the older of two has the name": ((), [has(B), has(A)], PLAIN, (module(A),)),
    "created in the same second: the smaller uid": (
        (),
        [has(make_adapter("x", uid="2", servedName="sql")), has(make_adapter("y", uid="1", servedName="sql"))],
        PLAIN,
        (make_module(path="/model-cache/1", uid="1", adapter="team-a/y"),),
    ),
    "created in the same second: who has the name keeps it": (
        (module(make_adapter("x", uid="2", servedName="sql")),),
        [has(make_adapter("x", uid="2", servedName="sql")), has(make_adapter("y", uid="1", servedName="sql"))],
        PLAIN,
        (module(make_adapter("x", uid="2", servedName="sql")),),
    ),
    "the older one comes when the younger is served: one list, and the name is the older's": (
        (module(B),),
        [has(A), has(B)],
        PLAIN,
        (module(A),),
    ),
    "the older one goes: one list, and the name is the younger's": ((module(A),), [has(B)], PLAIN, (module(B),)),
    "the older one goes and the younger has no content yet: nobody has the name": (
        (module(A),),
        [waits(B)],
        PLAIN,
        (),
    ),
    "an older one that is suspended is not served and holds the name": (
        (module(A),),
        [decided(A, None, Drop()), has(B)],
        PLAIN,
        (),
    ),
    "an older one that can't be downloaded holds the name": ((), [waits(A), has(B)], PLAIN, ()),
    "also where the younger one was served": ((module(B),), [waits(A), has(B)], PLAIN, ()),
    "an older one whose new content downloads keeps the old": (
        (module(A, path="before"),),
        [waits(A), has(B)],
        PLAIN,
        (module(A, path="before"),),
    ),
    "the older one was renamed and not looked at yet: it keeps its name so long": (
        (module(A),),
        [undecided(RENAMED_A), has(B)],
        PLAIN,
        (module(A),),
    ),
    "the older one was renamed: both have theirs in one list": (
        (module(A),),
        [has(RENAMED_A), has(B)],
        PLAIN,
        (module(RENAMED_A, "other"), module(B)),
    ),
    "the older one was renamed and wants other content: what it keeps gives way": (
        (module(A),),
        [waits(RENAMED_A), has(B)],
        PLAIN,
        (module(B),),
    ),
    "the older one was renamed and wants other content, nobody else wants the name: it stays as it is": (
        (module(A),),
        [waits(RENAMED_A)],
        PLAIN,
        (module(A),),
    ),
    "the younger one is renamed onto the older's name": (
        (module(RENAMED_A, "other"), module(B)),
        [has(RENAMED_A), has(RENAMED_B)],
        PLAIN,
        (module(RENAMED_A, "other"),),
    ),
    "the older one is renamed onto the younger's name, and not looked at yet": (
        (module(A), module(RENAMED_B, "other")),
        [undecided(RENAMED_A), has(RENAMED_B)],
        PLAIN,
        (module(RENAMED_B, "other"), module(A)),
    ),
    "the older one is renamed onto the younger's name": (
        (module(A), module(RENAMED_B, "other")),
        [has(RENAMED_A), has(RENAMED_B)],
        PLAIN,
        (module(RENAMED_A, "other"),),
    ),
    "a new adapter that was not looked at takes no name from anybody": (
        (module(B),),
        [undecided(A), has(B)],
        PLAIN,
        (module(B),),
    ),
    "a namespace that is no longer admitted gives up the name at once": (
        (module(A),),
        [has(A, {"team": "a"}), has(B, {"team": "x"})],
        make_deployment(policy=SELECTOR),
        (module(B),),
    ),
    "labels that are not known take nothing away": (
        (module(A),),
        [unlabelled(has(A)), has(B, {"team": "x"})],
        make_deployment(policy=SELECTOR),
        (module(A),),
    ),
    "labels that are not known give nothing either": (
        (module(B),),
        [unlabelled(has(A)), has(B, {"team": "x"})],
        make_deployment(policy=SELECTOR),
        (module(B),),
    ),
    "a name that became the base model's leaves the list, decided on or not": (
        (module(A, "llama"), module(RENAMED_B, "other")),
        [has(make_adapter("sql", "team-a", uid="a", servedName="llama")), undecided(RENAMED_B)],
        make_deployment(served_names=("meta/Llama", "llama", "other")),
        (),
    ),
    "what one keeps under a name that became the base model's leaves the list too": (
        (module(A),),
        [waits(RENAMED_A)],
        make_deployment(served_names=("sql",)),
        (),
    ),
    "another policy renames all at once, from decisions of before": (
        (module(A),),
        [has(A), has(B)],
        QUALIFIED,
        (module(A, "team-a/sql"), module(B, "team-b/sql")),
    ),
    "and what is kept": ((module(A, path="before"),), [waits(A)], QUALIFIED, (module(A, "team-a/sql", "before"),)),
    "and back, to the older one": (
        (module(A, "team-a/sql"), module(B, "team-b/sql")),
        [has(A), waits(B)],
        PLAIN,
        (module(A),),
    ),
    "qualified names collide within a namespace": (
        (),
        [has(A), has(make_adapter("two", "team-a", uid="z", created=NEW, servedName="sql"))],
        QUALIFIED,
        (module(A, "team-a/sql"),),
    ),
}


def listed(*modules: Module) -> ModuleList:
    return ModuleList("serving/llama", 5, tuple(sorted(modules)))


@pytest.mark.parametrize("case", CASES)
def test_settle_claims(case: str) -> None:
    before, candidates, deployment, after = CASES[case]
    for order in (candidates, candidates[::-1]):
        previous = listed(*before)
        decisions = settle_claims(order, deployment=deployment, previous=previous)
        planned = plan_list(previous, decisions, deployment="serving/llama")
        assert planned.modules == tuple(sorted(after))
        assert planned.generation == (5 if planned.modules == previous.modules else 6)


def test_one_that_can_t_be_read_keeps_its_name_from_everybody() -> None:
    previous = listed(module(B))
    decisions = settle_claims([has(A)], deployment=PLAIN, previous=previous, unreadable={"team-b/sql"})
    assert plan_list(previous, decisions, deployment="serving/llama") is previous
