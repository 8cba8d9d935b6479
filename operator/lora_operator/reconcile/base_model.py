"""What a deployment's engines read: the artifacts of its base model, tokenizer and draft model, wanted and made."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from lora_operator.api.artifact import ModelArtifact
from lora_operator.api.cache import ModelCache
from lora_operator.api.deployment import VLLMDeployment
from lora_operator.api.sources.source import Source
from lora_operator.constants import Reason
from lora_operator.errors import ForbiddenError, InvalidObjectError, KubeError, ReasonError
from lora_operator.kube.kinds import Kind
from lora_operator.plan.deployment import BLOCKED_SECONDS
from lora_operator.plan.deployment_status import describe_refresh
from lora_operator.plan.model_contents import Content, ModelContents, model_is_ready
from lora_operator.plan.refresh import Epoch, requested
from lora_operator.plan.source_policy import refused_by_pin, source_refused
from lora_operator.plan.wants import ContentWant, Credentials, Role, build_artifact, model_wants
from lora_operator.reconcile.adapter import cache_of
from lora_operator.reconcile.context import Context
from lora_operator.reconcile.records import ModelWant
from lora_operator.reconcile.store import Key, ObjectKey


@dataclass(frozen=True)
class _Want:
    """One content with its artifact's key, and its manifest unless something stands against wanting it."""

    role: Role
    source: Source
    key: ObjectKey | None
    credentials: Credentials | None = None
    manifest: dict[str, Any] | None = None
    blocked: ReasonError | None = None  # why it can't be wanted; with a manifest: why it can't be made
    in_use: ObjectKey | None = None  # another one that is there, and stays wanted until this one is made
    is_same: bool = True  # without a manifest: whether the artifact at the key is of the present spec


@dataclass(frozen=True)
class _Found:
    """One content with what its artifact is made of, or what stands against making it."""

    want: ContentWant
    cache: ModelCache | None
    credentials: Credentials | None = None
    blocked: ReasonError | None = None


@dataclass(frozen=True)
class _Choice:
    """The contents that are served, and those that a refresh brings in their place: all at once, for they belong together."""

    epoch: Epoch
    serving: list[_Want]
    refreshing: list[_Want]


async def want_model(context: Context, deployment: VLLMDeployment) -> ModelContents:
    """Find the cache and the credentials, say what is wanted, and make sure that the artifacts exist."""
    cache = cache_of(context, deployment)
    found = [await _find(context, deployment, cache, want) for want in model_wants(deployment.spec.model)]
    choice = _choose(context, deployment, found)
    _publish(context, deployment, choice)
    serving = [await _make(context, want, again=f"{BLOCKED_SECONDS:.0f} s") for want in choice.serving]
    refreshing = [await _make(context, want, again="minute") for want in choice.refreshing]
    _publish(context, deployment, choice)  # with what was made now
    known = cache if isinstance(cache, ModelCache) else None
    contents = [_content(context, want, cache_known=known is not None) for want in serving]
    coming = [_coming(context, want) for want in refreshing]
    return ModelContents(known, tuple(contents), choice.epoch.requested, describe_refresh(coming))


async def _find(
    context: Context, deployment: VLLMDeployment, cache: ModelCache | ReasonError, want: ContentWant
) -> _Found:
    credentials: Credentials | ReasonError | None = None
    is_offline = isinstance(cache, ModelCache) and cache.spec.offline
    if want.source.secret is not None and not is_offline:
        credentials = await context.secrets.credentials(deployment.metadata.namespace, *want.source.secret)
    if isinstance(cache, ReasonError):
        return _Found(want, None, blocked=cache)
    refused = source_refused(want.source, cache, namespace=deployment.metadata.namespace)
    if refused is not None or isinstance(credentials, ReasonError):
        return _Found(want, cache, blocked=refused or (credentials if isinstance(credentials, ReasonError) else None))
    return _Found(want, cache, credentials)


def _choose(context: Context, deployment: VLLMDeployment, found: list[_Found]) -> _Choice:
    """What is served until all that a refresh brings is there; and where it found the same, so that no adapter is checked anew."""
    served = Epoch(deployment.status.refresh)
    wanted = Epoch(requested(deployment.metadata.annotations))
    new = [_want(context, deployment, one, wanted) for one in found]
    if wanted == served:
        return _Choice(wanted, new, [])
    old = [_want(context, deployment, one, served) for one in found]
    artifacts = context.store.artifacts
    before = [artifacts.get(want.key) if want.key else None for want in old]
    after = [_arrived(context, want) for want in new]
    paths = [artifact.status.path if artifact is not None else None for artifact in after]
    is_same = paths == [artifact.status.path for artifact in before if artifact is not None]
    if not all(map(model_is_ready, before)) or (None not in paths and not is_same):
        return _Choice(wanted, new, [])
    return _Choice(served, old, new)


def _arrived(context: Context, want: _Want) -> ModelArtifact | None:
    artifact = context.store.artifacts.get(want.key) if want.key and want.manifest else None
    if not model_is_ready(artifact) or _is_foreign(artifact, want) or _pinned_out(want, artifact) is not None:
        return None
    return artifact


def _pinned_out(want: _Want, artifact: ModelArtifact | None) -> ReasonError | None:
    if artifact is None or not model_is_ready(artifact):
        return None
    return refused_by_pin(want.source, artifact.status.digest)


def _want(context: Context, deployment: VLLMDeployment, found: _Found, epoch: Epoch) -> _Want:
    role, source = found.want.role, found.want.source
    recorded = _recorded(context, deployment, role)
    if found.blocked is not None or found.cache is None:
        is_same = recorded is not None and _leads_to(found, recorded)
        kept = recorded.key if recorded is not None and (is_same or model_is_ready(recorded)) else None
        return _Want(role, source, kept, blocked=found.blocked, is_same=is_same)
    manifest = _build(found, found.cache, found.credentials, refresh=epoch.text)
    key = (manifest["metadata"]["namespace"], manifest["metadata"]["name"])
    in_use = recorded.key if recorded is not None and model_is_ready(recorded) and recorded.key != key else None
    return _Want(role, source, key, found.credentials, manifest, in_use=in_use)


def _build(found: _Found, cache: ModelCache, credentials: Credentials | None, *, refresh: str | None) -> dict[str, Any]:
    return build_artifact(
        cache=cache,
        source=found.want.source,
        base_artifact=None,
        credentials=credentials,
        details=found.want.details,
        refresh=refresh,
    )


def _leads_to(found: _Found, artifact: ModelArtifact) -> bool:
    """Whether the present spec asks for what the artifact has, whoever's credentials it came with; not known without a cache."""
    if found.cache is None:
        return True
    wanted: dict[str, Any] = _build(found, found.cache, None, refresh=None)["spec"]
    return artifact.spec.model_copy(update={"credentials": None}).to_wire() == wanted


async def _make(context: Context, want: _Want, *, again: str) -> _Want:
    """Make sure that the artifact exists; the want comes back with what stands against that, which holds up nothing else."""
    if want.manifest is None or want.key is None or want.key in context.store.artifacts:
        return want
    try:
        context.answers.take(Kind.MODEL_ARTIFACT, await context.kube.apply(want.manifest))
    except KubeError as error:
        refused = isinstance(error, ForbiddenError | InvalidObjectError)
        hint = "; change what refuses it: quota, policy or right" if refused else ""
        cause = f"its ModelArtifact can't be made: {error}{hint}; tried again every {again}"
        return replace(want, blocked=ReasonError(Reason.QUEUED, cause))
    context.enqueue(Key(Kind.MODEL_ARTIFACT, *want.key))
    return want


def _content(context: Context, want: _Want, *, cache_known: bool) -> Content:
    artifact = context.store.artifacts.get(want.key) if want.key and want.is_same else None
    name = want.key[1] if want.key else None
    refused = _pinned_out(want, artifact)
    if refused is not None:
        return Content(want.role, name, None, refused)
    if want.manifest is None or want.key is None:
        forbidden = want.blocked is not None and want.blocked.reason is Reason.SOURCE_NOT_ALLOWED
        usable = model_is_ready(artifact) and cache_known and not forbidden  # it was authorised when it was fetched
        return Content(want.role, name, artifact, None if usable else want.blocked)
    kept = (want.in_use or want.key)[1]
    if want.blocked is not None:
        return Content(want.role, kept, None, want.blocked)
    if _is_foreign(artifact, want):
        taken = f"ModelArtifact {want.key[0]}/{want.key[1]} exists with another spec: delete it"
        return Content(want.role, kept, None, ReasonError(Reason.NAME_TAKEN, taken))
    return Content(want.role, name, artifact, None)


def _coming(context: Context, want: _Want) -> Content:
    """The same for what a refresh brings: what is in use has no part in it."""
    if want.blocked is not None:
        return Content(want.role, None, None, want.blocked)
    return _content(context, replace(want, in_use=None), cache_known=True)


def _is_foreign(artifact: ModelArtifact | None, want: _Want) -> bool:
    return artifact is not None and want.manifest is not None and artifact.spec.to_wire() != want.manifest["spec"]


def _recorded(context: Context, deployment: VLLMDeployment, role: Role) -> ModelArtifact | None:
    """The artifact that is in use by what the status says, of whatever spec."""
    status = deployment.status
    names: dict[Role, str | None] = {
        "model": status.model_artifact,
        "tokenizer": status.tokenizer_artifact,
        "draftModel": status.draft_model_artifact,
    }
    return context.store.artifacts.get((deployment.metadata.namespace, names[role] or ""))


def _publish(context: Context, deployment: VLLMDeployment, choice: _Choice) -> None:
    """Say what is wanted, before an artifact is made: one without a wanter would be deleted.

    What can't be made takes no place: until it is there, what is in use stays wanted, and adapters are for that.
    """
    lent = [_stands_in(context, want) for want in choice.serving]
    (base, credentials), *others = lent
    coming = [(want.key, want.credentials) for want in choice.serving if want.manifest is not None]
    want = ModelWant(
        deployment.metadata.uid,
        deployment.metadata.generation,
        base,
        credentials,
        auxiliary=_known(others),
        refreshing=_known([one for one in coming if one not in lent])
        + _known([(want.key, want.credentials) for want in choice.refreshing]),
    )
    changed = context.records.publish_model_want(deployment.key, want)
    if changed is None:
        return
    for artifact in changed:
        context.enqueue(Key(Kind.MODEL_ARTIFACT, *artifact))
    for adapter in context.store.adapters_of(deployment.key):
        context.enqueue(Key(Kind.LORA_ADAPTER, *adapter.key))


def _stands_in(context: Context, want: _Want) -> tuple[ObjectKey | None, Credentials | None]:
    """The artifact that is wanted now, with what is lent to it: the one in use where that of the present spec is not there."""
    artifact = context.store.artifacts.get(want.key) if want.key else None
    if want.in_use is not None and (artifact is None or _is_foreign(artifact, want)):
        return want.in_use, None
    return want.key, want.credentials


def _known(
    lent: list[tuple[ObjectKey | None, Credentials | None]],
) -> tuple[tuple[ObjectKey, Credentials | None], ...]:
    return tuple((key, credentials) for key, credentials in lent if key is not None)
