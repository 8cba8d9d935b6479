"""The operator with the rights that the chart gives it, and no other, on a real API server: also its Secrets, which it can't read back."""

from __future__ import annotations

import asyncio
import base64
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from e2e.cluster import ControlPlane, tools
from lora_operator.errors import ForbiddenError
from lora_operator.kube.client import Kube, load_configuration
from lora_operator.kube.kinds import DEPLOYMENTS, JOBS, LORA_ADAPTERS, PODS, SECRETS
from lora_operator.reconcile.services import MASTER_KEY_SECRET
from tests.chart.conftest import Helm, render_chart
from tests.component.conftest import Kubectl
from tests.component.reconcile_support import NEVER, World, running_operator, until

Json = dict[str, Any]
HOME = "default"  # where the operator lives in these tests
ROLES = {"ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding", "ServiceAccount"}
PRIVATE = {"huggingFace": {"repo": "org/private", "tokenSecretRef": {"name": "hf", "key": "token"}}}


@pytest.fixture(scope="module")
def helm() -> Helm:
    """The project's own; it may have to be built, and before a World's Jobs are played."""
    return Helm(tools.helm())


@pytest.fixture
def account(helm: Helm, world: World, control_plane: ControlPlane, kubectl: Kubectl, tmp_path: Path) -> Path:
    """A kubeconfig of the operator's service account, with what the chart gives it, and team A's Secrets beside."""
    chart = render_chart(helm, {"secretNamespaces": [world.team_a]})
    roles = [item for item in chart.objects if item["kind"] in ROLES]
    at_home = json.loads(json.dumps(roles).replace('"namespace": "ops"', f'"namespace": "{HOME}"'))
    kubectl("apply", "--server-side", "-f", "-", manifest={"apiVersion": "v1", "kind": "List", "items": at_home})
    config = yaml.safe_load(control_plane.kubeconfig.read_text())
    config["users"] = [{"name": "operator", "user": {"token": kubectl("create", "token", "lora-operator", "-n", HOME)}}]
    config["contexts"][0]["context"]["user"] = "operator"
    path = tmp_path / "operator.kubeconfig"
    path.write_text(json.dumps(config))
    return path


async def gate_of(world: World) -> str:
    """Name of the Secret that the fleet's pods have their token from."""
    volumes = (await world.kube.get(DEPLOYMENTS, world.serving, "llama"))["spec"]["template"]["spec"]["volumes"]
    return next(str(volume["secret"]["secretName"]) for volume in volumes if volume["name"] == "gate")


async def job_of(world: World) -> Json:
    """The private adapter's Job, once it is let go."""

    async def look() -> Json | None:
        jobs = (await world.kube.list(JOBS, namespace=world.serving))[0]
        mine = (job for job in jobs if job["metadata"]["name"].startswith("private-"))
        return next((job for job in mine if not job["spec"].get("suspend")), None)

    return await until(look, "the private adapter's Job is let go")


def copy_of(job: Json) -> str:
    """Name of the Secret that it mounts."""
    volumes = job["spec"]["template"]["spec"]["volumes"]
    return next(str(volume["secret"]["secretName"]) for volume in volumes if volume["name"] == "credentials")


async def give_token(world: World) -> None:
    """The team's Secret for its private repository."""
    token = {"apiVersion": "v1", "kind": "Secret", "data": {"token": base64.b64encode(b"t").decode()}}
    await world.kube.apply(token | {"metadata": {"name": "hf", "namespace": world.team_a}})


async def test_with_the_charts_rights_all_is_served_and_no_secret_can_be_read_or_written_over(
    world: World, control_plane: ControlPlane, account: Path
) -> None:
    await give_token(world)
    await world.make_fleet()
    world.outcomes["org/private"] = NEVER
    async with running_operator(control_plane, kubeconfig=account):
        await world.adapter("sql", world.team_a)
        await world.run_pods()
        await world.ready("sql", world.team_a)
        await world.adapter("private", world.team_a, source=PRIVATE)
        job = await job_of(world)
        copy = await world.kube.get(SECRETS, world.serving, copy_of(job))
        assert [one["uid"] for one in copy["metadata"]["ownerReferences"]] == [job["metadata"]["uid"]]
        gate = await world.kube.get(SECRETS, world.serving, await gate_of(world))
        async with Kube(await load_configuration(str(account))) as operators:
            for namespace, secret in ((HOME, "lora-operator-key"), (world.serving, "x"), (world.team_a, "hf")):
                with pytest.raises(ForbiddenError):
                    await operators.patch(SECRETS, namespace, secret, {"data": {}})
                with pytest.raises(ForbiddenError):
                    await operators.delete(SECRETS, namespace, secret)
            for made in (gate, copy):
                with pytest.raises(ForbiddenError):
                    await operators.get(SECRETS, world.serving, made["metadata"]["name"])
                with pytest.raises(ForbiddenError):
                    await operators.apply(
                        {**made, "metadata": {"name": made["metadata"]["name"], "namespace": world.serving}}
                    )


async def test_no_secret_of_the_operator_can_be_edited(
    world: World, control_plane: ControlPlane, account: Path, kubectl: Kubectl
) -> None:
    """So there is nothing to repair in one; it can be deleted, and then it is made again."""
    await give_token(world)
    await world.make_fleet()
    world.outcomes["org/private"] = NEVER
    async with running_operator(control_plane, kubeconfig=account):
        await world.adapter("private", world.team_a, source=PRIVATE)
        copy = copy_of(await job_of(world))
        await until(lambda: world.find(DEPLOYMENTS, world.serving, "llama"), "the engines' Deployment is made")
        edit = json.dumps({"data": {"token": base64.b64encode(b"edited").decode()}})
        for name in (copy, await gate_of(world)):
            answer = kubectl.try_("patch", "secret", name, "-n", world.serving, "--type=merge", "-p", edit)
            assert not answer.ok
            assert "field is immutable when `immutable` is set" in answer.error


async def test_after_its_key_was_lost_the_fleet_gets_pods_with_another_token(
    world: World, control_plane: ControlPlane, account: Path
) -> None:
    await world.make_fleet()
    async with running_operator(control_plane, kubeconfig=account):
        await world.adapter("sql", world.team_a)
        await world.run_pods()
        await world.ready("sql", world.team_a)
        lost = await gate_of(world)
    await world.kube.delete(SECRETS, HOME, MASTER_KEY_SECRET)
    async with running_operator(control_plane, kubeconfig=account):

        async def rolled() -> bool:
            return await gate_of(world) != lost

        await until(rolled, "the Deployment has the new token's Secret")
        kept = await world.kube.get(SECRETS, world.serving, lost)
        made = await world.kube.get(SECRETS, world.serving, await gate_of(world))
        assert kept["data"] != made["data"]
        assert kept["metadata"]["ownerReferences"] == made["metadata"]["ownerReferences"], "it goes with the fleet"
        workload = await world.kube.get(DEPLOYMENTS, world.serving, "llama")
        await world.engines.pop("llama-0").stop()
        await world.kube.delete(PODS, world.serving, "llama-0")
        await world.start_pod(workload, "llama-1")
        await world.report_rollout(workload)
        await world.wait_for(LORA_ADAPTERS, "sql", world.team_a, "Ready", "True")
        again = await gate_of(world)
    async with running_operator(control_plane, kubeconfig=account):  # with the same key: nobody rolls
        await world.adapter("chat", world.team_a)
        await world.ready("chat", world.team_a)
        assert await gate_of(world) == again
        assert (await world.kube.get(DEPLOYMENTS, world.serving, "llama"))["metadata"]["generation"] == workload[
            "metadata"
        ]["generation"]


async def test_no_job_runs_with_a_secret_that_somebody_made_in_its_place(
    world: World, control_plane: ControlPlane, account: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody who sees the Job is faster than the operator; the next attempt's Secret has another name."""
    await give_token(world)
    await world.make_fleet()
    create = Kube.create
    taken: list[str] = []

    async def late(self: Kube, obj: Json) -> Json:
        if obj["kind"] == "Secret" and obj["metadata"]["name"].startswith("private-") and not taken:
            taken.append(obj["metadata"]["name"])
            theirs = {"token": base64.b64encode(b"theirs").decode()}
            place = {"name": obj["metadata"]["name"], "namespace": world.serving}
            await create(self, {"apiVersion": "v1", "kind": "Secret", "metadata": place, "data": theirs})
        return await create(self, obj)

    monkeypatch.setattr(Kube, "create", late)
    monkeypatch.setattr("lora_operator.plan.artifact.FIRST_BACKOFF_SECONDS", 1)
    seen: list[Json] = []

    async def watch() -> None:
        while True:
            seen.extend((await world.kube.list(JOBS, namespace=world.serving))[0])
            await asyncio.sleep(0.02)

    watching = asyncio.create_task(watch())
    async with running_operator(control_plane, kubeconfig=account):
        await world.adapter("private", world.team_a, source=PRIVATE)
        await world.run_pods()
        await world.ready("private", world.team_a)
    watching.cancel()
    await asyncio.wait([watching])
    mine = [job for job in seen if job["metadata"]["name"].startswith("private-")]
    assert {bool(job["spec"].get("suspend")) for job in mine if copy_of(job) in taken} <= {True}
    assert [repository for repository, _ in world.attempts].count("org/private") == 1, "the one that had its own Secret"
    assert all(job.endswith("-2") for repository, job in world.attempts if repository == "org/private")
