"""What a deployment with updateStrategy Rollout has in its pods' arguments, and what is to come into them.

The Deployment itself remembers what was rolled out; how long a change has waited is remembered in memory only, and begins anew
with another operator.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lora_operator.api.deployment import VLLMDeployment
from lora_operator.constants import ANNOTATION_ARGUMENTS, ROLLOUT
from lora_operator.desired.command_line import StaticModules
from lora_operator.plan.adapter_list import ModuleList
from lora_operator.plan.pod_trouble import find_trouble
from lora_operator.plan.rollout import (
    Rolled,
    RolloutPlan,
    build_static,
    is_coming,
    is_rolling,
    parse_rolled,
    plan_rollout,
)
from lora_operator.reconcile.context import Context
from lora_operator.reconcile.fleet import all_own_pods


@dataclass(frozen=True)
class Rollout:
    """The adapters as arguments, and whether the pods are to have them now."""

    static: StaticModules
    plan: RolloutPlan


def look_at_rollout(context: Context, deployment: VLLMDeployment, modules: ModuleList | None) -> Rollout | None:
    """Decide whether the list is rolled out now; None where pods are told of it instead, or it is not known."""
    record = context.records.deployments[deployment.key]
    if deployment.spec.lora.update_strategy != ROLLOUT or modules is None:
        record.unrolled = None
        return None
    static, rolled = build_static(modules), _rolled(context, deployment)
    if rolled is not None and rolled.digest == static.digest:
        static = replace(static, generation=rolled.generation)  # another number alone is no reason for other pods
    plan = plan_rollout(
        static,
        rolled,
        record.unrolled,
        coming=_coming(context, deployment),
        rolling=_is_rolling(context, deployment),
        now=context.clock.now(),
    )
    record.unrolled = plan.unrolled
    return Rollout(static, plan)


def as_rolled(
    context: Context, deployment: VLLMDeployment, modules: ModuleList | None, rollout: Rollout | None
) -> tuple[ModuleList | None, str | None]:
    """The list under the generation that pods hold it by, where it is in their arguments by now; else what that waits for."""
    if rollout is None or modules is None:
        return modules, None
    rolled = _rolled(context, deployment)
    if rolled is None or rolled.digest != rollout.static.digest:
        return modules, rollout.plan.waits_for
    return replace(modules, generation=rolled.generation), None


def _is_rolling(context: Context, deployment: VLLMDeployment) -> bool:
    workload = context.store.workloads.get(deployment.key)
    pods = all_own_pods(context, deployment)
    return is_rolling(workload, find_trouble(pods, workload, warnings={}, now=context.clock.now()))


def _rolled(context: Context, deployment: VLLMDeployment) -> Rolled | None:
    workload = context.store.workloads.get(deployment.key)
    return parse_rolled(workload.annotations.get(ANNOTATION_ARGUMENTS) if workload is not None else None)


def _coming(context: Context, deployment: VLLMDeployment) -> tuple[str, ...]:
    """Adapters that may soon be on the list, as they are named in messages."""
    found = []
    for adapter in context.store.adapters_of(deployment.key):
        decision = context.records.decision(adapter.key)
        metadata = adapter.metadata
        if decision is not None and (decision.uid, decision.generation) != (metadata.uid, metadata.generation):
            decision = None
        artifact = context.store.artifacts.get(decision.artifact) if decision and decision.artifact else None
        if is_coming(decision, artifact):
            found.append(f"LoRAAdapter {metadata.namespace}/{metadata.name}")
    return tuple(sorted(found))
