"""Roles of AWS's kind: a token service hands out temporary keys for one, and new ones before these expire.

Asking, keeping and renewing are botocore's. This says who asks, which service, and what its errors mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

from botocore import exceptions as boto
from botocore.config import Config
from botocore.credentials import (
    AssumeRoleCredentialFetcher,
    CredentialProvider,
    CredentialResolver,
    Credentials,
    DeferredRefreshableCredentials,
)
from botocore.parsers import ResponseParserError
from botocore.session import Session

from lora_operator.constants import Reason
from lora_operator.errors import ReasonError
from lora_operator.fetch import text
from lora_operator.fetch.sources.s3.errors import RATE, SERVER_TEXT_BYTES, TRANSPORT, S3Subject, translate
from lora_operator.wire.jobs import RoleRequest

_KEYS: Final = (
    "ExpiredToken",
    "ExpiredTokenException",
    "IncompleteSignature",
    "InvalidAccessKeyId",
    "InvalidClientTokenId",
    "InvalidToken",
    "MissingAuthenticationToken",
    "SignatureDoesNotMatch",
)
_CLOCK: Final = ("RequestExpired", "RequestTimeTooSkewed")
_INVALID: Final = ("InvalidParameterValue", "ValidationError")


@dataclass
class AssumedRole(CredentialProvider):
    """The keys of a role as the one thing that a client finds; `sources` are where who assumes it is found, nothing ambient."""

    METHOD = "assume-role"

    session: Session
    role: RoleRequest
    region: str
    sources: Sequence[CredentialProvider]
    config: Config
    subject: S3Subject

    def load(self) -> DeferredRefreshableCredentials:
        """Keys that are asked for when the first request is signed."""
        return DeferredRefreshableCredentials(refresh_using=self._refresh, method=self.METHOD)

    def _refresh(self) -> dict[str, Any]:
        try:
            found: dict[str, Any] = self._fetcher.fetch_credentials()
        except Exception as error:
            raise translate_role(error, self.subject) from error
        for name in ("secret_key", "token"):
            text.protect(found[name] or "")
        return found

    @cached_property
    def _fetcher(self) -> AssumeRoleCredentialFetcher:
        source = CredentialResolver(providers=list(self.sources)).load_credentials()
        if source is None:
            raise boto.NoCredentialsError
        more = {"RoleSessionName": self.role.session_name}
        if self.role.external_id is not None:
            text.protect(self.role.external_id)
            more["ExternalId"] = self.role.external_id
        return AssumeRoleCredentialFetcher(self._client, source, self.role.arn, extra_args=more)

    def _client(self, service: str, **keys: Any) -> Any:
        return self.session.create_client(
            service, region_name=self.region, endpoint_url=self.role.sts_endpoint, config=self.config, **keys
        )


class Fixed(CredentialProvider):
    """The keys of a Secret as a provider."""

    METHOD = "fixed"

    def __init__(self, access_key: str, secret_key: str, token: str | None) -> None:
        super().__init__()
        self._keys = Credentials(access_key, secret_key, token, method=self.METHOD)

    def load(self) -> Credentials:
        return self._keys


def translate_role(error: Exception, subject: S3Subject) -> ReasonError:
    """The reason why a role could not be assumed; decided on code and status, never on texts."""
    match error:
        case boto.ClientError() if error.operation_name == "AssumeRole":
            return _from_answer(error, subject)
        case boto.ParamValidationError():
            return ReasonError(Reason.UNAUTHORIZED, text.clean(f"{_asked(subject)}: {error}; correct it"))
        case boto.SSLError():
            return _unreachable(subject, f"its TLS certificate is not accepted: {error}")
        case _ if isinstance(error, TRANSPORT):
            return _unreachable(subject, f"{type(error).__name__}: {error}")
        case ResponseParserError() | KeyError() | TypeError() | ValueError():
            return _unreachable(subject, f"it does not answer like STS ({type(error).__name__})", elsewhere=True)
    return translate(error, subject)  # who assumes it could not be found


def _from_answer(error: boto.ClientError, subject: S3Subject) -> ReasonError:
    answer: Mapping[str, Any] = error.response
    found: Mapping[str, Any] = answer.get("Error", {})
    if "Code" not in found or found["Code"] == "Unknown":  # as S3 answers, not as STS does
        found = answer
    code = str(found.get("Code", ""))
    status = int(answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    words = text.clean(str(found.get("Message", "")), limit=SERVER_TEXT_BYTES)
    said = f" ({text.clean(code, limit=64) or status}{': ' + words if words else ''})"
    if code in RATE or status == 429:
        return ReasonError(
            Reason.RATE_LIMITED, f"{_service(subject)}, asked for {_asked(subject)}, wants fewer requests{said}"
        )
    if (status >= 500 and status != 501) or status == 408:
        return _unreachable(subject, f"server error {status}{said}")
    if code in _CLOCK:
        return _unreachable(subject, f"the clock of this Job's node differs too much from the service's{said}")
    if code in _KEYS:
        return ReasonError(
            Reason.UNAUTHORIZED,
            f"{_service(subject)} refuses {subject.caller} for {_asked(subject)}; {_renew(subject)}{said}",
        )
    if code == "RegionDisabledException":
        return ReasonError(
            Reason.UNAUTHORIZED,
            f"{_service(subject)} is not active for the account of {_asked(subject)}; activate it, or set source.s3.region{said}",
        )
    if code in _INVALID:
        return ReasonError(
            Reason.UNAUTHORIZED,
            f"{_service(subject)} takes {_asked(subject)} for none; correct source.s3.assumeRole{said}",
        )
    if status in (401, 403):
        return ReasonError(
            Reason.UNAUTHORIZED,
            f"{_service(subject)} does not let {subject.caller} assume {_asked(subject)}; allow them sts:AssumeRole on the role, and name them "
            f"in the role's trust policy, with the externalId that source.s3.assumeRole has, if any{said}",
        )
    return _unreachable(subject, f"unexpected answer {status}{said}", elsewhere=True)


def _asked(subject: S3Subject) -> str:
    return f"role {subject.source.role.arn}" if subject.source.role else "a role"


def _service(subject: S3Subject) -> str:
    role, source = subject.source.role, subject.source
    return f"STS at {role.sts_endpoint}" if role and role.sts_endpoint else f"AWS STS in {source.region or 'us-east-1'}"


def _renew(subject: S3Subject) -> str:
    return "put valid ones into it" if subject.identity is None else "check its role and who may take it on"


def _unreachable(subject: S3Subject, why: str, *, elsewhere: bool = False) -> ReasonError:
    hint = "; where its STS is elsewhere, the ModelCache's spec.s3.stsEndpoints says where" if elsewhere else ""
    return ReasonError(
        Reason.SOURCE_UNREACHABLE, text.clean(f"{_service(subject)}, asked for {_asked(subject)}: {why}{hint}")
    )
