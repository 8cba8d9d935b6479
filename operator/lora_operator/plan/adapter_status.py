"""What is told of an adapter: whether the pods serve it, and its status as a whole."""

from __future__ import annotations

from datetime import datetime
from typing import Final

from lora_operator.api.adapter import ArtifactRef, LoRAAdapterStatus, PodCounts, PodFailure
from lora_operator.api.deployment import VLLMDeployment
from lora_operator.api.progress import Progress
from lora_operator.conditions import Verdict, failing, find, merge, ok, reason_of, with_ready_and_stalled
from lora_operator.constants import REASONS, ROLLOUT, Condition, Reason
from lora_operator.plan.adapter_content import AdapterContent, AdapterObservation
from lora_operator.plan.adapter_list import Module
from lora_operator.plan.admission import public_name
from lora_operator.plan.deployment_pods import AdapterLoad, DeploymentPods
from lora_operator.plan.list_limits import MAX_PACKED_BYTES
from lora_operator.plan.progress import mirrored
from lora_operator.plan.rollout import MAX_ARGUMENT_BYTES

MAX_FAILURES: Final = 5


def not_loaded(accepted: Verdict) -> Verdict:
    """Of an adapter that is on no list."""
    if accepted.is_true:
        return failing(Reason.NOT_DOWNLOADED, "the wanted revision is not downloaded")
    return failing(Reason.NOT_ACCEPTED, "the adapter is not accepted")


def loaded_verdict(
    seen: AdapterObservation, deployment: VLLMDeployment, module: Module, served: DeploymentPods
) -> tuple[Verdict, AdapterLoad]:
    """Of an adapter that is on the list: what the pods say of it."""
    load = served.load_of(module)
    left_out = _left_out(deployment, seen.left_out) if seen.left_out is not None else None
    return left_out or _loaded(served, load, deployment), load


def _left_out(deployment: VLLMDeployment, reason: Reason) -> Verdict:
    where = f"VLLMDeployment {deployment.metadata.namespace}/{deployment.metadata.name}"
    if reason is Reason.LIST_TOO_LONG:
        return failing(
            reason,
            f"the list of {where} has no room for it ({MAX_PACKED_BYTES >> 10} KiB, packed, for all adapters; of the namespaces that "
            "have most the youngest give way): delete adapters that nobody needs, give them shorter names, or name another deployment",
        )
    return failing(
        Reason.ARGUMENTS_TOO_LONG,
        f"the pods' arguments of {where} have no room for it ({MAX_ARGUMENT_BYTES >> 10} KiB for all adapters): name another deployment, or have "
        "spec.lora.updateStrategy: HotLoad set there",
    )


def _loaded(served: DeploymentPods, load: AdapterLoad, deployment: VLLMDeployment) -> Verdict:
    if load.wanted == 0:
        if served.replicas == 0:
            return failing(Reason.SCALED_TO_ZERO, "the deployment is scaled to zero replicas")
        return failing(Reason.NO_READY_PODS, _why_down(served, deployment))
    counts = f"{load.loaded} of {load.wanted} ready pods serve it"
    if load.waiting:
        counts += f", {load.waiting} of them from the first request on"
    if load.loaded == load.wanted:
        return ok(Reason.LOADED, counts)
    cause = f"; {load.failures[0][0]}: {load.failures[0][1]}" if load.failures else ""
    if load.refused:
        return failing(Reason.ENGINE_REFUSED, f"{counts}{cause}")
    if load.unreachable and load.loaded + load.unreachable == load.wanted:
        return failing(Reason.ENGINE_UNREACHABLE, f"{counts}{cause}")
    if deployment.spec.lora.update_strategy == ROLLOUT and not cause:
        cause = "; it comes with the pods that replace them (updateStrategy: Rollout)"
    return failing(Reason.PARTIALLY_LOADED if load.loaded else Reason.LOADING, f"{counts}{cause}")


def _why_down(served: DeploymentPods, deployment: VLLMDeployment) -> str:
    """The deployment's reason in the words of its documentation: pods' names and logs are not for other namespaces."""
    where = f"VLLMDeployment {deployment.metadata.namespace}/{deployment.metadata.name}"
    message = f"0 of {served.replicas} pods of {where} are ready"
    available = find(deployment.status.conditions, Condition.AVAILABLE)
    reason = reason_of(available.reason) if available and available.status != "True" else None
    if reason is None or reason is Reason.SCALED_TO_ZERO:
        return message
    doc = REASONS[reason].doc.rstrip(".")
    return f"{message}: {reason}: {doc[0].lower()}{doc[1:]}; its status has the details"


def adapter_status(
    seen: AdapterObservation,
    verdicts: dict[Condition, Verdict],
    *,
    now: datetime,
    content: AdapterContent | None = None,
    load: AdapterLoad | None = None,
) -> LoRAAdapterStatus:
    """The status that the verdicts make; those that are missing follow from the others. `content`: None before it is looked for."""
    adapter, deployment = seen.adapter, seen.deployment
    if Condition.DOWNLOADED not in verdicts:
        verdicts[Condition.DOWNLOADED] = failing(
            Reason.NOT_ACCEPTED, "nothing is downloaded before the adapter is accepted"
        )
    if Condition.LOADED not in verdicts:
        verdicts[Condition.LOADED] = not_loaded(verdicts[Condition.ACCEPTED])
    has = content.ready.status if content and content.ready else None
    # Who is not admitted learns nothing of the deployment.
    admitted = verdicts[Condition.ACCEPTED].reason is not Reason.NAMESPACE_NOT_ALLOWED
    wanted = load.wanted if load else 0
    loaded = load.loaded if load else 0
    public = public_name(adapter, deployment) if deployment and admitted else adapter.served_name
    note = content.note if content else ""
    progress = _mirror(seen, verdicts, content)
    conditions = with_ready_and_stalled(verdicts, f"{loaded} of {wanted} ready pods serve {public}{note}")
    return LoRAAdapterStatus(
        conditions=merge(adapter.status.conditions, conditions, generation=adapter.metadata.generation, now=now),
        observed_generation=adapter.metadata.generation,
        served_name=public,
        base_model_name=adapter.spec.base_model_name
        or (deployment.spec.model.served_names[0] if deployment and admitted else None),
        url=seen.url,
        resolved_revision=has.resolved_revision if has else None,
        revision=has.revision if has else None,
        digest=has.digest if has else None,
        size_bytes=has.size_bytes if has else None,
        size=has.size if has else None,
        rank=has.rank if has else None,
        target_modules=has.target_modules if has else None,
        progress=progress,
        artifact_ref=ArtifactRef(namespace=content.key[0], name=content.key[1]) if content and content.key else None,
        refresh=content.refresh if content else adapter.status.refresh,
        ready_pods=f"{loaded}/{wanted}",
        pods=PodCounts(wanted=wanted, loaded=loaded),
        failures=tuple(PodFailure(pod=pod, message=message[:1024]) for pod, message in load.failures[:MAX_FAILURES])
        if load and load.failures
        else None,
    )


def _mirror(
    seen: AdapterObservation, verdicts: dict[Condition, Verdict], content: AdapterContent | None
) -> Progress | None:
    """The artifact's figures, and with them Downloaded's message: as they were told last while that is not long ago."""
    running = content.artifact if content is not None and not content.downloaded.is_true else None
    current = running.status.progress if running is not None else None
    progress = mirrored(seen.adapter.status.progress, current)
    before = find(seen.adapter.status.conditions, Condition.DOWNLOADED)
    found = verdicts[Condition.DOWNLOADED]
    if progress is not current and before is not None and (before.status, before.reason) == ("False", found.reason):
        verdicts[Condition.DOWNLOADED] = failing(found.reason, before.message)
    return progress
