"""Buckets that are read in an assumed role: by the keys of a Secret, or by the cache's service account.

Signatures, trust policies, external ids and the ends of keys are verified by the token service of the tests; what a role may read, by the
S3 service.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError

from e2e.fixtures.s3 import S3Server
from e2e.fixtures.sts import Role, Sts, StsServer
from lora_operator.constants import CACHE_MOUNT
from lora_operator.desired.job import build_request
from lora_operator.errors import ReasonError
from lora_operator.fetch.sources.s3.errors import S3Subject
from lora_operator.fetch.sources.s3.source import S3Keys, S3Source, build_client
from lora_operator.plan.wants import build_artifact
from lora_operator.wire.jobs import S3Request
from tests.component.fetch_support import Fetcher, Job
from tests.unit.builders import make_adapter, make_artifact, make_cache

TENANT = {"AWS_ACCESS_KEY_ID": "AKTENANTOFTHETESTS", "AWS_SECRET_ACCESS_KEY": "tenant-secret-of-the-tests"}
OTHER = {"AWS_ACCESS_KEY_ID": "AKOTHEROFTHETESTS", "AWS_SECRET_ACCESS_KEY": "other-secret-of-the-tests"}
READER = ("AKACCOUNTOFTHEROLE", "secret-of-the-roles-account")
NOBODY = ("AKACCOUNTWITHNOTHING", "secret-of-the-account-with-nothing")
ARN = "arn:aws:iam::123456789012:role/team-a/models"
CACHE = "arn:aws:iam::123456789012:role/cache"  # what the service account's token is good for
EXTERNAL = "external-id-of-team-a"
CONTENT = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]


@pytest.fixture(scope="module")
def service(content: Path) -> Iterator[S3Server]:
    with S3Server() as server:
        for account in (READER, NOBODY):
            server.add_account(*account)
        server.create_bucket("models", READER[0])
        server.upload("models", "base", content / "base")
        yield server


@pytest.fixture
def sts(service: S3Server) -> Sts:
    """The token service at S3's address: the tenant may assume a role that may read the bucket."""
    service.throttle(None)
    service.requests.clear()
    accounts = {keys["AWS_ACCESS_KEY_ID"]: keys["AWS_SECRET_ACCESS_KEY"] for keys in (TENANT, OTHER)}
    service.sts = Sts(accounts)
    service.sts.add_role(role())
    return service.sts


@pytest.fixture
def fetcher(tmp_path: Path) -> Fetcher:
    (tmp_path / "cache").mkdir()
    return Fetcher("", tmp_path / "cache", tmp_path / "jobs")


def role(**changes: Any) -> Role:
    return Role(**{"arn": ARN, "trusted": frozenset({TENANT["AWS_ACCESS_KEY_ID"]}), "acts_as": READER, **changes})


def asked_for(server: S3Server, *, sts_at: str | None = None, **assume: Any) -> dict[str, Any]:
    """What the operator tells a Job of a tenant's adapter that names the role."""
    own = [{"s3Endpoint": server.url, "address": sts_at}] if sts_at else []
    cache = make_cache(s3={"allowedEndpoints": [server.url], "stsEndpoints": own})
    s3 = {"bucket": "models", "prefix": "base", "endpoint": server.url, "assumeRole": {"arn": ARN, **assume}}
    source = make_adapter("sql", "team-a", secret="keys", s3=s3).spec.source
    manifest = build_artifact(
        cache=cache, source=source, base_artifact=None, credentials=("team-a", "keys", "AWS_*", "uid-of-the-secret")
    )
    artifact = make_artifact().model_validate({**manifest, "metadata": {**manifest["metadata"], "name": "sql-0123"}})
    request = build_request(artifact, cache, base_model_path=None, with_credentials=True)
    assert request.cache_root == CACHE_MOUNT
    told: dict[str, Any] = json.loads(request.model_dump_json(by_alias=True, exclude_none=True))
    return {"s3": told["source"]}


def run(fetcher: Fetcher, source: Mapping[str, Any], keys: Mapping[str, str] | None = TENANT, **options: Any) -> Job:
    """Runs a program to its end; nothing of the tenant's, of the role's session or of what it was asked with is shown by it."""
    return fetcher.launch(source, credentials=keys, type="BaseModel", **options).wait()


def shown(job: Job) -> str:
    return job.stdout + job.stderr + job.result.model_dump_json()


def assert_nothing_secret(job: Job, sts: Sts) -> None:
    told = shown(job)
    for session in sts.sessions.values():
        assert session.token not in told
        assert session.secret not in told
    for secret in (*sts.accounts.values(), EXTERNAL):
        assert secret not in told


def test_the_role_is_assumed_and_what_it_may_read_is_downloaded(service: S3Server, sts: Sts, fetcher: Fetcher) -> None:
    job = run(fetcher, asked_for(service, externalId=EXTERNAL))
    assert [file.path for file in fetcher.manifest(job.ok).files] == CONTENT
    (asked,) = sts.asked
    assert asked["RoleArn"] == ARN
    assert asked["RoleSessionName"] == "team-a@sql-0123"
    assert asked["ExternalId"] == EXTERNAL
    (session,) = sts.sessions.values()
    assert {request.token for request in service.requests} == {session.token}
    assert len(sts.used) == len(service.requests), "each request was let in by what was verified"
    assert_nothing_secret(job, sts)


def test_what_is_in_the_cache_does_not_depend_on_the_role_and_who_may_have_it_does(
    service: S3Server, sts: Sts, fetcher: Fetcher
) -> None:
    with_role = run(fetcher, asked_for(service), artifact="one").ok
    service.allow("models", READER[0], NOBODY[0])
    direct = {"s3": {"bucket": "models", "prefix": "base", "endpoint": service.url}}
    keys = dict(zip(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), READER, strict=True))
    sent = len(service.bodies("models"))
    without = run(fetcher, direct, keys, artifact="one").ok
    assert (without.digest, without.resolved_revision, without.path) == (
        with_role.digest,
        with_role.resolved_revision,
        with_role.path,
    )
    assert len(service.bodies("models")) == sent
    service.allow("models", READER[0])
    sts.add_role(role(acts_as=NOBODY))
    reason, message = run(fetcher, asked_for(service), artifact="two").failed
    assert reason == "Unauthorized"
    assert f"is denied to role {ARN}; allow it s3:ListBucket" in message
    assert not list(fetcher.cache.glob("artifacts/two-*"))


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], Mapping[str, str], str]] = {
    "a role that trusts somebody else": ({"trusted": frozenset({"AKSOMEBODY"})}, {}, TENANT, "does not let the keys"),
    "a role that is not there": ({}, {"arn": f"{ARN}-2"}, TENANT, "does not let the keys of the Secret assume"),
    "somebody else's keys": ({}, {}, OTHER, "does not let the keys of the Secret assume"),
    "a wrong external id": ({"external_id": EXTERNAL}, {"externalId": "not-it"}, TENANT, "the externalId"),
    "no external id": ({"external_id": EXTERNAL}, {}, TENANT, "the externalId"),
    "a wrong secret": ({}, {}, {**TENANT, "AWS_SECRET_ACCESS_KEY": "wrong-secret"}, "(SignatureDoesNotMatch"),
    "keys that nobody knows": ({}, {}, {**TENANT, "AWS_ACCESS_KEY_ID": "AKNOBODYS"}, "(InvalidClientTokenId"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_who_may_not_assume_the_role_gets_nothing(case: str, service: S3Server, sts: Sts, fetcher: Fetcher) -> None:
    policy, assume, keys, words = REFUSED[case]
    sts.add_role(role(**policy))
    job = run(fetcher, asked_for(service, **assume), keys)
    reason, message = job.failed
    assert (reason, words in message, ARN in message) == ("Unauthorized", True, True), message
    assert service.requests == [], "nothing is asked of S3 without the role"
    assert_nothing_secret(job, sts)


def test_keys_that_end_in_mid_download_are_renewed(service: S3Server, sts: Sts, fetcher: Fetcher) -> None:
    """The first keys are good for a moment, and the download takes longer."""
    sts.add_role(role(seconds=(3, 3600)))
    service.throttle(40 << 10)
    job = run(fetcher, asked_for(service), want={"maxWorkers": 1})
    assert job.ok.files == len(CONTENT)
    first = next(iter(sts.sessions.values()))
    assert first.end < datetime.now(UTC)
    assert sts.used[0] == first.access
    assert sts.used[-1] != first.access
    assert_nothing_secret(job, sts)
    old = S3Keys(first.access, first.secret, first.token)
    request = S3Request(bucket="models", endpoint=service.url)
    with pytest.raises(ClientError, match="ExpiredToken"):
        build_client(request, old, S3Subject.of(request, authenticated=True)).list_objects_v2(Bucket="models")


def test_another_address_of_the_token_service_is_the_caches_to_name(
    service: S3Server, sts: Sts, fetcher: Fetcher
) -> None:
    service.sts = Sts()  # S3's own address knows none of these roles
    with StsServer(sts) as elsewhere:
        service.sts.sessions = sts.sessions
        source = asked_for(service, sts_at=elsewhere.url)
        assert run(fetcher, source).ok.files == len(CONTENT)
        assert (len(sts.asked), service.sts.asked) == (1, [])
    reason, message = run(fetcher, source).failed
    assert (reason, f"STS at {elsewhere.url}, asked for role {ARN}" in message) == ("SourceUnreachable", True), message


def test_a_service_without_a_token_service_says_so(service: S3Server, sts: Sts, fetcher: Fetcher) -> None:
    """This answer is the S3 service's own."""
    service.sts = None
    reason, message = run(fetcher, asked_for(service)).failed
    assert reason == "SourceUnreachable"
    assert "unexpected answer 405 (MethodNotAllowed" in message
    assert "spec.s3.stsEndpoints" in message
    assert sts.asked == []


ANSWERS: dict[str, tuple[int, str, str, str]] = {
    "throttled": (400, "Throttling", "RateLimited", "wants fewer requests"),
    "broken": (500, "InternalFailure", "SourceUnreachable", "server error 500"),
    "not active in this region": (
        403,
        "RegionDisabledException",
        "Unauthorized",
        "activate it, or set source.s3.region",
    ),
    "no role to it": (400, "ValidationError", "Unauthorized", "correct source.s3.assumeRole"),
    "no clock": (400, "RequestExpired", "SourceUnreachable", "the clock of this Job's node"),
    "a web page": (200, "<html><p>log in", "SourceUnreachable", "does not answer like STS"),
    "other XML": (200, "<a><b/></a>", "SourceUnreachable", "does not answer like STS"),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_every_answer_has_its_reason(case: str, service: S3Server, sts: Sts) -> None:
    status, code, expected, words = ANSWERS[case]
    sts.answers = [(status, code)] * 9
    request = S3Request.model_validate(asked_for(service)["s3"])
    subject = S3Subject.of(request, authenticated=True)
    source = S3Source(request, build_client(request, S3Keys(*TENANT.values()), subject), subject)
    with pytest.raises(ReasonError) as raised:
        source.authorise()
    reason, message = raised.value.reason, raised.value.message
    assert (reason, words in message, ARN in message) == (expected, True, True), message


def test_a_short_failure_of_the_token_service_is_gone_over(service: S3Server, sts: Sts, fetcher: Fetcher) -> None:
    sts.answers = [(503, "ServiceUnavailable")]
    assert run(fetcher, asked_for(service)).ok.files == len(CONTENT)


# As whom


def ambient(sts_at: str, token: Path) -> dict[str, str]:
    """What EKS gives to pods of a service account, and what else a process could find."""
    return {
        **TENANT,
        "AWS_ROLE_ARN": CACHE,
        "AWS_WEB_IDENTITY_TOKEN_FILE": str(token),
        "AWS_ENDPOINT_URL_STS": sts_at,
        "AWS_EC2_METADATA_SERVICE_ENDPOINT": sts_at,
    }


def test_no_ambient_identity_assumes_a_role(service: S3Server, sts: Sts, fetcher: Fetcher, tmp_path: Path) -> None:
    """Without a Secret and without the cache's leave, the operator makes no such Job; and if it did, the Job would ask nobody."""
    (tmp_path / "token").write_text("token-of-the-service-account")
    source = asked_for(service)
    with StsServer(sts) as elsewhere:
        env = ambient(elsewhere.url, tmp_path / "token")
        reason, message = run(fetcher, source, None, env=env).failed
        assert (reason, f"nobody may assume role {ARN}" in message) == ("Unauthorized", True), message
        assert (sts.asked, service.requests) == ([], [])
        reason, _ = run(fetcher, source, OTHER, env=env).failed  # with a Secret it is the Secret that asks
        assert reason == "Unauthorized"
        assert [one["RoleArn"] for one in sts.asked] == [ARN]
        assert sts.sessions == {}


def test_the_caches_service_account_assumes_the_role(
    service: S3Server, sts: Sts, fetcher: Fetcher, tmp_path: Path
) -> None:
    """Its token is taken for an identity of its own first; that identity assumes the role."""
    (tmp_path / "token").write_text("token-of-the-service-account")
    (tmp_path / "other").write_text("token-of-somebody-else")
    sts.tokens["token-of-the-service-account"] = role(arn=CACHE, acts_as=NOBODY)
    sts.add_role(role(trusted=frozenset({CACHE})))
    allowed = {"workloadIdentity": "reader"}
    with StsServer(sts) as aws:
        env = ambient(aws.url, tmp_path / "token")
        job = run(fetcher, asked_for(service), None, env=env, want=allowed)
        assert job.ok.files == len(CONTENT)
        identity, taken = sts.sessions.values()
        assert identity.role.arn != taken.role.arn == ARN
        assert {request.token for request in service.requests} == {taken.token}
        assert_nothing_secret(job, sts)
        env["AWS_WEB_IDENTITY_TOKEN_FILE"] = str(tmp_path / "other")
        job = run(fetcher, asked_for(service), None, env=env, want=allowed)
        reason, message = job.failed
        assert (reason, "ServiceAccount reader" in message) == ("Unauthorized", True), message
        sts.roles.pop(ARN)
        env["AWS_WEB_IDENTITY_TOKEN_FILE"] = str(tmp_path / "token")
        reason, message = run(fetcher, asked_for(service), None, env=env, want=allowed).failed
        assert (reason, "does not let the identity of ServiceAccount reader" in message) == ("Unauthorized", True), (
            message
        )
        for word in ("token-of-the-service-account", "token-of-somebody-else"):
            assert word not in shown(job)
