"""The PodDisruptionBudget of a fleet: not watched, so it is looked at when the spec changes, and every few minutes."""

from __future__ import annotations

import time
from typing import Any, Final

from lora_operator.api.deployment import VLLMDeployment
from lora_operator.desired.children import build_disruption_budget
from lora_operator.errors import NotFoundError
from lora_operator.plan.pods import controller
from lora_operator.reconcile.context import Context
from lora_operator.resource_types import DISRUPTION_BUDGETS

LOOK_SECONDS: Final = 300.0


async def keep_budget(context: Context, deployment: VLLMDeployment) -> None:
    """Make the budget as the spec wants it, or have it gone.

    Raises ReasonError(NameTaken) where another's has the name, and what the API server refuses.
    """
    place, wanted = deployment.key, deployment.spec.disruption_budget
    form = f"{deployment.metadata.uid}/{wanted}"
    known = context.budgets.get(place)
    if known is not None and known[0] == form and time.monotonic() < known[1]:
        return
    budget = build_disruption_budget(deployment)
    live = await _look(context, place)
    if wanted == "None":
        if live is not None and (owner := controller(live)) is not None and owner[2] == deployment.metadata.uid:
            await context.kube.delete(DISRUPTION_BUDGETS, *place, uid=live["metadata"]["uid"])
    elif live is None or any(live["spec"].get(name) != value for name, value in budget["spec"].items()):
        await context.refuse_foreign(budget, live)
        await context.kube.apply(budget)
    context.budgets[place] = (form, time.monotonic() + LOOK_SECONDS)


async def _look(context: Context, place: tuple[str, str]) -> dict[str, Any] | None:
    try:
        return await context.kube.get(DISRUPTION_BUDGETS, *place)
    except NotFoundError:
        return None
