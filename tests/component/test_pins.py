"""Pins by digest, with the whole operator on a real API server: one download for who pins the content and who does not."""

from __future__ import annotations

from typing import Any

import pytest

from e2e.cluster import ControlPlane
from lora_operator.kube.kinds import MODEL_ARTIFACTS, VLLM_DEPLOYMENTS
from lora_operator.wire.jobs import FetchResult
from tests.component.conftest import Kubectl
from tests.component.manifests import manifest
from tests.component.reconcile_support import COMMIT, World, running_operator

RIGHT, WRONG = f"sha256:{'a' * 64}", f"sha256:{'b' * 64}"


def source(repo: str, digest: str | None) -> dict[str, Any]:
    return {"huggingFace": {"repo": repo}} | ({"digest": digest} if digest else {})


def found(name: str) -> FetchResult:
    """What a Job finds: content whose digest is RIGHT."""
    return FetchResult(
        ok=True, resolved_revision=COMMIT, digest=RIGHT, size_bytes=1, files=2, path=f"artifacts/{name}-1", rank=8
    )


async def test_one_download_for_all_and_each_accepts_what_it_pins(control_plane: ControlPlane, world: World) -> None:
    world.outcomes = {"org/sql": found("sql"), "org/base": found("base")}
    async with running_operator(control_plane):
        await world.make_fleet(model__source=source("org/base", RIGHT))
        await world.run_pods()
        pins = {"anybody": None, "right": RIGHT, "wrong": WRONG}
        for name, digest in pins.items():
            await world.adapter(name, world.team_a, source=source("org/sql", digest))
        for name in ("anybody", "right"):
            assert (await world.ready(name, world.team_a))["digest"] == RIGHT
        told = await world.refused("wrong", world.team_a, "DigestMismatch")
        message = next(c["message"] for c in told["conditions"] if c["type"] == "Ready")
        assert RIGHT in message
        assert WRONG in message
        assert set(await world.listed()) == {"anybody", "right"}

        await world.adapter("wrong", world.team_a, source=source("org/sql", RIGHT))
        await world.ready("wrong", world.team_a)
        await world.adapter("right", world.team_a, source=source("org/sql", WRONG))
        await world.refused("right", world.team_a, "DigestMismatch")
        await world.wait_listed({name: f"{world.team_a}/{name}" for name in ("anybody", "wrong")})
        assert len([repo for repo, _ in world.attempts if repo == "org/sql"]) == 1
        artifacts, _ = await world.kube.list(MODEL_ARTIFACTS, namespace=world.serving)
        assert len(artifacts) == 2


async def test_no_pod_is_made_of_another_base_model_than_is_pinned(control_plane: ControlPlane, world: World) -> None:
    world.outcomes = {"org/base": found("base")}
    async with running_operator(control_plane):
        await world.make_fleet(model__source=source("org/base", WRONG))
        told = await world.wait_for(VLLM_DEPLOYMENTS, "llama", world.serving, "ModelReady", "False", "DigestMismatch")
        assert "modelPath" not in told
        await world.make_fleet(model__source=source("org/base", RIGHT))
        await world.run_pods()
        await world.wait_for(VLLM_DEPLOYMENTS, "llama", world.serving, "Ready", "True")
        assert [repo for repo, _ in world.attempts] == ["org/base"]


@pytest.mark.parametrize("digest", ["sha256:abc", "a" * 64, f"sha256:{'A' * 64}", f"sha512:{'a' * 64}"])
async def test_a_pin_of_another_form_is_refused_at_apply(digest: str, kubectl: Kubectl) -> None:
    answer = kubectl.apply(manifest("LoRAAdapter", {"spec.source.digest": digest}), "--dry-run=server")
    assert (answer.ok, "spec.source.digest" in answer.error) == (False, True), answer.error
