"""What Events say of an object that its own status is silent about: volumes that can't be mounted, Jobs whose pods are refused.

Events are asked for one object at a time, only while it is silent, and not more often than every few seconds.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from typing import Any, Final

from lora_operator.errors import KubeError
from lora_operator.kube.kinds import EVENTS
from lora_operator.kube.objects import KubeObject
from lora_operator.kube.pods import Pod
from lora_operator.plan.pod_trouble import SETUP_SECONDS, is_setting_up
from lora_operator.reconcile.context import Context

log = logging.getLogger(__name__)

SILENT_SECONDS: Final = 5.0
MAX_ASKED: Final = 1000  # objects


async def warnings_of(context: Context, pods: Iterable[Pod]) -> tuple[bool, dict[str, str]]:
    """Whether a pod is being set up, and for one whose set-up takes longer than usual the newest warning, by its UID.

    One is enough: what keeps a pod of a fleet from being set up keeps the others.
    """
    now = context.now()
    coming = [pod for pod in pods if is_setting_up(pod, now=now, seconds=0)]
    slow = next((pod for pod in coming if is_setting_up(pod, now=now, seconds=SETUP_SECONDS)), None)
    warning = await last_warning(context, slow) if slow is not None else None
    return bool(coming), {slow.uid: warning} if slow is not None and warning else {}


async def last_warning(context: Context, obj: KubeObject) -> str | None:
    """The newest Warning about an object, as "<reason>: <message>"; None where there is none or Events can't be read."""
    known = context.registry.warnings
    asked, said = known.get(obj.uid, (0.0, None))
    if asked and time.monotonic() - asked < SILENT_SECONDS:
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
    known.pop(obj.uid, None)
    known[obj.uid] = (time.monotonic(), said)
    while len(known) > MAX_ASKED:
        del known[next(iter(known))]
    return said


def _when(event: dict[str, Any]) -> str:
    return str(event.get("lastTimestamp") or event.get("eventTime") or event["metadata"].get("creationTimestamp") or "")
