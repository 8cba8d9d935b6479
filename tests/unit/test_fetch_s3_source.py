"""The S3 client as it is built, without a service: where requests go, what they are signed with, and what errors become."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from botocore import exceptions as boto
from botocore.awsrequest import AWSRequest, AWSResponse
from botocore.compat import HTTPHeaders
from hypothesis import given
from hypothesis import strategies as st

from lora_operator.constants import Reason
from lora_operator.fetch.content.select import RemoteFile
from lora_operator.fetch.sources.object_place import ObjectPlace, blob_name
from lora_operator.fetch.sources.object_store import revision_of
from lora_operator.fetch.sources.s3.errors import S3Subject, translate
from lora_operator.fetch.sources.s3.source import S3Keys, build_client
from lora_operator.wire.jobs import S3Request

KEYS = S3Keys("AKIDOFTESTS", "secret-of-tests", "session-of-tests")
LISTING = b'<?xml version="1.0"?><ListBucketResult><Name>models</Name></ListBucketResult>'


class _Raw:
    def stream(self, **_: Any) -> Any:
        yield LISTING


def sent(request: S3Request, keys: S3Keys | None) -> AWSRequest:
    """The request that a listing leads to; it is answered here and goes nowhere."""
    client = build_client(request, keys, S3Subject.of(request, authenticated=keys is not None))
    seen: list[AWSRequest] = []

    def answer(request: AWSRequest, **_: Any) -> Any:
        seen.append(request)
        return AWSResponse(str(request.url), 200, HTTPHeaders(), _Raw())

    client.meta.events.register("before-send.s3", answer)
    client.list_objects_v2(Bucket=request.bucket, Prefix="team-a/")
    return seen[0]


ADDRESSES = {
    "AWS by default": (S3Request(bucket="models"), "https://models.s3.amazonaws.com/?"),
    "AWS in a region": (
        S3Request(bucket="models", region="eu-central-1"),
        "https://models.s3.eu-central-1.amazonaws.com/?",
    ),
    "an endpoint, with the bucket in the path": (
        S3Request(bucket="models", endpoint="http://s3.test:9000"),
        "http://s3.test:9000/models?",
    ),
}


@pytest.mark.parametrize("keys", [None, KEYS], ids=["anonymous", "with keys"])
@pytest.mark.parametrize("case", ADDRESSES)
def test_where_requests_go_and_who_signs_them(
    case: str, keys: S3Keys | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ambient = {
        "AWS_ACCESS_KEY_ID": "AKAMBIENT",
        "AWS_SECRET_ACCESS_KEY": "ambient",
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
        "AWS_CONFIG_FILE": os.devnull,
    }
    for name, value in ambient.items():
        monkeypatch.setenv(name, value)
    request, address = ADDRESSES[case]
    found = sent(request, keys)
    assert str(found.url).startswith(address)
    signature = str(found.headers.get("Authorization", b""))
    assert ("Credential=AKIDOFTESTS/" in signature) == (keys is not None)
    assert "AKAMBIENT" not in str(dict(found.headers.items()))
    assert ("X-Amz-Security-Token" in found.headers) == (keys is not None)


SUBJECT = S3Subject.of(S3Request(bucket="models", prefix="sql"), authenticated=True)
FOREIGN: dict[str, tuple[Exception, Reason, str]] = {
    "a time-out": (
        boto.ReadTimeoutError(endpoint_url="https://x"),
        Reason.SOURCE_UNREACHABLE,
        "AWS S3 in us-east-1: ReadTimeoutError",
    ),
    "a connection": (boto.ConnectionClosedError(endpoint_url="https://x"), Reason.SOURCE_UNREACHABLE, "Closed"),
    "a certificate": (
        boto.SSLError(endpoint_url="https://x", error=OSError("self-signed")),
        Reason.SOURCE_UNREACHABLE,
        "certificate is not accepted",
    ),
    "half an answer": (
        boto.IncompleteReadError(actual_bytes=1, expected_bytes=2),
        Reason.SOURCE_UNREACHABLE,
        "IncompleteReadError",
    ),
    "a checksum": (boto.FlexibleChecksumError(error_msg="crc32"), Reason.CHECKSUM_MISMATCH, "crc32"),
    "a full volume": (OSError(28, "No space left on device"), Reason.INSUFFICIENT_SPACE, "volume"),
    "what nobody knows": (RuntimeError("odd"), Reason.JOB_FAILED, "RuntimeError: odd"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_foreign_errors_have_reasons(case: str) -> None:
    error, reason, words = FOREIGN[case]
    found = translate(error, SUBJECT)
    assert (found.reason, words in found.message) == (reason, True), found.message


def answered(code: str, status: int) -> boto.ClientError:
    response: Any = {"Error": {"Code": code, "Message": "said"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return boto.ClientError(response, "GetObject")


CODES = {
    ("AccessDenied", 403): Reason.UNAUTHORIZED,
    ("InvalidAccessKeyId", 403): Reason.UNAUTHORIZED,
    ("SignatureDoesNotMatch", 403): Reason.UNAUTHORIZED,
    ("ExpiredToken", 400): Reason.UNAUTHORIZED,
    ("RequestTimeTooSkewed", 403): Reason.SOURCE_UNREACHABLE,
    ("NoSuchBucket", 404): Reason.REPOSITORY_NOT_FOUND,
    ("PermanentRedirect", 301): Reason.REPOSITORY_NOT_FOUND,
    ("InvalidObjectState", 403): Reason.ENTRY_NOT_FOUND,
    ("NoSuchKey", 404): Reason.SOURCE_CHANGED,
    ("PreconditionFailed", 412): Reason.SOURCE_CHANGED,
    ("InvalidRange", 416): Reason.SOURCE_CHANGED,
    ("SlowDown", 503): Reason.RATE_LIMITED,
    ("429", 429): Reason.RATE_LIMITED,
    ("ServiceUnavailable", 503): Reason.SOURCE_UNREACHABLE,
    ("Odd", 418): Reason.SOURCE_UNREACHABLE,
}


@pytest.mark.parametrize(("code", "status"), CODES)
def test_answers_have_reasons(code: str, status: int) -> None:
    found = translate(answered(code, status), SUBJECT)
    assert found.reason is CODES[(code, status)]
    assert f"({code}: said)" in found.message


def file(path: str, etag: str, size: int) -> RemoteFile:
    return RemoteFile(path=path, size=size, version=etag)


def test_the_revision_does_not_depend_on_the_order_and_depends_on_everything_else() -> None:
    one, two = file("a", '"1"', 1), file("b", '"2"', 2)
    first = revision_of([one, two])
    assert first == revision_of([two, one])
    assert len(first) == 64
    others = [[one], [one, file("b", '"2"', 3)], [one, file("b", '"3"', 2)], [one, file("c", '"2"', 2)]]
    assert len({first, *map(revision_of, others)}) == 5


@given(st.text(), st.text(), st.integers(min_value=0))
def test_no_key_whatever_leaves_the_store(key: str, etag: str, size: int) -> None:
    name = blob_name(key, etag, size)
    assert Path(name).name == name
    assert not name.startswith(".")


def place_of(root: Path, *, endpoint: str, bucket: str) -> ObjectPlace:
    return ObjectPlace.of(root, "s3", name=bucket, identity=(endpoint, bucket))


def test_a_bucket_of_another_endpoint_is_another_place(tmp_path: Path) -> None:
    places = {
        place_of(tmp_path, endpoint=endpoint, bucket=bucket).folder
        for endpoint in ("aws", "https://a.test")
        for bucket in ("models", "Models", "../..")
    }
    assert len(places) == 6
    assert all(place.parent == tmp_path / "s3" for place in places)


def test_a_payload_without_its_sum_counts_as_absent(tmp_path: Path) -> None:
    place = place_of(tmp_path, endpoint="aws", bucket="models")
    place.prepare()
    wanted = RemoteFile(path="x", size=3, version='"1"', stored_as=blob_name("x", '"1"', 3))
    place.partial(wanted).write_bytes(b"ab")
    assert (place.has(wanted), place.missing_bytes([wanted])) == (False, 1)
    place.finish(wanted, place.partial(wanted), "0" * 64)
    assert (place.has(wanted), place.missing_bytes([wanted])) == (True, 0)
    assert place.recorded(wanted) == "0" * 64
    place.forget(wanted)
    assert not place.has(wanted)
    assert place.blob(wanted).exists()
