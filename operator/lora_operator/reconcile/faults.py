"""A pass that fails by a bug of ours: nobody else waits for what it would have said, and its own object says what happened.

What a failing object has, it keeps: it goes on wanting what its status says is in use, and nothing of it is taken for unwanted.
"""

from __future__ import annotations

import re
import traceback
from dataclasses import replace
from datetime import datetime
from typing import Final

from pydantic import ValidationError

from lora_operator.api.common import StatusCondition
from lora_operator.conditions import Verdict, find, merge
from lora_operator.constants import Condition, Reason
from lora_operator.kube.kinds import Kind
from lora_operator.plan.adapter import undecidable
from lora_operator.plan.adapter_list import Unknown
from lora_operator.plan.deployment_pods import PodView
from lora_operator.reconcile.bodies import describe_invalid
from lora_operator.reconcile.context import Context
from lora_operator.reconcile.records import ModelWant
from lora_operator.reconcile.store import Key, ObjectKey

REPORT_AFTER: Final = 2  # failures in a row: what is over with the next attempt, 0.2 s later, is in the log alone
MAX_CAUSE: Final = 300
_ODD: Final = re.compile(r"[^\x20-\x7e]+")
_MAYBE_SECRET: Final = re.compile(r"[A-Za-z0-9+/_=-]{20,}")  # keys and tokens, and some names


def describe_fault(error: Exception) -> str:
    """The class of an exception, where it arose and its message, in one line without what could be the value of a secret."""
    text = describe_invalid(error) if isinstance(error, ValidationError) else str(error)
    text = _MAYBE_SECRET.sub("…", _ODD.sub(" ", text)).strip()[:MAX_CAUSE]
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "lora_operator" in frame.filename]
    where = ""
    if frames:
        path = frames[-1].filename.replace("\\", "/").rpartition("lora_operator/")[2]
        where = f" in {path}:{frames[-1].lineno}"
    return f"{type(error).__name__}{where}{': ' + text if text else ''}"


def settle_fault(context: Context, key: Key, cause: str) -> None:
    """Say in the records what others wait for: that nothing new is known of the object."""
    place, records = (key.namespace, key.name), context.records
    if key.kind is Kind.LORA_ADAPTER:
        _settle_adapter(context, place)
    elif key.kind is Kind.VLLM_DEPLOYMENT:
        _settle_fleet(context, key)
    elif key.kind is Kind.MODEL_ARTIFACT:
        records.turns.give_up(place)  # those behind it in the queue
        for name in records.turns.heads(key.namespace):
            context.enqueue(Key(key.kind, key.namespace, name))
    elif key.kind is Kind.POD:
        _settle_pod(context, key, cause)


def _settle_adapter(context: Context, place: ObjectKey) -> None:
    adapter, known = context.store.adapters.get(place), context.records.decision(place)
    if adapter is None:
        return
    form = (adapter.metadata.uid, adapter.metadata.generation)
    if known is not None and not isinstance(known.entry, Unknown) and (known.uid, known.generation) == form:
        return  # decided, and failed afterwards
    changed = context.records.publish_decision(place, undecidable(adapter))
    if changed is not None:
        context.enqueue(Key(Kind.VLLM_DEPLOYMENT, *adapter.deployment_key))
        for artifact in changed:
            context.enqueue(Key(Kind.MODEL_ARTIFACT, *artifact))


def _settle_fleet(context: Context, key: Key) -> None:
    place, records = (key.namespace, key.name), context.records
    deployment, known = context.store.deployments.get(place), records.model_want(place)
    if deployment is None:
        return
    metadata, status = deployment.metadata, deployment.status
    if known is not None and known.uid == metadata.uid:
        want = replace(known, generation=metadata.generation)
    else:
        base, *others = (
            (key.namespace, name) if name is not None else None
            for name in (status.model_artifact, status.tokenizer_artifact, status.draft_model_artifact)
        )
        auxiliary = tuple((other, None) for other in others if other is not None)
        want = ModelWant(metadata.uid, metadata.generation, base, None, auxiliary=auxiliary)
    if records.publish_model_want(place, want) is not None:
        for adapter in context.store.adapters_of(place):
            context.enqueue(Key(Kind.LORA_ADAPTER, *adapter.key))


def _settle_pod(context: Context, key: Key, cause: str) -> None:
    """It was asked, and what it serves is not known: its fleet goes on, and nothing that it may serve is removed."""
    place = (key.namespace, key.name)
    pod = context.store.pods.get(place)
    if pod is None:
        return
    record = context.records.pods[place]
    first, record.asked = not record.asked, True
    container = pod.running_engine
    if container is not None:
        known = record.view
        failed = PodView(
            uid=pod.uid,
            container_id=container,
            error=f"the operator failed on it ({cause})",
            guarded=known is not None and known.container_id == container and known.guarded,
        )
        first = first or known != failed
        record.view = failed
    if first:
        for deployment in context.store.deployments:
            if deployment[0] == key.namespace:
                context.enqueue(Key(Kind.VLLM_DEPLOYMENT, *deployment))


def fault_message(cause: str) -> str:
    """What stands on the object."""
    return (
        f"the operator failed on this object ({cause}): this is a bug of the operator, so please report it, with its log. What the "
        "object has, it keeps; it is tried again, at least every minute. A change of its spec may avoid it meanwhile"
    )


def fault_conditions(
    before: list[StatusCondition], cause: str, *, generation: int, now: datetime
) -> list[StatusCondition]:
    """The conditions with the fault. Ready stays where it was said of the present spec: what is in use is in use as before."""
    kept = [one for one in before if one.type not in (Condition.READY, Condition.OPERATOR_FAULT)]
    ready, message = find(before, Condition.READY), fault_message(cause)
    verdicts = {Condition.OPERATOR_FAULT: Verdict(True, Reason.OPERATOR_ERROR, message)}
    if ready is not None and ready.status == "True" and ready.observed_generation == generation:
        kept.append(ready)
    else:
        verdicts = {Condition.READY: Verdict(None, Reason.OPERATOR_ERROR, message)} | verdicts
    return [*kept, *merge(before, verdicts, generation=generation, now=now)]
