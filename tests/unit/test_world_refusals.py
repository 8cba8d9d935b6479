"""What the API server refuses, or a Secret that goes, holds up only what needs it: on the world of the property test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from lora_operator.errors import ConflictError, ForbiddenError, InvalidObjectError, KubeError, UnavailableError
from lora_operator.names import modules_config_map, plugin_config_map
from tests.unit.fake_kube import Json
from tests.unit.model_world import LLAMA, SERVING, World
from tests.unit.test_world_converging import (
    ADAPTERS,
    adapter,
    apply,
    cache,
    check_converged,
    check_idempotent,
    claim,
    delete,
    deployment,
    heal,
    listed,
    namespace,
    secret,
    start,
    told,
)

QUOTA = ForbiddenError("apply ModelArtifact serving/x: exceeded quota: full (403)")
WORKLOAD = ("Deployment", SERVING, "llama")


def refuse(world: World, kind: str, error: KubeError, *, named: str = "") -> None:
    """From now on objects of a kind, with that in their names, are not accepted."""
    world.kube.refused = lambda verb, obj: (
        error if verb in ("apply", "create") and obj["kind"] == kind and named in obj["metadata"]["name"] else None
    )


def accept(world: World) -> None:
    """Everything is accepted again."""
    world.kube.refused = lambda _verb, _obj: None


def change(world: World, **spec: Any) -> None:
    """Change the deployment's spec; `model` is laid over the model's."""
    body = world.objects[LLAMA]
    model = body["spec"]["model"] | spec.pop("model", {})
    apply(body | {"spec": body["spec"] | spec | {"model": model}})(world)


def revision(name: str, **source: Any) -> Json:
    """A base model of another revision."""
    return {"source": {"huggingFace": {"repo": "org/llama", "revision": name, **source}}}


def said(world: World, kind: str = "Ready") -> Json:
    """A condition of the deployment, which is of its present spec."""
    body = world.objects[LLAMA]
    assert body["status"]["observedGeneration"] == body["metadata"]["generation"]
    return told(body)[kind]


def goes_on(world: World) -> None:
    """An adapter that is deleted leaves list and engines, and the fleet is scaled, while the other one stays Ready."""
    kept = world.objects["LoRAAdapter", *ADAPTERS[3]]
    delete("LoRAAdapter", ADAPTERS[0])(world)
    delete("LoRAAdapter", ADAPTERS[2])(world)
    change(world, replicas=4)
    world.skip(60)
    assert listed(world) == {kept["metadata"]["uid"]: "b"}
    assert world.objects[WORKLOAD]["spec"]["replicas"] == 4
    assert len(world.engines) == 4
    assert [list(engine.served) for engine in world.engines.values()] == [["b"]] * 4
    assert told(world.objects["LoRAAdapter", *ADAPTERS[3]])["Ready"]["status"] == "True"


def artifact_of_base(world: World) -> Json:
    """The artifact that the status names."""
    return world.objects["ModelArtifact", SERVING, world.objects[LLAMA]["status"]["modelArtifact"]]


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        (QUOTA, "change what refuses it: quota, policy or right"),
        (InvalidObjectError("apply ModelArtifact serving/x: denied by a policy (422)"), "change what refuses it"),
        (UnavailableError("apply ModelArtifact serving/x: failed calling webhook (500)"), "tried again every 10 s"),
        (ConflictError("apply ModelArtifact serving/x: changed (409)"), "tried again every 10 s"),
    ],
)
def test_a_base_model_whose_artifact_is_refused_holds_up_nothing_else(error: KubeError, hint: str) -> None:
    world = start(1)
    before = artifact_of_base(world)["metadata"]["name"]
    template = world.objects[WORKLOAD]["spec"]["template"]
    refuse(world, "ModelArtifact", error)
    change(world, model=revision("v2"), engine={"image": "vllm:of-v2"})
    world.skip(60)
    goes_on(world)
    assert said(world)["reason"] == said(world, "ModelReady")["reason"] == "Queued"
    assert str(error) in said(world, "ModelReady")["message"]
    assert hint in said(world, "ModelReady")["message"]
    assert world.objects[WORKLOAD]["spec"]["template"] == template, "what is meant for another model is not rolled out"
    in_use = artifact_of_base(world)
    assert in_use["metadata"]["name"] == before
    assert "unreferencedSince" not in in_use["status"]
    accept(world)
    world.skip(120)
    assert artifact_of_base(world)["spec"]["source"]["huggingFace"]["revision"] == "v2"
    assert world.objects[WORKLOAD]["spec"]["template"] != template
    check_converged(world)
    check_idempotent(world)


def test_while_it_is_refused_nothing_is_written_again_and_again() -> None:
    world = start(2)
    refuse(world, "ModelArtifact", QUOTA)
    change(world, model=revision("v2"))
    world.skip(60)
    writes = world.kube.writes
    world.skip(600)
    assert world.kube.writes == writes


def test_a_base_model_whose_artifact_was_deleted_and_is_refused_holds_up_nothing_else() -> None:
    world = start(3)
    refuse(world, "ModelArtifact", QUOTA)
    name = artifact_of_base(world)["metadata"]["name"]
    world.remove(("ModelArtifact", SERVING, name))
    goes_on(world)
    assert str(QUOTA) in said(world)["message"]
    accept(world)
    world.skip(60)
    assert artifact_of_base(world)["metadata"]["name"] == name
    check_converged(world)


@pytest.mark.parametrize("part", ["tokenizer", "draftModel"])
def test_what_goes_with_the_base_model_and_is_refused_holds_up_nothing_else(part: str) -> None:
    world = start(4)
    refuse(world, "ModelArtifact", QUOTA)
    more = {"numSpeculativeTokens": 3} if part == "draftModel" else {}
    change(world, model={part: {"source": {"huggingFace": {"repo": "org/part"}}, **more}})
    goes_on(world)
    assert str(QUOTA) in said(world, "ModelReady")["message"]
    accept(world)
    world.skip(120)
    check_converged(world)


def test_a_new_fleet_whose_base_model_is_refused_says_so() -> None:
    world = start(5)
    delete("VLLMDeployment", (SERVING, "llama"))(world)
    world.skip(10)
    refuse(world, "ModelArtifact", QUOTA)
    body = deployment()
    apply(body | {"spec": body["spec"] | {"model": body["spec"]["model"] | revision("new")}})(world)
    world.skip(60)
    assert str(QUOTA) in said(world)["message"]
    accept(world)
    world.skip(120)
    check_converged(world)


# Other children


@pytest.mark.parametrize(
    ("kind", "named", "error", "reason"),
    [
        ("Service", "", ForbiddenError("apply Service serving/llama: exceeded quota (403)"), "PodsRefused"),
        ("Secret", "", ForbiddenError("apply Secret serving/llama-gate: forbidden (403)"), "PodsRefused"),
        ("ConfigMap", "kit", ForbiddenError("apply ConfigMap serving/kit: exceeded quota (403)"), "PodsRefused"),
        ("ConfigMap", "modules", InvalidObjectError("apply ConfigMap x: denied (422)"), "PodsRefused"),
        ("Deployment", "", InvalidObjectError("apply Deployment serving/llama: no (422)"), "PodTemplateInvalid"),
        ("Deployment", "", ForbiddenError("apply Deployment serving/llama: denied (403)"), "PodsRefused"),
        ("Deployment", "", ConflictError("apply Deployment serving/llama: changed (409)"), "Progressing"),
        ("Deployment", "", UnavailableError("apply Deployment serving/llama: webhook (500)"), "Progressing"),
    ],
)
def test_an_object_of_the_fleet_that_is_refused_holds_up_only_what_needs_it(
    kind: str, named: str, error: KubeError, reason: str
) -> None:
    world = start(6)
    for place in [p for p in world.objects if p[0] == kind and named in p[2] and p[0] != "Deployment"]:
        if place[0] != "Secret" or "gate" in place[2]:
            world.remove(place)
    record = world.context.records.deployments[SERVING, "llama"]
    record.secrets.clear()
    record.children.clear()
    world.context = world.dispatcher._context = replace(world.context, plugin_files={"plugin.py": "another"})
    refuse(world, kind, error, named=named)
    change(world, engine={"image": "another"})
    delete("LoRAAdapter", ADAPTERS[0])(world)
    delete("LoRAAdapter", ADAPTERS[2])(world)
    change(world, replicas=4)
    world.skip(60)
    assert world.objects[WORKLOAD]["spec"]["replicas"] == 4
    image = world.objects[WORKLOAD]["spec"]["template"]["spec"]["containers"][0]["image"]
    assert image == ("another" if (kind, named) in (("Service", ""), ("ConfigMap", "modules")) else "vllm")
    names = {"b": world.objects["LoRAAdapter", *ADAPTERS[3]]["metadata"]["uid"]}
    assert {name: uid for uid, name in listed(world).items()} == names
    assert (said(world)["reason"], str(error) in said(world)["message"]) == (reason, True)
    assert "podTemplate" not in said(world)["message"] or reason == "PodTemplateInvalid"
    accept(world)
    world.skip(120)
    assert ("ConfigMap", SERVING, plugin_config_map("llama", world.context.plugin_hash)) in world.objects
    check_converged(world)


def test_a_full_quota_of_secrets_takes_nothing_from_a_fleet_whose_secret_is_there() -> None:
    """The API server asks quotas before it looks whether the name is taken."""
    world = start(6)
    error = ForbiddenError("create Secret serving/llama-gate: exceeded quota: full (403)")
    world.kube.refused = lambda verb, obj: error if (verb, obj["kind"]) == ("create", "Secret") else None
    world.restart()
    change(world, engine={"image": "another"})
    world.skip(60)
    assert world.objects[WORKLOAD]["spec"]["template"]["spec"]["containers"][0]["image"] == "another"
    assert said(world)["status"] == "True"


def test_a_new_fleet_does_not_start_from_somebody_else_s_list() -> None:
    world = start(6)
    delete("VLLMDeployment", (SERVING, "llama"))(world)
    world.skip(60)
    place = ("ConfigMap", SERVING, modules_config_map("llama"))
    world.objects.pop(place, None)
    foreign = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"namespace": SERVING, "name": place[2]}}
    apply(foreign | {"data": {}})(world)
    apply(deployment())(world)
    world.skip(60)
    assert WORKLOAD not in world.objects
    assert said(world)["reason"] == "NameTaken"
    world.remove(place)
    world.skip(120)
    check_converged(world)


def test_what_was_changed_by_hand_is_repaired_though_the_fleet_was_scaled_meanwhile() -> None:
    world = start(6)
    refuse(world, "ModelArtifact", QUOTA)
    change(world, model=revision("v2"))
    world.skip(30)
    live = world.objects[WORKLOAD]
    container = live["spec"]["template"]["spec"]["containers"][0] | {"image": "evil:1"}
    template = live["spec"]["template"] | {"spec": live["spec"]["template"]["spec"] | {"containers": [container]}}
    apply(live | {"spec": live["spec"] | {"template": template}})(world)
    change(world, replicas=4)
    world.skip(30)
    assert world.objects[WORKLOAD]["spec"]["replicas"] == 4
    accept(world)
    change(world, model=revision("main"))
    world.skip(120)
    assert world.objects[WORKLOAD]["spec"]["template"]["spec"]["containers"][0]["image"] == "vllm"


# Secrets


def private(seed: int) -> World:
    """A fleet whose base model comes with a Secret."""
    world = start(seed)
    apply(secret(SERVING))(world)
    change(world, model=revision("main", tokenSecretRef={"name": "hf"}))
    world.skip(120)
    check_converged(world)
    assert "credentials" in artifact_of_base(world)["spec"]
    return world


def without_secret(world: World) -> None:
    delete("Secret", (SERVING, "hf"))(world)


def without_right(world: World) -> None:
    world.kube.secrets_forbidden = True


@pytest.mark.parametrize("lose", [without_secret, without_right])
def test_a_base_model_s_secret_that_is_gone_after_the_download_holds_up_no_scaling(
    lose: Callable[[World], None],
) -> None:
    world = private(7)
    before = artifact_of_base(world)
    lose(world)
    world.skip(60)
    goes_on(world)
    assert said(world)["status"] == "True"
    assert artifact_of_base(world)["metadata"]["name"] == before["metadata"]["name"]
    assert "unreferencedSince" not in artifact_of_base(world)["status"]
    change(world, engine={"image": "another"})
    world.skip(60)
    assert world.objects[WORKLOAD]["spec"]["template"]["spec"]["containers"][0]["image"] == "another"
    assert said(world)["status"] == "True"


def test_another_base_model_without_its_secret_is_not_there_and_what_is_in_use_is_served_on() -> None:
    world = private(8)
    before = artifact_of_base(world)["metadata"]["name"]
    without_secret(world)
    change(world, model=revision("v2", tokenSecretRef={"name": "hf"}))
    world.skip(60)
    goes_on(world)
    assert said(world)["reason"] == "CredentialsNotFound"
    assert world.objects[LLAMA]["status"]["modelArtifact"] == before
    heal(world)
    world.skip(120)
    assert artifact_of_base(world)["spec"]["source"]["huggingFace"]["revision"] == "v2"
    check_converged(world)


@pytest.mark.parametrize("lose", [without_right, lambda world: delete("Secret", ("team-b", "hf"))(world)])
def test_an_adapter_s_secret_that_is_gone_after_the_download_takes_nothing_from_it_when_its_spec_changes(
    lose: Callable[[World], None],
) -> None:
    world = start(9)
    lose(world)
    body = world.objects["LoRAAdapter", *ADAPTERS[3]]
    apply(body | {"spec": body["spec"] | {"servedName": "c"}})(world)
    world.skip(60)
    body = world.objects["LoRAAdapter", *ADAPTERS[3]]
    assert body["status"]["observedGeneration"] == body["metadata"]["generation"]
    assert told(body)["Ready"]["status"] == "True", told(body)
    assert listed(world)[body["metadata"]["uid"]] == "c"
    moved = body["spec"] | {
        "source": {"huggingFace": {"repo": "org/two", "revision": "v2", "tokenSecretRef": {"name": "hf"}}}
    }
    apply(body | {"spec": moved})(world)
    world.skip(60)
    reason = told(world.objects["LoRAAdapter", *ADAPTERS[3]])["Ready"]["reason"]
    assert reason in ("CredentialsNotFound", "CredentialsForbidden"), "that is other content"


# Deletions


def test_content_is_announced_though_its_job_can_t_be_deleted() -> None:
    world = World(10)
    error = ForbiddenError("delete Job serving/x: denied by a policy (403)")
    world.kube.refused = lambda verb, obj: error if verb == "delete" and obj["kind"] == "Job" else None
    for body in (claim(), cache(), deployment(), namespace("team-a", True), namespace(SERVING, True)):
        apply(body)(world)
    apply(adapter(ADAPTERS[0], "a", "org/one", secret=False))(world)
    world.skip(30)
    assert told(world.objects["LoRAAdapter", *ADAPTERS[0]])["Ready"]["status"] == "True"
    assert any(place[0] == "Job" for place in world.objects), "else nothing is shown"


# Nodes that are lost


def test_a_download_whose_node_is_lost_is_tried_again() -> None:
    world = start(11)
    world.lost_nodes.add("org/new")
    apply(adapter(ADAPTERS[1], "new", "org/new", secret=False))(world)
    world.skip(59)
    artifact = next(
        body
        for place, body in world.objects.items()
        if place[0] == "ModelArtifact" and body["spec"]["source"]["huggingFace"]["repo"] == "org/new"
    )
    name = artifact["metadata"]["name"]
    assert "lastFailure" not in artifact["status"], "a slow node is none that is lost"
    world.skip(10)
    artifact = world.objects["ModelArtifact", SERVING, name]
    assert artifact["status"]["lastFailure"]["reason"] == "JobFailed"
    assert artifact["status"]["lastFailure"]["message"].startswith("the Job's node was lost: ")
    assert ("Job", SERVING, f"{name}-1") not in world.objects, "its place is free"
    world.lost_nodes.clear()
    world.skip(180)
    assert told(world.objects["LoRAAdapter", *ADAPTERS[1]])["Ready"]["status"] == "True"
    check_idempotent(world)


def test_a_deployment_that_somebody_else_made_meanwhile_is_not_scaled() -> None:
    """Between the look at it and the patch lie the writes of the list and the Service, which a webhook may hold up."""
    world = start(1)
    list_of_ours = ("ConfigMap", SERVING, modules_config_map("llama"))
    known = world.objects[list_of_ours]

    def replace_workload() -> None:
        if world.objects[list_of_ours] is known or world.objects[WORKLOAD]["metadata"].get("labels") == {
            "of": "another"
        }:
            return
        metadata = {"name": "llama", "namespace": SERVING, "labels": {"of": "another"}}
        spec = world.objects[WORKLOAD]["spec"] | {"replicas": 1}
        world.remove(WORKLOAD)
        world.write({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": metadata, "spec": spec})
        world._hear(all_of_it=True)

    world.kube.on_written = replace_workload
    body = world.objects[LLAMA]
    world.write(body | {"spec": body["spec"] | {"replicas": 4}})
    delete("LoRAAdapter", ADAPTERS[0])(world)
    world.skip(60)
    live = world.objects[WORKLOAD]
    assert live["metadata"]["labels"] == {"of": "another"}
    assert live["spec"]["replicas"] == 1
    assert said(world)["reason"] == "NameTaken"
