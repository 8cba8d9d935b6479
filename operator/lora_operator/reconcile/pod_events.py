"""What Events say of an object that its own status is silent about: volumes that can't be mounted, Jobs whose pods are refused.

Events are asked for one object at a time, only while it is silent, and not more often than every few seconds.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any, Final

from lora_operator.errors import KubeError
from lora_operator.kube.kinds import EVENTS
from lora_operator.kube.objects import KubeObject
from lora_operator.kube.pods import Pod
from lora_operator.plan.pod_trouble import SETUP_SECONDS, is_setting_up
from lora_operator.reconcile.context import Context
from lora_operator.reconcile.records import Warnings

log = logging.getLogger(__name__)

SILENT_SECONDS: Final = 5.0
REMEMBERED_SECONDS: Final = 60.0  # since Events of an object were asked for


async def warnings_of(context: Context, pods: Iterable[Pod], *, known: Warnings) -> tuple[bool, dict[str, str]]:
    """Whether a pod is being set up, and for one whose set-up takes longer than usual the newest warning, by its UID.

    One is enough: what keeps a pod of a fleet from being set up keeps the others.
    """
    now = context.clock.now()
    coming = [pod for pod in pods if is_setting_up(pod, now=now, seconds=0)]
    slow = next((pod for pod in coming if is_setting_up(pod, now=now, seconds=SETUP_SECONDS)), None)
    warning = await last_warning(context, slow, known=known) if slow is not None else None
    return bool(coming), {slow.uid: warning} if slow is not None and warning else {}


async def last_warning(context: Context, obj: KubeObject, *, known: Warnings) -> str | None:
    """The newest Warning about an object, as "<reason>: <message>"; None where there is none or Events can't be read.

    `known` is what was said of it and others before; it stands in the record of the object of ours that they are for.
    """
    asked, said = known.get(obj.uid, (0.0, None))
    if asked and context.clock.monotonic() - asked < SILENT_SECONDS:
        return said
    try:
        events, _ = await context.kube.list(
            EVENTS, namespace=obj.namespace, field_selector=f"involvedObject.uid={obj.uid},type=Warning"
        )
    except KubeError as error:
        log.info("the Events of %s/%s can't be read: %s", obj.namespace, obj.name, error)
        return said
    newest = max(events, key=_when, default=None)
    said = f"{newest.get('reason')}: {newest.get('message')}" if newest else None
    now = context.clock.monotonic()
    for old in [uid for uid, (when, _) in known.items() if now - when > REMEMBERED_SECONDS]:
        del known[old]
    known[obj.uid] = (now, said)
    return said


def _when(event: dict[str, Any]) -> str:
    return str(event.get("lastTimestamp") or event.get("eventTime") or event["metadata"].get("creationTimestamp") or "")
