"""Which adapter of a deployment has which name, for one whole list: pure, and from what the objects say now.

An adapter's own decision says which content it would have served. Whether it has its name depends on all the others, and is
found here, at the moment the list is made: so a name passes from one adapter to the next within one list, a name of the base
model is free before any pod has it, and another policy renames all adapters at once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from lora_operator.api.adapter import LoRAAdapter
from lora_operator.api.deployment import VLLMDeployment
from lora_operator.plan.adapter_list import Decision, Module, ModuleList
from lora_operator.plan.admission import admit, public_name, seniority


@dataclass(frozen=True)
class Candidate:
    """An adapter that names the deployment."""

    adapter: LoRAAdapter
    namespace_labels: Mapping[str, str] | None
    decision: Decision | None  # None: none was made on its present form


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
    decisions = [Decision(uid=module.uid, generation=0, accepted=False, keep=True) for module in kept]
    taken = {module.name for module in kept}
    holders = {module.name: module.uid for module in entries.values()}

    def rank(one: Candidate) -> tuple[str, bool, str]:
        return seniority(one.adapter, holder=holders.get(public_name(one.adapter, deployment)))

    for candidate in sorted(candidates, key=rank):
        metadata, decision = candidate.adapter.metadata, candidate.decision
        entry = entries.get(metadata.uid)
        admitted = admit(candidate.adapter, deployment, namespace_labels=candidate.namespace_labels).status
        if admitted is None or (admitted and decision is None):
            decisions.append(Decision(uid=metadata.uid, generation=metadata.generation, accepted=False, keep=True))
            taken |= {entry.name} if entry is not None else set()
            continue
        name = public_name(candidate.adapter, deployment)
        if decision is None or not admitted or name in taken:
            decisions.append(Decision(uid=metadata.uid, generation=metadata.generation, accepted=False))
            continue
        taken.add(name)
        decisions.append(_named(decision, entry, name, candidate.adapter, deployment))
    return decisions


def _named(
    decision: Decision, entry: Module | None, name: str, adapter: LoRAAdapter, deployment: VLLMDeployment
) -> Decision:
    if not decision.keep:
        return replace(decision, module=replace(decision.module, name=name)) if decision.module else decision
    own = {adapter.served_name, f"{adapter.metadata.namespace}/{adapter.served_name}"}
    if entry is not None and entry.name in own:  # renamed by the deployment's policy, if at all
        return replace(decision, keep=False, module=replace(entry, name=name))
    if entry is not None and entry.name in deployment.spec.model.served_names:
        return replace(decision, keep=False)
    return decision  # renamed by its owner, together with other content: until that is there, it stays as it is
