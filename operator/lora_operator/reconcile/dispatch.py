"""From a key on the work queue to the reconcile of its kind.

    watch (kopf)     sync (our lists)
        |  event         |  page
        +-------+--------+
                v
    store       upsert, remove: an older version than the known one changes nothing
                |  Change(old, new)
                v
    routing     keys_for: every object that the change may mean something to
                |  keys
                v
    queue       one entry per key, one run at a time per key, back-off per key  <---------------+
                |  key, once every kind was listed completely                                   |
                v                                                                               |
    dispatch    can't be read: InvalidSpec in its status; a bug of ours: OperatorFault; else    |
                |                                                                               |
                v                                                                               |
    reconcile   observe  the store and the records, and what only asking tells                  |
                plan     pure: what is wanted, what is said, when to look again                 |
                apply    children, Jobs, deletions                                              |
                |                                                                               |
                +-- records, by which others go ------------------------------ their keys ----->|
                +-- status, if it changed, then an Event: the answer goes into                  |
                |   the store, and by routing -------------------------------- others' keys --->|
                +-- seconds until the next look, or an error that is tried again -- its key --->+

Events only ever say that something is to be looked at: many that come together are one run, and one that is lost costs the time
until the next list. A status that passes in a moment is held back (services.StatusWriter).
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import Any, Final

from pydantic import ValidationError

from lora_operator.api.common import ApiModel, StatusCondition
from lora_operator.conditions import failing, merge, with_ready_and_stalled
from lora_operator.constants import Condition, Reason
from lora_operator.errors import NotFoundError, OperatorError
from lora_operator.kube.client import Kube
from lora_operator.kube.kinds import OWN_KINDS, Kind
from lora_operator.reconcile.adapter import reconcile_adapter
from lora_operator.reconcile.artifact import reconcile_artifact
from lora_operator.reconcile.cache import reconcile_cache
from lora_operator.reconcile.clock import Clock
from lora_operator.reconcile.context import Context, build_context, load_plugin_files
from lora_operator.reconcile.deployment import reconcile_deployment
from lora_operator.reconcile.engine_pod import reconcile_pod
from lora_operator.reconcile.faults import REPORT_AFTER, describe_fault, fault_conditions, fault_message, settle_fault
from lora_operator.reconcile.store import Key, Store
from lora_operator.settings import Settings
from lora_operator.vllm import Engines

log = logging.getLogger(__name__)

Reconcile = Callable[[Context, Key], Awaitable[float | None]]

_RECONCILERS: Final[dict[Kind, Reconcile]] = {
    Kind.LORA_ADAPTER: reconcile_adapter,
    Kind.VLLM_DEPLOYMENT: reconcile_deployment,
    Kind.MODEL_CACHE: reconcile_cache,
    Kind.MODEL_ARTIFACT: reconcile_artifact,
    Kind.POD: reconcile_pod,
}


class Dispatcher:
    """The work queue's handler."""

    def __init__(
        self,
        kube: Kube,
        engines: Engines,
        store: Store,
        settings: Settings,
        enqueue: Callable[..., None],
        *,
        clock: Clock | None = None,
    ) -> None:
        self._context = build_context(
            kube=kube,
            engines=engines,
            store=store,
            settings=settings,
            enqueue=enqueue,
            clock=clock,
            plugin_files=load_plugin_files(),
        )
        self._reported: dict[Key, str] = {}
        self._faults: dict[
            Key, tuple[int, str]
        ] = {}  # failures in a row by a bug of ours, and the cause that was reported

    async def __call__(self, key: Key) -> float | None:
        """Reconcile one key. Returns after how many seconds to look again; raises what the queue's back-off is for."""
        problem = self._context.store.invalid.get(key)
        if problem is not None:
            await self._report_invalid(key, problem)
            return None
        self._reported.pop(key, None)
        try:
            again = await _RECONCILERS[key.kind](self._context, key)
        except OperatorError:
            raise
        except Exception as error:
            await self._note_fault(key, error)
            raise
        self._faults.pop(key, None)
        await self._clear_fault(key)
        return again

    async def _note_fault(self, key: Key, error: Exception) -> None:
        """Have nobody else wait for the object, and report a cause that lasts, once, on the object itself."""
        cause = describe_fault(error)
        settle_fault(self._context, key, cause)
        count, reported = self._faults.get(key, (0, ""))
        self._faults[key] = (count + 1, reported)
        if key.kind not in OWN_KINDS or count + 1 < REPORT_AFTER or reported == cause:
            return
        try:
            await self._report_fault(key, cause)
        except OperatorError as refused:
            log.info("%s: that the operator fails on it could not be told: %s", key, refused)
            return
        self._faults[key] = (count + 1, cause)

    async def _report_fault(self, key: Key, cause: str) -> None:
        body = await self._find(key)
        if body is None:
            return
        made = partial(fault_conditions, cause=cause, now=self._context.clock.now())
        if await self._write_conditions(key, body, lambda before, generation: made(before, generation=generation)):
            await self._context.kube.event(
                body, type="Warning", reason=Reason.OPERATOR_ERROR, message=fault_message(cause)
            )

    async def _clear_fault(self, key: Key) -> None:
        """A pass has ended well: what it did not say anew itself is taken back."""
        if key.kind not in OWN_KINDS or not self._context.store.has_condition(key, Condition.OPERATOR_FAULT):
            return
        if (body := await self._find(key)) is not None:
            await self._write_conditions(
                key, body, lambda before, _: [one for one in before if one.type != Condition.OPERATOR_FAULT]
            )

    async def _find(self, key: Key) -> dict[str, Any] | None:
        try:
            return await self._context.kube.get(key.kind.info.rt, key.namespace, key.name)
        except NotFoundError:
            return None

    async def _write_conditions(
        self, key: Key, body: dict[str, Any], made: Callable[[list[StatusCondition], int], Iterable[StatusCondition]]
    ) -> bool:
        """Write the conditions that are made of those that are there, and leave the rest of the status. Whether that changed it.

        What else its status says (an artifact in use, a refresh that was done) is needed when all is well again.
        """
        model = key.kind.info.status
        assert model is not None, key  # noqa: S101  a narrowing for the type checker: only objects of ours come here
        status = _readable(model, body.get("status") or {})
        before = [StatusCondition.model_validate(condition) for condition in status.get("conditions") or []]
        after = list(made(before, body["metadata"].get("generation", 0)))
        if after == before:
            return False
        status["conditions"] = [condition.to_wire() for condition in after]
        await self._context.kube.apply_status(key.kind.info.rt, key.namespace, key.name, status)
        return True

    async def _report_invalid(self, key: Key, problem: str) -> None:
        """An object that the schema accepted once and this operator can't read: say so on it, touch nothing else."""
        if self._reported.get(key) == problem or (body := await self._find(key)) is None:
            return
        verdict = failing(Reason.INVALID_SPEC, f"the object can't be read by this operator: {problem}")
        verdicts = with_ready_and_stalled({Condition.ACCEPTED: verdict}, "")
        made = partial(merge, verdicts=verdicts, now=self._context.clock.now())
        await self._write_conditions(key, body, lambda before, generation: made(before, generation=generation))
        self._reported[key] = problem


def _readable(model: type[ApiModel], status: dict[str, Any]) -> dict[str, Any]:
    """The fields of a status that this operator can read: one that it can't would keep the object unreadable for ever."""
    kept = {}
    for name, value in status.items():
        try:
            model.model_validate({name: value})
        except ValidationError:
            continue
        kept[name] = value
    return kept
