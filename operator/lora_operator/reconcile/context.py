"""What every reconciler is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib import resources

from lora_operator.desired.children import plugin_hash
from lora_operator.kube.client import Kube
from lora_operator.reconcile.clock import Clock
from lora_operator.reconcile.records import Records
from lora_operator.reconcile.services import Answers, ChildApplier, SecretReader, StatusWriter
from lora_operator.reconcile.store import Store
from lora_operator.settings import Settings
from lora_operator.vllm import Engines


@dataclass(frozen=True)
class Context:
    """Shared by all reconcilers of one process; made by `build_context`."""

    kube: Kube
    engines: Engines
    store: Store
    settings: Settings
    enqueue: Callable[..., None]
    records: Records
    clock: Clock
    answers: Answers
    statuses: StatusWriter
    children: ChildApplier
    secrets: SecretReader
    plugin_files: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def plugin_hash(self) -> str:
        """Hash of this operator's engine plugin, which names it."""
        return plugin_hash(self.plugin_files)


def build_context(
    *,
    kube: Kube,
    engines: Engines,
    store: Store,
    settings: Settings,
    enqueue: Callable[..., None],
    clock: Clock | None = None,
    plugin_files: Mapping[str, str] | None = None,
    master_key: bytes | None = None,
) -> Context:
    """The services around one store, with records that are empty. Without `master_key`, the Secret's is read at first use."""
    clock, records, answers = clock or Clock(), Records(), Answers(store, enqueue)
    return Context(
        kube=kube,
        engines=engines,
        store=store,
        settings=settings,
        enqueue=enqueue,
        records=records,
        clock=clock,
        answers=answers,
        statuses=StatusWriter(kube, records, clock, answers, enqueue),
        children=ChildApplier(kube, store, records, clock, answers),
        secrets=SecretReader(kube, settings.operator_namespace, master_key=master_key),
        plugin_files=plugin_files or {},
    )


def load_plugin_files() -> dict[str, str]:
    """The engine plugin's files by name, as shipped in this operator."""
    package = resources.files("lora_operator.engine_plugin")
    return {item.name: item.read_text() for item in package.iterdir() if item.name.endswith(".py")}
