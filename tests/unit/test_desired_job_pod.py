"""As whom a Job's pod runs, through which network, and what the cache adds to it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lora_operator.api import ModelCache
from lora_operator.api.sources.source import Source
from lora_operator.desired.evict_job import build_evict_job
from lora_operator.desired.job import build_job, build_request
from lora_operator.desired.job_placement import JobPlacement
from lora_operator.plan.source_policy import workload_identity
from lora_operator.wire.jobs import EvictRequest
from tests.unit.builders import make_artifact, make_cache

RESOURCES = {"limits": {"memory": "2Gi"}}
IDENTITY = {"serviceAccountName": "reader", "allowedSources": ["s3://models/team-a/*"]}


def pod_of(cache: ModelCache, *, identity: str | None = None, placed: dict[str, Any] | None = None) -> dict[str, Any]:
    """The Job's pod template."""
    artifact = make_artifact()
    request = build_request(artifact, cache, base_model_path=None, with_credentials=False, workload_identity=identity)
    job = build_job(
        artifact,
        cache,
        request,
        attempt=1,
        image="operator:1",
        image_pull_policy="Never",
        deadline_seconds=60,
        resources=RESOURCES,
        nonce="",
        placement=JobPlacement(placed or {}),
    )
    template: dict[str, Any] = job["spec"]["template"]
    assert job["metadata"]["labels"].items() <= template["metadata"]["labels"].items()
    return template


def env_of(template: dict[str, Any]) -> dict[str, str]:
    (container,) = template["spec"]["containers"]
    return {one["name"]: one["value"] for one in container["env"]}


ALLOWED: dict[str, tuple[tuple[str, ...], dict[str, Any], bool]] = {
    "a folder below": (("s3://models/team-a/*",), {"bucket": "models", "prefix": "team-a/sql"}, True),
    "the folder itself": (("s3://models/team-a/*",), {"bucket": "models", "prefix": "team-a"}, True),
    "the folder, however it is written": (("s3://models/team-a/*",), {"bucket": "models", "prefix": "team-a/"}, True),
    "a name that begins the same": (("s3://models/team-a/*",), {"bucket": "models", "prefix": "team-ab"}, False),
    "the folder above": (("s3://models/team-a/*",), {"bucket": "models", "prefix": ""}, False),
    "the whole bucket": (("s3://models",), {"bucket": "models"}, True),
    "another bucket": (("s3://models/*",), {"bucket": "models2", "prefix": "x"}, False),
    "the second of two": (("s3://a/*", "s3://models/*"), {"bucket": "models", "prefix": "x"}, True),
    "another service's bucket of the same name": (
        ("s3://*",),
        {"bucket": "models", "prefix": "x", "endpoint": "https://s3.test"},
        False,
    ),
    "a service that is named": (
        ("https://s3.test/models/*",),
        {"bucket": "models", "prefix": "x", "endpoint": "https://s3.test"},
        True,
    ),
    "one whose name goes on": (
        ("https://s3.test/models/*",),
        {"bucket": "models", "prefix": "x", "endpoint": "https://s3.test.evil.example"},
        False,
    ),
}


@pytest.mark.parametrize("sentence", ALLOWED)
def test_the_identity_is_for_sources_that_were_allowed(sentence: str) -> None:
    patterns, s3, allowed = ALLOWED[sentence]
    cache = make_cache(workloadIdentity={**IDENTITY, "allowedSources": list(patterns)})
    source = Source.model_validate({"s3": s3})
    assert workload_identity(source, cache, with_credentials=False) == ("reader" if allowed else None)
    assert workload_identity(source, cache, with_credentials=True) is None, "a Secret that is named is what is used"
    assert workload_identity(source, make_cache(), with_credentials=False) is None


def test_the_identity_is_not_for_the_hub() -> None:
    cache = make_cache(workloadIdentity={**IDENTITY, "allowedSources": ["https://*", "s3://*"]})
    source = Source.model_validate({"huggingFace": {"repo": "org/sql"}})
    assert workload_identity(source, cache, with_credentials=False) is None


def test_a_job_runs_as_the_service_account_only_where_it_is_told_to() -> None:
    cache = make_cache(workloadIdentity=IDENTITY)
    assert "serviceAccountName" not in pod_of(cache)["spec"]
    spec = pod_of(cache, identity="reader")["spec"]
    assert (spec["serviceAccountName"], spec["automountServiceAccountToken"]) == ("reader", False)
    assert not [volume for volume in spec["volumes"] if volume["name"] == "identity"]


def test_a_token_for_aws_where_the_cluster_gives_none_by_itself() -> None:
    role = "arn:aws:iam::123456789012:role/models"
    template = pod_of(make_cache(workloadIdentity={**IDENTITY, "awsRoleArn": role}), identity="reader")
    (volume,) = [volume for volume in template["spec"]["volumes"] if volume["name"] == "identity"]
    (source,) = volume["projected"]["sources"]
    assert source["serviceAccountToken"]["audience"] == "sts.amazonaws.com"
    (container,) = template["spec"]["containers"]
    (mount,) = [mount for mount in container["volumeMounts"] if mount["name"] == "identity"]
    env = env_of(template)
    assert env["AWS_ROLE_ARN"] == role
    assert env["AWS_WEB_IDENTITY_TOKEN_FILE"] == f"{mount['mountPath']}/token"
    assert mount["readOnly"]
    assert "AWS_ROLE_ARN" not in env_of(pod_of(make_cache(workloadIdentity={**IDENTITY, "awsRoleArn": role})))


def test_proxies_and_authorities() -> None:
    network = {
        "httpProxy": "http://proxy.corp.test:3128",
        "httpsProxy": "http://proxy.corp.test:3129",
        "noProxy": [".corp.test", "10.0.0.0/8"],
        "caBundle": {"name": "corp-ca", "key": "bundle.pem"},
    }
    template = pod_of(make_cache(network=network))
    env = env_of(template)
    for name, value in {
        "HTTP_PROXY": "http://proxy.corp.test:3128",
        "HTTPS_PROXY": "http://proxy.corp.test:3129",
        "NO_PROXY": ".corp.test,10.0.0.0/8",
    }.items():
        assert env[name] == env[name.lower()] == value
    (volume,) = [volume for volume in template["spec"]["volumes"] if volume["name"] == "ca"]
    assert volume["configMap"] == {"name": "corp-ca", "items": [{"key": "bundle.pem", "path": "ca.crt"}]}
    (container,) = template["spec"]["containers"]
    (mount,) = [mount for mount in container["volumeMounts"] if mount["name"] == "ca"]
    assert json.loads(env["LORA_OPERATOR_FETCH"])["caBundle"] == f"{mount['mountPath']}/ca.crt"
    assert set(env_of(pod_of(make_cache()))) == {"LORA_OPERATOR_FETCH", "HOME"}


def test_no_sidecar_comes_into_a_job_unless_the_cache_says_so() -> None:
    metadata = pod_of(make_cache())["metadata"]
    assert metadata["labels"]["sidecar.istio.io/inject"] == "false"
    assert metadata["labels"]["istio.io/dataplane-mode"] == "none"
    assert metadata["annotations"] == {"sidecar.istio.io/inject": "false", "linkerd.io/inject": "disabled"}
    wanted = {"annotations": {"linkerd.io/inject": "enabled", "team": "ml"}, "labels": {"cost": "ml"}}
    metadata = pod_of(make_cache(jobTemplate=wanted))["metadata"]
    assert metadata["annotations"]["linkerd.io/inject"] == "enabled"
    assert (metadata["annotations"]["team"], metadata["labels"]["cost"]) == ("ml", "ml")


def test_what_the_cache_adds_to_the_pods() -> None:
    toleration = {"key": "batch", "operator": "Exists"}
    wanted = {
        "imagePullSecrets": [{"name": "registry"}],
        "nodeSelector": {"pool": "batch"},
        "tolerations": [toleration],
        "resources": {"limits": {"memory": "4Gi"}},
    }
    placed = {"nodeSelector": {"zone": "b"}, "tolerations": [{"key": "gpu"}]}
    spec = pod_of(make_cache(jobTemplate=wanted), placed=placed)["spec"]
    assert spec["imagePullSecrets"] == [{"name": "registry"}]
    assert spec["nodeSelector"] == {"zone": "b", "pool": "batch"}
    assert spec["tolerations"] == [{"key": "gpu"}, toleration]
    assert spec["containers"][0]["resources"] == {"limits": {"memory": "4Gi"}}
    plain = pod_of(make_cache())["spec"]
    assert not {"imagePullSecrets", "nodeSelector", "tolerations"} & set(plain)
    assert plain["containers"][0]["resources"] == RESOURCES


def test_evictions_run_where_downloads_do_and_need_no_network() -> None:
    wanted = {
        "nodeSelector": {"zone": "a"},
        "imagePullSecrets": [{"name": "pull"}],
        "resources": {"limits": {"cpu": "1"}},
    }
    cache = make_cache(jobTemplate=wanted, network={"httpsProxy": "http://p.test:1", "caBundle": {"name": "ca"}})
    job = build_evict_job(
        cache,
        EvictRequest(cache_root="/model-cache"),
        attempt=1,
        requested=None,
        image="operator:1",
        image_pull_policy="Never",
        resources=RESOURCES,
        placement=JobPlacement({}),
    )
    template = job["spec"]["template"]
    (container,) = template["spec"]["containers"]
    assert template["spec"]["nodeSelector"] == {"zone": "a"}
    assert template["spec"]["imagePullSecrets"] == [{"name": "pull"}]
    assert container["resources"] == {"limits": {"cpu": "1"}}
    assert template["metadata"]["annotations"]["linkerd.io/inject"] == "disabled"
    assert {volume["name"] for volume in template["spec"]["volumes"]} == {"cache", "tmp"}
    assert not any("PROXY" in name for name in env_of(template))
