"""An adapter that names another VLLMDeployment: it comes to the one, leaves the other, and its status speaks of where it is."""

from __future__ import annotations

from e2e.cluster import ControlPlane
from tests.component.reconcile_support import World, asking, running_operator, until


async def test_an_adapter_that_moves_is_served_by_the_new_deployment_and_leaves_the_old_one(
    world: World, control_plane: ControlPlane
) -> None:
    await world.make_fleet()
    await world.make_fleet("other")
    async with running_operator(control_plane):
        await world.adapter("sql", world.team_a)
        await world.adapter("chat", world.team_b)
        [old] = await world.run_pods()
        [new] = await world.run_pods(deployment="other")
        await world.ready("chat", world.team_b)
        before = await world.ready("sql", world.team_a)
        path = old.served["sql"]
        async with asking(old, "sql") as here, asking(new, "sql") as there, asking(old, "chat") as beside:
            await world.adapter("sql", world.team_a, deployment="other")
            status = await world.ready("sql", world.team_a)
            assert await new.ask("sql") == (200, path)

            async def left() -> bool:
                return await old.ask("sql") == (404, None)

            await until(left, "the old deployment serves it no more")
        assert there[-1] == (200, path)
        assert {code for code, _ in there[:-1]} <= {404}
        assert here == [(200, path), (404, None)], "it was answered until it left"
        assert [code for code, _ in beside] == [200]
        assert await world.listed() == {"chat": f"{world.team_b}/chat"}
        assert await world.listed("other") == {"sql": f"{world.team_a}/sql"}
        assert status["url"] == before["url"].replace("//llama.", "//other.")
        assert (status["readyPods"], status["artifactRef"]) == ("1/1", before["artifactRef"])
        assert [repo for repo, _ in world.attempts].count("org/sql") == 1, "it was not downloaded again"

        await world.adapter("sql", world.team_a, deployment="nowhere")
        status = await world.refused("sql", world.team_a, "DeploymentNotFound")
        assert status.get("url") is None
        assert status["readyPods"] == "0/0"

        async def gone() -> bool:
            return not new.served and await world.listed("other") == {}

        await until(gone, "the deployment that it named before serves it no more")
