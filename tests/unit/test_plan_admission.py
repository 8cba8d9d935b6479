"""Who may be served where: the reasons that a tenant reads, and that they tell nothing of anybody else."""

from __future__ import annotations

from typing import Any

import pytest

from lora_operator.api import LoRAAdapter, VLLMDeployment
from lora_operator.api.common import LabelSelector
from lora_operator.plan.admission import admit, namespace_admitted, selector_matches, seniority, yield_name
from tests.unit.builders import make_adapter, make_deployment

SELECTOR = {"from": "Selector", "selector": {"matchLabels": {"team": "a"}}}
Labels = dict[str, str] | None

ADMIT: dict[str, tuple[LoRAAdapter, VLLMDeployment | None, Labels, tuple[bool | None, str, str]]] = {
    "an adapter in an admitted namespace": (
        make_adapter(),
        make_deployment(),
        {},
        (True, "Accepted", "served by serving/llama as sql"),
    ),
    "servedName is what clients write": (
        make_adapter(servedName="text2sql"),
        make_deployment(),
        {},
        (True, "Accepted", "served by serving/llama as text2sql"),
    ),
    "no such deployment": (
        make_adapter(),
        None,
        {},
        (
            False,
            "DeploymentNotFound",
            "VLLMDeployment serving/llama does not exist: create it or change vllmDeploymentRef",
        ),
    ),
    "a reference without a namespace means the adapter's own": (
        make_adapter(deployment_namespace=None),
        None,
        {},
        (
            False,
            "DeploymentNotFound",
            "VLLMDeployment team-a/llama does not exist: create it or change vllmDeploymentRef",
        ),
    ),
    "a namespace that the policy leaves out": (
        make_adapter(),
        make_deployment(policy={"from": "Same"}),
        {},
        (
            False,
            "NamespaceNotAllowed",
            "VLLMDeployment serving/llama does not admit adapters from namespace team-a: "
            "ask its owner to admit it by spec.adapterPolicy.namespaces",
        ),
    ),
    "a namespace that is not admitted is told nothing of the names that are served": (
        make_adapter(servedName="llama", baseModelName="nothing"),
        make_deployment(policy={"from": "Same"}),
        {},
        (
            False,
            "NamespaceNotAllowed",
            "VLLMDeployment serving/llama does not admit adapters from namespace team-a: "
            "ask its owner to admit it by spec.adapterPolicy.namespaces",
        ),
    ),
    "labels that matter and are not known decide nothing": (
        make_adapter(),
        make_deployment(policy=SELECTOR),
        None,
        (None, "NamespaceNotAllowed", "labels of namespace team-a are not known yet"),
    ),
    "labels that the selector selects": (
        make_adapter(),
        make_deployment(policy=SELECTOR),
        {"team": "a"},
        (True, "Accepted", "served by serving/llama as sql"),
    ),
    "a name of the base model": (
        make_adapter(servedName="llama"),
        make_deployment(),
        {},
        (
            False,
            "NameIsBaseModel",
            "servedName llama is a name of the base model of serving/llama: choose another",
        ),
    ),
    "metadata.name counts as the served name": (
        make_adapter("llama"),
        make_deployment(),
        {},
        (
            False,
            "NameIsBaseModel",
            "servedName llama is a name of the base model of serving/llama: choose another",
        ),
    ),
    "a lineage that is not served": (
        make_adapter(baseModelName="meta/Other"),
        make_deployment(),
        {},
        (
            False,
            "BaseModelNotServed",
            "baseModelName meta/Other is not served by serving/llama: use one of meta/Llama, llama",
        ),
    ),
    "names qualified by the namespace": (
        make_adapter(),
        make_deployment(names="NamespaceQualified"),
        {},
        (True, "Accepted", "served by serving/llama as team-a/sql"),
    ),
    "a qualified name that is one of the base model's": (
        make_adapter("Llama", "meta"),
        make_deployment(names="NamespaceQualified"),
        {},
        (
            False,
            "NameIsBaseModel",
            "servedName meta/Llama is a name of the base model of serving/llama: choose another",
        ),
    ),
    "a name of the base model, qualified, is free": (
        make_adapter("llama"),
        make_deployment(names="NamespaceQualified"),
        {},
        (True, "Accepted", "served by serving/llama as team-a/llama"),
    ),
    "the longest name, qualified": (
        make_adapter(servedName="x" * 121),
        make_deployment(names="NamespaceQualified"),
        {},
        (True, "Accepted", f"served by serving/llama as team-a/{'x' * 121}"),
    ),
    "a name that is too long when it is qualified": (
        make_adapter(servedName="x" * 122),
        make_deployment(names="NamespaceQualified"),
        {},
        (
            False,
            "InvalidSpec",
            "serving/llama serves adapters as <namespace>/<servedName>, which is 129 characters long here, and may be 128: "
            "choose a shorter servedName",
        ),
    ),
    "any served name may be the lineage": (
        make_adapter(baseModelName="llama"),
        make_deployment(),
        {},
        (True, "Accepted", "served by serving/llama as sql"),
    ),
}


@pytest.mark.parametrize("case", ADMIT)
def test_admit(case: str) -> None:
    adapter, deployment, labels, expected = ADMIT[case]
    verdict = admit(adapter, deployment, namespace_labels=labels)
    assert (verdict.status, verdict.reason, verdict.message) == expected


POLICIES: dict[str, tuple[dict[str, Any], str, Labels, bool | None]] = {
    "Same admits its own namespace": ({"from": "Same"}, "serving", None, True),
    "Same admits no other": ({"from": "Same"}, "team-a", {"team": "a"}, False),
    "All admits any, known or not": ({"from": "All"}, "team-a", None, True),
    "Selector admits by labels": (SELECTOR, "team-a", {"team": "a"}, True),
    "Selector leaves out by labels": (SELECTOR, "team-a", {"team": "b"}, False),
    "Selector does not know before the labels are": (SELECTOR, "team-a", None, None),
    "Selector admits the deployment's own namespace in any case": (SELECTOR, "serving", None, True),
    "an empty selector selects everything": ({"from": "Selector", "selector": {}}, "team-a", {}, True),
    "a selector that is missing selects nothing": ({"from": "Selector"}, "team-a", {"team": "a"}, False),
}


@pytest.mark.parametrize("case", POLICIES)
def test_namespace_admitted(case: str) -> None:
    policy, namespace, labels, expected = POLICIES[case]
    assert namespace_admitted(make_deployment(policy=policy), namespace, labels) is expected


def expression(operator: str, *values: str) -> dict[str, Any]:
    return {"matchExpressions": [{"key": "team", "operator": operator, "values": list(values)}]}


SELECTORS: dict[str, tuple[dict[str, Any], dict[str, str], bool]] = {
    "In with the value": (expression("In", "a", "b"), {"team": "b"}, True),
    "In with another value": (expression("In", "a", "b"), {"team": "c"}, False),
    "In without the label": (expression("In", "a"), {}, False),
    "NotIn with the value": (expression("NotIn", "a"), {"team": "a"}, False),
    "NotIn with another value": (expression("NotIn", "a"), {"team": "b"}, True),
    "NotIn without the label, as Kubernetes has it": (expression("NotIn", "a"), {}, True),
    "Exists with an empty value": (expression("Exists"), {"team": ""}, True),
    "Exists without the label": (expression("Exists"), {}, False),
    "DoesNotExist with the label": (expression("DoesNotExist"), {"team": "a"}, False),
    "DoesNotExist without the label": (expression("DoesNotExist"), {}, True),
    "all requirements must hold": (
        {"matchLabels": {"team": "a", "env": "prod"}} | expression("Exists"),
        {"team": "a", "env": "dev"},
        False,
    ),
}


@pytest.mark.parametrize("case", SELECTORS)
def test_selector_matches(case: str) -> None:
    selector, labels, expected = SELECTORS[case]
    assert selector_matches(LabelSelector.model_validate(selector), labels) is expected


OLD, NEW = "2026-01-01T00:00:00Z", "2026-01-01T00:00:01Z"


def rival(name: str, created: str | None, uid: str) -> LoRAAdapter:
    return make_adapter(name, "team-b", created=created, uid=uid, servedName="sql", repo="secret-org/secret-repo")


CONFLICTS = {
    "no rival": ([], False),
    "a younger rival": ([rival("theirs", NEW, "a")], False),
    "an older rival": ([rival("theirs", "2025-12-31T23:59:59Z", "z")], True),
    "created in the same second, the smaller UID wins": ([rival("theirs", OLD, "a")], True),
    "created in the same second, with the larger UID": ([rival("theirs", OLD, "z")], False),
    "one without a creation time counts as the youngest": ([rival("theirs", None, "a")], False),
    "one older rival among younger ones is enough": (
        [rival("one", NEW, "x"), rival("two", "2025-01-01T00:00:00Z", "y")],
        True,
    ),
}


@pytest.mark.parametrize("case", CONFLICTS)
def test_yield_name(case: str) -> None:
    rivals, yields = CONFLICTS[case]
    verdict = yield_name(make_adapter("mine", servedName="sql", created=OLD, uid="m"), make_deployment(), rivals)
    assert (verdict is not None) is yields


@pytest.mark.parametrize(("holder", "yields"), [("m", False), ("a", True), ("other", True), (None, True)])
def test_of_those_made_in_the_same_second_who_has_the_name_keeps_it(holder: str | None, yields: bool) -> None:
    mine = make_adapter("mine", servedName="sql", created=OLD, uid="m")
    rivals = [rival("theirs", OLD, "a")]
    assert (yield_name(mine, make_deployment(), rivals, holder=holder) is not None) is yields
    older = [rival("theirs", "2025-12-31T23:59:59Z", "z")]
    assert yield_name(mine, make_deployment(), older, holder="m") is not None


def test_a_name_conflict_tells_nothing_of_the_other_tenant() -> None:
    other = rival("theirs", "2025-01-01T00:00:00Z", "their-uid")
    verdict = yield_name(make_adapter("mine", servedName="sql", created=OLD), make_deployment(), [other])
    assert verdict is not None
    assert (verdict.status, verdict.reason) == (False, "NameConflict")
    assert verdict.message == (
        "servedName sql is taken by an older adapter of serving/llama: "
        "choose another; it is taken over should the older one go"
    )
    for theirs in ("theirs", "team-b", "secret", "their-uid", "2025"):
        assert theirs not in verdict.message


def test_of_two_rivals_exactly_one_has_the_name() -> None:
    adapters = [make_adapter(f"x{i}", created=OLD, uid=f"uid-{i}", servedName="sql") for i in range(4)]
    winners = [a for a in adapters if yield_name(a, make_deployment(), [o for o in adapters if o is not a]) is None]
    assert winners == [min(adapters, key=seniority)]
