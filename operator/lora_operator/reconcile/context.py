"""What every reconciler is given, and the few I/O steps that several share: writing a status, applying a child, Secrets."""

from __future__ import annotations

import base64
import binascii
import contextlib
import random
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from importlib import resources
from typing import Any, Final

from lora_operator.api.common import ApiModel, Metadata, Resource, StatusCondition
from lora_operator.conditions import find, is_passing, is_true, reason_of
from lora_operator.constants import API_VERSION, REASONS, Condition, Reason
from lora_operator.desired.children import kit_hash
from lora_operator.errors import AlreadyExistsError, ConflictError, ForbiddenError, NotFoundError, ReasonError
from lora_operator.kube.client import Kube
from lora_operator.kube.kinds import SECRETS, Kind, kind_of, type_of
from lora_operator.kube.objects import KubeObject
from lora_operator.kube.workloads import Workload
from lora_operator.names import short_hash
from lora_operator.plan.wants import Credentials
from lora_operator.reconcile.registry import Registry
from lora_operator.reconcile.routing import keys_for
from lora_operator.reconcile.store import Body, Key, Store
from lora_operator.settings import Settings
from lora_operator.source_kinds import keys_of
from lora_operator.vllm import Engines

MASTER_KEY_SECRET: Final = "lora-operator-key"  # noqa: S105  a name
SECRET_SECONDS: Final = 3600.0  # between looks for a Secret that nothing makes doubtful, give or take a quarter
DOUBTED_SECRET_SECONDS: Final = 10.0
PASSING_SECONDS: Final = 1.0  # a load takes some 50 ms: what is over so soon is not worth two writes and two Events
GATHER_SECONDS: Final = 0.3  # in which changes of a fleet that leave its Ready alone become one write


@dataclass
class Context:
    """Shared by all reconcilers of one process."""

    kube: Kube
    engines: Engines
    store: Store
    settings: Settings
    enqueue: Callable[..., None]
    registry: Registry = field(default_factory=Registry)
    kit_files: Mapping[str, str] = field(default_factory=dict)
    _master_key: bytes | None = None
    _applied: dict[tuple[str, str, str], tuple[str, str]] = field(default_factory=dict)
    _passing: dict[Key, float] = field(default_factory=dict)
    _secrets: dict[tuple[str, str], tuple[float, float]] = field(default_factory=dict)
    budgets: dict[tuple[str, str], tuple[str, float]] = field(default_factory=dict)

    @cached_property
    def kit(self) -> str:
        """Hash of this operator's engine kit, which names it."""
        return kit_hash(self.kit_files)

    def now(self) -> datetime:
        """The time, for plans."""
        return datetime.now(UTC)

    def enqueue_all(self, keys: Iterable[Key]) -> None:
        """Put keys on the work queue."""
        for key in keys:
            self.enqueue(key)

    async def master_key(self) -> bytes:
        """The key that gate tokens are derived from: a Secret in the operator's namespace, made at first use."""
        if self._master_key is None:
            namespace = self.settings.operator_namespace
            try:
                secret = await self.kube.get(SECRETS, namespace, MASTER_KEY_SECRET)
            except NotFoundError:
                body = {
                    "apiVersion": "v1",
                    "kind": "Secret",
                    "metadata": {"name": MASTER_KEY_SECRET, "namespace": namespace},
                    "data": {"key": base64.b64encode(secrets.token_bytes(32)).decode()},
                }
                try:
                    secret = await self.kube.create(body)
                except ConflictError:
                    secret = await self.kube.get(SECRETS, namespace, MASTER_KEY_SECRET)
            self._master_key = base64.b64decode(secret["data"]["key"])
        return self._master_key

    async def credentials(self, namespace: str, name: str, key: str) -> Credentials | ReasonError:
        """The identity of a Secret, by its metadata alone; or why it can't be used."""
        try:
            secret = await self.kube.get_metadata(SECRETS, namespace, name)
        except NotFoundError:
            return _secret_missing(namespace, name)
        except ForbiddenError:
            return _secret_forbidden(namespace, name)
        return (namespace, name, key, secret["metadata"]["uid"])

    async def secret_values(self, credentials: Credentials) -> dict[str, bytes]:
        """What a Job may have of a Secret, by the names that it reads. Raises ReasonError; values go into a Job's Secret only."""
        namespace, name, key, uid = credentials
        try:
            secret = await self.kube.get(SECRETS, namespace, name)
        except NotFoundError:
            raise _secret_missing(namespace, name) from None
        except ForbiddenError:
            raise _secret_forbidden(namespace, name) from None
        if uid and secret["metadata"]["uid"] != uid:
            raise ReasonError(
                Reason.CREDENTIALS_NOT_FOUND, f"Secret {namespace}/{name} was replaced by another of the same name"
            )
        named = keys_of(key, [key for key, value in (secret.get("data") or {}).items() if value])
        return {file: _value(secret, key, f"{namespace}/{name}") for file, key in named.items()}

    async def write_status(self, resource: Resource, status: ApiModel) -> bool:
        """Write a status where it changed, then post an Event where Ready did. Returns whether it was written.

        What will probably be over in a moment is looked at again before it is told.
        """
        old: Any = resource.status  # type: ignore[attr-defined]
        kind, metadata = kind_of(resource), resource.metadata
        key = Key(kind, metadata.namespace, metadata.name)
        wait = self._hold_back(key, old, status)
        if status == old:
            return False
        if wait > 0:
            self.enqueue(key, after=wait)
            return False
        try:
            body = await self.kube.apply_status(
                kind.info.rt,
                metadata.namespace,
                metadata.name,
                status.to_wire(),
                uid=metadata.uid,
                resource_version=metadata.resource_version,
            )
        except (NotFoundError, ConflictError):
            self._passing.pop(key, None)
            return False  # it is gone, or another one by now: nothing of this one is to be said
        self.take(kind, body, seen=resource.metadata)
        before: StatusCondition | None = find(old.conditions, Condition.READY)
        after: StatusCondition | None = find(status.conditions, Condition.READY)  # type: ignore[attr-defined]
        if after is not None and (before is None or (before.status, before.reason) != (after.status, after.reason)):
            stalled = find(status.conditions, Condition.STALLED) is not None  # type: ignore[attr-defined]
            warning = after.status != "True" and (stalled or REASONS[reason_of(after.reason)].warns)
            await self.event(resource, warning=warning, reason=after.reason, message=after.message)
        return True

    async def event(self, resource: Resource, *, warning: bool, reason: str, message: str) -> None:
        """Post an Event about one of our objects."""
        metadata = resource.metadata
        about = {
            "apiVersion": API_VERSION,
            "kind": kind_of(resource).value,
            "name": metadata.name,
            "namespace": metadata.namespace,
            "uid": metadata.uid,
        }
        await self.kube.event(about, type="Warning" if warning else "Normal", reason=reason, message=message[:1000])

    def _hold_back(self, key: Key, old: Any, status: Any) -> float:
        """For how many seconds a status is not to be written yet.

        A fleet's status changes with every adapter, so changes that don't touch its Ready are gathered too: the worker that
        would write each of them is the one that updates the list.
        """
        passing = is_passing(status.conditions)
        ready = [is_true(conditions, Condition.READY) for conditions in (old.conditions, status.conditions)]
        same = ready[0] == ready[1] and old.observed_generation == status.observed_generation
        gathered = key.kind is Kind.VLLM_DEPLOYMENT and same and status != old
        if not passing and not gathered:
            self._passing.pop(key, None)
            return 0.0
        now = time.monotonic()
        longest = PASSING_SECONDS if passing else GATHER_SECONDS
        wait = self._passing.setdefault(key, now) + longest - now
        if wait <= 0 and not passing:
            del self._passing[key]
        return wait

    async def apply_child(self, obj: dict[str, Any], live: KubeObject | None) -> KubeObject:
        """Apply a child unless it is known to be as applied. `live` is what the store has of it."""
        place = (obj["kind"], obj["metadata"]["namespace"], obj["metadata"]["name"])
        digest = short_hash(obj, 32)
        known = self._applied.get(place)
        if known is not None and known[0] == digest and live is not None and known[1] == live.version:
            return live
        await self.refuse_foreign(obj, live)
        body = await self.kube.apply(obj)
        result = KubeObject.parse(body)
        self._applied[place] = (digest, result.version)
        self.store.upsert(Kind(obj["kind"]), body)  # no news for the owner, whose reconcile this is
        return result

    async def ensure_secret(self, obj: dict[str, Any], *, doubtful: bool = False) -> None:
        """Make sure that an immutable Secret of ours exists: Secrets are neither watched, read nor changed, so it is made again.

        That is tried hourly, and every 10 s while it is `doubtful`, when something does not work that would not without it.
        Its name stands for its content and can't be foreseen, so one that exists already is ours.
        """
        place = (obj["metadata"]["namespace"], obj["metadata"]["name"])
        now = time.monotonic()
        written, due = self._secrets.get(place, (0.0, 0.0))
        if now < due and not (doubtful and now - written > DOUBTED_SECRET_SECONDS):
            return
        with contextlib.suppress(AlreadyExistsError):
            await self.kube.create(obj)
        spread = random.uniform(0.75, 1.25)  # noqa: S311  spreads load
        self._secrets = {known: times for known, times in self._secrets.items() if times[1] > now} | {
            place: (now, now + SECRET_SECONDS * spread)
        }

    async def refuse_foreign(self, obj: dict[str, Any], live: KubeObject | None) -> None:
        """Raise ReasonError(NameTaken) where an object of that name exists that our object's owner does not control."""
        namespace, name = obj["metadata"]["namespace"], obj["metadata"]["name"]
        if live is None:
            try:
                live = KubeObject.parse(await self.kube.get(type_of(obj), namespace, name))
            except NotFoundError:
                return
        ours, owner = obj["metadata"]["ownerReferences"][0], live.owner
        if owner is not None and owner[:2] == (ours["kind"], ours["name"]) and owner.uid != ours["uid"]:
            raise ReasonError(
                Reason.PROGRESSING,
                f"{obj['kind']} {namespace}/{name} of an earlier {owner.kind} {owner.name} is being deleted",
            )
        if owner is None or owner.uid != ours["uid"]:
            raise ReasonError(
                Reason.NAME_TAKEN,
                f"{obj['kind']} {namespace}/{name} exists and is not this object's own: delete it, or choose another name",
            )

    def adopt_child(self, live: Workload) -> bool:
        """For a child that must not be re-applied for its own sake: whether it is as it was when first seen or last applied."""
        known = self._applied.setdefault((Kind.DEPLOYMENT, *live.key), ("", live.version))
        return known[1] == live.version

    def note_child(self, applied: Body) -> None:
        """Record the API server's answer to a write of a child that `adopt_child` judges."""
        live = Workload.parse(applied)
        self._applied[Kind.DEPLOYMENT, *live.key] = ("", live.version)
        self.take(Kind.DEPLOYMENT, applied)

    def take(self, kind: Kind, body: Body, *, seen: Metadata | None = None) -> None:
        """Put the API server's answer to a write into the store: the watch will say the same later, and then it is no news.

        `seen`: what the object's own reconcile went by, which has just written what it found. It needs no other look, unless
        the answer has somebody's change that came in between: no watch will tell of that any more.
        """
        change = self.store.upsert(kind, body)
        if change is not None:
            keys = keys_for(change, self.store)
            new = change.new.metadata if isinstance(change.new, Resource) else None
            is_echo = seen is not None and new is not None and _asked_for(new) == _asked_for(seen)
            self.enqueue_all(keys - {change.key} if is_echo else keys)


def _asked_for(metadata: Metadata) -> tuple[Any, ...]:
    """What others change of one of our objects; its generation stands for the spec."""
    return (
        metadata.uid,
        metadata.generation,
        metadata.labels,
        metadata.annotations,
        metadata.deletion_timestamp,
    )


def load_kit_files() -> dict[str, str]:
    """The engine kit's files by name, as shipped in this operator."""
    package = resources.files("lora_operator.engine_plugin")
    return {item.name: item.read_text() for item in package.iterdir() if item.name.endswith(".py")}


def _value(secret: Body, key: str, place: str) -> bytes:
    try:
        value = base64.b64decode((secret.get("data") or {}).get(key, ""), validate=True).strip()
    except binascii.Error:
        value = b""
    if not value:
        raise ReasonError(Reason.CREDENTIALS_KEY_MISSING, f"Secret {place} has no key {key}, or it is empty: add it")
    return value


def _secret_missing(namespace: str, name: str) -> ReasonError:
    return ReasonError(Reason.CREDENTIALS_NOT_FOUND, f"Secret {namespace}/{name} does not exist: create it")


def _secret_forbidden(namespace: str, name: str) -> ReasonError:
    return ReasonError(
        Reason.CREDENTIALS_FORBIDDEN,
        f"the operator may not get Secret {namespace}/{name}: bind a Role in {namespace} that allows it to the operator's "
        "service account, or add the namespace to the chart's secretNamespaces",
    )
