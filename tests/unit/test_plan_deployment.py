"""What becomes of a deployment's pods: they roll for what they can't do without, and else they are scaled or left alone."""

from __future__ import annotations

import copy
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from lora_operator.api.deployment import VLLMDeployment
from lora_operator.constants import ANNOTATION_ARGUMENTS, ANNOTATION_KIT, Reason
from lora_operator.desired.children import build_gate_secret
from lora_operator.errors import ReasonError
from lora_operator.plan.adapter_list import Decision, Module, ModuleList
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
from lora_operator.plan.deployment_pods import PodView
from lora_operator.plan.model_contents import Content, ModelContents
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
KIT = {"plugin.py": "pass"}
ROLLING = make_deployment(lora={"updateStrategy": "Rollout"})
QUIET = NOW + timedelta(seconds=60)


def model(artifact: Any = BASE, *, cache: Any = None, **more: Any) -> ModelContents:
    """The base model alone."""
    known = make_cache() if cache is None else cache
    return ModelContents(known, (Content("model", "base-1", artifact, more.pop("blocked", None)),), **more)


def decided(*, entry: Module | None = SQL, **more: Any) -> Candidate:
    """An adapter of which it was decided what it has served."""
    form = {"uid": ADAPTER.metadata.uid, "generation": 1, "accepted": True}
    return Candidate(ADAPTER, {}, Decision(**(form | {"module": entry} | more)))


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
        "gate": build_gate_secret(found, "token"),
        "kit": "kit-1",
        "kit_files": KIT,
        "is_kit_there": True,
        "pods": (),
        "served": make_pods(),
    }
    return DeploymentObservation(**(values | more))


def as_live(manifest: dict[str, Any]) -> dict[str, Any]:
    """The Deployment as the API server has it."""
    body = copy.deepcopy(manifest)
    body["metadata"]["uid"] = "uid-deploy"
    body["status"] = {}
    return body


def manifest_of(plan: DeploymentPlan) -> dict[str, Any]:
    assert isinstance(plan.pods, RollPods)
    return plan.pods.manifest


def running(deployment: VLLMDeployment | None = None, *, made: dict[str, Any] | None = None, **more: Any) -> Any:
    """The same, with the Deployment that was made from what `made` says otherwise; `more` is what came since."""
    before = observe(**{"deployment": deployment, **(made or {})})
    live = as_live(manifest_of(plan_deployment(before, now=QUIET)))
    return observe(**{"deployment": deployment, "workload": live, **(made or {}), **more})


def with_workload(seen: DeploymentObservation, change: Any) -> DeploymentObservation:
    """Its Deployment changed."""
    live = copy.deepcopy(seen.workload)
    change(live)
    return replace(seen, workload=live)


def mine(body: dict[str, Any]) -> None:
    body["spec"]["replicas"] = 5


def of_another_kit(body: dict[str, Any]) -> None:
    body["metadata"]["annotations"][ANNOTATION_KIT] = "kit-0"


def somebody_elses(body: dict[str, Any]) -> None:
    body["metadata"]["ownerReferences"] = []


def with_fewer(body: dict[str, Any]) -> None:
    body["spec"]["replicas"] = 1


QUOTA = ReasonError(Reason.PODS_REFUSED, "exceeded quota")
UNSEEN = make_cache(access_modes=())
UNSEEN.access_modes = None  # type: ignore[misc]  # nothing is known of the claim
ROLL, LEAVE = RollPods, LeavePods()
# What is seen → what becomes of the pods
PODS: dict[str, tuple[DeploymentObservation, Any]] = {
    "nothing is there yet: the pods are made": (observe(), ROLL),
    "all is as it was made: the pods are left alone": (running(), LEAVE),
}
