"""Roles that sources are read in: who may have one assumed, what that makes of a want, what Jobs are told, and which STS is asked."""

from __future__ import annotations

import re
from typing import Any

import pytest
from botocore.awsrequest import AWSPreparedRequest
from botocore.exceptions import EndpointConnectionError
from botocore.httpsession import URLLib3Session
from hypothesis import given
from hypothesis import strategies as st

from lora_operator.api import ModelArtifact, ModelCache
from lora_operator.api.sources.source import Source
from lora_operator.desired.job import build_request
from lora_operator.errors import ReasonError
from lora_operator.fetch.sources.s3.errors import S3Subject
from lora_operator.fetch.sources.s3.source import S3Keys, S3Source, build_client
from lora_operator.names import session_name
from lora_operator.plan.artifact import ArtifactObservation, plan_artifact
from lora_operator.plan.source_policy import source_refused
from lora_operator.plan.wants import Credentials, build_artifact
from lora_operator.wire.jobs import RoleRequest, S3Request
from tests.unit.builders import NOW, make_artifact, make_cache, ready

ROLE = "arn:aws:iam::123456789012:role/team-a/models"
OTHER_ROLE = "arn:aws:iam::210987654321:role/models"
SECRET: dict[str, Any] = {"credentialsSecretRef": {"name": "keys"}}
CREDENTIALS: Credentials = ("team-a", "keys", "AWS_*", "uid-of-the-secret")


def s3(role: str | None = ROLE, *, external: str | None = None, **more: Any) -> Source:
    given: dict[str, Any] = {"bucket": "models", "prefix": "team-a/sql", **more}
    if role is not None:
        given["assumeRole"] = {"arn": role} | ({"externalId": external} if external else {})
    return Source.model_validate({"s3": given})


def lending(*namespaces: str, sources: tuple[str, ...] = ("s3://models/*",), **more: Any) -> ModelCache:
    """A cache whose service account may assume the role for these namespaces."""
    identity = {
        "serviceAccountName": "reader",
        "allowedSources": list(sources),
        "allowedRoles": [{"arn": ROLE, "namespaces": list(namespaces)}],
    }
    return make_cache(workloadIdentity=identity, **more)


# cache, source, namespace of the object → words of the refusal, None where it is allowed
ASKED: dict[str, tuple[ModelCache, Source, str, str | None]] = {
    "a Secret of its own, whatever the cache lends": (make_cache(), s3(**SECRET), "team-a", None),
    "a Secret of its own and a role that is on no list": (lending(), s3(OTHER_ROLE, **SECRET), "team-b", None),
    "nobody to assume it": (make_cache(), s3(), "team-a", "set source.s3.credentialsSecretRef"),
    "nobody to assume it, in the cache's own namespace": (
        make_cache(),
        s3(),
        "serving",
        f"nobody may assume role {ROLE}",
    ),
    "a source that is not lent the identity": (
        lending("*", sources=("s3://other/*",)),
        s3(),
        "team-a",
        "allowedSources",
    ),
    "another service's bucket of that name": (
        lending("*", s3_endpoints=("https://s3.test",)),
        s3(endpoint="https://s3.test"),
        "team-a",
        "allowedSources",
    ),
    "its namespace is listed": (lending("team-b", "team-a"), s3(), "team-a", None),
    "all namespaces are": (lending("*"), s3(), "team-a", None),
    "another namespace is": (lending("team-b"), s3(), "team-a", "for objects of namespace team-a"),
    "no namespace is": (lending(), s3(), "team-a", "ask its owner to add the role to allowedRoles"),
    "no namespace is, in the cache's own": (lending(), s3(), "serving", None),
    "a role that is not listed": (lending("*"), s3(OTHER_ROLE), "team-a", f"assume role {OTHER_ROLE}"),
    "a role whose name begins with a listed one": (lending("*"), s3(f"{ROLE}2"), "serving", "allowedRoles"),
    "no role": (lending(), s3(None), "team-a", None),
    "no network": (make_cache(offline=True), s3(), "team-a", None),
}


@pytest.mark.parametrize("case", ASKED)
def test_for_whom_a_role_is_assumed(case: str) -> None:
    cache, source, namespace, words = ASKED[case]
    found = source_refused(source, cache, namespace=namespace)
    assert (found is None) == (words is None), found
    if found is not None:
        assert (found.reason, str(words) in found.message) == ("SourceNotAllowed", True), found.message


def want(source: Source, cache: ModelCache, credentials: Credentials | None = CREDENTIALS) -> ModelArtifact:
    manifest = build_artifact(cache=cache, source=source, base_artifact=None, credentials=credentials)
    return ModelArtifact.model_validate(manifest)


def test_a_role_is_no_part_of_the_content_and_part_of_who_reads_it() -> None:
    cache = make_cache()
    sources = [s3(None), s3(), s3(OTHER_ROLE), s3(external="four-two"), s3(external="four-three")]
    assert len({source.anonymous() for source in sources}) == 1
    wants = [want(source, cache) for source in sources]
    assert len({found.metadata.name for found in wants}) == len(wants), "each is authorised by itself"
    assert len({found.spec.source for found in wants}) == 1
    assert [found.spec.role for found in wants] == [source.role for source in sources]
    offline = make_cache(offline=True)
    assert len({want(source, offline, None).metadata.name for source in sources}) == 1


def test_a_want_without_a_role_has_the_name_that_it_had_before_there_were_roles() -> None:
    assert want(s3(None), make_cache()).metadata.name == "sql-05183216a6def35e4b47"


def told(artifact: ModelArtifact, cache: ModelCache) -> RoleRequest | None:
    request = build_request(artifact, cache, base_model_path=None, with_credentials=True)
    assert isinstance(request.source, S3Request)
    return request.source.role


def test_what_a_job_is_told_of_its_role() -> None:
    cache = make_cache()
    artifact = want(s3(external="four-two"), cache)
    assert told(artifact, cache) == RoleRequest(
        arn=ROLE, external_id="four-two", session_name=f"team-a@{artifact.metadata.name}", sts_endpoint=None
    )
    assert told(want(s3(None), cache), cache) is None
    by_service_account = told(want(s3(), lending("*"), None), lending("*"))
    assert by_service_account is not None
    assert by_service_account.session_name.startswith("serving@"), "whose the identity is"
    by_hand = make_artifact("mine", s3={"bucket": "models", "assumeRole": {"arn": ROLE}}, secret="keys")
    assert told(by_hand, cache) == RoleRequest(arn=ROLE, session_name="serving@mine")
    assert told(by_hand, make_cache(offline=True)) is None


def test_the_token_service_of_an_endpoint_is_the_endpoint_or_what_the_cache_says() -> None:
    entry = {"s3Endpoint": "https://ceph.test", "address": "https://sts.ceph.test"}
    cache = make_cache(s3={"allowedEndpoints": ["https://ceph.test", "https://minio.test"], "stsEndpoints": [entry]})
    addresses = {}
    for endpoint in ("https://ceph.test", "https://minio.test", None):
        role = told(want(s3(**({"endpoint": endpoint} if endpoint else {})), cache), cache)
        assert role is not None
        addresses[endpoint] = role.sts_endpoint
    assert addresses == {
        "https://ceph.test": "https://sts.ceph.test",
        "https://minio.test": "https://minio.test",
        None: None,
    }


def observed(artifact: ModelArtifact, cache: ModelCache) -> ArtifactObservation:
    return ArtifactObservation(artifact, cache, base=None, wanted=True, secret=None, jobs=(), progress=None)


def test_no_job_is_made_for_a_role_that_nobody_may_assume() -> None:
    """Also not for an artifact that somebody wrote who may: the cache's owner may have changed the list since."""
    lent = lending("*", conditions=ready())
    for artifact in (
        want(s3(), lent, None),
        make_artifact(s3={"bucket": "models", "assumeRole": {"arn": ROLE}}, type="BaseModel"),
    ):
        assert plan_artifact(observed(artifact, lent), now=NOW).start == 1
        plan = plan_artifact(observed(artifact, make_cache(conditions=ready())), now=NOW)
        assert plan.start is None
        assert plan.status is not None
        (condition,) = [one for one in plan.status.conditions if one.type == "Ready"]
        assert (condition.reason, ROLE in condition.message) == ("SourceNotAllowed", True)
    own = want(s3(), lent)  # with a Secret that an adapter lends
    assert plan_artifact(observed(own, make_cache(conditions=ready())), now=NOW).start == 1


@given(
    st.from_regex(r"\A[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?\Z"), st.from_regex(r"\A[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?\Z")
)
def test_a_sessions_name_is_one_that_aws_takes(namespace: str, artifact: str) -> None:
    assert re.fullmatch(r"[\w+=,.@-]{2,64}", session_name(namespace, artifact), re.ASCII)


def test_a_sessions_name_tells_whose_it_is() -> None:
    assert session_name("team-a", "sql-0123") == "team-a@sql-0123"
    long = session_name("a" * 60, "sql-0123")
    assert long.startswith("aaa")
    assert long.endswith("@sql-0123")


ADDRESSES: dict[str, tuple[dict[str, Any], str, str]] = {
    "AWS by default": ({}, "https://sts.us-east-1.amazonaws.com/", "AWS STS in us-east-1"),
    "AWS in the source's region": (
        {"region": "eu-central-1"},
        "https://sts.eu-central-1.amazonaws.com/",
        "AWS STS in eu-central-1",
    ),
    "AWS in China": ({"region": "cn-north-1"}, "https://sts.cn-north-1.amazonaws.com.cn/", "AWS STS in cn-north-1"),
    "another service": (
        {"endpoint": "https://s3.test", "sts": "https://sts.test:8443"},
        "https://sts.test:8443/",
        "STS at https://sts.test:8443",
    ),
}


@pytest.mark.parametrize("case", ADDRESSES)
def test_which_token_service_is_asked_and_nobody_else(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing answers here; what the library would have sent is looked at."""
    more, address, named = ADDRESSES[case]
    sent: list[AWSPreparedRequest] = []

    def send(self: URLLib3Session, request: AWSPreparedRequest) -> None:
        sent.append(request)
        raise EndpointConnectionError(endpoint_url=request.url)

    monkeypatch.setattr(URLLib3Session, "send", send)
    monkeypatch.setattr("time.sleep", lambda _: None)
    role = RoleRequest(arn=ROLE, session_name="team-a@sql", external_id="four-two", sts_endpoint=more.get("sts"))
    request = S3Request(bucket="models", endpoint=more.get("endpoint"), region=more.get("region"), role=role)
    subject = S3Subject.of(request, authenticated=True)
    client = build_client(request, S3Keys("AKIDOFTESTS", "secret-of-tests", "session-of-tests"), subject)
    with pytest.raises(ReasonError) as raised:
        S3Source(request, client, subject).authorise()
    assert raised.value.reason == "SourceUnreachable"
    assert raised.value.message.startswith(f"{named}, asked for role {ROLE}: EndpointConnectionError")
    assert {one.url for one in sent} == {address}
    for one in sent:
        assert str(one.headers["Authorization"]).find("Credential=AKIDOFTESTS/") > 0
        assert "RoleSessionName=team-a%40sql" in str(one.body)
        assert "secret-of-tests" not in f"{dict(one.headers.items())} {one.body!r}"
