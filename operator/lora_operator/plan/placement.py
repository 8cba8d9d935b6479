"""Which pods load an adapter in advance: rendezvous hashing, so that a pod that comes or goes moves as few adapters as can be."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from functools import lru_cache
from typing import Final

from lora_operator.plan.adapter_list import Module

_REMEMBERED: Final = 20_000  # adapters that preload, of all fleets


def is_lazy_on(module: Module, pod: str, pods: Collection[str]) -> bool:
    """Whether a pod loads the module on the first request only. `pods` are all pods of the deployment by name."""
    if module.preload:
        return pod not in preloading_pods(module.uid, module.preload, pods)
    return module.lazy


def preloading_pods(uid: str, count: int, pods: Collection[str]) -> frozenset[str]:
    """The `count` pods with the highest weights for an adapter. A pod's weight depends on no other pod."""
    return _chosen(uid, count, frozenset(pods))


@lru_cache(maxsize=_REMEMBERED)
def _chosen(uid: str, count: int, pods: frozenset[str]) -> frozenset[str]:
    """Asked for every adapter on behalf of every pod, so it is found once for all pods."""
    return frozenset(sorted(pods, key=lambda pod: _weight(uid, pod), reverse=True)[:count])


def _weight(uid: str, pod: str) -> bytes:
    return hashlib.sha256(f"{uid}/{pod}".encode()).digest()
