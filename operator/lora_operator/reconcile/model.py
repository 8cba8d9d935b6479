"""What a deployment's engines read: the artifacts of its base model, tokenizer and draft model, wanted and made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lora_operator.api.artifact import ModelArtifact
from lora_operator.api.cache import ModelCache
from lora_operator.api.deployment import VLLMDeployment
from lora_operator.api.source import Source
from lora_operator.constants import CACHE_MOUNT, Reason
from lora_operator.desired.engine import Auxiliary
from lora_operator.errors import ForbiddenError, InvalidObjectError, ReasonError
from lora_operator.plan.allowed import source_refused
from lora_operator.plan.deployment import Content, describe_refresh, model_is_ready
from lora_operator.plan.pin import refused_by_pin
from lora_operator.plan.refresh import Epoch, requested
from lora_operator.plan.wants import ContentWant, Credentials, Role, build_artifact, model_wants
from lora_operator.reconcile.adapter import cache_of
from lora_operator.reconcile.context import Context
from lora_operator.reconcile.registry import ModelWant
from lora_operator.reconcile.store import Key, Kind, ObjectKey


@dataclass(frozen=True)
class Model:
    """The contents as far as they can be wanted, the base model first."""

    cache: ModelCache | None
    contents: tuple[Content, ...]
    refresh: str | None = None  # value of the refresh annotation that the contents are from
    note: str = ""  # what becomes of a refresh that is not done

    @property
    def base(self) -> Content:
        """The base model."""
        return self.contents[0]

    @property
    def is_ready(self) -> bool:
        """Whether everything is complete in the cache."""
        return all(model_is_ready(content.artifact) for content in self.contents)

    @property
    def is_blocked(self) -> bool:
        """Whether something can't even be wanted."""
        return any(content.blocked is not None for content in self.contents)

    def path(self, role: Role) -> str | None:
        """Where a content lies in the pods; None where the spec has none of it."""
        artifact = next((content.artifact for content in self.contents if content.role == role), None)
        return f"{CACHE_MOUNT}/{artifact.status.path}" if artifact is not None else None

    @property
    def auxiliary(self) -> Auxiliary:
        """Where in the pods that lies which goes with the base model."""
        return Auxiliary(tokenizer=self.path("tokenizer"), draft_model=self.path("draftModel"))


@dataclass(frozen=True)
class _Want:
    """One content with its artifact's key, and its manifest unless something stands against making it."""

    role: Role
    source: Source
    key: ObjectKey | None
    credentials: Credentials | None = None
    manifest: dict[str, Any] | None = None
    blocked: ReasonError | None = None


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


async def want_model(context: Context, deployment: VLLMDeployment) -> Model:
    """Find the cache and the credentials, say what is wanted, and make sure that the artifacts exist."""
    cache = cache_of(context, deployment)
    found = [await _find(context, deployment, cache, want) for want in model_wants(deployment.spec.model)]
    choice = _choose(context, deployment, found)
    _publish(context, deployment, choice)
    known = cache if isinstance(cache, ModelCache) else None
    contents = [await _ensure(context, want, cache_known=known is not None) for want in choice.serving]
    coming = [await _bring(context, want) for want in choice.refreshing]
    return Model(known, tuple(contents), choice.epoch.requested, describe_refresh(coming))


async def _find(
    context: Context, deployment: VLLMDeployment, cache: ModelCache | ReasonError, want: ContentWant
) -> _Found:
    credentials: Credentials | ReasonError | None = None
    is_offline = isinstance(cache, ModelCache) and cache.spec.offline
    if want.source.secret is not None and not is_offline:
        credentials = await context.credentials(deployment.metadata.namespace, *want.source.secret)
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
    if found.blocked is not None or found.cache is None:
        recorded = _recorded(context, deployment, found.want.role)
        return _Want(found.want.role, found.want.source, recorded, blocked=found.blocked)
    manifest = build_artifact(
        cache=found.cache,
        source=found.want.source,
        base_artifact=None,
        credentials=found.credentials,
        details=found.want.details,
        refresh=epoch.text,
    )
    key = (manifest["metadata"]["namespace"], manifest["metadata"]["name"])
    return _Want(found.want.role, found.want.source, key, found.credentials, manifest)


async def _ensure(context: Context, want: _Want, *, cache_known: bool) -> Content:
    artifact = context.store.artifacts.get(want.key) if want.key else None
    name = want.key[1] if want.key else None
    refused = _pinned_out(want, artifact)
    if refused is not None:
        return Content(want.role, name, None, refused)
    if want.manifest is None or want.key is None:
        forbidden = want.blocked is not None and want.blocked.reason is Reason.SOURCE_NOT_ALLOWED
        usable = model_is_ready(artifact) and cache_known and not forbidden  # it was authorised when it was fetched
        return Content(want.role, name, artifact, None if usable else want.blocked)
    if artifact is None:
        context.take(Kind.MODEL_ARTIFACT, await context.kube.apply(want.manifest))
        context.enqueue(Key(Kind.MODEL_ARTIFACT, *want.key))
        artifact = context.store.artifacts.get(want.key)
    if _is_foreign(artifact, want):
        taken = f"ModelArtifact {want.key[0]}/{want.key[1]} exists with another spec: delete it"
        return Content(want.role, name, None, ReasonError(Reason.NAME_TAKEN, taken))
    return Content(want.role, name, artifact, None)


async def _bring(context: Context, want: _Want) -> Content:
    """The same for what a refresh brings: whatever stands against it holds up nothing else."""
    if want.blocked is not None:
        return Content(want.role, None, None, want.blocked)
    try:
        return await _ensure(context, want, cache_known=True)
    except (ForbiddenError, InvalidObjectError) as error:
        cause = ReasonError(Reason.QUEUED, f"its ModelArtifact can't be made: {error}; tried again every minute")
        return Content(want.role, None, None, cause)


def _is_foreign(artifact: ModelArtifact | None, want: _Want) -> bool:
    return artifact is not None and want.manifest is not None and artifact.spec.to_wire() != want.manifest["spec"]


def _recorded(context: Context, deployment: VLLMDeployment, role: Role) -> ObjectKey | None:
    """The artifact in use, where the Secret or cache that it came through is gone but the spec is the same."""
    status = deployment.status
    names: dict[Role, str | None] = {
        "model": status.model_artifact,
        "tokenizer": status.tokenizer_artifact,
        "draftModel": status.draft_model_artifact,
    }
    name = names[role]
    if name is None or status.observed_generation != deployment.metadata.generation:
        return None
    key = (deployment.metadata.namespace, name)
    return key if key in context.store.artifacts else None


def _publish(context: Context, deployment: VLLMDeployment, choice: _Choice) -> None:
    """Say what is wanted, before an artifact is made: one without a wanter would be deleted."""
    base, *others = choice.serving
    want = ModelWant(
        deployment.metadata.uid,
        deployment.metadata.generation,
        base.key,
        base.credentials,
        auxiliary=_lent(others),
        refreshing=_lent(choice.refreshing),
    )
    changed = context.registry.publish_model_want(deployment.key, want)
    if changed is None:
        return
    for artifact in changed:
        context.enqueue(Key(Kind.MODEL_ARTIFACT, *artifact))
    for adapter in context.store.adapters_of(deployment.key):
        context.enqueue(Key(Kind.LORA_ADAPTER, *adapter.key))


def _lent(wants: list[_Want]) -> tuple[tuple[ObjectKey, Credentials | None], ...]:
    return tuple((want.key, want.credentials) for want in wants if want.key is not None)
