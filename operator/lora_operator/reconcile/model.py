"""What a deployment's engines read: the artifacts of its base model, tokenizer and draft model, wanted and made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lora_operator.api.cache import ModelCache
from lora_operator.api.deployment import VLLMDeployment
from lora_operator.constants import CACHE_MOUNT, Reason
from lora_operator.desired.engine import Auxiliary
from lora_operator.errors import ReasonError
from lora_operator.plan.deployment import Content, model_is_ready
from lora_operator.plan.wants import ContentWant, Credentials, Role, build_artifact, model_wants, source_refused
from lora_operator.reconcile.adapter import cache_of
from lora_operator.reconcile.context import Context
from lora_operator.reconcile.registry import ModelWant
from lora_operator.reconcile.store import Key, Kind, ObjectKey


@dataclass(frozen=True)
class Model:
    """The contents as far as they can be wanted, the base model first."""

    cache: ModelCache | None
    contents: tuple[Content, ...]

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
    key: ObjectKey | None
    credentials: Credentials | None = None
    manifest: dict[str, Any] | None = None
    blocked: ReasonError | None = None


async def want_model(context: Context, deployment: VLLMDeployment) -> Model:
    """Find the cache and the credentials, say what is wanted, and make sure that the artifacts exist."""
    cache = cache_of(context, deployment)
    wants = [await _find(context, deployment, cache, want) for want in model_wants(deployment.spec.model)]
    _publish(context, deployment, wants)
    contents = [await _ensure(context, want, cache_known=isinstance(cache, ModelCache)) for want in wants]
    return Model(cache if isinstance(cache, ModelCache) else None, tuple(contents))


async def _find(
    context: Context, deployment: VLLMDeployment, cache: ModelCache | ReasonError, want: ContentWant
) -> _Want:
    credentials: Credentials | ReasonError | None = None
    if want.source.secret is not None:
        credentials = await context.credentials(deployment.metadata.namespace, *want.source.secret)
    refused = source_refused(want.source, cache) if isinstance(cache, ModelCache) else None
    for error in (cache, refused, credentials):
        if isinstance(error, ReasonError):
            return _Want(want.role, _recorded(context, deployment, want.role), blocked=error)
    assert isinstance(cache, ModelCache)  # noqa: S101  a narrowing for the type checker, and the next line too
    assert not isinstance(credentials, ReasonError)  # noqa: S101
    manifest = build_artifact(
        cache=cache, source=want.source, base_artifact=None, credentials=credentials, details=want.details
    )
    key = (manifest["metadata"]["namespace"], manifest["metadata"]["name"])
    return _Want(want.role, key, credentials, manifest)


async def _ensure(context: Context, want: _Want, *, cache_known: bool) -> Content:
    artifact = context.store.artifacts.get(want.key) if want.key else None
    name = want.key[1] if want.key else None
    if want.manifest is None or want.key is None:
        forbidden = want.blocked is not None and want.blocked.reason is Reason.SOURCE_NOT_ALLOWED
        usable = model_is_ready(artifact) and cache_known and not forbidden  # it was authorised when it was fetched
        return Content(want.role, name, artifact, None if usable else want.blocked)
    if artifact is None:
        context.take(Kind.MODEL_ARTIFACT, await context.kube.apply(want.manifest))
        context.enqueue(Key(Kind.MODEL_ARTIFACT, *want.key))
        artifact = context.store.artifacts.get(want.key)
    if artifact is not None and artifact.spec.to_wire() != want.manifest["spec"]:
        taken = f"ModelArtifact {want.key[0]}/{want.key[1]} exists with another spec: delete it"
        return Content(want.role, name, None, ReasonError(Reason.NAME_TAKEN, taken))
    return Content(want.role, name, artifact, None)


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


def _publish(context: Context, deployment: VLLMDeployment, wants: list[_Want]) -> None:
    """Say what is wanted, before an artifact is made: one without a wanter would be deleted."""
    base, *others = wants
    want = ModelWant(
        deployment.metadata.uid,
        deployment.metadata.generation,
        base.key,
        base.credentials,
        tuple((other.key, other.credentials) for other in others if other.key is not None),
    )
    changed = context.registry.publish_model_want(deployment.key, want)
    if changed is None:
        return
    for artifact in changed:
        context.enqueue(Key(Kind.MODEL_ARTIFACT, *artifact))
    for adapter in context.store.adapters_of(deployment.key):
        context.enqueue(Key(Kind.LORA_ADAPTER, *adapter.key))
