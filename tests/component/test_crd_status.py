"""What the operator reports arrives: a full status of each kind survives the API server, and kubectl shows it."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from pydantic import BaseModel

from lora_operator.api.adapter import ArtifactRef, LoRAAdapterStatus, PodCounts, PodFailure, RefreshState
from lora_operator.api.artifact import Failure, ModelArtifactStatus
from lora_operator.api.cache import EvictionStatus, ModelCacheStatus, VolumeFigures
from lora_operator.api.common import ApiModel, StatusCondition
from lora_operator.api.deployment import PodState, VLLMDeploymentStatus
from lora_operator.api.progress import Progress
from lora_operator.conditions import MAX_MESSAGE
from lora_operator.constants import Condition, Reason
from tests.component.conftest import Kubectl
from tests.component.manifests import manifest

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
COMMIT = "0123456789abcdef0123456789abcdef01234567"
DIGEST = "sha256:" + "0" * 64


def condition(type_: Condition, reason: Reason, message: str = "as asked", status: str = "True") -> StatusCondition:
    return StatusCondition.model_validate(
        {
            "type": type_,
            "status": status,
            "reason": reason,
            "message": message,
            "lastTransitionTime": NOW,
            "observedGeneration": 3,
        }
    )


PROGRESS = Progress(
    phase="Downloading",
    bytes_done=12,
    bytes_total=128,
    percent=9,
    bytes_per_second=4,
    rate="4B/s",
    eta_seconds=29,
    eta="29s",
    time=NOW,
)
FULL: dict[str, ApiModel] = {
    "LoRAAdapter": LoRAAdapterStatus(
        conditions=(
            condition(Condition.ACCEPTED, Reason.ACCEPTED),
            condition(Condition.DOWNLOADED, Reason.DOWNLOADED, "x" * MAX_MESSAGE),
            condition(Condition.LOADED, Reason.LOADED),
            condition(Condition.READY, Reason.READY),
            condition(Condition.STALLED, Reason.UNAUTHORIZED, status="False"),
        ),
        observed_generation=3,
        served_name="team-a/sql",
        base_model_name="org/llama",
        url="http://llama.serving.svc:8000/v1",
        resolved_revision=COMMIT,
        revision=COMMIT[:8],
        digest=DIGEST,
        size_bytes=5 * 2**40,
        size="128Mi",
        rank=16,
        target_modules=("q_proj", "v_proj"),
        progress=PROGRESS,
        artifact_ref=ArtifactRef(name="sql-0123456789", namespace="serving"),
        refresh=RefreshState(requested="1", due=NOW, pending=NOW),
        ready_pods="2/2",
        pods=PodCounts(wanted=2, loaded=2),
        failures=tuple(PodFailure(pod=f"llama-{n}", message="y" * 1024) for n in range(5)),
    ),
    "VLLMDeployment": VLLMDeploymentStatus(
        conditions=(
            condition(Condition.MODEL_READY, Reason.MODEL_READY, "complete"),
            condition(Condition.AVAILABLE, Reason.AVAILABLE),
            condition(Condition.ADAPTERS_IN_SYNC, Reason.IN_SYNC),
            condition(Condition.READY, Reason.READY),
        ),
        observed_generation=3,
        replicas=2,
        ready_replicas=2,
        ready_pods="2/2",
        selector="a=b,c=d",
        url="http://llama.serving.svc:8000/v1",
        model_path="/model-cache/artifacts/llama-0123456789-01234567",
        model_artifact="llama-0123456789",
        tokenizer_artifact="tokenizer-0123456789",
        draft_model_artifact="draft-0123456789",
        refresh="1",
        list_generation=2**31,
        adapters=500,
        pods=tuple(
            PodState(
                name=f"llama-{n}",
                ready=True,
                list_generation=2**31,
                loaded=498,
                missing=("sql", "chat"),
                version="0.32.0",
            )
            for n in range(2)
        ),
        orphans=("llama-0/gone",),
    ),
    "ModelCache": ModelCacheStatus(
        conditions=(condition(Condition.READY, Reason.BOUND),),
        observed_generation=3,
        claim_name="models",
        claim_uid="0b1c2d3e-0000-0000-0000-000000000000",
        capacity="100Gi",
        access_modes=("ReadWriteMany",),
        artifacts=12,
        size="3.2Gi",
        volume=VolumeFigures(total_bytes=2**40, free_bytes=2**39, used_bytes=2**38, time=NOW, claim_capacity="1Ti"),
        used="256Gi",
        free="512Gi",
        reclaimable_bytes=2**37,
        reclaimable="128Gi",
        eviction=EvictionStatus(
            requested="now",
            attempt=7,
            running=False,
            time=NOW,
            views=2,
            freed="3Gi",
            message="2 sources were busy",
            lost_since=NOW,
        ),
    ),
    "ModelArtifact": ModelArtifactStatus(
        conditions=(condition(Condition.READY, Reason.DOWNLOADING, "12Mi of 128Mi (9%)", status="False"),),
        observed_generation=3,
        source="org/sql-lora",
        attempt=2,
        finished_attempt=1,
        failed_attempts=1,
        next_attempt_time=NOW,
        last_failure=Failure(
            attempt=1, reason="SourceUnreachable", message="z" * MAX_MESSAGE, time=NOW, needed_bytes=2**40
        ),
        credentials_version="123",
        unreferenced_since=NOW,
        resolved_revision=COMMIT,
        revision=COMMIT[:8],
        digest=DIGEST,
        size_bytes=5 * 2**40,
        size="128Mi",
        files=3,
        path="artifacts/sql-0123456789-01234567",
        rank=16,
        target_modules=("q_proj",),
        progress=PROGRESS,
    ),
}
LISTS = {
    "LoRAAdapter": "NAME BASE READY REVISION SIZE REASON AGE",
    "VLLMDeployment": "NAME READY ADAPTERS REASON MODEL AGE",
    "ModelCache": "NAME CLAIM CAPACITY ARTIFACTS SIZE USED FREE RECLAIMABLE REASON AGE",
    "ModelArtifact": "NAME TYPE SOURCE REVISION SIZE PERCENT RATE ETA UNUSED REASON AGE",
}
ROWS = {
    "LoRAAdapter": "example org/llama 2/2 01234567 128Mi Ready",
    "VLLMDeployment": "example 2/2 500 Ready complete",
    "ModelCache": "example models 100Gi 12 3.2Gi 256Gi 512Gi 128Gi Bound",
    "ModelArtifact": "example Adapter org/sql-lora 01234567 128Mi 9 4B/s 29s",
}


def unset(value: Any, path: str) -> list[str]:
    """Paths of fields that are None or empty, at any depth."""
    if isinstance(value, BaseModel):
        return [item for name in type(value).model_fields for item in unset(getattr(value, name), f"{path}.{name}")]
    if isinstance(value, tuple) and value:
        return [item for index, member in enumerate(value) for item in unset(member, f"{path}[{index}]")]
    return [path] if value is None or value == () else []


def write_status(kubectl: Kubectl, kind: str, namespace: str, status: dict[str, Any]) -> None:
    """Make the object, then write its status as the operator does, through the subresource; no field may be unknown."""
    assert kubectl.apply(manifest(kind, namespace=namespace)).ok
    applied = manifest(kind, namespace=namespace) | {"status": status}
    del applied["spec"]
    answer = kubectl.try_(
        "apply", "--server-side", "--subresource=status", "--field-manager=lora-operator", "-f", "-", manifest=applied
    )
    assert answer.ok, answer.error
    assert "unknown field" not in answer.error


@pytest.mark.parametrize("kind", FULL)
def test_a_full_status_comes_back_as_it_was_written(kind: str, kubectl: Kubectl, namespace: str) -> None:
    assert unset(FULL[kind], kind) == []
    written = FULL[kind].to_wire()

    write_status(kubectl, kind, namespace, written)

    stored = kubectl.read(f"{kind}/example", "-n", namespace)["status"]
    assert stored == written
    assert type(FULL[kind]).model_validate(stored) == FULL[kind]


@pytest.mark.parametrize("kind", FULL)
def test_kubectl_get_shows(kind: str, kubectl: Kubectl, namespace: str) -> None:
    write_status(kubectl, kind, namespace, FULL[kind].to_wire())
    header, row = kubectl("get", kind, "-n", namespace).splitlines()
    assert " ".join(header.split()) == LISTS[kind]
    assert " ".join(row.split()).startswith(ROWS[kind] + " ")


def test_kubectl_waits_for_ready(kubectl: Kubectl, namespace: str) -> None:
    write_status(kubectl, "LoRAAdapter", namespace, FULL["LoRAAdapter"].to_wire())
    kubectl("wait", "--for=condition=Ready", "lora", "--all", "-n", namespace, "--timeout=5s")


def test_a_status_of_no_field_at_all_is_accepted(kubectl: Kubectl, namespace: str) -> None:
    for kind, status in FULL.items():
        write_status(kubectl, kind, namespace, type(status)().to_wire())


def test_the_specs_generation_does_not_move_with_status(kubectl: Kubectl, namespace: str) -> None:
    write_status(kubectl, "LoRAAdapter", namespace, FULL["LoRAAdapter"].to_wire())
    assert kubectl.read("lora", "example", "-n", namespace)["metadata"]["generation"] == 1


def test_two_conditions_of_one_type_are_refused(kubectl: Kubectl, namespace: str) -> None:
    assert kubectl.apply(manifest("LoRAAdapter", namespace=namespace)).ok
    twice = [json.loads(condition(Condition.READY, Reason.READY).model_dump_json(by_alias=True))] * 2
    patch = json.dumps({"status": {"conditions": twice}})
    answer = kubectl.try_(
        "patch", "lora", "example", "-n", namespace, "--subresource=status", "--type=merge", "-p", patch
    )
    assert 'status.conditions[1]: Duplicate value: {"type":"Ready"}' in answer.error
