"""What becomes of a deployment's pods: they roll for what they can't do without, and else they are scaled or left alone."""

from __future__ import annotations

import copy
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from lora_operator.api.deployment import VLLMDeployment
from lora_operator.constants import Reason
from lora_operator.desired.children import build_guard_secret
from lora_operator.errors import ReasonError
from lora_operator.kube.pods import Pod
from lora_operator.kube.workloads import Workload
from lora_operator.plan.adapter_list import Decision, Drop, Entry, ModuleList, Serve, Unknown
from lora_operator.plan.admission import Candidate
from lora_operator.plan.deployment import (
    BLOCKED_SECONDS,
    LOOK_SECONDS,
    SETTING_UP_SECONDS,
    DeploymentObservation,
    DeploymentPlan,
    LeavePods,
    RollPods,
    ScalePods,
    look_again,
    plan_deployment,
)
from lora_operator.plan.deployment_list import ListObservation, ListPlan, ListUnknown
from lora_operator.plan.model_contents import Content, ModelContents
from lora_operator.plan.rollout import Unrolled
from tests.unit.builders import (
    NOW,
    engine_pod,
    make_adapter,
    make_artifact,
    make_cache,
    make_deployment,
    make_module,
    make_pods,
    make_view,
    ready_artifact,
)

ADAPTER, SQL = make_adapter(), make_module()
BASE = ready_artifact("base-1", type="BaseModel", rank=None)
OTHER_BASE = ready_artifact("base-2", type="BaseModel", rank=None)
PLUGIN = {"plugin.py": "pass"}
ROLLING = make_deployment(lora={"updateStrategy": "Rollout"})
QUIET = NOW + timedelta(seconds=60)


def model(artifact: Any = BASE, *, cache: Any = None, **more: Any) -> ModelContents:
    """The base model alone."""
    known = make_cache() if cache is None else cache
    return ModelContents(known, (Content("model", "base-1", artifact, more.pop("blocked", None)),), **more)


def decided(entry: Entry = Serve(SQL)) -> Candidate:  # noqa: B008  frozen
    """An adapter of which it was decided what it has served."""
    return Candidate(ADAPTER, {}, Decision(ADAPTER.metadata.uid, 1, entry))


UNDECIDED = Candidate(ADAPTER, {}, None)
LISTED = ModuleList("serving/llama", 4, (SQL,))


def adapters(*candidates: Candidate, previous: ModuleList | None = LISTED, **more: Any) -> ListObservation:
    """A list of one adapter, which has it still."""
    return ListObservation(candidates or (decided(),), previous, **more)


def observe(deployment: VLLMDeployment | None = None, **more: Any) -> DeploymentObservation:
    """A deployment that has no pods yet."""
    found = make_deployment() if deployment is None else deployment
    values: dict[str, Any] = {
        "deployment": found,
        "model": model(),
        "adapters": adapters(),
        "workload": None,
        "is_as_made": True,
        "token_secret": build_guard_secret(found, "token"),
        "plugin": "plugin-1",
        "plugin_files": PLUGIN,
        "is_plugin_there": True,
        "pods": (),
        "served": make_pods(),
    }
    values |= more
    if values["workload"] is not None:
        values["workload"] = Workload.parse(values["workload"])
    values["pods"] = [Pod.parse(pod) for pod in values["pods"]]
    return DeploymentObservation(**values)


def as_live(manifest: dict[str, Any]) -> dict[str, Any]:
    """The Deployment as the API server has it."""
    body = copy.deepcopy(manifest)
    body["metadata"]["uid"] = "uid-deploy"
    body["status"] = {}
    return body


def manifest_of(plan: DeploymentPlan) -> dict[str, Any]:
    assert isinstance(plan.pods, RollPods)
    return plan.pods.manifest


def running(deployment: VLLMDeployment | None = None, *, made: Any = None, change: Any = None, **more: Any) -> Any:
    """Its Deployment is there, made from what `made` says otherwise and changed by `change`; `more` is what is seen now."""
    before = observe(**({"deployment": deployment} | (made or {})))
    live = as_live(manifest_of(plan_deployment(before, now=QUIET)))
    if change is not None:
        change(live)
    return observe(deployment, **({"workload": live} | more))


def of_nobody(body: dict[str, Any]) -> None:
    body["metadata"]["ownerReferences"] = []


QUOTA = ReasonError(Reason.PODS_REFUSED, "exceeded quota")
DOWNLOADING = make_artifact("base-1", type="BaseModel")
UNSEEN = make_cache()
UNSEEN = UNSEEN.model_copy(update={"status": UNSEEN.status.model_copy(update={"claim_name": "another"})})
ANOTHER_TOKEN = build_guard_secret(make_deployment(), "another")
TWO, FIVE = make_deployment(replicas=2), make_deployment(replicas=5)
NEW_IMAGE = make_deployment(engine={"image": "vllm/vllm-openai:v9"})
MANUAL = make_deployment(replicas=None)
EMPTY = ModuleList("serving/llama", 3, ())
NEW_LIST = adapters(previous=EMPTY)
NOTHING_LISTED = {"adapters": adapters(decided(Drop()), previous=EMPTY)}
FIRST = Unrolled("", NOW - timedelta(hours=2), NOW - timedelta(hours=2))
ROLL, LEAVE = RollPods, LeavePods()
# What is seen → what becomes of the pods.
PODS: dict[str, tuple[DeploymentObservation, Any]] = {
    "nothing is there yet: the pods are made": (observe(), ROLL),
    "all is as it was made: the pods are left alone": (running(), LEAVE),
    "a changed replica count scales and does not roll": (running(FIVE, made={"deployment": TWO}), ScalePods(5)),
    "no replicas in the spec leave what an autoscaler has set": (
        running(MANUAL, change=lambda body: body["spec"].update(replicas=7)),
        LEAVE,
    ),
    "another image rolls": (running(NEW_IMAGE, made={"deployment": make_deployment()}), ROLL),
    "another content of the base model rolls": (running(model=model(OTHER_BASE)), ROLL),
    "another engine plugin alone leaves the pods alone": (running(plugin="plugin-2", is_plugin_there=False), LEAVE),
    "another image brings another plugin along": (
        running(NEW_IMAGE, made={"deployment": make_deployment()}, plugin="plugin-2", is_plugin_there=False),
        ROLL,
    ),
    "what was changed by hand is made again": (running(is_as_made=False), ROLL),
    "what was changed by hand stays where making it again would bring another plugin": (
        running(is_as_made=False, plugin="plugin-2", is_plugin_there=False),
        LEAVE,
    ),
    "another token rolls, for no pod answers without it": (running(token_secret=ANOTHER_TOKEN), ROLL),
    "without a token that is known, the pods are left alone": (running(NEW_IMAGE, token_secret=QUOTA), LEAVE),
    "a Deployment that is somebody else's is tried, and refused": (running(change=of_nobody), ROLL),
    "and it is never scaled": (
        running(FIVE, made={"deployment": TWO}, change=of_nobody, model=model(DOWNLOADING)),
        LEAVE,
    ),
    "a model that is not in the cache yet makes no pods": (observe(model=model(DOWNLOADING)), LEAVE),
    "pods that run keep the model that they have while another comes": (
        running(NEW_IMAGE, made={"deployment": make_deployment()}, model=model(DOWNLOADING)),
        LEAVE,
    ),
    "they are scaled all the same": (
        running(FIVE, made={"deployment": TWO}, model=model(DOWNLOADING)),
        ScalePods(5),
    ),
    "and while the list is not known": (
        running(FIVE, made={"deployment": TWO}, adapters=adapters(UNDECIDED, previous=None)),
        ScalePods(5),
    ),
    "a claim that can't be looked at makes no pods": (observe(model=model(cache=UNSEEN)), LEAVE),
    "another list leaves pods alone that are told of it": (running(adapters=NEW_LIST), LEAVE),
    "with Rollout, another list leaves them alone at first": (
        running(ROLLING, made=NOTHING_LISTED | {"unrolled": FIRST}, adapters=NEW_LIST),
        LEAVE,
    ),
    "with Rollout, another list rolls once all is quiet": (
        running(ROLLING, made=NOTHING_LISTED | {"unrolled": FIRST}, adapters=NEW_LIST, unrolled=FIRST),
        ROLL,
    ),
    "with Rollout, the first pods wait for adapters that are being downloaded": (
        observe(ROLLING, adapters=adapters(decided(), UNDECIDED, previous=EMPTY)),
        LEAVE,
    ),
}


@pytest.mark.parametrize("case", PODS)
def test_do_these_pods_get_replaced(case: str) -> None:
    seen, expected = PODS[case]
    pods = plan_deployment(seen, now=QUIET).pods
    if expected is ROLL:
        assert isinstance(pods, RollPods)
    else:
        assert pods == expected


def test_a_roll_out_that_is_refused_scales_still() -> None:
    deployment = make_deployment(replicas=5, engine={"image": "vllm/vllm-openai:v9"})
    pods = plan_deployment(running(deployment, made={"deployment": TWO}), now=QUIET).pods
    assert isinstance(pods, RollPods)
    assert pods.otherwise == ScalePods(5)
    assert pods.manifest["spec"]["replicas"] == 5


NEEDS: dict[str, tuple[dict[str, Any], Any]] = {
    "all is there": ({}, (False, False, None)),
    "its plugin was deleted": ({"is_plugin_there": False}, (False, True, None)),
    "an older plugin can't be made again": ({"is_plugin_there": False, "plugin": "plugin-2"}, (False, False, None)),
    "the claim is unknown": ({"model": model(cache=UNSEEN)}, (False, False, Reason.CACHE_NOT_READY)),
    "a pod does not start": ({"pods": [engine_pod(container={"state": {}})]}, (True, False, None)),
    "a pod does not answer": (
        {"pods": [engine_pod()], "views": {"llama-0": make_view(error="refused")}},
        (True, False, None),
    ),
    "a pod that has ended needs nothing": (
        {"pods": [engine_pod(container={"state": {}}, phase="Failed")]},
        (False, False, None),
    ),
}


@pytest.mark.parametrize("case", NEEDS)
def test_what_pods_need_is_made_where_it_is_missing(case: str) -> None:
    """(whether the token's Secret is doubted, whether the plugin's ConfigMap is made, what holds up new pods)"""
    more, expected = NEEDS[case]
    children = plan_deployment(running(**more), now=QUIET).children
    assert children is not None
    needs = children.needs
    assert (needs.is_secret_doubtful, needs.plugin is not None, needs.blocked and needs.blocked.reason) == expected
    assert needs.is_secret_mounted


BEHIND = make_view(SQL, generation=3)
NEW = make_view(SQL, generation=4)
LOOKS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "a pod that was never asked": ({"views": {}, "asked": frozenset()}, {"llama-0"}),
    "one that holds the list": ({"views": {"llama-0": NEW}}, set()),
    "one that holds an older list": ({"views": {"llama-0": BEHIND}}, {"llama-0"}),
    "one whose engine is too old to be told": ({"views": {"llama-0": replace(BEHIND, too_old=True)}}, set()),
    "one that lets clients load": ({"views": {"llama-0": replace(BEHIND, guarded=False)}}, set()),
    "one that could not be asked looks after itself": ({"views": {"llama-0": replace(BEHIND, error="refused")}}, set()),
    "one that gets its list by arguments": ({"views": {"llama-0": replace(BEHIND, update_strategy="Rollout")}}, set()),
    "a new list is for all": ({"views": {"llama-0": NEW}, "adapters": NEW_LIST}, {"llama-0"}),
    "one that has ended": ({"pods": [engine_pod(phase="Failed")], "asked": frozenset()}, set()),
    "what it holds, where the list was lost": (
        {"adapters": adapters(previous=None, unasked=("llama-0",)), "views": {"llama-0": NEW}},
        {"llama-0"},
    ),
}


@pytest.mark.parametrize("case", LOOKS)
def test_which_pods_are_asked(case: str) -> None:
    more, expected = LOOKS[case]
    seen = observe(**({"pods": [engine_pod()], "asked": frozenset({"llama-0"})} | more))
    assert plan_deployment(seen, now=QUIET).look_at == expected


UNKNOWN: dict[str, tuple[ListObservation, ListUnknown]] = {
    "pods were not asked what they hold": (
        adapters(previous=None, unasked=("llama-0",)),
        ListUnknown(pods=("llama-0",)),
    ),
    "an adapter was not looked at": (
        adapters(UNDECIDED, previous=None),
        ListUnknown(adapters=(ADAPTER.key,)),
    ),
    "pods may hold what nobody knows of": (
        adapters(decided(Unknown()), previous=None, has_pods=True),
        ListUnknown(),
    ),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_there_is_no_list_while(case: str) -> None:
    seen, expected = UNKNOWN[case]
    plan = plan_deployment(observe(adapters=seen), now=QUIET)
    assert plan.adapters == expected
    assert plan.children is None


def test_with_a_list_an_adapter_that_was_not_looked_at_holds_up_nobody() -> None:
    plan = plan_deployment(observe(adapters=adapters(UNDECIDED)), now=QUIET)
    assert isinstance(plan.adapters, ListPlan)
    assert plan.adapters.modules == LISTED
    assert plan.adapters.adapters == (ADAPTER.key,)


AGAIN: dict[str, tuple[DeploymentObservation, ReasonError | None, float]] = {
    "all is well": (running(), None, LOOK_SECONDS),
    "something was refused": (running(), QUOTA, BLOCKED_SECONDS),
    "the model can't be wanted": (running(model=model(None, blocked=QUOTA)), None, BLOCKED_SECONDS),
    "a pod is being set up": (running(is_setting_up=True), None, SETTING_UP_SECONDS),
}


@pytest.mark.parametrize("case", AGAIN)
def test_when_it_is_looked_at_again(case: str) -> None:
    seen, refused, expected = AGAIN[case]
    assert look_again(seen, plan_deployment(seen, now=QUIET), refused) == expected
