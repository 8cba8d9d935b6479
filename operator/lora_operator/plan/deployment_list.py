"""Which adapter list a deployment's pods are to have: what was decided of each adapter, as far as there is room.

Unknown is not empty: while it is not known what the pods were told before, or what an adapter is to have, there is no list.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from lora_operator.api.deployment import VLLMDeployment
from lora_operator.constants import ROLLOUT, Reason
from lora_operator.plan.adapter_list import Decision, Drop, Module, ModuleList, Unknown, names_passed_on, plan_list
from lora_operator.plan.admission import Candidate, settle_claims
from lora_operator.plan.list_limits import give_way
from lora_operator.plan.rollout import leave_out

Crowd = tuple[
    tuple[Module, ...], frozenset[str]
]  # a list without room for all: all, and the UIDs of those that gave way
Key = tuple[str, str]  # namespace and name


@dataclass(frozen=True)
class ListObservation:
    """What is known of a deployment's adapters, and of the list that its pods were told last."""

    candidates: tuple[Candidate, ...]
    previous: ModuleList | None  # as this operator made it, else as its ConfigMap has it
    recovered: ModuleList | None = None  # without a previous one: the newest that pods hold
    unasked: tuple[str, ...] = ()  # own pods of which it is not known what they hold
    has_pods: bool = False  # whether any pod has the deployment's label, whoever's it is
    highest: int = 0  # the highest generation that any pod was seen to hold
    unreadable: frozenset[str] = frozenset()  # adapters (<namespace>/<name>) that exist and can't be read
    left_out: Mapping[str, Reason] = field(default_factory=dict)  # those without room until now, by UID
    crowd: Crowd | None = None  # as found last: packing takes its time


@dataclass(frozen=True)
class ListUnknown:
    """There is no list yet. What is missing is looked at, and then the deployment again."""

    adapters: tuple[Key, ...] = ()
    pods: tuple[str, ...] = ()


@dataclass(frozen=True)
class ListPlan:
    """The list that the pods are to have."""

    modules: ModuleList
    is_new: bool  # so all pods are to be looked at
    adapters: tuple[Key, ...]  # to be looked at: they were not, or there is other news for them
    left_out: Mapping[str, Reason]
    crowd: Crowd | None


def plan_deployment_list(deployment: VLLMDeployment, seen: ListObservation) -> ListPlan | ListUnknown:
    """The list after all decisions."""
    if seen.previous is None and seen.unasked:
        return ListUnknown(pods=seen.unasked)
    previous = seen.previous or seen.recovered
    undecided = tuple(one.adapter.key for one in seen.candidates if one.decision is None)
    if previous is None and undecided:
        return ListUnknown(adapters=undecided[:1])
    entries = [one.decision.entry for one in seen.candidates if one.decision]
    if previous is None and seen.has_pods and any(isinstance(entry, Unknown) for entry in entries):
        return ListUnknown()  # what that one has, nobody knows: pods may hold a list with it
    decisions = settle_claims(seen.candidates, deployment=deployment, previous=previous, unreadable=seen.unreadable)
    updated, left_out, crowd = _fit(deployment, seen, previous, decisions)
    news = _news(seen, left_out)
    return ListPlan(
        updated,
        is_new=previous is None or updated.generation != previous.generation,
        adapters=(*undecided, *news, *names_passed_on(previous, updated)),
        left_out=left_out,
        crowd=crowd,
    )


def _fit(
    deployment: VLLMDeployment, seen: ListObservation, previous: ModuleList | None, decisions: list[Decision]
) -> tuple[ModuleList, Mapping[str, Reason], Crowd | None]:
    """The list that the decisions lead to, without those that there is no room for."""
    rolls = deployment.spec.lora.update_strategy == ROLLOUT
    name = "/".join(deployment.key)
    left_out: dict[str, Reason] = {}
    if rolls:
        present = {module.uid: module for module in previous.modules} if previous else {}
        decisions, without = leave_out(decisions, present)
        left_out = dict.fromkeys(without, Reason.ARGUMENTS_TOO_LONG)
    everybody = plan_list(previous, decisions, deployment=name, above=seen.highest, all_eager=rolls)
    without = _give_way(seen, everybody)
    if not without:
        return everybody, left_out, None
    decisions = [replace(one, entry=Drop()) if one.uid in without else one for one in decisions]
    left_out |= dict.fromkeys(without, Reason.LIST_TOO_LONG)
    fitting = plan_list(previous, decisions, deployment=name, above=seen.highest, all_eager=rolls)
    return fitting, left_out, (everybody.modules, without)


def _give_way(seen: ListObservation, everybody: ModuleList) -> frozenset[str]:
    """Those that the list has no room for, found anew only where anybody has come, gone or changed."""
    if seen.crowd is not None and seen.crowd[0] == everybody.modules:
        return seen.crowd[1]
    metadata = (one.adapter.metadata for one in seen.candidates)
    return give_way(everybody, {one.uid: one.creation_timestamp for one in metadata})


def _news(seen: ListObservation, left_out: Mapping[str, Reason]) -> Sequence[Key]:
    """Adapters for which there is room now and was none, or the other way round."""
    if seen.left_out == left_out:
        return ()
    adapters = [one.adapter for one in seen.candidates]
    return [one.key for one in adapters if seen.left_out.get(one.metadata.uid) != left_out.get(one.metadata.uid)]
