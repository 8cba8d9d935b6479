"""The PodDisruptionBudget of a fleet: not watched, so it is looked at when the spec changes, and every few minutes.

Nothing else of a fleet depends on it. What keeps it from being made is logged and told by an Event, and engines go on.
"""

from __future__ import annotations

import logging
from typing import Any, Final

from pydantic import ValidationError

from lora_operator.api.common import LabelSelector
from lora_operator.api.deployment import VLLMDeployment
from lora_operator.constants import Reason
from lora_operator.desired.children import build_disruption_budget
from lora_operator.errors import KubeError, ReasonError
from lora_operator.kube.kinds import DISRUPTION_BUDGETS
from lora_operator.kube.objects import KubeObject
from lora_operator.names import engine_labels
from lora_operator.plan.admission import selector_matches
from lora_operator.reconcile.context import Context

log = logging.getLogger(__name__)

LOOK_SECONDS: Final = 300.0
FAILED_LOOK_SECONDS: Final = 60.0


async def keep_budget(context: Context, deployment: VLLMDeployment) -> None:
    """Make the budget as the spec wants it, or have it gone. Where pods have another one already, that is theirs."""
    place, form = deployment.key, f"{deployment.metadata.uid}/{deployment.spec.disruption_budget}"
    record = context.records.deployments[place]
    if record.budget is not None and record.budget[0] == form and context.clock.monotonic() < record.budget[1]:
        return
    record.budget = (form, context.clock.monotonic() + LOOK_SECONDS)
    try:
        await _keep(context, deployment)
    except (KubeError, ReasonError) as error:
        record.budget = (form, context.clock.monotonic() + FAILED_LOOK_SECONDS)
        log.warning("PodDisruptionBudget of VLLMDeployment %s/%s: %s", *place, error)
        if isinstance(error, ReasonError):
            await context.statuses.event(deployment, warning=True, reason=error.reason, message=error.message)


async def _keep(context: Context, deployment: VLLMDeployment) -> None:
    namespace, name = deployment.key
    found = (await context.kube.list(DISRUPTION_BUDGETS, namespace=namespace))[0]
    named = next((one for one in found if one["metadata"]["name"] == name), None)
    live = KubeObject.parse(named) if named is not None else None
    ours = named if live is not None and live.is_controlled_by(deployment.metadata.uid) else None
    labels = _pod_labels(context, deployment)
    other = next((one for one in found if one is not ours and _selects(one, labels)), None)
    unwanted = deployment.spec.disruption_budget == "None"
    # An apply would leave minAvailable there, which excludes what ours says.
    if ours is not None and (unwanted or other is not None or "minAvailable" in ours["spec"]):
        await context.kube.delete(DISRUPTION_BUDGETS, namespace, name, uid=ours["metadata"]["uid"])
        live = ours = None
    if unwanted:
        return
    if other is not None:
        raise ReasonError(
            Reason.NAME_TAKEN,
            f"PodDisruptionBudget {namespace}/{other['metadata']['name']} has the engine pods already, and nothing could evict a pod "
            "with two: none is made; set spec.disruptionBudget: None to say so",
        )
    budget = build_disruption_budget(deployment)
    if ours is None or any(ours["spec"].get(key) != value for key, value in budget["spec"].items()):
        await context.children.refuse_foreign(budget, live)
        await context.kube.apply(budget)


def _pod_labels(context: Context, deployment: VLLMDeployment) -> dict[str, str]:
    """Labels of the pods: a podTemplate may add some."""
    workload = context.store.workloads.get(deployment.key)
    return {**(workload.template_labels if workload is not None else {}), **engine_labels(deployment.metadata.name)}


def _selects(budget: dict[str, Any], labels: dict[str, str]) -> bool:
    selector = (budget.get("spec") or {}).get("selector")
    if selector is None:
        return False  # none selects nothing, an empty one everything
    try:
        return selector_matches(LabelSelector.model_validate(selector), labels)
    except ValidationError:
        return False  # of a form that this operator does not know
