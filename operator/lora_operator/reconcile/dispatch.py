"""From a key on the work queue to the reconcile of its kind."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final

from pydantic import ValidationError

from lora_operator.api.adapter import LoRAAdapterStatus
from lora_operator.api.artifact import ModelArtifactStatus
from lora_operator.api.cache import ModelCacheStatus
from lora_operator.api.common import ApiModel, StatusCondition
from lora_operator.api.deployment import VLLMDeploymentStatus
from lora_operator.conditions import failing, merge, with_ready_and_stalled
from lora_operator.constants import Condition, Reason
from lora_operator.errors import NotFoundError
from lora_operator.kube import LORA_ADAPTERS, MODEL_ARTIFACTS, MODEL_CACHES, VLLM_DEPLOYMENTS, Kube, ResourceType
from lora_operator.reconcile.adapter import reconcile_adapter
from lora_operator.reconcile.artifact import reconcile_artifact
from lora_operator.reconcile.cache import reconcile_cache
from lora_operator.reconcile.context import Context, load_kit_files
from lora_operator.reconcile.deployment import reconcile_deployment
from lora_operator.reconcile.pod import reconcile_pod
from lora_operator.reconcile.store import Key, Kind, Store
from lora_operator.settings import Settings
from lora_operator.vllm import Engines

Reconcile = Callable[[Context, Key], Awaitable[float | None]]

_RECONCILERS: Final[dict[Kind, Reconcile]] = {
    Kind.LORA_ADAPTER: reconcile_adapter,
    Kind.VLLM_DEPLOYMENT: reconcile_deployment,
    Kind.MODEL_CACHE: reconcile_cache,
    Kind.MODEL_ARTIFACT: reconcile_artifact,
    Kind.POD: reconcile_pod,
}
_OWN: Final[dict[Kind, ResourceType]] = {
    Kind.LORA_ADAPTER: LORA_ADAPTERS,
    Kind.VLLM_DEPLOYMENT: VLLM_DEPLOYMENTS,
    Kind.MODEL_CACHE: MODEL_CACHES,
    Kind.MODEL_ARTIFACT: MODEL_ARTIFACTS,
}
_STATUSES: Final[dict[Kind, type[ApiModel]]] = {
    Kind.LORA_ADAPTER: LoRAAdapterStatus,
    Kind.VLLM_DEPLOYMENT: VLLMDeploymentStatus,
    Kind.MODEL_CACHE: ModelCacheStatus,
    Kind.MODEL_ARTIFACT: ModelArtifactStatus,
}


class Dispatcher:
    """The work queue's handler."""

    def __init__(
        self, kube: Kube, engines: Engines, store: Store, settings: Settings, enqueue: Callable[..., None]
    ) -> None:
        self._context = Context(
            kube=kube, engines=engines, store=store, settings=settings, enqueue=enqueue, kit_files=load_kit_files()
        )
        self._reported: dict[Key, str] = {}

    async def __call__(self, key: Key) -> float | None:
        """Reconcile one key. Returns after how many seconds to look again; raises what the queue's back-off is for."""
        problem = self._context.store.invalid.get(key)
        if problem is not None:
            await self._report_invalid(key, problem)
            return None
        self._reported.pop(key, None)
        return await _RECONCILERS[key.kind](self._context, key)

    async def _report_invalid(self, key: Key, problem: str) -> None:
        """An object that the schema accepted once and this operator can't read: say so on it, touch nothing else.

        What else its status says (an artifact in use, a refresh that was done) is needed when it can be read again.
        """
        if self._reported.get(key) == problem:
            return
        kube, rt = self._context.kube, _OWN[key.kind]
        try:
            body = await kube.get(rt, key.namespace, key.name)
        except NotFoundError:
            return
        verdict = failing(Reason.INVALID_SPEC, f"the object can't be read by this operator: {problem}")
        status = _readable(_STATUSES[key.kind], body.get("status") or {})
        conditions = merge(
            [StatusCondition.model_validate(condition) for condition in status.get("conditions") or []],
            with_ready_and_stalled({Condition.ACCEPTED: verdict}, ""),
            generation=body["metadata"].get("generation", 0),
            now=self._context.now(),
        )
        status["conditions"] = [condition.to_wire() for condition in conditions]
        await kube.apply_status(rt, key.namespace, key.name, status)
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
