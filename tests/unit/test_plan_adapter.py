"""A LoRAAdapter's status: what a tenant reads at every step from applied to answering, and what its deployment is told."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lora_operator.api import LoRAAdapter, ModelArtifact
from lora_operator.conditions import failing, find
from lora_operator.constants import Condition, Reason
from lora_operator.errors import ReasonError
from lora_operator.plan.adapter import AdapterPlan, plan_adapter, plan_refused
from lora_operator.plan.adapter_content import AdapterObservation
from lora_operator.plan.adapter_list import Drop, Keep, Serve, Unknown
from lora_operator.plan.wants import build_artifact
from tests.unit.builders import (
    COMMIT,
    LATER,
    NOW,
    make_adapter,
    make_artifact,
    make_cache,
    make_decision,
    make_deployment,
    make_module,
    make_pod,
    make_pods,
    make_view,
    not_ready,
    ready_artifact,
    served_by,
    through_the_api,
    told,
)

SECRET = ("team-a", "hf", "token", "uid-secret")
BASE = "base-1"
NO_SECRET = ReasonError(Reason.CREDENTIALS_NOT_FOUND, "Secret team-a/hf does not exist: create it")
URL = "http://llama.serving.svc:8000"
ROLLING = make_deployment(lora={"updateStrategy": "Rollout"})
NO_ROOM = (
    "the pods' arguments of VLLMDeployment serving/llama have no room for it (768 KiB for all adapters): name another "
    "deployment, or have spec.lora.updateStrategy: HotLoad set there"
)


def artifact_key(adapter: LoRAAdapter, credentials: Any = None) -> tuple[str, str]:
    """Where an adapter's artifact is."""
    manifest = build_artifact(
        cache=make_cache(), source=adapter.spec.source, base_artifact=BASE, credentials=credentials
    )
    return manifest["metadata"]["namespace"], manifest["metadata"]["name"]


NAME = artifact_key(make_adapter())[1]
PRIVATE = make_adapter(secret="hf")
PRIVATE_NAME = artifact_key(PRIVATE, SECRET)[1]
SQL = make_module(path=f"/model-cache/artifacts/{NAME}-{COMMIT}")


def seen(adapter: LoRAAdapter | None = None, *artifacts: ModelArtifact, **more: Any) -> AdapterObservation:
    """An adapter that a deployment with a Ready base model and one pod admits."""
    values: dict[str, Any] = {
        "adapter": adapter or make_adapter(),
        "deployment": make_deployment(),
        "namespace_labels": {},
        "rivals": (),
        "cache": make_cache(),
        "base_artifact": BASE,
        "credentials": None,
        "artifacts": {a.key: a for a in artifacts},
        "served": make_pods(make_pod("a", make_view())),
        "url": URL,
    }
    return AdapterObservation(**(values | more))


GOOD = ready_artifact(NAME, base=BASE)
ACCEPTED = ("True", "Accepted", "served by serving/llama as sql")
DOWNLOADED = ("True", "Downloaded", f"ModelArtifact serving/{NAME}: org/sql@01234567, 128Ki")
NOT_ACCEPTED = {
    "Downloaded": ("False", "NotAccepted", "nothing is downloaded before the adapter is accepted"),
    "Loaded": ("False", "NotAccepted", "the adapter is not accepted"),
}
NOT_DOWNLOADED = ("False", "NotDownloaded", "the wanted revision is not downloaded")


def refused(reason: str, message: str) -> dict[str, tuple[str, str, str]]:
    words = (reason, message)
    return {"Accepted": ("False", *words), **NOT_ACCEPTED, "Ready": ("False", *words), "Stalled": ("True", *words)}


def waits(reason: str, message: str, *, stalled: bool = False) -> dict[str, tuple[str, str, str]]:
    words = (reason, message)
    return {
        "Accepted": ACCEPTED,
        "Downloaded": ("False", *words),
        "Loaded": NOT_DOWNLOADED,
        "Ready": ("False", *words),
    } | ({"Stalled": ("True", *words)} if stalled else {})


def loads(reason: str, message: str) -> dict[str, tuple[str, str, str]]:
    return {
        "Accepted": ACCEPTED,
        "Downloaded": DOWNLOADED,
        "Loaded": ("False", reason, message),
        "Ready": ("False", reason, message),
    }


def served(counts: str) -> dict[str, tuple[str, str, str]]:
    return {
        "Accepted": ACCEPTED,
        "Downloaded": DOWNLOADED,
        "Loaded": ("True", "Loaded", f"{counts} ready pods serve it"),
        "Ready": ("True", "Ready", f"{counts} ready pods serve sql"),
    }


def keeps(plan: AdapterPlan) -> str:
    """What becomes of the adapter's entry in the list."""
    decision = plan.decision
    if isinstance(decision.entry, Keep | Unknown):
        return "kept"
    return "served" if isinstance(decision.entry, Serve) else "none"


TOO_LARGE = (
    "the adapter's rank is 128, VLLMDeployment serving/llama allows 64: "
    "use an adapter of a smaller rank, or raise spec.lora.maxLoraRank there"
)
RIVAL = make_adapter("theirs", "team-b", created="2025-01-01T00:00:00Z", servedName="sql")
YOUNGER = make_adapter("theirs", "team-b", created="2026-02-01T00:00:00Z", servedName="sql")
TAKEN = (
    "servedName sql is taken by an older adapter of serving/llama: "
    "choose another; it is taken over should the older one go"
)
BLOCKED = make_deployment(
    conditions={"ModelReady": ("False", "CredentialsNotFound", "Secret serving/hf does not exist: create it")},
)
BLOCKED = BLOCKED.model_copy(
    update={
        "status": BLOCKED.status.model_copy(
            update={
                "conditions": tuple(c.model_copy(update={"observed_generation": 1}) for c in BLOCKED.status.conditions)
            }
        )
    }
)
# (what is seen, conditions, the list's entry, seconds to the next look)
Case = tuple[AdapterObservation, dict[str, tuple[str, str, str]] | None, str, float | None]
CASES: dict[str, Case] = {
    "no deployment": (
        seen(deployment=None, cache=None, served=None, url=None),
        refused(
            "DeploymentNotFound",
            "VLLMDeployment serving/llama does not exist: create it or change vllmDeploymentRef",
        ),
        "none",
        None,
    ),
    "a name that an older adapter has: it stands by, downloaded": (
        seen(None, GOOD, rivals=(RIVAL,)),
        refused("NameConflict", TAKEN) | {"Downloaded": DOWNLOADED},
        "served",
        None,
    ),
    "a name that an older adapter has, and its artifact downloads": (
        seen(None, make_artifact(NAME, base=BASE, conditions=not_ready("Downloading", "39% of 1Gi")), rivals=(RIVAL,)),
        refused("NameConflict", TAKEN) | {"Downloaded": ("False", "Downloading", "39% of 1Gi")},
        "kept",
        None,
    ),
    "a name that an older adapter has, before anything is known of the pods": (
        seen(None, GOOD, rivals=(RIVAL,), served=None),
        refused("NameConflict", TAKEN) | {"Downloaded": DOWNLOADED},
        "served",
        None,
    ),
    "a name whose holder can't be read": (
        seen(None, GOOD, name_held=True),
        refused("NameConflict", TAKEN) | {"Downloaded": DOWNLOADED},
        "served",
        None,
    ),
    "a name that a younger adapter wants too": (
        seen(None, GOOD, rivals=(YOUNGER,), served=make_pods(make_pod("a", make_view(SQL)))),
        served("1 of 1"),
        "served",
        None,
    ),
    "an S3 endpoint that the cache does not allow": (
        seen(make_adapter(s3={"bucket": "models", "endpoint": "https://s3.test"}), GOOD, base_artifact=None),
        refused(
            "SourceNotAllowed",
            "ModelCache serving/default does not allow the S3 endpoint https://s3.test: use one that it allows, or ask its "
            "owner to add this one to spec.s3.allowedEndpoints",
        ),
        "none",
        None,
    ),
    "labels of its namespace that are not known: nothing changes": (
        seen(
            deployment=make_deployment(policy={"from": "Selector", "selector": {"matchLabels": {"a": "b"}}}),
            namespace_labels=None,
        ),
        None,
        "kept",
        1.0,
    ),
    "a deployment that was not planned yet: nothing changes": (seen(base_artifact=None), None, "kept", 1.0),
    "a deployment that can't want its base model": (
        seen(deployment=BLOCKED, base_artifact=None),
        waits(
            "Queued",
            "waits for the base model of VLLMDeployment serving/llama, which is held up by CredentialsNotFound: "
            "see its status",
        ),
        "kept",
        10.0,
    ),
    "a deployment without a cache": (
        seen(cache=ReasonError(Reason.CACHE_NOT_READY, "ModelCache serving/x does not exist")),
        waits("CacheNotReady", "ModelCache serving/x does not exist"),
        "kept",
        None,
    ),
    "a Secret that does not exist": (
        seen(PRIVATE, credentials=NO_SECRET),
        waits("CredentialsNotFound", "Secret team-a/hf does not exist: create it", stalled=True),
        "kept",
        10.0,
    ),
    "its artifact is only just made": (
        seen(),
        waits("Queued", f"ModelArtifact serving/{NAME} has not started"),
        "kept",
        None,
    ),
    "its artifact downloads": (
        seen(None, make_artifact(NAME, base=BASE, conditions=not_ready("Downloading", "39% of 1Gi"))),
        waits("Downloading", "39% of 1Gi"),
        "kept",
        None,
    ),
    "its artifact failed": (
        seen(None, make_artifact(NAME, base=BASE, conditions=not_ready("InvalidAdapter", "no tensors"))),
        waits("InvalidAdapter", "no tensors", stalled=True),
        "kept",
        None,
    ),
    "a private one that was refused looks whether its Secret changed": (
        seen(
            PRIVATE,
            make_artifact(PRIVATE_NAME, base=BASE, credentials=SECRET, conditions=not_ready("Unauthorized", "401")),
            credentials=SECRET,
        ),
        waits("Unauthorized", "401", stalled=True),
        "kept",
        10.0,
    ),
    "a rank above the deployment's": (
        seen(None, ready_artifact(NAME, rank=128, base=BASE)),
        {
            "Accepted": ("False", "RankTooLarge", TOO_LARGE),
            "Downloaded": DOWNLOADED,
            "Loaded": ("False", "NotAccepted", "the adapter is not accepted"),
            "Ready": ("False", "RankTooLarge", TOO_LARGE),
            "Stalled": ("True", "RankTooLarge", TOO_LARGE),
        },
        "none",
        None,
    ),
    "the rank that the deployment just allows": (
        seen(None, ready_artifact(NAME, rank=64, base=BASE), served=make_pods(make_pod("a", make_view(SQL)))),
        served("1 of 1"),
        "served",
        None,
    ),
    "nothing is known of the pods yet: what stands in the status stays": (
        seen(None, GOOD, served=None),
        None,
        "served",
        5.0,
    ),
    "every ready pod serves it": (
        seen(None, GOOD, served=make_pods(make_pod("a", make_view(SQL)), make_pod("b", make_view(SQL)))),
        served("2 of 2"),
        "served",
        None,
    ),
    "a pod that is not ready does not count": (
        seen(None, GOOD, served=make_pods(make_pod("a", make_view(SQL)), make_pod("b", make_view(), is_ready=False))),
        served("1 of 1"),
        "served",
        None,
    ),
    "no pod serves it yet": (
        seen(None, GOOD),
        loads("Loading", "0 of 1 ready pods serve it"),
        "served",
        None,
    ),
    "some pods serve it": (
        seen(None, GOOD, served=make_pods(make_pod("a", make_view(SQL)), make_pod("b", make_view()))),
        loads("PartiallyLoaded", "1 of 2 ready pods serve it"),
        "served",
        None,
    ),
    "no pod serves it yet, and none is told of it": (
        seen(None, GOOD, deployment=ROLLING),
        loads(
            "Loading", "0 of 1 ready pods serve it; it comes with the pods that replace them (updateStrategy: Rollout)"
        ),
        "served",
        None,
    ),
    "the pods' arguments have no room for it": (
        seen(None, GOOD, deployment=ROLLING, left_out=Reason.ARGUMENTS_TOO_LONG),
        loads("ArgumentsTooLong", NO_ROOM) | {"Stalled": ("True", "ArgumentsTooLong", NO_ROOM)},
        "served",
        None,
    ),
    "an engine refuses it": (
        seen(
            None,
            GOOD,
            served=make_pods(make_pod("a", make_view(SQL)), make_pod("b", make_view(failures={"sql": "bad regex"}))),
        ),
        loads("EngineRefused", "1 of 2 ready pods serve it; b: bad regex"),
        "served",
        None,
    ),
    "it is Lazy, and nobody has asked for it": (
        seen(
            make_adapter(loadPolicy="Lazy"),
            GOOD,
            served=make_pods(make_pod("a", make_view(SQL)), make_pod("b", make_view(waiting={"sql": SQL.path}))),
        ),
        {
            "Accepted": ACCEPTED,
            "Downloaded": DOWNLOADED,
            "Loaded": ("True", "Loaded", "2 of 2 ready pods serve it, 1 of them from the first request on"),
            "Ready": ("True", "Ready", "2 of 2 ready pods serve sql"),
        },
        "served",
        None,
    ),
    "it is Lazy, and a pod was not told of it yet": (
        seen(make_adapter(loadPolicy="Lazy"), GOOD),
        loads("Loading", "0 of 1 ready pods serve it"),
        "served",
        None,
    ),
    "it is suspended": (
        seen(make_adapter(suspend=True), GOOD, served=make_pods(make_pod("a", make_view(SQL)))),
        loads("Suspended", "spec.suspend is true: the adapter is kept, and not served"),
        "none",
        None,
    ),
    "it is suspended while its artifact downloads": (
        seen(
            make_adapter(suspend=True),
            make_artifact(NAME, base=BASE, conditions=not_ready("Downloading", "39% of 1Gi")),
        ),
        waits("Downloading", "39% of 1Gi")
        | {"Loaded": ("False", "Suspended", "spec.suspend is true: the adapter is kept, and not served")},
        "none",
        None,
    ),
    "a pod does not answer": (
        seen(None, GOOD, served=make_pods(make_pod("a", make_view(SQL)), make_pod("b", make_view(error="timed out")))),
        loads("EngineUnreachable", "1 of 2 ready pods serve it; b: timed out"),
        "served",
        None,
    ),
    "a pod does not answer and another is still loading": (
        seen(None, GOOD, served=make_pods(make_pod("a", make_view()), make_pod("b", make_view(error="timed out")))),
        loads("Loading", "0 of 2 ready pods serve it; b: timed out"),
        "served",
        None,
    ),
    "no pod is ready, and its deployment has not said why": (
        seen(None, GOOD, served=make_pods(make_pod("a", None, is_ready=False), replicas=2)),
        loads("NoReadyPods", "0 of 2 pods of VLLMDeployment serving/llama are ready"),
        "served",
        None,
    ),
    "no pod is ready, and its deployment says why: the reason, and no log line of the engine": (
        seen(
            None,
            GOOD,
            deployment=make_deployment(
                conditions={"Available": ("False", "CrashLooping", "pod llama-0: last lines: /secret/path leaked")}
            ),
            served=make_pods(make_pod("llama-0", None, is_ready=False), replicas=2),
        ),
        loads(
            "NoReadyPods",
            "0 of 2 pods of VLLMDeployment serving/llama are ready: CrashLooping: a container of an engine pod keeps exiting; "
            "the VLLMDeployment's message has its last lines; its status has the details",
        ),
        "served",
        None,
    ),
    "no pod can be made, and its deployment says why": (
        seen(
            None,
            GOOD,
            deployment=make_deployment(
                conditions={"Available": ("False", "PodsRefused", "exceeded quota: secret-name")}
            ),
            served=make_pods(replicas=2),
        ),
        loads(
            "NoReadyPods",
            "0 of 2 pods of VLLMDeployment serving/llama are ready: PodsRefused: quota or admission refuses the engine pods, "
            "their Deployment, or another object of the fleet; its status has the details",
        ),
        "served",
        None,
    ),
    "no pod is ready any more, and its deployment does not know yet": (
        seen(
            None,
            GOOD,
            deployment=make_deployment(conditions={"Available": ("True", "Available", "2 of 2 pods ready")}),
            served=make_pods(make_pod("llama-0", None, is_ready=False), replicas=2),
        ),
        loads("NoReadyPods", "0 of 2 pods of VLLMDeployment serving/llama are ready"),
        "served",
        None,
    ),
    "no pod is wanted": (
        seen(None, GOOD, served=make_pods(replicas=0)),
        loads("ScaledToZero", "the deployment is scaled to zero replicas"),
        "served",
        None,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_plan_adapter(case: str) -> None:
    observation, conditions, entry, again = CASES[case]
    plan = plan_adapter(observation, now=NOW)
    assert (told(plan.status.conditions) if plan.status else None) == conditions
    assert (keeps(plan), plan.requeue_after) == (entry, again)
    assert (plan.decision.uid, plan.decision.generation) == ("uid-team-a-sql", 1)


@pytest.mark.parametrize("case", CASES)
def test_a_second_look_at_the_same_world_changes_nothing(case: str) -> None:
    observation = CASES[case][0]
    first = plan_adapter(observation, now=NOW)
    if first.status is None:
        return
    stored = observation.adapter.model_copy(update={"status": through_the_api(first.status)})
    for now in (NOW, LATER):
        second = plan_adapter(replace(observation, adapter=stored), now=now)
        assert second == replace(first, status=stored.status)


def test_what_the_status_of_a_served_adapter_says() -> None:
    adapter = make_adapter(servedName="text2sql", baseModelName="llama")
    module = make_module("text2sql", path=SQL.path, base="llama")
    plan = plan_adapter(seen(adapter, GOOD, served=make_pods(make_pod("a", make_view(module)))), now=NOW)
    assert plan.status is not None
    status = plan.status.to_wire()
    del status["conditions"]
    assert status == {
        "observedGeneration": 1,
        "servedName": "text2sql",
        "baseModelName": "llama",
        "url": URL,
        "resolvedRevision": COMMIT,
        "revision": "01234567",
        "digest": "sha256:aa",
        "sizeBytes": 131072,
        "size": "128Ki",
        "rank": 8,
        "targetModules": ["q_proj"],
        "artifactRef": {"namespace": "serving", "name": NAME},
        "readyPods": "1/1",
        "pods": {"wanted": 1, "loaded": 1},
    }


def test_what_the_deployment_is_told() -> None:
    plan = plan_adapter(seen(None, GOOD), now=NOW)
    assert plan.decision == make_decision(Serve(SQL), artifact=("serving", NAME))
    assert SQL.base_model_name == "meta/Llama", "the first served name is the default lineage"


def test_what_of_the_spec_the_deployment_is_told() -> None:
    adapter = make_adapter(servedName="text2sql", placement={"preload": 2})
    module = served_by(plan_adapter(seen(adapter, GOOD), now=NOW).decision)
    assert module is not None
    assert (module.name, module.lazy, module.preload) == ("text2sql", False, 2)
    lazy = served_by(plan_adapter(seen(make_adapter(loadPolicy="Lazy"), GOOD), now=NOW).decision)
    assert lazy is not None
    assert (lazy.name, lazy.lazy, lazy.preload) == ("sql", True, 0)


def test_credentials_are_lent_to_the_artifact() -> None:
    plan = plan_adapter(seen(PRIVATE, credentials=SECRET), now=NOW)
    assert plan.decision.reference.artifact == ("serving", PRIVATE_NAME)
    assert plan.decision.reference.credentials == SECRET
    assert plan.artifact is not None
    assert plan.artifact["metadata"]["name"] == PRIVATE_NAME


def test_nothing_is_fetched_for_one_that_is_not_admitted() -> None:
    plan = plan_adapter(CASES["no deployment"][0], now=NOW)
    assert (plan.artifact, plan.decision.reference.artifact, plan.decision.reference.credentials) == (None, None, None)


def test_one_that_stands_by_for_its_name_has_everything_ready() -> None:
    plan = plan_adapter(seen(None, GOOD, rivals=(RIVAL,)), now=NOW)
    assert (plan.decision.reference.artifact, plan.decision.entry) == (("serving", NAME), Serve(SQL))


def test_one_that_stands_by_and_whose_artifact_is_refused_says_that_its_name_is_taken() -> None:
    observation = seen(rivals=(RIVAL,))
    plan = plan_refused(
        observation, plan_adapter(observation, now=NOW), failing(Reason.QUEUED, "exceeded quota"), now=NOW
    )
    assert plan.status is not None
    assert told(plan.status.conditions)["Ready"] == ("False", "NameConflict", TAKEN)
    assert told(plan.status.conditions)["Downloaded"] == ("False", "Queued", "exceeded quota")


def test_one_that_is_suspended_holds_its_name_and_its_content_and_is_not_served() -> None:
    older = make_adapter(created="2026-01-01T00:00:00Z", suspend=True)
    plan = plan_adapter(seen(older, GOOD, rivals=(make_adapter("other", created="2026-01-02T00:00:00Z"),)), now=NOW)
    assert plan.status is not None
    assert told(plan.status.conditions)["Accepted"] == ACCEPTED
    assert told(plan.status.conditions)["Loaded"][1] == "Suspended"
    assert (plan.decision.reference.artifact, plan.decision.entry) == (("serving", NAME), Drop())


def test_one_that_is_suspended_and_stands_by_says_that_its_name_is_taken() -> None:
    plan = plan_adapter(seen(make_adapter(suspend=True), GOOD, rivals=(RIVAL,)), now=NOW)
    assert plan.status is not None
    assert told(plan.status.conditions)["Ready"] == ("False", "NameConflict", TAKEN)
    assert told(plan.status.conditions)["Loaded"] == NOT_ACCEPTED["Loaded"]
    assert plan.decision.entry == Drop()


def test_with_qualified_names_the_status_has_the_name_that_clients_write() -> None:
    deployment = make_deployment(names="NamespaceQualified")
    module = make_module("team-a/sql", path=SQL.path)
    plan = plan_adapter(
        seen(None, GOOD, deployment=deployment, served=make_pods(make_pod("a", make_view(module)))), now=NOW
    )
    assert plan.status is not None
    assert plan.status.served_name == "team-a/sql"
    assert told(plan.status.conditions)["Accepted"] == ("True", "Accepted", "served by serving/llama as team-a/sql")
    assert told(plan.status.conditions)["Ready"] == ("True", "Ready", "1 of 1 ready pods serve team-a/sql")
    assert plan.decision.entry == Serve(module)


def test_a_namespace_that_is_not_admitted_learns_nothing_of_the_deployment() -> None:
    deployment = make_deployment(policy={"from": "Same"}, served_names=("hush/Hush",))
    plan = plan_adapter(seen(deployment=deployment, served=None, url=None), now=NOW)
    assert plan.status is not None
    assert told(plan.status.conditions)["Ready"][1] == "NamespaceNotAllowed"
    assert "hush" not in str(plan.status.to_wire()).lower()
    assert (plan.status.base_model_name, plan.status.url, plan.artifact) == (None, None, None)


@pytest.mark.parametrize(
    "case",
    [
        "labels of its namespace that are not known: nothing changes",
        "a deployment that was not planned yet: nothing changes",
    ],
)
def test_unknown_is_not_unwanted(case: str) -> None:
    decision = plan_adapter(CASES[case][0], now=NOW).decision
    assert decision.entry == Unknown(), "its artifact may be wanted: nothing may be taken for unwanted"


def test_an_adapter_of_a_blocked_base_model_keeps_what_it_has_and_holds_up_no_cleaning() -> None:
    decision = plan_adapter(CASES["a deployment that can't want its base model"][0], now=NOW).decision
    assert decision.entry == Keep()


def test_a_refused_artifact_is_told_and_the_adapter_keeps_what_it_has() -> None:
    observation = seen()
    cause = failing(Reason.QUEUED, "its ModelArtifact can't be made: exceeded quota; tried again every minute")
    plan = plan_refused(observation, plan_adapter(observation, now=NOW), cause, now=NOW)
    assert plan.status is not None
    assert told(plan.status.conditions)["Ready"] == ("False", "Queued", cause.message)
    assert plan.decision.entry == Keep()


def downloaded(adapter: LoRAAdapter, artifact: ModelArtifact, **more: Any) -> LoRAAdapter:
    """The adapter as it stands once its artifact is Ready."""
    plan = plan_adapter(seen(adapter, artifact, credentials=SECRET, **more), now=NOW)
    assert plan.status is not None
    return adapter.model_copy(update={"status": through_the_api(plan.status)})


PRIVATE_GOOD = ready_artifact(PRIVATE_NAME, base=BASE, credentials=SECRET)
HAD = downloaded(PRIVATE, PRIVATE_GOOD)


def test_content_that_was_authorised_stays_when_its_secret_goes() -> None:
    plan = plan_adapter(seen(HAD, PRIVATE_GOOD, credentials=NO_SECRET), now=LATER)
    assert isinstance(plan.decision.entry, Serve)
    assert plan.decision.reference.artifact == PRIVATE_GOOD.key
    assert plan.decision.reference.credentials is None
    assert plan.status == HAD.status
    assert plan.artifact is not None
    assert plan.artifact["spec"] == PRIVATE_GOOD.spec.to_wire()


def test_content_that_was_authorised_stays_when_its_secret_goes_and_something_else_of_the_spec_changes() -> None:
    changed = HAD.model_copy(update={"metadata": HAD.metadata.model_copy(update={"generation": 2})})
    plan = plan_adapter(seen(changed, PRIVATE_GOOD, credentials=NO_SECRET), now=LATER)
    assert isinstance(plan.decision.entry, Serve)
    assert plan.decision.reference.artifact == PRIVATE_GOOD.key


CHANGED: dict[str, AdapterObservation] = {
    "the spec asks for something else since": seen(
        make_adapter(repo="org/another", secret="hf").model_copy(update={"status": HAD.status}),
        PRIVATE_GOOD,
        credentials=NO_SECRET,
    ),
    "the artifact is gone": seen(HAD, credentials=NO_SECRET),
    "the artifact is not Ready": seen(
        HAD, make_artifact(PRIVATE_NAME, base=BASE, conditions=not_ready("Queued")), credentials=NO_SECRET
    ),
    "pods mount another cache since": seen(
        HAD, PRIVATE_GOOD, credentials=NO_SECRET, cache=make_cache("other", uid="uid-other")
    ),
    "pods have another base model since, which it was not checked against": seen(
        HAD, PRIVATE_GOOD, credentials=NO_SECRET, base_artifact="base-2"
    ),
}


@pytest.mark.parametrize("case", CHANGED)
def test_what_was_authorised_is_no_more_than_that(case: str) -> None:
    plan = plan_adapter(CHANGED[case], now=LATER)
    assert not isinstance(plan.decision.entry, Serve)
    assert isinstance(plan.decision.entry, Keep), "what pods serve stays until there is something else"
    assert plan.artifact is None
    assert plan.status is not None
    assert told(plan.status.conditions)["Ready"][1] == "CredentialsNotFound"


def test_that_is_not_decided_before_the_deployment_was_planned() -> None:
    plan = plan_adapter(seen(HAD, PRIVATE_GOOD, credentials=NO_SECRET, base_artifact=None), now=LATER)
    assert plan.status is None
    assert plan.decision.entry == Unknown()


def test_a_secret_made_anew_is_another_want() -> None:
    plan = plan_adapter(seen(HAD, PRIVATE_GOOD, credentials=(*SECRET[:3], "uid-2")), now=LATER)
    assert plan.decision.reference.artifact not in (None, PRIVATE_GOOD.key)
    assert not isinstance(plan.decision.entry, Serve)
    assert isinstance(plan.decision.entry, Keep)


def test_what_it_has_stays_wanted_while_its_cache_is_away() -> None:
    gone = ReasonError(Reason.CACHE_NOT_READY, "ModelCache serving/x does not exist")
    plan = plan_adapter(seen(HAD, PRIVATE_GOOD, cache=gone), now=LATER)
    assert plan.decision.reference.artifact == PRIVATE_GOOD.key
    assert not isinstance(plan.decision.entry, Serve)
    assert isinstance(plan.decision.entry, Keep)
    assert plan.status is not None
    assert told(plan.status.conditions)["Ready"][1] == "CacheNotReady"
    assert plan.status.artifact_ref == HAD.status.artifact_ref


def test_what_the_checks_in_a_pod_say_is_told_as_it_is() -> None:
    """An engine's version is known in its pod alone, so it is the first place where it can be judged."""
    says = "it needs vLLM 0.32 or newer; this engine is 0.31"
    plan = plan_adapter(seen(None, GOOD, served=make_pods(make_pod("a", make_view(failures={"sql": says})))), now=NOW)
    assert plan.status is not None
    loaded = find(plan.status.conditions, Condition.LOADED)
    assert loaded is not None
    assert (loaded.status, loaded.reason) == ("False", Reason.ENGINE_REFUSED)
    assert loaded.message == f"0 of 1 ready pods serve it; a: {says}"
    assert [(one.pod, one.message) for one in plan.status.failures or ()] == [("a", says)]


def test_failures_are_bounded() -> None:
    pods = [make_pod(f"p{i}", make_view(failures={"sql": "x" * 5000})) for i in range(9)]
    plan = plan_adapter(seen(None, GOOD, served=make_pods(*pods)), now=NOW)
    assert plan.status is not None
    assert plan.status.failures is not None
    assert [f.pod for f in plan.status.failures] == ["p0", "p1", "p2", "p3", "p4"]
    assert all(len(f.message) <= 1024 for f in plan.status.failures)
    assert plan.status.ready_pods == "0/9"
    assert all(len(c.message) <= 2048 for c in plan.status.conditions)


def test_failures_go_once_there_are_none() -> None:
    bad = plan_adapter(seen(None, GOOD, served=make_pods(make_pod("a", make_view(failures={"sql": "x"})))), now=NOW)
    assert bad.status is not None
    adapter = make_adapter().model_copy(update={"status": bad.status})
    good = plan_adapter(seen(adapter, GOOD, served=make_pods(make_pod("a", make_view(SQL)))), now=NOW)
    assert good.status is not None
    assert "failures" not in good.status.to_wire()
