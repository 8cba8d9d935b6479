"""The download Job: what it is told, what it may do, and that no secret stands in it."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from lora_operator.api import ModelArtifact
from lora_operator.api.sources.source import Source
from lora_operator.desired.job import build_credentials_secret, build_job, build_request, credentials_secret
from lora_operator.desired.job_placement import JobPlacement
from lora_operator.names import MAX_SIZE, short_hash, token_secret
from lora_operator.wire.jobs import FETCH_REQUEST_ENV, FetchRequest
from tests.unit.builders import make_artifact, make_cache

TOKEN = b"hf_thisIsTheToken"
HOLDER = f"sql-0a1b2c3d4e-{short_hash('uid-claim')}"
RESOURCES = {"requests": {"cpu": "100m"}, "limits": {"memory": "2Gi"}}
SECRET = ("team-a", "hf", "token", "uid-secret")
NONCE = "0123456789abcdef"


def job_of(
    artifact: ModelArtifact | None = None, *, with_credentials: bool = False, attempt: int = 3, **security: Any
) -> dict[str, Any]:
    artifact = artifact or make_artifact()
    cache = make_cache(claim="models", security=security)
    request = build_request(artifact, cache, base_model_path="artifacts/base-1-abc", with_credentials=with_credentials)
    return build_job(
        artifact,
        cache,
        request,
        attempt=attempt,
        image="operator:1",
        image_pull_policy="IfNotPresent",
        deadline_seconds=600,
        resources=RESOURCES,
        nonce=NONCE,
    )


def container_of(job: dict[str, Any]) -> dict[str, Any]:
    (container,) = job["spec"]["template"]["spec"]["containers"]
    found: dict[str, Any] = container
    return found


def test_what_the_job_is_told() -> None:
    artifact = make_artifact(repo="org/sql", revision="v1", base="base-1", credentials=SECRET)
    request = build_request(artifact, make_cache(), base_model_path="artifacts/base-1-abc", with_credentials=True)
    assert json.loads(request.model_dump_json(by_alias=True, exclude_none=True)) == {
        "artifact": "sql-0a1b2c3d4e",
        "type": "Adapter",
        "source": {
            "kind": "huggingFace",
            "repo": "org/sql",
            "revision": "v1",
            "allowPatterns": [],
            "ignorePatterns": [],
            "endpoint": "https://hub.test",
        },
        "path": "",
        "cacheRoot": "/model-cache",
        "credentials": "/etc/lora-operator/credentials",
        "loadFormat": "auto",
        "trustRemoteCode": False,
        "pickledWeights": False,
        "offline": False,
        "withoutTokenizer": False,
        "limits": {"minFreeBytes": 0, "holder": HOLDER, "hintBytes": 0},
        "maxWorkers": 4,
        "owner": "uid-claim",
        "baseModelPath": "artifacts/base-1-abc",
    }


def test_what_a_job_is_told_of_s3() -> None:
    s3 = {"bucket": "models", "prefix": "team-a/sql", "endpoint": "https://s3.test", "region": "eu-central-1"}
    artifact = make_artifact(s3=s3, secret="keys", by_hand=True)
    request = build_request(artifact, make_cache(), base_model_path=None, with_credentials=True)
    assert json.loads(request.model_dump_json(by_alias=True, exclude_none=True)) == {
        "artifact": "sql-0a1b2c3d4e",
        "type": "Adapter",
        "source": {"kind": "s3", **s3, "allowPatterns": [], "ignorePatterns": []},
        "loadFormat": "auto",
        "trustRemoteCode": False,
        "pickledWeights": False,
        "offline": False,
        "withoutTokenizer": False,
        "limits": {"minFreeBytes": 0, "holder": HOLDER, "hintBytes": 0},
        "maxWorkers": 4,
        "owner": "uid-claim",
        "path": "",
        "cacheRoot": "/model-cache",
        "credentials": "/etc/lora-operator/credentials",
    }


def test_a_claim_is_mounted_to_be_read_and_nothing_else() -> None:
    artifact = make_artifact()
    claim = Source.model_validate({"persistentVolumeClaim": {"claimName": "trained", "path": "sql"}})
    artifact = artifact.model_copy(update={"spec": artifact.spec.model_copy(update={"source": claim})})
    job = job_of(artifact)
    told = json.loads(container_of(job)["env"][0]["value"])["source"]
    assert (told["claimName"], told["path"], told["mount"]) == ("trained", "sql", "/source")
    assert told["claimNamespace"] == artifact.metadata.namespace
    volumes = {v["name"]: v for v in job["spec"]["template"]["spec"]["volumes"]}
    assert volumes["source"]["persistentVolumeClaim"] == {"claimName": "trained", "readOnly": True}
    mounts = {m["name"]: m for m in container_of(job)["volumeMounts"]}
    assert mounts["source"] == {"name": "source", "mountPath": "/source", "readOnly": True}
    assert "source" not in {v["name"] for v in job_of()["spec"]["template"]["spec"]["volumes"]}


def test_without_a_secret_access_is_anonymous() -> None:
    job = job_of()
    request = json.loads(container_of(job)["env"][0]["value"])
    assert "tokenFile" not in request
    assert not job["spec"]["suspend"]
    assert "secret" not in json.dumps(job["spec"])


def test_a_job_with_a_token_waits_suspended_for_its_secret() -> None:
    job = job_of(with_credentials=True)
    assert job["spec"]["suspend"]
    volumes = {v["name"]: v for v in job["spec"]["template"]["spec"]["volumes"]}
    name = token_secret(job["metadata"]["name"], NONCE)
    assert volumes["credentials"]["secret"] == {"secretName": name, "defaultMode": 0o444}
    assert credentials_secret(job) == name
    assert credentials_secret(job_of()) is None
    mounts = {m["name"]: m for m in container_of(job)["volumeMounts"]}
    assert mounts["credentials"] == {
        "name": "credentials",
        "mountPath": "/etc/lora-operator/credentials",
        "readOnly": True,
    }


def test_no_secret_stands_in_a_job() -> None:
    artifact = make_artifact(credentials=SECRET)
    job = job_of(artifact, with_credentials=True)
    job["metadata"]["uid"] = "uid-job"
    secret = build_credentials_secret(artifact, job=job, name="x", values={"token": TOKEN})
    text = json.dumps(job)
    for form in (TOKEN.decode(), base64.b64encode(TOKEN).decode(), "uid-secret", "team-a"):
        assert form not in text
    assert base64.b64decode(secret["data"]["token"]) == TOKEN


def test_the_copy_of_the_token_goes_with_its_job() -> None:
    job = job_of(with_credentials=True)
    job["metadata"]["uid"] = "uid-job"
    secret = build_credentials_secret(make_artifact(), job=job, name="private-1-0123", values={"token": TOKEN})
    assert (secret["kind"], secret["type"], secret["immutable"]) == ("Secret", "Opaque", True)
    assert secret["metadata"]["name"] == "private-1-0123"
    assert secret["metadata"]["namespace"] == "serving"
    assert secret["metadata"]["ownerReferences"] == [
        {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "name": job["metadata"]["name"],
            "uid": "uid-job",
            "controller": True,
            "blockOwnerDeletion": False,
        }
    ]
    assert set(secret["data"]) == {"token"}


def test_a_job_goes_where_it_is_told_and_keeps_to_itself_otherwise() -> None:
    artifact, cache = make_artifact(), make_cache(access_modes=("ReadWriteOnce",))
    request = build_request(artifact, cache, base_model_path=None, with_credentials=False)
    placement = JobPlacement({"nodeSelector": {"zone": "b"}, "affinity": {"nodeAffinity": {"x": []}}}, "x")
    job = build_job(
        artifact,
        cache,
        request,
        attempt=1,
        image="operator:1",
        image_pull_policy="IfNotPresent",
        deadline_seconds=600,
        resources=RESOURCES,
        nonce=NONCE,
        placement=placement,
    )
    pod = job["spec"]["template"]
    assert pod["spec"]["nodeSelector"] == {"zone": "b"}
    assert set(pod["spec"]["affinity"]) == {"nodeAffinity", "podAffinity"}
    assert (
        pod["metadata"]["labels"].items()
        >= (job["metadata"]["labels"] | {"lora-operator.dev/modelcache": "default"}).items()
    )
    plain = job_of()["spec"]["template"]
    assert not {"nodeSelector", "affinity", "tolerations"} & set(plain["spec"])
    assert "lora-operator.dev/modelcache" not in plain["metadata"]["labels"]


def test_one_job_is_one_attempt() -> None:
    job = job_of(attempt=3)
    assert job["metadata"]["name"] == "sql-0a1b2c3d4e-3"
    assert job["metadata"]["annotations"] == {"lora-operator.dev/attempt": "3"}
    assert job["metadata"]["ownerReferences"] == [
        {
            "apiVersion": "lora-operator.dev/v1alpha1",
            "kind": "ModelArtifact",
            "name": "sql-0a1b2c3d4e",
            "uid": "uid-artifact",
            "controller": True,
            "blockOwnerDeletion": False,
        }
    ]
    spec = job["spec"]
    assert (spec["backoffLimit"], spec["completions"], spec["parallelism"]) == (0, 1, 1)
    assert spec["activeDeadlineSeconds"] == 600
    assert spec["template"]["spec"]["restartPolicy"] == "Never"
    assert spec["template"]["metadata"]["labels"].items() >= job["metadata"]["labels"].items()


def restricted_violations(pod: dict[str, Any]) -> list[str]:
    """What the `restricted` Pod Security Standard refuses of a pod's spec; its rules, in this product's words."""
    found = []
    for field in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.get(field):
            found.append(field)
    context = pod.get("securityContext", {})
    if context.get("runAsUser") == 0:
        found.append("runAsUser 0")
    for volume in pod.get("volumes", ()):
        allowed = {
            "configMap",
            "csi",
            "downwardAPI",
            "emptyDir",
            "ephemeral",
            "persistentVolumeClaim",
            "projected",
            "secret",
        }
        if not set(volume) - {"name"} <= allowed:
            found.append(f"volume {volume['name']}")
    for container in pod["containers"] + pod.get("initContainers", []):
        own = container.get("securityContext", {})
        merged = {k: v for k, v in context.items() if k in ("runAsNonRoot", "seccompProfile")} | own
        if own.get("privileged") or own.get("allowPrivilegeEscalation") is not False:
            found.append("allowPrivilegeEscalation")
        if own.get("capabilities", {}).get("drop") != ["ALL"] or own.get("capabilities", {}).get("add"):
            found.append("capabilities")
        if merged.get("runAsNonRoot") is not True:
            found.append("runAsNonRoot")
        if merged.get("seccompProfile", {}).get("type") not in ("RuntimeDefault", "Localhost"):
            found.append("seccompProfile")
        if any("hostPort" in port for port in container.get("ports", ())):
            found.append("hostPort")
    return found


@pytest.mark.parametrize("with_credentials", [False, True])
def test_a_job_passes_restricted_pod_security(with_credentials: bool) -> None:
    pod = job_of(with_credentials=with_credentials)["spec"]["template"]["spec"]
    assert restricted_violations(pod) == []
    assert restricted_violations({"containers": [{"name": "x"}], "hostNetwork": True}), (
        "the check itself finds something"
    )


def test_a_job_can_write_only_where_it_has_to() -> None:
    job = job_of(with_credentials=True)
    container = container_of(job)
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert {m["mountPath"] for m in container["volumeMounts"] if not m.get("readOnly")} == {"/model-cache", "/tmp"}
    volumes = {v["name"]: v for v in job["spec"]["template"]["spec"]["volumes"]}
    assert volumes["cache"]["persistentVolumeClaim"] == {"claimName": "models"}
    assert volumes["tmp"] == {"name": "tmp", "emptyDir": {}}


def test_a_job_has_no_access_to_the_api_server() -> None:
    pod = job_of()["spec"]["template"]["spec"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["enableServiceLinks"] is False
    assert "serviceAccountName" not in pod


def test_a_job_is_the_operators_own_program() -> None:
    container = container_of(job_of())
    assert (container["image"], container["imagePullPolicy"]) == ("operator:1", "IfNotPresent")
    assert container["args"] == ["fetch"]
    assert "command" not in container
    assert container["resources"] == RESOURCES
    assert container["terminationMessagePolicy"] == "FallbackToLogsOnError"


SECURITY: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "nothing is asked for": ({}, {}),
    "as the volume's owner needs": (
        {"runAsUser": 1000, "fsGroup": 0, "fsGroupChangePolicy": "OnRootMismatch", "supplementalGroups": [5, 6]},
        {"runAsUser": 1000, "fsGroup": 0, "fsGroupChangePolicy": "OnRootMismatch", "supplementalGroups": [5, 6]},
    ),
}


@pytest.mark.parametrize("case", SECURITY)
def test_the_caches_security_context(case: str) -> None:
    asked, given = SECURITY[case]
    context = job_of(**asked)["spec"]["template"]["spec"]["securityContext"]
    assert context == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}} | given


def expanded(value: str) -> str:
    """A value as the kubelet hands it to a container that has no variables to expand."""
    result, i = "", 0
    while i < len(value):
        if value.startswith("$$", i):
            result, i = result + "$", i + 2
        elif value.startswith("$(", i):
            end = value.find(")", i)
            assert end == -1, f"the kubelet would look for a variable: {value[i : end + 1]}"
            result, i = result + "$(", i + 2
        else:
            result, i = result + value[i], i + 1
    return result


def test_what_the_kubelet_would_expand_comes_through_as_it_is() -> None:
    artifact = make_artifact()
    source = artifact.spec.source.hugging_face
    assert source is not None
    odd = source.model_copy(update={"allow_patterns": ("$(HOME)/*", "$$x", "a$")})
    spec = artifact.spec.model_copy(update={"source": artifact.spec.source.model_copy(update={"hugging_face": odd})})
    job = job_of(artifact.model_copy(update={"spec": spec}))
    env = {e["name"]: e["value"] for e in container_of(job)["env"]}
    request = FetchRequest.model_validate_json(expanded(env[FETCH_REQUEST_ENV]))
    assert request.source.kind == "huggingFace"
    assert request.source.allow_patterns == ("$(HOME)/*", "$$x", "a$")


def test_a_cache_bounds_its_jobs() -> None:
    cache = make_cache(
        capacity="500Gi",
        minFree="10Gi",
        maxArtifactSize="100Gi",
        download={"maxWorkers": 8, "timeout": "1h30m"},
        jobTemplate={"resources": {"limits": {"memory": "1Gi"}}},
    )
    artifact = make_artifact()
    source = artifact.spec.source.model_copy(update={"size_hint": "7Gi"})
    artifact = artifact.model_copy(update={"spec": artifact.spec.model_copy(update={"source": source})})
    request = build_request(artifact, cache, base_model_path=None, with_credentials=False)
    assert request.max_workers == 8
    assert request.limits.model_dump() == {
        "max_artifact_bytes": 100 * 2**30,
        "capacity_bytes": 500 * 2**30,
        "min_free_bytes": 10 * 2**30,
        "holder": HOLDER,
        "hint_bytes": 7 * 2**30,
    }
    job = build_job(
        artifact,
        cache,
        request,
        attempt=1,
        image="operator:1",
        image_pull_policy="IfNotPresent",
        deadline_seconds=600,
        resources=RESOURCES,
        nonce=NONCE,
    )
    assert job["spec"]["activeDeadlineSeconds"] == 5400
    assert container_of(job)["resources"] == {"limits": {"memory": "1Gi"}}


@pytest.mark.parametrize("size", [-1, "1e100", "1e99999999999999"])
def test_sizes_that_were_stored_when_they_were_still_accepted_are_reckoned_with(size: int | str) -> None:
    bounded = 0 if size == -1 else MAX_SIZE
    archive = {"http": {"url": "https://models.test/a.tar", "sha256": "0" * 64, "maxSize": size}, "sizeHint": size}
    source = Source.model_validate(archive)
    artifact = make_artifact()
    artifact = artifact.model_copy(update={"spec": artifact.spec.model_copy(update={"source": source})})
    cache = make_cache(maxArtifactSize=size, capacity=size, minFree=size)
    request = build_request(artifact, cache, base_model_path=None, with_credentials=False)
    assert request.source.kind == "http"
    limits = request.limits
    assert {limits.max_artifact_bytes, limits.capacity_bytes, limits.min_free_bytes, limits.hint_bytes} == {bounded}
    assert request.source.max_bytes == bounded
