"""Names on one fleet, through the whole operator: who has one, who waits for it, and how it passes on."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from e2e.cluster import ControlPlane
from lora_operator.constants import Reason
from lora_operator.kube.kinds import (
    CONFIG_MAPS,
    DEPLOYMENTS,
    LORA_ADAPTERS,
    MODEL_ARTIFACTS,
    NAMESPACES,
    VLLM_DEPLOYMENTS,
)
from tests.component.reconcile_support import World, asking, failure, running_operator, until


@dataclass(frozen=True)
class Tenant:
    """An adapter that wants the name `sql`."""

    name: str
    namespace: str
    repo: str

    @property
    def place(self) -> str:
        """As lists name it."""
        return f"{self.namespace}/{self.name}"


async def pair(world: World) -> tuple[Tenant, Tenant]:
    """Two tenants' adapters with one served name: the older, and one of another second."""
    made = await world.adapter("first", world.team_a, servedName="sql")
    created = datetime.fromisoformat(made["metadata"]["creationTimestamp"])

    async def is_past() -> bool:
        return datetime.now(UTC) >= created + timedelta(seconds=1)

    await until(is_past, "the next second has begun")
    await world.adapter("second", world.team_b, servedName="sql")
    return Tenant("first", world.team_a, "org/first"), Tenant("second", world.team_b, "org/second")


async def path_of(world: World, tenant: Tenant) -> str:
    """Where the content of a tenant's adapter is."""
    status = await world.wait_for(LORA_ADAPTERS, tenant.name, tenant.namespace, "Downloaded", "True")
    artifact = await world.kube.get(MODEL_ARTIFACTS, status["artifactRef"]["namespace"], status["artifactRef"]["name"])
    return f"/model-cache/{artifact['status']['path']}"


async def test_the_older_of_two_tenants_has_the_name_and_the_younger_is_told_nothing_of_it(
    world: World, control_plane: ControlPlane
) -> None:
    await world.make_fleet()
    older, younger = await pair(world)
    async with running_operator(control_plane):
        await world.run_pods()
        await world.ready(older.name, older.namespace)
        status = await world.refused(younger.name, younger.namespace, "NameConflict")
        assert await world.listed() == {"sql": older.place}
        conditions = {c["type"]: c for c in status["conditions"]}
        assert conditions["Accepted"]["message"] == (
            f"servedName sql is taken by an older adapter of {world.serving}/llama: "
            "choose another; it is taken over should the older one go"
        )
        assert conditions["Stalled"]["status"] == "True"
        for theirs in (older.name, older.namespace, older.repo):
            assert theirs not in str(status)
        await path_of(world, younger)  # it stands by
    async with running_operator(control_plane):
        await world.ready(older.name, older.namespace)
        await world.refused(younger.name, younger.namespace, "NameConflict")
        assert await world.listed() == {"sql": older.place}


Going = Callable[[World, Tenant], Awaitable[Any]]


async def _is_deleted(world: World, older: Tenant) -> None:
    await world.delete_adapter(older.name, older.namespace)


async def _is_being_deleted(world: World, older: Tenant) -> None:
    """As with `kubectl delete`, where somebody's finalizer keeps the object."""
    hold = {"metadata": {"finalizers": ["example.com/hold"]}}
    await world.kube.patch(LORA_ADAPTERS, older.namespace, older.name, hold)
    await world.delete_adapter(older.name, older.namespace)


async def _is_renamed(world: World, older: Tenant) -> None:
    await world.adapter(older.name, older.namespace, servedName="other")


async def _names_another_deployment(world: World, older: Tenant) -> None:
    await world.adapter(older.name, older.namespace, servedName="sql", deployment="nowhere")


async def _is_no_longer_admitted(world: World, older: Tenant) -> None:
    await world.kube.patch(NAMESPACES, "", older.namespace, {"metadata": {"labels": {"served": None}}})


GOING: dict[str, Going] = {
    "is deleted": _is_deleted,
    "is being deleted": _is_being_deleted,
    "is renamed": _is_renamed,
    "names another deployment": _names_another_deployment,
    "is no longer admitted": _is_no_longer_admitted,
}


@pytest.mark.parametrize("how", GOING)
async def test_the_younger_takes_over_in_one_swap_when_the_older(
    world: World, control_plane: ControlPlane, how: str
) -> None:
    for namespace in (world.team_a, world.team_b):
        await world.kube.patch(NAMESPACES, "", namespace, {"metadata": {"labels": {"served": "yes"}}})
    selector = {"from": "Selector", "selector": {"matchLabels": {"served": "yes"}}}
    await world.make_fleet(adapterPolicy={"namespaces": selector})
    older, younger = await pair(world)
    async with running_operator(control_plane):
        [engine] = await world.run_pods()
        await world.ready(older.name, older.namespace)
        old, new = await path_of(world, older), await path_of(world, younger)
        generation = (await world.modules()).generation
        async with asking(engine, "sql") as answers:
            await GOING[how](world, older)
            await world.ready(younger.name, younger.namespace)
            assert await engine.ask("sql") == (200, new)
        assert answers == [(200, old), (200, new)]
        expected = {"sql": younger.place} | ({"other": older.place} if how == "is renamed" else {})
        assert await world.listed() == expected
        assert (await world.modules()).generation == generation + 1
    await world.kube.patch(LORA_ADAPTERS, older.namespace, older.name, {"metadata": {"finalizers": None}}) if (
        how == "is being deleted"
    ) else None


async def test_an_older_adapter_that_is_renamed_onto_a_name_gets_it_and_one_that_is_younger_does_not(
    world: World, control_plane: ControlPlane
) -> None:
    await world.make_fleet()
    older, younger = await pair(world)
    async with running_operator(control_plane):
        [engine] = await world.run_pods()
        await world.ready(older.name, older.namespace)
        await world.adapter(older.name, older.namespace, servedName="other")
        await world.ready(younger.name, younger.namespace)
        await world.adapter(younger.name, younger.namespace, servedName="other")
        await world.refused(younger.name, younger.namespace, "NameConflict")
        await world.wait_listed({"other": older.place})
        await world.adapter(younger.name, younger.namespace, servedName="sql")
        await world.ready(younger.name, younger.namespace)
        old, new = await path_of(world, younger), await path_of(world, older)
        async with asking(engine, "sql") as answers:
            await world.adapter(older.name, older.namespace, servedName="sql")
            await world.refused(younger.name, younger.namespace, "NameConflict")
            await world.ready(older.name, older.namespace)
        assert answers == [(200, old), (200, new)]
        await world.wait_listed({"sql": older.place})


async def test_an_older_adapter_that_can_t_be_downloaded_holds_its_name(
    world: World, control_plane: ControlPlane
) -> None:
    await world.make_fleet()
    older, younger = await pair(world)
    world.outcomes[older.repo] = failure(Reason.REPOSITORY_NOT_FOUND, "no such repository")
    async with running_operator(control_plane):
        [engine] = await world.run_pods()
        await world.refused(older.name, older.namespace, "RepositoryNotFound")
        await world.refused(younger.name, younger.namespace, "NameConflict")
        new = await path_of(world, younger)
        assert await world.listed() == {}
        assert await engine.ask("sql") == (404, None)
        await world.delete_adapter(older.name, older.namespace)
        await world.ready(younger.name, younger.namespace)
        assert await engine.ask("sql") == (200, new)


async def test_what_the_older_left_does_not_answer_for_a_younger_whose_content_the_engine_refuses(
    world: World, control_plane: ControlPlane
) -> None:
    await world.make_fleet()
    older, younger = await pair(world)
    async with running_operator(control_plane):
        [engine] = await world.run_pods()
        await world.ready(older.name, older.namespace)
        engine.engine.refuses.add(await path_of(world, younger))
        await world.delete_adapter(older.name, older.namespace)
        await world.refused(younger.name, younger.namespace, "EngineRefused")
        assert (await engine.ask("sql"))[1] is None


async def test_an_adapter_leaves_the_list_before_pods_get_its_name_as_the_base_model_s(
    world: World, control_plane: ControlPlane
) -> None:
    await world.make_fleet()
    async with running_operator(control_plane):
        await world.adapter("sql", world.team_a)
        await world.run_pods()
        await world.ready("sql", world.team_a)
        before = (await world.kube.get(DEPLOYMENTS, world.serving, "llama"))["metadata"]["generation"]
        names = ["tiny/base", "tiny/alias", "sql"]
        await world.kube.patch(VLLM_DEPLOYMENTS, world.serving, "llama", {"spec": {"model": {"servedNames": names}}})
        status = await world.refused("sql", world.team_a, "NameIsBaseModel")
        assert f"servedName sql is a name of the base model of {world.serving}/llama" in str(status)

        async def rolled() -> Any:
            found = await world.kube.get(DEPLOYMENTS, world.serving, "llama")
            return found if found["metadata"]["generation"] > before else None

        workload = await until(rolled, "the Deployment has the new name")
        assert await world.listed() == {}
        modules = await world.kube.get(CONFIG_MAPS, world.serving, "llama-modules")
        assert int(modules["metadata"]["resourceVersion"]) < int(workload["metadata"]["resourceVersion"])


async def test_names_qualified_by_the_namespace(world: World, control_plane: ControlPlane) -> None:
    await world.make_fleet()
    older, younger = await pair(world)
    async with running_operator(control_plane):
        [engine] = await world.run_pods()
        await world.ready(older.name, older.namespace)
        await world.refused(younger.name, younger.namespace, "NameConflict")
        await path_of(world, younger)  # both contents are there: the policy alone changes the list
        generation = (await world.modules()).generation
        workload = await world.kube.get(DEPLOYMENTS, world.serving, "llama")

        await _set_names(world, "NamespaceQualified")
        for tenant in (older, younger):
            await _serves(world, tenant, f"{tenant.namespace}/sql")
        expected = {f"{tenant.namespace}/sql": tenant.place for tenant in (older, younger)}
        assert await world.listed() == expected
        assert (await world.modules()).generation == generation + 1
        assert engine.served == {f"{t.namespace}/sql": await path_of(world, t) for t in (older, younger)}
        assert await engine.ask("sql") == (404, None)
        assert (await world.kube.get(DEPLOYMENTS, world.serving, "llama"))["metadata"]["generation"] == workload[
            "metadata"
        ]["generation"]

        await world.adapter("third", older.namespace, servedName="sql")
        await world.refused("third", older.namespace, "NameConflict")
        await world.adapter("long", older.namespace, servedName="x" * 128)
        await world.refused("long", older.namespace, "InvalidSpec")

        await _set_names(world, "Plain")
        await world.refused(younger.name, younger.namespace, "NameConflict")
        await _serves(world, older, "sql")
        assert (await world.ready("long", older.namespace))["servedName"] == "x" * 128
        assert await world.listed() == {"sql": older.place, "x" * 128: f"{older.namespace}/long"}


async def _set_names(world: World, policy: str) -> None:
    await world.kube.patch(
        VLLM_DEPLOYMENTS, world.serving, "llama", {"spec": {"adapterPolicy": {"servedNames": policy}}}
    )


async def _serves(world: World, tenant: Tenant, name: str) -> None:
    """Until the adapter is Ready under a name."""

    async def look() -> bool:
        return bool((await world.ready(tenant.name, tenant.namespace))["servedName"] == name)

    await until(look, f"{tenant.place} is served as {name}")
