"""Whether a source is read as the cache's service account: only where its owner allowed that source, and never beside a Secret.

A role is assumed by the source's Secret, and then it is the tenant's affair and the token service's. Where the service account assumes
it, tenants could have it assume any role that trusts it; so the cache's owner lists the roles, and for whom.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

from lora_operator.api.cache import ModelCache
from lora_operator.api.sources.s3 import AssumeRole
from lora_operator.api.sources.source import Source
from lora_operator.constants import Reason
from lora_operator.errors import ReasonError


def workload_identity(source: Source, cache: ModelCache, *, with_credentials: bool) -> str | None:
    """The service account that a Job for the source runs as; None where access is by Secret, or anonymous."""
    identity = cache.spec.workload_identity
    address = _address(source)
    if identity is None or with_credentials or address is None or cache.spec.offline:
        return None
    # A source is a folder: s3://bucket/folder/* allows the folder itself, too.
    forms = (address, f"{address}/")
    allowed = any(fnmatchcase(form, pattern) for pattern in identity.allowed_sources for form in forms)
    return identity.service_account_name if allowed else None


def role_refused(
    role: AssumeRole | None, source: Source, cache: ModelCache, *, namespace: str, with_credentials: bool
) -> ReasonError | None:
    """SourceNotAllowed where nobody may assume the role for an object in `namespace`."""
    if role is None or with_credentials or cache.spec.offline:
        return None
    place = f"ModelCache {cache.metadata.namespace}/{cache.metadata.name}"
    identity = cache.spec.workload_identity
    if identity is None or workload_identity(source, cache, with_credentials=False) is None:
        return ReasonError(
            Reason.SOURCE_NOT_ALLOWED,
            f"nobody may assume role {role.arn}: {source.member.title} names no Secret, and {place} does not allow it to its "
            "spec.workloadIdentity; set source.s3.credentialsSecretRef, or ask its owner to add the source to allowedSources and the role "
            "to allowedRoles there",
        )
    asker = None if namespace == cache.metadata.namespace else namespace
    if any(entry.admits(role.arn, asker) for entry in identity.allowed_roles):
        return None
    return ReasonError(
        Reason.SOURCE_NOT_ALLOWED,
        f"{place} does not have its spec.workloadIdentity assume role {role.arn} for objects of namespace {namespace}: set "
        "source.s3.credentialsSecretRef, or ask its owner to add the role to allowedRoles there",
    )


def _address(source: Source) -> str | None:
    """What allowedSources are compared with: another endpoint is another address, so nothing of AWS goes there unasked."""
    if source.s3 is None:
        return None
    s3 = source.s3
    bucket = f"{s3.endpoint.rstrip('/')}/{s3.bucket}" if s3.endpoint else f"s3://{s3.bucket}"
    return f"{bucket}/{s3.prefix.strip('/')}".rstrip("/")
