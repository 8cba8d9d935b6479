"""The API server of the unit tests, in memory: objects with their versions, the rights and refusals of the test's, and who is told.

It is the only one, so that whatever a reconciler is tested with behaves alike. What only a real one can show (schemas, CEL, field
managers) is in tests/component. Nothing awaits: a reconciler on it is a plain call.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from lora_operator.constants import API_VERSION
from lora_operator.errors import (
    AlreadyExistsError,
    ConflictError,
    ForbiddenError,
    KubeError,
    NotFoundError,
    UnavailableError,
)
from lora_operator.kube.kinds import ResourceType

Json = dict[str, Any]
Place = tuple[str, str, str]  # kind, namespace, name

_NUMBERED = {"LoRAAdapter", "VLLMDeployment", "ModelCache", "ModelArtifact", "Deployment"}  # specs have a generation


def place_of(obj: Mapping[str, Any]) -> Place:
    """Where an object is kept."""
    return obj["kind"], obj["metadata"].get("namespace") or "", obj["metadata"]["name"]


class FakeKube:
    """kube.client.Kube for the operator; `put`, `write` and `remove` are for whoever else changes objects.

    One counter gives all versions, as etcd's does. A write that changes nothing is none, and what an object controls goes with it.
    """

    def __init__(self, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._now = now
        self.objects: dict[Place, Json] = {}
        self.version = 0
        self.down = False
        self.secrets_forbidden = False
        # What is said to a verb on an object (create, apply, patch, apply_status, delete); None: it is done.
        self.refused: Callable[[str, Json], KubeError | None] = lambda _verb, _obj: None
        self.on_change: Callable[[str, Json, bool], None] = lambda _event, _body, _by_operator: None
        self.on_written: Callable[[], None] = lambda: None  # after a change by the operator, before it has the answer
        # What the operator has done.
        self.writes = 0
        self.created: list[Json] = []
        self.deleted: list[str] = []  # names, each with its propagation where that is not Background
        self.statuses: list[Json] = []
        self.events: list[str] = []  # reasons
        self.metadata_read: list[Place] = []

    # For the test

    def put(self, obj: Mapping[str, Any], kind: str = "") -> Json:
        """Has an object be there as it is, uid and generation included; only its version is new."""
        self.version += 1
        body: Json = ({"kind": kind, "apiVersion": API_VERSION} if kind else {}) | json.loads(json.dumps(obj))
        body["metadata"]["resourceVersion"] = str(self.version)
        self.objects[place_of(body)] = body
        return body

    def write(self, obj: Mapping[str, Any], *, by_operator: bool = False) -> Json:
        """Create or replace an object."""
        place, metadata = place_of(obj), dict(obj["metadata"])
        live = self.objects.get(place)
        body: Json = json.loads(json.dumps(obj))
        self.version += 1
        kept: Json = live["metadata"] if live else {"uid": f"uid-{self.version:05}", "creationTimestamp": self.stamp()}
        changed = live is None or live.get("spec") != body.get("spec")
        body["metadata"] = {**kept, **metadata, "uid": kept["uid"]}
        if "creationTimestamp" in kept:
            body["metadata"]["creationTimestamp"] = kept["creationTimestamp"]
        if body["kind"] in _NUMBERED:
            body["metadata"]["generation"] = kept.get("generation", 0) + (1 if changed else 0)
        body.setdefault("status", (live or {}).get("status", {}))
        if live is not None and _but_version(body) == _but_version(live):
            return live
        body["metadata"]["resourceVersion"] = str(self.version)
        self.objects[place] = body
        self.writes += by_operator
        self.on_change("MODIFIED", body, by_operator)
        return body

    def remove(self, place: Place, *, by_operator: bool = False) -> None:
        """Delete an object, and what it controls."""
        body = self.objects.pop(place, None)
        if body is None:
            return
        self.version += 1
        self.writes += by_operator
        body = body | {"metadata": body["metadata"] | {"resourceVersion": str(self.version)}}
        self.on_change("DELETED", body, by_operator)
        for other, child in list(self.objects.items()):
            if any(owner["uid"] == body["metadata"]["uid"] for owner in child["metadata"].get("ownerReferences", ())):
                self.remove(other)

    def stamp(self) -> str:
        """The time as the API server writes it: in whole seconds."""
        return self._now().replace(microsecond=0).isoformat().replace("+00:00", "Z")

    # For the operator

    async def get(self, rt: ResourceType, namespace: str, name: str) -> Json:
        """As Kube's."""
        self._must_be_up()
        try:
            return self.objects[rt.kind, namespace, name]
        except KeyError:
            raise NotFoundError(f"{rt.kind} {namespace}/{name}") from None

    async def get_metadata(self, rt: ResourceType, namespace: str, name: str) -> Json:
        """As Kube's; the rights to Secrets may be missing."""
        self.metadata_read.append((rt.kind, namespace, name))
        if rt.kind == "Secret" and self.secrets_forbidden:
            raise ForbiddenError("get secrets")
        return await self.get(rt, namespace, name)

    async def list(
        self, rt: ResourceType, *, namespace: str = "", label_selector: str = "", field_selector: str = ""
    ) -> tuple[list[Json], str]:
        """As Kube's, by labels that are equal; by fields nothing is found."""
        self._must_be_up()
        asked = [pair.partition("=") for pair in label_selector.split(",") if pair]
        found = [
            obj
            for (kind, where, _), obj in self.objects.items()
            if (kind, where) == (rt.kind, namespace or where) and not field_selector
            if all((obj["metadata"].get("labels") or {}).get(label) == value for label, _, value in asked)
        ]
        return found, str(self.version)

    async def pod_log(self, *_: Any, **__: Any) -> str:
        """No node has any."""
        raise KubeError("no log")

    async def create(self, obj: Json) -> Json:
        """As Kube's."""
        self._must_be_up()
        self._ask("create", obj)  # admission, quotas among it, comes before the name is looked at
        if place_of(obj) in self.objects:
            raise AlreadyExistsError("exists")
        self._ask("apply", obj)
        self.created.append(self._write(obj))
        return self.created[-1]

    async def apply(self, obj: Json) -> Json:
        """As Kube's, for one who owns all the fields but the status."""
        self._must_be_up()
        self._ask("apply", obj)
        return self._write(obj)

    async def patch(self, rt: ResourceType, namespace: str, name: str, patch: Json) -> Json:
        """As Kube's, one level deep."""
        live = await self.get(rt, namespace, name)
        self._ask("patch", live)
        return self._write(live | {field: live.get(field, {}) | change for field, change in patch.items()})

    async def apply_status(
        self,
        rt: ResourceType,
        namespace: str,
        name: str,
        status: Json,
        *,
        uid: str | None = None,
        resource_version: str | None = None,
    ) -> Json:
        """As Kube's."""
        live = await self.get(rt, namespace, name)
        if uid is not None and live["metadata"]["uid"] != uid:
            raise ConflictError("another object")
        self._ask("apply_status", live)
        self.statuses.append(status)
        return self._write(live | {"status": json.loads(json.dumps(status))})

    async def delete(
        self, rt: ResourceType, namespace: str, name: str, *, uid: str | None = None, propagation: str = "Background"
    ) -> None:
        """As Kube's."""
        self._must_be_up()
        self._ask("delete", {"kind": rt.kind, "metadata": {"namespace": namespace, "name": name}})
        self.deleted.append(name if propagation == "Background" else f"{name} {propagation}")
        live = self.objects.get((rt.kind, namespace, name))
        if live is not None and uid in (None, live["metadata"]["uid"]):
            self.remove((rt.kind, namespace, name), by_operator=True)
        self.on_written()

    async def event(self, *_: Any, reason: str, **__: Any) -> None:
        """Events are nothing to the operator."""
        self.events.append(reason)

    def _must_be_up(self) -> None:
        if self.down:
            raise UnavailableError("the API server is away")

    def _ask(self, verb: str, obj: Json) -> None:
        if (error := self.refused(verb, obj)) is not None:
            raise error

    def _write(self, obj: Json) -> Json:
        body = self.write(obj, by_operator=True)
        self.on_written()
        return body


def _but_version(body: Json) -> Json:
    return body | {"metadata": body["metadata"] | {"resourceVersion": ""}}
