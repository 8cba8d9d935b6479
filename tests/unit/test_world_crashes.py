"""The operator dies at every single step of an upgrade, and the next one ends it: on the world of the property test, in memory.

That no wanted adapter leaves the list, and that no list is given a number twice, is asserted there at each write.
"""

from __future__ import annotations

import pytest

from tests.unit.model_world import World
from tests.unit.test_world_converging import ADAPTERS, adapter, apply, check_converged, check_idempotent, happen, start

MOST_STEPS = 200


@pytest.mark.parametrize("seed", range(2))
def test_an_upgrade_ends_whichever_step_was_the_last_of_an_operator(seed: int) -> None:
    world = start(seed)
    for step in range(1, MOST_STEPS):
        before = paths(world)
        world.steps_left = step
        happen(world, apply(adapter(ADAPTERS[0], "a", f"org/{step}", secret=False)))
        world.skip(90)
        assert all(path != old for path, old in zip(paths(world), before, strict=True)), f"died at step {step}"
        check_converged(world)
        if world.steps_left is not None:
            break
    else:
        raise AssertionError("an upgrade takes no end of steps")
    assert step > 10, "there is something to die at"
    world.steps_left = None
    check_idempotent(world)


def paths(world: World) -> list[str]:
    """What each pod serves under the name."""
    return [engine.served["a"] for engine in world.engines.values()]
