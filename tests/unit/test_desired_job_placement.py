"""Jobs go where the engines may, as long as that decides something; pods of a ReadWriteOnce cache go to one node."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from lora_operator.api import ModelCache, VLLMDeployment
from lora_operator.desired.job_placement import JobPlacement, job_placement, keep_on_one_node
from tests.unit.builders import make_cache, make_deployment, not_ready

ZONE_B = {"topology.kubernetes.io/zone": "b"}
NODES: dict[str, Any] = {
    "requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [{"matchExpressions": []}]}
}
TOLERATE = [{"key": "nvidia.com/gpu", "operator": "Exists"}]
WHERE = {
    "nodeSelector": ZONE_B,
    "affinity": {"nodeAffinity": NODES, "podAntiAffinity": {"of": "the engines among themselves"}},
    "tolerations": TOLERATE,
    "priorityClassName": "serving",
}
ALL = {"nodeSelector": ZONE_B, "affinity": {"nodeAffinity": NODES}, "tolerations": TOLERATE}
ORIGIN = "VLLMDeployment serving/llama"

UNBOUND = make_cache(conditions=not_ready("ClaimPending"))
BOUND = make_cache()
ONE_NODE = make_cache(access_modes=("ReadWriteOnce", "ReadOnlyMany"))


def fleet(spec: Any, name: str = "llama", created: str | None = None) -> VLLMDeployment:
    body = make_deployment(name, podTemplate={"spec": spec}).to_wire()
    body["metadata"] |= {"creationTimestamp": created} if created else {}
    return VLLMDeployment.model_validate(body)


CASES: dict[str, tuple[ModelCache, list[VLLMDeployment], JobPlacement]] = {
    "a volume that is yet to be made lands where the engines may run": (
        UNBOUND,
        [fleet(WHERE)],
        JobPlacement(ALL, ORIGIN),
    ),
    "a volume of one node is tied to a node where the engines may run": (
        ONE_NODE,
        [fleet(WHERE)],
        JobPlacement(ALL, ORIGIN),
    ),
    "a volume that is there decides for itself": (
        BOUND,
        [fleet(WHERE)],
        JobPlacement({"tolerations": TOLERATE}, ORIGIN),
    ),
    "nobody wants it": (UNBOUND, [], JobPlacement()),
    "nothing is asked of nodes": (UNBOUND, [fleet({"priorityClassName": "serving"})], JobPlacement()),
    "no podTemplate": (UNBOUND, [make_deployment()], JobPlacement()),
    "the oldest decides": (
        UNBOUND,
        [
            fleet({"nodeSelector": {"zone": "new"}}, "a", "2026-02-01T00:00:00Z"),
            fleet({"nodeSelector": {"zone": "old"}}, "z", "2026-01-01T00:00:00Z"),
        ],
        JobPlacement({"nodeSelector": {"zone": "old"}}, "VLLMDeployment serving/z"),
    ),
    "of two as old the first by name": (
        UNBOUND,
        [fleet({"nodeSelector": {"zone": name}}, name, "2026-02-01T00:00:00Z") for name in ("b", "a")],
        JobPlacement({"nodeSelector": {"zone": "a"}}, "VLLMDeployment serving/a"),
    ),
    "what is no pod spec": (UNBOUND, [fleet("x")], JobPlacement()),
    "what has other shapes": (
        UNBOUND,
        [fleet({"nodeSelector": ["x"], "affinity": "x", "tolerations": {"key": "x"}})],
        JobPlacement(),
    ),
    "empty headings": (
        UNBOUND,
        [fleet({"nodeSelector": None, "affinity": {"nodeAffinity": None}, "tolerations": []})],
        JobPlacement(),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_job_placement(case: str) -> None:
    cache, deployments, expected = CASES[case]
    assert job_placement(cache, deployments) == expected


TEMPLATE: dict[str, Any] = {"metadata": {"labels": {"a": "b"}}, "spec": {"containers": []}}
TERM = {
    "labelSelector": {"matchLabels": {"lora-operator.dev/modelcache": "default"}},
    "topologyKey": "kubernetes.io/hostname",
}
REQUIRED = "requiredDuringSchedulingIgnoredDuringExecution"


def test_pods_of_a_cache_that_one_node_can_mount_go_to_one_node() -> None:
    found = keep_on_one_node(TEMPLATE, ONE_NODE)
    assert found["metadata"]["labels"] == {"a": "b", "lora-operator.dev/modelcache": "default"}
    assert found["spec"]["affinity"] == {"podAffinity": {REQUIRED: [TERM]}}


def test_a_users_affinity_holds_beside_it() -> None:
    theirs = {"labelSelector": {}, "topologyKey": "zone"}
    affinity = {"nodeAffinity": NODES, "podAffinity": {REQUIRED: [theirs], "preferred": []}}
    template = {**TEMPLATE, "spec": {"affinity": affinity}}
    before = copy.deepcopy(template)
    found = keep_on_one_node(template, ONE_NODE)["spec"]["affinity"]
    assert found == {"nodeAffinity": NODES, "podAffinity": {REQUIRED: [theirs, TERM], "preferred": []}}
    assert template == before


@pytest.mark.parametrize("affinity", [None, {"podAffinity": None}, {"podAffinity": {REQUIRED: None}}])
def test_empty_headings_are_no_affinity(affinity: Any) -> None:
    found = keep_on_one_node({**TEMPLATE, "spec": {"affinity": affinity}}, ONE_NODE)
    assert found["spec"]["affinity"]["podAffinity"][REQUIRED] == [TERM]


@pytest.mark.parametrize("affinity", ["x", {"podAffinity": "x"}, {"podAffinity": {REQUIRED: "x"}}])
def test_what_is_no_affinity_is_left_to_the_api_server(affinity: Any) -> None:
    template = {**TEMPLATE, "spec": {"affinity": affinity}}
    assert keep_on_one_node(template, ONE_NODE) == template


@pytest.mark.parametrize(
    "cache", [BOUND, make_cache(access_modes=("ReadWriteOnce", "ReadWriteMany")), make_cache(status={})]
)
def test_pods_of_other_caches_are_free(cache: ModelCache) -> None:
    assert keep_on_one_node(TEMPLATE, cache) == TEMPLATE
