"""Which content an adapter has served: the artifact that its spec leads to, or what it has while a refresh is not done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from lora_operator.api.adapter import LoRAAdapter, RefreshState
from lora_operator.api.artifact import ModelArtifact
from lora_operator.api.cache import ModelCache
from lora_operator.api.deployment import VLLMDeployment
from lora_operator.conditions import Verdict, failing, find, is_true, ok, reason_of
from lora_operator.constants import Condition, Reason
from lora_operator.errors import ReasonError
from lora_operator.plan.deployment_pods import DeploymentPods
from lora_operator.plan.refresh import Epoch, Refresh, describe, parse_interval, plan_refresh
from lora_operator.plan.source_policy import refused_by_pin
from lora_operator.plan.wants import Credentials, build_artifact


@dataclass(frozen=True)
class AdapterObservation:
    """All that is known when an adapter is planned."""

    adapter: LoRAAdapter
    deployment: VLLMDeployment | None
    namespace_labels: Mapping[str, str] | None
    rivals: tuple[LoRAAdapter, ...]  # admitted adapters of the same deployment with the same served name
    cache: ModelCache | ReasonError | None
    base_artifact: str | None  # name of the base model's ModelArtifact; None while the deployment has not been planned
    credentials: Credentials | ReasonError | None
    artifacts: Mapping[tuple[str, str], ModelArtifact]
    served: DeploymentPods | None  # None while nothing is known of the pods
    url: str | None
    left_out: Reason | None = (
        None  # there is no room for it: in the list, or (updateStrategy Rollout) the pods' arguments
    )
    name_held: bool = False  # by an adapter that exists and can't be read
    name_holder: str | None = None  # the UID of who is listed under the name, where somebody else wants it too
    not_made: Verdict | None = None  # why the wanted artifact could not be made just now


@dataclass(frozen=True)
class AdapterContent:
    """What an adapter has, or is to have."""

    wanted: dict[str, Any] | None  # the artifact to be applied
    key: tuple[str, str] | None  # of the artifact that is served, or will be first
    artifact: ModelArtifact | None
    downloaded: Verdict
    refreshing: tuple[str, str] | None  # of the artifact that takes its place once it is Ready
    refresh: RefreshState | None
    note: str  # what becomes of a refresh that is not done
    again_at: datetime | None  # when the next refresh is due
    refused: ModelArtifact | None = None  # one that is there and must not be served on

    @property
    def ready(self) -> ModelArtifact | None:
        """The artifact, where it is complete."""
        return self.artifact if self.downloaded.is_true else None


def find_content(seen: AdapterObservation, deployment: VLLMDeployment, *, now: datetime) -> AdapterContent | None:
    """The content that the adapter's spec leads to; None where the base model's artifact is not known yet."""
    refresh = _refresh(seen, deployment, now)
    wanted, downloaded = _wanted_artifact(seen, refresh)
    if wanted is None and downloaded is None:
        return None
    key = (wanted["metadata"]["namespace"], wanted["metadata"]["name"]) if wanted else _kept(seen)
    artifact = _own(seen, wanted) if wanted is not None else seen.artifacts.get(key) if key else None
    if downloaded is None:
        taken = key is not None and artifact is None and key in seen.artifacts
        downloaded = seen.not_made or (name_taken(key) if taken and key else _downloaded(seen, artifact, key))
    refreshing, note = None, ""
    unusable = _unusable(downloaded, artifact, deployment)
    if refresh.is_due and refresh.content is not None and unusable is not None:
        refreshing = key  # what is served stays, and stays good, while the refresh runs or fails
        artifact, key = refresh.content, refresh.content.key
        downloaded = _downloaded(seen, artifact, key)
        note = describe(unusable, refresh.again_at)
    elif isinstance(seen.credentials, ReasonError) and refresh.wanted != refresh.served:
        note = describe(failing(seen.credentials.reason, seen.credentials.message))
    if downloaded.is_true:
        downloaded = replace(downloaded, message=downloaded.message + note)
    state = refresh.state(done=not note) if _is_known(seen) else seen.adapter.status.refresh
    refused = _refused(seen, artifact, downloaded, refresh)
    return AdapterContent(wanted, key, artifact, downloaded, refreshing, state, note, refresh.again_at, refused)


def _own(seen: AdapterObservation, wanted: dict[str, Any]) -> ModelArtifact | None:
    """The wanted artifact, where what has its name is it: not one that somebody made by hand of another spec."""
    artifact = seen.artifacts.get((wanted["metadata"]["namespace"], wanted["metadata"]["name"]))
    return artifact if artifact is not None and artifact.spec.to_wire() == wanted["spec"] else None


def name_taken(key: tuple[str, str]) -> Verdict:
    """Of an artifact that can't be made, for another one has its name."""
    return failing(Reason.NAME_TAKEN, f"ModelArtifact {key[0]}/{key[1]} exists with another spec: delete it")


def _is_known(seen: AdapterObservation) -> bool:
    """Whether it is known what the adapter wants, and with which credentials."""
    known = isinstance(seen.cache, ModelCache) and seen.base_artifact is not None
    return known and not isinstance(seen.credentials, ReasonError)


def _refresh(seen: AdapterObservation, deployment: VLLMDeployment, now: datetime) -> Refresh:
    """What is to be resolved anew; nothing where it is not known what the adapter wants, or with which credentials."""
    adapter = seen.adapter

    def artifact_at(epoch: Epoch) -> ModelArtifact | None:
        return _artifact_of(seen, epoch, pickled=allows_pickle(deployment))

    return plan_refresh(
        annotations=adapter.metadata.annotations,
        interval=parse_interval(adapter.spec.refresh_interval),
        source=adapter.spec.source,
        state=adapter.status.refresh,
        artifact_at=artifact_at,
        is_usable=lambda artifact: _pinned_out(seen, artifact) is None and too_large(artifact, deployment) is None,
        now=now,
    )


def allows_pickle(deployment: VLLMDeployment | None) -> bool:
    """Whether adapters whose weights exist only as pickle are served."""
    return deployment is not None and deployment.spec.adapter_policy.pickled_weights == "AllowScanned"


def _artifact_of(seen: AdapterObservation, epoch: Epoch, *, pickled: bool) -> ModelArtifact | None:
    """The artifact of the adapter's want at an epoch; None where there is none, or where the want is not known."""
    manifest = _build(seen, epoch, pickled=pickled)
    if manifest is None:
        return None
    return _own(seen, manifest)


def _build(seen: AdapterObservation, epoch: Epoch, *, pickled: bool) -> dict[str, Any] | None:
    if not _is_known(seen) or not isinstance(seen.cache, ModelCache) or isinstance(seen.credentials, ReasonError):
        return None
    return build_artifact(
        cache=seen.cache,
        source=seen.adapter.spec.source,
        base_artifact=seen.base_artifact,
        credentials=seen.credentials,
        details={"pickledWeights": "AllowScanned"} if pickled else {},
        refresh=epoch.text,
    )


def _refused(
    seen: AdapterObservation, artifact: ModelArtifact | None, downloaded: Verdict, refresh: Refresh
) -> ModelArtifact | None:
    """Content that is there and must not be served on: another one than is pinned, or a pickle that was allowed before."""
    if downloaded.reason is Reason.DIGEST_MISMATCH:
        return artifact
    if downloaded.reason is Reason.UNSAFE_FORMAT and not allows_pickle(seen.deployment):
        before = _artifact_of(seen, refresh.wanted, pickled=True)
        return before if before is not None and before.status.path is not None else None
    return None


def _unusable(downloaded: Verdict, artifact: ModelArtifact | None, deployment: VLLMDeployment) -> Verdict | None:
    """Why what a refresh is to bring can't be served; None where it can."""
    if not downloaded.is_true or artifact is None:
        return downloaded
    return too_large(artifact, deployment)


def too_large(artifact: ModelArtifact, deployment: VLLMDeployment) -> Verdict | None:
    """RankTooLarge where the deployment can't serve what was fetched."""
    if (artifact.status.rank or 0) <= deployment.spec.lora.max_lora_rank:
        return None
    return failing(
        Reason.RANK_TOO_LARGE,
        f"the adapter's rank is {artifact.status.rank}, VLLMDeployment {deployment.metadata.namespace}/"
        f"{deployment.metadata.name} allows {deployment.spec.lora.max_lora_rank}: use an adapter of a smaller "
        "rank, or raise spec.lora.maxLoraRank there",
    )


def _wanted_artifact(seen: AdapterObservation, refresh: Refresh) -> tuple[dict[str, Any] | None, Verdict | None]:
    """The artifact to be applied, or why there can't be one; (None, None) where it can't be known yet.

    An adapter whose artifact is Ready keeps it when its Secret is gone: the content was authorised when it was fetched.
    """
    if isinstance(seen.credentials, ReasonError):
        artifact = _authorised(seen)
        if artifact is not None and (seen.cache is None or seen.base_artifact is None):
            return None, None
        if artifact is not None and _fits(artifact, seen):
            return {
                "apiVersion": artifact.api_version,
                "kind": artifact.kind,
                "metadata": {"name": artifact.metadata.name, "namespace": artifact.metadata.namespace},
                "spec": artifact.spec.to_wire(),
            }, None
        return None, failing(seen.credentials.reason, seen.credentials.message)
    if isinstance(seen.cache, ReasonError):
        return None, failing(seen.cache.reason, seen.cache.message)
    if seen.cache is None or seen.base_artifact is None:
        return None, None
    return _build(seen, refresh.wanted, pickled=allows_pickle(seen.deployment)), None


def _kept(seen: AdapterObservation) -> tuple[str, str] | None:
    """What the adapter has stays wanted while the cache can't be found: it may be made anew over the same claim."""
    artifact = _authorised(seen) if isinstance(seen.cache, ReasonError) else None
    return artifact.key if artifact is not None else None


def _authorised(seen: AdapterObservation) -> ModelArtifact | None:
    """The Ready artifact that the adapter has, where its present spec asks for that content, with whatever credentials."""
    ref, source = seen.adapter.status.artifact_ref, seen.adapter.spec.source
    artifact = seen.artifacts.get((ref.namespace, ref.name)) if ref is not None else None
    if artifact is None or not is_true(artifact.status.conditions, Condition.READY):
        return None
    is_same = artifact.spec.source.to_wire() == source.anonymous().to_wire()
    return artifact if is_same and artifact.spec.assume_role in (None, source.role) else None


def _fits(artifact: ModelArtifact, seen: AdapterObservation) -> bool:
    """Whether the pods' cache holds the artifact, and it was checked against the pods' base model."""
    if not isinstance(seen.cache, ModelCache):
        return False
    base = artifact.spec.base_model_ref.name if artifact.spec.base_model_ref else None
    in_cache = (artifact.metadata.namespace, artifact.spec.cache_ref.name) == seen.cache.key
    allowed = artifact.spec.pickled_weights is None or allows_pickle(seen.deployment)
    return in_cache and base == seen.base_artifact and allowed


def _pinned_out(seen: AdapterObservation, artifact: ModelArtifact) -> ReasonError | None:
    return refused_by_pin(seen.adapter.spec.source, artifact.status.digest)


def _downloaded(seen: AdapterObservation, artifact: ModelArtifact | None, key: tuple[str, str] | None) -> Verdict:
    where = f"ModelArtifact {key[0]}/{key[1]}" if key else "ModelArtifact"
    ready = find(artifact.status.conditions, Condition.READY) if artifact else None
    if ready is None:
        return failing(Reason.QUEUED, f"{where} has not started")
    if ready.status == "True" and artifact is not None:
        refused = _pinned_out(seen, artifact)
        if refused is not None:
            return failing(refused.reason, refused.message)
        return ok(Reason.DOWNLOADED, f"{where}: {ready.message}")
    return failing(reason_of(ready.reason), ready.message)
