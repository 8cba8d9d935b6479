"""The steps of I/O that several reconcilers share: writing a status, applying what a deployment owns, reading Secrets."""

from __future__ import annotations

import base64
import binascii
import contextlib
import random
import secrets
from collections.abc import Callable
from typing import Any, Final

from lora_operator.api.common import ApiModel, Metadata, Resource, StatusCondition
from lora_operator.conditions import find, is_passing, is_true, reason_of
from lora_operator.constants import API_VERSION, REASONS, Condition, Reason
from lora_operator.errors import AlreadyExistsError, ConflictError, ForbiddenError, NotFoundError, ReasonError
from lora_operator.kube.client import Kube
from lora_operator.kube.kinds import SECRETS, Kind, kind_of, type_of
from lora_operator.kube.objects import KubeObject
from lora_operator.kube.workloads import Workload
from lora_operator.names import short_hash
from lora_operator.plan.wants import Credentials
from lora_operator.reconcile.clock import Clock
from lora_operator.reconcile.records import Records
from lora_operator.reconcile.routing import keys_for
from lora_operator.reconcile.store import Body, Key, ObjectKey, Store
from lora_operator.source_kinds import keys_of

MASTER_KEY_SECRET: Final = "lora-operator-key"  # noqa: S105  a name
SECRET_SECONDS: Final = 3600.0  # between looks for a Secret that nothing makes doubtful, give or take a quarter
DOUBTED_SECRET_SECONDS: Final = 10.0
PASSING_SECONDS: Final = 1.0  # a load takes some 50 ms: what is over so soon is not worth two writes and two Events
GATHER_SECONDS: Final = 0.3  # in which changes of a fleet that leave its Ready alone become one write


class Answers:
    """Takes the API server's answers to our own writes into the store."""

    def __init__(self, store: Store, enqueue: Callable[..., None]) -> None:
        self._store = store
        self._enqueue = enqueue

    def take(self, kind: Kind, body: Body, *, seen: Metadata | None = None) -> None:
        """Put the API server's answer to a write into the store: the watch will say the same later, and then it is no news.

        `seen`: what the object's own reconcile went by, which has just written what it found. It needs no other look, unless
        the answer has somebody's change that came in between: no watch will tell of that any more.
        """
        change = self._store.upsert(kind, body)
        if change is not None:
            keys = keys_for(change, self._store)
            new = change.new.metadata if isinstance(change.new, Resource) else None
            is_echo = seen is not None and new is not None and _asked_for(new) == _asked_for(seen)
            for key in keys - {change.key} if is_echo else keys:
                self._enqueue(key)


class StatusWriter:
    """Writes statuses, and posts the Events that go with them."""

    def __init__(
        self, kube: Kube, records: Records, clock: Clock, answers: Answers, enqueue: Callable[..., None]
    ) -> None:
        self._kube = kube
        self._records = records
        self._clock = clock
        self._answers = answers
        self._enqueue = enqueue

    async def write(self, resource: Resource, status: ApiModel) -> bool:
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
            self._enqueue(key, after=wait)
            return False
        try:
            body = await self._kube.apply_status(
                kind.info.rt,
                metadata.namespace,
                metadata.name,
                status.to_wire(),
                uid=metadata.uid,
                resource_version=metadata.resource_version,
            )
        except (NotFoundError, ConflictError):
            self._records.own(key).held_back_since = None
            return False  # it is gone, or another one by now: nothing of this one is to be said
        self._answers.take(kind, body, seen=resource.metadata)
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
        await self._kube.event(about, type="Warning" if warning else "Normal", reason=reason, message=message[:1000])

    def _hold_back(self, key: Key, old: Any, status: Any) -> float:
        """For how many seconds a status is not to be written yet.

        A fleet's status changes with every adapter, so changes that don't touch its Ready are gathered too: the worker that
        would write each of them is the one that updates the list.
        """
        passing = is_passing(status.conditions)
        ready = [is_true(conditions, Condition.READY) for conditions in (old.conditions, status.conditions)]
        same = ready[0] == ready[1] and old.observed_generation == status.observed_generation
        gathered = key.kind is Kind.VLLM_DEPLOYMENT and same and status != old
        record = self._records.own(key)
        if not passing and not gathered:
            record.held_back_since = None
            return 0.0
        now = self._clock.monotonic()
        longest = PASSING_SECONDS if passing else GATHER_SECONDS
        since = now if record.held_back_since is None else record.held_back_since
        wait = since + longest - now
        record.held_back_since = None if wait <= 0 and not passing else since
        return wait


class ChildApplier:
    """Applies what a VLLMDeployment owns, and remembers it in the deployment's record."""

    def __init__(self, kube: Kube, store: Store, records: Records, clock: Clock, answers: Answers) -> None:
        self._kube = kube
        self._store = store
        self._records = records
        self._clock = clock
        self._answers = answers

    async def apply(self, obj: dict[str, Any], live: KubeObject | None) -> KubeObject:
        """Apply a child unless it is known to be as applied. `live` is what the store has of it."""
        place, digest = (obj["kind"], obj["metadata"]["name"]), short_hash(obj, 32)
        children = self._records.deployments[_owner(obj)].children
        known = children.get(place)
        if known is not None and known[0] == digest and live is not None and known[1] == live.version:
            return live
        await self.refuse_foreign(obj, live)
        body = await self._kube.apply(obj)
        result = KubeObject.parse(body)
        children[place] = (digest, result.version)
        self._store.upsert(Kind(obj["kind"]), body)  # no news for the owner, whose reconcile this is
        return result

    async def ensure_secret(self, obj: dict[str, Any], *, doubtful: bool = False) -> None:
        """Make sure that an immutable Secret of ours exists: Secrets are neither watched, read nor changed, so it is made again.

        That is tried hourly, and every 10 s while it is `doubtful`, when something does not work that would not without it.
        Its name stands for its content and can't be foreseen, so one that exists already is ours.
        """
        name, record, now = obj["metadata"]["name"], self._records.deployments[_owner(obj)], self._clock.monotonic()
        written, due = record.secrets.get(name, (0.0, 0.0))
        if now < due and not (doubtful and now - written > DOUBTED_SECRET_SECONDS):
            return
        with contextlib.suppress(AlreadyExistsError):
            await self._kube.create(obj)
        spread = random.uniform(0.75, 1.25)  # noqa: S311  spreads load
        record.secrets = {known: times for known, times in record.secrets.items() if times[1] > now} | {
            name: (now, now + SECRET_SECONDS * spread)
        }

    async def refuse_foreign(self, obj: dict[str, Any], live: KubeObject | None) -> None:
        """Raise ReasonError(NameTaken) where an object of that name exists that our object's owner does not control."""
        namespace, name = obj["metadata"]["namespace"], obj["metadata"]["name"]
        if live is None:
            try:
                live = KubeObject.parse(await self._kube.get(type_of(obj), namespace, name))
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

    def adopt(self, deployment: ObjectKey, live: Workload) -> bool:
        """For a child that must not be re-applied for its own sake: whether it is as it was when first seen or last applied."""
        children = self._records.deployments[deployment].children
        known = children.setdefault((Kind.DEPLOYMENT, live.name), ("", live.version))
        return known[1] == live.version

    def note(self, deployment: ObjectKey, applied: Body) -> None:
        """Record the API server's answer to a write of a child that `adopt` judges."""
        children = self._records.deployments[deployment].children
        live = Workload.parse(applied)
        children[Kind.DEPLOYMENT, live.name] = ("", live.version)
        self._answers.take(Kind.DEPLOYMENT, applied)


class SecretReader:
    """Reads Secrets: the operator's own key, and the credentials that specs name. No value is kept but the key's."""

    def __init__(self, kube: Kube, operator_namespace: str, *, master_key: bytes | None = None) -> None:
        self._kube = kube
        self._namespace = operator_namespace
        self._master_key = master_key

    async def master_key(self) -> bytes:
        """The key that gate tokens are derived from: a Secret in the operator's namespace, made at first use."""
        if self._master_key is None:
            namespace = self._namespace
            try:
                secret = await self._kube.get(SECRETS, namespace, MASTER_KEY_SECRET)
            except NotFoundError:
                body = {
                    "apiVersion": "v1",
                    "kind": "Secret",
                    "metadata": {"name": MASTER_KEY_SECRET, "namespace": namespace},
                    "data": {"key": base64.b64encode(secrets.token_bytes(32)).decode()},
                }
                try:
                    secret = await self._kube.create(body)
                except ConflictError:
                    secret = await self._kube.get(SECRETS, namespace, MASTER_KEY_SECRET)
            self._master_key = base64.b64decode(secret["data"]["key"])
        return self._master_key

    async def credentials(self, namespace: str, name: str, key: str) -> Credentials | ReasonError:
        """The identity of a Secret, by its metadata alone; or why it can't be used."""
        try:
            secret = await self._kube.get_metadata(SECRETS, namespace, name)
        except NotFoundError:
            return _secret_missing(namespace, name)
        except ForbiddenError:
            return _secret_forbidden(namespace, name)
        return (namespace, name, key, secret["metadata"]["uid"])

    async def values(self, credentials: Credentials) -> dict[str, bytes]:
        """What a Job may have of a Secret, by the names that it reads. Raises ReasonError; values go into a Job's Secret only."""
        namespace, name, key, uid = credentials
        try:
            secret = await self._kube.get(SECRETS, namespace, name)
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


def _owner(obj: Body) -> ObjectKey:
    """The deployment that one of our manifests is for."""
    return (obj["metadata"]["namespace"], obj["metadata"]["ownerReferences"][0]["name"])


def _asked_for(metadata: Metadata) -> tuple[Any, ...]:
    """What others change of one of our objects; its generation stands for the spec."""
    return (
        metadata.uid,
        metadata.generation,
        metadata.labels,
        metadata.annotations,
        metadata.deletion_timestamp,
    )


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
