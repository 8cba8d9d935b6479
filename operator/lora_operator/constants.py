"""Every label, annotation, path, condition type and reason of the product, each with one line that the docs are generated from.

A reason says three things: what happened (its documentation), whether trying again can help (`retry`), and whether the
object is `Stalled` while it stands, that is, whether only a change by a user can help.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

GROUP: Final = "lora-operator.dev"
VERSION: Final = "v1alpha1"
API_VERSION: Final = f"{GROUP}/{VERSION}"
FIELD_MANAGER: Final = "lora-operator"

# Labels on everything the operator makes; watches are filtered by LABEL_MANAGED_BY on the server's side.
LABEL_MANAGED_BY: Final = "app.kubernetes.io/managed-by"
MANAGED_BY: Final = "lora-operator"
LABEL_DEPLOYMENT: Final = f"{GROUP}/vllmdeployment"
LABEL_ARTIFACT: Final = f"{GROUP}/modelartifact"
LABEL_CACHE: Final = f"{GROUP}/modelcache"  # on claims that were made, and on pods of a cache that one node can mount
LABEL_COMPONENT: Final = "app.kubernetes.io/component"
COMPONENT_ENGINE: Final = "engine"
COMPONENT_FETCH: Final = "fetch"
COMPONENT_EVICT: Final = "evict"

ANNOTATION_DEFAULT_CACHE: Final = f"{GROUP}/is-default-cache"
ANNOTATION_REFRESH: Final = f"{GROUP}/refresh"  # on adapters and deployments: another value resolves the source anew
ANNOTATION_EVICT: Final = f"{GROUP}/evict"  # on caches: another value removes all that nothing uses, at once
ANNOTATION_TEMPLATE_HASH: Final = f"{GROUP}/template-hash"
ANNOTATION_PLUGIN: Final = f"{GROUP}/engine-kit"
ANNOTATION_ARGUMENTS: Final = f"{GROUP}/lora-modules"  # <generation>-<hash> of the adapters in the pods' arguments
ANNOTATION_ATTEMPT: Final = f"{GROUP}/attempt"
# All that are read; others on objects that are watched are not kept.
LABELS: Final = (LABEL_MANAGED_BY, LABEL_COMPONENT, LABEL_DEPLOYMENT, LABEL_ARTIFACT, LABEL_CACHE)
ANNOTATIONS: Final = (
    ANNOTATION_DEFAULT_CACHE,
    ANNOTATION_REFRESH,
    ANNOTATION_EVICT,
    ANNOTATION_TEMPLATE_HASH,
    ANNOTATION_PLUGIN,
    ANNOTATION_ARGUMENTS,
    ANNOTATION_ATTEMPT,
)

# spec.lora.updateStrategy: how pods come to other adapters.
HOT_LOAD: Final = "HotLoad"
ROLLOUT: Final = "Rollout"

# Inside the pods.
CACHE_MOUNT: Final = "/model-cache"
PLUGIN_MOUNT: Final = "/opt/lora-operator"
PLUGIN_PACKAGE: Final = "lora_operator_plugin"
MODULES_MOUNT: Final = "/etc/lora-operator/modules"
MODULES_KEY: Final = "modules.json.gz"
GUARD_MOUNT: Final = "/etc/lora-operator/gate"
GUARD_KEY: Final = "token"
CHAT_MOUNT: Final = "/etc/lora-operator/chat"
CHAT_TEMPLATE_KEY: Final = "template.jinja"
PLUGIN_STATE_MOUNT: Final = "/var/lib/lora-operator"
SOURCE_MOUNT: Final = "/source"  # a claim that a Job copies from
CREDENTIALS_MOUNT: Final = "/etc/lora-operator/credentials"
CREDENTIALS_KEY: Final = "token"
IDENTITY_MOUNT: Final = "/etc/lora-operator/identity"
CA_MOUNT: Final = "/etc/lora-operator/ca"
DEFAULT_ENGINE_PORT: Final = 8000
MAX_SERVED_NAME: Final = 128  # characters of what clients write into "model"
ENGINE_CONTAINER: Final = "vllm"
FETCH_CONTAINER: Final = "fetch"
EVICT_CONTAINER: Final = "evict"


class Condition(StrEnum):
    """Condition types, as they stand in `status.conditions[].type`."""

    ACCEPTED = "Accepted"
    DOWNLOADED = "Downloaded"
    LOADED = "Loaded"
    READY = "Ready"
    STALLED = "Stalled"
    MODEL_READY = "ModelReady"
    AVAILABLE = "Available"
    ADAPTERS_IN_SYNC = "AdaptersInSync"
    SINGLE_NODE = "SingleNode"
    SPACE_LOW = "SpaceLow"
    EVICTION_HELD_UP = "EvictionHeldUp"
    OPERATOR_FAULT = "OperatorFault"


CONDITION_DOCS: Final[dict[Condition, str]] = {
    Condition.ACCEPTED: "The adapter may be served by the deployment it names: the deployment exists, admits the namespace, and the names are free.",
    Condition.DOWNLOADED: "The adapter's content is in the cache, authorised with the adapter's own credentials, and verified.",
    Condition.LOADED: "Every ready pod of the deployment serves the wanted revision of the adapter; one that has it Lazy loads it on the first request.",
    Condition.READY: "All the other conditions hold; for an artifact: content is complete and verified in the cache; for a cache: its volume can be used.",
    Condition.STALLED: "Only a change by a user can help; present only while it is so.",
    Condition.MODEL_READY: "The base model is complete and verified in the cache, and so are the tokenizer and draft model that the spec names.",
    Condition.AVAILABLE: "At least one engine pod is ready and its gate was proven closed.",
    Condition.ADAPTERS_IN_SYNC: "Every ready pod acknowledged the current module list and serves what it says.",
    Condition.SPACE_LOW: "The volume, or the cache's capacity, is as full as spec.warnAtPercent says; there once a Job has looked.",
    Condition.EVICTION_HELD_UP: "Content of the cache is to be removed, and can't be now, or could not be the last time; there once any was to be.",
    Condition.OPERATOR_FAULT: "The operator fails on the object by a bug of its own, and what it has, it keeps; present only while it is so.",
    Condition.SINGLE_NODE: "Only one node can mount the cache's claim, so all its pods are kept on one node; the message names it.",
}


class Retry(StrEnum):
    """What the operator does about a reason by itself."""

    NONE = "permanent"  # not tried again until the spec changes
    BACKOFF = "transient"  # tried again with back-off
    OUTSIDE = "outside"  # tried again with back-off up to 10 minutes, and at once when what it waits for changed
    WAIT = "waiting"  # nothing failed; it goes on when what it waits for happens


@dataclass(frozen=True)
class ReasonInfo:
    """What a reason means, for docs and for deciding what follows from it."""

    doc: str
    retry: Retry
    stalled: bool = False
    warns: bool = False  # an Event about it is a Warning, though it may pass without a change by a user


class Reason(StrEnum):
    """Reasons of conditions, as they stand in `status.conditions[].reason`."""

    # when True
    ACCEPTED = "Accepted"
    DOWNLOADED = "Downloaded"
    LOADED = "Loaded"
    READY = "Ready"
    MODEL_READY = "ModelReady"
    AVAILABLE = "Available"
    IN_SYNC = "InSync"
    BOUND = "Bound"
    # Accepted
    DEPLOYMENT_NOT_FOUND = "DeploymentNotFound"
    NAMESPACE_NOT_ALLOWED = "NamespaceNotAllowed"
    SOURCE_NOT_ALLOWED = "SourceNotAllowed"
    NAME_CONFLICT = "NameConflict"
    NAME_IS_BASE_MODEL = "NameIsBaseModel"
    BASE_MODEL_NOT_SERVED = "BaseModelNotServed"
    INVALID_SPEC = "InvalidSpec"
    RANK_TOO_LARGE = "RankTooLarge"
    # Downloaded, and Ready of an artifact
    NOT_ACCEPTED = "NotAccepted"
    QUEUED = "Queued"
    DOWNLOADING = "Downloading"
    VERIFYING = "Verifying"
    CREDENTIALS_NOT_FOUND = "CredentialsNotFound"
    CREDENTIALS_KEY_MISSING = "CredentialsKeyMissing"
    CREDENTIALS_FORBIDDEN = "CredentialsForbidden"
    UNAUTHORIZED = "Unauthorized"
    REPOSITORY_NOT_FOUND = "RepositoryNotFound"
    REVISION_NOT_FOUND = "RevisionNotFound"
    ENTRY_NOT_FOUND = "EntryNotFound"
    SOURCE_UNREACHABLE = "SourceUnreachable"
    RATE_LIMITED = "RateLimited"
    SOURCE_CHANGED = "SourceChanged"
    CHECKSUM_MISMATCH = "ChecksumMismatch"
    DIGEST_MISMATCH = "DigestMismatch"
    UNSAFE_FORMAT = "UnsafeFormat"
    INVALID_ADAPTER = "InvalidAdapter"
    INCOMPATIBLE_BASE_MODEL = "IncompatibleBaseModel"
    INCOMPLETE_MODEL = "IncompleteModel"
    TOO_LARGE = "TooLarge"
    INSUFFICIENT_SPACE = "InsufficientSpace"
    CACHE_NOT_READY = "CacheNotReady"
    CACHE_NOT_WRITABLE = "CacheNotWritable"
    JOB_UNSCHEDULABLE = "JobUnschedulable"
    JOB_IMAGE_PULL = "JobImagePull"
    JOB_NOT_STARTED = "JobNotStarted"
    JOB_OUT_OF_MEMORY = "JobOutOfMemory"
    JOB_TIMEOUT = "JobTimeout"
    JOB_FAILED = "JobFailed"
    # Loaded
    NOT_DOWNLOADED = "NotDownloaded"
    SUSPENDED = "Suspended"
    NO_READY_PODS = "NoReadyPods"
    SCALED_TO_ZERO = "ScaledToZero"
    LOADING = "Loading"
    PARTIALLY_LOADED = "PartiallyLoaded"
    ENGINE_REFUSED = "EngineRefused"
    ENGINE_UNREACHABLE = "EngineUnreachable"
    # Available
    MODEL_NOT_READY = "ModelNotReady"
    UNSCHEDULABLE = "Unschedulable"
    IMAGE_PULL = "ImagePull"
    POD_NOT_STARTED = "PodNotStarted"
    OUT_OF_MEMORY = "OutOfMemory"
    CRASH_LOOPING = "CrashLooping"
    PODS_REFUSED = "PodsRefused"
    GATE_MISSING = "GateMissing"
    ENGINE_TOO_OLD = "EngineTooOld"
    POD_TEMPLATE_INVALID = "PodTemplateInvalid"
    NAME_TAKEN = "NameTaken"
    PROGRESSING = "Progressing"
    # AdaptersInSync
    SYNC_PENDING = "SyncPending"
    NO_ATOMIC_SWAP = "NoAtomicSwap"
    ORPHANS_LOADED = "OrphansLoaded"
    ARGUMENTS_TOO_LONG = "ArgumentsTooLong"
    LIST_TOO_LONG = "ListTooLong"
    # Ready of a cache
    CLAIM_PENDING = "ClaimPending"
    CLAIM_NOT_FOUND = "ClaimNotFound"
    CLAIM_UNUSABLE = "ClaimUnusable"
    CLAIM_REFUSED = "ClaimRefused"
    # SingleNode of a cache, True and False
    READ_WRITE_ONCE = "ReadWriteOnce"
    READ_WRITE_MANY = "ReadWriteMany"
    # SpaceLow of a cache, True, False and Unknown
    NEARLY_FULL = "NearlyFull"
    ENOUGH_SPACE = "EnoughSpace"
    # EvictionHeldUp of a cache, True (JobNotStarted as well) and False
    EVICTION_WAITS = "EvictionWaits"
    EVICTION_FAILED = "EvictionFailed"
    NOT_HELD_UP = "NotHeldUp"
    VOLUME_RESIZED = "VolumeResized"
    # OperatorFault, True; and Ready, Unknown, where nothing was said of the present spec before
    OPERATOR_ERROR = "OperatorError"


_WAIT, _BACKOFF, _OUTSIDE, _NONE = Retry.WAIT, Retry.BACKOFF, Retry.OUTSIDE, Retry.NONE

REASONS: Final[dict[Reason, ReasonInfo]] = {
    Reason.ACCEPTED: ReasonInfo("The deployment admits the adapter.", _WAIT),
    Reason.DOWNLOADED: ReasonInfo("The content is in the cache and verified.", _WAIT),
    Reason.LOADED: ReasonInfo("Every ready pod serves the wanted revision.", _WAIT),
    Reason.READY: ReasonInfo("All is as the spec asks.", _WAIT),
    Reason.MODEL_READY: ReasonInfo("The base model and what goes with it are in the cache and verified.", _WAIT),
    Reason.AVAILABLE: ReasonInfo("Engine pods are ready.", _WAIT),
    Reason.IN_SYNC: ReasonInfo("Every ready pod serves exactly what is wanted.", _WAIT),
    Reason.BOUND: ReasonInfo("The cache's claim is bound.", _WAIT),
    Reason.DEPLOYMENT_NOT_FOUND: ReasonInfo(
        "No VLLMDeployment of that name exists in that namespace.", _WAIT, stalled=True
    ),
    Reason.NAMESPACE_NOT_ALLOWED: ReasonInfo(
        "The deployment's adapterPolicy does not admit the adapter's namespace.", _WAIT, stalled=True
    ),
    Reason.SOURCE_NOT_ALLOWED: ReasonInfo(
        "The source names an address, claim, path or role that its ModelCache does not allow; docs/sources says by which field it does.",
        _WAIT,
        stalled=True,
    ),
    Reason.NAME_CONFLICT: ReasonInfo(
        "An older adapter of the same deployment already has the served name.", _WAIT, stalled=True
    ),
    Reason.NAME_IS_BASE_MODEL: ReasonInfo(
        "The served name is one of the base model's own served names.", _WAIT, stalled=True
    ),
    Reason.BASE_MODEL_NOT_SERVED: ReasonInfo(
        "baseModelName is not one of the deployment's servedNames.", _WAIT, stalled=True
    ),
    Reason.INVALID_SPEC: ReasonInfo(
        "The stored object does not fit this operator's schema, or its namespace and served name are too long together.",
        _NONE,
        stalled=True,
    ),
    Reason.RANK_TOO_LARGE: ReasonInfo(
        "The adapter's rank is above the deployment's lora.maxLoraRank.", _WAIT, stalled=True
    ),
    Reason.NOT_ACCEPTED: ReasonInfo("Nothing is downloaded before the adapter is accepted, nor loaded.", _WAIT),
    Reason.QUEUED: ReasonInfo(
        "The download waits: for the base model's artifact, for its turn among the cache's Jobs, for its Job's pod to start, or for "
        "its ModelArtifact, which a quota or policy refuses.",
        _WAIT,
    ),
    Reason.DOWNLOADING: ReasonInfo("A Job is downloading; the message has bytes and percentage.", _WAIT),
    Reason.VERIFYING: ReasonInfo("A Job is checking checksums and the adapter's layout.", _WAIT),
    Reason.CREDENTIALS_NOT_FOUND: ReasonInfo("The Secret named by the source does not exist.", _OUTSIDE, stalled=True),
    Reason.CREDENTIALS_KEY_MISSING: ReasonInfo(
        "The Secret exists but has no such key, or it is empty.", _OUTSIDE, stalled=True
    ),
    Reason.CREDENTIALS_FORBIDDEN: ReasonInfo(
        "The operator was not given the right to read the Secret.", _OUTSIDE, stalled=True
    ),
    Reason.UNAUTHORIZED: ReasonInfo(
        "The source refuses these credentials, or is private or gated and none were given.", _OUTSIDE, stalled=True
    ),
    Reason.REPOSITORY_NOT_FOUND: ReasonInfo(
        "The source says that no such repository or bucket exists.", _OUTSIDE, stalled=True
    ),
    Reason.REVISION_NOT_FOUND: ReasonInfo("The repository exists, the revision does not.", _OUTSIDE, stalled=True),
    Reason.ENTRY_NOT_FOUND: ReasonInfo(
        "The repository and revision exist, the wanted folder or files do not.", _OUTSIDE, stalled=True
    ),
    Reason.SOURCE_UNREACHABLE: ReasonInfo("The source does not answer, or answers with server errors.", _BACKOFF),
    Reason.RATE_LIMITED: ReasonInfo("The source asks for fewer requests.", _BACKOFF),
    Reason.SOURCE_CHANGED: ReasonInfo(
        "The source's listing changed during the download; nothing of the mixture was published.", _BACKOFF
    ),
    Reason.CHECKSUM_MISMATCH: ReasonInfo("Downloaded bytes differ from what the source declares.", _BACKOFF),
    Reason.DIGEST_MISMATCH: ReasonInfo(
        "The content is another one than source.digest pins; the message has both digests.", _NONE, stalled=True
    ),
    Reason.UNSAFE_FORMAT: ReasonInfo(
        "The weights exist only as pickle files, which can run code when read.", _NONE, stalled=True
    ),
    Reason.INVALID_ADAPTER: ReasonInfo(
        "The adapter's files are not what vLLM can serve correctly.", _NONE, stalled=True
    ),
    Reason.INCOMPATIBLE_BASE_MODEL: ReasonInfo(
        "The adapter's tensors do not fit the deployment's base model.", _NONE, stalled=True
    ),
    Reason.INCOMPLETE_MODEL: ReasonInfo(
        "A base model, draft model or tokenizer lacks files: config, weights or a shard of them, tokenizer.",
        _NONE,
        stalled=True,
    ),
    Reason.TOO_LARGE: ReasonInfo(
        "The content is bigger than the ModelCache's spec.maxArtifactSize.", _OUTSIDE, stalled=True
    ),
    Reason.INSUFFICIENT_SPACE: ReasonInfo(
        "The content does not fit: the volume is too full, or the ModelCache's capacity or minFree would be hurt.",
        _OUTSIDE,
        stalled=True,
    ),
    Reason.CACHE_NOT_READY: ReasonInfo("The ModelCache is missing, or its claim can't be used yet.", _WAIT),
    Reason.CACHE_NOT_WRITABLE: ReasonInfo("The Job's user may not write to the volume.", _OUTSIDE, stalled=True),
    Reason.JOB_UNSCHEDULABLE: ReasonInfo(
        "No node can run the download Job's pod, or admission refuses it.", _OUTSIDE, stalled=True
    ),
    Reason.JOB_IMAGE_PULL: ReasonInfo("The download Job's image can't be pulled.", _OUTSIDE, stalled=True),
    Reason.JOB_NOT_STARTED: ReasonInfo(
        "The download Job's container can't be made: a volume, a Secret or a right of its user is missing.",
        _OUTSIDE,
        stalled=True,
    ),
    Reason.JOB_OUT_OF_MEMORY: ReasonInfo("The download Job was killed for its memory use.", _BACKOFF),
    Reason.JOB_TIMEOUT: ReasonInfo("The download Job took longer than its deadline.", _BACKOFF),
    Reason.JOB_FAILED: ReasonInfo("The download Job ended without a result.", _BACKOFF),
    Reason.NOT_DOWNLOADED: ReasonInfo("Nothing is loaded before it is downloaded.", _WAIT),
    Reason.SUSPENDED: ReasonInfo("spec.suspend is true: the adapter is downloaded and kept, and not served.", _WAIT),
    Reason.NO_READY_PODS: ReasonInfo("The deployment has no ready pod.", _WAIT),
    Reason.SCALED_TO_ZERO: ReasonInfo("The deployment is scaled to zero replicas.", _WAIT),
    Reason.LOADING: ReasonInfo("No ready pod serves the adapter yet.", _WAIT),
    Reason.PARTIALLY_LOADED: ReasonInfo("Some of the ready pods serve the adapter.", _WAIT),
    Reason.ENGINE_REFUSED: ReasonInfo(
        "An engine, or the checks before it in its pod, refused the adapter; the message has their words.", _BACKOFF
    ),
    Reason.ENGINE_UNREACHABLE: ReasonInfo("A ready pod's engine does not answer the operator.", _BACKOFF),
    Reason.MODEL_NOT_READY: ReasonInfo("No pod is made before the base model is in the cache.", _WAIT),
    Reason.UNSCHEDULABLE: ReasonInfo("No node can run an engine pod.", _WAIT, warns=True),
    Reason.IMAGE_PULL: ReasonInfo("The engine's image can't be pulled.", _WAIT, warns=True),
    Reason.POD_NOT_STARTED: ReasonInfo(
        "A container of an engine pod can't be made or started: a volume, Secret, ConfigMap or program is missing.",
        _WAIT,
        warns=True,
    ),
    Reason.OUT_OF_MEMORY: ReasonInfo("A container of an engine pod was killed for its memory use.", _WAIT, warns=True),
    Reason.CRASH_LOOPING: ReasonInfo(
        "A container of an engine pod keeps exiting; the VLLMDeployment's message has its last lines.",
        _WAIT,
        warns=True,
    ),
    Reason.PODS_REFUSED: ReasonInfo(
        "Quota or admission refuses the engine pods, their Deployment, or another object of the fleet.",
        _WAIT,
        warns=True,
    ),
    Reason.GATE_MISSING: ReasonInfo("A pod's engine answers without the operator's gate.", _WAIT, stalled=True),
    Reason.ENGINE_TOO_OLD: ReasonInfo(
        "The engine's version is too old for the deployment's updateStrategy.", _WAIT, stalled=True
    ),
    Reason.POD_TEMPLATE_INVALID: ReasonInfo(
        "The API server refuses the Deployment that the spec leads to.", _WAIT, stalled=True
    ),
    Reason.NAME_TAKEN: ReasonInfo(
        "An object of a name that the deployment or cache needs exists and belongs to somebody else.",
        _WAIT,
        stalled=True,
    ),
    Reason.PROGRESSING: ReasonInfo("Engine pods are starting.", _WAIT),
    Reason.SYNC_PENDING: ReasonInfo(
        "A ready pod has not yet acknowledged the current module list, or does not serve all of it.", _WAIT
    ),
    Reason.NO_ATOMIC_SWAP: ReasonInfo(
        "A pod's engine has no registry that the plugin knows: changing a revision unloads first.", _WAIT
    ),
    Reason.ORPHANS_LOADED: ReasonInfo(
        "A pod serves an adapter that no object wants; it is named in status.orphans.", _WAIT
    ),
    Reason.ARGUMENTS_TOO_LONG: ReasonInfo(
        "With updateStrategy Rollout: no room for the adapter in the pods' arguments.", _WAIT, stalled=True
    ),
    Reason.LIST_TOO_LONG: ReasonInfo(
        "No room for the adapter in the list that pods are told: a ConfigMap takes 1 MiB. Of the namespaces that have most adapters the "
        "youngest give way.",
        _WAIT,
        stalled=True,
    ),
    Reason.CLAIM_PENDING: ReasonInfo(
        "The claim exists but is not bound. Where its class waits for the first consumer that is in order: a download Job's pod "
        "is the first, and the message says so.",
        _WAIT,
    ),
    Reason.CLAIM_NOT_FOUND: ReasonInfo("The claim does not exist in the cache's namespace.", _WAIT, stalled=True),
    Reason.CLAIM_UNUSABLE: ReasonInfo(
        "The claim can't hold a cache: its volume is lost, it is being deleted, or its access or volume mode does not fit.",
        _WAIT,
        stalled=True,
    ),
    Reason.CLAIM_REFUSED: ReasonInfo(
        "The API server refuses the claim that volumeClaimTemplate leads to: quota, admission, or the template itself.",
        _WAIT,
        stalled=True,
    ),
    Reason.READ_WRITE_ONCE: ReasonInfo("The claim asks for ReadWriteOnce: only one node can mount it.", _WAIT),
    Reason.READ_WRITE_MANY: ReasonInfo("The claim asks for ReadWriteMany: pods on any node can mount it.", _WAIT),
    Reason.NEARLY_FULL: ReasonInfo("As little room is left as spec.warnAtPercent says.", _WAIT),
    Reason.ENOUGH_SPACE: ReasonInfo("There is more room than spec.warnAtPercent asks for.", _WAIT),
    Reason.EVICTION_WAITS: ReasonInfo(
        "It is not known for certain what is in use, so nothing is removed: a pod can't be asked, or an object can't be read.",
        _WAIT,
    ),
    Reason.EVICTION_FAILED: ReasonInfo(
        "Nothing could be removed the last time; the next time that is not asked for comes after a pause.", _BACKOFF
    ),
    Reason.NOT_HELD_UP: ReasonInfo("No removal of content waits or has failed.", _WAIT),
    Reason.VOLUME_RESIZED: ReasonInfo(
        "The claim has another capacity than when a Job last looked at the volume.", _WAIT
    ),
    Reason.OPERATOR_ERROR: ReasonInfo(
        "The operator fails on this object by a bug of its own: report what the message has. Others are not held up by it.",
        _BACKOFF,
        warns=True,
    ),
}
