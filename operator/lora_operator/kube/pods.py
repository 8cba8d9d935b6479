"""Pods as typed views: where they run, what they mount, and what the kubelet says of their containers. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, NamedTuple, Self

from lora_operator.constants import ENGINE_CONTAINER
from lora_operator.kube.objects import (
    Body,
    KubeObject,
    ObjectCondition,
    conditions_of,
    mapping,
    number_of,
    objects_in,
    parse_time,
    text_of,
)
from lora_operator.wire.jobs import views_in

_ENDED: Final = ("Succeeded", "Failed")


class Ended(NamedTuple):
    """How a container has ended."""

    reason: str = ""
    message: str = ""
    exit_code: int | None = None


class ContainerStatus(NamedTuple):
    """What the kubelet says of one container."""

    name: str
    id: str = ""
    is_ready: bool = False
    restarts: int = 0
    is_running: bool = False
    started_at: str = ""  # as the API server writes it
    is_waiting: bool = False
    waiting_reason: str = ""
    waiting_message: str = ""
    ended: Ended | None = None  # where that is its state
    ended_before: Ended | None = None  # the container that this one was started after


@dataclass(frozen=True, slots=True)
class PodSpec:
    """What is read of a pod's spec, or of a template's."""

    node: str = ""
    engine_port: int | None = None
    config_maps: frozenset[str] = frozenset()  # that it mounts
    secrets: tuple[tuple[str, str], ...] = ()  # (volume, Secret)
    views: frozenset[str] = frozenset()  # names of the contents that it names anywhere

    @classmethod
    def parse(cls, spec: Any) -> Self:
        """The view of a spec, whatever its form."""
        volumes = list(objects_in(mapping(spec).get("volumes")))
        mounted = (text_of(mapping(volume.get("configMap")).get("name")) for volume in volumes)
        secrets = ((text_of(one.get("name")), text_of(mapping(one.get("secret")).get("secretName"))) for one in volumes)
        return cls(
            node=text_of(mapping(spec).get("nodeName")),
            engine_port=_engine_port(spec),
            config_maps=frozenset(name for name in mounted if name),
            secrets=tuple((volume, name) for volume, name in secrets if name),
            views=frozenset(views_in(json.dumps(spec))),
        )

    def secret_of(self, volume: str) -> str | None:
        """Name of the Secret that the volume is; None without such a volume."""
        return next((name for known, name in self.secrets if known == volume), None)


NO_SPEC: Final = PodSpec()


@dataclass(frozen=True, slots=True, kw_only=True)
class Pod(KubeObject):
    """A pod."""

    spec: PodSpec = NO_SPEC
    phase: str = ""
    reason: str = ""
    message: str = ""
    address: str | None = None
    started_at: str = ""  # when its kubelet took it, as the API server writes it
    started: datetime | None = None
    conditions: tuple[ObjectCondition, ...] = ()
    init_containers: tuple[ContainerStatus, ...] = ()
    containers: tuple[ContainerStatus, ...] = ()

    @classmethod
    def _fields(cls, body: Body) -> dict[str, Any]:
        status = mapping(body.get("status"))
        return super(Pod, cls)._fields(body) | {
            "spec": PodSpec.parse(body.get("spec")),
            "phase": text_of(status.get("phase")),
            "reason": text_of(status.get("reason")),
            "message": text_of(status.get("message")),
            "address": text_of(status.get("podIP")) or None,
            "started_at": text_of(status.get("startTime")),
            "started": parse_time(status.get("startTime")),
            "conditions": conditions_of(status),
            "init_containers": tuple(map(_container, objects_in(status.get("initContainerStatuses")))),
            "containers": tuple(map(_container, objects_in(status.get("containerStatuses")))),
        }

    @property
    def has_ended(self) -> bool:
        """Whether none of its containers will run again."""
        return self.phase in _ENDED

    @property
    def is_alive(self) -> bool:
        """Whether it is neither at its end nor being deleted."""
        return not self.is_deleting and not self.has_ended

    @property
    def is_ready(self) -> bool:
        """Whether Kubernetes sends requests to it."""
        return not self.is_deleting and self.condition("Ready").is_true

    def condition(self, type_: str) -> ObjectCondition:
        """The condition of that type; one that says nothing where there is none."""
        return next((one for one in self.conditions if one.type == type_), ObjectCondition(type_))

    def container(self, name: str) -> ContainerStatus:
        """The status of the container of that name; one that says nothing where there is none yet."""
        return next((one for one in self.containers if one.name == name), ContainerStatus(name))

    @property
    def running_engine(self) -> str | None:
        """The id of the engine container where it runs, else None."""
        engine = self.container(ENGINE_CONTAINER)
        return engine.id or None if engine.is_running else None


def _container(status: Mapping[str, Any]) -> ContainerStatus:
    state = mapping(status.get("state"))
    waiting = mapping(state.get("waiting"))
    return ContainerStatus(
        name=text_of(status.get("name")),
        id=text_of(status.get("containerID")),
        is_ready=status.get("ready") is True,
        restarts=number_of(status.get("restartCount")) or 0,
        is_running=isinstance(state.get("running"), Mapping),
        started_at=text_of(mapping(state.get("running")).get("startedAt")),
        is_waiting=isinstance(state.get("waiting"), Mapping),
        waiting_reason=text_of(waiting.get("reason")),
        waiting_message=text_of(waiting.get("message")),
        ended=_ended(state),
        ended_before=_ended(mapping(status.get("lastState"))),
    )


def _ended(state: Mapping[str, Any]) -> Ended | None:
    ended = state.get("terminated")
    if not isinstance(ended, Mapping):
        return None
    return Ended(text_of(ended.get("reason")), text_of(ended.get("message")), number_of(ended.get("exitCode")))


def _engine_port(spec: Any) -> int | None:
    """The port that this pod's engine listens on, which an older pod need not share with the present spec."""
    for container in objects_in(mapping(spec).get("containers")):
        if container.get("name") == ENGINE_CONTAINER:
            ports = (
                number_of(p.get("containerPort")) for p in objects_in(container.get("ports")) if p.get("name") == "http"
            )
            return next(ports, None)
    return None
