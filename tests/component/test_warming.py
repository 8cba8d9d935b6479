"""A cache that is warmed by hand, and one that is offline: what the operator makes of them, on a real API server with played Jobs."""

from __future__ import annotations

import json
from typing import Any

from e2e.cluster import ControlPlane
from lora_operator.kube.kinds import JOBS, MODEL_ARTIFACTS
from tests.component.manifests import manifest
from tests.component.reconcile_support import NEVER, World, running_operator, until


async def request_of(world: World, repo: str) -> dict[str, Any]:
    """What the Job for a repository is told, once it goes."""

    async def made() -> dict[str, Any] | None:
        for job in (await world.kube.list(JOBS, namespace=world.serving))[0]:
            text = job["spec"]["template"]["spec"]["containers"][0]["env"][0]["value"]
            if f'"{repo}"' in text and not job["spec"].get("suspend"):
                found: dict[str, Any] = json.loads(text)
                return found
        return None

    return await until(made, f"a Job for {repo}")


async def test_what_was_warmed_by_hand_is_authorised_again_for_an_adapter(
    control_plane: ControlPlane, world: World
) -> None:
    async with running_operator(control_plane):
        await world.make_fleet()
        await world.run_pods()
        warm = {"spec.source": {"huggingFace": {"repo": "org/sql"}}, "spec.cacheRef": {"name": "default"}}
        await world.kube.apply(manifest("ModelArtifact", warm, name="warm-sql", namespace=world.serving))
        warmed = await world.wait_for(MODEL_ARTIFACTS, "warm-sql", world.serving, "Ready", "True")
        await world.adapter("sql", world.team_a)
        served = await world.ready("sql", world.team_a)
        assert served["digest"] == warmed["digest"]
        assert served["artifactRef"]["name"] != "warm-sql", (
            "another want has another artifact, and its own Job proves its own rights"
        )
        assert len([repo for repo, _ in world.attempts if repo == "org/sql"]) == 2
        await world.delete_adapter("sql", world.team_a)
        await world.wait_listed({})
        await world.wait_for(MODEL_ARTIFACTS, "warm-sql", world.serving, "Ready", "True")


async def test_an_offline_cache_looks_at_no_secret(control_plane: ControlPlane, world: World) -> None:
    world.outcomes = {"org/sql": NEVER, "org/more": NEVER}
    async with running_operator(control_plane):
        await world.make_fleet()
        offline = {"spec.offline": True, "spec.network.httpProxy": "http://proxy.test:3128"}
        await world.kube.apply(manifest("ModelCache", offline, name="default", namespace=world.serving))
        await world.run_pods()
        secret = {"tokenSecretRef": {"name": "nobody-made-this"}}
        await world.adapter("sql", world.team_a, source={"huggingFace": {"repo": "org/sql", **secret}})
        request = await request_of(world, "org/sql")
        assert (request["offline"], "credentials" in request) == (True, False)
        warm = {"spec.source": {"huggingFace": {"repo": "org/more", **secret}}, "spec.cacheRef": {"name": "default"}}
        await world.kube.apply(manifest("ModelArtifact", warm, name="warm-more", namespace=world.serving))
        assert (await request_of(world, "org/more"))["offline"] is True
