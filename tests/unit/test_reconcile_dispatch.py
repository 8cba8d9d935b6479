"""An object that this operator can't read is told so, and keeps everything else that its status says."""

from __future__ import annotations

from typing import Any

import pytest

from lora_operator.constants import API_VERSION
from lora_operator.kube.kinds import Kind
from lora_operator.reconcile.dispatch import Dispatcher
from lora_operator.reconcile.store import Key
from tests.unit.builders import make_adapter, ready
from tests.unit.small_world import SmallWorld

SQL = Key(Kind.LORA_ADAPTER, "team-a", "sql")
SAID: dict[str, Any] = {
    "refresh": {"requested": "2026-01-01", "due": "2026-01-01T00:00:00Z"},
    "artifactRef": {"name": "sql-0a1b2c3d4e", "namespace": "serving"},
    "resolvedRevision": "0" * 40,
}


async def told(body: dict[str, Any]) -> dict[str, Any]:
    """The status that an object has after two looks at it."""
    world = SmallWorld()
    world.put(SQL.kind, body)
    context = world.context
    dispatcher = Dispatcher(context.kube, context.engines, world.store, context.settings, context.enqueue)
    for _ in range(2):
        assert await dispatcher(SQL) is None
    [status] = world.kube.statuses
    return status


def unreadable(**status: Any) -> dict[str, Any]:
    body = make_adapter(conditions=ready()).to_wire() | {"apiVersion": API_VERSION, "kind": SQL.kind.value}
    body["spec"]["servedName"] = "a,b"
    body["status"] |= status
    return body


async def test_all_but_its_conditions_stays_as_it_was() -> None:
    status = await told(unreadable(**SAID))
    conditions = {one["type"]: (one["status"], one["reason"]) for one in status.pop("conditions")}
    assert status == SAID
    assert conditions["Ready"] == conditions["Accepted"] == ("False", "InvalidSpec")


@pytest.mark.parametrize("odd", [{"refresh": "a newer operator's word"}, {"conditions": [{"type": 5}]}], ids=str)
async def test_what_of_its_status_can_t_be_read_does_not_stay(odd: dict[str, Any]) -> None:
    status = await told(unreadable(**(SAID | odd)))
    assert status.pop("conditions")
    assert status == {name: value for name, value in SAID.items() if name not in odd}
