"""Jobs, Deployments and ReplicaSets as typed views. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

from lora_operator.kube.objects import (
    Body,
    KubeObject,
    ObjectCondition,
    conditions_of,
    mapping,
    number_of,
    parse_time,
    some_of,
)
from lora_operator.kube.pods import NO_SPEC, PodSpec

_MOST_LABELS: Final = 100  # that pods get


@dataclass(frozen=True, slots=True, kw_only=True)
class Job(KubeObject):
    """A Job."""

    is_suspended: bool = False
    deadline: int | None = None  # seconds
    started: datetime | None = None
    conditions: tuple[ObjectCondition, ...] = ()  # that are true

    @classmethod
    def _fields(cls, body: Body) -> dict[str, Any]:
        spec, status = mapping(body.get("spec")), mapping(body.get("status"))
        return super(Job, cls)._fields(body) | {
            "is_suspended": spec.get("suspend") is True,
            "deadline": number_of(spec.get("activeDeadlineSeconds")),
            "started": parse_time(status.get("startTime")),
            "conditions": tuple(one for one in conditions_of(status) if one.is_true),
        }

    def says(self, *types: str) -> ObjectCondition | None:
        """The condition of the first of these types that is true."""
        return next((one for type_ in types for one in self.conditions if one.type == type_), None)

    @property
    def says_ended(self) -> bool:
        """Whether it says that it is over. One whose node is lost does not: see plan.job_view.has_ended."""
        return self.says("Complete", "Failed") is not None

    @property
    def end_is_decided(self) -> bool:
        """Whether it will end whatever its pods still do."""
        return self.is_deleting or self.says("FailureTarget", "SuccessCriteriaMet") is not None

    @property
    def failure(self) -> ObjectCondition | None:
        """Why it fails or has failed."""
        return self.says("Failed", "FailureTarget")


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload(KubeObject):
    """An apps/v1 Deployment, or a ReplicaSet."""

    replicas: int = 1
    is_paused: bool = False
    template: PodSpec = NO_SPEC
    template_labels: Mapping[str, str] = field(default_factory=dict)
    observed_generation: int = 0
    updated_pods: int = 0
    pods: int = 0
    ready_pods: int = 0
    conditions: tuple[ObjectCondition, ...] = ()

    @classmethod
    def _fields(cls, body: Body) -> dict[str, Any]:
        spec, status = mapping(body.get("spec")), mapping(body.get("status"))
        template, replicas = mapping(spec.get("template")), number_of(spec.get("replicas"))
        labels = mapping(mapping(template.get("metadata")).get("labels"))
        return super(Workload, cls)._fields(body) | {
            "replicas": 1 if replicas is None else replicas,
            "is_paused": spec.get("paused") is True,
            "template": PodSpec.parse(template.get("spec")),
            "template_labels": some_of(labels, tuple(labels)[:_MOST_LABELS]),
            "observed_generation": number_of(status.get("observedGeneration")) or 0,
            "updated_pods": number_of(status.get("updatedReplicas")) or 0,
            "pods": number_of(status.get("replicas")) or 0,
            "ready_pods": number_of(status.get("readyReplicas")) or 0,
            "conditions": conditions_of(status),
        }

    def condition(self, type_: str) -> ObjectCondition:
        """The condition of that type; one that says nothing where there is none."""
        return next((one for one in self.conditions if one.type == type_), ObjectCondition(type_))
