"""Adapters that are read in a role: who may have which assumed, and what their Jobs are, on a real API server with played Jobs."""

from __future__ import annotations

import json
from typing import Any

from e2e.cluster import ControlPlane
from lora_operator.kube.kinds import MODEL_ARTIFACTS
from tests.component.conftest import Kubectl
from tests.component.manifests import manifest
from tests.component.reconcile_support import World, running_operator

ROLE = "arn:aws:iam::123456789012:role/models"
EXTERNAL = "external-id-of-team-a"


def read_in_role(**members: Any) -> dict[str, Any]:
    role = {"arn": ROLE, "externalId": EXTERNAL}
    return {"s3": {"bucket": "models", "prefix": "team-a/sql", "assumeRole": role, **members}}


async def lend(world: World, *namespaces: str) -> None:
    """The cache's service account assumes the role for objects of these namespaces."""
    identity = {
        "serviceAccountName": "reader",
        "allowedSources": ["s3://models/*"],
        "allowedRoles": [{"arn": ROLE, "namespaces": list(namespaces)}],
    }
    changes = {"spec.workloadIdentity": identity}
    await world.kube.apply(manifest("ModelCache", changes, name="default", namespace=world.serving))


def watch_jobs(world: World) -> dict[str, dict[str, Any]]:
    """The pod's spec of each artifact's Job, as they are made: they go once they have ended."""
    pods: dict[str, dict[str, Any]] = {}
    end = world._end_job

    async def seen(job: dict[str, Any]) -> None:
        pods[job["metadata"]["ownerReferences"][0]["name"]] = job["spec"]["template"]["spec"]
        await end(job)

    world._end_job = seen  # type: ignore[method-assign]
    return pods


async def spec_of(world: World, name: str) -> dict[str, Any]:
    """The artifact's."""
    found: dict[str, Any] = (await world.kube.get(MODEL_ARTIFACTS, world.serving, name))["spec"]
    return found


def role_of(pod: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(pod["containers"][0]["env"][0]["value"])["source"]["role"]
    return found


async def test_a_role_is_for_whom_the_cache_has_it_and_for_whom_a_secret_is(
    control_plane: ControlPlane, world: World, kubectl: Kubectl
) -> None:
    pods = watch_jobs(world)
    kubectl(
        "create",
        "secret",
        "generic",
        "keys",
        "-n",
        world.team_b,
        "--from-literal=AWS_ACCESS_KEY_ID=AKTENANT",
        "--from-literal=AWS_SECRET_ACCESS_KEY=secret",
    )
    async with running_operator(control_plane):
        await world.make_fleet()
        await world.run_pods()
        await world.adapter("lent", world.team_a, source=read_in_role())
        nobody = await world.refused("lent", world.team_a, "SourceNotAllowed")
        await lend(world, world.team_a)
        lent = await world.ready("lent", world.team_a)
        name = lent["artifactRef"]["name"]
        spec, pod = await spec_of(world, name), pods[name]
        assert spec["source"]["s3"] == {
            "bucket": "models",
            "prefix": "team-a/sql",
            "allowPatterns": [],
            "ignorePatterns": [],
        }
        assert (spec["assumeRole"], "credentials" in spec) == ({"arn": ROLE, "externalId": EXTERNAL}, False)
        assert (pod["serviceAccountName"], role_of(pod)["arn"]) == ("reader", ROLE)
        assert role_of(pod)["sessionName"] == f"{world.serving}@{name}"

        await world.adapter("other", world.team_b, source=read_in_role())
        other = await world.refused("other", world.team_b, "SourceNotAllowed")
        await world.adapter("own", world.team_b, source=read_in_role(credentialsSecretRef={"name": "keys"}))
        own = await world.ready("own", world.team_b)
        assert own["artifactRef"]["name"] != name
        name = own["artifactRef"]["name"]
        spec, pod = await spec_of(world, name), pods[name]
        assert spec["credentials"]["name"] == "keys"
        assert (pod.get("serviceAccountName"), role_of(pod)["arn"]) == (None, ROLE)
        assert role_of(pod)["sessionName"] == f"{world.team_b}@{name}"
        for status in (nobody, lent, other, own):
            assert EXTERNAL not in json.dumps(status)
        for pod in pods.values():
            assert pod["containers"][0]["args"] == ["fetch"]

        await lend(world, world.team_b)
        await world.refused("lent", world.team_a, "SourceNotAllowed")
        await world.ready("other", world.team_b)
