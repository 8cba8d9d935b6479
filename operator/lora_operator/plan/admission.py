"""Whether a deployment admits an adapter, and which of its adapters has which name: the same answer for status and list.

An adapter's own decision says which content it would have served. Whether it has its name depends on all the others, and is
found for the whole list, at the moment it is made: so a name passes from one adapter to the next within one list, a name of the
base model is free before any pod has it, and another policy renames all adapters at once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import assert_never

from lora_operator.api.adapter import LoRAAdapter
from lora_operator.api.artifact import ModelArtifact
from lora_operator.api.common import LabelSelector, LabelSelectorRequirement
from lora_operator.api.deployment import VLLMDeployment
from lora_operator.conditions import Verdict, failing, ok
from lora_operator.constants import MAX_SERVED_NAME, Reason
from lora_operator.plan.adapter_list import Decision, Drop, Keep, Module, ModuleList, Serve, Unknown


def selector_matches(selector: LabelSelector, labels: Mapping[str, str]) -> bool:
    """Whether metav1.LabelSelector selects `labels`; an empty selector selects everything."""
    return all(labels.get(key) == value for key, value in selector.match_labels.items()) and all(
        _requirement_matches(requirement, labels) for requirement in selector.match_expressions
    )


def _requirement_matches(requirement: LabelSelectorRequirement, labels: Mapping[str, str]) -> bool:
    value = labels.get(requirement.key)
    match requirement.operator:
        case "In":
            return value is not None and value in requirement.values
        case "NotIn":
            return value is None or value not in requirement.values
        case "Exists":
            return value is not None
        case "DoesNotExist":
            return value is None


def namespace_admitted(deployment: VLLMDeployment, namespace: str, labels: Mapping[str, str] | None) -> bool | None:
    """Whether adapterPolicy.namespaces admits a namespace; None where its labels matter and are not known."""
    policy = deployment.spec.adapter_policy.namespaces
    if namespace == deployment.metadata.namespace or policy.from_ == "All":
        return True
    if policy.from_ == "Same" or policy.selector is None:
        return False
    return None if labels is None else selector_matches(policy.selector, labels)


def public_name(adapter: LoRAAdapter, deployment: VLLMDeployment) -> str:
    """What clients of the deployment write into "model" for the adapter."""
    if deployment.spec.adapter_policy.served_names == "Plain":
        return adapter.served_name
    return f"{adapter.metadata.namespace}/{adapter.served_name}"


def admit(
    adapter: LoRAAdapter,
    deployment: VLLMDeployment | None,
    *,
    namespace_labels: Mapping[str, str] | None,
) -> Verdict:
    """Whether the deployment admits the adapter, its rivals for the name aside. Unknown only where labels are."""
    namespace, name = adapter.deployment_key
    if deployment is None:
        return failing(
            Reason.DEPLOYMENT_NOT_FOUND,
            f"VLLMDeployment {namespace}/{name} does not exist: create it or change vllmDeploymentRef",
        )
    own = adapter.metadata.namespace
    admitted = namespace_admitted(deployment, own, namespace_labels)
    if admitted is None:
        return Verdict(None, Reason.NAMESPACE_NOT_ALLOWED, f"labels of namespace {own} are not known yet")
    if not admitted:
        return failing(
            Reason.NAMESPACE_NOT_ALLOWED,
            f"VLLMDeployment {namespace}/{name} does not admit adapters from namespace {own}: "
            "ask its owner to admit it by spec.adapterPolicy.namespaces",
        )
    served = deployment.spec.model.served_names
    public = public_name(adapter, deployment)
    if len(public) > MAX_SERVED_NAME:
        return failing(
            Reason.INVALID_SPEC,
            f"{namespace}/{name} serves adapters as <namespace>/<servedName>, which is {len(public)} characters long "
            f"here, and may be {MAX_SERVED_NAME}: choose a shorter servedName",
        )
    if public in served:
        return failing(
            Reason.NAME_IS_BASE_MODEL,
            f"servedName {public} is a name of the base model of {namespace}/{name}: choose another",
        )
    if adapter.spec.base_model_name is not None and adapter.spec.base_model_name not in served:
        return failing(
            Reason.BASE_MODEL_NOT_SERVED,
            f"baseModelName {adapter.spec.base_model_name} is not served by {namespace}/{name}: "
            f"use one of {', '.join(served)}",
        )
    return ok(Reason.ACCEPTED, f"served by {namespace}/{name} as {public}")


def seniority(adapter: LoRAAdapter, *, holder: str | None = None) -> tuple[str, bool, str]:
    """Sort key: the older adapter first; of those made in the same second `holder`, the UID of who is listed under the name, then by UID."""
    created, uid = adapter.metadata.creation_timestamp, adapter.metadata.uid
    return created.isoformat() if created else "~", uid != holder, uid


def yield_name(
    adapter: LoRAAdapter,
    deployment: VLLMDeployment,
    rivals: Iterable[LoRAAdapter],
    *,
    held: bool = False,
    holder: str | None = None,
) -> Verdict | None:
    """NameConflict where an older of the admitted `rivals` for the same name exists; says nothing about whose it is.

    `held`: the name's present holder can't be read, and may be older. `holder`: its UID, where somebody has the name.
    """
    mine = seniority(adapter, holder=holder)
    if not held and all(mine <= seniority(rival, holder=holder) for rival in rivals):
        return None
    namespace, name = adapter.deployment_key
    return failing(
        Reason.NAME_CONFLICT,
        f"servedName {public_name(adapter, deployment)} is taken by an older adapter of {namespace}/{name}: "
        "choose another; it is taken over should the older one go",
    )


@dataclass(frozen=True)
class Candidate:
    """An adapter that names the deployment."""

    adapter: LoRAAdapter
    namespace_labels: Mapping[str, str] | None
    decision: Decision | None  # None: none was made on its present form
    artifact: ModelArtifact | None = None  # the one that the decision wants


def settle_claims(
    candidates: Iterable[Candidate],
    *,
    deployment: VLLMDeployment,
    previous: ModuleList | None,
    unreadable: Collection[str] = (),
) -> list[Decision]:
    """The candidates' decisions under the names that they have; one that has to yield its name is refused.

    `unreadable` names adapters (<namespace>/<name>) that exist and can't be read. These, and those of which too little is known,
    keep the entry and the name that they have in the previous list, and claim no other.
    """
    entries = {module.uid: module for module in previous.modules} if previous else {}
    kept = [module for module in entries.values() if module.adapter in unreadable]
    decisions = [Decision(module.uid, 0, Keep()) for module in kept]
    taken = {module.name for module in kept}
    holders = {module.name: module.uid for module in entries.values()}

    def rank(one: Candidate) -> tuple[str, bool, str]:
        return seniority(one.adapter, holder=holders.get(public_name(one.adapter, deployment)))

    for candidate in sorted(candidates, key=rank):
        metadata, decision = candidate.adapter.metadata, candidate.decision
        entry = entries.get(metadata.uid)
        admitted = admit(candidate.adapter, deployment, namespace_labels=candidate.namespace_labels).status
        if admitted is None or (admitted and decision is None):
            decisions.append(Decision(metadata.uid, metadata.generation, Keep()))
            taken |= {entry.name} if entry is not None else set()
            continue
        name = public_name(candidate.adapter, deployment)
        if decision is None or not admitted or name in taken:
            decisions.append(Decision(metadata.uid, metadata.generation, Drop()))
            continue
        taken.add(name)
        decisions.append(_named(decision, entry, name, candidate.adapter, deployment))
    return decisions


def _named(
    decision: Decision, entry: Module | None, name: str, adapter: LoRAAdapter, deployment: VLLMDeployment
) -> Decision:
    match decision.entry:
        case Serve(module):
            return replace(decision, entry=Serve(replace(module, name=name)))
        case Drop():
            return decision
        case Keep() | Unknown():
            return _kept_name(decision, entry, name, adapter, deployment)
        case _:
            assert_never(decision.entry)


def _kept_name(
    decision: Decision, entry: Module | None, name: str, adapter: LoRAAdapter, deployment: VLLMDeployment
) -> Decision:
    if entry is None or entry.path == decision.except_path:
        return decision
    own = {adapter.served_name, f"{adapter.metadata.namespace}/{adapter.served_name}"}
    if entry.name in own:  # renamed by the deployment's policy, if at all
        return replace(decision, entry=Serve(replace(entry, name=name)))
    if entry.name in deployment.spec.model.served_names:
        return replace(decision, entry=Drop())
    return decision  # renamed by its owner, together with other content: until that is there, it stays as it is
