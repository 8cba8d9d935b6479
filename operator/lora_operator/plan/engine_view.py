"""One engine pod's answers, as the view that the rest of the operator plans with; and what a pod is to be sent. Pure."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import Final

from lora_operator.constants import HOT_LOAD, ROLLOUT
from lora_operator.engine_plugin.versions import FIRST_RELEASE
from lora_operator.plan.adapter_list import ModuleList
from lora_operator.plan.deployment_pods import PodView, Served, is_lazy_on
from lora_operator.wire.plugin import PluginState, ServedModel

# The oldest vLLM for each updateStrategy. Below 0.26 an adapter that is loaded while all slots run silently gives wrong weights to
# running requests; below 0.10 the plugin was never tried.
MINIMUM_VERSIONS: Final = {HOT_LOAD: (0, 26), ROLLOUT: (0, 10)}

_VERSION: Final = re.compile(r"^v?(\d{1,6})\.(\d{1,6})(?:\.(\d{1,6}))?")


def parse_version(text: str) -> tuple[int, ...] | None:
    """'0.32.0', 'v0.26.1rc2', '0.11.2+cpu' as numbers; None for what is no release version ('dev', '0.1.dev12' of a clone without tags)."""
    match = _VERSION.match(text.strip())
    version = () if match is None else tuple(int(part) for part in match.groups() if part is not None)
    return version if version >= FIRST_RELEASE else None


def is_too_old(state: PluginState) -> bool:
    """Whether the engine's version can't be given adapters safely in the pod's way: then it is sent no list.

    Of an unknown version (a build of one's own) the better is assumed.
    """
    version = parse_version(state.vllm_version)
    minimum = MINIMUM_VERSIONS.get(state.update_strategy)
    return version is not None and minimum is not None and version < minimum


def list_for(modules: ModuleList | None, pod: str, pods: Collection[str]) -> ModuleList | None:
    """The deployment's list as one pod is sent it: with what this pod loads in advance, and what on the first request.

    `pods` are the names of all that may serve; None while there is no list.
    """
    if modules is None or not any(module.preload for module in modules.modules):
        return modules
    return replace(
        modules,
        modules=tuple(
            replace(module, lazy=is_lazy_on(module, pod, pods), preload=0) if module.preload else module
            for module in modules.modules
        ),
    )


def holds(held: PluginState | PodView, modules: ModuleList) -> bool:
    """Whether this list is what the pod holds; a plugin that reports no digest knows one list per generation."""
    return held.list_generation == modules.generation and held.list_digest in (None, modules.digest)


def is_at_rest(view: PodView) -> bool:
    """Whether nothing may change in a pod of which `/v1/models` does not show it.

    What is loaded on the first request may fail then, and requests may use content that is listed no more: no list of the engine
    shows either.
    """
    busy = view.failures or view.waiting or view.retired
    return view.settled and view.error is None and not busy


def build_view(
    uid: str,
    container: str,
    state: PluginState,
    models: tuple[ServedModel, ...],
    *,
    served_names: tuple[str, ...],
) -> PodView:
    """What an engine serves: `models` as it lists them itself, under the public names that its plugin reports.

    The two were asked for one after the other, so names may have moved in between. Only what the engine lists counts as served, and
    what nothing explains is an orphan.
    """
    adapters = [model for model in models if model.id not in served_names and model.parent is not None]
    served, waiting, orphans = _sort_out(state, adapters)
    return PodView(
        uid=uid,
        container_id=container,
        guarded=True,
        version=state.vllm_version,
        too_old=is_too_old(state),
        list_generation=state.list_generation,
        list_digest=state.list_digest,
        settled=state.settled,
        served=served,
        waiting=waiting,
        failures={failure.name: failure.message for failure in state.failures},
        retired=tuple(sorted(content.path for content in state.retired)),
        orphans=tuple(sorted(orphans)),
        atomic_swap=state.atomic_swap,
        update_strategy=state.update_strategy,
    )


def _sort_out(
    state: PluginState, models: Iterable[ServedModel]
) -> tuple[dict[str, Served], dict[str, str], Collection[str]]:
    """What is served by public name, what waits for its first request (name to path), and listed names that nothing explains."""
    listed = {model.id: model for model in models}
    served = {}
    for adapter in state.loaded:
        model = listed.pop(adapter.internal_name, None)
        if model is None and (renamed := listed.get(adapter.name)) is not None and renamed.root == adapter.path:
            model = listed.pop(adapter.name)  # it got its plain name back since the plugin reported
        if model is not None:
            internal = adapter.internal_name
            served[adapter.name] = Served(path=model.root or "", parent=model.parent, internal_name=internal)
    waiting = {adapter.name: adapter.path for adapter in state.waiting}
    for model in list(listed.values()):  # a first request has loaded it since the plugin reported
        public = model.id.partition("@")[0]
        if model.root is not None and waiting.get(public) == model.root:
            served[public] = Served(path=model.root, parent=model.parent, internal_name=model.id)
            del waiting[public], listed[model.id]
    return served, waiting, listed.keys()


def changed_names(old: PodView | None, new: PodView | None, modules: ModuleList | None) -> set[str] | None:
    """Served names about which the two views differ, or of which only the new one says anything; None: about all."""
    if old is None or new is None or old.error != new.error or old.guarded != new.guarded:
        return None
    names = {*old.served, *new.served, *old.failures, *new.failures, *old.waiting, *new.waiting}
    before, after = old.list_generation or 0, new.list_generation or 0
    brought = ((module.name, modules.brought(module) or 0) for module in modules.modules) if modules else ()
    return {name for name, since in brought if before < since <= after} | {
        name
        for name in names
        if old.served.get(name) != new.served.get(name)
        or old.failures.get(name) != new.failures.get(name)
        or old.waiting.get(name) != new.waiting.get(name)
    }
