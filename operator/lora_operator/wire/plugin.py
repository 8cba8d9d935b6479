"""What an engine pod answers the operator: the engine plugin's state and list (JSON in camelCase), and vLLM's list of models.

Pods run tenants' content, so every text and number is bounded here, and what is not known is ignored: a pod may have a plugin of an
earlier or a later operator. The list that the operator sends is encoded by `plan.adapter_list`.
"""

from __future__ import annotations

from typing import Annotated, Any, Final

from pydantic import BeforeValidator, ConfigDict, Field
from pydantic.alias_generators import to_camel
from pydantic.dataclasses import dataclass

from lora_operator.constants import HOT_LOAD

# Far above any real one: a pod or a ConfigMap that names a higher one is not believed, or it would steer the list of all pods.
MAX_GENERATION: Final = 2**53
MAX_MESSAGE: Final = 500  # characters of a foreign message that are kept

_ANSWER: Final = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="ignore")


def _cut(value: Any) -> Any:
    return value[:MAX_MESSAGE] if isinstance(value, str) else value


Name = Annotated[str, Field(max_length=1024)]
Path = Annotated[str, Field(max_length=4096)]
Message = Annotated[str, BeforeValidator(_cut)]


@dataclass(frozen=True, config=ConfigDict(extra="ignore"))
class ServedModel:
    """One entry of /v1/models: `root` is the path that it was loaded from, `parent` its lineage (None: a base model)."""

    id: Name
    root: Path | None = None
    parent: Name | None = None


@dataclass(frozen=True, config=_ANSWER)
class LoadedAdapter:
    """An adapter that the plugin has in the engine's registry under its public name."""

    name: Name
    internal_name: Name
    path: Path
    base_model_name: Name | None = None


@dataclass(frozen=True, config=_ANSWER)
class WaitingAdapter:
    """An adapter of the list that the first request for it will load."""

    name: Name
    path: Path


@dataclass(frozen=True, config=_ANSWER)
class FailedAdapter:
    """An adapter of the list that the pod does not serve, and why; `stage`: refused by the plugin's "checks" or by the "engine"."""

    name: Name
    path: Path
    stage: Name
    message: Message


@dataclass(frozen=True, config=_ANSWER)
class RetiredContent:
    """Content that is no longer served under a public name; `running`: requests may still use its files."""

    internal_name: Name
    path: Path
    running: bool = True


@dataclass(frozen=True, config=_ANSWER)
class PluginState:
    """What a pod's plugin reports of itself."""

    plugin: Annotated[Name, Field(alias="kit")]  # the plugin's hash, by which its ConfigMap is named
    vllm_version: Name
    list_generation: Annotated[int, Field(ge=0, lt=MAX_GENERATION)] | None
    settled: bool
    list_digest: Annotated[str, Field(max_length=64)] | None = None
    loaded: tuple[LoadedAdapter, ...] = ()
    waiting: tuple[WaitingAdapter, ...] = ()
    failures: tuple[FailedAdapter, ...] = ()
    retired: tuple[RetiredContent, ...] = ()
    atomic_swap: bool = False
    update_strategy: Name = HOT_LOAD  # Rollout: its list is in the pod's arguments, and it takes no other


@dataclass(frozen=True, config=_ANSWER)
class HeldEntry:
    """An entry of the list that a pod holds; `uid`: of the adapter that it was sent for."""

    name: Name
    path: Path
    base_model_name: Name | None = None
    revision: Name = ""
    uid: Name = ""


@dataclass(frozen=True, config=_ANSWER)
class HeldList:
    """The adapter list that a pod holds, whatever of it is loaded; generation 0: it was never sent one."""

    generation: Annotated[int, Field(ge=0, lt=MAX_GENERATION)] = 0
    modules: tuple[HeldEntry, ...] = ()
