"""The one place where what boto3 raises becomes reasons with a message that says what to do.

Decisions are made on error code and HTTP status, never on message texts. S3 hides what a caller may not see behind AccessDenied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from botocore import exceptions as boto
from botocore.parsers import ResponseParserError
from urllib3.exceptions import HTTPError

from lora_operator.constants import Reason
from lora_operator.errors import ReasonError
from lora_operator.fetch import text
from lora_operator.fetch.sources.errors import Subject, translate_rest
from lora_operator.wire.jobs import S3Request

SERVER_TEXT_BYTES: Final = 300
RATE: Final = ("SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "TooManyRequests", "429")
_CREDENTIALS: Final = (
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "ExpiredToken",
    "InvalidToken",
    "TokenRefreshRequired",
    "InvalidSecurity",
)
_NO_BUCKET: Final = ("NoSuchBucket", "InvalidBucketName", "404")
_REGION: Final = (
    "PermanentRedirect",
    "TemporaryRedirect",
    "AuthorizationHeaderMalformed",
    "InvalidRegion",
    "301",
    "307",
)
_CHANGED: Final = ("PreconditionFailed", "NoSuchKey", "NoSuchVersion", "InvalidRange", "412", "416")
TRANSPORT: Final = (
    boto.HTTPClientError,
    boto.ConnectionError,
    boto.IncompleteReadError,
    boto.ResponseStreamingError,
    HTTPError,
)


@dataclass(frozen=True)
class S3Subject(Subject):
    """A folder of a bucket, and as whom it is read."""

    source: S3Request
    identity: str | None = None  # the service account as which it is read, where no Secret is named

    @classmethod
    def of(cls, source: S3Request, *, authenticated: bool, identity: str | None = None) -> S3Subject:
        """The subject of a request; without an endpoint AWS is named with its region."""
        title = f"s3://{source.bucket}/{source.prefix}".rstrip("/")
        endpoint = source.endpoint or f"AWS S3 in {source.region or 'us-east-1'}"
        return cls(title, endpoint, authenticated, source, identity)

    @property
    def caller(self) -> str:
        """Who asks, or who assumes the role in which is asked."""
        if self.identity is not None:
            return f"the identity of ServiceAccount {self.identity} (the ModelCache's spec.workloadIdentity)"
        return "the keys of the Secret"


def translate(error: Exception, subject: S3Subject) -> ReasonError:
    """The reason behind `error`; JobFailed with the error's own words when none is known."""
    match error:
        case boto.ClientError():
            return _from_answer(error, subject)
        case boto.NoCredentialsError() | boto.CredentialRetrievalError():
            return ReasonError(
                Reason.UNAUTHORIZED,
                text.clean(
                    f"the ServiceAccount {subject.identity} of the ModelCache's spec.workloadIdentity gives this Job no identity at "
                    f"{subject.endpoint}: bind it to a role as the cloud's documentation says, or set awsRoleArn ({error})"
                ),
            )
        case boto.FlexibleChecksumError() | boto.ChecksumError():
            return ReasonError(Reason.CHECKSUM_MISMATCH, text.clean(f"{subject.title}: {error}"))
        case boto.ParamValidationError():
            return ReasonError(
                Reason.REPOSITORY_NOT_FOUND, text.clean(f"{subject.title} is no bucket; correct source.s3: {error}")
            )
        case ResponseParserError():
            return subject.unreachable(f"it does not answer like S3: {error}")
        case boto.SSLError():
            return subject.unreachable(f"its TLS certificate is not accepted: {error}")
        case _ if isinstance(error, TRANSPORT):
            return subject.unreachable(f"{type(error).__name__}: {error}")
    return translate_rest(error, subject.endpoint)


def changed(subject: S3Subject, what: str) -> ReasonError:
    """SourceChanged, with advice for buckets."""
    advice = "replace a prefix's files all at once, or write each version to a prefix of its own"
    return subject.changed(what, advice=advice)


def _from_answer(error: boto.ClientError, subject: S3Subject) -> ReasonError:
    code = str(error.response.get("Error", {}).get("Code", ""))
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    words = text.clean(str(error.response.get("Error", {}).get("Message", "")), limit=SERVER_TEXT_BYTES)
    said = f" ({text.clean(code, limit=64) or status}{': ' + words if words else ''})"
    if code in RATE or status == 429:
        return ReasonError(Reason.RATE_LIMITED, f"{subject.endpoint} asks for fewer requests{said}")
    if status >= 500 or status == 408:
        return subject.unreachable(f"server error {status}{said}")
    if error.operation_name == "AssumeRoleWithWebIdentity":
        return ReasonError(
            Reason.UNAUTHORIZED,
            f"STS takes {subject.caller} for nobody; see that the role of its annotation, or of awsRoleArn, trusts it{said}",
        )
    if code in _CREDENTIALS or status == 401:
        return ReasonError(Reason.UNAUTHORIZED, _refused(subject) + said)
    if code == "RequestTimeTooSkewed":
        return subject.unreachable(f"the clock of this Job's node differs too much from the service's{said}")
    if code in _REGION:
        return ReasonError(
            Reason.REPOSITORY_NOT_FOUND,
            f"bucket {subject.source.bucket} is not in the region of {subject.endpoint}; set source.s3.region{said}",
        )
    if code == "InvalidObjectState":
        return ReasonError(
            Reason.ENTRY_NOT_FOUND, f"an object of {subject.title} is archived; restore it to a readable class{said}"
        )
    if status == 403:
        return ReasonError(Reason.UNAUTHORIZED, _denied(subject) + said)
    if code in _CHANGED:
        return changed(subject, f"an object is not the one that was listed{said}")
    if code in _NO_BUCKET or status == 404:
        return ReasonError(
            Reason.REPOSITORY_NOT_FOUND,
            f"bucket {subject.source.bucket} does not exist at {subject.endpoint}; correct source.s3{said}",
        )
    return subject.unreachable(f"unexpected answer {status}{said}")


def _refused(subject: S3Subject) -> str:
    if (role := subject.source.role) is not None:
        return (
            f"{subject.endpoint} refuses the temporary keys of role {role.arn} for {subject.title}; "
            "see that they are from the STS that belongs to it"
        )
    if subject.identity is not None:
        return f"{subject.endpoint} refuses {subject.caller} for {subject.title}; check its role and who may take it on"
    if not subject.authenticated:
        return f"{subject.title} at {subject.endpoint} refuses anonymous clients; set source.s3.credentialsSecretRef"
    return f"{subject.endpoint} refuses {subject.caller} for {subject.title}; put valid ones into it"


def _denied(subject: S3Subject) -> str:
    if (role := subject.source.role) is not None:
        return (
            f"{subject.title} at {subject.endpoint} is denied to role {role.arn}; allow it s3:ListBucket on the bucket and "
            "s3:GetObject below the prefix, or correct bucket and prefix"
        )
    if subject.identity is not None:
        return (
            f"{subject.title} at {subject.endpoint} is denied to {subject.caller}; allow its role s3:ListBucket on the bucket and "
            "s3:GetObject below the prefix, and to be taken on by it"
        )
    if not subject.authenticated:
        return (
            f"{subject.title} at {subject.endpoint} can't be read anonymously; "
            "set source.s3.credentialsSecretRef, or correct bucket and prefix"
        )
    return (
        f"{subject.title} at {subject.endpoint} is denied to {subject.caller}; allow them s3:ListBucket on the bucket and "
        "s3:GetObject below the prefix, or correct bucket and prefix"
    )
