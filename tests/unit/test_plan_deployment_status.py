"""A VLLMDeployment's status: what the platform team reads of model, pods and adapters, in this order."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lora_operator.constants import Reason
from lora_operator.errors import ReasonError
from lora_operator.kube.pods import Pod
from lora_operator.kube.workloads import Workload
from lora_operator.plan.adapter_list import ModuleList
from lora_operator.plan.deployment_pods import replicas_wanted
from lora_operator.plan.deployment_status import DeploymentOutcome, plan_status, service_url
from lora_operator.plan.model_contents import Content, model_is_ready
from tests.unit.builders import (
    LATER,
    NOW,
    engine_pod,
    make_artifact,
    make_deployment,
    make_module,
    make_pod,
    make_pods,
    make_view,
    make_workload,
    not_ready,
    ready_artifact,
    through_the_api,
    told,
)

SQL, CHAT = make_module("sql"), make_module("chat", uid="uid-chat", adapter="team-b/chat")
LIST = ModuleList("serving/llama", 4, (CHAT, SQL))
BASE = ready_artifact("base-1", type="BaseModel", rank=None)
BASE_WORDS = "org/sql@01234567, 128Ki"
GOOD = make_view(SQL, CHAT, generation=4)


def rolled_out(pods: int) -> dict[str, Any]:
    """The Deployment once all of its pods are of the present spec."""
    return make_workload(observedGeneration=1, replicas=pods, updatedReplicas=pods)


def seen(**more: Any) -> DeploymentOutcome:
    """Two pods that serve all of a list of two."""
    values: dict[str, Any] = {
        "deployment": make_deployment(),
        "artifact_name": "base-1",
        "artifact": BASE,
        "blocked": None,
        "workload": rolled_out(2),
        "template_error": None,
        "pods": (),
        "served": make_pods(make_pod("a", GOOD), make_pod("b", GOOD)),
        "modules": LIST,
    }
    values |= more
    if values["workload"] is not None:
        values["workload"] = Workload.parse(values["workload"])
    values["pods"] = [Pod.parse(pod) for pod in values["pods"]]
    return DeploymentOutcome(**values)


def one(view: Any, **more: Any) -> DeploymentOutcome:
    """One pod with this view."""
    return seen(**({"served": make_pods(make_pod("a", view)), "workload": rolled_out(1)} | more))


ROLLING = make_deployment(lora={"updateStrategy": "Rollout"})


def rolling(view: Any, *, waits_for: str | None = None, left_out: int = 0, **more: Any) -> DeploymentOutcome:
    """One pod with its adapters in its arguments."""
    view = replace(view, update_strategy="Rollout", **more)
    without = {Reason.ARGUMENTS_TOO_LONG: left_out} if left_out else {}
    return one(view, deployment=ROLLING, waits_for=waits_for, left_out=without)


def no_pod(**more: Any) -> DeploymentOutcome:
    return seen(**({"served": make_pods(replicas=2)} | more))


STUCK = engine_pod(
    "b",
    is_ready=False,
    container={},
    conditions=({"type": "PodScheduled", "status": "False", "message": "no GPU"},),
)


def half(*, view: Any = GOOD, **more: Any) -> DeploymentOutcome:
    """One pod of two serves."""
    return seen(**({"served": make_pods(make_pod("a", view), make_pod("b", None, is_ready=False))} | more))


MODEL = ("True", "ModelReady", BASE_WORDS)
AVAILABLE = ("True", "Available", "2 of 2 pods ready")
ONE = ("True", "Available", "1 of 1 pods ready")
IN_SYNC = ("True", "InSync", "list 4 with 2 adapters")
TOKENIZER = Content("tokenizer", "tok-1", ready_artifact("tok-1"), None)
DOWNLOADING = Content("tokenizer", "tok-1", make_artifact(conditions=not_ready("Downloading", "1%")), None)
BLOCKED = ReasonError(Reason.CREDENTIALS_NOT_FOUND, "Secret serving/hf does not exist: create it")
BAD_TEMPLATE = ReasonError(Reason.POD_TEMPLATE_INVALID, "spec.template.spec.containers[0].env: invalid")
Words = tuple[str, str, str]
# (what is seen, ModelReady, Available, AdaptersInSync, Ready, whether it is stalled)
Case = tuple[DeploymentOutcome, Words, Words, Words, Words, bool]


def available(
    observation: DeploymentOutcome, reason: str, message: str, *, stalled: bool = False, in_sync: Words = IN_SYNC
) -> Case:
    """Only Available does not hold."""
    words = ("False", reason, message)
    return (observation, MODEL, words, in_sync, words, stalled)


def in_sync(
    observation: DeploymentOutcome, reason: str, message: str, *, ready: Words = ONE, stalled: bool = False
) -> Case:
    """Only AdaptersInSync does not hold."""
    words = ("False", reason, message)
    return (observation, MODEL, ready, words, words, stalled)


CASES: dict[str, Case] = {
    "all is well": (seen(), MODEL, AVAILABLE, IN_SYNC, ("True", "Ready", "2 of 2 pods ready"), False),
    "the base model's artifact is only just made": (
        no_pod(artifact=None, workload=None),
        ("False", "Queued", "ModelArtifact base-1 has not started"),
        (
            "False",
            "ModelNotReady",
            "no pod is made before the base model is in the cache: ModelArtifact base-1 has not started",
        ),
        IN_SYNC,
        ("False", "Queued", "ModelArtifact base-1 has not started"),
        False,
    ),
    "the base model downloads, with the percentage": (
        no_pod(artifact=make_artifact("base-1", conditions=not_ready("Downloading", "39% of 1Gi")), workload=None),
        ("False", "Downloading", "39% of 1Gi"),
        ("False", "ModelNotReady", "no pod is made before the base model is in the cache: 39% of 1Gi"),
        IN_SYNC,
        ("False", "Downloading", "39% of 1Gi"),
        False,
    ),
    "its Secret does not exist": (
        no_pod(artifact=None, artifact_name=None, blocked=BLOCKED, workload=None),
        ("False", "CredentialsNotFound", BLOCKED.message),
        ("False", "ModelNotReady", f"no pod is made before the base model is in the cache: {BLOCKED.message}"),
        IN_SYNC,
        ("False", "CredentialsNotFound", BLOCKED.message),
        True,
    ),
    "its tokenizer downloads": (
        no_pod(workload=None, auxiliary=[DOWNLOADING]),
        ("False", "Downloading", "tokenizer: 1%"),
        ("False", "ModelNotReady", "no pod is made before the base model is in the cache: tokenizer: 1%"),
        IN_SYNC,
        ("False", "Downloading", "tokenizer: 1%"),
        False,
    ),
    "its draft model's Secret does not exist": (
        seen(auxiliary=[TOKENIZER, Content("draftModel", None, None, BLOCKED)]),
        ("False", "CredentialsNotFound", f"draft model: {BLOCKED.message}"),
        AVAILABLE,
        IN_SYNC,
        ("False", "CredentialsNotFound", f"draft model: {BLOCKED.message}"),
        True,
    ),
    "what goes with the base model is there, and named": (
        seen(auxiliary=[TOKENIZER, Content("draftModel", "draft-1", ready_artifact("draft-1"), None)]),
        ("True", "ModelReady", f"{BASE_WORDS}; tokenizer: {BASE_WORDS}; draft model: {BASE_WORDS}"),
        AVAILABLE,
        IN_SYNC,
        ("True", "Ready", "2 of 2 pods ready"),
        False,
    ),
    "another base model downloads while pods serve the one they have": (
        seen(artifact=make_artifact("base-2", conditions=not_ready("Downloading", "1%"))),
        ("False", "Downloading", "1%"),
        AVAILABLE,
        IN_SYNC,
        ("False", "Downloading", "1%"),
        False,
    ),
    "engines start": available(no_pod(), "Progressing", "0 of 2 pods ready; engines are starting"),
    "some pods are ready": (
        seen(served=make_pods(make_pod("a", GOOD), make_pod("b", None, is_ready=False))),
        MODEL,
        ("True", "Available", "1 of 2 pods ready"),
        IN_SYNC,
        ("False", "Progressing", "1 of 2 pods ready"),
        False,
    ),
    "no pod is wanted": available(
        seen(served=make_pods(), deployment=make_deployment(replicas=0)), "ScaledToZero", "spec.replicas is 0"
    ),
    "no node": available(
        no_pod(
            pods=[
                engine_pod(
                    is_ready=False,
                    container={},
                    conditions=({"type": "PodScheduled", "status": "False", "message": "no GPU"},),
                )
            ]
        ),
        "Unschedulable",
        "pod llama-0: no GPU; free or add what it asks for, or change spec.engine.resources or spec.podTemplate",
    ),
    "quota refuses the pods": available(
        no_pod(workload=make_workload(conditions=[{"type": "ReplicaFailure", "status": "True", "message": "quota"}])),
        "PodsRefused",
        "quota; raise the quota, or ask for less: see spec.engine and spec.podTemplate",
    ),
    "the API server refuses the Deployment": available(
        no_pod(workload=None, template_error=BAD_TEMPLATE),
        "PodTemplateInvalid",
        BAD_TEMPLATE.message,
        stalled=True,
    ),
    "a new spec is refused while old pods serve": (
        seen(template_error=BAD_TEMPLATE),
        MODEL,
        AVAILABLE,
        IN_SYNC,
        ("False", "PodTemplateInvalid", f"{BAD_TEMPLATE.message}; the pods that run go on serving"),
        True,
    ),
    "one pod serves and the other has no node": (
        half(pods=[STUCK]),
        MODEL,
        ("True", "Available", "1 of 2 pods ready"),
        IN_SYNC,
        (
            "False",
            "Unschedulable",
            "pod b: no GPU; free or add what it asks for, or change spec.engine.resources or spec.podTemplate; 1 of 2 pods ready",
        ),
        False,
    ),
    "what keeps a pod away comes before what the other still loads": (
        half(pods=[STUCK], view=make_view(SQL, generation=4)),
        MODEL,
        ("True", "Available", "1 of 2 pods ready"),
        ("False", "SyncPending", "pod a is loading chat"),
        (
            "False",
            "Unschedulable",
            "pod b: no GPU; free or add what it asks for, or change spec.engine.resources or spec.podTemplate; 1 of 2 pods ready",
        ),
        False,
    ),
    "an engine without the gate": (
        seen(served=make_pods(make_pod("a", GOOD), make_pod("b", make_view(guarded=False, generation=None)))),
        MODEL,
        (
            "False",
            "GateMissing",
            "pod b: the engine lets clients load adapters: the plugin is not active; "
            "check that engine.command starts vLLM's API server and takes --middleware",
        ),
        ("False", "SyncPending", "pod b holds list None, the current one is 4"),
        (
            "False",
            "GateMissing",
            "pod b: the engine lets clients load adapters: the plugin is not active; "
            "check that engine.command starts vLLM's API server and takes --middleware",
        ),
        True,
    ),
    "an engine that is too old": available(
        one(replace(GOOD, version="0.25.0", too_old=True)),
        "EngineTooOld",
        "vLLM 0.25.0 can't be hot-loaded safely: use 0.26 or newer, or spec.lora.updateStrategy: Rollout",
        stalled=True,
    ),
    "a ready pod whose gate was never proven closed": (
        one(make_view(error="no answer in 10 s", guarded=False)),
        MODEL,
        (
            "False",
            "EngineUnreachable",
            "pod a is ready, but its engine was not seen to refuse clients' loads: no answer in 10 s",
        ),
        ("False", "SyncPending", "pod a: no answer in 10 s"),
        (
            "False",
            "EngineUnreachable",
            "pod a is ready, but its engine was not seen to refuse clients' loads: no answer in 10 s",
        ),
        False,
    ),
    "a pod that does not answer any more": in_sync(
        one(make_view(error="no answer in 10 s")), "SyncPending", "pod a: no answer in 10 s"
    ),
    "a pod whose container was started again and not asked yet": in_sync(
        seen(served=make_pods(make_pod("a", GOOD), make_pod("b", None))),
        "SyncPending",
        "pod b: not asked yet",
        ready=AVAILABLE,
    ),
    "adapters that were not looked at yet": in_sync(
        one(GOOD, modules=None), "SyncPending", "the adapters have not all been looked at yet"
    ),
    "a pod that holds an older list": in_sync(
        one(replace(GOOD, list_generation=3)), "SyncPending", "pod a holds list 3, the current one is 4"
    ),
    "a pod that is still loading": in_sync(one(make_view(SQL, generation=4)), "SyncPending", "pod a is loading chat"),
    "an adapter that an engine refuses holds nobody else up": (
        one(make_view(SQL, generation=4, failures={"chat": "bad regex"})),
        MODEL,
        ONE,
        ("True", "InSync", "list 4; not served: chat (see their status)"),
        ("True", "Ready", "1 of 1 pods ready"),
        False,
    ),
    "something that no object wants is served": in_sync(
        one(replace(GOOD, orphans=("zombie",))), "OrphansLoaded", "pod a answers zombie, which no object wants"
    ),
    "an engine without a registry that the plugin knows": in_sync(
        one(replace(GOOD, atomic_swap=False)),
        "NoAtomicSwap",
        "pod a: vLLM 0.32.0 has no registry that the plugin knows: "
        "while an adapter changes its revision, a few requests for it may get 404",
    ),
    "a list that is not rolled out yet": in_sync(
        rolling(GOOD, list_generation=3, waits_for="until no adapter has changed for 5 s"),
        "SyncPending",
        "list 4 is not rolled out yet: it waits until no adapter has changed for 5 s",
    ),
    "the first pods wait for adapters": available(
        no_pod(deployment=ROLLING, workload=None, modules=replace(LIST, modules=()), waits_for="until x is downloaded"),
        "Progressing",
        "the first pod is made with its adapters: it waits until x is downloaded",
        in_sync=("False", "SyncPending", "list 4 is not rolled out yet: it waits until x is downloaded"),
    ),
    "a pod that is being replaced for another list": in_sync(
        rolling(GOOD, list_generation=3),
        "SyncPending",
        "pod a holds list 3, the current one is 4; the pods are being replaced",
    ),
    "a pod that rolls need not swap": (
        rolling(GOOD, atomic_swap=False),
        MODEL,
        ONE,
        IN_SYNC,
        ("True", "Ready", "1 of 1 pods ready"),
        False,
    ),
    "adapters that don't fit into the arguments": in_sync(
        rolling(GOOD, left_out=2),
        "ArgumentsTooLong",
        "2 adapters don't fit into the pods' arguments (768 KiB): use spec.lora.updateStrategy: HotLoad, "
        "or serve some of them by another VLLMDeployment",
        stalled=True,
    ),
}


ROLLOUTS = {
    "the controller has not seen the spec yet": (
        {"observedGeneration": 0, "replicas": 2, "updatedReplicas": 2},
        (),
        ("False", "Progressing", "rolling out: 0 of 2 pods are of the present spec"),
    ),
    "an old pod is still there": (
        {"observedGeneration": 1, "replicas": 3, "updatedReplicas": 1},
        (),
        ("False", "Progressing", "rolling out: 1 of 2 pods are of the present spec"),
    ),
    "the only new pod keeps exiting": (
        {"observedGeneration": 1, "replicas": 3, "updatedReplicas": 1},
        (
            engine_pod(
                "c",
                is_ready=False,
                container={"ready": False, "restartCount": 2, "state": {"terminated": {"exitCode": 2}}},
            ),
        ),
        (
            "False",
            "CrashLooping",
            "pod c: the engine exited with code 2 and was restarted 2 times; last lines: none (see kubectl logs c --previous); "
            "rolling out: 1 of 2 pods are of the present spec",
        ),
    ),
}


@pytest.mark.parametrize("case", ROLLOUTS)
def test_a_deployment_is_not_ready_while_old_pods_serve_for_new_ones(case: str) -> None:
    status, pods, ready = ROLLOUTS[case]
    workload = make_workload()
    workload["status"] = status
    workload["metadata"]["generation"] = 1
    conditions = told(plan_status(seen(workload=workload, pods=pods), now=NOW).conditions)
    assert conditions["Ready"] == ready
    assert conditions["Available"][0] == "True"


@pytest.mark.parametrize("case", CASES)
def test_plan_deployment(case: str) -> None:
    observation, model, pods, adapters, ready, stalled = CASES[case]
    status = plan_status(observation, now=NOW)
    conditions = told(status.conditions)
    assert ("Stalled" in conditions) is stalled
    conditions.pop("Stalled", None)
    assert conditions == {"ModelReady": model, "Available": pods, "AdaptersInSync": adapters, "Ready": ready}


@pytest.mark.parametrize("case", CASES)
def test_a_second_look_at_the_same_world_changes_nothing(case: str) -> None:
    observation = CASES[case][0]
    first = plan_status(observation, now=NOW)
    stored = observation.deployment.model_copy(update={"status": through_the_api(first)})
    for now in (NOW, LATER):
        assert plan_status(replace(observation, deployment=stored), now=now) == stored.status


def test_what_the_status_says() -> None:
    fleet = make_pods(make_pod("a", GOOD), make_pod("b", make_view(SQL, generation=3)), replicas=3)
    status = plan_status(seen(served=fleet), now=NOW).to_wire()
    del status["conditions"]
    assert status == {
        "observedGeneration": 1,
        "replicas": 2,
        "readyReplicas": 2,
        "readyPods": "2/3",
        "selector": "app.kubernetes.io/component=engine,app.kubernetes.io/managed-by=lora-operator,"
        "lora-operator.dev/vllmdeployment=llama",
        "url": "http://llama.serving.svc:8000",
        "modelPath": f"/model-cache/{BASE.status.path}",
        "modelArtifact": "base-1",
        "listGeneration": 4,
        "adapters": 2,
        "pods": [
            {"name": "a", "ready": True, "listGeneration": 4, "loaded": 2, "version": "0.32.0"},
            {"name": "b", "ready": True, "listGeneration": 3, "loaded": 1, "missing": ["chat"], "version": "0.32.0"},
        ],
    }


def test_what_goes_with_the_base_model_is_named_also_before_it_is_there() -> None:
    draft = Content("draftModel", "draft-1", None, None)
    status = plan_status(seen(auxiliary=[TOKENIZER, draft]), now=NOW)
    assert (status.tokenizer_artifact, status.draft_model_artifact) == ("tok-1", "draft-1")
    assert status.model_path is None, "pods are made once all is there"


def test_no_path_is_told_before_the_model_is_there() -> None:
    artifact = make_artifact("base-1", conditions=not_ready("Verifying"), status={"path": "artifacts/old"})
    assert plan_status(seen(artifact=artifact), now=NOW).model_path is None


def test_what_may_be_long_is_bounded() -> None:
    many = tuple(make_module(f"m{i:03}", uid=f"u{i}") for i in range(200))
    view = make_view(generation=4, orphans=tuple(f"o{i}" for i in range(50)))
    status = plan_status(one(view, modules=ModuleList("serving/llama", 4, many)), now=NOW)
    assert status.pods is not None
    assert status.pods[0].missing == tuple(m.name for m in many[:10])
    assert status.orphans is not None
    assert len(status.orphans) == 20
    assert status.orphans[0] == "a/o0"


def test_a_pod_of_which_nothing_is_known_is_listed_as_that() -> None:
    status = plan_status(one(None), now=NOW)
    assert status.pods is not None
    assert status.pods[0].to_wire() == {"name": "a", "ready": True, "loaded": 0}


REPLICAS: dict[str, tuple[int | None, dict[str, Any] | None, int]] = {
    "the spec's": (3, make_workload(), 3),
    "none, which the spec may say too": (0, make_workload(), 0),
    "an autoscaler's": (None, make_workload(), 2),
    "Kubernetes' default before there is a Deployment": (None, None, 1),
    "not those of an earlier one of its name, which is still going": (None, make_workload(owner="uid-earlier"), 1),
}


@pytest.mark.parametrize("case", REPLICAS)
def test_replicas_wanted(case: str) -> None:
    replicas, workload, expected = REPLICAS[case]
    live = Workload.parse(workload) if workload is not None else None
    assert replicas_wanted(make_deployment(replicas=replicas), live) == expected


def test_small_questions() -> None:
    assert service_url(make_deployment(engine={"port": 9000})) == "http://llama.serving.svc:9000"
    assert model_is_ready(BASE)
    assert not model_is_ready(None)
    assert not model_is_ready(make_artifact())


def test_a_deleted_adapter_that_pods_answer_until_they_are_replaced_is_told() -> None:
    left = ModuleList("serving/llama", 5, (SQL,))
    status = plan_status(replace(rolling(GOOD), modules=left), now=NOW)
    assert status.orphans == ("a/chat",)
    assert told(status.conditions)["AdaptersInSync"][1] == "SyncPending"
    assert plan_status(replace(one(GOOD), modules=left), now=NOW).orphans is None, "pods are told in a moment"
