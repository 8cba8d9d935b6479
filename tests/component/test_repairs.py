"""What is broken, edited or deleted behind the operator's back is repaired or reported, and holds up nobody else."""

from __future__ import annotations

import asyncio
import base64
from datetime import timedelta
from typing import Any

import pytest

from e2e.cluster import ControlPlane
from lora_operator.constants import Reason
from lora_operator.errors import ForbiddenError
from lora_operator.kube.kinds import (
    CONFIG_MAPS,
    DEPLOYMENTS,
    JOBS,
    LORA_ADAPTERS,
    MODEL_ARTIFACTS,
    NAMESPACES,
    PODS,
    SECRETS,
    SERVICES,
    VLLM_DEPLOYMENTS,
    ResourceType,
)
from lora_operator.plan import job_view
from tests.component.conftest import Kubectl
from tests.component.manifests import manifest
from tests.component.reconcile_support import NEVER, World, asking, failure, owner, running_operator, until

Json = dict[str, Any]


async def artifact_of(world: World, adapter: str) -> Json:
    """The ModelArtifact that a Ready adapter of team A uses."""
    name = (await world.ready(adapter, world.team_a))["artifactRef"]["name"]
    return await world.kube.get(MODEL_ARTIFACTS, world.serving, name)


# One holds up nobody else


async def test_an_artifact_whose_name_is_taken_holds_up_no_other_adapter(
    world: World, control_plane: ControlPlane
) -> None:
    await world.make_fleet()
    async with running_operator(control_plane):
        await world.adapter("sql", world.team_a)
        await world.run_pods()
        made = await artifact_of(world, "sql")
        await world.delete_adapter("sql", world.team_a)
        await world.wait_listed({})
        await world.kube.delete(MODEL_ARTIFACTS, world.serving, made["metadata"]["name"])
        made["spec"]["source"]["huggingFace"]["repo"] = "org/other"
        made["metadata"] = {"name": made["metadata"]["name"], "namespace": world.serving}
        await world.kube.create({key: made[key] for key in ("apiVersion", "kind", "metadata", "spec")})
        await world.adapter("sql", world.team_a)
        status = await world.refused("sql", world.team_a, "NameTaken")
        assert f"ModelArtifact {world.serving}/{made['metadata']['name']} exists with another spec" in str(status)
        await world.adapter("chat", world.team_a)
        await world.ready("chat", world.team_a)
        await world.delete_adapter("chat", world.team_a)
        await world.wait_listed({})


async def fill_quota(world: World, kubectl: Kubectl) -> None:
    """A quota for ModelArtifacts, of which two are there, is full."""
    what = "count/modelartifacts.lora-operator.dev"
    kubectl("create", "quota", "full", f"--hard={what}=2", "-n", world.serving)
    status = f'{{"status": {{"hard": {{"{what}": "2"}}, "used": {{"{what}": "2"}}}}}}'
    kubectl("patch", "quota", "full", "-n", world.serving, "--subresource=status", "--type=merge", f"-p={status}")

    async def refuses() -> bool:
        try:
            await world.kube.create(manifest("ModelArtifact", name="probe", namespace=world.serving))
        except ForbiddenError:
            return True
        await world.kube.delete(MODEL_ARTIFACTS, world.serving, "probe")
        return False

    await until(refuses, "the quota refuses artifacts")


async def test_a_quota_that_refuses_the_base_model_s_artifact_holds_up_nothing_else(
    world: World, control_plane: ControlPlane, kubectl: Kubectl
) -> None:
    await world.make_fleet()
    async with running_operator(control_plane):
        for namespace in (world.team_a, world.team_b):
            await world.adapter("sql", namespace, repo="org/sql", servedName=f"sql-{namespace}")
        [engine] = await world.run_pods()
        await world.ready("sql", world.team_a)
        await world.ready("sql", world.team_b)
        ready = await world.wait_for(VLLM_DEPLOYMENTS, "llama", world.serving, "Ready", "True")
        await fill_quota(world, kubectl)
        change = {"replicas": 3, "model": {"source": {"huggingFace": {"revision": "v2"}}}}
        await world.kube.patch(VLLM_DEPLOYMENTS, world.serving, "llama", {"spec": change})
        await world.delete_adapter("sql", world.team_a)
        await world.wait_listed({f"sql-{world.team_b}": f"{world.team_b}/sql"})

        async def gone() -> bool:
            return (await engine.ask(f"sql-{world.team_a}"))[0] == 404

        await until(gone, "an engine answers a deleted adapter no more")
        told = await world.wait_for(VLLM_DEPLOYMENTS, "llama", world.serving, "ModelReady", "False", "Queued")
        message = next(c["message"] for c in told["conditions"] if c["type"] == "ModelReady")
        assert "its ModelArtifact can't be made: apply ModelArtifact " in message
        assert "exceeded quota: full" in message
        assert told["modelArtifact"] == ready["modelArtifact"], "it goes on being served"
        workload = await world.kube.get(DEPLOYMENTS, world.serving, "llama")
        assert workload["spec"]["replicas"] == 3
        await world.ready("sql", world.team_b)
        kubectl("delete", "quota", "full", "-n", world.serving)
        told = await world.wait_for(VLLM_DEPLOYMENTS, "llama", world.serving, "ModelReady", "True")
        assert told["modelArtifact"] != ready["modelArtifact"]


async def test_a_quota_that_refuses_one_artifact_holds_up_no_other_adapter(
    world: World, control_plane: ControlPlane, kubectl: Kubectl
) -> None:
    await world.make_fleet()
    async with running_operator(control_plane):
        await world.adapter("sql", world.team_a)
        await world.run_pods()
        await world.ready("sql", world.team_a)
        await fill_quota(world, kubectl)
        await world.adapter("more", world.team_a)
        told = await world.refused("more", world.team_a, "Queued")
        message = next(c["message"] for c in told["conditions"] if c["type"] == "Ready")
        assert message.startswith("its ModelArtifact can't be made: ")
        assert "exceeded quota: full" in message
        await world.adapter("again", world.team_b, repo="org/sql")
        await world.ready("again", world.team_b)
        await world.delete_adapter("sql", world.team_a)
        await world.wait_listed({"again": f"{world.team_b}/again"})


async def test_a_deployment_that_can_t_be_read_is_told_so_and_holds_up_no_other(
    world: World, control_plane: ControlPlane, kubectl: Kubectl
) -> None:
    path = "/spec/versions/0/schema/openAPIV3Schema/properties/spec/properties/model/properties/dtype/enum"
    crd = "vllmdeployments.lora-operator.dev"
    values = kubectl.read("crd", crd)["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    values = values["properties"]["model"]["properties"]["dtype"]["enum"]
    await world.make_fleet()
    live = await world.kube.get(VLLM_DEPLOYMENTS, world.serving, "llama")
    odd = {"apiVersion": live["apiVersion"], "kind": live["kind"], "spec": live["spec"]}
    odd["spec"]["model"]["dtype"] = "odd"
    odd["metadata"] = {"name": "odd", "namespace": world.serving}
    kubectl("patch", "crd", crd, "--type=json", f'-p=[{{"op": "remove", "path": "{path}"}}]')
    try:

        async def accepted() -> bool:
            return await asyncio.to_thread(lambda: kubectl.apply(odd).ok)

        await until(accepted, "a value that this operator does not know is accepted")
    finally:
        again = f'-p=[{{"op": "add", "path": "{path}", "value": {str(values).replace(chr(39), chr(34))}}}]'
        kubectl("patch", "crd", crd, "--type=json", again)
    async with running_operator(control_plane):
        await world.adapter("lost", world.team_a, deployment="odd")
        await world.adapter("sql", world.team_a)
        await world.run_pods()
        await world.ready("sql", world.team_a)
        status = await world.wait_for(VLLM_DEPLOYMENTS, "odd", world.serving, "Ready", "False", "InvalidSpec")
        assert "spec.model.dtype" in str(status)
        await world.delete_adapter("sql", world.team_a)
        await world.wait_listed({})
    await world.kube.delete(VLLM_DEPLOYMENTS, world.serving, "odd")


@pytest.mark.parametrize("how", ["silent", "chatty"])
async def test_a_pod_that_does_not_answer_is_named_and_delays_no_other(
    world: World, control_plane: ControlPlane, how: str
) -> None:
    await world.make_fleet(replicas=2)
    async with running_operator(control_plane, engine_timeout=6):
        await world.adapter("sql", world.team_a)
        bad, good = await world.run_pods(2)
        await world.ready("sql", world.team_a)
        setattr(bad, how, True)
        await world.adapter("chat", world.team_b)
        await world.wait_listed({"sql": f"{world.team_a}/sql", "chat": f"{world.team_b}/chat"})
        began = asyncio.get_running_loop().time()

        async def answers() -> bool:
            return (await good.ask("chat"))[0] == 200

        await until(answers, "the other pod answers")
        took = asyncio.get_running_loop().time() - began
        assert took < 6, "it waited for the pod's time-out"
        status = await world.refused("chat", world.team_b, "EngineUnreachable")
        assert status["readyPods"] == "1/2"
        assert [one["pod"] for one in status["failures"]] == ["llama-0"]
        before = await world.kube.get(LORA_ADAPTERS, world.team_b, "chat")
        asked = len(bad.requests)

        async def asked_again() -> bool:
            return len(bad.requests) > asked

        await until(asked_again, "the pod is asked again")
        after = await world.kube.get(LORA_ADAPTERS, world.team_b, "chat")
        assert after["metadata"]["resourceVersion"] == before["metadata"]["resourceVersion"]
        assert good.served.keys() == {"sql", "chat"}
        setattr(bad, how, False)
        for ready in (False, True):  # as its probe would say
            await world.set_ready("llama-0", ready)
        await world.ready("chat", world.team_b)


# What is edited or deleted by hand


async def test_what_is_edited_or_deleted_by_hand_is_repaired(
    world: World, control_plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_operator.reconcile.services.SECRET_SECONDS", 0.1)
    await world.make_fleet()
    async with running_operator(control_plane):
        await world.adapter("sql", world.team_a)
        [engine] = await world.run_pods()
        await world.ready("sql", world.team_a)
        known = await world.modules()
        async with asking(engine, "sql") as answers:
            body = {"binaryData": {"modules.json.gz": base64.b64encode(b"edited").decode()}}
            await world.kube.patch(CONFIG_MAPS, world.serving, "llama-modules", body)
            await _until_list(world, known)
            await world.kube.delete(CONFIG_MAPS, world.serving, "llama-modules")
            await _until_list(world, known)
            await _until_again(world, SERVICES, "llama")
            await _until_again(world, DEPLOYMENTS, "llama")
        assert [status for status, _ in answers] == [200]
        [gate] = [
            secret
            for secret in (await world.kube.list(SECRETS, namespace=world.serving))[0]
            if secret["metadata"]["name"].startswith("llama-gate-")
        ]
        await world.kube.delete(SECRETS, world.serving, gate["metadata"]["name"])
        await asyncio.sleep(0.15)  # Secrets are not watched: they are looked at from time to time
        touch = {"metadata": {"annotations": {"example.com/touched": "yes"}}}
        await world.kube.patch(VLLM_DEPLOYMENTS, world.serving, "llama", touch)

        async def restored() -> Json | None:
            return await world.find(SECRETS, world.serving, gate["metadata"]["name"])

        assert (await until(restored, "the gate's Secret is there again"))["data"] == gate["data"]


async def _until_list(world: World, known: Any) -> None:
    """Until the ConfigMap has the list again: the same one, so that pods have nothing to do."""

    async def look() -> bool:
        body = await world.find(CONFIG_MAPS, world.serving, "llama-modules")
        edited = body is None or body["binaryData"]["modules.json.gz"] == base64.b64encode(b"edited").decode()
        return not edited and await world.modules() == known

    await until(look, "the ConfigMap has the list again")


async def _until_again(world: World, rt: ResourceType, name: str) -> None:
    uid = (await world.kube.get(rt, world.serving, name))["metadata"]["uid"]
    await world.kube.delete(rt, world.serving, name)

    async def look() -> bool:
        body = await world.find(rt, world.serving, name)
        return body is not None and body["metadata"]["uid"] != uid

    await until(look, f"{rt.kind} {name} is made again")


@pytest.mark.parametrize("how", ["deleted", "edited"])
async def test_a_list_that_was_lost_with_the_operator_down_is_numbered_above_what_pods_hold(
    world: World, control_plane: ControlPlane, how: str
) -> None:
    await world.make_fleet()
    async with running_operator(control_plane):
        [engine] = await world.run_pods()
        for name in ("one", "two", "three"):
            await world.adapter(name, world.team_a)
            await world.ready(name, world.team_a)
        known = await world.modules()
    async with asking(engine, "one") as answers:
        if how == "deleted":
            await world.kube.delete(CONFIG_MAPS, world.serving, "llama-modules")
        else:
            body = {"binaryData": {"modules.json.gz": base64.b64encode(b"edited").decode()}}
            await world.kube.patch(CONFIG_MAPS, world.serving, "llama-modules", body)
        await world.adapter("four", world.team_a)
        async with running_operator(control_plane):
            await world.ready("four", world.team_a)
            now = await world.modules()
    assert now.generation > known.generation
    assert {module.name for module in now.modules} == {"one", "two", "three", "four"}
    assert [status for status, _ in answers] == [200]


async def test_a_list_that_was_lost_with_the_operator_down_keeps_what_pods_hold_of_an_adapter_whose_content_is_not_there(
    world: World, control_plane: ControlPlane
) -> None:
    await world.make_fleet()
    async with running_operator(control_plane):
        [engine] = await world.run_pods()
        for name in ("one", "two"):
            await world.adapter(name, world.team_a)
        made = await artifact_of(world, "one")
        await world.ready("two", world.team_a)
    known = engine.served
    world.outcomes["org/one"] = failure(Reason.SOURCE_UNREACHABLE, "the Hub answers 503")
    async with asking(engine, "one") as answers:
        await world.kube.delete(MODEL_ARTIFACTS, world.serving, made["metadata"]["name"])
        await world.kube.delete(CONFIG_MAPS, world.serving, "llama-modules")
        async with running_operator(control_plane):
            await world.wait_for(LORA_ADAPTERS, "one", world.team_a, "Downloaded", "False", "SourceUnreachable")
            await world.adapter("three", world.team_a)
            await world.ready("three", world.team_a)
            assert {name: path for name, path in engine.served.items() if name != "three"} == known
            assert (await world.listed()).keys() == {"one", "two", "three"}
    assert answers == [(200, known["one"])]


async def test_an_artifact_or_a_job_that_is_deleted_by_hand_is_made_again(
    world: World, control_plane: ControlPlane
) -> None:
    await world.make_fleet()
    async with running_operator(control_plane):
        await world.adapter("sql", world.team_a)
        [engine] = await world.run_pods()
        made = await artifact_of(world, "sql")
        async with asking(engine, "sql") as answers:
            await world.kube.delete(MODEL_ARTIFACTS, world.serving, made["metadata"]["name"])

            async def again() -> bool:
                body = await world.find(MODEL_ARTIFACTS, world.serving, made["metadata"]["name"])
                return body is not None and body["metadata"]["uid"] != made["metadata"]["uid"]

            await until(again, "the artifact is made again")
            await world.ready("sql", world.team_a)
        assert [status for status, _ in answers] == [200]

        world.outcomes["org/slow"] = NEVER
        await world.adapter("slow", world.team_a)

        async def job() -> Json | None:
            jobs = (await world.kube.list(JOBS, namespace=world.serving))[0]
            return next((one for one in jobs if one["metadata"]["name"].startswith("slow-")), None)

        first = await until(job, "its Job is made")
        del world.outcomes["org/slow"]
        await world.kube.delete(JOBS, world.serving, first["metadata"]["name"])
        await world.ready("slow", world.team_a)


async def test_a_job_with_credentials_that_is_deleted_by_hand_has_its_secret_again(
    world: World, control_plane: ControlPlane
) -> None:
    await world.make_fleet()
    token = {"data": {"token": base64.b64encode(b"t").decode()}, "apiVersion": "v1", "kind": "Secret"}
    await world.kube.apply(token | {"metadata": {"name": "hf", "namespace": world.team_a}})
    private = {"huggingFace": {"repo": "org/private", "tokenSecretRef": {"name": "hf", "key": "token"}}}
    world.outcomes["org/private"] = NEVER
    async with running_operator(control_plane):
        await world.adapter("private", world.team_a, source=private)

        async def started(but: str = "") -> Json | None:
            for job in (await world.kube.list(JOBS, namespace=world.serving))[0]:
                ours = job["metadata"]["name"].startswith("private-") and job["metadata"]["uid"] != but
                if ours and not job["spec"].get("suspend"):
                    return job
            return None

        first = await until(started, "its Job is made and let go")
        volumes = first["spec"]["template"]["spec"]["volumes"]
        [name] = [volume["secret"]["secretName"] for volume in volumes if volume["name"] == "credentials"]
        await world.kube.delete(SECRETS, world.serving, name)  # as the garbage collector does with what the Job owns
        await world.kube.delete(JOBS, world.serving, first["metadata"]["name"])
        second = await until(lambda: started(first["metadata"]["uid"]), "its Job is made again and let go")
        [anew] = [
            volume["secret"]["secretName"]
            for volume in second["spec"]["template"]["spec"]["volumes"]
            if volume["name"] == "credentials"
        ]
        assert anew != name, "no Secret had that name before"
        secret = await world.kube.get(SECRETS, world.serving, anew)
        assert [one["uid"] for one in secret["metadata"]["ownerReferences"]] == [second["metadata"]["uid"]]


# Restarts


async def test_the_state_of_retries_survives_the_operator(
    world: World, control_plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_operator.plan.artifact.FIRST_BACKOFF_SECONDS", 4)
    await world.make_fleet()
    world.outcomes["org/sql"] = failure(Reason.SOURCE_UNREACHABLE, "the Hub answers 503")
    async with running_operator(control_plane):
        await world.adapter("sql", world.team_a)
        told = await world.refused("sql", world.team_a, "SourceUnreachable")
        name = told["artifactRef"]["name"]
        before = (await world.kube.get(MODEL_ARTIFACTS, world.serving, name))["status"]
    assert before["failedAttempts"] == 1
    assert before["lastFailure"]["message"] == "the Hub answers 503"
    async with running_operator(control_plane):

        async def tried_again() -> Json | None:
            found = (await world.kube.get(MODEL_ARTIFACTS, world.serving, name))["status"]
            return found if found["failedAttempts"] == 2 else None

        second = await until(tried_again, "the second attempt has failed")
    # Counted on from what the first operator wrote, and no sooner than it had promised.
    assert (second["attempt"], second["lastFailure"]["attempt"]) == (2, 2)
    assert second["lastFailure"]["time"] >= before["nextAttemptTime"]


@pytest.mark.parametrize("rt", [LORA_ADAPTERS, NAMESPACES, CONFIG_MAPS], ids=lambda rt: rt.kind)
async def test_an_operator_that_can_t_list_a_kind_does_nothing_until_it_can(
    world: World, control_plane: ControlPlane, rt: ResourceType
) -> None:
    await world.kube.patch(NAMESPACES, "", world.team_a, {"metadata": {"labels": {"served": "yes"}}})
    selector = {"from": "Selector", "selector": {"matchLabels": {"served": "yes"}}}
    await world.make_fleet(adapterPolicy={"namespaces": selector})
    async with running_operator(control_plane):
        await world.adapter("sql", world.team_a)
        [engine] = await world.run_pods()
        await world.ready("sql", world.team_a)
    known, asked = await world.modules(), len(engine.requests)
    await world.adapter("chat", world.team_a)
    async with running_operator(control_plane, unlistable=rt) as operator:

        async def only_this_is_missing() -> bool:
            return [kind.value for kind in operator.missing()] == [rt.kind]

        await until(only_this_is_missing, "everything else was listed")
        assert await world.modules() == known
        assert len(engine.requests) == asked
        assert (await world.kube.get(LORA_ADAPTERS, world.team_a, "chat")).get("status") is None
        operator.kube.unlistable = None
        await world.ready("chat", world.team_a)
        assert engine.served.keys() == {"sql", "chat"}


async def test_a_container_that_restarts_with_the_operator_down_serves_what_was_acknowledged(
    world: World, control_plane: ControlPlane
) -> None:
    await world.make_fleet()
    async with running_operator(control_plane):
        await world.adapter("sql", world.team_a)
        [engine] = await world.run_pods()
        await world.ready("sql", world.team_a)
    await engine.stop()
    await engine.start()
    assert (await engine.ask("sql"))[0] == 200
    await engine.engine._unload("sql")
    async with running_operator(control_plane):
        await world.set_ready("llama-0", True, container="containerd://second")
        await world.ready("sql", world.team_a)

        async def answers() -> bool:
            return (await engine.ask("sql"))[0] == 200

        await until(answers, "what was unloaded behind the operator's back is loaded again")


async def test_a_download_whose_node_is_lost_is_tried_again(
    world: World, control_plane: ControlPlane, kubectl: Kubectl, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kubernetes says Failed only when the pod is gone, and nobody confirms the end of one on a lost node: a finalizer plays that."""
    monkeypatch.setattr(job_view, "LOST", timedelta(seconds=1))
    await world.make_fleet()
    world.outcomes["org/sql"] = NEVER
    async with running_operator(control_plane):
        await world.adapter("sql", world.team_a)

        async def made() -> Json | None:
            found = (await world.kube.list(JOBS, namespace=world.serving))[0]
            return next((job for job in found if job["metadata"]["name"].startswith("sql-")), None)

        job = await until(made, "the download's Job is made")
        name, template = job["metadata"]["name"], job["spec"]["template"]
        pod: Json = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": "lost",
                "namespace": world.serving,
                "labels": template["metadata"]["labels"] | {"batch.kubernetes.io/job-name": name},
                "ownerReferences": [owner("batch/v1", "Job", job)],
                "finalizers": ["batch.kubernetes.io/job-tracking"],
            },
            "spec": {"restartPolicy": "Never", "nodeName": "lost", "containers": [{"name": "fetch", "image": "x"}]},
        }
        await world.kube.apply(pod)
        await world.kube.apply_status(PODS, world.serving, "lost", {"phase": "Running"})
        at = "2026-01-01T00:00:00Z"
        target = {"type": "FailureTarget", "status": "True", "reason": "BackoffLimitExceeded", "lastTransitionTime": at}
        await world.kube.apply_status(
            JOBS, world.serving, name, {"startTime": at, "conditions": [target], "terminating": 1}
        )
        kubectl("delete", "pod", "lost", "-n", world.serving, "--wait=false", "--grace-period=1")
        artifact = name.rpartition("-")[0]

        async def failed() -> Json | None:
            status = (await world.kube.get(MODEL_ARTIFACTS, world.serving, artifact)).get("status") or {}
            return status.get("lastFailure")

        told = await until(failed, "the lost node is told")
        assert told["reason"] == "JobFailed"
        assert told["message"].startswith("the Job's node was lost: ")

        async def gone() -> bool:
            return await world.find(JOBS, world.serving, name) is None

        await until(gone, "its Job is deleted")
        del world.outcomes["org/sql"]
        await world.wait_for(MODEL_ARTIFACTS, artifact, world.serving, "Ready", "True")
    kubectl("patch", "pod", "lost", "-n", world.serving, "--type=merge", '-p={"metadata": {"finalizers": null}}')
